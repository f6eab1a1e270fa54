"""The portable forward with split keys: what a thread block does with its share of a tile's chunks, and how
shares with huge scores are weighed.

`split.py` says why it is made so. Everything but that is `ForwardTile`'s and `ShareMerge`'s.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.numbers import ALL_LANES, LN2, LOG2E, LOWEST
from spattn_tvm.domains.share_merge import ShareMerge, share_row
from spattn_tvm.domains.tiles import share_of, tile_slots
from spattn_tvm.domains.variables import scalar

from .blocks import BATCH, BLOCK, DOC_END, HEAD, LEAST_SCALE, ROW0, Blocks, row_pitch
from .forward_tile import ForwardTile


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
        """The chunks ``[first_chunk, chunks)`` of the tile's; none where shares are fewer than blocks."""
        self.split = scalar("int32", split)
        total = scalar("int32", self.chunks)
        first, after = share_of(total, self.split, self.call.splits, self.least_chunks)
        self.first_chunk = first
        T.buffer_store(self.chunks.source, after, [0])

    @T.inline
    def keep_to_share(self):
        """The share may begin and end within the band, or lie before or behind it."""
        before: T.int32 = T.Select(self.band == 0, 0, self.near_chunks)
        self.index = T.max(self.first_chunk - before, 0)
        self.count = T.min(self.count, self.chunks - before)

    def row_of(self, row: Any) -> Any:
        """Which of all shares' rows (int64) holds this share of a query."""
        call, tile = self.call, self.tile
        of_call = (call.batches, call.query_heads, call.length)
        return share_row(self.split, tile[BATCH], tile[HEAD], row, *of_call)

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


class Merge(ShareMerge):
    """The kernel that puts the shares of each row together; `run` is all of it.

    Parameters
    ----------
    head_dim, dtype
        As `SplitTile`'s.
    call : namespace
        Likewise.
    """

    def __init__(self, head_dim: int, dtype: str, call: SimpleNamespace) -> None:
        blocks = Blocks(dtype, row_pitch(head_dim, dtype))
        super().__init__(head_dim, None if blocks.is_split else blocks.pack, call)

    def prepare(self) -> None:
        # As the blocks have it.
        factor = T.abs(self.call.scale) * T.float32(LOG2E)
        self.scale2 = scalar("float32", T.max(factor, T.float32(LEAST_SCALE)))

    def address(self, column: Any) -> Any:
        o = self.call.o
        to = scalar("int64", o.row(self.batch, self.head, self.query) + T.cast(column, "int64"))
        return o.flat.ptr_to([to])

    @T.inline
    def weigh(self):
        """Where one share's scores were huge, weights are made of scores before they are scaled, as its own
        were.
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
            self.weigh_by_references()
        self.add_sums(has_keys)
        top: T.float32 = T.if_then_else(
            any_huge, self.top[0] * (self.scale2 * T.float32(LN2)), self.top[0] * T.float32(LN2)
        )
        self.lse[0] = top + T.log2(self.total[0]) * T.float32(LN2)
