"""What the README shows runs, the training script trains, and the scripts say what a bare machine lacks."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_readme_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """As a reader would; the other pages' blocks run under scripts/test --all."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 16
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert all(names[name].grad.abs().sum() > 0 for name in "qkv")
    assert names["y"].shape == (2, 1024, 256)
    assert names["step"].shape == (2, 1, 256)
    layout = names["layout"]
    dense = 8 * 1024 * 1025 // 2
    assert f"{layout.pairs(1024) / dense:.2f} of the dense work" in capsys.readouterr().out


def test_commands_of_the_pages_exist() -> None:
    """Each `spattn …` of README.md and docs/ parses: the command exists and so does each of its options."""
    from spattn_tvm.cli import app

    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = [
        line for block in re.findall(r"```sh[^\n]*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    lines += re.findall(r"`(spattn [^`]*)`", text)
    commands = [line.split("#")[0].split()[1:] for line in lines if line.startswith("spattn ")]
    assert len(commands) >= 6
    from typer.testing import CliRunner

    for command in commands:
        names = [word for word in command[:2] if re.fullmatch("[a-z]+", word)]
        names = names if names[:1] == ["plot"] else names[:1]
        options = {word for word in command if word.startswith("--")}
        result = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, f"spattn {' '.join(command)}: {result.output}"
        assert all(option in result.output for option in options), command


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return load_script("train_byte_lm")


def test_models_start_equal_and_differ_in_attention_only(training: ModuleType) -> None:
    sizes = training.Sizes(context=96, batch=2, layers=2, heads=4, head_dim=32)
    first, second = (training.Run.start(name, sizes, 3, 1e-3).model for name in training.VARIANTS)
    for (name, a), (other, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    text = torch.randint(256, (2, 97))
    assert first.loss(text).item() != second.loss(text).item()

    from spattn_tvm import BandLayout, reference_attention

    layout = BandLayout.spattention(4, 96)
    for block in second.blocks:
        block.attend = lambda q, k, v: reference_attention(q, k, v, layout)[0]
    torch.testing.assert_close(first.loss(text), second.loss(text), atol=1e-5, rtol=1e-5)


def test_model_is_causal(training: ModuleType) -> None:
    sizes = training.Sizes(context=64, batch=1, layers=2, heads=4, head_dim=32)
    for name in training.VARIANTS:
        model = training.Run.start(name, sizes, 0, 1e-3).model
        text = torch.randint(256, (1, 64))
        altered = text.clone()
        altered[0, 40] = (altered[0, 40] + 1) % 256
        difference = (model(text) - model(altered)).abs().amax(-1)[0]
        assert difference[:40].max() < 1e-5
        assert difference[40] > 1e-4


def test_training_lowers_both_losses(training: ModuleType, tmp_path: Path) -> None:
    sizes = training.Sizes(context=128, batch=2, layers=1, heads=4, head_dim=32)
    runs = training.train(sizes, 3e-3, 0, steps=30)
    summary = training.summarize(runs, sizes, 0)
    for run in runs:
        assert len(run.losses) == 30
        assert sum(run.losses[-5:]) < 0.85 * sum(run.losses[:5])
        (last, bits) = run.held_out[-1]
        assert last == 30
        assert 2 < bits < 8
    assert summary["tokens"] == 30 * 2 * 128
    first = [run.held_out[0] for run in runs]
    assert all(step == 0 and 7.5 < bits < 8.5 for step, bits in first)
    training.plot(summary, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_held_out_is_trained_on(training: ModuleType) -> None:
    train, held_out = (bytes(text.tolist()) for text in training.load_text())
    assert len(train) > 300_000
    assert len(held_out) > 25_000
    long_paragraphs = [text for text in held_out.split(b"\n\n") if len(text) > 60]
    assert len(long_paragraphs) > 100
    assert [text for text in long_paragraphs if text in train] == []


def bare_environment(tmp_path: Path, *programs: str) -> dict[str, str]:
    """A PATH with nothing but the named programs and what the script itself needs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("bash", "dirname", "cat", "flock", *programs):
        found = shutil.which(program)
        if found:
            (folder / program).symlink_to(found)
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "SPATTN_PYTHON")}
    return clean | {"PATH": str(folder)}


def run_environment(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    script = f'source "{ROOT}/scripts/environment.sh"; ensure_environment'
    return subprocess.run([bash, "-c", script], env=environment, capture_output=True, text=True, timeout=60)


def test_missing_python_is_named(tmp_path: Path) -> None:
    done = run_environment(bare_environment(tmp_path))
    assert done.returncode == 1
    assert "no Python 3.10 or newer found" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    environment = bare_environment(tmp_path) | {"SPATTN_PYTHON": sys.executable}
    done = run_environment(environment)
    assert done.returncode == 1
    assert "no C++ compiler found" in done.stderr
    assert "apt-get install g++" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the scripts are for Linux")
def test_scripts_are_valid_shell() -> None:
    for name in ("environment.sh", "quickstart", "test", "docs"):
        subprocess.run(["bash", "-n", str(ROOT / "scripts" / name)], check=True, timeout=20)
    for name in ("scripts/quickstart", "scripts/test", "scripts/docs", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"


def test_what_searches_gain_is_filled_from_their_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row for each problem, whatever directions were searched; slower, wrong and CPU's kernels are not in
    it.
    """
    from spattn_tvm.bands import BandLayout
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import parse_target
    from spattn_tvm.tuning.log import TuningLog, log_folder

    update = load_script("update_readme")
    monkeypatch.setattr(update, "LOGS", tmp_path)
    assert update.gains_block() is None

    def logged(target: str, direction: str, length: int, *latencies: tuple[float | None, bool, bool]) -> None:
        machine = parse_target(target)
        problem = AttentionProblem(
            direction, "bfloat16", 1, 8, 2, length, 64, BandLayout.sliding_window(8, 64)
        )
        folder = log_folder(tmp_path, machine, problem, "evolutionary")
        with TuningLog(folder, problem, machine, "evolutionary") as log:
            log.begin_session({"candidates": "near the default"} if length == 1024 else {})
        kernels = [
            {"latency_us": latency_us, "is_default": is_default, "is_recorded": is_recorded}
            for latency_us, is_default, is_recorded in latencies
        ]
        compared = {"date": "2026-11-28T06:00", "device": f"chip {length}", "kernels": kernels}
        compared["rounds"] = 11 if length == 1024 else 9
        (folder / "distilled-some.json").write_text(json.dumps(compared))

    h100, chip = "nvidia/h100", "cuda-sm_90a-nvidia-h100"
    # A deterministic kernel is recorded beside the fastest.
    rivals = ((1500.0, False, True), (None, False, False), (1100.0, False, False))
    logged(h100, "backward", 8192, (1234.56, True, False), (1000.0, False, True), *rivals)
    logged(h100, "forward", 8192, (812.0, True, True), (811.0, False, False))
    logged(h100, "forward", 1024, (10.0, True, False), (8.0, False, True))
    logged("cpu-x86-64-v4", "forward", 2048, (10.0, True, False), (8.0, False, True))
    logged(h100, "forward", 512, (None, True, False), (8.0, False, True))  # no default to compare with
    rows = [line for line in update.gains_block().splitlines() if line.startswith("|")][2:]
    problem = "(1,8/2,{},64) bfloat16 sliding_window some"
    assert rows == [
        f"| {chip} | {problem.format(1024)} | 0.01 | 0.008 | 1.250 |  |  |  |",
        f"| {chip} | {problem.format(8192)} | 0.812 | the default | 1.000 | 1.235 | 1 | 1.235 |",
    ]
    text = update.gains_block()
    assert (
        "chip 1024, 2026-11-28; chip 8192, 2026-11-28." in text
        and "chip 2048" not in text
        and "chip 512" not in text
    )
    assert "in 9 to 11 turns" in text and "others (near the default, the cost model's)" in text


def test_readme_is_filled_from_reports(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spattn_tvm.bands import BandLayout
    from spattn_tvm.bench import clocks
    from spattn_tvm.bench import report as reports
    from spattn_tvm.bench import run as bench
    from spattn_tvm.bench.case import Case
    from spattn_tvm.problem import AttentionProblem

    monkeypatch.setattr(clocks.CpuClock, "matmul_size", 64)
    update = load_script("update_readme")
    for name, path in (
        ("ROOT", "."),
        ("LOGS", "logs"),
        ("DOCS", "docs"),
        ("LANGUAGE_MODEL", "results/byte_lm.json"),
    ):
        monkeypatch.setattr(update, name, tmp_path / path)
    monkeypatch.setattr(sys, "argv", ["update_readme.py"])
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/index.md", "docs/generation.md", "docs/distributed.md"):
        emptied = update.BLOCK.sub(r"\1\3", (ROOT / name).read_text())
        (tmp_path / name).write_text(emptied)
    problem = AttentionProblem("forward", "float32", 1, 2, 2, 60, 32, BandLayout.spattention(2))
    report = bench.benchmark([Case(problem)], rounds=2, idle_ms=0, peers=("ours", "sdpa", "cudnn"))
    measured = report["results"][0]
    for length in range(61, 67):  # more than the README has rows for
        more = {**measured, "shape": f"length {length}", "problem": {**measured["problem"], "length": length}}
        report["results"].append(more)
    path = reports.write_report(report, tmp_path / "logs")
    other = {**report["device"], "name": "another device"}
    fewer = {**report, "date": "2999-01-01T00:00:00+00:00", "device": other, "results": [measured]}
    reports.write_report(fewer, tmp_path / "logs")
    layout = BandLayout.spattention(2, 60)
    step = {"problem": dataclasses.replace(problem, direction="decode", length=1, layout=layout).to_json()}
    times = {"median_ms": 1.23456, "needed_gb_s": 1.0, "of_copy": 0.5, "of_dense": None, "error": 1e-6}
    rates = {"tokens_s": 23.456, "of_dense": 4.0, "prefill_tokens_s": 1.0, "cache_bytes": 2**20}
    rates |= {"cache_of_dense": 0.531}
    model = {"layers": 8, "hidden": 64, "vocabulary": 50, "parameters": 11e6}
    for kind, measurement, values in (
        ("decode_benchmarks", step, {"title": "step", "peer": "ours", **times}),
        ("generation_benchmarks", {**step, "model": model, "prompt": 3}, {"title": "bands", **rates}),
    ):
        entries = [values | {"status": "ok", "same_mask": True}]
        entries += [{"title": "absent", "status": "not available", "reason": "none"}]
        result = [{**measurement, "entries": entries}]
        reports.write_report({**report, "copy_gb_s": 9.0, "results": result}, tmp_path / "logs", kind)
    shared = {"peer": "heads", "title": "ours, heads", "direction": "forward", "status": "ok", "reason": ""}
    shared |= {"median_ms": 4.5678, "speed_up": 3.456, "balance": 0.987, "parts": 3}
    shared |= {"received_bytes": [2**20, 2**21], "planned_bytes": [2**20, 2**21]}
    absent = {"title": "no peer", "direction": "forward", "status": "not available", "reason": "none"}
    result = [{**measured, "entries": [shared, {**absent, "median_ms": None}]}]
    on_cuda = {**report, "target": "cuda-sm_90a-nvidia-h100", "results": result}
    reports.write_report(on_cuda, tmp_path / "logs", "rank_benchmarks")
    sizes = training.Sizes(context=64, batch=1, layers=1, heads=2, head_dim=32)
    runs = training.train(sizes, 1e-3, 0, steps=10)
    summary = training.summarize(runs, sizes, 0)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "byte_lm.json").write_text(json.dumps(summary))
    training.plot(summary, tmp_path / "results" / "byte_lm.png")

    update.main()
    names = ("README.md", "docs/performance.md", "docs/index.md")
    text, page, first = ((tmp_path / name).read_text() for name in names)
    for entry in measured["entries"]:
        if entry["median_ms"] is not None:
            assert f"{entry['median_ms']:.4g}" in text and f"| {entry['median_ms']:.4g} |" in page
    table = re.search(r"<!-- measured: benchmark cpu -->(.*?)<!-- end -->", text, re.DOTALL)
    assert table is not None
    rows = [line for line in table[1].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 10 and "| direction |" in rows[0] and "length 66" not in table[1]
    assert "(docs/performance.md)" in table[1]
    assert "2999-01-01" not in text, "a later report of fewer problems on another device is on the page alone"
    assert page.count("\n### ") == 2 * 7 + 2 + 2 and "### length 66, forward + backward" in page
    assert page.count("- cuDNN SDPA, dense causal: not made for cpu") == 2 * (7 + 1)
    assert page.index("### length 66, forward") < page.index("### generate()") < page.index("another device")
    assert f"({Path('..') / path.relative_to(tmp_path)})" in page
    assert str(path.relative_to(tmp_path)) in text
    assert "| **step** | 1.235 | 1 | 50% |  | 1.0e-06 |" in page
    generated = "| **bands** | 23.46 | 4.00 | 1 | 1 | 0.531 |"
    assert generated in page and generated in (tmp_path / "docs/generation.md").read_text()
    assert page.count("| absent | not available |") == 2
    ranks = (tmp_path / "docs/distributed.md").read_text()
    assert "| forward | ours, heads | 4.568 | 3.46 | 2 | 2 | 0.99 | 3 |" in ranks
    assert "| forward | no peer | not available: none |" in ranks
    assert (tmp_path / "docs/ranks-cuda.png").read_bytes()[:4] == b"\x89PNG" and "(ranks-cuda.png)" in ranks
    for model in summary["models"].values():
        assert f"{model['tokens_per_second']:,.0f} | " in first
    assert "(byte_lm.png)" in first
    pictures = re.findall(r"\((docs/[a-z_-]+\.png)\)", text)
    pictures += [f"docs/{name}" for name in re.findall(r"\(([a-z_-]+\.png)\)", page + first)]
    for picture in pictures:
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"

    update.main()
    assert [(tmp_path / name).read_text() for name in names] == [text, page, first], (
        "filling twice is filling once"
    )
