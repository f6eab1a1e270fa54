"""The benchmark of steps of decoding."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from spattn_tvm.bands import BandLayout
from spattn_tvm.bench import decode
from spattn_tvm.bench.decode import benchmark_decode, decode_table
from spattn_tvm.bench.report import write_report
from spattn_tvm.problem import AttentionProblem

PROBLEM = AttentionProblem("decode", "float32", 2, 4, 2, 3, 32, BandLayout.spattention(4, 300), 300)


def test_a_report_holds_what_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode._COPY_BYTES, "cpu", 2**16)
    grouped = dataclasses.replace(PROBLEM, length=1, kv_heads=4, layout=BandLayout.exclusive(4, 300))
    report = benchmark_decode([PROBLEM, grouped], rounds=2, idle_ms=0.0, threads=1)
    assert report["threads"] == 1
    for result, problem in zip(report["results"], (PROBLEM, grouped), strict=True):
        assert result["needed_bytes"] == problem.min_bytes
        ours, dense = result["entries"]
        assert (ours["status"], dense["status"], dense["of_dense"]) == ("ok", "ok", 1.0)
        assert ours["of_dense"] == ours["median_ms"] / dense["median_ms"]
        assert ours["needed_gb_s"] == pytest.approx(problem.min_bytes / ours["median_ms"] * 1e-6)
        assert ours["of_copy"] == pytest.approx(ours["needed_gb_s"] / report["copy_gb_s"])
    path = write_report(report, tmp_path, "decode_benchmarks")
    assert json.loads(path.read_text()) == report and path.parent.name == "decode_benchmarks"
    assert decode_table(report).row_count == 4


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode._COPY_BYTES, "cpu", 2**16)
    wrong = dataclasses.replace(
        decode.STEP_PEERS["ours"], prepare=lambda inputs: lambda: torch.zeros_like(inputs.q)
    )
    monkeypatch.setattr(decode, "STEP_PEERS", {**decode.STEP_PEERS, "ours": wrong})
    report = benchmark_decode([PROBLEM], peers=["ours", "cudnn"], rounds=1, idle_ms=0.0)
    ours, other = report["results"][0]["entries"]
    assert ours["status"] == "wrong" and "median_ms" not in ours
    assert other["status"] == "not available" and "not made for cpu" in other["reason"]
    assert decode_table(report).row_count == 2


def test_what_can_not_be_timed_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown peer 'abacus'"):
        benchmark_decode([PROBLEM], peers=["abacus"])
    for problems in ([], [dataclasses.replace(PROBLEM, direction="forward")]):
        with pytest.raises(ValueError, match="of the direction decode"):
            benchmark_decode(problems)
