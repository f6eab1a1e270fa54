"""What a benchmark gives every peer: a problem, its documents, and whether results must repeat bit by bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from spattn_tvm.bands import BandLayout
from spattn_tvm.problem import AttentionProblem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Parameters
    ----------
    problem : AttentionProblem
        Its ``direction`` is ignored.
    boundaries : tuple of int
        Of packed documents, from 0 to the problem's length; empty when a row is one sequence.
    deterministic : bool
        Two runs must give the same bits.

    Raises
    ------
    ValueError
        For boundaries that do not rise from 0 to the length.
    """

    problem: AttentionProblem
    boundaries: tuple[int, ...] = ()
    deterministic: bool = False

    def __post_init__(self) -> None:
        ends = self.boundaries
        if ends and (ends[0] != 0 or ends[-1] != self.problem.length or list(ends) != sorted(set(ends))):
            raise ValueError(
                f"boundaries of documents rise from 0 to the length {self.problem.length}, got {ends}"
            )

    @classmethod
    def packed(cls, problem: AttentionProblem, documents: int, deterministic: bool = False) -> Case:
        """With so many documents, whose lengths are as 1 to 2 to 3 and so on; 1 packs nothing.

        Raises
        ------
        ValueError
            For fewer than one document, or so many that some would be empty.
        """
        if documents < 1:
            raise ValueError(f"documents must be at least 1, got {documents}")
        if documents == 1:
            return cls(problem, (), deterministic)
        total = documents * (documents + 1) // 2
        ends = [problem.length * (n * (n + 1) // 2) // total for n in range(documents + 1)]
        if any(begin >= end for begin, end in pairwise(ends)):
            raise ValueError(
                f"{problem.length} tokens are too few for {documents} documents of rising lengths"
            )
        return cls(problem, tuple(ends), deterministic)

    @property
    def documents(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of each; of a row that is one sequence, the row's."""
        return pairwise(self.boundaries or (0, self.problem.length))

    def flops(self, layout: BandLayout, direction: str) -> int:
        """Useful operations of a layout on the documents."""
        problem = dataclasses.replace(self.problem, layout=layout, direction=direction)
        return sum(
            int(dataclasses.replace(problem, length=end - begin).useful_flops)
            for begin, end in self.documents
        )

    def cu_seqlens(self, device: torch.device) -> torch.Tensor | None:
        """Boundaries as an int32 tensor, None when nothing is packed."""
        import torch

        return torch.tensor(self.boundaries, dtype=torch.int32, device=device) if self.boundaries else None

    def describe(self) -> str:
        """Such as ``(1,16,4096,64) float32 spattention``; ``16/4`` heads with grouped queries, and what is
        special behind it."""
        problem = self.problem
        heads = str(problem.query_heads)
        if problem.kv_heads != problem.query_heads:
            heads += f"/{problem.kv_heads}"
        shape = f"({problem.batch},{heads},{problem.length},{problem.head_dim})"
        parts = [f"{shape} {problem.dtype} {problem.layout.name}"]
        if self.boundaries:
            parts.append(f"{len(self.boundaries) - 1} documents")
        if self.deterministic:
            parts.append("deterministic")
        return ", ".join(parts)
