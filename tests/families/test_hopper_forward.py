"""What the Hopper forward can be built with. No GPU, no TVM: the builder refuses before it imports any."""

from __future__ import annotations

import random

import pytest

from spattn_tvm import BandLayout
from spattn_tvm.families import find_space
from spattn_tvm.families.hopper.forward import build_hopper_forward
from spattn_tvm.families.hopper.forward_sizes import (
    SHARED_BYTES_MOST,
    entry_registers,
    producer_registers,
    shared_bytes,
)
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget, parse_target

SPACE = find_space("hopper", "forward")


@pytest.fixture
def h200() -> MachineTarget:
    return parse_target("nvidia/h200")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_the_untuned_decisions_are_legal(head_dim: int, dtype: str, h200: MachineTarget) -> None:
    assert SPACE.rejection(SPACE.untuned(head_dim, dtype, h200), head_dim, dtype, h200) is None


@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_legal_decisions_share_registers_and_memory_that_exist(head_dim: int, h200: MachineTarget) -> None:
    draw = random.Random(head_dim)
    choices = SPACE.structures(head_dim, "bfloat16")[""]
    legal = 0
    for _ in range(20000):
        decisions = {name: draw.choice(values) for name, values in choices.items()}
        if SPACE.illegal(decisions, head_dim, "bfloat16", h200) is not None:
            continue
        legal += 1
        consumers, registers = decisions["consumer_warpgroups"], decisions["consumer_registers"]
        loader = producer_registers(consumers, registers)
        assert loader >= 24 and loader % 8 == 0 and registers <= 256
        assert loader + consumers * registers <= (consumers + 1) * entry_registers(consumers + 1)
        assert shared_bytes(decisions, head_dim) <= SHARED_BYTES_MOST
    assert legal > 0


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"stages": 8}, "bytes of shared memory"),
        ({"stages": 2}, "can deadlock"),
        ({"queries_in_registers": 1}, "registers are needed"),
        ({"consumer_registers": 240}, "leaves the loader"),
        ({"consumer_registers": 112}, "than a thread has at launch"),
        ({"weight_parts": 2}, "without overlap"),
        ({"consumer_warpgroups": 2, "consumer_registers": 232, "key_rows": 128, "stages": 2, "overlap": 0,
          "queries_in_registers": 1}, "same registers"),
    ],
)  # fmt: skip
def test_what_would_hang_spill_or_compute_wrongly_is_refused(
    changes: dict[str, int], message: str, h200: MachineTarget
) -> None:
    decisions = {**SPACE.untuned(128, "bfloat16", h200), **changes}
    assert message in str(SPACE.rejection(decisions, 128, "bfloat16", h200))
    with pytest.raises(ValueError, match=message):
        build_hopper_forward(decisions, 128, "bfloat16")


def test_unsupported_problems_are_refused_with_a_reason(h200: MachineTarget) -> None:
    assert SPACE.unsupported(128, "bfloat16", h200) is None
    assert "head dim 96" in str(SPACE.unsupported(96, "bfloat16", h200))
    assert "float32" in str(SPACE.unsupported(64, "float32", h200))
    assert "sm_90a" in str(SPACE.unsupported(64, "bfloat16", MachineTarget("cpu", "x86-64-v4", "amd-25-17")))


def test_features_are_finite_and_tell_decisions_apart(h200: MachineTarget) -> None:
    problem = AttentionProblem("forward", "bfloat16", 4, 16, 16, 4096, 128, BandLayout.spattention(16))
    decisions = SPACE.untuned(128, "bfloat16", h200)
    features = SPACE.features(decisions, problem)
    assert all(abs(value) < 1e6 for value in features)
    # 1.25 times the useful pairs, less what the sequence's start saves in near bands.
    executed_over_useful = features[len(decisions)]
    assert 1.2 < executed_over_useful < 1.3
    assert SPACE.features({**decisions, "key_rows": 128}, problem) != features
