"""Offloaded caches: whatever was done to them, each layer attends as over the whole sequence."""

from __future__ import annotations

import copy
import gc
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached_rows import HEAD_DIM, Rows, change_rows, compare, draw, draw_layout
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.cache import BandedCache
from spattn_tvm.cache_forms import least_capacity, merged
from spattn_tvm.nn import BandedAttention
from spattn_tvm.offloaded import OffloadedCaches, _Together
from spattn_tvm.torch_private import cuda_sleep

CASES = int(os.environ.get("SPATTN_SWEEP", "10"))
CONTEXT = 400

pytestmark = pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")


def _fill(caches: OffloadedCaches) -> None:
    for layer in caches:
        for memory in (layer.keys, layer.values, layer.host):
            memory.fill_(torch.nan)


def _run_case(seed: int, device: str = "cpu") -> None:
    """Prompts, steps and chunks in turn, padded, cropped and reordered, in layers of several layouts."""
    chance = random.Random(seed)
    batch, kv_heads, group = chance.randint(1, 3), chance.choice((1, 4, 8)), chance.choice((1, 1, 2))
    heads = kv_heads * group
    layouts = [draw_layout(chance, heads, CONTEXT) for _ in range(chance.randint(1, 3))]
    if chance.random() < 0.7:
        layouts[0] = BandLayout.spattention(heads, CONTEXT)
    slack = chance.choice((0, 3, 15, 20))
    caches = OffloadedCaches(
        layouts,
        batch_size=batch,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        slack=slack,
        max_length=CONTEXT,
        device=device,
        count_on_host=chance.random() < 0.7,
    )
    _fill(caches)
    rows = [Rows(layout, batch) for layout in layouts]
    padding = chance.choice(("none", "none", "left", "right"))
    total = highest = 0
    while total < CONTEXT:
        count = min(chance.choice((1, 1, 1, 1, 2, 5, 16, 17, 40, 150)), CONTEXT - total)
        counts: list[int] | None = None
        starts = [chance.randint(0, count) for _ in range(batch)]
        if padding == "right" and (total == 0 or chance.random() < 0.3):
            counts = [chance.randint(0, count) for _ in range(batch)]
        given = None if counts is None else torch.tensor(counts, device=device)
        is_attended = chance.random() < 0.8
        for cache, seen in zip(caches, rows, strict=True):
            q, k, v = (draw(chance, batch, n, count, HEAD_DIM) for n in (heads, kv_heads, kv_heads))
            if padding == "left" and total == 0:
                seen.starts = list(starts)
                for row, start in enumerate(starts):
                    k[row, :, :start] = v[row, :, :start] = torch.nan
                cache.begin_rows(torch.tensor(starts, device=device))
            for row, own in enumerate(counts or []):
                k[row, :, own:] = v[row, :, own:] = torch.nan
            expected = seen.attend(q, k, v, counts or [count] * batch)
            if is_attended:
                compare(cache.attend(q.to(device), k.to(device), v.to(device), counts=given), expected)
            else:
                cache.append(k.to(device), v.to(device), counts=given)
        total += count
        highest = max(highest, total)
        most_back = max(0, min(total, slack - (highest - total))) if padding == "none" else None
        total -= change_rows(chance, caches, rows, most_back)
        batch = len(rows[0].keys)


@pytest.mark.parametrize("seed", range(CASES))
def test_every_layer_attends_as_over_the_whole_sequence(seed: int) -> None:
    with torch.no_grad():
        _run_case(seed)


@pytest.mark.parametrize("seed", range(CASES))
def test_rows_may_come_and_go_as_late_as_the_step_ends(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a step of a GPU: what is read in a step was there before it."""
    late: list[Callable[[], None]] = []
    join, move_rows = _Together._join, _Together.move_rows

    def end_step(self: _Together) -> None:
        for move in late:
            move()
        late.clear()
        join(self)

    monkeypatch.setattr(_Together, "move_rows", lambda *given: late.append(lambda: move_rows(*given)))
    monkeypatch.setattr(_Together, "_join", end_step)
    with torch.no_grad():
        _run_case(seed)


def _with_bands(layout: BandLayout, slack: int, **settings: Any) -> OffloadedCaches:
    sizes = {"batch_size": 2, "num_kv_heads": layout.num_heads, "head_dim": HEAD_DIM}
    return OffloadedCaches([layout] * 2, slack=slack, **{**sizes, **settings})


def test_heads_without_a_near_window_keep_what_goes_to_the_host() -> None:
    layout, chance = BandLayout.exclusive(8, CONTEXT), random.Random(0)
    caches = _with_bands(layout, 15)
    _fill(caches)
    rows = [Rows(layout, 2) for _ in caches]
    with torch.no_grad():
        for _ in range(CONTEXT // 16):
            for cache, seen in zip(caches, rows, strict=True):
                q = k = v = draw(chance, 2, 8, 16, HEAD_DIM)
                compare(cache.attend(q, k, v), seen.attend(q, k, v, [16, 16]))


@pytest.mark.parametrize(
    ("kv_heads", "on_device", "on_host"), [(16, 0.156, 0.54), (8, 0.24, 0.57), (4, 0.37, 0.64)]
)
def test_memory_is_what_is_promised(kv_heads: int, on_device: float, on_host: float) -> None:
    layout = BandLayout.spattention(16, 32768)
    caches = OffloadedCaches(
        [layout] * 3, batch_size=2, num_kv_heads=kv_heads, head_dim=8, device="meta", dtype=torch.bfloat16
    )
    dense = 3 * 2 * 2 * kv_heads * 32768 * 8 * 2
    ring = (
        3
        * BandedCache(
            layout, batch_size=2, num_kv_heads=kv_heads, head_dim=8, device="meta", dtype=torch.bfloat16
        ).nbytes
    )
    assert 2 / 16 < caches.nbytes / dense < on_device
    assert caches.host_nbytes == ring < on_host * dense


def test_the_least_ring_has_a_row_for_each_key() -> None:
    """Against trying all capacities with all pairs of distances."""
    chance = random.Random(0)
    for _ in range(300):
        edges = sorted(chance.sample(range(90), 2 * chance.randint(1, 4)))
        spans = merged(list(zip(edges[::2], edges[1::2], strict=True)))
        distances = [distance for low, high in spans for distance in range(low, high + 1)]
        least = next(
            size for size in range(1, 91) if len({each % size for each in distances}) == len(distances)
        )
        assert least_capacity(spans) == least, spans


def test_a_step_takes_its_layers_in_turn() -> None:
    caches = _with_bands(BandLayout.spattention(8, CONTEXT), 3)
    q = k = v = torch.randn(2, 8, 1, HEAD_DIM)
    with pytest.raises(ValueError, match="it is layer 0's turn, got layer 1"):
        caches[1].append(k, v)
    caches[0].attend(q, k, v)
    with pytest.raises(ValueError, match="it is layer 1's turn, got layer 0"):
        caches[0].attend(q, k, v)
    with pytest.raises(ValueError, match="layer 0 got 1 after 0, layer 1 2 after 0"):
        caches[1].append(*(torch.cat((t, t), 2) for t in (k, v)))
    for refused in (
        lambda: caches.crop(1),
        lambda: caches.reorder(torch.tensor([0, 0])),
        lambda: caches.repeat(2),
    ):
        with pytest.raises(ValueError, match="it is layer 1's turn: end it, or reset"):
            refused()
    caches.reset()
    for cache in caches:
        cache.attend(q, k, v)
    assert caches.known_length == 1 and caches.lengths.tolist() == [1, 1]
    caches[0].crop(1)
    caches[0].append(k, v)
    caches.reset()
    for cache in caches:
        cache.append(k, v)
    for refused in (lambda: caches[0].select(torch.tensor([0])), lambda: caches[0].repeat(2)):
        with pytest.raises(ValueError, match=r"changes the batch, .* call it on the OffloadedCaches"):
            refused()
    with pytest.raises(ValueError, match="layouts must be those of one layer or more"):
        OffloadedCaches([], batch_size=1, num_kv_heads=1, head_dim=HEAD_DIM)
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        copy.deepcopy(caches)
    with pytest.raises(Exception, match=r"can't be traced by torch\.compile"):
        torch.compile(caches[0].attend, backend="eager", fullgraph=True)(q, k, v)


def test_a_call_that_raises_is_made_again() -> None:
    layout = BandLayout.spattention(8, CONTEXT)
    caches, chance = _with_bands(layout, 3), random.Random(2)
    rows = [Rows(layout, 2) for _ in caches]
    with torch.no_grad():
        for count in (150, 1, 3, 1, 1):
            for cache, seen in zip(caches, rows, strict=True):
                q = k = v = draw(chance, 2, 8, count, HEAD_DIM)
                with pytest.raises(ValueError, match="scale must be finite"):
                    cache.attend(q, k, v, scale=torch.nan)
                compare(cache.attend(q, k, v), seen.attend(q, k, v, [count] * 2))


def test_what_inference_mode_made_goes_on_outside_of_it() -> None:
    layout, chance = BandLayout.spattention(8, CONTEXT), random.Random(1)
    with torch.inference_mode():
        caches = _with_bands(layout, 0)
        caches.select(torch.tensor([1, 0, 0]))
    rows = [Rows(layout, 3) for _ in caches]
    for count in (200, 1, 1):
        for cache, seen in zip(caches, rows, strict=True):
            q = k = v = draw(chance, 3, 8, count, HEAD_DIM)
            with torch.no_grad():
                compare(cache.attend(q, k, v), seen.attend(q, k, v, [count] * 3))


def test_modules_share_offloaded_caches() -> None:
    torch.manual_seed(0)
    modules = [
        BandedAttention(8 * HEAD_DIM, num_heads=8, context_length=CONTEXT, rope_theta=1e4) for _ in range(2)
    ]
    caches = OffloadedCaches(
        [module.layout for module in modules], batch_size=1, num_kv_heads=8, head_dim=HEAD_DIM
    )
    x = torch.randn(1, 300, 8 * HEAD_DIM)
    with torch.no_grad():
        for module, cache in zip(modules, caches, strict=True):
            module(x[:, :270], cache=cache)
        for position in range(270, 300):
            steps = [
                module(x[:, position : position + 1], cache=cache)
                for module, cache in zip(modules, caches, strict=True)
            ]
        for module, step in zip(modules, steps, strict=True):
            torch.testing.assert_close(step, module(x)[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(CASES))
def test_every_layer_attends_as_over_the_whole_sequence_on_the_gpu(seed: int) -> None:
    with torch.no_grad():
        _run_case(seed, "cuda")


@pytest.mark.gpu
def test_a_captured_step_goes_on_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a cache that keeps all on the device; rows come late, as from a slow bus."""
    fetch = _Together.fetch

    def fetch_late(*given: Any) -> None:
        cuda_sleep(200_000)
        fetch(*given)

    monkeypatch.setattr(_Together, "fetch", fetch_late)
    layout = BandLayout.spattention(8, 4096)
    sizes: dict[str, Any] = {"batch_size": 2, "num_kv_heads": 8, "head_dim": 64, "device": "cuda"}
    gc.collect()
    held = torch.cuda.memory_allocated()
    caches = OffloadedCaches([layout] * 3, **sizes)
    held = torch.cuda.memory_allocated() - held
    assert caches.nbytes <= held < caches.nbytes + 2**22
    plain = [BandedCache(layout, **sizes) for _ in caches]
    _fill(caches)

    def draw_step(count: int) -> list[list[Tensor]]:
        return [[torch.randn(2, 8, count, 64, device="cuda") for _ in range(3)] for _ in caches]

    def check(step: list[list[Tensor]]) -> None:
        for cache, other, given in zip(caches, plain, step, strict=True):
            torch.testing.assert_close(cache.attend(*given), other.attend(*given), atol=1e-3, rtol=1e-3)

    with torch.no_grad():
        for cache, other, (_, k, v) in zip(caches, plain, draw_step(3000), strict=True):
            cache.append(k, v)
            other.append(k, v)
        for count in (1, 16, 5, 1):
            check(draw_step(count))
        step = draw_step(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for cache, given in zip(caches, step, strict=True):
                cache.attend(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for other, given in zip(plain, step, strict=True):
            other.attend(*given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [cache.attend(*given) for cache, given in zip(caches, step, strict=True)]
        for _ in range(600):
            for given, new in zip(step, draw_step(1), strict=True):
                for tensor, value in zip(given, new, strict=True):
                    tensor.copy_(value)
            graph.replay()
            for o, other, given in zip(outputs, plain, step, strict=True):
                torch.testing.assert_close(o, other.attend(*given), atol=1e-3, rtol=1e-3)
