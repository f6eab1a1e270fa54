"""The portable forward with split keys: what a thread block does with its share of a tile's chunks, and how
the shares of a row are put together.

`split.py` says why it is made so. Everything but that is `ForwardTile`'s.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.tiles import chunk_count, tile_slots

from .blocks import BATCH, BLOCK, DOC_END, HEAD, ROW0, Blocks, row_pitch, scalar
from .forward_tile import ALL_LANES, INF, LEAST_SCALE, LN2, LOG2E, LOWEST, ForwardTile

QUAD = 4  # columns that a lane puts together at once
FAN = 8  # shares of a row whose outputs are on their way at once
MERGE_WARPS = 4


class SplitTile(ForwardTile):
    """The kernel that computes shares; `run` is all of it.

    Parameters
    ----------
    decisions, head_dim, dtype, arch
        As `ForwardTile`'s; of the decisions also ``least_chunks``.
    call : namespace
        Likewise, and ``partial_o``, ``partial_sums`` and int32 ``splits``: blocks of each tile.
    """

    def __init__(
        self, decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str, call: SimpleNamespace
    ) -> None:
        super().__init__(decisions, head_dim, dtype, arch, call)
        self.least_chunks = decisions["least_chunks"]

    @T.inline
    def run(self):
        tiles = T.meta_var(
            tile_slots(self.call.length, self.call.documents, self.rows)
            * self.call.batches
            * self.call.query_heads
        )
        number = T.cta_id([tiles * self.call.splits])
        warp = T.warp_id([self.warps])
        lane = T.lane_id([32])
        thread = T.thread_id([self.threads])
        self.enter(warp, lane, thread)
        self.start(T.truncdiv(number, self.call.splits))
        if self.tile[ROW0] < self.tile[DOC_END]:
            self.prepare()
            self.take_share(T.truncmod(number, self.call.splits))
            if self.first_chunk < self.chunks:
                self.walk()
                self.store()
            else:
                self.store_nothing()

    def take_share(self, split: Any) -> None:
        """The chunks ``[first_chunk, chunks)`` of the tile's; none where there are fewer shares than blocks.

        Shares differ by one chunk at most.
        """
        self.split = scalar("int32", split)
        total = scalar("int32", self.chunks)
        wanted = chunk_count(0, total, self.least_chunks)
        shares = scalar("int32", T.max(T.min(self.call.splits, wanted), 1))
        each = scalar("int32", T.truncdiv(total, shares))
        longer = scalar("int32", total - each * shares)  # shares of one chunk more
        begin = each * self.split + T.min(self.split, longer)
        self.first_chunk = scalar("int32", T.Select(self.split < shares, begin, total))
        end = self.first_chunk + each + T.Select(self.split < longer, 1, 0)
        T.buffer_store(self.chunks.source, T.Select(self.split < shares, end, total), [0])

    @T.inline
    def keep_to_share(self):
        """The share may begin and end within the band, or lie before or behind it."""
        before: T.int32 = T.Select(self.band == 0, 0, self.near_chunks)
        self.index = T.max(self.first_chunk - before, 0)
        self.count = T.min(self.count, self.chunks - before)

    def row_of(self, row: Any) -> Any:
        """Which of all shares' rows (int64) holds this share of a query."""
        call, tile = self.call, self.tile
        heads = T.cast(self.split * call.batches + tile[BATCH], "int64") * T.cast(call.query_heads, "int64")
        return (heads + T.cast(tile[HEAD], "int64")) * T.cast(call.length, "int64") + T.cast(row, "int64")

    @T.inline
    def store_sums(self, place, reference, total, maximum, is_huge):
        T.ptx["st.global.v4.f32"](
            self.call.partial_sums.ptr_to([place, 0]), reference, total, maximum, is_huge
        )

    @T.inline
    def store_row(self, m, r, row):
        """The row's output before it is divided, what its weights are relative to, and their sum."""
        i = T.meta_var(2 * m + r)
        is_inside: T.bool = row < self.tile[DOC_END]
        place: T.int64 = self.row_of(row)
        total = T.alloc_local((1,), "float32")
        maximum = T.alloc_local((1,), "float32")
        self.add_lanes(total, i)
        maximum[0] = T.float32(0)
        if self.is_huge != 0:
            maximum[0] = self.maxima[self.maximum_lane + (m * BLOCK + 8 * r) * self.pitch_words]
        if is_inside:
            if self.lane % 4 == 0:
                self.store_sums(
                    place, self.reference[i], total[0], maximum[0], T.cast(self.is_huge, "float32")
                )
            for n in T.unroll(self.steps):
                self.store_block(place, n, (m * self.steps + n) * 8 + 2 * r)

    @T.inline
    def store_block(self, place, n, at):
        """A lane's four of a row's 16 columns."""
        left = T.meta_var(n * BLOCK + self.blocks.column(self.lane, 0, 0, transposed=False))
        if self.blocks.is_split:
            T.ptx["st.global.v4.f32"](
                self.call.partial_o.ptr_to([place, left]),
                *[self.output[at + self.blocks.neighbour(i)] for i in range(4)],
            )
        else:
            for t in T.unroll(2):
                T.ptx["st.global.v2.f32"](
                    self.call.partial_o.ptr_to([place, left + 8 * t]),
                    self.output[at + 4 * t],
                    self.output[at + 4 * t + 1],
                )

    @T.inline
    def store_nothing(self):
        """A sum of 0 for each row: nobody looks at the rest."""
        for i in T.unroll((self.rows + self.threads - 1) // self.threads):
            own: T.int32 = i * self.threads + self.thread
            row: T.int32 = self.tile[ROW0] + own
            if T.And(own < self.rows, row < self.tile[DOC_END]):
                self.store_sums(self.row_of(row), T.float32(LOWEST), T.float32(0), T.float32(0), T.float32(0))


class Merge:
    """The kernel that puts the shares of each row together, a warp for a row; `run` is all of it."""

    def __init__(self, head_dim: int, dtype: str, call: SimpleNamespace) -> None:
        self.call, self.head_dim = call, head_dim
        self.blocks = Blocks(dtype, row_pitch(head_dim, dtype))
        self.units = (head_dim // QUAD + 31) // 32  # of a lane

    @T.inline
    def run(self):
        call = T.meta_var(self.call)
        rows: T.int32 = call.batches * call.query_heads * call.length
        block = T.cta_id([(call.batches * call.query_heads * call.length + (MERGE_WARPS - 1)) // MERGE_WARPS])
        warp = T.warp_id([MERGE_WARPS])
        lane = T.lane_id([32])
        self.enter(block * MERGE_WARPS + warp, lane)
        if self.row < rows:
            self.read_sums(rows)
            self.weigh()
            self.add_outputs(rows)
            self.store()

    def enter(self, row: Any, lane: Any) -> None:
        self.row, self.lane = scalar("int32", row), lane
        # As the blocks have it.
        factor = T.abs(self.call.scale) * T.float32(LOG2E)
        self.scale2 = scalar("float32", T.max(factor, T.float32(LEAST_SCALE)))
        # Of the lane's share: reference, sum, greatest score, whether it is huge; its weight.
        self.sums = T.alloc_local((4,), "float32")
        self.weight = T.alloc_local((1,), "float32")
        # Of the row.
        self.top = T.alloc_local((1,), "float32")
        self.total = T.alloc_local((1,), "float32")
        self.lse = T.alloc_local((1,), "float32")
        self.values = T.alloc_local((QUAD * self.units,), "float32")

    def place(self, share: Any, rows: Any) -> Any:
        return T.cast(share, "int64") * T.cast(rows, "int64") + T.cast(self.row, "int64")

    @T.inline
    def read_sums(self, rows):
        """A share without keys for this row, of which nothing but the sum counts, has a sum of 0."""
        for i in T.unroll(4):
            self.sums[i] = T.float32(0)
        if self.lane < self.call.splits:
            T.ptx["ld.global.v4.f32"](
                *[self.sums[i] for i in range(4)],
                self.call.partial_sums.ptr_to([self.place(self.lane, rows), 0]),
            )

    @T.inline
    def find_top(self, value):
        self.top[0] = T.Select(self.sums[1] != T.float32(0), value, T.float32(LOWEST))
        for i in T.unroll(5):
            self.top[0] = T.max(
                self.top[0], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), self.top[0], 1 << i, 32, 32)
            )

    @T.inline
    def weigh(self):
        """Each share's weight, and lse. Where one share's scores were huge, weights are made of scores before
        they are scaled, as its own were.
        """
        has_keys: T.bool = self.sums[1] != T.float32(0)
        is_huge: T.bool = T.And(has_keys, self.sums[3] != T.float32(0))
        any_huge: T.bool = T.cuda.any_sync(T.uint32(ALL_LANES), is_huge) != 0
        if any_huge:
            self.find_top(T.Select(is_huge, self.sums[2], self.sums[0] / self.scale2))
            self.weight[0] = T.Select(
                is_huge,
                (self.sums[2] - self.top[0]) * self.scale2,
                self.sums[0] - self.top[0] * self.scale2,
            )
            self.weight[0] = T.exp2(T.min(self.weight[0], T.float32(0)))
        else:
            self.find_top(self.sums[0])
            self.weight[0] = T.exp2(self.sums[0] - self.top[0])
        if T.Not(has_keys):
            self.weight[0] = T.float32(0)
        self.total[0] = T.Select(has_keys, self.weight[0] * self.sums[1], T.float32(0))
        for i in T.unroll(5):
            self.total[0] = self.total[0] + T.tvm_warp_shuffle_xor(
                T.uint32(ALL_LANES), self.total[0], 1 << i, 32, 32
            )
        top: T.float32 = T.if_then_else(
            any_huge, self.top[0] * (self.scale2 * T.float32(LN2)), self.top[0] * T.float32(LN2)
        )
        self.lse[0] = top + T.log2(self.total[0]) * T.float32(LN2)

    @T.inline
    def add_outputs(self, rows):
        for i in T.unroll(QUAD * self.units):
            self.values[i] = T.float32(0)
        share: T.int32 = 0
        while share < self.call.splits:
            parts = T.alloc_local((FAN * QUAD * self.units,), "float32")
            for p in T.unroll(FAN):
                # Beyond the last share a lane has a sum of 0.
                total: T.float32 = T.tvm_warp_shuffle(T.uint32(ALL_LANES), self.sums[1], share + p, 32, 32)
                for u in T.unroll(self.units):
                    at = T.meta_var((p * self.units + u) * QUAD)
                    for i in T.unroll(QUAD):
                        parts[at + i] = T.float32(0)
                    if T.And(total != T.float32(0), (self.lane + 32 * u) * QUAD < self.head_dim):
                        T.ptx["ld.global.v4.f32"](
                            *[parts[at + i] for i in range(QUAD)],
                            self.call.partial_o.ptr_to(
                                [self.place(share + p, rows), (self.lane + 32 * u) * QUAD]
                            ),
                        )
            for p in T.unroll(FAN):
                weight: T.float32 = T.tvm_warp_shuffle(T.uint32(ALL_LANES), self.weight[0], share + p, 32, 32)
                for i in T.unroll(QUAD * self.units):
                    self.values[i] = self.values[i] + parts[p * QUAD * self.units + i] * weight
            share = share + FAN

    @T.inline
    def store(self):
        call = T.meta_var(self.call)
        head: T.int32 = T.truncdiv(self.row, call.length)
        query: T.int32 = self.row - head * call.length
        batch: T.int32 = T.truncdiv(head, call.query_heads)
        head = head - batch * call.query_heads
        # A query without keys; one that is NaN, or sees NaN, has a sum of NaN.
        is_keyless: T.bool = self.total[0] == T.float32(0)
        factor: T.float32 = T.Select(is_keyless, T.float32(0), T.float32(1) / self.total[0])
        if self.lane == 0:
            call.lse[batch, head, query] = T.Select(is_keyless, T.float32(-INF), self.lse[0])
        for u in T.unroll(self.units):
            column: T.int32 = (self.lane + 32 * u) * QUAD
            if column < self.head_dim:
                to: T.int64 = call.o.row(batch, head, query) + T.cast(column, "int64")
                self.store_quad(call.o.flat.ptr_to([to]), u * QUAD, factor)

    @T.inline
    def store_quad(self, to, at, factor):
        words = T.alloc_local((QUAD,), "uint32")
        if self.blocks.is_split:
            for i in T.unroll(QUAD):
                words[i] = T.reinterpret("uint32", self.values[at + i] * factor)
            T.ptx["st.global.v4.b32"](to, words[0], words[1], words[2], words[3])
        else:
            for i in T.unroll(2):
                T.ptx[self.blocks.pack](
                    words[i], self.values[at + 2 * i + 1] * factor, self.values[at + 2 * i] * factor
                )
            T.ptx["st.global.v2.b32"](to, words[0], words[1])
