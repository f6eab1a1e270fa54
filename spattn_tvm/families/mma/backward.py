"""Banded attention backward with ``mma.sync``, ``ldmatrix`` and ``cp.async``, for any NVIDIA GPU from sm_80 on.

**One shape of work for two passes.** A tile keeps the *rows* of one side in shared memory, *chunks* of the other
side's rows (the columns of its score matrix) stream past through a ring:

========  =================  =================  ==============================  =============================
pass      rows               columns            accumulates                     executed products a pair
========  =================  =================  ==============================  =============================
dQ        queries (Q, dO)    keys (K, V)        dQ += dS K                      3
dK, dV    keys (K, V)        queries (Q, dO)    dK += dS^T Q, dV += P^T dO      4, or 5 with dQ through atomics
========  =================  =================  ==============================  =============================

Scores come out with the tile's rows in rows in both, so that P and dS leave the accumulators as the left operands of
the next products. With ``one_pass`` the second pass makes dQ too: dS goes through shared memory, its product with K
is added into a float32 ``dq_sum`` by atomics, and a last kernel scales and casts it. Without, each gradient is summed
by one warp in one order, so it is bitwise equal from run to run.

**Wide outputs.** dK and dV of 16 keys at head dim 256 are 256 registers a thread. ``dkv_split`` warps share rows:
each makes the scores of its part of the columns, takes its own P and dS from registers and the others' through
shared memory, and accumulates its part of the head dimension. With 32 rows a warp, that also halves what
``ldmatrix`` reads for a product.

**Warps drift.** With two stages or more no barrier holds the block together. Every thread *arrives* when its copies
of the next chunk and its part of dS are there, which is waited for before dQ and the next chunk, and has *left* when
it is through with a chunk's rows, which is waited for before they are overwritten. Buffers of P and dS alternate.
Warps that share rows meet once a chunk.

**Shared memory** rows are padded by 16 bytes: with a row of an even number of 16-byte units, the pitch is an odd
number of them, so 8 consecutive rows lie in different banks, for ``ldmatrix`` as for the 4-byte loads that float32
needs where 2-byte types have ``ldmatrix.trans``. Offsets inside a tile are immediates.

**float32** runs as three TF32 products (high parts, and each high part with the other's low part). The columns
(2t, 2t + 1) that a thread holds of an accumulator serve as columns (t, t + 4) of the left operand when the right
operand's rows are taken in the same order.

Measured on an H200 (bfloat16, spattention, L2 cleared, medians of 11 calls; ms and useful TFLOP/s):

=====================================================  =================  ==================  ================
structure (tile rows x warps that share rows)          4, 16, 4096, 128   1, 16, 16384, 128   4, 16, 4096, 64
=====================================================  =================  ==================  ================
one pass, 128 keys x 2, chunks of 64                   0.667 (181)        1.71 (283)          -
the same with a barrier of the block instead           0.716 (169)        1.91 (254)          -
one pass, 64 keys x 2, one stage, two blocks           0.733 (165)        2.10 (231)          -
one pass, 128 keys x 1, 32 rows a warp                 -                  -                   0.359 (169)
two passes, 128 keys x 2, chunks of 64                 0.791 (153)        2.16 (224)          -
two passes, 64 keys x 2, one stage, two blocks         0.773 (157)        2.25 (215)          -
two passes, 64 keys x 1, 16 rows a warp                0.815 (148)        2.45 (198)          -
two passes, 128 keys x 1, 32 rows a warp               -                  -                   0.414 (147)
=====================================================  =================  ==================  ================

In the first row the key pass takes 0.538 ms, of which the atomic adds are 0.053; delta and clearing dq_sum take 0.068,
casting it 0.051: the last two run at the memory's speed. Own P and dS out of registers were worth 0.027 ms, warps that
drift 0.05. Adds of two floats instead of four cost 0.11 ms in the first row and 0.33 in the second.
What did not help: a barrier of the block before dQ beside one of the sharing warps (0.745), two or four rows at once
in the kernels that move data, dQ of a chunk beside the next chunk's scores, upper keys a chunk ahead of lower ones,
delta inside the dQ pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .blocks import BEFORE_HOPPER, registers_most, shared_bytes_most, tile_slots, wait_macro

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PAD = 16  # bytes behind a row in shared memory
INFO_BYTES = 16  # of a chunk: first row, its band's lo and hi, which band of which head
SINGLE_ATOMICS = BEFORE_HOPPER  # chips whose atomic adds take one float at a time
SMALL_THREADS = 256  # of the kernels that only move data


def _align(value: int, to: int) -> int:
    return (value + to - 1) // to * to


@dataclass(frozen=True)
class Pass:
    """Sizes of one of the two passes; everything here is known before the kernel is built."""

    keys: bool  # whether the rows of a tile are keys
    head_dim: int
    element: int  # bytes
    warps: int  # along the rows
    split: int  # warps that share rows, each accumulating its part of the head dimension
    exchange: bool  # whether those share the scores too; without, each makes all of them
    rows: int  # of a warp
    strip: int  # columns that a warp computes at once
    chunk: int  # columns of a stage
    stages: int
    hold: bool  # row operands in registers
    heads: int  # whose tiles are interleaved
    blocks: int  # a multiprocessor should hold
    one_pass: bool
    vector: int  # floats of one atomic add

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.split

    @property
    def tile(self) -> int:
        return self.warps * self.rows

    @property
    def pitch(self) -> int:
        return self.head_dim * self.element + PAD

    @property
    def steps(self) -> int:
        """Products that a score takes along the head dimension, 32 bytes of both sides each."""
        return self.head_dim * self.element // 32

    @property
    def out_step(self) -> int:
        """Columns of scores that one output product consumes."""
        return 32 // self.element

    @property
    def row_blocks(self) -> int:
        return self.rows // 16

    @property
    def out_columns(self) -> int:
        """Head dimension that a warp accumulates, in steps of 16; the last warp's may reach beyond the end."""
        return _align(-(-self.head_dim // self.split), 16)

    @property
    def accumulators(self) -> int:
        return self.rows * self.out_columns // 32

    @property
    def scores(self) -> int:
        return self.rows * self.strip // 32

    @property
    def drifts(self) -> bool:
        """Whether warps wait only for what they need of each other; else the whole block meets."""
        return self.stages > 1

    @property
    def exchange_bytes(self) -> int:
        """Of one of the two buffers of P or dS (one without drifting warps)."""
        return self.tile * self.exchange_pitch

    @property
    def exchange_pitch(self) -> int:
        return self.chunk * self.element + PAD

    @property
    def dq_warps(self) -> tuple[int, int]:
        """How the warps share a chunk's dQ in one pass: along queries, along the head dimension."""
        best = (1, 1)
        least = math.inf
        for along in range(1, self.chunk // 16 + 1):
            if self.chunk % (16 * along):
                continue
            across = min(self.warps * self.split // along, self.head_dim // 16)
            if across == 0:
                continue
            columns = _align(-(-self.head_dim // across), 16)
            rows = self.chunk // along
            # The slowest warp's products, and what it loads for them.
            work = rows * columns + 4 * (rows + columns)
            if work < least:
                best, least = (along, across), work
        return best

    @property
    def dq_keys(self) -> int:
        """Keys that dQ takes or leaves together."""
        return self.tile // 2 if self.tile % 128 == 0 else self.tile

    @property
    def dq_rows(self) -> int:
        return self.chunk // self.dq_warps[0]

    @property
    def dq_columns(self) -> int:
        return _align(-(-self.head_dim // self.dq_warps[1]), 16)

    @property
    def offsets(self) -> dict[str, int]:
        """Byte offsets in shared memory, and under ``"end"`` the size."""
        at = {"first": 0, "second": self.tile * self.pitch}
        end = 2 * self.tile * self.pitch
        for name in ("third", "fourth"):
            at[name] = end
            end += self.stages * self.chunk * self.pitch
        for name, is_used in (("p", self.exchange), ("ds", self.exchange or self.one_pass)):
            at[name] = end
            end += (2 if self.drifts else 1) * self.exchange_bytes if is_used else 0
        at["lse"] = end
        end += self.stages * self.chunk * 4 if self.keys else 0
        at["delta"] = end
        end += self.stages * self.chunk * 4 if self.keys else 0
        at["info"] = _align(end, 16)
        at["arrived"] = at["info"] + self.stages * INFO_BYTES
        at["left"] = at["arrived"] + 8
        at["end"] = at["left"] + 8
        return at

    @property
    def shared_bytes(self) -> int:
        # Columns beyond the head dimension are read, never used, and must lie inside the allocation.
        beyond = self.out_columns * self.split + self.dq_columns * self.dq_warps[1] - 2 * self.head_dim
        return self.offsets["end"] + beyond * self.element

    @property
    def registers(self) -> int:
        """Estimate of what a thread needs."""
        outputs = (2 if self.keys else 1) * self.accumulators
        scores = 2 * self.scores
        packed = self.scores * self.element // 4
        fragments = (8 * self.row_blocks * self.steps if self.hold else 4 * self.row_blocks) + 8
        if self.element == 4:
            fragments = 2 * fragments + 48  # high and low parts, and the own sums of products in flight
        dq = self.dq_rows * self.dq_columns // 32 if self.one_pass else 0
        return outputs + max(scores + packed, dq) + fragments + 26


def passes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> tuple[Pass, Pass]:
    """The dQ pass and the dK/dV pass that decisions name."""
    element = ELEMENT_BYTES[dtype]
    dq = Pass(
        keys=False,
        head_dim=head_dim,
        element=element,
        warps=decisions["dq_warps"],
        split=1,
        exchange=False,
        rows=decisions["dq_rows"],
        strip=decisions["dq_strip"],
        chunk=decisions["dq_strip"] * decisions["dq_strips"],
        stages=decisions["dq_stages"],
        hold=bool(decisions["dq_hold"]),
        heads=decisions["dq_heads"],
        blocks=decisions["dq_blocks"],
        one_pass=False,
        vector=1,
    )
    exchange = decisions["dkv_strips"] == 0
    dkv = Pass(
        keys=True,
        head_dim=head_dim,
        element=element,
        warps=decisions["dkv_warps"],
        split=decisions["dkv_split"],
        exchange=exchange,
        rows=decisions["dkv_rows"],
        strip=decisions["dkv_strip"],
        chunk=decisions["dkv_strip"] * (decisions["dkv_split"] if exchange else decisions["dkv_strips"]),
        stages=decisions["dkv_stages"],
        hold=bool(decisions["dkv_hold"]),
        heads=decisions["dkv_heads"],
        blocks=decisions["dkv_blocks"],
        one_pass=bool(decisions["one_pass"]),
        vector=decisions["atomic_floats"],
    )
    return dq, dkv


def _pass_conflict(part: Pass, arch: str) -> str | None:
    if part.exchange and part.split == 1:
        return "a warp that shares its rows with none has nothing to exchange (dkv_strips=0)"
    if part.hold and part.element == 4:
        return "hold is for 2-byte types: float32 operands are split where they are used"
    if part.split * 16 > part.head_dim:
        return f"{part.split} warps for a head dim of {part.head_dim}"
    if part.threads > 512:
        return f"{part.threads} threads"
    most = shared_bytes_most(arch, part.blocks)
    if part.shared_bytes > most:
        return (
            f"{part.shared_bytes} bytes of shared memory, {arch} has {most} for each of {part.blocks} blocks"
        )
    if part.registers > registers_most(part.threads, part.blocks):
        return f"about {part.registers} registers, a thread has {registers_most(part.threads, part.blocks)}"
    return None


def conflict(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> str | None:
    """Why a chip can't run the kernel with these decisions, or would spill registers; None if it can."""
    if decisions["one_pass"] and decisions["atomic_floats"] > 1 and arch in SINGLE_ATOMICS:
        return f"atomic_floats={decisions['atomic_floats']} needs sm_90, not {arch}"
    dq, dkv = passes(decisions, head_dim, dtype)
    if not decisions["one_pass"]:
        reason = _pass_conflict(dq, arch)
        if reason is not None:
            return f"dQ pass: {reason}"
    reason = _pass_conflict(dkv, arch)
    return None if reason is None else f"dK/dV pass: {reason}"


_DOT_SOURCE = {
    "bfloat16": """
__device__ __forceinline__ float spattn_dot(unsigned int a, unsigned int b, float sum) {
  sum = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
  return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), sum);
}
""",
    "float16": """
__device__ __forceinline__ float spattn_dot(unsigned int a, unsigned int b, float sum) {
  float2 x = __half22float2(*reinterpret_cast<__half2*>(&a));
  float2 y = __half22float2(*reinterpret_cast<__half2*>(&b));
  return fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
}
""",
    "float32": """
__device__ __forceinline__ float spattn_dot(unsigned int a, unsigned int b, float sum) {
  return fmaf(__uint_as_float(a), __uint_as_float(b), sum);
}
""",
}


_ADDRESS_SOURCE = """
__device__ __forceinline__ unsigned long long spattn_address(const void* pointer) {
  return reinterpret_cast<unsigned long long>(pointer);
}
"""


def build_mma_backward(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> Any:
    """The backward of banded attention as one function ``backward`` that launches three kernels: delta, then
    the dQ and the dK/dV pass, or the one pass and the kernel that scales and casts dq_sum.

    Exported: ``backward(q, k, v, o, lse, do, dlse, bands, cu_seqlens, dq, dk, dv, delta, [dq_sum,] scale, workers)``.
    Batch, heads, length, strides, layout and documents are data of the call. Nothing synchronises; nothing is
    allocated.

    ============== ================ ========= =====================================================================
    argument       shape            dtype     meaning
    ============== ================ ========= =====================================================================
    q, o, do, dq   (B, Hq, N, D)    `dtype`   any strides with a contiguous last dimension
    k, v, dk, dv   (B, Hkv, N, D)   `dtype`   likewise; dk and dv are summed over the group in registers
    lse, dlse      (B, Hq, N)       float32   contiguous; natural logarithm, -inf for a query with no key
    bands          (M, Hq, 4)       int32     near_lo, near_hi, far_lo, far_hi; a document's row: table_row
    cu_seqlens     (documents + 1,) int32     first token of each document, and N
    delta          (B, Hq, N)       float32   workspace, contiguous: rowsum(do * o) - dlse
    dq_sum         (B, Hq, N, D)    float32   workspace, contiguous, only with ``one_pass``; cleared by the call
    scale          scalar           float32   factor of the scores, of any sign
    workers        scalar           int32     multiprocessors of the device; not used
    ============== ================ ========= =====================================================================

    B, Hq, Hkv and N are at least 1; addresses and the strides of dimensions longer than 1 are multiples of 16 bytes.
    Offsets are 64-bit.

    Parameters
    ----------
    decisions : mapping of str to int
        ``one_pass``; ``dq_`` and ``dkv_`` each: ``warps`` (along the tile's rows), ``rows`` (of a warp, 16 or 32),
        ``strip`` (columns that a warp computes at once), ``strips`` (in a chunk, the columns of a stage; ``dkv_strips``
        = 0: one for each of the warps that share rows, which exchange P and dS), ``stages`` (of the ring, 1: loads wait
        for the products), ``hold`` (the tile's rows as operands in registers), ``heads`` (whose tiles are interleaved),
        ``blocks`` (that a multiprocessor should hold, which limits registers); ``dkv_split`` (warps that share rows);
        ``atomic_floats`` (of one atomic add, with ``one_pass``; more than 1 from sm_90 on).
    head_dim : int
        D: a multiple of 16 up to 256.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    arch : str
        ``"sm_80"`` and so on: what a block may have of shared memory and registers, and whether atomic adds of
        several floats exist.

    Returns
    -------
    tvm.IRModule
        For ``tvm.compile(..., tir_pipeline="tirx")`` with a CUDA target.

    Raises
    ------
    ValueError
        For another head dim or dtype, and where the decisions don't suit the chip.
    """
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"head_dim must be a multiple of 16 up to 256, got {head_dim}")
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(ELEMENT_BYTES)}, got {dtype!r}")

    reason = conflict(decisions, head_dim, dtype, arch)
    if reason is not None:
        raise ValueError(f"{reason}: choose other decisions than {dict(decisions)}")

    import tvm
    from tvm.script import tirx as T

    from spattn_tvm.domains.tiles import first_slot

    D = head_dim
    E = ELEMENT_BYTES[dtype]
    HALF = E == 2
    ONE_PASS = bool(decisions["one_pass"])
    DQ, DKV = passes(decisions, head_dim, dtype)
    SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "tf32"}[dtype]
    MMA = f"mma.sync.aligned.{'m16n8k16' if HALF else 'm16n8k8'}.row.col.f32.{SHORT}.{SHORT}.f32"
    LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
    LDMATRIX_TRANS = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
    PACK = f"cvt.rn.{SHORT}x2.f32"
    ADD = {1: "red.global.add.f32", 2: "red.global.add.v2.f32", 4: "red.global.add.v4.f32"}[DKV.vector]
    TF32_MASK = 0xFFFFE000
    wait = wait_macro(arch)
    LOG2E = math.log2(math.e)
    INF = float("inf")
    ALL = 0xFFFFFFFF

    # The kernels that only move data: LANES threads a row, 16 bytes each.
    UNITS = D * E // 16
    LANES = min(32, 1 << (UNITS - 1).bit_length())
    SMALL_ROWS = SMALL_THREADS // LANES
    CAST_LANES = min(32, 1 << (D // 4 - 1).bit_length())
    CAST_ROWS = SMALL_THREADS // CAST_LANES

    def element(start: Any, strides: tuple[Any, Any, Any], b: Any, h: Any, row: Any, size: int) -> Any:
        """Global address of a row of a strided (B, H, N, D) tensor, in 64-bit arithmetic."""
        offset = sum(T.Cast("int64", i) * s for i, s in zip((b, h, row), strides, strict=True))
        return address(start) + T.Cast("uint64", offset * size)

    def address(pointer: Any) -> Any:
        """A pointer as an integer. Not by T.reinterpret, which TVM 0.27 can't legalize below sm_89."""
        return T.cuda.func_call("spattn_address", pointer, source_code=_ADDRESS_SOURCE, return_type="uint64")

    def u32(value: Any) -> Any:
        return T.Cast("uint32", value)

    def reaches(c: Pass, info: Any, first_row: Any, last_row: Any, end: Any, col: Any, count: int) -> Any:
        """Whether some pair of a warp's rows and `count` columns from `col` on lies in the chunk's band."""
        if c.keys:
            inside = T.And(
                col <= T.min(last_row + info[2], end - 1), col + (count - 1) >= first_row + info[1]
            )
        else:
            inside = T.And(col <= last_row - info[1], col + (count - 1) >= first_row - info[2])
        return T.And(inside, first_row <= last_row)

    # fmt: off
    @T.prim_func
    def backward(q_h: T.handle, k_h: T.handle, v_h: T.handle, o_h: T.handle, lse_h: T.handle, do_h: T.handle, dlse_h: T.handle,
                 bands_h: T.handle, cu_h: T.handle, dq_h: T.handle, dk_h: T.handle, dv_h: T.handle, delta_h: T.handle,
                 dq_sum_h: T.handle, scale: T.float32, workers: T.int32):
        B64 = T.int64(); HQ64 = T.int64(); HK64 = T.int64(); N64 = T.int64(); M64 = T.int64(); ND64 = T.int64()
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
        delta = T.match_buffer(delta_h, (B64, HQ64, N64), "float32", align=4)
        dq_sum = T.match_buffer(dq_sum_h, (B64, HQ64, N64, hd), "float32", align=16)

        N: T.let[T.int32] = T.Cast("int32", N64)
        B: T.let[T.int32] = T.Cast("int32", B64)
        HQ: T.let[T.int32] = T.Cast("int32", HQ64)
        HK: T.let[T.int32] = T.Cast("int32", HK64)
        M: T.let[T.int32] = T.Cast("int32", M64)
        docs: T.let[T.int32] = T.Cast("int32", ND64) - 1
        group: T.let[T.int32] = HQ // HK

        # delta = rowsum(dO * O) - dlse
        with T.attr({"tirx.device_entry": True}):
            bx = T.cta_id([(B * HQ * N + (SMALL_ROWS - 1)) // SMALL_ROWS])
            tx = T.thread_id([SMALL_THREADS])
            # What is beyond the last row does that row again: shuffles need all lanes.
            row: T.int32 = T.min(bx * SMALL_ROWS + tx // LANES, B * HQ * N - 1)
            lane: T.int32 = tx % LANES
            bh: T.int32 = T.truncdiv(row, N)
            i: T.int32 = row - bh * N
            b: T.int32 = T.truncdiv(bh, HQ)
            h: T.int32 = bh - b * HQ
            o_at: T.uint64 = element(o.data, (o0s, o1s, o2s), b, h, i, E)
            g_at: T.uint64 = element(do.data, (g0s, g1s, g2s), b, h, i, E)
            total = T.alloc_local((1,), "float32")
            x = T.alloc_local((4,), "uint32")
            y = T.alloc_local((4,), "uint32")
            total[0] = T.float32(0)
            for step in T.unroll((UNITS + LANES - 1) // LANES):
                if lane + step * LANES < UNITS:
                    T.ptx["ld.global.nc.v4.u32"](x[0], x[1], x[2], x[3], o_at + T.Cast("uint64", (lane + step * LANES) * 16))
                    T.ptx["ld.global.nc.v4.u32"](y[0], y[1], y[2], y[3], g_at + T.Cast("uint64", (lane + step * LANES) * 16))
                    for w in T.unroll(4):
                        total[0] = T.cuda.func_call("spattn_dot", x[w], y[w], total[0], source_code=_DOT_SOURCE[dtype], return_type="float32")
                    if ONE_PASS:
                        for w in T.unroll(4 // E):
                            T.ptx["st.global.v4.f32"](address(dq_sum.data) + T.Cast("uint64", row) * T.uint64(4 * D) + T.Cast("uint64", (lane + step * LANES) * (64 // E) + 16 * w),
                                                      T.float32(0), T.float32(0), T.float32(0), T.float32(0))
            for half in T.unroll((LANES - 1).bit_length()):
                total[0] = total[0] + T.tvm_warp_shuffle_xor(ALL, total[0], 1 << half, 32, 32)
            if lane == 0:
                # What a query without keys is given as dlse must not matter.
                delta[b, h, i] = T.if_then_else(lse[b, h, i] > -T.float32(INF), total[0] - dlse[b, h, i], T.float32(0))

        @T.inline
        def run_pass(c):
            bx = T.cta_id([tile_slots(N, docs, c.tile) * B * (HK if c.keys else HQ)])
            warp = T.warp_id([c.threads // 32])
            tx = T.thread_id([c.threads])
            arena = T.alloc_buffer((c.shared_bytes,), "uint8", scope="shared.dyn", align=1024)
            base: T.uint32 = T.cuda.cvta_generic_to_shared(arena.data)
            lane: T.int32 = tx % 32
            quad: T.int32 = lane // 4
            slots: T.int32 = tile_slots(N, docs, c.tile)

            # A few heads at a time, so that what their tiles share stays in the L2; of those the tiles with most work first:
            # late queries, early keys.
            heads = T.meta_var(HK if c.keys else HQ)
            pack: T.int32 = T.truncdiv(bx, slots * c.heads)
            packed: T.int32 = T.min(B * heads - pack * c.heads, c.heads)
            slot: T.int32 = T.truncdiv(bx - pack * (slots * c.heads), packed)
            h: T.int32 = bx - pack * (slots * c.heads) - slot * packed + pack * c.heads
            b: T.int32 = h - T.truncdiv(h, B) * B
            h = T.truncdiv(h, B)
            if not c.keys:
                slot = slots - 1 - slot
            doc: T.int32 = 0
            doc_hi: T.int32 = docs - 1
            while doc < doc_hi:
                mid: T.int32 = (doc + doc_hi + 1) // 2
                if first_slot(cu[mid], mid, c.tile) <= slot:
                    doc = mid
                else:
                    doc_hi = mid - 1
            begin: T.int32 = cu[doc]
            end: T.int32 = cu[doc + 1]
            row0: T.int32 = begin + slot * c.tile
            if docs > 1:
                row0 = begin + (slot - first_slot(begin, doc, c.tile)) * c.tile
            if M == 1:
                doc = 0

            @T.inline
            def load_rows(to, source, stride, first, count):
                # Rows outside of the document become zeros.
                units = T.meta_var(D * E // 16)
                if c.threads % units == 0:
                    unit: T.int32 = tx % units
                    start: T.uint64 = source + T.Cast("uint64", T.Cast("int64", first + tx // units) * stride * E) + T.Cast("uint64", unit * 16)
                    pace: T.int64 = stride * (c.threads // units * E)
                    target: T.uint32 = to + u32(tx // units * c.pitch + unit * 16)
                    for i in T.unroll((count * units + c.threads - 1) // c.threads):
                        row: T.int32 = first + tx // units + i * (c.threads // units)
                        wanted: T.bool = T.And(row >= begin, row < end)
                        if count * units % c.threads != 0:
                            if tx // units + i * (c.threads // units) < count:
                                T.ptx["cp.async.cg.shared.global"](target + T.uint32(i * (c.threads // units) * c.pitch), start + T.Cast("uint64", i * pace), 16, T.if_then_else(wanted, T.uint32(16), T.uint32(0)))
                        else:
                            T.ptx["cp.async.cg.shared.global"](target + T.uint32(i * (c.threads // units) * c.pitch), start + T.Cast("uint64", i * pace), 16, T.if_then_else(wanted, T.uint32(16), T.uint32(0)))
                else:
                    for i in T.unroll((count * units + c.threads - 1) // c.threads):
                        place: T.int32 = tx + i * c.threads
                        if place < count * units:
                            row: T.int32 = first + place // units
                            wanted: T.bool = T.And(row >= begin, row < end)
                            T.ptx["cp.async.cg.shared.global"](to + u32(place // units * c.pitch + place % units * 16),
                                                               source + T.Cast("uint64", T.Cast("int64", row) * stride * E) + T.Cast("uint64", place % units * 16), 16,
                                                               T.if_then_else(wanted, T.uint32(16), T.uint32(0)))

            if row0 < end:
                last: T.int32 = T.min(row0 + c.tile, end) - 1
                across: T.int32 = warp % c.split
                strip_row: T.int32 = warp // c.split * c.rows  # first row of this warp in the tile
                first_row: T.int32 = row0 + strip_row
                last_row: T.int32 = T.min(first_row + c.rows, end) - 1
                my_row: T.int32 = first_row + quad

                # The tile's own rows.
                if c.keys:
                    load_rows(base + T.uint32(c.offsets["first"]), element(k.data, (k0s, k1s, k2s), b, h, 0, E), k2s, row0, c.tile)
                    load_rows(base + T.uint32(c.offsets["second"]), element(v.data, (v0s, v1s, v2s), b, h, 0, E), v2s, row0, c.tile)
                else:
                    load_rows(base + T.uint32(c.offsets["first"]), element(q.data, (q0s, q1s, q2s), b, h, 0, E), q2s, row0, c.tile)
                    load_rows(base + T.uint32(c.offsets["second"]), element(do.data, (g0s, g1s, g2s), b, h, 0, E), g2s, row0, c.tile)

                # Walks the chunks: the two bands of each query head of the group.
                segments: T.int32 = 2 * group if c.keys else 2
                band_at: T.uint64 = address(bands.data) + T.Cast("uint64", (doc * HQ + (h * group if c.keys else h)) * 16)
                segment: T.int32 = -1
                place: T.int32 = 1
                place_last: T.int32 = 0
                lo = T.alloc_local((1,), "int32")
                hi = T.alloc_local((1,), "int32")
                lo[0] = 0
                hi[0] = 0
                made: T.int32 = 0
                put: T.int32 = 0  # the stage to fill
                info = T.alloc_local((4,), "int32")

                @T.inline
                def produce():
                    while T.And(place > place_last, segment + 1 < segments):
                        segment = segment + 1
                        T.ptx["ld.global.nc.v2.s32"](lo[0], hi[0], band_at + T.Cast("uint64", segment * 8))
                        if c.keys:
                            place = row0 + lo[0]
                            place_last = T.min(last + hi[0], end - 1)
                        else:
                            place = T.max(row0 - hi[0], begin)
                            place_last = last - lo[0]
                    if place <= place_last:
                        third: T.uint32 = base + T.uint32(c.offsets["third"]) + u32(put * (c.chunk * c.pitch))
                        fourth: T.uint32 = base + T.uint32(c.offsets["fourth"]) + u32(put * (c.chunk * c.pitch))
                        if c.keys:
                            head: T.int32 = h * group + segment // 2
                            load_rows(third, element(q.data, (q0s, q1s, q2s), b, head, 0, E), q2s, place, c.chunk)
                            load_rows(fourth, element(do.data, (g0s, g1s, g2s), b, head, 0, E), g2s, place, c.chunk)
                            stat_row: T.int64 = T.Cast("int64", b * HQ + head) * N64 + T.Cast("int64", place + tx)
                            for part in T.unroll((c.chunk + c.threads - 1) // c.threads):
                                if tx + part * c.threads < c.chunk:
                                    there: T.uint32 = T.if_then_else(place + tx + part * c.threads < end, T.uint32(4), T.uint32(0))
                                    T.ptx["cp.async.ca.shared.global"](base + T.uint32(c.offsets["lse"] + part * c.threads * 4) + u32((put * c.chunk + tx) * 4),
                                                                       address(lse.data) + T.Cast("uint64", stat_row * 4 + part * c.threads * 4), 4, there)
                                    T.ptx["cp.async.ca.shared.global"](base + T.uint32(c.offsets["delta"] + part * c.threads * 4) + u32((put * c.chunk + tx) * 4),
                                                                       address(delta.data) + T.Cast("uint64", stat_row * 4 + part * c.threads * 4), 4, there)
                        else:
                            head: T.int32 = T.truncdiv(h, group)
                            load_rows(third, element(k.data, (k0s, k1s, k2s), b, head, 0, E), k2s, place, c.chunk)
                            load_rows(fourth, element(v.data, (v0s, v1s, v2s), b, head, 0, E), v2s, place, c.chunk)
                        if tx == 0:
                            T.ptx["st.shared.v4.s32"](base + T.uint32(c.offsets["info"]) + u32(put * INFO_BYTES), place, lo[0], hi[0], segment)
                        place = place + c.chunk
                        made = made + 1
                        put = put + 1
                        if put == c.stages:
                            put = 0

                # Lane offsets of the fragments, see the module's docstring.
                a_lane: T.uint32 = u32(lane % 16 * c.pitch + lane // 16 * 16)
                b_lane: T.uint32 = u32((lane // 16 * 8 + lane % 8) * c.pitch + lane // 8 % 2 * 16)
                # Rows of the right operand of an output: natural order for ldmatrix.trans, pairs for float32.
                t_lane: T.uint32 = u32(lane % 16 * c.pitch + lane // 16 * 16 if HALF else lane % 4 * 2 * c.pitch + quad * 4)
                first_at: T.uint32 = base + T.uint32(c.offsets["first"]) + u32(strip_row * c.pitch) + a_lane
                second_at: T.uint32 = base + T.uint32(c.offsets["second"]) + u32(strip_row * c.pitch) + a_lane

                s = T.alloc_local((c.scores,), "float32")
                p = T.alloc_local((c.scores,), "float32")
                out1 = T.alloc_local((c.accumulators,), "float32")
                out2 = T.alloc_local((c.accumulators if c.keys else 1,), "float32")
                pw = T.alloc_local((c.scores * E // 4,), "uint32")
                dw = T.alloc_local((c.scores * E // 4,), "uint32")
                af = T.alloc_local((4 * c.row_blocks,), "uint32")
                al = T.alloc_local((4 * c.row_blocks,), "uint32")
                bf = T.alloc_local((4,), "uint32")
                bl = T.alloc_local((4,), "uint32")
                tf = T.alloc_local((4,), "float32")
                held = T.alloc_local((8 * c.row_blocks * c.steps if c.hold else 1,), "uint32")
                stat = T.alloc_local((4 * c.row_blocks,), "float32")
                cs = T.alloc_local((c.strip // 4 if c.keys else 1,), "float32")
                scale2: T.float32 = scale * T.float32(LOG2E)

                for i in T.unroll(c.accumulators):
                    out1[i] = T.float32(0)
                    if c.keys:
                        out2[i] = T.float32(0)

                @T.inline
                def split_words(high, low, count):
                    # A float32 as the TF32 number nearest to it and the one nearest to the rest.
                    if not HALF:
                        for i in T.unroll(count):
                            rest: T.float32 = T.reinterpret("float32", high[i]) - T.reinterpret("float32", (high[i] + T.uint32(0x1000)) & T.uint32(TF32_MASK))
                            high[i] = (high[i] + T.uint32(0x1000)) & T.uint32(TF32_MASK)
                            low[i] = T.reinterpret("uint32", rest) + T.uint32(0x1000)

                @T.inline
                def multiply(out, at, high, low, ah, right, rl, rh, fresh):
                    # out[at ...] (+)= left[ah ...] right[rh, rh + 1]
                    if HALF:
                        T.ptx[MMA](*[out[at + e] for e in range(4)], *[high[ah + e] for e in range(4)], right[rh], right[rh + 1],
                                   *[T.float32(0) if fresh else out[at + e] for e in range(4)])
                    else:
                        # Tensor cores cut sums off instead of rounding them, which long chains would turn into a bias.
                        T.ptx[MMA](*[tf[e] for e in range(4)], *[low[ah + e] for e in range(4)], right[rh], right[rh + 1], *[T.float32(0) for e in range(4)])
                        T.ptx[MMA](*[tf[e] for e in range(4)], *[high[ah + e] for e in range(4)], rl[rh], rl[rh + 1], *[tf[e] for e in range(4)])
                        T.ptx[MMA](*[tf[e] for e in range(4)], *[high[ah + e] for e in range(4)], right[rh], right[rh + 1], *[tf[e] for e in range(4)])
                        for e in T.unroll(4):
                            if fresh:
                                out[at + e] = tf[e]
                            else:
                                out[at + e] = out[at + e] + tf[e]

                @T.inline
                def score_step(out, rows_at, held_from, cols_at, kk, fresh):
                    if not c.hold:
                        for m in T.unroll(c.row_blocks):
                            T.ptx[LDMATRIX](*[af[4 * m + e] for e in range(4)], rows_at + T.uint32(16 * c.pitch) * u32(m) + T.uint32(32) * u32(kk))
                        split_words(af, al, 4 * c.row_blocks)
                    for n in T.unroll(c.strip // 16):
                        T.ptx[LDMATRIX](*[bf[e] for e in range(4)], cols_at + T.uint32(16 * c.pitch) * u32(n) + T.uint32(32) * u32(kk))
                        split_words(bf, bl, 4)
                        for m in T.unroll(c.row_blocks):
                            for side in T.unroll(2):
                                if c.hold:
                                    multiply(out, (m * (c.strip // 8) + 2 * n + side) * 4, held, held, held_from + (m * c.steps + kk) * 4, bf, bl, 2 * side, fresh)
                                else:
                                    multiply(out, (m * (c.strip // 8) + 2 * n + side) * 4, af, al, 4 * m, bf, bl, 2 * side, fresh)

                @T.inline
                def score_product(out, rows_at, held_from, cols_at):
                    score_step(out, rows_at, held_from, cols_at, 0, True)
                    for kk in T.unroll(c.steps - 1):
                        score_step(out, rows_at, held_from, cols_at, kk + 1, False)

                @T.inline
                def load_right(at):
                    # Rows (as the product's inner dimension) times 16 columns of the head dimension.
                    if HALF:
                        T.ptx[LDMATRIX_TRANS](*[bf[e] for e in range(4)], at)
                    else:
                        for e in T.unroll(4):
                            T.ptx["ld.shared.u32"](bf[e], at + T.uint32(c.pitch) * u32(e % 2) + T.uint32(32) * u32(e // 2))
                        split_words(bf, bl, 4)

                @T.inline
                def take_words(words, kk):
                    # The left operand of output step kk out of packed scores.
                    for m in T.unroll(c.row_blocks):
                        if HALF:
                            for e in T.unroll(4):
                                af[4 * m + e] = words[(m * (c.strip // 8) + 2 * kk + e // 2) * 2 + e % 2]
                        else:
                            for e in T.unroll(4):
                                af[4 * m + e] = words[(m * (c.strip // 8) + kk) * 4 + e % 2 * 2 + e // 2]
                    split_words(af, al, 4 * c.row_blocks)

                @T.inline
                def take_shared(at, kk):
                    # The same out of an exchange buffer; `at` is this lane's.
                    for m in T.unroll(c.row_blocks):
                        if HALF:
                            T.ptx[LDMATRIX](*[af[4 * m + e] for e in range(4)], at + T.uint32(16 * c.exchange_pitch) * u32(m) + T.uint32(32) * u32(kk))
                        else:
                            for e in T.unroll(2):
                                T.ptx["ld.shared.v2.u32"](af[4 * m + e], af[4 * m + e + 2], at + T.uint32(16 * c.exchange_pitch) * u32(m) + T.uint32(8 * c.exchange_pitch) * u32(e) + T.uint32(32) * u32(kk))
                    split_words(af, al, 4 * c.row_blocks)

                @T.inline
                def output_step(out, cols_at, kk):
                    # out += the left operand in af times rows of step kk at cols_at
                    for n in T.unroll(c.out_columns // 16):
                        load_right(cols_at + T.uint32(c.out_step * c.pitch) * u32(kk) + T.uint32(16 * E) * u32(n))
                        for m in T.unroll(c.row_blocks):
                            for side in T.unroll(2):
                                multiply(out, (m * (c.out_columns // 8) + 2 * n + side) * 4, af, al, 4 * m, bf, bl, 2 * side, False)

                @T.inline
                def own_product(out, words, cols_at):
                    for kk in T.unroll(c.strip // c.out_step):
                        take_words(words, kk)
                        output_step(out, cols_at, kk)

                @T.inline
                def others_product(out, name, cols_at):
                    # The same of the strips that the other warps of these rows made.
                    for other in T.unroll(c.split - 1):
                        theirs: T.int32 = (across + (other + 1)) % c.split
                        if reaches(c, info, first_row, last_row, end, info[0] + theirs * c.strip, c.strip):
                            for kk in T.unroll(c.strip // c.out_step):
                                take_shared(base + T.uint32(c.offsets[name]) + buffer + e_lane + u32(theirs * (c.strip * E)), kk)
                                output_step(out, cols_at + u32(theirs * (c.strip * c.pitch)), kk)

                @T.inline
                def pack(words, values):
                    if HALF:
                        for i in T.unroll(c.scores // 2):
                            T.ptx[PACK](words[i], values[2 * i + 1], values[2 * i])
                    else:
                        for i in T.unroll(c.scores):
                            words[i] = T.reinterpret("uint32", values[i])

                @T.inline
                def mask(first_col):
                    # Distances grow along the columns when they are queries, and shrink when they are keys.
                    for m in T.unroll(c.row_blocks):
                        for half in T.unroll(2):
                            at_row: T.int32 = my_row + 16 * m + 8 * half
                            top: T.int32 = T.min(info[2], end - 1 - at_row) if c.keys else info[2]
                            limit: T.uint32 = u32(T.max(top - info[1] + 1, 0))
                            d0: T.int32 = (first_col + lane % 4 * 2 - at_row - info[1]) if c.keys else (at_row - first_col - lane % 4 * 2 - info[1])
                            for n in T.unroll(c.strip // 8):
                                for j in T.unroll(2):
                                    x: T.let = (m * (c.strip // 8) + n) * 4 + 2 * half + j
                                    s[x] = T.if_then_else(u32(d0 + (8 * n + j) if c.keys else d0 - (8 * n + j)) < limit, s[x], T.float32(-INF))

                @T.inline
                def weigh(stats_at):
                    # P in s, in place of what follows it: dS in p.
                    if c.keys:
                        for n in T.unroll(c.strip // 8):
                            T.ptx["ld.shared.v2.f32"](cs[2 * n], cs[2 * n + 1], stats_at + T.uint32(32 * n))
                    for m in T.unroll(c.row_blocks):
                        for n in T.unroll(c.strip // 8):
                            for e in T.unroll(4):
                                x: T.let = (m * (c.strip // 8) + n) * 4 + e
                                if c.keys:
                                    s[x] = s[x] * scale2 - cs[2 * n + e % 2] * T.float32(LOG2E)
                                else:
                                    s[x] = s[x] * scale2 - stat[2 * m + e // 2]

                @T.inline
                def exponentiate():
                    for x in T.unroll(c.scores):
                        T.ptx["ex2.approx.ftz.f32"](s[x], s[x])

                @T.inline
                def differentiate(stats_at):
                    if c.keys:
                        for n in T.unroll(c.strip // 8):
                            T.ptx["ld.shared.v2.f32"](cs[2 * n], cs[2 * n + 1], stats_at + T.uint32(32 * n))
                    for m in T.unroll(c.row_blocks):
                        for n in T.unroll(c.strip // 8):
                            for e in T.unroll(4):
                                x: T.let = (m * (c.strip // 8) + n) * 4 + e
                                if c.keys:
                                    p[x] = s[x] * (p[x] - cs[2 * n + e % 2])
                                else:
                                    p[x] = s[x] * (p[x] - stat[2 * c.row_blocks + 2 * m + e // 2])

                @T.inline
                def publish(words, name, col):
                    # This warp's P^T or dS^T into an exchange buffer, rows as in the tile.
                    at: T.uint32 = base + T.uint32(c.offsets[name]) + buffer + u32((strip_row + quad) * c.exchange_pitch + (col + lane % 4 * 2) * E)
                    for m in T.unroll(c.row_blocks):
                        for half in T.unroll(2):
                            for n in T.unroll(c.strip // 8):
                                if HALF:
                                    T.ptx["st.shared.u32"](at + T.uint32((16 * m + 8 * half) * c.exchange_pitch + 8 * n * E), words[(m * (c.strip // 8) + n) * 2 + half])
                                else:
                                    T.ptx["st.shared.v2.u32"](at + T.uint32((16 * m + 8 * half) * c.exchange_pitch + 8 * n * E), words[(m * (c.strip // 8) + n) * 4 + 2 * half], words[(m * (c.strip // 8) + n) * 4 + 2 * half + 1])

                @T.inline
                def add_dq():
                    # dQ += dS K of one chunk, summed over this tile's keys here and over tiles in dq_sum.
                    along: T.int32 = warp // c.dq_warps[1]
                    beside: T.int32 = warp % c.dq_warps[1]
                    if warp < c.dq_warps[0] * c.dq_warps[1]:
                        dqs = T.alloc_local((c.dq_rows * c.dq_columns // 32,), "float32")
                        for i in T.unroll(c.dq_rows * c.dq_columns // 32):
                            dqs[i] = T.float32(0)
                        left = T.alloc_local((4 * (c.dq_rows // 16),), "uint32")
                        left_low = T.alloc_local((4 * (c.dq_rows // 16),), "uint32")
                        ds_at: T.uint32 = base + T.uint32(c.offsets["ds"]) + buffer + u32(along * (c.dq_rows * E) + ((lane // 16 * 8 + lane % 8) * c.exchange_pitch + lane // 8 % 2 * 16 if HALF else lane % 4 * 2 * c.exchange_pitch + quad * 4))
                        keys_at: T.uint32 = base + T.uint32(c.offsets["first"]) + t_lane + u32(beside * (c.dq_columns * E))
                        for part in T.unroll(c.tile // c.dq_keys):
                            # At a band's edges half of a tile has no key of these queries.
                            if T.And(info[0] + (c.chunk - 1) - info[1] >= row0 + part * c.dq_keys, info[0] - info[2] <= row0 + (part * c.dq_keys + c.dq_keys - 1)):
                                for step in T.unroll(c.dq_keys // c.out_step):
                                    kk: T.let = part * (c.dq_keys // c.out_step) + step
                                    for m in T.unroll(c.dq_rows // 16):
                                        if HALF:
                                            T.ptx[LDMATRIX_TRANS](*[left[4 * m + e] for e in range(4)], ds_at + T.uint32(16 * c.exchange_pitch) * u32(kk) + T.uint32(32) * u32(m))
                                        else:
                                            for e in T.unroll(4):
                                                T.ptx["ld.shared.u32"](left[4 * m + e], ds_at + T.uint32(8 * c.exchange_pitch) * u32(kk) + T.uint32(c.exchange_pitch) * u32(e // 2) + T.uint32(32) * u32(e % 2) + T.uint32(64) * u32(m))
                                    split_words(left, left_low, 4 * (c.dq_rows // 16))
                                    for n in T.unroll(c.dq_columns // 16):
                                        load_right(keys_at + T.uint32(c.out_step * c.pitch) * u32(kk) + T.uint32(16 * E) * u32(n))
                                        for m in T.unroll(c.dq_rows // 16):
                                            for side in T.unroll(2):
                                                multiply(dqs, (m * (c.dq_columns // 8) + 2 * n + side) * 4, left, left_low, 4 * m, bf, bl, 2 * side, False)
                        # The four floats that a lane has of a row and 16 columns are neighbours in dq_sum.
                        query: T.int32 = info[0] + along * c.dq_rows + quad
                        dq_at: T.uint64 = address(dq_sum.data) + T.Cast("uint64", (T.Cast("int64", b * HQ + h * group + info[3] // 2) * N64 + T.Cast("int64", query)) * (4 * D) + T.Cast("int64", beside * (c.dq_columns * 4) + lane % 4 * 16))
                        for m in T.unroll(c.dq_rows // 16):
                            for half in T.unroll(2):
                                if query + (16 * m + 8 * half) < end:
                                    for n in T.unroll(c.dq_columns // 16):
                                        if beside * c.dq_columns + 16 * n < D:
                                            for j in T.unroll(4 // c.vector):
                                                T.ptx[ADD](dq_at + T.uint64((16 * m + 8 * half) * 4 * D + 64 * n + 4 * c.vector * j),
                                                           *[dqs[(m * (c.dq_columns // 8) + 2 * n) * 4 + 2 * half + (c.vector * j + e) // 2 * 4 + (c.vector * j + e) % 2] for e in range(c.vector)])

                @T.inline
                def strip(third, fourth, stats, first_col):
                    # What follows from the strip of columns that starts at first_col, as far as this warp needs no other.
                    inside: T.bool = T.And(first_row - (first_col + (c.strip - 1)) >= info[1], first_row + (c.rows - 1) - first_col <= info[2])
                    if c.keys:
                        inside = T.And(T.And(first_col - (first_row + (c.rows - 1)) >= info[1], first_col + (c.strip - 1) - first_row <= info[2]), first_col + c.strip <= end)
                    # Where P is neither exchanged nor waited for, later: that spills less.
                    late = T.meta_var(c.keys and not c.exchange and not c.one_pass)
                    if late:
                        score_product(p, second_at, 4 * c.row_blocks * c.steps, fourth + b_lane)
                    weigh(stats + T.uint32(c.offsets["lse"]))
                    if T.Not(inside):
                        mask(first_col)
                    exponentiate()
                    if c.keys and not late:
                        pack(pw, s)
                        if c.exchange:
                            publish(pw, "p", first_col - info[0])
                        own_product(out2, pw, fourth + slab)
                    if not late:
                        score_product(p, second_at, 4 * c.row_blocks * c.steps, fourth + b_lane)
                    differentiate(stats + T.uint32(c.offsets["delta"]))
                    if late:
                        pack(pw, s)
                        own_product(out2, pw, fourth + slab)
                    pack(dw, p)
                    if c.exchange or c.one_pass:
                        publish(dw, "ds", first_col - info[0])
                    own_product(out1, dw, third + slab)

                @T.inline
                def no_strip(first_col):
                    # What dQ takes of a strip beyond the band.
                    if c.one_pass:
                        for x in T.unroll(c.scores * E // 4):
                            dw[x] = T.uint32(0)
                        publish(dw, "ds", first_col - info[0])

                take: T.int32 = 0
                done: T.int32 = 0
                buffer: T.uint32 = T.uint32(0)
                for i in T.unroll(max(c.stages - 1, 1)):
                    produce()
                    T.ptx.cp.async_.commit_group()

                @T.inline
                def load_ahead():
                    # A later chunk in the place of the one before, once all warps have left that. Of a new barrier the
                    # phase before the first counts as passed.
                    if c.drifts:
                        wait(base + T.uint32(c.offsets["left"]), (done + 1) % 2)
                        produce()
                        T.ptx.cp.async_.commit_group()

                # Statistics of the tile's rows.
                if not c.keys:
                    for m in T.unroll(2 * c.row_blocks):
                        stat[m] = T.float32(INF)
                        stat[2 * c.row_blocks + m] = T.float32(0)
                        if my_row + 8 * m < end:
                            stat[m] = lse[b, h, my_row + 8 * m] * T.float32(LOG2E)
                            stat[2 * c.row_blocks + m] = delta[b, h, my_row + 8 * m]

                slab: T.uint32 = t_lane + u32(across * (c.out_columns * E))
                e_lane: T.uint32 = u32((strip_row + lane % 16) * c.exchange_pitch + lane // 16 * 16 if HALF else (strip_row + quad) * c.exchange_pitch + lane % 4 * 8)

                if c.drifts:
                    if tx == 0:
                        T.ptx.mbarrier.init.shared.b64(base + T.uint32(c.offsets["arrived"]), T.uint32(c.threads))
                        T.ptx.mbarrier.init.shared.b64(base + T.uint32(c.offsets["left"]), T.uint32(c.threads))
                T.ptx.cp.async_.wait_group(max(c.stages - 2, 0))
                T.cuda.cta_sync()
                while done < made:
                    if c.hold:
                        if done == 0:
                            for m in T.unroll(c.row_blocks):
                                for kk in T.unroll(c.steps):
                                    T.ptx[LDMATRIX](*[held[(m * c.steps + kk) * 4 + e] for e in range(4)], first_at + T.uint32(16 * c.pitch) * u32(m) + T.uint32(32) * u32(kk))
                                    T.ptx[LDMATRIX](*[held[4 * c.row_blocks * c.steps + (m * c.steps + kk) * 4 + e] for e in range(4)], second_at + T.uint32(16 * c.pitch) * u32(m) + T.uint32(32) * u32(kk))
                    T.ptx["ld.shared.v4.s32"](info[0], info[1], info[2], info[3], base + T.uint32(c.offsets["info"]) + u32(take * INFO_BYTES))
                    third: T.uint32 = base + T.uint32(c.offsets["third"]) + u32(take * (c.chunk * c.pitch))
                    fourth: T.uint32 = base + T.uint32(c.offsets["fourth"]) + u32(take * (c.chunk * c.pitch))
                    stats: T.uint32 = base + u32(take * (c.chunk * 4) + lane % 4 * 8)
                    if c.exchange:
                        mine: T.int32 = across * c.strip
                        own: T.bool = reaches(c, info, first_row, last_row, end, info[0] + mine, c.strip)
                        if own:
                            score_product(s, first_at, 0, third + u32(mine * c.pitch) + b_lane)
                        load_ahead()
                        if own:
                            strip(third + u32(mine * c.pitch), fourth + u32(mine * c.pitch), stats + u32(mine * 4), info[0] + mine)
                        else:
                            no_strip(info[0] + mine)
                    else:
                        load_ahead()
                        at: T.int32 = 0
                        while at < c.chunk:
                            if reaches(c, info, first_row, last_row, end, info[0] + at, c.strip):
                                score_product(s, first_at, 0, third + u32(at * c.pitch) + b_lane)
                                strip(third + u32(at * c.pitch), fourth + u32(at * c.pitch), stats + u32(at * 4), info[0] + at)
                            else:
                                no_strip(info[0] + at)
                            at = at + c.strip
                    if c.drifts:
                        # This thread's copies of the next chunk are there, and its part of dS.
                        T.ptx.cp.async_.wait_group(c.stages - 2)
                        T.ptx.mbarrier.arrive.shared.b64(base + T.uint32(c.offsets["arrived"]))
                        if c.exchange:
                            T.ptx.bar.sync(u32(1 + warp // c.split), T.uint32(32 * c.split))
                    elif c.exchange or c.one_pass:
                        T.cuda.cta_sync()
                    if c.exchange:
                        others_product(out2, "p", fourth + slab)
                        others_product(out1, "ds", third + slab)
                    if c.drifts:
                        T.ptx.mbarrier.arrive.shared.b64(base + T.uint32(c.offsets["left"]))
                        wait(base + T.uint32(c.offsets["arrived"]), done % 2)
                    if c.one_pass:
                        add_dq()
                    take = take + 1
                    if take == c.stages:
                        take = 0
                    done = done + 1
                    if c.drifts:
                        buffer = T.uint32(c.exchange_bytes) - buffer
                    else:
                        T.cuda.cta_sync()
                        produce()
                        T.ptx.cp.async_.commit_group()
                        T.ptx.cp.async_.wait_group(0)
                        T.cuda.cta_sync()
                # Without any chunk the tile's rows may still be on their way.
                T.ptx.cp.async_.wait_group(0)

                @T.inline
                def store(out, start, factor):
                    # start: address of this thread's first row and the warp's first column
                    turn = T.alloc_local((3,), "uint32")
                    for m in T.unroll(c.row_blocks):
                        for half in T.unroll(2):
                            row_at: T.uint64 = start[2 * m + half]
                            wanted: T.bool = my_row + 16 * m + 8 * half < end
                            for n in T.unroll(c.out_columns // 16):
                                x: T.let = (m * (c.out_columns // 8) + 2 * n) * 4 + 2 * half
                                if HALF:
                                    # Neighbouring lanes swap halves of two 8-column blocks: a quad then writes whole 32-byte sectors.
                                    T.ptx[PACK](turn[0], out[x + 1] * factor, out[x] * factor)
                                    T.ptx[PACK](turn[1], out[x + 5] * factor, out[x + 4] * factor)
                                    turn[2] = T.tvm_warp_shuffle_xor(ALL, T.if_then_else(lane % 2 == 0, turn[1], turn[0]), 1, 32, 32)
                                    if T.And(wanted, across * c.out_columns + 16 * n + lane % 2 * 8 < D):
                                        T.ptx["st.global.v2.u32"](row_at + T.uint64(32 * n), T.if_then_else(lane % 2 == 0, turn[0], turn[2]), T.if_then_else(lane % 2 == 0, turn[2], turn[1]))
                                else:
                                    for side in T.unroll(2):
                                        if T.And(wanted, across * c.out_columns + 16 * n + 8 * side < D):
                                            T.ptx["st.global.v2.f32"](row_at + T.uint64(64 * n + 32 * side), out[x + 4 * side] * factor, out[x + 4 * side + 1] * factor)

                my_col: T.int32 = across * c.out_columns + (lane % 2 * 8 + lane % 4 // 2 * 4 if HALF else lane % 4 * 2)
                starts = T.alloc_local((2 * c.row_blocks,), "uint64")
                if c.keys:
                    for m in T.unroll(2 * c.row_blocks):
                        starts[m] = element(dv.data, (dv0s, dv1s, dv2s), b, h, my_row + 8 * m, E) + T.Cast("uint64", my_col * E)
                    store(out2, starts, T.float32(1))
                    for m in T.unroll(2 * c.row_blocks):
                        starts[m] = element(dk.data, (dk0s, dk1s, dk2s), b, h, my_row + 8 * m, E) + T.Cast("uint64", my_col * E)
                    store(out1, starts, scale)
                else:
                    for m in T.unroll(2 * c.row_blocks):
                        starts[m] = element(dq.data, (dq0s, dq1s, dq2s), b, h, my_row + 8 * m, E) + T.Cast("uint64", my_col * E)
                    store(out1, starts, scale)

        if not ONE_PASS:
            with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": DQ.blocks}):
                run_pass(DQ)
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": DKV.blocks}):
            run_pass(DKV)

        # dQ out of dq_sum.
        if ONE_PASS:
            with T.attr({"tirx.device_entry": True}):
                bx = T.cta_id([(B * HQ * N + (CAST_ROWS - 1)) // CAST_ROWS])
                tx = T.thread_id([SMALL_THREADS])
                # What is beyond the last row does that row again: shuffles need all lanes.
                row: T.int32 = T.min(bx * CAST_ROWS + tx // CAST_LANES, B * HQ * N - 1)
                lane: T.int32 = tx % CAST_LANES
                bh: T.int32 = T.truncdiv(row, N)
                i: T.int32 = row - bh * N
                b: T.int32 = T.truncdiv(bh, HQ)
                h: T.int32 = bh - b * HQ
                source: T.uint64 = address(dq_sum.data) + T.Cast("uint64", row) * T.uint64(4 * D) + T.Cast("uint64", lane * 16)
                to: T.uint64 = element(dq.data, (dq0s, dq1s, dq2s), b, h, i, E) + T.Cast("uint64", (lane // 4 * 16 + lane % 2 * 8 + lane % 4 // 2 * 4) * E)
                x = T.alloc_local((4,), "float32")
                swapped = T.alloc_local((2,), "float32")
                y = T.alloc_local((2,), "uint32")
                for step in T.unroll((D // 4 + CAST_LANES - 1) // CAST_LANES):
                    inside: T.bool = lane + step * CAST_LANES < D // 4
                    for e in T.unroll(4):
                        x[e] = T.float32(0)
                    if inside:
                        T.ptx["ld.global.v4.f32"](x[0], x[1], x[2], x[3], source + T.uint64(16 * CAST_LANES * step))
                    # A lane has two columns of each half of 16; with its neighbour's it has four of one.
                    for e in T.unroll(2):
                        swapped[e] = T.tvm_warp_shuffle_xor(ALL, T.if_then_else(lane % 2 == 0, x[2 + e], x[e]), 1, 32, 32)
                    for e in T.unroll(2):
                        x[2 + e] = T.if_then_else(lane % 2 == 0, swapped[e], x[2 + e])
                        x[e] = T.if_then_else(lane % 2 == 0, x[e], swapped[e])
                    if inside:
                        if HALF:
                            for w in T.unroll(2):
                                T.ptx[PACK](y[w], x[2 * w + 1] * scale, x[2 * w] * scale)
                            T.ptx["st.global.v2.u32"](to + T.uint64(4 * CAST_LANES * E * step), y[0], y[1])
                        else:
                            T.ptx["st.global.v4.f32"](to + T.uint64(4 * CAST_LANES * E * step), x[0] * scale, x[1] * scale, x[2] * scale, x[3] * scale)
    # fmt: on
    if not ONE_PASS:
        kept = [param for param in backward.params if param.name != "dq_sum"]
        backward = tvm.tirx.PrimFunc(kept, backward.body, backward.ret_type, backward.attrs)
    return tvm.IRModule({"backward": backward})
