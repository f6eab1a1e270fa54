"""The problem itself in TensorIR: naive banded attention, forward, backward and decoding, with the bands as
loop bounds.

A search tunes *this* function: its shapes, dtype and layout identify a problem in the tuning database, and
its block ``attention`` carries the decisions as annotations. It runs, so that a test can compare it with the
reference, but it is written to be read, not to be fast: one query after another, the row of scores kept
whole.

The keys of query ``i`` are two ranges, far band first, clipped at the first key of the query's document, so
that one loop of ``far_count + near_count`` steps visits exactly the attended pairs. The queries of a document
are its last rows.

MetaSchedule accepts tensors with static shapes only, so ``scale`` is a tensor of one element here and the
``workers`` argument of the real kernels is absent.
"""

import math

from tvm import IRModule
from tvm.script import tirx as T

from spattn_tvm.problem import AttentionProblem

DECISIONS_BLOCK = "attention"


def _build_forward(B, HQ, HKV, N, NK, D, dtype, documents, tables):
    group = HQ // HKV

    @T.prim_func(s_tir=True)
    def forward(
        q: T.Buffer((B, HQ, N, D), dtype),
        k: T.Buffer((B, HKV, NK, D), dtype),
        v: T.Buffer((B, HKV, NK, D), dtype),
        bands: T.Buffer((tables, HQ, 4), "int32"),
        cu_seqlens: T.Buffer((documents + 1,), "int32"),
        cu_seqlens_k: T.Buffer((documents + 1,), "int32"),
        scale: T.Buffer((1,), "float32"),
        o: T.Buffer((B, HQ, N, D), dtype),
        lse: T.Buffer((B, HQ, N), "float32"),
    ):
        T.func_attr({"global_symbol": "forward", "tirx.noalias": True})
        for b, h, i in T.grid(B, HQ, N):
            with T.sblock("attention"):
                vb, vh, vi = T.axis.remap("SSS", [b, h, i])
                T.reads(
                    q[vb, vh, vi, 0:D],
                    k[vb, vh // group, 0:NK, 0:D],
                    v[vb, vh // group, 0:NK, 0:D],
                    bands[0:tables, vh, 0:4],
                    cu_seqlens[0 : documents + 1],
                    cu_seqlens_k[0 : documents + 1],
                    scale[0],
                )
                T.writes(o[vb, vh, vi, 0:D], lse[vb, vh, vi])
                document = T.sblock_alloc_buffer((1,), "int32")
                scores = T.sblock_alloc_buffer((NK,), "float32")
                row_max = T.sblock_alloc_buffer((1,), "float32")
                row_sum = T.sblock_alloc_buffer((1,), "float32")
                output = T.sblock_alloc_buffer((D,), "float32")

                document[0] = 0
                for m in range(1, documents):
                    if cu_seqlens[m] <= vi:
                        document[0] = m
                table: T.let[T.int32] = T.min(document[0], tables - 1)
                first: T.let[T.int32] = cu_seqlens_k[document[0]]
                position: T.let[T.int32] = vi + (cu_seqlens_k[document[0] + 1] - cu_seqlens[document[0] + 1])
                far_begin: T.let[T.int32] = T.max(first, position - bands[table, vh, 3])
                far_count: T.let[T.int32] = T.max(0, position - bands[table, vh, 2] - far_begin + 1)
                near_begin: T.let[T.int32] = T.max(first, position - bands[table, vh, 1])
                near_count: T.let[T.int32] = T.max(0, position - bands[table, vh, 0] - near_begin + 1)

                row_max[0] = T.float32(-math.inf)
                for s in range(far_count + near_count):
                    j: T.let[T.int32] = T.if_then_else(
                        s < far_count, far_begin + s, near_begin + s - far_count
                    )
                    scores[s] = T.float32(0)
                    for d in range(D):
                        scores[s] = scores[s] + T.cast(q[vb, vh, vi, d], "float32") * T.cast(
                            k[vb, vh // group, j, d], "float32"
                        )
                    scores[s] = scores[s] * scale[0]
                    row_max[0] = T.max(row_max[0], scores[s])

                row_sum[0] = T.float32(0)
                for d in range(D):
                    output[d] = T.float32(0)
                for s in range(far_count + near_count):
                    j: T.let[T.int32] = T.if_then_else(
                        s < far_count, far_begin + s, near_begin + s - far_count
                    )
                    scores[s] = T.exp(scores[s] - row_max[0])
                    row_sum[0] = row_sum[0] + scores[s]
                    for d in range(D):
                        output[d] = output[d] + scores[s] * T.cast(v[vb, vh // group, j, d], "float32")

                if far_count + near_count > 0:
                    lse[vb, vh, vi] = row_max[0] + T.log(row_sum[0])
                    for d in range(D):
                        o[vb, vh, vi, d] = T.cast(output[d] / row_sum[0], dtype)
                else:
                    lse[vb, vh, vi] = T.float32(-math.inf)
                    for d in range(D):
                        o[vb, vh, vi, d] = T.cast(T.float32(0), dtype)

    return forward


def _build_backward(B, HQ, HKV, N, NK, D, dtype, documents, tables):
    group = HQ // HKV

    @T.prim_func(s_tir=True)
    def backward(
        q: T.Buffer((B, HQ, N, D), dtype),
        k: T.Buffer((B, HKV, NK, D), dtype),
        v: T.Buffer((B, HKV, NK, D), dtype),
        o: T.Buffer((B, HQ, N, D), dtype),
        lse: T.Buffer((B, HQ, N), "float32"),
        do: T.Buffer((B, HQ, N, D), dtype),
        dlse: T.Buffer((B, HQ, N), "float32"),
        bands: T.Buffer((tables, HQ, 4), "int32"),
        cu_seqlens: T.Buffer((documents + 1,), "int32"),
        cu_seqlens_k: T.Buffer((documents + 1,), "int32"),
        scale: T.Buffer((1,), "float32"),
        dq: T.Buffer((B, HQ, N, D), dtype),
        dk: T.Buffer((B, HKV, NK, D), dtype),
        dv: T.Buffer((B, HKV, NK, D), dtype),
    ):
        T.func_attr({"global_symbol": "backward", "tirx.noalias": True})
        for b, g in T.grid(B, HKV):
            with T.sblock("attention"):
                vb, vg = T.axis.remap("SS", [b, g])
                T.reads(
                    q[vb, vg * group : vg * group + group, 0:N, 0:D],
                    k[vb, vg, 0:NK, 0:D],
                    v[vb, vg, 0:NK, 0:D],
                    o[vb, vg * group : vg * group + group, 0:N, 0:D],
                    lse[vb, vg * group : vg * group + group, 0:N],
                    do[vb, vg * group : vg * group + group, 0:N, 0:D],
                    dlse[vb, vg * group : vg * group + group, 0:N],
                    bands[0:tables, vg * group : vg * group + group, 0:4],
                    cu_seqlens[0 : documents + 1],
                    cu_seqlens_k[0 : documents + 1],
                    scale[0],
                )
                T.writes(
                    dq[vb, vg * group : vg * group + group, 0:N, 0:D],
                    dk[vb, vg, 0:NK, 0:D],
                    dv[vb, vg, 0:NK, 0:D],
                )
                document = T.sblock_alloc_buffer((1,), "int32")
                delta = T.sblock_alloc_buffer((1,), "float32")
                score = T.sblock_alloc_buffer((1,), "float32")
                dp = T.sblock_alloc_buffer((1,), "float32")
                dq_sum = T.sblock_alloc_buffer((D,), "float32")
                dk_sum = T.sblock_alloc_buffer((NK, D), "float32")
                dv_sum = T.sblock_alloc_buffer((NK, D), "float32")

                for j, d in T.grid(NK, D):
                    dk_sum[j, d] = T.float32(0)
                    dv_sum[j, d] = T.float32(0)

                for r, i in T.grid(group, N):
                    h: T.let[T.int32] = vg * group + r
                    document[0] = 0
                    for m in range(1, documents):
                        if cu_seqlens[m] <= i:
                            document[0] = m
                    table: T.let[T.int32] = T.min(document[0], tables - 1)
                    first: T.let[T.int32] = cu_seqlens_k[document[0]]
                    position: T.let[T.int32] = i + (
                        cu_seqlens_k[document[0] + 1] - cu_seqlens[document[0] + 1]
                    )
                    far_begin: T.let[T.int32] = T.max(first, position - bands[table, h, 3])
                    far_count: T.let[T.int32] = T.max(0, position - bands[table, h, 2] - far_begin + 1)
                    near_begin: T.let[T.int32] = T.max(first, position - bands[table, h, 1])
                    near_count: T.let[T.int32] = T.max(0, position - bands[table, h, 0] - near_begin + 1)

                    # dS = P * (dP - delta): the softmax's Jacobian, and P * dlse, the derivative of lse
                    # being P.
                    delta[0] = T.float32(0) - dlse[vb, h, i]
                    for d in range(D):
                        delta[0] = delta[0] + T.cast(do[vb, h, i, d], "float32") * T.cast(
                            o[vb, h, i, d], "float32"
                        )
                        dq_sum[d] = T.float32(0)

                    for s in range(far_count + near_count):
                        j: T.let[T.int32] = T.if_then_else(
                            s < far_count, far_begin + s, near_begin + s - far_count
                        )
                        score[0] = T.float32(0)
                        dp[0] = T.float32(0)
                        for d in range(D):
                            score[0] = score[0] + T.cast(q[vb, h, i, d], "float32") * T.cast(
                                k[vb, vg, j, d], "float32"
                            )
                            dp[0] = dp[0] + T.cast(do[vb, h, i, d], "float32") * T.cast(
                                v[vb, vg, j, d], "float32"
                            )
                        p: T.let[T.float32] = T.exp(score[0] * scale[0] - lse[vb, h, i])
                        ds: T.let[T.float32] = p * (dp[0] - delta[0]) * scale[0]
                        for d in range(D):
                            dq_sum[d] = dq_sum[d] + ds * T.cast(k[vb, vg, j, d], "float32")
                            dk_sum[j, d] = dk_sum[j, d] + ds * T.cast(q[vb, h, i, d], "float32")
                            dv_sum[j, d] = dv_sum[j, d] + p * T.cast(do[vb, h, i, d], "float32")

                    for d in range(D):
                        dq[vb, h, i, d] = T.cast(dq_sum[d], dtype)

                for j, d in T.grid(NK, D):
                    dk[vb, vg, j, d] = T.cast(dk_sum[j, d], dtype)
                    dv[vb, vg, j, d] = T.cast(dv_sum[j, d], dtype)

    return backward


def _build_decode(B, HQ, HKV, N, NK, D, dtype, documents, tables):
    group = HQ // HKV

    @T.prim_func(s_tir=True)
    def decode(
        q: T.Buffer((B, HQ, N, D), dtype),
        k: T.Buffer((B, HKV, NK, D), dtype),
        v: T.Buffer((B, HKV, NK, D), dtype),
        bands: T.Buffer((1, HQ, 4), "int32"),
        cache_lengths: T.Buffer((B,), "int32"),
        cache_starts: T.Buffer((B,), "int32"),
        scale: T.Buffer((1,), "float32"),
        o: T.Buffer((B, HQ, N, D), dtype),
        lse: T.Buffer((B, HQ, N), "float32"),
    ):
        T.func_attr({"global_symbol": "decode", "tirx.noalias": True})
        for b, h, r in T.grid(B, HQ, N):
            with T.sblock("attention"):
                vb, vh, vr = T.axis.remap("SSS", [b, h, r])
                T.reads(
                    q[vb, vh, vr, 0:D],
                    k[vb, vh // group, 0:NK, 0:D],
                    v[vb, vh // group, 0:NK, 0:D],
                    bands[0, vh, 0:4],
                    cache_lengths[vb],
                    cache_starts[vb],
                    scale[0],
                )
                T.writes(o[vb, vh, vr, 0:D], lse[vb, vh, vr])
                scores = T.sblock_alloc_buffer((NK,), "float32")
                row_max = T.sblock_alloc_buffer((1,), "float32")
                row_sum = T.sblock_alloc_buffer((1,), "float32")
                output = T.sblock_alloc_buffer((D,), "float32")

                position: T.let[T.int32] = cache_lengths[vb] - N + vr
                row_max[0] = T.float32(-math.inf)
                for j in range(cache_starts[vb], cache_lengths[vb]):
                    scores[j] = T.float32(-math.inf)
                    if ((position - j >= bands[0, vh, 0]) & (position - j <= bands[0, vh, 1])) | (
                        (position - j >= bands[0, vh, 2]) & (position - j <= bands[0, vh, 3])
                    ):
                        scores[j] = T.float32(0)
                        for d in range(D):
                            scores[j] = scores[j] + T.cast(q[vb, vh, vr, d], "float32") * T.cast(
                                k[vb, vh // group, j, d], "float32"
                            )
                        scores[j] = scores[j] * scale[0]
                        row_max[0] = T.max(row_max[0], scores[j])

                row_sum[0] = T.float32(0)
                for d in range(D):
                    output[d] = T.float32(0)
                for j in range(cache_starts[vb], cache_lengths[vb]):
                    if scores[j] > T.float32(-math.inf):
                        scores[j] = T.exp(scores[j] - row_max[0])
                        row_sum[0] = row_sum[0] + scores[j]
                        for d in range(D):
                            output[d] = output[d] + scores[j] * T.cast(v[vb, vh // group, j, d], "float32")

                if row_sum[0] > T.float32(0):
                    lse[vb, vh, vr] = row_max[0] + T.log(row_sum[0])
                    for d in range(D):
                        o[vb, vh, vr, d] = T.cast(output[d] / row_sum[0], dtype)
                else:
                    lse[vb, vh, vr] = T.float32(-math.inf)
                    for d in range(D):
                        o[vb, vh, vr, d] = T.cast(T.float32(0), dtype)

    return decode


_BUILDERS = {"forward": _build_forward, "backward": _build_backward, "decode": _build_decode}


def build_workload(
    problem: AttentionProblem, *, documents: int = 1, per_document_bands: bool = False
) -> IRModule:
    """The naive kernel of a problem, whose function is named after the problem's direction.

    Parameters
    ----------
    problem : AttentionProblem
        Its layout becomes an attribute of the function, so that two layouts of one shape are two
        workloads; the bands themselves stay an argument.
    documents : int
        Documents that ``cu_seqlens`` (their queries) and ``cu_seqlens_k`` (their keys) separate.
    per_document_bands : bool
        Whether the band table has a row for each document (a layout without context length), or one for all.

    Returns
    -------
    IRModule
        ``forward(q, k, v, bands, cu_seqlens, cu_seqlens_k, scale, o, lse)``,
        ``backward(q, k, v, o, lse, do, dlse, bands, cu_seqlens, cu_seqlens_k, scale, dq, dk, dv)`` or
        ``decode(q, k, v, bands, cache_lengths, cache_starts, scale, o, lse)`` over a contiguous cache. Shapes
        and dtypes are those of the kernel ABI; ``scale`` is float32 of shape (1,), dq, dk, dv have the dtype
        and shape of q, k, v.

    Raises
    ------
    ValueError
        When `documents` is below 1.
    """
    if documents < 1:
        raise ValueError(f"documents must be at least 1, got {documents}")
    function = _BUILDERS[problem.direction](
        problem.batch,
        problem.query_heads,
        problem.kv_heads,
        problem.length,
        problem.keys,
        problem.head_dim,
        problem.dtype,
        documents,
        documents if per_document_bands else 1,
    )
    return IRModule({problem.direction: function.with_attr("spattn.layout", problem.layout.spec)})
