"""The portable forward with split keys: its space, its choice and its machine code. Its results are tested
beside the forward's, in test_mma_forward.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from compiled_kernels import compiled, require_nvcc
from split_calls import (
    check_choice_beside_a_record,
    check_features,
    check_random_problems,
    check_short_calls,
)

from spattn_tvm import BandLayout
from spattn_tvm.bundle import read_manifest
from spattn_tvm.choice import find_schedule
from spattn_tvm.export import export_bundle
from spattn_tvm.families import find_family, find_space, is_made_for
from spattn_tvm.families.family import Sizes
from spattn_tvm.families.mma.abi import HOPPER_HEAD_DIMS, SPLIT_BY_HOPPER
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget, parse_target

PROBLEMS = int(os.environ.get("SPATTN_SWEEP", "100"))
SPACE, WHOLE = find_space("mma_split", "forward"), find_space("mma", "forward")
H100 = parse_target("nvidia/h100")
SHORT = AttentionProblem(
    "forward", "bfloat16", 1, 16, 16, 128, 128, BandLayout.spattention(16, 32768), kv_length=32768
)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_untuned_decisions_are_the_forwards(dtype: str, arch: str) -> None:
    target = MachineTarget("cuda", arch)
    for head_dim in range(32, 257, 16):
        decisions = SPACE.untuned(head_dim, dtype, target, deterministic=True)
        assert SPACE.rejection(decisions, head_dim, dtype, target) is None
        assert SPACE.is_deterministic(decisions)
        assert {**WHOLE.untuned(head_dim, dtype, target), "least_chunks": 2} == decisions


def test_it_knows_what_the_hopper_forward_has_kernels_for() -> None:
    hopper = find_space("hopper", "forward")
    for head_dim in range(32, 257, 16):
        for dtype in ("bfloat16", "float16", "float32"):
            is_there = hopper.unsupported(head_dim, dtype, H100) is None
            assert is_there == (dtype != "float32" and head_dim in HOPPER_HEAD_DIMS)
            short = dataclasses.replace(SHORT, head_dim=head_dim, dtype=dtype)
            is_left = is_there and head_dim in SPLIT_BY_HOPPER
            assert is_made_for("hopper_split", short, H100) == is_left
            assert is_made_for("mma_split", short, H100) != is_left


def test_features_tell_the_shares() -> None:
    check_features("mma_split", SHORT, H100)


def rows(batch: int = 1, queries: int = 128, workers: int = 132) -> int:
    sizes = Sizes(batch, 16, 16, queries, 32768, 128, workers)
    scratch = find_family("mma_split").abis["forward"].scratch
    (all_rows, head_dim), (sums_rows, words) = (item.shape(sizes) for item in scratch)
    assert (head_dim, sums_rows, words) == (sizes.head_dim, all_rows, 4)
    assert all_rows % (sizes.batch * sizes.query_heads * sizes.queries) == 0
    return all_rows // (sizes.batch * sizes.query_heads * sizes.queries)


def test_scratch_grows_with_the_multiprocessors_not_with_the_call() -> None:
    assert rows() == 32  # of a warp's lanes
    assert rows(batch=2) == 16
    assert rows(queries=129) == 16
    assert rows(batch=5) == 6
    assert rows(batch=100) == rows(queries=100_000) == 1
    assert rows(workers=24) == 6


def test_a_record_of_another_family_does_not_keep_it_from_short_calls(tmp_path: Path) -> None:
    short = dataclasses.replace(SHORT, head_dim=192)
    check_choice_beside_a_record("mma_split", "hopper", short, H100, tmp_path)
    assert find_schedule(short, H100, families=["mma"], root=tmp_path).kernel.family == "mma"


@pytest.mark.timeout(120)
def test_the_machine_code_spills_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = parse_target("a100")
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    _, kernels = compiled("mma_split", "forward", 64, SPACE.untuned(64, "bfloat16", target), target)
    assert len(kernels) == 2
    for resources in kernels.values():
        assert resources["spill_store_bytes"] == resources["spill_load_bytes"] == 0


@pytest.mark.timeout(180)
def test_a_bundle_for_short_calls_serves_others_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a100 = parse_target("a100")
    require_nvcc(a100)
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "cache"))
    folder = export_bundle(tmp_path / "bundle", dataclasses.replace(SHORT, head_dim=64), a100)
    kernels = read_manifest(folder)["kernels"]
    assert [kernel["family"] for kernel in kernels] == ["mma_split", "mma"]


@pytest.mark.gpu
@pytest.mark.timeout(120 + PROBLEMS)
@pytest.mark.parametrize(
    "dtype,head_dim,relative",
    [
        (torch.float32, 32, 1e-5),
        (torch.bfloat16, 64, 1.2e-2),
        (torch.bfloat16, 128, 1.2e-2),
        (torch.float16, 96, 2e-3),
    ],
)
def test_random_problems(dtype: torch.dtype, head_dim: int, relative: float) -> None:
    check_random_problems("mma_split", dtype, head_dim, relative, PROBLEMS)


@pytest.mark.gpu
def test_short_calls_take_it_by_themselves_again_and_in_graphs() -> None:
    layout = BandLayout.spattention(16, 8192)
    shapes = ((1, 16, 100, 96), (1, 4, 8192, 96), (1, 4, 8192, 96))
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    check_short_calls("mma_split", "mma", q, k, v, layout)
