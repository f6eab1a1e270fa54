"""The hopper family on a GPU: random problems, reruns, streams, graphs and many launches.

``SPATTN_SWEEP`` sets the number of random problems, a quarter of which go to each dtype and head dim.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from sweep import SweepProblem, check_problem, problems

from spattn_tvm import BandLayout, banded_attention, reference_attention

PROBLEMS = int(os.environ.get("SPATTN_SWEEP", "1000"))
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
VARIANTS = [(dtype, head_dim) for dtype in HALVES for head_dim in (64, 128)]


def lacks_hopper() -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(lacks_hopper(), reason="needs a GPU of sm_90"),
    pytest.mark.usefixtures("poisoned_outputs"),
]


def draw(batch: int, heads: int, length: int, head_dim: int, dtype: str = "bfloat16") -> list[torch.Tensor]:
    return [
        torch.randn(batch, heads, length, head_dim, device="cuda").to(HALVES[dtype]).requires_grad_()
        for _ in range(3)
    ]


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BandLayout, do: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    o = banded_attention(q, k, v, layout, impl="hopper", deterministic=True)
    return (o, *torch.autograd.grad(o, (q, k, v), do))


@pytest.mark.timeout(240 + PROBLEMS)
@pytest.mark.parametrize("dtype,head_dim", VARIANTS)
def test_random_problems_err_at_most_twice_as_much_as_plain_pytorch(dtype: str, head_dim: int) -> None:
    @settings(
        max_examples=max(1, PROBLEMS // len(VARIANTS)), suppress_health_check=list(HealthCheck), deadline=None
    )
    @given(
        problem=problems(
            dtypes=(dtype,), head_dims=(head_dim,), longest=1100, most_heads=16, most_scores=2**24
        )
    )
    def sweep(problem: SweepProblem) -> None:
        check_problem(problem, device="cuda", impl="hopper")

    sweep()


@pytest.mark.parametrize("dtype,head_dim", VARIANTS)
def test_deterministic_gradients_are_bitwise_equal(dtype: str, head_dim: int) -> None:
    q, k, v = draw(2, 8, 1531, head_dim, dtype)
    do = torch.randn_like(q)
    layout = BandLayout.spattention(8)
    first = gradients(q, k, v, layout, do)
    for _ in range(5):
        for one, other in zip(first, gradients(q, k, v, layout, do), strict=True):
            assert torch.equal(one, other)


def test_a_call_runs_on_the_current_stream_and_can_be_captured_in_a_graph() -> None:
    q, k, v = draw(1, 8, 700, 128)
    layout = BandLayout.spattention(8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        banded_attention(q, k, v, layout, impl="hopper")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            o = banded_attention(q, k, v, layout, impl="hopper")
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
    stream.synchronize()
    expected, _ = reference_attention(q.double(), k.double(), v.double(), layout)
    assert (o.double() - expected).norm() < 5e-3 * expected.norm()


def test_a_compiled_function_takes_other_lengths() -> None:
    layout = BandLayout.spattention(8)
    compiled = torch.compile(
        lambda q, k, v: banded_attention(q, k, v, layout, impl="hopper"), fullgraph=True, dynamic=True
    )
    for length in (256, 300, 1025):
        q, k, v = draw(1, 8, length, 64)
        expected, _ = reference_attention(q.double(), k.double(), v.double(), layout)
        assert (compiled(q, k, v).double() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.timeout(300)
def test_ten_thousand_launches_of_mixed_shapes_do_not_hang() -> None:
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
    expected = [gradients(*each) for each in inputs]
    # A forward and a backward each.
    for turn in range(5000):
        which = choices.randrange(len(inputs))
        results = gradients(*inputs[which])
        if turn % 250 == 0:
            for result, wanted in zip(results, expected[which], strict=True):
                assert torch.equal(result, wanted)
    torch.cuda.synchronize()


def test_another_length_and_layout_use_the_same_library() -> None:
    from spattn_tvm.dispatch import find_kernel

    q = draw(1, 8, 512, 128)[0]
    longer = draw(2, 8, 2048, 128)[0]
    paths = {
        find_kernel("forward", tensor, layout.spec, "hopper").path
        for tensor in (q, longer)
        for layout in (BandLayout.spattention(8), BandLayout.causal(8))
    }
    assert len(paths) == 1
