"""The operators inside of ``vmap``, ``grad`` and the other transforms of ``torch.func``.

The elements of a mapped dimension become part of the batch, many at a time. What they share, such as q, k
and v under a batch of gradients, is copied for each of them, so only as many are taken at once as fit into a
bounded copy.

``torch.compile`` of a function that calls ``torch.func.grad`` inside is beyond this: it looks into
``_Attention``, sees the operator and refuses it. It compiles ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .operators import (
    BACKWARD,
    FORWARD,
    LIBRARY,
    Settings,
    differentiate,
    refuse_forward_mode,
    refuse_second_derivative,
    save,
)

Outputs = tuple[Tensor, ...]

# Elements of a call's largest tensor: 64 MiB in float32.
_MOST_ELEMENTS = 2**24
# q, k, v; do, dlse, q, k, v, o, lse. The boundaries of packed documents follow, then the settings.
_FORWARD_TENSORS, _BACKWARD_TENSORS = 3, 7


def _map(
    attend: Callable[..., Outputs],
    num_tensors: int,
    info: Any,
    in_dims: tuple[int | None, ...],
    *inputs: Any,
) -> tuple[Outputs, tuple[int, ...]]:
    """The rule for vmap of an operator: what it returns for each element of the mapped dimension.

    A call has one set of boundaries for its whole batch, so that elements with boundaries of their own take
    a call each.
    """
    size = info.batch_size
    tensors = [
        tensor if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(inputs[:num_tensors], in_dims[:num_tensors], strict=True)
    ]
    is_mapped = [dim is not None for dim in in_dims[:num_tensors]]
    cu_seqlens, cu_seqlens_dim = inputs[num_tensors], in_dims[num_tensors]
    settings = inputs[num_tensors + 1 :]

    sizes = [
        tensor.numel() // (max(size, 1) if mapped else 1)
        for tensor, mapped in zip(tensors, is_mapped, strict=True)
        if tensor is not None
    ]
    at_once = max(1, _MOST_ELEMENTS // max(1, *sizes)) if cu_seqlens_dim is None else 1

    def fold(tensor: Tensor | None, mapped: bool, begin: int, count: int) -> Tensor | None:
        if tensor is None:
            return None
        part = tensor[begin : begin + count] if mapped else tensor.expand(count, *tensor.shape)
        return part.flatten(0, 1)

    parts = []
    for begin in range(0, max(size, 1), at_once):
        count = min(at_once, size - begin)
        folded = [fold(*each, begin, count) for each in zip(tensors, is_mapped, strict=True)]
        boundaries = cu_seqlens if cu_seqlens_dim is None else cu_seqlens.select(cu_seqlens_dim, begin)
        outputs = attend(*folded, boundaries, *settings)
        parts.append([output.unflatten(0, (count, output.shape[0] // max(count, 1))) for output in outputs])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True)), (0,) * len(parts[0])


class _Gradients(torch.autograd.Function):
    """``banded_attention_backward``, transformable."""

    @staticmethod
    def forward(*inputs: Any) -> Outputs:
        return BACKWARD(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _map(_Gradients.apply, _BACKWARD_TENSORS, info, in_dims, *inputs)

    backward = staticmethod(refuse_second_derivative)
    jvp = staticmethod(refuse_forward_mode)


class _Attention(torch.autograd.Function):
    """``banded_attention_forward``, transformable."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        layout: str,
        scale: float,
        deterministic: bool,
        impl: str,
    ) -> Outputs:
        return FORWARD(q, k, v, cu_seqlens, layout, scale, deterministic, impl)

    setup_context = staticmethod(save)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _map(_Attention.apply, _FORWARD_TENSORS, info, in_dims, *inputs)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return differentiate(ctx, do, dlse, _Gradients.apply)

    jvp = staticmethod(refuse_forward_mode)


# For maps alone, and for batches of gradients of eager calls.
for _name, _operator, _tensors in (
    ("forward", FORWARD, _FORWARD_TENSORS),
    ("backward", BACKWARD, _BACKWARD_TENSORS),
):
    torch.library.register_vmap(
        f"spattn_tvm::banded_attention_{_name}", partial(_map, _operator, _tensors), lib=LIBRARY
    )


def attend_transformed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """``banded_attention_forward`` under functional transforms of which one differentiates; unchecked."""
    return _Attention.apply(q, k, v, cu_seqlens, *settings)
