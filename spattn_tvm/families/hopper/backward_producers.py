"""The two loading warps of a pass of the Hopper backward: one draws tiles, the other walks their bands.

The *tile warp* draws tiles from a counter, hands them to the chunk warp through a queue, and loads what stays
for the whole tile. The *chunk warp* fills a ring of chunks of the other side, across tiles. What they know of
a chunk (where it starts, its band, which warpgroups need it) travels beside the data, so that the consumers
keep no scheduling state.

A copy takes whole boxes, and a box can reach beyond the rows that exist for a tile: into another document,
among keys that don't exist, or among queries without keys, for which anything may arrive. Masks keep such
rows' scores out, but their weight 0 times a NaN or an infinity is NaN: the rows are set to zero before the
consumers see them, by the warp that loads them. Only boxes at those ends have any, and none at the ends of
the tensors, where boxes are filled with zeros.

A query's position among the keys is its row and a shift of its document. Taken off a band's distances, it
leaves nothing to do to those who compare rows.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.key_range import document_keys, key_range, maximum, minimum, query_range
from spattn_tvm.domains.numbers import ALL_LANES
from spattn_tvm.domains.tiles import chunk_count, locate_head, locate_rows, table_row, tile_slots

from .backward_sizes import (
    BARRIER_BYTES,
    INFO_BYTES,
    MET_BYTES,
    QUEUE,
    QUEUE_INFO_BYTES,
    SWIZZLE_ROW_BYTES,
    TILE_COUNTS_AT,
    TILE_INFO_BYTES,
)
from .parts import advance, arrive, ballot, band_row, load_shared
from .support import PLANE, WARPGROUP_ROWS

# Every lane arrives for what it has read itself. One for its warp, after a warp synchronisation, took about 1
# % less time and left racecheck in doubt about the other lanes' reads.
LANES = 32
UNITS = SWIZZLE_ROW_BYTES // 16


@dataclass(frozen=True)
class Plan:
    """What the producers of a pass have to know of it.

    Attributes
    ----------
    of_keys : bool
        Whether tiles are of keys, chunks of queries and their statistics; otherwise it is the other way
        round.
    rows, chunk_rows : int
        Rows of a tile, and of a chunk.
    warpgroups, stages, buffers : int
        Consumers, chunks in the ring, and tiles that shared memory holds.
    together : int
        Heads whose tiles are drawn together.
    kept, streamed : tuple of str
        Regions of shared memory that hold ``head_dim`` columns of each row of a tile, and of a chunk.
    head_dim : int
    shared : bool
        Whether all warpgroups take all chunks; then a chunk is told by its row of heads instead.
    chunk_others, tile_others : int
        Threads besides the consumers' that hand chunks back, and tiles.
    late : bool
        Whether a tile is drawn when all chunks of the one before are on their way, not when that one is drawn
        too. Long tiles are shared out better so: whoever draws early holds a tile that others could begin.
    """

    of_keys: bool
    rows: int
    chunk_rows: int
    warpgroups: int
    stages: int
    buffers: int
    together: int
    kept: tuple[str, ...]
    streamed: tuple[str, ...]
    head_dim: int
    shared: bool = False
    chunk_others: int = 0
    tile_others: int = 0
    late: bool = False

    @property
    def planes(self) -> int:
        """Of 64 columns."""
        return self.head_dim // PLANE

    @property
    def tile_bytes(self) -> int:
        """Of one region of a tile."""
        return self.rows * self.head_dim * 2

    @property
    def chunk_bytes(self) -> int:
        """Of one region of a chunk."""
        return self.chunk_rows * self.head_dim * 2

    @property
    def streamed_bytes(self) -> int:
        """Of a chunk in all."""
        return len(self.streamed) * self.chunk_bytes + (8 * self.chunk_rows if self.of_keys else 0)

    def met(self, first: Any, last: Any, low: Any, high: Any, begin: Any, end: Any) -> tuple[Any, Any]:
        """The rows ``[begin, end)`` of the other side that a band gives to the rows ``first ... last``."""
        if self.of_keys:
            query_begin, query_end = query_range(first, last, low, high, end)
            return maximum(begin, query_begin), query_end
        key_begin, key_end = key_range(first, last, low, high, begin)
        return key_begin, minimum(end, key_end)

    def chunks(self, begin: Any, end: Any) -> tuple[Any, Any]:
        """The first row of the chunks that cover ``[begin, end)``, and their number.

        Chunks of keys end with them: the mask has no edge there. Chunks of queries begin with them, or one
        before: TMA traps on rows of statistics (two queries are 16 bytes) that do not start at 16 bytes.
        """
        if not self.of_keys:
            count = chunk_count(begin, end, self.chunk_rows)
            return end - count * self.chunk_rows, count
        even = begin // 2 * 2
        return even, T.if_then_else(end > begin, chunk_count(even, end, self.chunk_rows), 0)


@T.inline
def init_barriers(first, count, arrivals):
    for s in T.unroll(count):
        T.ptx.mbarrier.init.shared.b64(first + T.uint32(s * BARRIER_BYTES), T.uint32(arrivals))


@T.inline
def init_rings(plan, at):
    # A producer arrives once for what it hands over, each thread of the consumers for what it hands back.
    takers = T.meta_var(LANES * 4 * plan.warpgroups)
    init_barriers(at("full"), plan.stages, 1)
    init_barriers(at("empty"), plan.stages, takers + plan.chunk_others)
    init_barriers(at("tile_full"), plan.buffers, 1)
    init_barriers(at("tile_empty"), plan.buffers, takers + plan.tile_others)
    init_barriers(at("queue_full"), QUEUE, 1)
    init_barriers(at("queue_empty"), QUEUE, LANES)
    init_barriers(at("chunk_landed"), 1, 1)
    init_barriers(at("tile_landed"), 1, 1)
    T.ptx.fence.mbarrier_init.release.cluster()


@T.inline
def draw_tile(counter, lane, fetched):
    # The number of the next tile, in lane 0.
    T.ptx["atom.global.add.s32"](fetched[0], T.address_of(counter), T.if_then_else(lane == 0, 1, 0))


@T.inline
def offer_tile(at, offered, lane, first, begin, end, other_begin, other_end, shift, table, b, h):
    # From the tile warp to the chunk warp; `offered` counts the tiles before.
    place: T.int32 = offered % QUEUE
    T.cuda.mbarrier_wait(at("queue_empty", place, BARRIER_BYTES), offered // QUEUE % 2 ^ 1)
    if lane == 0:
        words: T.uint32 = at("queue", place, QUEUE_INFO_BYTES)
        T.ptx["st.shared.v4.s32"](words, first, begin, end, other_begin)
        T.ptx["st.shared.v4.s32"](words + T.uint32(16), other_end, shift, table, b)
        T.ptx["st.shared.s32"](words + T.uint32(32), h)
        arrive(at("queue_full", place, BARRIER_BYTES))


@T.inline
def take_tile(plan, at, place, begin, end, other_begin, other_end, shift, table, b, h):
    # The rest of what `offer_tile` wrote.
    words: T.uint32 = at("queue", place, QUEUE_INFO_BYTES)
    begin = load_shared(words + T.uint32(4))
    end = load_shared(words + T.uint32(8))
    other_begin = load_shared(words + T.uint32(12))
    other_end = load_shared(words + T.uint32(16))
    shift = load_shared(words + T.uint32(20))
    table = load_shared(words + T.uint32(24))
    b = load_shared(words + T.uint32(28))
    h = load_shared(words + T.uint32(32))
    T.cuda.warp_sync()
    if not plan.late:
        arrive(at("queue_empty", place, BARRIER_BYTES))


@T.inline
def offer_no_more(plan, at, offered, lane):
    # To the chunk warp, and to the consumers.
    offer_tile(at, offered, lane, -1, 0, 0, 0, 0, 0, 0, 0, 0)
    slab: T.int32 = offered % plan.buffers
    T.cuda.mbarrier_wait(at("tile_empty", slab, BARRIER_BYTES), offered // plan.buffers % 2 ^ 1)
    if lane == 0:
        T.ptx["st.shared.v4.s32"](at("tile", slab, TILE_INFO_BYTES), -1, 0, 0, 0)
        arrive(at("tile_full", slab, BARRIER_BYTES))


@T.inline
def find_chunks(
    plan, bands_at, band, lane, first, end, other_begin, other_end, shift, lo, hi,
    origin, chunks, own_first, own_last,
):  # fmt: skip
    # The chunks, from row `origin` on, that a tile needs of one band, and those of lane w's warpgroup among
    # them: the producers have too few registers to keep a copy for each warpgroup.
    T.ptx["ld.global.nc.v2.s32"](lo[0], hi[0], bands_at + T.Cast("uint64", band * 8))
    lo[0] = lo[0] - shift
    hi[0] = hi[0] - shift
    last: T.int32 = T.min(first + plan.rows, end) - 1
    needed_first, needed_end = T.meta_var(plan.met(first, last, lo[0], hi[0], other_begin, other_end))
    chunks_begin, chunks_count = T.meta_var(plan.chunks(needed_first, needed_end))
    origin = chunks_begin
    chunks = chunks_count
    if not plan.shared:
        own: T.int32 = first + lane * WARPGROUP_ROWS
        own_end: T.int32 = T.min(own + WARPGROUP_ROWS, end)
        own_needed_first, own_needed_end = T.meta_var(
            plan.met(own, own_end - 1, lo[0], hi[0], other_begin, other_end)
        )
        own_first = 1
        own_last = 0
        if T.And(T.And(lane < plan.warpgroups, own < own_end), own_needed_first < own_needed_end):
            own_first = (own_needed_first - origin) // plan.chunk_rows
            own_last = (own_needed_end - 1 - origin) // plan.chunk_rows


def _clear_unit(plan: Plan, starts: list[Any], plane_bytes: int, unit: Any) -> None:
    """Set 16 bytes to zero, the same of each plane of the regions that begin at ``starts``."""
    for start in starts:
        for plane in range(plan.planes):
            place = start + T.uint32(plane * plane_bytes) + T.Cast("uint32", unit * 16)
            T.evaluate(T.ptx["st.shared.v4.s32"](place, 0, 0, 0, 0))


@T.inline
def clear_rows(plan, starts, rows, first, end, lane):
    # Rows [first, end) of regions of `rows` rows. A row has units of 16 bytes in its 128 bytes of each plane.
    unit: T.int32 = first * UNITS + lane
    while unit < end * UNITS:
        _clear_unit(plan, starts, rows * SWIZZLE_ROW_BYTES, unit)
        unit = unit + LANES


@T.inline
def clear_statistics(plan, at, stage, clear_to, clear_from, lane):
    # Two queries are 16 bytes: lse of both, then delta of both. What else is 0 there, a masked score turns
    # into the weight 0; an infinity or a NaN it would not. Lane 0 stores all: its arrival releases what it
    # wrote itself. (Stored by all lanes before a warp synchronisation, they left racecheck in doubt.)
    if lane == 0:
        for pair in T.serial(plan.chunk_rows // 2):
            word: T.uint32 = at("stats", stage, plan.chunk_rows * 8) + T.Cast("uint32", pair * 16)
            for i in T.unroll(2):
                if T.Or(2 * pair + i < clear_to, 2 * pair + i >= clear_from):
                    T.ptx["st.shared.s32"](word + T.uint32(4 * i), 0)
                    T.ptx["st.shared.s32"](word + T.uint32(4 * i + 8), 0)


@T.inline
def show(barrier, lane):
    # Ordinary stores, then products that read them through the asynchronous proxy.
    T.ptx.fence.proxy.async_.shared__cta()
    T.cuda.warp_sync()
    if lane == 0:
        arrive(barrier)


@T.inline
def draw_tiles(plan, at, lane, counter, tensors, batches, heads, spread, foresee, await_head, load_tile):
    # The tile warp. A tile's head has `spread` heads of bands; what is streamed for it is there when
    # `await_head(b, h)` returns; `load_tile(slab, barrier, first, b, h)` issues the copies. About a tile
    # before that, `foresee(first, b, h)` may bring something to the L2 cache.
    fetched = T.alloc_local((1,), "int32")
    lo = T.alloc_local((1,), "int32")
    hi = T.alloc_local((1,), "int32")
    boundaries = T.meta_var(tensors.cu_seqlens_k if plan.of_keys else tensors.cu_seqlens)
    length = T.meta_var(tensors.keys if plan.of_keys else tensors.queries)
    slots: T.int32 = tile_slots(length, tensors.documents, plan.rows)
    tiles: T.int32 = slots * batches * heads
    offered: T.int32 = 0  # one count instead of places and phases: registers are few here
    landed_phase: T.int32 = 0
    slot: T.int32 = 0
    document: T.int32 = 0
    first: T.int32 = 0
    begin: T.int32 = 0
    end: T.int32 = 0
    other_begin: T.int32 = 0
    other_end: T.int32 = 0
    shift: T.int32 = 0
    b: T.int32 = 0
    h: T.int32 = 0
    origin: T.int32 = 0
    chunks: T.int32 = 0
    own_first: T.int32 = 0
    own_last: T.int32 = 0
    draw_tile(counter, lane, fetched)
    fetched[0] = T.tvm_warp_shuffle(ALL_LANES, fetched[0], 0, 32, 32)
    while fetched[0] < tiles:
        locate_head(fetched[0], slots, batches, heads, plan.together, slot, b, h)
        if not plan.of_keys:
            # Late queries have the most keys, early keys the most queries.
            slot = slots - 1 - slot
        if not plan.late:
            draw_tile(counter, lane, fetched)
        locate_rows(slot, plan.rows, boundaries, tensors.documents, document, begin, end, first)
        key_begin, key_end, offset = T.meta_var(
            document_keys(
                document, b, tensors.cu_seqlens, tensors.cu_seqlens_k, tensors.key_ranges, tensors.ranges
            )
        )
        shift = offset
        if plan.of_keys:
            # Tiles begin with the first key that exists.
            first = first - begin + key_begin
            begin = key_begin
            end = key_end
            other_begin = tensors.cu_seqlens[document]
            other_end = tensors.cu_seqlens[document + 1]
        else:
            other_begin = key_begin
            other_end = key_end
        document = table_row(document, tensors.documents, tensors.tables)
        if first < end:
            foresee(first, b, h)
            await_head(b, h)
            offer_tile(at, offered, lane, first, begin, end, other_begin, other_end, shift, document, b, h)
            bands_at: T.uint64 = band_row(tensors.bands, tensors.query_heads, document, h * spread)
            total: T.int32 = 0
            own: T.int32 = 0
            band: T.int32 = 0
            while band < 2 * spread:
                find_chunks(
                    plan, bands_at, band, lane, first, end, other_begin, other_end, shift, lo, hi,
                    origin, chunks, own_first, own_last,
                )  # fmt: skip
                total = total + chunks
                own = own + own_last - own_first + 1
                band = band + 1
            slab: T.int32 = offered % plan.buffers
            T.cuda.mbarrier_wait(at("tile_empty", slab, BARRIER_BYTES), offered // plan.buffers % 2 ^ 1)
            words: T.uint32 = at("tile", slab, TILE_INFO_BYTES)
            # Lane 0 stores all counts: its arrival releases what it wrote itself. (Stored by their own lanes
            # before a warp synchronisation, they left racecheck in doubt.)
            if not plan.shared:
                for w in T.unroll(plan.warpgroups):
                    theirs: T.int32 = T.tvm_warp_shuffle(ALL_LANES, own, w, 32, 32)
                    if lane == 0:
                        T.ptx["st.shared.s32"](words + T.uint32(TILE_COUNTS_AT + 4 * w), theirs)
            arrival: T.uint32 = at("tile_full", slab, BARRIER_BYTES)
            # Rows of the box behind the tile's own, if they matter and there are such rows.
            strangers: T.int32 = 0
            if plan.shared:
                if end < length:
                    strangers = T.max(first + plan.rows - end, 0)
                if strangers > 0:
                    arrival = at("tile_landed")
            if lane == 0:
                T.ptx["st.shared.v4.s32"](words, first, other_begin, end, b * heads + h)
                if plan.shared:
                    T.ptx["st.shared.s32"](words + T.uint32(TILE_COUNTS_AT), other_end)
                T.ptx["st.shared.s32"](words + T.uint32(TILE_COUNTS_AT + 4 * plan.warpgroups), total)
                T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                    arrival, T.uint32(len(plan.kept) * plan.tile_bytes)
                )
                load_tile(slab, arrival, first, b, h)
            if strangers > 0:
                T.cuda.mbarrier_wait(at("tile_landed"), landed_phase)
                landed_phase = landed_phase ^ 1
                kept = T.meta_var([at(region, slab, plan.tile_bytes) for region in plan.kept])
                clear_rows(plan, kept, plan.rows, plan.rows - strangers, plan.rows, lane)
                show(at("tile_full", slab, BARRIER_BYTES), lane)
            if plan.late:
                # The chunk warp has walked the tile.
                T.cuda.mbarrier_wait(at("queue_empty", offered % QUEUE, BARRIER_BYTES), offered // QUEUE % 2)
            offered = offered + 1
        if plan.late:
            draw_tile(counter, lane, fetched)
        fetched[0] = T.tvm_warp_shuffle(ALL_LANES, fetched[0], 0, 32, 32)
    offer_no_more(plan, at, offered, lane)


@T.inline
def walk_chunks(plan, at, lane, tensors, spread, streamed_head, load_chunk):
    # The chunk warp. A tile of head h streams `streamed_head(h)` and, for `spread` heads, those behind it;
    # `load_chunk(stage, barrier, row, b, head)` issues the copies.
    lo = T.alloc_local((1,), "int32")
    hi = T.alloc_local((1,), "int32")
    taken: T.int32 = 0
    stage: T.int32 = 0
    phase: T.int32 = 0
    landed_phase: T.int32 = 0
    table: T.int32 = 0
    first: T.int32 = 0
    begin: T.int32 = 0
    end: T.int32 = 0
    other_begin: T.int32 = 0
    other_end: T.int32 = 0
    shift: T.int32 = 0
    b: T.int32 = 0
    h: T.int32 = 0
    origin: T.int32 = 0
    chunks: T.int32 = 0
    own_first: T.int32 = 0
    own_last: T.int32 = 0
    walking: T.int32 = 1
    while walking == 1:
        place: T.int32 = taken % QUEUE
        T.cuda.mbarrier_wait(at("queue_full", place, BARRIER_BYTES), taken // QUEUE % 2)
        first = load_shared(at("queue", place, QUEUE_INFO_BYTES))
        if first < 0:
            walking = 0
        else:
            take_tile(plan, at, place, begin, end, other_begin, other_end, shift, table, b, h)
            taken = taken + 1
            bands_at: T.uint64 = band_row(tensors.bands, tensors.query_heads, table, h * spread)
            h = streamed_head(h)
            band: T.int32 = 0
            while band < 2 * spread:
                find_chunks(
                    plan, bands_at, band, lane, first, end, other_begin, other_end, shift, lo, hi,
                    origin, chunks, own_first, own_last,
                )  # fmt: skip
                # Keys that exist, and queries that have a key in this band.
                usable_begin, usable_end = T.meta_var(
                    plan.met(begin, end - 1, lo[0], hi[0], other_begin, other_end)
                    if plan.of_keys
                    else (other_begin, other_end)
                )
                met_begin, met_end = T.meta_var(
                    plan.met(first, T.min(end, first + plan.rows) - 1, lo[0], hi[0], other_begin, other_end)
                )
                c: T.int32 = 0
                while c < chunks:
                    row: T.int32 = origin + c * plan.chunk_rows
                    word: T.int32 = tensors.query_heads * b + h + band // 2
                    if not plan.shared:
                        word = T.Cast("int32", ballot(T.And(c >= own_first, c <= own_last)))
                    # The box's rows before those that this band may use, and behind them.
                    clear_to: T.int32 = 0
                    if usable_begin > 0:
                        clear_to = T.max(usable_begin - row, 0)
                    clear_from: T.int32 = plan.chunk_rows
                    if plan.of_keys:
                        if usable_end < tensors.queries:
                            clear_from = T.min(usable_end - row, plan.chunk_rows)
                    strange: T.bool = T.Or(clear_to > 0, clear_from < plan.chunk_rows)
                    T.cuda.mbarrier_wait(at("empty", stage, BARRIER_BYTES), phase ^ 1)
                    if lane == 0:
                        arrival: T.uint32 = T.if_then_else(
                            strange, at("chunk_landed"), at("full", stage, BARRIER_BYTES)
                        )
                        T.ptx["st.shared.v4.s32"](at("info", stage, INFO_BYTES), row, lo[0], hi[0], word)
                        if plan.shared:
                            # Of its rows, those that meet the tile.
                            T.ptx["st.shared.v2.s32"](
                                at("met", stage, MET_BYTES),
                                T.max(row, met_begin), T.min(row + plan.chunk_rows, met_end),
                            )  # fmt: skip
                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(arrival, T.uint32(plan.streamed_bytes))
                        load_chunk(stage, arrival, row, b, h + band // 2)
                    if strange:
                        T.cuda.mbarrier_wait(at("chunk_landed"), landed_phase)
                        landed_phase = landed_phase ^ 1
                        streamed = T.meta_var(
                            [at(region, stage, plan.chunk_bytes) for region in plan.streamed]
                        )
                        clear_rows(plan, streamed, plan.chunk_rows, 0, clear_to, lane)
                        clear_rows(plan, streamed, plan.chunk_rows, clear_from, plan.chunk_rows, lane)
                        if plan.of_keys:
                            clear_statistics(plan, at, stage, clear_to, clear_from, lane)
                        show(at("full", stage, BARRIER_BYTES), lane)
                    advance(stage, phase, plan.stages)
                    c = c + 1
                band = band + 1
            if plan.late:
                arrive(at("queue_empty", place, BARRIER_BYTES))
