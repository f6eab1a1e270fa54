"""Decision space of the portable forward with split keys: the forward's, and how short shares may be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from spattn_tvm.families.shares import MOST_SHARES
from spattn_tvm.families.space import MULTIPROCESSORS, Decisions, Space, one_structure

from .abi import query_tiles
from .forward_space import FORWARD as WHOLE
from .support import unsupported

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget


def _choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    return {**WHOLE.structures(head_dim, dtype)[""], "least_chunks": (1, 2, 4, 8)}


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """The forward's; shares of a tile, and chunks of a share."""
    tiles = query_tiles(problem.batch, problem.query_heads, problem.length)
    places = MULTIPROCESSORS * decisions["blocks_per_multiprocessor"]
    chunks = max(1.0, (problem.mean_keys + problem.length) / decisions["key_rows"])
    splits = max(1.0, min(places // tiles, MOST_SHARES, chunks / decisions["least_chunks"]))
    return [*WHOLE.features(decisions, problem), math.log2(splits), math.log2(max(1.0, chunks / splits))]


def _untuned(head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False) -> dict[str, int]:
    """The forward's, and shares of two chunks. The kernel is deterministic."""
    return {**WHOLE.untuned(head_dim, dtype, target, deterministic), "least_chunks": 2}


def _build(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    from .split import build_mma_split

    return build_mma_split(decisions, head_dim, dtype, target.arch)


FORWARD = Space(
    family="mma_split",
    direction="forward",
    structures=one_structure(_choices),
    illegal=WHOLE.illegal,
    features=_features,
    untuned=_untuned,
    build=_build,
    unsupported=unsupported,
)
