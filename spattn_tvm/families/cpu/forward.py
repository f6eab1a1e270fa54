"""Banded attention forward for CPUs.

The vector lanes are *queries*. A tile of ``query_rows`` queries is transposed once; then keys and values are
read as they lie in memory, one scalar broadcast against a vector of queries:

    scores[j, :]  = sum_d K[j, d] * query[d, :]          key_unroll rows of scores stay in registers
    output[d, :] += sum_j V[j, d] * probability[j, :]    dim_unroll rows of output stay in registers

No key or value is packed, and the softmax over keys needs no reduction across lanes. A head's two bands give
two ranges of keys that start exactly at the band's edge; only tiles that cross an edge are masked.

Measured on one Zen 4 core at (1, 16, 4096, 64) float32: 76 ms, 91 GFLOP/s executed, which is what the same
core reaches in a large matrix product (91 GFLOP/s).
"""

import math

from tvm import IRModule
from tvm.script import tirx as T

from spattn_tvm.domains.key_range import crosses_edge, document_keys, in_band, key_range
from spattn_tvm.domains.tiles import first_slot, table_row, tile_slots

from .exponential import LN2, exp
from .register_tile import REGISTERS, fill, multiply_add, rows_of, widen
from .rows import find_document, strided_rows

# A running maximum not above any finite score, yet finite: -inf - -inf would be NaN.
LOWEST = -3.4028234663852886e38


def build_cpu_forward(decisions, head_dim: int, dtype: str) -> IRModule:
    """The forward kernel as TensorIR.

    Parameters
    ----------
    decisions : Mapping[str, int]
        ``query_rows`` (vector lanes, queries of a tile), ``key_rows`` (keys between two rescalings, a
        multiple of ``key_unroll``), ``key_unroll`` and ``dim_unroll`` (rows of a register tile; the latter
        divides ``head_dim``), ``stage`` (1: copy keys and values of a tile to float32 scratch first),
        ``head_major`` (order in which a worker visits tiles).
    head_dim : int
        D.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"`` of q, k, v and o; sums are float32.

    Returns
    -------
    tvm.IRModule
        With one function ``forward(q, k, v, bands, cu_seqlens, cu_seqlens_k, key_ranges, o, lse, scale,
        workers)``: q, o (B, Hq, Nq, D); k, v (B, Hkv, Nk, D), any strides with a contiguous last dimension;
        bands int32 (M, Hq, 4), whose rows `table_row` gives to documents; cu_seqlens and cu_seqlens_k int32
        (documents + 1,) of queries and of keys; key_ranges int32 (0, 1 or B, 3) as `document_keys` takes
        them; lse float32 (B, Hq, Nq), natural logarithm.
    """
    R = decisions["query_rows"]
    KR = decisions["key_rows"]
    JU = decisions["key_unroll"]
    DU = decisions["dim_unroll"]
    head_major = bool(decisions["head_major"])
    stage = bool(decisions["stage"])
    D = head_dim
    LANES = math.gcd(D, 16)
    SR = KR if stage else 1

    @T.prim_func(s_tir=True)
    def forward(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        bands_handle: T.handle,
        cu_seqlens_handle: T.handle,
        cu_seqlens_k_handle: T.handle,
        key_ranges_handle: T.handle,
        o_handle: T.handle,
        lse_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "forward", "tirx.noalias": True})
        B, HQ, HKV, N, NK = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        M, DOCUMENTS_1, RANGES = T.int64(), T.int64(), T.int64()
        q = strided_rows(q_handle, (B, HQ, N, D), dtype)
        k = strided_rows(k_handle, (B, HKV, NK, D), dtype)
        v = strided_rows(v_handle, (B, HKV, NK, D), dtype)
        bands = T.match_buffer(bands_handle, (M, HQ, 4), "int32", align=4)
        cu_seqlens = T.match_buffer(cu_seqlens_handle, (DOCUMENTS_1,), "int32", align=4)
        cu_seqlens_k = T.match_buffer(cu_seqlens_k_handle, (DOCUMENTS_1,), "int32", align=4)
        key_ranges = T.match_buffer(key_ranges_handle, (RANGES, 3), "int32", align=4)
        o = strided_rows(o_handle, (B, HQ, N, D), dtype)
        lse = T.match_buffer(lse_handle, (B, HQ, N), "float32", align=4)
        for worker in T.parallel(workers):
            query = T.alloc_buffer((D, R), "float32")
            output = T.alloc_buffer((D, R), "float32")
            scores = T.alloc_buffer((KR, R), "float32")
            key_scratch = T.alloc_buffer((SR, D), "float32")
            value_scratch = T.alloc_buffer((SR, D), "float32")
            row_max = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
            tile_max = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
            row_sum = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
            rescale = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
            probability = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
            score_tile = T.alloc_buffer((JU, R), "float32", annotations=REGISTERS)
            output_tile = T.alloc_buffer((DU, R), "float32", annotations=REGISTERS)
            bounds = T.alloc_buffer((2,), "int32", annotations=REGISTERS)
            # Read back from a buffer, a value is opaque to TVM's simplifier, which otherwise puts these
            # divisions into every index: compiling takes 0.24 s instead of 8.2, and the kernel runs as fast.
            place = T.alloc_buffer((8,), "int32", annotations=REGISTERS)

            documents: T.let[T.int32] = T.cast(DOCUMENTS_1, "int32") - 1
            heads: T.let[T.int32] = T.cast(HQ, "int32")
            batch_heads: T.let[T.int32] = T.cast(B, "int32") * heads
            slots: T.let[T.int32] = tile_slots(T.cast(N, "int32"), documents, R)
            tiles: T.let[T.int32] = slots * batch_heads
            # Tiles are dealt out one by one, not in contiguous shares: heads differ in their work.
            for turn in T.serial((tiles - worker + workers - 1) // workers):
                tile: T.let[T.int32] = turn * workers + worker
                batch_head: T.let[T.int32] = tile // slots if head_major else tile % batch_heads
                place[0] = tile % slots if head_major else tile // batch_heads
                place[1] = batch_head // heads
                place[2] = batch_head % heads
                place[3] = place[2] // T.cast(HQ // HKV, "int32")
                slot: T.let[T.int32] = place[0]
                b: T.let[T.int32] = place[1]
                h: T.let[T.int32] = place[2]
                hk: T.let[T.int32] = place[3]

                bounds[0] = 0
                bounds[1] = documents - 1
                find_document(cu_seqlens, slot, R, bounds, 0)
                document: T.let[T.int32] = bounds[0]
                begin: T.let[T.int32] = cu_seqlens[document]
                end: T.let[T.int32] = cu_seqlens[document + 1]
                place[4] = begin + (slot - first_slot(begin, document, R)) * R
                query_begin: T.let[T.int32] = place[4]
                if query_begin < end:
                    query_last: T.let[T.int32] = T.min(query_begin + R, end) - 1
                    keys_of_document = T.meta_var(
                        document_keys(
                            document,
                            b,
                            cu_seqlens,
                            cu_seqlens_k,
                            key_ranges,
                            T.cast(RANGES, "int32"),
                        )
                    )
                    place[5] = keys_of_document[0]
                    place[6] = keys_of_document[1]
                    place[7] = keys_of_document[2]
                    first: T.let[T.int32] = query_begin + place[7]
                    last: T.let[T.int32] = query_last + place[7]
                    table: T.let[T.int32] = table_row(document, documents, T.cast(M, "int32"))
                    # Lanes past the end repeat the last query; they are never written.
                    for r, d in T.grid(R, D):
                        query[d, r] = (
                            T.cast(q[b, h, T.min(query_begin + r, query_last), d], "float32") * scale
                        )
                    for d in T.serial(D):
                        fill(output, d, 1, R, lambda u, r: T.float32(0))
                    for r in T.vectorized(R):
                        row_max[r] = T.float32(LOWEST)
                        row_sum[r] = T.float32(0)

                    for band in T.serial(2):  # the far band, then the near one
                        low: T.let[T.int32] = bands[table, h, 2 - 2 * band]
                        high: T.let[T.int32] = bands[table, h, 3 - 2 * band]
                        keys_of_band = T.meta_var(key_range(first, last, low, high, place[5]))
                        band_begin: T.let[T.int32] = keys_of_band[0]
                        band_end: T.let[T.int32] = T.min(place[6], keys_of_band[1])
                        for key_tile in T.serial(T.max(0, band_end - band_begin + KR - 1) // KR):
                            key_begin: T.let[T.int32] = band_begin + key_tile * KR
                            count: T.let[T.int32] = T.min(KR, band_end - key_begin)
                            groups: T.let[T.int32] = (count + JU - 1) // JU
                            masked: T.let[T.bool] = crosses_edge(
                                first, last, key_begin, key_begin + count - 1, low, high
                            )
                            if stage:
                                widen(key_scratch, count, D, LANES, lambda j, d: k[b, hk, key_begin + j, d])
                                widen(value_scratch, count, D, LANES, lambda j, d: v[b, hk, key_begin + j, d])
                            keys = key_scratch if stage else rows_of(k, b, hk, key_begin, KR)
                            values = value_scratch if stage else rows_of(v, b, hk, key_begin, KR)

                            for r in T.vectorized(R):
                                tile_max[r] = row_max[r]
                            for group in T.serial(groups):
                                fill(score_tile, 0, JU, R, lambda u, r: T.float32(0))
                                # Rows past the last key repeat it, so that they raise no maximum.
                                multiply_add(
                                    score_tile, JU, R, D,
                                    lambda u, d: keys[T.min(group * JU + u, count - 1), d],
                                    lambda d, r: query[d, r],
                                )  # fmt: skip
                                if masked:
                                    fill(
                                        score_tile, 0, JU, R,
                                        lambda u, r: T.Select(
                                            in_band(
                                                first + r,
                                                key_begin + T.min(group * JU + u, count - 1),
                                                low,
                                                high,
                                            ),
                                            score_tile[u, r],
                                            T.float32(-math.inf),
                                        ),
                                    )  # fmt: skip
                                for u in T.unroll(JU):
                                    for r in T.vectorized(R):
                                        tile_max[r] = T.max(tile_max[r], score_tile[u, r])
                                fill(scores, group * JU, JU, R, lambda u, r: score_tile[u, r])

                            for r in T.vectorized(R):
                                rescale[r] = exp(row_max[r] - tile_max[r])
                            for r in T.vectorized(R):
                                row_max[r] = tile_max[r]
                                row_sum[r] = row_sum[r] * rescale[r]
                            for j in T.serial(count):
                                for r in T.vectorized(R):
                                    probability[r] = exp(scores[j, r] - row_max[r])
                                for r in T.vectorized(R):
                                    row_sum[r] = row_sum[r] + probability[r]
                                for r in T.vectorized(R):
                                    scores[j, r] = probability[r]

                            for chunk in T.serial(D // DU):
                                fill(
                                    output_tile, 0, DU, R, lambda u, r: output[chunk * DU + u, r] * rescale[r]
                                )
                                multiply_add(
                                    output_tile, DU, R, count,
                                    lambda u, j: values[j, chunk * DU + u],
                                    lambda j, r: scores[j, r],
                                )  # fmt: skip
                                fill(output, chunk * DU, DU, R, lambda u, r: output_tile[u, r])

                    # A query with no key has row_sum 0: its output is 0, also where a value that it doesn't
                    # see is NaN, and its lse -inf. A query that is NaN stays NaN.
                    for r in T.vectorized(R):
                        rescale[r] = T.float32(1) / row_sum[r]
                    for r in T.serial(query_last - query_begin + 1):
                        for d in T.serial(D):
                            o[b, h, query_begin + r, d] = T.Select(
                                row_sum[r] == T.float32(0),
                                T.cast(0, dtype),
                                T.cast(output[d, r] * rescale[r], dtype),
                            )
                        lse[b, h, query_begin + r] = row_max[r] + T.log2(row_sum[r]) * T.float32(LN2)

    return IRModule({"forward": forward})
