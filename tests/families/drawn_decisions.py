"""Decisions drawn from a space: tests of what it calls legal, and of the features it tells a cost model."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping

from spattn_tvm.families.space import Space
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# From the data sheets, apart from the table under test: shared memory in KiB of all blocks of a
# multiprocessor, of which each takes one more for itself, and registers of all threads.
KIBIBYTES = {"sm_80": 164, "sm_86": 100, "sm_90a": 228}
REGISTERS = 65536


def draw_decisions(space: Space, draw: random.Random, head_dim: int, dtype: str) -> dict[str, int]:
    """Any decisions of any structure, legal or not."""
    structure = draw.choice(list(space.structures(head_dim, dtype).values()))
    return {name: draw.choice(values) for name, values in structure.items()}


def draw_legal(space: Space, dtype: str, arch: str, draws: int) -> Iterator[tuple[int, Mapping[str, int]]]:
    """Head dims and decisions: of so many drawn ones those that a space calls legal on a chip."""
    draw = random.Random(arch + dtype)
    for _ in range(draws):
        head_dim = draw.choice(HEAD_DIMS)
        decisions = draw_decisions(space, draw, head_dim, dtype)
        if space.illegal(decisions, head_dim, dtype, MachineTarget("cuda", arch)) is None:
            yield head_dim, decisions


def check_fit(arch: str, blocks: int, threads: int, shared_bytes: int, registers: int) -> None:
    """So many blocks have a place on one multiprocessor; registers are those of a thread."""
    assert blocks * (shared_bytes + 1024) <= 1024 * KIBIBYTES[arch]
    assert blocks * threads * registers <= REGISTERS


def check_features(space: Space, problem: AttentionProblem) -> None:
    """They are finite, and differ between decisions."""
    draw = random.Random(1)
    seen = set()
    for _ in range(50):
        decisions = draw_decisions(space, draw, problem.head_dim, problem.dtype)
        features = space.features(decisions, problem)
        assert all(math.isfinite(value) and abs(value) < 1e6 for value in features)
        seen.add((tuple(sorted(decisions.items())), tuple(features)))
    assert len({decisions for decisions, _ in seen}) == len({features for _, features in seen}) > 40
