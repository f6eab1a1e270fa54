"""Loss and gradients of a banded model are those by the bands' definition; what it can't do is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from banded_models import BY_DEFINITION, HEADS, LAYERS, VOCABULARY, make_model, register_the_definition
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

transformers = pytest.importorskip("transformers")

from spattn_tvm.bands import BandLayout  # noqa: E402
from spattn_tvm.integrations import transformers as adapter  # noqa: E402
from spattn_tvm.integrations.transformers import make_cache, register, set_layout  # noqa: E402

LENGTH = 40
BANDED = BandLayout.spattention(HEADS, LENGTH)
HYBRID = [None, BANDED]

pytestmark = pytest.mark.filterwarnings(
    "ignore::spattn_tvm.FallbackWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.fixture(scope="module", autouse=True)
def _definition() -> None:
    register_the_definition()


def _batch(form: str, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(batch: int) -> Tensor:
        return torch.randint(2, VOCABULARY, (batch, LENGTH), generator=generator)

    if form == "plain":
        ids = tokens(2)
        return {"input_ids": ids, "labels": ids}
    if form.startswith("padded"):
        ids, mask = tokens(3), torch.ones(3, LENGTH, dtype=torch.int64)
        mask[0, 30:] = mask[2, 3:] = 0
        if form == "padded left":
            mask = mask.flip(1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": position}
    lengths = [[17, 1, 22]] if form != "packed rows" else [[17, 1, 22], [40], [5, 35]]
    ids = tokens(len(lengths))
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    batch = {"input_ids": ids, "position_ids": position, "labels": ids.masked_fill(position == 0, -100)}
    if form == "packed boundaries":
        ends = torch.tensor([0, 17, 18, 40], dtype=torch.int32)
        batch |= {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends.clone(),
            "max_length_q": 22,
            "max_length_k": 22,
        }
    return batch


FORMS = ("plain", "padded right", "padded left", "packed", "packed rows", "packed boundaries")


def _gradients(
    model: Any, batch: dict[str, Any], forward: Any = None, **settings: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = (model if forward is None else forward)(**batch, **settings).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _expected(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    model.set_attn_implementation(BY_DEFINITION)
    return _gradients(model, batch, use_cache=False)


def _compare(results: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(results[0], expected[0], atol=1e-5, rtol=1e-5)
    assert results[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-5, rtol=1e-5)


def _banded(kind: str = "llama", layout: Any = BANDED, **settings: Any) -> Any:
    model = make_model(kind, **settings)
    set_layout(model, layout)
    return model.train()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "layout"), [("llama", HYBRID), ("olmoe", BANDED)])
def test_loss_and_gradients(form: str, kind: str, layout: Any) -> None:
    """As a training loop calls a model: with the cache a configuration asks for by default, and without."""
    model, batch = _banded(kind, layout), _batch(form)
    expected = _expected(model, batch)
    _compare(_gradients(model, batch, use_cache=False), expected)
    if form != "packed boundaries":
        _compare(_gradients(model, batch), expected)


@pytest.mark.parametrize("form", ["packed", "packed rows"])
def test_packing_where_attention_is_not_told_positions(form: str) -> None:
    """By a model that hands position_ids to the mask function and not to the attention function."""
    model, batch = _banded("Persimmon", [BANDED], num_hidden_layers=1), _batch(form)
    expected = _expected(model, batch)
    _compare(_gradients(model, batch, use_cache=False), expected)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    _compare(_gradients(model, batch, compiled, use_cache=False), expected)
    _compare(_gradients(model, _batch("plain"), use_cache=False), _expected(model, _batch("plain")))


@pytest.mark.parametrize(("kind", "layout"), [("llama", BANDED), ("olmoe", HYBRID)])
def test_each_step_of_a_run(kind: str, layout: Any, seed: int) -> None:
    """Thirty steps by the definition, of batches of every form, each repeated with bands from its weights."""
    # A choice of experts turns over by rounding in one of many runs, and all that follows with it.
    settings = {"num_experts_per_tok": 4} if kind == "olmoe" else {}
    banded = _banded(kind, layout, seed=seed, **settings)
    model = copy.deepcopy(banded)
    model.set_attn_implementation(BY_DEFINITION)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(30):
        batch = _batch(FORMS[step % len(FORMS)], seed + step)
        banded.load_state_dict(model.state_dict())
        expected = _gradients(model, batch, use_cache=False)
        _compare(_gradients(banded, batch, use_cache=False), expected)
        optimizer.step()
    moved = [
        weight.detach() - old for weight, old in zip(model.parameters(), _first(kind, seed), strict=True)
    ]
    assert all(change.abs().max() > 0.01 for change in moved)


def _first(kind: str, seed: int) -> list[Tensor]:
    return [weight.detach() for weight in make_model(kind, seed=seed).parameters()]


def test_bands_of_each_sequences_own_length() -> None:
    model = _banded(layout=BandLayout.spattention(HEADS))
    for form in ("plain", "packed", "packed boundaries"):
        batch = _batch(form)
        result = _gradients(model, batch, use_cache=False)
        documents = [batch] if form == "plain" else _separate(batch)
        losses = [_expected(model, document)[0] for document in documents]
        weights = [float((document["labels"][:, 1:] != -100).sum()) for document in documents]
        loss = sum(a * b for a, b in zip(losses, weights, strict=True) if b) / sum(weights)
        torch.testing.assert_close(result[0], torch.as_tensor(loss), atol=1e-5, rtol=1e-5)


def _separate(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {key: batch[key][:, begin:end] for key in ("input_ids", "labels")}
        for begin, end in ((0, 17), (18, 40))
    ]


@pytest.mark.parametrize("form", FORMS)
def test_inference_mode(form: str) -> None:
    """Where tensors have no versions, those that the caller or the model makes there among them."""
    model = _banded(layout=HYBRID).eval()
    expected, _ = _expected(model, _batch(form))
    with torch.inference_mode():
        for _ in range(2):
            loss = model(**_batch(form), use_cache=False).loss
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("form", ["plain", "padded right", "packed", "packed boundaries"])
def test_gradient_checkpointing(form: str, is_reentrant: bool) -> None:
    model, batch = _banded(), _batch(form)
    expected = _expected(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    model.enable_input_require_grads()
    _compare(_gradients(model, batch, use_cache=False), expected)


@pytest.mark.parametrize("form", ["plain", "padded right", "packed", "packed boundaries"])
def test_compiled_without_a_break(form: str) -> None:
    model, batch = _banded(layout=[BANDED], num_hidden_layers=1), _batch(form)
    expected = _expected(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    _compare(_gradients(model, batch, compiled, use_cache=False), expected)


@pytest.mark.parametrize("form", ["plain", "padded left", "packed rows"])
def test_compiled_once_for_all_lengths(form: str) -> None:
    model, whole = _banded(layout=[BANDED], num_hidden_layers=1), _batch(form)
    del whole["labels"]
    torch.compiler.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    for length in (37, 19, 33, 27):
        batch = {name: value[:, -length:].contiguous() for name, value in whole.items()}
        logits, expected = (each(**batch, use_cache=False).logits for each in (compiled, model))
        is_token = batch.get("attention_mask", torch.ones(logits.shape[:2])).bool()
        torch.testing.assert_close(logits[is_token], expected[is_token], atol=1e-5, rtol=1e-5)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("form", ["padded left", "packed rows"])
def test_an_exported_model_serves_all_lengths(form: str) -> None:
    model, whole = _banded(layout=[BANDED], num_hidden_layers=1).eval(), _batch(form)
    name = "attention_mask" if form.startswith("padded") else "position_ids"

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, told: Tensor) -> Tensor:
            return self.model(ids, **{name: told}, use_cache=False).logits  # type: ignore[no-any-return]

    length = {1: torch.export.Dim("length", min=4, max=LENGTH)}
    ids, told = (whole[key] for key in ("input_ids", name))
    program = torch.export.export(Logits(), (ids, told), dynamic_shapes=(length, length))
    for tokens in (LENGTH, 19, 7):
        part = ids[:, -tokens:].contiguous(), told[:, -tokens:].contiguous()
        is_token = part[1].bool() if name == "attention_mask" else torch.ones_like(part[1], dtype=torch.bool)
        with torch.no_grad():
            logits, expected = program.module()(*part), Logits()(*part)
        torch.testing.assert_close(logits[is_token], expected[is_token], atol=1e-5, rtol=1e-5)


def test_compiled_without_packing() -> None:
    """For whoever packs nothing; who then packs is told."""
    model, batch = make_model("llama", num_hidden_layers=1).train(), _batch("plain")
    set_layout(model, [BANDED], packing=False)
    expected = _expected(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    _compare(_gradients(model, batch, compiled, use_cache=False), expected)
    with pytest.raises(RuntimeError, match="position_ids start again within a row"):
        compiled(**_batch("packed"), use_cache=False)
    _compare(_gradients(model, _batch("packed"), use_cache=False), _expected(model, _batch("packed")))


def test_what_compiled_code_cannot_do_is_refused() -> None:
    """What only the device knows."""
    model = _banded(layout=[BANDED], num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    holes, padded, others = _batch("padded right"), _batch("padded right"), _batch("packed boundaries")
    holes["attention_mask"][1, 7] = 0
    padded["position_ids"] = _batch("packed")["position_ids"] + 3
    others["cu_seq_lens_k"][1] = 20
    numbered = _batch("plain") | {"seq_idx": torch.arange(LENGTH).expand(2, -1) // 20}
    for batch, message in (
        (holes, "padding between a row's tokens"),
        (padded, "position_ids start again within a row that attention_mask pads"),
        (others, "cu_seq_lens_k are not cu_seq_lens_q"),
        (numbered, "seq_idx changes where position_ids go on"),
    ):
        torch.compiler.reset()  # transformers' own functions are compiled in other tests too, up to a limit
        with pytest.raises(RuntimeError, match=message):
            compiled(**batch, use_cache=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["padded left", "packed rows"])
def test_a_trace_serves_other_values(form: str) -> None:
    """What torch.jit traces with plain sequences of the same shapes."""
    model, batch = _banded(num_hidden_layers=1, layout=[BANDED]).eval().requires_grad_(False), _batch(form)
    name = "attention_mask" if form.startswith("padded") else "position_ids"

    def logits(ids: Tensor, told: Tensor) -> Tensor:
        return model(ids, **{name: told}, use_cache=False).logits  # type: ignore[no-any-return]

    ids, told = batch["input_ids"], batch[name]
    plain = torch.ones_like(told) if name == "attention_mask" else torch.arange(LENGTH).expand_as(told)
    traced = torch.jit.trace(logits, (ids, plain.contiguous()), check_trace=False)
    is_token = told.bool() if name == "attention_mask" else torch.ones_like(told, dtype=torch.bool)
    for values in (plain, told):
        expected = logits(ids, values)[is_token]
        torch.testing.assert_close(traced(ids, values)[is_token], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_fake_tensors_go_through(form: str) -> None:
    """As with transformers' own implementations: to know memory and shapes without the values."""
    with FakeTensorMode():
        model = _banded(num_hidden_layers=1, layout=[BANDED])
        loss = model(**_batch(form), use_cache=False).loss
        loss.backward()
    assert isinstance(loss, FakeTensor)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name


@pytest.mark.parametrize("kind", ["banded", "paged", "dynamic"])
def test_fake_tensors_are_cached(kind: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        model = _banded(num_hidden_layers=1, layout=[BANDED]).eval()
        cache = transformers.DynamicCache() if kind == "dynamic" else make_cache(model, kind)
        ids, mask = torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 10, dtype=torch.int64)
        model(ids, attention_mask=mask[:, :9], past_key_values=cache)
        logits = model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits
    assert isinstance(logits, FakeTensor) and logits.shape == (2, 1, VOCABULARY)


def test_autocast() -> None:
    model, batch = _banded(), _batch("plain")
    expected, _ = _expected(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = _gradients(model, batch, use_cache=False)
    assert abs(float(loss - expected)) < 0.05
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    losses = []
    for implementation in ("spattn", BY_DEFINITION):
        model = _banded("olmoe", HYBRID)
        model.set_attn_implementation(implementation)
        rows = [_batch("padded right", seed) for seed in range(4)]
        data = [{key: value[row] for key, value in batch.items()} for batch in rows for row in range(3)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            max_steps=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0][-1] != losses[0][0]


# --- configurations -----------------------------------------------------------------------------------------


def test_bands_come_back_with_the_weights(tmp_path: Path) -> None:
    model, batch = _banded(layout=HYBRID).eval(), _batch("plain")
    with torch.no_grad():
        logits = model(**batch).logits
    folder = tmp_path / "0"
    model.save_pretrained(folder)
    for again in ("1", "2"):  # what was loaded can be saved and loaded
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config.spattn_layouts == [BandLayout.causal(HEADS).spec, BANDED.spec]
        assert loaded.config._attn_implementation == "spattn"
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, logits)
        folder = tmp_path / again
        loaded.save_pretrained(folder)
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert made.config._attn_implementation == "spattn"
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    with torch.no_grad():
        assert not torch.allclose(dense(**batch).logits, logits, atol=1e-2), (
            "asked for, dense is what one gets"
        )


def _pictured() -> Any:
    """A decoder that also reads pictures, which an encoder of its own attends to in all directions."""
    sees = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        vision_config=sees, text_config=make_model("llama").config, image_token_index=1
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_only_the_decoder_of_several_parts_has_bands(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = _pictured()
    batch = {
        "input_ids": torch.cat((torch.ones(1, 4), torch.arange(2, 30)[None]), 1).long(),
        "pixel_values": torch.randn(1, 3, 28, 28),
    }
    dense = model(**batch).logits
    set_layout(model, BandLayout.causal(HEADS))
    torch.testing.assert_close(model(**batch).logits, dense, atol=1e-4, rtol=1e-4)
    set_layout(model, BANDED)
    banded = model(**batch).logits
    assert not torch.allclose(banded, dense, atol=1e-3)
    for again in ("1", "2"):
        model.save_pretrained(tmp_path / again)
        model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / again).eval()
        torch.testing.assert_close(model(**batch).logits, banded)
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    for asked, is_dense in (("sdpa", True), ({"text_config": "eager"}, True), ("spattn", False)):
        loaded = load(tmp_path / "2", attn_implementation=asked).eval()
        torch.testing.assert_close(
            loaded(**batch).logits, dense if is_dense else banded, atol=1e-4, rtol=1e-4
        )
    request.getfixturevalue("unregistered")
    with pytest.raises(ValueError, match="spattn"):
        load(tmp_path / "2")


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers as it is in a process that has not called `register`."""
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        mapping = {k: v for k, v in interface._global_mapping.items() if k != "spattn"}
        monkeypatch.setattr(interface, "_global_mapping", mapping)
    monkeypatch.setattr(adapter, "_names", [])
    yield


# --- wrong uses ---------------------------------------------------------------------------------------------


def test_a_banded_checkpoint_does_not_run_dense_where_bands_are_unknown(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    _banded().save_pretrained(tmp_path)
    request.getfixturevalue("unregistered")
    with pytest.raises(ValueError, match="spattn"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_half_a_registration_is_refused() -> None:
    model = _banded()
    name = "half_of_spattn"
    transformers.AttentionInterface.register(name, adapter.banded_attention_forward)
    try:
        model.set_attn_implementation(name)
        with pytest.raises(ValueError, match="registered without its mask function"):
            model(**_batch("packed"))
        transformers.AttentionMaskInterface.register(name, transformers.masking_utils.sdpa_mask)
        with pytest.raises(ValueError, match="takes no mask of 4 dimensions"):
            model(**_batch("padded right"))
    finally:
        for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            interface._global_mapping.pop(name, None)


@pytest.mark.parametrize("name", ["eager", "sdpa", BY_DEFINITION])
def test_names_of_others_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="another attention implementation's name"):
        register(name)


def test_layouts_that_do_not_fit_are_refused() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"layer 0: the layout has 8 heads, the model 4"):
        set_layout(model, BandLayout.spattention(8, 64))
    with pytest.raises(ValueError, match=rf"the model has {LAYERS} layers, got 3 layouts"):
        set_layout(model, [BANDED] * 3)
    with pytest.raises(TypeError, match="layer 1: a layout is a BandLayout"):
        set_layout(model, [BANDED, 5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="expected 'name:heads"):
        set_layout(model, "longformer:heads=4")
    with pytest.raises(TypeError, match="must be a PreTrainedModel of transformers, got Linear"):
        set_layout(torch.nn.Linear(2, 2), BANDED)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MambaForCausalLM has no attention heads"):
        config = transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)
        set_layout(transformers.MambaForCausalLM(config), BANDED)
    assert model.config._attn_implementation != "spattn"
    assert not hasattr(model.config, "spattn_layouts")
    set_layout(model, "spattention:heads=4,context=40")
    with pytest.raises(ValueError, match="a sequence of 41 is longer"):
        model(torch.ones(1, 41, dtype=torch.int64))
    for specs, error, message in (
        (["spattention:heads=8"] * LAYERS, ValueError, "attends with 4 query heads, .* are for 8: give"),
        ("spattention:heads=4", TypeError, "is a list of a layout's spec a layer, got 'spattention"),
    ):
        model.config.spattn_layouts = specs
        with pytest.raises(error, match=message):
            model(torch.ones(1, 40, dtype=torch.int64))


def test_a_model_without_bands_is_refused() -> None:
    register()
    model = make_model("llama", attn_implementation="spattn")
    with pytest.raises(ValueError, match="give the model its bands with set_layout"):
        model(**_batch("plain"))
    with pytest.raises(ValueError, match="the model has no bands"):
        make_cache(model)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dropout": ({"attention_dropout": 0.1}, {}, "dropout, and the model asks for attention_dropout=0.1"),
    "output_attentions": ({}, {"output_attentions": True}, "attention weights to output"),
    "4-D mask": ({}, {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)}, "takes no mask"),
    "4-D float mask": ({}, {"attention_mask": torch.zeros(2, 1, LENGTH, LENGTH)}, "takes no mask"),
    "padding amid tokens": (
        {},
        {"attention_mask": torch.ones(2, LENGTH, dtype=torch.int64).index_fill(1, torch.tensor([5]), 0)},
        "padding between a row's tokens",
    ),
    "packed and padded": (
        {},
        {
            "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64).index_fill(1, torch.tensor([0]), 0),
            "position_ids": torch.cat((torch.zeros(1), torch.arange(20), torch.arange(19)))[None].long(),
        },
        "position_ids start again within a row that attention_mask pads",
    ),
    "packed and padded, positions of a longer text": (
        {},
        {
            "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64).index_fill(1, torch.tensor([39]), 0),
            "position_ids": torch.cat((torch.arange(9, 29), torch.arange(5, 25)))[None],
        },
        "position_ids start again within a row that attention_mask pads",
    ),
    "mask of other rows": (
        {},
        {"attention_mask": torch.ones(3, LENGTH)},
        r"of shape \(2, 40\).* got \(3, 40\)",
    ),
    "mask of fewer tokens": ({}, {"attention_mask": torch.ones(2, 9)}, r"of shape \(2, 40\).* got \(2, 9\)"),
    "3-D mask": ({}, {"attention_mask": torch.ones(2, LENGTH, LENGTH)}, r"got \(2, 40, 40\)"),
    "FlexAttention's mask": (
        {},
        {
            "attention_mask": create_block_mask(
                lambda b, h, query, key: query >= key, 2, 1, LENGTH, LENGTH, device="cpu"
            )
        },
        r"takes no mask of 4 dimensions, got \(2, 1, 40, 40\) \(BlockMask\)",
    ),
    "bidirectional": ({}, {"is_causal": False}, "bidirectional or cross attention"),
    "softcap": ({}, {"softcap": 30.0}, r"softcap of the scores \(softcap=30.0\)"),
    "sinks": ({}, {"s_aux": torch.zeros(HEADS)}, "attention sinks"),
    "window": ({}, {"sliding_window": 8}, "window of the model's own beside its bands"),
    "position bias": ({}, {"position_bias": torch.zeros(1)}, "position bias"),
    "unknown": ({}, {"block_ids": torch.zeros(2, LENGTH)}, "argument block_ids, and won't ignore it"),
    "boundaries of keys alone": ({}, {"cu_seq_lens_k": torch.tensor([0, 40])}, "give cu_seq_lens_q too"),
    "numbers of sequences": (
        {},
        {"seq_idx": torch.arange(LENGTH).expand(2, -1) // 20},
        "seq_idx changes where position_ids go on",
    ),
    "packed rows": (
        {},
        {"cu_seq_lens_q": torch.tensor([0, 40]), "cu_seq_lens_k": torch.tensor([0, 40])},
        "one row holds all",
    ),
}


@pytest.mark.parametrize("use", REFUSED)
def test_what_bands_cannot_do_is_refused_by_name(use: str) -> None:
    settings, arguments, message = REFUSED[use]
    model = _banded(**settings)
    with pytest.raises(ValueError, match=message):
        model(**(_batch("plain") | arguments), use_cache=False)


@pytest.mark.parametrize("keys", [[0, 20, 40], [0, 40]])
def test_boundaries_of_keys_are_those_of_queries(keys: list[int]) -> None:
    batch = _batch("packed") | {"cu_seq_lens_q": torch.tensor([0, 17, 40])}
    model = _banded()
    for again in (batch["cu_seq_lens_q"], batch["cu_seq_lens_q"].clone(), None):
        model(**batch, cu_seq_lens_k=again, use_cache=False)
    with pytest.raises(ValueError, match="cu_seq_lens_k are not cu_seq_lens_q"):
        model(**batch, cu_seq_lens_k=torch.tensor(keys), use_cache=False)


def test_masks_of_other_models_are_refused() -> None:
    """What mask functions of other models would ask for; of those that mix bands with a window, say."""
    from transformers import masking_utils as masks

    config = _banded(layout=BANDED).config
    config.sliding_window, config.attention_chunk_size = 8, 8
    given = {"config": config, "inputs_embeds": torch.zeros(1, 12, 4), "attention_mask": None, "cache": None}
    module = torch.nn.Module()
    module.config, module.layer_idx = config, 0
    q = torch.zeros(1, config.num_attention_heads, 12, 32)
    mask = adapter.banded_mask(1, 12, 12)
    with pytest.raises(ValueError, match=r"values of another head dim than the keys' \(24 and 32\)"):
        adapter.banded_attention_forward(module, q, q, q[..., :24], mask)
    for make in (masks.create_sliding_window_causal_mask, masks.create_chunked_causal_mask):
        # Made for no layer by some models.
        mask = make(**given)
        with pytest.raises(ValueError, match=r"window or chunk of the model's own.*_window=8.* in layer 0"):
            adapter.banded_attention_forward(module, q, q, q, mask)
    with pytest.raises(ValueError, match="bidirectional or cross attention"):
        masks.create_bidirectional_mask(config, given["inputs_embeds"], None)
    with pytest.raises(ValueError, match="mask of the kind or_masks"):
        masks.create_causal_mask(**given, block_sequence_ids=torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="masks of the user's own"):
        masks.create_causal_mask(**given, and_mask_function=masks.sliding_window_overlay(3))


def test_caches_refuse_what_they_cannot_hold() -> None:
    model, batch = _banded().eval(), _batch("packed")
    del batch["labels"]
    packed = r"position_ids start again within a row whose keys are cached: .*use_cache=False"
    for kind in ("banded", "paged"):
        with torch.no_grad(), pytest.raises(ValueError, match=packed):
            model(**batch, cache=make_cache(model, kind))
    later = torch.cat((torch.arange(10, 20), torch.arange(10)))[None]
    for cache in (make_cache(model), transformers.DynamicCache(config=model.config)):
        with torch.no_grad(), pytest.raises(ValueError, match=packed):
            model(batch["input_ids"][:, :10], cache=cache)
            model(batch["input_ids"][:, 10:30], position_ids=later, cache=cache)
    with pytest.raises(RuntimeError, match="a cache has no gradient"):
        model(batch["input_ids"], cache=make_cache(model))
    others = _banded(layout=[BandLayout.exclusive(HEADS, LENGTH), BANDED])
    for kind in ("banded", "paged"):
        with torch.no_grad(), pytest.raises(ValueError, match=r"of layer 0 is made for exclusive.*has spatt"):
            model(batch["input_ids"], cache=make_cache(others, kind))
    cache = make_cache(model)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), pytest.raises(ValueError, match="keeps what bands need, and the model runs 'sdpa'"):
        model(batch["input_ids"], cache=cache)
    with pytest.raises(ValueError, match="kind must be one of banded, paged"):
        make_cache(model, "dense")
    for kind, is_static in (("banded", False), ("paged", True), ("banded", True)):
        with pytest.raises(ValueError, match="give max_length"):
            make_cache(_banded(layout=HYBRID), kind, is_static=is_static)
    with pytest.raises(ValueError, match="generation needs bands that don't follow"):
        make_cache(_banded(layout=BandLayout.spattention(HEADS)))
    growing = _banded(layout=BandLayout.spattention(HEADS)).eval()
    with pytest.raises(ValueError, match="needs bands that don't follow"):
        growing.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
