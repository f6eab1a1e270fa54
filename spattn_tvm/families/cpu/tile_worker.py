"""What the forward and the backward have alike: a thread, its tile of queries, and the walk over its keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.key_range import in_band, key_range

from .register_tile import REGISTERS, fill, multiply_add, rows_of, widen
from .rows import BandedRows

# Where a worker is: batch row and heads, the rest of a search for the document, the rows it has to do, and
# the keys that there are for them, whose positions are those of the rows plus SHIFT.
BATCH, HEAD, KV_HEAD, DOCUMENT, LAST_DOCUMENT, ROW, ROW_END, SHIFT, KEY, KEY_END = range(10)
PLACE_WORDS = 10


class TileWorker:
    """A thread of a kernel, in the function that is being parsed.

    A kernel gives it ``visit_keys(first, last, key_begin, count, low, high)``: what to do with the queries at
    the positions ``first ... last``, a tile of keys, and the band ``[low, high]``.

    Parameters
    ----------
    decisions : Mapping[str, int]
    dtype : str
        Of q, k and v.
    call : BandedRows
    """

    def __init__(self, decisions: Mapping[str, int], dtype: str, call: BandedRows) -> None:
        self.R = decisions["query_rows"]
        self.KR = decisions["key_rows"]
        self.JU = decisions["key_unroll"]
        self.DU = decisions["dim_unroll"]
        self.stage = bool(decisions["stage"])
        self.D, self.dtype, self.call = call.head_dim, dtype, call

    def allocate_place(self, words: int = PLACE_WORDS) -> None:
        # Read back from a buffer, a value is opaque to TVM's simplifier, which otherwise puts the divisions
        # that find a tile into every index: compiling takes 0.24 s instead of 8.2, at the same speed.
        self.place = T.alloc_buffer((words,), "int32", annotations=REGISTERS)

    def allocate_keys(self) -> None:
        rows = self.KR if self.stage else 1
        self.key_scratch = T.alloc_buffer((rows, self.D), "float32")
        self.value_scratch = T.alloc_buffer((rows, self.D), "float32")

    @T.inline
    def find_keys(self, document):
        """The keys that there are for a document's queries."""
        found = T.meta_var(self.call.keys_of(document, self.place[BATCH]))
        self.place[KEY] = found[0]
        self.place[KEY_END] = found[1]
        self.place[SHIFT] = found[2]

    @T.inline
    def visit_bands(self, table, first, last, first_band, bands_end):
        """The keys of some of the two bands (the far one is 0), tile by tile."""
        place, KR = T.meta_var(self.place), T.meta_var(self.KR)
        for band in T.serial(first_band, bands_end):
            low: T.let[T.int32] = self.call.bands[table, place[HEAD], 2 - 2 * band]
            high: T.let[T.int32] = self.call.bands[table, place[HEAD], 3 - 2 * band]
            found = T.meta_var(key_range(first, last, low, high, place[KEY]))
            begin: T.let[T.int32] = found[0]
            end: T.let[T.int32] = T.min(place[KEY_END], found[1])
            for key_tile in T.serial(T.max(0, end - begin + KR - 1) // KR):
                key_begin: T.let[T.int32] = begin + key_tile * KR
                count: T.let[T.int32] = T.min(KR, end - key_begin)
                self.visit_keys(first, last, key_begin, count, low, high)

    def read_keys(self, key_begin: Any, count: Any) -> tuple[Any, Any]:
        """A tile of keys and of values as matrices: copies in float32, or the tensors' own memory."""
        call, KR = self.call, self.KR
        b, hk = T.bind(self.place[BATCH]), T.bind(self.place[KV_HEAD])
        if not self.stage:
            return rows_of(call.k, b, hk, key_begin, KR), rows_of(call.v, b, hk, key_begin, KR)
        lanes = math.gcd(self.D, 16)
        widen(self.key_scratch, count, self.D, lanes, lambda j, d: call.k[b, hk, key_begin + j, d])
        widen(self.value_scratch, count, self.D, lanes, lambda j, d: call.v[b, hk, key_begin + j, d])
        return self.key_scratch, self.value_scratch

    @T.inline
    def multiply_rows(self, tile, rows, vectors, group, count):
        """Products of some of a tile's ``count`` rows and of vectors of queries, to a register tile.

        Rows past the last one repeat it.
        """
        R, JU = T.meta_var((self.R, self.JU))
        fill(tile, 0, JU, R, lambda u, r: T.float32(0))
        multiply_add(
            tile, JU, R, self.D,
            lambda u, d: rows[T.min(group * JU + u, count - 1), d],
            lambda d, r: vectors[d, r],
        )  # fmt: skip

    def mask_rows(
        self, tile: Any, group: Any, first: Any, key_begin: Any, count: Any, low: Any, high: Any
    ) -> None:
        """-inf in place of the scores in a register tile whose pairs are not in the band."""
        JU = self.JU

        def masked(u: Any, r: Any) -> Any:
            key = key_begin + T.min(group * JU + u, count - 1)
            return T.Select(in_band(first + r, key, low, high), tile[u, r], T.float32(-math.inf))

        fill(tile, 0, JU, self.R, masked)

    def add_products(
        self, sums: Any, tile: Any, rows: Any, weights: Any, count: Any, before: Callable[[Any, Any], Any]
    ) -> None:
        """``sums[d, r] = before(d, r) + sum_j rows[j, d] * weights[j, r]`` of ``count`` keys, some dims at a
        time in a register tile.
        """
        R, DU = self.R, self.DU
        with T.serial(self.D // DU) as chunk:
            fill(tile, 0, DU, R, lambda u, r: before(chunk * DU + u, r))
            multiply_add(
                tile, DU, R, count,
                lambda u, j: rows[j, chunk * DU + u],
                lambda j, r: weights[j, r],
            )  # fmt: skip
            fill(sums, chunk * DU, DU, R, lambda u, r: tile[u, r])
