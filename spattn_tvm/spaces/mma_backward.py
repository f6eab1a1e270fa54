"""Decision space of the portable tensor-core backward: its structure, and the shapes and order of its passes.

The dQ pass and the dK/dV pass share no decision, so each has a prefix of its own. With ``one_pass`` there is no dQ
pass, and the ``dq_`` decisions say nothing; they stay, so that every point of the space has the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from spattn_tvm.kernels import mma_backward as kernel
from spattn_tvm.kernels import mma_tile
from spattn_tvm.spaces import Decisions, Space

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = range(32, 257, 16)
MULTIPROCESSORS = 132  # only the scale of a feature hangs on it


def _unsupported(head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    if target.kind != "cuda":
        return f"the mma family needs an NVIDIA GPU, not {target.folder}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not among {', '.join(DTYPES)}"
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is not a multiple of 16 from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
    return None


def _choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    columns, rows, stages = (16, 32, 64), (16, 32), (1, 2, 3)
    heads, blocks = (1, 4, 8, 16, 64), (1, 2, 3, 4)
    return {
        "one_pass": (0, 1),
        "atomic_floats": (1, 2),
        "dq_warps": (1, 2, 4, 8),
        "dq_rows": rows,
        "dq_strip": columns,
        "dq_chunk": (16, 32, 64, 128),
        "dq_stages": stages,
        "dq_hold": (0, 1) if dtype != "float32" else (0,),
        "dq_heads": heads,
        "dq_blocks": blocks,
        "dkv_warps": (1, 2, 4, 8),
        "dkv_split": (1, 2, 4),
        "dkv_exchange": (0, 1),
        "dkv_rows": rows,
        "dkv_strip": columns,
        "dkv_chunk": (16, 32, 64, 128),
        "dkv_stages": stages,
        "dkv_heads": heads,
        "dkv_blocks": blocks,
    }


def _illegal(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    return kernel.conflict(decisions, head_dim, dtype, target.arch)


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """Sizes on a logarithmic scale; of each pass the work executed against useful work, bytes read from shared memory
    for a product, shared memory, registers, and the tiles that each multiprocessor gets.
    """
    layout, length = problem.layout, problem.length
    useful = max(1, layout.pairs(length))
    features = [math.log2(value) if value else -1.0 for _, value in sorted(decisions.items())]
    for part in kernel.passes(decisions, problem.head_dim, problem.dtype):
        # By symmetry the queries of a key tile are counted like the keys of a query tile.
        features.append(layout.executed_pairs(length, part.rows, part.strip) / useful)
        features.append(layout.executed_pairs(length, part.tile, part.chunk) / useful)
        features.append(1 / part.rows + 1 / (part.strip if part.exchange else part.chunk))
        features.append(part.shared_bytes / 2**16)
        features.append(part.registers / 256)
        tiles = problem.batch * (problem.kv_heads if part.keys else problem.query_heads)
        features.append(math.log2(tiles * math.ceil(length / part.tile) / MULTIPROCESSORS / part.blocks))
    return features


def _candidates(head_dim: int, dtype: str, one_pass: int) -> Iterator[dict[str, int]]:
    """Decisions in order of preference; what a chip has no room for is passed over."""
    newest = (2, 1)
    for atomic_floats, stages, rows in product(newest, (2, 1), (32, 16)):
        for warps, split, exchange, chunk in (
            (4, 1, 0, 64),
            (4, 2, 1, 64),
            (4, 2, 1, 32),
            (2, 2, 1, 32),
            (4, 1, 0, 32),
            (2, 2, 0, 16),
            (2, 4, 0, 16),
            (1, 4, 0, 16),
        ):
            strip = chunk // split if exchange else min(chunk, 32)
            for hold, dq_chunk, dq_warps, blocks in product((1, 0), (64, 32, 16), (4, 2), (2, 1)):
                yield {
                    "one_pass": one_pass,
                    "atomic_floats": atomic_floats,
                    "dq_warps": dq_warps,
                    "dq_rows": 16,
                    "dq_strip": min(dq_chunk, 32),
                    "dq_chunk": dq_chunk,
                    "dq_stages": stages,
                    "dq_hold": hold if dtype != "float32" else 0,
                    "dq_heads": 8,
                    "dq_blocks": blocks,
                    "dkv_warps": warps,
                    "dkv_split": split,
                    "dkv_exchange": exchange,
                    "dkv_rows": rows,
                    "dkv_strip": strip,
                    "dkv_chunk": chunk,
                    "dkv_stages": stages,
                    "dkv_heads": 8,
                    "dkv_blocks": blocks,
                }


def _untuned(
    head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False
) -> dict[str, int]:
    one_pass = 0 if deterministic else 1
    for decisions in _candidates(head_dim, dtype, one_pass):
        if _illegal(decisions, head_dim, dtype, target) is None:
            return decisions
    raise ValueError(f"no decisions fit {target.arch} at head dim {head_dim} and {dtype}")


def _is_deterministic(decisions: Decisions) -> bool:
    return not decisions["one_pass"]


def _build(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    return kernel.build_mma_backward(decisions, head_dim, dtype)


BACKWARD = Space(
    family="mma",
    direction="backward",
    choices=_choices,
    illegal=_illegal,
    features=_features,
    untuned=_untuned,
    build=_build,
    unsupported=_unsupported,
    is_deterministic=_is_deterministic,
)
