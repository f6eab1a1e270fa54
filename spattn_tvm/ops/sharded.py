"""The operators on DTensors: batch, heads and rows may be sharded, each rank calls with its own part of the
layout.

Heads of a layout differ, and what a rank gets to see of an operator's arguments is a tensor's shard and the
whole layout's text. So the rank's heads are taken from the layout here, above the operator, rather than by a
sharding strategy that is registered for it. Rows that ranks share are attended by context parallelism: a
DTensor's operator moves what it needs, and that moves the least.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spattn_tvm.bands import BandLayout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_BATCH, _HEADS, _ROWS = 0, 1, 2
_CONTEXT_PARALLELISM = "spattn_tvm.distributed"


def is_sharded(*tensors: object) -> bool:
    """Is one of these a DTensor? Without importing what that is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def replicate_like(other: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that all ranks have alike, as a DTensor if `other` is one and it is none yet."""
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _sharing_axes(mesh: Any, placements: Iterable[Any]) -> list[int]:
    """The mesh dimensions whose ranks share rows."""
    return [
        axis for axis, placement in enumerate(placements) if placement.is_shard(_ROWS) and mesh.size(axis) > 1
    ]


def _refuse_rows(reason: str) -> ValueError:
    return ValueError(f"the rows of q, k or v are sharded, and {reason}: redistribute them to Replicate()")


def _check_shared_rows(q: DTensor, k: DTensor, axes: Sequence[int], options: Mapping[str, Any]) -> None:
    if len(axes) > 1:
        raise _refuse_rows(
            f"that over {len(axes)} dimensions of the mesh, where context parallelism takes one"
        )
    for name in ("cu_seqlens_k", "query_offset", "kv_lengths", "kv_starts"):
        if options[name] is not None:
            raise _refuse_rows(f"context parallelism has no {name}: its queries lie where the keys lie")
    if options["return_lse"]:
        raise _refuse_rows("context parallelism returns no lse, which return_lse asks for")
    if q.shape[2] != k.shape[2]:
        raise _refuse_rows(f"context parallelism has no {q.shape[2]} queries for {k.shape[2]} keys")


@torch.compiler.disable
def _share_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BandLayout,
    mesh: Any,
    axis: int,
    length: int,
    options: Mapping[str, Any],
) -> Tensor:
    """Attention of this rank's rows of a sequence that the ranks of a mesh dimension cut as DTensor does."""
    # Found by its name: it stands above the operators, which it calls.
    distributed: Any = importlib.import_module(_CONTEXT_PARALLELISM)
    shards = distributed.Shards.contiguous(length, mesh.size(axis))
    taken = {name: options[name] for name in ("cu_seqlens", "scale", "deterministic", "impl")}
    o: Tensor = distributed.context_parallel_attention(
        q, k, v, layout, mesh.get_group(axis), shards=shards, **taken
    )
    return o


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


def _own_keys_and_values(
    q: DTensor, k: DTensor, v: DTensor, placements: list[Any], begin: int, end: int
) -> tuple[Tensor, Tensor]:
    """What the query heads ``[begin, end)`` of this rank read, placed as q but for heads that ranks share."""
    from torch.distributed.tensor import Partial, Replicate

    ranks = 1
    for axis, placement in enumerate(placements):
        ranks *= q.device_mesh.size(axis) if placement.is_shard(_HEADS) else 1
    if q.shape[1] % ranks:
        raise ValueError(f"{q.shape[1]} query heads can't be shared equally by {ranks} ranks")
    group = q.shape[1] // k.shape[1]
    are_sharded = k.shape[1] % ranks == 0
    if not are_sharded and (end - begin) % group and group % (end - begin):
        raise ValueError(
            f"{end - begin} query heads a rank are neither whole groups of {group} nor part of one: the "
            f"{k.shape[1]} key/value heads can't be shared by {ranks} ranks"
        )
    are_whole = [placement.is_shard(_HEADS) and not are_sharded for placement in placements]
    own = [Replicate() if whole else each for whole, each in zip(are_whole, placements, strict=True)]
    # A key/value head that several ranks read gets a part of its gradient from each.
    gradients = [Partial() if whole else each for whole, each in zip(are_whole, placements, strict=True)]
    k_own, v_own = (
        tensor.redistribute(placements=own).to_local(grad_placements=gradients) for tensor in (k, v)
    )
    if are_sharded:
        return k_own, v_own
    first, last = begin // group, -(-end // group)
    return k_own[:, first:last], v_own[:, first:last]


def _placed(local: Tensor, size: torch.Size, mesh: Any, placements: list[Any]) -> DTensor:
    """The DTensor of which this rank has a part; strides in the order of the part's."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*size[:3], *local.shape[3:]))
    order = sorted(range(local.dim()), key=lambda dim: (local.stride(dim), -dim))
    strides, step = [0] * local.dim(), 1
    for dim in order:
        strides[dim], step = step, step * shape[dim]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=tuple(strides))


def attend_sharded(
    attend: Callable[..., Tensor | tuple[Tensor, Tensor]],
    q: Any,
    k: Any,
    v: Any,
    layout: BandLayout,
    by_row: Mapping[str, Any],
    shared: Mapping[str, Any],
    *,
    can_share_rows: bool,
) -> Any:
    """Call `attend` with this rank's batch rows and heads, as q is sharded, or, where ranks share the rows of
    q, ``context_parallel_attention``.

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
        What all ranks call with alike; whole or replicated.
    can_share_rows : bool
        Whether `attend` is ``banded_attention``, which has a form for rows that ranks share.

    Returns
    -------
    DTensor, or tuple of DTensor
        Placed as q.

    Raises
    ------
    TypeError
        DTensors beside other tensors.
    ValueError
        DTensors on different meshes, query heads that the ranks can't divide, and of sharded rows what
        context parallelism has not.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not all(isinstance(tensor, DTensor) for tensor in (q, k, v)):
        kinds = ", ".join(type(tensor).__name__ for tensor in (q, k, v))
        raise TypeError(f"q, k and v must all be DTensors or none, got {kinds}")
    mesh = q.device_mesh
    if k.device_mesh != mesh or v.device_mesh != mesh:
        raise ValueError(f"q, k and v must be on one mesh, got {mesh}, {k.device_mesh} and {v.device_mesh}")
    layout.check_heads(q.shape[1])
    if not can_share_rows and any(_sharing_axes(mesh, tensor.placements) for tensor in (q, k, v)):
        raise _refuse_rows("a step of decoding reads whole caches")
    placements: list[Any] = [
        placement if placement in (Shard(_BATCH), Shard(_HEADS), Shard(_ROWS)) else Replicate()
        for placement in q.placements
    ]
    sharing = _sharing_axes(mesh, placements)
    if sharing:
        _check_shared_rows(q, k, sharing, {**by_row, **shared})
    q = q.redistribute(placements=placements)
    begin, end = _own_heads(q, placements)
    k_own, v_own = _own_keys_and_values(q, k, v, placements, begin, end)
    row_placements = [placement if placement.is_shard(_BATCH) else Replicate() for placement in placements]

    def own_rows(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return replicate_like(q, value).redistribute(placements=row_placements).to_local()  # type: ignore[attr-defined]

    size = q.shape  # compiled code that breaks behind this must not hand on q, which has no gradient then
    own = layout if (begin, end) == (0, size[1]) else layout.heads(begin, end)
    tensors = q.to_local(grad_placements=placements), k_own, v_own
    options = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in shared.items()
    }
    outputs: Tensor | tuple[Tensor, ...]
    if sharing:
        outputs = _share_rows(*tensors, own, mesh, sharing[0], size[2], options)
    else:
        outputs = attend(
            *tensors, own, **{name: own_rows(value) for name, value in by_row.items()}, **options
        )

    if isinstance(outputs, Tensor):
        return _placed(outputs, size, mesh, placements)
    return tuple(_placed(each, size, mesh, placements) for each in outputs)
