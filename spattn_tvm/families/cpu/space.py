"""Decision space of the CPU kernels: tile shapes, register tiles, staging and the order of work."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from spattn_tvm.families.space import Decisions, Space, one_structure

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

DTYPES = ("float32", "float16", "bfloat16")
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 32, 256, 8

# (float32 lanes of a vector register, vector registers) of an instruction set.
VECTOR_UNITS = {"x86-64-v4": (16, 32), "x86-64-v3": (8, 16), "x86-64-v2": (4, 16), "aarch64": (4, 32)}
NARROWEST = (4, 16)


def unsupported(head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    """Why the family can't serve a head dim, dtype or target, or None."""
    if target.kind != "cpu":
        return f"the cpu family runs on CPUs, not on {target.folder}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not among {', '.join(DTYPES)}"
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % HEAD_DIM_STEP:
        return (
            f"head dim {head_dim} is not a multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        )
    return None


def _shared_choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    return {
        # Powers of two only: with 48 lanes LLVM splits every vector operation badly (20 times slower).
        "query_rows": (8, 16, 32, 64),
        # Multiples of 48, which every register tile height divides.
        "key_rows": (48, 96, 192, 384),
        "key_unroll": (2, 4, 6, 8, 12, 16, 24),
        "dim_unroll": tuple(u for u in (2, 4, 8, 16) if head_dim % u == 0),
        # Half precision is always widened once a tile: converting at each use costs more than the product.
        "stage": (0, 1) if dtype == "float32" else (1,),
    }


def _forward_choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    return {**_shared_choices(head_dim, dtype), "head_major": (0, 1)}


def _backward_choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    return {
        **_shared_choices(head_dim, dtype),
        "gradient_unroll": (2, 4, 6, 8, 12, 16),
        "gradient_lanes": tuple(lanes for lanes in (8, 16, 32, 64) if head_dim % lanes == 0),
    }


def _register_tiles(decisions: Decisions) -> dict[str, tuple[int, int]]:
    """Rows and float32 lanes of each register tile, by the decision that sets its height."""
    tiles = {name: (decisions[name], decisions["query_rows"]) for name in ("key_unroll", "dim_unroll")}
    if "gradient_unroll" in decisions:
        tiles["gradient_unroll"] = (decisions["gradient_unroll"], decisions["gradient_lanes"])
    return tiles


def _registers(rows: int, tile_lanes: int, lanes: int) -> int:
    """Vector registers that a register tile keeps live: accumulators, one row of operands, one broadcast."""
    vectors = math.ceil(tile_lanes / lanes)
    return rows * vectors + vectors + 1


def _illegal(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    lanes, registers = VECTOR_UNITS.get(target.arch, NARROWEST)
    for name, (rows, tile_lanes) in _register_tiles(decisions).items():
        needed = _registers(rows, tile_lanes, lanes)
        if needed > registers:
            return (
                f"{name}={rows} with {tile_lanes} lanes needs {needed} vector registers, "
                f"{target.arch} has {registers}"
            )
    return None


def _scratch_bytes(decisions: Decisions, head_dim: int) -> int:
    rows, key_rows = decisions["query_rows"], decisions["key_rows"]
    backward = "gradient_unroll" in decisions
    per_query_tile = (5 if backward else 2) * rows * head_dim
    per_key_tile = (2 if backward else 1) * rows * key_rows
    staged = 2 * key_rows * head_dim if decisions["stage"] else 0
    return 4 * (per_query_tile + per_key_tile + staged)


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """Sizes on a logarithmic scale, and the ratios that decide the speed: work executed, loads for each
    multiplication, scratch against a 32 KiB first-level cache, tiles for each head.
    """
    rows, unroll = decisions["query_rows"], decisions["key_unroll"]
    executed = problem.layout.executed_pairs(problem.length, rows, unroll)
    features = [math.log2(max(value, 0.5)) for _, value in sorted(decisions.items())]
    features.append(executed / max(1, problem.layout.pairs(problem.length)))
    for height, tile_lanes in _register_tiles(decisions).values():
        features.append((height + tile_lanes / 16) / (height * tile_lanes / 16))
        features.append(_registers(height, tile_lanes, 16) / 32)
    features.append(math.log2(_scratch_bytes(decisions, problem.head_dim) / 32768))
    features.append(math.log2(math.ceil(problem.length / rows)))
    return features


def _tallest(choices: tuple[int, ...], tile_lanes: int, lanes: int, registers: int) -> int:
    fitting = [height for height in choices if _registers(height, tile_lanes, lanes) <= registers]
    return max(fitting, default=min(choices))


def _untuned(
    direction: str, head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False
) -> dict[str, int]:
    """Two vectors of queries and the tallest register tiles that fit: 12% (forward) and 7% (backward) slower
    than the best that a search or its control found on Zen 4 at (1, 16, 4096, 64) float32.
    """
    lanes, registers = VECTOR_UNITS.get(target.arch, NARROWEST)
    choices = (_forward_choices if direction == "forward" else _backward_choices)(head_dim, dtype)
    rows = 2 * lanes
    decisions = {
        "query_rows": rows,
        "key_rows": 96,
        "key_unroll": _tallest(choices["key_unroll"], rows, lanes, registers),
        "dim_unroll": _tallest(choices["dim_unroll"], rows, lanes, registers),
        "stage": choices["stage"][0],
    }
    if direction == "forward":
        decisions["head_major"] = 1
    else:
        decisions["gradient_lanes"] = max(g for g in choices["gradient_lanes"] if g <= max(8, 4 * lanes))
        decisions["gradient_unroll"] = _tallest(
            choices["gradient_unroll"], decisions["gradient_lanes"], lanes, registers
        )
    return decisions


def _build_forward(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    from .forward import build_cpu_forward

    return build_cpu_forward(decisions, head_dim, dtype)


def _build_backward(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    from .backward import build_cpu_backward

    return build_cpu_backward(decisions, head_dim, dtype)


FORWARD = Space(
    family="cpu",
    direction="forward",
    structures=one_structure(_forward_choices),
    illegal=_illegal,
    features=_features,
    untuned=partial(_untuned, "forward"),
    build=_build_forward,
    unsupported=unsupported,
)

BACKWARD = Space(
    family="cpu",
    direction="backward",
    structures=one_structure(_backward_choices),
    illegal=_illegal,
    features=_features,
    untuned=partial(_untuned, "backward"),
    build=_build_backward,
    unsupported=unsupported,
)
