"""generate() over every cache gives what the whole sequence gives, by the definition of the bands."""

from __future__ import annotations

import inspect
import os
import random
from typing import Any

import pytest
import torch
from banded_models import (
    BY_DEFINITION,
    CONTEXT,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    OTHER_MODELS,
    VOCABULARY,
    make_model,
    register_the_definition,
)
from torch import Tensor

transformers = pytest.importorskip("transformers")

from spattn_tvm.bands import BandLayout  # noqa: E402
from spattn_tvm.integrations.transformers import make_cache, set_layout  # noqa: E402

CASES = int(os.environ.get("SPATTN_SWEEP", "6"))
KINDS = ("banded", "paged", "banded static", "static", "dynamic")
LAYOUTS: dict[str, Any] = {
    "spattention": BandLayout.spattention(HEADS, CONTEXT),
    "exclusive": BandLayout.exclusive(HEADS, CONTEXT),
    "hybrid": [BandLayout.spattention(HEADS, CONTEXT), BandLayout.sliding_window(HEADS, 9)],
    "dense and banded": [None, BandLayout.equal_area(HEADS, CONTEXT)],
}

pytestmark = pytest.mark.filterwarnings(
    "ignore::spattn_tvm.FallbackWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    register_the_definition()
    return {kind: make_model(kind).eval() for kind in ("llama", "olmoe")}


def _with(model: Any, layout: Any, implementation: str | None = None) -> Any:
    set_layout(model, layout)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def _cache(model: Any, kind: str, batch: int, length: int, **settings: Any) -> Any:
    """With NaN wherever nothing will be stored."""
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=length)
    elif kind == "paged":
        cache = make_cache(model, "paged", max_length=length, page_size=16)
    else:
        cache = make_cache(model, max_length=length, is_static=kind == "banded static", **settings)
    cache.early_initialization(batch, KV_HEADS, HEAD_DIM, torch.float32, model.device)
    for layer in cache.layers:
        memory = getattr(layer, "cache", layer)
        memory.keys.fill_(torch.nan)
        memory.values.fill_(torch.nan)
    return cache


def _prompts(chance: random.Random, batch: int, is_padded: bool) -> tuple[Tensor, Tensor]:
    longest = chance.choice((1, 2, 5, 16, 17, 33, 50))
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    ids = torch.randint(2, VOCABULARY, (batch, longest), generator=generator)
    mask = torch.ones_like(ids)
    if is_padded:
        for row in range(batch):
            mask[row, : chance.randrange(longest)] = 0
        mask[chance.randrange(batch)] = 1
    return ids.masked_fill(mask == 0, 0), mask


def _recomputed(model: Any, layout: Any, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Logits of the last `steps` tokens, each of which the one before it predicts."""
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        positions = {}
    _with(model, layout, BY_DEFINITION)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=False, **positions).logits
    _with(model, layout)
    return logits[:, -steps - 1 : -1]


def _check_case(
    seed: int, model: Any, device: str = "cpu", kind: str | None = None, is_compiled: bool = False
) -> None:
    """A random case, on a cache of some kind; of a GPU's static caches transformers compiles the steps."""
    chance = random.Random(seed)
    layout = chance.choice(list(LAYOUTS.values()))
    batch, steps = chance.randint(1, 3), chance.choice((3, 10, 30))
    ids, mask = (t.to(device) for t in _prompts(chance, batch, chance.random() < 0.6))
    kind = kind or chance.choice(KINDS)
    settings: dict[str, Any] = {"disable_compile": not is_compiled}
    if chance.random() < 0.5:
        settings["prefill_chunk_size"] = chance.choice((1, 3, 16, 20))
    _with(model, layout)
    slack = {"slack": chance.choice((0, 15))} if kind.startswith("banded") else {}
    result = model.generate(
        ids,
        attention_mask=mask,
        cache=_cache(model, kind, batch, ids.shape[1] + steps, **slack),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    logits = torch.stack(result.logits, 1)
    expected = _recomputed(model, layout, result.sequences, mask, steps)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    best = expected.topk(2).values
    is_clear = best[..., 0] - best[..., 1] > 1e-4
    tokens = result.sequences[:, -steps:]
    assert torch.equal(tokens[is_clear], expected.argmax(-1)[is_clear])


@pytest.mark.parametrize("kind", ["llama", "olmoe"])
@pytest.mark.parametrize("seed", range(CASES))
def test_logits_and_tokens_are_those_of_the_whole_sequence(
    seed: int, kind: str, models: dict[str, Any]
) -> None:
    _check_case(seed, models[kind])


def test_every_cache_comes_to_the_same(models: dict[str, Any]) -> None:
    """Left padding and chunks, on each kind of cache, so that none is left to chance."""
    layout = LAYOUTS["hybrid"]
    model = _with(models["llama"], layout)
    ids, mask = _prompts(random.Random(3), 3, is_padded=True)
    for kind in KINDS:
        for chunk in (None, 7):
            result = model.generate(
                ids,
                attention_mask=mask,
                cache=_cache(model, kind, 3, ids.shape[1] + 8),
                max_new_tokens=8,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                prefill_chunk_size=chunk,
            )
            expected = _recomputed(model, layout, result.sequences, mask, 8)
            torch.testing.assert_close(torch.stack(result.logits, 1), expected, atol=1e-5, rtol=1e-5)
            # A model that says one thing would show nothing.
            assert expected.argmax(-1).unique().numel() > 8


@pytest.mark.parametrize(
    "name", list(OTHER_MODELS) if "SPATTN_SWEEP" in os.environ else list(OTHER_MODELS)[:8]
)
def test_other_models_generate_what_the_whole_sequence_gives(name: str, models: dict[str, Any]) -> None:
    model, layout = make_model(name).eval(), LAYOUTS["hybrid"]
    _with(model, layout)
    ids, mask = _prompts(random.Random(7), 2, is_padded=True)
    # Its attention does not hand on what our caches need.
    kinds = ("dynamic",) if name == "GPTNeoX" else ("banded", "static")
    for kind in kinds:
        if kind == "banded":
            cache = make_cache(model)
        elif kind == "static":
            cache = transformers.StaticCache(config=model.config, max_cache_len=CONTEXT)
        else:
            cache = transformers.DynamicCache(config=model.config)
        result = model.generate(
            ids,
            attention_mask=mask,
            cache=cache,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = _recomputed(model, layout, result.sequences, mask, 6)
        torch.testing.assert_close(torch.stack(result.logits, 1), expected, atol=2e-5, rtol=2e-5)


NOT_THESE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window in some layers": ("Gemma2", {"head_dim": HEAD_DIM}, "sliding_window=4096"),
    "softcap": (
        "Gemma2",
        {"head_dim": HEAD_DIM, "layer_types": ["full_attention"] * 2},
        r"softcap of the scores \(softcap=50",
    ),
    "sinks": (
        "GptOss",
        {"head_dim": HEAD_DIM, "num_local_experts": 2, "layer_types": ["full_attention"] * 2},
        "attention sinks",
    ),
    "a window": ("Mistral", {"sliding_window": 9}, "sliding_window=9"),
    "attention of its own": ("Bloom", {}, "does not take attention functions of others"),
    "no way to our caches": ("GPTNeoX", {}, "use a DynamicCache or StaticCache"),
    "both kinds in a layer": (
        "FalconH1",
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_ssm": 64,
            "mamba_d_state": 16,
            "head_dim": HEAD_DIM,
        },
        "layer 0 of the model has linear attention beside attention",
    ),
}


@pytest.mark.parametrize("what", NOT_THESE)
def test_models_that_bands_do_not_serve_are_refused(what: str) -> None:
    name, settings, message = NOT_THESE[what]
    model = make_model(name, **settings).eval()
    with pytest.raises(ValueError, match=message):
        set_layout(model, LAYOUTS["spattention"])
        model.generate(torch.tensor([[5, 6, 7]]), cache=make_cache(model), max_new_tokens=2)


def test_layers_that_share_keys_are_refused(models: dict[str, Any]) -> None:
    config = _with(models["llama"], LAYOUTS["spattention"]).config
    config.kv_sharing_modes = [None, "reuse"]
    try:
        with pytest.raises(ValueError, match="attend to the keys of other layers"):
            make_cache(config)
    finally:
        del config.kv_sharing_modes


@pytest.mark.parametrize("kind", ["banded", "paged", "static"])
def test_beams_and_samples_are_those_without_a_cache(kind: str, models: dict[str, Any]) -> None:
    model = _with(models["llama"], LAYOUTS["spattention"])
    ids, mask = _prompts(random.Random(5), 2, is_padded=True)
    for settings in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        beams = settings.get("num_beams", 1)
        sequences = []
        for cache in (None, _cache(model, kind, 2 * beams, ids.shape[1] + 12)):
            torch.manual_seed(1)
            given = {"use_cache": False} if cache is None else {"cache": cache}
            sequences.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, **given, **settings))
        assert torch.equal(*sequences)


WAYS: dict[str, dict[str, Any]] = {
    "several samples of a prompt": {"do_sample": True, "num_return_sequences": 3},
    "several beams of a prompt": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams, in chunks": {"num_beams": 2, "do_sample": True, "prefill_chunk_size": 7},
    "guesses from the prompt": {"prompt_lookup_num_tokens": 4},
    "guesses of the first layer": {"assistant_early_exit": 1},
    "a static cache by name": {"cache_implementation": "static"},
    "a static cache by name, beams": {"cache_implementation": "static", "num_beams": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate_are_those_without_a_cache(way: str, models: dict[str, Any]) -> None:
    settings = WAYS[way]
    model = _with(models["llama"], LAYOUTS["spattention"])
    ids, mask = _prompts(random.Random(11), 2, is_padded=True)
    if "guesses" in way:  # transformers takes one row
        ids = torch.cat((ids, ids), 1)[:1, 1:]
        mask = torch.ones_like(ids)
    is_named = "cache_implementation" in settings
    without = {
        name: value
        for name, value in settings.items()
        if name in ("do_sample", "num_return_sequences", "num_beams")
    }
    sequences = []
    for given in (
        without | {"use_cache": False},
        settings if is_named else settings | {"cache": make_cache(model)},
    ):
        torch.manual_seed(1)
        given = {"do_sample": False, "max_new_tokens": 10} | given
        sequences.append(model.generate(ids, attention_mask=mask, **given))
    assert torch.equal(*sequences)


@pytest.mark.parametrize("is_static", [False, True])
def test_padded_rows_go_on_and_go_back(is_static: bool, models: dict[str, Any]) -> None:
    """A second turn, then the same again after a crop."""
    model = _with(models["llama"], LAYOUTS["hybrid"])
    ids, mask = _prompts(random.Random(12), 2, is_padded=True)
    cache = make_cache(model, is_static=is_static, max_length=CONTEXT, slack=16)
    ids = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=5, do_sample=False)
    more = torch.randint(2, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(8))
    ids = torch.cat((ids, more), 1)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, cache=cache, **settings), expected)
    cache.crop(-9)
    assert torch.equal(model.generate(ids, cache=cache, **settings), expected)


@pytest.mark.parametrize("kind", ["banded", "paged", "dynamic"])
def test_a_conversation_goes_on_where_it_was(kind: str, models: dict[str, Any]) -> None:
    model = _with(models["olmoe"], LAYOUTS["spattention"])
    cache = _cache(model, kind, 1, CONTEXT)
    ids = torch.randint(2, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(4))
    for _ in range(3):
        ids = model.generate(ids, cache=cache, max_new_tokens=6, do_sample=False)
        assert cache.get_seq_length() == ids.shape[1] - 1
        more = torch.randint(2, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(ids.shape[1]))
        ids = torch.cat((ids, more), 1)
    whole = model.generate(ids[:, :-9], use_cache=False, max_new_tokens=1, do_sample=False)
    assert torch.equal(whole[:, :-1], ids[:, :-9])
    expected = _recomputed(model, LAYOUTS["spattention"], ids[:, :-9], torch.ones_like(ids[:, :-9]), 6)
    assert torch.equal(expected.argmax(-1), ids[:, -15:-9])


FAR = BandLayout.custom([[(0, 5), (40 + 5 * head, 52 + 5 * head)] for head in range(HEADS)], CONTEXT)


@pytest.mark.parametrize(
    "way",
    [{}, {"prefill_chunk_size": 7}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=str,
)
def test_keys_that_wait_come_back_in_time(way: dict[str, Any], models: dict[str, Any]) -> None:
    layout = [FAR, LAYOUTS["spattention"]]
    model = _with(models["llama"], layout)
    ids, mask = _prompts(random.Random(3), 2, is_padded=True)
    sequences = []
    settings = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, **way}
    for cache in (None, make_cache(model, offload=True, slack=0)):
        given = {"use_cache": False, "prefill_chunk_size": None} if cache is None else {"cache": cache}
        sequences.append(model.generate(ids, **(settings | given)))
    assert torch.equal(*sequences)
    assert all(ring.far for ring in cache.layers[0].cache.rings)


def test_offloaded_caches_go_on_and_go_back(models: dict[str, Any]) -> None:
    model = _with(models["llama"], [FAR, FAR])
    ids, mask = _prompts(random.Random(12), 2, is_padded=True)
    cache = make_cache(model, offload=True, slack=10)
    settings = {"max_new_tokens": 6, "do_sample": False}
    ids = model.generate(ids, attention_mask=mask, cache=cache, **settings)
    mask = torch.nn.functional.pad(mask, (0, 6), value=1)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache=cache, **settings), expected)
    cache.crop(-7)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache=cache, **settings), expected)
    cache.crop(-6)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    row = {"attention_mask": mask[[1, 1]], "cache": cache}
    assert torch.equal(model.generate(ids[[1, 1]], **row, **settings), expected[[1, 1]])


def test_what_is_not_offloaded_is_refused(models: dict[str, Any]) -> None:
    model = _with(models["llama"], [FAR, FAR])
    for given, message in (
        ({"kind": "paged"}, "got kind 'paged'"),
        ({"is_static": True}, "got a static cache, whose steps are compiled"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cache(model, offload=True, **given)


def test_a_speculating_assistant_changes_nothing(models: dict[str, Any]) -> None:
    model = _with(models["llama"], LAYOUTS["spattention"])
    assistant = _with(make_model("llama", seed=7).eval(), LAYOUTS["spattention"])
    ids = torch.randint(2, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(2))
    expected = model.generate(ids, use_cache=False, max_new_tokens=25, do_sample=False)
    cache = _cache(model, "banded", 1, CONTEXT, slack=15)
    result = model.generate(ids, cache=cache, assistant_model=assistant, max_new_tokens=25, do_sample=False)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("kind", ["banded static", "static"])
def test_compiled_steps_are_compiled_once(kind: str, models: dict[str, Any]) -> None:
    model = _with(models["llama"], LAYOUTS["spattention"])
    ids, mask = _prompts(random.Random(3), 2, is_padded=True)
    compiled = 0

    def count(module: Any, inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return module.forward

    cache = _cache(model, kind, 2, ids.shape[1] + 10)
    step = torch.compile(model.forward, backend=count, fullgraph=True, dynamic=False)
    with torch.no_grad():
        position = (mask.cumsum(1) - 1).clamp(min=0)
        prompt = model.prepare_inputs_for_generation(
            ids, cache=cache, attention_mask=mask, position_ids=position
        )
        logits = [model(**prompt).logits[:, -1]]
        sequence, full = ids, mask
        for _ in range(8):
            sequence = torch.cat((sequence, logits[-1].argmax(-1, keepdim=True)), 1)
            full = torch.nn.functional.pad(full, (0, 1), value=1)
            position = full.sum(1, keepdim=True) - 1
            inputs = model.prepare_inputs_for_generation(
                sequence, next_sequence_length=1, cache=cache, attention_mask=full, position_ids=position
            )
            logits.append(step(**inputs, return_dict=True).logits[:, -1])
    sequence = torch.cat((sequence, logits[-1].argmax(-1, keepdim=True)), 1)
    assert compiled == 1
    expected = _recomputed(model, LAYOUTS["spattention"], sequence, mask, 9)
    torch.testing.assert_close(torch.stack(logits, 1), expected, atol=1e-5, rtol=1e-5)


def test_a_padded_batch_needs_its_padding_on_the_left(models: dict[str, Any]) -> None:
    model = _with(models["llama"], LAYOUTS["spattention"])
    ids = torch.randint(2, VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with pytest.raises(ValueError, match="padding between a row's tokens"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)


def test_memory_is_what_the_bands_need(models: dict[str, Any]) -> None:
    model = _with(models["llama"], BandLayout.spattention(HEADS, 2048))
    cache = make_cache(model)
    cache.early_initialization(1, KV_HEADS, HEAD_DIM, torch.float32, torch.device("meta"))
    dense = 2 * KV_HEADS * 2048 * HEAD_DIM * 4
    assert all(0.7 < layer.cache.nbytes / dense < 0.77 for layer in cache.layers)  # (1/2 + 1) / 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("error::spattn_tvm.FallbackWarning")
@pytest.mark.parametrize("kind", ["llama", "olmoe"])
@pytest.mark.parametrize("seed", range(CASES))
def test_logits_and_tokens_are_those_of_the_whole_sequence_on_the_gpu(seed: int, kind: str) -> None:
    register_the_definition()
    assert not torch.backends.cuda.matmul.allow_tf32
    _check_case(seed, make_model(kind).eval().cuda(), "cuda")


# Each is compiled by itself, which takes ten times as long as the case.
@pytest.mark.gpu
@pytest.mark.filterwarnings("error::spattn_tvm.FallbackWarning")
@pytest.mark.parametrize("cache", ["banded static", "static"])
@pytest.mark.parametrize("kind", ["llama", "olmoe"])
def test_compiled_steps_are_those_of_the_whole_sequence_on_the_gpu(kind: str, cache: str) -> None:
    register_the_definition()
    _check_case(3, make_model(kind).eval().cuda(), "cuda", cache, is_compiled=True)
