"""CUDA graphs and streams: what is kept from call to call serves them all, and what a graph holds stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.nn import BandedAttention
from spattn_tvm.ops import band_tables
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.band_tables import clear_tables

pytestmark = pytest.mark.gpu

HEADS = 4
LAYOUTS = [
    BandLayout.spattention(HEADS),
    BandLayout.spattention(HEADS, 512),
    BandLayout.equal_area(HEADS),
    BandLayout.custom([[(0, 3), (9, 20)], [], [(2, 5)], [(0, 500)]]),
]
FAMILIES = ["mma", "hopper"]
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.spec[:24])


@pytest.fixture(params=FAMILIES)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    return request.param


@pytest.fixture(autouse=True)
def no_tables() -> Iterator[None]:
    clear_tables()
    yield
    torch.cuda.synchronize()
    clear_tables()


def draw(length: int) -> list[Tensor]:
    return [
        torch.randn(2, length, heads, 64, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .detach()
        .requires_grad_()
        for heads in (HEADS, 2, 2)
    ]


class Step:
    """A forward and a backward pass on tensors that stay where they are."""

    def __init__(self, layout: BandLayout, impl: str, length: int, packed: bool) -> None:
        self.layout, self.impl = layout, impl
        self.leaves = draw(length)
        self.do = torch.randn_like(self.leaves[0])
        self.cu_seqlens = torch.tensor([0, length // 3, length], device="cuda") if packed else None
        self.results: tuple[Tensor, ...] = ()

    def attend(self, leaves: list[Tensor], do: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
        o, lse = banded_attention(
            *leaves,
            self.layout,
            cu_seqlens=cu_seqlens,
            return_lse=True,
            deterministic=True,
            impl=self.impl,
        )
        return o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do)

    def __call__(self) -> None:
        self.results = self.attend(self.leaves, self.do, self.cu_seqlens)

    def renew(self) -> None:
        with torch.no_grad():
            for tensor in (*self.leaves, self.do):
                tensor.normal_()
            if self.cu_seqlens is not None:
                self.cu_seqlens[1] = torch.randint(self.leaves[0].shape[2] + 1, ())

    def check(self) -> None:
        """The results in place against an eager call on copies."""
        torch.cuda.synchronize()
        kept = [tensor.clone() for tensor in self.results]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in self.leaves]
        expected = self.attend(leaves, self.do.clone(), self.cu_seqlens)
        for result, wanted in zip(kept, expected, strict=True):
            assert not wanted.isnan().any()
            torch.testing.assert_close(result, wanted, rtol=0, atol=0)

    def poison(self) -> None:
        for result in self.results:
            result.fill_(torch.nan)


def warm_up(*functions: Callable[[], object]) -> None:
    """As PyTorch's documentation does it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for function in functions:
                function()
    torch.cuda.current_stream().wait_stream(stream)


def capture(step: Step, **options: object) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        step()
    return graph


def replay_and_check(graph: torch.cuda.CUDAGraph, step: Step, times: int = 3) -> None:
    for _ in range(times):
        step.renew()
        step.poison()
        graph.replay()
        step.check()


@pytest.mark.parametrize("packed", [False, True])
@by_layout
def test_pytorchs_recipe(layout: BandLayout, packed: bool, impl: str) -> None:
    step = Step(layout, impl, 200, packed)
    warm_up(step)
    replay_and_check(capture(step), step)


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_every_mode_of_capture_on_the_stream_of_earlier_calls(mode: str, impl: str) -> None:
    step = Step(LAYOUTS[0], impl, 130, False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = capture(step, stream=stream, capture_error_mode=mode)
    clear_tables()
    replay_and_check(graph, step)


@pytest.mark.parametrize("packed", [False, True])
@by_layout
def test_what_is_first_needed_while_a_graph_is_captured(layout: BandLayout, packed: bool, impl: str) -> None:
    """Its tables are the graph's own, and nobody else's."""
    warm_up(Step(layout, impl, 200, packed))  # loads the kernels
    torch.cuda.synchronize()
    clear_tables()
    step = Step(layout, impl, 200, packed)
    graph = capture(step)
    assert not band_tables._entries
    assert not band_tables._lookups
    replay_and_check(graph, step, 1)
    other = Step(layout, impl, 200, packed)
    other()
    other.check()
    replay_and_check(graph, step)


@pytest.mark.parametrize("packed", [False, True])
def test_tables_of_a_graph_outlast_many_others(
    packed: bool, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(band_tables, "_MAX_ENTRIES", 8)
    step = Step(LAYOUTS[0], impl, 200, packed)
    warm_up(step)
    graph = capture(step)
    for length in range(2, 400, 5):
        find = band_tables._find_bands(BandLayout.causal(HEADS + length % 3), length, step.do.device)
        band_tables._find_ends(length, step.do.device)
        assert find.single.shape[0] == 1
    clear_tables()
    torch.cuda.empty_cache()
    filler = [torch.full((128,), 7, dtype=torch.int32, device="cuda") for _ in range(2000)]
    replay_and_check(graph, step)
    assert len(filler) == 2000


def test_graphs_of_one_pool(impl: str) -> None:
    steps = [
        Step(LAYOUTS[index % 2], impl, length, index == 2) for index, length in enumerate((64, 200, 130))
    ]
    warm_up(*steps)
    graphs: list[torch.cuda.CUDAGraph] = []
    for step in steps:
        options = {"pool": graphs[0].pool()} if graphs else {}
        graphs.append(capture(step, **options))
    for _ in range(3):
        for graph, step in zip(graphs, steps, strict=True):
            step.renew()
            graph.replay()
            step.check()


def test_streams_replays_and_eager_calls_at_once(impl: str) -> None:
    """Counters of tiles are a stream's or a graph's own."""
    steps = [Step(LAYOUTS[0], impl, 1500 + index, False) for index in range(4)]
    warm_up(*steps)
    graphs = [capture(step) for step in steps[:2]]
    streams = [torch.cuda.Stream() for _ in steps]
    for _ in range(10):
        for step in steps:
            step.renew()
        torch.cuda.synchronize()
        for stream, step, graph in zip(streams, steps, [*graphs, None, None], strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000)
                step() if graph is None else graph.replay()
        torch.cuda.synchronize()
        for step in steps:
            step.check()


def test_new_tables_on_streams_that_are_behind(impl: str) -> None:
    q, k, v = (tensor.detach() for tensor in draw(257))
    expected = banded_attention(q, k, v, LAYOUTS[0], impl=impl)
    torch.cuda.synchronize()
    clear_tables()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(4)]:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            results.append(banded_attention(q, k, v, LAYOUTS[0], impl=impl))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_graphed_callables(impl: str) -> None:
    module = BandedAttention(256, HEADS, num_kv_heads=2, impl=impl, device="cuda", dtype=torch.bfloat16)
    sample = torch.randn(2, 150, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    eager = BandedAttention(256, HEADS, num_kv_heads=2, impl=impl, device="cuda", dtype=torch.bfloat16)
    eager.load_state_dict(module.state_dict())
    graphed = torch.cuda.make_graphed_callables(module, (sample,))
    for _ in range(3):
        x = torch.randn_like(sample).requires_grad_()
        results = []
        for function in (graphed, eager):
            leaf = x.detach().clone().requires_grad_()
            y = function(leaf)
            y.float().square().sum().backward()
            results.append((y.detach().clone(), leaf.grad.clone()))
        for result, wanted in zip(*results, strict=True):
            torch.testing.assert_close(result, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_training_with_reduced_overhead(packed: bool, impl: str) -> None:
    module = BandedAttention(256, HEADS, num_kv_heads=2, impl=impl, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(module, mode="reduce-overhead")
    for length in (150, 150, 150, 90, 150, 90, 90):
        torch.compiler.cudagraph_mark_step_begin()
        cu_seqlens = torch.tensor([0, length // 4, length], device="cuda") if packed else None
        x = torch.randn(2, length, 256, device="cuda", dtype=torch.bfloat16)
        results = []
        for function in (compiled, module):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = function(leaf, cu_seqlens)
            y.float().square().sum().backward()
            weights = [parameter.grad.clone() for parameter in module.parameters()]
            results.append([y.detach().clone(), leaf.grad.clone(), *weights])
        for result, wanted in zip(*results, strict=True):
            error = (result.float() - wanted.float()).norm() / wanted.float().norm()
            assert error < 2e-2


def test_nothing_that_is_kept_lies_in_a_callers_pool(impl: str) -> None:
    warm_up(Step(LAYOUTS[0], impl, 64, False))  # loads the kernels
    torch.cuda.synchronize()
    clear_tables()
    pool = torch.cuda.MemPool()
    steps = [Step(layout, impl, 90, packed) for layout in LAYOUTS for packed in (False, True)]
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.use_mem_pool(pool):
        for step in steps:
            step()
            step.results = ()
    torch.cuda.synchronize()
    assert band_tables._entries
    segments = pool.snapshot()
    assert segments, "the outputs were to lie there"
    assert sum(segment["allocated_size"] for segment in segments) == 0
