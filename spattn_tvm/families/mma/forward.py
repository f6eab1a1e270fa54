"""Banded attention forward for any NVIDIA GPU from sm_80 on: ``mma.sync``, ``ldmatrix``, ``cp.async``.

A thread block owns one tile of query rows of one head, a warp 16 or 32 of its rows. All threads copy the keys
and values of the tile's near and far band, chunk by chunk, into a ring in shared memory; each warp computes
with the chunks that its own rows attend to and lets the others pass. Threads meet at two barriers a stage,
full and empty, so that a warp may be as many chunks before another as the ring has stages that are not being
filled.

Key ranges start at the band's edge, not at a multiple of the chunk. A chunk whose every pair is attended is
one step without a mask; a chunk that an edge crosses is taken in steps of ``edge_keys``, masked, of which
those that the warp's rows don't attend to are left out.

Measured on an H200, bfloat16, spattention, L2 cleared, medians of 21 and 15, in ms at (B, H, N, D); steps of
32 keys at an edge, groups of 8 heads:

================================================================  ================  =================
warps x rows, key rows, stages (ahead), asks for a chunk, blocks  4, 16, 4096, 128  1, 16, 16384, 128
================================================================  ================  =================
4 x 32, 32, 4 (2), before the scores, 2                           0.208             0.574
4 x 32, 32, 4 (3), after the scores, 2                            0.223             0.603
4 x 32, 32, 2 (1), after the scores, 2                            0.225             0.605
4 x 32, 64, 2 (1), after the weights, 2                           0.220             0.580
4 x 32, 64, 2 (1), after the scores, 2                            0.230             0.584
2 x 32, 32, 2 (1), after the scores, 4                            0.222             0.638
8 x 32, 64, 4 (2), before the scores, 1                           0.237             0.605
4 x 16, 32, 2 (1), after the scores, 3                            0.244             0.733
8 x 16, 32, 3 (1), before the scores, 1                           0.299             0.783
================================================================  ================  =================

Dense causal FlashAttention-2 (PyTorch's) made 306 and 325 TFLOP/s on the same chip, the first line 234 and
347 beside it. With one barrier of the whole block for each chunk, 64 key rows and 2 stages took 0.230 and
0.605; without that barrier (and wrong) 0.193 and 0.529, without loads as well 0.175 and 0.481, without
``exp2`` 0.223 and 0.583: it is waiting, not arithmetic, that there is to save. One barrier a stage, at which
a thread arrives when it is through with a chunk and its own copies of a later one are there, took 0.202 and
0.548 beside the first line's 0.203 and 0.554, but with two stages 0.232 and 0.609 beside 0.225 and 0.586:
then no warp gets ahead of another. Groups of 8 heads saved 1 to 2 % in each of six pairs. At
(4, 16, 4096, 64), three blocks of 4 x 32 rows and six stages (three ahead) took 0.119, four blocks of 4 x 16
rows and two stages of 64 keys 0.126.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .blocks import (
    BATCH,
    BLOCK,
    DOC_BEGIN,
    DOC_END,
    FAR_HI,
    FAR_LO,
    HEAD,
    LOCATION_WORDS,
    NEAR_HI,
    NEAR_LO,
    ROW0,
    Blocks,
    element_bytes,
    locate_macro,
    registers_most,
    row_loader_macro,
    row_pitch,
    shared_bytes_most,
    tile_slots,
    wait_macro,
)

if TYPE_CHECKING:
    import tvm

TILE_BYTES = 4 * LOCATION_WORDS + 12  # a multiple of 16
LEAST_SCALE = 1e-30
NO_MAXIMUM = -1e30  # finite, so that a row without keys gives exp2(-inf - finite) = 0 rather than NaN


def shared_bytes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> int:
    """Shared memory of a block: the query tile, a ring of chunks of keys and of values, the tile's words."""
    rows = decisions["warps"] * decisions["warp_rows"] + 2 * decisions["stages"] * decisions["key_rows"]
    return rows * row_pitch(head_dim, dtype) * element_bytes(dtype) + TILE_BYTES + 16 * decisions["stages"]


def registers_needed(decisions: Mapping[str, int], head_dim: int, dtype: str) -> int:
    """Registers of a thread: output, scores, the operands in flight, and 40 for the rest."""
    tiles = decisions["warp_rows"] // BLOCK
    keys = decisions["key_rows"]
    output, scores = tiles * head_dim // 2, tiles * keys // 2
    if dtype == "float32":
        # Weights are twice as many words as scores, which are gone by then.
        return output + 2 * scores + 16 * tiles + 16 + 76
    queries = tiles * head_dim // 4 if decisions["queries_in_registers"] else 8 * tiles
    return output + scores + queries + 8 + 32


def conflict(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> str | None:
    """Why the kernel can't be built with ``decisions`` for a chip of ``arch``; None if it can."""
    blocks, threads = decisions["blocks_per_multiprocessor"], 32 * decisions["warps"]
    needed, limit = shared_bytes(decisions, head_dim, dtype), shared_bytes_most(arch, blocks)
    if needed > limit:
        return f"{needed} bytes of shared memory, each of {blocks} blocks has {limit} on {arch}"
    registers, most = registers_needed(decisions, head_dim, dtype), registers_most(threads, blocks)
    if registers > most:
        return f"about {registers} registers are needed, each of {blocks} x {threads} threads has {most}"
    if decisions["key_rows"] % decisions["edge_keys"]:
        return f"edge_keys={decisions['edge_keys']} does not divide key_rows={decisions['key_rows']}"
    if decisions["ahead"] >= decisions["stages"]:
        return f"ahead={decisions['ahead']} leaves none of stages={decisions['stages']} to compute with"
    if dtype == "float32" and decisions["queries_in_registers"]:
        return "queries_in_registers is for two-byte types: float32 queries and their rests are too many"
    return None


def build_mma_forward(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> tvm.IRModule:
    """Build the forward kernel for a chip of ``arch``.

    The module exports ``forward(q, k, v, bands, cu_seqlens, o, lse, scale, workers)``: q and o (B, Hq, N, D),
    k and v (B, Hkv, N, D) of ``dtype``, any strides with a contiguous last dimension, base addresses and
    strides multiples of 16 bytes; bands int32 (M, Hq, 4); cu_seqlens int32 (documents + 1,); lse float32
    (B, Hq, N), contiguous, natural logarithm; scale float32, of any sign; workers int32, not used. B, N and
    the head counts must be positive. A query without keys gets o = 0 and lse = -inf. Masked keys of a visited
    chunk get the weight 0, so a NaN among the values there spreads, as it does in dense attention with a mask.

    Parameters
    ----------
    decisions : mapping of str to int
        ``warps`` of a thread block, ``warp_rows`` (query rows of each, 16 or 32: the operands from keys and
        values are loaded once for them), ``key_rows`` of a chunk, ``edge_keys`` (of a step where an edge
        crosses a chunk), ``stages`` of the ring, ``ahead`` (chunks that are on
        their way; the fewer of the stages, the further warps may drift apart), ``load_point`` (when a warp
        asks for the next one: 0 before a chunk's scores, 1 after them, 2 after the weights),
        ``queries_in_registers`` (0: loaded again for each step),
        ``rescale_threshold`` (in powers of two; output is rescaled only when a row's maximum grew by more;
        0: always), ``head_group`` ((batch, head) pairs whose tiles are interleaved),
        ``blocks_per_multiprocessor`` (that registers must suffice for).
    head_dim : int
        A multiple of 16.
    dtype : {"bfloat16", "float16", "float32"}
    arch : str
        Such as ``"sm_80"``.

    Returns
    -------
    tvm.IRModule
        For ``tvm.compile(..., tir_pipeline="tirx")``.

    Raises
    ------
    ValueError
        When the head dim, the dtype or the combination of decisions can't work.
    """
    from tvm import IRModule
    from tvm.script import tirx as T

    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be 'bfloat16', 'float16' or 'float32', got {dtype!r}")
    if head_dim % BLOCK:
        raise ValueError(f"head_dim must be a multiple of {BLOCK}, got {head_dim}")
    reason = conflict(decisions, head_dim, dtype, arch)
    if reason is not None:
        raise ValueError(f"{reason}: choose other decisions than {dict(decisions)}")

    D = head_dim
    WARP_ROWS = decisions["warp_rows"]
    KEYS = decisions["key_rows"]
    EDGE = decisions["edge_keys"]
    STAGES = decisions["stages"]
    AHEAD = decisions["ahead"]
    LOAD_POINT = decisions["load_point"]
    Q_IN_REGISTERS = bool(decisions["queries_in_registers"])
    THRESHOLD = float(decisions["rescale_threshold"])
    BLOCKS_PER_MULTIPROCESSOR = decisions["blocks_per_multiprocessor"]

    THREADS = 32 * decisions["warps"]
    ROWS = decisions["warps"] * WARP_ROWS
    TILES = WARP_ROWS // BLOCK  # of 16 rows in a warp
    STEPS = D // BLOCK
    PITCH = row_pitch(D, dtype)
    CHUNK = KEYS * PITCH  # elements
    K_AT, V_AT = ROWS * PITCH, ROWS * PITCH + STAGES * CHUNK
    BARRIER_BYTES = 16 * STAGES
    ARENA = ROWS * PITCH + 2 * STAGES * CHUNK + (TILE_BYTES + BARRIER_BYTES) // element_bytes(dtype)
    FULL, EMPTY = 0, STAGES
    blocks = Blocks(dtype, PITCH)
    WORDS = blocks.words
    wait = wait_macro(arch)
    locate = locate_macro(ROWS, decisions["head_group"])
    load_queries = row_loader_macro(ROWS, D, dtype, THREADS)
    load_chunk = row_loader_macro(KEYS, D, dtype, THREADS)
    # Unrolled, split operands of several steps would be loaded at once, and spill.
    over_steps = T.serial if blocks.is_split else T.unroll
    LOG2E, LN2, INF = math.log2(math.e), math.log(2.0), math.inf
    ALL = 0xFFFFFFFF
    SIGNS = 0x80000000 if dtype == "float32" else 0x80008000  # of the elements of a word

    def first_key(tile: Any, which: Any, near_chunks: Any) -> Any:
        """The first key of chunk `which`, of the near band's chunks and behind them the far band's."""
        is_near = which < near_chunks
        top = T.min(tile[ROW0] + ROWS, tile[DOC_END]) - tile[T.Select(is_near, NEAR_LO, FAR_LO)]
        return top - (which + 1 - T.Select(is_near, 0, near_chunks)) * KEYS

    def greatest(scores: Any, first: Any, keys: int) -> Any:
        """The greatest of a lane's scores in one row: pairs ``first``, ``first + 4``, ... of each tile."""
        level = [scores[first + 4 * n + e] for n in range(keys // 8) for e in range(2)]
        while len(level) > 1:
            level = [T.max(*level[i : i + 2]) for i in range(0, len(level), 2)]
        return level[0]

    @T.prim_func
    def forward(
        q_ptr: T.handle,
        k_ptr: T.handle,
        v_ptr: T.handle,
        bands_ptr: T.handle,
        cu_ptr: T.handle,
        o_ptr: T.handle,
        lse_ptr: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "forward"})
        # 64-bit shapes, because a stride is bound in the type of its buffer's shape.
        B64 = T.int64()
        Hq64 = T.int64()
        Hkv64 = T.int64()
        N64 = T.int64()
        M64 = T.int64()
        BOUNDS64 = T.int64()
        qb = T.int64()
        qh = T.int64()
        qn = T.int64()
        kb = T.int64()
        kh = T.int64()
        kn = T.int64()
        vb = T.int64()
        vh = T.int64()
        vn = T.int64()
        ob = T.int64()
        oh = T.int64()
        on = T.int64()
        Q = T.match_buffer(q_ptr, (B64, Hq64, N64, D), dtype, strides=(qb, qh, qn, 1), align=16)
        K = T.match_buffer(k_ptr, (B64, Hkv64, N64, D), dtype, strides=(kb, kh, kn, 1), align=16)
        V = T.match_buffer(v_ptr, (B64, Hkv64, N64, D), dtype, strides=(vb, vh, vn, 1), align=16)
        bands = T.match_buffer(bands_ptr, (M64, Hq64, 4), "int32")
        cu = T.match_buffer(cu_ptr, (BOUNDS64,), "int32")
        O = T.match_buffer(o_ptr, (B64, Hq64, N64, D), dtype, strides=(ob, oh, on, 1), align=16)
        lse = T.match_buffer(lse_ptr, (B64, Hq64, N64), "float32")
        # Indexing the tensors themselves would ignore their strides.
        q_flat = T.decl_buffer((B64 * qb,), dtype, data=Q.data)
        k_flat = T.decl_buffer((B64 * kb,), dtype, data=K.data)
        v_flat = T.decl_buffer((B64 * vb,), dtype, data=V.data)
        o_flat = T.decl_buffer((B64 * ob,), dtype, data=O.data)

        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS_PER_MULTIPROCESSOR})
        block = T.cta_id([T.cast(tile_slots(N64, BOUNDS64 - T.int64(1), ROWS) * B64 * Hq64, "int32")])
        warp = T.warp_id([THREADS // 32])
        lane = T.lane_id([32])
        thread = T.thread_id([THREADS])
        arena = T.alloc_buffer((ARENA,), dtype, scope="shared.dyn", align=128)
        arena_words = T.decl_buffer(
            (ARENA * element_bytes(dtype) // 4,), "uint32", data=arena.data, scope="shared.dyn"
        )

        # In shared memory, because registers are what this kernel is short of.
        tile = T.decl_buffer(
            (LOCATION_WORDS,),
            "int32",
            data=arena.data,
            elem_offset=(ARENA * element_bytes(dtype) - BARRIER_BYTES - TILE_BYTES) // 4,
            scope="shared.dyn",
        )
        barriers = T.decl_buffer(
            (2 * STAGES,),
            "uint64",
            data=arena.data,
            elem_offset=(ARENA * element_bytes(dtype) - BARRIER_BYTES) // 8,
            scope="shared.dyn",
        )

        if thread == 0:
            for s in T.unroll(STAGES):
                T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([FULL + s]), T.uint32(THREADS))
                T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([EMPTY + s]), T.uint32(THREADS))
            locate(
                tile, block, bands, cu, T.cast(B64, "int32"), T.cast(Hq64, "int32"), T.cast(N64, "int32"),
                T.cast(BOUNDS64, "int32") - 1, T.cast(M64, "int32"),
            )  # fmt: skip
        T.cuda.cta_sync()
        if tile[ROW0] < tile[DOC_END]:
            batch: T.int64 = T.cast(tile[BATCH], "int64")
            kv_head: T.int64 = T.cast(tile[HEAD] // T.cast(Hq64 // Hkv64, "int32"), "int64")
            k_origin: T.int64 = batch * kb + kv_head * kh
            v_origin: T.int64 = batch * vb + kv_head * vh
            q_origin: T.int64 = batch * qb + T.cast(tile[HEAD], "int64") * qh

            # Keys [top - chunks * KEYS, top) of a band, read from the top down.
            rows_end: T.int32 = T.min(tile[ROW0] + ROWS, tile[DOC_END])
            near_keys: T.int32 = rows_end - tile[NEAR_LO] - T.max(tile[DOC_BEGIN], tile[ROW0] - tile[NEAR_HI])
            far_keys: T.int32 = rows_end - tile[FAR_LO] - T.max(tile[DOC_BEGIN], tile[ROW0] - tile[FAR_HI])
            near_chunks: T.int32 = T.max(near_keys + (KEYS - 1), 0) // KEYS
            chunks: T.int32 = near_chunks + T.max(far_keys + (KEYS - 1), 0) // KEYS

            @T.inline
            def load_keys_and_values(which, stage):
                first: T.int32 = first_key(tile, which, near_chunks)
                begin: T.int32 = tile[DOC_BEGIN]
                end: T.int32 = tile[DOC_END]
                load_chunk(arena, K_AT + stage * CHUNK, k_flat, k_origin, kn, first, begin, end, thread)
                load_chunk(arena, V_AT + stage * CHUNK, v_flat, v_origin, vn, first, begin, end, thread)
                T.ptx["cp.async.mbarrier.arrive.noinc.shared.b64"](barriers.ptr_to([FULL + stage]))

            load_queries(
                arena, 0, q_flat, q_origin, qn, tile[ROW0], tile[DOC_BEGIN], tile[DOC_END], thread
            )  # fmt: skip
            for s in T.unroll(AHEAD):
                if s < chunks:
                    load_keys_and_values(s, s)

            my_row0: T.int32 = tile[ROW0] + warp * WARP_ROWS  # of this warp
            query: T.int32 = my_row0 + lane // 4  # and 8 below, in each of the tiles
            # The queries carry a negative factor's sign, so that the greatest score has the greatest weight; and
            # the factor is not 0, which would make 0 * -inf of a masked score.
            scale2: T.float32 = T.max(T.abs(scale) * T.float32(LOG2E), T.float32(LEAST_SCALE))
            q_lane: T.int32 = blocks.lane_a(lane) + warp * (WARP_ROWS * PITCH)
            k_lane: T.int32 = blocks.lane_b_transposed(lane)
            v_lane: T.int32 = blocks.lane_b(lane)
            queries = T.alloc_local((TILES * WORDS * (STEPS if Q_IN_REGISTERS else 1),), "uint32")
            output = T.alloc_local((TILES * STEPS * 8,), "float32")
            row_max = T.alloc_local((2 * TILES,), "float32")  # of scores times scale2
            row_sum = T.alloc_local((2 * TILES,), "float32")
            shrink = T.alloc_local((2 * TILES,), "float32")
            for i in T.unroll(2 * TILES):
                row_max[i] = T.float32(NO_MAXIMUM)
                row_sum[i] = T.float32(0)
            for i in T.unroll(TILES * STEPS * 8):
                output[i] = T.float32(0)

            # Makes the greatest score of each row so far the reference of its weights.
            @T.inline
            def raise_maximum(top):
                for i in T.unroll(2 * TILES):
                    top[i] = T.max(top[i], T.tvm_warp_shuffle_xor(T.uint32(ALL), top[i], 1, 32, 32))
                for i in T.unroll(2 * TILES):
                    top[i] = T.max(top[i], T.tvm_warp_shuffle_xor(T.uint32(ALL), top[i], 2, 32, 32))
                for i in T.unroll(2 * TILES):
                    top[i] = T.max(top[i] * scale2, row_max[i])
                    shrink[i] = T.exp2(row_max[i] - top[i])
                    row_max[i] = top[i]
                    row_sum[i] = row_sum[i] * shrink[i]
                for m in T.unroll(TILES):
                    for j in T.unroll(STEPS * 2):
                        for r in T.unroll(2):
                            for e in T.unroll(2):
                                i: T.let = m * STEPS * 8 + 4 * j + 2 * r + e
                                output[i] = output[i] * shrink[2 * m + r]

            chunk: T.int32 = 0
            stage: T.int32 = 0  # of the chunk
            phase: T.int32 = 0  # of the stage

            # A later chunk, as soon as all warps are through with the one whose place it takes.
            @T.inline
            def load_ahead():
                if chunk + AHEAD < chunks:
                    wraps: T.bool = stage + AHEAD >= STAGES
                    place: T.int32 = T.Select(wraps, stage + AHEAD - STAGES, stage + AHEAD)
                    wait(barriers.ptr_to([EMPTY + place]), T.Select(wraps, phase, phase ^ 1))
                    load_keys_and_values(chunk + AHEAD, place)

            # One step of the online softmax: `keys` keys from row `offset` of the chunk in `stage` on.
            @T.inline
            def attend(offset, keys, masked, key0, low, high):
                scores = T.alloc_local((TILES * keys // 2,), "float32")
                weights = T.alloc_local((TILES * keys // BLOCK * WORDS,), "uint32")
                k_words = T.alloc_local((keys // BLOCK * WORDS,), "uint32")
                v_words = T.alloc_local((WORDS,), "uint32")
                top = T.alloc_local((2 * TILES,), "float32")
                k_from: T.int32 = K_AT + stage * CHUNK + offset * PITCH + k_lane
                v_from: T.int32 = V_AT + stage * CHUNK + offset * PITCH + v_lane
                for i in T.unroll(TILES * keys // 2):
                    scores[i] = T.float32(0)
                for step in over_steps(STEPS):
                    if not Q_IN_REGISTERS:
                        for m in T.unroll(TILES):
                            blocks.load_a(
                                queries, m * WORDS, arena, q_lane + (m * BLOCK * PITCH + step * BLOCK)
                            )
                    for n in T.unroll(keys // BLOCK):
                        blocks.load_b_transposed(
                            k_words, n * WORDS, arena, k_from + (n * BLOCK * PITCH + step * BLOCK)
                        )
                        for m in T.unroll(TILES):
                            blocks.multiply(
                                scores, (m * (keys // BLOCK) + n) * 8,
                                queries, ((step if Q_IN_REGISTERS else 0) * TILES + m) * WORDS,
                                k_words, n * WORDS,
                            )  # fmt: skip

                if not masked and LOAD_POINT == 1:
                    load_ahead()
                if masked:
                    for m in T.unroll(TILES):
                        for r in T.unroll(2):
                            row: T.int32 = query + (m * BLOCK + 8 * r)
                            least: T.int32 = T.max(tile[DOC_BEGIN], row - high)
                            seen: T.uint32 = T.cast(T.max(row - low + 1 - least, 0), "uint32")
                            for n in T.unroll(keys // BLOCK):
                                for t in T.unroll(2):
                                    for e in T.unroll(2):
                                        i: T.let = (m * (keys // BLOCK) + n) * 8 + 4 * t + 2 * r + e
                                        key: T.int32 = (
                                            key0 + n * BLOCK + blocks.column(lane, t, e, transposed=True)
                                        )
                                        scores[i] = T.Select(
                                            T.cast(key - least, "uint32") < seen,
                                            scores[i],
                                            T.float32(-INF),
                                        )
                for m in T.unroll(TILES):
                    for r in T.unroll(2):
                        top[2 * m + r] = greatest(scores, m * (keys // 2) + 2 * r, keys)
                if THRESHOLD > 0:
                    # Any reference near the maximum gives the same quotient; weights stay below
                    # 2**threshold, sums are float32. So lanes need not know each other's maxima.
                    grown = T.alloc_local((1,), "float32")
                    grown[0] = top[0] * scale2 - row_max[0]
                    for i in T.unroll(2 * TILES - 1):
                        grown[0] = T.max(grown[0], top[i + 1] * scale2 - row_max[i + 1])
                    if T.cuda.any_sync(T.uint32(ALL), grown[0] > T.float32(THRESHOLD)) != 0:
                        raise_maximum(top)
                else:
                    raise_maximum(top)

                for m in T.unroll(TILES):
                    for n in T.unroll(keys // BLOCK):
                        for t in T.unroll(2):
                            for r in T.unroll(2):
                                for e in T.unroll(2):
                                    i: T.let = (m * (keys // BLOCK) + n) * 8 + 4 * t + 2 * r + e
                                    scores[i] = T.exp2(scores[i] * scale2 - row_max[2 * m + r])
                                    row_sum[2 * m + r] = row_sum[2 * m + r] + scores[i]
                        at: T.let = m * (keys // BLOCK) + n
                        blocks.a_from_sums(weights, at * WORDS, scores, at * 8)

                if not masked and LOAD_POINT == 2:
                    load_ahead()
                for n in T.unroll(keys // BLOCK):
                    for step in T.unroll(STEPS):
                        blocks.load_b(v_words, 0, arena, v_from + (n * BLOCK * PITCH + step * BLOCK))
                        for m in T.unroll(TILES):
                            blocks.multiply(
                                output, (m * STEPS + step) * 8,
                                weights, (m * (keys // BLOCK) + n) * WORDS,
                                v_words, 0,
                            )  # fmt: skip
                        if blocks.is_split:
                            T.cuda.warp_sync()

            if scale < T.float32(0):
                T.ptx["cp.async.wait_all"]()
                T.cuda.cta_sync()
                for i in T.serial(WARP_ROWS * PITCH * element_bytes(dtype) // 128):
                    at: T.int32 = warp * (WARP_ROWS * PITCH * element_bytes(dtype) // 4) + 32 * i + lane
                    arena_words[at] = arena_words[at] ^ T.uint32(SIGNS)
                T.cuda.warp_sync()
            my_end: T.int32 = T.min(my_row0 + WARP_ROWS, tile[DOC_END])
            # From which chunk of a band on some, or all, of this warp's rows are not before its keys.
            some_first: T.int32 = T.Select(my_row0 < my_end, (rows_end - my_end) // KEYS, chunks)
            full_first: T.int32 = T.Select(
                my_row0 < my_end, (rows_end - 1 - my_row0 + (KEYS - 1)) // KEYS, chunks
            )
            band: T.int32 = 0
            while band < 2:
                low: T.int32 = tile[T.Select(band == 0, NEAR_LO, FAR_LO)]
                high: T.int32 = tile[T.Select(band == 0, NEAR_HI, FAR_HI)]
                count: T.int32 = T.Select(band == 0, near_chunks, chunks - near_chunks)
                # Behind which chunk all, or some, of this warp's rows are too far from its keys.
                top: T.int32 = rows_end - low
                some_last: T.int32 = (top - T.max(tile[DOC_BEGIN], my_row0 - high) + (KEYS - 1)) // KEYS
                full_last: T.int32 = (top - T.max(tile[DOC_BEGIN], my_end - 1 - high)) // KEYS
                index: T.int32 = 0
                while index < count:
                    wait(barriers.ptr_to([FULL + stage]), phase)
                    if Q_IN_REGISTERS:
                        if chunk == 0:
                            for step in T.unroll(STEPS):
                                for m in T.unroll(TILES):
                                    blocks.load_a(
                                        queries, (step * TILES + m) * WORDS, arena,
                                        q_lane + (m * BLOCK * PITCH + step * BLOCK),
                                    )  # fmt: skip
                    if T.And(index >= full_first, index < full_last):
                        if LOAD_POINT == 0:
                            load_ahead()
                        attend(0, KEYS, False, 0, low, high)
                    else:
                        load_ahead()
                        if T.And(index >= some_first, index < some_last):
                            key0: T.int32 = top - (index + 1) * KEYS
                            offset: T.int32 = (
                                T.max(T.max(tile[DOC_BEGIN], my_row0 - high) - key0, 0) // EDGE * EDGE
                            )
                            last: T.int32 = T.min(my_end - low - key0, KEYS)
                            while offset < last:
                                attend(offset, EDGE, True, key0 + offset, low, high)
                                offset = offset + EDGE
                    # Each lane for itself: one that arrives for its warp, behind a warp barrier, is no
                    # faster, and racecheck doesn't know that it speaks for the other lanes' reads.
                    T.ptx.mbarrier.arrive.shared.b64(barriers.ptr_to([EMPTY + stage]))
                    chunk = chunk + 1
                    index = index + 1
                    phase = T.Select(stage == STAGES - 1, phase ^ 1, phase)
                    stage = T.Select(stage == STAGES - 1, 0, stage + 1)
                band = band + 1
            # Without any chunk the queries may still be on their way.
            T.ptx["cp.async.wait_all"]()

            for m in T.unroll(TILES):
                for r in T.unroll(2):
                    i: T.let = 2 * m + r
                    row: T.int32 = query + (m * BLOCK + 8 * r)
                    row_sum[i] = row_sum[i] + T.tvm_warp_shuffle_xor(T.uint32(ALL), row_sum[i], 1, 32, 32)
                    row_sum[i] = row_sum[i] + T.tvm_warp_shuffle_xor(T.uint32(ALL), row_sum[i], 2, 32, 32)
                    shrink[i] = T.Select(row_sum[i] > T.float32(0), T.float32(1) / row_sum[i], T.float32(0))
                    if T.And(lane % 4 == 0, row < tile[DOC_END]):
                        lse[tile[BATCH], tile[HEAD], row] = T.Select(
                            row_sum[i] > T.float32(0),
                            (row_max[i] + T.log2(row_sum[i])) * T.float32(LN2),
                            T.float32(-INF),
                        )
                    o_row: T.int64 = (
                        T.cast(tile[BATCH], "int64") * ob
                        + T.cast(tile[HEAD], "int64") * oh
                        + T.cast(row, "int64") * on
                    )
                    blocks.store_row(
                        o_flat, o_row, row < tile[DOC_END], output, m * STEPS * 8, r, STEPS, shrink[i], lane
                    )

    return IRModule({"forward": forward})
