"""Rows that travel between ranks: pieces of tensors, and the same way back for their gradients.

What is sent where follows from plans that each rank makes alone, so that no sizes are exchanged. A journey
starts in one place (`depart`) and ends in another (`arrive`): what is called in between overlaps with it,
also in the backward pass, where gradients start at `arrive` and end at `depart`.

Between GPUs that can write to each other's memory copy engines bring them (`peer_copies`). Elsewhere they are
packed and travel in one all-to-all; with NCCL the rows of one head, where they are very large, are a message
of their own, read and written where the tensors lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .copy_engines import Block, blocks_of
from .groups import group_of
from .peer_copies import PeerCopies, Shipment, peer_copies
from .shards import Rows, Shards

# From how many bytes on a head's rows travel as a message of their own; where none is given all are packed.
# On a CPU the transport copies anyway. On four H100 twice as many messages, 192 in place of 96 in a forward
# pass, took 3 ms more; in the 33 us of a message some 30 MB are packed and unpacked.
_OWN_MESSAGE_BYTES = {"cuda": 2**25}

# Of a route: tensors of so many kinds of strides, before all are forgotten.
_MOST_CARGO = 16


@dataclass(frozen=True)
class Piece:
    """Rows of some heads of one of several tensors ``(B, heads, rows, D)``."""

    tensor: int
    heads: tuple[int, ...]
    begin: int
    rows: int


Places = tuple[Piece, ...]
"""Where a piece is: one place, or several that hold the same."""


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives.

    Attributes
    ----------
    sends, receives : tuple of tuple of tuple of Piece
        For each rank, its own included, what travels; each with the places where it is written to. What is
        sent has one place. A rank sends another pieces of the sizes and in the order in which that one
        receives them.
    rows : tuple of tuple of int
        How many rows of a head each rank sends each other, of one batch element: ``rows[sender][receiver]``.
    cargo : dict
        What copy engines have to do, found once for tensors of the same strides.
    """

    sends: tuple[tuple[Places, ...], ...]
    receives: tuple[tuple[Places, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    cargo: dict[tuple[object, ...], Cargo] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Landing:
    """How pieces cover the tensors that they are written to.

    Attributes
    ----------
    rows : tuple of int
        Of each tensor, how many rows of how many heads are written, together.
    overlaps : tuple of bool
        Of each tensor, whether some row is written twice; such pieces add up.
    """

    rows: tuple[int, ...]
    overlaps: tuple[bool, ...]

    @classmethod
    def of(cls, ways: Iterable[Sequence[Sequence[Places]]], tensors: int) -> Landing:
        """Of all pieces of some routes' sends, or receives."""
        taken: dict[tuple[int, int], list[Rows]] = {}
        for piece in (piece for way in ways for pieces in way for places in pieces for piece in places):
            for head in piece.heads:
                taken.setdefault((piece.tensor, head), []).append((piece.begin, piece.begin + piece.rows))
        rows, overlaps = [0] * tensors, [False] * tensors
        for (tensor, _), ranges in taken.items():
            rows[tensor] += sum(end - begin for begin, end in ranges)
            overlaps[tensor] |= any(after[0] < before[1] for before, after in pairwise(sorted(ranges)))
        return cls(tuple(rows), tuple(overlaps))


class Place:
    """The tensors of ``(B, heads, rows, D)`` that journeys end at; made when the first sets out."""

    def __init__(self, shapes: Sequence[Sequence[int]], landing: Landing) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.overlaps = landing.overlaps
        self._is_filled = [
            rows * shape[0] == math.prod(shape[:3]) and not overlaps
            for rows, shape, overlaps in zip(landing.rows, self.shapes, landing.overlaps, strict=True)
        ]
        self._tensors: list[Tensor] | None = None

    def open(self, like: Tensor) -> list[Tensor]:
        """Its tensors, of the dtype of `like`, or wider where pieces add up."""
        if self._tensors is None:
            wide = torch.promote_types(like.dtype, torch.float32)
            self._tensors = [
                (torch.empty if is_filled else torch.zeros)(
                    shape, dtype=wide if overlaps else like.dtype, device=like.device
                )
                for shape, is_filled, overlaps in zip(
                    self.shapes, self._is_filled, self.overlaps, strict=True
                )
            ]
        return self._tensors

    def close(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Hand its tensors over."""
        assert self._tensors is not None
        tensors, self._tensors = self._tensors, None
        return tuple(tensor.to(dtype) for tensor in tensors)

    def write(self, piece: Piece, values: Tensor) -> None:
        assert self._tensors is not None
        tensor, heads = self._tensors[piece.tensor], _as_slice(piece.heads)
        rows = tensor[:, :, piece.begin : piece.begin + piece.rows]
        adds = self.overlaps[piece.tensor]
        if heads is None:
            write = rows.index_add_ if adds else rows.index_copy_
            write(1, _as_index(piece.heads, rows.device), values.to(rows.dtype))
        elif adds:
            rows[:, heads] += values
        else:
            rows[:, heads] = values


@lru_cache(maxsize=4096)
def _step(heads: tuple[int, ...]) -> int | None:
    """By what the heads ascend, if by equal steps."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if step < 1 or any(after - before != step for before, after in pairwise(heads)):
        return None
    return step


@lru_cache(maxsize=4096)
def _as_slice(heads: tuple[int, ...]) -> slice | None:
    """The heads as a slice, if they ascend by equal steps."""
    if not heads:
        return slice(0, 0)
    step = _step(heads)
    return None if step is None else slice(heads[0], heads[-1] + 1, step)


@lru_cache(maxsize=1024)
def _as_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, device=device)


def _read(tensors: Sequence[Tensor], places: Places) -> Tensor:
    """A piece ``(B, heads, rows, D)``; the sum over its places."""
    found = None
    for piece in places:
        rows = tensors[piece.tensor][:, :, piece.begin : piece.begin + piece.rows]
        heads = _as_slice(piece.heads)
        values = (
            rows.index_select(1, _as_index(piece.heads, rows.device)) if heads is None else rows[:, heads]
        )
        found = values if found is None else found + values
    assert found is not None
    return found


def _rows_of_heads(tensors: Sequence[Tensor], piece: Piece) -> Iterator[Tensor]:
    """``(rows, D)`` of each batch element and head of a piece, as views."""
    tensor = tensors[piece.tensor]
    for batch in range(tensor.shape[0]):
        for head in piece.heads:
            yield tensor[batch, head, piece.begin : piece.begin + piece.rows]


def _outgoing(tensors: Sequence[Tensor], places: Places) -> Iterator[Tensor]:
    """A piece's heads, each contiguous; where they lie, if they are in one place."""
    if len(places) == 1:
        yield from (rows.contiguous() for rows in _rows_of_heads(tensors, places[0]))
    else:
        yield from _read(tensors, places).flatten(0, 1)


# --- by copy engines --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cargo:
    """What copy engines bring along a route.

    Attributes
    ----------
    packed : tuple of Places
        Each read into a tensor of its own, which is a source behind the others.
    parcels : tuple of (tuple of int, Places)
        Shapes of tensors that are received, targets behind the others, and where each is written to.
    shipment : Shipment
    """

    packed: tuple[Places, ...]
    parcels: tuple[tuple[tuple[int, ...], Places], ...]
    shipment: Shipment


def _blocks(tensor: Tensor, index: int, piece: Piece) -> list[tuple[int, Block]]:
    blocks = blocks_of(tensor, piece.heads, _step(piece.heads), piece.begin, piece.rows)
    return [(index, block) for block in blocks]


def _cargo(
    rank: int,
    rows: Sequence[Sequence[int]],
    sources: Sequence[Tensor],
    place: Place,
    targets: Sequence[Tensor],
    outward: Sequence[Sequence[Places]],
    inward: Sequence[Sequence[Places]],
) -> Cargo:
    """From where the rows lie to where they belong; ``rows[sender][receiver]`` of a head."""
    batch, head_dim = sources[0].shape[0], sources[0].shape[3]
    size = batch * head_dim * sources[0].itemsize
    packed: list[Places] = []
    sent: list[list[tuple[int, Block]]] = []
    for peer, pieces in enumerate(outward):
        sent.append([])
        for places in pieces if peer != rank else ():
            piece, index = places[0], places[0].tensor
            tensor = sources[index]
            if len(places) > 1 or tensor.stride()[2:] != (head_dim, 1):
                index = len(sources) + len(packed)
                packed.append(places)
                tensor = sources[0].new_empty((batch, len(piece.heads), piece.rows, head_dim))
                piece = Piece(index, tuple(range(len(piece.heads))), 0, piece.rows)
            sent[-1] += _blocks(tensor, index, piece)
    parcels: list[tuple[tuple[int, ...], Places]] = []
    received: list[list[tuple[int, int, Block]]] = []
    for peer, pieces in enumerate(inward):
        received.append([])
        at = 0
        for places in pieces if peer != rank else ():
            first = places[0]
            spots = [(targets[each.tensor], each) for each in places]
            if place.overlaps[first.tensor]:
                shape = (batch, len(first.heads), first.rows, head_dim)
                index = len(targets) + len(parcels)
                parcels.append((shape, places))
                whole = Piece(index, tuple(range(len(first.heads))), 0, first.rows)
                spots = [(sources[0].new_empty(shape), whole)]
            for tensor, each in spots:
                offset = at
                for index, block in _blocks(tensor, each.tensor, each):
                    received[-1].append((offset, index, block))
                    offset += block.size
            at += len(first.heads) * first.rows * size
    sizes = [[count * size for count in each] for each in rows]
    return Cargo(tuple(packed), tuple(parcels), Shipment.of(rank, sizes, sent, received))


# --- journeys ---------------------------------------------------------------------------------------------


class Journey:
    """The exchange along a route, and the one back for its gradients.

    Attributes
    ----------
    home, goal : Place
        Where gradients, and where the pieces, end.
    """

    def __init__(self, route: Route, group: dist.ProcessGroup, home: Place, goal: Place) -> None:
        self.home, self.goal = home, goal
        self._route, self._group = route, group
        self._works: list[Any] = []
        self._writes: list[Callable[[], None]] = []
        self._kept: list[Tensor] = []

    def start(self, sources: Sequence[Tensor], *, back: bool = False) -> None:
        """Set what is to be sent going, to the goal or `back` home."""
        place = self.home if back else self.goal
        targets = place.open(sources[0])
        outward, inward = self._route.sends, self._route.receives
        if back:
            outward, inward = inward, outward
        rank = dist.get_rank(self._group)
        copies = peer_copies(self._group, sources[0].device)
        if copies is None or not self._copy(copies, sources, place, targets, outward, inward):
            self._send(sources, place, targets, outward, inward)
        for origin, places in zip(outward[rank], inward[rank], strict=True):
            values = _read(sources, origin)
            for each in places:
                place.write(each, values)

    def _copy(
        self,
        copies: PeerCopies,
        sources: Sequence[Tensor],
        place: Place,
        targets: Sequence[Tensor],
        outward: Sequence[Sequence[Places]],
        inward: Sequence[Sequence[Places]],
    ) -> bool:
        """By copy engines; False where a rank has no room."""
        route, first = self._route, sources[0]
        strides = tuple(tensor.stride() for tensor in (*sources, *targets))
        back = place is self.home
        key = (back, place.overlaps, first.shape[0], first.shape[3], first.dtype, strides)
        cargo = route.cargo.get(key)
        if cargo is None:
            rows = tuple(zip(*route.rows, strict=True)) if back else route.rows
            if len(route.cargo) >= _MOST_CARGO:
                route.cargo.clear()
            cargo = _cargo(copies.rank, rows, sources, place, targets, outward, inward)
            route.cargo[key] = cargo
        if not copies.reserve(cargo.shipment.room):
            return False
        packed = [_read(sources, places).contiguous() for places in cargo.packed]
        parcels = [first.new_empty(shape) for shape, _ in cargo.parcels]
        for values, (_, places) in zip(parcels, cargo.parcels, strict=True):
            self._writes += [partial(place.write, each, values) for each in places]
        self._kept = [*sources, *packed, *targets, *parcels]
        addresses = [tensor.data_ptr() for tensor in self._kept]
        count = len(sources) + len(packed)
        self._works = [copies.start(cargo.shipment, addresses[:count], addresses[count:], self._kept)]
        return True

    def _send(
        self,
        sources: Sequence[Tensor],
        place: Place,
        targets: Sequence[Tensor],
        outward: Sequence[Sequence[Places]],
        inward: Sequence[Sequence[Places]],
    ) -> None:
        """By the group's messages, packed."""
        rank = dist.get_rank(self._group)
        batch, head_dim = sources[0].shape[0], sources[0].shape[3]
        least = _OWN_MESSAGE_BYTES.get(sources[0].device.type, math.inf)
        least_rows = least / max(head_dim * sources[0].itemsize, 1)

        def packed(way: Sequence[Sequence[Places]]) -> list[list[Places]]:
            return [
                [places for places in pieces if peer != rank and places[0].rows < least_rows]
                for peer, pieces in enumerate(way)
            ]

        def own_messages(way: Sequence[Sequence[Places]], peer: int) -> list[Places]:
            return [places for places in way[peer] if places[0].rows >= least_rows]

        out, into = packed(outward), packed(inward)
        sizes, expected = (
            [sum(len(each[0].heads) * each[0].rows for each in pieces) * batch * head_dim for pieces in way]
            for way in (out, into)
        )
        sent, received = sources[0].new_empty(sum(sizes)), sources[0].new_empty(sum(expected))
        for places, view in _views(sent, out, batch, head_dim):
            view.copy_(_read(sources, places))
        for places, view in _views(received, into, batch, head_dim):
            self._writes += [partial(place.write, each, view) for each in places]
        if least == math.inf:
            self._kept = [sent, received]
            self._works = [
                dist.all_to_all_single(received, sent, expected, sizes, group=self._group, async_op=True)
            ]
        else:
            messages: list[tuple[Any, Tensor, int]] = []
            parcels, arriving = sent.split(sizes), received.split(expected)
            # Each sends to the rank behind it first: none is everybody's first.
            for step in range(1, len(outward)):
                peer = (rank + step) % len(outward)
                rows = (each for places in own_messages(outward, peer) for each in _outgoing(sources, places))
                messages += [(dist.isend, each, peer) for each in (*rows, parcels[peer]) if each.numel()]
                peer = (rank - step) % len(outward)
                rows = (
                    each
                    for places in own_messages(inward, peer)
                    for each in self._incoming(place, targets, places, sources[0])
                )
                messages += [(dist.irecv, each, peer) for each in (*rows, arriving[peer]) if each.numel()]
            self._kept = [tensor for _, tensor, _ in messages]
            if messages:
                self._works = dist.batch_isend_irecv(
                    [
                        dist.P2POp(operation, tensor, group=self._group, group_peer=peer)
                        for operation, tensor, peer in messages
                    ]
                )

    def _incoming(
        self, place: Place, targets: Sequence[Tensor], places: Places, like: Tensor
    ) -> Iterator[Tensor]:
        """Where a piece's heads are received: in its first place, if nothing else is written there."""
        first = places[0]
        if place.overlaps[first.tensor]:
            values = like.new_empty((like.shape[0], len(first.heads), first.rows, like.shape[3]))
            self._writes += [partial(place.write, each, values) for each in places]
            yield from values.flatten(0, 1)
            return
        yield from _rows_of_heads(targets, first)
        for each in places[1:]:
            self._writes.append(lambda each=each: place.write(each, _read(targets, (first,))))  # type: ignore[misc]

    def finish(self) -> None:
        """Wait for what `start` set going, and put it in its places."""
        works, writes = self._works, self._writes
        self._works, self._writes = [], []
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank(self._group)} waited in vain for rows of others: one ended, hangs, "
                f"or called with other arguments ({error})"
            ) from error
        for write in writes:
            write()
        self._kept = []


def _views(
    buffer: Tensor, way: Sequence[Sequence[Places]], batch: int, head_dim: int
) -> Iterator[tuple[Places, Tensor]]:
    """The places of each piece, and the piece in the buffer, as ``(B, heads, rows, D)``."""
    at = 0
    for places in (places for pieces in way for places in pieces):
        shape = (batch, len(places[0].heads), places[0].rows, head_dim)
        size = math.prod(shape)
        yield places, buffer[at : at + size].view(shape)
        at += size


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journeys: Sequence[Journey], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.journeys = journeys
        for journey in journeys:
            journey.start(tensors)
        # What arrives is not known yet; autograd only has to know in which order.
        return tuple(tensors[0].new_empty(0) for _ in journeys)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *markers: Tensor) -> tuple[Tensor | None, ...]:
        for journey in ctx.journeys:
            journey.finish()
        return None, *ctx.journeys[0].home.close(markers[0].dtype)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journeys: Sequence[Journey], *markers: Tensor) -> tuple[Tensor, ...]:
        ctx.journeys = journeys
        # Activation checkpointing computes again until it has what was saved. Ranks with nothing to attend to
        # have saved nothing else, and take part in the journeys all the same.
        ctx.save_for_backward(*markers)
        for journey in journeys:
            journey.finish()
        return journeys[0].goal.close(markers[0].dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        _ = ctx.saved_tensors  # before anything sets out, as where there is something to attend to
        for journey in ctx.journeys:
            journey.start(gradients, back=True)
        return None, *(gradients[0].new_empty(0) for _ in ctx.journeys)


def depart(journeys: Sequence[Journey], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Set pieces of tensors ``(B, heads, rows, D)`` going; differentiable.

    The journeys have one home. There is one result for each, which `arrive` takes.
    """
    markers: tuple[Tensor, ...] = _Depart.apply(journeys, *tensors)
    return markers


def arrive(journeys: Sequence[Journey], markers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors at the journeys' common goal; rows that none brought are 0."""
    outputs: tuple[Tensor, ...] = _Arrive.apply(journeys, *markers)
    return outputs


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shards: Shards, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.shards, ctx.dim, ctx.rank = shards, dim, dist.get_rank(group)
        # An all-gather takes equal sizes.
        rows = [shards.rows(rank) for rank in range(shards.ranks)]
        shape = [*tensor.shape]
        shape[dim] = max(rows)
        padded = tensor.new_zeros(shape)
        padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded, group=group)
        return shards.join([part.narrow(dim, 0, held) for part, held in zip(parts, rows, strict=True)], dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.shards.take(gradient, ctx.rank, ctx.dim).contiguous(), None, None, None


def gather(tensor: Tensor, shards: Shards, group_or_mesh: Any, dim: int = 1) -> Tensor:
    """The whole sequence's tensor, on each rank, from the ranks' rows of it.

    Differentiable for ranks that compute the same from it: a rank's gradient is its rows of what arrives.

    Parameters
    ----------
    tensor : Tensor
        This rank's rows.
    shards : Shards
    group_or_mesh : ProcessGroup, DeviceMesh or None
        As in ``context_parallel_attention``.
    dim : int
        The dimension of the rows.

    Raises
    ------
    ValueError
        Shards for another number of ranks, or other rows than this rank's.
    """
    group = group_of(group_or_mesh)
    shards.check_ranks(dist.get_world_size(group))
    if tensor.shape[dim] != shards.rows(dist.get_rank(group)):
        raise ValueError(
            f"this rank holds {shards.rows(dist.get_rank(group))} rows, dimension {dim} of "
            f"{tuple(tensor.shape)} has not"
        )
    whole: Tensor = _Gather.apply(tensor, shards, dim, group)
    return whole
