"""Rows that travel between ranks: one all-to-all of pieces of tensors, the same way back for gradients.

What is sent where follows from plans that each rank makes alone, so that no sizes are exchanged. A journey
starts in one place (`depart`) and ends in another (`arrive`): what is called in between overlaps with it,
also in the backward pass, where gradients start at `arrive` and end at `depart`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import Shards


@dataclass(frozen=True)
class Piece:
    """Rows of some heads of one of several tensors ``(B, heads, rows, D)``."""

    tensor: int
    heads: tuple[int, ...]
    begin: int
    rows: int


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives.

    Attributes
    ----------
    sends, receives : tuple of tuple of tuple of Piece
        For each rank, its own included, what travels; each with the places where it is written to. What is
        sent has one place. A rank sends another pieces of the sizes and in the order in which that one
        receives them.
    """

    sends: tuple[tuple[tuple[Piece, ...], ...], ...]
    receives: tuple[tuple[tuple[Piece, ...], ...], ...]


@lru_cache(maxsize=4096)
def _as_slice(heads: tuple[int, ...]) -> slice | None:
    """The heads as a slice, if they ascend by equal steps."""
    if not heads:
        return slice(0, 0)
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if step < 1 or any(after - before != step for before, after in pairwise(heads)):
        return None
    return slice(heads[0], heads[-1] + 1, step)


@lru_cache(maxsize=1024)
def _as_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, device=device)


def _sizes(route: Sequence[Sequence[tuple[Piece, ...]]], batch: int, head_dim: int) -> list[int]:
    """Elements that go to, or come from, each rank."""
    return [
        sum(len(places[0].heads) * places[0].rows for places in pieces) * batch * head_dim for pieces in route
    ]


def _ends(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Batch and head dim, which all tensors of a journey share."""
    return shapes[0][0], shapes[0][3]


def _views(
    buffer: Tensor, route: Sequence[Sequence[tuple[Piece, ...]]], batch: int, head_dim: int
) -> Iterator[tuple[tuple[Piece, ...], Tensor]]:
    """The places of each piece, and the piece in the buffer, as ``(B, heads, rows, D)``."""
    at = 0
    for places in (places for pieces in route for places in pieces):
        shape = (batch, len(places[0].heads), places[0].rows, head_dim)
        size = math.prod(shape)
        yield places, buffer[at : at + size].view(shape)
        at += size


def _read(tensors: Sequence[Tensor], piece: Piece) -> Tensor:
    rows = tensors[piece.tensor][:, :, piece.begin : piece.begin + piece.rows]
    heads = _as_slice(piece.heads)
    return rows.index_select(1, _as_index(piece.heads, rows.device)) if heads is None else rows[:, heads]


def _write(tensors: Sequence[Tensor], piece: Piece, values: Tensor, *, adds: bool) -> None:
    rows = tensors[piece.tensor][:, :, piece.begin : piece.begin + piece.rows]
    heads = _as_slice(piece.heads)
    if heads is None:
        write = rows.index_add_ if adds else rows.index_copy_
        write(1, _as_index(piece.heads, rows.device), values.to(rows.dtype))
    elif adds:
        rows[:, heads] += values
    else:
        rows[:, heads] = values


class Journey:
    """One all-to-all along a route, and the one back for its gradients."""

    def __init__(self, route: Route, group: dist.ProcessGroup) -> None:
        self.route = route
        self._group = group
        self._work: Any = None
        self._buffer: Tensor | None = None

    def start(self, tensors: Sequence[Tensor], *, back: bool = False) -> Tensor:
        """Pack what is to be sent and set it going; returns the buffer that `finish` will have filled."""
        outward, inward = self.route.sends, self.route.receives
        if back:
            outward, inward = inward, outward
        batch, head_dim = _ends([tensor.shape for tensor in tensors])
        sizes, expected = _sizes(outward, batch, head_dim), _sizes(inward, batch, head_dim)
        sent = tensors[0].new_empty(sum(sizes))
        for places, view in _views(sent, outward, batch, head_dim):
            view.copy_(_read(tensors, places[0]))
            for place in places[1:]:
                view += _read(tensors, place)
        self._buffer = tensors[0].new_empty(sum(expected))
        self._work = dist.all_to_all_single(
            self._buffer, sent, expected, sizes, group=self._group, async_op=True
        )
        return self._buffer

    def finish(self) -> Tensor:
        """Wait for what `start` set going."""
        assert self._buffer is not None
        buffer, work = self._buffer, self._work
        self._buffer = self._work = None
        try:
            work.wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank(self._group)} waited in vain for rows of others: one ended, hangs, "
                f"or called with other arguments ({error})"
            ) from error
        return buffer


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, *tensors: Tensor) -> Tensor:
        ctx.journey, ctx.shapes = journey, [tensor.shape for tensor in tensors]
        return journey.start(tensors)

    @staticmethod
    def backward(ctx: Any, marker: Tensor) -> tuple[Tensor | None, ...]:
        buffer = ctx.journey.finish()
        batch, head_dim = _ends(ctx.shapes)
        # A row that went to several ranks comes back as several parts.
        dtype = torch.promote_types(buffer.dtype, torch.float32)
        gradients = [torch.zeros(shape, dtype=dtype, device=buffer.device) for shape in ctx.shapes]
        for places, view in _views(buffer, ctx.journey.route.sends, batch, head_dim):
            _write(gradients, places[0], view, adds=True)
        return None, *(gradient.to(buffer.dtype) for gradient in gradients)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        journeys: Sequence[Journey],
        shapes: Sequence[tuple[int, int, int, int]],
        *departed: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.journeys, ctx.sizes = journeys, [buffer.shape for buffer in departed]
        batch, head_dim = _ends(shapes)
        landings = [places for journey in journeys for each in journey.route.receives for places in each]
        written = sum(len(place.heads) * place.rows for places in landings for place in places)
        is_filled = written * batch * head_dim == sum(math.prod(shape) for shape in shapes)
        make = departed[0].new_empty if is_filled else departed[0].new_zeros
        outputs = tuple(make(shape) for shape in shapes)
        for journey in journeys:
            for places, view in _views(journey.finish(), journey.route.receives, batch, head_dim):
                for place in places:
                    _write(outputs, place, view, adds=False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        for journey in ctx.journeys:
            journey.start(gradients, back=True)
        # The gradients themselves arrive in `_Depart`; autograd only has to know in which order.
        marker = gradients[0].new_zeros(())
        return None, None, *(marker.expand(size) for size in ctx.sizes)


def depart(journey: Journey, *tensors: Tensor) -> Tensor:
    """Set pieces of tensors ``(B, heads, rows, D)`` going; differentiable. The result is for `arrive`."""
    departed: Tensor = _Depart.apply(journey, *tensors)
    return departed


def arrive(
    journeys: Sequence[Journey],
    departed: Sequence[Tensor],
    shapes: Sequence[tuple[int, int, int, int]],
) -> tuple[Tensor, ...]:
    """Tensors of `shapes` with the pieces of all journeys in their places; rows that none brought are 0."""
    outputs: tuple[Tensor, ...] = _Arrive.apply(journeys, shapes, *departed)
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


def gather(tensor: Tensor, shards: Shards, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """The whole sequence's tensor, on each rank, from the ranks' rows of it.

    Differentiable for ranks that compute the same from it: a rank's gradient is its rows of what arrives.
    """
    if tensor.shape[dim] != shards.rows(dist.get_rank(group)):
        raise ValueError(
            f"this rank holds {shards.rows(dist.get_rank(group))} rows, dimension {dim} of "
            f"{tuple(tensor.shape)} has not"
        )
    whole: Tensor = _Gather.apply(tensor, shards, dim, group)
    return whole
