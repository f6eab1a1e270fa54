"""The benchmark of sequences that ranks share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from spattn_tvm.bands import BandLayout
from spattn_tvm.bench.ranks import RANK_PEERS, benchmark_ranks, rank_tables
from spattn_tvm.bench.report import write_report
from spattn_tvm.plotting import plot_benchmark
from spattn_tvm.problem import AttentionProblem

PROBLEM = AttentionProblem("forward", "float32", 1, 4, 2, 96, 32, BandLayout.spattention(4))


def test_a_report_holds_what_was_moved_and_is_drawn(tmp_path: Path) -> None:
    report = benchmark_ranks([PROBLEM], 2, shardings=["head_tail"], rounds=1)
    row = 32 * 4
    for result in report["results"]:
        entries = {(entry["peer"], entry["direction"]): entry for entry in result["entries"]}
        assert {peer for peer, _ in entries} == set(RANK_PEERS)
        for (peer, step), entry in entries.items():
            if peer == "ring":
                assert entry["status"] == "not available" and "CPU" in entry["reason"]
                continue
            assert entry["status"] == "ok", entry["reason"]
            assert entry["median_ms"] >= entry["min_ms"] > 0
            assert entry["speed_up"] == entries["one", step]["median_ms"] / entry["median_ms"]
            if peer == "one":
                assert entry["received_bytes"] == entry["sent_bytes"] == [0, 0]
                continue
            assert entry["received_bytes"] == entry["planned_bytes"]
            assert sum(entry["received_bytes"]) == sum(entry["sent_bytes"]) > 0
            assert max(entry["errors"].values()) < 1e-5
        # By hand: K and V of 2 heads, of the 48 rows that the other rank has.
        assert entries["all_gather", "forward"]["received_bytes"] == [2 * 2 * 48 * row] * 2
        # 2 query heads and 2 * 1 key/value heads in, the o of 2 heads back.
        assert entries["heads", "forward"]["received_bytes"] == [(4 + 2) * 48 * row] * 2
    path = write_report(report, tmp_path, "rank_benchmarks")
    assert json.loads(path.read_text()) == report and path.parent.name == "rank_benchmarks"
    assert [table.row_count for table in rank_tables(report)] == [10]
    assert plot_benchmark(path, tmp_path / "ranks.png").stat().st_size > 0


def test_what_can_not_be_timed_is_refused() -> None:
    for message, problems, options in (
        ("unknown peer 'abacus'; known: one, heads", [PROBLEM], {"peers": ["abacus"]}),
        ("unknown sharding 'zigzag'", [PROBLEM], {"shardings": ["zigzag"]}),
        ("unknown step 'backward'", [PROBLEM], {"steps": ["backward"]}),
        ("needs a problem", [], {}),
        ("multiple of twice the 2 ranks, .* got 98", [dataclasses.replace(PROBLEM, length=98)], {}),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark_ranks(problems, 2, **options)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        benchmark_ranks([PROBLEM], 1)
