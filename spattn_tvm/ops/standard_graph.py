"""Banded attention in PyTorch's standard operators, for graphs that hold no others: those of ONNX."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from spattn_tvm.bands import LIMIT, BandLayout
from spattn_tvm.reference import attend_masked

from .operators import Places

# PyTorch imports it when it begins to write ONNX, and with it a few hundred other modules.
_EXPORTER = "torch.onnx._internal.exporter"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def writes_standard_graph() -> bool:
    """Whether ``torch.onnx.export`` is at work."""
    return _EXPORTER in sys.modules and torch.onnx.is_in_onnx_export()


def attend_by_standard_operators(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    layout: BandLayout,
    scale: float,
    offset: Any = None,
) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` of queries and keys that are the same rows, from the definition, with a dense mask.

    Parameters
    ----------
    q, k, v : Tensor
        ``(B, Hq, N, D)`` and ``(B, Hk, N, D)``; N may be dynamic where the layout has a context length.
    places, layout, scale, offset
        As the operator takes them.

    Raises
    ------
    ValueError
        For packed documents or rows with places of their own, or a dynamic length with a layout whose bands
        follow it.
    """
    length = q.shape[2]
    if any(place is not None for place in (*places, offset)):
        raise ValueError(
            "an ONNX graph takes neither packed documents nor padding, offsets or caches: give it whole "
            "sequences alone"
        )
    if layout.is_autoregressive:
        length_of_bands = LIMIT
    elif isinstance(length, int):
        length_of_bands = length
    else:
        raise ValueError(
            f"the bands of {layout.spec} follow the length, which is dynamic in this ONNX graph: give the "
            "layout its context length, or export one length"
        )
    near_lo, near_hi, far_lo, far_hi = (
        column[:, None, None]
        for column in torch.tensor(layout.table(length_of_bands), device=q.device).unbind(1)
    )
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position
    near = (distance >= near_lo) & (distance <= near_hi)
    mask = near | ((distance >= far_lo) & (distance <= far_hi))
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (tensor.to(dtype)[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for tensor in (k, v))
    o, lse = attend_masked(q.to(dtype), k, v, mask, scale)
    return o.to(q.dtype), lse
