"""The benchmark of whole generate() calls."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from spattn_tvm.bands import BandLayout
from spattn_tvm.bench import generation
from spattn_tvm.bench.generation import (
    GENERATION_PEERS,
    ModelSizes,
    benchmark_generation,
    generation_tables,
)
from spattn_tvm.bench.report import write_report
from spattn_tvm.problem import AttentionProblem

PROBLEM = AttentionProblem("decode", "float32", 2, 4, 2, 1, 32, BandLayout.spattention(4, 128), 128)
SIZES = ModelSizes(layers=2, vocabulary=50)


def _measured(**settings: Any) -> dict[str, Any]:
    settings = {"tokens": 3, "rounds": 2, "idle_ms": 0.0, "threads": 1} | settings
    return benchmark_generation([PROBLEM], SIZES, **settings)


def test_a_report_holds_what_the_table_says(tmp_path: Path) -> None:
    report = _measured()
    (result,) = report["results"]
    assert result["prompt"] == 128 - 1 - 3 * 3
    assert [entry["peer"] for entry in result["entries"]] == list(GENERATION_PEERS)
    entries = {entry["peer"]: entry for entry in result["entries"]}
    best_dense = min(entries[name]["token_ms"] for name in ("dense", "dense_static"))
    for entry in entries.values():
        assert entry["status"] == "ok" and entry["error"] < 1e-5
        assert entry["tokens_s"] == pytest.approx(2 / entry["token_ms"] * 1e3)
        assert entry["of_dense"] == pytest.approx(best_dense / entry["token_ms"])
        assert entry["prefill_tokens_s"] == pytest.approx(2 * result["prompt"] / entry["prefill_ms"] * 1e3)
    # K and V of 2 layers, 2 rows and 2 heads of 32 float32 columns.
    row = 2 * 2 * 2 * 2 * 32 * 4
    # A dynamic cache has no row for the token that came last.
    assert [entries[name]["cache_bytes"] // row for name in ("static", "dense")] == [128, 127]
    # The heads of a group reach 64 and 128 back, and 15 tokens of slack.
    rings = (min(128, 64 + 15) + 128 + 15 + 1) * row / 2
    assert entries["banded"]["cache_bytes"] == entries["banded_static"]["cache_bytes"] == rings
    assert entries["banded"]["cache_of_dense"] == pytest.approx(rings / (128 * row))
    path = write_report(report, tmp_path, "generation_benchmarks")
    assert json.loads(path.read_text()) == report and path.parent.name == "generation_benchmarks"
    assert [table.row_count for table in generation_tables(report)] == [6]


def test_what_is_wrong_or_fails_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache = generation._make_cache

    def forgetful(model: Any, problem: AttentionProblem, peer: generation.GenerationPeer) -> Any:
        if peer.kind == "paged":
            raise RuntimeError("no pages today")
        cache = make_cache(model, problem, peer)
        if peer.kind == "banded":
            update = cache.layers[0].update
            cache.layers[0].update = lambda k, *others, **named: update(k * 1.5, *others, **named)
        return cache

    monkeypatch.setattr(generation, "_make_cache", forgetful)
    report = _measured(peers=["banded", "paged", "static"], rounds=1)
    wrong, failed, right = report["results"][0]["entries"]
    assert wrong["status"] == "wrong" and "tokens_s" not in wrong
    assert failed["status"] == "not available" and "no pages today" in failed["reason"]
    assert right["status"] == "ok" and right["of_dense"] is None
    assert generation_tables(report)[0].row_count == 3


def test_what_can_not_be_timed_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown peer 'abacus'"):
        _measured(peers=["abacus"])
    with pytest.raises(ValueError, match="3 calls of 40 tokens need a context of 163, got 128"):
        _measured(tokens=40, rounds=3)
    with pytest.raises(ValueError, match="tokens and rounds must be at least 1"):
        _measured(tokens=0)
    for problems in ([], [dataclasses.replace(PROBLEM, length=2)]):
        with pytest.raises(ValueError, match="of the direction decode with one query"):
            benchmark_generation(problems)
    with pytest.raises(ValueError, match="layers must be at least 1"):
        ModelSizes(layers=0)
