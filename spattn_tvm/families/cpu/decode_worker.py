"""What a thread of a step of decoding does: its parts of the keys, for all queries that read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.bands import LIMIT
from spattn_tvm.domains.key_range import in_band, key_range
from spattn_tvm.domains.numbers import LOWEST

from .decode_partials import LARGEST, SUM, Partials
from .exponential import exp
from .register_tile import REGISTERS, fill, rows_of, sum_rows, widen

# Behind every position.
NOWHERE = 2**31 - 1

# Where a worker is: batch row and key head, the keys that there are and the first query's position; the run
# of keys that it is in; keys that are left to do; and the tile: its first key, keys, and where they lie.
BATCH, HEAD, BEGIN, END, FIRST, POSITION, LEFT, RUN_BEGIN, RUN_END, COUNT, BLOCK, ROW = range(12)
GROUP, PARTS = range(12, 14)
PLACE_WORDS = 14


def value_columns(head_dim: int, lanes: int) -> int:
    """Columns of the output that stay in registers over a tile of keys: at most eight vectors."""
    return max(w for w in range(lanes, min(head_dim, 8 * lanes) + 1, lanes) if head_dim % w == 0)


class DecodeWorker:
    """A thread of the decode kernel, in the function that is being parsed; `run` is all that it does.

    Parameters
    ----------
    decisions : Mapping[str, int]
    call : namespace
        Buffers ``q, k, v, bands, cache_lengths, cache_starts, block_table, ring``; ``scale``; int64 ``blocks,
        rows, pages, rings``: extents of k, the block table and the ring; int32 ``queries, kv_heads``,
        ``group`` (query heads of a key head), ``shares`` (batch rows and key heads), ``parts`` (of a share).
    partials : Partials
    """

    def __init__(self, decisions: Mapping[str, int], call: SimpleNamespace, partials: Partials) -> None:
        self.L = decisions["lanes"]
        self.KR = decisions["key_rows"]
        self.stage = bool(decisions["stage"])
        self.D = int(call.q.shape[3])
        self.W = value_columns(self.D, self.L)
        self.call, self.partials = call, partials

    @T.inline
    def run(self, worker, workers):
        self.allocate()
        self.bind_parts()
        place, shares = T.meta_var((self.place, self.call.shares))
        for turn in T.serial((self.parts * shares - worker + workers - 1) // workers):
            part: T.let[T.int32] = turn * workers + worker
            self.enter(part)
            for row in T.serial(self.group * self.call.queries):
                self.partials.clear(part, row)
            self.find_keys(part)
            while place[LEFT] > 0:
                self.take_tile()
                self.visit_tile(part)
            if self.parts == 1:
                self.write_outputs(part)

    def allocate(self) -> None:
        rows = self.KR if self.stage else 1
        self.key_scratch = T.alloc_buffer((rows, self.D), "float32")
        self.value_scratch = T.alloc_buffer((rows, self.D), "float32")
        self.query = T.alloc_buffer((self.D,), "float32", annotations=REGISTERS)
        self.products = T.alloc_buffer((self.L, self.L), "float32", annotations=REGISTERS)
        self.scores = T.alloc_buffer((self.KR,), "float32", annotations=REGISTERS)
        self.lane_max = T.alloc_buffer((self.L,), "float32", annotations=REGISTERS)
        self.lane_sum = T.alloc_buffer((self.L,), "float32", annotations=REGISTERS)
        self.columns = T.alloc_buffer((self.W,), "float32", annotations=REGISTERS)
        self.sums = T.alloc_buffer((2,), "float32", annotations=REGISTERS)
        # Read back from a buffer, a value is opaque to TVM's simplifier, as in the forward: compiling takes
        # 1.0 s instead of 5.6.
        self.place = T.alloc_buffer((PLACE_WORDS,), "int32", annotations=REGISTERS)

    def bind_parts(self) -> None:
        T.buffer_store(self.place, self.call.group, [GROUP])
        T.buffer_store(self.place, self.call.parts, [PARTS])
        self.group = T.bind(self.place[GROUP])
        self.parts = T.bind(self.place[PARTS])

    # Which keys

    @T.inline
    def enter(self, part):
        """The batch row and the key head of a part, and which keys there are."""
        call, place = T.meta_var((self.call, self.place))
        place[BATCH] = part // self.parts // call.kv_heads
        place[HEAD] = part // self.parts % call.kv_heads
        b: T.let[T.int32] = place[BATCH]
        in_cache = T.meta_var(T.Select(call.pages > 0, call.pages * call.rows, call.rows))
        held: T.let[T.int64] = T.Select(call.rings > 0, T.int64(LIMIT), in_cache)
        place[BEGIN] = T.max(0, call.cache_starts[b])
        place[END] = T.max(0, T.min(call.cache_lengths[b], T.cast(T.min(held, T.int64(LIMIT)), "int32")))
        place[FIRST] = place[END] - call.queries

    @T.inline
    def find_keys(self, part):
        """How many keys of all runs are this part's, and where they begin."""
        place = T.meta_var(self.place)
        place[LEFT] = 0
        place[POSITION] = 0
        while place[POSITION] < NOWHERE:
            self.find_run()
            place[LEFT] = place[LEFT] + (place[RUN_END] - place[RUN_BEGIN])
            place[POSITION] = place[RUN_END]
        share: T.let[T.int32] = (place[LEFT] + self.parts - 1) // self.parts
        place[COUNT] = T.min(part % self.parts * share, place[LEFT])
        place[LEFT] = T.min(share, place[LEFT] - place[COUNT])
        place[POSITION] = 0
        while place[COUNT] > 0:
            self.find_run()
            place[POSITION] = T.min(place[RUN_END], place[RUN_BEGIN] + place[COUNT])
            place[COUNT] = place[COUNT] - (place[POSITION] - place[RUN_BEGIN])

    @T.inline
    def find_run(self):
        """The keys from POSITION on that some head of the group attends to without a gap, as one band has
        them; RUN_BEGIN is NOWHERE behind the last one.
        """
        place = T.meta_var(self.place)
        place[RUN_BEGIN] = NOWHERE
        for t in T.serial(2 * self.group):
            keys = T.meta_var(self.keys_of_band(t))
            if (keys[0] < keys[1]) & (keys[1] > place[POSITION]):
                place[RUN_BEGIN] = T.min(place[RUN_BEGIN], T.max(keys[0], place[POSITION]))
        place[RUN_END] = place[RUN_BEGIN]
        for t in T.serial(2 * self.group):
            keys = T.meta_var(self.keys_of_band(t))
            if keys[0] <= place[RUN_BEGIN]:
                place[RUN_END] = T.max(place[RUN_END], keys[1])

    def keys_of_band(self, number: Any) -> tuple[Any, Any]:
        """Of the two bands of each head of the group."""
        place, bands = self.place, self.call.bands
        head, side = place[HEAD] * self.group + number // 2, number % 2 * 2
        low, high = bands[0, head, side], bands[0, head, side + 1]
        keys = key_range(place[FIRST], place[END] - 1, low, high, place[BEGIN])
        return keys[0], T.min(place[END], keys[1])

    @T.inline
    def take_tile(self):
        """The next keys of a run that lie one behind the other in memory."""
        call, place = T.meta_var((self.call, self.place))
        rows = T.meta_var(T.cast(call.rows, "int32"))
        self.find_run()
        key: T.let[T.int32] = place[RUN_BEGIN]
        place[COUNT] = T.min(T.min(place[RUN_END] - key, place[LEFT]), self.KR)
        place[BLOCK] = place[BATCH]
        place[ROW] = key
        if call.pages > 0:
            page = T.meta_var(call.block_table[place[BATCH], key // rows])
            place[ROW] = key % rows
            place[BLOCK] = T.max(0, T.min(page, T.cast(call.blocks, "int32") - 1))
        if call.rings > 0:
            capacity: T.let[T.int32] = T.max(1, call.ring[place[HEAD], 1])
            place[COUNT] = T.min(place[COUNT], capacity - key % capacity)
            # Of any numbers, whose sum may not fit into 32 bits.
            around: T.let[T.int64] = T.cast(call.ring[place[HEAD], 0], "int64") + T.cast(
                key % capacity, "int64"
            )
            place[ROW] = T.cast(T.max(T.int64(0), T.min(around, call.rows - T.int64(1))), "int32")
        place[COUNT] = T.min(place[COUNT], rows - place[ROW])
        place[POSITION] = key + place[COUNT]
        place[LEFT] = place[LEFT] - place[COUNT]

    # A tile of keys

    @T.inline
    def visit_tile(self, part):
        """The tile's keys, for each query of the group that attends to some of them."""
        place, bands = T.meta_var((self.place, self.call.bands))
        key: T.let[T.int32] = place[RUN_BEGIN]
        count: T.let[T.int32] = place[COUNT]
        keys, values = T.meta_var(self.read_keys(count))
        for member in T.serial(self.group):
            h: T.let[T.int32] = place[HEAD] * self.group + member
            near_low: T.let[T.int32] = bands[0, h, 0]
            near_high: T.let[T.int32] = bands[0, h, 1]
            far_low: T.let[T.int32] = bands[0, h, 2]
            far_high: T.let[T.int32] = bands[0, h, 3]
            for r in T.serial(self.call.queries):
                position: T.let[T.int32] = place[FIRST] + r
                last: T.let[T.int32] = key + count - 1
                if ((position - near_low >= key) & (position - near_high <= last)) | (
                    (position - far_low >= key) & (position - far_high <= last)
                ):
                    row: T.let[T.int32] = member * self.call.queries + r
                    self.read_query(h, r)
                    self.score(
                        keys,
                        count,
                        lambda at: (
                            (at < count)
                            & (
                                in_band(position, key + at, near_low, near_high)
                                | in_band(position, key + at, far_low, far_high)
                            )
                        ),
                    )
                    self.exponentiate(part, row, count)
                    self.add_values(part, row, values, count)

    def read_keys(self, count: Any) -> tuple[Any, Any]:
        """The tile's keys and values as matrices: copies in float32, or the cache's own memory."""
        call, place = self.call, self.place
        block, row = T.bind(place[BLOCK]), T.bind(place[ROW])
        head = T.bind(T.Select(call.rings > 0, 0, place[HEAD]))
        if not self.stage:
            return rows_of(call.k, block, head, row, self.KR), rows_of(call.v, block, head, row, self.KR)
        widen(self.key_scratch, count, self.D, self.L, lambda j, d: call.k[block, head, row + j, d])
        widen(self.value_scratch, count, self.D, self.L, lambda j, d: call.v[block, head, row + j, d])
        return self.key_scratch, self.value_scratch

    @T.inline
    def read_query(self, head, r):
        b: T.let[T.int32] = self.place[BATCH]
        for chunk in T.serial(self.D // self.L):
            for lane in T.vectorized(self.L):
                self.query[chunk * self.L + lane] = (
                    T.cast(self.call.q[b, head, r, chunk * self.L + lane], "float32") * self.call.scale
                )

    @T.inline
    def score(self, keys, count, is_seen):
        """The scores of the keys, ``lanes`` at a time, and the largest one of each lane."""
        L, query, products, scores, lane_max = T.meta_var(
            (self.L, self.query, self.products, self.scores, self.lane_max)
        )
        for lane in T.vectorized(L):
            lane_max[lane] = T.float32(LOWEST)
        for step in T.serial((count + L - 1) // L):
            fill(products, 0, L, L, lambda u, lane: T.float32(0))
            for chunk in T.serial(self.D // L):
                for u in T.unroll(L):
                    for lane in T.vectorized(L):
                        products[u, lane] = (
                            products[u, lane]
                            + query[chunk * L + lane] * keys[T.min(step * L + u, count - 1), chunk * L + lane]
                        )
            sum_rows(products, L)
            for lane in T.vectorized(L):
                scores[step * L + lane] = T.Select(
                    is_seen(step * L + lane), products[0, lane], T.float32(-math.inf)
                )
            for lane in T.vectorized(L):
                lane_max[lane] = T.max(lane_max[lane], scores[step * L + lane])

    @T.inline
    def exponentiate(self, part, row, count):
        """Probabilities in place of the scores; their sum, and the factor of what was summed before."""
        L, scores, sums, lane_sum = T.meta_var((self.L, self.scores, self.sums, self.lane_sum))
        so_far = T.meta_var(self.partials.of_scores)
        sums[LARGEST] = so_far[part, row, LARGEST]
        for lane in T.unroll(L):
            sums[LARGEST] = T.max(sums[LARGEST], self.lane_max[lane])
        sums[SUM] = exp(so_far[part, row, LARGEST] - sums[LARGEST])
        for lane in T.vectorized(L):
            lane_sum[lane] = T.float32(0)
        for step in T.serial((count + L - 1) // L):
            for lane in T.vectorized(L):
                scores[step * L + lane] = exp(scores[step * L + lane] - sums[LARGEST])
            for lane in T.vectorized(L):
                lane_sum[lane] = lane_sum[lane] + scores[step * L + lane]

    @T.inline
    def add_values(self, part, row, values, count):
        W, columns, sums, scores = T.meta_var((self.W, self.columns, self.sums, self.scores))
        of_scores, of_values = T.meta_var((self.partials.of_scores, self.partials.of_values))
        for chunk in T.serial(self.D // W):
            for column in T.vectorized(W):
                columns[column] = of_values[part, row, chunk * W + column] * sums[SUM]
            for j in T.serial(count):
                for column in T.vectorized(W):
                    columns[column] = columns[column] + scores[j] * values[j, chunk * W + column]
            for column in T.vectorized(W):
                of_values[part, row, chunk * W + column] = columns[column]
        sums[SUM] = sums[SUM] * of_scores[part, row, SUM]
        for lane in T.unroll(self.L):
            sums[SUM] = sums[SUM] + self.lane_sum[lane]
        of_scores[part, row, LARGEST] = sums[LARGEST]
        of_scores[part, row, SUM] = sums[SUM]

    @T.inline
    def write_outputs(self, part):
        place, queries = T.meta_var((self.place, self.call.queries))
        b: T.let[T.int32] = place[BATCH]
        for member in T.serial(self.group):
            h: T.let[T.int32] = place[HEAD] * self.group + member
            for r in T.serial(queries):
                row: T.let[T.int32] = member * queries + r
                self.partials.write(part, row, b, h, r, self.sums)
