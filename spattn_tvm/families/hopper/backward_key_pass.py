"""The dK/dV pass of the Hopper backward: tiles of keys, chunks of queries.

Scores are transposed here (keys in rows), so that P and dS leave the accumulators in the layout that the
products with dO and Q take from registers.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from tvm.script import tirx as T

from spattn_tvm.domains.numbers import LOG2E
from spattn_tvm.domains.row_store import store_row

from .backward_producers import Plan, draw_tiles, init_rings, walk_chunks
from .backward_sizes import (
    BARRIER_BYTES,
    SWIZZLE_ROW_BYTES,
    TILE_COUNTS_AT,
    TILE_INFO_BYTES,
    dkv_arena,
    holds_keys,
)
from .parts import (
    ANY_CHUNK,
    LOAD,
    LOAD_STATS,
    advance,
    arrive,
    convert,
    element,
    find_chunk,
    find_next,
    here,
    hold,
    issue_left_registers,
    issue_left_shared,
    issue_sum,
    load_fragment,
    mask_queries,
    pass_rest,
    peek,
    rows_map,
    statistics_map,
    wait_count,
    wgmma,
)
from .support import WARPGROUP_ROWS

CLEARING_WARP = 3


def key_plan(
    decisions: Mapping[str, int], head_dim: int, queries: int, buffers: int, **differences: int | bool
) -> Plan:
    """What the producers of a pass over tiles of keys, with chunks of ``queries``, have to know."""
    return Plan(
        of_keys=True,
        rows=WARPGROUP_ROWS * decisions["dkv_warpgroups"],
        chunk_rows=queries,
        warpgroups=decisions["dkv_warpgroups"],
        stages=decisions["dkv_stages"],
        buffers=buffers,
        together=decisions["dkv_heads"],
        kept=("k", "v"),
        streamed=("q", "do"),
        head_dim=head_dim,
        **differences,
    )


def key_pass_maps(t: SimpleNamespace, key_rows: int, queries: int) -> SimpleNamespace:
    """TMA maps of a pass over tiles of ``key_rows`` keys, with chunks of ``queries``."""
    return SimpleNamespace(
        k=rows_map(t.k, key_rows),
        v=rows_map(t.v, key_rows),
        q=rows_map(t.q, queries),
        do=rows_map(t.do, queries),
        stats=statistics_map(t.stats, queries),
    )


@T.inline
def clear_missing_keys(t, head_dim, block, workers, lane):
    # No tile holds the keys that don't exist, before or behind those of a batch row: their dk and dv.
    units = T.meta_var(head_dim // 8)  # of 16 bytes, in a row
    step: T.int32 = workers * (32 // units)
    pairs: T.int32 = T.if_then_else(t.ranges > 0, t.batches * t.kv_heads, 0)
    pair: T.int32 = 0
    while pair < pairs:
        b: T.int32 = T.truncdiv(pair, t.kv_heads)
        h: T.int32 = pair - b * t.kv_heads
        begin: T.int32 = t.key_ranges[T.min(b, t.ranges - 1), 0]
        count: T.int32 = T.max(t.key_ranges[T.min(b, t.ranges - 1), 1] - begin, 0)
        missing: T.int32 = block * (32 // units) + lane // units
        while missing < t.keys - count:
            row: T.int32 = T.if_then_else(missing < begin, missing, missing + count)
            column: T.int32 = lane % units * 8
            T.ptx["st.global.v4.s32"](element(t.dk, b, h, row, column), 0, 0, 0, 0)
            T.ptx["st.global.v4.s32"](element(t.dv, b, h, row, column), 0, 0, 0, 0)
            missing = missing + step
        pair = pair + 1


@T.inline
def produce_for_keys(plan, at, warp, lane, t, maps, block, workers, await_head):
    # The loading warps of a pass over tiles of keys; the first ones have the most queries. What is streamed
    # for a tile's head is there when `await_head(b, h)` returns.
    @T.inline
    def load_tile(slab, barrier, first, b, h):
        T.ptx[LOAD](at("k", slab, plan.tile_bytes), T.address_of(maps.k), 0, first, 0, h, b, barrier)
        T.ptx[LOAD](at("v", slab, plan.tile_bytes), T.address_of(maps.v), 0, first, 0, h, b, barrier)

    @T.inline
    def load_chunk(stage, barrier, row, b, head):
        T.ptx[LOAD](at("q", stage, plan.chunk_bytes), T.address_of(maps.q), 0, row, 0, head, b, barrier)
        T.ptx[LOAD_STATS](
            at("stats", stage, plan.chunk_rows * 8), T.address_of(maps.stats),
            2 * row, b * t.query_heads + head, barrier,
        )  # fmt: skip
        T.ptx[LOAD](at("do", stage, plan.chunk_bytes), T.address_of(maps.do), 0, row, 0, head, b, barrier)

    @T.inline
    def draw():
        if warp == 1:
            draw_tiles(
                plan, at, lane, t.next_tile[1], t, t.batches, t.kv_heads, t.group,
                lambda first, b, h: None, await_head, load_tile,
            )  # fmt: skip

    @T.inline
    def walk():
        if warp == 0:
            walk_chunks(plan, at, lane, t, t.group, lambda h: h * t.group, load_chunk)

    # A wait of one lane in a branch costs those behind it their uniform registers: with one it comes last.
    if plan.shared:
        draw()
        walk()
    else:
        walk()
        draw()
    if warp == CLEARING_WARP:
        clear_missing_keys(t, plan.head_dim, block, workers, lane)


@T.inline
def store_gradients(t, tile, my_row, head_dim, k_acc, v_acc, scale, convert_instruction, lane):
    b: T.int32 = T.truncdiv(tile[3], t.kv_heads)
    h: T.int32 = tile[3] - b * t.kv_heads
    for j in T.unroll(2):
        row: T.int32 = tile[0] + my_row + 8 * j
        v_at: T.uint64 = element(t.dv, b, h, row, 0)
        k_at: T.uint64 = element(t.dk, b, h, row, 0)
        store_row(
            lambda n, e: v_acc[4 * n + 2 * j + e], head_dim,
            lambda column: v_at + T.Cast("uint64", 2 * column), lambda column: row < tile[2],
            convert_instruction, lane,
        )  # fmt: skip
        store_row(
            lambda n, e: k_acc[4 * n + 2 * j + e] * scale, head_dim,
            lambda column: k_at + T.Cast("uint64", 2 * column), lambda column: row < tile[2],
            convert_instruction, lane,
        )  # fmt: skip


def key_pass(decisions: Mapping[str, int], head_dim: int, dtype: str) -> SimpleNamespace:
    """What the roles of the pass do, inline functions of shared memory and the tensors."""
    D = head_dim
    QUERIES = decisions["dkv_queries"]
    STAGES = decisions["dkv_stages"]
    BUFFERS = decisions["dkv_buffers"]
    WARPGROUPS = decisions["dkv_warpgroups"]
    OFFSETS, BYTES = dkv_arena(decisions, D)
    SCORE, OUTPUT, CONVERT = wgmma(QUERIES, dtype), wgmma(D, dtype), convert(dtype)
    HOLDS = holds_keys(D)
    PLAN = key_plan(decisions, D, QUERIES, BUFFERS, late=True)

    @T.inline
    def consume(at, warp, lane, t, scale):
        w: T.int32 = warp // 4 - 1
        strip: T.int32 = w * WARPGROUP_ROWS + warp % 4 * 16  # this warp's rows of the tile
        my_row: T.int32 = strip + lane // 4
        frag_row: T.uint32 = T.Cast("uint32", (strip + lane % 16) * SWIZZLE_ROW_BYTES)
        frag_column: T.uint32 = T.Cast("uint32", lane // 16)
        frag_swizzle: T.uint32 = T.Cast("uint32", lane % 8)
        stats_lane: T.uint32 = T.Cast("uint32", lane % 4 * 16)
        kf = T.alloc_local((D // 4,), "uint32")
        vf = T.alloc_local((D // 4,), "uint32")
        s_acc = T.alloc_local((QUERIES // 2,), "float32")
        p_acc = T.alloc_local((QUERIES // 2,), "float32")
        k_acc = T.alloc_local((D // 2,), "float32")
        v_acc = T.alloc_local((D // 2,), "float32")
        ps = T.alloc_local((QUERIES // 4,), "uint32")
        ds = T.alloc_local((QUERIES // 4,), "uint32")
        chunk = T.alloc_local((4,), "int32")
        tile = T.alloc_local((4,), "int32")
        steps = T.alloc_local((2,), "int32")
        stat = T.alloc_local((QUERIES // 4,), "float32")
        stage: T.int32 = 0
        phase: T.int32 = 0
        slab: T.int32 = 0
        tile_phase: T.int32 = 0
        prev: T.int32 = 0
        left: T.int32 = 0
        found: T.int32 = 0
        takers: T.int32 = 0
        todo: T.int32 = 0
        running: T.int32 = 1
        scale2: T.float32 = scale * T.float32(LOG2E)

        # scores^T = K Q^T or dP^T = V dO^T of this warpgroup's keys.
        @T.inline
        def issue_product(out, kept, fragments, streamed):
            right: T.uint32 = at(streamed, stage, PLAN.chunk_bytes)
            if HOLDS:
                issue_left_registers(SCORE, out, QUERIES // 2, D, fragments, right, QUERIES)
            else:
                own: T.uint32 = at(kept, slab, PLAN.tile_bytes) + T.Cast(
                    "uint32", w * (WARPGROUP_ROWS * SWIZZLE_ROW_BYTES)
                )
                issue_left_shared(SCORE, out, QUERIES // 2, D, own, PLAN.rows, right, QUERIES, False)

        @T.inline
        def hold_keys():
            k_at: T.uint32 = at("k", slab, PLAN.tile_bytes)
            v_at: T.uint32 = at("v", slab, PLAN.tile_bytes)
            for step in T.unroll(D // 16):
                load_fragment(kf, 4 * step, k_at, PLAN.rows, step, frag_row, frag_column, frag_swizzle)
                load_fragment(vf, 4 * step, v_at, PLAN.rows, step, frag_row, frag_column, frag_swizzle)

        # Of a chunk's queries: lse at 0, delta at 8.
        @T.inline
        def load_statistics(offset):
            for n in T.unroll(QUERIES // 8):
                T.ptx["ld.shared.v2.f32"](
                    stat[2 * n], stat[2 * n + 1],
                    at("stats", stage, QUERIES * 8) + stats_lane + T.uint32(64 * n + offset),
                )  # fmt: skip

        @T.inline
        def release_tile():
            T.cuda.warp_sync()
            arrive(at("tile_empty", slab, BARRIER_BYTES))

        # dP runs under the exponentials, as does the look at the next chunk, dV under dS, and the dK of one
        # chunk before the scores of the next.
        @T.inline
        def step(follows):
            if follows:
                issue_sum(OUTPUT, k_acc, D // 2, ds, at("q", prev, PLAN.chunk_bytes), QUERIES)
            issue_product(s_acc, "k", kf, "q")
            if follows:
                T.ptx.wgmma.wait_group.sync.aligned(1)
                arrive(at("empty", prev, BARRIER_BYTES))
            issue_product(p_acc, "v", vf, "do")
            load_statistics(0)
            T.ptx.wgmma.wait_group.sync.aligned(1)
            hold(s_acc, QUERIES // 2)
            mask_queries(s_acc, QUERIES, lane, chunk, tile, w * WARPGROUP_ROWS, my_row)
            peek(at, stage, phase, STAGES, takers)
            for n in T.unroll(QUERIES // 8):
                for j in T.unroll(4):
                    T.ptx["ex2.approx.ftz.f32"](
                        s_acc[4 * n + j], s_acc[4 * n + j] * scale2 - stat[2 * n + j % 2]
                    )
                for j in T.unroll(2):
                    T.ptx[CONVERT](ps[2 * n + j], s_acc[4 * n + 2 * j + 1], s_acc[4 * n + 2 * j])
            issue_sum(OUTPUT, v_acc, D // 2, ps, at("do", stage, PLAN.chunk_bytes), QUERIES)
            load_statistics(8)
            T.ptx.wgmma.wait_group.sync.aligned(1)
            hold(p_acc, QUERIES // 2)
            if not HOLDS:
                if todo == 1:
                    # K and V are read: the next tile's may load under what is left of this one.
                    release_tile()
            for n in T.unroll(QUERIES // 8):
                for j in T.unroll(2):
                    T.ptx[CONVERT](
                        ds[2 * n + j],
                        s_acc[4 * n + 2 * j + 1] * (p_acc[4 * n + 2 * j + 1] - stat[2 * n + 1]),
                        s_acc[4 * n + 2 * j] * (p_acc[4 * n + 2 * j] - stat[2 * n]),
                    )
            T.ptx.wgmma.wait_group.sync.aligned(0)
            prev = stage
            advance(stage, phase, STAGES)

        @T.inline
        def look_ahead():
            found = 0
            if todo > 0:
                find_next(at, w, stage, phase, STAGES, left, found, chunk, takers)

        @T.inline
        def run_chunks():
            while todo > 0:
                find_chunk(at, w, stage, phase, STAGES, left, found, chunk, ANY_CHUNK)
                step(False)
                todo = todo - 1
                look_ahead()
                while found == 1:
                    step(True)
                    todo = todo - 1
                    look_ahead()
                issue_sum(OUTPUT, k_acc, D // 2, ds, at("q", prev, PLAN.chunk_bytes), QUERIES)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                hold(k_acc, D // 2)
                hold(v_acc, D // 2)
                arrive(at("empty", prev, BARRIER_BYTES))

        while running == 1:
            T.cuda.mbarrier_wait(at("tile_full", slab, BARRIER_BYTES), tile_phase)
            words: T.uint32 = at("tile", slab, TILE_INFO_BYTES)
            T.ptx["ld.shared.v4.s32"](tile[0], tile[1], tile[2], tile[3], words)
            T.ptx["ld.shared.s32"](steps[0], words + T.uint32(TILE_COUNTS_AT) + T.Cast("uint32", w * 4))
            T.ptx["ld.shared.s32"](steps[1], words + T.uint32(TILE_COUNTS_AT + 4 * WARPGROUPS))
            todo = steps[0]
            left = steps[1]
            if tile[0] < 0:
                running = 0
            else:
                for i in T.unroll(D // 2):
                    k_acc[i] = T.float32(0)
                    v_acc[i] = T.float32(0)
                if HOLDS:
                    hold_keys()
                    release_tile()
                elif todo == 0:
                    release_tile()
                run_chunks()
                pass_rest(at, stage, phase, STAGES, left)
                store_gradients(t, tile, my_row, D, k_acc, v_acc, scale, CONVERT, lane)
                advance(slab, tile_phase, BUFFERS)

    @T.inline
    def start(at):
        init_rings(PLAN, at)

    # The statistics of a tile's queries, which other CTAs may still be computing.
    @T.inline
    def produce(at, warp, lane, t, maps, block, workers):
        @T.inline
        def await_statistics(b, h):
            if lane == 0:
                wait_count(t.progress, b * t.kv_heads + h, here(t.group) * t.queries)
                T.ptx.fence.proxy.async_()
            T.cuda.warp_sync()

        produce_for_keys(PLAN, at, warp, lane, t, maps, block, workers, await_statistics)

    return SimpleNamespace(start=start, produce=produce, consume=consume, offsets=OFFSETS, bytes=BYTES)
