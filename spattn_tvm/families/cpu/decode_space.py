"""Decision space of the CPU's decode kernel: vectors, tiles of keys and parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from spattn_tvm.families.space import Decisions, Space, one_structure
from spattn_tvm.problem import keys_read

from .abi import DECODE_PARTS
from .space import NARROWEST, VECTOR_UNITS, unsupported

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget


def _choices(head_dim: int, dtype: str) -> dict[str, tuple[int, ...]]:
    return {
        "lanes": tuple(lanes for lanes in (4, 8, 16) if head_dim % lanes == 0),
        "key_rows": (16, 32, 64, 128, 256),
        "stage": (0, 1),
        "parts": tuple(2**n for n in range(DECODE_PARTS.bit_length())),
    }


def _registers(lanes: int, vector: int) -> int:
    """Vector registers that the products of ``lanes`` keys and a vector of the query keep live."""
    return lanes * math.ceil(lanes / vector) + 1


def _illegal(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    vector, registers = VECTOR_UNITS.get(target.arch, NARROWEST)
    needed = _registers(decisions["lanes"], vector)
    if needed > registers:
        return f"lanes={decisions['lanes']} needs {needed} vector registers, {target.arch} has {registers}"
    return None


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """Sizes on a logarithmic scale, and what decides the speed: keys of a part, the scratch of a tile against
    a first-level cache of 32 KiB, query rows that a tile is read for.
    """
    shares = problem.batch * problem.kv_heads
    keys = keys_read(problem.layout, problem.kv_heads, problem.length, problem.keys) / problem.kv_heads
    tile_bytes = 8 * decisions["key_rows"] * problem.head_dim
    return [
        math.log2(max(1.0, keys) / decisions["key_rows"]),
        math.log2(tile_bytes / 32768),
        math.log2(problem.query_heads // problem.kv_heads * problem.length),
        math.log2(shares / decisions["parts"]),
    ]


def _untuned(head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False) -> dict[str, int]:
    vector, registers = VECTOR_UNITS.get(target.arch, NARROWEST)
    fitting = [n for n in _choices(head_dim, dtype)["lanes"] if _registers(n, vector) <= registers]
    return {
        "lanes": max(fitting),
        "key_rows": 64,
        "stage": int(dtype != "float32"),
        "parts": 4,
    }


def _build(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    from .decode import build_cpu_decode

    return build_cpu_decode(decisions, head_dim, dtype)


DECODE = Space(
    family="cpu",
    direction="decode",
    structures=one_structure(_choices),
    illegal=_illegal,
    features=_features,
    untuned=_untuned,
    build=_build,
    unsupported=unsupported,
)
