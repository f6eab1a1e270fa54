"""Strategy ``"heads"``: whole sequences of some heads to each rank, and their outputs back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.ops.attention import banded_attention

from .exchange import Journey, Landing, Piece, Place, Route, arrive, depart
from .planner import Share
from .shards import Shards


@dataclass(frozen=True)
class Part:
    """Some heads of each rank's share, which travel together."""

    shares: tuple[Share, ...]
    inbound: Route
    outbound: Route
    whole: Landing  # of q, k and v of the rank's heads
    gradient: Landing  # of their o's gradient


@dataclass(frozen=True)
class Parts:
    """What travels together, and how all of it covers the rank's own rows."""

    each: tuple[Part, ...]
    gradients: Landing  # of the rank's rows of q, k and v
    o: Landing


def _split(share: Share, parts: int) -> list[Share]:
    """A share's groups in `parts` parts, those of equal size side by side.

    Nothing hides the way of the first part there and of the last one back, so what does not divide is
    between them.
    """
    groups = sorted(share.groups, key=lambda group: (len(group[1]), group[0]))
    count, least = len(groups), len(groups) // parts
    edges = [count * index // parts for index in range(parts + 1)]
    if parts > 2 and least:
        between = (count - 2 * least, parts - 2)
        edges[1:-1] = [least + between[0] * index // between[1] for index in range(parts - 1)]
    return [Share(tuple(groups[edges[index] : edges[index + 1]])) for index in range(parts)]


@lru_cache(maxsize=256)
def plan_parts(shares: tuple[Share, ...], shards: Shards, rank: int, parts: int) -> Parts:
    split = [_split(share, parts) for share in shares]
    each = tuple(_part(tuple(share[index] for share in split), shards, rank) for index in range(parts))
    return Parts(
        each,
        Landing.of((part.inbound.sends for part in each), 3),
        Landing.of((part.outbound.receives for part in each), 1),
    )


def _part(shares: tuple[Share, ...], shards: Shards, rank: int) -> Part:
    own, mine = shares[rank], shards.placed(rank)

    def heads_of(share: Share) -> tuple[tuple[int, ...], ...]:
        return share.query_heads, share.kv_heads, share.kv_heads

    def pieces(
        heads: Sequence[tuple[int, ...]], chunks: Sequence[tuple[int, int]]
    ) -> tuple[tuple[Piece, ...], ...]:
        return tuple(
            (Piece(tensor, taken, begin, rows),)
            for tensor, taken in enumerate(heads)
            for begin, rows in chunks
            if taken
        )

    here = [tuple(range(len(heads))) for heads in heads_of(own)]
    local = [(at, rows) for _, at, rows in mine]
    whole = [[(begin, rows) for begin, _, rows in shards.placed(other)] for other in range(shards.ranks)]
    inbound = Route(
        tuple(pieces(heads_of(share), local) for share in shares),
        tuple(pieces(here, chunks) for chunks in whole),
        tuple(
            tuple(shards.rows(sender) * share.rows_of_a_position for share in shares)
            for sender in range(shards.ranks)
        ),
    )
    outbound = Route(
        tuple(pieces(here[:1], chunks) for chunks in whole),
        tuple(pieces([share.query_heads], local) for share in shares),
        tuple(
            tuple(len(share.query_heads) * shards.rows(receiver) for receiver in range(shards.ranks))
            for share in shares
        ),
    )
    return Part(shares, inbound, outbound, Landing.of([inbound.receives], 3), Landing.of([outbound.sends], 1))


def _attend_share(
    q: Tensor, k: Tensor, v: Tensor, layout: BandLayout, share: Share, options: dict[str, Any]
) -> Tensor:
    """Attention of whole sequences of a share's heads; one call for groups of equal size."""
    if not share.groups:
        return q
    sizes = [len(heads) for _, heads in share.groups]
    outputs, first, head = [], 0, 0
    while first < len(sizes):
        last = first + sizes[first:].count(sizes[first])
        count = sizes[first] * (last - first)
        outputs.append(
            banded_attention(
                q[:, head : head + count],
                k[:, first:last],
                v[:, first:last],
                layout.heads(share.query_heads[head : head + count]),
                **options,
            )
        )
        first, head = last, head + count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def attend_by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BandLayout,
    parts: Parts,
    shards: Shards,
    group: dist.ProcessGroup,
    options: dict[str, Any],
) -> Tensor:
    """This rank's rows of o; `options` are those of ``banded_attention``.

    All parts set out at once. While one is attended, the next are on their way, and so is the o of those
    before; backward the same, from the last part to the first.
    """
    rank = dist.get_rank(group)
    batch, _, _, head_dim = q.shape
    home = Place([tensor.shape for tensor in (q, k, v)], parts.gradients)
    end = Place([q.shape], parts.o)
    there, back = [], []
    for part in parts.each:
        own = part.shares[rank]
        q_shape, k_shape = (
            (batch, len(heads), shards.length, head_dim) for heads in (own.query_heads, own.kv_heads)
        )
        there.append(Journey(part.inbound, group, home, Place([q_shape, k_shape, k_shape], part.whole)))
        back.append(Journey(part.outbound, group, Place([q_shape], part.gradient), end))
    departed = depart(there, q, k, v)
    returned: list[Tensor] = []
    for index, part in enumerate(parts.each):
        q_whole, k_whole, v_whole = arrive(there[index : index + 1], departed[index : index + 1])
        o_whole = _attend_share(q_whole, k_whole, v_whole, layout, part.shares[rank], options)
        returned += depart(back[index : index + 1], o_whole)
    (o,) = arrive(back, returned)
    return o
