"""What a thread of the backward does in a phase; `backward.py` says why in phases, and the five products.

The parts stand in the order in which they run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.key_range import crosses_edge, has_key, key_range
from spattn_tvm.domains.tiles import first_slot

from .exponential import exp
from .register_tile import REGISTERS, fill, multiply_add
from .rows import BandedRows, find_document
from .segments import Division
from .tile_worker import (
    BATCH,
    DOCUMENT,
    HEAD,
    KEY,
    KEY_END,
    KV_HEAD,
    LAST_DOCUMENT,
    PLACE_WORDS,
    ROW,
    ROW_END,
    SHIFT,
    TileWorker,
)

# Which segment of its document, how many keys a tile or a segment meets, and how many segments of all workers
# came before.
NUMBER, KEYS, TURN = range(PLACE_WORDS, PLACE_WORDS + 3)


class BackwardWorker(TileWorker):
    """A thread of the backward; `run` is all that it does in a phase.

    Parameters
    ----------
    decisions, dtype, call
        As a `TileWorker` takes them.
    rows : namespace
        Buffers: ``o, lse, do, dlse``; ``dq, dk, dv``; and ``sums``, where dq is summed if heads are divided.
    division : Division
    scale : float32
    """

    def __init__(
        self,
        decisions: Mapping[str, int],
        dtype: str,
        call: BandedRows,
        rows: SimpleNamespace,
        division: Division,
        scale: Any,
    ) -> None:
        super().__init__(decisions, dtype, call)
        self.GU = decisions["gradient_unroll"]
        self.GL = decisions["gradient_lanes"]
        self.rows, self.division, self.scale = rows, division, scale

    @T.inline
    def run(self, phase, worker, workers):
        self.allocate()
        self.bind_phase(phase)
        place, is_split = T.meta_var(self.place), T.meta_var(self.division.is_split)
        place[TURN] = 0
        for number in T.serial(self.call.batch_heads * self.division.slots):
            self.enter(number)
            if is_split:
                self.enter_document(place[DOCUMENT])
                self.count_keys(place[DOCUMENT], place[ROW] + place[SHIFT], place[ROW_END] - 1 + place[SHIFT])
            if ~is_split | ((place[ROW] < place[ROW_END]) & (place[KEYS] > 0)):
                if place[TURN] % workers == worker:
                    for document in T.serial(place[DOCUMENT], place[LAST_DOCUMENT] + 1):
                        self.visit_document(document)
                place[TURN] = place[TURN] + 1

    def allocate(self) -> None:
        D, R, KR = self.D, self.R, self.KR
        # Transposed, as vectors of queries, and as rows.
        self.query = T.alloc_buffer((D, R), "float32")
        self.query_rows = T.alloc_buffer((R, D), "float32")
        self.doutput = T.alloc_buffer((D, R), "float32")
        self.doutput_rows = T.alloc_buffer((R, D), "float32")
        self.dquery = T.alloc_buffer((D, R), "float32")
        self.probabilities = T.alloc_buffer((KR, R), "float32")
        self.dscores = T.alloc_buffer((KR, R), "float32")
        self.allocate_keys()
        self.row_lse = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
        self.delta = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
        self.keyed = T.alloc_buffer((R,), "int32")
        self.query_tile = T.alloc_buffer((self.JU, R), "float32", annotations=REGISTERS)
        self.dim_tile = T.alloc_buffer((self.DU, R), "float32", annotations=REGISTERS)
        self.gradient_tile = T.alloc_buffer((self.GU, self.GL), "float32", annotations=REGISTERS)
        self.allocate_place(PLACE_WORDS + 3)

    def bind_phase(self, phase: Any) -> None:
        """The phase's bands, the far one is 0, and its diagonal."""
        division = self.division
        self.first_band = T.bind(T.cast(division.is_split & (phase >= division.far_phases), "int32"))
        self.bands_end = T.bind(T.Select(division.is_split, self.first_band + 1, 2))
        self.diagonal = T.bind(phase - self.first_band * division.far_phases)

    # Where to work

    @T.inline
    def enter(self, number):
        """A head, or a slot of a head, and whose rows it has."""
        call, place, division = T.meta_var(self.call), T.meta_var(self.place), T.meta_var(self.division)
        place[BATCH] = number // division.slots // call.heads
        place[HEAD] = number // division.slots % call.heads
        place[KV_HEAD] = place[HEAD] // call.group
        place[NUMBER] = 0
        place[DOCUMENT] = 0
        place[LAST_DOCUMENT] = call.documents - 1
        if division.is_split:
            slot, rows = T.meta_var(number % division.slots), T.meta_var(division.segment)
            find_document(call.cu_seqlens, slot, rows, place, DOCUMENT)
            begin = T.meta_var(call.cu_seqlens[place[DOCUMENT]])
            place[NUMBER] = slot - first_slot(begin, place[DOCUMENT], rows)

    @T.inline
    def enter_document(self, document):
        """Its rows, or a segment of them, and the keys that they meet in this phase."""
        call, place, division = T.meta_var(self.call), T.meta_var(self.place), T.meta_var(self.division)
        table: T.let[T.int32] = call.table_of(document)
        self.find_keys(document)
        place[ROW] = call.cu_seqlens[document] + place[NUMBER] * division.segment
        place[ROW_END] = T.min(call.cu_seqlens[document + 1], place[ROW] + division.segment)
        if division.is_split:
            keys = T.meta_var((place[KEY], place[KEY_END], place[SHIFT]))
            found = T.meta_var(division.diagonals(document, table, place[HEAD], self.first_band, *keys))
            behind: T.let[T.int32] = (found[0] + self.diagonal) * division.segment
            first_key: T.let[T.int32] = place[ROW] + place[SHIFT] - behind
            place[KEY] = T.max(place[KEY], first_key)
            place[KEY_END] = T.min(place[KEY_END], first_key + division.segment)

    @T.inline
    def count_keys(self, document, first, last):
        """Of the phase's band, for a tile or a segment of queries."""
        call, place = T.meta_var(self.call), T.meta_var(self.place)
        table: T.let[T.int32] = call.table_of(document)
        low, high = T.meta_var(
            [call.bands[table, place[HEAD], side - 2 * self.first_band] for side in (2, 3)]
        )
        found = T.meta_var(key_range(first, last, low, high, place[KEY]))
        place[KEYS] = T.min(place[KEY_END], found[1]) - found[0]

    @T.inline
    def visit_document(self, document):
        place, R = T.meta_var(self.place), T.meta_var(self.R)
        self.enter_document(document)
        table: T.let[T.int32] = self.call.table_of(document)
        for tile in T.serial((place[ROW_END] - place[ROW] + R - 1) // R):
            begin: T.let[T.int32] = place[ROW] + tile * R
            end: T.let[T.int32] = T.min(begin + R, place[ROW_END])
            first: T.let[T.int32] = begin + place[SHIFT]
            last: T.let[T.int32] = end - 1 + place[SHIFT]
            self.count_keys(document, first, last)
            if (place[KEYS] > 0) | ~self.division.is_split:
                self.read_queries(begin, end, first, table)
                self.visit_bands(table, first, last, self.first_band, self.bands_end)
                self.write_queries(begin, end)

    # A tile of queries

    @T.inline
    def read_queries(self, begin, end, first, table):
        """A tile of q, do and what is known of its rows, as vectors of queries and as rows.

        Lanes past the end, and queries without keys whatever arrives for their o and lse, hold zeros and
        lse = inf, so that they add nothing anywhere.
        """
        call, rows = T.meta_var(self.call), T.meta_var(self.rows)
        b: T.let[T.int32] = self.place[BATCH]
        h: T.let[T.int32] = self.place[HEAD]
        for r in T.serial(self.R):
            i: T.let[T.int32] = T.min(begin + r, end - 1)
            has_keys = T.meta_var(self.has_key(first + r, table, 0) | self.has_key(first + r, table, 2))
            self.keyed[r] = T.cast((begin + r < end) & has_keys, "int32")
            is_nobody: T.let[T.bool] = self.keyed[r] == 0
            self.row_lse[r] = T.Select(is_nobody, T.float32(math.inf), rows.lse[b, h, i])
            self.delta[r] = T.Select(is_nobody, T.float32(0), T.float32(0) - rows.dlse[b, h, i])
            for d in T.serial(self.D):
                self.query_rows[r, d] = self.unless(is_nobody, call.q[b, h, i, d])
                self.query[d, r] = self.query_rows[r, d] * self.scale
                self.doutput_rows[r, d] = self.unless(is_nobody, rows.do[b, h, i, d])
                self.doutput[d, r] = self.doutput_rows[r, d]
                self.delta[r] = self.delta[r] + self.doutput_rows[r, d] * self.unless(
                    is_nobody, rows.o[b, h, i, d]
                )
        for d in T.serial(self.D):
            fill(self.dquery, d, 1, self.R, lambda u, r: T.float32(0))

    def has_key(self, position: Any, table: Any, side: int) -> Any:
        """Whether the near (``side`` 0) or the far band (2) gives a query one of the keys that there are."""
        head, bands = self.place[HEAD], self.call.bands
        low, high = bands[table, head, side], bands[table, head, side + 1]
        return has_key(position, low, high, self.place[KEY], self.place[KEY_END])

    def unless(self, is_nobody: Any, value: Any) -> Any:
        return T.Select(is_nobody, T.float32(0), T.cast(value, "float32"))

    @T.inline
    def write_queries(self, begin, end):
        # Selected, because a key's infinity times a query's zero is NaN.
        b: T.let[T.int32] = self.place[BATCH]
        h: T.let[T.int32] = self.place[HEAD]
        if self.division.is_split:
            sums = T.meta_var(self.rows.sums)
            for r in T.serial(end - begin):
                for d in T.serial(self.D):
                    sums[b, h, begin + r, d] = sums[b, h, begin + r, d] + T.Select(
                        self.keyed[r] == 0, T.float32(0), self.dquery[d, r]
                    )
        else:
            for r in T.serial(end - begin):
                for d in T.serial(self.D):
                    self.rows.dq[b, h, begin + r, d] = T.Select(
                        self.keyed[r] == 0, T.cast(0, self.dtype), T.cast(self.dquery[d, r], self.dtype)
                    )

    # A tile of queries and one of keys

    @T.inline
    def visit_keys(self, first, last, key_begin, count, low, high):
        keys, values = T.meta_var(self.read_keys(key_begin, count))
        self.score(keys, values, first, last, key_begin, count, low, high)
        self.add_products(
            self.dquery, self.dim_tile, keys, self.dscores, count, lambda d, r: self.dquery[d, r]
        )
        for group in T.serial((count + self.GU - 1) // self.GU):
            for chunk in T.serial(self.D // self.GL):
                at = T.meta_var((key_begin, count, group * self.GU, chunk * self.GL))
                self.add_to_keys(self.rows.dv, self.probabilities, self.doutput_rows, *at)
                self.add_to_keys(self.rows.dk, self.dscores, self.query_rows, *at)

    @T.inline
    def score(self, keys, values, first, last, key_begin, count, low, high):
        """P and dS of the tile and of ``count`` keys."""
        R, JU, tile = T.meta_var((self.R, self.JU, self.query_tile))
        groups: T.let[T.int32] = (count + JU - 1) // JU
        masked: T.let[T.bool] = crosses_edge(first, last, key_begin, key_begin + count - 1, low, high)
        for group in T.serial(groups):
            # Nothing reads what rows past the last key give.
            self.multiply_rows(tile, keys, self.query, group, count)
            if masked:
                self.mask_rows(tile, group, first, key_begin, count, low, high)
            fill(self.probabilities, group * JU, JU, R, lambda u, r: exp(tile[u, r] - self.row_lse[r]))
            self.multiply_rows(tile, values, self.doutput, group, count)
            fill(
                self.dscores, group * JU, JU, R,
                lambda u, r: self.probabilities[group * JU + u, r]
                * (tile[u, r] - self.delta[r])
                * self.scale,
            )  # fmt: skip

    @T.inline
    def add_to_keys(self, gradient, weights, rows, key_begin, count, first, first_dim):
        """Add ``sum_r weights[j, r] * rows[r, :]`` to each key of a register tile."""
        GU, GL, tile, place = T.meta_var((self.GU, self.GL, self.gradient_tile, self.place))
        fill(tile, 0, GU, GL, lambda u, lane: T.float32(0))
        multiply_add(
            tile, GU, GL, self.R,
            lambda u, r: weights[first + u, r],
            lambda r, lane: rows[r, first_dim + lane],
        )  # fmt: skip
        for u in T.unroll(GU):
            if first + u < count:
                for lane in T.vectorized(GL):
                    gradient[place[BATCH], place[HEAD], key_begin + first + u, first_dim + lane] = (
                        gradient[place[BATCH], place[HEAD], key_begin + first + u, first_dim + lane]
                        + tile[u, lane]
                    )
