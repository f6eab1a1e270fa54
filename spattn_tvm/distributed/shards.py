"""Which rows of a sequence are on which rank."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from spattn_tvm.bands import require_int

if TYPE_CHECKING:
    from torch import Tensor

Rows = tuple[int, int]
"""The rows from the first to before the second."""


def _join(chunks: Iterable[Rows]) -> tuple[Rows, ...]:
    """Sorted, without empty ones, those that touch as one."""
    joined: list[Rows] = []
    for begin, end in sorted(chunk for chunk in chunks if chunk[0] < chunk[1]):
        if joined and begin == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return tuple(joined)


def boundaries_of(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Boundaries of packed documents on the host.

    Raises
    ------
    TypeError
        They are no integers, or not in one row.
    ValueError
        They don't start at 0, or decrease.
    """
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens
    try:
        boundaries = tuple(operator.index(value) for value in values)  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(
            f"cu_seqlens must be integers (number of documents + 1,), got {cu_seqlens!r}"
        ) from None
    if len(boundaries) < 2 or boundaries[0] != 0 or any(end < begin for begin, end in pairwise(boundaries)):
        shown = boundaries if len(boundaries) <= 8 else (*boundaries[:4], "…", *boundaries[-3:])
        raise ValueError(f"cu_seqlens must rise from 0, at least one document, got {shown}")
    return boundaries


def _head_tail(begin: int, end: int, ranks: int) -> list[tuple[Rows, Rows]]:
    """Of ``2 * ranks`` chunks, the one of rank r from the front and the one from the back."""
    size = -(-(end - begin) // (2 * ranks))
    edges = [min(begin + index * size, end) for index in range(2 * ranks + 1)]
    chunks = list(pairwise(edges))
    return [(chunks[rank], chunks[-1 - rank]) for rank in range(ranks)]


@dataclass(frozen=True)
class Shards:
    """Which rows of a sequence each rank holds. A rank holds its rows in the order of their positions.

    Make one with `contiguous`, `head_tail` or `per_document`, or give the chunks.

    Attributes
    ----------
    length : int
        Rows of the whole sequence, N.
    chunks : tuple of tuple of (int, int)
        Of each rank, its chunks of rows (begin, end), sorted, none touching another. Together the ranks
        hold each row once. A rank may hold none.

    Raises
    ------
    ValueError
        From the constructor: a row that no rank holds, or two hold.

    Examples
    --------
    >>> Shards.head_tail(80, ranks=2).chunks
    (((0, 20), (60, 80)), ((20, 60),))
    """

    length: int
    chunks: tuple[tuple[Rows, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", require_int("length", self.length, 1))
        chunks = tuple(_join((int(begin), int(end)) for begin, end in rank) for rank in self.chunks)
        object.__setattr__(self, "chunks", chunks)
        reached = 0
        for begin, end in sorted(chunk for rank in chunks for chunk in rank):
            if begin != reached:
                what = "no rank holds" if begin > reached else "two ranks hold"
                raise ValueError(f"{what} the rows {min(begin, reached)} to {max(begin, reached) - 1}")
            reached = end
        if reached != self.length:
            raise ValueError(f"the ranks hold {reached} rows of {self.length}")

    @classmethod
    def contiguous(cls, length: int, ranks: int) -> Shards:
        """One piece a rank, of ``ceil(length / ranks)`` rows as ``torch.chunk`` cuts them: the last are
        shorter, or empty.
        """
        length = require_int("length", length, 1)
        size = -(-length // require_int("ranks", ranks, 1))
        edges = [min(rank * size, length) for rank in range(ranks + 1)]
        return cls(length, tuple((chunk,) for chunk in pairwise(edges)))

    @classmethod
    def head_tail(cls, length: int, ranks: int) -> Shards:
        """Of ``2 * ranks`` pieces, rank r holds number r from the front and number r from the back: then the
        ranks' causal work is equal.
        """
        length, ranks = require_int("length", length, 1), require_int("ranks", ranks, 1)
        return cls(length, tuple(_head_tail(0, length, ranks)))

    @classmethod
    def per_document(
        cls, cu_seqlens: Tensor | Sequence[int], ranks: int, length: int | None = None
    ) -> Shards:
        """Each packed document is cut as by `head_tail`, so that the ranks' work is equal however long the
        documents are.

        Parameters
        ----------
        cu_seqlens : Tensor or sequence of int
            Boundaries of the documents.
        ranks : int
        length : int, optional
            Rows of the sequence, the last boundary by default; what lies behind it is cut as a document.
        """
        boundaries = boundaries_of(cu_seqlens)
        length = require_int("length", boundaries[-1] if length is None else length, 1)
        ranks = require_int("ranks", ranks, 1)
        if boundaries[-1] > length:
            raise ValueError(f"cu_seqlens ends at {boundaries[-1]}, beyond the sequence's {length} rows")
        held: list[list[Rows]] = [[] for _ in range(ranks)]
        for begin, end in pairwise((*boundaries, length)):
            for rank, pieces in enumerate(_head_tail(begin, end, ranks)):
                held[rank] += pieces
        return cls(length, tuple(tuple(rank) for rank in held))

    @property
    def ranks(self) -> int:
        """How many ranks hold the sequence."""
        return len(self.chunks)

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError unless the shards are for so many ranks."""
        if self.ranks != ranks:
            raise ValueError(f"the shards are for {self.ranks} ranks, the group has {ranks}")

    def held_by(self, rank: int) -> tuple[Rows, ...]:
        """A rank's chunks; ValueError where there is no such rank."""
        if not 0 <= rank < self.ranks:
            raise ValueError(
                f"the shards are for the ranks 0 to {self.ranks - 1} of a group, got rank {rank}"
            )
        return self.chunks[rank]

    def rows(self, rank: int) -> int:
        """How many rows a rank holds."""
        return sum(end - begin for begin, end in self.held_by(rank))

    def placed(self, rank: int) -> list[tuple[int, int, int]]:
        """A rank's chunks: first row in the sequence, first row among its own, how many."""
        found, before = [], 0
        for begin, end in self.held_by(rank):
            found.append((begin, before, end - begin))
            before += end - begin
        return found

    def owned(self, rows: Rows) -> list[tuple[int, int, int, int]]:
        """Who holds `rows`: (rank, its first row of them counted in the rank's own rows, begin, end)."""
        found = []
        for rank in range(self.ranks):
            for begin, at, count in self.placed(rank):
                first, last = max(begin, rows[0]), min(begin + count, rows[1])
                if first < last:
                    found.append((rank, at + first - begin, first, last))
        return sorted(found, key=lambda entry: entry[2])

    # --- tensors ------------------------------------------------------------------------------------------

    def take(self, tensor: Tensor, rank: int, dim: int = 1) -> Tensor:
        """A rank's rows of the whole sequence's tensor: tokens, labels, hidden states, q.

        Labels are shifted before they are cut: a rank's last token is followed by another rank's first.

        Parameters
        ----------
        tensor : Tensor
            `length` long in dimension `dim`.
        rank : int
        dim : int

        Returns
        -------
        Tensor
            A view where the rank holds one piece. Differentiable.
        """
        import torch

        if tensor.shape[dim] != self.length:
            raise ValueError(
                f"the whole sequence has {self.length} rows, dimension {dim} of {tuple(tensor.shape)} has not"
            )
        pieces = [tensor.narrow(dim, begin, end - begin) for begin, end in self.held_by(rank)]
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces, dim) if pieces else tensor.narrow(dim, 0, 0)

    def position_ids(
        self, rank: int, cu_seqlens: Tensor | Sequence[int] | None = None, device: Any = None
    ) -> Tensor:
        """int64 ``(rows,)``: the positions of a rank's rows; in their documents, if there are some."""
        import torch

        positions = torch.arange(self.length, device=device)
        if cu_seqlens is not None:
            for begin, end in pairwise((*boundaries_of(cu_seqlens), self.length)):
                positions[begin:end] -= begin
        return self.take(positions, rank, 0)

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence's tensor from those of all ranks, as `take` cut them. Differentiable."""
        import torch

        pieces = []
        for rank, part in enumerate(parts):
            if part.shape[dim] != self.rows(rank):
                raise ValueError(
                    f"rank {rank} holds {self.rows(rank)} rows, dimension {dim} of {tuple(part.shape)} "
                    "has not"
                )
            pieces += [(begin, part.narrow(dim, at, count)) for begin, at, count in self.placed(rank)]
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda entry: entry[0])], dim)
