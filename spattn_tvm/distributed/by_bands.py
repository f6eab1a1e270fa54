"""Strategy ``"bands"``: each rank keeps its queries and fetches the key rows that their bands touch.

Keys in a query's own chunk are attended where they are, while the earlier ones of its document travel. These
lie together in one buffer a chunk: a head's pieces side by side, whatever lay between them left out. Since
distances are all that bands compare, each band is shifted by what its piece was moved; one call attends all
heads. Both results merge by lse.
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
    """Queries of a chunk and the earlier keys of their document, in a buffer."""

    rows: Rows  # of the rank
    layout: BandLayout
    keys: int


@dataclass(frozen=True)
class _HeadGroup:
    """Key/value heads that travel together, with the calls of their query heads.

    Tensors `2 * i` and `2 * i + 1` of the route's receiving end are the keys and values of call i.
    """

    kv_heads: tuple[int, int]  # from the first to before the last
    route: Route
    keys: Landing
    calls: tuple[_RemoteCall, ...]


@dataclass(frozen=True)
class BandCalls:
    """What a rank fetches, and its calls."""

    local: tuple[_LocalCall, ...]
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


def _shifted(layout: BandLayout, part: RemotePart) -> BandLayout:
    """The bands as distances from query row r, at position ``size + r``, to a row of the buffer."""
    size, placed = _place(part)
    first, last = part.queries
    group = layout.num_heads // len(placed)
    intervals = []
    for head, bands in enumerate(layout.bands(part.document[1] - part.document[0])):
        moved = []
        for lo, hi in bands:
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


def _head_group(
    layout: BandLayout,
    kv_heads: int,
    span: tuple[int, int],
    shards: Shards,
    documents: tuple[Rows, ...],
    rank: int,
) -> _HeadGroup:
    first, last = span
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
    route = Route(
        tuple(tuple((source,) for owner, source, _ in each if owner == rank) for each in deliveries),
        tuple(
            tuple(places for owner, _, places in deliveries[rank] if owner == sender)
            for sender in range(shards.ranks)
        ),
    )
    shift = {begin: at - begin for begin, at, _ in shards.placed(rank)}
    calls = []
    for part in parts[rank]:
        moved = shift[part.queries[0]]
        queries = (part.queries[0] + moved, part.queries[1] + moved)
        calls.append(_RemoteCall(queries, _shifted(own, part), _place(part)[0]))
    return _HeadGroup(span, route, Landing.of([route.receives], max(2 * len(calls), 1)), tuple(calls))


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
    each = tuple(_head_group(layout, kv_heads, span, shards, documents, rank) for span in pairwise(edges))
    local: list[_LocalCall] = []
    for begin, at, rows in shards.placed(rank):
        local += _local_calls(layout, (begin, begin + rows), at, documents, is_packed)
    return BandCalls(tuple(local), each, Landing.of((group.route.sends for group in each), 2))


# --- the calls --------------------------------------------------------------------------------------------


def _rows(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[:, :, rows[0] : rows[1]]


def _attend_local(
    q: Tensor, k: Tensor, v: Tensor, calls: Sequence[_LocalCall], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """o and lse of all rows of the rank, each with the keys of its own chunk."""
    outputs, sums = [], []
    for call in calls:
        q_rows, k_rows, v_rows = (_rows(tensor, call.rows) for tensor in (q, k, v))
        if call.layout is None:
            # A gradient of zeros, rather than none at all.
            o = q_rows.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
            dtype = torch.promote_types(q.dtype, torch.float32)
            lse = torch.full(o.shape[:3], -torch.inf, dtype=dtype, device=q.device)
        else:
            packed: dict[str, Any] = {}
            if call.boundaries is not None:
                packed["cu_seqlens"] = torch.tensor(call.boundaries, dtype=torch.int32, device=q.device)
            o, lse = banded_attention(
                q_rows, k_rows, v_rows, call.layout, return_lse=True, **packed, **options
            )
        outputs.append(o)
        sums.append(lse)
    if not calls:
        return q, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    if len(calls) == 1:
        return outputs[0], sums[0]
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _merge(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> Tensor:
    """Attention over both sets of keys, from that over each."""
    highest = torch.maximum(lse, other_lse).detach()
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weight, other = (lse - highest).exp(), (other_lse - highest).exp()
    total = weight + other
    total = total.masked_fill(total == 0, 1.0)
    merged = (weight / total)[..., None] * o + (other / total)[..., None] * other_o
    return merged.to(o.dtype)


def attend_by_bands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calls: BandCalls,
    group: dist.ProcessGroup,
    options: dict[str, Any],
) -> Tensor:
    """This rank's rows of o; `options` are those of ``banded_attention``.

    All remote keys set out before the local ones are attended; those of a group of heads are attended while
    the next groups' are on their way. Backward, gradients of a group's keys set out while the groups before
    it, and at last the local keys, are attended.
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
            (batch, last - first, call.keys, head_dim) for call in part.calls for _ in ("k", "v")
        ] or [(batch, (last - first) * size, 0, head_dim)]  # fmt: skip
        journeys.append(Journey(part.route, group, home, Place(shapes, part.keys)))
    departed = depart(journeys, k, v)
    o, lse = _attend_local(q, k, v, calls.local, options)
    merged = []
    for index, part in enumerate(calls.groups):
        first, last = part.kv_heads
        own = slice(first * size, last * size)
        arrived = arrive(journeys[index : index + 1], departed[index : index + 1])
        outputs, reached = [], 0
        for number, call in enumerate(part.calls):
            begin, end = call.rows
            other, other_lse = banded_attention(
                q[:, own, begin:end],
                arrived[2 * number],
                arrived[2 * number + 1],
                call.layout,
                query_offset=call.keys,
                return_lse=True,
                **options,
            )
            outputs.append(o[:, own, reached:begin])
            outputs.append(_merge(o[:, own, begin:end], lse[:, own, begin:end], other, other_lse))
            reached = end
        outputs.append(o[:, own, reached:])
        outputs += [] if part.calls else arrived
        merged.append(_join([piece for piece in outputs if piece.shape[2] or not part.calls], 2))
    return _join(merged, 1)


def _join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
