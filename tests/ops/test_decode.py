"""``banded_attention_decode``: the function, its operator, repeated steps, and the reference behind them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from decode_problems import FORMS, DecodeProblem, random_decode
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spattn_tvm import BandedCache, banded_attention, banded_attention_decode
from spattn_tvm.bands import BandLayout
from spattn_tvm.ops import repeated_steps
from spattn_tvm.reference import reference_decode

DECODE = torch.ops.spattn_tvm.banded_attention_decode.default
SWEEP = int(os.environ.get("SPATTN_SWEEP", "40"))
LAYOUT = BandLayout.spattention(4, 256)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# Of o and lse, whose values are of the order of 1.
ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def check(problem: DecodeProblem, dtype: torch.dtype, device: str = "cpu", **options: Any) -> None:
    q, k, v = problem.tensors(dtype, device)
    expected = problem.truth(q, k, v)
    k_cache, v_cache, places = problem.cached(k, v)
    found = banded_attention_decode(q, k_cache, v_cache, problem.layout, return_lse=True, **places, **options)
    assert found[0].stride() == torch.empty_like(q).stride()
    for actual, exact in zip(found, expected, strict=True):
        actual = actual.cpu().double()
        assert torch.equal(actual.isinf(), exact.isinf()) and not actual.isnan().any(), problem
        error = (actual - exact).masked_fill(exact.isinf(), 0.0).abs()
        assert not error.numel() or float(error.max()) <= ERROR[dtype], (float(error.max()), problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_steps_on_the_reference(dtype: torch.dtype) -> None:
    for seed in range(SWEEP):
        check(random_decode(seed), dtype, impl="reference")


def test_random_steps() -> None:
    for seed in range(SWEEP):
        check(random_decode(seed), torch.float32, impl="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_steps_on_a_gpu(dtype: torch.dtype) -> None:
    for seed in range(10 * SWEEP):
        check(random_decode(seed, head_dims=(64, 128), longest=900), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_step_on_a_gpu_waits_for_nothing_and_is_captured(form: str) -> None:
    problem = random_decode(3, head_dims=(64,), form=form)
    q, k, v = problem.tensors(torch.bfloat16, "cuda")
    k_cache, v_cache, places = problem.cached(k, v)
    empty = {**places, "cache_lengths": torch.zeros_like(places["cache_lengths"])}
    steps = [
        lambda given=given: banded_attention_decode(q, k_cache, v_cache, problem.layout, **given)
        for given in (places, empty)
    ]
    expected = [step() for step in steps for _ in range(3)][::3]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lengths = places["cache_lengths"].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = banded_attention_decode(
            q, k_cache, v_cache, problem.layout, **{**places, "cache_lengths": lengths}
        )
    for given, result in zip((places, empty), expected, strict=True):
        lengths.copy_(given["cache_lengths"])
        graph.replay()
        assert torch.equal(captured, result)


# --- against attention -----------------------------------------------------------------------------------


def draw(queries: int = 3, keys: int = 200, batch: int = 2, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 4, queries, 32, **options)
    k, v = (torch.randn(batch, 2, keys, 32, **options) for _ in range(2))
    return q, k, v


def test_steps_of_a_sequence_equal_attention_to_all_of_it() -> None:
    q, k, v = draw(90, 90)
    whole, whole_lse = banded_attention(q, k, v, LAYOUT, return_lse=True)
    end = 0
    for queries in (1, 1, 16, 5, 16, 1, 13, 16, 16, 4, 1):
        end += queries
        cache = [torch.cat((t[:, :, :end], torch.full_like(t[:, :, end:], torch.nan)), 2) for t in (k, v)]
        rows = slice(end - queries, end)
        o, lse = banded_attention_decode(
            q[:, :, rows], *cache, LAYOUT, cache_lengths=torch.tensor([end, end]), return_lse=True
        )
        torch.testing.assert_close(o, whole[:, :, rows], **CLOSE)
        torch.testing.assert_close(lse, whole_lse[:, :, rows], **CLOSE)
    assert end == 90


def test_a_step_equals_attention_with_lengths() -> None:
    q, k, v = draw()
    lengths, starts = torch.tensor([200, 57]), torch.tensor([3, 50])
    expected = banded_attention(q, k, v, LAYOUT, kv_lengths=lengths, kv_starts=starts, scale=0.3)
    found = banded_attention_decode(q, k, v, LAYOUT, cache_lengths=lengths, cache_starts=starts, scale=0.3)
    torch.testing.assert_close(found, expected, **CLOSE)


# --- repeated steps --------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a step is served by an earlier one."""
    served: list[int] = []
    prepare = repeated_steps.ready_decode

    def counting(*arguments: Any) -> Any:
        launch = prepare(*arguments)
        assert launch is not None
        return lambda *tensors: (served.append(1), launch(*tensors))[1]

    repeated_steps._prepared.clear()
    monkeypatch.setattr(repeated_steps, "ready_decode", counting)
    yield served
    repeated_steps._prepared.clear()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_repeated_steps_follow_the_values(launches: list[int], dtype: torch.dtype) -> None:
    q, k, v = draw()
    for end in (5, 6, 7, 200, 0, 1, 77):
        lengths = torch.tensor([end, max(0, end - 1)], dtype=dtype)
        starts = torch.tensor([0, end // 2], dtype=torch.int32)
        q = torch.randn_like(q)
        for given in ({}, {"cache_starts": starts}):
            found = banded_attention_decode(q, k, v, LAYOUT, cache_lengths=lengths, return_lse=True, **given)
            expected = reference_decode(q, k, v, LAYOUT, cache_lengths=lengths, **given)
            for actual, exact in zip(found, expected, strict=True):
                torch.testing.assert_close(actual, exact, **CLOSE)
    assert len(launches) >= 8


def test_repeated_steps_raise_as_first_ones_do(launches: list[int]) -> None:
    q, k, v = draw()
    lengths = torch.tensor([200, 3])

    def step(**changes: Any) -> Tensor:
        given = {"cache_lengths": lengths, **changes}
        return banded_attention_decode(q, k, v, LAYOUT, **given)

    for _ in range(4):
        step()
    assert launches
    with pytest.raises(TypeError, match=r"cache_lengths must be a torch\.Tensor, got NoneType"):
        step(cache_lengths=None)
    for changes, message in (
        ({"cache_lengths": torch.tensor([201, 3])}, r"cache_lengths must lie in \[0, 200\]"),
        ({"cache_lengths": torch.tensor([-1, 3])}, r"cache_lengths must lie in \[0, 200\]"),
        ({"cache_lengths": torch.tensor([3])}, "cache_lengths must have shape"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"impl": "abacus"}, "impl must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            step(**changes)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        step()
    with torch.no_grad():
        assert not step().requires_grad


def test_repeated_steps_over_rings_follow_their_values(launches: list[int]) -> None:
    """Whoever changes them, past the counter of versions too."""
    cache = BandedCache(LAYOUT, batch_size=2, num_kv_heads=2, head_dim=32)
    other = BandedCache(LAYOUT, batch_size=2, num_kv_heads=2, head_dim=32)
    q, k, v = draw()
    for end in range(1, 60):
        row = slice(end - 1, end)
        for each in (cache, other):
            o = each.attend(q[:, :, :1], k[:, :, row], v[:, :, row])
        expected = reference_decode(q[:, :, :1], k, v, LAYOUT, cache_lengths=torch.tensor([end, end]))[0]
        torch.testing.assert_close(o, expected, **CLOSE)
    assert len(launches) > 100
    ring = cache.ring.clone()

    def step() -> Tensor:
        return banded_attention_decode(
            q[:, :, :1], cache.keys, cache.values, LAYOUT, cache_lengths=cache.lengths, ring=ring
        )

    before = len(launches)
    torch.testing.assert_close(step(), expected, **CLOSE)
    assert len(launches) == before + 1
    for changed in ([0, -1], [0, 10**6], [-1, 50]):
        kept = ring[0].clone()
        ring.numpy()[0] = changed
        with pytest.raises(ValueError, match=r"ring\[0\]"):
            step()
        ring[0] = kept
    torch.testing.assert_close(step(), expected, **CLOSE)


def test_a_cache_that_grows_is_not_prepared_for(launches: list[int]) -> None:
    q, k, v = draw()
    for end in range(20, 60):
        banded_attention_decode(
            q, k[:, :, :end], v[:, :, :end], LAYOUT, cache_lengths=torch.tensor([end, end])
        )
    assert not repeated_steps._prepared and not launches


def test_thread_counts_may_change_between_steps() -> None:
    q, k, v = draw()
    lengths, before = torch.tensor([200, 150]), torch.get_num_threads()
    expected = reference_decode(q, k, v, LAYOUT, cache_lengths=lengths)[0]
    try:
        for threads in (1, 1, 1, 9, 2, 1):
            torch.set_num_threads(threads)
            found = banded_attention_decode(q, k, v, LAYOUT, cache_lengths=lengths)
            torch.testing.assert_close(found, expected, **CLOSE)
    finally:
        torch.set_num_threads(before)


# --- the operator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    problem = random_decode(8, form=form)
    q, k, v = problem.tensors(torch.float32)
    k_cache, v_cache, places = problem.cached(k, v)
    given = [places.get(name) for name in ("cache_lengths", "cache_starts", "block_table", "ring")]
    torch.library.opcheck(DECODE, (q, k_cache, v_cache, *given, problem.layout.spec, 0.2, "cpu"))


class Step(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None) -> Tensor:
        return banded_attention_decode(q, k, v, LAYOUT, cache_lengths=lengths, block_table=table)


def test_compiled_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Step(), fullgraph=True, dynamic=True)
    for queries, keys in ((1, 30), (2, 31), (5, 200)):
        q, k, v = draw(queries, keys)
        lengths = torch.tensor([keys, keys // 2])
        torch.testing.assert_close(compiled(q, k, v, lengths, None), Step()(q, k, v, lengths, None))
        pages = [torch.randn(9, 2, 16, 32) for _ in range(2)]
        table = torch.tensor([[8, 1, 0], [3, 4, 5]], dtype=torch.int32)
        lengths = torch.tensor([48, queries])
        torch.testing.assert_close(compiled(q, *pages, lengths, table), Step()(q, *pages, lengths, table))


def test_exported_with_a_dynamic_cache() -> None:
    keys = torch.export.Dim("keys", min=2, max=4096)
    shapes = ({}, {2: keys}, {2: keys}, {}, None)
    example = (*draw(1, 64), torch.tensor([64, 9]), None)
    program = torch.export.export(Step(), example, dynamic_shapes=shapes).module()
    for size in (64, 200, 7):
        inputs = (*draw(1, size), torch.tensor([size, 1]), None)
        torch.testing.assert_close(program(*inputs), Step()(*inputs))


def test_modes_see_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    q, k, v = draw()
    lengths = torch.tensor([200, 10])
    for _ in range(3):
        expected = banded_attention_decode(q, k, v, LAYOUT, cache_lengths=lengths)
    with Watch():
        found = banded_attention_decode(q, k, v, LAYOUT, cache_lengths=lengths)
    assert DECODE in seen and torch.equal(found, expected)
    with torch.inference_mode():
        assert torch.equal(banded_attention_decode(q, k, v, LAYOUT, cache_lengths=lengths), expected)
    meta = banded_attention_decode(
        *(t.to("meta") for t in (q, k, v)), LAYOUT, cache_lengths=lengths.to("meta")
    )
    assert meta.is_meta and meta.shape == q.shape


def test_flops_are_those_of_the_attended_pairs() -> None:
    for seed in range(20):
        problem = random_decode(seed)
        q, k, v = problem.tensors(torch.float32)
        k_cache, v_cache, places = problem.cached(k, v)
        with FlopCounterMode(display=False) as counter:
            banded_attention_decode(q, k_cache, v_cache, problem.layout, **places)
        assert counter.get_total_flops() == 4 * 32 * int(problem.mask().sum()), problem


def test_autocast_decodes_in_the_lower_precision() -> None:
    q, k, v = draw()
    lengths = torch.tensor([200, 10])
    with torch.autocast("cpu", torch.bfloat16):
        found = banded_attention_decode(q, k, v, LAYOUT, cache_lengths=lengths)
    expected = banded_attention_decode(*(t.bfloat16() for t in (q, k, v)), LAYOUT, cache_lengths=lengths)
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected)


# --- what is refused -------------------------------------------------------------------------------------


def test_no_gradient_and_no_transform() -> None:
    q, k, v = draw()

    def step(q: Tensor) -> Tensor:
        return banded_attention_decode(q, k, v, LAYOUT, cache_lengths=torch.tensor([200, 10])).sum()

    for ask in (
        lambda: step(q.clone().requires_grad_()),
        lambda: torch.func.grad(step)(q),
        lambda: torch.func.jvp(step, (q,), (q,)),
    ):
        with pytest.raises(RuntimeError, match=r"no gradient: call it under torch\.no_grad"):
            ask()
    with pytest.raises(NotImplementedError, match="make the mapped dimension part of the batch"):
        torch.vmap(step)(q[None])
    o, _ = DECODE(
        q.clone().requires_grad_(), k, v, torch.tensor([200, 10]), None, None, None, LAYOUT.spec, 0.2, "cpu"
    )
    with pytest.raises(RuntimeError, match="no gradient"):
        o.sum().backward()


Q, K = torch.zeros(2, 4, 2, 32), torch.zeros(2, 2, 40, 32)
PAGES, RINGS = torch.zeros(5, 2, 16, 32), torch.zeros(2, 400, 32)
LENGTHS = torch.tensor([40, 3])
TABLE = torch.tensor([[0, 1, 2], [3, 4, -1]], dtype=torch.int32)
RING = torch.tensor([[0, 140], [140, 260]], dtype=torch.int32)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.zeros(2, 4, 17, 32)}, ValueError, "has 1 to 16 queries, got 17"),
    ({"q": torch.zeros(4, 2, 32)}, ValueError, "q must have 4 dimensions"),
    ({"q": Q.double()}, TypeError, "must have one dtype"),
    (
        {"q": torch.zeros(2, 4, 2, 30), "k": torch.zeros(2, 2, 40, 30)},
        ValueError,
        "head_dim must be a multiple",
    ),
    ({"k": torch.zeros(3, 2, 40, 32)}, ValueError, "k_cache must have q's batch of 2"),
    ({"k": torch.zeros(2, 3, 40, 32)}, ValueError, "multiple of the kv heads, got 4 and 3"),
    (
        {"k": torch.zeros(2, 2, 40, 64)},
        ValueError,
        r"k_cache must have shape \(batch, kv heads, length, 32\)",
    ),
    ({"k": None}, TypeError, "k_cache must be a torch.Tensor, got NoneType"),
    ({"v": torch.zeros(2, 2, 41, 32)}, ValueError, "k_cache and v_cache must have one shape"),
    ({"layout": BandLayout.spattention(4)}, ValueError, "decoding needs bands that don't follow"),
    ({"layout": BandLayout.causal(3)}, ValueError, "3"),
    ({"layout": "causal"}, TypeError, "layout must be a BandLayout"),
    ({"cache_lengths": None}, TypeError, "cache_lengths must be a torch.Tensor"),
    ({"cache_lengths": LENGTHS.float()}, TypeError, "cache_lengths must be int32 or int64"),
    ({"cache_lengths": LENGTHS[:1]}, ValueError, r"cache_lengths must have shape \(batch,\) = \(2,\)"),
    ({"cache_lengths": LENGTHS.to("meta")}, ValueError, "cache_lengths must be on the device of q"),
    ({"cache_lengths": torch.tensor([41, 3])}, ValueError, r"cache_lengths must lie in \[0, 40\]"),
    ({"cache_lengths": torch.tensor([-1, 3])}, ValueError, r"cache_lengths must lie in \[0, 40\]"),
    ({"cache_starts": torch.tensor([0, -3])}, ValueError, r"cache_starts must lie in \[0, 40\]"),
    ({"layout": BandLayout.spattention(4, 39)}, ValueError, "a sequence of 40 is longer than"),
    ({"k": PAGES, "block_table": TABLE.long()}, TypeError, "block_table must be int32"),
    ({"k": PAGES, "block_table": TABLE[0]}, ValueError, r"block_table must have shape \(batch, max_pages\)"),
    ({"k": PAGES, "block_table": TABLE[:1]}, ValueError, r"block_table must have shape \(batch, max_pages\)"),
    (
        {"k": torch.zeros(5, 2, 8, 32), "block_table": TABLE},
        ValueError,
        "page_size must be from 16 to 256, got 8",
    ),
    ({"k": PAGES[:2], "block_table": TABLE}, ValueError, r"block_table\[0\] must hold pages in \[0, 2\)"),
    (
        {"k": PAGES, "block_table": TABLE, "cache_lengths": torch.tensor([48, 33])},
        ValueError,
        r"block_table\[1\] must hold pages in \[0, 5\)",
    ),
    (
        {"k": RINGS, "ring": RING, "block_table": TABLE},
        ValueError,
        "block_table and ring exclude one another",
    ),
    ({"k": RINGS, "ring": RING.long()}, TypeError, "ring must be int32"),
    ({"k": RINGS, "ring": RING[:, :1]}, ValueError, r"shape \(Hkv, 2\), got \(2, 1\)"),
    ({"k": K, "ring": RING}, ValueError, r"with ring, k_cache must have shape \(batch, rows, head_dim\)"),
    (
        {"k": RINGS[:, :399], "ring": RING},
        ValueError,
        r"ring\[1\] = \(base, capacity\) must lie within the 399 rows",
    ),
    (
        {"k": RINGS, "ring": RING - 11, "cache_lengths": torch.tensor([250, 3])},
        ValueError,
        r"ring\[0\] = \(base, capacity\) must lie within",
    ),
    (
        {"k": RINGS, "ring": RING - torch.tensor([0, 11]).int(), "cache_lengths": torch.tensor([250, 3])},
        ValueError,
        r"ring\[1\] has a capacity of 249, but 2 queries with the layout's largest distance 255 need 257",
    ),
    ({"scale": float("inf")}, ValueError, "scale must be finite"),
    ({"impl": "abacus"}, ValueError, "impl must be one of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_what_does_not_fit_raises(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"q": Q, "k": K, "layout": LAYOUT, "cache_lengths": LENGTHS, **changes}
    q, k, layout = given.pop("q"), given.pop("k"), given.pop("layout")
    v = given.pop("v", k)
    for impl in (given.pop("impl", "cpu"), "reference"):
        with pytest.raises(error, match=message):
            banded_attention_decode(q, k, v, layout, **{"impl": impl, **given})
        if message.startswith(("impl", "head_dim")):
            break


def test_a_page_that_nobody_reads_may_be_anything() -> None:
    layout = BandLayout.sliding_window(4, 10)
    table = torch.tensor([[-7, 1, 2], [99, 4, -1]], dtype=torch.int32)
    lengths = torch.tensor([48, 28])
    found = banded_attention_decode(Q, PAGES, PAGES, layout, cache_lengths=lengths, block_table=table)
    assert not found.any()
