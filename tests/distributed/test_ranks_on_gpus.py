"""Attention over NCCL ranks, each with a GPU of its own: results, bytes and the benchmark."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from rank_problems import Problem, compare_problems, draw_problem
from rank_processes import Ranks

from spattn_tvm.bands import BandLayout
from spattn_tvm.bench.ranks import benchmark_ranks
from spattn_tvm.distributed.peer_copies import bytes_copied
from spattn_tvm.problem import AttentionProblem

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module", params=[ranks for ranks in (2, 3, 4) if ranks <= GPUS])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks(request.param, backend="nccl")
    yield processes
    processes.close()


def compare_sent_by(way: str, problems: Sequence[Problem]) -> tuple[int, int]:
    """Bytes that copy engines received and sent meanwhile."""
    before = bytes_copied()
    # Packed: below the threshold of CUDA, which none of these rows reach.
    own_message_bytes = 1 if way == "messages" else None
    with patch.dict(os.environ, {} if way == "copies" else {"SPATTN_PEER_COPIES": "0"}):
        compare_problems(problems, own_message_bytes, 2e-2, torch.bfloat16, "cuda")
    received, sent = (after - earlier for after, earlier in zip(bytes_copied(), before, strict=True))
    return received, sent


@pytest.mark.parametrize("way", ["copies", "messages", "packed"])
@pytest.mark.parametrize("strategy", ["heads", "bands"])
def test_random_problems_equal_one_process(ranks: Ranks, strategy: str, way: str) -> None:
    count = int(os.environ.get("SPATTN_SWEEP", 40))
    problems = [
        replace(draw_problem(2000 + seed, ranks.ranks, [strategy]), head_dim=128, impl="auto")
        for seed in range(count)
    ]
    moved = ranks.call(compare_sent_by, way, problems)
    assert all((min(each) > 0) == (way == "copies") for each in moved)


@pytest.mark.parametrize("sharding", ["contiguous", "head_tail"])
def test_long_sequences_move_what_the_plan_says(sharding: str) -> None:
    """As counted on the operators of NCCL; the ring is right as well."""
    problem = AttentionProblem("forward", "bfloat16", 1, 16, 4, 16384, 128, BandLayout.spattention(16, 16384))
    report = benchmark_ranks([problem], min(GPUS, 4), shardings=[sharding], device="cuda", rounds=1)
    for entry in report["results"][0]["entries"]:
        assert entry["status"] == "ok", entry["reason"]
        if "planned_bytes" in entry:
            assert entry["received_bytes"] == entry["planned_bytes"]
        if entry["peer"] in ("heads", "bands"):
            assert entry["copied_bytes"] == entry["received_bytes"]
        if entry["peer"] == "ring":
            assert min(entry["received_bytes"]) > 0
