"""What the parts of a step of decoding leave in memory, and what becomes of it."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.numbers import LN2, LOWEST

from .exponential import exp
from .register_tile import REGISTERS

# A row's sums: the largest score and the sum of what the others are to it.
LARGEST, SUM = range(2)


class Partials:
    """The sums of each part and row, and the outputs that are made of them.

    Parameters
    ----------
    o, lse, partial_o, partial_sums : buffers
        As `build_cpu_decode` describes them.
    lanes : int
        Columns at a time.
    """

    def __init__(self, o: Any, lse: Any, partial_o: Any, partial_sums: Any, lanes: int) -> None:
        self.o, self.lse, self.of_values, self.of_scores = o, lse, partial_o, partial_sums
        self.lanes, self.chunks = lanes, int(o.shape[3]) // lanes

    @T.inline
    def clear(self, part, row):
        L = T.meta_var(self.lanes)
        self.of_scores[part, row, LARGEST] = T.float32(LOWEST)
        self.of_scores[part, row, SUM] = T.float32(0)
        for chunk in T.serial(self.chunks):
            for lane in T.vectorized(L):
                self.of_values[part, row, chunk * L + lane] = T.float32(0)

    @T.inline
    def add(self, part, other, row, factors):
        """A row of another part to one of this part."""
        L, scores, values = T.meta_var((self.lanes, self.of_scores, self.of_values))
        factors[0] = T.max(scores[part, row, LARGEST], scores[other, row, LARGEST])
        factors[1] = exp(scores[other, row, LARGEST] - factors[0])
        factors[0] = exp(scores[part, row, LARGEST] - factors[0])
        for chunk in T.serial(self.chunks):
            for lane in T.vectorized(L):
                values[part, row, chunk * L + lane] = (
                    values[part, row, chunk * L + lane] * factors[0]
                    + values[other, row, chunk * L + lane] * factors[1]
                )
        scores[part, row, SUM] = scores[part, row, SUM] * factors[0] + scores[other, row, SUM] * factors[1]
        scores[part, row, LARGEST] = T.max(scores[part, row, LARGEST], scores[other, row, LARGEST])

    @T.inline
    def write(self, part, row, batch, head, query, factors):
        """The result of a query from the sums of all its keys; 0 and -inf if it has none."""
        L, dtype = T.meta_var((self.lanes, self.o.dtype))
        factors[1] = self.of_scores[part, row, SUM]
        factors[0] = T.float32(1) / factors[1]
        for chunk in T.serial(self.chunks):
            for lane in T.vectorized(L):
                self.o[batch, head, query, chunk * L + lane] = T.Select(
                    factors[1] == T.float32(0),
                    T.cast(0, dtype),
                    T.cast(self.of_values[part, row, chunk * L + lane] * factors[0], dtype),
                )
        self.lse[batch, head, query] = self.of_scores[part, row, LARGEST] + T.log2(factors[1]) * T.float32(
            LN2
        )

    @T.inline
    def combine(self, call, worker, workers):
        """A worker's rows, each from all parts of its share."""
        factors = T.alloc_buffer((2,), "float32", annotations=REGISTERS)
        place = T.alloc_buffer((2,), "int32", annotations=REGISTERS)
        place[0] = call.group
        place[1] = call.parts
        group: T.let[T.int32] = place[0]
        parts: T.let[T.int32] = place[1]
        rows: T.let[T.int32] = call.shares * group * call.queries
        for turn in T.serial((rows - worker + workers - 1) // workers):
            number: T.let[T.int32] = turn * workers + worker
            share: T.let[T.int32] = number // (group * call.queries)
            row: T.let[T.int32] = number % (group * call.queries)
            first_part: T.let[T.int32] = share * parts
            for other in T.serial(parts - 1):
                part: T.let[T.int32] = first_part + 1 + other
                self.add(first_part, part, row, factors)
            b, g = T.meta_var((share // call.kv_heads, share % call.kv_heads))
            self.write(first_part, row, b, g * group + row // call.queries, row % call.queries, factors)
