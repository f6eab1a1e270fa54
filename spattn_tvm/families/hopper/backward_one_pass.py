"""Banded attention backward for Hopper in one pass over key tiles: five products, dQ added up in global memory.

Three kernels. The first computes the statistics of the queries and clears the float32 sums of dQ; the second draws
tiles of keys, as the dK/dV pass of :mod:`.hopper_backward` does, and adds each chunk's dQ to the sums by bulk
reductions of 16 KB; the third scales and converts them. Adding goes in no fixed order: gradients differ from run to run
in the last bits.

**A chunk.** Both warpgroups write their 64 keys of dS to shared memory, in two buffers, and meet once. Each then
multiplies all 128 keys by half of the columns of K, so that half as much is added as if each added its own keys' part.
The next chunk's scores and this one's dK run while dQ goes to shared memory, dP under the exponentials, dV under dS. dQ
and dP share registers, and dK takes dS from shared memory: one more fragment of registers and ptxas serializes every
wgmma (C7512).

**Sums.** A warpgroup's columns of all queries of a head lie together, (B, Hq, 2, N, D / 2), so that a chunk of 64 queries
is one contiguous piece wherever it starts. The order of the columns is that of the accumulators.

Measured on an H200 (bfloat16, medians, L2 cleared, the two passes in the same run; ms):

=================== ============= ========== ========
(B, H, N, D)        layout        two passes one pass
=================== ============= ========== ========
(4, 16, 4096, 128)  spattention   0.404      0.537 *
(1, 16, 16384, 128) spattention   1.076      1.167
(4, 32, 4096, 128)  spattention   0.569      0.860 *
(1, 4, 65536, 128)  spattention   12.90      13.04 *
(1, 16, 8192, 128)  causal        1.456      1.400
(4, 16, 4096, 64)   spattention   0.261      0.368 *
(1, 16, 16384, 64)  spattention   0.680      0.784
=================== ============= ========== ========

with * before the third kernel was made 0.03 ms faster and dS was turned, which gave 0.01.

So it is for dense causal attention of head dim 128; bands are faster in two passes, the more so the narrower they are:
clearing, reading and converting the sums takes 0.12 ms at the second size. Of the second
kernel's 0.98 ms at (1, 16, 16384, 128), writing dQ to shared memory, with the fence and the barrier, cost 0.22 and
the additions 0.05; leaving out the product, the exponentials or the exchange as well changed little (0.01, 0.09, 0.08).
Compute throughput was 57% over the cycles that a multiprocessor had work (ncu). By count, the five products with what
is exchanged move 192 KB through shared memory a block of 64 x 64, the seven of two passes 144 KB, since those of the dQ
pass have one side in registers. Also tried: `red.global.add.v4.f32`
from registers (1.35 ms at that size), dS with keys in rows (1.175), dK from registers (1.21), the additions by a warp
of their own one chunk later (1.175, and 1.499 on the causal layout), that with dK issued after dP (1.27), packs of 4
and 2 heads instead of 8 (1.20, 1.22).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

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
    descriptor,
    dot2,
    draw_tile,
    element,
    encode_rows,
    encode_stats,
    hold,
    init_rings,
    load_shared,
    locate_head,
    locate_rows,
    offer_no_more,
    offer_tile,
    store_rows,
    take_tile,
)
from .backward_sizes import (
    BARRIER_BYTES,
    INFO_BYTES,
    ONE_PASS_QUERIES,
    SWIZZLE_ROW_BYTES,
    TILE_INFO_BYTES,
    WARPGROUP_ROWS,
    one_pass_arena,
)

SUM_BARRIER = 1  # all consumers; then one for each warpgroup
DELTAS = 4  # pairs of delta in registers at a time: all eight are too many
PREP_THREADS = 256
PIECES = 4  # of four columns, that a thread converts


def build_one_pass(decisions: Mapping[str, int], head_dim: int, dtype: str) -> Any:
    """The backward in one pass, as :func:`.hopper_backward.build_hopper_backward` describes and checks it."""
    D = head_dim
    KS = D // 16  # k16 steps over the head dimension
    ROW = SWIZZLE_ROW_BYTES
    BF = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    LOG2E = math.log2(math.e)
    INF = float("inf")

    W = decisions["dkv_warpgroups"]
    ROWS = WARPGROUP_ROWS * W
    CHUNK = ONE_PASS_QUERIES
    STAGES = decisions["dkv_stages"]
    HEADS = decisions["dkv_heads"]
    AT, BYTES = one_pass_arena(decisions, D)
    THREADS = 128 * (W + 1)
    REGISTERS, PRODUCER_REGISTERS = decisions["dkv_registers"], decisions["dkv_producer_registers"]

    # Columns of dQ that a warpgroup sums, and the bytes from those of one to those of the next in K.
    SPAN = D // W
    SLICE = SPAN * 2 if SPAN < 64 else SPAN // 64 * ROWS * ROW

    PREP_LANES = D // 8
    PREP_ROWS = PREP_THREADS // PREP_LANES

    CVT = f"cvt.rn.{BF}x2.f32"
    REDUCE = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"
    MMA_SCORE = f"wgmma.mma_async.sync.aligned.m64n{CHUNK}k16.f32.{BF}.{BF}"
    MMA_OUT = f"wgmma.mma_async.sync.aligned.m64n{D}k16.f32.{BF}.{BF}"
    MMA_SUM = f"wgmma.mma_async.sync.aligned.m64n{SPAN}k16.f32.{BF}.{BF}"

    # fmt: off
    @T.prim_func
    def backward(q_h: T.handle, k_h: T.handle, v_h: T.handle, o_h: T.handle, lse_h: T.handle, do_h: T.handle, dlse_h: T.handle,
                 bands_h: T.handle, cu_h: T.handle, dq_h: T.handle, dk_h: T.handle, dv_h: T.handle, stats_h: T.handle, next_h: T.handle,
                 sum_h: T.handle, scale: T.float32, workers: T.int32):
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
        dq_sum = T.match_buffer(sum_h, (B64, HQ64, N64, hd), "float32", align=16)

        N: T.let[T.int32] = T.Cast("int32", N64)
        NP: T.let[T.int32] = T.Cast("int32", NP64)
        B: T.let[T.int32] = T.Cast("int32", B64)
        HQ: T.let[T.int32] = T.Cast("int32", HQ64)
        HK: T.let[T.int32] = T.Cast("int32", HK64)
        M: T.let[T.int32] = T.Cast("int32", M64)
        docs: T.let[T.int32] = T.Cast("int32", ND64) - 1
        group: T.let[T.int32] = HQ // HK

        qc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(qc_map, q, dtype, D, B64, HQ64, N64, q0s, q1s, q2s, CHUNK)
        gc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(gc_map, do, dtype, D, B64, HQ64, N64, g0s, g1s, g2s, CHUNK)
        kc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(kc_map, k, dtype, D, B64, HK64, N64, k0s, k1s, k2s, ROWS)
        vc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_rows(vc_map, v, dtype, D, B64, HK64, N64, v0s, v1s, v2s, ROWS)
        stats_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode_stats(stats_map, stats, B64 * HQ64, NP64, CHUNK)

        # Statistics of the queries, and the sums of dQ start at zero.
        with T.attr({"tirx.device_entry": True}):
            bx = T.cta_id([(B * HQ * N + PREP_ROWS - 1) // PREP_ROWS])
            tx = T.thread_id([PREP_THREADS])
            row: T.int32 = T.min(bx * PREP_ROWS + tx // PREP_LANES, B * HQ * N - 1)
            part: T.int32 = tx % PREP_LANES
            bh: T.int32 = T.truncdiv(row, N)
            query: T.int32 = row - bh * N
            b: T.int32 = T.truncdiv(bh, HQ)
            h: T.int32 = bh - b * HQ
            ow = T.alloc_local((4,), "uint32")
            gw = T.alloc_local((4,), "uint32")
            delta = T.alloc_local((1,), "float32")
            if bx * PREP_THREADS + tx < 2:
                next_tile[tx] = 0
            T.ptx["ld.global.nc.v4.u32"](ow[0], ow[1], ow[2], ow[3], element(o.data, (o0s, o1s, o2s), b, h, query, part * 8))
            T.ptx["ld.global.nc.v4.u32"](gw[0], gw[1], gw[2], gw[3], element(do.data, (g0s, g1s, g2s), b, h, query, part * 8))
            zero_at: T.uint64 = T.reinterpret("uint64", dq_sum.data) + T.Cast("uint64", row) * T.uint64(D * 4) + T.Cast("uint64", part * 16)
            T.ptx["st.global.v4.f32"](zero_at, T.float32(0), T.float32(0), T.float32(0), T.float32(0))
            T.ptx["st.global.v4.f32"](zero_at + T.uint64(D * 2), T.float32(0), T.float32(0), T.float32(0), T.float32(0))
            delta[0] = T.float32(0)
            for i in T.unroll(4):
                delta[0] = dot2(ow[i], gw[i], delta[0], dtype)
            for i in T.unroll(PREP_LANES.bit_length() - 1):
                delta[0] = delta[0] + T.tvm_warp_shuffle_xor(0xFFFFFFFF, delta[0], 1 << i, 32, 32)
            if part == 0:
                lse2: T.float32 = lse[b, h, query] * T.float32(LOG2E)
                if lse2 < T.float32(-3e38):
                    # A query with no key: +inf makes its probabilities vanish.
                    stats[b, h, query // 2, query % 2] = T.float32(INF)
                    stats[b, h, query // 2, query % 2 + 2] = T.float32(0)
                else:
                    stats[b, h, query // 2, query % 2] = lse2
                    stats[b, h, query // 2, query % 2 + 2] = delta[0] - dlse[b, h, query]
                if query == N - 1:
                    if N % 2 == 1:
                        stats[b, h, query // 2, 1] = T.float32(INF)
                        stats[b, h, query // 2, 3] = T.float32(0)

        # Tiles of keys, chunks of queries. Scores are transposed (keys in rows), so that P leaves the accumulators in the layout
        # that the product with dO takes from registers.
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            bx = T.cta_id([workers])
            warp = T.warp_id([THREADS // 32])
            tx = T.thread_id([THREADS])
            arena = T.alloc_buffer((BYTES,), "uint8", scope="shared.dyn", align=1024)
            base: T.uint32 = T.cuda.cvta_generic_to_shared(arena.data)
            slots: T.int32 = N // ROWS + docs
            tiles: T.int32 = slots * B * HK
            lane: T.int32 = tx % 32
            stage: T.int32 = 0
            phase: T.int32 = 0
            tile_phase: T.int32 = 0
            at = T.meta_var(partial(address, base, AT))

            if tx == 0:
                init_rings(at, STAGES, 1, W)
            T.cuda.cta_sync()

            if warp < 4:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](PRODUCER_REGISTERS)
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
                chunks: T.int32 = 0

                @T.inline
                def segment():
                    # Chunks of queries from q_first on. That is even, because TMA traps on rows of stats (two queries are 16
                    # bytes) that do not start at 16 bytes.
                    T.ptx["ld.global.nc.v2.s32"](lo[0], hi[0], band_at + T.Cast("uint64", seg * 8))
                    q_first = (k0 + lo[0]) // 2 * 2
                    chunks = 0
                    if T.min(T.min(k0 + ROWS, end) - 1 + hi[0], end - 1) >= k0 + lo[0]:
                        chunks = (T.min(T.min(k0 + ROWS, end) - 1 + hi[0], end - 1) - q_first) // CHUNK + 1

                if warp == 1:
                    # The tile warp: draws tiles, hands them to the chunk warp, and loads what stays for the whole tile.
                    fetched = T.alloc_local((1,), "int32")
                    slot: T.int32 = 0
                    draw_tile(next_tile[1], lane, fetched)
                    fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    while fetched[0] < tiles:
                        locate_head(fetched[0], slots, B, HK, HEADS, slot, b, h)  # early keys have the most queries
                        draw_tile(next_tile[1], lane, fetched)
                        locate_rows(slot, ROWS, cu, docs, doc, begin, end, k0)
                        doc = table_row(doc, docs, M)
                        if k0 < end:
                            offer_tile(at, place, place_phase, lane, k0, begin, end, doc, b, h)
                            band_at = T.reinterpret("uint64", bands.data) + T.Cast("uint64", (doc * HQ + h * group) * 16)
                            total: T.int32 = 0
                            seg = 0
                            while seg < 2 * group:
                                segment()
                                total = total + chunks
                                seg = seg + 1
                            T.cuda.mbarrier_wait(at("tile_empty"), tile_phase ^ 1)
                            if lane == 0:
                                T.ptx["st.shared.v4.s32"](at("tile"), k0, begin, end, b * HK + h)
                                T.ptx["st.shared.s32"](at("tile") + T.uint32(16), total)
                                T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("tile_full"), T.uint32(2 * ROWS * D * 2))
                                T.ptx[LOAD](at("k"), T.address_of(kc_map), 0, k0, 0, h, b, at("tile_full"))
                                T.ptx[LOAD](at("v"), T.address_of(vc_map), 0, k0, 0, h, b, at("tile_full"))
                            tile_phase = tile_phase ^ 1
                        fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    offer_no_more(at, place, place_phase, 0, tile_phase, lane)
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
                                    T.cuda.mbarrier_wait(at("empty", stage, BARRIER_BYTES), phase ^ 1)
                                    if lane == 0:
                                        T.ptx["st.shared.v4.s32"](at("info", stage, INFO_BYTES), q_first + c * CHUNK, lo[0], hi[0], b * HQ + h * group + seg // 2)
                                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("full", stage, BARRIER_BYTES), T.uint32(2 * CHUNK * D * 2 + CHUNK * 8))
                                        T.ptx[LOAD](at("q", stage, CHUNK * D * 2), T.address_of(qc_map), 0, q_first + c * CHUNK, 0, h * group + seg // 2, b, at("full", stage, BARRIER_BYTES))
                                        T.ptx[LOAD_STATS](at("stats", stage, CHUNK * 8), T.address_of(stats_map), 2 * (q_first + c * CHUNK), b * HQ + h * group + seg // 2, at("full", stage, BARRIER_BYTES))
                                        T.ptx[LOAD](at("do", stage, CHUNK * D * 2), T.address_of(gc_map), 0, q_first + c * CHUNK, 0, h * group + seg // 2, b, at("full", stage, BARRIER_BYTES))
                                    stage = stage + 1
                                    if stage == STAGES:
                                        stage = 0
                                        phase = phase ^ 1
                                    c = c + 1
                                seg = seg + 1
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](REGISTERS)
                w: T.int32 = warp // 4 - 1
                strip: T.int32 = w * WARPGROUP_ROWS + warp % 4 * 16  # this warp's keys of the tile
                my_row: T.int32 = strip + lane // 4
                stats_lane: T.uint32 = T.Cast("uint32", lane % 4 * 16)
                s_acc = T.alloc_local((CHUNK // 2,), "float32")
                p_acc = T.alloc_local((CHUNK // 2,), "float32")
                own_acc = T.alloc_local((SPAN // 2,), "float32")
                sum_acc = T.meta_var(own_acc if D == 64 else p_acc)
                k_acc = T.alloc_local((D // 2,), "float32")
                v_acc = T.alloc_local((D // 2,), "float32")
                ps = T.alloc_local((CHUNK // 4,), "uint32")
                ds = T.alloc_local((CHUNK // 4,), "uint32")
                info = T.alloc_local((4,), "int32")
                tinfo = T.alloc_local((4,), "int32")
                steps = T.alloc_local((1,), "int32")
                stat = T.alloc_local((CHUNK // 4,), "float32")
                sector_col: T.int32 = lane % 2 * 8 + lane % 4 // 2 * 4
                turn = T.alloc_local((3 * D // 16,), "uint32")
                # Where stmatrix puts this lane's row of dS: a query, this warpgroup's 64 keys of it, swizzled by the query.
                frag_at: T.uint32 = at("ds", w * CHUNK + lane // 16 * 8 + lane % 8, ROW) + T.Cast("uint32", ((warp % 4 * 2 + lane // 8 % 2) ^ lane % 8) * 16)
                prev: T.int32 = 0
                left: T.int32 = 0
                flip: T.uint32 = T.uint32(0)
                running: T.int32 = 1
                scale2: T.float32 = scale * T.float32(LOG2E)

                @T.inline
                def issue_product(out, rows_region, region):
                    # scores^T = K Q^T or dP^T = V dO^T of this warpgroup's keys
                    mine: T.uint64 = T.uint64(K_MAJOR) + T.Cast("uint64", (at(rows_region) + T.Cast("uint32", w * (WARPGROUP_ROWS * ROW))) >> T.uint32(4))
                    start: T.uint64 = T.uint64(K_MAJOR) + T.Cast("uint64", at(region, stage, CHUNK * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(KS):
                        T.ptx[MMA_SCORE](*[out[i] for i in range(CHUNK // 2)],
                                         mine + T.uint64(kk // 4 * (ROWS * ROW // 16) + kk % 4 * 2),
                                         start + T.uint64(kk // 4 * (CHUNK * ROW // 16) + kk % 4 * 2), T.bool(kk > 0), 1, 1, 0, 0)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def issue_output(out, left_operand, region, which):
                    start: T.uint64 = T.uint64(descriptor(CHUNK * ROW)) + T.Cast("uint64", at(region, which, CHUNK * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(CHUNK // 16):
                        T.ptx[MMA_OUT](*[out[i] for i in range(D // 2)], *[left_operand[4 * kk + i] for i in range(4)],
                                       start + T.uint64(kk * (16 * ROW // 16)), T.bool(True), 1, 1, 1)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def issue_keys():
                    # dK = dS^T Q, with dS from shared memory: its registers are free for the next scores.
                    left_at: T.uint64 = T.uint64(descriptor(ROWS * ROW)) + T.Cast("uint64", (at("ds") + (flip ^ T.uint32(ROWS * CHUNK * 2)) + T.Cast("uint32", w * (WARPGROUP_ROWS * ROW))) >> T.uint32(4))
                    start: T.uint64 = T.uint64(descriptor(CHUNK * ROW)) + T.Cast("uint64", at("q", prev, CHUNK * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(CHUNK // 16):
                        T.ptx[MMA_OUT](*[k_acc[i] for i in range(D // 2)], left_at + T.uint64(kk * (16 * ROW // 16)),
                                       start + T.uint64(kk * (16 * ROW // 16)), T.bool(True), 1, 1, 1, 1)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def issue_sum():
                    # dQ = dS K: all keys of the tile, this warpgroup's columns.
                    left_at: T.uint64 = T.uint64(K_MAJOR) + T.Cast("uint64", (at("ds") + (flip ^ T.uint32(ROWS * CHUNK * 2))) >> T.uint32(4))
                    start: T.uint64 = T.uint64(descriptor(ROWS * ROW)) + T.Cast("uint64", (at("k") + T.Cast("uint32", w * SLICE)) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(ROWS // 16):
                        T.ptx[MMA_SUM](*[sum_acc[i] for i in range(SPAN // 2)], left_at + T.uint64(kk // 4 * (CHUNK * ROW // 16) + kk % 4 * 2),
                                       start + T.uint64(kk * (16 * ROW // 16)), T.bool(kk > 0), 1, 1, 0, 1)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def exchange():
                    # Both warpgroups have written dS, and nothing of the sums before is left in shared memory. Only numbers
                    # watch over this barrier and the one before the addition: without either, dQ was wrong and racecheck
                    # silent, for it knows nothing of what wgmma and bulk copies read.
                    if tx % 128 == 0:
                        T.ptx["cp.async.bulk.wait_group.read"](0)
                    T.ptx.bar.sync(T.uint32(SUM_BARRIER), T.uint32(128 * W))

                @T.inline
                def add_sum():
                    # In groups of 16 columns a lane has 2 and 2 of, which stand side by side in the sums; the groups
                    # of odd queries are swapped in pairs, for the banks.
                    T.ptx["ld.shared.v4.s32"](info[0], info[1], info[2], info[3], at("info", prev, INFO_BYTES))
                    odd: T.int32 = lane // 4 % 2
                    sum_row: T.uint32 = at("sum", w, CHUNK * SPAN * 4) + T.Cast("uint32", (warp % 4 * 16 + lane // 4) * (SPAN * 4) + odd * 64 + lane % 4 * 16)
                    sum_other: T.uint32 = sum_row - T.Cast("uint32", odd * 128)
                    for j in T.unroll(2):
                        for m in T.unroll(SPAN // 16):
                            T.ptx["st.shared.v4.f32"]((sum_row if m % 2 == 0 else sum_other) + T.uint32(j * 8 * SPAN * 4 + m * 64),
                                                      sum_acc[8 * m + 2 * j], sum_acc[8 * m + 2 * j + 1], sum_acc[8 * m + 4 + 2 * j], sum_acc[8 * m + 5 + 2 * j])
                    T.ptx.fence.proxy.async_.shared__cta()
                    T.ptx.bar.sync(T.Cast("uint32", SUM_BARRIER + 1 + w), T.uint32(128))
                    if tx % 128 == 0:
                        T.ptx[REDUCE](T.reinterpret("uint64", dq_sum.data) + T.Cast("uint64", T.Cast("int64", info[3] * W + w) * T.Cast("int64", N) + T.Cast("int64", info[0])) * T.uint64(SPAN * 4),
                                      at("sum", w, CHUNK * SPAN * 4), T.Cast("uint32", T.min(tinfo[2] - info[0], CHUNK) * (SPAN * 4)))
                        T.ptx["cp.async.bulk.commit_group"]()

                @T.inline
                def step(follows):
                    T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
                    if follows:
                        exchange()
                        flip = flip ^ T.uint32(ROWS * CHUNK * 2)
                        issue_sum()
                    issue_product(s_acc, "k", "q")
                    if follows:
                        issue_keys()
                        T.ptx.wgmma.wait_group.sync.aligned(2)
                        hold(sum_acc, SPAN // 2)
                        add_sum()
                    issue_product(p_acc, "v", "do")
                    T.ptx["ld.shared.v4.s32"](info[0], info[1], info[2], info[3], at("info", stage, INFO_BYTES))
                    for n in T.unroll(CHUNK // 8):
                        T.ptx["ld.shared.v2.f32"](stat[2 * n], stat[2 * n + 1], at("stats", stage, CHUNK * 8) + stats_lane + T.uint32(64 * n))
                    T.ptx.wgmma.wait_group.sync.aligned(2 if follows else 1)
                    hold(s_acc, CHUNK // 2)
                    first_k: T.int32 = tinfo[0] + w * WARPGROUP_ROWS
                    inside: T.bool = T.And(T.And(info[0] - first_k - (WARPGROUP_ROWS - 1) >= info[1], info[0] + (CHUNK - 1) - first_k <= info[2]), info[0] + CHUNK <= tinfo[2])
                    if T.Not(inside):
                        k_row: T.int32 = tinfo[0] + my_row
                        d0: T.int32 = info[0] + lane % 4 * 2 - k_row - info[1]
                        lim0: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], tinfo[2] - 1 - k_row) - info[1] + 1, 0))
                        lim1: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], tinfo[2] - 9 - k_row) - info[1] + 1, 0))
                        for n in T.unroll(CHUNK // 8):
                            for j in T.unroll(2):
                                s_acc[4 * n + j] = T.if_then_else(T.Cast("uint32", d0 + (8 * n + j)) < lim0, s_acc[4 * n + j], T.float32(-INF))
                                s_acc[4 * n + 2 + j] = T.if_then_else(T.Cast("uint32", d0 - 8 + (8 * n + j)) < lim1, s_acc[4 * n + 2 + j], T.float32(-INF))
                    for n in T.unroll(CHUNK // 8):
                        for j in T.unroll(4):
                            T.ptx["ex2.approx.ftz.f32"](s_acc[4 * n + j], s_acc[4 * n + j] * scale2 - stat[2 * n + j % 2])
                        for j in T.unroll(2):
                            T.ptx[CVT](ps[2 * n + j], s_acc[4 * n + 2 * j + 1], s_acc[4 * n + 2 * j])
                    issue_output(v_acc, ps, "do", stage)
                    for n in T.unroll(DELTAS):
                        T.ptx["ld.shared.v2.f32"](stat[2 * n], stat[2 * n + 1], at("stats", stage, CHUNK * 8) + stats_lane + T.uint32(64 * n + 8))
                    T.ptx.wgmma.wait_group.sync.aligned(1)
                    hold(p_acc, CHUNK // 2)
                    if follows:
                        arrive(at("empty", prev, BARRIER_BYTES))
                    for n in T.unroll(CHUNK // 8):
                        if n > 0 and n % DELTAS == 0:
                            for i in T.unroll(DELTAS):
                                T.ptx["ld.shared.v2.f32"](stat[2 * i], stat[2 * i + 1], at("stats", stage, CHUNK * 8) + stats_lane + T.uint32(64 * (n + i) + 8))
                        for j in T.unroll(2):
                            T.ptx[CVT](ds[2 * n + j], s_acc[4 * n + 2 * j + 1] * (p_acc[4 * n + 2 * j + 1] - stat[2 * (n % DELTAS) + 1]),
                                       s_acc[4 * n + 2 * j] * (p_acc[4 * n + 2 * j] - stat[2 * (n % DELTAS)]))
                        if n % 2 == 1:
                            T.ptx["stmatrix.sync.aligned.m8n8.x4.trans.shared.b16"](
                                frag_at + flip + T.uint32((n - 1) * 8 * ROW),
                                ds[2 * n - 2], ds[2 * n - 1], ds[2 * n], ds[2 * n + 1])
                    T.ptx.fence.proxy.async_.shared__cta()
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    prev = stage
                    advance(stage, phase, STAGES)

                while running == 1:
                    T.cuda.mbarrier_wait(at("tile_full"), tile_phase)
                    tile_phase = tile_phase ^ 1
                    T.ptx["ld.shared.v4.s32"](tinfo[0], tinfo[1], tinfo[2], tinfo[3], at("tile"))
                    T.ptx["ld.shared.s32"](steps[0], at("tile") + T.uint32(16))
                    left = steps[0]
                    if tinfo[0] < 0:
                        running = 0
                    else:
                        for i in T.unroll(D // 2):
                            k_acc[i] = T.float32(0)
                            v_acc[i] = T.float32(0)
                        if left > 0:
                            step(False)
                            left = left - 1
                            while left > 0:
                                step(True)
                                left = left - 1
                            exchange()
                            flip = flip ^ T.uint32(ROWS * CHUNK * 2)
                            issue_keys()
                            issue_sum()
                            T.ptx.wgmma.wait_group.sync.aligned(0)
                            hold(sum_acc, SPAN // 2)
                            hold(k_acc, D // 2)
                            hold(v_acc, D // 2)
                            add_sum()
                            arrive(at("empty", prev, BARRIER_BYTES))
                        T.cuda.warp_sync()
                        arrive(at("tile_empty"))
                        b: T.int32 = T.truncdiv(tinfo[3], HK)
                        for j in T.unroll(2):
                            out_row: T.int32 = tinfo[0] + my_row + 8 * j
                            v_at: T.uint64 = element(dv.data, (dv0s, dv1s, dv2s), b, tinfo[3] - b * HK, out_row, sector_col)
                            store_rows(v_acc, D // 2, j, T.float32(1), v_at, out_row < tinfo[2], lane, turn, CVT)
                            k_at: T.uint64 = element(dk.data, (dk0s, dk1s, dk2s), b, tinfo[3] - b * HK, out_row, sector_col)
                            store_rows(k_acc, D // 2, j, scale, k_at, out_row < tinfo[2], lane, turn, CVT)
                if tx % 128 == 0:
                    T.ptx["cp.async.bulk.wait_group"](0)

        # dQ from its sums. A lane's four are columns 2t, 2t + 1, 2t + 8 and 2t + 9 of 16: a quad sorts them, and writes whole
        # 32-byte sectors.
        with T.attr({"tirx.device_entry": True}):
            bx = T.cta_id([(B * HQ * N * (D // 4) + PREP_THREADS * PIECES - 1) // (PREP_THREADS * PIECES)])
            tx = T.thread_id([PREP_THREADS])
            quarter: T.int32 = tx % 4
            sums = T.alloc_local((4 * PIECES,), "float32")
            words = T.alloc_local((2,), "uint32")
            sorted_words = T.alloc_local((4,), "uint32")
            for i in T.unroll(PIECES):
                piece: T.int32 = T.min((bx * PIECES + i) * PREP_THREADS + tx, B * HQ * N * (D // 4) - 4 + quarter)
                T.ptx["ld.global.nc.v4.f32"](sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3], T.reinterpret("uint64", dq_sum.data) + T.Cast("uint64", piece) * T.uint64(16))
            for i in T.unroll(PIECES):
                piece: T.int32 = T.min((bx * PIECES + i) * PREP_THREADS + tx, B * HQ * N * (D // 4) - 4 + quarter)
                row: T.int32 = piece // (SPAN // 4)
                part: T.int32 = piece % (SPAN // 4) // 4
                bhw: T.int32 = T.truncdiv(row, N)
                query: T.int32 = row - bhw * N
                bh: T.int32 = bhw // W
                b: T.int32 = T.truncdiv(bh, HQ)
                T.ptx[CVT](words[0], sums[4 * i + 1] * scale, sums[4 * i] * scale)
                T.ptx[CVT](words[1], sums[4 * i + 3] * scale, sums[4 * i + 2] * scale)
                for j in T.unroll(2):
                    sorted_words[j] = T.tvm_warp_shuffle(0xFFFFFFFF, words[0], quarter * 2 + j, 4, 32)
                    sorted_words[2 + j] = T.tvm_warp_shuffle(0xFFFFFFFF, words[1], quarter * 2 + j, 4, 32)
                T.ptx["st.global.v2.u32"](element(dq.data, (dq0s, dq1s, dq2s), b, bh - b * HQ, query, bhw % W * SPAN + (part ^ (query % 2)) * 16 + quarter * 4),
                                          T.if_then_else(quarter < 2, sorted_words[0], sorted_words[2]), T.if_then_else(quarter < 2, sorted_words[1], sorted_words[3]))
    # fmt: on
    return tvm.IRModule({"backward": backward})
