"""``context_parallel_attention``: banded attention of a sequence whose rows are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.target import detect_cpu, detect_cuda

from .agreement import agree, agree_on_refusal
from .by_bands import attend_by_bands, plan_calls
from .by_heads import attend_by_heads, plan_parts
from .planner import STRATEGIES, documents_of, plan_ranks, strategies_of
from .shards import Shards, boundaries_of

# --- the public function ----------------------------------------------------------------------------------


def _group_of(group_or_mesh: Any) -> dist.ProcessGroup:
    if isinstance(group_or_mesh, dist.ProcessGroup):
        return group_or_mesh
    if group_or_mesh is None:
        return dist.group.WORLD
    if not hasattr(group_or_mesh, "get_group"):
        raise TypeError(
            "group_or_mesh must be a ProcessGroup, a DeviceMesh of one dimension, or None for all ranks, got "
            f"{type(group_or_mesh).__name__}"
        )
    if group_or_mesh.ndim != 1:
        raise ValueError(
            f"the mesh has {group_or_mesh.ndim} dimensions: pass the one that shards the sequence, such as "
            'mesh["context"]'
        )
    group: dist.ProcessGroup = group_or_mesh.get_group()
    return group


def _check(q: Any, k: Any, v: Any, layout: Any, shards: Shards, group: dist.ProcessGroup) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, rows, head_dim), got {tuple(tensor.shape)}")
    if not isinstance(layout, BandLayout):
        raise TypeError(f"layout must be a BandLayout, got {type(layout).__name__}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise TypeError(
            "q, k and v must have one dtype and device, got "
            f"{', '.join(f'{tensor.dtype} on {tensor.device}' for tensor in (q, k, v))}"
        )
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            "q, k and v must agree in batch, rows and head_dim, and k with v in heads, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    layout.check_heads(q.shape[1])
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if shards.ranks != ranks:
        raise ValueError(f"the shards are for {shards.ranks} ranks, the group has {ranks}")
    if shards.rows(rank) != q.shape[2]:
        raise ValueError(f"the shards give rank {rank} {shards.rows(rank)} rows, q has {q.shape[2]}")


def _able(q: Tensor, impl: str) -> tuple[str, ...]:
    """What "auto" may choose; the slow reference only where nothing else was asked for."""
    if impl == "reference" or q.dtype is torch.float64:
        return STRATEGIES
    return strategies_of(detect_cuda(q.get_device()) if q.is_cuda else detect_cpu(), impl)


def _autocast(tensor: Tensor) -> Tensor:
    device_type = tensor.device.type
    if not torch.is_autocast_enabled(device_type) or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


@torch.compiler.disable
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BandLayout,
    group_or_mesh: Any,
    *,
    strategy: str = "auto",
    shards: Shards | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    impl: str = "auto",
    parts: int | None = None,
) -> Tensor:
    """:func:`~spattn_tvm.banded_attention` of a sequence of which each rank of a group holds some rows.

    All ranks call it, with their own rows of q, k and v and otherwise the same. Differentiable: all ranks
    then go backward. On the first call with a configuration the ranks compare their arguments.

    Parameters
    ----------
    q : Tensor
        ``(B, Hq, rows, D)``: this rank's rows, of all heads.
    k, v : Tensor
        ``(B, Hkv, rows, D)``, dtype and device of q.
    layout : BandLayout
        Of the whole sequence and the Hq heads.
    group_or_mesh : ProcessGroup, DeviceMesh or None
        The ranks among which the sequence is sharded: a group, a mesh of one dimension, None for all.
    strategy : str
        ``"heads"``: whole sequences of some heads to each rank, and back. Heads are dealt out by their work,
        whole key/value groups to a rank; fewer key/value heads than ranks are copied. ``"bands"``: each
        rank fetches the key rows that its queries' bands touch, each once, while it attends to its own.
        ``"auto"``: what :func:`~spattn_tvm.distributed.plan_ranks` expects to take less time, of what the
        device's kernels can do.
    shards : Shards, optional
        Which rows are whose; contiguous and equally many by default.
    cu_seqlens : Tensor or sequence of int, optional
        Boundaries of packed documents in the whole sequence, as in ``banded_attention``. The host reads
        them: for a CUDA tensor it waits once a call, for integers or a CPU tensor it does not.
    scale, deterministic, impl
        As in ``banded_attention``.
    parts : int, optional
        In how many parts the heads travel, so that one is attended while the others are on their way; by
        default what ``plan_ranks`` says on CUDA, 1 on a CPU. A key/value head's group travels together.

    Returns
    -------
    Tensor
        ``(B, Hq, rows, D)``: this rank's rows of o.

    Raises
    ------
    RankMismatchError
        A ValueError, on each rank: what the ranks called with differs, in what and on which.
    RuntimeError
        A rank did not answer within the group's timeout.
    ValueError, TypeError
        Arguments that don't fit, as in ``banded_attention``, or rows that are not the shards'.

    Examples
    --------
    >>> shards = Shards.head_tail(131072, ranks=4)  # doctest: +SKIP
    >>> tokens = shards.take(tokens, rank)  # doctest: +SKIP
    >>> o = context_parallel_attention(q, k, v, layout, group, shards=shards)  # doctest: +SKIP
    """
    group = _group_of(group_or_mesh)
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    try:
        if shards is None:
            shards = Shards.contiguous(
                max(q.shape[2], 1) * dist.get_world_size(group), dist.get_world_size(group)
            )
        _check(q, k, v, layout, shards, group)
        boundaries = None if cu_seqlens is None else boundaries_of(cu_seqlens)
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
        plan = plan_ranks(
            layout,
            shards,
            kv_heads=k.shape[1],
            boundaries=boundaries,
            head_dim=q.shape[3],
            itemsize=q.itemsize,
            strategy=strategy,
            available=_able(q, impl),
        )
        most = max(len(share.groups) for share in plan.shares) if plan.strategy == "heads" else k.shape[1]
        # On a CPU the cores that would attend are those that copy.
        wanted = parts if parts is not None else plan.parts if device.type == "cuda" else 1
        count = max(1, min(wanted, most))
    except Exception as error:
        agree_on_refusal(group, device, error)
        raise
    agree(
        group,
        device,
        {
            "q": tuple(q.shape[:2]) + (shards.length, q.shape[3]),
            "kv heads": k.shape[1],
            "dtype": q.dtype,
            "device": device.type,
            "layout": layout.spec,
            "shards": shards.chunks,
            "cu_seqlens": boundaries,
            "scale": scale,
            "strategy": plan.strategy,
            "parts": count,
            "requires grad": torch.is_grad_enabled() and tuple(t.requires_grad for t in (q, k, v)),
        },
    )
    rank = dist.get_rank(group)
    options: dict[str, Any] = {"scale": scale, "deterministic": deterministic, "impl": impl}
    if plan.strategy == "bands":
        documents = documents_of(boundaries, shards.length)
        calls = plan_calls(layout, k.shape[1], shards, documents, boundaries is not None, rank, count)
        return attend_by_bands(q, k, v, calls, group, options)
    if boundaries is not None:
        options["cu_seqlens"] = (
            cu_seqlens.to(device)
            if isinstance(cu_seqlens, Tensor)
            else torch.tensor(boundaries, dtype=torch.int32, device=device)
        )
    chosen = plan_parts(plan.shares, shards, rank, count)
    return attend_by_heads(q, k, v, layout, chosen, shards, group, options)
