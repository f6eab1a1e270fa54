"""The portable tensor-core backward: its space, its machine code and, on a GPU, both structures' results."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import compiled, machine_code
from drawn_decisions import ARCHS, HEAD_DIMS, KIBIBYTES, check_features, check_fit, draw_decisions, draw_legal
from sweep import DTYPES, check_problem
from test_mma_forward import OTHER_KEYS, complete_problem

from spattn_tvm import BandLayout, banded_attention
from spattn_tvm.families import find_space
from spattn_tvm.families.mma.backward import build_mma_backward
from spattn_tvm.families.mma.backward_sizes import Pass, passes
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget, parse_target

SPACE = find_space("mma", "backward")
H200 = parse_target("nvidia/h200")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_untuned_decisions_are_legal_for_every_head_dim(
    dtype: str, arch: str, deterministic: bool
) -> None:
    target = MachineTarget("cuda", arch)
    for head_dim in range(32, 257, 16):
        decisions = SPACE.untuned(head_dim, dtype, target, deterministic=deterministic)
        assert SPACE.rejection(decisions, head_dim, dtype, target) is None
        assert SPACE.is_deterministic(decisions) == (decisions["one_pass"] == 0)
        assert SPACE.is_deterministic(decisions) or not deterministic
        # Atomic adds of one float cost more than a pass for dQ.
        assert decisions["one_pass"] == int(not deterministic and arch.endswith("a"))


@pytest.mark.parametrize("arch", sorted(KIBIBYTES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_legal_decisions_share_the_memory_and_registers_that_a_chip_has(dtype: str, arch: str) -> None:
    legal = Counter[int]()
    for head_dim, decisions in draw_legal(SPACE, dtype, arch, 10000):
        legal[decisions["one_pass"]] += 1
        for part in passes(decisions, head_dim, dtype):
            check_fit(arch, part.blocks, part.threads, part.shared_bytes, part.registers)
            assert part.chunk % part.strip == 0
    assert min(legal[0], legal[1]) > 20


def largest_offset(part: Pass) -> int:
    """End of what a pass keeps in shared memory, counted apart from its own offsets."""
    row = part.head_dim * part.element + 16
    tile, ring = 2 * part.tile * row, 2 * part.stages * part.chunk * row
    exchanged = int(part.exchange) + int(part.exchange or part.one_pass)
    exchange = exchanged * min(part.stages, 2) * part.tile * (part.chunk * part.element + 16)
    statistics = 8 * part.stages * part.chunk if part.keys else 0
    return tile + ring + exchange + statistics + 16 * part.stages + 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_memory_holds_all_parts(dtype: str) -> None:
    draw = random.Random(dtype)
    for _ in range(500):
        head_dim = draw.choice(HEAD_DIMS)
        for part in passes(draw_decisions(SPACE, draw, head_dim, dtype), head_dim, dtype):
            assert largest_offset(part) <= part.shared_bytes <= largest_offset(part) + 4096
            assert part.out_columns * part.split >= head_dim
            assert part.dq_warps[0] * part.dq_rows == part.chunk
            assert part.dq_warps[1] * part.dq_columns >= head_dim
            assert part.dq_warps[0] * part.dq_warps[1] <= max(part.warps * part.split, part.dq_warps[0])


@pytest.mark.parametrize(
    "dtype,arch,changes,message",
    [
        ("bfloat16", "sm_90a", {"dkv_warps": 8}, "dK/dV pass: 3.* bytes of shared memory"),
        ("bfloat16", "sm_90a", {"dkv_blocks": 2}, "dK/dV pass: 2.* bytes of shared memory"),
        ("bfloat16", "sm_90a", {"dkv_split": 1}, "nothing to exchange"),
        ("bfloat16", "sm_90a", {"dkv_hold": 1}, "about .* registers"),
        ("bfloat16", "sm_80", {}, "atomic_floats=4 needs sm_90, not sm_80"),
        ("bfloat16", "sm_90a", {"dq_hold": 1}, "dQ pass: about .* registers"),
        ("float32", "sm_90a", {"dkv_hold": 1}, "dK/dV pass: hold is for 2-byte types"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    dtype: str, arch: str, changes: dict[str, int], message: str
) -> None:
    two_passes = any(name.startswith("dq_") for name in changes)
    decisions = {**SPACE.untuned(128, "bfloat16", H200, deterministic=two_passes), **changes}
    assert re.search(message, str(SPACE.illegal(decisions, 128, dtype, MachineTarget("cuda", arch))))
    with pytest.raises(ValueError, match=message):
        build_mma_backward(decisions, 128, dtype, arch)


def test_unsupported_problems_are_refused_with_a_reason() -> None:
    assert SPACE.unsupported(48, "float32", H200) is None
    assert "head dim 40" in str(SPACE.unsupported(40, "bfloat16", H200))
    assert "float64" in str(SPACE.unsupported(64, "float64", H200))
    assert "NVIDIA" in str(SPACE.unsupported(64, "bfloat16", MachineTarget("cpu", "x86-64-v4")))
    decisions = SPACE.untuned(128, "bfloat16", H200)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16 from 32 to 256, got 40"):
        build_mma_backward(decisions, 40, "bfloat16", "sm_90a")
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'float64'"):
        build_mma_backward(decisions, 64, "float64", "sm_90a")


def test_features_are_finite_and_tell_decisions_apart() -> None:
    problem = AttentionProblem("backward", "bfloat16", 4, 16, 16, 4096, 128, BandLayout.spattention(16))
    check_features(SPACE, problem)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_machine_code_uses_tensor_cores_and_spills_nothing(
    deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    target = parse_target("a100") if deterministic else H200
    decisions = SPACE.untuned(64, "bfloat16", target, deterministic=deterministic)
    library, kernels = compiled("mma", "backward", 64, decisions, target)
    assert len(kernels) == 3
    assert all(each["spill_store_bytes"] <= 32 for each in kernels.values())

    code = machine_code(library)
    count = Counter(re.findall(r"\b(HMMA\.16816|LDSM|LDGSTS|RED[G.A-Z]*)", code))
    *others, dkv = passes(decisions, 64, "bfloat16")
    # Of a strip: two score products, and the outputs; of a chunk dQ.
    scores = 2 * (64 // 16) * (dkv.rows // 16) * (dkv.strip // 8)
    outputs = 2 * (dkv.strip // 16) * (dkv.rows // 16) * (64 // 8)
    if deterministic:
        (dq,) = others
        scores_dq = 2 * (64 // 16) * (dq.rows // 16) * (dq.strip // 8)
        outputs_dq = (dq.strip // 16) * (dq.rows // 16) * (64 // 8)
        assert count["HMMA.16816"] == scores + outputs + scores_dq + outputs_dq
    else:
        added = (dkv.tile // 16) * (dkv.dq_rows // 16) * (dkv.dq_columns // 8)
        assert count["HMMA.16816"] == scores + outputs + added
    assert count["LDSM"] > 0 and count["LDGSTS"] > 0
    assert any(name.startswith("RED") for name in count) != deterministic


@pytest.mark.timeout(120)
def test_two_passes_at_head_dim_128_spill_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What their loads look up in shared memory, others keep in registers."""
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            for deterministic in (False, True):
                decisions = SPACE.untuned(head_dim, dtype, H200, deterministic=deterministic)
                where = deterministic and head_dim == 128 and dtype != "float32"
                assert all(part.looks_up == where for part in passes(decisions, head_dim, dtype))
    decisions = SPACE.untuned(128, "bfloat16", H200, deterministic=True)
    _, kernels = compiled("mma", "backward", 128, decisions, H200)
    assert not any(each["spill_store_bytes"] + each["spill_load_bytes"] for each in kernels.values())


PROBLEMS: dict[str, dict[str, Any]] = {
    "one token": {"length": 1},
    "paper": {"length": 1024, "kv_heads": 16, "batch": 1},
    "ragged, grouped": {"length": 333, "kv_heads": 2, "group": 3, "batch": 3, "scale": -0.3},
    "keyless queries": {"length": 517, "layout": BandLayout.exclusive(4), "strides": ("fused",) * 4},
    "keys that nobody sees": {"length": 260, "layout": BandLayout.custom([[(3, 40), (77, 90)]] * 4)},
    "packed": {
        "length": 300,
        "kv_heads": 8,
        "cu_seqlens": (0, 0, 37, 37, 190, 300),
        "strides": ("bnhd", "padded", "last", "bhnd"),
    },
    "packed, one table, grouped": {
        "length": 777,
        "kv_heads": 2,
        "group": 2,
        "layout": BandLayout.spattention(4, 1024),
        "cu_seqlens": (0, 128, 384, 640, 777),
        "strides": ("padded", "expanded", "bnhd", "bhnd"),
        "scale": 0.0,
    },
    "dense": {"length": 400, "layout": BandLayout.causal(4), "scale": 0.5},
    **{f"other keys: {name}": problem for name, problem in OTHER_KEYS.items()},
}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 48, 240])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_err_at_most_twice_as_much_as_plain_pytorch(
    dtype: str, head_dim: int, name: str, deterministic: bool
) -> None:
    problem = complete_problem(dtype, head_dim, PROBLEMS[name])
    check_problem(problem, device="cuda", impl="mma", deterministic=deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_deterministic_runs_are_bitwise_equal(dtype: str) -> None:
    layout = BandLayout.spattention(8)
    q, k, v, do = (torch.randn(2, 8, 1000, 128, device="cuda").to(DTYPES[dtype]) for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    first, second = (
        torch.autograd.grad(banded_attention(q, k, v, layout, impl="mma", deterministic=True), leaves, do)
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
