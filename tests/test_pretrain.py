"""The training recipe: data, attention by name, exact resume, clear errors, tables from logs."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from training_recipe import SCRIPTS, imported_recipe

from spattn_tvm import BandLayout
from spattn_tvm.bench.peer_masks import bigbird_mask, longformer_mask, reformer_mask
from spattn_tvm.file_lock import file_lock

pytest.importorskip("transformers", minversion="5.24")

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in SCRIPTS.rglob("*.toml"))
COMPUTED = ("loss", "gradient_norm", "learning_rate", "held_out", "copies")
# Ten kills, and runs of two processes, take minutes.
KILLS = min(10, int(os.environ.get("SPATTN_SWEEP", "1")))

TINY = """
[model]
hidden = 64
layers = 2
heads = 2
kv_heads = 2
intermediate = 32
experts = 4

[data]
folder = "{folder}"
context = 96

[train]
steps = 10
batch = 4
micro_batch = 2
warmup = 2
precision = "float32"
loss_chunk = 50
log_every = 1
evaluate_every = 4
evaluate_sequences = 2
checkpoint_every = 3
"""


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    with imported_recipe() as modules:
        yield modules


def _words(count: int, seed: int) -> str:
    words = ["the", "of", "to", "and", "a", "in", "band", "head", "query", "key", "token", "width", "far"]
    return " ".join(random.Random(seed).choices(words, k=count))


@pytest.fixture(scope="module")
def folder(recipe: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of documents that are shorter and longer than a context, as bytes."""
    out = tmp_path_factory.mktemp("tokens")
    documents = [recipe.data.Document(_words(50 + 7 * seed, seed), "made") for seed in range(30)]
    recipe.data.prepare(documents, out, tokenizer="bytes", held_out=0.2)
    return out


@pytest.fixture
def tiny(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(folder=folder))
    return path


# --- data ---------------------------------------------------------------------------------------------------


def test_documents_are_collected_once_and_split(recipe: SimpleNamespace, tmp_path: Path) -> None:
    docs, man = tmp_path / "usr/share/doc/thing", tmp_path / "usr/share/man/man1"
    german = tmp_path / "usr/share/doc/ding"
    for made in (docs, man, german):
        made.mkdir(parents=True)
    lines = [_words(12, seed) for seed in range(200)]
    (docs / "guide.txt").write_text("\n".join(lines[:40]))
    (docs / "again.txt").write_text("\n".join(lines[:40]) + "\n")
    (docs / "part.txt").write_text("\n".join(lines[10:30] + lines[50:90]))
    (docs / "page.html").write_text(f"<style>hidden</style><p>{'<p>'.join(lines[90:130])}")
    (docs / "changelog").write_text("\n".join(lines[130:150]))
    (docs / "copyright").write_text("Files: *\nLicense: MIT\n")
    (german / "readme.txt").write_text("Der Kopf sieht nur seine eigenen Abstände und ein Fenster. " * 20)
    perl = tmp_path / "usr/share/perl/5.36/pod"
    perl.mkdir(parents=True)
    marked = [line.replace(" ", " B<", 1).replace(" ", "> ", 2).replace("> B<", " B<", 1) for line in lines]
    pod = "\n".join(marked[180:])
    (perl / "perlthing.pod").write_text(f"print 1;\n\n=head1 NAME\n\n=over 4\n\n{pod}\n\n=cut\nprint 2;\n")
    (man / "thing.1").write_text(
        ".TH THING 1\n.SH NAME\n" + "\n".join(f"\\fB{line}\\fR" for line in lines[150:180])
    )
    meta = recipe.data.prepare(
        recipe.data.collect(tmp_path),
        tmp_path / "out",
        tokenizer="bpe",
        vocabulary=300,
        held_out=0.25,
        root=tmp_path,
    )
    assert meta["train"]["documents"] + meta["held_out"]["documents"] == 5
    sources = json.loads((tmp_path / "out/sources.json").read_text())
    assert {entry["source"]: entry["licence"] for entry in sources}["thing"] == "MIT"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    text = {}
    for part in ("train", "held_out"):
        tokens = recipe.data.Tokens(tmp_path / "out", part, 16).tokens
        assert len(tokens) == meta[part]["tokens"] and tokens[0] == meta["separator"]
        assert (tokens == meta["separator"]).sum() == meta[part]["documents"]
        text[part] = tokenizer.decode([int(token) for token in tokens if token != meta["separator"]])
    both = text["train"] + text["held_out"]
    # Each line once, also where a second file repeats it; nothing of the changelog or another language.
    for place, line in enumerate(lines[:130] + lines[150:]):
        assert both.count(line) == (0 if 40 <= place < 50 else 1), place
    assert all(line not in both for line in lines[130:150])
    assert all(word not in both for word in ("hidden", "Abst", "TH", "\\f", "print", "over 4", "B<"))


def test_books_are_several_documents(recipe: SimpleNamespace, tmp_path: Path) -> None:
    """All of a book, cut at empty lines."""
    folder = tmp_path / "usr/share/dictd"
    folder.mkdir(parents=True)
    entries = [_words(100, seed) for seed in range(1000)]
    # Of an old dictionary: a byte is of another encoding.
    with gzip.open(folder / "words.dict.dz", "wb") as file:
        file.write(b"\x92" + "\n\n".join(entries).encode())
    (folder / "words.index.gz").write_bytes(gzip.compress("größer ".encode("latin-1") * 999))
    pieces = list(recipe.data.collect(tmp_path))
    assert len(pieces) == 3 and all(len(piece.text) < 210_000 for piece in pieces)
    assert [entry for piece in pieces for entry in piece.text.split("\n\n")] == entries


def test_files_of_each_kind(recipe: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"body": "second"}\n\n{"body": null}\n{"body": "third"}')
    (tmp_path / "C.TXT").write_text("with a mark", encoding="utf-8-sig")
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "d.txt" / "e.md.gz").write_bytes(gzip.compress(b"packed"))
    lines = '{"body": "more"}\r\n{"body": "and more"}\r\n'.encode("utf-8-sig")
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "g.jsonl").write_bytes(b"")
    read = recipe.data.read
    texts = ["with a mark", "first", "second", "third", "packed", "more", "and more"]
    assert [d.text for d in read([tmp_path], "body")] == texts
    for name in ("b.jsonl", "f.jsonl.gz"):
        with pytest.raises(recipe.data.DataError, match=rf"{name}, line 1: .* field 'text'"):
            list(read([tmp_path / name], "text"))
    with pytest.raises(recipe.data.DataError, match="there is no"):
        list(read([tmp_path / "c.txt"], "text"))
    for name in ("d.doc", "rows.parquet.gz", "gz"):
        (tmp_path / name).write_text("x")
        with pytest.raises(recipe.data.DataError, match=rf"{name}: a document is \.txt, \.md, \.jsonl .* or"):
            list(read([tmp_path / name], "text"))
    with pytest.raises(recipe.data.DataError, match="too few"):
        recipe.data.prepare([recipe.data.Document(_words(99, 0), "one")], tmp_path / "o", tokenizer="bytes")
    rows = tmp_path / "e.parquet"
    rows.write_bytes(b"")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        with pytest.raises(recipe.data.DataError, match="needs pyarrow"):
            list(read([rows], "text"))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["fourth", None, "fifth"]}), rows)
        assert [d.text for d in read([rows], "text")] == ["fourth", "fifth"]


def test_damaged_texts_say_what_is_wrong(recipe: SimpleNamespace, tmp_path: Path) -> None:
    latin, lines, half = tmp_path / "latin.txt", tmp_path / "lines.jsonl", tmp_path / "half.jsonl"
    latin.write_bytes("a café".encode("latin-1"))
    lines.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    for path, byte in ((latin, "0xe9"), (lines, "0xff")):
        with pytest.raises(recipe.data.DataError, match=rf"{path.name} is no UTF-8 \(byte {byte}\)"):
            list(recipe.data.read([path], "text"))
    lines.write_text("[" * 100_000)
    with pytest.raises(recipe.data.DataError, match="line 1: no JSON object with a field 'text'"):
        list(recipe.data.read([lines], "text"))
    packed, whole = tmp_path / "packed.txt.gz", gzip.compress(_words(999, 0).encode())
    for damaged in (b"plain", whole[:99], whole[:40] + b"\xff" * 9 + whole[49:]):
        packed.write_bytes(damaged)
        with pytest.raises(recipe.data.DataError, match=r"packed.txt.gz can't be read"):
            list(recipe.data.read([packed], "text"))
    lines.write_text('{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(recipe.data.DataError, match="line 2: field 'text' is no text, but 5"):
        list(recipe.data.read([lines], "text"))
    half.write_text('{"text": "a \\ud800 b"}\n')
    assert [d.text for d in recipe.data.read([half], "text")] == ["a ? b"]
    pytest.importorskip("pyarrow")
    rows = tmp_path / "rows.parquet"
    rows.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(recipe.data.DataError, match=r"rows.parquet is damaged, or no Parquet"):
        list(recipe.data.read([rows], "text"))


def test_a_separator_in_a_text_begins_no_document(recipe: SimpleNamespace, tmp_path: Path) -> None:
    Document, separator = recipe.data.Document, recipe.data.SEPARATOR
    documents = [
        Document(f"{_words(60, seed)} {separator} {_words(60, 99 + seed)}", "a") for seed in range(9)
    ]
    with pytest.raises(recipe.data.DataError, match="all bytes and a separator, 257, got 256"):
        recipe.data.prepare(documents, tmp_path, vocabulary=256)
    meta = recipe.data.prepare(documents, tmp_path, vocabulary=300, held_out=0.3)
    for part in ("train", "held_out"):
        tokens = recipe.data.Tokens(tmp_path, part, 16).tokens
        assert (tokens == meta["separator"]).sum() == meta[part]["documents"]


def test_tokens_are_whole_or_not_there(
    recipe: SimpleNamespace, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making them anew leaves those of a run under way alone; what is cut off is not taken for less text."""
    out = tmp_path / "tokens"
    shutil.copytree(folder, out)
    before = recipe.data.Tokens(out, "train", 96)
    first = before.at(0, 3)
    documents = [recipe.data.Document(_words(90, 100 + seed), "made") for seed in range(9)]
    recipe.data.prepare(documents, out, tokenizer="bytes", held_out=0.2)
    assert (before.at(0, 3) == first).all()
    assert (recipe.data.Tokens(out, "train", 96).at(0, 3) != first).any()
    os.truncate(out / "train.bin", 400)
    with pytest.raises(recipe.data.DataError, match=r"train.bin has 200 tokens, and meta.json says \d+"):
        recipe.data.Tokens(out, "train", 96)
    monkeypatch.setattr(recipe.data, "_encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe.data.prepare(documents, out, tokenizer="bytes", held_out=0.2)
    with pytest.raises(recipe.data.DataError, match="holds no tokens"):
        recipe.data.Tokens(out, "train", 96)


def test_windows_are_a_function_of_seed_and_place(recipe: SimpleNamespace, folder: Path) -> None:
    tokens = recipe.data.Tokens(folder, "train", 96, seed=3)
    everything = tokens.at(0, 2 * tokens.windows)
    place = random.randrange(tokens.windows)
    again = recipe.data.Tokens(folder, "train", 96, seed=3).at(place, tokens.windows)
    assert (again == everything[place : place + tokens.windows]).all()
    for epoch in (everything[: tokens.windows], everything[tokens.windows :]):
        assert len({row.tobytes() for row in epoch}) == tokens.windows
    assert (everything[: tokens.windows] != everything[tokens.windows :]).any()
    assert (recipe.data.Tokens(folder, "train", 96, seed=4).at(0, 9) != everything[:9]).any()
    for row, positions in zip(everything, tokens.positions(everything), strict=True):
        expected = 0
        for index, token in enumerate(row[:-1]):
            expected = 0 if token == tokens.meta["separator"] or index == 0 else expected + 1
            assert positions[index] == expected


# --- attention ----------------------------------------------------------------------------------------------


def _make(recipe: SimpleNamespace, path: Path, *settings: str) -> tuple[Any, Any]:
    # All experts: a choice among them turns over by rounding now and then.
    config = recipe.config.load(path, ["model.experts_per_token=4", *settings])
    torch.manual_seed(0)
    return config, recipe.model.LanguageModel(config, 257)


def _batch(recipe: SimpleNamespace, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = recipe.data.Tokens(Path(config.data.folder), "train", config.data.context)
    windows = tokens.at(random.randrange(1000), 2)
    return torch.from_numpy(windows), torch.from_numpy(tokens.positions(windows))


def _loss_and_gradients(model: Any, batch: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss, _ = model(*batch)
    loss.backward()
    return [loss.detach()] + [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_each_attention_is_that_of_its_mask(recipe: SimpleNamespace, tiny: Path, documents: str) -> None:
    """Kernels against eager attention with a mask; masks against definitions; pairs against masks."""
    definitions = {
        "longformer": longformer_mask(96),
        "bigbird": bigbird_mask(96),
        "reformer": reformer_mask(96, 2),
    }
    for name in recipe.config.ATTENTIONS:
        where = (f"attention.name={name}", f"data.documents={documents}")
        config, model = _make(recipe, tiny, *where)
        batch = _batch(recipe, config)
        found = _loss_and_gradients(model, batch)
        assert all(part.isfinite().all() for part in found), name
        if name == "bound":
            continue
        _, eager = _make(recipe, tiny, *where, "attention.implementation=eager")
        if model.layers[0].means in ("bands", "sdpa"):
            for mine, theirs in zip(found, _loss_and_gradients(eager, batch), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-6, msg=name)
        rows = batch[1] if documents == "separate" else None
        mask = recipe.model._make_mask(eager.layers[0], 2, 96, rows, torch.device("cpu"))
        mask = mask.expand(2, 2, 96, 96)
        lengths = recipe.model.document_lengths(config, batch[1])
        assert sum(lengths) == batch[1].numel()
        begin = 0
        for length in lengths:
            row, column = divmod(begin, 96)
            inside = mask[row, :, column : column + length, column : column + length]
            assert inside.sum() == mask[row, :, column : column + length].sum()
            assert inside.sum() == recipe.model.pairs(model.layers[0], 2, 96, length), name
            if name in definitions:
                assert torch.equal(inside, definitions[name][:, :length, :length].expand_as(inside)), name
            begin += length


def _parts(mask: Any) -> dict[str, Any]:
    names = ["seq_lengths", "BLOCK_SIZE"]
    for what in ("num_blocks", "indices"):
        names += [f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q")]
    return {name: getattr(mask, name) for name in names}


@pytest.mark.parametrize("pairs", [1, 1 << 27])
def test_block_masks_are_those_of_flex_attention(
    recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    """At lengths of whole blocks and others, all at once and a row of blocks at a time."""
    monkeypatch.setattr(recipe.model, "PAIRS_AT_A_TIME", pairs)
    for length, name in ((96, "reformer"), (300, "bigbird"), (384, "dense"), (517, "spattention")):
        layout = {"dense": BandLayout.causal(3), "spattention": BandLayout.spattention(3, length)}.get(name)
        layer = recipe.model.Layer(name, "flex", layout)
        masks, cpu = 1 if name in recipe.model.ALIKE else 3, torch.device("cpu")
        sees = recipe.model._in_one_document(recipe.model.rule_of(layer, 3, length, cpu))
        found = _parts(recipe.model.block_mask(sees, masks, length, cpu))
        expected = _parts(create_block_mask(sees, 1, masks, length, length, device="cpu"))
        for part, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[part], value, rtol=0, atol=0, msg=f"{name}: {part}")
            else:
                assert found[part] == value


def test_rules_do_not_share_the_limit_of_recompilations(
    recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention of many rules in one process stays compiled; what would not be raises."""
    length, cpu = 80, torch.device("cpu")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    q = torch.randn(2, 2, length, 16)
    with torch._dynamo.config.patch(recompile_limit=1):
        for name in ("dense", "longformer", "reformer"):
            layout = BandLayout.causal(2) if name == "dense" else None
            layer = recipe.model.Layer(name, "flex", layout)
            sees = recipe.model._in_one_document(recipe.model.rule_of(layer, 2, length, cpu))
            mask = recipe.model.block_mask(sees, 2, length, cpu)
            attend = recipe.model.compiled_for(flex_attention, layer, 2, length)
            expected = F.scaled_dot_product_attention(
                q, q, q, attn_mask=recipe.model._make_mask(layer, 2, length, None, cpu)
            )
            torch.testing.assert_close(attend(q, q, q, block_mask=mask), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            attend(q.double(), q.double(), q.double(), block_mask=mask)
    recipe.model.compiled_for.cache_clear()


def test_hybrids_and_other_shapes(recipe: SimpleNamespace, tiny: Path) -> None:
    for settings in (
        ['attention.name=["spattention", "dense"]'],
        ['attention.name=["longformer", "exclusive"]', "model.kind=llama", "model.kv_heads=1"],
        ["train.activation_checkpointing=true", "train.loss_chunk=7"],
        ["model.experts_implementation=eager"],
    ):
        config, model = _make(recipe, tiny, *settings)
        batch = _batch(recipe, config)
        plain = [s for s in settings if not s.startswith(("train.", "model.experts"))]
        _, other = _make(recipe, tiny, *plain, *(["attention.implementation=eager"] if plain else []))
        for mine, theirs in zip(
            _loss_and_gradients(model, batch), _loss_and_gradients(other, batch), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-6)


def test_experts_run_in_autocasts_dtype(recipe: SimpleNamespace, tiny: Path) -> None:
    config, model = _make(recipe, tiny)
    batch = _batch(recipe, config)
    exact = _loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = _loss_and_gradients(model, batch)
    assert all(part.dtype is torch.float32 for part in rounded)
    assert (rounded[0] - exact[0]).abs() < 0.02 * exact[0]
    experts = dict(
        zip([n for n, _ in model.named_parameters()], zip(exact[1:], rounded[1:], strict=True), strict=True)
    )
    for name, (mine, theirs) in experts.items():
        if "experts" in name:
            assert 0 < (mine - theirs).norm() < 0.1 * mine.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_each_attention_on_the_gpu(recipe: SimpleNamespace, tiny: Path, documents: str) -> None:
    """In autocast, by kernels and FlexAttention, near eager attention with a mask."""
    torch.use_deterministic_algorithms(False)
    for name in recipe.config.ATTENTIONS:
        where = (f"attention.name={name}", f"data.documents={documents}", "data.context=300")
        found = []
        for implementation in ("auto", "eager", "flex") if name != "bound" else ("auto", "auto"):
            config, model = _make(recipe, tiny, *where, f"attention.implementation={implementation}")
            if not found:
                batch = tuple(part.cuda() for part in _batch(recipe, config))
            with torch.autocast("cuda", torch.bfloat16):
                found.append(_loss_and_gradients(model.cuda(), batch))
        for other in found[1:]:
            assert abs(found[0][0] - other[0]) < 5e-3, name
            for mine, theirs in zip(found[0][1:], other[1:], strict=True):
                assert (mine - theirs).norm() < 0.05 * theirs.norm() + 1e-4, name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_a_run_on_the_gpu(recipe: SimpleNamespace, tiny: Path, tmp_path: Path, precision: str) -> None:
    settings = [f"train.precision={precision}", "train.steps=30", "train.learning_rate=0.01"]
    settings += ["data.context=200", "train.peak_tflops=989"]
    recipe.train.train(recipe.config.load(tiny, settings), tmp_path / "run")
    lines = recipe.tables.read_lines(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30 and statistics.mean(losses[-5:]) < 0.8 * losses[0]
    assert all(0 < line["mfu"] < 1 for line in lines if "mfu" in line)
    assert list(lines[-1]["copies_by_distance"]) == ["64", "128"]


# --- runs ---------------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """Of a process that computes as this one does."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(torch.get_num_threads())
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads}


def _losses(out: Path) -> dict[int, list[Any]]:
    """What must not depend on how often a run was stopped."""
    found: dict[int, list[Any]] = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "step" in entry:
            kept = {
                name: entry[name]
                for name in entry
                if name.startswith(("loss", "grad", "held", "learning", "copies"))
            }
            found.setdefault(entry["step"], []).append(kept)
    return found


def test_a_killed_run_goes_on_as_if_nothing_happened(
    recipe: SimpleNamespace, folder: Path, tiny: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    config = recipe.config.load(tiny)
    recipe.train.train(config, whole)
    expected = _losses(whole)
    assert sorted(expected) == list(range(1, 11))
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept == ["step-00000009.pt", "step-00000010.pt"]
    assert len(expected[4]) == 2 and "held_out_by_position" in expected[4][1]
    for number in range(KILLS):
        killed, at = tmp_path / f"killed-{number}", random.randrange(1, 10)
        command = [sys.executable, str(SCRIPTS / "train.py"), str(tiny), "--out", str(killed)]
        process = subprocess.Popen(command, env=_environment(), stderr=subprocess.DEVNULL)
        while process.poll() is None:
            log = killed / "log.jsonl"
            if log.exists() and log.read_text().count('"loss"') >= at:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        assert process.wait() in (0, -signal.SIGKILL)
        assert _losses(killed)
        recipe.train.train(config, killed)
        assert _losses(killed) == expected, at
    other = recipe.config.load(tiny, ["train.learning_rate=1", "train.log_every=3"])
    with pytest.raises(recipe.config.ConfigError, match=r"\(train.learning_rate was 0.001, is 1\)"):
        recipe.train.train(other, killed)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    same = recipe.config.load(tiny, [f"data.folder={moved}"])
    recipe.train.train(same, killed)
    assert _losses(killed) == expected
    meta = json.loads((moved / "meta.json").read_text())
    (moved / "meta.json").write_text(json.dumps(meta | {"sha256": "0"}))
    with pytest.raises(recipe.config.ConfigError, match="moved holds other tokens than then"):
        recipe.train.train(same, killed)
    _check_folders_of_others(recipe, config, killed, expected)


def _check_folders_of_others(
    recipe: SimpleNamespace, config: Any, out: Path, expected: dict[int, list[Any]]
) -> None:
    """Nothing of a run is lost to another, nor to a damaged checkpoint."""
    with file_lock(out / "lock"), pytest.raises(recipe.config.ConfigError, match="another run writes into"):
        recipe.train.train(config, out)
    last = out / "checkpoints/step-00000010.pt"
    os.truncate(last, last.stat().st_size // 2)
    with pytest.raises(recipe.config.ConfigError, match=r"10.pt is damaged \(.*\): delete it, and"):
        recipe.train.train(config, out)
    last.unlink()
    recipe.train.train(config, out)
    assert _losses(out) == expected
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(recipe.config.ConfigError, match="the log of 10 steps and no checkpoint"):
        recipe.train.train(config, out)
    assert _losses(out) == expected


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(
    recipe: SimpleNamespace, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say."""
    config, save, out = recipe.config.load(tiny), torch.save, tmp_path / "run"

    def write_half(state: dict[str, Any], file: Any) -> None:
        save(state, file)
        if state["step"] == 6:
            raise RuntimeError("unexpected pos 707904 vs 707796")  # what PyTorch's writer says

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="no checkpoint could be written, is the disk full"):
        recipe.train.train(config, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003.pt"]


def test_too_little_held_out_text_is_said_at_once(recipe: SimpleNamespace, tiny: Path) -> None:
    place = recipe.train.Place(0, 4, torch.device("cpu"))
    with pytest.raises(recipe.data.DataError, match="2 held-out sequences for 4 processes"):
        recipe.train.start(recipe.config.load(tiny, ["train.micro_batch=1"]), place)


def test_copies_stand_at_their_distance(recipe: SimpleNamespace, tiny: Path, folder: Path) -> None:
    """A model that says each token's number as its loss: of a copy and of its original it is the same."""
    config = recipe.config.load(tiny, ["data.context=600"])
    seen = []

    def loss_of(tokens: torch.Tensor, positions: torch.Tensor) -> tuple[None, torch.Tensor]:
        seen.append(tokens)
        return None, tokens[:, 1:].float()

    place = recipe.train.Place(0, 1, torch.device("cpu"))
    held_out = recipe.data.Tokens(folder, "held_out", 600)
    run = recipe.train.Run(config, place, loss_of, None, None, held_out)
    found = recipe.train.probe_copies(run)["copies_by_distance"]
    assert list(found) == ["64", "128", "256", "512"]
    original, *copies = seen
    for (distance, losses), copied in zip(found.items(), copies, strict=True):
        assert losses["copy"] == pytest.approx(losses["original"])
        assert losses["copy"] == pytest.approx(copied[:, -48:].double().mean().item())
        end = 601 - int(distance)
        assert torch.equal(copied[:, -64:], original[:, end - 64 : end])
        assert torch.equal(copied[:, :-64], original[:, :-64])


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


@pytest.mark.skipif(KILLS < 2, reason="takes a minute; SPATTN_SWEEP=2 runs it")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_make_the_steps_of_one(
    recipe: SimpleNamespace, tiny: Path, tmp_path: Path, parallel: str
) -> None:
    """Losses and gradient norms of all steps, and again from a checkpoint of the middle."""
    settings = ["train.micro_batch=1", "train.steps=6", f"train.parallel={parallel}"]
    recipe.train.train(recipe.config.load(tiny, settings), tmp_path / "one")
    arguments = [str(tiny), "--out", str(tmp_path / "two"), *(f"--set={setting}" for setting in settings)]
    found = []
    for _ in range(2):
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": _free_port()}
        processes = [
            subprocess.Popen(
                [sys.executable, str(SCRIPTS / "train.py"), *arguments],
                env=_environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        assert [process.wait(120) for process in processes] == [0, 0]
        found.append(_losses(tmp_path / "two"))
        (tmp_path / "two/checkpoints/step-00000006.pt").unlink()
    assert all(one == found[0] for one in found)
    expected = _losses(tmp_path / "one")
    assert found[0].keys() == expected.keys()
    for step, lines in expected.items():
        for mine, theirs in zip(found[0][step], lines, strict=True):
            by_position = mine.pop("held_out_by_position", {})
            assert by_position == pytest.approx(theirs.pop("held_out_by_position", {}), rel=1e-5)
            assert mine.pop("copies_by_distance", {}) == theirs.pop("copies_by_distance", {}) == {}
            assert mine == pytest.approx(theirs, rel=1e-5), step


def test_a_model_learns_and_its_log_says_so(recipe: SimpleNamespace, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = recipe.config.load(
        tiny, ["train.steps=30", "train.learning_rate=0.01", "train.log_every=7", "train.peak_tflops=1e-3"]
    )
    recipe.train.train(config, out)
    lines = recipe.tables.read_lines(out)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30 and statistics.mean(losses[-5:]) < 0.7 * losses[0]
    rates = [line for line in lines if "tokens_per_second" in line]
    assert rates[-1]["tokens"] == 30 * 4 * 96
    # MFU is work over time over peak, so that this product is the work of a token.
    work = [line["mfu"] * 1e9 / line["tokens_per_second"] for line in rates]
    matmuls = recipe.model.matmul_flops_per_token(config, 257)
    assert all(matmuls < one < 1.5 * matmuls for one in work)
    end = lines[-1]
    assert end["step"] == 30 and end["held_out_loss"] < losses[0]
    assert list(end["held_out_by_position"])[:4] == ["0", "1", "2", "4"]
    # A second run of another seed, and one that can't be compared.
    recipe.train.train(recipe.config.load(tiny, ["train.steps=2", "train.warmup=1"]), tmp_path / "short")
    with pytest.raises(recipe.tables.TableError, match=r"train.steps: 30 and 2"):
        recipe.tables.quality({"a": lines, "b": recipe.tables.read_lines(tmp_path / "short")})
    again = json.loads(json.dumps(lines))
    again[0]["run"]["config"]["train"]["seed"] = 1
    again[-1]["held_out_loss"] += 1
    with pytest.raises(recipe.tables.TableError, match="b is a second run of spattention with seed 0"):
        recipe.tables.quality({"a": lines, "b": lines})
    table = recipe.tables.quality({"a": lines, "b": again})
    mean = end["held_out_loss"] + 0.5
    assert f"| spattention | 2 | {mean:.4f} ± {0.5**0.5:.4f} |" in table
    log = tmp_path / "half.jsonl"
    log.write_text((out / "log.jsonl").read_text() + '{"step": 31, "lo')
    assert recipe.tables.read_lines(log) == lines
    for text in ("", "5\n", '{"loss": 1}\n', "[train\n"):
        log.write_text(text)
        with pytest.raises(recipe.tables.TableError, match=r"half\.jsonl is no log"):
            recipe.tables.read_lines(log)
    with pytest.raises(recipe.tables.TableError, match="ended at step 29 of 30"):
        recipe.tables.quality({"a": [line for line in lines if line.get("step", 0) < 30]})
    _check_saved_model(recipe, config, lines[-1]["held_out_loss"], out / "model")
    assert "there are no runs of spattention, dense, longformer, bigbird and reformer with" in table
    with pytest.raises(recipe.tables.TableError, match="no run has copies to draw"):
        recipe.tables.plot_distances({"a": lines}, tmp_path / "copies.png")
    recipe.tables.plot({"a": lines, "b": again}, tmp_path / "losses.png", 5)
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_the_verdict_goes_by_seeds_that_two_have(recipe: SimpleNamespace) -> None:
    """Differences spread by 0.01 here, so that 0.02 counts, however much losses differ from seed to seed."""
    ours = {0: 4.0, 1: 5.0, 2: 3.0}
    worse = {name: {1: 5.05} for name in ("longformer", "bigbird", "reformer")}
    verdict = recipe.tables.verdict
    for shift, holds, words in (
        (-0.015, "holds", "on par with dense (+0.0150 nats/token)"),
        (-0.03, "does not hold", "worse than dense (+0.0300 nats/token)"),
        (0.03, "holds", "better than dense (-0.0300 nats/token)"),
    ):
        dense = {0: 4.0 + shift - 0.01, 1: 5.0 + shift, 2: 3.0 + shift + 0.01, 3: 9.0}
        text = verdict({"spattention": ours, "dense": dense, **worse})
        assert f") {holds} here: SPAttention is {words}, better than longformer (-0.0500), " in text
        assert "more than 0.0200 counts" in text
    text = verdict({"spattention": ours, "dense": dense, **worse, "bigbird": {1: 5.01}})
    assert " does not hold here: " in text
    assert (
        "better than longformer (-0.0500) and reformer (-0.0500), not better than bigbird (-0.0100)" in text
    )
    text = verdict({"spattention": ours, "dense": dense, "bigbird": {7: 5.0}, "reformer": {0: 5.0}})
    assert "is open: there are no runs of spattention, longformer and bigbird with the same seed" in text
    one = {name: {0: 1.0} for name in ("spattention", "dense", *worse)}
    assert "is open: there is no second seed" in verdict(one)


def test_a_row_of_more_seeds_is_not_behind_for_them(recipe: SimpleNamespace) -> None:
    """A seed whose losses are high moves no attention down, in the table's order or in its other parts."""

    def lines(name: str, seed: int, loss: float) -> list[dict[str, Any]]:
        config = recipe.config.load(
            SCRIPTS / f"configs/quality/{name}.toml", [f"train.seed={seed}", "train.steps=200"]
        )
        run = {
            "config": config.as_dict(),
            "label": config.label,
            "parameters": 1,
            "data": {"sha256": ""},
            "device": {"name": "a device"},
            "versions": {"torch": "2.11", "transformers": "5.24"},
        }
        end = {
            "step": 200,
            "held_out_loss": loss,
            "held_out_bits_per_byte": loss,
            "held_out_by_position": {"0": loss},
            "copies_by_distance": {"64": {"copy": loss + 0.5, "original": loss}},
        }
        return [{"run": run}, {"step": 200, "loss": loss}, end]

    logs = {
        "a": lines("spattention", 0, 4.0),
        "b": lines("spattention", 1, 6.0),
        "c": lines("dense", 0, 4.25),
        "d": lines("longformer", 1, 5.875),
        "e": lines("longformer", 0, 4.125),
    }
    text = recipe.tables.quality(logs)
    assert "6.6 M tokens a run; a device, torch 2.11, transformers 5.24\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    table, places, copies = rows[2:5], rows[7:10], rows[12:15]
    shown = [row.split(" | ")[1].strip(" |") for row in copies]
    assert shown == ["0.500 ± 0.000", "0.500 ± 0.000", "0.500"]
    assert [row.split(" | ")[0] for row in table] == ["| spattention", "| longformer", "| dense"]
    assert [row.split(" | ")[3] for row in table] == ["–", "+0.0000 ± 0.1768", "+0.2500"]
    shown = [row.split(" | ")[1].strip(" |") for row in places]
    assert shown == ["5.000 ± 1.414", "+0.000 ± 0.177", "+0.250"]
    curves = {label: len(runs) for label, runs in recipe.tables._by_label(logs).items()}
    assert curves == {"spattention": 1, "dense": 1, "longformer": 1}


def test_the_page_shows_logs_of_the_shipped_configurations(recipe: SimpleNamespace) -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    logs = {
        str(path): recipe.tables.read_lines(path)
        for path in sorted(ROOT.glob("autotune_logs/*/training/quality/*"))
    }
    assert recipe.tables.quality(logs) in page
    for lines in logs.values():
        run = lines[0]["run"]
        seed = run["config"]["train"]["seed"]
        shipped = recipe.config.load(SCRIPTS / f"configs/quality/{run['label']}.toml", [f"train.seed={seed}"])
        assert json.loads(json.dumps(shipped.as_dict())) == run["config"]
    measured = sorted(ROOT.glob("autotune_logs/*/training/throughput/*.jsonl"))
    if measured:
        assert (
            recipe.tables.throughput([line for path in measured for line in recipe.tables.read_lines(path)])
            in page
        )


def _check_saved_model(recipe: SimpleNamespace, config: Any, held_out_loss: float, folder: Path) -> None:
    """What transformers loads has the loss of the run's end, and generates."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation == "spattn"
    tokens = recipe.data.Tokens(Path(config.data.folder), "held_out", config.data.context)
    windows = tokens.first(config.train.evaluate_sequences)
    with torch.no_grad():
        logits = model(
            torch.from_numpy(windows[:, :-1]), position_ids=torch.from_numpy(tokens.positions(windows))
        ).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(windows[:, 1:]).flatten())
    assert loss.item() == pytest.approx(held_out_loss, rel=1e-5)
    start = torch.tensor([[model.config.bos_token_id, *b"the "]])
    assert model.generate(start, max_new_tokens=3, do_sample=False).shape[1] > start.shape[1]


@pytest.mark.parametrize("names", ["dense", '["dense", "exclusive"]', '["dense", "reformer"]'])
def test_saved_models_are_those_of_the_run(
    recipe: SimpleNamespace, tiny: Path, tmp_path: Path, names: str
) -> None:
    from transformers import AutoModelForCausalLM

    config, model = _make(recipe, tiny, f"attention.name={names}", "data.documents=joined")
    saved = recipe.model.save_model(config, 257, model.state_dict(), tmp_path / "model", 256)
    assert saved == ("reformer" not in names)
    if saved:
        tokens, positions = _batch(recipe, config)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert hasattr(loaded.config, "spattn_layouts") == ("exclusive" in names)
        logits = loaded(tokens[:, :-1]).logits
        found = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        torch.testing.assert_close(found.detach(), model(tokens, positions)[1], rtol=1e-4, atol=1e-5)


def test_throughput_rows_are_ratios_to_dense(recipe: SimpleNamespace, tmp_path: Path) -> None:
    def line(label: str, rate: float, context: int = 4096) -> dict[str, Any]:
        measured = {"tokens_per_second": rate, "mfu": 0.25}
        return {
            "label": label,
            "context": context,
            "layers": 4,
            "parameters": 1_800_000_000,
            "device": "a device",
            "versions": {"torch": "2.11", "transformers": "5.24"},
            "peak_memory_bytes": 2**30,
            "forward_backward": measured,
            "with_optimizer": measured | {"mfu": None},
        }

    table = recipe.tables.throughput(
        [line("spattention", 1.0), line("dense", 200.0), line("spattention", 300.0), line("bound", 7.0, 9)]
    )
    assert "| 4,096 | 4 | spattention | 300 (1.50x) | – | 25.0% | 300 (1.50x) | – | – | 1.0 |" in table
    assert "| 9 | 4 | bound | 7 | 100.0% | 25.0% | 7 | 100.0% | – | 1.0 |" in table
    rows = [line("spattention", 300.0), line("dense", 200.0), line("bound", 400.0)]
    assert "| 300 (1.50x) | 75.0% | 25.0% |" in recipe.tables.throughput(rows)
    recipe.tables.plot_lengths(rows, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 1000
    with pytest.raises(recipe.tables.TableError, match="no length has a row of dense"):
        recipe.tables.plot_lengths(rows[:1], tmp_path / "lengths.png")
    for name, value in (("layers", 2), ("device", "another")):
        with pytest.raises(recipe.tables.TableError, match=f"at 4,096 tokens can't be compared: {name} "):
            recipe.tables.throughput([rows[0] | {name: value}, *rows[1:]])


# --- configurations -----------------------------------------------------------------------------------------


def test_shipped_configurations_are_right(recipe: SimpleNamespace) -> None:
    quality: dict[str, Any] = {}
    for path in CONFIGS:
        config = recipe.config.load(path)
        if path.parent.name == "quality" and path.stem != "base":
            quality[path.stem] = config
    assert len(quality) == 11
    base = recipe.config.load(SCRIPTS / "configs/quality/base.toml")
    for name, config in quality.items():
        assert (config.model, config.data, config.train) == (base.model, base.data, base.train)
        assert name == "hybrid" or config.attention.name == name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stepz=3", r"unknown setting train.stepz; is steps meant\?"),
        ("optimizer.name=sgd", "unknown setting optimizer; there are attention, data, model, train"),
        ("train.steps=many", "train.steps is int, got 'many'"),
        ("train.steps=true", "train.steps is int, got True"),
        ("train.steps=0", "train.steps is at least 1, got 0"),
        ("train.batch=3", r"train.batch \(3\) is a multiple of train.micro_batch \(2\)"),
        ("train.warmup=10", r"train.warmup \(10\) is below train.steps \(10\)"),
        ("train.betas=[0.9]", "train.betas are two numbers"),
        ("train.learning_rate=0.0", "train.learning_rate is above 0"),
        ("train.weight_decay=nan", "train.weight_decay is at least 0, got nan"),
        ("model.rope_theta=-1", "model.rope_theta is above 0, got -1"),
        ("train.final_learning_rate=inf", "train.final_learning_rate is at least 0, got inf"),
        ("model.layers=99999999999999999999", r"model.layers is below 2\^31"),
        ("train.precision=fp8", "train.precision is one of autocast, bfloat16, float32, got 'fp8'"),
        ("attention.name=performer", r"attention.name\[0\] is one of spattention, .* got 'performer'"),
        ('attention.name=["dense"]', "attention.name has 1 names, model.layers is 2"),
        ("attention.window=3", "is sliding_window's"),
        ("model.heads=4", r"model.hidden / model.heads \(16\) is a multiple of 8 from 32 to 256"),
        ("model.heads=3", r"model.hidden \(64\) is a multiple of model.heads \(3\)"),
        ("model.experts_per_token=5", "5 experts a token of 4"),
        ("train", "section.key=value"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(
    recipe: SimpleNamespace, tiny: Path, setting: str, message: str
) -> None:
    with pytest.raises(recipe.config.ConfigError, match=message):
        recipe.config.load(tiny, [setting])


def test_wrong_files_say_what_is_wrong(recipe: SimpleNamespace, tmp_path: Path, tiny: Path) -> None:
    loop = tmp_path / "loop.toml"
    loop.write_text('extends = "loop.toml"')
    with pytest.raises(recipe.config.ConfigError, match="extends itself"):
        recipe.config.load(loop)
    with pytest.raises(recipe.config.ConfigError, match="no configuration"):
        recipe.config.load(tmp_path / "none.toml")
    loop.write_text("extends = 5")
    with pytest.raises(recipe.config.ConfigError, match="extends is the name of a file, got 5"):
        recipe.config.load(loop)
    loop.write_text("train = 5")
    with pytest.raises(recipe.config.ConfigError, match=r"\[train\] is a section of settings, got 5"):
        recipe.config.load(loop, ["train.steps=3"])
    loop.write_text("[train")
    with pytest.raises(recipe.config.ConfigError, match="is no TOML"):
        recipe.config.load(loop)
    config = recipe.config.load(tiny, [f"data.folder={tmp_path}"])
    with pytest.raises(recipe.data.DataError, match=r"(?s)holds no tokens .*scripts/pretrain/data.py --out"):
        recipe.train.train(config, tmp_path / "run")
    config = recipe.config.load(tiny, ["data.context=1000000"])
    with pytest.raises(recipe.data.DataError, match="fewer than a context of 1000000"):
        recipe.train.train(config, tmp_path / "run")
