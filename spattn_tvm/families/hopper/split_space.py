"""Decision space of the Hopper forward with split keys: the forward's, and how short shares may be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from spattn_tvm.families.hopper.abi import split_rows, split_shares, split_tiles
from spattn_tvm.families.space import MULTIPROCESSORS, Decisions, Space, one_structure

from .forward_space import FORWARD as WHOLE
from .support import WARPGROUP_ROWS

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget


def _choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    """The tiles are those that shares are counted for."""
    return {
        **WHOLE.structures(head_dim, dtype)[""],
        "consumer_warpgroups": (split_rows(head_dim) // WARPGROUP_ROWS,),
        "least_chunks": (1, 2, 4, 8),
    }


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """The forward's; shares of a tile, and chunks of a share."""
    tiles = split_tiles(problem.batch, problem.query_heads, problem.length, problem.head_dim)
    chunks = max(1.0, (problem.mean_keys + split_rows(problem.head_dim)) / decisions["key_rows"])
    shares = max(1.0, min(split_shares(tiles, MULTIPROCESSORS), chunks / decisions["least_chunks"]))
    return [*WHOLE.features(decisions, problem), math.log2(shares), math.log2(max(1.0, chunks / shares))]


def _untuned(head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False) -> dict[str, int]:
    """The forward's, and shares of any length; at head dim 64 smaller tiles, with larger chunks. The kernel
    is deterministic.
    """
    decisions = {**WHOLE.untuned(head_dim, dtype, target, deterministic), "least_chunks": 1}
    if head_dim == 64:
        decisions |= {
            "consumer_warpgroups": 2,
            "key_rows": 128,
            "stages": 4,
            "queries_in_registers": 1,
            "consumer_registers": 232,
        }
    return decisions


def _build(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    from .split import build_hopper_split

    return build_hopper_split(decisions, head_dim, dtype)


FORWARD = Space(
    family="hopper_split",
    direction="forward",
    structures=one_structure(_choices),
    illegal=WHOLE.illegal,
    features=_features,
    untuned=_untuned,
    build=_build,
    unsupported=WHOLE.unsupported,
)
