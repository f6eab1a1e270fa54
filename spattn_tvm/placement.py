"""Where the queries and the keys of a call lie, when there may be other numbers of them.

A query row ``r`` has position ``r + offset``, a key row ``j`` position ``j``, and distances are differences
of positions. Checks, and the clamping of what only a device knows, stand here once for the operators and the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bands import LIMIT, BandLayout


class Placement(NamedTuple):
    """Where the queries and the keys of a call lie, as ``banded_attention`` describes it."""

    cu_seqlens: Tensor | Sequence[int] | None = None
    cu_seqlens_k: Tensor | Sequence[int] | None = None
    query_offset: int | Tensor | None = None
    kv_lengths: Tensor | None = None
    kv_starts: Tensor | None = None

    @property
    def has_own_keys(self) -> bool:
        """Whether the keys are the queries' own rows, if there are as many."""
        return all(given is None for given in self[1:])


def check_row_values(name: str, values: Any, batch: int, device: torch.device) -> None:
    """Raise unless these are integers ``(batch,)``, int32 or int64, on the device."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
    if values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {values.dtype}")
    if values.is_nested or values.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor")
    if values.dim() != 1 or values.shape[0] != batch:
        raise ValueError(f"{name} must have shape (batch,) = ({batch},), got {tuple(values.shape)}")
    if values.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, got {values.device}")


def check_placement(layout: BandLayout, q: Tensor, k: Tensor, placement: Placement) -> None:
    """Raise where the places of queries and keys contradict one another, their shapes or the layout.

    Parameters
    ----------
    layout : BandLayout
    q, k : Tensor
        ``(B, Hq, Nq, D)`` and ``(B, Hkv, Nk, D)``.
    placement : Placement
        May hold anything. Of boundaries it matters here whether they are there, not what they hold.

    Raises
    ------
    ValueError
        Arguments that exclude one another, Nq and Nk that differ where they may not, a layout that is not
        autoregressive, and a position known here that is beyond the layout's context.
    TypeError
        A `query_offset` that is neither an int nor an integer tensor, other dtypes.
    """
    cu_seqlens, cu_seqlens_k, query_offset, kv_lengths, kv_starts = placement
    queries, keys = q.shape[2], k.shape[2]
    rows: dict[str, Any] = {"query_offset": query_offset, "kv_lengths": kv_lengths, "kv_starts": kv_starts}
    given = [name for name, value in rows.items() if value is not None]
    if cu_seqlens is not None and given:
        raise ValueError(
            f"{given[0]} and cu_seqlens exclude one another: the queries of a packed document are its last "
            "ones; say with cu_seqlens_k where its keys lie"
        )
    if cu_seqlens_k is not None and cu_seqlens is None:
        raise ValueError("cu_seqlens_k needs cu_seqlens, the boundaries of the queries, beside it")
    for name in given:
        value = rows[name]
        if name == "query_offset" and not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
                raise TypeError(
                    f"query_offset must be an int or an integer tensor (batch,), got {value!r} of type "
                    f"{type(value).__name__}"
                )
        else:
            check_row_values(name, value, q.shape[0], q.device)
    if cu_seqlens_k is not None:
        given.append("cu_seqlens_k")
    if given:
        layout.require_autoregressive(given[0])
    if cu_seqlens is not None:
        if cu_seqlens_k is None and queries != keys:
            raise ValueError(
                "cu_seqlens alone says where as many queries as keys lie, got "
                f"{queries} queries and {keys} keys: give cu_seqlens_k too"
            )
    elif not given:
        if not layout.is_autoregressive and queries != keys:
            layout.require_autoregressive(f"attention of {queries} queries to {keys} keys")
        layout.check_length(keys)
    elif not isinstance(query_offset, Tensor) and query_offset is not None:
        layout.check_length(queries + query_offset)
    elif query_offset is None and kv_lengths is None:
        layout.check_length(keys)


def clamp_offset(offset: int, queries: int) -> int:
    """An offset of the queries in int32 arithmetic: what is cut off is negative, or beyond every band."""
    return min(max(offset, -queries), LIMIT - queries)


def place_rows(
    ranges: Tensor,
    queries: int,
    keys: int,
    query_offset: int | Tensor | None,
    kv_lengths: Tensor | None,
    kv_starts: Tensor | None,
) -> Tensor:
    """Write where each batch row's keys begin and end and the offset of its queries; no value is read.

    Parameters
    ----------
    ranges : Tensor
        Integers ``(batch, 3)``, written.
    queries, keys : int
        Nq and Nk.
    query_offset, kv_lengths, kv_starts
        Valid ones. Tensors are clamped in their own dtype.

    Returns
    -------
    Tensor
        ``ranges``.
    """
    begin, end, offset = ranges.unbind(1)
    if kv_starts is None:
        begin.zero_()
    else:
        begin.copy_(kv_starts.clamp(0, keys))
    if kv_lengths is None:
        end.fill_(keys)
    else:
        end.copy_(kv_lengths.clamp(0, keys))
    if isinstance(query_offset, Tensor):
        offset.copy_(query_offset.clamp(-queries, LIMIT - queries))
    elif query_offset is not None:
        offset.fill_(clamp_offset(query_offset, queries))
    else:
        torch.sub(end, queries, out=offset)
    return ranges
