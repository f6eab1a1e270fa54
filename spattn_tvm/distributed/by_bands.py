"""Strategy ``"bands"``: each rank keeps its queries and fetches the key rows that their bands touch.

Heads travel in groups. The earlier keys of a chunk's document lie together in one buffer: a head's pieces
side by side, whatever lay between them left out. Since distances are all that bands compare, each band is
shifted by what its piece was moved; one call attends all heads of a group.

The first group's keys in a query's own chunk are attended where they are, while the earlier ones travel, and
both results merge by lse. The other groups travel meanwhile: their own keys are copied behind the earlier
ones, and one call attends both. To merge outputs takes more memory traffic than to copy keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.ops.attention import banded_attention

from .exchange import Journey, Landing, Piece, Place, Route, arrive, depart
from .planner import RemotePart, fetched_rows, remote_parts
from .shards import Rows, Shards


@dataclass(frozen=True)
class _LocalCall:
    """Queries of a chunk and its own keys; rows of no document have no layout."""

    rows: Rows  # of the rank
    layout: BandLayout | None
    boundaries: tuple[int, ...] | None


@dataclass(frozen=True)
class _RemoteCall:
    """Queries of a chunk and the earlier keys of their document, in a buffer; behind them maybe their own."""

    rows: Rows  # of the rank
    layout: BandLayout
    keys: int
    offset: int  # of the queries' first: how many keys are earlier


@dataclass(frozen=True)
class _HeadGroup:
    """Key/value heads that travel together, with the calls of their query heads.

    Tensors `2 * i` and `2 * i + 1` of the route's receiving end are the keys and values of remote call i.
    """

    kv_heads: tuple[int, int]  # from the first to before the last
    is_joined: bool  # whether own keys are copied behind the earlier ones
    local: tuple[_LocalCall, ...]  # if joined, for the rows that no remote call has
    route: Route
    keys: Landing
    remote: tuple[_RemoteCall, ...]


@dataclass(frozen=True)
class BandCalls:
    """What a rank fetches, and its calls."""

    groups: tuple[_HeadGroup, ...]
    gradients: Landing  # of the rank's rows of k and v


# --- keys in the queries' own chunk -----------------------------------------------------------------------


def _bands_of(layout: BandLayout, document: Rows) -> BandLayout:
    """The layout for a part of a document."""
    if not layout.depends_on_length:
        return layout
    return BandLayout.custom(layout.bands(document[1] - document[0]))


def _local_calls(
    layout: BandLayout, chunk: Rows, at: int, documents: Sequence[Rows], is_packed: bool
) -> list[_LocalCall]:
    """The calls of a chunk whose first row is the rank's row `at`, in the order of their rows."""
    shift = at - chunk[0]
    inside = [
        ((max(begin, chunk[0]), min(end, chunk[1])), (begin, end))
        for begin, end in documents
        if max(begin, chunk[0]) < min(end, chunk[1])
    ]
    runs: list[tuple[BandLayout, list[Rows]]] = []
    for rows, document in inside:
        # Whole documents find the bands of their own lengths themselves.
        own = layout if rows == document else _bands_of(layout, document)
        if runs and runs[-1][0] is own:
            runs[-1][1].append(rows)
        else:
            runs.append((own, [rows]))
    calls = []
    for own, parts in runs:
        edges = tuple(edge - parts[0][0] for edge in (parts[0][0], *(end for _, end in parts)))
        rows = (parts[0][0] + shift, parts[-1][1] + shift)
        calls.append(_LocalCall(rows, own, edges if is_packed and len(edges) > 2 else None))
    reached = calls[-1].rows[1] if calls else at
    if reached < chunk[1] + shift:
        calls.append(_LocalCall((reached, chunk[1] + shift), None, None))
    return calls


# --- keys from elsewhere ----------------------------------------------------------------------------------


def _place(part: RemotePart) -> tuple[int, tuple[tuple[tuple[int, int, int], ...], ...]]:
    """Rows of the buffer, and of each key/value head its pieces: (begin, end, row of the buffer).

    A band that a document's start, or the queries' own chunk, cuts off would go on beyond its piece: there
    the buffer must end. So a piece at the document's start comes first, and one that ends at the queries
    comes last.
    """
    size = max(sum(end - begin for begin, end in group) for group in part.keys)
    placed = []
    for group in part.keys:
        row, pieces = 0, []
        for begin, end in group:
            if end == part.queries[0]:
                row = size - (end - begin)
            pieces.append((begin, end, row))
            row += end - begin
        placed.append(tuple(pieces))
    return size, tuple(placed)


def _shifted(layout: BandLayout, part: RemotePart, is_joined: bool) -> BandLayout:
    """The bands as distances from query row r, at position ``size + r``, to a row of the buffer.

    A band that reaches into the queries' chunk ends a piece there, which is not moved: so it fits the own
    keys too, where they are joined behind.
    """
    size, placed = _place(part)
    first, last = part.queries
    group = layout.num_heads // len(placed)
    intervals = []
    for head, bands in enumerate(layout.bands(part.document[1] - part.document[0])):
        moved = []
        for lo, hi in bands:
            if is_joined and hi == 0:
                moved.append((0, 0))
            farthest, nearest = max(part.document[0], first - hi), min(first - 1, last - 1 - lo)
            for begin, end, row in placed[head // group]:
                if begin <= farthest <= nearest < end:
                    shift = size - row + begin - first
                    moved.append((max(lo + shift, 0), hi + shift))
        intervals.append(moved)
    return BandLayout.custom(intervals)


def _deliveries(
    shards: Shards, parts: Sequence[RemotePart], first_head: int, kv_heads: int
) -> list[tuple[int, Piece, tuple[Piece, ...]]]:
    """What a rank with these parts, of key/value heads from `first_head` on, is sent: (by whom, from where,
    to where), k and v alike: tensor 0 and 1 of the sender, `2 * i` and `2 * i + 1` of part i.
    """
    placed = [_place(part)[1] for part in parts]
    heads: dict[tuple[int, int, int, tuple[tuple[int, int], ...]], list[int]] = {}
    for group, fetched in enumerate(fetched_rows(parts, kv_heads)):
        pieces = [(index, piece) for index, each in enumerate(placed) for piece in each[group]]
        edges = sorted({edge for _, (begin, end, _) in pieces for edge in (begin, end)})
        for begin, end in pairwise(edges):
            if not any(first <= begin and end <= last for first, last in fetched):
                continue
            for owner, at, first, last in shards.owned((begin, end)):
                places = tuple(
                    (index, row + first - begun) for index, (begun, ended, row) in pieces
                    if begun <= first and last <= ended
                )  # fmt: skip
                heads.setdefault((owner, at, last - first, places), []).append(group)
    return [
        (
            owner,
            Piece(tensor, tuple(first_head + head for head in taken), at, rows),
            tuple(Piece(2 * index + tensor, tuple(taken), row, rows) for index, row in places),
        )
        for (owner, at, rows, places), taken in heads.items()
        for tensor in (0, 1)
    ]


def _own_keys(
    shards: Shards, parts: Sequence[RemotePart], first_head: int, kv_heads: int, rank: int
) -> list[tuple[int, Piece, tuple[Piece, ...]]]:
    """As `_deliveries`: the keys of the parts' queries, from the rank to itself, behind the earlier ones."""
    taken = tuple(range(kv_heads))
    found: list[tuple[int, Piece, tuple[Piece, ...]]] = []
    for index, part in enumerate(parts):
        begin, end = part.queries
        at = next(at for first, at, _ in shards.placed(rank) if first == begin)
        for tensor in (0, 1):
            source = Piece(tensor, tuple(first_head + head for head in taken), at, end - begin)
            found.append((rank, source, (Piece(2 * index + tensor, taken, _place(part)[0], end - begin),)))
    return found


def _head_group(
    layout: BandLayout,
    kv_heads: int,
    span: tuple[int, int],
    shards: Shards,
    documents: tuple[Rows, ...],
    is_packed: bool,
    rank: int,
) -> _HeadGroup:
    first, last = span
    is_joined = first > 0
    size = layout.num_heads // kv_heads
    own = layout if span == (0, kv_heads) else layout.heads(range(first * size, last * size))
    parts = [
        [
            part
            for part in remote_parts(own, last - first, shards, documents, each)
            if any(group for group in part.keys)
        ]
        for each in range(shards.ranks)
    ]
    deliveries = [_deliveries(shards, each, first, last - first) for each in parts]
    if is_joined:
        deliveries[rank] += _own_keys(shards, parts[rank], first, last - first, rank)
    route = Route(
        tuple(tuple((source,) for owner, source, _ in each if owner == rank) for each in deliveries),
        tuple(
            tuple(places for owner, _, places in deliveries[rank] if owner == sender)
            for sender in range(shards.ranks)
        ),
        tuple(
            tuple(
                sum(len(source.heads) * source.rows for owner, source, _ in each if owner == sender)
                for each in deliveries
            )
            for sender in range(shards.ranks)
        ),
    )
    part_of = {part.queries[0]: part for part in parts[rank]}
    local: list[_LocalCall] = []
    remote = []
    for begin, at, rows in shards.placed(rank):
        done = 0
        if begin in part_of:
            part = part_of[begin]
            earlier, queries = _place(part)[0], part.queries[1] - begin
            done = queries if is_joined else 0
            shifted = _shifted(own, part, is_joined)
            remote.append(_RemoteCall((at, at + queries), shifted, earlier + done, earlier))
        if done < rows:
            local += _local_calls(own, (begin + done, begin + rows), at + done, documents, is_packed)
    keys = Landing.of([route.receives], max(2 * len(remote), 1))
    return _HeadGroup(span, is_joined, tuple(local), route, keys, tuple(remote))


@lru_cache(maxsize=64)
def plan_calls(
    layout: BandLayout,
    kv_heads: int,
    shards: Shards,
    documents: tuple[Rows, ...],
    is_packed: bool,
    rank: int,
    groups: int,
) -> BandCalls:
    """What `rank` sends, fetches and calls, in closed form; key/value heads travel in `groups` groups."""
    edges = [kv_heads * index // groups for index in range(groups + 1)]
    each = tuple(
        _head_group(layout, kv_heads, span, shards, documents, is_packed, rank) for span in pairwise(edges)
    )
    return BandCalls(each, Landing.of((group.route.sends for group in each), 2))


# --- the calls --------------------------------------------------------------------------------------------


def _rows(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[:, :, rows[0] : rows[1]]


def _attend_local(
    q: Tensor, k: Tensor, v: Tensor, call: _LocalCall, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """o and lse of a call's rows, with the keys of their own chunk."""
    q_rows, k_rows, v_rows = (_rows(tensor, call.rows) for tensor in (q, k, v))
    if call.layout is None:
        # A gradient of zeros, rather than none at all.
        o = q_rows.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
        dtype = torch.promote_types(q.dtype, torch.float32)
        return o, torch.full(o.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    packed: dict[str, Any] = {}
    if call.boundaries is not None:
        packed["cu_seqlens"] = torch.tensor(call.boundaries, dtype=torch.int32, device=q.device)
    return banded_attention(q_rows, k_rows, v_rows, call.layout, return_lse=True, **packed, **options)


def _merge(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> Tensor:
    """Attention over both sets of keys, from that over each."""
    highest = torch.maximum(lse, other_lse).detach()
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weight, other = (lse - highest).exp(), (other_lse - highest).exp()
    total = weight + other
    total = total.masked_fill(total == 0, 1.0)
    merged = (weight / total)[..., None] * o + (other / total)[..., None] * other_o
    return merged.to(o.dtype)


def _attend_group(
    q: Tensor,
    local: Sequence[tuple[Rows, Tensor, Tensor]],
    arrived: Sequence[Tensor],
    part: _HeadGroup,
    options: dict[str, Any],
) -> Tensor:
    """o of a group's heads, from what its local calls gave (rows, o, lse) and the keys that arrived."""
    found: list[tuple[int, Tensor]] = []
    if part.is_joined:
        found += [(rows[0], o) for rows, o, _ in local]
        for index, call in enumerate(part.remote):
            k, v = arrived[2 * index : 2 * index + 2]
            o = banded_attention(_rows(q, call.rows), k, v, call.layout, query_offset=call.offset, **options)
            found.append((call.rows[0], o))
    else:
        whole = _join([o for _, o, _ in local], 2) if local else q
        sums = _join([lse for _, _, lse in local], 2) if local else None
        reached = 0
        for index, call in enumerate(part.remote):
            assert sums is not None
            k, v = arrived[2 * index : 2 * index + 2]
            o, lse = banded_attention(
                _rows(q, call.rows), k, v, call.layout, query_offset=call.offset, return_lse=True, **options
            )
            found.append((reached, _rows(whole, (reached, call.rows[0]))))
            merged = _merge(_rows(whole, call.rows), _rows(sums, call.rows), o, lse)
            found.append((call.rows[0], merged))
            reached = call.rows[1]
        found.append((reached, _rows(whole, (reached, whole.shape[2]))))
    outputs = [o for _, o in sorted(found, key=lambda entry: entry[0]) if o.shape[2]]
    # No rows, but what connects the rank's q and its way back.
    ends = () if part.remote else (q[:, :, :0], *arrived)
    return _join([*outputs, *ends], 2)


def attend_by_bands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calls: BandCalls,
    group: dist.ProcessGroup,
    options: dict[str, Any],
) -> Tensor:
    """This rank's rows of o; `options` are those of ``banded_attention``.

    All groups of heads set out at once. While one is attended the next ones are on their way; backward,
    gradients of a group's keys set out while the groups before it are attended.
    """
    batch, heads, _, head_dim = q.shape
    size = heads // k.shape[1]
    home = Place([k.shape, v.shape], calls.gradients)
    journeys = []
    for part in calls.groups:
        first, last = part.kv_heads
        # A rank that fetches nothing still takes part in the way back: what connects it is a tensor of no
        # rows.
        shapes = [
            (batch, last - first, call.keys, head_dim) for call in part.remote for _ in ("k", "v")
        ] or [(batch, (last - first) * size, 0, head_dim)]  # fmt: skip
        journeys.append(Journey(part.route, group, home, Place(shapes, part.keys)))
    departed = depart(journeys, k, v)
    outputs = []
    for index, part in enumerate(calls.groups):
        first, last = part.kv_heads
        own = (q[:, first * size : last * size], k[:, first:last], v[:, first:last])
        # Before the wait for what is remote.
        local = [(call.rows, *_attend_local(*own, call, options)) for call in part.local]
        arrived = arrive(journeys[index : index + 1], departed[index : index + 1])
        outputs.append(_attend_group(own[0], local, arrived, part, options))
    return _join(outputs, 1)


def _join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
