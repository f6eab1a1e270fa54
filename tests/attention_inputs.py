"""Inputs of attention, and the comparison of a route with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spattn_tvm.bands import BandLayout
from spattn_tvm.reference import reference_attention

SPATTENTION = BandLayout.spattention(4)
LAYOUTS = [
    BandLayout.spattention(4),
    BandLayout.exclusive(4),
    BandLayout.gapped(4, 11),
    BandLayout.equal_area(4),
    BandLayout.sliding_window(4, 3),
    BandLayout.custom([[(0, 2), (5, 6)], [], [(7, 40)], [(1, 1)]]),
]


def draw(
    *, heads: int = 4, kv_heads: int = 2, length: int = 37, head_dim: int = 32, batch: int = 2, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh q, k, v in (B, N, H, D) memory order."""
    q, k, v = (
        torch.randn(batch, length, count, head_dim, **options).transpose(1, 2).detach()
        for count in (heads, kv_heads, kv_heads)
    )
    return q, k, v


def draw_cuda(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return draw(**{"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, **options})


def requiring_grad(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def close_to_reference(
    attention: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BandLayout = SPATTENTION,
    tolerance: float = 3e-5,
    **options: Any,
) -> None:
    """Compare o, lse and the gradients of both with the float64 reference."""
    ours = requiring_grad(q, k, v)
    theirs = requiring_grad(q.double(), k.double(), v.double())
    o, lse = attention(*ours)
    expected_o, expected_lse = reference_attention(*theirs, layout, **options)
    torch.testing.assert_close(o.double(), expected_o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    gradients = torch.autograd.grad((o, lse), ours, (do, dlse))
    expected = torch.autograd.grad((expected_o, expected_lse), theirs, (do.double(), dlse.double()))
    for gradient, wanted, tensor in zip(gradients, expected, (q, k, v), strict=True):
        assert gradient.dtype == tensor.dtype
        torch.testing.assert_close(gradient.double(), wanted, rtol=5 * tolerance, atol=5 * tolerance)


class Recorder(TorchDispatchMode):
    """The operators that a dispatch mode sees, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionRecorder(TorchFunctionMode):
    """The functions that a function mode sees, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
