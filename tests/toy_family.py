"""Families for tests of the search: a naive forward kernel whose decisions say how slow and how broken it is.

``repeats`` computes everything that many times, so that the best decisions are known beforehand. ``fault``
plants an error: 1 leaves out half of the keys, and so is faster than any correct kernel; 2 reads far
outside the inputs; 3 takes forever; 4 does not build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spattn_tvm.families import resolve_family
from spattn_tvm.families.family import Abi, Family, Output
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.families.space import Space

REPEATS = (1, 2, 4, 8)
UNTUNED = {"repeats": 4, "label": 10, "fault": 0}
CHOICES = {"repeats": REPEATS, "label": (10, 20, 30, 40), "fault": (0,)}


def _build(decisions: Mapping[str, int], head_dim: int, dtype: str, target: Any) -> Any:
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
        for b, h, i, again in T.grid(B, HQ, N, repeats):
            with T.sblock("row"):
                vb, vh, vi, _vr = T.axis.remap("SSSS", [b, h, i, again])
                row_sum = T.sblock_alloc_buffer((1,), "float32")
                score = T.sblock_alloc_buffer((1,), "float32")
                total = T.sblock_alloc_buffer((D,), "float32")
                row_sum[0] = T.float32(0)
                for d in range(D):
                    total[d] = T.float32(0)
                for j in range(vi // skipped + 1):
                    if (vi - j >= bands[0, vh, 0] and vi - j <= bands[0, vh, 1]) or (
                        vi - j >= bands[0, vh, 2] and vi - j <= bands[0, vh, 3]
                    ):
                        score[0] = T.float32(0)
                        for d in range(D):
                            score[0] = score[0] + q[vb, vh, vi, d] * k[vb, vh // (HQ // HKV), j + wild, d]
                        # Without the maximum: the test's scores are small.
                        score[0] = T.exp(score[0] * scale)
                        row_sum[0] = row_sum[0] + score[0]
                        for d in range(D):
                            total[d] = total[d] + score[0] * v[vb, vh // (HQ // HKV), j, d]
                lse[vb, vh, vi] = T.log(row_sum[0])
                for d in range(D):
                    o[vb, vh, vi, d] = total[d] / row_sum[0]

    return IRModule({"forward": forward})


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


FORWARD = Space(
    family="toy",
    direction="forward",
    choices=lambda head_dim, dtype: dict(CHOICES),
    illegal=_illegal,
    features=lambda decisions, problem: [float(decisions["repeats"] * problem.useful_flops)],
    untuned=lambda head_dim, dtype, target, deterministic=False: dict(UNTUNED),
    build=_build,
    unsupported=lambda head_dim, dtype, target: None if dtype == "float32" else "float32 only",
)
BROKEN_FORWARD = replace(
    FORWARD, family="broken_toy", choices=lambda head_dim, dtype: {**CHOICES, "fault": (0, 1, 2, 3, 4)}
)
BROKEN_CUDA_FORWARD = replace(BROKEN_FORWARD, family="broken_cuda_toy", build=_build_cuda)


def _family(name: str, space: str, kind: str) -> Family:
    abi = Abi(
        inputs=("q", "k", "v", "bands", "cu_seqlens"),
        outputs=(
            Output("o", like="q"),
            Output("lse", shape=lambda n: (n.batch, n.query_heads, n.queries), dtype="float32"),
        ),
    )
    return Family(
        name=name,
        reference=f"toy_family:{name.upper()}",
        runs_on=lambda target: target.kind == kind,
        spaces={"forward": f"toy_family:{space}"},
        abis={"forward": abi},
    )


TOY = _family("toy", "FORWARD", "cpu")
BROKEN_TOY = _family("broken_toy", "BROKEN_FORWARD", "cpu")
BROKEN_CUDA_TOY = _family("broken_cuda_toy", "BROKEN_CUDA_FORWARD", "cuda")


def kernel(family: Family, **decisions: int) -> KernelSpec:
    """A toy's forward kernel with some decisions, the rest untuned; the family is registered."""
    resolve_family(family.reference)
    return KernelSpec(family.name, "forward", "float32", 32, {**UNTUNED, **decisions})
