"""The Hopper forward with split keys: its space, its choice, its shares and its machine code. More of its
results is tested beside the forward's, in test_hopper_forward.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from compiled_kernels import compiled
from split_calls import (
    check_choice_beside_a_record,
    check_features,
    check_random_problems,
    check_short_calls,
)

from spattn_tvm import BandLayout
from spattn_tvm.families import find_family, find_space
from spattn_tvm.families.family import Sizes
from spattn_tvm.families.hopper.abi import MORE_KEYS, split_shares
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.families.shares import MOST_SHARES
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import parse_target

PROBLEMS = int(os.environ.get("SPATTN_SWEEP", "100"))
SPACE = find_space("hopper_split", "forward")
H100 = parse_target("nvidia/h100")
SHORT = AttentionProblem(
    "forward", "bfloat16", 1, 16, 16, 512, 128, BandLayout.spattention(16, 32768), kv_length=32768
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_the_untuned_decisions_are_legal(head_dim: int, dtype: str) -> None:
    decisions = SPACE.untuned(head_dim, dtype, H100, deterministic=True)
    assert SPACE.rejection(decisions, head_dim, dtype, H100) is None
    assert SPACE.is_deterministic(decisions)
    assert set(decisions) == set(SPACE.structures(head_dim, dtype)[""])


def test_what_it_has_no_kernels_for_is_refused_with_a_reason() -> None:
    decisions = SPACE.untuned(64, "bfloat16", H100)
    assert "head dim 96 is not among" in str(SPACE.rejection(decisions, 96, "bfloat16", H100))
    assert "dtype float32 is not among" in str(SPACE.rejection(decisions, 64, "float32", H100))
    assert "sm_90a" in str(SPACE.rejection(decisions, 64, "bfloat16", parse_target("a100")))
    # Tiles of other sizes than shares are counted for.
    assert "consumer_warpgroups=3" in str(
        SPACE.rejection({**decisions, "consumer_warpgroups": 3}, 64, "bfloat16", H100)
    )
    # Records may name anything.
    other = KernelSpec("hopper_split", "forward", "bfloat16", 96, decisions)
    assert other.space.without_idle(decisions, 96, "bfloat16") == decisions


def test_features_tell_the_shares() -> None:
    check_features("hopper_split", SHORT, H100)


def test_shares_fill_the_multiprocessors() -> None:
    """In the fewest and shortest rounds: no number of shares keeps them busier without shorter shares."""
    assert [split_shares(tiles, 132) for tiles in (1, 8, 16, 32, 64, 66)] == [32, 16, 8, 4, 2, 2]
    assert [split_shares(tiles, 132) for tiles in (130, 132, 1000)] == [1, 1, 1]
    # Measured with 48 tiles of 4096 keys: 48.6 us, and 49.0 with 5.
    assert split_shares(48, 132) == 2
    for tiles in range(1, 200):
        shares = split_shares(tiles, 132)
        assert 1 <= shares <= MOST_SHARES
        # Rounds, in times of a tile.
        assert -(-tiles * shares // 132) / shares <= -(-tiles // 132)


def scratch(**changes: int) -> tuple[int, int]:
    """Rows of the partial outputs and sums for each query row, 0 where there is one share, and for all."""
    sizes = Sizes(1, 16, 4, 512, 32768, 128, 132)._replace(**changes)
    abi = find_family("hopper_split").abis["forward"]
    shapes = {item.name: item.shape(sizes) for item in abi.scratch}
    rows = shapes["partial_o"][0]
    assert shapes["partial_o"] == (rows, sizes.head_dim) and shapes["partial_sums"] == (rows, 4)
    return rows // (sizes.batch * sizes.query_heads * sizes.queries), rows


def test_scratch_is_the_shares_and_next_to_nothing_for_one() -> None:
    assert scratch()[0] == split_shares(48, 132) == 2
    assert scratch(head_dim=64)[0] == split_shares(64, 132) == 2
    assert scratch(batch=2, queries=100)[0] == split_shares(32, 132) == 4
    assert scratch(batch=9) == scratch(queries=100_000) == (0, 1)
    assert scratch(queries=1, query_heads=1, kv_heads=1)[0] == MOST_SHARES
    assert scratch(workers=24, query_heads=2, kv_heads=2)[0] == split_shares(6, 24) == 4


def test_a_record_of_another_family_does_not_keep_it_from_short_calls(tmp_path: Path) -> None:
    check_choice_beside_a_record("hopper_split", "hopper", SHORT, H100, tmp_path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("head_dim", MORE_KEYS)
def test_the_machine_code_spills_nothing(
    head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    decisions = SPACE.untuned(head_dim, "bfloat16", H100)
    library, kernels = compiled("hopper_split", "forward", head_dim, decisions, H100)
    # Such as that wgmma is serialized.
    assert json.loads(library.with_suffix(".json").read_text())["resources"]["warnings"] == []
    assert len(kernels) == 2
    for resources in kernels.values():
        assert resources["spill_store_bytes"] == resources["spill_load_bytes"] == 0


def skip_unless_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of sm_90")


@pytest.mark.gpu
@pytest.mark.timeout(120 + PROBLEMS)
@pytest.mark.parametrize(
    "dtype,head_dim,relative",
    [
        (torch.bfloat16, 64, 1.2e-2),
        (torch.bfloat16, 128, 1.2e-2),
        (torch.float16, 128, 2e-3),
        (torch.bfloat16, 192, 1.2e-2),
    ],
)
def test_random_problems(dtype: torch.dtype, head_dim: int, relative: float) -> None:
    skip_unless_hopper()
    check_random_problems("hopper_split", dtype, head_dim, relative, PROBLEMS)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim,queries", [(128, 500), (64, 500), (64, 100)])
def test_short_calls_take_it_by_themselves_again_and_in_graphs(head_dim: int, queries: int) -> None:
    skip_unless_hopper()
    layout = BandLayout.spattention(16, 16384)
    shapes = ((1, 16, queries, head_dim), (1, 4, 16384, head_dim), (1, 4, 16384, head_dim))
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    check_short_calls("hopper_split", "hopper", q, k, v, layout)
