"""CPU kernels under decisions far from the default, against the reference in float64."""

import math

import pytest
import torch

from spattn_tvm.bands import BandLayout
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.families import find_space
from spattn_tvm.families.cpu.abi import BACKWARD
from spattn_tvm.families.family import Sizes
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.launch import Domain
from spattn_tvm.reference import reference_attention
from spattn_tvm.runtime import load_library
from spattn_tvm.target import detect_cpu

FORWARD_CASES = [
    ("float32", 40, {"query_rows": 16, "key_rows": 48, "key_unroll": 4, "dim_unroll": 4, "stage": 1}),
    ("bfloat16", 256, {"query_rows": 8, "key_rows": 96, "key_unroll": 6, "dim_unroll": 8}),
    ("float16", 32, {"query_rows": 32, "key_rows": 192, "key_unroll": 2, "dim_unroll": 2, "head_major": 0}),
]
BACKWARD_CASES = [
    (
        "float32",
        40,
        {"query_rows": 16, "key_rows": 48, "gradient_lanes": 8, "gradient_unroll": 12, "stage": 1},
    ),
    ("bfloat16", 96, {"query_rows": 8, "key_rows": 96, "gradient_lanes": 32, "gradient_unroll": 4}),
]
# (batch, query heads, kv heads, length, layout, document boundaries)
PROBLEMS = [
    (2, 4, 2, 133, BandLayout.spattention(4), None),
    (1, 4, 4, 300, BandLayout.exclusive(4), None),
    (1, 3, 1, 257, BandLayout.equal_area(3), (0, 0, 31, 64, 65, 200, 257)),
    (1, 2, 2, 1, BandLayout.spattention(2), None),
    (1, 2, 1, 701, BandLayout.custom([[(0, 3), (300, 700)], [(40, 290)]], 701), None),
]
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def build(direction, dtype, head_dim, changes):
    target = detect_cpu()
    space = find_space("cpu", direction)
    decisions = {**space.untuned(head_dim, dtype, target), **changes}
    reason = space.rejection(decisions, head_dim, dtype, target)
    if reason is not None:
        pytest.skip(reason)
    return load_library(
        compile_kernel(KernelSpec("cpu", direction, dtype, head_dim, decisions), target), direction
    )


def draw(problem, head_dim, dtype):
    batch, heads, kv_heads, length, layout, boundaries = problem
    q = torch.randn(batch, length, heads, head_dim).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, length, head_dim).to(dtype) for _ in range(2))
    cu_seqlens = torch.tensor(boundaries or (0, length), dtype=torch.int32)
    table = layout.packed_table(cu_seqlens.diff().tolist()) if boundaries else layout.table(length)[None]
    return q, k, v, cu_seqlens, torch.from_numpy(table.copy())


def relative(result, expected):
    return ((result.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def run_backward(kernel, given, domain, workers):
    q, k = given[:2]
    dq = torch.full_like(q, math.nan)
    dk, dv = (torch.full(tuple(q.shape), math.nan) for _ in range(2))
    sizes = Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], workers)
    scratch = [torch.full(item.shape(sizes), math.nan) for item in BACKWARD.scratch]
    kernel(*given, *domain, dq, dk, dv, *scratch, q.shape[3] ** -0.5, workers)
    return dq, *(g.unflatten(1, (k.shape[1], -1)).sum(2) for g in (dk, dv))


@pytest.mark.parametrize("dtype,head_dim,changes", FORWARD_CASES)
def test_forward_under_other_decisions(dtype, head_dim, changes):
    kernel = build("forward", dtype, head_dim, changes)
    for problem in PROBLEMS:
        q, k, v, cu_seqlens, table = draw(problem, head_dim, getattr(torch, dtype))
        expected, expected_lse = reference_attention(
            q.double(), k.double(), v.double(), problem[4], cu_seqlens=cu_seqlens
        )
        o = torch.full_like(q, math.nan)
        lse = torch.full(q.shape[:3], math.nan)
        kernel(q, k, v, *Domain.of_same_rows(table, cu_seqlens), o, lse, head_dim**-0.5, 2)
        assert relative(o, expected) < 4 * UNIT[dtype] + 1e-6
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype,head_dim,changes", BACKWARD_CASES)
def test_backward_under_other_decisions(dtype, head_dim, changes):
    kernel = build("backward", dtype, head_dim, changes)
    for problem in PROBLEMS:
        q, k, v, cu_seqlens, table = draw(problem, head_dim, getattr(torch, dtype))
        leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
        o, lse = reference_attention(*leaves, problem[4], cu_seqlens=cu_seqlens)
        do = torch.randn_like(o).to(q.dtype)
        dlse = torch.randn_like(lse)
        finite = torch.where(lse.isfinite(), lse, 0.0)
        expected = torch.autograd.grad((o * do.double()).sum() + (finite * dlse).sum(), leaves)
        given = q, k, v, o.detach().to(q.dtype), lse.detach().float(), do, dlse.float()
        for workers in (1, 3, 16):
            results = run_backward(kernel, given, Domain.of_same_rows(table, cu_seqlens), workers)
            for result, gradient in zip(results, expected, strict=True):
                # With one key dq is a difference of nearly equal numbers, hence the absolute term.
                assert relative(result, gradient) < 8 * UNIT[dtype] + 2e-5
        again = run_backward(kernel, given, Domain.of_same_rows(table, cu_seqlens), workers)
        assert all(torch.equal(*pair) for pair in zip(again, results, strict=True))
