"""Caches: whatever was appended, padded, cropped or reordered, a call attends as the whole sequence would."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cached_rows import CONTEXT, HEAD_DIM, Rows, change_rows, compare, draw, draw_layout
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.cache import BandedCache, KeyValueCache, PagedCache
from spattn_tvm.reference import reference_attention

CASES = int(os.environ.get("SPATTN_SWEEP", "16"))


def _make(
    kind: type[KeyValueCache],
    chance: random.Random,
    layout: BandLayout,
    batch: int,
    kv_heads: int,
    **settings: Any,
) -> KeyValueCache:
    if kind is BandedCache:
        settings["slack"] = chance.choice((0, 3, 15, 40))
        if layout.depends_on_length:
            settings["max_length"] = CONTEXT
    else:
        settings["page_size"] = chance.choice((16, 64))
    if chance.random() < 0.3:
        settings["max_length"] = CONTEXT
    cache = kind(layout, batch_size=batch, num_kv_heads=kv_heads, head_dim=HEAD_DIM, **settings)
    for memory in (cache.keys, cache.values):
        memory.fill_(torch.nan)
    return cache


def _run_case(seed: int, kind: type[KeyValueCache], device: str = "cpu") -> None:
    """Prompts of several lengths, steps and chunks in turn, crops, beams; NaN wherever nothing was stored."""
    chance = random.Random(seed)
    batch, kv_heads, group = chance.randint(1, 3), chance.choice((1, 2)), chance.choice((1, 2))
    heads = kv_heads * group
    layout = draw_layout(chance, heads)
    cache = _make(kind, chance, layout, batch, kv_heads, device=device)
    rows = Rows(layout, batch)
    padding = chance.choice(("none", "left", "right"))
    total = highest = 0
    while total < CONTEXT:
        count = min(chance.choice((1, 1, 1, 2, 5, 16, 17, 40)), CONTEXT - total)
        q, k, v = (draw(chance, batch, n, count, HEAD_DIM) for n in (heads, kv_heads, kv_heads))
        counts: list[int] | None = None
        if padding == "left" and total == 0:
            rows.starts = [chance.randint(0, count) for _ in range(batch)]
            for row, start in enumerate(rows.starts):
                k[row, :, :start] = v[row, :, :start] = torch.nan
            cache.begin_rows(torch.tensor(rows.starts, device=device))
        elif padding == "right" and (total == 0 or chance.random() < 0.3):
            counts = [chance.randint(0, count) for _ in range(batch)]
            for row, own in enumerate(counts):
                k[row, :, own:] = v[row, :, own:] = torch.nan
        expected = rows.attend(q, k, v, counts or [count] * batch)
        given = None if counts is None else torch.tensor(counts, device=device)
        compare(cache.attend(q.to(device), k.to(device), v.to(device), counts=given), expected)
        total += count
        highest = max(highest, total)
        assert padding != "none" or cache.known_length == total
        most_back = max(0, min(total, cache.slack - (highest - total))) if padding == "none" else None
        total -= change_rows(chance, cache, [rows], most_back)
        batch = len(rows.keys)


@pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")
@pytest.mark.parametrize("kind", [BandedCache, PagedCache])
@pytest.mark.parametrize("seed", range(CASES))
def test_a_call_attends_as_the_whole_sequence(seed: int, kind: type[KeyValueCache]) -> None:
    with torch.no_grad():
        _run_case(seed, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [BandedCache, PagedCache])
@pytest.mark.parametrize("seed", range(CASES))
def test_a_call_attends_as_the_whole_sequence_on_the_gpu(seed: int, kind: type[KeyValueCache]) -> None:
    with torch.no_grad():
        _run_case(seed, kind, "cuda")


@pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")
def test_padding_on_the_right_takes_no_place() -> None:
    """It would take the places of keys that are still needed."""
    layout = BandLayout.sliding_window(1, 8)
    rows = Rows(layout, 2)
    cache = BandedCache(layout, batch_size=2, num_kv_heads=1, head_dim=HEAD_DIM, slack=0)
    chance = random.Random(0)
    with torch.no_grad():
        for counts in ([12, 9], [2, 0], [1, 12], [3, 3]):
            q, k, v = (draw(chance, 2, 1, 12, HEAD_DIM) for _ in range(3))
            given = torch.tensor(counts)
            compare(cache.attend(q, k, v, counts=given), rows.attend(q, k, v, counts))


@pytest.mark.parametrize(("kv_heads", "most"), [(16, 0.56), (8, 0.59), (4, 0.65)])
@pytest.mark.parametrize("context", [16384, 131072])
def test_memory_is_a_part_of_a_dense_cache(kv_heads: int, most: float, context: int) -> None:
    layout = BandLayout.spattention(16, context)
    cache = BandedCache(layout, batch_size=2, num_kv_heads=kv_heads, head_dim=8, device="meta")
    dense = 2 * 2 * kv_heads * context * 8 * 4
    assert 0.5 < cache.nbytes / dense <= most


@pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")
def test_crop_goes_back_as_far_as_the_slack() -> None:
    layout = BandLayout.spattention(2, CONTEXT)
    cache = BandedCache(layout, batch_size=1, num_kv_heads=2, head_dim=HEAD_DIM, slack=5)
    q = k = v = torch.randn(1, 2, 60, HEAD_DIM)
    cache.attend(q, k, v)
    cache.crop(3)
    with pytest.raises(ValueError, match=r"at most slack=5 .* got 6"):
        cache.crop(3)
    cache.crop(2)
    assert cache.known_length == 55
    cache.append(k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="got 6"):
        cache.crop(3)  # rows of 60 tokens were written: 57 - 3 is 6 back from there
    cache.append(k[:, :, :8], v[:, :, :8])
    cache.crop(5)
    with pytest.raises(ValueError, match="number of tokens"):
        cache.crop(-1)
    cache.reset()
    with pytest.raises(ValueError, match="has only 0"):
        cache.crop(1)


@pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")
def test_crop_asks_the_device_where_the_host_does_not_know() -> None:
    layout = BandLayout.sliding_window(1, 8)
    cache = BandedCache(layout, batch_size=2, num_kv_heads=1, head_dim=HEAD_DIM, slack=2, count_on_host=False)
    k = torch.randn(2, 1, 9, HEAD_DIM)
    cache.append(k, k, counts=torch.tensor([9, 4]))
    cache.crop(1)
    assert cache.lengths.tolist() == [8, 3]
    with pytest.raises(ValueError, match="got 3"):
        cache.crop(2)
    with pytest.raises(ValueError, match="has only 3"):
        cache.crop(4)


@pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")
@pytest.mark.parametrize("kind", [BandedCache, PagedCache])
def test_compiled_steps_have_no_breaks_and_are_compiled_once(kind: type[KeyValueCache]) -> None:
    layout = BandLayout.spattention(4, CONTEXT)
    cache = kind(layout, batch_size=2, num_kv_heads=2, head_dim=HEAD_DIM, max_length=CONTEXT)
    rows = Rows(layout, 2)
    chance = random.Random(0)
    compiled = 0

    def count_graphs(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return module.forward

    attend = torch.compile(cache.attend, backend=count_graphs, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for count, call in ((20, cache.attend), *((1, attend),) * 6, (20, cache.attend), (1, attend)):
            q, k, v = (draw(chance, 2, n, count, HEAD_DIM) for n in (4, 2, 2))
            compare(call(q, k, v), rows.attend(q, k, v, [count] * 2))
    assert compiled == 1
    assert cache.known_length is None
    assert cache.lengths.tolist() == [47, 47]


@pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")
def test_what_cannot_be_right_raises() -> None:
    layout = BandLayout.spattention(4, 64)
    sizes: dict[str, Any] = {"batch_size": 1, "num_kv_heads": 2, "head_dim": HEAD_DIM}
    with pytest.raises(ValueError, match=r"a cache needs bands that don't follow the sequence's length"):
        BandedCache(BandLayout.spattention(4), **sizes)
    with pytest.raises(ValueError, match="needs a max_length"):
        BandedCache(BandLayout.causal(4), **sizes)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        BandedCache(layout, **{**sizes, "num_kv_heads": 3})
    with pytest.raises(ValueError, match="page_size must be between 16 and 256, got 8"):
        PagedCache(layout, page_size=8, **sizes)
    with pytest.raises(TypeError, match="must be a BandLayout"):
        BandedCache("spattention", **sizes)  # type: ignore[arg-type]

    q, k = torch.randn(1, 4, 60, HEAD_DIM), torch.randn(1, 2, 60, HEAD_DIM)
    cache = BandedCache(layout, **sizes)
    with pytest.raises(ValueError, match="the cache holds a batch of 1"):
        cache.attend(q, k[:, :1], k[:, :1])
    with pytest.raises(TypeError, match=r"holds torch\.float32"):
        cache.attend(q, k.double(), k.double())
    with pytest.raises(ValueError, match="of the same tokens"):
        cache.attend(q[:, :, :1], k, k)
    with pytest.raises(RuntimeError, match="no gradient"):
        cache.attend(q, k.clone().requires_grad_(), k)
    cache.attend(q, k, k)
    for call in (cache.attend, lambda q, k, v: cache.append(k, v)):
        with pytest.raises(
            ValueError, match="a sequence of 65 is longer than the layout's context_length 64"
        ):
            call(q[:, :, :5], k[:, :, :5], k[:, :, :5])
    assert cache.known_length == 60
    assert cache.lengths.tolist() == [60], "a refused call stores nothing"
    with pytest.raises(ValueError, match="row 0 has some already, 60: begin at 0"):
        cache.begin_rows(torch.tensor([2]))
    for sizes_of_others, error, message in (
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer, got 2.0"),
        ({"slack": -1}, ValueError, "slack must be between 0 and"),
        ({"slack": True}, TypeError, "slack must be an integer, got True"),
        ({"max_length": 9.5}, TypeError, "max_length must be an integer, got 9.5"),
        ({"dtype": torch.int32}, TypeError, r"dtype must be one of torch\.float32, .*got torch\.int32"),
    ):
        with pytest.raises(error, match=message):
            BandedCache(layout, **{**sizes, **sizes_of_others})
    numpy_sizes = {name: np.int64(size) if isinstance(size, int) else size for name, size in sizes.items()}
    assert BandedCache(layout, slack=np.int64(2), **numpy_sizes).keys.shape[0] == 1
    ended = BandedCache(BandLayout.causal(4), max_length=16, **sizes)
    ended.append(k[:, :, :16], k[:, :, :16])
    with pytest.raises(ValueError, match="17 is longer than the cache's max_length 16"):
        ended.append(k[:, :, :1], k[:, :, :1])


_WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("attend", {"impl": "foo"}, ValueError, "impl must be one of"),
    ("attend", {"scale": float("nan")}, ValueError, "scale must be finite"),
    ("attend", {"starts": torch.zeros(3, dtype=torch.int64)}, ValueError, r"starts must have shape"),
    ("attend", {"starts": [0, 0]}, TypeError, r"starts must be a torch\.Tensor, got list"),
    ("attend", {"starts": torch.tensor([0, -1])}, ValueError, r"cache_starts must lie in"),
    ("attend", {"counts": torch.tensor([1, 9])}, ValueError, r"from 0 to the 2 tokens, got \[1, 9\]"),
    ("attend", {"counts": torch.tensor([-1, 1])}, ValueError, r"from 0 to the 2 tokens, got \[-1, 1\]"),
    ("append", {"counts": torch.tensor([1.0, 1.0])}, TypeError, r"counts must be int32 or int64"),
    ("attend", {"q": torch.randn(2, 3, 2, HEAD_DIM)}, ValueError, "multiple of the kv heads, got 3 and 2"),
    ("attend", {"q": torch.randn(2, 4, 2, 2 * HEAD_DIM)}, ValueError, "k_cache must have shape|with ring"),
    ("attend", {"q": torch.randn(2, 4, 2, HEAD_DIM).half()}, TypeError, "must have one dtype"),
    ("attend", {"q": None}, ValueError, "at least one token"),
    ("append", {"k": torch.zeros(2, 2, 2, HEAD_DIM, device="meta")}, ValueError, "the cache is on cpu"),
    ("append", {"k": [0.0]}, TypeError, r"k must be a torch\.Tensor, got list"),
    ("reorder", {"indices": torch.tensor([0, 2])}, ValueError, r"rows from 0 to 1, got \[0, 2\]"),
    ("reorder", {"indices": torch.tensor([0.0, 1.0])}, TypeError, r"int32 or int64, got torch\.float32"),
    ("select", {"indices": torch.tensor([-1])}, ValueError, r"rows from 0 to 1, got \[-1\]"),
    ("select", {"indices": torch.empty(0, dtype=torch.int64)}, ValueError, "at least one"),
    ("repeat", {"repeats": 0}, ValueError, "repeats must be between 1 and"),
    ("crop", {"tokens": 1.5}, TypeError, "tokens to forget must be an integer, got 1.5"),
    ("begin_rows", {"begin": torch.tensor([1])}, ValueError, "begin must have shape"),
]


@pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")
@pytest.mark.parametrize("kind", [BandedCache, PagedCache])
def test_a_refused_call_changes_nothing(kind: type[KeyValueCache]) -> None:
    """The same call made right gives what it would have given; rows of one length and of several."""
    layout = BandLayout.spattention(4, 64)
    for is_known in (True, False):
        given = {"batch_size": 2, "num_kv_heads": 2, "head_dim": HEAD_DIM}
        caches = [kind(layout, **given) for _ in range(2)]  # type: ignore[arg-type]
        k = torch.randn(2, 2, 30, HEAD_DIM)
        for cache in caches:
            cache.append(k, k, counts=None if is_known else torch.tensor([30, 7]))
        for name, wrong, error, message in _WRONG:
            right: dict[str, Any] = {}
            if name in ("attend", "append"):
                right["k"] = right["v"] = torch.randn(2, 2, 2, HEAD_DIM)
            if name == "attend":
                right["q"] = torch.randn(2, 4, 2, HEAD_DIM)
            if "q" in wrong and wrong["q"] is None:
                wrong = {part: tensor[:, :, :0] for part, tensor in right.items()}
            before = caches[0].lengths.tolist(), caches[0].known_length
            with pytest.raises(error, match=message):
                getattr(caches[0], name)(**{**right, **wrong})
            assert (caches[0].lengths.tolist(), caches[0].known_length) == before
            if name == "attend":
                o, expected = (cache.attend(**right, impl="reference") for cache in caches)
                assert torch.equal(o, expected)
        left = 64 - int(caches[0].lengths.max())
        for tokens in (left + 1, left + 20):  # one more than there is room for, by either way to attend
            q, k = torch.randn(2, 4, tokens, HEAD_DIM), torch.randn(2, 2, tokens, HEAD_DIM)
            with pytest.raises(ValueError, match=r"longer than the layout's context_length 64"):
                caches[0].attend(q, k, k)
        assert caches[0].lengths.tolist() == caches[1].lengths.tolist()
        caches[0].crop(7)


@pytest.mark.parametrize("kind", [BandedCache, PagedCache])
def test_a_cache_goes_on_outside_of_inference_mode(kind: type[KeyValueCache]) -> None:
    layout, k = BandLayout.spattention(4, 64), torch.randn(2, 2, 15, HEAD_DIM)
    with torch.inference_mode():
        cache = kind(layout, batch_size=1, num_kv_heads=2, head_dim=HEAD_DIM)
        cache.append(k[:1], k[:1])
        cache.repeat(2)
        cache.reorder(torch.tensor([1, 0]))
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            cache.append(k, k)
            cache.select(torch.tensor([1, 0]))
            cache.reorder(torch.tensor([1, 1]))
            cache.crop(5)
    assert cache.lengths.tolist() == [45, 45]


def test_a_call_that_was_interrupted_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled in the middle of it, which takes seconds and can fail."""
    cache = BandedCache(BandLayout.spattention(4, 64), batch_size=1, num_kv_heads=2, head_dim=HEAD_DIM)
    q, k = torch.randn(1, 4, 3, HEAD_DIM), torch.randn(1, 2, 3, HEAD_DIM)
    cache.append(k, k)

    def interrupt(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("spattn_tvm.cache.banded_attention_decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.attend(q, k, k)
    assert cache.known_length == 3 and cache.lengths.tolist() == [3]
    cache.attend(q, k, k)
    assert cache.known_length == 6


@pytest.mark.gpu
def test_a_captured_step_goes_on_with_the_sequence() -> None:
    layout = BandLayout.spattention(8, 4096)
    cache = BandedCache(
        layout,
        batch_size=2,
        num_kv_heads=4,
        head_dim=64,
        device="cuda",
        dtype=torch.float32,
        count_on_host=False,
    )
    chance = random.Random(1)
    whole = [draw(chance, 2, n, 400, 64).cuda() for n in (8, 4, 4)]
    with torch.no_grad():
        expected = reference_attention(*(t.double() for t in whole), layout)[0]
        first = cache.attend(*(t[:, :, :300] for t in whole))
        torch.testing.assert_close(first.double(), expected[:, :, :300], atol=1e-3, rtol=1e-3)
        step = [torch.empty_like(t[:, :, :1]) for t in whole]
        for tensor, source in zip(step, whole, strict=True):
            tensor.copy_(source[:, :, 300:301])
        cache.attend(*step)
        graph = torch.cuda.CUDAGraph()
        lengths = cache.lengths.clone()
        with torch.cuda.graph(graph):
            o = cache.attend(*step)
        assert torch.equal(cache.lengths, lengths), "a capture runs nothing"
        for position in range(301, 400):
            for tensor, source in zip(step, whole, strict=True):
                tensor.copy_(source[:, :, position : position + 1])
            graph.replay()
            torch.testing.assert_close(
                o.double(), expected[:, :, position : position + 1], atol=1e-3, rtol=1e-3
            )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [BandedCache, PagedCache])
def test_the_host_waits_for_nothing(kind: type[KeyValueCache]) -> None:
    layout = BandLayout.spattention(8, 4096)
    cache = kind(layout, batch_size=2, num_kv_heads=4, head_dim=64, device="cuda", max_length=4096)
    counts, begin = torch.tensor([290, 300], device="cuda"), torch.tensor([0, 7], device="cuda")
    calls = [
        [torch.randn(2, n, count, 64, device="cuda") for n in (8, 4, 4)] for count in (300, 1, 16, 100, 1)
    ]
    with torch.no_grad():
        for again in range(2):  # the first time kernels are loaded
            torch.cuda.set_sync_debug_mode("error" if again else "default")
            try:
                cache.begin_rows(begin)
                cache.attend(*calls[0], counts=counts)
                for call in calls[1:]:
                    cache.attend(*call)
                cache.reorder(begin % 2)
                cache.reset()
            finally:
                torch.cuda.set_sync_debug_mode("default")
