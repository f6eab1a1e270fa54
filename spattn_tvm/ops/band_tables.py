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
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spattn_tvm.bands import EMPTY, LIMIT, BandLayout, length_tables
from spattn_tvm.cache_forms import CachePlaces
from spattn_tvm.lasting import make_lasting
from spattn_tvm.launch import CacheDomain, Domain
from spattn_tvm.placement import clamp_offset, place_rows
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


@cache
def _no_ranges(device: torch.device) -> Tensor:
    # It has no memory that could belong to a stream or a graph.
    with torch.inference_mode(False):
        return torch.empty((0, 3), dtype=torch.int32, device=device)


# --- packed documents ------------------------------------------------------------------------------------


def _check_boundaries(name: str, boundaries: tuple[int, ...], length: int) -> None:
    if boundaries[0] != 0:
        raise ValueError(f"{name} must start with 0, got {boundaries[0]}")
    for index, (begin, end) in enumerate(pairwise(boundaries)):
        if end < begin:
            raise ValueError(
                f"{name} must be sorted, got {name}[{index}] = {begin} and {name}[{index + 1}] = {end}"
            )
    if boundaries[-1] > length:
        raise ValueError(
            f"{name} must not exceed the sequence length {length}, got {boundaries[-1]} at its end"
        )


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


def _packed(
    layout: BandLayout, length: int, cu_seqlens: Tensor, key_length: int, cu_seqlens_k: Tensor | None
) -> Domain:
    device = cu_seqlens.device
    boundaries = _covering(cu_seqlens, length)
    if cu_seqlens_k is not None:
        layout.require_autoregressive("cu_seqlens_k")
        bands = _find_bands(layout, LIMIT, device).packed
        return Domain(bands, boundaries, _covering(cu_seqlens_k, key_length), _no_ranges(device))
    if not layout.depends_on_length:
        bands = _find_bands(layout, 1, device).packed
        return Domain(bands, boundaries, boundaries, _no_ranges(device))
    # The first and the last document, which are nobody's, count as having no row.
    lengths = boundaries[1:-1].diff(prepend=boundaries[1:2], append=boundaries[-2:-1])
    lookup = _find_lookup(layout, length, device)
    bands = _tables_of(layout, lengths) if lookup is None else lookup.index_select(0, lengths)
    return Domain(bands, boundaries, boundaries, _no_ranges(device))


# A pass through a model asks for the same again and again, 2 us instead of 30. More would hold the heap.
@lru_cache(maxsize=16)
def _packed_on_host(
    spec: str,
    length: int,
    boundaries: tuple[int, ...],
    key_length: int,
    key_boundaries: tuple[int, ...] | None,
) -> Domain:
    layout, cu_seqlens_k = BandLayout.from_spec(spec), None
    _check_boundaries("cu_seqlens", boundaries, length)
    if key_boundaries is not None:
        _check_boundaries("cu_seqlens_k", key_boundaries, key_length)
        cu_seqlens_k = torch.tensor(key_boundaries, device=_HOST)
    layout.check_length(max(end - begin for begin, end in pairwise(key_boundaries or boundaries)))
    cu_seqlens = torch.tensor(boundaries, device=_HOST)
    return make_lasting(_HOST, lambda: _packed(layout, length, cu_seqlens, key_length, cu_seqlens_k))


# --- calls -----------------------------------------------------------------------------------------------


def _find_ranges(
    q: Tensor,
    keys: int,
    query_offset: int | Tensor | None,
    kv_lengths: Tensor | None,
    kv_starts: Tensor | None,
) -> Tensor:
    """``Domain.key_ranges`` of a call that is not packed. An offset is not kept: each step of generation has
    another.
    """
    queries, device = q.shape[2], q.device
    if kv_lengths is None and kv_starts is None and not isinstance(query_offset, Tensor):
        if query_offset is None:
            return _no_ranges(device)
        values = [[0, keys, clamp_offset(query_offset, queries)]]
        if device.type == "cpu":
            return torch.tensor(values, dtype=torch.int32)
        return _written_by_launches(np.array(values), device)
    ranges = torch.empty((q.shape[0], 3), dtype=torch.int32, device=device)
    return place_rows(ranges, queries, keys, query_offset, kv_lengths, kv_starts)


def find_domain(
    spec: str,
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
) -> Domain:
    """Which keys the queries of a call attend to, as kernels take it.

    Parameters
    ----------
    spec : str
        ``BandLayout.spec``.
    q, k : Tensor
        ``(B, Hq, Nq, D)`` and ``(B, Hkv, Nk, D)``; their lengths and their device matter.
    cu_seqlens, cu_seqlens_k : Tensor, optional
        ``(documents + 1,)`` int32 or int64 on the device of q. On a CUDA device nothing waits for their
        values: they are taken as their running maximum, clamped to ``[0, Nq]`` and ``[0, Nk]``.
    query_offset, kv_lengths, kv_starts : int or Tensor, optional
        As in ``banded_attention``. No value of a tensor is read; they are clamped before they are cast.

    Returns
    -------
    Domain
        A packed call has two documents more than the caller's.

    Raises
    ------
    ValueError
        On the CPU, boundaries that are not sorted, don't start with 0 or exceed the length, and a document
        that is longer than the layout's context.
    """
    device, length, key_length = q.device, q.shape[2], k.shape[2]
    layout = BandLayout.from_spec(spec)
    if cu_seqlens is None:
        ends = _find_ends(length, device)
        if query_offset is None and kv_lengths is None and kv_starts is None and length == key_length:
            return Domain(_find_bands(layout, length, device).single, ends, ends, _no_ranges(device))
        layout.require_autoregressive("attention to other keys than the queries' own")
        # The same intervals wherever a query stands.
        bands = _find_bands(layout, LIMIT, device).single
        ranges = _find_ranges(q, key_length, query_offset, kv_lengths, kv_starts)
        return Domain(bands, ends, _find_ends(key_length, device), ranges)
    if cu_seqlens.is_cpu:
        key_boundaries = None if cu_seqlens_k is None else tuple(cu_seqlens_k.tolist())
        return _packed_on_host(spec, length, tuple(cu_seqlens.tolist()), key_length, key_boundaries)
    return _packed(layout, length, cu_seqlens, key_length, cu_seqlens_k)


def _no_table(batch: int, device: torch.device) -> Tensor:
    # A compiled function takes it for contiguous only with a stride of 0, the length of a row.
    return torch.empty(0, dtype=torch.int32, device=device).as_strided((batch, 0), (0, 1))


def narrowed(values: Tensor, largest: int) -> Tensor:
    """Integers as int32, where kernels clamp them themselves; int64 is clamped before it is cast."""
    if values.dtype is torch.int32:
        return values
    return values.clamp(0, min(largest, LIMIT)).to(torch.int32)


def find_cache_domain(spec: str, places: CachePlaces, capacity: int) -> CacheDomain:
    """Where the keys of a decoding call lie, as kernels take it. No value is read, and none trusted.

    Parameters
    ----------
    spec : str
        ``BandLayout.spec``.
    places : CachePlaces
        Of valid dtypes and shapes.
    capacity : int
        The largest length.
    """
    cache_lengths, cache_starts, block_table, ring = places
    device = cache_lengths.device
    bands = _find_bands(BandLayout.from_spec(spec), LIMIT, device).single
    batch = len(cache_lengths)

    if cache_starts is not None:
        starts = narrowed(cache_starts, capacity)
    else:
        key = ("starts", batch, device)
        kept: Tensor | None = _find(key, device, lambda: torch.zeros(batch, dtype=torch.int32, device=device))
        starts = torch.zeros(batch, dtype=torch.int32, device=device) if kept is None else kept
    if block_table is None:
        kept = _find(("table", batch, device), device, lambda: _no_table(batch, device))
        block_table = _no_table(batch, device) if kept is None else kept
    if ring is None:
        kept = _find(("ring", device), device, lambda: torch.empty((0, 2), dtype=torch.int32, device=device))
        ring = torch.empty((0, 2), dtype=torch.int32, device=device) if kept is None else kept
    return CacheDomain(bands, narrowed(cache_lengths, capacity), starts, block_table, ring)
