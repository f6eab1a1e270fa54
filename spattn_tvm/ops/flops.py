"""What ``torch.utils.flop_counter.FlopCounterMode`` counts: the attended pairs, as AttentionProblem does."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from spattn_tvm.bands import BandLayout
from spattn_tvm.problem import useful_flops

from .decode_operator import DECODE, DecodeCall
from .operators import BACKWARD, FORWARD, Call

# Queries and keys of a document.
_Document = tuple[int, int]


def _have_values(*tensors: Tensor) -> bool:
    """Whether the values may be read, which waits for a GPU."""
    is_real = all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors)
    return is_real and not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _documents(
    layout: BandLayout, queries: int, keys: int, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[_Document]:
    """The documents; where boundaries have no values, those that attend to the most pairs."""
    if cu_seqlens is None:
        return [(queries, keys)]
    both = (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)
    if _have_values(*both):
        offsets, key_offsets = (
            [min(max(offset, 0), length) for offset in boundaries.tolist()]
            for boundaries, length in zip(both, (queries, keys), strict=True)
        )
        pairs = zip(pairwise(offsets), pairwise(key_offsets), strict=True)
        lengths = [(end - begin, last - first) for (begin, end), (first, last) in pairs]
        return [(rows, others) for rows, others in lengths if rows > 0 and others > 0]
    longest = min(keys, layout.context_length or keys)
    count, rest = divmod(keys, longest)
    if cu_seqlens_k is not None:
        # As many queries as each of them can have.
        return [(min(queries, longest), longest)] * count + [(min(queries, rest), rest)] * (rest > 0)
    return [(longest, longest)] * count + [(rest, rest)] * (rest > 0)


def _layout(spec: str) -> BandLayout:
    layout = BandLayout.from_spec(spec)
    # Nobody compared documents on a GPU with its context, and a counter is not the place to refuse them.
    return layout if layout.context_length is None else replace(layout, allow_longer=True)


def _count(direction: str, q: Tensor, k: Tensor, call: Call) -> int:
    batch, _, length, head_dim = map(int, q.shape)
    keys = int(k.shape[2])
    layout = _layout(call.layout)
    if call.query_offset is not None:
        # Keys behind the queries are seen by none.
        keys = min(keys, max(0, length + int(call.query_offset)))
    documents = _documents(layout, length, keys, call.cu_seqlens, call.cu_seqlens_k)
    return batch * sum(useful_flops(layout, *document, head_dim, direction) for document in documents)


@register_flop_formula(FORWARD.overloadpacket, get_raw=True)
def count_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    """Useful floating-point operations of ``banded_attention_forward``: ``4*D`` an attended pair.

    Boundaries of packed documents are read, which waits for the GPU there, as PyTorch's own formulas do.
    Where they have no values (fake and meta tensors) or can't be waited for (while a CUDA graph is captured)
    the sequence is counted as one document, or as several of the layout's context length: an upper bound.
    What other tensors say of queries and keys is not read: queries count as the last ones of keys that all
    exist.
    """
    return _count("forward", q, k, Call(*rest))


@register_flop_formula(BACKWARD.overloadpacket, get_raw=True)
def count_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *rest: Any,
    **_: Any,
) -> int:
    """Useful floating-point operations of ``banded_attention_backward``: ``10*D`` an attended pair."""
    return _count("backward", q, k, Call(*rest))


@register_flop_formula(DECODE.overloadpacket, get_raw=True)
def count_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **_: Any) -> int:
    """Useful floating-point operations of ``banded_attention_decode``: ``4*D`` an attended pair.

    Lengths and starts are read, which waits for the GPU there. Where they have no values, each batch row
    counts as if its cache were full.
    """
    call = DecodeCall(*rest)
    batch, _heads, queries, head_dim = map(int, q.shape)
    capacity = int(call.places.capacity(k_cache))
    keys = [capacity] * batch
    rows = [row for row in (call.cache_lengths, call.cache_starts) if row is not None]
    if _have_values(*rows):
        ends, *begins = (row.clamp(0, capacity).tolist() for row in rows)
        keys = [end - begin for end, begin in zip(ends, begins[0] if begins else [0] * batch, strict=True)]
    bands = _layout(call.layout)
    return sum(
        useful_flops(bands, min(queries, count), count, head_dim, "decode") for count in keys if count > 0
    )
