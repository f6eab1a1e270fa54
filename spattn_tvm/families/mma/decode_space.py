"""Decision space of the portable decode: how many bytes are on their way, and over how many blocks.

The kernel's sizes say which combinations a chip has the shared memory and the registers for; nothing of that
is repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spattn_tvm.families.mma import decode_sizes as sizes
from spattn_tvm.families.mma.abi import DECODE_ROWS
from spattn_tvm.families.space import MULTIPROCESSORS, Decisions, Space, one_structure
from spattn_tvm.problem import keys_read

from .support import unsupported

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

# In flight on a multiprocessor. An H100 reached 98 % of its copy bandwidth with as many, and no more with 1.5
# or 2.5 times as many (bfloat16, head dim 128).
ENOUGH_BYTES = 64 * 1024


def _choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    return {
        "warps": (1, 2, 4, 8),
        "key_rows": (16, 32, 64),
        "stages": (2, 3, 4, 6),
        "blocks_per_multiprocessor": (1, 2, 3, 4),
        "waves": (1, 2, 4),
        "least_tiles": (1, 2, 4, 8),
        "queries_in_registers": (0,) if dtype == "float32" else (0, 1),
    }


def _illegal(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    return sizes.conflict(decisions, head_dim, dtype, target.arch)


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """Sizes on a logarithmic scale, bytes in flight on a multiprocessor, blocks for each place that the chip
    has for one, tiles of a warp, shared memory and registers.
    """
    head_dim, dtype = problem.head_dim, problem.dtype
    rows = problem.query_heads // problem.kv_heads * problem.length
    items = problem.batch * problem.kv_heads * math.ceil(rows / DECODE_ROWS)
    places = MULTIPROCESSORS * decisions["blocks_per_multiprocessor"]
    keys = keys_read(problem.layout, problem.kv_heads, problem.length, problem.keys) / problem.kv_heads
    tiles = max(1.0, keys / decisions["key_rows"])
    most = max(1, math.ceil(tiles / (decisions["warps"] * decisions["least_tiles"])))
    splits = min(max(1, places * decisions["waves"] // items), most)
    return [
        *(math.log2(max(value, 0.5)) for _, value in sorted(decisions.items())),
        math.log2(sizes.flying_bytes(decisions, head_dim, dtype) / 32768),
        math.log2(items * splits / places),
        math.log2(splits),
        math.log2(tiles / splits / decisions["warps"]),
        sizes.shared_bytes(decisions, head_dim, dtype) / 1024 / 100,
        sizes.registers_needed(decisions, head_dim, dtype) / 100,
    ]


def _candidates(head_dim: int, dtype: str) -> Iterator[dict[str, int]]:
    for blocks in (2, 1):
        for warps in (4, 2, 1):
            for keys, stages in ((16, 2), (16, 3), (32, 2), (32, 3)):
                yield {
                    "warps": warps,
                    "key_rows": keys,
                    "stages": stages,
                    "blocks_per_multiprocessor": blocks,
                    "waves": 1,
                    "least_tiles": 1,
                    "queries_in_registers": int(dtype != "float32" and head_dim <= 192),
                }


def _untuned(head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False) -> dict[str, int]:
    """The first candidate with enough bytes in flight that the chip has memory and registers for, or the one
    with the most of them. The kernel is deterministic.
    """
    legal = [d for d in _candidates(head_dim, dtype) if _illegal(d, head_dim, dtype, target) is None]
    flying = [sizes.flying_bytes(decisions, head_dim, dtype) for decisions in legal]
    enough = (decisions for decisions, size in zip(legal, flying, strict=True) if size >= ENOUGH_BYTES)
    return next(enough, None) or legal[flying.index(max(flying))]


def _build(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    from spattn_tvm.families.mma.decode import build_mma_decode

    return build_mma_decode(decisions, head_dim, dtype, target.arch)


DECODE = Space(
    family="mma",
    direction="decode",
    structures=one_structure(_choices),
    illegal=_illegal,
    features=_features,
    untuned=_untuned,
    build=_build,
    unsupported=unsupported,
)
