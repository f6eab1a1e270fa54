"""Decision space of the Hopper forward: tile shape, rings, overlap, registers and the order of tiles.

The kernel's own file says which combinations fit, deadlock or compile to wrong code; nothing of that is
repeated here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spattn_tvm.bands import BandLayout
from spattn_tvm.families.hopper import forward_sizes as sizes
from spattn_tvm.families.space import MULTIPROCESSORS, Cases, Decisions, Space, one_structure

from .support import WARPGROUP_ROWS, unsupported

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
    rows = WARPGROUP_ROWS * decisions["consumer_warpgroups"]
    executed = layout.executed_pairs(length, WARPGROUP_ROWS, decisions["key_rows"])
    loaded = layout.executed_pairs(length, rows, decisions["key_rows"])
    tiles = problem.batch * problem.query_heads * math.ceil(length / rows)
    needed = sizes.consumer_registers_needed(decisions, head_dim)
    return [
        *(math.log2(max(value, 0.5)) for _, value in sorted(decisions.items())),
        executed / useful,
        loaded / rows / useful * WARPGROUP_ROWS,
        executed / WARPGROUP_ROWS / decisions["key_rows"] / max(1, tiles),
        math.log2(max(1, tiles) / MULTIPROCESSORS),
        sizes.shared_bytes(decisions, head_dim) / sizes.SHARED_BYTES_MOST,
        needed / decisions["consumer_registers"],
    ]


class _Shape(NamedTuple):
    """Decisions, and what a tile takes with them: to begin with, and for each key that it loads. The us are
    fitted to 35 to 48 problems of up to five rounds, which they meet within 4 to 6 % on average.
    """

    decisions: dict[str, int]
    begins_us: float
    key_us: float

    @property
    def rows(self) -> int:
        return WARPGROUP_ROWS * self.decisions["consumer_warpgroups"]


_TALL = {
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
_SHORT = _TALL | {"consumer_warpgroups": 2, "queries_in_registers": 1, "consumer_registers": 232}
# By rows of a tile and keys of a chunk. The first of a head dim is the fastest where tiles are many; where
# they are few, how often they go round decides, and how wide the bands are. H100, bfloat16, 16 heads, L2
# cleared, us:
#
# ======  =====  ===========  =======  =======  =======  =======  =======  =======  =======
# queries keys   bands        head dim 128               head dim 64
# --------------------------  -------------------------  ----------------------------------
#                             192, 64  128, 96  128, 64  256, 64  192,128  128,128  128, 64
# ======  =====  ===========  =======  =======  =======  =======  =======  =======  =======
#   1024  32768  spattention     79.2     69.7     72.5     75.0     65.9     52.3     61.3
#   1536  32768  spattention     87.0      126      130     77.9     67.6     93.0      109
#   2048  32768  spattention      150      126      132     79.1      113     93.8      112
#   3072  32768  spattention      159      183      185      145      120      136      161
#   4096  32768  spattention      223      234      237      148      165      176      208
#   1024  32768  causal           485      374      461      480      407      311      400
#   2048  32768  causal           951      829      823      487      664      586      743
#   1024   1024  spattention     20.9     19.6     18.7     17.6     17.6     17.1     14.7
#   2048   2048  spattention     27.9     28.1     26.3     22.4     22.9     22.4     20.3
#   4096   4096  spattention     47.7     50.1     46.8     33.8     38.6     40.6     38.0
# ======  =====  ===========  =======  =======  =======  =======  =======  =======  =======
#
# At head dim 128 chunks of 128 keys, in two stages and with queries in shared memory, took 70.6 with 1024
# queries, 122 with 2048 and 707 with 2048 and causal bands, and lost to both others where bands are narrow; a
# third stage, with room for one tile of queries, took 74.8. At head dim 64 queries in registers took 58.8 in
# the third shape. 240 registers, with 64 bytes of the loader's spilled: 68.0 for 69.7, 51.2 for 52.3.
_SHAPES = {
    64: (
        _Shape(_TALL | {"consumer_warpgroups": 4, "stages": 8, "consumer_registers": 112}, 2.25, 0.0146),
        _Shape(_TALL | {"key_rows": 128}, 3.0, 0.0116),
        _Shape(_SHORT | {"key_rows": 128, "queries_in_registers": 0}, 3.25, 0.0092),
        _Shape(_SHORT | {"stages": 8}, 2.0, 0.0116),
    ),
    128: (
        _Shape(_TALL, 4.75, 0.0150),
        _Shape(_SHORT | {"key_rows": 96}, 4.75, 0.0120),
        _Shape(_SHORT, 4.0, 0.0132),
    ),
    # Which fills the registers of two warpgroups: what fits.
    192: (_Shape(_SHORT | {"stages": 2, "overlap": 0}, 0.0, 1.0),),
}
# With more rounds of tiles no other shape than the first was faster.
_FEW_ROUNDS = 3
# The estimates err by that much.
_SURELY = 0.94


def keys_of_tiles(problem: AttentionProblem, rows: int, chunk: int) -> Any:
    """Keys that each tile loads in whole chunks, ``(heads, tiles)``, the last queries first as the kernel
    takes them.
    """
    first = problem.keys - problem.length + np.arange(0, problem.length, rows)[::-1]
    last = np.minimum(first + rows, problem.keys) - 1
    keys = np.zeros((problem.query_heads, len(first)), np.int64)
    for head, bands in enumerate(problem.layout.bands(problem.keys)):
        for low, high in bands:
            count = np.maximum(last - low + 1 - np.maximum(first - high, 0), 0)
            keys[head] += -(-count // chunk) * chunk
    return keys


def _ends_us(shape: _Shape, problem: AttentionProblem, workers: int) -> float:
    """When the last multiprocessor ends, each taking the next tile as soon as it is free."""
    tile_us = shape.begins_us + shape.key_us * keys_of_tiles(problem, shape.rows, shape.decisions["key_rows"])
    busy = [0.0] * workers
    for one in np.repeat(tile_us.T, problem.batch).tolist():
        heapq.heapreplace(busy, busy[0] + one)
    return max(busy)


@lru_cache(maxsize=1024)
def _case(problem: AttentionProblem, target: MachineTarget) -> int:
    """Which of the head dim's shapes ends first, if surely; the first where there are many tiles."""
    shapes, workers = _SHAPES.get(problem.head_dim, ()), target.multiprocessors
    if len(shapes) < 2:
        return 0
    tiles = problem.batch * problem.query_heads * math.ceil(problem.length / shapes[0].rows)
    if tiles > _FEW_ROUNDS * workers:
        return 0
    ends = [_ends_us(shape, problem, workers) for shape in shapes]
    best = ends.index(min(ends))
    return best if ends[best] < _SURELY * ends[0] else 0


def _shown(problem: AttentionProblem) -> str:
    tiles = problem.batch * problem.query_heads * math.ceil(problem.length / 128)
    return f"{tiles} tiles of 128 queries, {problem.mean_keys:.0f} keys each"


def _other_cases(problem: AttentionProblem, target: MachineTarget) -> Iterator[AttentionProblem]:
    seen = {_case(problem, target)}
    heads = problem.query_heads
    wide, narrow = BandLayout.causal(heads), BandLayout.sliding_window(heads, 128)
    few = ((1, n, layout) for layout in (wide, narrow) for n in range(128, 4097, 128))
    for batch, queries, layout in ((64, 4096, narrow), *few):
        other = replace(problem, batch=batch, length=queries, kv_length=32768, layout=layout)
        case = _case(other, target)
        if case not in seen:
            seen.add(case)
            yield other


def _untuned(
    head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False, case: int = 0
) -> dict[str, int]:
    """The fastest that were measured, for bands of any width (the tables are in the kernel's file), and for
    so few tiles that their number decides.
    """
    shapes = _SHAPES.get(head_dim, _SHAPES[128])
    return dict(shapes[min(case, len(shapes) - 1)].decisions)


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
    cases=Cases(
        values=tuple(range(max(map(len, _SHAPES.values())))), of=_case, shown=_shown, others=_other_cases
    ),
)
