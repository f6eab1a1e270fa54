"""Decision space of the portable tensor-core forward: tile shape, ring, registers and the order of tiles.

The kernel's own file says which combinations a chip has the shared memory and the registers for; nothing of
that is repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spattn_tvm.families.mma import forward as kernel
from spattn_tvm.families.space import MULTIPROCESSORS, Decisions, Space, one_structure
from spattn_tvm.target import registers_most

from .support import unsupported

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget


def _choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    return {
        "warps": (2, 4, 8),
        "warp_rows": (16, 32),
        "key_rows": (16, 32, 64, 128),
        "edge_keys": (16, 32, 64),
        "stages": (2, 3, 4, 6),
        "ahead": (1, 2, 3),
        "load_point": (0, 1, 2),
        "queries_in_registers": (0, 1),
        "rescale_threshold": (0, 8),
        "head_group": (1, 4, 8, 16, 64),
        "blocks_per_multiprocessor": (1, 2, 3, 4),
    }


def _illegal(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    return kernel.conflict(decisions, head_dim, dtype, target.arch)


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """Sizes on a logarithmic scale, work executed and keys loaded against useful work, shared memory,
    registers, and the tiles that each multiprocessor gets.
    """
    layout, length, head_dim = problem.layout, problem.length, problem.head_dim
    useful = max(1, layout.pairs(length))
    rows, warp_rows = decisions["warps"] * decisions["warp_rows"], decisions["warp_rows"]
    executed = layout.executed_pairs(length, warp_rows, decisions["edge_keys"])
    loaded = layout.executed_pairs(length, rows, decisions["key_rows"])
    tiles = problem.batch * problem.query_heads * math.ceil(length / rows)
    threads, blocks = 32 * decisions["warps"], decisions["blocks_per_multiprocessor"]
    needed = kernel.registers_needed(decisions, head_dim, problem.dtype)
    return [
        *(math.log2(max(value, 0.5)) for _, value in sorted(decisions.items())),
        executed / useful,
        loaded / rows / useful * warp_rows,
        math.log2(max(1, tiles) / (MULTIPROCESSORS * blocks)),
        math.log2(decisions["warps"] * blocks),
        kernel.shared_bytes(decisions, head_dim, problem.dtype) / 1024 / 100,
        needed / registers_most(threads, blocks),
    ]


def _candidates(head_dim: int, dtype: str) -> Iterator[dict[str, int]]:
    """Decisions in the order in which they are tried.

    What comes first was the fastest of many on an H200 at head dims 32, 64, 128 and 192; other head dims
    follow the nearest. What comes behind it is for chips with less shared memory (fewer stages, fewer rows,
    fewer blocks), measured on the same chip with as many blocks as they have room for.
    """
    names = ("warps", "warp_rows", "key_rows", "stages", "ahead", "load_point", "blocks_per_multiprocessor")
    shapes: list[tuple[int, ...]] = []
    if dtype == "float32":
        if head_dim <= 64:
            shapes = [(4, 16, 32, 4, 2, 0, 2)]
        if head_dim <= 96:
            shapes += [(4, 16, 32, 3, 1, 0, 2)]
    elif head_dim <= 64:
        shapes = [(4, 32, 32, 6, 3, 0, 3), (4, 16, 32, 3, 1, 0, 4), (4, 32, 32, 3, 1, 0, 2)]
    elif head_dim <= 128:
        shapes = [(4, 32, 32, 4, 2, 0, 2), (4, 32, 32, 2, 1, 1, 2), (8, 16, 32, 3, 1, 0, 1)]
    else:
        shapes = [(4, 16, 32, 3, 1, 0, 2)]
    # What float32 heads beyond 128 have been run with; 1 and 2 spill less.
    point = 0 if dtype == "float32" and head_dim > 128 else 1
    if dtype != "float32" or head_dim <= 128:
        shapes += [(4, 16, 32, 2, 1, point, 2), (4, 16, 32, 2, 1, point, 1)]
    shapes += [(4, 16, 16, 2, 1, point, 2), (4, 16, 16, 2, 1, point, 1), (2, 16, 16, 2, 1, point, 1)]
    for shape in shapes:
        decisions = dict(zip(names, shape, strict=True))
        yield {
            **decisions,
            "edge_keys": min(32, decisions["key_rows"]),
            "queries_in_registers": 0,
            "rescale_threshold": 8,
            "head_group": 8,
        }


def _untuned(head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False) -> dict[str, int]:
    """The first candidate that the chip has memory and registers for. The kernel is deterministic."""
    for decisions in _candidates(head_dim, dtype):
        if kernel.conflict(decisions, head_dim, dtype, target.arch) is None:
            return decisions
    raise AssertionError(f"no untuned decisions for {dtype}, head dim {head_dim}, {target.arch}")


def _build(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    return kernel.build_mma_forward(decisions, head_dim, dtype, target.arch)


FORWARD = Space(
    family="mma",
    direction="forward",
    structures=one_structure(_choices),
    illegal=_illegal,
    features=_features,
    untuned=_untuned,
    build=_build,
    unsupported=unsupported,
)
