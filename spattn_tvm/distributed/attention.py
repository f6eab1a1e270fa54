"""``context_parallel_attention``: banded attention of a sequence whose rows are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spattn_tvm.bands import BandLayout, require_int
from spattn_tvm.ops.attention import (
    check_dense,
    check_head_dim,
    check_kinds,
    check_scale,
    with_autocast_dtype,
)
from spattn_tvm.ops.sharded import is_sharded
from spattn_tvm.target import detect_cpu, detect_cuda

from .agreement import agree, agree_on_refusal
from .by_bands import attend_by_bands, plan_calls
from .by_heads import attend_by_heads, plan_parts
from .groups import group_of
from .peer_copies import are_turned_off
from .planner import STRATEGIES, documents_of, plan_ranks, strategies_of
from .shards import Shards, boundaries_of

# --- the public function ----------------------------------------------------------------------------------


def _check(q: Any, k: Any, v: Any, layout: Any, scale: Any, impl: str, parts: Any) -> None:
    """What ``banded_attention`` would find out, before anything travels."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if is_sharded(tensor):
            raise TypeError(
                f"{name} is a DTensor: pass its local part, or call banded_attention, which takes DTensors"
            )
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, rows, head_dim), got {tuple(tensor.shape)}")
    check_kinds("q, k and v", q, k, v, layout, impl)
    if q.is_meta:
        raise ValueError("context parallelism moves rows between ranks, got tensors on meta")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            "q, k and v must agree in batch, rows and head_dim, and k with v in heads, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    layout.check_heads(q.shape[1])
    check_head_dim(q.shape[3], q.dtype, impl)
    if scale is not None:
        check_scale(scale)
    if parts is not None:
        require_int("parts", parts, 1)


def equal_shards(rows: int, ranks: int) -> Shards:
    """Contiguous ones of `rows` rows on each rank; where there are none the comparison of ranks says so."""
    return Shards.contiguous(max(rows, 1) * ranks, ranks)


def _check_rows(shards: Any, rows: int, group: dist.ProcessGroup) -> None:
    if not isinstance(shards, Shards):
        raise TypeError(f"shards must be Shards, got {type(shards).__name__}")
    shards.check_ranks(dist.get_world_size(group))
    rank = dist.get_rank(group)
    if shards.rows(rank) != rows:
        raise ValueError(f"the shards give rank {rank} {shards.rows(rank)} rows, q has {rows}")


def _able(q: Tensor, impl: str) -> tuple[str, ...]:
    """What "auto" may choose; the slow reference only where nothing else was asked for."""
    if impl == "reference" or q.dtype is torch.float64:
        return STRATEGIES
    return strategies_of(detect_cuda(q.get_device()) if q.is_cuda else detect_cpu(), impl)


def _autocast(tensor: Any) -> Any:
    device_type = "cuda" if isinstance(tensor, Tensor) and tensor.is_cuda else "cpu"
    return with_autocast_dtype(tensor, device_type) if torch.is_autocast_enabled(device_type) else tensor


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
    group = group_of(group_or_mesh)
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    try:
        q, k, v = _autocast(q), _autocast(k), _autocast(v)
        _check(q, k, v, layout, scale, impl, parts)
        if shards is None:
            shards = equal_shards(q.shape[2], dist.get_world_size(group))
        _check_rows(shards, q.shape[2], group)
        boundaries = None if cu_seqlens is None else boundaries_of(cu_seqlens)
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
        count = plan.parts_on(device.type, parts)
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
            "copies turned off": are_turned_off(),
            "requires grad": tuple(torch.is_grad_enabled() and t.requires_grad for t in (q, k, v)),
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
