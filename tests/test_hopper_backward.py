"""What the Hopper backward can be built with: its space against the kernel's own sizes. No GPU, no TVM."""

from __future__ import annotations

import random

import pytest

from spattn_tvm.kernels.hopper_backward import (
    SHARED_LIMIT,
    build_hopper_backward,
    dkv_shared_bytes,
    dq_shared_bytes,
    one_pass_shared_bytes,
)
from spattn_tvm.spaces import find_space
from spattn_tvm.target import MachineTarget, parse_target

SPACE = find_space("hopper", "backward")


@pytest.fixture
def h200() -> MachineTarget:
    return parse_target("nvidia/h200")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_untuned_decisions_are_legal(head_dim: int, dtype: str, h200: MachineTarget) -> None:
    decisions = SPACE.untuned(head_dim, dtype, h200)
    assert SPACE.rejection(decisions, head_dim, dtype, h200) is None
    assert SPACE.is_deterministic(SPACE.untuned(head_dim, dtype, h200, deterministic=True))
    for name in ("dq_stages", "dkv_stages"):
        deeper = {**decisions, name: 1000}
        assert "1000" in str(SPACE.rejection(deeper, head_dim, dtype, h200))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_legal_decisions_fit_in_shared_memory_and_no_fitting_ones_are_lost(
    head_dim: int, h200: MachineTarget
) -> None:
    choices = SPACE.choices(head_dim, "bfloat16")
    draw = random.Random(head_dim)
    refused_for_memory = 0
    for _ in range(3000):
        decisions = {name: draw.choice(values) for name, values in choices.items()}
        decisions["one_pass"] = 0
        most = max(dq_shared_bytes(decisions, head_dim), dkv_shared_bytes(decisions, head_dim))
        reason = SPACE.illegal(decisions, head_dim, "bfloat16", h200)
        if reason is None:
            assert most <= SHARED_LIMIT
        elif "shared memory" in reason:
            refused_for_memory += 1
            # The space rounds up what is small.
            assert most > SHARED_LIMIT - 1024
    assert refused_for_memory > 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_pass_has_the_decisions_of_the_key_pass_and_no_others(head_dim: int, h200: MachineTarget) -> None:
    choices = SPACE.choices(head_dim, "bfloat16")
    decisions = {**SPACE.untuned(head_dim, "bfloat16", h200), "one_pass": 1, "dkv_stages": 2}
    assert SPACE.rejection(decisions, head_dim, "bfloat16", h200) is None
    assert not SPACE.is_deterministic(decisions)
    fits = []
    for stages in choices["dkv_stages"]:
        changed = {**decisions, "dkv_stages": stages}
        fits.append(one_pass_shared_bytes(changed, head_dim) <= SHARED_LIMIT)
        assert fits[-1] == (SPACE.illegal(changed, head_dim, "bfloat16", h200) is None)
    assert fits.count(False) == {64: 0, 128: 4}[head_dim]
    for name, values in choices.items():
        if name.startswith("dq_") or name in ("dkv_queries", "dkv_buffers"):
            for value in set(values) - {decisions[name]}:
                reason = SPACE.illegal({**decisions, name: value}, head_dim, "bfloat16", h200)
                assert reason == f"one_pass=1 has {name}={decisions[name]}, not {value}"


@pytest.mark.parametrize(
    "head_dim,dtype,changes,message",
    [
        (96, "bfloat16", {}, "head_dim must be 64 or 128, got 96"),
        (128, "float32", {}, "'float32'"),
        (128, "bfloat16", {"dkv_stages": 6}, "dK/dV pass needs 265"),
        (128, "bfloat16", {"one_pass": 1}, "one pass needs 29"),
    ],
)
def test_the_builder_refuses_what_it_cannot_build(
    head_dim: int, dtype: str, changes: dict[str, int], message: str, h200: MachineTarget
) -> None:
    decisions = {**SPACE.untuned(128, "bfloat16", h200), **changes}
    with pytest.raises(ValueError, match=message):
        build_hopper_backward(decisions, head_dim, dtype)


def test_unsupported_problems_are_refused_with_a_reason(h200: MachineTarget) -> None:
    assert SPACE.unsupported(128, "bfloat16", h200) is None
    assert "head dim 96" in str(SPACE.unsupported(96, "bfloat16", h200))
    assert "float32" in str(SPACE.unsupported(64, "float32", h200))
    cpu = MachineTarget("cpu", "x86-64-v4", "amd-25-17")
    assert "sm_90a" in str(SPACE.unsupported(64, "bfloat16", cpu))
