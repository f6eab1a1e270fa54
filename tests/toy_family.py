"""Families from outside of the package, for tests: naive kernels whose decisions say how slow and how broken
they are.

``repeats`` computes everything that many times, so that the best decisions are known beforehand. ``fault``
plants an error: 1 leaves out half of the keys, and so is faster than any correct kernel; 2 reads far
outside the inputs; 3 takes forever; 4 does not build.

The toy's ABI has all that an ABI can have: gradients of each query head, scratch, something kept that must be
zero, alignment, and no factors but positive ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spattn_tvm.families import resolve_family
from spattn_tvm.families.family import Abi, Family, Output, Scratch, Sizes
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.families.space import Space, one_structure

REPEATS = (1, 2, 4, 8)
UNTUNED = {"repeats": 4, "label": 10, "fault": 0}
CHOICES = {"repeats": REPEATS, "label": (10, 20, 30, 40), "fault": (0,)}


def _build_forward(decisions: Mapping[str, int], head_dim: int, dtype: str, target: Any) -> Any:
    from tvm import IRModule
    from tvm.script import tirx as T

    D, fault = head_dim, decisions["fault"]
    if fault == 4:
        raise RuntimeError("planted build failure")
    repeats = 2**30 if fault == 3 else decisions["repeats"]
    skipped = 2 if fault == 1 else 1
    wild = 2**25 if fault == 2 else 0

    @T.prim_func(s_tir=True)
    def forward(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        bands_handle: T.handle,
        cu_handle: T.handle,
        o_handle: T.handle,
        lse_handle: T.handle,
        running_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "forward", "tirx.noalias": True})
        B, HQ, HKV, N = T.int32(), T.int32(), T.int32(), T.int32()
        M, BOUNDARIES = T.int32(), T.int32()
        qb, qh, qn = T.int32(), T.int32(), T.int32()
        kb, kh, kn = T.int32(), T.int32(), T.int32()
        vb, vh, vn = T.int32(), T.int32(), T.int32()
        ob, oh, on = T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_handle, (B, HQ, N, D), dtype, strides=[qb, qh, qn, 1])
        k = T.match_buffer(k_handle, (B, HKV, N, D), dtype, strides=[kb, kh, kn, 1])
        v = T.match_buffer(v_handle, (B, HKV, N, D), dtype, strides=[vb, vh, vn, 1])
        bands = T.match_buffer(bands_handle, (M, HQ, 4), "int32")
        cu_seqlens = T.match_buffer(cu_handle, (BOUNDARIES,), "int32")
        o = T.match_buffer(o_handle, (B, HQ, N, D), dtype, strides=[ob, oh, on, 1])
        lse = T.match_buffer(lse_handle, (B, HQ, N), "float32")
        running = T.match_buffer(running_handle, (1,), "int32")
        with T.sblock("begin"):
            running[0] = running[0] + 1
        for b, h, i, again in T.grid(B, HQ, N, repeats):
            with T.sblock("row"):
                vb, vh, vi, _vr = T.axis.remap("SSSS", [b, h, i, again])
                T.reads(
                    q[vb, vh, vi, 0:D],
                    k[vb, vh // (HQ // HKV), 0:N, 0:D],
                    v[vb, vh // (HQ // HKV), 0:N, 0:D],
                    bands[0:M, vh, 0:4],
                    cu_seqlens[0:BOUNDARIES],
                    running[0],
                )
                T.writes(o[vb, vh, vi, 0:D], lse[vb, vh, vi])
                document = T.sblock_alloc_buffer((1,), "int32")
                row_sum = T.sblock_alloc_buffer((1,), "float32")
                score = T.sblock_alloc_buffer((1,), "float32")
                total = T.sblock_alloc_buffer((D,), "float32")
                document[0] = 0
                for m in range(1, BOUNDARIES - 1):
                    if cu_seqlens[m] <= vi:
                        document[0] = m
                table: T.let[T.int32] = T.min(document[0], M - 1)
                begin: T.let[T.int32] = cu_seqlens[document[0]]
                row_sum[0] = T.float32(0)
                for d in range(D):
                    total[d] = T.float32(0)
                for s in range((vi - begin) // skipped + 1):
                    j: T.let[T.int32] = begin + s
                    if (vi - j >= bands[table, vh, 0] and vi - j <= bands[table, vh, 1]) or (
                        vi - j >= bands[table, vh, 2] and vi - j <= bands[table, vh, 3]
                    ):
                        score[0] = T.float32(0)
                        for d in range(D):
                            score[0] = score[0] + q[vb, vh, vi, d] * k[vb, vh // (HQ // HKV), j + wild, d]
                        # Without the maximum: the tests' scores are small.
                        score[0] = T.exp(score[0] * scale)
                        row_sum[0] = row_sum[0] + score[0]
                        for d in range(D):
                            total[d] = total[d] + score[0] * v[vb, vh // (HQ // HKV), j, d]
                # A launcher that breaks the ABI's rules is found out.
                if scale <= T.float32(0) or running[0] != 1:
                    row_sum[0] = T.float32(math.nan)
                if row_sum[0] == T.float32(0):
                    lse[vb, vh, vi] = T.float32(-math.inf)
                else:
                    lse[vb, vh, vi] = T.log(row_sum[0])
                for d in range(D):
                    o[vb, vh, vi, d] = total[d] / T.if_then_else(
                        row_sum[0] == T.float32(0), T.float32(1), row_sum[0]
                    )
        with T.sblock("end"):
            running[0] = 0

    return IRModule({"forward": forward})


def _build_backward(decisions: Mapping[str, int], head_dim: int, dtype: str, target: Any) -> Any:
    from tvm import IRModule
    from tvm.script import tirx as T

    D, repeats = head_dim, decisions["repeats"]

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
        cu_handle: T.handle,
        dq_handle: T.handle,
        dk_handle: T.handle,
        dv_handle: T.handle,
        delta_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "backward", "tirx.noalias": True})
        B, HQ, HKV, N = T.int32(), T.int32(), T.int32(), T.int32()
        M, BOUNDARIES = T.int32(), T.int32()
        qb, qh, qn = T.int32(), T.int32(), T.int32()
        kb, kh, kn = T.int32(), T.int32(), T.int32()
        vb, vh, vn = T.int32(), T.int32(), T.int32()
        ob, oh, on = T.int32(), T.int32(), T.int32()
        dob, doh, don = T.int32(), T.int32(), T.int32()
        dqb, dqh, dqn = T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_handle, (B, HQ, N, D), dtype, strides=[qb, qh, qn, 1])
        k = T.match_buffer(k_handle, (B, HKV, N, D), dtype, strides=[kb, kh, kn, 1])
        v = T.match_buffer(v_handle, (B, HKV, N, D), dtype, strides=[vb, vh, vn, 1])
        o = T.match_buffer(o_handle, (B, HQ, N, D), dtype, strides=[ob, oh, on, 1])
        lse = T.match_buffer(lse_handle, (B, HQ, N), "float32")
        do = T.match_buffer(do_handle, (B, HQ, N, D), dtype, strides=[dob, doh, don, 1])
        dlse = T.match_buffer(dlse_handle, (B, HQ, N), "float32")
        bands = T.match_buffer(bands_handle, (M, HQ, 4), "int32")
        cu_seqlens = T.match_buffer(cu_handle, (BOUNDARIES,), "int32")
        dq = T.match_buffer(dq_handle, (B, HQ, N, D), dtype, strides=[dqb, dqh, dqn, 1])
        dk = T.match_buffer(dk_handle, (B, HQ, N, D), "float32")
        dv = T.match_buffer(dv_handle, (B, HQ, N, D), "float32")
        delta = T.match_buffer(delta_handle, (B, HQ, N), "float32")
        for b, h, again in T.grid(B, HQ, repeats):
            with T.sblock("head"):
                vb, vh, _vr = T.axis.remap("SSS", [b, h, again])
                T.reads(
                    q[vb, vh, 0:N, 0:D],
                    k[vb, vh // (HQ // HKV), 0:N, 0:D],
                    v[vb, vh // (HQ // HKV), 0:N, 0:D],
                    o[vb, vh, 0:N, 0:D],
                    lse[vb, vh, 0:N],
                    do[vb, vh, 0:N, 0:D],
                    dlse[vb, vh, 0:N],
                    bands[0:M, vh, 0:4],
                    cu_seqlens[0:BOUNDARIES],
                )
                T.writes(dq[vb, vh, 0:N, 0:D], dk[vb, vh, 0:N, 0:D], dv[vb, vh, 0:N, 0:D], delta[vb, vh, 0:N])
                document = T.sblock_alloc_buffer((1,), "int32")
                score = T.sblock_alloc_buffer((1,), "float32")
                dp = T.sblock_alloc_buffer((1,), "float32")
                g: T.let[T.int32] = vh // (HQ // HKV)
                for i, d in T.grid(N, D):
                    dq[vb, vh, i, d] = T.float32(0)
                    dk[vb, vh, i, d] = T.float32(0)
                    dv[vb, vh, i, d] = T.float32(0)
                for i in range(N):
                    delta[vb, vh, i] = T.float32(0) - dlse[vb, vh, i]
                    for d in range(D):
                        delta[vb, vh, i] = delta[vb, vh, i] + do[vb, vh, i, d] * o[vb, vh, i, d]
                    document[0] = 0
                    for m in range(1, BOUNDARIES - 1):
                        if cu_seqlens[m] <= i:
                            document[0] = m
                    table: T.let[T.int32] = T.min(document[0], M - 1)
                    begin: T.let[T.int32] = cu_seqlens[document[0]]
                    for s in range(i - begin + 1):
                        j: T.let[T.int32] = begin + s
                        if (i - j >= bands[table, vh, 0] and i - j <= bands[table, vh, 1]) or (
                            i - j >= bands[table, vh, 2] and i - j <= bands[table, vh, 3]
                        ):
                            score[0] = T.float32(0)
                            dp[0] = T.float32(0)
                            for d in range(D):
                                score[0] = score[0] + q[vb, vh, i, d] * k[vb, g, j, d]
                                dp[0] = dp[0] + do[vb, vh, i, d] * v[vb, g, j, d]
                            # As above: only positive factors.
                            p: T.let[T.float32] = T.exp(
                                score[0] * T.sqrt(scale) * T.sqrt(scale) - lse[vb, vh, i]
                            )
                            ds: T.let[T.float32] = p * (dp[0] - delta[vb, vh, i]) * scale
                            for d in range(D):
                                dq[vb, vh, i, d] = dq[vb, vh, i, d] + ds * k[vb, g, j, d]
                                dk[vb, vh, j, d] = dk[vb, vh, j, d] + ds * q[vb, vh, i, d]
                                dv[vb, vh, j, d] = dv[vb, vh, j, d] + p * do[vb, vh, i, d]

    return IRModule({"backward": backward})


def _build_cuda(decisions: Mapping[str, int], head_dim: int, dtype: str, target: Any) -> Any:
    """The same, a thread for each row."""
    from tvm import IRModule
    from tvm.script import tirx as T

    D, fault = head_dim, decisions["fault"]
    if fault == 4:
        raise RuntimeError("planted build failure")
    repeats = 2**30 if fault == 3 else decisions["repeats"]
    skipped = 2 if fault == 1 else 1
    wild = 2**25 if fault == 2 else 0

    @T.prim_func(s_tir=True)
    def forward(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        bands_handle: T.handle,
        cu_handle: T.handle,
        o_handle: T.handle,
        lse_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "forward", "tirx.noalias": True})
        B, HQ, HKV, N = T.int32(), T.int32(), T.int32(), T.int32()
        M, DOCUMENTS = T.int32(), T.int32()
        q = T.match_buffer(q_handle, (B, HQ, N, D), dtype)
        k = T.match_buffer(k_handle, (B, HKV, N, D), dtype)
        v = T.match_buffer(v_handle, (B, HKV, N, D), dtype)
        bands = T.match_buffer(bands_handle, (M, HQ, 4), "int32")
        _cu_seqlens = T.match_buffer(cu_handle, (DOCUMENTS,), "int32")
        o = T.match_buffer(o_handle, (B, HQ, N, D), dtype)
        lse = T.match_buffer(lse_handle, (B, HQ, N), "float32")
        for b in T.thread_binding(B, thread="blockIdx.z"):
            for h in T.thread_binding(HQ, thread="blockIdx.y"):
                for i in T.thread_binding(N, thread="blockIdx.x"):
                    for _t in T.thread_binding(1, thread="threadIdx.x"):
                        with T.sblock("row"):
                            vb, vh, vi = T.axis.remap("SSS", [b, h, i])
                            row_sum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            score = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            total = T.sblock_alloc_buffer((D,), "float32", scope="local")
                            for _again in range(repeats):
                                row_sum[0] = T.float32(0)
                                for d in range(D):
                                    total[d] = T.float32(0)
                                for j in range(vi // skipped + 1):
                                    if (vi - j >= bands[0, vh, 0] and vi - j <= bands[0, vh, 1]) or (
                                        vi - j >= bands[0, vh, 2] and vi - j <= bands[0, vh, 3]
                                    ):
                                        score[0] = T.float32(0)
                                        for d in range(D):
                                            score[0] = (
                                                score[0]
                                                + q[vb, vh, vi, d] * k[vb, vh // (HQ // HKV), j + wild, d]
                                            )
                                        score[0] = T.exp(score[0] * scale)
                                        row_sum[0] = row_sum[0] + score[0]
                                        for d in range(D):
                                            total[d] = total[d] + score[0] * v[vb, vh // (HQ // HKV), j, d]
                                # In the loop, or the compiler would leave out all rounds but the last.
                                lse[vb, vh, vi] = T.log(row_sum[0])
                                for d in range(D):
                                    o[vb, vh, vi, d] = total[d] / row_sum[0]

    return IRModule({"forward": forward})


def _illegal(decisions: Mapping[str, int], head_dim: int, dtype: str, target: Any) -> str | None:
    if decisions["label"] == 40 and decisions["repeats"] == 1:
        return "label 40 needs repeats"
    return None


def _features(decisions: Mapping[str, int], problem: Any) -> list[float]:
    return [float(decisions["repeats"] * problem.useful_flops)]


def _untuned(head_dim: int, dtype: str, target: Any, deterministic: bool = False) -> dict[str, int]:
    return dict(UNTUNED)


def _unsupported(head_dim: int, dtype: str, target: Any) -> str | None:
    return None if dtype == "float32" else "float32 only"


FORWARD = Space(
    family="toy",
    direction="forward",
    structures=one_structure(lambda head_dim, dtype: dict(CHOICES)),
    illegal=_illegal,
    features=_features,
    untuned=_untuned,
    build=_build_forward,
    unsupported=_unsupported,
)
BACKWARD = replace(FORWARD, direction="backward", build=_build_backward)
BROKEN_FORWARD = replace(
    FORWARD,
    family="broken_toy",
    structures=one_structure(lambda head_dim, dtype: {**CHOICES, "fault": (0, 1, 2, 3, 4)}),
)
BROKEN_CUDA_FORWARD = replace(BROKEN_FORWARD, family="broken_cuda_toy", build=_build_cuda)


def _query_rows(n: Sizes) -> tuple[int, ...]:
    return n.batch, n.query_heads, n.queries


CUDA_FORWARD_ABI = Abi(
    inputs=("q", "k", "v", "bands", "cu_seqlens"),
    outputs=(Output("o", like="q"), Output("lse", shape=_query_rows, dtype="float32")),
)
FORWARD_ABI = Abi(
    inputs=("q", "k", "v", "bands", "cu_seqlens"),
    outputs=(Output("o", like="q"), Output("lse", shape=_query_rows, dtype="float32")),
    scratch=(Scratch("running", shape=lambda n: (1,), dtype="int32", kept=True),),
    alignment=16,
    positive_scale=True,
)
BACKWARD_ABI = Abi(
    inputs=("q", "k", "v", "o", "lse", "do", "dlse", "bands", "cu_seqlens"),
    outputs=(
        Output("dq", like="q", has_sign=True),
        Output("dk", like="k", per_query_head=True),
        Output("dv", like="v", per_query_head=True),
    ),
    scratch=(
        Scratch("delta", shape=_query_rows, dtype="float32"),
        Scratch("never", shape=lambda n: (n.queries,), dtype="float32", only_with="fault"),
    ),
    alignment=16,
    positive_scale=True,
)


def _runs_on_cpu(target: Any) -> bool:
    return target.kind == "cpu"


TOY = Family(
    name="toy",
    reference="toy_family:TOY",
    runs_on=_runs_on_cpu,
    spaces={"forward": "toy_family:FORWARD", "backward": "toy_family:BACKWARD"},
    abis={"forward": FORWARD_ABI, "backward": BACKWARD_ABI},
)
BROKEN_TOY = Family(
    name="broken_toy",
    reference="toy_family:BROKEN_TOY",
    runs_on=_runs_on_cpu,
    spaces={"forward": "toy_family:BROKEN_FORWARD"},
    abis={"forward": FORWARD_ABI},
)
BROKEN_CUDA_TOY = Family(
    name="broken_cuda_toy",
    reference="toy_family:BROKEN_CUDA_TOY",
    runs_on=lambda target: target.kind == "cuda",
    spaces={"forward": "toy_family:BROKEN_CUDA_FORWARD"},
    abis={"forward": CUDA_FORWARD_ABI},
)


def kernel(family: Family, **decisions: int) -> KernelSpec:
    """A toy's forward kernel with some decisions, the rest untuned; the family is registered."""
    resolve_family(family.reference)
    return KernelSpec(family.name, "forward", "float32", 32, {**UNTUNED, **decisions})
