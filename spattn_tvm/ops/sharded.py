"""The operators on DTensors: batch and heads may be sharded, each rank calls with its own part of the layout.

Heads of a layout differ, and what a rank gets to see of an operator's arguments is a tensor's shard and the
whole layout's text. So the rank's heads are taken from the layout here, above the operator, rather than by a
sharding strategy that is registered for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spattn_tvm.bands import BandLayout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_BATCH, _HEADS, _ROWS = 0, 1, 2


def is_sharded(*tensors: object) -> bool:
    """Is one of these a DTensor? Without importing what that is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def _refuse_rows(name: str) -> ValueError:
    return ValueError(
        f"the rows of {name} are sharded, and queries need keys of other ranks: use "
        "spattn_tvm.distributed.context_parallel_attention with the local tensors and the mesh dimension of "
        "the sequence, or redistribute"
    )


def _span(size: int, ranks: int, index: int) -> tuple[int, int]:
    """What a rank holds of a dimension, as DTensor cuts it."""
    step = -(-size // ranks)
    return min(index * step, size), min((index + 1) * step, size)


def _own_heads(q: DTensor, placements: list[Any]) -> tuple[int, int]:
    """The query heads of this rank: each mesh dimension cuts what those before it left."""
    coordinate = q.device_mesh.get_coordinate()
    assert coordinate is not None
    begin, end = 0, q.shape[1]
    for axis, placement in enumerate(placements):
        if placement.is_shard(_HEADS):
            first, last = _span(end - begin, q.device_mesh.size(axis), coordinate[axis])
            begin, end = begin + first, begin + last
    return begin, end


def attend_sharded(
    attend: Callable[..., Tensor | tuple[Tensor, Tensor]],
    q: Any,
    k: Any,
    v: Any,
    layout: BandLayout,
    by_row: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> Any:
    """Call `attend` with this rank's batch rows and heads, as q is sharded.

    Parameters
    ----------
    attend : callable
        Takes q, k, v, a layout and the rest by name; returns o, or o and lse.
    q, k, v : DTensor
        On one mesh. k and v are redistributed to fit q. Where q's heads are sharded, so are theirs; if there
        are fewer of them than ranks, each rank takes those that its query heads read from all.
    layout : BandLayout
        Of all heads.
    by_row : mapping
        Tensors with an entry for each batch row, whole or sharded as DTensors; other values are left alone.
    shared : mapping
        What all ranks call with alike.

    Returns
    -------
    DTensor, or tuple of DTensor
        Placed as q.

    Raises
    ------
    TypeError
        DTensors beside other tensors.
    ValueError
        DTensors on different meshes, sharded rows, or query heads that the ranks can't divide.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not all(isinstance(tensor, DTensor) for tensor in (q, k, v)):
        kinds = ", ".join(type(tensor).__name__ for tensor in (q, k, v))
        raise TypeError(f"q, k and v must all be DTensors or none, got {kinds}")
    mesh = q.device_mesh
    if k.device_mesh != mesh or v.device_mesh != mesh:
        raise ValueError(f"q, k and v must be on one mesh, got {mesh}, {k.device_mesh} and {v.device_mesh}")
    layout.check_heads(q.shape[1])
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if any(placement.is_shard(_ROWS) for placement in tensor.placements):
            raise _refuse_rows(name)
    placements: list[Any] = [
        placement if placement in (Shard(_BATCH), Shard(_HEADS)) else Replicate()
        for placement in q.placements
    ]
    q = q.redistribute(placements=placements)
    heads_ranks = 1
    for axis, placement in enumerate(placements):
        heads_ranks *= mesh.size(axis) if placement.is_shard(_HEADS) else 1
    if q.shape[1] % heads_ranks:
        raise ValueError(f"{q.shape[1]} query heads can't be shared equally by {heads_ranks} ranks")
    begin, end = _own_heads(q, placements)
    group = q.shape[1] // k.shape[1]
    are_kv_sharded = k.shape[1] % heads_ranks == 0
    if not are_kv_sharded and (end - begin) % group and group % (end - begin):
        raise ValueError(
            f"{end - begin} query heads a rank are neither whole groups of {group} nor part of one: the "
            f"{k.shape[1]} key/value heads can't be shared by {heads_ranks} ranks"
        )
    kv_placements = [
        Replicate() if placement.is_shard(_HEADS) and not are_kv_sharded else placement
        for placement in placements
    ]
    # A key/value head that several ranks read gets a part of its gradient from each.
    kv_gradients = [
        Partial() if placement.is_shard(_HEADS) and not are_kv_sharded else placement
        for placement in placements
    ]
    k_own, v_own = (
        tensor.redistribute(placements=kv_placements).to_local(grad_placements=kv_gradients)
        for tensor in (k, v)
    )
    if not are_kv_sharded:
        first, last = begin // group, -(-end // group)
        k_own, v_own = k_own[:, first:last], v_own[:, first:last]
    row_placements = [placement if placement.is_shard(_BATCH) else Replicate() for placement in placements]

    def own_rows(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not isinstance(value, DTensor):
            value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return value.redistribute(placements=row_placements).to_local()

    own = layout if (begin, end) == (0, q.shape[1]) else layout.heads(begin, end)
    outputs = attend(
        q.to_local(grad_placements=placements),
        k_own,
        v_own,
        own,
        **{name: own_rows(value) for name, value in by_row.items()},
        **{name: value.to_local() if isinstance(value, DTensor) else value for name, value in shared.items()},
    )

    def placed(local: Tensor) -> DTensor:
        shape = torch.Size((*q.shape[:2], *local.shape[2:]))
        # Strides in the order of the shard's.
        order = sorted(range(local.dim()), key=lambda dim: (local.stride(dim), -dim))
        strides, step = [0] * local.dim(), 1
        for dim in order:
            strides[dim], step = step, step * shape[dim]
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=tuple(strides)
        )

    return placed(outputs) if isinstance(outputs, Tensor) else tuple(placed(each) for each in outputs)
