"""Band layouts: which distances ``d = i - j`` each head attends to, and how much work that is.

A layout is a handful of integers per head. Kernels receive them as an int32 table; everything that can be
said about a layout without running it (pairs, coverage, load, executed work) is a closed form over them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isqrt
from typing import TYPE_CHECKING, Any, overload

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

MAX_HEADS = 2**16
"""Most heads of a layout: what is kept for each stays small, whatever a few letters of a spec ask for."""

FLOPS_PER_PAIR = {"forward": 4, "backward": 10, "decode": 4}
"""Floating-point operations that each direction needs for an attended pair, divided by the head dim."""


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


# --- the layouts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    """What intervals are computed from: arrays of one row a context length and one column a head.

    NumPy's on the host; on a device tensors, whose values the host never reads.
    """

    layout: BandLayout
    context: Any  # (M, 1): C
    width: Any  # (M, H): width(h)
    begin: Any  # (M, H): the first distance of the head's own share
    end: Any  # (M, H): the one after its last


@dataclass(frozen=True)
class _Kind:
    """What a layout's name stands for.

    Attributes
    ----------
    intervals : callable
        At most two closed intervals (lo, hi) of each head, in any order; lo > hi is empty. Integers or
        arrays that broadcast to one entry a head.
    edges : callable, optional
        ``(num_heads, context)`` to the ``num_heads + 1`` edges of the heads' shares, where these don't have
        equal widths.
    edges_of_each : callable, optional
        The same for tensors, of contexts ``(M, 1)``: ``(M, num_heads + 1)``.
    partitions : bool
        Do the heads share the distances out among themselves?
    parameters : tuple of str
        The fields of `BandLayout` that the layout needs besides heads and context.
    from_context : bool
        Do the bands follow from C?
    is_autoregressive : bool
        Without C, does what a query sees depend on no later token?
    is_uniform : bool
        Has each head the same bands, however many there are?
    """

    intervals: Callable[[_Heads], Sequence[tuple[Any, Any]]]
    edges: Callable[[int, int], tuple[int, ...]] | None = None
    edges_of_each: Callable[[int, Tensor], Tensor] | None = None
    partitions: bool = False
    parameters: tuple[str, ...] = ()
    from_context: bool = True
    is_autoregressive: bool = False
    is_uniform: bool = False


def _window_and_share(heads: _Heads) -> Sequence[tuple[Any, Any]]:
    return (0, heads.width), (heads.begin, heads.end - 1)


def _given(heads: _Heads) -> Sequence[tuple[Any, Any]]:
    bands = heads.layout.intervals or ()
    ends = np.array([(*head, EMPTY, EMPTY)[:2] for head in bands], dtype=np.int64)
    return (ends[:, 0, 0], ends[:, 0, 1]), (ends[:, 1, 0], ends[:, 1, 1])


_KINDS = {
    "spattention": _Kind(_window_and_share, partitions=True),
    "exclusive": _Kind(lambda heads: [(heads.begin, heads.end - 1)], partitions=True),
    "gapped": _Kind(
        lambda heads: [(heads.begin, heads.begin + (heads.end - heads.begin) // 2 - 1)], partitions=True
    ),
    "equal_area": _Kind(
        _window_and_share, edges=_equal_area_edges, edges_of_each=_equal_area_edges_of_each, partitions=True
    ),
    "local_only": _Kind(lambda heads: [(0, heads.width)]),
    "causal": _Kind(lambda heads: [(0, heads.context - 1)], is_autoregressive=True, is_uniform=True),
    "sliding_window": _Kind(
        lambda heads: [(0, (heads.layout.window or 0) - 1)],
        parameters=("window",),
        from_context=False,
        is_autoregressive=True,
        is_uniform=True,
    ),
    "custom": _Kind(_given, parameters=("intervals",), from_context=False, is_autoregressive=True),
}
LAYOUT_NAMES = tuple(_KINDS)


def _share_out(xp: Any, total: int, context: Any, head: Any) -> tuple[Any, Any]:
    """``width(h)`` and ``start(h)`` of the heads ``head`` of `total`."""
    base = context // total
    extra = context - base * total
    return base + (head < extra), head * base + xp.minimum(head, extra)


def _tables(xp: Any, heads: _Heads) -> Any:
    """The merged bands, ``(M, H, 4)``; `xp` is numpy or torch, whichever made the arrays of `heads`."""
    zeros = xp.zeros_like(heads.begin)
    ends = []
    for lo, hi in (*_KINDS[heads.layout.name].intervals(heads), EMPTY, EMPTY)[:2]:
        lo, hi = lo + zeros, hi + zeros
        ends.append((xp.where(lo > hi, EMPTY[0], lo), xp.where(lo > hi, EMPTY[1], hi)))
    (near_lo, near_hi), (far_lo, far_hi) = ends
    swaps = far_lo < near_lo
    near_lo, far_lo = xp.where(swaps, far_lo, near_lo), xp.where(swaps, near_lo, far_lo)
    near_hi, far_hi = xp.where(swaps, far_hi, near_hi), xp.where(swaps, near_hi, far_hi)
    touches = far_lo <= near_hi + 1
    columns = (
        near_lo,
        xp.where(touches, xp.maximum(near_hi, far_hi), near_hi),
        xp.where(touches, EMPTY[0], far_lo),
        xp.where(touches, EMPTY[1], far_hi),
    )
    return xp.stack(columns, -1)


def _runs(indices: Sequence[int]) -> list[range]:
    """The indices, in order, as ranges as long as possible."""
    runs: list[range] = []
    for index in indices:
        if runs and index == runs[-1].stop:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs


def require_int(what: str, value: object, least: int, most: int = LIMIT) -> int:
    """The integer that an argument holds, NumPy's too.

    Raises
    ------
    TypeError
        Anything else, bool too.
    ValueError
        An integer out of bounds, which are inclusive.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what} must be an integer, got {value!r} of type {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{what} must be between {least} and {most}, got {value}")
    return int(value)


def _check_intervals(intervals: Iterable[Iterable[Sequence[int]]]) -> tuple[Bands, ...]:
    heads = []
    for head, given in enumerate(intervals):
        try:
            pairs = [tuple(interval) for interval in given]
        except TypeError:
            raise TypeError(
                f"head {head}: a head's bands are a list of pairs (lo, hi), got {given!r}"
            ) from None
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
        sequences: each document's own). Then what a token sees depends on how many tokens follow it: fine
        for training at one length, but such a layout is not autoregressive (see `is_autoregressive`).
    allow_longer : bool
        May a sequence be longer than ``C``? If so, distances from ``C`` on are seen only by a head whose
        interval reaches them.
    window : int or None
        The ``w`` of ``sliding_window``.
    intervals : tuple of tuple of (int, int), or None
        The merged intervals of each head of ``custom``.
    of_heads : int or None
        Of a part of a layout (see `heads`) whose bands follow from how many heads share the distances: that
        number, the ``H`` of the whole.
    head_indices : tuple of int, or None
        Which of the `of_heads` heads these are, in their order here.
    spec : str
        Text form, such as ``"spattention:heads=16,context=4096"``.
    """

    name: str
    num_heads: int
    context_length: int | None = None
    allow_longer: bool = False
    window: int | None = None
    intervals: tuple[Bands, ...] | None = None
    of_heads: int | None = None
    head_indices: tuple[int, ...] | None = None
    # A plain attribute, not a property: it is read on every attention call and traced by torch.compile.
    spec: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def set_field(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.name not in _KINDS:
            raise ValueError(f"unknown layout {self.name!r}; known: {', '.join(LAYOUT_NAMES)}")
        set_field("num_heads", require_int("num_heads", self.num_heads, 1, MAX_HEADS))
        if self.context_length is not None:
            set_field("context_length", require_int("context_length", self.context_length, 1))
        elif self.allow_longer:
            raise ValueError("allow_longer=True needs a context_length; without one no length is too long")
        set_field("allow_longer", bool(self.allow_longer))
        parameters = _KINDS[self.name].parameters
        if "window" in parameters:
            if self.window is None:
                raise ValueError(
                    f"layout {self.name!r} needs a window, the number of distances that each head sees: "
                    f"BandLayout.{self.name}({self.num_heads}, window=256), "
                    f"or as text '{self.name}:window=256'"
                )
            set_field("window", require_int("window", self.window, 1))
        elif self.window is not None:
            raise ValueError(f"layout {self.name!r} takes no window, got {self.window}")
        if "intervals" in parameters:
            if self.intervals is None:
                raise ValueError(
                    f"a {self.name} layout needs intervals: for each head a sequence of (lo, hi), "
                    f"or as text '{self.name}:bands=0-3+8-15/0-7'"
                )
            intervals = _check_intervals(self.intervals)
            set_field("intervals", intervals)
            if len(intervals) != self.num_heads:
                raise ValueError(f"{len(intervals)} heads have intervals, num_heads is {self.num_heads}")
        elif self.intervals is not None:
            raise ValueError(f"layout {self.name!r} takes no intervals; use BandLayout.custom")
        if self.of_heads is not None or self.head_indices is not None:
            self._check_part(set_field)
        set_field("spec", self._make_spec())

    def _check_part(self, set_field: Callable[[str, object], None]) -> None:
        if self.of_heads is None or self.head_indices is None:
            raise ValueError(
                f"of_heads and head_indices belong together, got {self.of_heads} and {self.head_indices}"
            )
        kind = _KINDS[self.name]
        if kind.is_uniform or not kind.from_context:
            raise ValueError(
                f"a part of a {self.name!r} layout is a {self.name!r} layout of its own, without of_heads "
                "and head_indices; BandLayout.heads makes it"
            )
        set_field("of_heads", require_int("of_heads", self.of_heads, 1, MAX_HEADS))
        indices = _check_indices(self.head_indices, self.of_heads)
        if len(indices) != self.num_heads:
            raise ValueError(f"head_indices are {len(indices)} heads, num_heads is {self.num_heads}")
        is_whole = indices == tuple(range(self.of_heads))
        set_field("head_indices", None if is_whole else indices)
        if is_whole:
            set_field("of_heads", None)

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
        if self.head_indices is not None:
            runs = (
                f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in _runs(self.head_indices)
            )
            parts += [f"of={self.of_heads}", "take=" + "+".join(runs)]
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

    # --- parts --------------------------------------------------------------------------------------------

    @overload
    def heads(self, indices: Iterable[int], /) -> BandLayout: ...
    @overload
    def heads(self, start: int, stop: int, /) -> BandLayout: ...
    def heads(self, indices: Iterable[int] | int, stop: int | None = None, /) -> BandLayout:
        """The layout of some of the heads, whose bands stay what they are: for tensor parallelism, say.

        Of `n` devices, the one of `rank` holds the heads ``H//n*rank … H//n*(rank+1) - 1`` and calls
        ``banded_attention`` with ``layout.heads(H//n*rank, H//n*(rank+1))``. A layout *made* for ``H//n``
        heads has other bands: there fewer heads share the distances. Also without a context length the bands
        come from the whole layout's heads. Of a part, indices count the part's own heads.

        Parameters
        ----------
        indices : iterable of int
            The heads, in the order in which they are wanted, each at most once; or the first head, with
            `stop`.
        stop : int
            The head after the last.

        Raises
        ------
        ValueError
            No head, one that the layout does not have, or one twice.

        Examples
        --------
        >>> BandLayout.spattention(16, 4096).heads(4, 8).spec
        'spattention:heads=4,of=16,take=4-7,context=4096'
        """
        if stop is not None:
            start = _check_index(indices)
            indices = range(start, _check_index(stop))
        elif not isinstance(indices, Iterable):
            raise TypeError(f"heads takes a sequence of indices, or start and stop; got {indices!r} alone")
        taken = _check_indices(indices, self.num_heads)
        kind = _KINDS[self.name]
        settings = (self.name, len(taken), self.context_length, self.allow_longer, self.window)
        if kind.is_uniform:
            return BandLayout(*settings)
        if self.intervals is not None:
            return BandLayout(*settings, intervals=tuple(self.intervals[head] for head in taken))
        of_heads, own = self._whole()
        return BandLayout(*settings, of_heads=of_heads, head_indices=tuple(own[head] for head in taken))

    def _whole(self) -> tuple[int, Sequence[int]]:
        """How many heads share the distances, and which of them are these."""
        if self.of_heads is None or self.head_indices is None:
            return self.num_heads, range(self.num_heads)
        return self.of_heads, self.head_indices

    def check_heads(self, query_heads: int) -> None:
        """Raise ValueError, saying what to do, when q has other than the layout's number of heads."""
        if query_heads == self.num_heads:
            return
        mismatch = f"the layout is made for {self.num_heads} query heads and q has {query_heads}"
        if query_heads > self.num_heads:
            raise ValueError(f"{mismatch}: make it with num_heads={query_heads}")
        raise ValueError(
            f"{mismatch}: where q holds some of a model's heads (tensor parallelism), pass their bands, "
            f"layout.heads(start, start + {query_heads}) or layout.heads(indices); a layout made for "
            f"{query_heads} heads has other bands"
        )

    # --- bands --------------------------------------------------------------------------------------------

    @property
    def depends_on_length(self) -> bool:
        """Do the bands follow the sequence's (of packed sequences: each document's) own length?"""
        return self.context_length is None and _KINDS[self.name].from_context

    @property
    def is_autoregressive(self) -> bool:
        """Does a query see the same keys however many tokens follow it?

        False for spattention, exclusive, local_only, gapped and equal_area without a context length, whose
        bands grow with the sequence: a model trained so sees other bands when it decodes token by token.
        """
        return self.context_length is not None or _KINDS[self.name].is_autoregressive

    def has_bands_of(self, other: BandLayout) -> bool:
        """Do the heads see the same distances in any sequence that both layouts accept?"""
        if self.depends_on_length or other.depends_on_length:
            return self == other
        return self.num_heads == other.num_heads and bool((self.table(0) == other.table(0)).all())

    def require_autoregressive(self, purpose: str) -> None:
        """Raise ValueError unless `is_autoregressive`; `purpose` is what needs it, such as ``"decoding"``."""
        if not self.is_autoregressive:
            raise ValueError(
                f"{purpose} needs bands that don't follow the sequence's length, and those of {self.spec} "
                "do: make the layout with the context length that the model is trained at, such as "
                f"BandLayout.{self.name}({self._whole()[0]}, context_length=4096)"
            )

    def check_length(self, length: int) -> None:
        """Raise ValueError when a sequence of `length` is longer than the layout's context allows."""
        if self.context_length is not None and length > self.context_length and not self.allow_longer:
            raise ValueError(
                f"a sequence of {length} is longer than the layout's context_length {self.context_length}; "
                "make the layout for the longer context, or pass allow_longer=True to it (in a spec longer=1)"
            )

    def edges(self, length: int) -> tuple[int, ...]:
        """The ``H + 1`` edges of the heads' shares of the distances: head h owns ``[edges[h], edges[h+1])``.

        Defined for the partitioning layouts (spattention, exclusive, gapped, equal_area), not for a part of
        one.
        """
        kind = _KINDS[self.name]
        if not kind.partitions:
            raise ValueError(f"layout {self.name!r} does not partition the distances among its heads")
        if self.of_heads is not None:
            raise ValueError(f"{self.spec} is a part of a layout: only all heads partition the distances")
        return (kind.edges or _balanced_edges)(self.num_heads, self._context(length))

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
        length = require_int("length", length, 0)
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
        """Floating-point operations of one batch row's pairs, `FLOPS_PER_PAIR` times D each."""
        if direction not in FLOPS_PER_PAIR:
            raise ValueError(f"direction must be one of {tuple(FLOPS_PER_PAIR)}, got {direction!r}")
        return self.pairs(length) * FLOPS_PER_PAIR[direction] * head_dim

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
        query_rows = require_int("query_rows", query_rows, 1)
        key_rows = require_int("key_rows", key_rows, 1)
        first_query = np.arange(0, require_int("length", length, 0), query_rows, dtype=np.int64)
        last_query = np.minimum(first_query + query_rows, length) - 1
        keys = 0
        for head in self.bands(length):
            for lo, hi in head:
                count = np.maximum(last_query - lo - np.maximum(first_query - hi, 0) + 1, 0)
                keys += int((-(-count // key_rows) * key_rows).sum())
        return keys * query_rows


# Enough for the lengths in use; 64 heads take about 20 KiB here and 1 KiB as a table.
@lru_cache(maxsize=256)
def _bands(layout: BandLayout, context: int) -> tuple[Bands, ...]:
    return tuple(
        tuple((lo, hi) for lo, hi in (row[:2], row[2:]) if lo <= hi)
        for row in _table(layout, context).tolist()
    )


@lru_cache(maxsize=64)
def _table(layout: BandLayout, context: int) -> NDArray[np.int32]:
    total, own = layout._whole()
    head, contexts = np.array(own, dtype=np.int64), np.array([[context]], dtype=np.int64)
    width, begin = _share_out(np, total, contexts, head)
    end = begin + width
    kind = _KINDS[layout.name]
    if kind.edges is not None:
        edges = np.array(kind.edges(total, context), dtype=np.int64)
        begin, end = edges[None, head], edges[None, head + 1]
    table: NDArray[np.int32] = _tables(np, _Heads(layout, contexts, width, begin, end))[0].astype(np.int32)
    table.flags.writeable = False
    return table


def _check_index(value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"a head's index is an integer, got {value!r} of type {type(value).__name__}"
        ) from None


def _check_indices(indices: Iterable[object], num_heads: int) -> tuple[int, ...]:
    """The heads of a part of `num_heads` heads: at least one, each once, in any order."""
    taken: dict[int, None] = {}
    # One after the other: there may be no end of them.
    for value in indices:
        index = _check_index(value)
        if not 0 <= index < num_heads:
            raise ValueError(f"the layout has the heads 0 to {num_heads - 1}, got {index}")
        if index in taken:
            raise ValueError(f"each head of a layout can be taken once, got head {index} twice")
        taken[index] = None
    if not taken:
        raise ValueError("a part of a layout has at least one head, got none")
    return tuple(taken)


def _parse_heads(spec: str, text: str, count: int) -> tuple[int, ...]:
    runs = []
    for part in text.split("+"):
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part)
        if match is None:
            raise ValueError(f"layout {spec!r}: the heads of a part read like '4-7+12', got {part!r}")
        runs.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    # Before they are written out: a text of few letters may mean billions.
    total = sum(map(len, runs))
    if total != count or total > MAX_HEADS:
        raise ValueError(f"layout {spec!r}: take={text} are {total} heads, heads={count}")
    return tuple(head for run in runs for head in run)


def _parse_bands(spec: str, text: str) -> list[list[Interval]]:
    heads: list[list[Interval]] = []
    for part in text.split("/"):
        if part == "none":
            heads.append([])
            continue
        if not re.fullmatch(r"[0-9]{1,18}-[0-9]{1,18}(\+[0-9]{1,18}-[0-9]{1,18})*", part):
            raise ValueError(f"layout {spec!r}: a head's bands read like '0-3+8-15' or 'none', got {part!r}")
        pairs = (interval.split("-") for interval in part.split("+"))
        heads.append([(int(lo), int(hi)) for lo, hi in pairs])
    return heads


_SPEC_FIELDS = ("heads", "of", "take", "window", "context", "longer", "bands")


@lru_cache(maxsize=1024)
def _parse_spec(spec: str) -> BandLayout:
    if not isinstance(spec, str):
        raise TypeError(f"a layout's spec is a string, got {spec!r} of type {type(spec).__name__}")
    name, colon, rest = spec.partition(":")
    if name not in _KINDS or not colon:
        raise ValueError(f"layout {spec!r}: expected 'name:heads=…' with a name of {', '.join(LAYOUT_NAMES)}")
    fields: dict[str, str] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if key not in _SPEC_FIELDS or not equals or key in fields:
            raise ValueError(
                f"layout {spec!r}: expected {'=, '.join(_SPEC_FIELDS)}=, each at most once, got {part!r}"
            )
        if key not in ("bands", "take") and not re.fullmatch(r"[0-9]{1,18}", value):
            raise ValueError(f"layout {spec!r}: {key} must be a non-negative integer, got {value!r}")
        fields[key] = value
    if "heads" not in fields:
        raise ValueError(f"layout {spec!r}: heads= is missing")
    if fields.get("longer", "1") not in ("0", "1"):
        raise ValueError(f"layout {spec!r}: longer must be 0 or 1, got {fields['longer']!r}")
    intervals = _parse_bands(spec, fields["bands"]) if "bands" in fields else None
    indices = _parse_heads(spec, fields["take"], int(fields["heads"])) if "take" in fields else None
    try:
        return BandLayout(
            name,
            int(fields["heads"]),
            int(fields["context"]) if "context" in fields else None,
            fields.get("longer", "0") == "1",
            int(fields["window"]) if "window" in fields else None,
            None if intervals is None else _check_intervals(intervals),
            int(fields["of"]) if "of" in fields else None,
            indices,
        )
    except ValueError as error:
        raise ValueError(f"layout {spec!r}: {error}") from error


def length_tables(layout: BandLayout, lengths: Tensor) -> Tensor:
    """``layout.table`` of each of `lengths` in tensor operations on their device, without reading them on the
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
    total, own = layout._whole()
    # Made on the device: a copy of the host's would wait, and can't be captured in a CUDA graph.
    head = torch.cat([torch.arange(run.start, run.stop, device=lengths.device) for run in _runs(own)])
    context = lengths.long()[:, None]
    width, begin = _share_out(torch, total, context, head)
    end = begin + width
    edges_of_each = _KINDS[layout.name].edges_of_each
    if edges_of_each is not None:
        edges = edges_of_each(total, context)
        begin, end = edges[:, head], edges[:, head + 1]
    tables: Tensor = _tables(torch, _Heads(layout, context, width, begin, end)).int()
    return tables
