"""The dQ pass of the Hopper backward: tiles of queries, chunks of keys.

A warpgroup keeps the fragments of its 64 rows of Q and dO in registers. It also computes the statistics of
its queries, which the dK/dV pass reads.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from tvm.script import tirx as T

from spattn_tvm.domains.numbers import ALL_LANES, INF, LOG2E
from spattn_tvm.domains.row_store import store_row

from .backward_producers import LANES, Plan, draw_tiles, init_barriers, init_rings, walk_chunks
from .backward_sizes import BARRIER_BYTES, SWIZZLE_ROW_BYTES, TILE_COUNTS_AT, dq_arena
from .parts import (
    ANY_CHUNK,
    LOAD,
    add_release,
    advance,
    arrive,
    convert,
    dot2,
    element,
    find_chunk,
    find_next,
    here,
    hold,
    issue_left_registers,
    issue_sum,
    load_fragment,
    load_shared,
    mask_keys,
    pass_rest,
    peek,
    pin,
    settle_statistics,
    wgmma,
)
from .support import WARPGROUP_ROWS

REPORTING_WARP = 2
LINE_ROWS = 32  # of float32, in a line of the L2 cache


def query_pass(decisions: Mapping[str, int], head_dim: int, dtype: str) -> SimpleNamespace:
    """What the roles of the pass do, inline functions of shared memory and the tensors."""
    D = head_dim
    STEPS = D // 16  # of 16 columns
    KEYS = decisions["dq_keys"]
    STAGES = decisions["dq_stages"]
    WARPGROUPS = decisions["dq_warpgroups"]
    ROWS = WARPGROUP_ROWS * WARPGROUPS
    OFFSETS, BYTES = dq_arena(decisions, D)
    SCORE, OUTPUT, CONVERT = wgmma(KEYS, dtype), wgmma(D, dtype), convert(dtype)
    PLAN = Plan(
        of_keys=False,
        rows=ROWS,
        chunk_rows=KEYS,
        warpgroups=WARPGROUPS,
        stages=STAGES,
        buffers=1,
        together=decisions["dq_heads"],
        kept=("q", "do", "o"),
        streamed=("k", "v"),
        head_dim=D,
        tile_others=LANES,
    )

    @T.inline
    def produce(at, warp, lane, t, maps):
        @T.inline
        def load_tile(slab, barrier, first, b, h):
            T.ptx[LOAD](at("q"), T.address_of(maps.q), 0, first, 0, h, b, barrier)
            T.ptx[LOAD](at("do"), T.address_of(maps.do), 0, first, 0, h, b, barrier)
            T.ptx[LOAD](at("o"), T.address_of(maps.o), 0, first, 0, h, b, barrier)

        # What consumers load themselves, long before they do: at head dim 64 1%, at 128 half a percent lost.
        @T.inline
        def foresee(first, b, h):
            if D == 64:
                prefetch_rows(first, b, h)

        @T.inline
        def prefetch_rows(first, b, h):
            query: T.int32 = T.min(first + lane * LINE_ROWS, t.queries - 1)
            if lane < ROWS // LINE_ROWS:
                T.ptx["prefetch.global.L2"](T.address_of(t.lse[b, h, query]))
                T.ptx["prefetch.global.L2"](T.address_of(t.dlse[b, h, query]))

        @T.inline
        def load_chunk(stage, barrier, row, b, kv_head):
            T.ptx[LOAD](
                at("k", stage, PLAN.chunk_bytes), T.address_of(maps.k), 0, row, 0, kv_head, b, barrier
            )
            T.ptx[LOAD](
                at("v", stage, PLAN.chunk_bytes), T.address_of(maps.v), 0, row, 0, kv_head, b, barrier
            )

        if warp == 1:
            draw_tiles(
                PLAN, at, lane, t.next_tile[0], t, t.batches, t.query_heads, 1, foresee,
                lambda b, h: None, load_tile,
            )  # fmt: skip
        if warp == 0:
            walk_chunks(PLAN, at, lane, t, 1, lambda h: T.truncdiv(h, t.group), load_chunk)
        if warp == REPORTING_WARP:
            report_tiles(PLAN, at, lane, t)

    @T.inline
    def consume(at, warp, lane, t, scale):
        w: T.int32 = warp // 4 - 1
        strip: T.int32 = w * WARPGROUP_ROWS + warp % 4 * 16  # this warp's rows of the tile
        my_row: T.int32 = strip + lane // 4
        frag_row: T.uint32 = T.Cast("uint32", (strip + lane % 16) * SWIZZLE_ROW_BYTES)
        frag_column: T.uint32 = T.Cast("uint32", lane // 16)
        frag_swizzle: T.uint32 = T.Cast("uint32", lane % 8)
        qf = T.alloc_local((4 * STEPS,), "uint32")
        gf = T.alloc_local((4 * STEPS,), "uint32")
        s_acc = T.alloc_local((KEYS // 2,), "float32")
        p_acc = T.alloc_local((KEYS // 2,), "float32")
        acc = T.alloc_local((D // 2,), "float32")
        ds = T.alloc_local((KEYS // 4,), "uint32")
        chunk = T.alloc_local((4,), "int32")
        tile = T.alloc_local((4,), "int32")
        steps = T.alloc_local((2,), "int32")
        lse2 = T.alloc_local((2,), "float32")
        delta = T.alloc_local((2,), "float32")
        dl = T.alloc_local((2,), "float32")
        stage: T.int32 = 0
        phase: T.int32 = 0
        tile_phase: T.int32 = 0
        prev: T.int32 = 0
        left: T.int32 = 0
        found: T.int32 = 0
        takers: T.int32 = 0
        todo: T.int32 = 0
        fresh: T.int32 = 0
        b: T.int32 = 0
        h: T.int32 = 0
        running: T.int32 = 1
        scale2: T.float32 = scale * T.float32(LOG2E)

        @T.inline
        def begin_tile():
            b = T.truncdiv(tile[3], t.query_heads)
            h = tile[3] - b * t.query_heads
            for step in T.unroll(STEPS):
                load_fragment(qf, 4 * step, at("q"), ROWS, step, frag_row, frag_column, frag_swizzle)
                load_fragment(gf, 4 * step, at("do"), ROWS, step, frag_row, frag_column, frag_swizzle)
            for i in T.unroll(D // 2):
                acc[i] = T.float32(0)
            fresh = 1

        # lse in base 2 and delta = rowsum(dO * O) - dlse, kept here and written for the dK/dV pass.
        @T.inline
        def compute_statistics():
            for j in T.unroll(2):
                query: T.int32 = tile[0] + my_row + 8 * j
                lse2[j] = -T.float32(INF)
                dl[j] = T.float32(0)
                if query < tile[2]:
                    lse2[j] = t.lse[b, h, query]
                    dl[j] = t.dlse[b, h, query]
                delta[j] = T.float32(0)
            for step in T.unroll(STEPS):
                load_fragment(ds, 0, at("o"), ROWS, step, frag_row, frag_column, frag_swizzle)
                for i in T.unroll(4):
                    delta[i % 2] = dot2(ds[i], gf[4 * step + i], delta[i % 2], dtype)
            T.cuda.warp_sync()
            arrive(at("tile_empty"))
            for j in T.unroll(2):
                query: T.int32 = tile[0] + my_row + 8 * j
                delta[j] = delta[j] + T.tvm_warp_shuffle_xor(ALL_LANES, delta[j], 1, 32, 32)
                delta[j] = delta[j] + T.tvm_warp_shuffle_xor(ALL_LANES, delta[j], 2, 32, 32) - dl[j]
                settle_statistics(lse2, delta, j)
                if query < tile[2]:
                    if lane % 4 == 0:
                        t.stats[b, h, query // 2, query % 2] = lse2[j]
                        t.stats[b, h, query // 2, query % 2 + 2] = delta[j]

        # The previous chunk's dQ product runs under this chunk's exponentials, and so does the look at the
        # next one.
        @T.inline
        def step(follows):
            issue_left_registers(
                SCORE, s_acc, KEYS // 2, D, qf, at("k", stage, PLAN.chunk_bytes), KEYS
            )  # fmt: skip
            if follows:
                issue_sum(OUTPUT, acc, D // 2, ds, at("k", prev, PLAN.chunk_bytes), KEYS)
            issue_left_registers(SCORE, p_acc, KEYS // 2, D, gf, at("v", stage, PLAN.chunk_bytes), KEYS)
            if not follows:
                if fresh == 1:
                    compute_statistics()
                    fresh = 0
            T.ptx.wgmma.wait_group.sync.aligned(2 if follows else 1)
            hold(s_acc, KEYS // 2)
            mask_keys(s_acc, KEYS, lane, chunk, tile, w * WARPGROUP_ROWS, my_row)
            peek(at, stage, phase, STAGES, takers)
            for n in T.unroll(KEYS // 8):
                for j in T.unroll(4):
                    T.ptx["ex2.approx.ftz.f32"](s_acc[4 * n + j], s_acc[4 * n + j] * scale2 - lse2[j // 2])
            pin(s_acc[KEYS // 2 - 1])
            T.ptx.wgmma.wait_group.sync.aligned(0)
            hold(p_acc, KEYS // 2)
            if follows:
                arrive(at("empty", prev, BARRIER_BYTES))
            for n in T.unroll(KEYS // 8):
                for j in T.unroll(2):
                    T.ptx[CONVERT](
                        ds[2 * n + j],
                        s_acc[4 * n + 2 * j + 1] * (p_acc[4 * n + 2 * j + 1] - delta[j]),
                        s_acc[4 * n + 2 * j] * (p_acc[4 * n + 2 * j] - delta[j]),
                    )
            prev = stage
            advance(stage, phase, STAGES)

        @T.inline
        def look_ahead():
            found = 0
            if todo > 0:
                find_next(at, w, stage, phase, STAGES, left, found, chunk, takers)

        # The loop is rotated so that no product is in flight across its back edge: ptxas serializes every
        # wgmma otherwise (C7514).
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
                issue_sum(OUTPUT, acc, D // 2, ds, at("k", prev, PLAN.chunk_bytes), KEYS)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                hold(acc, D // 2)
                arrive(at("empty", prev, BARRIER_BYTES))

        @T.inline
        def store_tile():
            for j in T.unroll(2):
                row: T.int32 = tile[0] + my_row + 8 * j
                row_at: T.uint64 = element(t.dq, b, h, row, 0)
                # A query without keys has the gradient 0, also if dO is NaN there.
                has_keys: T.bool = lse2[j] != T.float32(INF)
                store_row(
                    lambda n, e: T.Select(has_keys, acc[4 * n + 2 * j + e] * scale, T.float32(0)), D,
                    lambda column: row_at + T.Cast("uint64", 2 * column), lambda column: row < tile[2],
                    CONVERT, lane,
                )  # fmt: skip

        while running == 1:
            T.cuda.mbarrier_wait(at("tile_full"), tile_phase)
            tile_phase = tile_phase ^ 1
            T.ptx["ld.shared.v4.s32"](tile[0], tile[1], tile[2], tile[3], at("tile"))
            T.ptx["ld.shared.s32"](steps[0], at("tile", w, 4) + T.uint32(TILE_COUNTS_AT))
            T.ptx["ld.shared.s32"](steps[1], at("tile") + T.uint32(TILE_COUNTS_AT + 4 * WARPGROUPS))
            todo = steps[0]
            left = steps[1]
            if tile[0] < 0:
                running = 0
            else:
                begin_tile()
                if todo == 0:
                    compute_statistics()
                run_chunks()
                pass_rest(at, stage, phase, STAGES, left)
                arrive(at("told", tile_phase ^ 1, BARRIER_BYTES))
                store_tile()

    @T.inline
    def start(at):
        init_barriers(at("told"), 2, 128 * WARPGROUPS)
        init_rings(PLAN, at)

    return SimpleNamespace(start=start, produce=produce, consume=consume, offsets=OFFSETS, bytes=BYTES)


@T.inline
def report_tiles(plan, at, lane, t):
    # Counts the queries of each key head whose statistics are stored. The consumers may be a tile ahead.
    taken: T.int32 = 0
    row: T.int32 = 0
    head: T.int32 = 0
    count: T.int32 = 0
    reporting: T.int32 = 1
    while reporting == 1:
        T.cuda.mbarrier_wait(at("tile_full"), taken % 2)
        row = load_shared(at("tile"))
        if row < 0:
            reporting = 0
        else:
            count = T.min(load_shared(at("tile") + T.uint32(8)) - row, plan.rows)
            head = load_shared(at("tile") + T.uint32(12))
            arrive(at("tile_empty"))
            T.cuda.mbarrier_wait(at("told", taken % 2, BARRIER_BYTES), taken // 2 % 2)
            if lane == 0:
                # Ordinary stores; copies read them through the asynchronous proxy.
                T.ptx.fence.proxy.async_()
                add_release(t.progress, T.truncdiv(head, here(t.group)), count)
            taken = taken + 1
