"""Band layouts: which distances ``d = i - j`` each head attends to, and how much work that is.

A layout is a handful of integers per head. Kernels receive them as an int32 table; everything that can be
said about a layout without running it (pairs, coverage, load, executed work) is a closed form over them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Interval = tuple[int, int]
Bands = tuple[Interval, ...]

EMPTY: Interval = (2**30, -1)
"""The interval of a table entry that holds no distance: ``lo > hi``, and safe in int32 arithmetic."""

LIMIT = 2**30 - 1
"""Largest context length and distance: sums and differences of two stay inside int32."""

_PARTITIONING = ("spattention", "exclusive", "gapped", "equal_area")
_FROM_CONTEXT = (*_PARTITIONING, "local_only", "causal")
LAYOUT_NAMES = (*_FROM_CONTEXT, "sliding_window", "custom")


@dataclass(frozen=True)
class Coverage:
    """How the heads together cover the distances ``0 … distances - 1``.

    Attributes
    ----------
    distances : int
        Number of distances considered.
    seen : int
        Distances that at least one head attends to.
    seen_once : int
        Distances that exactly one head attends to.
    """

    distances: int
    seen: int
    seen_once: int

    @property
    def is_complete(self) -> bool:
        """Is each distance seen by at least one head?"""
        return self.seen == self.distances

    @property
    def is_exclusive(self) -> bool:
        """Is no distance seen by two heads?"""
        return self.seen == self.seen_once


def merge_intervals(intervals: Iterable[Sequence[int]]) -> Bands:
    """Sort closed intervals, near first; join those that overlap or touch; drop empty ones (lo > hi)."""
    merged: list[Interval] = []
    for lo, hi in sorted((int(lo), int(hi)) for lo, hi in intervals if lo <= hi):
        if merged and lo <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], hi))
        else:
            merged.append((lo, hi))
    return tuple(merged)


def _balanced_edges(num_heads: int, context: int) -> tuple[int, ...]:
    base, extra = divmod(context, num_heads)
    return tuple(h * base + min(h, extra) for h in range(num_heads + 1))


def _pairs_below(edge: int, length: int) -> int:
    """Pairs (i, j) of a sequence with a distance below `edge`: sum of ``length - d`` over ``d < edge``."""
    return edge * length - edge * (edge - 1) // 2


def _equal_area_edges(num_heads: int, context: int) -> tuple[int, ...]:
    """Edges whose cumulative pair counts come nearest to ``h / num_heads`` of all pairs (ties: the lower).

    The real root of ``e*C - e*(e-1)/2 = h*T/H`` is taken in integers, so that no size loses exactness. Near
    ``C = H`` a distance outweighs a share; edges then move just enough for each head to own a distance.
    """
    sharing = min(num_heads, context)
    total = context * (context + 1) // 2
    edges = [0]
    for head in range(1, sharing):
        discriminant = (2 * context + 1) ** 2 * sharing - 8 * head * total
        below = max(0, (2 * context + 1 - isqrt(discriminant // sharing) - 1) // 2 - 1)
        while _pairs_below(below + 1, context) * sharing <= head * total:
            below += 1
        left = head * total - _pairs_below(below, context) * sharing
        right = _pairs_below(below + 1, context) * sharing - head * total
        nearest = below if left <= right else below + 1
        edges.append(min(max(nearest, edges[-1] + 1), context - (sharing - head)))
    edges.extend([context] * (num_heads - len(edges) + 1))
    return tuple(edges)


def _require_int(what: str, value: object, least: int, most: int = LIMIT) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what} must be an integer, got {value!r} of type {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{what} must be between {least} and {most}, got {value}")
    return int(value)


def _check_intervals(intervals: Iterable[Iterable[Sequence[int]]]) -> tuple[Bands, ...]:
    heads = []
    for head, given in enumerate(intervals):
        pairs = [tuple(interval) for interval in given]
        for pair in pairs:
            if len(pair) != 2:
                raise ValueError(f"head {head}: an interval is a pair (lo, hi) of distances, got {pair}")
            for value in pair:
                if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                    raise TypeError(f"head {head}: the distances of interval {pair} must be integers")
            lo, hi = pair
            if lo < 0 or hi < 0:
                raise ValueError(
                    f"head {head}: interval [{lo}, {hi}] has a negative distance; attention is causal, "
                    "distances i - j start at 0"
                )
            if lo > hi:
                raise ValueError(
                    f"head {head}: interval [{lo}, {hi}] has lo > hi; leave an empty interval out instead"
                )
            if hi > LIMIT:
                raise ValueError(f"head {head}: interval [{lo}, {hi}] exceeds the largest distance {LIMIT}")
        merged = merge_intervals(pairs)
        if len(merged) > 2:
            raise ValueError(
                f"head {head}: {list(merged)} are {len(merged)} disjoint intervals after merging; "
                "a head has at most two, join some or spread them over more heads"
            )
        heads.append(merged)
    return tuple(heads)


@dataclass(frozen=True)
class BandLayout:
    """Per-head distance intervals of banded causal attention.

    Make one with a classmethod named after the layout. Instances are immutable and hashable; `spec` is a
    readable string that `from_spec` turns back into an equal layout.

    Attributes
    ----------
    name : str
        One of `LAYOUT_NAMES`.
    num_heads : int
        Number of query heads ``H``.
    context_length : int or None
        ``C``, the length that the layout is made for; None takes the sequence's own length (of packed
        sequences: each document's own).
    allow_longer : bool
        May a sequence be longer than ``C``? If so, distances from ``C`` on are seen only by a head whose
        interval reaches them.
    window : int or None
        The ``w`` of ``sliding_window``.
    intervals : tuple of tuple of (int, int), or None
        The merged intervals of each head of ``custom``.
    spec : str
        Text form, such as ``"spattention:heads=16,context=4096"``.
    """

    name: str
    num_heads: int
    context_length: int | None = None
    allow_longer: bool = False
    window: int | None = None
    intervals: tuple[Bands, ...] | None = None
    # A plain attribute, not a property: it is read on every attention call and traced by torch.compile.
    spec: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def set_field(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.name not in LAYOUT_NAMES:
            raise ValueError(f"unknown layout {self.name!r}; known: {', '.join(LAYOUT_NAMES)}")
        set_field("num_heads", _require_int("num_heads", self.num_heads, 1))
        if self.context_length is not None:
            set_field("context_length", _require_int("context_length", self.context_length, 1))
        elif self.allow_longer:
            raise ValueError("allow_longer=True needs a context_length; without one no length is too long")
        set_field("allow_longer", bool(self.allow_longer))
        if self.name == "sliding_window":
            set_field("window", _require_int("window", self.window, 1))
        elif self.window is not None:
            raise ValueError(f"layout {self.name!r} takes no window, got {self.window}")
        if self.name == "custom":
            if self.intervals is None:
                raise ValueError("a custom layout needs intervals: for each head a sequence of (lo, hi)")
            set_field("intervals", _check_intervals(self.intervals))
            assert self.intervals is not None
            if len(self.intervals) != self.num_heads:
                raise ValueError(f"{len(self.intervals)} heads have intervals, num_heads is {self.num_heads}")
        elif self.intervals is not None:
            raise ValueError(f"layout {self.name!r} takes no intervals; use BandLayout.custom")
        set_field("spec", self._make_spec())

    def __hash__(self) -> int:
        # A str remembers its hash; hashing 64 heads of nested tuples on each table lookup costs microseconds.
        return hash(self.spec)

    # --- construction -------------------------------------------------------------------------------------

    @classmethod
    def spattention(
        cls, num_heads: int, context_length: int | None = None, *, allow_longer: bool = False
    ) -> BandLayout:
        """SPAttention: an inclusive local window ``[0, width(h)]`` and the head's own share of distances."""
        return cls("spattention", num_heads, context_length, allow_longer)

    @classmethod
    def exclusive(
        cls, num_heads: int, context_length: int | None = None, *, allow_longer: bool = False
    ) -> BandLayout:
        """Only the head's own share of distances; queries before ``start(h)`` have no key."""
        return cls("exclusive", num_heads, context_length, allow_longer)

    @classmethod
    def local_only(
        cls, num_heads: int, context_length: int | None = None, *, allow_longer: bool = False
    ) -> BandLayout:
        """Only the local window ``[0, width(h)]``."""
        return cls("local_only", num_heads, context_length, allow_longer)

    @classmethod
    def gapped(
        cls, num_heads: int, context_length: int | None = None, *, allow_longer: bool = False
    ) -> BandLayout:
        """The first half of each head's share; nobody sees the second half."""
        return cls("gapped", num_heads, context_length, allow_longer)

    @classmethod
    def causal(
        cls, num_heads: int, context_length: int | None = None, *, allow_longer: bool = False
    ) -> BandLayout:
        """Dense causal attention, ``[0, C - 1]``."""
        return cls("causal", num_heads, context_length, allow_longer)

    @classmethod
    def equal_area(
        cls, num_heads: int, context_length: int | None = None, *, allow_longer: bool = False
    ) -> BandLayout:
        """SPAttention with shares of equal area.

        The shares still partition ``0 … C - 1``, and each holds, as nearly as whole distances allow, the same
        number of (i, j) pairs at ``N = C``: far bands are wider, because a far distance has fewer pairs. The
        local window is SPAttention's own, ``[0, width(h)]`` with ``width`` of the equal-width partition.
        """
        return cls("equal_area", num_heads, context_length, allow_longer)

    @classmethod
    def sliding_window(
        cls, num_heads: int, window: int, context_length: int | None = None, *, allow_longer: bool = False
    ) -> BandLayout:
        """The last `window` keys, the query's own included: ``[0, window - 1]`` for each head."""
        return cls("sliding_window", num_heads, context_length, allow_longer, window=window)

    @classmethod
    def custom(
        cls,
        intervals: Iterable[Iterable[Sequence[int]]],
        context_length: int | None = None,
        *,
        allow_longer: bool = False,
    ) -> BandLayout:
        """Intervals given per head.

        Parameters
        ----------
        intervals : iterable over heads of iterables of (lo, hi)
            Closed intervals of distances. Overlapping or touching ones are merged; at most two may remain for
            a head. A head without intervals attends to nothing.
        context_length : int, optional
            Longest sequence; None accepts any length.

        Raises
        ------
        ValueError
            A negative distance, ``lo > hi``, or more than two disjoint intervals, with the values.
        """
        checked = _check_intervals(intervals)
        return cls("custom", len(checked), context_length, allow_longer, intervals=checked)

    def _make_spec(self) -> str:
        parts = [f"heads={self.num_heads}"]
        if self.window is not None:
            parts.append(f"window={self.window}")
        if self.context_length is not None:
            parts.append(f"context={self.context_length}")
        if self.allow_longer:
            parts.append("longer=1")
        if self.intervals is not None:
            heads = ("+".join(f"{lo}-{hi}" for lo, hi in head) or "none" for head in self.intervals)
            parts.append("bands=" + "/".join(heads))
        return f"{self.name}:{','.join(parts)}"

    @staticmethod
    def from_spec(spec: str) -> BandLayout:
        """The layout that `spec` names; equal text gives the same object.

        Raises
        ------
        ValueError
            Text that no layout has as its `spec`; the message quotes it and says what is wrong.
        """
        return _parse_spec(spec)

    # --- bands --------------------------------------------------------------------------------------------

    @property
    def depends_on_length(self) -> bool:
        """Do the bands follow the sequence's (of packed sequences: each document's) own length?"""
        return self.context_length is None and self.name in _FROM_CONTEXT

    def check_length(self, length: int) -> None:
        """Raise ValueError when a sequence of `length` is longer than the layout's context allows."""
        if self.context_length is not None and length > self.context_length and not self.allow_longer:
            raise ValueError(
                f"a sequence of {length} is longer than the layout's context_length {self.context_length}; "
                "make the layout for the longer context, or pass allow_longer=True to it"
            )

    def edges(self, length: int) -> tuple[int, ...]:
        """The ``H + 1`` edges of the heads' shares of the distances: head h owns ``[edges[h], edges[h+1])``.

        Defined for the partitioning layouts (spattention, exclusive, gapped, equal_area).
        """
        if self.name not in _PARTITIONING:
            raise ValueError(f"layout {self.name!r} does not partition the distances among its heads")
        context = self._context(length)
        return (_equal_area_edges if self.name == "equal_area" else _balanced_edges)(self.num_heads, context)

    def bands(self, length: int) -> tuple[Bands, ...]:
        """Merged intervals of each head, near first, at most two, for a sequence of `length`.

        `length` matters only when the layout has no context length of its own: then ``C = length``.
        """
        return _bands(self, self._context(length))

    def table(self, length: int) -> NDArray[np.int32]:
        """The bands as kernels take them: read-only int32 ``(H, 4)`` of near_lo, near_hi, far_lo, far_hi.

        A missing interval is `EMPTY`. Cached.
        """
        return _table(self, self._context(length))

    def packed_table(self, lengths: Sequence[int]) -> NDArray[np.int32]:
        """Tables of packed documents of `lengths`: int32 ``(M, H, 4)``.

        ``M = len(lengths)`` when the bands follow each document's own length, else 1: one row for all.
        """
        if not self.depends_on_length or not len(lengths):
            return self.table(max(lengths, default=0))[None]
        return np.stack([self.table(length) for length in lengths])

    def _context(self, length: int) -> int:
        length = _require_int("length", length, 0)
        return length if self.depends_on_length else self.context_length or 0

    # --- work ---------------------------------------------------------------------------------------------

    def pairs_per_head(self, length: int) -> tuple[int, ...]:
        """Attended (i, j) pairs of each head: ``Σ_{d in bands(h)} max(0, N - d)``."""
        return tuple(
            sum(
                _pairs_below(min(hi + 1, length), length) - _pairs_below(min(lo, length), length)
                for lo, hi in head
            )
            for head in self.bands(length)
        )

    def pairs(self, length: int) -> int:
        """Attended (i, j) pairs of all heads."""
        return sum(self.pairs_per_head(length))

    def useful_flops(self, length: int, head_dim: int, direction: str = "forward") -> int:
        """Floating-point operations of one batch row's pairs: ``4*D`` each forward, ``10*D`` backward."""
        per_pair = {"forward": 4, "backward": 10}
        if direction not in per_pair:
            raise ValueError(f"direction must be 'forward' or 'backward', got {direction!r}")
        return self.pairs(length) * per_pair[direction] * head_dim

    def load(self, length: int) -> tuple[float, ...]:
        """Each head's share of all attended pairs; sums to 1 (all zeros if nothing is attended)."""
        per_head = self.pairs_per_head(length)
        total = sum(per_head)
        return tuple(pairs / total if total else 0.0 for pairs in per_head)

    def coverage(self, length: int | None = None) -> Coverage:
        """How many of the distances ``0 … length - 1`` at least one, and exactly one, head attends to.

        `length` defaults to the context length, and must be given for a layout without one.
        """
        if length is None:
            if self.context_length is None:
                raise ValueError(f"{self.spec} has no context length of its own: give a length")
            length = self.context_length
        steps: dict[int, int] = {}
        for head in self.bands(length):
            for lo, hi in head:
                begin, end = min(lo, length), min(hi + 1, length)
                steps[begin] = steps.get(begin, 0) + 1
                steps[end] = steps.get(end, 0) - 1
        seen = seen_once = heads = previous = 0
        for distance in sorted(steps):
            seen += (distance - previous) * (heads >= 1)
            seen_once += (distance - previous) * (heads == 1)
            heads, previous = heads + steps[distance], distance
        return Coverage(length, seen, seen_once)

    def executed_pairs(self, length: int, query_rows: int, key_rows: int) -> int:
        """Pairs that a kernel computes whose key ranges follow the bands' edges, masked pairs included.

        A tile of `query_rows` queries from ``q0`` on visits, for each band, the keys from
        ``max(0, q0 - hi)`` to ``q_last - lo``, their number rounded up to a multiple of `key_rows`. Each
        visited key costs `query_rows` pairs, also in a tile that the sequence's end cuts off. Keys that a
        tile visits for both bands count twice.
        """
        query_rows = _require_int("query_rows", query_rows, 1)
        key_rows = _require_int("key_rows", key_rows, 1)
        first_query = np.arange(0, _require_int("length", length, 0), query_rows, dtype=np.int64)
        last_query = np.minimum(first_query + query_rows, length) - 1
        keys = 0
        for head in self.bands(length):
            for lo, hi in head:
                count = np.maximum(last_query - lo - np.maximum(first_query - hi, 0) + 1, 0)
                keys += int((-(-count // key_rows) * key_rows).sum())
        return keys * query_rows


@lru_cache(maxsize=4096)
def _bands(layout: BandLayout, context: int) -> tuple[Bands, ...]:
    heads = range(layout.num_heads)
    if layout.name == "custom":
        assert layout.intervals is not None
        return layout.intervals
    if layout.name == "sliding_window":
        assert layout.window is not None
        return tuple(((0, layout.window - 1),) for _ in heads)
    if layout.name == "causal":
        return tuple(merge_intervals([(0, context - 1)]) for _ in heads)
    balanced = _balanced_edges(layout.num_heads, context)
    width = [balanced[h + 1] - balanced[h] for h in heads]
    if layout.name == "local_only":
        return tuple(((0, width[h]),) for h in heads)
    if layout.name == "gapped":
        return tuple(merge_intervals([(balanced[h], balanced[h] + width[h] // 2 - 1)]) for h in heads)
    edges = layout.edges(context)
    shares = [(edges[h], edges[h + 1] - 1) for h in heads]
    if layout.name == "exclusive":
        return tuple(merge_intervals([shares[h]]) for h in heads)
    return tuple(merge_intervals([(0, width[h]), shares[h]]) for h in heads)


@lru_cache(maxsize=4096)
def _table(layout: BandLayout, context: int) -> NDArray[np.int32]:
    padded = [(*head, EMPTY, EMPTY)[:2] for head in _bands(layout, context)]
    table = np.array(padded, dtype=np.int32).reshape(layout.num_heads, 4)
    table.flags.writeable = False
    return table


def _parse_bands(spec: str, text: str) -> list[list[Interval]]:
    heads: list[list[Interval]] = []
    for part in text.split("/"):
        if part == "none":
            heads.append([])
            continue
        if not re.fullmatch(r"\d+-\d+(\+\d+-\d+)*", part):
            raise ValueError(f"layout {spec!r}: a head's bands read like '0-3+8-15' or 'none', got {part!r}")
        pairs = (interval.split("-") for interval in part.split("+"))
        heads.append([(int(lo), int(hi)) for lo, hi in pairs])
    return heads


@lru_cache(maxsize=4096)
def _parse_spec(spec: str) -> BandLayout:
    if not isinstance(spec, str):
        raise TypeError(f"a layout's spec is a string, got {spec!r} of type {type(spec).__name__}")
    name, colon, rest = spec.partition(":")
    if name not in LAYOUT_NAMES or not colon:
        raise ValueError(f"layout {spec!r}: expected 'name:heads=…' with a name of {', '.join(LAYOUT_NAMES)}")
    fields: dict[str, str] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if key not in ("heads", "window", "context", "longer", "bands") or not equals or key in fields:
            raise ValueError(
                f"layout {spec!r}: expected heads=, window=, context=, longer= or bands=, each at most once, "
                f"got {part!r}"
            )
        if key != "bands" and not re.fullmatch(r"[0-9]{1,18}", value):
            raise ValueError(f"layout {spec!r}: {key} must be a non-negative integer, got {value!r}")
        fields[key] = value
    if "heads" not in fields:
        raise ValueError(f"layout {spec!r}: heads= is missing")
    if fields.get("longer", "1") not in ("0", "1"):
        raise ValueError(f"layout {spec!r}: longer must be 0 or 1, got {fields['longer']!r}")
    intervals = _parse_bands(spec, fields["bands"]) if "bands" in fields else None
    try:
        return BandLayout(
            name,
            int(fields["heads"]),
            int(fields["context"]) if "context" in fields else None,
            fields.get("longer", "0") == "1",
            int(fields["window"]) if "window" in fields else None,
            None if intervals is None else _check_intervals(intervals),
        )
    except ValueError as error:
        raise ValueError(f"layout {spec!r}: {error}") from error


def _equal_area_edges_of_each(num_heads: int, contexts: Tensor) -> Tensor:
    """`_equal_area_edges` of many contexts at once: ``(M, H + 1)`` int64 of ``(M, 1)`` int64."""
    import torch

    head = torch.arange(num_heads + 1, dtype=torch.int64, device=contexts.device)
    sharing = contexts.clamp(1, num_heads)
    target = head * (contexts * (contexts + 1) // 2)

    def pairs_below(edge: Tensor) -> Tensor:
        return (edge * contexts - edge * (edge - 1) // 2) * sharing

    # The root in floating point is at most one too large, and four steps too small.
    span = (2 * contexts + 1).double()
    root = (span - (span * span - 8 * target.double() / sharing).clamp(min=0).sqrt()) / 2
    below = (root.long() - 2).clamp(min=0)
    for _ in range(4):
        below = below + (pairs_below(below + 1) <= target).long()
    nearest = below + (target - pairs_below(below) > pairs_below(below + 1) - target).long()
    # At least one distance a head: a running maximum of what an edge is ahead of its head's number.
    edges = (nearest - head).clamp(min=0).cummax(1).values + head
    edges = torch.minimum(edges, contexts - sharing + head)
    return torch.where(head < sharing, edges, contexts).masked_fill(head == 0, 0)


def length_tables(layout: BandLayout, lengths: Tensor) -> Tensor:
    """``layout.packed_table`` in tensor operations on the device of `lengths`, without reading them on the
    host.

    Parameters
    ----------
    layout : BandLayout
        One whose bands follow the sequence's own length.
    lengths : Tensor
        ``(M,)`` integer lengths of documents.

    Returns
    -------
    Tensor
        int32 ``(M, H, 4)``.

    Raises
    ------
    ValueError
        A layout whose bands don't depend on the length.
    """
    import torch

    if not layout.depends_on_length:
        raise ValueError(f"the bands of {layout.spec} don't depend on the length: use its table")
    context = lengths.long()[:, None]
    head = torch.arange(layout.num_heads, device=lengths.device)
    base = context // layout.num_heads
    extra = context - base * layout.num_heads
    width = base + (head < extra)
    start = head * base + torch.minimum(head, extra)
    last = start + width - 1
    zero = torch.zeros_like(start)
    nothing = (torch.full_like(start, EMPTY[0]), torch.full_like(start, EMPTY[1]))
    near, far = (start, last), nothing
    if layout.name == "causal":
        near = (zero, (context - 1).expand_as(start))
    elif layout.name == "local_only":
        near = (zero, width)
    elif layout.name == "gapped":
        near = (start, start + width // 2 - 1)
    elif layout.name != "exclusive":
        if layout.name == "equal_area":
            edges = _equal_area_edges_of_each(layout.num_heads, context)
            start, last = edges[:, :-1], edges[:, 1:] - 1
        elif layout.name != "spattention":
            raise ValueError(f"no tables of many lengths are known for layout {layout.name!r}")
        touches = start <= width + 1
        near = (zero, torch.where(touches, torch.maximum(width, last), width))
        far = (start.masked_fill(touches, EMPTY[0]), last.masked_fill(touches, EMPTY[1]))
    columns = []
    for lo, hi in (near, far):
        is_empty = lo > hi
        columns += [lo.masked_fill(is_empty, EMPTY[0]), hi.masked_fill(is_empty, EMPTY[1])]
    return torch.stack(columns, -1).int()
