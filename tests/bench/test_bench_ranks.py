"""The benchmark of sequences that ranks share."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from rank_processes import Ranks, mesh_of
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.bench import ranks as bench_ranks
from spattn_tvm.bench.ranks import RANK_PEERS, benchmark_ranks, rank_tables
from spattn_tvm.bench.report import write_report
from spattn_tvm.distributed import Shards
from spattn_tvm.plotting import plot_benchmark
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.torch_private import send_keys_round

PROBLEM = AttentionProblem("forward", "float32", 1, 4, 2, 96, 32, BandLayout.spattention(4))


def test_a_report_holds_what_was_moved_and_is_drawn(tmp_path: Path) -> None:
    report = benchmark_ranks([PROBLEM], 2, shardings=["head_tail"], rounds=1, parts=2)
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
            assert entry["received_bytes"] == entry["planned_bytes"] and entry["copied_bytes"] == [0, 0]
            assert sum(entry["received_bytes"]) == sum(entry["sent_bytes"]) > 0
            assert max(entry["errors"].values()) < 1e-5
        # A rank has one key/value head under "heads", two travel under "bands".
        assert (entries["heads", "forward"]["parts"], entries["bands", "forward"]["parts"]) == (1, 2)
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


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    scale: Any = None,
) -> tuple[Any, ...]:
    """What PyTorch has on GPUs alone: the operator that its ring calls."""
    scores = (q @ k.transpose(-1, -2)) * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1)
    o = (scores - lse[..., None]).exp() @ v
    none = torch.zeros((), dtype=torch.int64)
    seed = torch.zeros(2, dtype=torch.uint64)
    return o, lse, none, none.clone(), q.shape[2], k.shape[2], seed, seed[0].clone(), torch.empty(0)


def _go_round() -> tuple[float, int, int]:
    """Of the ring's o against one process's: the largest difference; received and sent bytes."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", _flash, "CPU")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 96, 32, generator=generator) for heads in (4, 2, 2))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    whole = sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)

    def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    shards = Shards.head_tail(96, ranks)
    own = [shards.take(tensor, rank, 2).contiguous() for tensor in (q, k, v)]
    assert send_keys_round()
    with (
        patch.object(torch.nn.functional, "scaled_dot_product_attention", scaled_dot_product_attention),
        contextmanager(bench_ranks._round)(mesh_of((ranks,)), PROBLEM) as attend,
        bench_ranks._counter() as counter,
    ):
        o = attend(*own)
    difference = (o - shards.take(whole, rank, 2)).abs().max().item()
    return difference, counter.received, counter.sent


@pytest.mark.parametrize("count", [2, 4])
def test_the_ring_is_right_and_its_bytes_are_counted(count: int) -> None:
    """K and V of all heads go round, from each rank to all others."""
    processes = Ranks(count)
    try:
        moved = (count - 1) * 2 * 4 * (96 // count) * 32 * 4
        for difference, received, sent in processes.call(_go_round):
            assert difference < 1e-5
            assert received == sent == moved
    finally:
        processes.close()
