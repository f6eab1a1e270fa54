"""How ``parallelize_module`` spreads a ``BandedAttention``: its heads, or its sequence."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from spattn_tvm.nn import BandedAttention

from .attention import context_parallel_attention, equal_shards
from .shards import Shards


def _require_attention(style: ParallelStyle, module: nn.Module, mesh: DeviceMesh) -> BandedAttention:
    if not isinstance(module, BandedAttention):
        raise TypeError(f"{type(style).__name__} is for a BandedAttention, got {type(module).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f'the mesh has {mesh.ndim} dimensions: pass the one that this is about, such as mesh["tensor"]'
        )
    return module


class HeadParallel(ParallelStyle):
    """Tensor parallelism: each rank has an equal part of the heads, with their own bands.

    Projections to q, k and v are sharded by columns, the one behind by rows, as DTensors; in between all is
    local to the rank, caches included. Input and output are whole on each rank. The state stays that of all
    heads: ``torch.distributed.checkpoint`` writes and reads it for any number of ranks.

    Raises
    ------
    ValueError
        From ``parallelize_module``: heads that the ranks can't share equally.

    Examples
    --------
    >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("context", "tensor"))  # doctest: +SKIP
    >>> parallelize_module(attention, mesh["tensor"], HeadParallel())  # doctest: +SKIP
    >>> parallelize_module(attention, mesh["context"], ContextParallel())  # doctest: +SKIP
    >>> fully_shard(attention, mesh=mesh["context"])  # doctest: +SKIP
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        attention = _require_attention(self, module, device_mesh)
        attention.keep_heads(device_mesh.get_local_rank(), device_mesh.size())
        columns = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        parallelize_module(attention, device_mesh, {**columns, "out_proj": RowwiseParallel()})
        return attention


def _own_positions(mesh: DeviceMesh, shards: Shards | None, rows: int, device: torch.device) -> Tensor:
    whole = shards or equal_shards(rows, mesh.size())
    return whole.position_ids(mesh.get_local_rank(), device=device)


class ContextParallel(ParallelStyle):
    """Each rank has some rows of the sequence, among which ``context_parallel_attention`` attends.

    A rotary position embedding turns them by their positions in the whole sequence, unless the module is
    called with `position_ids`.

    Parameters
    ----------
    shards : Shards, optional
        Which rows are whose; contiguous and equally many by default.
    strategy : str
        As in ``context_parallel_attention``.
    """

    def __init__(self, shards: Shards | None = None, strategy: str = "auto") -> None:
        super().__init__()
        self.shards, self.strategy = shards, strategy

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        attention = _require_attention(self, module, device_mesh)
        if self.shards is not None:
            self.shards.check_ranks(device_mesh.size())
        options = {"shards": self.shards, "strategy": self.strategy}
        attend = partial(context_parallel_attention, group_or_mesh=device_mesh, **options)
        attention.share_sequence(attend, partial(_own_positions, device_mesh, self.shards))
        return attention
