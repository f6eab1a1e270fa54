"""What the command line does, from Python: values that come back, lines and progress that are told."""

from __future__ import annotations

from pathlib import Path

import pytest

import spattn_tvm
from spattn_tvm import AttentionProblem, BandLayout, benchmark, explain, export_bundle, load_bundle, tune
from spattn_tvm.target import detect_cpu
from spattn_tvm.tuning.search import SearchProgress

PROBLEM = AttentionProblem("forward", "float32", 1, 2, 2, 128, 32, BandLayout.spattention(2))


def test_a_search_gives_values_and_tells_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    seen: list[SearchProgress] = []
    schedules = tmp_path / "schedules"
    tuning = tune(
        PROBLEM,
        trials=2,
        log_root=tmp_path / "logs",
        schedules=schedules,
        verify_problems=2,
        report=lines.append,
        progress=seen.append,
    )
    (result,), (record,) = tuning.results, tuning.records
    assert result.trials == 2 and result.log_dir.is_relative_to(tmp_path / "logs")
    assert record.problem == PROBLEM and record.latency_us > 0
    assert tuning.verification is not None and tuning.verification.passed >= 2
    assert (tuning.failures, tuning.comparisons, tuning.interrupted) == ((), (), False)
    assert lines[0] == f"{PROBLEM.key} on {detect_cpu().folder}, evolutionary"
    assert any(line.startswith("best of 2 trials") for line in lines)
    assert lines[-1].startswith("verified on random problems")
    assert {(step.search, step.total) for step in seen} == {("cpu forward", 2.0)}
    assert [step.done for step in seen] == sorted(step.done for step in seen) and seen[-1].done == 2
    assert seen[-1].best_us == result.latency_us

    monkeypatch.setenv("SPATTN_SCHEDULES", str(schedules))
    spattn_tvm.dispatch.clear_cache()
    explained = explain(PROBLEM)
    spattn_tvm.dispatch.clear_cache()
    assert (explained.status, explained.family) == ("tuned", "cpu")
    assert explained.latency_us == record.latency_us
    assert explained.decisions == dict(record.kernel.decisions)
    assert explained.reason in str(explained)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        tune([])
    with pytest.raises(ValueError, match="either trials or minutes"):
        tune(PROBLEM, trials=3, minutes=1.0)
    with pytest.raises(ValueError, match="a search must run on its target"):
        tune(PROBLEM, "aarch64" if detect_cpu().arch != "aarch64" else "x86-64-v3")
    decode = AttentionProblem("decode", "float32", 1, 2, 2, 1, 32, BandLayout.causal(2), 64)
    with pytest.raises(ValueError, match="decoding are benchmarked alone"):
        benchmark([PROBLEM, decode])


def test_what_no_family_serves_is_explained_by_the_reference() -> None:
    odd = AttentionProblem("forward", "float32", 1, 2, 2, 64, 40, BandLayout.causal(2))
    explained = explain(odd, "nvidia/h200")
    assert (explained.family, explained.status, explained.decisions) == ("reference", "reference", {})
    assert explained.latency_us is None and explained.reason in str(explained)


def test_a_bundle_is_written_and_told_of(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = export_bundle(tmp_path / "bundle", PROBLEM, "cpu", report=lines.append)
    bundle = load_bundle(folder, register=False)
    assert [entry.problem for entry in bundle.kernels] == [PROBLEM]
    assert lines == [f"{detect_cpu().folder}, {PROBLEM.key}: cpu"]


def test_a_benchmark_is_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    report = benchmark(PROBLEM, steps=["forward"], peers=["ours"], rounds=2, idle_ms=0.0, report=lines.append)
    (entry,) = report["results"][0]["entries"]
    assert (entry["peer"], entry["direction"], entry["status"]) == ("ours", "forward", "ok")
    assert entry["median_ms"] > 0 and lines
    decode = AttentionProblem("decode", "float32", 1, 2, 2, 1, 32, BandLayout.causal(2), 64)
    (step,) = benchmark(decode, peers=["ours"], rounds=2, idle_ms=0.0)["results"]
    assert step["entries"][0]["median_ms"] > 0
    assert capsys.readouterr().out == ""
