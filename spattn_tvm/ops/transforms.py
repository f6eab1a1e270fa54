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

from spattn_tvm.torch_private import is_functionalized

from .operators import (
    BACKWARD,
    FORWARD,
    LIBRARY,
    SAME_ROWS,
    Places,
    Settings,
    differentiate,
    refuse_forward_mode,
    refuse_second_derivative,
    save,
)

Outputs = tuple[Tensor, ...]

# Elements of a call's largest tensor: 64 MiB in float32.
_MOST_ELEMENTS = 2**24
# q, k, v; do, dlse, q, k, v, o, lse. The boundaries of packed documents follow, which a batch shares, what
# each batch row has of its own, then the settings.
_FORWARD_TENSORS, _BACKWARD_TENSORS = 3, 7
_BOUNDARIES, _PLACES = 2, len(SAME_ROWS)


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
    shared, by_row = num_tensors + _BOUNDARIES, num_tensors + _PLACES
    pairs = list(zip(inputs, in_dims, strict=True))
    mapped_pairs = pairs[:num_tensors] + pairs[shared:by_row]
    tensors = [tensor if dim is None else tensor.movedim(dim, 0) for tensor, dim in mapped_pairs]
    is_mapped = [dim is not None for _, dim in mapped_pairs]
    boundaries = pairs[num_tensors:shared]
    settings = inputs[by_row:]

    sizes = [
        tensor.numel() // (max(size, 1) if mapped else 1)
        for tensor, mapped in zip(tensors, is_mapped, strict=True)
        if tensor is not None
    ]
    at_once = max(1, _MOST_ELEMENTS // max(1, *sizes)) if all(dim is None for _, dim in boundaries) else 1

    def fold(tensor: Tensor | None, mapped: bool, begin: int, count: int) -> Tensor | None:
        if tensor is None:
            return None
        part = tensor[begin : begin + count] if mapped else tensor.expand(count, *tensor.shape)
        return part.flatten(0, 1)

    rows = tensors[0].shape[1 if is_mapped[0] else 0]
    parts = []
    for begin in range(0, max(size, 1), at_once):
        count = min(at_once, size - begin)
        folded = [fold(*each, begin, count) for each in zip(tensors, is_mapped, strict=True)]
        # No element has boundaries, and an empty batch reads none.
        own = [t if dim is None else t.select(dim, begin) if count else None for t, dim in boundaries]
        outputs = attend(*folded[:num_tensors], *own, *folded[num_tensors:], *settings)
        parts.append([output.unflatten(0, (count, rows)) for output in outputs])
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
        *others: Any,
    ) -> Outputs:
        return FORWARD(q, k, v, *others)

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
    q: Tensor, k: Tensor, v: Tensor, places: Places, settings: Settings
) -> tuple[Tensor, Tensor]:
    """``banded_attention_forward`` under functional transforms of which one differentiates; unchecked."""
    if is_functionalized():
        raise NotImplementedError(
            "banded_attention has no derivative inside of torch.func.functionalize, which takes no custom "
            "functions: leave it out, or functionalize the graph that make_fx makes of the derivative"
        )
    return _Attention.apply(q, k, v, *places, *settings)
