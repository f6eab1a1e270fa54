"""Banded attention backward for CPUs: one deterministic pass, five matrix products a tile.

A worker owns whole query heads, so the sums of a head's dk and dv have one fixed order whatever the number of
workers. For a tile of queries (vector lanes) and a tile of keys:

    scores[j, :]         = sum_d K[j, d] * query[d, :]             lanes are queries
    dscores[j, :]        = P[j, :] * (sum_d V[j, d] * doutput[d, :] - delta)
    dquery[d, :]        += sum_j K[j, d] * dscores[j, :]
    dv[j, :]            += sum_i P[j, i] * dO[i, :]                lanes are head dimensions
    dk[j, :]            += sum_i dscores[j, i] * Q[i, :]

``delta = rowsum(dO * O) - dlse`` (D in FlashAttention-2, arXiv 2307.08691). The other known structure,
separate passes for dq and for dk and dv, needs seven products.
"""

import math

from tvm import IRModule
from tvm.script import tirx as T

from spattn_tvm.domains.key_range import crosses_edge, document_keys, has_key, in_band, key_range
from spattn_tvm.domains.tiles import table_row

from .exponential import exp
from .register_tile import REGISTERS, fill, multiply_add, rows_of, widen


def build_cpu_backward(decisions, head_dim: int, dtype: str) -> IRModule:
    """The backward kernel as TensorIR.

    Parameters
    ----------
    decisions : Mapping[str, int]
        ``query_rows``, ``key_rows``, ``key_unroll``, ``dim_unroll``, ``stage`` as in the forward kernel;
        ``gradient_unroll`` and ``gradient_lanes`` (key rows and head dimensions of a register tile of dk and
        dv; ``gradient_lanes`` divides ``head_dim``, ``gradient_unroll`` divides ``key_rows``).
    head_dim : int
        D.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``; sums are float32.

    Returns
    -------
    tvm.IRModule
        With one function ``backward(q, k, v, o, lse, do, dlse, bands, cu_seqlens, cu_seqlens_k, key_ranges,
        dq, dk, dv, scale, workers)``: shapes of q, k, v, o, lse and of what says where rows lie as in the
        forward kernel; do, dq like q; dlse float32 (B, Hq, Nq); dk and dv contiguous float32 (B, Hq, Nk, D):
        gradients of each *query* head, to be summed over the heads that share a key head.
    """
    R = decisions["query_rows"]
    KR = decisions["key_rows"]
    JU = decisions["key_unroll"]
    DU = decisions["dim_unroll"]
    GU = decisions["gradient_unroll"]
    GL = decisions["gradient_lanes"]
    stage = bool(decisions["stage"])
    D = head_dim
    LANES = math.gcd(D, 16)
    SR = KR if stage else 1

    @T.inline
    def add_gradient(gradient, weights, rows, tile, b, h, key_begin, count, first, first_dim):
        """Add ``sum_r weights[j, r] * rows[r, :]`` to the gradient of each key of a register tile."""
        fill(tile, 0, GU, GL, lambda u, lane: T.float32(0))
        multiply_add(
            tile, GU, GL, R, lambda u, r: weights[first + u, r], lambda r, lane: rows[r, first_dim + lane]
        )
        for u in T.unroll(GU):
            if first + u < count:
                for lane in T.vectorized(GL):
                    gradient[b, h, key_begin + first + u, first_dim + lane] = (
                        gradient[b, h, key_begin + first + u, first_dim + lane] + tile[u, lane]
                    )

    @T.prim_func(s_tir=True)
    def backward(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        o_handle: T.handle,
        lse_handle: T.handle,
        do_handle: T.handle,
        dlse_handle: T.handle,
        bands_handle: T.handle,
        cu_seqlens_handle: T.handle,
        cu_seqlens_k_handle: T.handle,
        key_ranges_handle: T.handle,
        dq_handle: T.handle,
        dk_handle: T.handle,
        dv_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "backward", "tirx.noalias": True})
        B, HQ, HKV, N, NK = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        M, DOCUMENTS_1, RANGES = T.int64(), T.int64(), T.int64()
        qb, qh, qn = T.int64(), T.int64(), T.int64()
        kb, kh, kn = T.int64(), T.int64(), T.int64()
        vb, vh, vn = T.int64(), T.int64(), T.int64()
        ob, oh, on = T.int64(), T.int64(), T.int64()
        gb, gh, gn = T.int64(), T.int64(), T.int64()
        db, dh, dn = T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_handle, (B, HQ, N, D), dtype, strides=(qb, qh, qn, 1), align=2, offset_factor=1)
        k = T.match_buffer(
            k_handle, (B, HKV, NK, D), dtype, strides=(kb, kh, kn, 1), align=2, offset_factor=1
        )
        v = T.match_buffer(
            v_handle, (B, HKV, NK, D), dtype, strides=(vb, vh, vn, 1), align=2, offset_factor=1
        )
        o = T.match_buffer(o_handle, (B, HQ, N, D), dtype, strides=(ob, oh, on, 1), align=2, offset_factor=1)
        lse = T.match_buffer(lse_handle, (B, HQ, N), "float32", align=4)
        do = T.match_buffer(
            do_handle, (B, HQ, N, D), dtype, strides=(gb, gh, gn, 1), align=2, offset_factor=1
        )
        dlse = T.match_buffer(dlse_handle, (B, HQ, N), "float32", align=4)
        bands = T.match_buffer(bands_handle, (M, HQ, 4), "int32", align=4)
        cu_seqlens = T.match_buffer(cu_seqlens_handle, (DOCUMENTS_1,), "int32", align=4)
        cu_seqlens_k = T.match_buffer(cu_seqlens_k_handle, (DOCUMENTS_1,), "int32", align=4)
        key_ranges = T.match_buffer(key_ranges_handle, (RANGES, 3), "int32", align=4)
        dq = T.match_buffer(
            dq_handle, (B, HQ, N, D), dtype, strides=(db, dh, dn, 1), align=2, offset_factor=1
        )
        dk = T.match_buffer(dk_handle, (B, HQ, NK, D), "float32", align=4)
        dv = T.match_buffer(dv_handle, (B, HQ, NK, D), "float32", align=4)
        for worker in T.parallel(workers):
            query = T.alloc_buffer((D, R), "float32")
            query_rows = T.alloc_buffer((R, D), "float32")
            doutput = T.alloc_buffer((D, R), "float32")
            doutput_rows = T.alloc_buffer((R, D), "float32")
            dquery = T.alloc_buffer((D, R), "float32")
            probabilities = T.alloc_buffer((KR, R), "float32")
            dscores = T.alloc_buffer((KR, R), "float32")
            key_scratch = T.alloc_buffer((SR, D), "float32")
            value_scratch = T.alloc_buffer((SR, D), "float32")
            row_lse = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
            delta = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
            keyed = T.alloc_buffer((R,), "int32")
            query_tile = T.alloc_buffer((JU, R), "float32", annotations=REGISTERS)
            dim_tile = T.alloc_buffer((DU, R), "float32", annotations=REGISTERS)
            gradient_tile = T.alloc_buffer((GU, GL), "float32", annotations=REGISTERS)
            # As in the forward: divisions that the simplifier can't put into every index.
            place = T.alloc_buffer((6,), "int32", annotations=REGISTERS)

            documents: T.let[T.int32] = T.cast(DOCUMENTS_1, "int32") - 1
            heads: T.let[T.int32] = T.cast(HQ, "int32")
            batch_heads: T.let[T.int32] = T.cast(B, "int32") * heads
            for turn in T.serial((batch_heads - worker + workers - 1) // workers):
                batch_head: T.let[T.int32] = turn * workers + worker
                place[0] = batch_head // heads
                place[1] = batch_head % heads
                place[2] = place[1] // T.cast(HQ // HKV, "int32")
                b: T.let[T.int32] = place[0]
                h: T.let[T.int32] = place[1]
                hk: T.let[T.int32] = place[2]
                for j in T.serial(T.cast(NK, "int32")):
                    for d in T.vectorized(D):
                        dk[b, h, j, d] = T.float32(0)
                    for d in T.vectorized(D):
                        dv[b, h, j, d] = T.float32(0)
                for document in T.serial(documents):
                    begin: T.let[T.int32] = cu_seqlens[document]
                    end: T.let[T.int32] = cu_seqlens[document + 1]
                    table: T.let[T.int32] = table_row(document, documents, T.cast(M, "int32"))
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
                    place[3] = keys_of_document[0]
                    place[4] = keys_of_document[1]
                    place[5] = keys_of_document[2]
                    for tile in T.serial((end - begin + R - 1) // R):
                        query_begin: T.let[T.int32] = begin + tile * R
                        query_last: T.let[T.int32] = T.min(query_begin + R, end) - 1
                        first: T.let[T.int32] = query_begin + place[5]
                        last: T.let[T.int32] = query_last + place[5]
                        # Lanes past the end, and queries without keys whatever arrives for their o and lse,
                        # hold zeros and lse = inf, so that they add nothing anywhere.
                        for r in T.serial(R):
                            i: T.let[T.int32] = T.min(query_begin + r, query_last)
                            keyed[r] = T.cast(
                                (query_begin + r <= query_last)
                                & (
                                    has_key(
                                        first + r, bands[table, h, 0], bands[table, h, 1], place[3], place[4]
                                    )
                                    | has_key(
                                        first + r, bands[table, h, 2], bands[table, h, 3], place[3], place[4]
                                    )
                                ),
                                "int32",
                            )
                            is_nobody: T.let[T.bool] = keyed[r] == 0
                            row_lse[r] = T.Select(is_nobody, T.float32(math.inf), lse[b, h, i])
                            delta[r] = T.Select(is_nobody, T.float32(0), T.float32(0) - dlse[b, h, i])
                            for d in T.serial(D):
                                query_rows[r, d] = T.Select(
                                    is_nobody, T.float32(0), T.cast(q[b, h, i, d], "float32")
                                )
                                query[d, r] = query_rows[r, d] * scale
                                doutput_rows[r, d] = T.Select(
                                    is_nobody, T.float32(0), T.cast(do[b, h, i, d], "float32")
                                )
                                doutput[d, r] = doutput_rows[r, d]
                                delta[r] = delta[r] + doutput_rows[r, d] * T.Select(
                                    is_nobody, T.float32(0), T.cast(o[b, h, i, d], "float32")
                                )
                        for d in T.serial(D):
                            fill(dquery, d, 1, R, lambda u, r: T.float32(0))

                        for band in T.serial(2):  # the far band, then the near one
                            low: T.let[T.int32] = bands[table, h, 2 - 2 * band]
                            high: T.let[T.int32] = bands[table, h, 3 - 2 * band]
                            keys_of_band = T.meta_var(key_range(first, last, low, high, place[3]))
                            band_begin: T.let[T.int32] = keys_of_band[0]
                            band_end: T.let[T.int32] = T.min(place[4], keys_of_band[1])
                            for key_tile in T.serial(T.max(0, band_end - band_begin + KR - 1) // KR):
                                key_begin: T.let[T.int32] = band_begin + key_tile * KR
                                count: T.let[T.int32] = T.min(KR, band_end - key_begin)
                                groups: T.let[T.int32] = (count + JU - 1) // JU
                                masked: T.let[T.bool] = crosses_edge(
                                    first, last, key_begin, key_begin + groups * JU - 1, low, high
                                )
                                if stage:
                                    widen(
                                        key_scratch, count, D, LANES, lambda j, d: k[b, hk, key_begin + j, d]
                                    )
                                    widen(
                                        value_scratch,
                                        count,
                                        D,
                                        LANES,
                                        lambda j, d: v[b, hk, key_begin + j, d],
                                    )
                                keys = key_scratch if stage else rows_of(k, b, hk, key_begin, KR)
                                values = value_scratch if stage else rows_of(v, b, hk, key_begin, KR)

                                for group in T.serial(groups):
                                    fill(query_tile, 0, JU, R, lambda u, r: T.float32(0))
                                    # Rows past the last key repeat it; nothing reads what they give.
                                    multiply_add(
                                        query_tile, JU, R, D,
                                        lambda u, d: keys[T.min(group * JU + u, count - 1), d],
                                        lambda d, r: query[d, r],
                                    )  # fmt: skip
                                    if masked:
                                        fill(
                                            query_tile, 0, JU, R,
                                            lambda u, r: T.Select(
                                                in_band(
                                                    first + r, key_begin + group * JU + u, low, high
                                                ),
                                                query_tile[u, r],
                                                T.float32(-math.inf),
                                            ),
                                        )  # fmt: skip
                                    fill(
                                        probabilities, group * JU, JU, R,
                                        lambda u, r: exp(query_tile[u, r] - row_lse[r]),
                                    )  # fmt: skip
                                    fill(query_tile, 0, JU, R, lambda u, r: T.float32(0))
                                    multiply_add(
                                        query_tile, JU, R, D,
                                        lambda u, d: values[T.min(group * JU + u, count - 1), d],
                                        lambda d, r: doutput[d, r],
                                    )  # fmt: skip
                                    fill(
                                        dscores, group * JU, JU, R,
                                        lambda u, r: probabilities[group * JU + u, r]
                                        * (query_tile[u, r] - delta[r])
                                        * scale,
                                    )  # fmt: skip

                                for chunk in T.serial(D // DU):
                                    fill(dim_tile, 0, DU, R, lambda u, r: dquery[chunk * DU + u, r])
                                    multiply_add(
                                        dim_tile, DU, R, count,
                                        lambda u, j: keys[j, chunk * DU + u],
                                        lambda j, r: dscores[j, r],
                                    )  # fmt: skip
                                    fill(dquery, chunk * DU, DU, R, lambda u, r: dim_tile[u, r])

                                for group in T.serial((count + GU - 1) // GU):
                                    for chunk in T.serial(D // GL):
                                        add_gradient(
                                            dv, probabilities, doutput_rows, gradient_tile,
                                            b, h, key_begin, count, group * GU, chunk * GL,
                                        )  # fmt: skip
                                        add_gradient(
                                            dk, dscores, query_rows, gradient_tile,
                                            b, h, key_begin, count, group * GU, chunk * GL,
                                        )  # fmt: skip

                        for r in T.serial(query_last - query_begin + 1):
                            for d in T.serial(D):
                                # Selected, because a key's infinity times a query's zero is NaN.
                                dq[b, h, query_begin + r, d] = T.Select(
                                    keyed[r] == 0, T.cast(0, dtype), T.cast(dquery[d, r], dtype)
                                )

    return IRModule({"backward": backward})
