"""The CUDA families on a GPU: random problems, reruns, streams, graphs and many launches.

``SPATTN_SWEEP`` sets the number of random problems of each family, which its dtypes and head dims share.
"""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweep import DTYPES, SweepProblem, check_problem, problems

from spattn_tvm import BandLayout, banded_attention, reference_attention

PROBLEMS = int(os.environ.get("SPATTN_SWEEP", "1000"))
HALVES = ("bfloat16", "float16")
VARIANTS = {
    "hopper": [(dtype, head_dim) for dtype in HALVES for head_dim in (64, 128)],
    "mma": [(dtype, head_dim) for dtype in ("float32", *HALVES) for head_dim in (32, 64, 96, 128, 192, 256)],
}
# Tests that share the problems of a variant, so that processes can run them side by side.
SHARES = {"hopper": 4, "mma": 1}


def lacks_hopper() -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)


def of_family(family: str, *values: object) -> object:
    marks = [pytest.mark.skipif(lacks_hopper(), reason="needs a GPU of sm_90")] if family == "hopper" else []
    return pytest.param(family, *values, marks=marks)


families = pytest.mark.parametrize("family", [of_family(family) for family in VARIANTS])
variants = pytest.mark.parametrize(
    "family,dtype,head_dim", [of_family(family, *each) for family in VARIANTS for each in VARIANTS[family]]
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]


def draw(batch: int, heads: int, length: int, head_dim: int, dtype: str = "bfloat16") -> list[torch.Tensor]:
    return [
        torch.randn(batch, heads, length, head_dim, device="cuda").to(DTYPES[dtype]).requires_grad_()
        for _ in range(3)
    ]


def gradients(
    family: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BandLayout, do: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    o = banded_attention(q, k, v, layout, impl=family, deterministic=True)
    return (o, *torch.autograd.grad(o, (q, k, v), do))


@pytest.mark.timeout(240 + PROBLEMS)
@pytest.mark.parametrize(
    "family,dtype,head_dim,share",
    [
        of_family(family, *each, share)
        for family in VARIANTS
        for each in VARIANTS[family]
        for share in range(SHARES[family])
    ],
)
def test_random_problems_err_at_most_twice_as_much_as_plain_pytorch(
    family: str, dtype: str, head_dim: int, share: int
) -> None:
    tests = len(VARIANTS[family]) * SHARES[family]

    @settings(
        max_examples=math.ceil(PROBLEMS / tests),
        suppress_health_check=list(HealthCheck),
        deadline=None,
        database=None,
    )
    @given(
        problem=problems(
            dtypes=(dtype,), head_dims=(head_dim,), longest=1100, most_heads=16, most_scores=2**24
        ),
        deterministic=st.booleans(),
    )
    def sweep(problem: SweepProblem, deterministic: bool) -> None:
        check_problem(problem, device="cuda", impl=family, deterministic=deterministic)

    sweep()


@variants
def test_deterministic_gradients_are_bitwise_equal(family: str, dtype: str, head_dim: int) -> None:
    q, k, v = draw(2, 8, 1531, head_dim, dtype)
    do = torch.randn_like(q)
    layout = BandLayout.spattention(8)
    first = gradients(family, q, k, v, layout, do)
    for _ in range(5):
        for one, other in zip(first, gradients(family, q, k, v, layout, do), strict=True):
            assert torch.equal(one, other)


@families
def test_a_call_runs_on_the_current_stream_and_can_be_captured_in_a_graph(family: str) -> None:
    q, k, v = draw(1, 8, 700, 128)
    layout = BandLayout.spattention(8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        banded_attention(q, k, v, layout, impl=family)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            o = banded_attention(q, k, v, layout, impl=family)
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
    stream.synchronize()
    expected, _ = reference_attention(q.double(), k.double(), v.double(), layout)
    assert (o.double() - expected).norm() < 5e-3 * expected.norm()


@families
def test_a_captured_call_takes_lengths_and_offsets_when_it_is_replayed(family: str) -> None:
    """A step of chunked prefill over a cache, whose lengths only the device knows."""
    layout = BandLayout.spattention(8, 1024)
    q, k, v = (
        torch.randn(2, heads, length, 128, device="cuda", dtype=torch.bfloat16)
        for heads, length in ((8, 130), (2, 1000), (2, 1000))
    )
    lengths, starts = torch.tensor([130, 130], device="cuda"), torch.tensor([0, 0], device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    do = torch.randn_like(q)

    def step() -> tuple[torch.Tensor, ...]:
        o = banded_attention(*leaves, layout, kv_lengths=lengths, kv_starts=starts, impl=family)
        return (o, *torch.autograd.grad(o, leaves, do))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    torch.cuda.current_stream().wait_stream(stream)
    for ends, begins in (([1000, 555], [0, 13]), ([131, 0], [7, 0]), ([700, 1000], [699, 400])):
        lengths.copy_(torch.tensor(ends))
        starts.copy_(torch.tensor(begins))
        graph.replay()
        exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
        o, _ = reference_attention(*exact, layout, kv_lengths=lengths, kv_starts=starts)
        for found, wanted in zip(captured, (o, *torch.autograd.grad(o, exact, do.double())), strict=True):
            assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()


@families
def test_a_compiled_function_takes_other_lengths(family: str) -> None:
    layout = BandLayout.spattention(8)
    compiled = torch.compile(
        lambda q, k, v: banded_attention(q, k, v, layout, impl=family), fullgraph=True, dynamic=True
    )
    for length in (256, 300, 1025):
        q, k, v = draw(1, 8, length, 64)
        expected, _ = reference_attention(q.double(), k.double(), v.double(), layout)
        assert (compiled(q, k, v).double() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.timeout(300)
@families
def test_ten_thousand_launches_of_mixed_shapes_do_not_hang(family: str) -> None:
    choices = random.Random(0)
    shapes = [
        (1, 1, 1, 64),
        (3, 4, 65, 128),
        (1, 16, 1024, 128),
        (2, 8, 333, 64),
        (1, 5, 2049, 128),
        (4, 2, 127, 64),
    ]
    inputs = []
    for batch, heads, length, head_dim in shapes:
        q, k, v = draw(batch, heads, length, head_dim)
        inputs.append((q, k, v, BandLayout.spattention(heads), torch.randn_like(q)))
    expected = [gradients(family, *each) for each in inputs]
    # A forward and a backward each.
    for turn in range(5000):
        which = choices.randrange(len(inputs))
        results = gradients(family, *inputs[which])
        if turn % 250 == 0:
            for result, wanted in zip(results, expected[which], strict=True):
                assert torch.equal(result, wanted)
    torch.cuda.synchronize()


@families
def test_another_length_and_layout_use_the_same_library(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spattn_tvm.dispatch import clear_cache, find_kernel

    # Without records, and with many tiles: few have kernels of their own.
    monkeypatch.setenv("SPATTN_SCHEDULES", str(tmp_path))
    clear_cache()
    q = draw(8, 8, 2048, 128)[0]
    longer = draw(5, 8, 4096, 128)[0]
    paths = {
        find_kernel("forward", tensor, layout.spec, family).path
        for tensor in (q, longer)
        for layout in (BandLayout.spattention(8), BandLayout.causal(8))
    }
    clear_cache()
    assert len(paths) == 1


@families
def test_offsets_beyond_two_to_the_31(family: str) -> None:
    needed = 60 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    heads, length, head_dim, window, tail = 16, 2**20 + 5, 128, 64, 500
    layout = BandLayout.sliding_window(heads, window)
    q, k, v, do = (
        torch.randn(1, heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    assert q.numel() > 2**31
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    o = banded_attention(*leaves, layout, impl=family)
    results = (o, *torch.autograd.grad(o, leaves, do))

    # The last tokens attend to no token before this slice, and only its queries attend to them.
    end = slice(length - tail - window, None)
    last = [tensor.detach()[:, :, end].double().requires_grad_() for tensor in leaves]
    expected, _ = reference_attention(*last, layout)
    wanted = (expected, *torch.autograd.grad(expected, last, do[:, :, end].double()))
    for result, exact in zip(results, wanted, strict=True):
        difference = result[:, :, -tail:].double() - exact[:, :, -tail:]
        assert difference.norm() < 1e-2 * exact[:, :, -tail:].norm()
