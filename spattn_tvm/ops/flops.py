"""What ``torch.utils.flop_counter.FlopCounterMode`` counts: the attended pairs, as AttentionProblem does."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from spattn_tvm.bands import BandLayout

from .operators import BACKWARD, FORWARD


def _document_lengths(layout: BandLayout, length: int, cu_seqlens: Tensor | None) -> list[int]:
    """Lengths of the documents; where boundaries have no values, those that attend to the most pairs."""
    if cu_seqlens is None:
        return [length]
    has_values = type(cu_seqlens) is Tensor and not cu_seqlens.is_meta
    if has_values and not (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        offsets = [min(max(offset, 0), length) for offset in cu_seqlens.tolist()]
        return [end - begin for begin, end in pairwise(offsets) if end > begin]
    longest = min(length, layout.context_length or length)
    return [longest] * (length // longest) + [length % longest] * (length % longest > 0)


def _count(direction: str, q: Tensor, cu_seqlens: Tensor | None, spec: str) -> int:
    batch, _, length, head_dim = map(int, q.shape)
    layout = BandLayout.from_spec(spec)
    if layout.context_length is not None:
        # Nobody compared documents on a GPU with it, and a counter is not the place to refuse them.
        layout = replace(layout, allow_longer=True)
    lengths = _document_lengths(layout, length, cu_seqlens)
    return batch * sum(layout.useful_flops(length, head_dim, direction) for length in lengths)


@register_flop_formula(FORWARD.overloadpacket, get_raw=True)
def count_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, layout: str, *rest: Any, **_: Any
) -> int:
    """Useful floating-point operations of ``banded_attention_forward``: ``4*D`` an attended pair.

    Boundaries of packed documents are read, which waits for the GPU there, as PyTorch's own formulas do.
    Where they have no values (fake and meta tensors) or can't be waited for (while a CUDA graph is captured)
    the sequence is counted as one document, or as several of the layout's context length: an upper bound.
    """
    return _count("forward", q, cu_seqlens, layout)


@register_flop_formula(BACKWARD.overloadpacket, get_raw=True)
def count_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    layout: str,
    *rest: Any,
    **_: Any,
) -> int:
    """Useful floating-point operations of ``banded_attention_backward``: ``10*D`` an attended pair."""
    return _count("backward", q, cu_seqlens, layout)
