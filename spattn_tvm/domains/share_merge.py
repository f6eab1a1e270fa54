"""The second kernel of a forward whose keys are split over blocks: the shares of each row, put together.

A tile's chunks are shared out among blocks (`tiles.share_of`). Each leaves of every row, at `share_row`,
float32 outputs that are not yet divided, and four numbers: the exponent, in base 2, that its weights are
relative to; their sum, 0 where the share has no key of the row, and then nobody looks at the rest; two of the
family's own.
"""

# mypy: ignore-errors
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from .numbers import ALL_LANES, INF, LOWEST
from .variables import scalar

QUAD = 4  # columns that a lane puts together at once
FAN = 8  # shares of a row whose outputs are on their way at once
MERGE_WARPS = 4


def share_row(share: Any, batch: Any, head: Any, query: Any, batches: Any, heads: Any, queries: Any) -> Any:
    """Which of all shares' rows (int64) holds this share of a query."""
    pairs = T.cast(share * batches + batch, "int64") * T.cast(heads, "int64") + T.cast(head, "int64")
    return pairs * T.cast(queries, "int64") + T.cast(query, "int64")


class ShareMerge:
    """A warp for a row, always in the same order; `run` is all of the kernel.

    A family says where a row of o lies, how shares are weighed, and what is left to do to a row.

    Parameters
    ----------
    head_dim : int
        A multiple of 16.
    pack : str or None
        The instruction ``(to, upper, lower)`` that makes two float32 one word of o; None where o is float32.
    call : namespace
        float32 buffers partial_o (P, head_dim), partial_sums (P, 4) and lse (B, Hq, N); int32 batches,
        query_heads, length and splits (shares of a tile, 32 at most).
    """

    def __init__(self, head_dim: int, pack: str | None, call: SimpleNamespace) -> None:
        self.call, self.head_dim, self.pack = call, head_dim, pack
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
            self.finish()

    def prepare(self) -> None:
        """What the family needs of the call in every row."""

    def address(self, column: Any) -> Any:
        """A pointer to, or the global address of, a column of the row of o."""
        raise NotImplementedError

    def weigh(self) -> None:
        """Each share's weight, the sum of all, and lse."""
        raise NotImplementedError

    def finish(self) -> None:
        """What the family has to do once a row is stored."""

    def enter(self, row: Any, lane: Any) -> None:
        self.row, self.lane = scalar("int32", row), lane
        self.prepare()
        # Of the lane's share, and its weight.
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
    def weigh_by_references(self):
        self.find_top(self.sums[0])
        self.weight[0] = T.exp2(self.sums[0] - self.top[0])

    @T.inline
    def add_sums(self, has_keys):
        if T.Not(has_keys):
            self.weight[0] = T.float32(0)
        self.total[0] = T.Select(has_keys, self.weight[0] * self.sums[1], T.float32(0))
        for i in T.unroll(5):
            self.total[0] = self.total[0] + T.tvm_warp_shuffle_xor(
                T.uint32(ALL_LANES), self.total[0], 1 << i, 32, 32
            )

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

    def locate(self) -> None:
        """The row's batch row, head and query."""
        pair = scalar("int32", T.truncdiv(self.row, self.call.length))
        self.query = scalar("int32", self.row - pair * self.call.length)
        self.batch = scalar("int32", T.truncdiv(pair, self.call.query_heads))
        self.head = scalar("int32", pair - self.batch * self.call.query_heads)

    @T.inline
    def store(self):
        self.locate()
        # A query without keys; one that is NaN, or sees NaN, has a sum of NaN.
        is_keyless: T.bool = self.total[0] == T.float32(0)
        factor: T.float32 = T.Select(is_keyless, T.float32(0), T.float32(1) / self.total[0])
        if self.lane == 0:
            self.call.lse[self.batch, self.head, self.query] = T.Select(
                is_keyless, T.float32(-INF), self.lse[0]
            )
        for u in T.unroll(self.units):
            column: T.int32 = (self.lane + 32 * u) * QUAD
            if column < self.head_dim:
                to = T.meta_var(self.address(column))
                self.store_quad(to, u * QUAD, factor)

    @T.inline
    def store_quad(self, to, at, factor):
        words = T.alloc_local((QUAD,), "uint32")
        if self.pack is None:
            for i in T.unroll(QUAD):
                words[i] = T.reinterpret("uint32", self.values[at + i] * factor)
            T.ptx["st.global.v4.b32"](to, words[0], words[1], words[2], words[3])
        else:
            for i in T.unroll(2):
                T.ptx[self.pack](
                    words[i], self.values[at + 2 * i + 1] * factor, self.values[at + 2 * i] * factor
                )
            T.ptx["st.global.v2.b32"](to, words[0], words[1])
