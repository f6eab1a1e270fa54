"""The portable forward: what a thread block does with its tile of queries.

`forward.py` says why it is made so. The parts stand in the order in which they run.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.key_range import key_range
from spattn_tvm.domains.numbers import ALL_LANES, INF, LN2, LOG2E, LOWEST
from spattn_tvm.domains.tiles import chunk_count, tile_slots
from spattn_tvm.domains.variables import scalar

from .blocks import (
    BATCH,
    BLOCK,
    DOC_END,
    FAR_HI,
    FAR_LO,
    HEAD,
    KEY_BEGIN,
    KEY_END,
    LEAST_SCALE,
    LOCATION_BYTES,
    LOCATION_WORDS,
    NEAR_HI,
    NEAR_LO,
    ROW0,
    SHIFT,
    Blocks,
    RowCopies,
    element_bytes,
    greatest,
    locate_macro,
    row_loader_macro,
    row_pitch,
    wait_macro,
)

# From this magnitude on (in powers of two) a row's maximum is subtracted from its scores before they are
# scaled: the rounding of the scaled maximum would be worth more than a weight, and beyond 2.4e38 be infinite.
HUGE = 2.0**24


class ForwardTile:
    """The kernel of some decisions over the tensors of a call; `run` is all of it.

    Parameters
    ----------
    decisions : mapping of str to int
    head_dim : int
    dtype, arch : str
    call : namespace
        From `match_call`.
    """

    def __init__(
        self, decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str, call: SimpleNamespace
    ) -> None:
        self.call, self.dtype = call, dtype
        self.warps, self.warp_rows = decisions["warps"], decisions["warp_rows"]
        self.threads, self.rows = 32 * self.warps, self.warps * self.warp_rows
        self.keys, self.edge = decisions["key_rows"], decisions["edge_keys"]
        self.stages, self.ahead = decisions["stages"], decisions["ahead"]
        self.load_point = decisions["load_point"]
        self.holds_queries = bool(decisions["queries_in_registers"])
        self.threshold = float(decisions["rescale_threshold"])

        self.pitch = row_pitch(head_dim, dtype)
        self.blocks = Blocks(dtype, self.pitch)
        self.words = self.blocks.words
        self.row_blocks, self.steps = self.warp_rows // BLOCK, head_dim // BLOCK
        self.wait = wait_macro(arch)
        self.locate = locate_macro(self.rows, decisions["head_group"])
        self.load_tile = row_loader_macro(self.rows, head_dim, dtype, self.threads)
        self.copies = RowCopies(self.keys, head_dim, dtype, self.threads)
        # Where a chunk's rows start is counted from one to the next: a load takes 66 instructions rather than
        # 96 (bfloat16, head dim 128: 0.550 against 0.574 ms at (1, 16, 16384, 128) on an H100). Products of
        # split operands leave no registers for that at large head dims.
        self.walks = not self.blocks.is_split or head_dim <= 128
        # Unrolled, split operands of several steps would be loaded at once, and spill.
        self.over_steps = T.serial if self.blocks.is_split else T.unroll

        # Elements of the arena: the queries, the ring of keys, that of values, the tile's words, the
        # barriers.
        self.chunk_size = self.keys * self.pitch
        self.keys_at = self.rows * self.pitch
        self.values_at = self.keys_at + self.stages * self.chunk_size
        self.tile_at = self.values_at + self.stages * self.chunk_size
        self.arena_size = self.tile_at + (LOCATION_BYTES + 16 * self.stages) // element_bytes(dtype)

    @T.inline
    def run(self):
        number = T.cta_id(
            [
                tile_slots(self.call.length, self.call.documents, self.rows)
                * self.call.batches
                * self.call.query_heads
            ]
        )
        warp = T.warp_id([self.warps])
        lane = T.lane_id([32])
        thread = T.thread_id([self.threads])
        self.enter(warp, lane, thread)
        self.start(number)
        if self.tile[ROW0] < self.tile[DOC_END]:
            self.prepare()
            self.walk()
            self.store()

    @T.inline
    def walk(self):
        """From the tile's queries and chunks to its rows' sums."""
        self.load(
            self.load_tile, 0, self.call.q, self.call.q.origin(self.tile[BATCH], self.tile[HEAD]),
            self.tile[ROW0], self.tile[ROW0], self.tile[DOC_END],
        )  # fmt: skip
        for s in T.unroll(self.ahead):
            if self.first_chunk + s < self.chunks:
                self.load_keys_and_values(self.first_chunk + s, s, s == 0)
        self.clear()
        if self.call.scale < T.float32(0):
            self.negate_queries()
        self.find_own_rows()
        while self.band < 2:
            self.enter_band()
            while self.index < self.count:
                self.wait(self.full.ptr_to([self.stage]), self.phase)
                self.hold_queries()
                self.visit_chunk()
                self.leave_chunk()
            self.band = self.band + 1
        # Without any chunk the queries may still be on their way.
        T.ptx["cp.async.wait_all"]()

    # What a block and a thread have

    def enter(self, warp: Any, lane: Any, thread: Any) -> None:
        self.warp, self.lane, self.thread = warp, lane, thread
        self.arena = T.alloc_buffer((self.arena_size,), self.dtype, scope="shared.dyn", align=128)
        size = element_bytes(self.dtype)

        def view(dtype: str, count: int, at: int) -> Any:
            element = at * size // (8 if dtype == "uint64" else 4)
            return T.decl_buffer(
                (count,), dtype, data=self.arena.data, elem_offset=element, scope="shared.dyn"
            )

        self.query_words = view("uint32", self.keys_at * size // 4, 0)
        self.maxima = view("float32", self.keys_at * size // 4, 0)
        # In shared memory, because registers are what this kernel is short of.
        self.tile = view("int32", LOCATION_WORDS, self.tile_at)
        self.full = view("uint64", self.stages, self.tile_at + LOCATION_BYTES // size)
        self.empty = view("uint64", self.stages, self.tile_at + (LOCATION_BYTES + 8 * self.stages) // size)

    @T.inline
    def start(self, number):
        call = T.meta_var(self.call)
        if self.thread == 0:
            for s in T.unroll(self.stages):
                T.ptx.mbarrier.init.shared.b64(self.full.ptr_to([s]), T.uint32(self.threads))
                T.ptx.mbarrier.init.shared.b64(self.empty.ptr_to([s]), T.uint32(self.threads))
            self.locate(self.tile, number, call)
        T.cuda.cta_sync()

    def prepare(self) -> None:
        """The tile's chunks: keys ``[top - chunks * key_rows, top)`` of a band, read from the top down.

        From here to the end, rows are where the queries stand among the keys.
        """
        tile, call = self.tile, self.call

        def chunks(low: int, high: int) -> Any:
            first = tile[ROW0] + tile[SHIFT]
            begin, end = key_range(first, self.rows_end - 1, tile[low], tile[high], tile[KEY_BEGIN])
            return chunk_count(begin, T.min(end, tile[KEY_END]), self.keys)

        self.near_chunks = scalar("int32", chunks(NEAR_LO, NEAR_HI))
        self.chunks = scalar("int32", self.near_chunks + chunks(FAR_LO, FAR_HI))
        self.first_chunk = 0
        kv_head = T.truncdiv(tile[HEAD], T.truncdiv(call.query_heads, call.kv_heads))
        self.origins = [tensor.origin(tile[BATCH], kv_head) for tensor in (call.k, call.v)]
        if not self.walks:
            self.origins = [scalar("int64", origin) for origin in self.origins]
        # A thread's first unit of the chunk that was loaded last, and how far that is from the keys' begin.
        self.key_start = scalar("int64", T.int64(0))
        self.value_start = scalar("int64", T.int64(0))
        self.room = scalar("int32", 0)

    @property
    def rows_end(self) -> Any:
        return T.min(self.tile[ROW0] + self.rows, self.tile[DOC_END]) + self.tile[SHIFT]

    @T.inline
    def load(self, load_rows, at, tensor, origin, first, least, most):
        """Rows of a head to the arena; those outside of ``[least, most)`` become zeros."""
        row: T.int32 = first
        begin: T.int32 = least
        end: T.int32 = most
        load_rows(self.arena, at, tensor.flat, origin, tensor.row_stride, row, begin, end, self.thread)

    @T.inline
    def load_keys_and_values(self, which, stage, is_first):
        """Chunk ``which`` of the near band's chunks and behind them the far band's; it is the one behind the
        last that was loaded.
        """
        if T.Or(is_first or not self.walks, which == self.near_chunks):
            self.aim(which)
        else:
            self.key_start = self.key_start - T.int64(self.keys) * self.call.k.row_stride
            self.value_start = self.value_start - T.int64(self.keys) * self.call.v.row_stride
            self.room = self.room - self.keys
        own: T.int32 = self.copies.own_row(self.thread)
        place: T.int32 = stage * self.chunk_size + own * self.pitch + self.copies.own_column(self.thread)
        # The last chunk of a band may begin before the keys; none ends behind them.
        if self.room >= 0:
            self.copy(place, own, None)
        else:
            self.copy(place, own, 0)
        T.ptx["cp.async.mbarrier.arrive.noinc.shared.b64"](self.full.ptr_to([stage]))

    @T.inline
    def copy(self, place, own, first):
        """The chunk's keys and values. Those before row ``first``, from the keys' begin on, become zeros."""
        call, room = T.meta_var(self.call), T.meta_var(self.room)
        keys_at, values_at = T.meta_var(self.keys_at + place), T.meta_var(self.values_at + place)
        key, value = T.meta_var(self.key_start), T.meta_var(self.value_start)
        self.copies.copy(self.arena, keys_at, call.k.flat, key, call.k.row_stride, own, room, first, None)
        self.copies.copy(self.arena, values_at, call.v.flat, value, call.v.row_stride, own, room, first, None)

    @T.inline
    def aim(self, which):
        """From one chunk to the next, rows are counted; in front of a band's first they are looked up."""
        tile, call = T.meta_var(self.tile), T.meta_var(self.call)
        is_near: T.let = which < self.near_chunks
        low: T.let = tile[T.Select(is_near, NEAR_LO, FAR_LO)]
        top: T.let = T.min(self.rows_end - low, tile[KEY_END])
        first: T.int32 = top - (which + 1 - T.Select(is_near, 0, self.near_chunks)) * self.keys
        self.room = first - tile[KEY_BEGIN]
        row: T.int64 = T.cast(first + self.copies.own_row(self.thread), "int64")
        column: T.int64 = T.cast(self.copies.own_column(self.thread), "int64")
        self.key_start = self.origins[0] + row * call.k.row_stride + column
        self.value_start = self.origins[1] + row * call.v.row_stride + column

    def clear(self) -> None:
        """A lane's places in the operands, and its rows' sums."""
        blocks, lane, warp_size = self.blocks, self.lane, self.warp_rows * self.pitch
        row0 = self.tile[ROW0] + self.tile[SHIFT]
        self.my_row0 = scalar("int32", row0 + self.warp * self.warp_rows)  # of this warp
        self.query = scalar("int32", self.my_row0 + lane // 4)  # and 8 below, in each of the blocks
        # The queries carry a negative factor's sign, so that the greatest score has the greatest weight; and
        # the factor is not 0, which would make 0 * -inf of a masked score.
        factor = T.abs(self.call.scale) * T.float32(LOG2E)
        self.scale2 = scalar("float32", T.max(factor, T.float32(LEAST_SCALE)))
        self.query_lane = scalar("int32", blocks.lane_a(lane) + self.warp * warp_size)
        self.pitch_words = self.pitch * element_bytes(self.dtype) // 4
        row = self.warp * self.warp_rows + lane // 4
        self.maximum_lane = row * self.pitch_words + self.pitch_words - 4 + lane % 4
        self.key_lane = scalar("int32", blocks.lane_b_transposed(lane))
        self.value_lane = scalar("int32", blocks.lane_b(lane))
        held = self.steps if self.holds_queries else 1
        self.queries = T.alloc_local((self.row_blocks * self.words * held,), "uint32")
        self.output = T.alloc_local((self.row_blocks * self.steps * 8,), "float32")
        # What is subtracted from a row's scaled scores: the greatest when it was last looked for.
        self.reference = T.alloc_local((2 * self.row_blocks,), "float32")
        self.row_sum = T.alloc_local((2 * self.row_blocks,), "float32")
        self.shrink = T.alloc_local((2 * self.row_blocks,), "float32")
        self.limit = scalar("float32", T.float32(-INF))  # what a score may exceed its reference by
        self.is_huge = scalar("int32", 0)  # whether some score of this warp's rows was
        self.chunk = scalar("int32", self.first_chunk)
        self.stage = scalar("int32", 0)  # of the chunk
        self.phase = scalar("int32", 0)  # of the stage
        self.band = scalar("int32", 0)
        self.clear_sums()

    @T.inline
    def clear_sums(self):
        for i in T.unroll(2 * self.row_blocks):
            self.reference[i] = T.float32(LOWEST)
            self.row_sum[i] = T.float32(0)
        for i in T.unroll(self.row_blocks * self.steps * 8):
            self.output[i] = T.float32(0)

    @T.inline
    def negate_queries(self):
        """In shared memory, each warp its own."""
        size = T.meta_var(self.warp_rows * self.pitch * element_bytes(self.dtype) // 4)
        signs = T.meta_var(0x80000000 if self.dtype == "float32" else 0x80008000)  # of a word's elements
        T.ptx["cp.async.wait_all"]()
        T.cuda.cta_sync()
        for i in T.serial(size // 32):
            at: T.int32 = self.warp * size + 32 * i + self.lane
            self.query_words[at] = self.query_words[at] ^ T.uint32(signs)
        T.cuda.warp_sync()

    # The walk over the chunks

    def find_own_rows(self) -> None:
        my_end = T.min(self.my_row0 + self.warp_rows, self.tile[DOC_END] + self.tile[SHIFT])
        self.my_end = scalar("int32", my_end)
        names = ("low", "high", "count", "top", "some_first", "full_first", "some_last", "full_last", "index")
        for name in names:
            setattr(self, name, scalar("int32", 0))

    @T.inline
    def enter_band(self):
        """Its distances and chunks: from which of them on some, or all, of this warp's rows are not before
        the keys, and behind which all, or some, are too far from them.
        """
        begin = T.meta_var(self.tile[KEY_BEGIN])
        self.find_edges()
        self.count = T.Select(self.band == 0, self.near_chunks, self.chunks - self.near_chunks)
        self.top = T.min(self.rows_end - self.low, self.tile[KEY_END])
        is_any = T.meta_var(self.my_row0 < self.my_end)
        some = T.meta_var(T.max(self.top - (self.my_end - self.low), 0) // self.keys)
        full = T.meta_var(chunk_count(self.my_row0 + 1 - self.low, self.top, self.keys))
        self.some_first = T.Select(is_any, some, self.count)
        self.full_first = T.Select(is_any, full, self.count)
        self.some_last = chunk_count(T.max(begin, self.my_row0 - self.high), self.top, self.keys)
        self.full_last = (self.top - T.max(begin, self.my_end - 1 - self.high)) // self.keys
        self.index = 0
        self.keep_to_share()

    @T.inline
    def find_edges(self):
        self.low = self.tile[T.Select(self.band == 0, NEAR_LO, FAR_LO)]
        self.high = self.tile[T.Select(self.band == 0, NEAR_HI, FAR_HI)]

    def keep_to_share(self) -> None:
        """Where a block takes a share of its tile's chunks, of a band's only these: here all."""

    @T.inline
    def hold_queries(self):
        if self.holds_queries:
            if self.chunk == self.first_chunk:
                for step in T.unroll(self.steps):
                    self.load_queries(step, step * self.row_blocks * self.words)

    @T.inline
    def load_queries(self, step, at):
        for m in T.unroll(self.row_blocks):
            self.blocks.load_a(
                self.queries, at + m * self.words, self.arena,
                self.query_lane + (m * BLOCK * self.pitch + step * BLOCK),
            )  # fmt: skip

    @T.inline
    def visit_chunk(self):
        if self.load_point == 0:
            self.load_ahead()
        if T.And(self.index >= self.full_first, self.index < self.full_last):
            self.attend(0, self.keys, False, 0)
        else:
            if self.load_point != 0:
                self.load_ahead()
            if T.And(self.index >= self.some_first, self.index < self.some_last):
                if self.walks:
                    # Again: kept over chunks, they and what rows make of them would take ten registers.
                    self.find_edges()
                key0: T.int32 = self.top - (self.index + 1) * self.keys
                least: T.int32 = T.max(self.tile[KEY_BEGIN], self.my_row0 - self.high)
                offset: T.int32 = T.max(least - key0, 0) // self.edge * self.edge
                last: T.int32 = T.min(self.my_end - self.low - key0, self.keys)
                while offset < last:
                    self.attend(offset, self.edge, True, key0 + offset)
                    offset = offset + self.edge

    @T.inline
    def load_ahead(self):
        """A later chunk, as soon as all warps are through with the one whose place it takes."""
        if self.chunk + self.ahead < self.chunks:
            wraps: T.bool = self.stage + self.ahead >= self.stages
            place: T.int32 = T.Select(wraps, self.stage + self.ahead - self.stages, self.stage + self.ahead)
            self.wait(self.empty.ptr_to([place]), T.Select(wraps, self.phase, self.phase ^ 1))
            self.load_keys_and_values(self.chunk + self.ahead, place, False)

    @T.inline
    def leave_chunk(self):
        # Each lane for itself: one that arrives for its warp, behind a warp barrier, is no faster, and
        # racecheck doesn't know that it speaks for the other lanes' reads.
        T.ptx.mbarrier.arrive.shared.b64(self.empty.ptr_to([self.stage]))
        self.chunk = self.chunk + 1
        self.index = self.index + 1
        is_last = T.meta_var(self.stage == self.stages - 1)
        self.phase = T.Select(is_last, self.phase ^ 1, self.phase)
        self.stage = T.Select(is_last, 0, self.stage + 1)

    # One step of the online softmax

    @T.inline
    def attend(self, offset, keys, masked, key0):
        """``keys`` keys from row ``offset`` of the chunk on; the first is ``key0`` (where it matters)."""
        scores = T.alloc_local((self.row_blocks * keys // 2,), "float32")
        weights = T.alloc_local((self.row_blocks * keys // BLOCK * self.words,), "uint32")
        rows: T.int32 = self.stage * self.chunk_size + offset * self.pitch
        self.multiply_keys(scores, keys, rows)
        if not masked and self.load_point == 1:
            self.load_ahead()
        if masked:
            self.mask(scores, keys, key0)
        self.find_maximum(scores, keys)
        self.weigh(scores, weights, keys)
        if not masked and self.load_point == 2:
            self.load_ahead()
        self.multiply_values(weights, keys, rows)

    @T.inline
    def multiply_keys(self, scores, keys, rows):
        key_words = T.alloc_local((keys // BLOCK * self.words,), "uint32")
        start: T.int32 = self.keys_at + rows + self.key_lane
        for i in T.unroll(self.row_blocks * keys // 2):
            scores[i] = T.float32(0)
        for step in self.over_steps(self.steps):
            if not self.holds_queries:
                self.load_queries(step, 0)
            queries_at = T.meta_var((step if self.holds_queries else 0) * self.row_blocks * self.words)
            for n in T.unroll(keys // BLOCK):
                self.blocks.load_b_transposed(
                    key_words, n * self.words, self.arena, start + (n * BLOCK * self.pitch + step * BLOCK)
                )
                for m in T.unroll(self.row_blocks):
                    self.blocks.multiply(
                        scores, (m * (keys // BLOCK) + n) * 8,
                        self.queries, queries_at + m * self.words, key_words, n * self.words,
                    )  # fmt: skip

    @T.inline
    def mask(self, scores, keys, key0):
        for m in T.unroll(self.row_blocks):
            for r in T.unroll(2):
                row: T.int32 = self.query + (m * BLOCK + 8 * r)
                least: T.int32 = T.max(self.tile[KEY_BEGIN], row - self.high)
                seen: T.uint32 = T.cast(T.max(row - self.low + 1 - least, 0), "uint32")
                for n in T.unroll(keys // BLOCK):
                    for t in T.unroll(2):
                        for e in T.unroll(2):
                            i: T.let = (m * (keys // BLOCK) + n) * 8 + 4 * t + 2 * r + e
                            column: T.let = n * BLOCK + self.blocks.column(self.lane, t, e, transposed=True)
                            key: T.int32 = key0 + column
                            scores[i] = T.Select(
                                T.cast(key - least, "uint32") < seen, scores[i], T.float32(-INF)
                            )

    @T.inline
    def find_maximum(self, scores, keys):
        """Raises the reference of a row's weights, if its greatest score so far asks for it."""
        top = T.alloc_local((2 * self.row_blocks,), "float32")
        for m in T.unroll(self.row_blocks):
            for r in T.unroll(2):
                top[2 * m + r] = greatest(scores, m * (keys // 2) + 2 * r, keys)
        if self.threshold > 0:
            # Any reference near the maximum gives the same quotient; weights stay below 2**threshold, sums
            # are float32. So lanes need not know each other's maxima.
            grown = T.alloc_local((1,), "float32")
            grown[0] = top[0] * self.scale2 - self.reference[0]
            for i in T.unroll(2 * self.row_blocks - 1):
                grown[0] = T.max(grown[0], top[i + 1] * self.scale2 - self.reference[i + 1])
            if T.cuda.any_sync(T.uint32(ALL_LANES), grown[0] >= self.limit) != 0:
                self.raise_reference(scores, top, keys)
        else:
            self.raise_reference(scores, top, keys)

    @T.inline
    def raise_reference(self, scores, top, keys):
        """Makes the greatest score of each row so far the reference of its weights."""
        count = T.meta_var(2 * self.row_blocks)
        furthest = T.alloc_local((1,), "float32")
        furthest[0] = T.float32(0)
        for i in T.unroll(count):
            top[i] = T.max(top[i], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), top[i], 1, 32, 32))
        for i in T.unroll(count):
            top[i] = T.max(top[i], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), top[i], 2, 32, 32))
            furthest[0] = T.max(
                furthest[0], T.Select(top[i] > T.float32(LOWEST), T.abs(top[i]), T.float32(0))
            )
        was_huge: T.bool = self.is_huge != 0
        self.is_huge = self.is_huge | T.cuda.any_sync(
            T.uint32(ALL_LANES), furthest[0] * self.scale2 > T.float32(HUGE)
        )
        if self.is_huge != 0:
            self.subtract_maximum(scores, top, keys, was_huge)
        else:
            for i in T.unroll(count):
                top[i] = T.max(top[i] * self.scale2, self.reference[i])
                self.shrink[i] = T.exp2(self.reference[i] - top[i])
                self.reference[i] = top[i]
            self.find_limit()
        for i in T.unroll(count):
            self.row_sum[i] = self.row_sum[i] * self.shrink[i]
        for m in T.unroll(self.row_blocks):
            for j in T.unroll(self.steps * 2):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        i: T.let = m * self.steps * 8 + 4 * j + 2 * r + e
                        self.output[i] = self.output[i] * self.shrink[2 * m + r]

    @T.inline
    def find_limit(self):
        """A score below a row's first reference must raise it too: they are, where scaling makes them so."""
        lowest = T.alloc_local((1,), "float32")
        lowest[0] = self.reference[0]
        for i in T.unroll(2 * self.row_blocks - 1):
            lowest[0] = T.min(lowest[0], self.reference[i + 1])
        is_any = T.meta_var(T.And(lowest[0] == T.float32(LOWEST), self.scale2 > T.float32(1)))
        self.limit = T.Select(
            T.cuda.any_sync(T.uint32(ALL_LANES), is_any) != 0, T.float32(-INF), T.float32(self.threshold)
        )

    @T.inline
    def subtract_maximum(self, scores, top, keys, was_huge):
        """From scores before they are scaled, with this chunk and all that follow.

        The maxima, which these chunks alone need, are kept behind the rows of queries, where each lane has a
        word of what keeps rows in different banks.
        """
        for m in T.unroll(self.row_blocks):
            for r in T.unroll(2):
                i: T.let = 2 * m + r
                before = T.alloc_local((1,), "float32")
                at: T.int32 = self.maximum_lane + (m * BLOCK + 8 * r) * self.pitch_words
                if was_huge:
                    before[0] = self.maxima[at]
                    top[i] = T.max(top[i], before[0])
                    self.shrink[i] = (before[0] - top[i]) * self.scale2
                else:
                    # What a row begins with is no score, scaled or not.
                    is_first: T.bool = self.reference[i] == T.float32(LOWEST)
                    before[0] = T.Select(is_first, T.float32(LOWEST), self.reference[i] / self.scale2)
                    top[i] = T.max(top[i], T.max(before[0], T.float32(LOWEST)))
                    self.shrink[i] = self.reference[i] - top[i] * self.scale2
                self.shrink[i] = T.exp2(T.min(self.shrink[i], T.float32(0)))
                self.maxima[at] = top[i]
                self.reference[i] = T.float32(0)
                for j in T.unroll(keys // 8):
                    for e in T.unroll(2):
                        one: T.let = m * (keys // 2) + 4 * j + 2 * r + e
                        scores[one] = scores[one] - top[i]
        self.limit = T.float32(-INF)

    @T.inline
    def weigh(self, scores, weights, keys):
        """The weights of scores, as left operands."""
        for m in T.unroll(self.row_blocks):
            for n in T.unroll(keys // BLOCK):
                for t in T.unroll(2):
                    for r in T.unroll(2):
                        for e in T.unroll(2):
                            i: T.let = (m * (keys // BLOCK) + n) * 8 + 4 * t + 2 * r + e
                            row: T.let = 2 * m + r
                            scores[i] = T.exp2(scores[i] * self.scale2 - self.reference[row])
                            self.row_sum[row] = self.row_sum[row] + scores[i]
                at: T.let = m * (keys // BLOCK) + n
                self.blocks.a_from_sums(weights, at * self.words, scores, at * 8)

    @T.inline
    def multiply_values(self, weights, keys, rows):
        value_words = T.alloc_local((self.words,), "uint32")
        start: T.int32 = self.values_at + rows + self.value_lane
        for n in T.unroll(keys // BLOCK):
            for step in T.unroll(self.steps):
                self.blocks.load_b(
                    value_words, 0, self.arena, start + (n * BLOCK * self.pitch + step * BLOCK)
                )
                for m in T.unroll(self.row_blocks):
                    self.blocks.multiply(
                        self.output, (m * self.steps + step) * 8,
                        weights, (m * (keys // BLOCK) + n) * self.words, value_words, 0,
                    )  # fmt: skip
                if self.blocks.is_split:
                    T.cuda.warp_sync()

    # The end

    @T.inline
    def store(self):
        for m in T.unroll(self.row_blocks):
            for r in T.unroll(2):
                self.store_row(m, r, self.query + (m * BLOCK + 8 * r) - self.tile[SHIFT])

    @T.inline
    def add_lanes(self, total, i):
        """The sum of a row's weights, of which each of four lanes has its own columns'."""
        total[0] = self.row_sum[i]
        total[0] = total[0] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), total[0], 1, 32, 32)
        total[0] = total[0] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), total[0], 2, 32, 32)

    @T.inline
    def store_row(self, m, r, row):
        tile, i = T.meta_var(self.tile), T.meta_var(2 * m + r)
        is_inside: T.bool = row < tile[DOC_END]
        total = T.alloc_local((1,), "float32")
        self.add_lanes(total, i)
        # A query without keys; one that is NaN, or sees NaN, has a sum of NaN.
        is_keyless: T.bool = total[0] == T.float32(0)
        if self.is_huge != 0:
            maximum = T.meta_var(self.maxima[self.maximum_lane + (m * BLOCK + 8 * r) * self.pitch_words])
            self.reference[i] = maximum * (self.scale2 * T.float32(LN2))
        else:
            self.reference[i] = self.reference[i] * T.float32(LN2)
        if T.And(self.lane % 4 == 0, is_inside):
            self.call.lse[tile[BATCH], tile[HEAD], row] = T.Select(
                is_keyless, T.float32(-INF), self.reference[i] + T.log2(total[0]) * T.float32(LN2)
            )
        if is_keyless:
            # Also where a value that it doesn't see is NaN.
            for j in T.unroll(self.steps * 2):
                for e in T.unroll(2):
                    self.output[m * self.steps * 8 + 4 * j + 2 * r + e] = T.float32(0)
        factor: T.float32 = T.Select(is_keyless, T.float32(0), T.float32(1) / total[0])
        start: T.int64 = self.call.o.row(tile[BATCH], tile[HEAD], row)
        self.blocks.store_row(
            self.output, m * self.steps * 8, r, self.steps, factor, self.lane,
            lambda column: self.call.o.flat.ptr_to([start + T.cast(column, "int64")]),
            lambda column: is_inside,
        )  # fmt: skip
