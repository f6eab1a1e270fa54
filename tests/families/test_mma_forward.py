"""The portable tensor-core forward: its space, its machine code and, on a GPU, its results."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import compiled, machine_code
from drawn_decisions import ARCHS, HEAD_DIMS, KIBIBYTES, check_features, check_fit, draw_legal
from sweep import DTYPES, SweepProblem, check_problem

from spattn_tvm import BandLayout, banded_attention
from spattn_tvm.families import find_space
from spattn_tvm.families.mma.blocks import row_pitch
from spattn_tvm.families.mma.forward import build_mma_forward, registers_needed, shared_bytes
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import attention_mask, reference_gradients
from spattn_tvm.target import MachineTarget, parse_target, registers_most

SPACE = find_space("mma", "forward")
H200 = parse_target("nvidia/h200")
IMPLS = ("mma", "mma_split")  # the second with keys split over blocks


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_untuned_decisions_are_legal_for_every_head_dim(dtype: str, arch: str) -> None:
    target = MachineTarget("cuda", arch)
    for head_dim in range(32, 257, 16):
        decisions = SPACE.untuned(head_dim, dtype, target, deterministic=True)
        assert SPACE.rejection(decisions, head_dim, dtype, target) is None
        assert SPACE.is_deterministic(decisions)


@pytest.mark.parametrize("arch", sorted(KIBIBYTES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_legal_decisions_share_the_memory_and_registers_that_a_chip_has(dtype: str, arch: str) -> None:
    legal = list(draw_legal(SPACE, dtype, arch, 3000))
    for head_dim, decisions in legal:
        needed = shared_bytes(decisions, head_dim, dtype), registers_needed(decisions, head_dim, dtype)
        check_fit(arch, decisions["blocks_per_multiprocessor"], 32 * decisions["warps"], *needed)
        assert decisions["key_rows"] % decisions["edge_keys"] == 0
    assert len(legal) > 30


def test_a_smaller_chip_allows_less() -> None:
    decisions = SPACE.untuned(128, "bfloat16", H200)
    assert SPACE.illegal(decisions, 128, "bfloat16", H200) is None
    assert "shared memory" in str(SPACE.illegal(decisions, 128, "bfloat16", parse_target("rtx4090")))


@pytest.mark.parametrize(
    "dtype,changes,message",
    [
        ("bfloat16", {"stages": 6}, "bytes of shared memory"),
        ("bfloat16", {"ahead": 3, "stages": 3}, "ahead=3 leaves none"),
        ("bfloat16", {"blocks_per_multiprocessor": 3, "key_rows": 32, "stages": 2}, "registers are needed"),
        ("bfloat16", {"key_rows": 128, "stages": 2, "blocks_per_multiprocessor": 1}, "registers are needed"),
        ("bfloat16", {"key_rows": 16, "edge_keys": 32}, "does not divide"),
        (
            "float32",
            {"warp_rows": 16, "key_rows": 16, "edge_keys": 16, "queries_in_registers": 1},
            "queries_in_registers is for two-byte types",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    dtype: str, changes: dict[str, int], message: str
) -> None:
    decisions = {**SPACE.untuned(128, "bfloat16", H200), **changes}
    assert message in str(SPACE.rejection(decisions, 128, dtype, H200))
    with pytest.raises(ValueError, match=message):
        build_mma_forward(decisions, 128, dtype, "sm_90a")


def test_unsupported_problems_are_refused_with_a_reason() -> None:
    assert SPACE.unsupported(48, "float32", H200) is None
    assert "head dim 40" in str(SPACE.unsupported(40, "bfloat16", H200))
    assert "head dim 272" in str(SPACE.unsupported(272, "bfloat16", H200))
    assert "float64" in str(SPACE.unsupported(64, "float64", H200))
    assert "NVIDIA" in str(SPACE.unsupported(64, "bfloat16", MachineTarget("cpu", "x86-64-v4")))


def test_features_are_finite_and_tell_decisions_apart() -> None:
    problem = AttentionProblem("forward", "bfloat16", 4, 16, 16, 4096, 128, BandLayout.spattention(16))
    check_features(SPACE, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_eight_rows_of_a_column_are_in_different_banks(head_dim: int, dtype: str) -> None:
    size = 4 if dtype == "float32" else 2
    pitch = row_pitch(head_dim, dtype) * size
    assert pitch % 16 == 0
    assert len({row * pitch // 16 % 8 for row in range(8)}) == 8


@pytest.mark.timeout(120)
def test_the_machine_code_uses_tensor_cores_and_spills_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = parse_target("a100")
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    decisions = SPACE.untuned(64, "bfloat16", target)
    library, kernels = compiled("mma", "forward", 64, decisions, target)
    (resources,) = kernels.values()
    assert resources["spill_store_bytes"] == resources["spill_load_bytes"] == 0
    assert resources["registers"] <= registers_most(
        32 * decisions["warps"], decisions["blocks_per_multiprocessor"]
    )

    code = machine_code(library)
    count = Counter(re.findall(r"\b(HMMA\.16816|LDSM|LDGSTS|LDL|STL)\b", code))
    # A whole step and an edge step, each with scores and output for every tile of rows.
    products = loads = 0
    tiles, blocks = decisions["warp_rows"] // 16, 64 // 16
    for keys in (decisions["key_rows"], decisions["edge_keys"]):
        products += 2 * tiles * blocks * (keys // 8)
        loads += blocks * (tiles + 2 * (keys // 16))
    assert count["HMMA.16816"] == products
    assert count["LDSM"] == loads
    assert count["LDGSTS"] > 0
    assert count["LDL"] == count["STL"] == 0


class _WithReferenceGradients(torch.autograd.Function):
    """The forward under test, so that its errors are judged apart from the backward's."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, problem: SweepProblem, impl: str) -> Any:
        ctx.problem, ctx.places = problem, problem.placed.arguments("cuda")
        o, lse = banded_attention(
            q, k, v, problem.layout, scale=problem.scale, return_lse=True, impl=impl, **ctx.places
        )
        ctx.save_for_backward(q, k, v, o, lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Any, dlse: Any) -> Any:
        q, k, v, o, lse = ctx.saved_tensors
        gradients = reference_gradients(
            q, k, v, o, lse, do, dlse, ctx.problem.layout, scale=ctx.problem.scale, **ctx.places
        )
        return *(g.to(q.dtype) for g in gradients), None, None


PROBLEMS = {
    "one token": {"length": 1},
    "paper": {"length": 1024, "kv_heads": 16},
    "ragged, grouped": {"length": 333, "kv_heads": 2, "group": 3, "batch": 3, "scale": -0.3},
    "keyless queries": {"length": 517, "layout": BandLayout.exclusive(4), "strides": ("fused",) * 4},
    "packed": {
        "length": 300,
        "kv_heads": 8,
        "cu_seqlens": (0, 0, 37, 37, 190, 300),
        "strides": ("bnhd", "padded", "last", "bhnd"),
    },
    "packed, one table": {
        "length": 777,
        "layout": BandLayout.spattention(4, 1024),
        "cu_seqlens": (0, 128, 384, 640, 777),
        "strides": ("padded", "expanded", "bnhd", "bhnd"),
        "scale": 0.0,
    },
    "dense": {"length": 400, "layout": BandLayout.causal(4), "scale": 0.5},
}
HOLES = BandLayout.custom([[(0, 20), (200, 260)], [(0, 20), (200, 260)], [(5, 5)], [(130, 400)]])
OTHER_KEYS = {
    "a prompt's last chunk": {
        "length": 200, "kv_length": 901, "layout": BandLayout.spattention(4, 901), "kv_heads": 2, "group": 2
    },
    "fewer keys than queries": {"length": 300, "kv_length": 131, "layout": HOLES},
    "a cache padded on both sides": {
        "length": 130,
        "kv_length": 700,
        "batch": 3,
        "layout": BandLayout.spattention(4, 1024),
        "strides": ("bnhd", "padded", "bnhd", "fused"),
        "places": {"kv_lengths": [700, 333, 0], "kv_starts": [0, 77, 5]},
    },
    "queries before the keys": {
        "length": 300, "kv_length": 200, "layout": BandLayout.causal(4), "places": {"query_offset": -150}
    },
    # Queries without keys between others, and behind all.
    "queries behind the keys": {
        "length": 700, "kv_length": 300, "layout": HOLES, "places": {"query_offset": [10, 250]}
    },
    "queries far from the keys": {
        "length": 150,
        "kv_length": 100,
        "layout": BandLayout.causal(4),
        "places": {"query_offset": [2**30, -(2**31)]},
    },
    "packed": {
        "length": 500,
        "kv_length": 640,
        "layout": BandLayout.spattention(4, 1024),
        "cu_seqlens": (0, 100, 100, 350, 480),
        "places": {"cu_seqlens_k": [0, 0, 200, 333, 600]},
    },
}  # fmt: skip
PROBLEMS |= {f"other keys: {name}": problem for name, problem in OTHER_KEYS.items()}


def complete_problem(dtype: str, head_dim: int, given: dict[str, Any]) -> SweepProblem:
    """The problem of some fields, the usual others and fresh data."""
    fields = {
        "batch": 2,
        "kv_heads": 4,
        "group": 1,
        "strides": ("bhnd",) * 4,
        "cu_seqlens": None,
        "scale": None,
        **given,
    }
    fields.setdefault("layout", BandLayout.spattention(fields["kv_heads"] * fields["group"]))
    return SweepProblem(dtype=dtype, head_dim=head_dim, loss="both", seed=random.getrandbits(32), **fields)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 48, 80])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_results_err_at_most_twice_as_much_as_plain_pytorch(
    impl: str, dtype: str, head_dim: int, name: str
) -> None:
    problem = complete_problem(dtype, head_dim, PROBLEMS[name])

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _WithReferenceGradients.apply(q, k, v, problem, impl)

    check_problem(problem, device="cuda", attention=attention)


@pytest.mark.gpu
@pytest.mark.parametrize("sign", [1, -1, 0], ids=["positive", "negative", "of both signs"])
@pytest.mark.parametrize("size", [1e3, 1e5, 1e9, 1e15, 1.2e18])
@pytest.mark.parametrize("dtype,head_dim", [("float32", 32), ("bfloat16", 64), ("bfloat16", 128)])
@pytest.mark.parametrize("impl", IMPLS)
def test_scores_up_to_the_float32_limit(impl: str, dtype: str, head_dim: int, size: float, sign: int) -> None:
    """Where one key's score is far above the others', it takes all, however large or small all are."""
    layout = BandLayout.custom([[(0, 40), (100, 160)], [(7, 90)]])
    mask = attention_mask(layout, 300, device="cuda")
    compared = 0
    for scale in (head_dim**-0.5, 3 / head_dim, 2.0):
        q, k, v = (torch.randn(2, 2, 300, head_dim, device="cuda") for _ in range(3))
        if sign:
            q, k = q.abs() * sign, k.abs()
        q, k, v = (tensor.to(DTYPES[dtype]) for tensor in (q * size, k * size, v))
        products = q.double() @ k.double().mT
        scores = (scale * products).masked_fill(~mask, -torch.inf)
        if max(1, scale) * products.abs().max() > 3e38:
            continue
        has_key = mask.any(-1).expand(2, -1, -1)
        scores, mine, other = scores[has_key], *scores.topk(2)[0][has_key].unbind(-1)
        # Rounded as a float32 product is, the best must still be the best by enough to take all.
        clear = mine - other > 1e-5 * mine.abs() + 30
        o, lse = banded_attention(q, k, v, layout, scale=scale, return_lse=True, impl=impl)
        values = v.double()[:, :, None].expand(-1, -1, 300, -1, -1)[has_key]
        expected = (scores.softmax(-1)[:, None] @ values)[:, 0]
        assert not o.isnan().any() and torch.equal(lse == -torch.inf, ~has_key)
        torch.testing.assert_close(o[has_key][clear].double(), expected[clear], rtol=1e-2, atol=1e-2)
        # Products of both signs cancel, their errors don't.
        error = (lse[has_key].double() - scores.logsumexp(-1)).abs().max()
        assert error < 1e-3 + 1e-5 * scale * products.abs().max()
        compared += int(clear.sum())
    assert compared
