"""Banded attention backward for Hopper (sm_90a): TMA, wgmma and warp specialisation in TIRx.

Two passes instead of one. The gradient of a query tile needs three matrix products per block (scores, dP, dQ), those of a
key tile four (scores, dP, dV, dK): seven where a single pass needs five. In return nothing is accumulated through global
memory: no float32 dQ buffer to clear, to add to atomically and to convert, no exchange of dS through shared memory, no
barrier between the consumer warpgroups, and gradients that are bitwise equal from run to run.

In both passes a persistent CTA has one producer warp, which walks the tiles and the chunks of their bands, and consumer
warpgroups that own 64 rows each. The producer writes what it found (where a chunk starts, which band it belongs to, which
warpgroups need it) next to the data, so consumers hold no scheduling state: registers are what limits this kernel.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

WARPGROUP_ROWS = 64  # rows of one wgmma
SWIZZLE_ROW_BYTES = 128  # a shared-memory row of one 64-column plane, 128-byte swizzle
BARRIER_BYTES = 8
INFO_BYTES = 16  # int32 x 4 that travel with a chunk
TILE_INFO_BYTES = 32  # int32 x 8 that travel with a tile
QUEUE = 2  # tiles that the tile warp may be ahead of the chunk warp
SHARED_LIMIT = 232448  # bytes a CTA may use on sm_90

_DOT_SOURCE = {
    "bfloat16": """
__device__ __forceinline__ float spattn_dot2(unsigned int a, unsigned int b, float sum) {
  sum = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
  return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), sum);
}
""",
    "float16": """
__device__ __forceinline__ float spattn_dot2(unsigned int a, unsigned int b, float sum) {
  float2 x = __half22float2(*reinterpret_cast<__half2*>(&a));
  float2 y = __half22float2(*reinterpret_cast<__half2*>(&b));
  return fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
}
""",
}


_PIN_SOURCE = """
__device__ __forceinline__ void spattn_pin(float p) {
  asm volatile("{\\n.reg .pred q;\\nspattn_again:\\nsetp.lt.f32 q, %0, 0f00000000;\\n@q nanosleep.u32 32;\\n@q bra spattn_again;\\n}" ::"f"(p) : "memory");
}
"""

_LOAD_SHARED_SOURCE = """
__device__ __forceinline__ int spattn_load_shared(unsigned int at) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
  return value;
}
"""

_BALLOT_SOURCE = """
__device__ __forceinline__ unsigned int spattn_ballot(int p) { return __ballot_sync(0xffffffffu, p); }
"""


def _hold_source(count: int) -> str:
    operands = ", ".join(f'"+f"(r[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void spattn_hold{count}(float* r) {{
  asm volatile("" : {operands} :: "memory");
}}
"""


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


def dq_shared_bytes(decisions: dict[str, int], head_dim: int) -> int:
    """Dynamic shared memory of the dQ pass in bytes."""
    return _dq_arena(decisions, head_dim)[1]


def dkv_shared_bytes(decisions: dict[str, int], head_dim: int) -> int:
    """Dynamic shared memory of the dK/dV pass in bytes."""
    return _dkv_arena(decisions, head_dim)[1]


def _dq_arena(decisions: dict[str, int], head_dim: int) -> tuple[dict[str, int], int]:
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


def _dkv_arena(decisions: dict[str, int], head_dim: int) -> tuple[dict[str, int], int]:
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


def build_hopper_backward(decisions: dict[str, int], head_dim: int, dtype: str) -> Any:
    """TODO docstring."""
    import tvm
    from tvm.script import tirx as T

    D = head_dim
    PLANES = D // 64
    KS = D // 16  # k16 steps over the head dimension
    ROW = SWIZZLE_ROW_BYTES
    BF = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    LOG2E = math.log2(math.e)
    INF = float("inf")

    # dQ pass
    A_W = decisions["dq_warpgroups"]
    A_ROWS = WARPGROUP_ROWS * A_W
    A_KEYS = decisions["dq_keys"]
    A_STAGES = decisions["dq_stages"]
    A_AT, A_BYTES = _dq_arena(decisions, D)
    A_THREADS = 128 * (A_W + 1)
    # dK/dV pass
    C_W = decisions["dkv_warpgroups"]
    C_ROWS = WARPGROUP_ROWS * C_W
    C_QUERIES = decisions["dkv_queries"]
    C_STAGES = decisions["dkv_stages"]
    C_BUFFERS = decisions["dkv_buffers"]
    C_AT, C_BYTES = _dkv_arena(decisions, D)
    C_THREADS = 128 * (C_W + 1)
    A_CONSUMER_REGS, A_PRODUCER_REGS = decisions["dq_registers"], decisions["dq_producer_registers"]
    A_HEADS, C_HEADS = decisions["dq_heads"], decisions["dkv_heads"]
    C_CONSUMER_REGS, C_PRODUCER_REGS = decisions["dkv_registers"], decisions["dkv_producer_registers"]

    RESET_THREADS = 128

    CVT = f"cvt.rn.{BF}x2.f32"
    LOAD = "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
    LOAD_STATS = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    MMA_A_SCORE = f"wgmma.mma_async.sync.aligned.m64n{A_KEYS}k16.f32.{BF}.{BF}"
    MMA_C_SCORE = f"wgmma.mma_async.sync.aligned.m64n{C_QUERIES}k16.f32.{BF}.{BF}"
    MMA_OUT = f"wgmma.mma_async.sync.aligned.m64n{D}k16.f32.{BF}.{BF}"

    def desc_const(plane_bytes: int) -> int:
        """Descriptor bits besides the address: 128-byte swizzle, 1024 bytes between groups of 8 rows."""
        return (1 << 62) | (64 << 32) | ((plane_bytes >> 4) << 16)

    K_MAJOR = desc_const(16)

    def address(base: Any, offsets: dict[str, int], name: str, index: Any = None, pitch: int = 0) -> Any:
        """Shared-memory address of element `index` (`pitch` bytes apart) of the region `name`."""
        start = base + T.uint32(offsets[name])
        return start if index is None else start + T.Cast("uint32", index) * T.uint32(pitch)

    def element(start: Any, strides: tuple[Any, Any, Any], b: Any, h: Any, row: Any, col: Any) -> Any:
        """Global address of one element of a strided (B, H, N, D) tensor, in 64-bit arithmetic."""
        offset = sum(T.Cast("int64", i) * s for i, s in zip((b, h, row), strides, strict=True)) + T.Cast("int64", col)
        return T.reinterpret("uint64", start) + T.Cast("uint64", offset * 2)

    def load_shared(at: Any) -> Any:
        """An int32 in shared memory."""
        return T.cuda.func_call("spattn_load_shared", at, source_code=_LOAD_SHARED_SOURCE, return_type="int32")

    def ballot(condition: Any) -> Any:
        """Bit i of the result says whether the condition holds in lane i."""
        return T.cuda.func_call("spattn_ballot", T.Cast("int32", condition), source_code=_BALLOT_SOURCE, return_type="uint32")

    def pin(probability: Any) -> Any:
        """A branch never taken: without it ptxas moves the wait for the next product above the exponentials it should hide."""
        return T.cuda.func_call("spattn_pin", probability, source_code=_PIN_SOURCE)

    def hold(accumulator: Any, count: int) -> Any:
        """Ties accumulator registers to this place: plain arithmetic on them must not move above the wait before it,
        or ptxas sees an accumulator read in flight and serializes every wgmma of the kernel (C7514)."""
        return T.cuda.func_call(f"spattn_hold{count}", accumulator.data, source_code=_hold_source(count))

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


        @T.inline
        def encode(tmap, buffer, heads, s0, s1, s2, rows):
            # A stride that no index ever multiplies may be anything in torch; the encoder wants multiples of 16 bytes.
            T.call_packed("runtime.cuTensorMapEncodeTiled", tmap, dtype, 5, buffer.data, 64, N64, PLANES, heads, B64,
                          T.if_then_else(N64 == 1, T.int64(2 * D), s2 * 2), 128,
                          T.if_then_else(heads == 1, T.int64(2 * D), s1 * 2), T.if_then_else(B64 == 1, T.int64(2 * D), s0 * 2),
                          64, rows, PLANES, 1, 1, 1, 1, 1, 1, 1, 0, 3, 2, 0)

        qa_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode(qa_map, q, HQ64, q0s, q1s, q2s, A_ROWS)
        oa_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode(oa_map, o, HQ64, o0s, o1s, o2s, A_ROWS)
        ga_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode(ga_map, do, HQ64, g0s, g1s, g2s, A_ROWS)
        ka_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode(ka_map, k, HK64, k0s, k1s, k2s, A_KEYS)
        va_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode(va_map, v, HK64, v0s, v1s, v2s, A_KEYS)
        qc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode(qc_map, q, HQ64, q0s, q1s, q2s, C_QUERIES)
        gc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode(gc_map, do, HQ64, g0s, g1s, g2s, C_QUERIES)
        kc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode(kc_map, k, HK64, k0s, k1s, k2s, C_ROWS)
        vc_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        encode(vc_map, v, HK64, v0s, v1s, v2s, C_ROWS)
        stats_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.call_packed("runtime.cuTensorMapEncodeTiled", stats_map, "float32", 2, stats.data, NP64 * 4, B64 * HQ64, NP64 * 16,
                      2 * C_QUERIES, 1, 1, 1, 0, 0, 2, 0)

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

        # dQ
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            bx = T.cta_id([workers])
            warp = T.warp_id([A_THREADS // 32])
            tx = T.thread_id([A_THREADS])
            arena = T.alloc_buffer((A_BYTES,), "uint8", scope="shared.dyn", align=1024)
            base: T.uint32 = T.cuda.cvta_generic_to_shared(arena.data)
            slots: T.int32 = N // A_ROWS + docs
            tiles: T.int32 = slots * B * HQ
            lane: T.int32 = tx % 32
            stage: T.int32 = 0
            phase: T.int32 = 0
            tile_phase: T.int32 = 0

            at = T.meta_var(partial(address, base, A_AT))

            if tx == 0:
                for s in T.unroll(A_STAGES):
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(A_AT["full"] + s * BARRIER_BYTES), T.uint32(1))
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(A_AT["empty"] + s * BARRIER_BYTES), T.uint32(4 * A_W))
                T.ptx.mbarrier.init.shared.b64(base + T.uint32(A_AT["tile_full"]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(base + T.uint32(A_AT["tile_empty"]), T.uint32(4 * A_W))
                for s in T.unroll(QUEUE):
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(A_AT["queue_full"] + s * BARRIER_BYTES), T.uint32(1))
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(A_AT["queue_empty"] + s * BARRIER_BYTES), T.uint32(1))
                T.ptx.fence.mbarrier_init.release.cluster()
            T.cuda.cta_sync()

            if warp < 4:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](A_PRODUCER_REGS)
                place: T.int32 = 0
                place_phase: T.int32 = 0
                seg: T.int32 = 0
                lo = T.alloc_local((1,), "int32")
                hi = T.alloc_local((1,), "int32")
                q0: T.int32 = 0
                begin: T.int32 = 0
                end: T.int32 = 0
                b: T.int32 = 0
                h: T.int32 = 0
                band_at: T.uint64 = T.uint64(0)
                k_first: T.int32 = 0
                c_first: T.int32 = 0
                c_last: T.int32 = 0
                chunks: T.int32 = 0

                @T.inline
                def next_place():
                    place = place + 1
                    if place == QUEUE:
                        place = 0
                        place_phase = place_phase ^ 1

                @T.inline
                def segment():
                    # Chunks of keys from k_first on that the tile needs from one band, and those of lane w's warpgroup among
                    # them: the producers have too few registers to keep a copy for each warpgroup.
                    T.ptx["ld.global.nc.v2.s32"](lo[0], hi[0], band_at + T.Cast("uint64", seg * 8))
                    mine: T.int32 = q0 + lane * WARPGROUP_ROWS
                    mine_last: T.int32 = T.min(mine + WARPGROUP_ROWS, end) - 1
                    k_first = T.max(q0 - hi[0], begin)
                    chunks = T.max(T.min(q0 + A_ROWS, end) - 1 - lo[0] - k_first + A_KEYS, 0) // A_KEYS
                    c_first = 1
                    c_last = 0
                    if lane < A_W:
                        if mine <= mine_last:
                            if mine_last - lo[0] >= T.max(mine - hi[0], begin):
                                c_first = (T.max(mine - hi[0], begin) - k_first) // A_KEYS
                                c_last = (mine_last - lo[0] - k_first) // A_KEYS

                if warp == 1:
                    # The tile warp: draws tiles, hands them to the chunk warp, and loads what stays for the whole tile.
                    fetched = T.alloc_local((1,), "int32")
                    T.ptx["atom.global.add.s32"](fetched[0], T.address_of(next_tile[0]), T.if_then_else(lane == 0, 1, 0))
                    fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    while fetched[0] < tiles:
                        # A few heads at a time, so that what their tiles share stays in the L2; of those the late queries,
                        # which have the most keys, first.
                        pack: T.int32 = T.truncdiv(fetched[0], slots * A_HEADS)
                        packed: T.int32 = T.min(B * HQ - pack * A_HEADS, A_HEADS)
                        slot: T.int32 = T.truncdiv(fetched[0] - pack * (slots * A_HEADS), packed)
                        h = fetched[0] - pack * (slots * A_HEADS) - slot * packed + pack * A_HEADS
                        b = h - T.truncdiv(h, B) * B
                        h = T.truncdiv(h, B)
                        slot = slots - 1 - slot
                        T.ptx["atom.global.add.s32"](fetched[0], T.address_of(next_tile[0]), T.if_then_else(lane == 0, 1, 0))
                        doc: T.int32 = 0
                        doc_hi: T.int32 = docs - 1
                        while doc < doc_hi:
                            mid: T.int32 = (doc + doc_hi + 1) // 2
                            if cu[mid] // A_ROWS + mid <= slot:
                                doc = mid
                            else:
                                doc_hi = mid - 1
                        begin = cu[doc]
                        end = cu[doc + 1]
                        q0 = begin + (slot - (begin // A_ROWS + doc)) * A_ROWS
                        if M == 1:
                            doc = 0
                        if q0 < end:
                            T.cuda.mbarrier_wait(at("queue_empty", place, BARRIER_BYTES), place_phase ^ 1)
                            if lane == 0:
                                T.ptx["st.shared.v4.s32"](at("queue", place, TILE_INFO_BYTES), q0, begin, end, doc)
                                T.ptx["st.shared.v2.s32"](at("queue", place, TILE_INFO_BYTES) + T.uint32(16), b, h)
                                T.ptx.mbarrier.arrive.shared.b64(at("queue_full", place, BARRIER_BYTES))
                            next_place()
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
                            if lane < A_W:
                                T.ptx["st.shared.s32"](at("tile", lane, 4) + T.uint32(16), count)
                            T.cuda.warp_sync()
                            if lane == 0:
                                T.ptx["st.shared.v4.s32"](at("tile"), q0, begin, end, b * HQ + h)
                                T.ptx["st.shared.s32"](at("tile") + T.uint32(16 + 4 * A_W), total)
                                T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("tile_full"), T.uint32(3 * A_ROWS * D * 2))
                                T.ptx[LOAD](at("q"), T.address_of(qa_map), 0, q0, 0, h, b, at("tile_full"))
                                T.ptx[LOAD](at("do"), T.address_of(ga_map), 0, q0, 0, h, b, at("tile_full"))
                                T.ptx[LOAD](at("o"), T.address_of(oa_map), 0, q0, 0, h, b, at("tile_full"))
                        fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    T.cuda.mbarrier_wait(at("queue_empty", place, BARRIER_BYTES), place_phase ^ 1)
                    if lane == 0:
                        T.ptx["st.shared.s32"](at("queue", place, TILE_INFO_BYTES), -1)
                        T.ptx.mbarrier.arrive.shared.b64(at("queue_full", place, BARRIER_BYTES))
                    T.cuda.mbarrier_wait(at("tile_empty"), tile_phase ^ 1)
                    if lane == 0:
                        T.ptx["st.shared.v4.s32"](at("tile"), -1, 0, 0, 0)
                        T.ptx.mbarrier.arrive.shared.b64(at("tile_full"))
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
                            begin = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(4))
                            end = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(8))
                            doc: T.int32 = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(12))
                            b = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(16))
                            h = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(20))
                            T.cuda.warp_sync()
                            if lane == 0:
                                T.ptx.mbarrier.arrive.shared.b64(at("queue_empty", place, BARRIER_BYTES))
                            next_place()
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
                                        T.ptx["st.shared.v4.s32"](at("info", stage, INFO_BYTES), k_first + c * A_KEYS, lo[0], hi[0], T.Cast("int32", needed))
                                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("full", stage, BARRIER_BYTES), T.uint32(2 * A_KEYS * D * 2))
                                        T.ptx[LOAD](at("k", stage, A_KEYS * D * 2), T.address_of(ka_map), 0, k_first + c * A_KEYS, 0, hk, b, at("full", stage, BARRIER_BYTES))
                                        T.ptx[LOAD](at("v", stage, A_KEYS * D * 2), T.address_of(va_map), 0, k_first + c * A_KEYS, 0, hk, b, at("full", stage, BARRIER_BYTES))
                                    stage = stage + 1
                                    if stage == A_STAGES:
                                        stage = 0
                                        phase = phase ^ 1
                                    c = c + 1
                                seg = seg + 1
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](A_CONSUMER_REGS)
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
                s_acc = T.alloc_local((A_KEYS // 2,), "float32")
                p_acc = T.alloc_local((A_KEYS // 2,), "float32")
                acc = T.alloc_local((D // 2,), "float32")
                ds = T.alloc_local((A_KEYS // 4,), "uint32")
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
                def store_rows(values, j, factor, row_at, wanted):
                    # Neighbouring lanes swap halves of two 8-column blocks: a quad then writes whole 32-byte sectors.
                    for n in T.unroll(D // 16):
                        T.ptx[CVT](turn[3 * n], values[8 * n + 2 * j + 1] * factor, values[8 * n + 2 * j] * factor)
                        T.ptx[CVT](turn[3 * n + 1], values[8 * n + 4 + 2 * j + 1] * factor, values[8 * n + 4 + 2 * j] * factor)
                        turn[3 * n + 2] = T.tvm_warp_shuffle_xor(0xFFFFFFFF, T.if_then_else(lane % 2 == 0, turn[3 * n + 1], turn[3 * n]), 1, 32, 32)
                    if wanted:
                        for n in T.unroll(D // 16):
                            T.ptx["st.global.v2.u32"](row_at + T.uint64(32 * n), T.if_then_else(lane % 2 == 0, turn[3 * n], turn[3 * n + 2]), T.if_then_else(lane % 2 == 0, turn[3 * n + 2], turn[3 * n + 1]))

                @T.inline
                def release(which):
                    if lane == 0:
                        T.ptx.mbarrier.arrive.shared.b64(at("empty", which, BARRIER_BYTES))

                @T.inline
                def advance():
                    stage = stage + 1
                    if stage == A_STAGES:
                        stage = 0
                        phase = phase ^ 1

                @T.inline
                def look(limit):
                    # The next chunk that this warpgroup needs; chunks for others are handed back. While the output of a chunk
                    # is still to be issued its stage is taken, so the search gives up before it would wait for that stage.
                    found = 0
                    skipped: T.int32 = 0
                    searching: T.int32 = 1
                    while searching == 1:
                        T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
                        T.ptx["ld.shared.v4.s32"](info[0], info[1], info[2], info[3], at("info", stage, INFO_BYTES))
                        if ((info[3] >> w) & 1) == 1:
                            found = 1
                            searching = 0
                            left = left - 1
                        else:
                            if skipped == limit:
                                searching = 0
                            else:
                                release(stage)
                                advance()
                                left = left - 1
                                skipped = skipped + 1

                @T.inline
                def drain():
                    # The rest of the tile's chunks concern other warpgroups only.
                    while left > 0:
                        T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
                        release(stage)
                        advance()
                        left = left - 1

                @T.inline
                def issue_product(out, left_operand, region):
                    # scores = Q K^T or dP = dO V^T of this warpgroup's rows
                    start: T.uint64 = T.uint64(K_MAJOR) + T.Cast("uint64", at(region, stage, A_KEYS * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(KS):
                        T.ptx[MMA_A_SCORE](*[out[i] for i in range(A_KEYS // 2)], *[left_operand[4 * kk + i] for i in range(4)],
                                           start + T.uint64(kk // 4 * (A_KEYS * ROW // 16) + kk % 4 * 2), T.bool(kk > 0), 1, 1, 0)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def issue_output():
                    start: T.uint64 = T.uint64(desc_const(A_KEYS * ROW)) + T.Cast("uint64", at("k", prev, A_KEYS * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(A_KEYS // 16):
                        T.ptx[MMA_OUT](*[acc[i] for i in range(D // 2)], *[ds[4 * kk + i] for i in range(4)],
                                       start + T.uint64(kk * (16 * ROW // 16)), T.bool(True), 1, 1, 1)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def load_fragment(frag, start, region, kk):
                    T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                        *[frag[start + i] for i in range(4)],
                        at(region) + T.uint32(kk // 4 * A_ROWS * ROW) + frag_offset + (((frag_col + T.uint32(kk % 4 * 2)) ^ frag_swizzle) << T.uint32(4)))

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
                            delta[i % 2] = T.cuda.func_call("spattn_dot2", ds[i], gf[4 * kk + i], delta[i % 2], source_code=_DOT_SOURCE[dtype], return_type="float32")
                    T.cuda.warp_sync()
                    if lane == 0:
                        T.ptx.mbarrier.arrive.shared.b64(at("tile_empty"))
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
                    hold(s_acc, A_KEYS // 2)
                    first_q: T.int32 = tinfo[0] + w * WARPGROUP_ROWS
                    inside: T.bool = T.And(T.And(first_q - info[0] - (A_KEYS - 1) >= info[1], first_q + (WARPGROUP_ROWS - 1) - info[0] <= info[2]), info[0] >= tinfo[1])
                    if T.Not(inside):
                        q_row: T.int32 = tinfo[0] + my_row
                        d0: T.int32 = q_row - info[0] - lane % 4 * 2 - info[1]
                        lim0: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], q_row - tinfo[1]) - info[1] + 1, 0))
                        lim1: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], q_row + 8 - tinfo[1]) - info[1] + 1, 0))
                        for n in T.unroll(A_KEYS // 8):
                            for j in T.unroll(2):
                                s_acc[4 * n + j] = T.if_then_else(T.Cast("uint32", d0 - (8 * n + j)) < lim0, s_acc[4 * n + j], T.float32(-INF))
                                s_acc[4 * n + 2 + j] = T.if_then_else(T.Cast("uint32", d0 + 8 - (8 * n + j)) < lim1, s_acc[4 * n + 2 + j], T.float32(-INF))
                    for n in T.unroll(A_KEYS // 8):
                        for j in T.unroll(4):
                            T.ptx["ex2.approx.ftz.f32"](s_acc[4 * n + j], s_acc[4 * n + j] * scale2 - lse2[j // 2])
                    pin(s_acc[A_KEYS // 2 - 1])
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    hold(p_acc, A_KEYS // 2)
                    if follows:
                        release(prev)
                    for n in T.unroll(A_KEYS // 8):
                        for j in T.unroll(2):
                            T.ptx[CVT](ds[2 * n + j], s_acc[4 * n + 2 * j + 1] * (p_acc[4 * n + 2 * j + 1] - delta[j]),
                                       s_acc[4 * n + 2 * j] * (p_acc[4 * n + 2 * j] - delta[j]))
                    prev = stage
                    advance()

                while running == 1:
                    T.cuda.mbarrier_wait(at("tile_full"), tile_phase)
                    tile_phase = tile_phase ^ 1
                    T.ptx["ld.shared.v4.s32"](tinfo[0], tinfo[1], tinfo[2], tinfo[3], at("tile"))
                    T.ptx["ld.shared.s32"](steps[0], at("tile", w, 4) + T.uint32(16))
                    T.ptx["ld.shared.s32"](steps[1], at("tile") + T.uint32(16 + 4 * A_W))
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
                            look(1 << 30)
                            step(False)
                            todo = todo - 1
                            found = 0
                            if todo > 0:
                                look(A_STAGES - 2)
                            while found == 1:
                                step(True)
                                todo = todo - 1
                                found = 0
                                if todo > 0:
                                    look(A_STAGES - 2)
                            issue_output()
                            T.ptx.wgmma.wait_group.sync.aligned(0)
                            hold(acc, D // 2)
                            release(prev)
                        drain()
                        for j in T.unroll(2):
                            out_row: T.int32 = tinfo[0] + my_row + 8 * j
                            out_at: T.uint64 = element(dq.data, (dq0s, dq1s, dq2s), b, h, out_row, sector_col)
                            store_rows(acc, j, scale, out_at, out_row < tinfo[2])

        # dK and dV
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            bx = T.cta_id([workers])
            warp = T.warp_id([C_THREADS // 32])
            tx = T.thread_id([C_THREADS])
            arena = T.alloc_buffer((C_BYTES,), "uint8", scope="shared.dyn", align=1024)
            base: T.uint32 = T.cuda.cvta_generic_to_shared(arena.data)
            slots: T.int32 = N // C_ROWS + docs
            tiles: T.int32 = slots * B * HK
            lane: T.int32 = tx % 32
            stage: T.int32 = 0
            phase: T.int32 = 0
            slab: T.int32 = 0
            tile_phase: T.int32 = 0
            at = T.meta_var(partial(address, base, C_AT))

            if tx == 0:
                for s in T.unroll(C_STAGES):
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(C_AT["full"] + s * BARRIER_BYTES), T.uint32(1))
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(C_AT["empty"] + s * BARRIER_BYTES), T.uint32(4 * C_W))
                for s in T.unroll(C_BUFFERS):
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(C_AT["tile_full"] + s * BARRIER_BYTES), T.uint32(1))
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(C_AT["tile_empty"] + s * BARRIER_BYTES), T.uint32(4 * C_W))
                for s in T.unroll(QUEUE):
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(C_AT["queue_full"] + s * BARRIER_BYTES), T.uint32(1))
                    T.ptx.mbarrier.init.shared.b64(base + T.uint32(C_AT["queue_empty"] + s * BARRIER_BYTES), T.uint32(1))
                T.ptx.fence.mbarrier_init.release.cluster()
            T.cuda.cta_sync()

            if warp < 4:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](C_PRODUCER_REGS)
                place: T.int32 = 0
                place_phase: T.int32 = 0
                seg: T.int32 = 0
                lo = T.alloc_local((1,), "int32")
                hi = T.alloc_local((1,), "int32")
                k0: T.int32 = 0
                begin: T.int32 = 0
                end: T.int32 = 0
                b: T.int32 = 0
                h: T.int32 = 0
                band_at: T.uint64 = T.uint64(0)
                q_first: T.int32 = 0
                c_first: T.int32 = 0
                c_last: T.int32 = 0
                chunks: T.int32 = 0

                @T.inline
                def next_place():
                    place = place + 1
                    if place == QUEUE:
                        place = 0
                        place_phase = place_phase ^ 1

                @T.inline
                def segment():
                    # Chunks of queries from q_first on. That is even, because TMA traps on rows of stats (two queries are 16
                    # bytes) that do not start at 16 bytes.
                    T.ptx["ld.global.nc.v2.s32"](lo[0], hi[0], band_at + T.Cast("uint64", seg * 8))
                    mine: T.int32 = k0 + lane * WARPGROUP_ROWS
                    mine_last: T.int32 = T.min(mine + WARPGROUP_ROWS, end) - 1
                    q_first = (k0 + lo[0]) // 2 * 2
                    chunks = 0
                    if T.min(T.min(k0 + C_ROWS, end) - 1 + hi[0], end - 1) >= k0 + lo[0]:
                        chunks = (T.min(T.min(k0 + C_ROWS, end) - 1 + hi[0], end - 1) - q_first) // C_QUERIES + 1
                    c_first = 1
                    c_last = 0
                    if lane < C_W:
                        if mine <= mine_last:
                            if T.min(mine_last + hi[0], end - 1) >= mine + lo[0]:
                                c_first = (mine + lo[0] - q_first) // C_QUERIES
                                c_last = (T.min(mine_last + hi[0], end - 1) - q_first) // C_QUERIES

                if warp == 1:
                    # The tile warp: draws tiles, hands them to the chunk warp, and loads what stays for the whole tile.
                    fetched = T.alloc_local((1,), "int32")
                    T.ptx["atom.global.add.s32"](fetched[0], T.address_of(next_tile[1]), T.if_then_else(lane == 0, 1, 0))
                    fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    while fetched[0] < tiles:
                        # As above; the early keys have the most queries.
                        pack: T.int32 = T.truncdiv(fetched[0], slots * C_HEADS)
                        packed: T.int32 = T.min(B * HK - pack * C_HEADS, C_HEADS)
                        slot: T.int32 = T.truncdiv(fetched[0] - pack * (slots * C_HEADS), packed)
                        h = fetched[0] - pack * (slots * C_HEADS) - slot * packed + pack * C_HEADS
                        b = h - T.truncdiv(h, B) * B
                        h = T.truncdiv(h, B)
                        T.ptx["atom.global.add.s32"](fetched[0], T.address_of(next_tile[1]), T.if_then_else(lane == 0, 1, 0))
                        doc: T.int32 = 0
                        doc_hi: T.int32 = docs - 1
                        while doc < doc_hi:
                            mid: T.int32 = (doc + doc_hi + 1) // 2
                            if cu[mid] // C_ROWS + mid <= slot:
                                doc = mid
                            else:
                                doc_hi = mid - 1
                        begin = cu[doc]
                        end = cu[doc + 1]
                        k0 = begin + (slot - (begin // C_ROWS + doc)) * C_ROWS
                        if M == 1:
                            doc = 0
                        if k0 < end:
                            T.cuda.mbarrier_wait(at("queue_empty", place, BARRIER_BYTES), place_phase ^ 1)
                            if lane == 0:
                                T.ptx["st.shared.v4.s32"](at("queue", place, TILE_INFO_BYTES), k0, begin, end, doc)
                                T.ptx["st.shared.v2.s32"](at("queue", place, TILE_INFO_BYTES) + T.uint32(16), b, h)
                                T.ptx.mbarrier.arrive.shared.b64(at("queue_full", place, BARRIER_BYTES))
                            next_place()
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
                            if lane < C_W:
                                T.ptx["st.shared.s32"](at("tile", slab, TILE_INFO_BYTES) + T.Cast("uint32", 16 + 4 * lane), count)
                            T.cuda.warp_sync()
                            if lane == 0:
                                T.ptx["st.shared.v4.s32"](at("tile", slab, TILE_INFO_BYTES), k0, begin, end, b * HK + h)
                                T.ptx["st.shared.s32"](at("tile", slab, TILE_INFO_BYTES) + T.uint32(16 + 4 * C_W), total)
                                T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("tile_full", slab, BARRIER_BYTES), T.uint32(2 * C_ROWS * D * 2))
                                T.ptx[LOAD](at("k", slab, C_ROWS * D * 2), T.address_of(kc_map), 0, k0, 0, h, b, at("tile_full", slab, BARRIER_BYTES))
                                T.ptx[LOAD](at("v", slab, C_ROWS * D * 2), T.address_of(vc_map), 0, k0, 0, h, b, at("tile_full", slab, BARRIER_BYTES))
                            slab = slab + 1
                            if slab == C_BUFFERS:
                                slab = 0
                                tile_phase = tile_phase ^ 1
                        fetched[0] = T.tvm_warp_shuffle(0xFFFFFFFF, fetched[0], 0, 32, 32)
                    T.cuda.mbarrier_wait(at("queue_empty", place, BARRIER_BYTES), place_phase ^ 1)
                    if lane == 0:
                        T.ptx["st.shared.s32"](at("queue", place, TILE_INFO_BYTES), -1)
                        T.ptx.mbarrier.arrive.shared.b64(at("queue_full", place, BARRIER_BYTES))
                    T.cuda.mbarrier_wait(at("tile_empty", slab, BARRIER_BYTES), tile_phase ^ 1)
                    if lane == 0:
                        T.ptx["st.shared.v4.s32"](at("tile", slab, TILE_INFO_BYTES), -1, 0, 0, 0)
                        T.ptx.mbarrier.arrive.shared.b64(at("tile_full", slab, BARRIER_BYTES))
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
                            begin = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(4))
                            end = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(8))
                            doc: T.int32 = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(12))
                            b = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(16))
                            h = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(20))
                            T.cuda.warp_sync()
                            if lane == 0:
                                T.ptx.mbarrier.arrive.shared.b64(at("queue_empty", place, BARRIER_BYTES))
                            next_place()
                            band_at = T.reinterpret("uint64", bands.data) + T.Cast("uint64", (doc * HQ + h * group) * 16)
                            seg = 0
                            while seg < 2 * group:
                                segment()
                                c = 0
                                while c < chunks:
                                    needed: T.uint32 = ballot(T.And(c >= c_first, c <= c_last))
                                    T.cuda.mbarrier_wait(at("empty", stage, BARRIER_BYTES), phase ^ 1)
                                    if lane == 0:
                                        T.ptx["st.shared.v4.s32"](at("info", stage, INFO_BYTES), q_first + c * C_QUERIES, lo[0], hi[0], T.Cast("int32", needed))
                                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(at("full", stage, BARRIER_BYTES), T.uint32(2 * C_QUERIES * D * 2 + C_QUERIES * 8))
                                        T.ptx[LOAD](at("q", stage, C_QUERIES * D * 2), T.address_of(qc_map), 0, q_first + c * C_QUERIES, 0, h * group + seg // 2, b, at("full", stage, BARRIER_BYTES))
                                        T.ptx[LOAD_STATS](at("stats", stage, C_QUERIES * 8), T.address_of(stats_map), 2 * (q_first + c * C_QUERIES), b * HQ + h * group + seg // 2, at("full", stage, BARRIER_BYTES))
                                        T.ptx[LOAD](at("do", stage, C_QUERIES * D * 2), T.address_of(gc_map), 0, q_first + c * C_QUERIES, 0, h * group + seg // 2, b, at("full", stage, BARRIER_BYTES))
                                    stage = stage + 1
                                    if stage == C_STAGES:
                                        stage = 0
                                        phase = phase ^ 1
                                    c = c + 1
                                seg = seg + 1
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](C_CONSUMER_REGS)
                w: T.int32 = warp // 4 - 1
                strip: T.int32 = w * WARPGROUP_ROWS + warp % 4 * 16
                my_row: T.int32 = strip + lane // 4
                stats_lane: T.uint32 = T.Cast("uint32", lane % 4 * 16)
                s_acc = T.alloc_local((C_QUERIES // 2,), "float32")
                p_acc = T.alloc_local((C_QUERIES // 2,), "float32")
                k_acc = T.alloc_local((D // 2,), "float32")
                v_acc = T.alloc_local((D // 2,), "float32")
                ps = T.alloc_local((C_QUERIES // 4,), "uint32")
                ds = T.alloc_local((C_QUERIES // 4,), "uint32")
                info = T.alloc_local((4,), "int32")
                tinfo = T.alloc_local((4,), "int32")
                steps = T.alloc_local((2,), "int32")
                stat = T.alloc_local((C_QUERIES // 4,), "float32")
                sector_col: T.int32 = lane % 2 * 8 + lane % 4 // 2 * 4
                turn = T.alloc_local((3 * D // 16,), "uint32")
                prev: T.int32 = 0
                left: T.int32 = 0
                found: T.int32 = 0
                todo: T.int32 = 0
                running: T.int32 = 1
                scale2: T.float32 = scale * T.float32(LOG2E)

                @T.inline
                def store_rows(values, j, factor, row_at, wanted):
                    # Neighbouring lanes swap halves of two 8-column blocks: a quad then writes whole 32-byte sectors.
                    for n in T.unroll(D // 16):
                        T.ptx[CVT](turn[3 * n], values[8 * n + 2 * j + 1] * factor, values[8 * n + 2 * j] * factor)
                        T.ptx[CVT](turn[3 * n + 1], values[8 * n + 4 + 2 * j + 1] * factor, values[8 * n + 4 + 2 * j] * factor)
                        turn[3 * n + 2] = T.tvm_warp_shuffle_xor(0xFFFFFFFF, T.if_then_else(lane % 2 == 0, turn[3 * n + 1], turn[3 * n]), 1, 32, 32)
                    if wanted:
                        for n in T.unroll(D // 16):
                            T.ptx["st.global.v2.u32"](row_at + T.uint64(32 * n), T.if_then_else(lane % 2 == 0, turn[3 * n], turn[3 * n + 2]), T.if_then_else(lane % 2 == 0, turn[3 * n + 2], turn[3 * n + 1]))

                @T.inline
                def release(which):
                    if lane == 0:
                        T.ptx.mbarrier.arrive.shared.b64(at("empty", which, BARRIER_BYTES))

                @T.inline
                def advance():
                    stage = stage + 1
                    if stage == C_STAGES:
                        stage = 0
                        phase = phase ^ 1

                @T.inline
                def look(limit):
                    # The next chunk that this warpgroup needs; chunks for others are handed back. While the output of a chunk
                    # is still to be issued its stage is taken, so the search gives up before it would wait for that stage.
                    found = 0
                    skipped: T.int32 = 0
                    searching: T.int32 = 1
                    while searching == 1:
                        T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
                        T.ptx["ld.shared.v4.s32"](info[0], info[1], info[2], info[3], at("info", stage, INFO_BYTES))
                        if ((info[3] >> w) & 1) == 1:
                            found = 1
                            searching = 0
                            left = left - 1
                        else:
                            if skipped == limit:
                                searching = 0
                            else:
                                release(stage)
                                advance()
                                left = left - 1
                                skipped = skipped + 1

                @T.inline
                def drain():
                    # The rest of the tile's chunks concern other warpgroups only.
                    while left > 0:
                        T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
                        release(stage)
                        advance()
                        left = left - 1

                @T.inline
                def issue_product(out, rows_region, region):
                    # scores^T = K Q^T or dP^T = V dO^T of this warpgroup's keys
                    mine: T.uint64 = T.uint64(K_MAJOR) + T.Cast("uint64", (at(rows_region, slab, C_ROWS * D * 2) + T.Cast("uint32", w * (WARPGROUP_ROWS * ROW))) >> T.uint32(4))
                    start: T.uint64 = T.uint64(K_MAJOR) + T.Cast("uint64", at(region, stage, C_QUERIES * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(KS):
                        T.ptx[MMA_C_SCORE](*[out[i] for i in range(C_QUERIES // 2)],
                                           mine + T.uint64(kk // 4 * (C_ROWS * ROW // 16) + kk % 4 * 2),
                                           start + T.uint64(kk // 4 * (C_QUERIES * ROW // 16) + kk % 4 * 2), T.bool(kk > 0), 1, 1, 0, 0)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def issue_output(out, left_operand, region, which):
                    start: T.uint64 = T.uint64(desc_const(C_QUERIES * ROW)) + T.Cast("uint64", at(region, which, C_QUERIES * D * 2) >> T.uint32(4))
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(C_QUERIES // 16):
                        T.ptx[MMA_OUT](*[out[i] for i in range(D // 2)], *[left_operand[4 * kk + i] for i in range(4)],
                                       start + T.uint64(kk * (16 * ROW // 16)), T.bool(True), 1, 1, 1)
                    T.ptx.wgmma.commit_group.sync.aligned()

                @T.inline
                def step(follows):
                    # dP runs under the exponentials, dV under dS, and the dK of one chunk before the scores of the next.
                    if follows:
                        issue_output(k_acc, ds, "q", prev)
                    issue_product(s_acc, "k", "q")
                    if follows:
                        T.ptx.wgmma.wait_group.sync.aligned(1)
                        release(prev)
                    issue_product(p_acc, "v", "do")
                    for n in T.unroll(C_QUERIES // 8):
                        T.ptx["ld.shared.v2.f32"](stat[2 * n], stat[2 * n + 1], at("stats", stage, C_QUERIES * 8) + stats_lane + T.uint32(64 * n))
                    T.ptx.wgmma.wait_group.sync.aligned(1)
                    hold(s_acc, C_QUERIES // 2)
                    first_k: T.int32 = tinfo[0] + w * WARPGROUP_ROWS
                    inside: T.bool = T.And(T.And(info[0] - first_k - (WARPGROUP_ROWS - 1) >= info[1], info[0] + (C_QUERIES - 1) - first_k <= info[2]), info[0] + C_QUERIES <= tinfo[2])
                    if T.Not(inside):
                        k_row: T.int32 = tinfo[0] + my_row
                        d0: T.int32 = info[0] + lane % 4 * 2 - k_row - info[1]
                        lim0: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], tinfo[2] - 1 - k_row) - info[1] + 1, 0))
                        lim1: T.uint32 = T.Cast("uint32", T.max(T.min(info[2], tinfo[2] - 9 - k_row) - info[1] + 1, 0))
                        for n in T.unroll(C_QUERIES // 8):
                            for j in T.unroll(2):
                                s_acc[4 * n + j] = T.if_then_else(T.Cast("uint32", d0 + (8 * n + j)) < lim0, s_acc[4 * n + j], T.float32(-INF))
                                s_acc[4 * n + 2 + j] = T.if_then_else(T.Cast("uint32", d0 - 8 + (8 * n + j)) < lim1, s_acc[4 * n + 2 + j], T.float32(-INF))
                    for n in T.unroll(C_QUERIES // 8):
                        for j in T.unroll(4):
                            T.ptx["ex2.approx.ftz.f32"](s_acc[4 * n + j], s_acc[4 * n + j] * scale2 - stat[2 * n + j % 2])
                        for j in T.unroll(2):
                            T.ptx[CVT](ps[2 * n + j], s_acc[4 * n + 2 * j + 1], s_acc[4 * n + 2 * j])
                    issue_output(v_acc, ps, "do", stage)
                    for n in T.unroll(C_QUERIES // 8):
                        T.ptx["ld.shared.v2.f32"](stat[2 * n], stat[2 * n + 1], at("stats", stage, C_QUERIES * 8) + stats_lane + T.uint32(64 * n + 8))
                    T.ptx.wgmma.wait_group.sync.aligned(1)
                    hold(p_acc, C_QUERIES // 2)
                    for n in T.unroll(C_QUERIES // 8):
                        for j in T.unroll(2):
                            T.ptx[CVT](ds[2 * n + j], s_acc[4 * n + 2 * j + 1] * (p_acc[4 * n + 2 * j + 1] - stat[2 * n + 1]),
                                       s_acc[4 * n + 2 * j] * (p_acc[4 * n + 2 * j] - stat[2 * n]))
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    prev = stage
                    advance()

                @T.inline
                def release_tile():
                    T.cuda.warp_sync()
                    if lane == 0:
                        T.ptx.mbarrier.arrive.shared.b64(at("tile_empty", slab, BARRIER_BYTES))

                while running == 1:
                    T.cuda.mbarrier_wait(at("tile_full", slab, BARRIER_BYTES), tile_phase)
                    T.ptx["ld.shared.v4.s32"](tinfo[0], tinfo[1], tinfo[2], tinfo[3], at("tile", slab, TILE_INFO_BYTES))
                    T.ptx["ld.shared.s32"](steps[0], at("tile", slab, TILE_INFO_BYTES) + T.uint32(16) + T.Cast("uint32", w * 4))
                    T.ptx["ld.shared.s32"](steps[1], at("tile", slab, TILE_INFO_BYTES) + T.uint32(16 + 4 * C_W))
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
                            look(1 << 30)
                            step(False)
                            todo = todo - 1
                            found = 0
                            if todo > 0:
                                look(C_STAGES - 2)
                            while found == 1:
                                step(True)
                                todo = todo - 1
                                found = 0
                                if todo > 0:
                                    look(C_STAGES - 2)
                            if todo == 0:
                                # K and V are read: the next tile's may load under what is left of this one.
                                release_tile()
                            issue_output(k_acc, ds, "q", prev)
                            T.ptx.wgmma.wait_group.sync.aligned(0)
                            hold(k_acc, D // 2)
                            hold(v_acc, D // 2)
                            release(prev)
                        drain()
                        b: T.int32 = T.truncdiv(tinfo[3], HK)
                        for j in T.unroll(2):
                            out_row: T.int32 = tinfo[0] + my_row + 8 * j
                            v_at: T.uint64 = element(dv.data, (dv0s, dv1s, dv2s), b, tinfo[3] - b * HK, out_row, sector_col)
                            store_rows(v_acc, j, T.float32(1), v_at, out_row < tinfo[2])
                            k_at: T.uint64 = element(dk.data, (dk0s, dk1s, dk2s), b, tinfo[3] - b * HK, out_row, sector_col)
                            store_rows(k_acc, j, scale, k_at, out_row < tinfo[2])
                        slab = slab + 1
                        if slab == C_BUFFERS:
                            slab = 0
                            tile_phase = tile_phase ^ 1
    # fmt: on
    return tvm.IRModule({"backward": backward})
