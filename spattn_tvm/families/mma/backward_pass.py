"""One pass of the portable backward: what a thread block does with its tile.

Rows are the tile's, columns those of the other side; `backward.py` says which side is which, and why. The
parts stand in the order in which they run.
"""

# mypy: ignore-errors
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.key_range import document_keys, has_key, key_range, query_range
from spattn_tvm.domains.numbers import INF, LOG2E
from spattn_tvm.domains.tiles import locate_head, locate_rows, table_row, tile_slots
from spattn_tvm.domains.variables import scalar

from .backward_sizes import KEPT_WORDS, TILE_WORDS, Pass
from .blocks import BLOCK, Blocks, row_loader_macro, wait_macro

ADD = {1: "red.global.add.f32", 2: "red.global.add.v2.f32", 4: "red.global.add.v4.f32"}
INFO_WORDS = 4
PLACE, LOW, HIGH, SEGMENT = range(
    INFO_WORDS
)  # of a chunk: its first column, its band, which band of which head
# Of a tile, in shared memory, because registers are what these kernels are short of: what makes a row's
# number one of its own side's, the head, where the document's rows end there, the first of the columns that
# there are, the first of the tile's rows that exist and where they end, the first head's bands, how many.
TO_ROW, HEAD, OWN_END, COLUMN_BEGIN, LEAST, MOST, TABLE_AT, SEGMENTS = range(TILE_WORDS - KEPT_WORDS)
# And, where sizes say so, the batch row and the segment's band, for the thread that notes what a chunk is.
BATCH, BAND_LOW, BAND_HIGH = range(TILE_WORDS - KEPT_WORDS, TILE_WORDS - 1)
NO_ROW = 2**30  # behind all columns: sums with distances stay inside int32


class TilePass:
    """A pass of the given sizes over the tensors of a call; `run` is the kernel.

    Parameters
    ----------
    sizes : Pass
    dtype, arch : str
    call : namespace
        From `match_call`, but ``lse``, ``delta``, ``bands`` and ``dq_sum`` (with one pass) flat buffers.

    Rows are numbered as those of the columns' side, so that the distance of a pair is the difference of the
    two: a query is where it stands among the keys, a key is the query that would stand there.
    """

    def __init__(self, sizes: Pass, dtype: str, arch: str, call: SimpleNamespace) -> None:
        self.sizes, self.dtype, self.call = sizes, dtype, call
        self.pitch = sizes.pitch // sizes.element
        self.exchange_pitch = sizes.exchange_pitch // sizes.element
        self.blocks = Blocks(dtype, self.pitch)
        self.exchanged = Blocks(dtype, self.exchange_pitch)  # the operands that warps hand to each other
        self.words = self.blocks.words
        self.wait = wait_macro(arch)
        self.load_tile = row_loader_macro(sizes.tile, sizes.head_dim, dtype, sizes.threads, whole=False)
        self.load_chunk = row_loader_macro(sizes.chunk, sizes.head_dim, dtype, sizes.threads, whole=False)
        # The tile's own rows, the columns' rows, and what is accumulated from the latter.
        if sizes.keys:
            self.heads, self.length, self.boundaries = call.kv_heads, call.key_length, call.key_boundaries
            self.row_tensors, self.column_tensors = (call.k, call.v), (call.q, call.do)
        else:
            self.heads, self.length, self.boundaries = call.query_heads, call.length, call.boundaries
            self.row_tensors, self.column_tensors = (call.q, call.do), (call.k, call.v)

    def at(self, name: str) -> int:
        """Element of the arena where a part of it starts."""
        return self.sizes.offsets[name] // self.sizes.element

    # What a thread has

    @T.inline
    def run(self):
        number = T.cta_id([self.slots() * self.call.batches * self.heads])
        warp = T.warp_id([self.sizes.threads // 32])
        thread = T.thread_id([self.sizes.threads])
        self.enter(warp, thread)
        self.locate(number)
        if self.own_row0 < self.own_end:
            self.find_domain()
            self.prepare()
            self.load_own_rows()
            for i in T.unroll(max(self.sizes.stages - 1, 1)):
                self.load_next_chunk()
                T.ptx.cp.async_.commit_group()
            self.read_own_statistics()
            self.start_together()
            while self.done < self.made:
                self.take_chunk()
                self.compute_own()
                self.hand_over()
                self.compute_from_others()
                self.pass_chunk()
            # Without any chunk the tile's rows may still be on their way.
            T.ptx.cp.async_.wait_group(0)
            self.store_outputs()

    def slots(self) -> Any:
        return tile_slots(self.length, self.call.documents, self.sizes.tile)

    def enter(self, warp: Any, thread: Any) -> None:
        """The block's shared memory and the variables of its place."""
        sizes = self.sizes
        self.warp, self.thread = warp, thread
        self.arena = T.alloc_buffer(
            (sizes.shared_bytes // sizes.element,), self.dtype, scope="shared.dyn", align=1024
        )
        self.column_lse = self.view("lse", "float32", max(1, sizes.stages * sizes.chunk))
        self.column_delta = self.view("delta", "float32", max(1, sizes.stages * sizes.chunk))
        self.infos = self.view("info", "int32", sizes.stages * INFO_WORDS)
        self.arrived = self.view("arrived", "uint64", 1)
        self.left = self.view("left", "uint64", 1)
        self.tile = self.view("tile", "int32", self.sizes.tile_words)
        self.lane = scalar("int32", thread % 32)
        self.quad = scalar("int32", self.lane // 4)
        for name in ("slot", "batch", "head", "document", "own_begin", "own_end", "own_row0", "row0", "end"):
            setattr(self, name, scalar("int32", 0))

    def view(self, name: str, dtype: str, count: int) -> Any:
        bytes_of_one = 8 if dtype == "uint64" else 4
        return T.decl_buffer(
            (count,), dtype, data=self.arena.data, scope="shared.dyn",
            elem_offset=self.sizes.offsets[name] // bytes_of_one,
        )  # fmt: skip

    @T.inline
    def locate(self, number):
        """The tile's rows; those with most work first: late queries, early keys."""
        call, rows = T.meta_var(self.call), T.meta_var(self.sizes.tile)
        slots: T.int32 = self.slots()
        locate_head(
            number, slots, call.batches, self.heads, self.sizes.heads, self.slot, self.batch, self.head
        )
        if not self.sizes.keys:
            self.slot = slots - 1 - self.slot
        locate_rows(
            self.slot, rows, self.boundaries, call.documents, self.document,
            self.own_begin, self.own_end, self.own_row0,
        )  # fmt: skip

    @T.inline
    def find_domain(self):
        """The tile's rows that exist, as rows of the columns' side, and the columns that they may meet."""
        call, rows = T.meta_var(self.call), T.meta_var(self.sizes.tile)
        keys = T.meta_var(
            document_keys(
                self.document, self.batch, call.boundaries, call.key_boundaries, call.key_ranges,
                call.num_ranges,
            )
        )  # fmt: skip
        key_begin: T.int32 = keys[0]
        key_end: T.int32 = keys[1]
        to_row: T.int32 = keys[2] if self.sizes.keys else 0 - keys[2]
        queries = T.meta_var([call.boundaries[self.document], call.boundaries[self.document + 1]])
        self.end = queries[1] if self.sizes.keys else key_end
        self.row0 = self.own_row0 - to_row
        if self.thread == 0:
            row_begin, row_end = T.meta_var((key_begin, key_end) if self.sizes.keys else (0, self.own_end))
            self.tile[TO_ROW] = to_row
            self.tile[OWN_END] = self.own_end
            self.tile[COLUMN_BEGIN] = queries[0] if self.sizes.keys else key_begin
            least: T.int32 = T.max(self.own_row0, row_begin) - to_row
            most: T.int32 = T.min(self.own_row0 + rows, row_end) - to_row
            self.tile[LEAST] = least
            self.tile[MOST] = most
            if self.sizes.looks_up:
                self.tile[BATCH] = self.batch
            self.tile[HEAD] = self.head
            self.tile[SEGMENTS] = T.Select(least < most, 2 * self.group() if self.sizes.keys else 2, 0)
            first_head = T.meta_var(self.head * self.group() if self.sizes.keys else self.head)
            table = T.meta_var(table_row(self.document, call.documents, call.tables))
            self.tile[TABLE_AT] = table * call.query_heads + first_head
        T.cuda.cta_sync()

    def group(self) -> Any:
        return T.truncdiv(self.call.query_heads, self.call.kv_heads)

    def prepare(self) -> None:
        """This warp's rows, the walk over the chunks, and what is kept in registers."""
        sizes, words = self.sizes, self.words
        self.across = scalar("int32", self.warp % sizes.split)
        self.strip_row = scalar("int32", self.warp // sizes.split * sizes.rows)  # of this warp in the tile
        self.first_row = scalar("int32", self.row0 + self.strip_row)
        end_row = self.first_row + sizes.rows
        self.last_row = scalar("int32", T.min(end_row, self.tile[MOST]) - 1)
        # The last row, or one beyond all columns, with which no strip is whole, where some don't exist.
        exist = T.And(self.first_row >= self.tile[LEAST], end_row <= self.tile[MOST])
        self.whole_row = scalar("int32", T.Select(exist, end_row - 1, NO_ROW) if sizes.keys else end_row - 1)
        self.my_row = scalar("int32", self.first_row + self.quad)

        # The two bands of each query head that reads, or is, this head.
        head = self.tile[HEAD] if sizes.looks_up else self.head
        self.first_head = head * self.group() if sizes.keys else head
        if sizes.looks_up:
            self.batch = self.tile[BATCH]
        else:
            self.first_head = scalar("int32", self.first_head)
        self.segment = scalar("int32", -1)
        self.place = scalar("int32", 0)  # of the chunk to load
        self.place_end = scalar("int32", 0)
        self.band = T.alloc_local((2,), "int32")
        self.noted = [self.tile[BAND_LOW], self.tile[BAND_HIGH]] if sizes.looks_up else self.band
        self.made = scalar("int32", 0)  # chunks asked for
        self.put = T.truncmod(self.made, sizes.stages)  # the stage to fill
        self.done = scalar("int32", 0)  # chunks computed with
        self.take = T.truncmod(self.done, sizes.stages)  # the stage they are in
        # Which of the two exchange buffers, in elements.
        self.buffer = self.done % 2 * (sizes.exchange_bytes // sizes.element) if sizes.drifts else 0
        self.info = T.alloc_local((INFO_WORDS,), "int32")

        # Where a lane's elements of the operands lie.
        blocks, lane = self.blocks, self.lane
        own = blocks.lane_a(lane) + self.strip_row * self.pitch
        self.first_at = scalar("int32", self.at("first") + own)
        self.second_at = scalar("int32", self.at("second") + own)
        self.column_lane = scalar("int32", blocks.lane_b_transposed(lane))
        self.slab = scalar("int32", blocks.lane_b(lane) + self.across * sizes.out_columns)
        exchange_row = self.strip_row * self.exchange_pitch
        self.exchange_lane = scalar("int32", self.exchanged.lane_a(lane) + exchange_row)
        self.third = self.at("third") + self.take * (sizes.chunk * self.pitch)  # of the chunk to compute with
        self.fourth = self.at("fourth") + self.take * (sizes.chunk * self.pitch)

        self.s = T.alloc_local((sizes.scores,), "float32")  # scores, then P
        self.p = T.alloc_local((sizes.scores,), "float32")  # dP, then dS
        self.packed = T.alloc_local((sizes.scores // 2,), "uint32")
        self.dpacked = T.alloc_local((sizes.scores // 2,), "uint32")
        self.operand = T.alloc_local((words * sizes.row_blocks,), "uint32")
        self.right = T.alloc_local((words,), "uint32")
        self.held = T.alloc_local(
            (2 * words * sizes.row_blocks * sizes.steps if sizes.hold else 1,), "uint32"
        )
        self.row_lse = T.alloc_local((2 * sizes.row_blocks,), "float32")  # times log2(e)
        self.row_delta = T.alloc_local((2 * sizes.row_blocks,), "float32")
        self.statistics = T.alloc_local((sizes.strip // 4 if sizes.keys else 1,), "float32")  # of columns
        self.first_output = T.alloc_local((sizes.accumulators,), "float32")  # from dS and the third tensor
        self.second_output = T.alloc_local((sizes.accumulators if sizes.keys else 1,), "float32")
        self.scale2 = scalar("float32", self.call.scale * T.float32(LOG2E))

    # Loads

    @T.inline
    def load_own_rows(self):
        row0: T.int32 = self.row0 + self.tile[TO_ROW]
        first: T.int32 = self.tile[LEAST] + self.tile[TO_ROW]
        end: T.int32 = self.tile[MOST] + self.tile[TO_ROW]
        self.load(self.load_tile, "first", 0, self.row_tensors[0], self.head, row0, first, end)
        self.load(self.load_tile, "second", 0, self.row_tensors[1], self.head, row0, first, end)
        for i in T.unroll(self.sizes.accumulators):
            self.first_output[i] = T.float32(0)
            if self.sizes.keys:
                self.second_output[i] = T.float32(0)

    @T.inline
    def load(self, load_rows, part, at, tensor, head, row0, first, end):
        """Rows of a head to a part of the arena; those outside of ``[first, end)`` become zeros."""
        load_rows(
            self.arena, self.at(part) + at, tensor.flat, tensor.origin(self.batch, head), tensor.row_stride,
            row0, first, end, self.thread,
        )  # fmt: skip

    @T.inline
    def load_next_chunk(self):
        """Asks for the next chunk of columns, if there is one, and notes which it is."""
        sizes, call = T.meta_var(self.sizes), T.meta_var(self.call)
        while T.And(self.place >= self.place_end, self.segment + 1 < self.tile[SEGMENTS]):
            self.segment = self.segment + 1
            row: T.int64 = T.cast(2 * self.tile[TABLE_AT] + self.segment, "int64") * T.int64(2)
            T.ptx["ld.global.nc.v2.s32"](self.band[0], self.band[1], call.bands.ptr_to([row]))
            low, high = T.meta_var(self.band[0]), T.meta_var(self.band[1])
            if sizes.looks_up:
                if self.thread == 0:
                    self.tile[BAND_LOW] = low
                    self.tile[BAND_HIGH] = high
            first_row, last_row = T.meta_var(self.tile[LEAST]), T.meta_var(self.tile[MOST] - 1)
            if sizes.keys:
                queries = T.meta_var(query_range(first_row, last_row, low, high, self.end))
                self.place = T.max(queries[0], self.tile[COLUMN_BEGIN])
                self.place_end = queries[1]
            else:
                keys = T.meta_var(key_range(first_row, last_row, low, high, self.tile[COLUMN_BEGIN]))
                self.place = keys[0]
                self.place_end = T.min(keys[1], self.end)
        if self.place < self.place_end:
            head: T.int32 = self.first_head + self.segment // 2
            if not sizes.keys:
                head = T.truncdiv(self.first_head, self.group())
            stage = T.meta_var(self.put * (sizes.chunk * self.pitch))
            first, second = T.meta_var(self.column_tensors)
            # Behind the band may be queries without keys, whose dO is anything.
            self.load(self.load_chunk, "third", stage, first, head, self.place, None, self.place_end)
            self.load(self.load_chunk, "fourth", stage, second, head, self.place, None, self.place_end)
            if sizes.keys:
                self.load_column_statistics(head)
            if self.thread == 0:
                T.ptx["st.shared.v4.s32"](
                    self.infos.ptr_to([self.put * INFO_WORDS]),
                    self.place, self.noted[0], self.noted[1], self.segment,
                )  # fmt: skip
            self.place = self.place + sizes.chunk
            self.made = self.made + 1

    @T.inline
    def load_column_statistics(self, head):
        """lse and delta of the chunk's queries."""
        sizes, call = T.meta_var(self.sizes), T.meta_var(self.call)
        row: T.int64 = self.query_row(head, self.place + self.thread)
        for part in T.unroll((sizes.chunk + sizes.threads - 1) // sizes.threads):
            column: T.int32 = self.thread + part * sizes.threads
            if column < sizes.chunk:
                at = T.meta_var(self.put * sizes.chunk + column)
                from_row = T.meta_var(row + part * sizes.threads)
                there: T.uint32 = T.if_then_else(
                    self.place + column < self.place_end, T.uint32(4), T.uint32(0)
                )
                T.ptx["cp.async.ca.shared.global"](
                    self.column_lse.ptr_to([at]), call.lse.ptr_to([from_row]), 4, there
                )
                T.ptx["cp.async.ca.shared.global"](
                    self.column_delta.ptr_to([at]), call.delta.ptr_to([from_row]), 4, there
                )

    def query_row(self, head: Any, query: Any) -> Any:
        """Number (int64) of a query among those of all heads."""
        pair = T.cast(self.batch * self.call.query_heads + head, "int64")
        return pair * self.call.of_queries[2] + T.cast(query, "int64")

    @T.inline
    def read_own_statistics(self):
        if not self.sizes.keys:
            row: T.int64 = self.query_row(self.head, self.my_row + self.tile[TO_ROW])
            for i in T.unroll(2 * self.sizes.row_blocks):
                # Rows behind the end add nothing to anything.
                self.row_lse[i] = T.float32(INF)
                self.row_delta[i] = T.float32(0)
                if self.my_row + 8 * i < self.tile[MOST]:
                    self.row_lse[i] = self.call.lse[row + 8 * i] * T.float32(LOG2E)
                    self.row_delta[i] = self.call.delta[row + 8 * i]

    # The walk over the chunks

    @T.inline
    def start_together(self):
        if self.sizes.drifts:
            if self.thread == 0:
                T.ptx.mbarrier.init.shared.b64(self.arrived.ptr_to([0]), T.uint32(self.sizes.threads))
                T.ptx.mbarrier.init.shared.b64(self.left.ptr_to([0]), T.uint32(self.sizes.threads))
        T.ptx.cp.async_.wait_group(max(self.sizes.stages - 2, 0))
        T.cuda.cta_sync()

    @T.inline
    def load_ahead(self):
        """A later chunk in the place of the one before, once all warps have left that."""
        if self.sizes.drifts:
            # Of a new barrier the phase before the first counts as passed.
            self.wait(self.left.ptr_to([0]), (self.done + 1) % 2)
            self.load_next_chunk()
            T.ptx.cp.async_.commit_group()

    @T.inline
    def take_chunk(self):
        sizes, words = T.meta_var(self.sizes), T.meta_var(self.words)
        if sizes.hold:
            if self.done == 0:
                for m in T.unroll(sizes.row_blocks):
                    for step in T.unroll(sizes.steps):
                        offset = T.meta_var(m * BLOCK * self.pitch + step * BLOCK)
                        held = T.meta_var((m * sizes.steps + step) * words)
                        second = T.meta_var(held + sizes.row_blocks * sizes.steps * words)
                        self.blocks.load_a(self.held, held, self.arena, self.first_at + offset)
                        self.blocks.load_a(self.held, second, self.arena, self.second_at + offset)
        T.ptx["ld.shared.v4.s32"](
            *[self.info[i] for i in range(INFO_WORDS)], self.infos.ptr_to([self.take * INFO_WORDS])
        )

    @T.inline
    def hand_over(self):
        """The chunk's dS (and P) are there, and this thread's copies of the next chunk."""
        sizes = T.meta_var(self.sizes)
        if sizes.drifts:
            T.ptx.cp.async_.wait_group(sizes.stages - 2)
            T.ptx.mbarrier.arrive.shared.b64(self.arrived.ptr_to([0]))
            if sizes.exchange:
                T.ptx.bar.sync(T.cast(1 + self.warp // sizes.split, "uint32"), T.uint32(32 * sizes.split))
        elif sizes.exchange or sizes.one_pass:
            T.cuda.cta_sync()

    @T.inline
    def compute_from_others(self):
        sizes = T.meta_var(self.sizes)
        if sizes.exchange:
            self.multiply_others(self.second_output, "p", self.fourth)
            self.multiply_others(self.first_output, "ds", self.third)
        if sizes.drifts:
            T.ptx.mbarrier.arrive.shared.b64(self.left.ptr_to([0]))
            self.wait(self.arrived.ptr_to([0]), self.done % 2)
        if sizes.one_pass:
            self.add_query_gradients()

    @T.inline
    def pass_chunk(self):
        sizes = T.meta_var(self.sizes)
        self.done = self.done + 1
        if not sizes.drifts:
            T.cuda.cta_sync()
            self.load_next_chunk()
            T.ptx.cp.async_.commit_group()
            T.ptx.cp.async_.wait_group(0)
            T.cuda.cta_sync()

    # Strips: the columns of a chunk that a warp computes at once

    @T.inline
    def compute_own(self):
        """What follows from this warp's strips of the chunk, as far as it needs no other warp."""
        sizes = T.meta_var(self.sizes)
        if sizes.exchange:
            mine: T.int32 = self.across * sizes.strip
            is_reached: T.bool = self.reaches(mine)
            if is_reached:
                self.multiply_scores(self.s, 0, self.first_at, self.third + mine * self.pitch)
            self.load_ahead()
            if is_reached:
                self.compute_strip(mine)
            else:
                self.skip_strip(mine)
        else:
            self.load_ahead()
            column: T.int32 = 0
            while column < sizes.chunk:
                if self.reaches(column):
                    self.multiply_scores(self.s, 0, self.first_at, self.third + column * self.pitch)
                    self.compute_strip(column)
                else:
                    self.skip_strip(column)
                column = column + sizes.strip

    def reaches(self, column: Any) -> Any:
        """Whether some pair of this warp's rows and the strip from `column` on lies in the chunk's band."""
        low, high = self.info[LOW], self.info[HIGH]
        first = self.info[PLACE] + column
        last = first + (self.sizes.strip - 1)
        if self.sizes.keys:
            begin, most = self.first_row + low, self.last_row + high
        else:
            begin, most = self.first_row - high, self.last_row - low
        inside = T.And(first <= T.min(most, self.end - 1), last >= begin)
        return T.And(inside, self.first_row <= self.last_row)

    def is_whole(self, column: Any) -> Any:
        """Whether all pairs of them do."""
        low, high = self.info[LOW], self.info[HIGH]
        first = self.info[PLACE] + column
        last, last_row = first + (self.sizes.strip - 1), self.whole_row
        if self.sizes.keys:
            inside = T.And(first - last_row >= low, last - self.first_row <= high)
        else:
            inside = T.And(self.first_row - last >= low, last_row - first <= high)
        return T.And(inside, last < self.end)

    @T.inline
    def compute_strip(self, column):
        sizes = T.meta_var(self.sizes)
        third, fourth = (
            T.meta_var(self.third + column * self.pitch),
            T.meta_var(self.fourth + column * self.pitch),
        )
        # Where P is neither exchanged nor waited for, it is used last: that spills less.
        late = T.meta_var(sizes.keys and not sizes.exchange and not sizes.one_pass)
        if late:
            self.multiply_scores(self.p, 1, self.second_at, fourth)
        self.weigh(column)
        if T.Not(self.is_whole(column)):
            self.mask(column)
        self.exponentiate()
        if sizes.keys and not late:
            self.pack(self.packed, self.s)
            if sizes.exchange:
                self.publish(self.packed, self.s, "p", column)
            self.multiply_own(self.second_output, self.packed, self.s, fourth)
        if not late:
            self.multiply_scores(self.p, 1, self.second_at, fourth)
        self.differentiate(column)
        if late:
            self.pack(self.packed, self.s)
            self.multiply_own(self.second_output, self.packed, self.s, fourth)
        self.pack(self.dpacked, self.p)
        if sizes.exchange or sizes.one_pass:
            self.publish(self.dpacked, self.p, "ds", column)
        self.multiply_own(self.first_output, self.dpacked, self.p, third)

    @T.inline
    def skip_strip(self, column):
        """What dQ takes of a strip beyond the band: nothing."""
        if self.sizes.one_pass:
            for i in T.unroll(self.sizes.scores):
                self.p[i] = T.float32(0)
            self.pack(self.dpacked, self.p)
            self.publish(self.dpacked, self.p, "ds", column)

    @T.inline
    def multiply_scores(self, scores, side, rows_at, columns_at):
        """Products of this warp's rows (the tile's first or second tensor) and a strip's columns."""
        sizes, blocks, words = T.meta_var(self.sizes), T.meta_var(self.blocks), T.meta_var(self.words)
        for i in T.unroll(sizes.scores):
            scores[i] = T.float32(0)
        for step in T.unroll(sizes.steps):
            if not sizes.hold:
                for m in T.unroll(sizes.row_blocks):
                    blocks.load_a(
                        self.operand, m * words, self.arena, rows_at + (m * BLOCK * self.pitch + step * BLOCK)
                    )
            for n in T.unroll(sizes.strip // BLOCK):
                blocks.load_b_transposed(
                    self.right, 0, self.arena,
                    columns_at + self.column_lane + (n * BLOCK * self.pitch + step * BLOCK),
                )  # fmt: skip
                for m in T.unroll(sizes.row_blocks):
                    blocks.multiply(
                        scores, (m * (sizes.strip // BLOCK) + n) * 8,
                        self.held if sizes.hold else self.operand,
                        (((side * sizes.row_blocks + m) * sizes.steps + step) if sizes.hold else m) * words,
                        self.right, 0,
                    )  # fmt: skip

    @T.inline
    def read_statistics(self, source, column):
        """A column's lse or delta: of the two columns of each eight that this lane has."""
        at: T.let = self.take * self.sizes.chunk + column + self.lane % 4 * 2
        for n in T.unroll(self.sizes.strip // 8):
            T.ptx["ld.shared.v2.f32"](
                self.statistics[2 * n], self.statistics[2 * n + 1], source.ptr_to([at + 8 * n])
            )

    @T.inline
    def weigh(self, column):
        """The exponents of P."""
        sizes = T.meta_var(self.sizes)
        if sizes.keys:
            self.read_statistics(self.column_lse, column)
        for m in T.unroll(sizes.row_blocks):
            for n in T.unroll(sizes.strip // 8):
                for e in T.unroll(4):
                    i: T.let = (m * (sizes.strip // 8) + n) * 4 + e
                    if sizes.keys:
                        lse: T.let = self.statistics[2 * n + e % 2] * T.float32(LOG2E)
                        self.s[i] = self.s[i] * self.scale2 - lse
                    else:
                        self.s[i] = self.s[i] * self.scale2 - self.row_lse[2 * m + e // 2]

    @T.inline
    def mask(self, column):
        """Distances grow along the columns when they are queries, and shrink when they are keys."""
        sizes, low, high = T.meta_var(self.sizes), T.meta_var(self.info[LOW]), T.meta_var(self.info[HIGH])
        for m in T.unroll(sizes.row_blocks):
            for half in T.unroll(2):
                row: T.int32 = self.my_row + (16 * m + 8 * half)
                first: T.int32 = self.info[PLACE] + column + self.lane % 4 * 2
                # Distances to columns that there are.
                least: T.int32 = low if sizes.keys else T.max(low, row - (self.end - 1))
                most: T.int32 = T.min(high, self.end - 1 - row) if sizes.keys else high
                seen: T.uint32 = T.cast(T.max(most - least + 1, 0), "uint32")
                if sizes.keys:
                    if T.Or(row < self.tile[LEAST], row >= self.tile[MOST]):
                        seen = T.uint32(0)
                distance: T.int32 = (first - row if sizes.keys else row - first) - least
                for n in T.unroll(sizes.strip // 8):
                    for e in T.unroll(2):
                        i: T.let = (m * (sizes.strip // 8) + n) * 4 + 2 * half + e
                        beyond: T.let = T.cast(
                            distance + (8 * n + e) if sizes.keys else distance - (8 * n + e), "uint32"
                        )
                        self.s[i] = T.if_then_else(beyond < seen, self.s[i], T.float32(-INF))

    @T.inline
    def exponentiate(self):
        for i in T.unroll(self.sizes.scores):
            T.ptx["ex2.approx.ftz.f32"](self.s[i], self.s[i])

    @T.inline
    def differentiate(self, column):
        """dS = P (dP - delta), without the scale."""
        sizes = T.meta_var(self.sizes)
        if sizes.keys:
            self.read_statistics(self.column_delta, column)
        for m in T.unroll(sizes.row_blocks):
            for n in T.unroll(sizes.strip // 8):
                for e in T.unroll(4):
                    i: T.let = (m * (sizes.strip // 8) + n) * 4 + e
                    if sizes.keys:
                        self.p[i] = self.s[i] * (self.p[i] - self.statistics[2 * n + e % 2])
                    else:
                        self.p[i] = self.s[i] * (self.p[i] - self.row_delta[2 * m + e // 2])

    # Outputs

    @T.inline
    def pack(self, packed, values):
        """Left operands out of scores; those of float32 are split where they are used."""
        if not self.blocks.is_split:
            for i in T.unroll(self.sizes.scores // 8):
                self.blocks.a_from_sums(packed, i * self.words, values, i * 8)

    @T.inline
    def publish(self, packed, values, name, column):
        """P or dS of a strip for other warps, rows as in the tile."""
        sizes = T.meta_var(self.sizes)
        at: T.int32 = (
            self.at(name) + self.buffer + (self.strip_row + self.quad) * self.exchange_pitch
            + (column + self.lane % 4 * 2)
        )  # fmt: skip
        for m in T.unroll(sizes.row_blocks):
            for half in T.unroll(2):
                for n in T.unroll(sizes.strip // 8):
                    i: T.let = (m * (sizes.strip // 8) + n) * 2 + half
                    to = T.meta_var(
                        self.arena.ptr_to([at + ((16 * m + 8 * half) * self.exchange_pitch + 8 * n)])
                    )
                    if self.blocks.is_split:
                        T.ptx["st.shared.v2.f32"](to, values[2 * i], values[2 * i + 1])
                    else:
                        T.ptx["st.shared.b32"](to, packed[i])

    @T.inline
    def multiply_output(self, output, left, left_at, pace, columns_at):
        """Adds the products of left operands (``left_at + m * pace``) and 16 columns' rows to an output."""
        sizes, blocks = T.meta_var(self.sizes), T.meta_var(self.blocks)
        for n in T.unroll(sizes.out_columns // BLOCK):
            blocks.load_b(self.right, 0, self.arena, columns_at + n * BLOCK)
            for m in T.unroll(sizes.row_blocks):
                blocks.multiply(
                    output,
                    (m * (sizes.out_columns // BLOCK) + n) * 8,
                    left,
                    left_at + m * pace,
                    self.right,
                    0,
                )

    @T.inline
    def multiply_own(self, output, packed, values, columns_at):
        sizes, blocks, words = T.meta_var(self.sizes), T.meta_var(self.blocks), T.meta_var(self.words)
        steps = T.meta_var(sizes.strip // BLOCK)
        for step in T.unroll(steps):
            rows_at = T.meta_var(columns_at + self.slab + step * BLOCK * self.pitch)
            if blocks.is_split:
                for m in T.unroll(sizes.row_blocks):
                    blocks.a_from_sums(self.operand, m * words, values, (m * steps + step) * 8)
                self.multiply_output(output, self.operand, 0, words, rows_at)
            else:
                self.multiply_output(output, packed, step * words, steps * words, rows_at)

    @T.inline
    def multiply_others(self, output, name, columns_at):
        """The same of the strips that the other warps of these rows made."""
        sizes, words = T.meta_var(self.sizes), T.meta_var(self.words)
        for other in T.unroll(sizes.split - 1):
            theirs: T.int32 = (self.across + (other + 1)) % sizes.split * sizes.strip
            if self.reaches(theirs):
                for step in T.unroll(sizes.strip // BLOCK):
                    for m in T.unroll(sizes.row_blocks):
                        self.exchanged.load_a(
                            self.operand, m * words, self.arena,
                            self.at(name) + self.buffer + self.exchange_lane + theirs
                            + (m * BLOCK * self.exchange_pitch + step * BLOCK),
                        )  # fmt: skip
                    self.multiply_output(
                        output, self.operand, 0, words,
                        columns_at + self.slab + theirs * self.pitch + step * BLOCK * self.pitch,
                    )  # fmt: skip

    @T.inline
    def add_query_gradients(self):
        """dQ += dS K of one chunk, summed over this tile's keys here and over tiles in dq_sum."""
        sizes, words = T.meta_var(self.sizes), T.meta_var(self.words)
        along: T.int32 = self.warp // sizes.dq_warps[1]
        beside: T.int32 = self.warp % sizes.dq_warps[1]
        if self.warp < sizes.dq_warps[0] * sizes.dq_warps[1]:
            sums = T.alloc_local((sizes.dq_rows * sizes.dq_columns // 32,), "float32")
            left = T.alloc_local((words * (sizes.dq_rows // BLOCK),), "uint32")
            for i in T.unroll(sizes.dq_rows * sizes.dq_columns // 32):
                sums[i] = T.float32(0)
            ds_at: T.int32 = (
                self.at("ds") + self.buffer + along * sizes.dq_rows
                + self.exchanged.lane_a_transposed(self.lane)
            )  # fmt: skip
            keys_at: T.int32 = self.at("first") + self.blocks.lane_b(self.lane) + beside * sizes.dq_columns
            for part in T.unroll(sizes.tile // sizes.dq_keys):
                # At a band's edges half of a tile has no key of these queries.
                first: T.let = self.row0 + part * sizes.dq_keys
                if T.And(
                    self.info[PLACE] + (sizes.chunk - 1) - self.info[LOW] >= first,
                    self.info[PLACE] - self.info[HIGH] <= first + (sizes.dq_keys - 1),
                ):
                    for step in T.unroll(sizes.dq_keys // BLOCK):
                        key: T.let = part * sizes.dq_keys + step * BLOCK
                        self.multiply_query_gradients(
                            sums, left, ds_at + key * self.exchange_pitch, keys_at + key * self.pitch
                        )
            self.add_to_sum(sums, along * sizes.dq_rows, beside * sizes.dq_columns)

    @T.inline
    def multiply_query_gradients(self, sums, left, ds_at, keys_at):
        """The part of 16 keys."""
        sizes, words = T.meta_var(self.sizes), T.meta_var(self.words)
        for m in T.unroll(sizes.dq_rows // BLOCK):
            self.exchanged.load_a_transposed(left, m * words, self.arena, ds_at + m * BLOCK)
        for n in T.unroll(sizes.dq_columns // BLOCK):
            self.blocks.load_b(self.right, 0, self.arena, keys_at + n * BLOCK)
            for m in T.unroll(sizes.dq_rows // BLOCK):
                self.blocks.multiply(
                    sums, (m * (sizes.dq_columns // BLOCK) + n) * 8, left, m * words, self.right, 0
                )

    @T.inline
    def add_to_sum(self, sums, first_query, first_column):
        """The four floats that a lane has of a row and 16 columns are neighbours in dq_sum."""
        sizes, call = T.meta_var(self.sizes), T.meta_var(self.call)
        head_dim, vector = T.meta_var(sizes.head_dim), T.meta_var(sizes.vector)
        # Queries behind the band may have no key: what they get, theirs times a key that is NaN, is nothing.
        end: T.int32 = T.min(self.end, self.tile[MOST] + self.info[HIGH])
        query: T.int32 = self.info[PLACE] + first_query + self.quad
        row: T.int64 = self.query_row(self.first_head + self.info[SEGMENT] // 2, query)
        at: T.int64 = row * head_dim + T.cast(first_column + self.lane % 4 * 4, "int64")
        for m in T.unroll(sizes.dq_rows // BLOCK):
            for half in T.unroll(2):
                if query + (16 * m + 8 * half) < end:
                    for n in T.unroll(sizes.dq_columns // BLOCK):
                        if first_column + BLOCK * n < head_dim:
                            for j in T.unroll(4 // vector):
                                first: T.let = (m * (sizes.dq_columns // BLOCK) + n) * 8 + 2 * half
                                offset: T.let = (16 * m + 8 * half) * head_dim + BLOCK * n + vector * j
                                T.ptx[ADD[vector]](
                                    call.dq_sum.ptr_to([at + offset]),
                                    *[
                                        sums[first + self.blocks.neighbour(vector * j + i)]
                                        for i in range(vector)
                                    ],
                                )

    # The end

    @T.inline
    def store_outputs(self):
        call = T.meta_var(self.call)
        for m in T.unroll(self.sizes.row_blocks):
            for half in T.unroll(2):
                self.clear_row_of_nobody(m, half, self.my_row + (16 * m + 8 * half))
        if self.sizes.keys:
            self.store(self.second_output, call.dv, T.float32(1))
            self.store(self.first_output, call.dk, call.scale)
        else:
            self.store(self.first_output, call.dq, call.scale)

    @T.inline
    def clear_row_of_nobody(self, m, half, row):
        """A key that does not exist, or a query without keys, whatever arrived for its o and lse."""
        sizes, call = T.meta_var(self.sizes), T.meta_var(self.call)
        if sizes.keys:
            if T.Or(row < self.tile[LEAST], row >= self.tile[MOST]):
                self.clear_row(self.first_output, m, half)
                self.clear_row(self.second_output, m, half)
        else:
            at: T.int64 = T.cast(self.tile[TABLE_AT], "int64") * T.int64(4)
            begin, end = T.meta_var(self.tile[COLUMN_BEGIN]), T.meta_var(self.end)
            near = T.meta_var(has_key(row, call.bands[at], call.bands[at + 1], begin, end))
            far = T.meta_var(has_key(row, call.bands[at + 2], call.bands[at + 3], begin, end))
            if T.Not(T.Or(near, far)):
                self.clear_row(self.first_output, m, half)

    @T.inline
    def clear_row(self, output, m, half):
        for n in T.unroll(self.sizes.out_columns // 8):
            for e in T.unroll(2):
                output[(m * (self.sizes.out_columns // 8) + n) * 4 + 2 * half + e] = T.float32(0)

    @T.inline
    def store(self, output, tensor, factor):
        sizes = T.meta_var(self.sizes)
        blocks_across = T.meta_var(sizes.out_columns // BLOCK)
        first_column: T.int32 = self.across * sizes.out_columns
        for m in T.unroll(sizes.row_blocks):
            for half in T.unroll(2):
                row: T.int32 = self.my_row + (16 * m + 8 * half) + self.tile[TO_ROW]
                start: T.int64 = tensor.row(self.batch, self.tile[HEAD], row) + T.cast(first_column, "int64")
                self.blocks.store_row(
                    output, m * blocks_across * 8, half, blocks_across, factor, self.lane,
                    lambda column: tensor.flat.ptr_to([start + T.cast(column, "int64")]),
                    lambda column: T.And(row < self.tile[OWN_END], first_column + column < sizes.head_dim),
                )  # fmt: skip
