"""Decision space of the portable tensor-core backward: its structure, its passes' shapes and their order.

The dQ pass and the dK/dV pass share no decision, so each has a prefix of its own. With ``one_pass`` there is
no dQ pass; without it nothing is added by atomics.
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

from spattn_tvm.families.mma import backward_sizes as sizes
from spattn_tvm.families.mma.backward import build_mma_backward
from spattn_tvm.families.space import MULTIPROCESSORS, Decisions, Space
from spattn_tvm.target import is_before_hopper

from .blocks import element_bytes
from .support import unsupported

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget


def _structures(head_dim: int, dtype: str) -> dict[str, dict[str, tuple[int, ...]]]:
    wide = head_dim * element_bytes(dtype) > 256
    strips = (16, 32) if wide else (16, 32, 64)
    warps = (1, 2, 4) if wide else (2, 4, 8)
    rows, stages, heads = (16, 32), (1, 2, 3), (1, 4, 8, 16, 64)
    holds = (0,) if dtype == "float32" else (0, 1)
    blocks = (1, 2) if wide else (1, 2, 3, 4)
    of_keys = {
        "dkv_warps": warps,
        "dkv_split": (1, 2, 4),
        "dkv_rows": rows,
        "dkv_strip": strips,
        "dkv_strips": (0, 1, 2, 4),
        "dkv_stages": stages,
        "dkv_hold": holds,
        "dkv_heads": heads,
        "dkv_blocks": blocks,
    }
    of_queries = {
        "dq_warps": warps,
        "dq_rows": rows,
        "dq_strip": strips,
        "dq_strips": (1, 2, 4),
        "dq_stages": stages,
        "dq_hold": holds,
        "dq_heads": heads,
        "dq_blocks": blocks,
    }
    return {
        "two passes": {"one_pass": (0,), **of_queries, **of_keys},
        "one pass": {"one_pass": (1,), "atomic_floats": (1, 2, 4), **of_keys},
    }


def _illegal(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    return sizes.conflict(decisions, head_dim, dtype, target.arch)


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """Sizes on a logarithmic scale; of each pass, zeros where there is none, the work executed against useful
    work, what a product loads from shared memory, shared memory, registers, and the tiles that each
    multiprocessor gets.
    """
    layout, length = problem.layout, problem.length
    useful = max(1, layout.pairs(length))
    names = BACKWARD.names(problem.head_dim, problem.dtype)
    features = [math.log2(value) if (value := decisions.get(name, 0)) else -1.0 for name in names]
    passes = sizes.passes(decisions, problem.head_dim, problem.dtype)
    features += [0.0] * 6 * (2 - len(passes))
    for part in passes:
        # By symmetry the queries of a key tile are counted like the keys of a query tile.
        features.append(layout.executed_pairs(length, part.rows, part.strip) / useful)
        features.append(layout.executed_pairs(length, part.tile, part.chunk) / useful)
        features.append(1 / part.rows + 1 / (part.strip if part.exchange else part.chunk))
        features.append(part.shared_bytes / 2**16)
        features.append(part.registers / 256)
        tiles = problem.batch * (problem.kv_heads if part.keys else problem.query_heads)
        features.append(math.log2(tiles * math.ceil(length / part.tile) / MULTIPROCESSORS / part.blocks))
    return features


# In order of preference; the first that a chip has room for is the default. Measured where a comment says so,
# on an H200 in bfloat16 at (B, H, N, D), the rest chosen by what they have in common with those.
_DQ = ("warps", "rows", "strip", "strips", "stages", "hold", "blocks")
_DQ_PREFERRED = (
    (4, 32, 32, 4, 2, 1, 2),  # head dim 64: 0.16 ms of the 0.41 at (4, 16, 4096, 64), the next one 0.17
    (4, 32, 32, 2, 2, 1, 2),
    (4, 32, 32, 1, 2, 0, 2),  # head dim 128: 0.31 ms at (4, 16, 4096, 128), 16 rows in registers 0.34
    (4, 16, 32, 2, 2, 1, 2),
    (4, 16, 32, 1, 2, 1, 2),
    (4, 16, 32, 1, 2, 1, 1),
    (4, 16, 32, 1, 2, 0, 1),
    (4, 16, 16, 1, 2, 0, 1),
    (4, 16, 16, 1, 1, 0, 1),
    (2, 16, 16, 1, 1, 0, 1),
    (1, 16, 16, 1, 1, 0, 1),
)
_DKV = ("warps", "rows", "split", "strip", "strips", "stages", "blocks")
_DKV_PREFERRED = (
    (4, 32, 1, 32, 2, 2, 2),  # head dim 64: 0.36 ms at (4, 16, 4096, 64), 16 rows 0.43
    (4, 32, 2, 32, 0, 2, 1),  # head dim 128: 0.67 and 1.71 ms at (4, 16, 4096, 128) and (1, 16, 16384, 128)
    (4, 32, 2, 16, 0, 2, 1),  # what an sm_80 has room for: 0.88 and 2.42 in two passes
    (2, 32, 2, 16, 0, 2, 1),  # what an sm_120a has room for: 0.72 and 2.10, the next one 0.73 and 2.10
    (2, 32, 2, 32, 0, 1, 1),
    (2, 32, 4, 16, 0, 2, 1),
    (4, 16, 2, 16, 0, 2, 1),  # head dim 256: 1.57 ms at (4, 16, 4096, 256), the next one 1.72
    (2, 32, 4, 16, 0, 1, 1),
    (4, 16, 2, 16, 0, 1, 1),
    (2, 16, 2, 16, 0, 2, 1),
    (2, 16, 2, 16, 0, 1, 1),
    (2, 16, 2, 16, 1, 1, 1),
    (1, 16, 2, 16, 0, 1, 1),
    (1, 16, 4, 16, 1, 1, 1),
)


def _untuned(head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False) -> dict[str, int]:
    """One pass where atomic adds of four floats exist: at (4, 16, 4096, 128) on an H200 the key pass took
    0.54 ms with those, 0.65 with adds of two floats, and about 0.4 more with single ones, which is more than
    a dQ pass.
    """
    vectors = not is_before_hopper(target.arch)
    one_pass = int(vectors and not deterministic)
    shared = {"one_pass": one_pass, "dkv_heads": 8, "dkv_hold": 0}
    shared |= {"atomic_floats": 4} if one_pass else {"dq_heads": 8}
    for dq, dkv in product(_DQ_PREFERRED, _DKV_PREFERRED):
        # The sums of float32 products in flight spill with 32 rows or columns.
        if dtype == "float32" and (max(dq[1], dq[2], dkv[1]) > 16 or dq[_DQ.index("hold")]):
            continue
        decisions = dict(shared)
        if not one_pass:
            decisions.update({f"dq_{name}": value for name, value in zip(_DQ, dq, strict=True)})
        decisions.update({f"dkv_{name}": value for name, value in zip(_DKV, dkv, strict=True)})
        if _illegal(decisions, head_dim, dtype, target) is None:
            return decisions
    raise ValueError(f"no default fits {target.arch} at head dim {head_dim} and {dtype}")


def _is_deterministic(decisions: Decisions) -> bool:
    return not decisions["one_pass"]


def _build(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    return build_mma_backward(decisions, head_dim, dtype, target.arch)


BACKWARD = Space(
    family="mma",
    direction="backward",
    structures=_structures,
    illegal=_illegal,
    features=_features,
    untuned=_untuned,
    build=_build,
    unsupported=unsupported,
    is_deterministic=_is_deterministic,
)
