"""The workload that defines a tuning problem computes what the reference computes."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch

from spattn_tvm.bands import BandLayout
from spattn_tvm.problem import DIRECTIONS, AttentionProblem
from spattn_tvm.reference import reference_attention, reference_decode

tvm = pytest.importorskip("tvm")

from tvm_ffi import structural_equal  # noqa: E402

from spattn_tvm.tuning.workload import DECISIONS_BLOCK, build_workload  # noqa: E402


class Case(NamedTuple):
    dtype: str
    batch: int
    query_heads: int
    kv_heads: int
    length: int
    head_dim: int
    layout: BandLayout
    cu_seqlens: tuple[int, ...] | None = None
    keys: int | None = None
    cu_seqlens_k: tuple[int, ...] | None = None


CASES = {
    "spattention": Case("float32", 2, 4, 2, 37, 32, BandLayout.spattention(4)),
    "empty rows": Case("float32", 1, 3, 1, 29, 40, BandLayout.exclusive(3, 29)),
    "a head without bands": Case("float32", 1, 2, 2, 17, 32, BandLayout.custom([[], [(0, 2), (5, 9)]])),
    "length 1": Case("float32", 1, 2, 1, 1, 32, BandLayout.causal(2)),
    "half": Case("float16", 1, 2, 1, 33, 32, BandLayout.gapped(2, 64)),
    "bfloat16": Case("bfloat16", 1, 2, 1, 33, 32, BandLayout.spattention(2, 64)),
    "packed, one table": Case("float32", 2, 4, 2, 40, 32, BandLayout.spattention(4, 64), (0, 11, 11, 24, 40)),
    "packed, own bands": Case("float32", 1, 4, 4, 40, 32, BandLayout.spattention(4), (0, 1, 18, 40)),
    "more keys": Case("float32", 2, 4, 2, 19, 32, BandLayout.spattention(4, 64), keys=50),
    "fewer keys": Case("float32", 1, 2, 1, 30, 32, BandLayout.custom([[(1, 4), (9, 11)], [(3, 9)]]), keys=21),
    "packed, other keys": Case(
        "float32", 1, 4, 2, 40, 32, BandLayout.spattention(4, 64), (0, 9, 9, 40), 33, (0, 20, 24, 33)
    ),
}


def _close(actual: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    # One rounding to the storage dtype on top of float32 sums: half a unit is 2**-11 or 2**-8, inputs
    # reach 4.
    tolerance = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.2e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_workload_matches_reference(name: str, direction: str) -> None:
    case = CASES[name]
    problem = AttentionProblem(direction, *case[:7], case.keys)
    dtype = getattr(torch, case.dtype)
    query_shape = (case.batch, case.query_heads, case.length, case.head_dim)
    key_shape = (case.batch, case.kv_heads, problem.keys, case.head_dim)
    generator = torch.Generator()
    print("seed", generator.seed())
    q, do = (torch.randn(query_shape, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(key_shape, generator=generator).to(dtype) for _ in range(2))
    dlse = torch.randn(query_shape[:3], generator=generator)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    o, lse = reference_attention(
        *exact, case.layout, cu_seqlens=case.cu_seqlens, cu_seqlens_k=case.cu_seqlens_k
    )
    has_key = lse > -torch.inf
    gradients = torch.autograd.grad(
        (o * do).sum() + (torch.where(has_key, lse, 0.0) * dlse).sum(), exact, allow_unused=True
    )

    boundaries = case.cu_seqlens or (0, case.length)
    key_boundaries = case.cu_seqlens_k or case.cu_seqlens or (0, problem.keys)
    lengths = [end - begin for begin, end in itertools.pairwise(key_boundaries)]
    bands = torch.tensor(case.layout.packed_table(lengths))
    module = build_workload(problem, documents=len(lengths), per_document_bands=len(bands) > 1)
    run = tvm.compile(module, target="llvm")[direction]
    places = [torch.tensor(values, dtype=torch.int32) for values in (boundaries, key_boundaries)]
    scale = torch.tensor([case.head_dim**-0.5])
    if direction == "forward":
        actual_o = torch.full(query_shape, torch.nan, dtype=dtype)
        actual_lse = torch.full(query_shape[:3], torch.nan)
        run(q, k, v, bands, *places, scale, actual_o, actual_lse)
        _close(actual_o, o.detach(), case.dtype)
        torch.testing.assert_close(actual_lse.double(), lse.detach(), rtol=1e-5, atol=1e-5)
        return
    outputs = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    arguments = (o.detach().to(dtype), lse.detach().float(), do, dlse, bands, *places, scale)
    run(q, k, v, *arguments, *outputs)
    for actual, expected in zip(outputs, gradients, strict=True):
        _close(actual, expected, case.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_matches_the_reference(dtype: str) -> None:
    lengths, starts = (50, 33, 2, 0), (0, 7, 0, 0)
    layout = BandLayout.custom([[(0, 3), (9, 20)], [(5, 60)], [], [(0, 49)]], 64)
    problem = AttentionProblem("decode", dtype, 4, 4, 2, 3, 32, layout, 50)
    shapes = ((4, 4, 3, 32), (4, 2, 50, 32), (4, 2, 50, 32))
    q, k, v = (torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes)
    places = [torch.tensor(values, dtype=torch.int32) for values in (lengths, starts)]
    expected = reference_decode(
        *(tensor.double() for tensor in (q, k, v)), layout, cache_lengths=places[0], cache_starts=places[1]
    )
    o, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
    run = tvm.compile(build_workload(problem), target="llvm")["decode"]
    run(q, k, v, torch.tensor(layout.table(50)[None]), *places, torch.tensor([32**-0.5]), o, lse)
    _close(o, expected[0], dtype)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)


def test_layout_is_part_of_the_workload() -> None:
    shape = ("float32", 1, 2, 2, 64, 32)
    workloads = [
        build_workload(AttentionProblem("forward", *shape, layout))
        for layout in (BandLayout.spattention(2, 64), BandLayout.causal(2, 64), BandLayout.causal(2, 64))
    ]
    assert not structural_equal(workloads[0], workloads[1])
    assert structural_equal(workloads[1], workloads[2])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_workload_has_the_block_that_carries_decisions(direction: str) -> None:
    problem = AttentionProblem(direction, "float32", 1, 2, 1, 16, 32, BandLayout.causal(2))
    schedule = tvm.s_tir.Schedule(build_workload(problem))
    block = schedule.get_sblock(DECISIONS_BLOCK, direction)
    schedule.annotate(block, "spattn.query_rows", 64)
    assert schedule.get(block).annotations["spattn.query_rows"] == 64


def test_documents_must_be_positive() -> None:
    problem = AttentionProblem("forward", "float32", 1, 2, 1, 16, 32, BandLayout.causal(2))
    with pytest.raises(ValueError, match="documents must be at least 1, got 0"):
        build_workload(problem, documents=0)
