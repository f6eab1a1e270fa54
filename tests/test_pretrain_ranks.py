"""The training recipe where ranks share the sequences of a batch: the losses and gradients of one process."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from rank_processes import Ranks
from torch.distributed.tensor import DTensor
from training_recipe import import_recipe, imported_recipe

from spattn_tvm.distributed import context_parallel_attention

pytest.importorskip("transformers", minversion="5.24")


TINY = """
[model]
hidden = 64
layers = 2
heads = 2
kv_heads = 1
intermediate = 32
experts = 4
experts_per_token = 4

[data]
folder = "{folder}"
context = {context}

[train]
steps = 4
batch = 4
micro_batch = 2
warmup = 2
precision = "float32"
loss_chunk = 50
log_every = 1
evaluate_every = 3
evaluate_sequences = 4
checkpoint_every = 2
device = "cpu"
"""


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    with imported_recipe() as modules:
        yield modules


@pytest.fixture(scope="module")
def tiny(recipe: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with documents that are shorter and longer than its context, as bytes; two ranks can't
    cut the context into equal chunks."""
    folder = tmp_path_factory.mktemp("tokens")
    words = ["the", "of", "band", "head", "query", "key", "token", "width", "far"]
    texts = [" ".join(random.Random(seed).choices(words, k=40 + 7 * seed)) for seed in range(30)]
    documents = [recipe.data.Document(text, "made") for text in texts]
    recipe.data.prepare(documents, folder, tokenizer="bytes", held_out=0.2)
    path = folder / "tiny.toml"
    path.write_text(TINY.format(folder=folder, context=90))
    return path


# --- a batch ------------------------------------------------------------------------------------------------


def _place(config: Any) -> Any:
    make_place = import_recipe().train.make_place
    return make_place(config, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def _gradients(model: Any) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in found]


def _compare_batch(path: str, strategy: str, *settings: str) -> None:
    """Loss, tokens' losses and gradients, of whole batches in one process and of shared ones in all."""
    recipe = import_recipe()
    load, train, context = recipe.config.load, recipe.train, recipe.context
    alone = load(Path(path), list(settings))
    config = load(Path(path), [*settings, "train.context_parallel=2"])
    place = _place(config)
    run = train.start(config, place)
    torch.manual_seed(alone.train.seed)
    whole = train.LanguageModel(alone, 257)
    losses = []
    for batch in range(place.batches):
        windows = run.training.at(2 * batch, 2)
        tokens, positions = torch.from_numpy(windows), torch.from_numpy(run.training.positions(windows))
        expected, nats = whole(tokens, positions)
        (expected / place.batches).backward()
        losses.append(expected.item() / place.batches)
        if batch == place.batch:
            attend = partial(context_parallel_attention, strategy=strategy)
            with patch.object(context, "context_parallel_attention", attend):
                mine, found = run.model(tokens, positions)
                mine.backward()
            torch.testing.assert_close(found, nats, rtol=1e-5, atol=1e-5)
    # What each rank's loss is the mean of.
    total = mine.detach().clone()
    dist.all_reduce(total)
    assert total.item() / place.world == pytest.approx(sum(losses), rel=1e-5)
    wanted = _gradients(whole)
    names = [name for name, _ in whole.named_parameters()]
    for name, ours, theirs in zip(names, _gradients(run.model), wanted, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=1e-4,
            atol=1e-5 * scale,
            msg=lambda text, name=name: f"{settings} {name}: {text}",
        )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_a_shared_batch_has_the_gradients_of_a_whole_one(
    two: Ranks, tiny: Path, documents: str, parallel: str
) -> None:
    settings = [f"data.documents={documents}", f"train.parallel={parallel}"]
    two.call(_compare_batch, str(tiny), "bands", *settings)
    two.call(
        _compare_batch, str(tiny), "heads", *settings, 'attention.name=["exclusive", "dense"]',
        "model.kind=llama", "train.activation_checkpointing=true",
    )  # fmt: skip


def _compare_mixed_precision(path: str, *settings: str) -> None:
    recipe = import_recipe()
    config = recipe.config.load(Path(path), ["train.parallel=fsdp2", "train.precision=autocast", *settings])
    run = recipe.train.start(config, _place(config))
    torch.manual_seed(config.train.seed)
    whole = recipe.model.LanguageModel(replace(config, train=replace(config.train, context_parallel=1)), 257)
    windows = run.training.at(0, 2)
    tokens, positions = torch.from_numpy(windows), torch.from_numpy(run.training.positions(windows))
    loss, nats = run.model(tokens, positions)
    loss.backward()
    assert nats.dtype is torch.float32
    torch.testing.assert_close(nats, whole(tokens, positions)[1], rtol=0, atol=0.1)
    assert all(gradient.isfinite().all() for gradient in _gradients(run.model))


def test_fully_sharded_parameters_in_mixed_precision(two: Ranks, tiny: Path) -> None:
    """FSDP2 casts what a forward pass is called with, whole structures of it."""
    two.call(_compare_mixed_precision, str(tiny), "train.context_parallel=2")
    two.call(_compare_mixed_precision, str(tiny), 'attention.name=["longformer", "exclusive"]')


def _balance(seed: int) -> None:
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    rank, positions = dist.get_rank(), torch.arange(45).expand(2, 45)
    shared = import_recipe().context.SharedBatch.of(positions, True, dist.group.WORLD)
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randn(2, 45, 5, generator=generator, requires_grad=True) for _ in range(3)]
    expected = load_balancing_loss_func(tuple(each.flatten(0, 1) for each in whole), 5, 2)
    expected.backward()
    own = [shared.shards.take(each.detach(), rank).clone().requires_grad_() for each in whole]
    loss = shared.balancing_loss([each.flatten(0, 1) for each in own], 5, 2)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach())
    for ours, theirs in zip(own, whole, strict=True):
        torch.testing.assert_close(ours.grad, shared.shards.take(theirs.grad, rank))


def test_experts_are_balanced_over_all_rows(two: Ranks) -> None:
    for seed in range(5):
        two.call(_balance, seed)


# --- runs ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _placed(config: Any) -> Iterator[Any]:
    """As for torchrun's processes, with the group that there is."""
    yield _place(config)


def _train(path: str, out: str, *settings: str) -> str:
    """Returns what the run refuses."""
    recipe = import_recipe()
    with patch.object(recipe.train, "placed", _placed):
        try:
            recipe.train.train(recipe.config.load(Path(path), list(settings)), Path(out))
        except recipe.config.ConfigError as error:
            return str(error)
    return ""


def _lines(out: Path) -> dict[int, list[dict[str, Any]]]:
    """What does not depend on the time, of each step."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "step" in entry:
            kept = {
                name: entry[name] for name in entry if name.startswith(("loss", "grad", "held", "tokens"))
            }
            kept.pop("tokens_per_second", None)
            found.setdefault(entry["step"], []).append(kept)
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_run_of_shared_sequences_is_that_of_one_process(
    recipe: SimpleNamespace, four: Ranks, tiny: Path, tmp_path: Path, parallel: str
) -> None:
    """On a mesh of data and context; also from a checkpoint on."""
    settings, out = [f"train.parallel={parallel}"], tmp_path / "four"
    recipe.train.train(recipe.config.load(tiny, settings), tmp_path / "one")
    expected = _lines(tmp_path / "one")
    assert sorted(expected) == [1, 2, 3, 4] and expected[4][0]["tokens"] == 4 * 4 * 90
    shared = [*settings, "train.context_parallel=2"]
    assert not any(four.call(_train, str(tiny), str(out), *shared))
    found = _lines(out)
    (out / "checkpoints/step-00000004.pt").unlink()
    assert not any(four.call(_train, str(tiny), str(out), *shared))
    assert _lines(out) == found
    assert found.keys() == expected.keys()
    for step, lines in expected.items():
        for mine, theirs in zip(found[step], lines, strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in theirs.items():
                assert mine[name] == pytest.approx(value, rel=1e-4), (step, name)
    for refused in four.call(_train, str(tiny), str(out), *settings, "train.micro_batch=1"):
        assert "train.context_parallel was 2, is 1" in refused


def _measure(path: str) -> Any:
    recipe = import_recipe()
    config = recipe.config.load(Path(path), ["train.context_parallel=2", "train.peak_tflops=1e-3"])
    with patch.object(recipe.throughput, "placed", _placed):
        return recipe.throughput.measure(config, 257, 1, 2)


def test_throughput_is_that_of_all_processes(recipe: SimpleNamespace, four: Ranks, tiny: Path) -> None:
    for line in four.call(_measure, str(tiny)):
        assert line["processes"] == 4
        measured = line["forward_backward"]
        # Two batches of two sequences at a time, whoever computes them.
        tokens = measured["tokens_per_second"] * measured["seconds"]
        assert tokens == pytest.approx(2 * 2 * 90)
        work = measured["mfu"] * 4e9 * measured["seconds"]
        model, config = recipe.model, recipe.config.load(tiny)
        expected = tokens * model.matmul_flops_per_token(config, 257)
        assert work == pytest.approx(expected + 2 * model.attention_flops(config, [90, 90]))


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["attention.name=reformer"],
            r"reformer has a mask of another kind.* equal_area, sliding_window, dense",
        ),
        (['attention.name=["dense", "bigbird"]'], "shares sequences by bands, and bigbird has a mask"),
        (["attention.implementation=flex"], "goes with attention.implementation=auto, got 'flex'"),
        (["data.context=3"], r"data.context \(3\) is at least two tokens for each of .* \(2\)"),
    ],
)
def test_what_ranks_can_not_share_is_said_first(
    recipe: SimpleNamespace, tiny: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(recipe.config.ConfigError, match=message):
        recipe.config.load(tiny, [*settings, "train.context_parallel=2"])


def test_processes_that_can_not_be_dealt_out(
    recipe: SimpleNamespace, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, train = recipe.config, recipe.train
    monkeypatch.setenv("WORLD_SIZE", "3")
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    loaded = config.load_arguments(parser.parse_args([str(tiny), "--context-parallel", "2"]))
    assert loaded.train.context_parallel == 2
    message = re.escape("train.context_parallel (2) does not divide the number of processes (3)")
    with pytest.raises(config.ConfigError, match=message), train.placed(loaded):
        pass
