"""The two persistent passes of the Hopper backward: dQ, then dK and dV."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from .backward_sizes import (
    BARRIER_BYTES,
    INFO_BYTES,
    SWIZZLE_ROW_BYTES,
    TILE_INFO_BYTES,
    WARPGROUP_ROWS,
    _dkv_arena,
    _dq_arena,
)


def _build_two_passes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> Any:
    import tvm
    from tvm.script import tirx as T

    from spattn_tvm.domains.tiles import table_row

    from .backward_parts import (
        K_MAJOR,
        LOAD,
        LOAD_STATS,
        address,
        advance,
        arrive,
        ballot,
        descriptor,
        dot2,
        draw_tile,
        element,
        encode_rows,
        encode_stats,
        find_chunk,
        hold,
        init_rings,
        load_shared,
        locate_head,
        locate_rows,
        offer_no_more,
        offer_tile,
        pass_rest,
        pin,
        store_rows,
        take_tile,
    )

    D = head_dim
    KS = D // 16  # k16 steps over the head dimension
    ROW = SWIZZLE_ROW_BYTES
    BF = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    LOG2E = math.log2(math.e)
    INF = float("inf")
    ANY = 1 << 30

    # dQ pass
    Q_W = decisions["dq_warpgroups"]
    Q_ROWS = WARPGROUP_ROWS * Q_W
    Q_KEYS = decisions["dq_keys"]
    Q_STAGES = decisions["dq_stages"]
    Q_AT, Q_BYTES = _dq_arena(decisions, D)
    Q_THREADS = 128 * (Q_W + 1)
    # dK/dV pass
    KV_W = decisions["dkv_warpgroups"]
    KV_ROWS = WARPGROUP_ROWS * KV_W
    KV_QUERIES = decisions["dkv_queries"]
    KV_STAGES = decisions["dkv_stages"]
    KV_BUFFERS = decisions["dkv_buffers"]
    KV_AT, KV_BYTES = _dkv_arena(decisions, D)
    KV_THREADS = 128 * (KV_W + 1)
    Q_REGISTERS, Q_PRODUCER_REGISTERS = decisions["dq_registers"], decisions["dq_producer_registers"]
    Q_HEADS, KV_HEADS = decisions["dq_heads"], decisions["dkv_heads"]
    KV_REGISTERS, KV_PRODUCER_REGISTERS = decisions["dkv_registers"], decisions["dkv_producer_registers"]

    RESET_THREADS = 128

    CVT = f"cvt.rn.{BF}x2.f32"
    MMA_Q_SCORE = f"wgmma.mma_async.sync.aligned.m64n{Q_KEYS}k16.f32.{BF}.{BF}"
    MMA_KV_SCORE = f"wgmma.mma_async.sync.aligned.m64n{KV_QUERIES}k16.f32.{BF}.{BF}"
    MMA_OUT = f"wgmma.mma_async.sync.aligned.m64n{D}k16.f32.{BF}.{BF}"

    # fmt: off
    @T.prim_func
    def backward(q_h: T.handle, k_h: T.handle, v_h: T.handle, o_h: T.handle, lse_h: T.handle, do_h: T.handle, dlse_h: T.handle,
                 bands_h: T.handle, cu_h: T.handle, dq_h: T.handle, dk_h: T.handle, dv_h: T.handle, stats_h: T.handle, next_h: T.handle,
                 scale: T.float32, workers: T.int32):
        B64 = T.int64(); HQ64 = T.int64(); HK64 = T.int64(); N64 = T.int64(); M64 = T.int64(); ND64 = T.int64(); NP64 = T.int64()
        q0s = T.int64(); q1s = T.int64(); q2s = T.int64()
        k0s = T.int64(); k1s = T.int64(); k2s = T.int64()
        v0s = T.int64(); v1s = T.int64(); v2s = T.int64()
        o0s = T.int64(); o1s = T.int64(); o2s = T.int64()
        g0s = T.int64(); g1s = T.int64(); g2s = T.int64()
        dq0s = T.int64(); dq1s = T.int64(); dq2s = T.int64()
        dk0s = T.int64(); dk1s = T.int64(); dk2s = T.int64()
        dv0s = T.int64(); dv1s = T.int64(); dv2s = T.int64()
        one = T.meta_var(T.int64(1)); hd = T.meta_var(T.int64(D))
        q = T.match_buffer(q_h, (B64, HQ64, N64, hd), dtype, strides=(q0s, q1s, q2s, one), align=16, layout=None)
        k = T.match_buffer(k_h, (B64, HK64, N64, hd), dtype, strides=(k0s, k1s, k2s, one), align=16, layout=None)
        v = T.match_buffer(v_h, (B64, HK64, N64, hd), dtype, strides=(v0s, v1s, v2s, one), align=16, layout=None)
        o = T.match_buffer(o_h, (B64, HQ64, N64, hd), dtype, strides=(o0s, o1s, o2s, one), align=16, layout=None)
        lse = T.match_buffer(lse_h, (B64, HQ64, N64), "float32", align=4)
        do = T.match_buffer(do_h, (B64, HQ64, N64, hd), dtype, strides=(g0s, g1s, g2s, one), align=16, layout=None)
        dlse = T.match_buffer(dlse_h, (B64, HQ64, N64), "float32", align=4)
        bands = T.match_buffer(bands_h, (M64, HQ64, 4), "int32", align=4)
        cu = T.match_buffer(cu_h, (ND64,), "int32", align=4)
        dq = T.match_buffer(dq_h, (B64, HQ64, N64, hd), dtype, strides=(dq0s, dq1s, dq2s, one), align=16, layout=None)
        dk = T.match_buffer(dk_h, (B64, HK64, N64, hd), dtype, strides=(dk0s, dk1s, dk2s, one), align=16, layout=None)
        dv = T.match_buffer(dv_h, (B64, HK64, N64, hd), dtype, strides=(dv0s, dv1s, dv2s, one), align=16, layout=None)
        stats = T.match_buffer(stats_h, (B64, HQ64, NP64, 4), "float32", align=16)
        next_tile = T.match_buffer(next_h, (2,), "int32", align=4)

        N: T.let[T.int32] = T.Cast("int32", N64)
        NP: T.let[T.int32] = T.Cast("int32", NP64)
        B: T.let[T.int32] = T.Cast("int32", B64)
        HQ: T.let[T.int32] = T.Cast("int32", HQ64)
        HK: T.let[T.int32] = T.Cast("int32", HK64)
        M: T.let[T.int32] = T.Cast("int32", M64)
        docs: T.let[T.int32] = T.Cast("int32", ND64) - 1
        group: T.let[T.int32] = HQ // HK

        qa_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(qa_map, q, dtype, D, B64, HQ64, N64, q0s, q1s, q2s, Q_ROWS)
        oa_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(oa_map, o, dtype, D, B64, HQ64, N64, o0s, o1s, o2s, Q_ROWS)
        ga_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(ga_map, do, dtype, D, B64, HQ64, N64, g0s, g1s, g2s, Q_ROWS)
        ka_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(ka_map, k, dtype, D, B64, HK64, N64, k0s, k1s, k2s, Q_KEYS)
        va_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(va_map, v, dtype, D, B64, HK64, N64, v0s, v1s, v2s, Q_KEYS)
        qc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(qc_map, q, dtype, D, B64, HQ64, N64, q0s, q1s, q2s, KV_QUERIES)
        gc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(gc_map, do, dtype, D, B64, HQ64, N64, g0s, g1s, g2s, KV_QUERIES)
        kc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(kc_map, k, dtype, D, B64, HK64, N64, k0s, k1s, k2s, KV_ROWS)
        vc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(vc_map, v, dtype, D, B64, HK64, N64, v0s, v1s, v2s, KV_ROWS)
        stats_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_stats(stats_map, stats, B64 * HQ64, NP64, KV_QUERIES)

        # What the passes share: the tile counters start at zero, and an odd N has one more row of stats, which must be finite.
        with T.attr({"tirx.device_entry": True}):
            bx = T.cta_id([(B * HQ + RESET_THREADS - 1) // RESET_THREADS])
            tx = T.thread_id([RESET_THREADS])
            row: T.int32 = bx * RESET_THREADS + tx
            if row < 2:
                next_tile[row] = 0
            if row < B * HQ:
                if N % 2 == 1:
                    stats[T.truncdiv(row, HQ), row - T.truncdiv(row, HQ) * HQ, NP - 1, 1] = T.float32(INF)
                    stats[T.truncdiv(row, HQ), row - T.truncdiv(row, HQ) * HQ, NP - 1, 3] = T.float32(0)

        # dQ: tiles of queries, chunks of keys.
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            bx = T.cta_id([workers])
            warp = T.warp_id([Q_THREADS // 32])
            tx = T.thread_id([Q_THREADS])
            arena = T.alloc_buffer((Q_BYTES,), "uint8", scope="shared.dyn", align=1024)
            base: T.uint32 = T.cuda.cvta_generic_to_shared(arena.data)
            slots: T.int32 = N // Q_ROWS + docs
            tiles: T.int32 = slots * B * HQ
            lane: T.int32 = tx % 32
            stage: T.int32 = 0
            phase: T.int32 = 0
            tile_phase: T.int32 = 0

            at = T.meta_var(partial(address, base, Q_AT))

            if tx == 0:
                init_rings(at, Q_STAGES, 1, Q_W)
            T.cuda.cta_sync()

            if warp < 4:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](Q_PRODUCER_REGISTERS)
                place: T.int32 = 0
                place_phase: T.int32 = 0
                seg: T.int32 = 0
                lo = T.alloc_local((1,), "int32")
                hi = T.alloc_local((1,), "int32")
                q0: T.int32 = 0
                begin: T.int32 = 0
                end: T.int32 = 0
                doc: T.int32 = 0
                b: T.int32 = 0
                h: T.int32 = 0
                band_at: T.uint64 = T.uint64(0)
                k_first: T.int32 = 0
                c_first: T.int32 = 0
                c_last: T.int32 = 0
                chunks: T.int32 = 0

                @T.inline
                def segment():
                    # Chunks of keys from k_first on that the tile needs from one band, and those of lane w's warpgroup among
                    # them: the producers have too few registers to keep a copy for each warpgroup.
                    T.ptx["ld.global.nc.v2.s32"](lo[0], hi[0], band_at + T.Cast("uint64", seg * 8))
                    mine: T.int32 = q0 + lane * WARPGROUP_ROWS
                    mine_last: T.int32 = T.min(mine + WARPGROUP_ROWS, end) - 1
                    k_first = T.max(q0 - hi[0], begin)
                    chunks = T.max(T.min(q0 + Q_ROWS, end) - 1 - lo[0] - k_first + Q_KEYS, 0) // Q_KEYS
                    c_first = 1
                    c_last = 0
                    if lane < Q_W:
                        if mine <= mine_last:
                            if mine_last - lo[0] >= T.max(mine - hi[0], begin):
                                c_first = (T.max(mine - hi[0], begin) - k_first) // Q_KEYS
                                c_last = (mine_last - lo[0] - k_first) // Q_KEYS

                if warp == 1:
                    # The tile warp: draws tiles, hands them to the chunk warp, and loads what stays for the whole tile.
                    fetched = T.alloc_local((1,), "int32")
                    slot: T.int32 = 0
                    draw_tile(next_tile[0], lane, fetched)
                    fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    while fetched[0] < tiles:
                        locate_head(fetched[0], slots, B, HQ, Q_HEADS, slot, b, h)
                        slot = slots - 1 - slot  # late queries have the most keys
                        draw_tile(next_tile[0], lane, fetched)
                        locate_rows(slot, Q_ROWS, cu, docs, doc, begin, end, q0)
                        doc = table_row(doc, docs, M)
                        if q0 < end:
                            offer_tile(at, place, place_phase, lane, q0, begin, end, doc, b, h)
                            band_at = T.reinterpret("uint64", bands.data) + T.Cast("uint64", (doc * HQ + h) * 16)
                            total: T.int32 = 0
                            count: T.int32 = 0
                            seg = 0
                            while seg < 2:
                                segment()
                                total = total + chunks
                                count = count + c_last - c_first + 1
                                seg = seg + 1
                            T.cuda.mbarrier_wait(at("tile_empty"), tile_phase ^ 1)
                            tile_phase = tile_phase ^ 1
                            # Lane 0 stores all counts: its arrival releases what it wrote itself. (Stored by their own lanes
                            # before a warp synchronisation, they left racecheck in doubt.)
                            for w in T.unroll(Q_W):
                                theirs: T.int32 = T.tvm_warp_shuffle(0xFFFFFFFF, count, w, 32, 32)
                                if lane == 0:
                                    T.ptx["st.shared.s32"](at("tile") + T.uint32(16 + 4 * w), theirs)
                            if lane == 0:
                                T.ptx["st.shared.v4.s32"](at("tile"), q0, begin, end, b * HQ + h)
                                T.ptx["st.shared.s32"](at("tile") + T.uint32(16 + 4 * Q_W), total)
                                T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("tile_full"), T.uint32(3 * Q_ROWS * D * 2))
                                T.ptx[LOAD](at("q"), T.address_of(qa_map), 0, q0, 0, h, b, at("tile_full"))
                                T.ptx[LOAD](at("do"), T.address_of(ga_map), 0, q0, 0, h, b, at("tile_full"))
                                T.ptx[LOAD](at("o"), T.address_of(oa_map), 0, q0, 0, h, b, at("tile_full"))
                        fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    offer_no_more(at, place, place_phase, 0, tile_phase, lane)
                if warp == 0:
                    # The chunk warp: walks the bands of each tile and keeps the ring full, also across tiles.
                    c: T.int32 = 0
                    walking: T.int32 = 1
                    while walking == 1:
                        T.cuda.mbarrier_wait(at("queue_full", place, BARRIER_BYTES), place_phase)
                        q0 = load_shared(at("queue", place, TILE_INFO_BYTES))
                        if q0 < 0:
                            walking = 0
                        else:
                            take_tile(at, place, place_phase, begin, end, doc, b, h)
                            band_at = T.reinterpret("uint64", bands.data) + T.Cast("uint64", (doc * HQ + h) * 16)
                            hk: T.int32 = T.truncdiv(h, group)
                            seg = 0
                            while seg < 2:
                                segment()
                                c = 0
                                while c < chunks:
                                    needed: T.uint32 = ballot(T.And(c >= c_first, c <= c_last))
                                    T.cuda.mbarrier_wait(at("empty", stage, BARRIER_BYTES), phase ^ 1)
                                    if lane == 0:
                                        T.ptx["st.shared.v4.s32"](at("info", stage, INFO_BYTES), k_first + c * Q_KEYS, lo[0], hi[0], T.Cast("int32", needed))
                                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("full", stage, BARRIER_BYTES), T.uint32(2 * Q_KEYS * D * 2))
                                        T.ptx[LOAD](at("k", stage, Q_KEYS * D * 2), T.address_of(ka_map), 0, k_first + c * Q_KEYS, 0, hk, b, at("full", stage, BARRIER_BYTES))
                                        T.ptx[LOAD](at("v", stage, Q_KEYS * D * 2), T.address_of(va_map), 0, k_first + c * Q_KEYS, 0, hk, b, at("full", stage, BARRIER_BYTES))
                                    stage = stage + 1
                                    if stage == Q_STAGES:
                                        stage = 0
                                        phase = phase ^ 1
                                    c = c + 1
                                seg = seg + 1
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](Q_REGISTERS)
                w: T.int32 = warp // 4 - 1
                strip: T.int32 = w * WARPGROUP_ROWS + warp % 4 * 16  # this warp's rows of the tile
                my_row: T.int32 = strip + lane // 4
                # One address serves ldmatrix and stmatrix: the 8 lanes of a matrix take 8 rows, and the 16-byte column is
                # swizzled by the row, as TMA did.
                frag_row: T.int32 = strip + lane % 16
                frag_offset: T.uint32 = T.Cast("uint32", frag_row * ROW)
                frag_col: T.uint32 = T.Cast("uint32", lane // 16)
                frag_swizzle: T.uint32 = T.Cast("uint32", lane % 8)
                qf = T.alloc_local((4 * KS,), "uint32")
                gf = T.alloc_local((4 * KS,), "uint32")
                s_acc = T.alloc_local((Q_KEYS // 2,), "float32")
                p_acc = T.alloc_local((Q_KEYS // 2,), "float32")
                acc = T.alloc_local((D // 2,), "float32")
                ds = T.alloc_local((Q_KEYS // 4,), "uint32")
                info = T.alloc_local((4,), "int32")
                tinfo = T.alloc_local((4,), "int32")
                steps = T.alloc_local((2,), "int32")
                lse2 = T.alloc_local((2,), "float32")
                delta = T.alloc_local((2,), "float32")
                sector_col: T.int32 = lane % 2 * 8 + lane % 4 // 2 * 4
                turn = T.alloc_local((3 * D // 16,), "uint32")
                prev: T.int32 = 0
                left: T.int32 = 0
                found: T.int32 = 0
                todo: T.int32 = 0
                fresh: T.int32 = 0
                b: T.int32 = 0
                h: T.int32 = 0
                dl = T.alloc_local((2,), "float32")
                running: T.int32 = 1
                scale2: T.float32 = scale * T.float32(LOG2E)

                @T.inline
                def look(limit):
                    find_chunk(at, w, stage, phase, Q_STAGES, left, found, info, limit)

                @T.inline
                def issue_product(out, left_operand, region):
                    # scores = Q K^T or dP = dO V^T of this warpgroup's rows
                    start: T.uint64 = T.uint64(K_MAJOR) + T.Cast("uint64", at(region, stage, Q_KEYS * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(KS):
                        T.ptx[MMA_Q_SCORE](*[out[i] for i in range(Q_KEYS // 2)], *[left_operand[4 * kk + i] for i in range(4)],
                                           start + T.uint64(kk // 4 * (Q_KEYS * ROW // 16) + kk % 4 * 2), T.bool(kk > 0), 1, 1, 0)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def issue_output():
                    start: T.uint64 = T.uint64(descriptor(Q_KEYS * ROW)) + T.Cast("uint64", at("k", prev, Q_KEYS * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(Q_KEYS // 16):
                        T.ptx[MMA_OUT](*[acc[i] for i in range(D // 2)], *[ds[4 * kk + i] for i in range(4)],
                                       start + T.uint64(kk * (16 * ROW // 16)), T.bool(True), 1, 1, 1)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def load_fragment(frag, start, region, kk):
                    T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                        *[frag[start + i] for i in range(4)],
                        at(region) + T.uint32(kk // 4 * Q_ROWS * ROW) + frag_offset + (((frag_col + T.uint32(kk % 4 * 2)) ^ frag_swizzle) << T.uint32(4)))

                @T.inline
                def row_statistics():
                    # lse in base 2 and delta = rowsum(dO * O) - dlse, kept here and written for the dK/dV pass.
                    for j in T.unroll(2):
                        query: T.int32 = tinfo[0] + my_row + 8 * j
                        lse2[j] = -T.float32(INF)
                        dl[j] = T.float32(0)
                        if query < tinfo[2]:
                            lse2[j] = lse[b, h, query] * T.float32(LOG2E)
                            dl[j] = dlse[b, h, query]
                        delta[j] = T.float32(0)
                    for kk in T.unroll(KS):
                        load_fragment(ds, 0, "o", kk)
                        for i in T.unroll(4):
                            delta[i % 2] = dot2(ds[i], gf[4 * kk + i], delta[i % 2], dtype)
                    T.cuda.warp_sync()
                    arrive(at("tile_empty"))
                    for j in T.unroll(2):
                        query: T.int32 = tinfo[0] + my_row + 8 * j
                        delta[j] = delta[j] + T.tvm_warp_shuffle_xor(0xFFFFFFFF, delta[j], 1, 32, 32)
                        delta[j] = delta[j] + T.tvm_warp_shuffle_xor(0xFFFFFFFF, delta[j], 2, 32, 32) - dl[j]
                        if lse2[j] < T.float32(-3e38):
                            # A query with no key: +inf makes its probabilities vanish.
                            lse2[j] = T.float32(INF)
                            delta[j] = T.float32(0)
                        if query < tinfo[2]:
                            if lane % 4 == 0:
                                stats[b, h, query // 2, query % 2] = lse2[j]
                                stats[b, h, query // 2, query % 2 + 2] = delta[j]

                @T.inline
                def step(follows):
                    # The previous chunk's dQ product runs under this chunk's exponentials.
                    issue_product(s_acc, qf, "k")
                    if follows:
                        issue_output()
                    issue_product(p_acc, gf, "v")
                    if not follows:
                        if fresh == 1:
                            row_statistics()
                            fresh = 0
                    T.ptx.wgmma.wait_group.sync.aligned(2 if follows else 1)
                    hold(s_acc, Q_KEYS // 2)
                    first_q: T.int32 = tinfo[0] + w * WARPGROUP_ROWS
                    inside: T.bool = T.And(T.And(first_q - info[0] - (Q_KEYS - 1) >= info[1], first_q + (WARPGROUP_ROWS - 1) - info[0] <= info[2]), info[0] >= tinfo[1])
                    if T.Not(inside):
                        q_row: T.int32 = tinfo[0] + my_row
                        d0: T.int32 = q_row - info[0] - lane % 4 * 2 - info[1]
                        lim0: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], q_row - tinfo[1]) - info[1] + 1, 0))
                        lim1: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], q_row + 8 - tinfo[1]) - info[1] + 1, 0))
                        for n in T.unroll(Q_KEYS // 8):
                            for j in T.unroll(2):
                                s_acc[4 * n + j] = T.if_then_else(T.Cast("uint32", d0 - (8 * n + j)) < lim0, s_acc[4 * n + j], T.float32(-INF))
                                s_acc[4 * n + 2 + j] = T.if_then_else(T.Cast("uint32", d0 + 8 - (8 * n + j)) < lim1, s_acc[4 * n + 2 + j], T.float32(-INF))
                    for n in T.unroll(Q_KEYS // 8):
                        for j in T.unroll(4):
                            T.ptx["ex2.approx.ftz.f32"](s_acc[4 * n + j], s_acc[4 * n + j] * scale2 - lse2[j // 2])
                    pin(s_acc[Q_KEYS // 2 - 1])
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    hold(p_acc, Q_KEYS // 2)
                    if follows:
                        arrive(at("empty", prev, BARRIER_BYTES))
                    for n in T.unroll(Q_KEYS // 8):
                        for j in T.unroll(2):
                            T.ptx[CVT](ds[2 * n + j], s_acc[4 * n + 2 * j + 1] * (p_acc[4 * n + 2 * j + 1] - delta[j]),
                                       s_acc[4 * n + 2 * j] * (p_acc[4 * n + 2 * j] - delta[j]))
                    prev = stage
                    advance(stage, phase, Q_STAGES)

                while running == 1:
                    T.cuda.mbarrier_wait(at("tile_full"), tile_phase)
                    tile_phase = tile_phase ^ 1
                    T.ptx["ld.shared.v4.s32"](tinfo[0], tinfo[1], tinfo[2], tinfo[3], at("tile"))
                    T.ptx["ld.shared.s32"](steps[0], at("tile", w, 4) + T.uint32(16))
                    T.ptx["ld.shared.s32"](steps[1], at("tile") + T.uint32(16 + 4 * Q_W))
                    todo = steps[0]
                    left = steps[1]
                    if tinfo[0] < 0:
                        running = 0
                    else:
                        b = T.truncdiv(tinfo[3], HQ)
                        h = tinfo[3] - b * HQ
                        for kk in T.unroll(KS):
                            load_fragment(qf, 4 * kk, "q", kk)
                            load_fragment(gf, 4 * kk, "do", kk)
                        for i in T.unroll(D // 2):
                            acc[i] = T.float32(0)
                        fresh = 1
                        if todo == 0:
                            row_statistics()
                        # The loop is rotated so that no product is in flight across its back edge: ptxas serializes every
                        # wgmma otherwise (C7514).
                        while todo > 0:
                            look(ANY)
                            step(False)
                            todo = todo - 1
                            found = 0
                            if todo > 0:
                                look(Q_STAGES - 2)
                            while found == 1:
                                step(True)
                                todo = todo - 1
                                found = 0
                                if todo > 0:
                                    look(Q_STAGES - 2)
                            issue_output()
                            T.ptx.wgmma.wait_group.sync.aligned(0)
                            hold(acc, D // 2)
                            arrive(at("empty", prev, BARRIER_BYTES))
                        pass_rest(at, stage, phase, Q_STAGES, left)
                        for j in T.unroll(2):
                            out_row: T.int32 = tinfo[0] + my_row + 8 * j
                            out_at: T.uint64 = element(dq.data, (dq0s, dq1s, dq2s), b, h, out_row, sector_col)
                            store_rows(acc, D // 2, j, scale, out_at, out_row < tinfo[2], lane, turn, CVT)

        # dK and dV: tiles of keys, chunks of queries. Scores are transposed here (keys in rows), so that P and dS leave the
        # accumulators in the layout that the products with dO and Q take from registers.
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            bx = T.cta_id([workers])
            warp = T.warp_id([KV_THREADS // 32])
            tx = T.thread_id([KV_THREADS])
            arena = T.alloc_buffer((KV_BYTES,), "uint8", scope="shared.dyn", align=1024)
            base: T.uint32 = T.cuda.cvta_generic_to_shared(arena.data)
            slots: T.int32 = N // KV_ROWS + docs
            tiles: T.int32 = slots * B * HK
            lane: T.int32 = tx % 32
            stage: T.int32 = 0
            phase: T.int32 = 0
            slab: T.int32 = 0
            tile_phase: T.int32 = 0
            at = T.meta_var(partial(address, base, KV_AT))

            if tx == 0:
                init_rings(at, KV_STAGES, KV_BUFFERS, KV_W)
            T.cuda.cta_sync()

            if warp < 4:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](KV_PRODUCER_REGISTERS)
                place: T.int32 = 0
                place_phase: T.int32 = 0
                seg: T.int32 = 0
                lo = T.alloc_local((1,), "int32")
                hi = T.alloc_local((1,), "int32")
                k0: T.int32 = 0
                begin: T.int32 = 0
                end: T.int32 = 0
                doc: T.int32 = 0
                b: T.int32 = 0
                h: T.int32 = 0
                band_at: T.uint64 = T.uint64(0)
                q_first: T.int32 = 0
                c_first: T.int32 = 0
                c_last: T.int32 = 0
                chunks: T.int32 = 0

                @T.inline
                def segment():
                    # Chunks of queries from q_first on. That is even, because TMA traps on rows of stats (two queries are 16
                    # bytes) that do not start at 16 bytes.
                    T.ptx["ld.global.nc.v2.s32"](lo[0], hi[0], band_at + T.Cast("uint64", seg * 8))
                    mine: T.int32 = k0 + lane * WARPGROUP_ROWS
                    mine_last: T.int32 = T.min(mine + WARPGROUP_ROWS, end) - 1
                    q_first = (k0 + lo[0]) // 2 * 2
                    chunks = 0
                    if T.min(T.min(k0 + KV_ROWS, end) - 1 + hi[0], end - 1) >= k0 + lo[0]:
                        chunks = (T.min(T.min(k0 + KV_ROWS, end) - 1 + hi[0], end - 1) - q_first) // KV_QUERIES + 1
                    c_first = 1
                    c_last = 0
                    if lane < KV_W:
                        if mine <= mine_last:
                            if T.min(mine_last + hi[0], end - 1) >= mine + lo[0]:
                                c_first = (mine + lo[0] - q_first) // KV_QUERIES
                                c_last = (T.min(mine_last + hi[0], end - 1) - q_first) // KV_QUERIES

                if warp == 1:
                    # The tile warp: draws tiles, hands them to the chunk warp, and loads what stays for the whole tile.
                    fetched = T.alloc_local((1,), "int32")
                    slot: T.int32 = 0
                    draw_tile(next_tile[1], lane, fetched)
                    fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    while fetched[0] < tiles:
                        locate_head(fetched[0], slots, B, HK, KV_HEADS, slot, b, h)  # early keys have the most queries
                        draw_tile(next_tile[1], lane, fetched)
                        locate_rows(slot, KV_ROWS, cu, docs, doc, begin, end, k0)
                        doc = table_row(doc, docs, M)
                        if k0 < end:
                            offer_tile(at, place, place_phase, lane, k0, begin, end, doc, b, h)
                            band_at = T.reinterpret("uint64", bands.data) + T.Cast("uint64", (doc * HQ + h * group) * 16)
                            total: T.int32 = 0
                            count: T.int32 = 0
                            seg = 0
                            while seg < 2 * group:
                                segment()
                                total = total + chunks
                                count = count + c_last - c_first + 1
                                seg = seg + 1
                            T.cuda.mbarrier_wait(at("tile_empty", slab, BARRIER_BYTES), tile_phase ^ 1)
                            for w in T.unroll(KV_W):
                                theirs: T.int32 = T.tvm_warp_shuffle(0xFFFFFFFF, count, w, 32, 32)
                                if lane == 0:
                                    T.ptx["st.shared.s32"](at("tile", slab, TILE_INFO_BYTES) + T.uint32(16 + 4 * w), theirs)
                            if lane == 0:
                                T.ptx["st.shared.v4.s32"](at("tile", slab, TILE_INFO_BYTES), k0, begin, end, b * HK + h)
                                T.ptx["st.shared.s32"](at("tile", slab, TILE_INFO_BYTES) + T.uint32(16 + 4 * KV_W), total)
                                T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("tile_full", slab, BARRIER_BYTES), T.uint32(2 * KV_ROWS * D * 2))
                                T.ptx[LOAD](at("k", slab, KV_ROWS * D * 2), T.address_of(kc_map), 0, k0, 0, h, b, at("tile_full", slab, BARRIER_BYTES))
                                T.ptx[LOAD](at("v", slab, KV_ROWS * D * 2), T.address_of(vc_map), 0, k0, 0, h, b, at("tile_full", slab, BARRIER_BYTES))
                            slab = slab + 1
                            if slab == KV_BUFFERS:
                                slab = 0
                                tile_phase = tile_phase ^ 1
                        fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    offer_no_more(at, place, place_phase, slab, tile_phase, lane)
                if warp == 0:
                    # The chunk warp: walks the bands of each tile and keeps the ring full, also across tiles.
                    c: T.int32 = 0
                    walking: T.int32 = 1
                    while walking == 1:
                        T.cuda.mbarrier_wait(at("queue_full", place, BARRIER_BYTES), place_phase)
                        k0 = load_shared(at("queue", place, TILE_INFO_BYTES))
                        if k0 < 0:
                            walking = 0
                        else:
                            take_tile(at, place, place_phase, begin, end, doc, b, h)
                            band_at = T.reinterpret("uint64", bands.data) + T.Cast("uint64", (doc * HQ + h * group) * 16)
                            seg = 0
                            while seg < 2 * group:
                                segment()
                                c = 0
                                while c < chunks:
                                    needed: T.uint32 = ballot(T.And(c >= c_first, c <= c_last))
                                    T.cuda.mbarrier_wait(at("empty", stage, BARRIER_BYTES), phase ^ 1)
                                    if lane == 0:
                                        T.ptx["st.shared.v4.s32"](at("info", stage, INFO_BYTES), q_first + c * KV_QUERIES, lo[0], hi[0], T.Cast("int32", needed))
                                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("full", stage, BARRIER_BYTES), T.uint32(2 * KV_QUERIES * D * 2 + KV_QUERIES * 8))
                                        T.ptx[LOAD](at("q", stage, KV_QUERIES * D * 2), T.address_of(qc_map), 0, q_first + c * KV_QUERIES, 0, h * group + seg // 2, b, at("full", stage, BARRIER_BYTES))
                                        T.ptx[LOAD_STATS](at("stats", stage, KV_QUERIES * 8), T.address_of(stats_map), 2 * (q_first + c * KV_QUERIES), b * HQ + h * group + seg // 2, at("full", stage, BARRIER_BYTES))
                                        T.ptx[LOAD](at("do", stage, KV_QUERIES * D * 2), T.address_of(gc_map), 0, q_first + c * KV_QUERIES, 0, h * group + seg // 2, b, at("full", stage, BARRIER_BYTES))
                                    stage = stage + 1
                                    if stage == KV_STAGES:
                                        stage = 0
                                        phase = phase ^ 1
                                    c = c + 1
                                seg = seg + 1
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](KV_REGISTERS)
                w: T.int32 = warp // 4 - 1
                strip: T.int32 = w * WARPGROUP_ROWS + warp % 4 * 16
                my_row: T.int32 = strip + lane // 4
                stats_lane: T.uint32 = T.Cast("uint32", lane % 4 * 16)
                s_acc = T.alloc_local((KV_QUERIES // 2,), "float32")
                p_acc = T.alloc_local((KV_QUERIES // 2,), "float32")
                k_acc = T.alloc_local((D // 2,), "float32")
                v_acc = T.alloc_local((D // 2,), "float32")
                ps = T.alloc_local((KV_QUERIES // 4,), "uint32")
                ds = T.alloc_local((KV_QUERIES // 4,), "uint32")
                info = T.alloc_local((4,), "int32")
                tinfo = T.alloc_local((4,), "int32")
                steps = T.alloc_local((2,), "int32")
                stat = T.alloc_local((KV_QUERIES // 4,), "float32")
                sector_col: T.int32 = lane % 2 * 8 + lane % 4 // 2 * 4
                turn = T.alloc_local((3 * D // 16,), "uint32")
                prev: T.int32 = 0
                left: T.int32 = 0
                found: T.int32 = 0
                todo: T.int32 = 0
                running: T.int32 = 1
                scale2: T.float32 = scale * T.float32(LOG2E)

                @T.inline
                def look(limit):
                    find_chunk(at, w, stage, phase, KV_STAGES, left, found, info, limit)

                @T.inline
                def issue_product(out, rows_region, region):
                    # scores^T = K Q^T or dP^T = V dO^T of this warpgroup's keys
                    mine: T.uint64 = T.uint64(K_MAJOR) + T.Cast("uint64", (at(rows_region, slab, KV_ROWS * D * 2) + T.Cast("uint32", w * (WARPGROUP_ROWS * ROW))) >> T.uint32(4))
                    start: T.uint64 = T.uint64(K_MAJOR) + T.Cast("uint64", at(region, stage, KV_QUERIES * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(KS):
                        T.ptx[MMA_KV_SCORE](*[out[i] for i in range(KV_QUERIES // 2)],
                                           mine + T.uint64(kk // 4 * (KV_ROWS * ROW // 16) + kk % 4 * 2),
                                           start + T.uint64(kk // 4 * (KV_QUERIES * ROW // 16) + kk % 4 * 2), T.bool(kk > 0), 1, 1, 0, 0)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def issue_output(out, left_operand, region, which):
                    start: T.uint64 = T.uint64(descriptor(KV_QUERIES * ROW)) + T.Cast("uint64", at(region, which, KV_QUERIES * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(KV_QUERIES // 16):
                        T.ptx[MMA_OUT](*[out[i] for i in range(D // 2)], *[left_operand[4 * kk + i] for i in range(4)],
                                       start + T.uint64(kk * (16 * ROW // 16)), T.bool(True), 1, 1, 1)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def release_tile():
                    T.cuda.warp_sync()
                    arrive(at("tile_empty", slab, BARRIER_BYTES))

                @T.inline
                def step(follows):
                    # dP runs under the exponentials, dV under dS, and the dK of one chunk before the scores of the next.
                    if follows:
                        issue_output(k_acc, ds, "q", prev)
                    issue_product(s_acc, "k", "q")
                    if follows:
                        T.ptx.wgmma.wait_group.sync.aligned(1)
                        arrive(at("empty", prev, BARRIER_BYTES))
                    issue_product(p_acc, "v", "do")
                    for n in T.unroll(KV_QUERIES // 8):
                        T.ptx["ld.shared.v2.f32"](stat[2 * n], stat[2 * n + 1], at("stats", stage, KV_QUERIES * 8) + stats_lane + T.uint32(64 * n))
                    T.ptx.wgmma.wait_group.sync.aligned(1)
                    hold(s_acc, KV_QUERIES // 2)
                    first_k: T.int32 = tinfo[0] + w * WARPGROUP_ROWS
                    inside: T.bool = T.And(T.And(info[0] - first_k - (WARPGROUP_ROWS - 1) >= info[1], info[0] + (KV_QUERIES - 1) - first_k <= info[2]), info[0] + KV_QUERIES <= tinfo[2])
                    if T.Not(inside):
                        k_row: T.int32 = tinfo[0] + my_row
                        d0: T.int32 = info[0] + lane % 4 * 2 - k_row - info[1]
                        lim0: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], tinfo[2] - 1 - k_row) - info[1] + 1, 0))
                        lim1: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], tinfo[2] - 9 - k_row) - info[1] + 1, 0))
                        for n in T.unroll(KV_QUERIES // 8):
                            for j in T.unroll(2):
                                s_acc[4 * n + j] = T.if_then_else(T.Cast("uint32", d0 + (8 * n + j)) < lim0, s_acc[4 * n + j], T.float32(-INF))
                                s_acc[4 * n + 2 + j] = T.if_then_else(T.Cast("uint32", d0 - 8 + (8 * n + j)) < lim1, s_acc[4 * n + 2 + j], T.float32(-INF))
                    for n in T.unroll(KV_QUERIES // 8):
                        for j in T.unroll(4):
                            T.ptx["ex2.approx.ftz.f32"](s_acc[4 * n + j], s_acc[4 * n + j] * scale2 - stat[2 * n + j % 2])
                        for j in T.unroll(2):
                            T.ptx[CVT](ps[2 * n + j], s_acc[4 * n + 2 * j + 1], s_acc[4 * n + 2 * j])
                    issue_output(v_acc, ps, "do", stage)
                    for n in T.unroll(KV_QUERIES // 8):
                        T.ptx["ld.shared.v2.f32"](stat[2 * n], stat[2 * n + 1], at("stats", stage, KV_QUERIES * 8) + stats_lane + T.uint32(64 * n + 8))
                    T.ptx.wgmma.wait_group.sync.aligned(1)
                    hold(p_acc, KV_QUERIES // 2)
                    if todo == 1:
                        # K and V are read: the next tile's may load under what is left of this one.
                        release_tile()
                    for n in T.unroll(KV_QUERIES // 8):
                        for j in T.unroll(2):
                            T.ptx[CVT](ds[2 * n + j], s_acc[4 * n + 2 * j + 1] * (p_acc[4 * n + 2 * j + 1] - stat[2 * n + 1]),
                                       s_acc[4 * n + 2 * j] * (p_acc[4 * n + 2 * j] - stat[2 * n]))
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    prev = stage
                    advance(stage, phase, KV_STAGES)

                while running == 1:
                    T.cuda.mbarrier_wait(at("tile_full", slab, BARRIER_BYTES), tile_phase)
                    T.ptx["ld.shared.v4.s32"](tinfo[0], tinfo[1], tinfo[2], tinfo[3], at("tile", slab, TILE_INFO_BYTES))
                    T.ptx["ld.shared.s32"](steps[0], at("tile", slab, TILE_INFO_BYTES) + T.uint32(16) + T.Cast("uint32", w * 4))
                    T.ptx["ld.shared.s32"](steps[1], at("tile", slab, TILE_INFO_BYTES) + T.uint32(16 + 4 * KV_W))
                    todo = steps[0]
                    left = steps[1]
                    if tinfo[0] < 0:
                        running = 0
                    else:
                        for i in T.unroll(D // 2):
                            k_acc[i] = T.float32(0)
                            v_acc[i] = T.float32(0)
                        if todo == 0:
                            release_tile()
                        while todo > 0:
                            look(ANY)
                            step(False)
                            todo = todo - 1
                            found = 0
                            if todo > 0:
                                look(KV_STAGES - 2)
                            while found == 1:
                                step(True)
                                todo = todo - 1
                                found = 0
                                if todo > 0:
                                    look(KV_STAGES - 2)
                            issue_output(k_acc, ds, "q", prev)
                            T.ptx.wgmma.wait_group.sync.aligned(0)
                            hold(k_acc, D // 2)
                            hold(v_acc, D // 2)
                            arrive(at("empty", prev, BARRIER_BYTES))
                        pass_rest(at, stage, phase, KV_STAGES, left)
                        b: T.int32 = T.truncdiv(tinfo[3], HK)
                        for j in T.unroll(2):
                            out_row: T.int32 = tinfo[0] + my_row + 8 * j
                            v_at: T.uint64 = element(dv.data, (dv0s, dv1s, dv2s), b, tinfo[3] - b * HK, out_row, sector_col)
                            store_rows(v_acc, D // 2, j, T.float32(1), v_at, out_row < tinfo[2], lane, turn, CVT)
                            k_at: T.uint64 = element(dk.data, (dk0s, dk1s, dk2s), b, tinfo[3] - b * HK, out_row, sector_col)
                            store_rows(k_acc, D // 2, j, scale, k_at, out_row < tinfo[2], lane, turn, CVT)
                        slab = slab + 1
                        if slab == KV_BUFFERS:
                            slab = 0
                            tile_phase = tile_phase ^ 1
    # fmt: on
    return tvm.IRModule({"backward": backward})
