"""The Hopper backward: its space against the kernels' own sizes, its machine code, and one pass on a GPU.

Two passes, the default, are run by test_cuda_kernels.py.
"""

from __future__ import annotations

import random

import pytest
import torch

from spattn_tvm import BandLayout
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.build.resources import SPILL_TOLERANCE_BYTES, library_metadata
from spattn_tvm.build.toolchain import compile_obstacle
from spattn_tvm.dispatch import Kernel
from spattn_tvm.families import find_space
from spattn_tvm.families.hopper.backward import build_hopper_backward
from spattn_tvm.families.hopper.backward_sizes import SHARED_LIMIT, shared_bytes
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.launch import launch_backward
from spattn_tvm.reference import reference_attention, reference_gradients
from spattn_tvm.runtime import load_library
from spattn_tvm.target import MachineTarget, parse_target

SPACE = find_space("hopper", "backward")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def one_pass_decisions(head_dim: int, dtype: str, target: MachineTarget) -> dict[str, int]:
    untuned = SPACE.untuned(head_dim, dtype, target)
    return {**untuned, "one_pass": 1, "dkv_stages": 3 if head_dim == 128 else 5}


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
        most = max(shared_bytes(decisions, head_dim).values())
        reason = SPACE.illegal(decisions, head_dim, "bfloat16", h200)
        if reason is None:
            assert most <= SHARED_LIMIT
        elif "shared memory" in reason:
            refused_for_memory += 1
            assert most > SHARED_LIMIT
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
        fits.append(shared_bytes(changed, head_dim)["one"] <= SHARED_LIMIT)
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


@pytest.mark.parametrize("one_pass", [0, 1])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_machine_code_neither_spills_nor_waits_for_each_product(
    head_dim: int, one_pass: int, h200: MachineTarget
) -> None:
    if compile_obstacle(h200) is not None:
        pytest.skip(str(compile_obstacle(h200)))
    decisions = SPACE.untuned(head_dim, "bfloat16", h200)
    if one_pass:
        decisions = one_pass_decisions(head_dim, "bfloat16", h200)
    path = compile_kernel(KernelSpec("hopper", "backward", "bfloat16", head_dim, decisions), h200)
    resources = library_metadata(path)["resources"]
    assert len(resources["kernels"]) == 3
    for kernel in resources["kernels"].values():
        assert kernel["spill_store_bytes"] <= SPILL_TOLERANCE_BYTES
    assert not [text for text in resources["warnings"] if "serialized" in text]


ONE_PASS_PROBLEMS = {
    "tails": (2, 4, 4, 333, "spattention", None),
    "groups": (1, 4, 1, 1000, "exclusive", None),
    "packed": (1, 8, 4, 1111, "spattention", [0, 7, 64, 700, 1111]),
    "dense": (2, 2, 2, 517, "causal", [0, 100, 101, 300, 517]),
    "single": (3, 2, 1, 1, "causal", None),
    "many tiles": (2, 16, 16, 2048, "spattention", None),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("name", ONE_PASS_PROBLEMS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_gives_the_gradients_of_the_reference(
    dtype: str, head_dim: int, name: str, h200: MachineTarget
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of sm_90")
    if compile_obstacle(h200) is not None:
        pytest.skip(str(compile_obstacle(h200)))
    batch, heads, kv_heads, length, layout_name, documents = ONE_PASS_PROBLEMS[name]
    decisions = one_pass_decisions(head_dim, dtype, h200)
    spec = KernelSpec("hopper", "backward", dtype, head_dim, decisions)
    kernel = Kernel(load_library(compile_kernel(spec, h200), "backward"), spec)
    layout = getattr(BandLayout, layout_name)(heads, length)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(batch, count, length, head_dim, device="cuda").to(DTYPES[dtype])

    q, k, v, do = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    scale = head_dim**-0.5
    o, lse = reference_attention(q, k, v, layout, scale=scale, cu_seqlens=documents)
    o = o.to(q.dtype)
    lse = lse.contiguous()
    dlse = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
    exact = reference_gradients(q, k, v, o, lse, do, dlse, layout, scale=scale, cu_seqlens=documents)
    bands = torch.tensor(layout.table(length)[None], device="cuda")
    cu_seqlens = torch.tensor(documents or [0, length], dtype=torch.int32, device="cuda")
    ours = launch_backward(kernel, q, k, v, o, lse, do, dlse, bands, cu_seqlens, scale)
    for gradient, expected in zip(ours, exact, strict=True):
        # At most 0.0056 in some hundred runs on an H200.
        assert (gradient.float() - expected).abs().max() <= 0.02 * expected.abs().max()
