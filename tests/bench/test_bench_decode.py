"""The benchmark of steps of decoding."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from spattn_tvm.bands import BandLayout
from spattn_tvm.bench import decode
from spattn_tvm.bench.decode import benchmark_decode, decode_table
from spattn_tvm.bench.report import write_report
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import reference_decode

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


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
def test_a_wrong_result_is_not_timed(
    place: tuple[int, int], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only what lies farthest in memory is wrong."""
    monkeypatch.setitem(decode._COPY_BYTES, "cpu", 2**16)
    peer = decode.STEP_PEERS["ours"]

    def prepare(inputs: Any) -> Any:
        o = peer.prepare(inputs)()
        o[place] = value
        return lambda: o

    wrong = dataclasses.replace(peer, prepare=prepare)
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


class _Cache(NamedTuple):
    """As much of the inputs as tells how far a kernel has to reach."""

    problem: AttentionProblem
    k: torch.Tensor


@pytest.mark.parametrize(("batch", "heads", "keys", "calls"), [
    (32, 32, 32768, 2), (16, 32, 32768, 1), (17, 32, 32768, 2), (1, 16, 131072, 1), (3, 64, 262144, 3),
])  # fmt: skip
def test_a_peer_with_offsets_of_32_bits_reaches_its_part_of_the_batch(
    batch: int, heads: int, keys: int, calls: int
) -> None:
    layout = BandLayout.spattention(heads, keys)
    problem = AttentionProblem("decode", "bfloat16", batch, heads, heads, 1, 128, layout, keys)
    inputs = _Cache(problem, torch.empty(batch, heads, keys, 128, dtype=torch.bfloat16, device="meta"))
    assert decode.STEP_PEERS["fsa"].calls(inputs) == calls  # type: ignore[arg-type]
    for part in inputs.k.chunk(calls):
        assert (part.shape[0] - 1) * part.stride(0) < 2**31


def test_a_step_in_several_calls_is_the_step_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's function stood in for by ours, which takes the whole batch as well."""
    layout = BandLayout.spattention(4, 300)
    problem = AttentionProblem("decode", "float32", 5, 4, 4, 1, 32, layout, 300)
    sizes = []

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> torch.Tensor:
        sizes.append(q.shape[0])
        assert settings["window_sizes"].tolist() == [
            [0, 0, 0, 76], [0, 0, 0, 150], [0, 75, 74, 76], [0, 75, 149, 76],
        ]  # fmt: skip
        lengths = torch.full((q.shape[0],), 300, dtype=torch.int32)
        heads = (t.transpose(1, 2) for t in (k, v))
        return reference_decode(q[:, :, None], *heads, layout, cache_lengths=lengths)[0][:, :, 0]

    module = types.ModuleType("flash_sparse_attn")
    module.flash_dense_attn_with_kvcache_func = step  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("flash_sparse_attn", None)
    monkeypatch.setitem(sys.modules, "flash_sparse_attn", module)
    for name in ("triton_kernels", "triton_kernels.matmul_ogs", "triton_kernels.numerics"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(decode, "_REACH", 2 * 4 * 300 * 32)
    inputs = decode._Inputs.random(problem, torch.device("cpu"), 0)
    assert decode._error(inputs, decode.STEP_PEERS["fsa"], decode.STEP_PEERS["fsa"].prepare(inputs)()) < 1e-5
    assert sizes == [3, 2]


def test_a_peer_that_loses_the_device_ends_no_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode._COPY_BYTES, "cpu", 2**16)
    lost = False

    def lose(inputs: Any) -> Any:
        nonlocal lost
        lost = True
        raise RuntimeError("an illegal memory access")

    loses = dataclasses.replace(decode.STEP_PEERS["sdpa"], prepare=lose)
    monkeypatch.setattr(decode, "STEP_PEERS", {**decode.STEP_PEERS, "sdpa": loses})
    monkeypatch.setattr(decode, "_is_lost", lambda place: lost)
    report = benchmark_decode([PROBLEM, PROBLEM], peers=["ours", "sdpa"], rounds=1, idle_ms=0.0)
    entries = [entry for result in report["results"] for entry in result["entries"]]
    assert [entry["status"] for entry in entries] == ["not available"] * 4
    assert "an illegal memory access" in entries[1]["reason"]
    assert all("leave that peer out" in entries[index]["reason"] for index in (0, 2, 3))
    assert decode_table(report).row_count == 4
