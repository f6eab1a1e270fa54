"""Band tables and document boundaries on the device of a call, as kernels take them.

Bands are int32 ``(M, Hq, 4)``, boundaries int32 ``(documents + 1,)``, sorted, from 0 to the length N. A
packed call's first and last documents are made here, of the rows before the caller's first boundary and
behind its last one: their bands are empty, so a kernel treats them like any query without keys. M is 1 (one
row for all), 3 (a row for the first document, one for all between, one for the last) or the number of
documents.

What is kept is kept for all streams, threads and modes (`make_lasting`), in few pieces: a small block for
each length, between the large ones that calls free again, would keep the heap from ever shrinking. (1,500
ascending lengths of up to 3 MiB a tensor took 2.4 GiB.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spattn_tvm.bands import EMPTY, BandLayout, length_tables
from spattn_tvm.lasting import make_lasting
from spattn_tvm.torch_private import add_to_each, is_capturing


class _Bands(NamedTuple):
    """The bands of a layout for one context, for an unpacked call and for a packed one."""

    single: Tensor  # (1, Hq, 4)
    packed: Tensor  # (3, Hq, 4): empty, the bands, empty


_HOST = torch.device("cpu")
# How many tensors are made at once.
_CHUNK = 64
# Of lengths and of layouts. Then all are made anew: an entry is 1.5 KiB at 32 heads.
_MAX_ENTRIES = 2048
# The tables of all lengths up to a sequence's are kept where they are no larger, which saves a packed call
# about 30 small operations; together they may be three times as large.
_LOOKUP_BYTES = 16 * 2**20

_lock = threading.Lock()
_entries: dict[Hashable, Tensor | _Bands] = {}
# By the number of heads, 0 for boundaries.
_unused: dict[tuple[int, torch.device], list[Any]] = {}
# By layout and device: the tables of the lengths 0 … len - 1.
_lookups: dict[tuple[str, torch.device], Tensor] = {}
# Addresses in CUDA graphs, which may be replayed at any time.
_captured: dict[Hashable, Tensor | _Bands] = {}
# On CUDA: what was dropped last, because a thread may have found it and not have launched its kernel yet.
_dropped: list[object] = []
_listeners: list[Callable[[], None]] = []


def call_when_dropped(function: Callable[[], None]) -> None:
    """Have a function called when no table that was found before should be used any longer."""
    _listeners.append(function)


def _drop() -> None:
    for function in _listeners:
        function()
    kept: list[object] = [dict(_entries), dict(_unused), dict(_lookups)]
    devices = {device for _, device in (*_unused, *_lookups) if device.type == "cuda"}
    for device in devices:
        torch.cuda.synchronize(device)
    _dropped[:] = kept if devices else []
    _entries.clear()
    _unused.clear()
    _lookups.clear()
    _packed_on_host.cache_clear()


def clear_tables() -> None:
    """Forget the tables, but for those that captured CUDA graphs hold."""
    with _lock:
        _drop()


# --- one table, one pair of boundaries -------------------------------------------------------------------


def _make_ends(device: torch.device) -> list[Tensor]:
    return list(torch.zeros((_CHUNK, 2), dtype=torch.int32, device=device).unbind(0))


def _make_bands(heads: int, device: torch.device) -> list[_Bands]:
    packed = torch.empty((_CHUNK, 3, heads, 4), dtype=torch.int32, device=device)
    for column, value in enumerate(EMPTY):
        packed[..., column::2] = value
    return [_Bands(*views) for views in zip(packed[:, 1:2].unbind(0), packed.unbind(0), strict=True)]


def _fill(target: Tensor, values: np.ndarray) -> None:
    source = torch.from_numpy(values)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def _new_ends(length: int, device: torch.device) -> Tensor:
    unused = _unused.setdefault((0, device), [])
    if not unused:
        unused.extend(_make_ends(device))
    ends: Tensor = unused.pop()
    _fill(ends, np.array([0, length], dtype=np.int32))
    return ends


def _new_bands(table: np.ndarray, device: torch.device) -> _Bands:
    heads = len(table)
    unused = _unused.setdefault((heads, device), [])
    if not unused:
        unused.extend(_make_bands(heads, device))
    bands: _Bands = unused.pop()
    _fill(bands.single[0], np.array(table))
    return bands


def _find(key: Hashable, device: torch.device, make: Callable[[], Any]) -> Any:
    """What is kept for a key, made if there is none; None if it can't be made because a graph is captured."""
    found = _entries.get(key)
    if device.type == "cuda" and is_capturing():
        return _captured.get(key) if found is None else _captured.setdefault(key, found)
    if found is None:
        with _lock:
            if len(_entries) >= _MAX_ENTRIES:
                _drop()
            found = _entries.get(key)
            if found is None:
                found = _entries[key] = make_lasting(device, make)
    return found


def _written_by_launches(values: np.ndarray, device: torch.device) -> Tensor:
    """A new tensor of these values, which travel as arguments of kernels: a graph that is being captured then
    needs nothing but itself to write them again.
    """
    flat = torch.zeros(values.size, dtype=torch.int32, device=device)
    add_to_each(list(flat.split(1)), values.ravel().tolist())
    return flat.view(values.shape)


def _find_ends(length: int, device: torch.device) -> Tensor:
    """int32 ``[0, length]``."""
    found: Tensor | None = _find((length, device), device, lambda: _new_ends(length, device))
    if found is None:
        return torch.arange(0, length + 1, length, dtype=torch.int32, device=device)
    return found


def _find_bands(layout: BandLayout, length: int, device: torch.device) -> _Bands:
    context = length if layout.depends_on_length else 0
    key = (layout.spec, context, device)
    found: _Bands | None = _find(key, device, lambda: _new_bands(layout.table(length), device))
    if found is None:
        empty = np.tile(np.array(EMPTY, dtype=np.int32), (layout.num_heads, 2))
        packed = _written_by_launches(np.stack([empty, layout.table(length), empty]), device)
        return _Bands(packed[1:2], packed)
    return found


# --- packed documents ------------------------------------------------------------------------------------


def _check_boundaries(boundaries: tuple[int, ...], length: int, layout: BandLayout) -> None:
    if boundaries[0] != 0:
        raise ValueError(f"cu_seqlens must start with 0, got {boundaries[0]}")
    longest = 0
    for index, (begin, end) in enumerate(pairwise(boundaries)):
        if end < begin:
            raise ValueError(
                "cu_seqlens must be sorted, "
                f"got cu_seqlens[{index}] = {begin} and cu_seqlens[{index + 1}] = {end}"
            )
        longest = max(longest, end - begin)
    if boundaries[-1] > length:
        raise ValueError(
            f"cu_seqlens must not exceed the sequence length {length}, got {boundaries[-1]} at its end"
        )
    layout.check_length(longest)


def _covering(cu_seqlens: Tensor, length: int) -> Tensor:
    """int32 ``[0, c0, …, cn, length]`` of boundaries c: their running maximum, clamped before it is cast."""
    ends = _find_ends(length, cu_seqlens.device)
    rising = torch.cat((ends[:1], cu_seqlens, ends[1:])).cummax(0).values
    # Not by torch.minimum with an int32 output: on CUDA that casts what it compares.
    return rising.clamp_(max=length).to(torch.int32)


def _tables_of(layout: BandLayout, lengths: Tensor) -> Tensor:
    """As `length_tables`, but a document without rows has empty bands."""
    tables = length_tables(layout, lengths)
    without_rows = (lengths == 0)[:, None, None]
    for column, value in enumerate(EMPTY):
        tables[..., column::2].masked_fill_(without_rows, value)
    return tables


def _find_lookup(layout: BandLayout, length: int, device: torch.device) -> Tensor | None:
    """`_tables_of` all lengths up to one; None where that would be too large."""
    key = (layout.spec, device)
    found = _lookups.get(key)
    if found is not None and len(found) > length:
        if device.type == "cuda" and is_capturing():
            _captured[(*key, len(found))] = found
        return found
    # Rounded up, so that a new length rarely means new tables.
    count = 1 << length.bit_length()
    if count * layout.num_heads * 16 > _LOOKUP_BYTES or (device.type == "cuda" and is_capturing()):
        return None
    with _lock:
        kept = sum(lookup.nbytes for other, lookup in _lookups.items() if other != key)
        if kept > 2 * _LOOKUP_BYTES:
            _drop()
        elif key in _lookups and device.type == "cuda":
            _dropped.append(_lookups[key])
        lookup = make_lasting(device, lambda: _tables_of(layout, torch.arange(count, device=device)))
        _lookups[key] = lookup
    return lookup


def _packed(layout: BandLayout, length: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    device = cu_seqlens.device
    boundaries = _covering(cu_seqlens, length)
    if not layout.depends_on_length:
        return _find_bands(layout, 1, device).packed, boundaries
    # The first and the last document, which are nobody's, count as having no row.
    lengths = boundaries[1:-1].diff(prepend=boundaries[1:2], append=boundaries[-2:-1])
    lookup = _find_lookup(layout, length, device)
    return (_tables_of(layout, lengths) if lookup is None else lookup.index_select(0, lengths)), boundaries


# A pass through a model asks for the same again and again, 2 us instead of 30. More would hold the heap.
@lru_cache(maxsize=16)
def _packed_on_host(spec: str, length: int, boundaries: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    layout = BandLayout.from_spec(spec)
    _check_boundaries(boundaries, length, layout)
    return make_lasting(_HOST, lambda: _packed(layout, length, torch.tensor(boundaries, device=_HOST)))


def find_bands(spec: str, q: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The band table and the document boundaries, as kernels take them.

    Parameters
    ----------
    spec : str
        ``BandLayout.spec``.
    q : Tensor
        ``(B, Hq, N, D)``; its length and its device matter.
    cu_seqlens : Tensor or None
        ``(documents + 1,)`` int32 or int64 on the device of q. On a CUDA device nothing waits for its
        values: they are taken as their running maximum, clamped to ``[0, N]``.

    Returns
    -------
    bands : Tensor
        int32 ``(M, Hq, 4)``.
    boundaries : Tensor
        int32 ``(documents + 1,)``, of a packed call with two documents more than the caller's.

    Raises
    ------
    ValueError
        On the CPU, boundaries that are not sorted, don't start with 0 or exceed N, and a document that is
        longer than the layout's context.
    """
    device, length = q.device, q.shape[2]
    layout = BandLayout.from_spec(spec)
    if cu_seqlens is None:
        return _find_bands(layout, length, device).single, _find_ends(length, device)
    if cu_seqlens.is_cpu:
        return _packed_on_host(spec, length, tuple(cu_seqlens.tolist()))
    return _packed(layout, length, cu_seqlens)
