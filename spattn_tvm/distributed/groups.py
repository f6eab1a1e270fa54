"""Which ranks a call is about."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def group_of(group_or_mesh: Any) -> dist.ProcessGroup:
    """The process group of what users pass for it.

    Parameters
    ----------
    group_or_mesh : ProcessGroup, DeviceMesh or None
        A group, a mesh of one dimension, None for all ranks.

    Raises
    ------
    TypeError
        Something else.
    ValueError
        A mesh of several dimensions, or ranks that this process is not among.
    RuntimeError
        torch.distributed is not initialized.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialized: call init_process_group in each of the processes that "
            "torchrun starts"
        )
    if group_or_mesh is None:
        return dist.group.WORLD
    if group_or_mesh is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"rank {dist.get_rank()} is not in the group")
    if not isinstance(group_or_mesh, dist.ProcessGroup):
        if not hasattr(group_or_mesh, "get_group"):
            raise TypeError(
                "group_or_mesh must be a ProcessGroup, a DeviceMesh of one dimension, or None for all ranks, "
                f"got {type(group_or_mesh).__name__}"
            )
        if group_or_mesh.ndim != 1:
            raise ValueError(
                f"the mesh has {group_or_mesh.ndim} dimensions: pass the one that shards the sequence, such "
                'as mesh["context"]'
            )
        if group_or_mesh.get_coordinate() is None:
            raise ValueError(f"rank {dist.get_rank()} is not in the mesh {group_or_mesh}")
        group_or_mesh = group_or_mesh.get_group()
    group: dist.ProcessGroup = group_or_mesh
    return group
