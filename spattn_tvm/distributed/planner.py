"""What each strategy moves and how even the work is, in closed form over a layout's bands.

Traffic is counted in rows: a row is one head's ``head_dim`` elements of one position of one batch element.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from spattn_tvm.bands import BandLayout, merge_intervals
from spattn_tvm.problem import TRAINING

from .shards import Rows, Shards

if TYPE_CHECKING:
    from spattn_tvm.target import MachineTarget

STRATEGIES = ("heads", "bands")

FLOPS_PER_BYTE = 1500
"""Floating-point operations in the time that a byte takes to arrive, assumed by ``"auto"``: about that of
GPUs of one host, 500 TFLOP/s beside 350 GB/s."""

_PAIR_FLOPS = 14  # times head_dim: forward 4, backward 10
_FORWARD_PAIR_FLOPS = 4

_PART_BYTES = 80 * 2**20
"""What could arrive in the time that one more part of the heads costs, assumed: 0.24 ms at 350 GB/s, for what
the host does about it and for the ends of its kernels. At N = 131072, H = 16, D = 128 two parts took less
time than three or four on four H100, three less than two on two; on two H200 four to six took as much as
three, within 2%, and eight more."""

# Positions in the search for an even deal; on few heads it ends before, with the best one.
_MOST_POSITIONS = 4000
# A deal that is this near to even, or to another, counts as that: then who moves less is preferred.
_EVEN = 1.001
_NEARLY_EVEN = 1.01


# --- heads ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The heads that a rank attends with under ``"heads"``.

    Attributes
    ----------
    groups : tuple of (int, tuple of int)
        Key/value heads, ascending, each with those of its query heads that are the rank's.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def query_heads(self) -> tuple[int, ...]:
        return tuple(head for _, heads in self.groups for head in heads)

    @property
    def kv_heads(self) -> tuple[int, ...]:
        return tuple(head for head, _ in self.groups)

    @property
    def rows_of_a_position(self) -> int:
        """Rows of q, k and v that the rank needs of each position."""
        return len(self.query_heads) + 2 * len(self.groups)


def _partition(loads: Sequence[int], bins: int, most: int) -> list[list[int]]:
    """Indices of `loads` in `bins` parts of at most `most`, the largest sum as small as a bounded search
    finds it.

    Depth first, the heaviest load first, each into the emptiest bin first: the first deal that is found is
    the greedy one.
    """
    order = sorted(range(len(loads)), key=lambda index: -loads[index])
    bound = max(-(-sum(loads) // bins), max(loads, default=0))
    sums, parts = [0] * bins, [[] for _ in range(bins)]  # type: tuple[list[int], list[list[int]]]
    best: tuple[int, list[list[int]]] | None = None
    positions = 0

    def place(depth: int) -> bool:
        """Returns whether the search is over."""
        nonlocal best, positions
        positions += 1
        if depth == len(order):
            best = max(sums), [list(part) for part in parts]
            return best[0] <= bound * _EVEN
        load, tried = loads[order[depth]], set()
        for index in sorted(range(bins), key=lambda each: (sums[each], each)):
            state = (sums[index], len(parts[index]))
            if len(parts[index]) >= most or state in tried:
                continue
            if best is not None and sums[index] + load >= best[0]:
                break
            tried.add(state)
            sums[index] += load
            parts[index].append(order[depth])
            is_over = place(depth + 1)
            parts[index].pop()
            sums[index] -= load
            if is_over or (best is not None and positions > _MOST_POSITIONS):
                return True
        return False

    place(0)
    assert best is not None
    return sorted((sorted(part) for part in best[1]), key=lambda part: (not part, part))


def _evenly(loads: Sequence[int], bins: int) -> list[list[int]]:
    """As `_partition`, with equal numbers where that costs next to nothing."""

    def heaviest(parts: list[list[int]]) -> int:
        return max(sum(loads[index] for index in part) for part in parts)

    free = _partition(loads, bins, len(loads))
    if max(map(len, free)) == -(-len(loads) // bins):
        return free
    equal = _partition(loads, bins, -(-len(loads) // bins))
    return equal if heaviest(equal) <= heaviest(free) * _NEARLY_EVEN else free


def _some_ranks_a_group(loads: Sequence[Sequence[int]], ranks: int) -> list[list[tuple[int, int]]]:
    """Each rank takes query heads of one group: the next rank goes where a rank has most to do."""
    counts = [1] * len(loads)
    for _ in range(ranks - len(loads)):
        splittable = [group for group, count in enumerate(counts) if count < len(loads[group])]
        if not splittable:
            break
        counts[max(splittable, key=lambda group: (sum(loads[group]) / counts[group], -group))] += 1
    return [
        [(group, index) for index in part]
        for group, count in enumerate(counts)
        for part in _evenly(loads[group], count)
    ]


def _consecutive(loads: Sequence[Sequence[int]], ranks: int) -> list[list[tuple[int, int]]]:
    """Consecutive query heads, whatever group they are of; the largest sum as small as can be."""
    heads = [(group, index) for group, each in enumerate(loads) for index in range(len(each))]

    def cut(most: int) -> list[list[tuple[int, int]]]:
        parts: list[list[tuple[int, int]]] = [[]]
        held = 0
        for head in heads:
            load = loads[head[0]][head[1]]
            if held + load > most and parts[-1]:
                parts.append([])
                held = 0
            parts[-1].append(head)
            held += load
        return parts

    low, high = max(map(max, loads)), sum(map(sum, loads))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= ranks else (middle + 1, high)
    return cut(low)


@lru_cache(maxsize=256)
def deal_heads(loads: tuple[int, ...], kv_heads: int, ranks: int) -> tuple[Share, ...]:
    """Deal query heads out to ranks, so that their work is as nearly equal as whole groups allow.

    A group is a key/value head with the query heads that read it. Where there are fewer groups than ranks,
    groups are split and their key/value head goes to several ranks. Ranks beyond the number of query heads
    get none.

    Parameters
    ----------
    loads : tuple of int
        Pairs of each query head.
    kv_heads : int
        Divides their number.
    ranks : int

    Returns
    -------
    tuple of Share
        One a rank.
    """
    size = len(loads) // kv_heads
    groups = [loads[group * size : (group + 1) * size] for group in range(kv_heads)]
    if kv_heads >= ranks:
        parts = _evenly([sum(group) for group in groups], ranks)
        deal = [[(group, index) for group in part for index in range(size)] for part in parts]
    else:

        def heaviest(deal: list[list[tuple[int, int]]]) -> int:
            return max(sum(groups[group][index] for group, index in part) for part in deal)

        deal = _some_ranks_a_group(groups, ranks)
        mixed = _consecutive(groups, ranks)
        if heaviest(mixed) * _NEARLY_EVEN < heaviest(deal):
            deal = mixed
    shares = []
    for part in [*deal, *([[]] * (ranks - len(deal)))]:
        held: dict[int, list[int]] = {}
        for group, index in part:
            held.setdefault(group, []).append(group * size + index)
        shares.append(Share(tuple((group, tuple(heads)) for group, heads in sorted(held.items()))))
    return tuple(shares)


def loads_of(layout: BandLayout, documents: Sequence[Rows]) -> tuple[int, ...]:
    """Pairs of each query head in all documents."""
    loads = [0] * layout.num_heads
    for length, count in Counter(end - begin for begin, end in documents).items():
        for head, pairs in enumerate(layout.pairs_per_head(length)):
            loads[head] += count * pairs
    return tuple(loads)


# --- bands ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemotePart:
    """Queries of a chunk whose document began before it, and the earlier keys that their bands touch.

    Attributes
    ----------
    document : (int, int)
        Rows of the document.
    queries : (int, int)
        Rows of the queries.
    keys : tuple of tuple of (int, int)
        Of each key/value head, sorted disjoint pieces of rows before the queries.
    """

    document: Rows
    queries: Rows
    keys: tuple[tuple[Rows, ...], ...]


def remote_parts(
    layout: BandLayout, kv_heads: int, shards: Shards, documents: Sequence[Rows], rank: int
) -> tuple[RemotePart, ...]:
    """What a rank's queries need from outside of their own chunk, under ``"bands"``: at most one part a
    chunk, because later documents of a chunk begin in it.
    """
    size = layout.num_heads // kv_heads
    parts = []
    for begin, end in shards.chunks[rank]:
        for document in documents:
            if not document[0] < begin < document[1]:
                continue
            last = min(end, document[1])
            bands = layout.bands(document[1] - document[0])
            pieces = [
                merge_intervals(
                    (max(document[0], begin - hi), min(begin - 1, last - 1 - lo))
                    for head in bands[group * size : (group + 1) * size]
                    for lo, hi in head
                )
                for group in range(kv_heads)
            ]
            keys = tuple(tuple((first, final + 1) for first, final in group) for group in pieces)
            parts.append(RemotePart(document, (begin, last), keys))
    return tuple(parts)


def fetched_rows(parts: Sequence[RemotePart], kv_heads: int) -> tuple[tuple[Rows, ...], ...]:
    """Of each key/value head, the rows that a rank's parts need, each once, sorted; its own among them."""
    return tuple(
        tuple(
            (first, final + 1)
            for first, final in merge_intervals(
                (begin, end - 1) for part in parts for begin, end in part.keys[group]
            )
        )
        for group in range(kv_heads)
    )


def _pairs_of_rows(bands: Sequence[Rows], begin: int, end: int) -> int:
    """Pairs of the queries from `begin` to before `end` of a document, for one head's bands."""

    def below(rows: int) -> int:
        return rows * (rows + 1) // 2 if rows > 0 else 0

    return sum(
        below(end - lo) - below(end - hi - 1) - below(begin - lo) + below(begin - hi - 1) for lo, hi in bands
    )


def _pairs_of_rank(layout: BandLayout, shards: Shards, documents: Sequence[Rows], rank: int) -> int:
    pairs = 0
    for begin, end in shards.chunks[rank]:
        for first, last in documents:
            if max(begin, first) < min(end, last):
                pairs += sum(
                    _pairs_of_rows(head, max(begin, first) - first, min(end, last) - first)
                    for head in layout.bands(last - first)
                )
    return pairs


# --- plans ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Rows that one strategy moves and pairs that it attends, of each rank, in the forward pass.

    The backward pass moves the same rows the other way.
    """

    received: tuple[int, ...]
    sent: tuple[int, ...]
    pairs: tuple[int, ...]

    @property
    def balance(self) -> float:
        """Mean over busiest of the pairs; the speed-up is at most so much times the number of ranks."""
        busiest = max(self.pairs)
        return sum(self.pairs) / (len(self.pairs) * busiest) if busiest else 1.0

    def cost(self, head_dim: int, itemsize: int) -> float:
        """Forward and backward on the busiest rank, in the time that a byte takes to arrive."""
        moved = max(there + back for there, back in zip(self.received, self.sent, strict=True))
        return max(self.pairs) * _PAIR_FLOPS * head_dim / FLOPS_PER_BYTE + moved * head_dim * itemsize


def _traffic_of_heads(shares: Sequence[Share], shards: Shards, loads: Sequence[int]) -> Traffic:
    rows = [shards.rows(rank) for rank in range(shards.ranks)]
    needs = [share.rows_of_a_position for share in shares]
    attends = [len(share.query_heads) for share in shares]
    others = [shards.length - own for own in rows]
    received, sent = [], []
    for rank, own in enumerate(rows):
        received.append(others[rank] * needs[rank] + own * (sum(attends) - attends[rank]))
        sent.append(own * (sum(needs) - needs[rank]) + others[rank] * attends[rank])
    pairs = tuple(sum(loads[head] for head in share.query_heads) for share in shares)
    return Traffic(tuple(received), tuple(sent), pairs)


def _traffic_of_bands(
    layout: BandLayout, kv_heads: int, shards: Shards, documents: Sequence[Rows]
) -> Traffic:
    received, sent = [0] * shards.ranks, [0] * shards.ranks
    for rank in range(shards.ranks):
        parts = remote_parts(layout, kv_heads, shards, documents, rank)
        for piece in (piece for group in fetched_rows(parts, kv_heads) for piece in group):
            for owner, _, begin, end in shards.owned(piece):
                if owner != rank:
                    received[rank] += 2 * (end - begin)
                    sent[owner] += 2 * (end - begin)
    pairs = tuple(_pairs_of_rank(layout, shards, documents, rank) for rank in range(shards.ranks))
    return Traffic(tuple(received), tuple(sent), pairs)


@dataclass(frozen=True)
class RankPlan:
    """What each strategy would do, and which one is taken.

    Attributes
    ----------
    strategy : str
        ``"heads"`` or ``"bands"``.
    reason : str
        Why.
    shards : Shards
    shares : tuple of Share
        The heads of each rank under ``"heads"``.
    traffic : dict of str to Traffic
        Of each strategy, and of ``"all_gather"`` of K and V with each rank's own queries.
    kv_heads : int
    parts : int
        In how many parts the heads travel where communication overlaps with attention. All but the first
        part's transfer, or all but the last one's attention, is hidden, and each part costs its start: the
        time ``hidden / parts + parts * start`` is least at the root of their ratio.
    """

    strategy: str
    reason: str
    shards: Shards
    shares: tuple[Share, ...]
    traffic: dict[str, Traffic]
    kv_heads: int
    parts: int

    def relative(self, strategy: str, over: Callable[[Sequence[int]], float] = max) -> float:
        """Rows received in the forward pass, of the busiest rank (or ``over=statistics.mean``, say), over
        those of an all-gather of K and V.
        """
        whole = over(self.traffic["all_gather"].received)
        return over(self.traffic[strategy].received) / whole if whole else 0.0

    def parts_on(self, device_type: str, wanted: int | None = None) -> int:
        """In how many parts the heads travel on devices of a type: as `wanted`, where there are so many."""
        if wanted is None:
            # On a CPU the cores that would attend are those that copy.
            return self.parts if device_type == "cuda" else 1
        return max(1, min(wanted, _most_parts(self.strategy, self.shares, self.kv_heads)))

    def describe(self, bytes_of_a_row: int) -> str:
        """A page of text: the choice, a line for each strategy, the deal of heads."""

        def mean(values: Sequence[int]) -> float:
            return sum(values) / len(values)

        rows = [self.shards.rows(rank) for rank in range(self.shards.ranks)]
        lines = [
            f"ranks     {len(rows)} with {min(rows):,} to {max(rows):,} rows of {self.shards.length:,}",
            f"strategy  {self.strategy}: {self.reason}",
            f"parts     {self.parts}, each attended while the next are on their way (on GPUs)",
            "received in the forward pass by the busiest rank, by the mean one; both over an all-gather of K "
            "and V; balance of pairs",
        ]
        for name, traffic in self.traffic.items():
            sizes = (max(traffic.received), mean(traffic.received))
            busiest, typical = (f"{size * bytes_of_a_row / 2**20:,.1f} MiB" for size in sizes)
            lines.append(
                f"  {name:10} {busiest:>14} {typical:>14}   {self.relative(name):.3f} "
                f"{self.relative(name, mean):.3f}   {traffic.balance:.3f}"
            )
        lines.append("heads     of each rank under 'heads'" + self._replicas())
        for rank, share in enumerate(self.shares):
            heads = ", ".join(map(str, share.query_heads)) or "none"
            lines.append(f"  rank {rank:<4} {heads}")
        return "\n".join(lines)

    def _replicas(self) -> str:
        copies = sum(len(share.groups) for share in self.shares) - self.kv_heads
        return f"; {copies} copies of key/value heads, which are fewer than ranks" if copies else ""


def strategies_of(target: MachineTarget, impl: str = "auto") -> tuple[str, ...]:
    """What a machine's kernels can do: ``"bands"`` needs ones that take other keys than the queries' rows.

    Parameters
    ----------
    target : MachineTarget
    impl : str
        As in ``banded_attention``; of the kernel families in question, the one of this name alone.
    """
    from spattn_tvm.families import families_for, find_family

    families = families_for(target) if impl == "auto" else (impl,)
    for abis in (find_family(name).abis for name in families):
        if all(name in abis and abis[name].takes_other_keys for name in TRAINING):
            return STRATEGIES
    return ("heads",)


def documents_of(boundaries: Sequence[int] | None, length: int) -> tuple[Rows, ...]:
    """Rows of each document that has some; of the whole sequence without boundaries."""
    if boundaries is None:
        return ((0, length),)
    if boundaries[-1] > length:
        raise ValueError(
            f"cu_seqlens must not exceed the sequence's {length} rows, got {boundaries[-1]} at its end"
        )
    return tuple((begin, end) for begin, end in pairwise(boundaries) if begin < end)


def plan_ranks(
    layout: BandLayout,
    shards: Shards,
    *,
    kv_heads: int | None = None,
    boundaries: Sequence[int] | None = None,
    head_dim: int = 128,
    itemsize: int = 2,
    strategy: str = "auto",
    available: Sequence[str] = STRATEGIES,
) -> RankPlan:
    """Plan attention of a sequence that ranks share.

    Parameters
    ----------
    layout : BandLayout
    shards : Shards
        Who holds which rows.
    kv_heads : int, optional
        Key/value heads, as many as query heads by default.
    boundaries : sequence of int, optional
        Of packed documents: ``cu_seqlens``.
    head_dim, itemsize : int
        Channels of a head, and bytes of one; they weigh work against traffic.
    strategy : str
        ``"heads"``, ``"bands"``, or ``"auto"``: whichever takes less time on the busiest rank, forward and
        backward, if a byte arrives in the time of `FLOPS_PER_BYTE` operations and nothing overlaps.
    available : sequence of str
        What ``"auto"`` may choose.

    Returns
    -------
    RankPlan

    Raises
    ------
    ValueError
        An unknown strategy, heads that don't divide, a sequence or document longer than the layout's context.
    """
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy must be 'auto', 'heads' or 'bands', got {strategy!r}")
    kv_heads = layout.num_heads if kv_heads is None else kv_heads
    if kv_heads < 1 or layout.num_heads % kv_heads:
        raise ValueError(
            f"the number of query heads must be a multiple of the kv heads, got {layout.num_heads} and "
            f"{kv_heads}"
        )
    key = None if boundaries is None else tuple(boundaries)
    return _plan(layout, shards, kv_heads, key, head_dim, itemsize, strategy, tuple(available))


@lru_cache(maxsize=64)
def _plan(
    layout: BandLayout,
    shards: Shards,
    kv_heads: int,
    boundaries: tuple[int, ...] | None,
    head_dim: int,
    itemsize: int,
    strategy: str,
    available: tuple[str, ...],
) -> RankPlan:
    documents = documents_of(boundaries, shards.length)
    layout.check_length(max((end - begin for begin, end in documents), default=0))
    loads = loads_of(layout, documents)
    shares = deal_heads(loads, kv_heads, shards.ranks)
    bands = _traffic_of_bands(layout, kv_heads, shards, documents)
    rows = [shards.rows(rank) for rank in range(shards.ranks)]
    traffic = {
        "heads": _traffic_of_heads(shares, shards, loads),
        "bands": bands,
        "all_gather": Traffic(
            tuple(2 * kv_heads * (shards.length - own) for own in rows),
            tuple(2 * kv_heads * own * (len(rows) - 1) for own in rows),
            bands.pairs,
        ),
    }
    reason = "asked for"
    if strategy == "auto":
        costs = {name: traffic[name].cost(head_dim, itemsize) for name in available}
        strategy = min(available, key=lambda name: costs[name])
        reason = _compare(traffic, costs, strategy)
    parts = _parts_of(traffic[strategy], head_dim, itemsize)
    most = _most_parts(strategy, shares, kv_heads)
    return RankPlan(strategy, reason, shards, shares, traffic, kv_heads, max(1, min(parts, most)))


def _most_parts(strategy: str, shares: Sequence[Share], kv_heads: int) -> int:
    """Where each part has a key/value head of some rank."""
    return max(len(share.groups) for share in shares) if strategy == "heads" else kv_heads


def _parts_of(traffic: Traffic, head_dim: int, itemsize: int) -> int:
    """How many parts hide the most; see `RankPlan`."""
    moved = max(map(max, zip(traffic.received, traffic.sent, strict=True))) * head_dim * itemsize
    attended = max(traffic.pairs) * _FORWARD_PAIR_FLOPS * head_dim / FLOPS_PER_BYTE
    return round(math.sqrt(min(moved, attended) / _PART_BYTES))


def _compare(traffic: dict[str, Traffic], costs: dict[str, float], chosen: str) -> str:
    """Why a strategy was chosen, in a line."""
    others = [name for name in costs if name != chosen]
    if not others:
        return "the only one that is available"
    other = min(others, key=lambda name: costs[name])
    ours, theirs = traffic[chosen], traffic[other]
    share = costs[chosen] / costs[other] if costs[other] else 1.0
    whole = max(traffic["all_gather"].received) or 1
    return (
        f"{share:.2f} of the time of {other!r} on the busiest rank, which receives "
        f"{max(ours.received) / whole:.3f} of an all-gather against {max(theirs.received) / whole:.3f}, at a "
        f"balance of {ours.balance:.2f} against {theirs.balance:.2f} "
        f"(at {FLOPS_PER_BYTE} operations a byte, without overlap)"
    )
