"""Banded attention backward for Hopper (sm_90a) in TIRx: TMA, wgmma, warp specialisation, two persistent passes.

:mod:`.hopper_backward_one_pass` is the other structure; it has the figures of both.

**Two passes instead of one.** A query tile's gradient takes three matrix products a block (scores, dP, dQ), a key
tile's four (scores, dP, dV, dK): seven where a single pass over key tiles needs five. In return nothing is
accumulated through global memory: no float32 dQ to clear, to add to and to convert (134 MB at
(4, 16, 4096, 128): 0.08 ms at the memory's speed), no dS exchanged through shared memory, no barrier between warpgroups. And the
gradients are bitwise equal from run to run: each is summed by one warpgroup in one order.

**Who does what.** In both passes a CTA stays on its multiprocessor and draws tiles from a counter. The *tile warp*
draws them and loads what a tile keeps (Q, dO, O or K, V); the *chunk warp* walks the tile's bands and fills a ring
with chunks of the other side (K, V or Q, dO), across tiles; two *consumer warpgroups* own 64 rows of the tile each.
What the producers know of a chunk (where it starts, its band, which warpgroups need it) travels beside the data, so
consumers keep no scheduling state: registers limit this kernel. A warpgroup hands back at once the chunks that only
the other needs: with bands of 256 distances it works on 5 chunks of 64 a band, where the tile of 128 rows has 6.

**Ranges.** TMA boxes may start at any row, so chunks start exactly at a band's edge (queries at an even one), and
only the first and last ones of a band are masked.

Measured on an H200 (bfloat16, spattention, medians, L2 cleared; ms): (4, 16, 4096, 128) 0.40, (1, 16, 16384, 128)
1.07, (4, 32, 4096, 128) 0.57, (4, 16, 4096, 64) 0.26. Tensor cores are active for 57% (dQ) and 61% (dK/dV) of the
cycles at the first size (ncu); the loops alone reach about 80% by warp samples, the rest goes to the starts and ends
of tiles. Handing K and V back before a tile's last dS, not after it, took off 1 to 2%. Running a tile's last dQ product
under the next tile's first scores did not pay: 0.41 and 0.59 instead of 0.40 and 0.57 at the first and third size, 1%
less at the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

WARPGROUP_ROWS = 64  # rows of one wgmma
SWIZZLE_ROW_BYTES = 128  # a shared-memory row of one 64-column plane, 128-byte swizzle
DTYPES = ("float16", "bfloat16")
BARRIER_BYTES = 8
# Of a chunk: first row, its band's lo and hi, a bit for each warpgroup that needs it.
INFO_BYTES = 16
# Of a tile: first row, its document's begin and end, batch and head; chunks for each warpgroup, chunks in all.
TILE_INFO_BYTES = 32
QUEUE = 2  # tiles that the tile warp may be ahead of the chunk warp
ONE_PASS_QUERIES = 64  # of a chunk, where both passes are one
SHARED_LIMIT = 232448  # bytes a CTA may use on sm_90


def _align(value: int, to: int) -> int:
    return (value + to - 1) // to * to


class _Arena:
    """Byte offsets into the one dynamic shared-memory buffer of a kernel."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int, align: int = 128) -> int:
        offset = _align(self.size, align)
        self.size = offset + count
        return offset


def dq_shared_bytes(decisions: Mapping[str, int], head_dim: int) -> int:
    """Dynamic shared memory of the dQ pass in bytes."""
    return _dq_arena(decisions, head_dim)[1]


def dkv_shared_bytes(decisions: Mapping[str, int], head_dim: int) -> int:
    """Dynamic shared memory of the dK/dV pass in bytes."""
    return _dkv_arena(decisions, head_dim)[1]


def one_pass_shared_bytes(decisions: Mapping[str, int], head_dim: int) -> int:
    """Dynamic shared memory of the one pass in bytes."""
    return one_pass_arena(decisions, head_dim)[1]


def _dq_arena(decisions: Mapping[str, int], head_dim: int) -> tuple[dict[str, int], int]:
    rows = WARPGROUP_ROWS * decisions["dq_warpgroups"]
    chunk = decisions["dq_keys"]
    stages = decisions["dq_stages"]
    arena = _Arena()
    at = {
        "q": arena.take(rows * head_dim * 2, 1024),
        "do": arena.take(rows * head_dim * 2, 1024),
        "o": arena.take(rows * head_dim * 2, 1024),
        "k": arena.take(stages * chunk * head_dim * 2, 1024),
        "v": arena.take(stages * chunk * head_dim * 2, 1024),
        "info": arena.take(stages * INFO_BYTES, 16),
        "tile": arena.take(TILE_INFO_BYTES, 16),
        "queue": arena.take(QUEUE * TILE_INFO_BYTES, 16),
        "full": arena.take(stages * BARRIER_BYTES, 8),
        "empty": arena.take(stages * BARRIER_BYTES, 8),
        "tile_full": arena.take(BARRIER_BYTES, 8),
        "tile_empty": arena.take(BARRIER_BYTES, 8),
        "queue_full": arena.take(QUEUE * BARRIER_BYTES, 8),
        "queue_empty": arena.take(QUEUE * BARRIER_BYTES, 8),
    }
    return at, arena.size


def _dkv_arena(decisions: Mapping[str, int], head_dim: int) -> tuple[dict[str, int], int]:
    rows = WARPGROUP_ROWS * decisions["dkv_warpgroups"]
    chunk = decisions["dkv_queries"]
    stages = decisions["dkv_stages"]
    buffers = decisions["dkv_buffers"]
    arena = _Arena()
    at = {
        "k": arena.take(buffers * rows * head_dim * 2, 1024),
        "v": arena.take(buffers * rows * head_dim * 2, 1024),
        "q": arena.take(stages * chunk * head_dim * 2, 1024),
        "do": arena.take(stages * chunk * head_dim * 2, 1024),
        "stats": arena.take(stages * chunk * 8, 128),
        "info": arena.take(stages * INFO_BYTES, 16),
        "tile": arena.take(buffers * TILE_INFO_BYTES, 16),
        "queue": arena.take(QUEUE * TILE_INFO_BYTES, 16),
        "full": arena.take(stages * BARRIER_BYTES, 8),
        "empty": arena.take(stages * BARRIER_BYTES, 8),
        "tile_full": arena.take(buffers * BARRIER_BYTES, 8),
        "tile_empty": arena.take(buffers * BARRIER_BYTES, 8),
        "queue_full": arena.take(QUEUE * BARRIER_BYTES, 8),
        "queue_empty": arena.take(QUEUE * BARRIER_BYTES, 8),
    }
    return at, arena.size


def one_pass_arena(decisions: Mapping[str, int], head_dim: int) -> tuple[dict[str, int], int]:
    """Byte offsets of the one pass in shared memory, and the bytes in all."""
    rows = WARPGROUP_ROWS * decisions["dkv_warpgroups"]
    chunk = ONE_PASS_QUERIES
    stages = decisions["dkv_stages"]
    arena = _Arena()
    at = {
        "k": arena.take(rows * head_dim * 2, 1024),
        "v": arena.take(rows * head_dim * 2, 1024),
        "q": arena.take(stages * chunk * head_dim * 2, 1024),
        "do": arena.take(stages * chunk * head_dim * 2, 1024),
        "ds": arena.take(2 * rows * chunk * 2, 1024),
        "sum": arena.take(chunk * head_dim * 4, 1024),
        "stats": arena.take(stages * chunk * 8, 128),
        "info": arena.take(stages * INFO_BYTES, 16),
        "tile": arena.take(TILE_INFO_BYTES, 16),
        "queue": arena.take(QUEUE * TILE_INFO_BYTES, 16),
        "full": arena.take(stages * BARRIER_BYTES, 8),
        "empty": arena.take(stages * BARRIER_BYTES, 8),
        "tile_full": arena.take(BARRIER_BYTES, 8),
        "tile_empty": arena.take(BARRIER_BYTES, 8),
        "queue_full": arena.take(QUEUE * BARRIER_BYTES, 8),
        "queue_empty": arena.take(QUEUE * BARRIER_BYTES, 8),
    }
    return at, arena.size


def build_hopper_backward(decisions: Mapping[str, int], head_dim: int, dtype: str) -> Any:
    """The backward of banded attention as one function ``backward`` that launches three kernels.

    Exported: ``backward(q, k, v, o, lse, do, dlse, bands, cu_seqlens, dq, dk, dv, stats, next_tile, [dq_sum,] scale,
    workers)``. Batch, heads, length, strides, layout and documents are data of the call. Nothing synchronises; nothing is
    allocated.

    ============== ======================= ============ ==============================================================
    argument       shape                   dtype        meaning
    ============== ======================= ============ ==============================================================
    q, o, do, dq   (B, Hq, N, D)           `dtype`      any strides with a contiguous last dimension
    k, v, dk, dv   (B, Hkv, N, D)          `dtype`      likewise; dk and dv are summed over the group in registers
    lse, dlse      (B, Hq, N)              float32      contiguous; natural logarithm, -inf for a query with no key
    bands          (M, Hq, 4)              int32        near_lo, near_hi, far_lo, far_hi of document m, or of all (M = 1)
    cu_seqlens     (documents + 1,)        int32        first token of each document, and N
    stats          (B, Hq, ceil(N / 2), 4) float32      workspace, written before it is read: of two queries, lse in base
                                                        2 twice, then delta = rowsum(do * o) - dlse twice
    next_tile      (2,)                    int32        workspace: the tile counters, cleared by the first kernel
    dq_sum         (B, Hq, N, D)           float32      only for ``one_pass``; contiguous workspace, written before it is
                                                        read
    scale          scalar                  float32      factor of the scores
    workers        scalar                  int32        CTAs of each pass: the multiprocessors of the device
    ============== ======================= ============ ==============================================================

    B, Hq, Hkv and N are at least 1. Inputs must suit TMA: addresses and the strides of dimensions longer than 1 are
    multiples of 16 bytes (gradients: 8). Offsets are 64-bit. Gradients of two passes are bitwise reproducible.

    Parameters
    ----------
    decisions : mapping of str to int
        ``one_pass`` (1: dQ is added up beside dK and dV, and of the others only those of ``dkv_`` count).
        ``dq_`` and ``dkv_`` each: ``warpgroups`` (consumers of 64 rows), ``stages`` (chunks in the ring), ``heads``
        (whose tiles are drawn together), ``registers`` and ``producer_registers`` (a thread); ``dq_keys`` and
        ``dkv_queries`` (rows of a chunk, a multiple of 16); ``dkv_buffers`` (tiles of K and V in shared memory).
    head_dim : int
        D: 64 or 128.
    dtype : str
        ``"float16"`` or ``"bfloat16"``.

    Returns
    -------
    tvm.IRModule
        For ``tvm.compile(..., tir_pipeline="tirx")`` with an sm_90a target.

    Raises
    ------
    ValueError
        For another head dim or dtype, or when a pass needs more shared memory than a CTA has.
    """
    if head_dim not in (64, 128):
        raise ValueError(f"head_dim must be 64 or 128, got {head_dim}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if decisions["one_pass"]:
        passes = {"one": one_pass_shared_bytes(decisions, head_dim)}
    else:
        passes = {
            "dQ": dq_shared_bytes(decisions, head_dim),
            "dK/dV": dkv_shared_bytes(decisions, head_dim),
        }
    for name, needed in passes.items():
        if needed > SHARED_LIMIT:
            raise ValueError(
                f"the {name} pass needs {needed} bytes of shared memory, a CTA has {SHARED_LIMIT}: fewer stages"
            )
    if decisions["one_pass"]:
        from spattn_tvm.kernels.hopper_backward_one_pass import build_one_pass

        return build_one_pass(decisions, head_dim, dtype)
    return _build_two_passes(decisions, head_dim, dtype)


def _build_two_passes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> Any:
    import tvm
    from tvm.script import tirx as T

    from spattn_tvm.kernels.hopper_backward_parts import (
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
                        if M == 1:
                            doc = 0
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
                        if M == 1:
                            doc = 0
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
