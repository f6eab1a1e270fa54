"""Decision space of the Hopper forward: tile shape, rings, overlap, registers and the order of tiles.

The kernel's own file says which combinations fit, deadlock or compile to wrong code; nothing of that is
repeated here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from spattn_tvm.families.hopper import forward_sizes as sizes
from spattn_tvm.families.space import MULTIPROCESSORS, Decisions, Space, one_structure

from .support import unsupported

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

HEAD_DIMS = (64, 128, 192)


def _choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    return {
        "consumer_warpgroups": (2, 3, 4),
        "key_rows": (64, 80, 96, 128),
        # Powers of two: the position in a ring is taken modulo its depth at every chunk.
        "stages": (2, 4, 8),
        "overlap": (0, 1),
        "weight_parts": (1, 2, 4),
        "queries_in_registers": (0, 1),
        "rescale_threshold": (0, 8),
        "head_group": (1, 4, 8, 16, 64),
        # What two, three and four warpgroups can have, and a little less, which goes to the loader.
        "consumer_registers": (112, 152, 160, 232, 240),
        "dynamic": (0, 1),
        "claim_lead": (0, 2, 4),
    }


def _illegal(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    return sizes.conflict(decisions, head_dim)


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """Sizes on a logarithmic scale, work executed and keys loaded against useful work, shared memory,
    registers, and the tiles that each multiprocessor gets.
    """
    layout, length, head_dim = problem.layout, problem.length, problem.head_dim
    useful = max(1, layout.pairs(length))
    rows = sizes.WARPGROUP_ROWS * decisions["consumer_warpgroups"]
    executed = layout.executed_pairs(length, sizes.WARPGROUP_ROWS, decisions["key_rows"])
    loaded = layout.executed_pairs(length, rows, decisions["key_rows"])
    tiles = problem.batch * problem.query_heads * math.ceil(length / rows)
    needed = sizes.consumer_registers_needed(decisions, head_dim)
    return [
        *(math.log2(max(value, 0.5)) for _, value in sorted(decisions.items())),
        executed / useful,
        loaded / rows / useful * sizes.WARPGROUP_ROWS,
        executed / sizes.WARPGROUP_ROWS / decisions["key_rows"] / max(1, tiles),
        math.log2(max(1, tiles) / MULTIPROCESSORS),
        sizes.shared_bytes(decisions, head_dim) / sizes.SHARED_BYTES_MOST,
        needed / decisions["consumer_registers"],
    ]


def _untuned(head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False) -> dict[str, int]:
    """The fastest that were measured, for bands of any width (the tables are in the kernel's file); at head
    dim 192, which fills the registers of two warpgroups, what fits.
    """
    decisions = {
        "consumer_warpgroups": 3,
        "key_rows": 64,
        "stages": 4,
        "overlap": 1,
        "weight_parts": 1,
        "queries_in_registers": 0,
        "rescale_threshold": 8,
        "head_group": 8,
        "consumer_registers": 160,
        "dynamic": 1,
        "claim_lead": 2,
    }
    if head_dim == 64:
        decisions |= {"consumer_warpgroups": 4, "stages": 8, "consumer_registers": 112}
    if head_dim == 192:
        decisions |= {
            "consumer_warpgroups": 2,
            "stages": 2,
            "overlap": 0,
            "queries_in_registers": 1,
            "consumer_registers": 232,
        }
    return decisions


def _build(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    from .forward import build_hopper_forward

    return build_hopper_forward(decisions, head_dim, dtype)


FORWARD = Space(
    family="hopper",
    direction="forward",
    structures=one_structure(_choices),
    illegal=_illegal,
    features=_features,
    untuned=_untuned,
    build=_build,
    unsupported=partial(unsupported, HEAD_DIMS),
)
