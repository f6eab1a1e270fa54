"""The forms of a key/value cache that a step of decoding reads: contiguous, paged, and rings.

Where position p of key/value head g of batch row b lies:

* contiguous, ``(B, Hkv, S, D)``: row p;
* paged, ``(pages, Hkv, page_size, D)`` with a block table ``(B, max_pages)``: row ``p % page_size`` of page
  ``block_table[b, p // page_size]``;
* ring, ``(B, R, D)`` with int32 ``(Hkv, 2)`` of (base, capacity): row ``base[g] + p % capacity[g]``. No two
  keys that are needed may share a row: one more than the largest distance is enough for a query, and less
  may be where bands lie far apart.

Checks stand here once for the operator and the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bands import LIMIT, BandLayout
from .placement import check_row_values
from .problem import MAX_DECODE_QUERIES

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 16, 256


class CachePlaces(NamedTuple):
    """Where the keys of a step of decoding lie, as ``banded_attention_decode`` describes it."""

    cache_lengths: Tensor
    cache_starts: Tensor | None = None
    block_table: Tensor | None = None
    ring: Tensor | None = None

    def capacity(self, k_cache: Tensor) -> int:
        """Positions that the cache has rows for; of rings, which hold the last ones, the largest position."""
        if self.ring is not None:
            return LIMIT
        return k_cache.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    def kv_heads(self, k_cache: Tensor) -> int:
        """Key/value heads of the cache."""
        return k_cache.shape[1] if self.ring is None else self.ring.shape[0]


def _check_table(name: str, table: Any, device: torch.device) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(table).__name__}")
    if table.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {table.dtype}")
    if table.is_nested or table.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor")
    if table.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, got {table.device}")


def check_cache(
    layout: BandLayout,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    places: CachePlaces,
) -> None:
    """Raise where shapes, dtypes or devices of a step of decoding do not fit; no value is read.

    Parameters
    ----------
    layout : BandLayout
    q : Tensor
        ``(B, Hq, Nq, D)``.
    k_cache, v_cache : Tensor
    places : CachePlaces
        May hold anything.

    Raises
    ------
    ValueError
        Shapes, heads or devices that do not fit, more queries than a step may have, `block_table` together
        with `ring`, or a layout that is not autoregressive.
    TypeError
        Other dtypes.
    """
    cache_lengths, cache_starts, block_table, ring = places
    layout.require_autoregressive("decoding")
    batch, query_heads, queries, head_dim = q.shape
    if queries > MAX_DECODE_QUERIES:
        raise ValueError(
            f"a step of decoding has 1 to {MAX_DECODE_QUERIES} queries, got {queries}: attend to a longer "
            "chunk with banded_attention(..., kv_lengths=cache_lengths)"
        )
    if block_table is not None and ring is not None:
        raise ValueError("block_table and ring exclude one another: a cache is paged or made of rings")
    check_row_values("cache_lengths", cache_lengths, batch, q.device)
    if cache_starts is not None:
        check_row_values("cache_starts", cache_starts, batch, q.device)
    k_shape = k_cache.shape
    if v_cache.shape != k_shape:
        raise ValueError(
            f"k_cache and v_cache must have one shape, got {tuple(k_shape)} and {tuple(v_cache.shape)}"
        )
    if ring is not None:
        _check_table("ring", ring, q.device)
        if ring.dim() != 2 or ring.shape[1] != 2 or ring.shape[0] == 0:
            raise ValueError(
                f"ring must hold (base, capacity) of each kv head, shape (Hkv, 2), got {tuple(ring.shape)}"
            )
        if len(k_shape) != 3 or k_shape[0] != batch or k_shape[2] != head_dim or k_shape[1] == 0:
            raise ValueError(
                f"with ring, k_cache must have shape (batch, rows, head_dim) = ({batch}, R, {head_dim}), got "
                f"{tuple(k_shape)}"
            )
        kv_heads = ring.shape[0]
    else:
        if len(k_shape) != 4 or k_shape[3] != head_dim or 0 in k_shape[1:3]:
            raise ValueError(
                f"k_cache must have shape (batch, kv heads, length, {head_dim}), or with block_table (pages, "
                f"kv heads, page_size, {head_dim}), got {tuple(k_shape)}"
            )
        kv_heads = k_shape[1]
        if block_table is None and k_shape[0] != batch:
            raise ValueError(f"k_cache must have q's batch of {batch}, got {tuple(k_shape)}")
    if block_table is not None:
        _check_table("block_table", block_table, q.device)
        if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.shape[1] == 0:
            raise ValueError(
                f"block_table must have shape (batch, max_pages) = ({batch}, ...), got "
                f"{tuple(block_table.shape)}"
            )
        if k_shape[0] == 0:
            raise ValueError(f"a paged cache needs at least one page, got k_cache {tuple(k_shape)}")
        if not MIN_PAGE_SIZE <= k_shape[2] <= MAX_PAGE_SIZE:
            raise ValueError(
                f"page_size must be from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}, got {k_shape[2]} in k_cache "
                f"{tuple(k_shape)}"
            )
    if query_heads == 0 or queries == 0 or head_dim == 0:
        raise ValueError(f"heads, queries and head_dim must be at least 1, got q {tuple(q.shape)}")
    if query_heads % kv_heads:
        raise ValueError(
            f"the number of query heads must be a multiple of the kv heads, got {query_heads} and {kv_heads}"
        )
    layout.check_heads(query_heads)


def _reach(layout: BandLayout, first: int, count: int) -> int:
    """The largest distance that some of a layout's heads attend to; -1 for none."""
    return max((high for head in layout.bands(LIMIT)[first : first + count] for _, high in head), default=-1)


def merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The closed intervals `spans` of integers in order, those that overlap or touch as one."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def _collision(spans: Sequence[tuple[int, int]], capacity: int) -> tuple[int, int] | None:
    """Of two keys at distances within `spans` that share a row of a ring: how many times round it they are
    apart, and the largest difference of distances within their two spans. None where none do.
    """
    for index, (low, high) in enumerate(spans):
        for farther_low, farther_high in spans[index:]:
            largest = farther_high - low
            turns = largest // capacity
            if turns and turns * capacity >= farther_low - high:
                return turns, largest
    return None


def least_capacity(spans: Sequence[tuple[int, int]]) -> int:
    """Rows of the smallest ring in which all keys at distances within `spans` have a row each.

    Parameters
    ----------
    spans : sequence of (int, int)
        Closed intervals of distances, in order and disjoint; at least one.

    Returns
    -------
    int
        At most the largest distance plus 1.
    """
    capacity = max(high - low + 1 for low, high in spans)
    while (shared := _collision(spans, capacity)) is not None:
        turns, largest = shared
        capacity = largest // turns + 1
    return capacity


def _suffices(layout: BandLayout, first: int, count: int, queries: int, capacity: int) -> bool:
    """Does a ring of `capacity` hold what `queries` of some of a layout's heads need, however many keys?"""
    heads = layout.bands(LIMIT)[first : first + count]
    needed = merged([(low, high + queries - 1) for head in heads for low, high in head])
    return _collision(needed, capacity) is None


def rings_suffice(layout: BandLayout, q: Tensor, ring: Tensor | None) -> bool:
    """Do valid rings hold what the bands of their query heads need, however long the rows are?"""
    if ring is None:
        return True
    group, queries = q.shape[1] // ring.shape[0], q.shape[2]
    return all(
        _suffices(layout, head * group, group, queries, size) for head, (_, size) in enumerate(ring.tolist())
    )


def check_cache_values(layout: BandLayout, q: Tensor, k_cache: Tensor, places: CachePlaces) -> None:
    """Raise where what a host knows of a cache would lead out of it; reads the tensors, which are valid.

    Raises
    ------
    ValueError
        A length or start below 0 or beyond the cache; a sequence longer than the layout's context; a page
        number that is read and not there; rings that leave the rows, or hold fewer keys than the bands of
        their query heads need.
    """
    cache_lengths, cache_starts, block_table, ring = places
    capacity, queries = places.capacity(k_cache), q.shape[2]
    lengths = cache_lengths.tolist()
    starts = [0] * len(lengths) if cache_starts is None else cache_starts.tolist()
    for name, values in (("cache_lengths", lengths), ("cache_starts", starts)):
        if values and not (min(values) >= 0 and max(values) <= capacity):
            raise ValueError(f"{name} must lie in [0, {capacity}], what the cache holds, got {values}")
    longest = max((end - begin for end, begin in zip(lengths, starts, strict=True)), default=0)
    layout.check_length(max(longest, 0))
    if block_table is not None:
        pages, page_size = k_cache.shape[0], k_cache.shape[2]
        reach = _reach(layout, 0, layout.num_heads)
        for row, (begin, end) in enumerate(zip(starts, lengths, strict=True)):
            first = max(begin, end - queries - reach) // page_size
            read = block_table[row, first : -(-end // page_size)] if begin < end else block_table[row, :0]
            if read.numel() and not (int(read.min()) >= 0 and int(read.max()) < pages):
                raise ValueError(
                    f"block_table[{row}] must hold pages in [0, {pages}) for the keys that are read, got "
                    f"{read.tolist()}"
                )
    if ring is not None:
        rows, group = k_cache.shape[1], q.shape[1] // ring.shape[0]
        for head, (base, size) in enumerate(ring.tolist()):
            if base < 0 or size < 1 or base + size > rows:
                raise ValueError(
                    f"ring[{head}] = (base, capacity) must lie within the {rows} rows of k_cache, got "
                    f"({base}, {size})"
                )
            needed = _reach(layout, head * group, group) + queries
            if size < min(needed, max(lengths, default=0)) and not _suffices(
                layout, head * group, group, queries, size
            ):
                raise ValueError(
                    f"ring[{head}] has a capacity of {size}, but {queries} queries with the layout's largest "
                    f"distance {needed - queries} need {needed}, or one in which no two share a row"
                )
