"""Banded attention forward for Hopper (sm_90a): TMA, wgmma, warp specialisation, a persistent grid.

One thread block per multiprocessor takes query tiles from an atomic counter until none is left. Its first
warpgroup moves: one thread decodes the next tile (heads, document, key ranges), another loads the tile's
queries and the keys and values of its far and near bands by TMA, the latter into two rings of chunks. The
other warpgroups compute: each owns 64 query rows, takes from the rings the chunks that its own rows attend
to, and lets the others pass.

Key ranges start at the band's edge, not at a multiple of the chunk (a TMA box may start at any row), and only
chunks that an edge crosses are masked. With 64-row warpgroups and 64-key chunks that executes 1.25 times the
useful products at 16 heads and N = 4096, the least that 64-row instructions allow.

Measured on an H200, bfloat16, spattention, L2 cleared, medians of 40, in ms at (B, H, N, D); a dash where the
registers don't suffice or nothing was measured:

===================================  ================  =================  ================  ===============
warpgroups, chunk, queries, overlap  4, 16, 4096, 128  1, 16, 16384, 128  4, 32, 4096, 128  4, 16, 4096, 64
===================================  ================  =================  ================  ===============
3, 64, shared memory, yes            0.131             0.325              0.182             0.100
4, 64, shared memory, yes            -                 -                  -                 0.091
3, 64, registers, yes                -                 -                  -                 0.099
3, 64, registers, no                 0.136             0.346              0.185             -
3, 64, registers, no, two parts      0.133             0.329              0.186             -
3, 64, shared memory, no             0.143             0.386              0.191             -
2, 64, registers, yes                0.141             0.370              0.197             0.110
2, 64, shared memory, yes            0.143             0.382              0.199             -
2, 128, registers, yes               0.146             0.341              0.214             0.113
===================================  ================  =================  ================  ===============

Dense causal cuDNN took 0.472 and 1.712 in the same run. Chunks of 80 and 96 keys took 0.156 and 0.160. At
(4, 16, 4096, 128) the tensor cores were busy 53 % of the time, issue slots 41 %, L2 66 %, memory 42 %: no
unit is full, the chain from scores to weights is long, which more warpgroups and overlap hide. Overlap across
tiles (the next tile's first scores issued before this one's output is written) did not pay: 0.133, 0.329, 0.186
and 0.091 ms where 0.131, 0.324, 0.182 and 0.090 were measured without it in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm

WARPGROUP_ROWS = 64
PLANE = 64  # columns of a 128-byte swizzled row of 2-byte elements
REGISTERS_PER_BLOCK = 65536
PRODUCER_REGISTERS_LEAST = 24
SHARED_BYTES_MOST = 232_448 - 1024  # 227 KB, less what aligning the arena may take

# What the decoding thread tells the others about a tile, as int32 words in shared memory.
TILE_WORDS = 16
LIVE, BATCH, HEAD, QUERY0, DOC_BEGIN, DOC_END, NEAR_LO, NEAR_HI, FAR_LO, FAR_HI = range(10)
NEAR_TOP, NEAR_CHUNKS, FAR_TOP, FAR_CHUNKS = range(10, 14)

NO_MAXIMUM = -1e30  # finite, so that a row without keys gives exp2(-inf - finite) = 0 rather than NaN


def entry_registers(warpgroups: int) -> int:
    """Registers of each thread at launch: what the hardware can give all threads, in steps of 8."""
    return REGISTERS_PER_BLOCK // (128 * warpgroups) // 8 * 8


def producer_registers(consumer_warpgroups: int, consumer_registers: int) -> int:
    """What the loading warpgroup may keep so that the consumers can have theirs.

    The pool is what the block was launched with, not the whole register file: two consumers at 240 leave 24
    of 168, and asking for more hangs the block in ``setmaxnreg``.
    """
    entry = entry_registers(consumer_warpgroups + 1)
    return entry - consumer_warpgroups * (consumer_registers - entry)


def shared_bytes(decisions: Mapping[str, int], head_dim: int) -> int:
    """Shared memory of a block: two rings, the query tile, the tile's words and the barriers."""
    rows = WARPGROUP_ROWS * decisions["consumer_warpgroups"]
    ring = 2 * decisions["stages"] * decisions["key_rows"] * head_dim * 2
    queries = (1 if decisions["queries_in_registers"] else 2) * rows * head_dim * 2
    return ring + queries + 4 * TILE_WORDS + 8 * (4 * decisions["stages"] + 6)


def least_stages(decisions: Mapping[str, int]) -> int:
    """Ring depth below which the overlapped loop can deadlock.

    Between the near and the far band a warpgroup lets pass up to ``(rows - 64) // key_rows + 1`` key chunks
    while it still holds one value chunk, and the loader issues each chunk's keys before its values.
    """
    if not decisions["overlap"]:
        return 2
    return WARPGROUP_ROWS * (decisions["consumer_warpgroups"] - 1) // decisions["key_rows"] + 2


def consumer_registers_needed(decisions: Mapping[str, int], head_dim: int) -> int:
    """Registers of a computing thread: output, scores, weights beside them, queries, and 32 for the rest.

    ptxas spilled nothing where these fit, and serialised every wgmma (C7512) where they did not: 160 of 160
    and 112 of 112 fitted, 176 of 160 and 128 of 112 did not.
    """
    keys = decisions["key_rows"]
    weights = keys // 4 if decisions["overlap"] else 0
    queries = head_dim // 4 if decisions["queries_in_registers"] else 0
    return head_dim // 2 + keys // 2 + weights + queries + 32


def conflict(decisions: Mapping[str, int], head_dim: int) -> str | None:
    """Why the kernel can't be built with ``decisions``, or would be wrong or hang; None if it can."""
    warpgroups, registers = decisions["consumer_warpgroups"], decisions["consumer_registers"]
    if shared_bytes(decisions, head_dim) > SHARED_BYTES_MOST:
        return f"{shared_bytes(decisions, head_dim)} bytes of shared memory, a block has {SHARED_BYTES_MOST}"
    if decisions["stages"] < least_stages(decisions):
        return f"stages={decisions['stages']} can deadlock, {least_stages(decisions)} are needed"
    if registers < entry_registers(warpgroups + 1):
        return f"consumer_registers={registers} is less than a thread has at launch"
    if producer_registers(warpgroups, registers) < PRODUCER_REGISTERS_LEAST:
        return f"consumer_registers={registers} leaves the loader {producer_registers(warpgroups, registers)}"
    if consumer_registers_needed(decisions, head_dim) > registers:
        needed = consumer_registers_needed(decisions, head_dim)
        return f"about {needed} registers are needed, consumer_registers={registers}"
    if decisions["overlap"] and decisions["weight_parts"] != 1:
        return "weight_parts is for kernels without overlap"
    if decisions["key_rows"] // 16 % decisions["weight_parts"]:
        return f"weight_parts={decisions['weight_parts']} does not divide {decisions['key_rows'] // 16} steps"
    if decisions["queries_in_registers"] and not decisions["overlap"] and decisions["key_rows"] == head_dim:
        # Seen at 64 and 64: wrong results, and in the SASS the same registers in both products.
        return "ptxas 13.0 keeps queries and weights of one size in the same registers"
    return None


def build_hopper_forward(decisions: Mapping[str, int], head_dim: int, dtype: str) -> tvm.IRModule:
    """Build the forward kernel for sm_90a.

    The module exports ``forward(q, k, v, bands, cu_seqlens, o, lse, counters, scale, workers)``: q and o (B,
    Hq, N, D), k and v (B, Hkv, N, D) of ``dtype``, any strides with a contiguous last dimension, base
    addresses and strides multiples of 16 bytes; bands int32 (M, Hq, 4); cu_seqlens int32 (documents + 1,);
    lse float32 (B, Hq, N), contiguous, natural logarithm; counters int32 (2,), zero before the first call,
    left zero by each call, not shared by calls that may run at the same time; scale float32 > 0; workers
    int32, the number of thread blocks (one for each multiprocessor). B, N and the head counts must be
    positive. A query without keys gets o = 0 and lse = -inf. Masked keys of a visited chunk get the weight
    0, so a NaN among the values there spreads, as it does in dense attention with a mask.

    Parameters
    ----------
    decisions : mapping of str to int
        ``consumer_warpgroups`` (64 query rows each), ``key_rows`` of a chunk (a multiple of 16), ``stages``
        of each ring (a power of two: others cost divisions), ``overlap`` (1: the next chunk's scores are
        issued before the current values' product), ``weight_parts`` (without overlap: the values' product is
        issued in so many parts, each as soon as its weights are ready), ``queries_in_registers`` (0: two
        tiles of queries in shared memory, which frees D / 4 registers), ``rescale_threshold`` (in powers of
        two; output is rescaled only when a row's maximum grew by more; 0: always), ``head_group`` ((batch,
        head) pairs whose tiles are interleaved), ``consumer_registers`` (of each computing thread),
        ``dynamic`` (1: tiles from a counter, 0: every ``workers``-th tile), ``claim_lead`` (chunks that the
        loader has still to issue when the next tile is claimed).
    head_dim : int
        A multiple of 64.
    dtype : {"bfloat16", "float16"}

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

    from spattn_tvm.domains.tiles import table_row

    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f"dtype must be 'bfloat16' or 'float16', got {dtype!r}")
    if head_dim % PLANE:
        raise ValueError(f"head_dim must be a multiple of {PLANE}, got {head_dim}")
    reason = conflict(decisions, head_dim)
    if reason is not None:
        raise ValueError(f"{reason}: choose other decisions than {dict(decisions)}")

    D = head_dim
    CONSUMERS = decisions["consumer_warpgroups"]
    KEYS = decisions["key_rows"]
    STAGES = decisions["stages"]
    OVERLAP = bool(decisions["overlap"])
    THRESHOLD = float(decisions["rescale_threshold"])
    GROUP = decisions["head_group"]
    DYNAMIC = bool(decisions["dynamic"])
    PARTS = decisions["weight_parts"]
    LEAD = decisions["claim_lead"]
    Q_IN_REGISTERS = bool(decisions["queries_in_registers"])
    Q_SLOTS = 1 if Q_IN_REGISTERS else 2
    CONSUMER_REGISTERS = decisions["consumer_registers"]
    LOADER_REGISTERS = producer_registers(CONSUMERS, CONSUMER_REGISTERS)

    ROWS = WARPGROUP_ROWS * CONSUMERS
    PLANES = D // PLANE
    CHUNK = KEYS * D  # elements
    THREADS = 128 * (CONSUMERS + 1)
    WARPS = 4 * CONSUMERS  # that compute
    # The arena, in bytes: 128-byte swizzled tiles need 1024-byte alignment, which every size here keeps.
    K_AT = 0
    V_AT = K_AT + STAGES * CHUNK * 2
    Q_AT = V_AT + STAGES * CHUNK * 2
    TILE_AT = Q_AT + Q_SLOTS * ROWS * D * 2
    BARRIERS_AT = TILE_AT + 4 * TILE_WORDS
    # Barriers: K full, V full, K empty, V empty (one per stage each), then two for each that follows.
    K_FULL, V_FULL, K_EMPTY, V_EMPTY = 0, STAGES, 2 * STAGES, 3 * STAGES
    Q_FULL, Q_EMPTY, TILE_FULL, TILE_EMPTY = (4 * STAGES + i for i in (0, 2, 4, 5))
    BARRIERS = 4 * STAGES + 6
    ARENA = BARRIERS_AT + 8 * BARRIERS

    # Registers of a thread: a warpgroup's 64 x n accumulator is n/2 floats, two rows (r and r + 8) of it.
    SCORES, WEIGHTS, OUTPUTS, QUERIES = KEYS // 2, KEYS // 4, D // 2, D // 4

    SHORT = "bf16" if dtype == "bfloat16" else "f16"
    QK = f"wgmma.mma_async.sync.aligned.m64n{KEYS}k16.f32.{SHORT}.{SHORT}"
    PV = f"wgmma.mma_async.sync.aligned.m64n{D}k16.f32.{SHORT}.{SHORT}"
    PACK = f"cvt.rn.{SHORT}x2.f32"
    LOAD = "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
    LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
    LOG2E, LN2, INF = math.log2(math.e), math.log(2.0), math.inf
    ALL = 0xFFFFFFFF

    def ones(count: Any) -> Any:
        """A word whose lowest ``count`` bits are set."""
        word = (T.uint32(1) << T.cast(count, "uint32")) - T.uint32(1)
        return word if KEYS // 4 < 32 else T.Select(count >= 32, T.uint32(ALL), word)

    @T.prim_func
    def forward(
        q_ptr: T.handle,
        k_ptr: T.handle,
        v_ptr: T.handle,
        bands_ptr: T.handle,
        cu_ptr: T.handle,
        o_ptr: T.handle,
        lse_ptr: T.handle,
        counters_ptr: T.handle,
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
        counters = T.match_buffer(counters_ptr, (2,), "int32")
        # Indexing O itself would ignore its strides.
        o_flat = T.decl_buffer((B64 * ob,), dtype, data=O.data)

        # (64 columns, rows, planes of 64 columns, heads, batch): one box is a whole chunk in wgmma's layout.
        # Rows before the tensor's first or behind its last are filled with zeros.
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.call_packed(
            "runtime.cuTensorMapEncodeTiled", q_map, dtype, 5, Q.data, PLANE, N64, PLANES, Hq64, B64,
            qn * 2, 2 * PLANE, qh * 2, qb * 2, PLANE, ROWS, PLANES, 1, 1, 1, 1, 1, 1, 1, 0, 3, 2, 0,
        )  # fmt: skip
        T.call_packed(
            "runtime.cuTensorMapEncodeTiled", k_map, dtype, 5, K.data, PLANE, N64, PLANES, Hkv64, B64,
            kn * 2, 2 * PLANE, kh * 2, kb * 2, PLANE, KEYS, PLANES, 1, 1, 1, 1, 1, 1, 1, 0, 3, 2, 0,
        )  # fmt: skip
        T.call_packed(
            "runtime.cuTensorMapEncodeTiled", v_map, dtype, 5, V.data, PLANE, N64, PLANES, Hkv64, B64,
            vn * 2, 2 * PLANE, vh * 2, vb * 2, PLANE, KEYS, PLANES, 1, 1, 1, 1, 1, 1, 1, 0, 3, 2, 0,
        )  # fmt: skip

        T.device_entry()
        # With the 1, or ptxas ignores setmaxnreg.
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        block = T.cta_id([workers])
        warp = T.warp_id([THREADS // 32])
        lane = T.lane_id([32])
        thread = T.thread_id([THREADS])
        arena = T.alloc_buffer((ARENA,), "uint8", scope="shared.dyn", align=1024)
        sK = T.decl_buffer(
            (STAGES * CHUNK,), dtype, data=arena.data, elem_offset=K_AT // 2, scope="shared.dyn"
        )
        sV = T.decl_buffer(
            (STAGES * CHUNK,), dtype, data=arena.data, elem_offset=V_AT // 2, scope="shared.dyn"
        )
        sQ = T.decl_buffer(
            (Q_SLOTS * ROWS * D,), dtype, data=arena.data, elem_offset=Q_AT // 2, scope="shared.dyn"
        )
        tile_words = T.decl_buffer(
            (TILE_WORDS,), "int32", data=arena.data, elem_offset=TILE_AT // 4, scope="shared.dyn"
        )
        barriers = T.decl_buffer(
            (BARRIERS,), "uint64", data=arena.data, elem_offset=BARRIERS_AT // 8, scope="shared.dyn"
        )

        @T.inline
        def wait(barrier, phase):
            T.cuda.mbarrier_wait(barriers.ptr_to([barrier]), phase)

        @T.inline
        def arrive(barrier):
            T.ptx.mbarrier.arrive.shared.b64(barriers.ptr_to([barrier]))

        # Each computing warp arrives for itself, not one thread for its warpgroup: where chunks are let pass
        # no instruction keeps the four warps together, and one left two uses behind would wait for ever.
        @T.inline
        def arrive_warp(barrier):
            if lane == 0:
                arrive(barrier)

        if thread == 0:
            for s in T.unroll(STAGES):
                T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([K_FULL + s]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([V_FULL + s]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([K_EMPTY + s]), T.uint32(WARPS))
                T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([V_EMPTY + s]), T.uint32(WARPS))
            for s in T.unroll(Q_SLOTS):
                T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([Q_FULL + s]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([Q_EMPTY + s]), T.uint32(WARPS))
            T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([TILE_FULL]), T.uint32(1))
            T.ptx.mbarrier.init.shared.b64(barriers.ptr_to([TILE_EMPTY]), T.uint32(32 * WARPS + 1))
            T.ptx.fence.mbarrier_init.release.cluster()
            T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()

        if warp < 4:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](LOADER_REGISTERS)

            # The decoding thread. Apart from the loader, so that the latencies of a ticket, two boundaries
            # and four band edges, and the divisions, don't hold up the loads.
            if thread == 32:
                B: T.int32 = T.cast(B64, "int32")
                Hq: T.int32 = T.cast(Hq64, "int32")
                N: T.int32 = T.cast(N64, "int32")
                documents: T.int32 = T.cast(BOUNDS64, "int32") - 1
                # One document has ceil(N / ROWS) slots, several have at most N // ROWS + documents.
                slots: T.int32 = T.Select(documents == 1, (N + (ROWS - 1)) // ROWS, N // ROWS + documents)
                tiles: T.int32 = slots * B * Hq
                tile: T.int32 = block
                word_phase: T.int32 = 0
                while tile < tiles:
                    # Last queries first: a later query has no fewer keys, so the longest tiles lead and the
                    # blocks end together. A group of heads is finished before the next one starts, so that
                    # its keys and values stay in the L2 cache between the near and the far band's reading
                    # (all heads at once would read 1.5 times the bytes at (4, 32, 4096, 128)).
                    group: T.int32 = tile // (slots * GROUP)
                    members: T.int32 = T.min(GROUP, B * Hq - group * GROUP)
                    inside: T.int32 = tile - group * (slots * GROUP)
                    slot: T.int32 = slots - 1 - inside // members
                    pair: T.int32 = group * GROUP + inside % members
                    batch: T.int32 = pair % B
                    # Head 0 last: its near and far band coincide in the paper's layout, so it is the
                    # lightest.
                    head: T.int32 = (pair // B + 1) % Hq
                    # The document of a slot: the last one whose first slot, cu[m] // ROWS + m, is not behind
                    # it.
                    document: T.int32 = 0
                    beyond: T.int32 = documents
                    while beyond - document > 1:
                        middle: T.int32 = (document + beyond) // 2
                        if cu[middle] // ROWS + middle <= slot:
                            document = middle
                        else:
                            beyond = middle
                    doc_begin: T.int32 = cu[document]
                    doc_end: T.int32 = cu[document + 1]
                    first_slot: T.int32 = T.Select(documents == 1, 0, doc_begin // ROWS + document)
                    query0: T.int32 = doc_begin + (slot - first_slot) * ROWS
                    if query0 < doc_end:
                        table: T.int32 = table_row(document, documents, T.cast(M64, "int32"))
                        near_lo: T.int32 = bands[table, head, 0]
                        near_hi: T.int32 = bands[table, head, 1]
                        far_lo: T.int32 = bands[table, head, 2]
                        far_hi: T.int32 = bands[table, head, 3]
                        # Keys [top - chunks * KEYS, top) of a band, read from the top down.
                        rows_end: T.int32 = T.min(query0 + ROWS, doc_end)
                        near_top: T.int32 = rows_end - near_lo
                        near_keys: T.int32 = near_top - T.max(doc_begin, query0 - near_hi)
                        far_top: T.int32 = rows_end - far_lo
                        far_keys: T.int32 = far_top - T.max(doc_begin, query0 - far_hi)
                        tile_words[LIVE] = 1
                        tile_words[BATCH] = batch
                        tile_words[HEAD] = head
                        tile_words[QUERY0] = query0
                        tile_words[DOC_BEGIN] = doc_begin
                        tile_words[DOC_END] = doc_end
                        tile_words[NEAR_LO] = near_lo
                        tile_words[NEAR_HI] = near_hi
                        tile_words[FAR_LO] = far_lo
                        tile_words[FAR_HI] = far_hi
                        tile_words[NEAR_TOP] = near_top
                        tile_words[NEAR_CHUNKS] = T.max(near_keys + (KEYS - 1), 0) // KEYS
                        tile_words[FAR_TOP] = far_top
                        tile_words[FAR_CHUNKS] = T.max(far_keys + (KEYS - 1), 0) // KEYS
                        arrive(TILE_FULL)
                        # Not before the loader nears this tile's end: blocks that claim early end apart (by
                        # 7 % of the kernel's time at (4, 16, 4096, 128) when the ticket was drawn a tile
                        # ahead).
                        wait(TILE_EMPTY, word_phase)
                        word_phase = word_phase ^ 1
                    if DYNAMIC:
                        ticket = T.alloc_local((1,), "uint32")
                        T.ptx.atom.global_.add.u32(ticket[0], counters.ptr_to([0]), T.uint32(1))
                        tile = T.cast(ticket[0], "int32") + workers
                    else:
                        tile = tile + workers
                tile_words[LIVE] = 0
                arrive(TILE_FULL)
                if DYNAMIC:
                    # The last block to run out of tiles leaves the counters as the next call needs them.
                    finished = T.alloc_local((1,), "uint32")
                    T.ptx.atom.global_.add.u32(finished[0], counters.ptr_to([1]), T.uint32(1))
                    if T.cast(finished[0], "int32") == workers - 1:
                        counters[0] = 0
                        counters[1] = 0

            # The loading thread.
            if thread == 0:
                shared_heads: T.int32 = T.cast(Hq64, "int32") // T.cast(Hkv64, "int32")
                position: T.int32 = 0
                order: T.int32 = 0  # of the tile among this block's
                live: T.int32 = 1
                while live == 1:
                    wait(TILE_FULL, order % 2)
                    live = tile_words[LIVE]
                    if live == 1:
                        l_batch: T.int32 = tile_words[BATCH]
                        l_head: T.int32 = tile_words[HEAD]
                        l_query0: T.int32 = tile_words[QUERY0]
                        l_near_top: T.int32 = tile_words[NEAR_TOP]
                        l_near_chunks: T.int32 = tile_words[NEAR_CHUNKS]
                        l_far_top: T.int32 = tile_words[FAR_TOP]
                        l_chunks: T.int32 = l_near_chunks + tile_words[FAR_CHUNKS]
                        q_slot: T.int32 = order % Q_SLOTS
                        wait(Q_EMPTY + q_slot, (order // Q_SLOTS) % 2 ^ 1)
                        order = order + 1
                        T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                            barriers.ptr_to([Q_FULL + q_slot]), T.uint32(ROWS * D * 2)
                        )
                        T.ptx[LOAD](
                            sQ.ptr_to([q_slot * (ROWS * D)]), T.address_of(q_map),
                            0, l_query0, 0, l_head, l_batch,
                            barriers.ptr_to([Q_FULL + q_slot]),
                        )  # fmt: skip
                        kv_head: T.int32 = l_head // shared_heads
                        chunk: T.int32 = 0
                        if l_chunks <= LEAD:
                            arrive(TILE_EMPTY)
                        while chunk < l_chunks:
                            key0: T.int32 = T.Select(
                                chunk < l_near_chunks,
                                l_near_top - (chunk + 1) * KEYS,
                                l_far_top - (chunk - l_near_chunks + 1) * KEYS,
                            )
                            stage: T.int32 = position % STAGES
                            empty_phase: T.int32 = (position // STAGES) % 2 ^ 1
                            wait(K_EMPTY + stage, empty_phase)
                            T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                                barriers.ptr_to([K_FULL + stage]), T.uint32(CHUNK * 2)
                            )
                            T.ptx[LOAD](
                                sK.ptr_to([stage * CHUNK]), T.address_of(k_map), 0, key0, 0, kv_head, l_batch,
                                barriers.ptr_to([K_FULL + stage]),
                            )  # fmt: skip
                            wait(V_EMPTY + stage, empty_phase)
                            T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                                barriers.ptr_to([V_FULL + stage]), T.uint32(CHUNK * 2)
                            )
                            T.ptx[LOAD](
                                sV.ptr_to([stage * CHUNK]), T.address_of(v_map), 0, key0, 0, kv_head, l_batch,
                                barriers.ptr_to([V_FULL + stage]),
                            )  # fmt: skip
                            position = position + 1
                            chunk = chunk + 1
                            if chunk == l_chunks - LEAD:
                                arrive(TILE_EMPTY)
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](CONSUMER_REGISTERS)
            warpgroup: T.int32 = warp // 4 - 1
            scale2: T.float32 = scale * T.float32(LOG2E)
            my_row: T.int32 = (warp % 4) * 16 + lane // 4  # and 8 below
            my_column: T.int32 = (lane % 4) * 2  # and the next, of each 8
            queries = T.alloc_local((QUERIES,), "uint32")
            scores = T.alloc_local((SCORES,), "float32")
            weights = T.alloc_local((WEIGHTS,), "uint32")
            output = T.alloc_local((OUTPUTS,), "float32")
            row_max = T.alloc_local((2,), "float32")
            row_sum = T.alloc_local((2,), "float32")
            shrink = T.alloc_local((2,), "float32")
            k_desc = T.alloc_local((1,), "uint64")
            v_desc = T.alloc_local((1,), "uint64")
            # Offsets in 16-byte units: 8 rows of 128 bytes are 64; V's planes are KEYS rows apart.
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(k_desc[0]), sK.ptr_to([0]), 1, 64, 3)
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(v_desc[0]), sV.ptr_to([0]), KEYS * 8, 64, 3)
            q_desc = T.alloc_local((1,), "uint64")
            if not Q_IN_REGISTERS:
                T.cuda.wgmma.encode_matrix_descriptor(T.address_of(q_desc[0]), sQ.ptr_to([0]), 1, 64, 3)
            k_at: T.int32 = 0
            v_at: T.int32 = 0
            tile_at: T.int32 = 0

            @T.inline
            def pass_chunk(position, full, empty):
                ring: T.int32 = position % STAGES
                wait(full + ring, (position // STAGES) % 2)
                arrive_warp(empty + ring)
                position = position + 1

            # Keys and values in the loader's order: all keys of a tile first would wait for a slot that only
            # its values' passing frees.
            @T.inline
            def pass_chunks(count):
                pass_end: T.int32 = k_at + count
                while k_at < pass_end:
                    pass_chunk(k_at, K_FULL, K_EMPTY)
                    pass_chunk(v_at, V_FULL, V_EMPTY)

            running: T.int32 = 1
            while running == 1:
                wait(TILE_FULL, tile_at % 2)
                running = tile_words[LIVE]
                if running == 1:
                    c_batch: T.int32 = tile_words[BATCH]
                    c_head: T.int32 = tile_words[HEAD]
                    c_begin: T.int32 = tile_words[DOC_BEGIN]
                    c_end: T.int32 = tile_words[DOC_END]
                    c_near_lo: T.int32 = tile_words[NEAR_LO]
                    c_near_hi: T.int32 = tile_words[NEAR_HI]
                    c_far_lo: T.int32 = tile_words[FAR_LO]
                    c_far_hi: T.int32 = tile_words[FAR_HI]
                    c_near_top: T.int32 = tile_words[NEAR_TOP]
                    c_near_chunks: T.int32 = tile_words[NEAR_CHUNKS]
                    c_far_top: T.int32 = tile_words[FAR_TOP]
                    c_far_chunks: T.int32 = tile_words[FAR_CHUNKS]
                    row0: T.int32 = tile_words[QUERY0] + warpgroup * WARPGROUP_ROWS
                    # Every lane, since every lane has read the words.
                    arrive(TILE_EMPTY)
                    q_ring: T.int32 = tile_at % Q_SLOTS
                    wait(Q_FULL + q_ring, (tile_at // Q_SLOTS) % 2)
                    tile_at = tile_at + 1
                    if Q_IN_REGISTERS:
                        for step in T.unroll(D // 16):
                            q_row: T.int32 = warpgroup * WARPGROUP_ROWS + (warp % 4) * 16 + lane % 16
                            T.ptx[LDMATRIX](
                                queries[4 * step], queries[4 * step + 1],
                                queries[4 * step + 2], queries[4 * step + 3],
                                sQ.ptr_to([
                                    (step // 4) * (ROWS * PLANE) + q_row * PLANE
                                    + ((((step % 4) * 2 + lane // 16) ^ (q_row % 8)) * 8)
                                ]),
                            )  # fmt: skip
                        T.cuda.warp_sync()
                        arrive_warp(Q_EMPTY)

                    # This warpgroup's chunks of the tile's: [near_first, near_last) and [far_first,
                    # far_last).
                    row_end: T.int32 = T.min(row0 + WARPGROUP_ROWS, c_end)
                    near_bottom: T.int32 = T.max(c_begin, row0 - c_near_hi)
                    has_near: T.bool = T.And(row0 < c_end, near_bottom < row_end - c_near_lo)
                    near_first: T.int32 = T.Select(
                        has_near, (c_near_top - (row_end - c_near_lo)) // KEYS, c_near_chunks
                    )
                    near_last: T.int32 = T.Select(
                        has_near, (c_near_top - near_bottom + (KEYS - 1)) // KEYS, c_near_chunks
                    )
                    far_bottom: T.int32 = T.max(c_begin, row0 - c_far_hi)
                    has_far: T.bool = T.And(row0 < c_end, far_bottom < row_end - c_far_lo)
                    far_first: T.int32 = T.Select(
                        has_far, (c_far_top - (row_end - c_far_lo)) // KEYS, c_far_chunks
                    )
                    far_last: T.int32 = T.Select(
                        has_far, (c_far_top - far_bottom + (KEYS - 1)) // KEYS, c_far_chunks
                    )
                    near_count: T.int32 = near_last - near_first
                    chunks: T.int32 = near_count + far_last - far_first
                    between: T.int32 = c_near_chunks - near_last + far_first
                    query: T.int32 = row0 + my_row

                    for r in T.unroll(2):
                        row_max[r] = T.float32(NO_MAXIMUM)
                        row_sum[r] = T.float32(0)
                    for i in T.unroll(OUTPUTS):
                        output[i] = T.float32(0)

                    @T.inline
                    def issue_scores():
                        k_ring: T.int32 = k_at % STAGES
                        wait(K_FULL + k_ring, (k_at // STAGES) % 2)
                        k_tile: T.uint64 = k_desc[0] + T.cast(k_ring * (CHUNK // 8), "uint64")
                        T.ptx.wgmma.fence.sync.aligned()
                        if Q_IN_REGISTERS:
                            for step in T.unroll(D // 16):
                                T.ptx[QK](
                                    *[scores[i] for i in range(SCORES)],
                                    queries[4 * step], queries[4 * step + 1],
                                    queries[4 * step + 2], queries[4 * step + 3],
                                    k_tile + T.uint64((step // 4) * (KEYS * 8) + (step % 4) * 2),
                                    step > 0, 1, 1, 0,
                                )  # fmt: skip
                        else:
                            q_tile: T.uint64 = q_desc[0] + T.cast(
                                q_ring * (ROWS * D // 8) + warpgroup * (WARPGROUP_ROWS * 8), "uint64"
                            )
                            for step in T.unroll(D // 16):
                                T.ptx[QK](
                                    *[scores[i] for i in range(SCORES)],
                                    q_tile + T.uint64((step // 4) * (ROWS * 8) + (step % 4) * 2),
                                    k_tile + T.uint64((step // 4) * (KEYS * 8) + (step % 4) * 2),
                                    step > 0, 1, 1, 0, 0,
                                )  # fmt: skip
                        T.ptx.wgmma.commit_group.sync.aligned()

                    @T.inline
                    def wait_values():
                        wait(V_FULL + v_at % STAGES, (v_at // STAGES) % 2)

                    @T.inline
                    def issue_output(part, parts):
                        v_tile: T.uint64 = v_desc[0] + T.cast(v_at % STAGES * (CHUNK // 8), "uint64")
                        T.ptx.wgmma.fence.sync.aligned()
                        for s in T.unroll(KEYS // 16 // parts):
                            step: T.let = part * (KEYS // 16 // parts) + s
                            T.ptx[PV](
                                *[output[i] for i in range(OUTPUTS)],
                                weights[4 * step], weights[4 * step + 1],
                                weights[4 * step + 2], weights[4 * step + 3],
                                v_tile + T.uint64(step * 128),
                                T.bool(True), 1, 1, 1,
                            )  # fmt: skip
                        T.ptx.wgmma.commit_group.sync.aligned()

                    @T.inline
                    def release_keys():
                        arrive_warp(K_EMPTY + k_at % STAGES)
                        k_at = k_at + 1

                    @T.inline
                    def release_values():
                        arrive_warp(V_EMPTY + v_at % STAGES)
                        v_at = v_at + 1

                    # Mask the chunk's scores and choose each row's reference, near its maximum.
                    @T.inline
                    def find_maximum(c):
                        near: T.bool = c < near_count
                        chunk_key: T.int32 = T.Select(
                            near,
                            c_near_top - (near_first + c + 1) * KEYS,
                            c_far_top - (far_first + c - near_count + 1) * KEYS,
                        )
                        lo: T.int32 = T.Select(near, c_near_lo, c_far_lo)
                        hi: T.int32 = T.Select(near, c_near_hi, c_far_hi)
                        if T.Or(
                            chunk_key + (KEYS - 1) > row0 - lo,
                            chunk_key < T.max(c_begin, row0 + (WARPGROUP_ROWS - 1) - hi),
                        ):
                            # One bit for each of a row's columns that this thread holds, at offsets 8 j + e:
                            # two instructions an element instead of the three of two comparisons.
                            for r in T.unroll(2):
                                least: T.int32 = (
                                    T.max(c_begin, query + 8 * r - hi) - chunk_key - my_column - 1
                                )
                                most: T.int32 = query + 8 * r - lo - chunk_key - my_column
                                below: T.int32 = T.min(
                                    T.max(2 * (least // 8) + T.min(least % 8, 1) + 1, 0), KEYS // 4
                                )
                                upto: T.int32 = T.min(
                                    T.max(2 * (most // 8) + T.min(most % 8, 1) + 1, 0), KEYS // 4
                                )
                                seen: T.uint32 = ones(upto) & ~ones(below)
                                for j in T.unroll(KEYS // 8):
                                    for e in T.unroll(2):
                                        scores[4 * j + 2 * r + e] = T.Select(
                                            ((seen >> T.cast(2 * j + e, "uint32")) & T.uint32(1))
                                            != T.uint32(0),
                                            scores[4 * j + 2 * r + e],
                                            T.float32(-INF),
                                        )
                        for r in T.unroll(2):
                            top = T.alloc_local((1,), "float32")
                            top[0] = T.max(scores[2 * r], scores[2 * r + 1])
                            for j in T.unroll(KEYS // 8 - 1):
                                top[0] = T.max(
                                    top[0], T.max(scores[4 * j + 4 + 2 * r], scores[4 * j + 5 + 2 * r])
                                )
                            top[0] = T.max(top[0], T.tvm_warp_shuffle_xor(T.uint32(ALL), top[0], 1, 32, 32))
                            top[0] = T.max(top[0], T.tvm_warp_shuffle_xor(T.uint32(ALL), top[0], 2, 32, 32))
                            top[0] = T.max(top[0], row_max[r])
                            if THRESHOLD > 0:
                                # Any reference near the maximum gives the same quotient; weights stay below
                                # 2**threshold, sums are float32.
                                grown: T.float32 = (top[0] - row_max[r]) * scale2
                                top[0] = T.Select(grown > T.float32(THRESHOLD), top[0], row_max[r])
                            shrink[r] = T.exp2((row_max[r] - top[0]) * scale2)
                            row_max[r] = top[0]
                            row_sum[r] = row_sum[r] * shrink[r]

                    # exp2 of a part of the chunk's scores, in place.
                    @T.inline
                    def weigh(part, parts):
                        for r in T.unroll(2):
                            offset: T.float32 = row_max[r] * scale2
                            for j in T.unroll(KEYS // 8 // parts):
                                for e in T.unroll(2):
                                    i: T.let = 4 * (part * (KEYS // 8 // parts) + j) + 2 * r + e
                                    scores[i] = T.exp2(scores[i] * scale2 - offset)
                                    row_sum[r] = row_sum[r] + scores[i]

                    @T.inline
                    def pack_weights(part, parts):
                        for i in T.unroll(WEIGHTS // parts):
                            word: T.let = part * (WEIGHTS // parts) + i
                            T.ptx[PACK](weights[word], scores[2 * word + 1], scores[2 * word])

                    @T.inline
                    def shrink_output():
                        for j in T.unroll(OUTPUTS // 4):
                            for r in T.unroll(2):
                                for e in T.unroll(2):
                                    output[4 * j + 2 * r + e] = output[4 * j + 2 * r + e] * shrink[r]

                    # No wgmma is in flight here: a branch around part of a stage would serialise all of them.
                    @T.inline
                    def shrink_output_if_needed():
                        if THRESHOLD > 0:
                            grew: T.bool = T.Or(shrink[0] < T.float32(1), shrink[1] < T.float32(1))
                            if T.cuda.any_sync(T.uint32(ALL), grew) != 0:
                                shrink_output()
                        else:
                            shrink_output()

                    pass_chunks(near_first)
                    if near_count == 0:
                        pass_chunks(between)
                    if chunks > 0:
                        if OVERLAP:
                            issue_scores()
                            T.ptx.wgmma.wait_group.sync.aligned(0)
                            release_keys()
                            find_maximum(0)
                            weigh(0, 1)
                            pack_weights(0, 1)
                            c: T.int32 = 1
                            while c < chunks:
                                if c == near_count:
                                    keys_end: T.int32 = k_at + between
                                    while k_at < keys_end:
                                        pass_chunk(k_at, K_FULL, K_EMPTY)
                                issue_scores()
                                wait_values()
                                issue_output(0, 1)
                                T.ptx.wgmma.wait_group.sync.aligned(1)
                                release_keys()
                                find_maximum(c)
                                weigh(0, 1)
                                T.ptx.wgmma.wait_group.sync.aligned(0)
                                release_values()
                                shrink_output_if_needed()
                                pack_weights(0, 1)
                                if c == near_count:
                                    values_end: T.int32 = v_at + between
                                    while v_at < values_end:
                                        pass_chunk(v_at, V_FULL, V_EMPTY)
                                c = c + 1
                            wait_values()
                            issue_output(0, 1)
                            T.ptx.wgmma.wait_group.sync.aligned(0)
                            release_values()
                        else:
                            c: T.int32 = 0
                            while c < chunks:
                                if T.And(c == near_count, c > 0):
                                    pass_chunks(between)
                                issue_scores()
                                T.ptx.wgmma.wait_group.sync.aligned(0)
                                release_keys()
                                find_maximum(c)
                                shrink_output_if_needed()
                                wait_values()
                                for part in T.unroll(PARTS):
                                    weigh(part, PARTS)
                                    pack_weights(part, PARTS)
                                    issue_output(part, PARTS)
                                T.ptx.wgmma.wait_group.sync.aligned(0)
                                release_values()
                                c = c + 1
                    if not Q_IN_REGISTERS:
                        arrive_warp(Q_EMPTY + q_ring)
                    # What remains of the tile's chunks: all behind the near band if there was no far chunk.
                    if T.And(near_count > 0, chunks == near_count):
                        pass_chunks(between)
                    pass_chunks(c_far_chunks - far_last)

                    for r in T.unroll(2):
                        row_sum[r] = row_sum[r] + T.tvm_warp_shuffle_xor(T.uint32(ALL), row_sum[r], 1, 32, 32)
                        row_sum[r] = row_sum[r] + T.tvm_warp_shuffle_xor(T.uint32(ALL), row_sum[r], 2, 32, 32)
                        shrink[r] = T.Select(
                            row_sum[r] > T.float32(0), T.float32(1) / row_sum[r], T.float32(0)
                        )
                        if T.And(lane % 4 == 0, query + 8 * r < c_end):
                            lse[c_batch, c_head, query + 8 * r] = T.Select(
                                row_sum[r] > T.float32(0),
                                row_max[r] * scale + T.log2(row_sum[r]) * T.float32(LN2),
                                T.float32(-INF),
                            )
                    # Four lanes hold a row, each two columns of every eight. A 4 x 4 transpose among them
                    # makes 16-byte stores, which need no shared memory and handle ragged and packed ends row
                    # by row.
                    for r in T.unroll(2):
                        o_row: T.int64 = (
                            T.cast(c_batch, "int64") * ob
                            + T.cast(c_head, "int64") * oh
                            + T.cast(query + 8 * r, "int64") * on
                        )
                        pairs = T.alloc_local((4,), "uint32")
                        half = T.alloc_local((4,), "uint32")
                        odd: T.bool = lane % 2 == 1
                        upper: T.bool = lane % 4 >= 2
                        for g in T.unroll(D // 32):
                            for i in T.unroll(4):
                                T.ptx[PACK](
                                    pairs[i],
                                    output[16 * g + 4 * i + 2 * r + 1] * shrink[r],
                                    output[16 * g + 4 * i + 2 * r] * shrink[r],
                                )
                            for i in T.unroll(2):
                                give: T.uint32 = T.Select(odd, pairs[2 * i], pairs[2 * i + 1])
                                got: T.uint32 = T.tvm_warp_shuffle_xor(T.uint32(ALL), give, 1, 32, 32)
                                half[2 * i] = T.Select(odd, got, pairs[2 * i])
                                half[2 * i + 1] = T.Select(odd, pairs[2 * i + 1], got)
                            for i in T.unroll(2):
                                give2: T.uint32 = T.Select(upper, half[i], half[i + 2])
                                got2: T.uint32 = T.tvm_warp_shuffle_xor(T.uint32(ALL), give2, 2, 32, 32)
                                pairs[i] = T.Select(upper, got2, half[i])
                                pairs[i + 2] = T.Select(upper, half[i + 2], got2)
                            if query + 8 * r < c_end:
                                T.ptx["st.global.v4.b32"](
                                    o_flat.ptr_to([o_row + T.cast(32 * g + 8 * (lane % 4), "int64")]),
                                    pairs[0], pairs[1], pairs[2], pairs[3],
                                )  # fmt: skip

    return IRModule({"forward": forward})
