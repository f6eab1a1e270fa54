"""The portable decode: what a thread block does with its share of a cache's keys.

`decode.py` says why it is made so. The parts stand in the order in which they run.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.bands import LIMIT
from spattn_tvm.domains.numbers import ALL_LANES, INF, LN2, LOG2E, LOWEST
from spattn_tvm.domains.tiles import chunk_count
from spattn_tvm.domains.variables import scalar

from .blocks import BLOCK, LEAST_SCALE, Blocks, element_bytes, greatest, row_pitch
from .decode_sizes import warp_ring_bytes, words

NOWHERE = 2**31 - 1  # where a span without keys begins and ends
QUAD = 4  # columns that a thread merges at once
FAN = 16  # parts that a block merges at once, so many loads being on their way


def chunk_count_by(total: Any, size: Any) -> Any:
    """Chunks of a size that is known to the device only."""
    return T.truncdiv(total + (size - 1), size)


class Merged:
    """Four columns of a row's output, not yet divided by its sum, from several parts of its keys."""

    def __init__(self, scale2: Any) -> None:
        self.scale2 = scale2
        self.top, self.total = T.alloc_local((1,), "float32"), T.alloc_local((1,), "float32")
        self.values = T.alloc_local((QUAD,), "float32")

    @T.inline
    def clear(self):
        self.top[0] = T.float32(LOWEST)
        self.total[0] = T.float32(0)
        for i in T.unroll(QUAD):
            self.values[i] = T.float32(0)

    @T.inline
    def add(self, stats, values, count):
        """``count`` parts: the row's maximum and sum of each, and its four columns."""
        top = T.alloc_local((1,), "float32")
        top[0] = self.top[0]
        for p in T.unroll(count):
            top[0] = T.max(top[0], stats[2 * p])
        shrink: T.float32 = T.exp2((self.top[0] - top[0]) * self.scale2)
        self.top[0] = top[0]
        self.total[0] = self.total[0] * shrink
        for i in T.unroll(QUAD):
            self.values[i] = self.values[i] * shrink
        for p in T.unroll(count):
            # Without keys for this row a part may hold NaN of values that other rows attend to.
            if stats[2 * p + 1] != T.float32(0):
                weight: T.float32 = T.exp2((stats[2 * p] - top[0]) * self.scale2)
                self.total[0] = self.total[0] + stats[2 * p + 1] * weight
                for i in T.unroll(QUAD):
                    self.values[i] = self.values[i] + values[QUAD * p + i] * weight


class DecodeTile:
    """The kernel of some decisions over the tensors of a call; `run` is all of it.

    Parameters
    ----------
    decisions : mapping of str to int
    head_dim : int
    dtype : str
    call : namespace
        The arguments of the function that is being parsed: the strided ``q, k, v, o``; ``lse``, ``bands``,
        ``lengths``, ``starts``, ``block_table``, ``ring``, ``partial_o``, ``partial_sums``, ``arrived``;
        ``scale``; int32 ``query_heads, kv_heads, queries, blocks, rows, pages, rings`` (of the cache: its
        first and third dimension, table entries a batch row, rings); ``row_tiles, items, splits``.
    """

    def __init__(
        self, decisions: Mapping[str, int], head_dim: int, dtype: str, call: SimpleNamespace
    ) -> None:
        self.call, self.dtype, self.head_dim = call, dtype, head_dim
        self.warps, self.keys, self.stages = decisions["warps"], decisions["key_rows"], decisions["stages"]
        self.threads = 32 * self.warps
        self.least_tiles = self.warps * decisions["least_tiles"]
        self.holds_queries = bool(decisions["queries_in_registers"])

        size = element_bytes(dtype)
        self.pitch = row_pitch(head_dim, dtype)
        self.blocks = Blocks(dtype, self.pitch)
        self.words_of_block = self.blocks.words
        self.steps = head_dim // BLOCK
        # Unrolled, split operands of several steps would be loaded at once, and spill.
        self.over_steps = T.serial if self.blocks.is_split else T.unroll

        # Of a row's 16-byte units, as many side by side as a power of two divides: no division by 3, 5 or 7.
        self.unit = 16 // size
        units = head_dim // self.unit
        self.abreast = min(units & -units, 32)
        self.columns, self.high = units // self.abreast, 32 // self.abreast

        # Elements of the arena: the queries, each warp's ring of keys and values, the words.
        self.tile_size = self.keys * self.pitch
        self.ring_size = warp_ring_bytes(decisions, head_dim, dtype) // size
        self.rings_at = BLOCK * self.pitch
        self.words_at = self.rings_at + self.warps * self.ring_size
        self.arena_size = self.words_at + 4 * words(decisions).end // size
        self.word = words(decisions)

    @T.inline
    def run(self):
        number = T.cta_id([self.call.items * self.call.splits])
        warp = T.warp_id([self.warps])
        lane = T.lane_id([32])
        thread = T.thread_id([self.threads])
        self.enter(warp, lane, thread)
        self.locate(number)
        if warp == 0:
            self.find_ranges()
        T.cuda.cta_sync()
        self.take_share()
        if self.split < self.shares:
            self.load_queries()
            self.start_walk()
            for s in T.unroll(self.stages - 1):
                self.load_tile(s)
            self.clear()
            T.ptx["cp.async.wait_group"](self.stages - 1)
            T.cuda.cta_sync()
            self.hold_queries()
            while self.tile < self.last:
                T.ptx["cp.async.wait_group"](self.stages - 2)
                T.cuda.warp_sync()
                self.load_tile(T.Select(self.stage == 0, self.stages - 1, self.stage - 1))
                self.attend()
                self.tile = self.tile + self.warps
                self.stage = T.Select(self.stage == self.stages - 1, 0, self.stage + 1)
            self.leave_results()
            T.cuda.cta_sync()
            self.merge_warps()
            self.start_climb()
            while self.parts > 1:
                self.arrive()
                if self.words[self.word.ticket] == self.count - 1:
                    self.merge_parts()
                    self.climb()
                else:
                    self.parts = 0

    # What a block and a thread have

    def enter(self, warp: Any, lane: Any, thread: Any) -> None:
        self.warp, self.lane, self.thread = warp, lane, thread
        self.arena = T.alloc_buffer((self.arena_size,), self.dtype, scope="shared.dyn", align=128)
        size = element_bytes(self.dtype)

        def view(dtype: str, elements: int, at: int) -> Any:
            return T.decl_buffer(
                (elements * size // 4,), dtype, data=self.arena.data, elem_offset=at * size // 4,
                scope="shared.dyn",
            )  # fmt: skip

        self.words = view("int32", self.arena_size - self.words_at, self.words_at)
        self.stats = view("float32", self.arena_size - self.words_at, self.words_at)
        self.results = view("float32", self.words_at - self.rings_at, self.rings_at)

    def locate(self, number: Any) -> None:
        """Whose keys the block reads, which part of them, and for which query rows.

        What the device says is clamped, so that whatever it is, no address lies outside of the tensors.
        """
        call = self.call

        def named(name: str, value: Any) -> Any:
            setattr(self, name, scalar("int32", value))
            return getattr(self, name)

        row_tile = scalar("int32", T.truncmod(number, call.row_tiles))
        rest = scalar("int32", T.truncdiv(number, call.row_tiles))
        named("split", T.truncmod(rest, call.splits))
        pair = scalar("int32", T.truncdiv(rest, call.splits))
        named("kv_head", T.truncmod(pair, call.kv_heads))
        named("batch", T.truncdiv(pair, call.kv_heads))
        named("slot0", (pair * call.row_tiles + row_tile) * call.splits)  # of what the item's blocks leave
        named("group", T.truncdiv(call.query_heads, call.kv_heads))
        named("row0", row_tile * BLOCK)
        named("rows", T.min(self.group * call.queries - self.row0, BLOCK))

        of_table = T.Select(
            call.blocks > 0,
            T.cast(T.min(T.cast(call.pages, "int64") * T.cast(call.rows, "int64"), LIMIT), "int32"),
            0,
        )
        of_ring = T.Select(call.rows > 0, LIMIT, 0)
        most = T.Select(call.rings > 0, of_ring, T.Select(call.pages > 0, of_table, call.rows))
        named("length", T.max(T.min(call.lengths[self.batch], most), 0))
        named("start", T.max(call.starts[self.batch], 0))
        named("ring_base", T.if_then_else(call.rings > 0, call.ring[self.kv_head, 0], 0))
        named("ring_capacity", T.if_then_else(call.rings > 0, T.max(call.ring[self.kv_head, 1], 1), 0))
        # A ring is a view without heads.
        head = T.Select(call.rings > 0, 0, self.kv_head)
        self.key_origin = scalar("int64", call.k.origin(0, head))
        self.value_origin = scalar("int64", call.v.origin(0, head))

    def head_of(self, row: Any) -> Any:
        """Of a row of those that read one key/value head."""
        return self.kv_head * self.group + T.truncdiv(row, self.call.queries)

    def query_of(self, row: Any) -> Any:
        return T.truncmod(row, self.call.queries)

    # Which keys they are

    @T.inline
    def find_ranges(self):
        """The keys that any of the rows attends to, as disjoint ranges, and how many tiles come before each.

        A row has two spans, one of each lane. Ranges begin with a span that no other reaches from before, and
        end with one that none reaches beyond; they are listed at the lane of their first span.
        """
        call, words, at = T.meta_var(self.call), T.meta_var(self.words), T.meta_var(self.word)
        lane = T.meta_var(self.lane)
        row: T.int32 = self.row0 + T.min(lane // 2, self.rows - 1)
        head: T.int32 = self.head_of(row)
        position: T.int32 = self.length - call.queries + self.query_of(row)
        low: T.int32 = call.bands[0, head, lane % 2 * 2]
        high: T.int32 = call.bands[0, head, lane % 2 * 2 + 1]
        begin: T.int32 = T.max(self.start, position - high)
        end: T.int32 = T.min(self.length, position - low + 1)
        is_some: T.bool = T.And(lane // 2 < self.rows, begin < end)
        begin = T.Select(is_some, begin, NOWHERE)
        end = T.Select(is_some, end, NOWHERE)
        words[at.spans + 2 * lane] = begin
        words[at.spans + 2 * lane + 1] = end
        T.cuda.warp_sync()

        is_first: T.bool = is_some
        is_last: T.bool = is_some
        for other in T.serial(2 * self.rows):
            its_begin: T.int32 = words[at.spans + 2 * other]
            its_end: T.int32 = words[at.spans + 2 * other + 1]
            reaches: T.bool = T.Or(
                T.And(its_begin < begin, begin <= its_end), T.And(its_begin == begin, other < lane)
            )
            goes_on: T.bool = T.Or(
                T.And(its_begin <= end, end < its_end), T.And(its_end == end, other < lane)
            )
            is_first = T.And(is_first, T.Not(reaches))
            is_last = T.And(is_last, T.Not(goes_on))
        words[at.ends + lane] = T.Select(is_last, end, NOWHERE)
        T.cuda.warp_sync()
        range_end: T.int32 = NOWHERE
        for other in T.serial(2 * self.rows):
            its_end: T.int32 = words[at.ends + other]
            range_end = T.min(range_end, T.Select(its_end >= begin, its_end, NOWHERE))
        T.cuda.warp_sync()

        tiles: T.int32 = T.Select(is_first, chunk_count(begin, range_end, self.keys), 0)
        before: T.int32 = tiles
        for step in T.unroll(5):
            upper: T.int32 = T.tvm_warp_shuffle_up(T.uint32(ALL_LANES), before, 1 << step, 32, 32)
            before = before + T.Select(lane >= (1 << step), upper, 0)
        words[at.begins + lane] = begin
        words[at.ends + lane] = range_end
        words[at.firsts + lane] = before - tiles
        if lane == 31:
            words[at.firsts + 32] = before

    def take_share(self) -> None:
        """The block's tiles, and how many blocks have any: one at least."""
        total = scalar("int32", self.words[self.word.firsts + 32])
        most = T.min(chunk_count(0, total, self.least_tiles), self.call.splits)
        share = scalar("int32", T.max(chunk_count_by(total, T.max(most, 1)), 1))
        self.shares = scalar("int32", T.max(chunk_count_by(total, share), 1))
        begin = T.min(self.split * share, total)
        self.tile = scalar("int32", begin + self.warp)
        self.last = scalar("int32", T.min(begin + share, total))

    # The way of queries, keys and values to shared memory

    @T.inline
    def load_queries(self):
        """By all threads; rows that the block doesn't have become zeros."""
        call = T.meta_var(self.call)
        units = T.meta_var(self.head_dim // self.unit)
        for i in T.unroll((BLOCK * units + self.threads - 1) // self.threads):
            index: T.int32 = i * self.threads + self.thread
            if T.Or((BLOCK * units) % self.threads == 0, index < BLOCK * units):
                row: T.int32 = index // units
                column: T.int32 = index % units * self.unit
                mine: T.int32 = self.row0 + T.min(row, self.rows - 1)
                start: T.int64 = call.q.row(self.batch, self.head_of(mine), self.query_of(mine))
                T.ptx["cp.async.cg.shared.global"](
                    self.arena.ptr_to([row * self.pitch + column]),
                    call.q.flat.ptr_to([start + T.cast(column, "int64")]),
                    16,
                    T.Select(row < self.rows, T.uint32(16), T.uint32(0)),
                )
        T.ptx["cp.async.commit_group"]()

    @T.inline
    def start_walk(self):
        self.begin_walk()
        self.aim()

    def begin_walk(self) -> None:
        self.next = scalar("int32", self.tile)  # to be loaded; its range, first key and keys
        self.range = scalar("int32", 0)
        self.key0 = scalar("int32", 0)
        self.present = scalar("int32", 1)
        # Of the lane's key of it, or its two: which block and row of the cache.
        count = (self.keys + 31) // 32
        self.block, self.slot = T.alloc_local((count,), "int32"), T.alloc_local((count,), "int32")
        self.stage = scalar("int32", 0)

    @T.inline
    def aim(self):
        """Finds the keys of the next tile; a tile before they are asked for, because a block table is far."""
        words, at = T.meta_var(self.words), T.meta_var(self.word)
        if self.next < self.last:
            while self.next >= words[at.firsts + self.range + 1]:
                self.range = self.range + 1
            before: T.int32 = (self.next - words[at.firsts + self.range]) * self.keys
            self.key0 = words[at.begins + self.range] + before
            self.present = T.min(words[at.ends + self.range] - self.key0, self.keys)
            for i in T.unroll((self.keys + 31) // 32):
                self.place(i, self.key0 + T.min(32 * i + self.lane, self.present - 1))

    @T.inline
    def place(self, i, position):
        call = T.meta_var(self.call)
        where: T.int32 = position
        self.block[i] = self.batch
        self.slot[i] = where
        if self.ring_capacity > 0:
            around: T.int64 = T.cast(self.ring_base, "int64") + T.cast(
                T.truncmod(where, self.ring_capacity), "int64"
            )
            self.slot[i] = T.cast(T.max(T.min(around, T.cast(call.rows - 1, "int64")), T.int64(0)), "int32")
        if T.And(self.ring_capacity == 0, call.pages > 0):
            page: T.int32 = T.truncdiv(where, call.rows)
            self.block[i] = T.max(T.min(call.block_table[self.batch, page], call.blocks - 1), 0)
            self.slot[i] = where - page * call.rows

    @T.inline
    def load_tile(self, stage):
        """The tile that is aimed at, by one warp; and aims at its next one."""
        call = T.meta_var(self.call)
        if self.next < self.last:
            at: T.int32 = (
                self.rings_at
                + self.warp * self.ring_size
                + stage * (2 * self.tile_size)
                + self.lane // self.abreast * self.pitch
                + self.lane % self.abreast * self.unit
            )
            column: T.int32 = self.lane % self.abreast * self.unit
            for p in T.unroll(self.keys // self.high):
                row: T.int32 = p * self.high + self.lane // self.abreast
                bytes_read: T.uint32 = T.Select(row < self.present, T.uint32(16), T.uint32(0))
                of: T.let = p * self.high // 32
                block: T.int32 = T.tvm_warp_shuffle(T.uint32(ALL_LANES), self.block[of], row % 32, 32, 32)
                slot: T.int32 = T.tvm_warp_shuffle(T.uint32(ALL_LANES), self.slot[of], row % 32, 32, 32)
                key: T.int64 = self.key_origin + call.k.row(block, 0, slot) + T.cast(column, "int64")
                value: T.int64 = self.value_origin + call.v.row(block, 0, slot) + T.cast(column, "int64")
                for c in T.unroll(self.columns):
                    to: T.int32 = at + (p * self.high * self.pitch + c * self.abreast * self.unit)
                    right = T.meta_var(T.int64(c * self.abreast * self.unit))
                    self.copy(to, call.k.flat, key + right, bytes_read)
                    self.copy(to + self.tile_size, call.v.flat, value + right, bytes_read)
            if self.lane == 0:
                at_tile: T.int32 = self.word.tiles + 2 * (self.warp * self.stages + stage)
                self.words[at_tile] = self.key0
                self.words[at_tile + 1] = self.key0 + self.present
            self.next = self.next + self.warps
            self.aim()
        T.ptx["cp.async.commit_group"]()

    @T.inline
    def copy(self, to, source, element, bytes_read):
        T.ptx["cp.async.cg.shared.global.L2::128B"](
            self.arena.ptr_to([to]), source.ptr_to([element]), 16, bytes_read
        )

    # One tile of the online softmax

    def clear(self) -> None:
        """A lane's places in the operands, its rows' sums and spans."""
        blocks, lane = self.blocks, self.lane
        # The scores carry a negative factor's sign, so that the greatest has the greatest weight; and the
        # factor is not 0, which would make 0 * -inf of a masked score.
        factor = T.abs(self.call.scale) * T.float32(LOG2E)
        self.scale2 = scalar("float32", T.max(factor, T.float32(LEAST_SCALE)))
        self.sign = scalar("float32", T.Select(self.call.scale < T.float32(0), T.float32(-1), T.float32(1)))
        self.query_lane = scalar("int32", blocks.lane_a(lane))
        self.key_lane = scalar("int32", blocks.lane_b_transposed(lane))
        self.value_lane = scalar("int32", blocks.lane_b(lane))
        held = self.steps if self.holds_queries else 1
        self.queries = T.alloc_local((self.words_of_block * held,), "uint32")
        self.output = T.alloc_local((self.steps * 8,), "float32")
        self.row_max = T.alloc_local((2,), "float32")  # of scores before they are scaled
        self.row_sum = T.alloc_local((2,), "float32")  # of the lane's own columns
        self.spans = T.alloc_local((8,), "int32")  # of two rows: first key and number of keys, near and far
        self.clear_sums()

    @T.inline
    def clear_sums(self):
        for r in T.unroll(2):
            self.row_max[r] = T.float32(LOWEST)
            self.row_sum[r] = T.float32(0)
            for band in T.unroll(2):
                at: T.int32 = self.word.spans + 4 * (self.lane // 4 + 8 * r) + 2 * band
                self.spans[4 * r + 2 * band] = self.words[at]
                self.spans[4 * r + 2 * band + 1] = self.words[at + 1] - self.words[at]
        for i in T.unroll(self.steps * 8):
            self.output[i] = T.float32(0)

    @T.inline
    def hold_queries(self):
        if self.holds_queries:
            for step in T.unroll(self.steps):
                self.blocks.load_a(
                    self.queries, step * self.words_of_block, self.arena, self.query_lane + step * BLOCK
                )

    @T.inline
    def attend(self):
        scores = T.alloc_local((self.keys // 2,), "float32")
        weights = T.alloc_local((self.keys // BLOCK * self.words_of_block,), "uint32")
        tile: T.int32 = self.rings_at + self.warp * self.ring_size + self.stage * (2 * self.tile_size)
        self.multiply_keys(scores, tile)
        self.mask(scores, self.word.tiles + 2 * (self.warp * self.stages + self.stage))
        self.find_maximum(scores)
        self.weigh(scores, weights)
        self.multiply_values(weights, tile + self.tile_size)

    @T.inline
    def multiply_keys(self, scores, tile):
        key_words = T.alloc_local((self.words_of_block,), "uint32")
        for i in T.unroll(self.keys // 2):
            scores[i] = T.float32(0)
        for step in self.over_steps(self.steps):
            if not self.holds_queries:
                self.blocks.load_a(self.queries, 0, self.arena, self.query_lane + step * BLOCK)
            for n in T.unroll(self.keys // BLOCK):
                self.blocks.load_b_transposed(
                    key_words, 0, self.arena, tile + self.key_lane + (n * BLOCK * self.pitch + step * BLOCK)
                )
                self.blocks.multiply(
                    scores, n * 8, self.queries, (step if self.holds_queries else 0) * self.words_of_block,
                    key_words, 0,
                )  # fmt: skip

    @T.inline
    def mask(self, scores, at):
        """Most tiles are attended to as a whole by each row, or by the only one, and need none.

        Behind a tile's keys, where there are zeros, may be those of another range: of another tile.
        """
        key0: T.int32 = self.words[at]
        end: T.int32 = self.words[at + 1]
        for i in T.unroll(self.keys // 2):
            scores[i] = scores[i] * self.sign
        is_whole: T.bool = T.And(
            end - key0 == self.keys, T.And(self.sees_whole(0, key0), self.sees_whole(1, key0))
        )
        if T.cuda.any_sync(T.uint32(ALL_LANES), T.Not(is_whole)) != 0:
            for n in T.unroll(self.keys // BLOCK):
                for t in T.unroll(2):
                    for e in T.unroll(2):
                        key: T.int32 = key0 + n * BLOCK + self.blocks.column(self.lane, t, e, transposed=True)
                        for r in T.unroll(2):
                            i: T.let = n * 8 + 4 * t + 2 * r + e
                            scores[i] = T.Select(
                                T.And(key < end, T.Or(self.is_in(4 * r, key), self.is_in(4 * r + 2, key))),
                                scores[i], T.float32(-INF),
                            )  # fmt: skip

    def sees_whole(self, r: int, key0: Any) -> Any:
        """Whether one span of a row holds a tile; whatever those see that the block doesn't have."""
        last = key0 + (self.keys - 1)
        return T.Or(
            self.lane // 4 + 8 * r >= self.rows,
            T.Or(
                T.And(self.is_in(4 * r, key0), self.is_in(4 * r, last)),
                T.And(self.is_in(4 * r + 2, key0), self.is_in(4 * r + 2, last)),
            ),
        )

    def is_in(self, span: Any, key: Any) -> Any:
        """Whether a key is in the span that begins at ``spans[span]``."""
        return T.cast(key - self.spans[span], "uint32") < T.cast(self.spans[span + 1], "uint32")

    @T.inline
    def find_maximum(self, scores):
        """The greatest score of each row so far becomes the reference of its weights."""
        top = T.alloc_local((2,), "float32")
        for r in T.unroll(2):
            top[r] = greatest(scores, 2 * r, self.keys)
        grown: T.bool = T.Or(top[0] > self.row_max[0], top[1] > self.row_max[1])
        if T.cuda.any_sync(T.uint32(ALL_LANES), grown) != 0:
            for r in T.unroll(2):
                top[r] = T.max(top[r], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), top[r], 1, 32, 32))
                top[r] = T.max(top[r], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), top[r], 2, 32, 32))
                top[r] = T.max(top[r], self.row_max[r])
                shrink: T.float32 = T.exp2((self.row_max[r] - top[r]) * self.scale2)
                self.row_max[r] = top[r]
                self.row_sum[r] = self.row_sum[r] * shrink
                for j in T.unroll(self.steps * 2):
                    for e in T.unroll(2):
                        self.output[4 * j + 2 * r + e] = self.output[4 * j + 2 * r + e] * shrink

    @T.inline
    def weigh(self, scores, weights):
        """The weights of scores, as left operands."""
        for n in T.unroll(self.keys // BLOCK):
            for t in T.unroll(2):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        i: T.let = n * 8 + 4 * t + 2 * r + e
                        scores[i] = T.exp2((scores[i] - self.row_max[r]) * self.scale2)
                        self.row_sum[r] = self.row_sum[r] + scores[i]
            self.blocks.a_from_sums(weights, n * self.words_of_block, scores, n * 8)

    @T.inline
    def multiply_values(self, weights, tile):
        value_words = T.alloc_local((self.words_of_block,), "uint32")
        for n in T.unroll(self.keys // BLOCK):
            for step in T.unroll(self.steps):
                at = T.meta_var(n * BLOCK * self.pitch + step * BLOCK)
                self.blocks.load_b(value_words, 0, self.arena, tile + self.value_lane + at)
                self.blocks.multiply(self.output, step * 8, weights, n * self.words_of_block, value_words, 0)
                if self.blocks.is_split:
                    T.cuda.warp_sync()

    # From the warps' results to the block's, from the blocks' to the call's

    @T.inline
    def leave_results(self):
        """A warp's sums in place of its ring, which nobody reads any more: (16, head_dim) float32."""
        T.cuda.warp_sync()
        for r in T.unroll(2):
            total = T.alloc_local((1,), "float32")
            total[0] = self.row_sum[r]
            total[0] = total[0] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), total[0], 1, 32, 32)
            total[0] = total[0] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), total[0], 2, 32, 32)
            row: T.int32 = self.lane // 4 + 8 * r
            if row < self.rows:
                if self.lane % 4 == 0:
                    at: T.int32 = self.word.stats + 2 * (self.warp * BLOCK + row)
                    self.stats[at] = self.row_max[r]
                    self.stats[at + 1] = total[0]
                for n in T.unroll(self.steps):
                    for t in T.unroll(2):
                        for e in T.unroll(2):
                            column: T.let = n * BLOCK + self.blocks.column(self.lane, t, e, transposed=False)
                            self.results[self.result(self.warp, row) + column] = self.output[
                                8 * n + 4 * t + 2 * r + e
                            ]

    def result(self, warp: Any, row: Any) -> Any:
        return warp * (self.ring_size * element_bytes(self.dtype) // 4) + row * self.head_dim

    @T.inline
    def merge_warps(self):
        quads = T.meta_var(self.head_dim // QUAD)
        unit = T.meta_var(scalar("int32", self.thread))
        while unit < self.rows * quads:
            row: T.int32 = unit // quads
            column: T.int32 = unit % quads * QUAD
            merged = T.meta_var(Merged(self.scale2))
            merged.clear()
            self.add_warps(merged, row, column)
            if self.shares == 1:
                self.write_output(merged, row, column)
            else:
                self.write_partial(merged, row, column, self.split, 0)
            unit = unit + self.threads

    @T.inline
    def add_warps(self, merged, row, column):
        stats = T.alloc_local((2 * self.warps,), "float32")
        values = T.alloc_local((QUAD * self.warps,), "float32")
        for w in T.unroll(self.warps):
            for i in T.unroll(2):
                stats[2 * w + i] = self.stats[self.word.stats + 2 * (w * BLOCK + row) + i]
            for i in T.unroll(QUAD):
                values[QUAD * w + i] = self.results[self.result(w, row) + column + i]
        merged.add(stats, values, self.warps)

    @T.inline
    def write_partial(self, merged, row, column, part, pair):
        call = T.meta_var(self.call)
        slot: T.int32 = self.slot0 + part
        for i in T.unroll(QUAD):
            call.partial_o[slot, row, column + i] = merged.values[i]
        if column == 0:
            call.partial_sums[slot, row, 2 * pair] = merged.top[0]
            call.partial_sums[slot, row, 2 * pair + 1] = merged.total[0]

    # The blocks of an item form a tree: of up to `FAN` parts the last one to arrive merges all, in their
    # order, and goes on for them. One block alone would take longer than the keys where there are hundreds.

    def start_climb(self) -> None:
        """The block's index among the parts of its level, which lie ``stride`` slots apart."""
        self.parts = scalar("int32", self.shares)
        self.index = scalar("int32", self.split)
        self.stride = scalar("int32", 1)
        self.level = scalar("int32", 0)
        self.first = scalar("int32", 0)  # of those that are merged together
        self.count = scalar("int32", 0)

    @T.inline
    def arrive(self):
        """How many of the parts that are merged together were here before.

        One thread releases and acquires for all, between two barriers.
        """
        self.first = self.index // FAN * FAN
        self.count = T.min(self.parts - self.first, FAN)
        T.cuda.cta_sync()
        if self.thread == 0:
            ticket = T.alloc_local((1,), "int32")
            ticket[0] = 0
            if self.count > 1:
                # A slot of their own, because at each level those of another remainder are taken.
                place: T.int32 = self.slot0 + self.first * self.stride + self.level
                T.ptx["atom.acq_rel.gpu.global.add.s32"](ticket[0], self.call.arrived.ptr_to([place]), 1)
                if ticket[0] == self.count - 1:
                    self.call.arrived[place] = 0  # as the next call needs it
            self.words[self.word.ticket] = ticket[0]
        T.cuda.cta_sync()

    @T.inline
    def climb(self):
        self.parts = (self.parts + (FAN - 1)) // FAN
        self.index = self.index // FAN
        self.stride = self.stride * FAN
        self.level = self.level + 1

    @T.inline
    def merge_parts(self):
        quads = T.meta_var(self.head_dim // QUAD)
        unit = T.meta_var(scalar("int32", self.thread))
        while unit < self.rows * quads:
            row: T.int32 = unit // quads
            column: T.int32 = unit % quads * QUAD
            merged = T.meta_var(Merged(self.scale2))
            merged.clear()
            self.add_parts(merged, row, column)
            if self.parts <= FAN:
                self.write_output(merged, row, column)
            else:
                # Sums of two levels side by side: other threads still read this level's.
                self.write_partial(merged, row, column, self.first * self.stride, (self.level + 1) % 2)
            unit = unit + self.threads

    @T.inline
    def add_parts(self, merged, row, column):
        call = T.meta_var(self.call)
        stats = T.alloc_local((2 * FAN,), "float32")
        values = T.alloc_local((QUAD * FAN,), "float32")
        for p in T.unroll(FAN):
            part: T.int32 = (self.first + T.min(p, self.count - 1)) * self.stride
            T.ptx["ld.global.cg.v2.f32"](
                stats[2 * p], stats[2 * p + 1],
                call.partial_sums.ptr_to([self.slot0 + part, row, self.level % 2 * 2]),
            )  # fmt: skip
            T.ptx["ld.global.cg.v4.f32"](
                values[4 * p], values[4 * p + 1], values[4 * p + 2], values[4 * p + 3],
                call.partial_o.ptr_to([self.slot0 + part, row, column]),
            )  # fmt: skip
        for p in T.unroll(FAN):
            stats[2 * p] = T.Select(p < self.count, stats[2 * p], T.float32(LOWEST))
            stats[2 * p + 1] = T.Select(p < self.count, stats[2 * p + 1], T.float32(0))
        merged.add(stats, values, FAN)

    @T.inline
    def write_output(self, merged, row, column):
        call = T.meta_var(self.call)
        head: T.int32 = self.head_of(self.row0 + row)
        query: T.int32 = self.query_of(self.row0 + row)
        # A query without keys; one that is NaN, or sees NaN, has a sum of NaN.
        is_keyless: T.bool = merged.total[0] == T.float32(0)
        factor: T.float32 = T.Select(is_keyless, T.float32(0), T.float32(1) / merged.total[0])
        if column == 0:
            call.lse[self.batch, head, query] = T.Select(
                is_keyless,
                T.float32(-INF),
                merged.top[0] * (self.scale2 * T.float32(LN2)) + T.log2(merged.total[0]) * T.float32(LN2),
            )
        to: T.int64 = call.o.row(self.batch, head, query) + T.cast(column, "int64")
        words = T.alloc_local((QUAD,), "uint32")
        if self.blocks.is_split:
            for i in T.unroll(QUAD):
                words[i] = T.reinterpret("uint32", merged.values[i] * factor)
            T.ptx["st.global.v4.b32"](call.o.flat.ptr_to([to]), words[0], words[1], words[2], words[3])
        else:
            for i in T.unroll(2):
                T.ptx[self.blocks.pack](
                    words[i], merged.values[2 * i + 1] * factor, merged.values[2 * i] * factor
                )
            T.ptx["st.global.v2.b32"](call.o.flat.ptr_to([to]), words[0], words[1])
