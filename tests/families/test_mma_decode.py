"""The portable decode: its space, its machine code and, on a GPU, its results in each form of a cache.

``SPATTN_SWEEP`` sets the number of random steps that all dtypes and head dims share.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import compiled, machine_code
from decode_problems import FORMS, DecodeProblem, random_decode
from drawn_decisions import ARCHS, HEAD_DIMS, KIBIBYTES, check_features, check_fit, draw_legal
from sweep import DTYPES

from spattn_tvm import BandLayout, banded_attention_decode
from spattn_tvm.accuracy import judge
from spattn_tvm.choice import find_schedule
from spattn_tvm.families import find_space
from spattn_tvm.families.family import Sizes
from spattn_tvm.families.mma.abi import DECODE
from spattn_tvm.families.mma.decode import build_mma_decode
from spattn_tvm.families.mma.decode_sizes import flying_bytes, registers_needed, shared_bytes, words
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget, parse_target

SPACE = find_space("mma", "decode")
H100 = parse_target("nvidia/h100")
SWEEP = int(os.environ.get("SPATTN_SWEEP", "600"))
STEP = AttentionProblem(
    "decode", "bfloat16", 4, 16, 16, 1, 128, BandLayout.spattention(16, 32768), kv_length=32768
)


# --- the space --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_untuned_decisions_are_legal_for_every_head_dim(dtype: str, arch: str) -> None:
    target = MachineTarget("cuda", arch)
    kibibytes = 32 if arch in ("sm_80", "sm_90a", "sm_100a") else 16  # others have less shared memory
    for head_dim in range(32, 257, 16):
        decisions = SPACE.untuned(head_dim, dtype, target, deterministic=True)
        assert SPACE.rejection(decisions, head_dim, dtype, target) is None
        assert SPACE.is_deterministic(decisions)
        assert flying_bytes(decisions, head_dim, dtype) >= 1024 * kibibytes


@pytest.mark.parametrize("arch", sorted(KIBIBYTES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_legal_decisions_share_the_memory_and_registers_that_a_chip_has(dtype: str, arch: str) -> None:
    legal = list(draw_legal(SPACE, dtype, arch, 2000))
    for head_dim, decisions in legal:
        needed = shared_bytes(decisions, head_dim, dtype), registers_needed(decisions, head_dim, dtype)
        check_fit(arch, decisions["blocks_per_multiprocessor"], 32 * decisions["warps"], *needed)
    assert len(legal) > 100


def test_a_warps_results_fit_in_the_place_of_its_tiles() -> None:
    for dtype in DTYPES:
        size = 4 if dtype == "float32" else 2
        for head_dim in HEAD_DIMS:
            for structure in SPACE.structures(head_dim, dtype).values():
                least = {name: min(values) for name, values in structure.items()}
                ring = shared_bytes(least, head_dim, dtype) - 4 * words(least).end
                assert ring - 16 * (head_dim * size + 16) >= 16 * head_dim * 4


@pytest.mark.parametrize(
    "dtype,changes,message",
    [
        ("bfloat16", {"stages": 6}, "bytes of shared memory"),
        ("bfloat16", {"blocks_per_multiprocessor": 3}, "registers are needed"),
        ("bfloat16", {"key_rows": 64, "warps": 1}, "registers are needed"),
        ("bfloat16", {"waves": 8}, "8 waves of 2 blocks a multiprocessor are more than the 8"),
        ("float32", {"warps": 1}, "queries_in_registers is for two-byte types"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    dtype: str, changes: dict[str, int], message: str
) -> None:
    head_dim = 192 if "key_rows" in changes else 128
    decisions = {**SPACE.untuned(head_dim, "bfloat16", H100), **changes}
    assert message in str(SPACE.illegal(decisions, head_dim, dtype, H100))
    with pytest.raises(ValueError, match=message):
        build_mma_decode(decisions, head_dim, dtype, "sm_90a")


def test_features_are_finite_and_tell_decisions_apart() -> None:
    check_features(SPACE, STEP)


def test_it_serves_the_chips_whose_own_family_decodes_nothing() -> None:
    for target in (H100, parse_target("nvidia/a100")):
        assert find_schedule(STEP, target).kernel.family == "mma"


def test_scratch_is_for_as_many_parts_as_a_chip_can_work_on() -> None:
    def shapes(batch: int, query_heads: int, kv_heads: int, queries: int) -> list[tuple[int, ...]]:
        sizes = Sizes(batch, query_heads, kv_heads, queries, 4096, 128, 132)
        return [item.shape(sizes) for item in DECODE.scratch]

    assert shapes(1, 16, 16, 1) == [(1056, 1, 128), (1056, 1, 4), (1056,)]
    assert shapes(1, 32, 4, 3) == [(1056, 16, 128), (1056, 16, 4), (1056,)]
    # More than half as many blocks as there can be parts: none is divided.
    assert shapes(32, 32, 32, 1) == [(1, 1, 128), (1, 1, 4), (1,)]
    assert shapes(33, 32, 2, 2)[2] == (1056,) and shapes(265, 4, 2, 1)[2] == (1,)


# --- the machine code -------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_the_machine_code_uses_tensor_cores_and_spills_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = parse_target("a100")
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    decisions = SPACE.untuned(128, "bfloat16", target)
    library, kernels = compiled("mma", "decode", 128, decisions, target)
    (resources,) = kernels.values()
    assert resources["spill_store_bytes"] == resources["spill_load_bytes"] == 0
    blocks, threads = decisions["blocks_per_multiprocessor"], 32 * decisions["warps"]
    assert blocks * threads * resources["registers"] <= 65536
    assert resources["dynamic_shared_bytes"] == shared_bytes(decisions, 128, "bfloat16")

    count = Counter(re.findall(r"\b(HMMA\.16816|LDSM|LDGSTS|LDL|STL)\b", machine_code(library)))
    # Scores and output of one tile; keys and values, and the queries once.
    pieces = 128 // 16
    assert count["HMMA.16816"] == 2 * pieces * (decisions["key_rows"] // 8)
    assert count["LDSM"] == pieces * (1 + 2 * (decisions["key_rows"] // 16))
    assert count["LDGSTS"] > 0
    assert count["LDL"] == count["STL"] == 0


# --- results ----------------------------------------------------------------------------------------------


def plain(
    problem: DecodeProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The step as a few PyTorch operations in q's dtype."""
    mask, group = problem.mask().to(q.device), problem.query_heads // problem.kv_heads
    k, v = (tensor.nan_to_num().repeat_interleave(group, 1) for tensor in (k, v))
    scores = (problem.head_dim**-0.5 * (q @ k.mT)).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return {"o": weights @ v, "lse": scores.float().logsumexp(-1)}


def check(problem: DecodeProblem, dtype: str) -> None:
    """Judge a step's results, which must also be the same when it is done again."""
    q, k, v = problem.tensors(DTYPES[dtype], "cuda")
    k_cache, v_cache, places = problem.cached(k, v)
    options: dict[str, Any] = {"return_lse": True, "impl": "mma", **places}
    results = banded_attention_decode(q, k_cache, v_cache, problem.layout, **options)
    again = banded_attention_decode(q, k_cache, v_cache, problem.layout, **options)
    for result, other in zip(results, again, strict=True):
        assert torch.equal(result, other), problem
    actual = {name: result.cpu() for name, result in zip(("o", "lse"), results, strict=True)}
    exact = dict(zip(("o", "lse"), problem.truth(q, k, v), strict=True))
    expected = {name: value.cpu() for name, value in plain(problem, q, k, v).items()}
    _, wrong = judge(actual, exact, expected, dtype)
    assert not wrong, f"{problem}: {wrong}"


VARIANTS = [(dtype, head_dim) for dtype in DTYPES for head_dim in (*HEAD_DIMS, 48, 80)]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype,head_dim", VARIANTS)
def test_random_steps_err_at_most_twice_as_much_as_plain_pytorch(dtype: str, head_dim: int) -> None:
    for _ in range(max(3, SWEEP // len(VARIANTS))):
        longest = random.choice((60, 400, 3000))
        check(random_decode(random.getrandbits(31), head_dims=(head_dim,), longest=longest), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads,query_heads,queries", [(1, 1, 1), (1, 16, 1), (2, 8, 16), (16, 16, 2)])
def test_keys_that_many_blocks_share(form: str, kv_heads: int, query_heads: int, queries: int) -> None:
    """Hundreds of parts, of which groups are merged, and groups of those."""
    problem = random_decode(random.getrandbits(31), head_dims=(128,), form=form)
    layout = BandLayout.causal(query_heads) if queries == 1 else BandLayout.spattention(query_heads, 30000)
    check(
        replace(
            problem,
            query_heads=query_heads,
            kv_heads=kv_heads,
            queries=queries,
            lengths=(29000 + problem.seed % 999,),
            starts=None,
            layout=layout,
        ),
        "bfloat16",
    )


@pytest.fixture
def step() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    q, k, v = (torch.randn(2, heads, rows, 64).cuda() for heads, rows in ((4, 3), (2, 200), (2, 200)))
    yield q.bfloat16(), k.bfloat16(), v.bfloat16()


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_any_factor(step: tuple[torch.Tensor, ...], scale: float) -> None:
    q, k, v = step
    layout, lengths = BandLayout.spattention(4, 200), torch.tensor([200, 77]).cuda()
    options: dict[str, Any] = {"cache_lengths": lengths, "scale": scale, "return_lse": True}
    actual = banded_attention_decode(q, k, v, layout, impl="mma", **options)
    exact = banded_attention_decode(q.double(), k.double(), v.double(), layout, impl="reference", **options)
    for result, value in zip(actual, exact, strict=True):
        torch.testing.assert_close(result.double(), value, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_query_that_is_nan_stays_alone(step: tuple[torch.Tensor, ...]) -> None:
    q, k, v = step
    q[1, 2, 1] = torch.nan
    layout, lengths = BandLayout.spattention(4, 200), torch.tensor([200, 200]).cuda()
    o, lse = banded_attention_decode(q, k, v, layout, cache_lengths=lengths, return_lse=True, impl="mma")
    wanted = torch.zeros_like(lse, dtype=torch.bool)
    wanted[1, 2, 1] = True
    assert torch.equal(lse.isnan(), wanted)
    assert torch.equal(o.isnan(), wanted[..., None].expand_as(o))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_device_says_nothing_outside_is_read(form: str) -> None:
    """Huge, negative and random numbers; a sanitizer watches the same."""
    draw = torch.Generator().manual_seed(random.getrandbits(31))
    for _ in range(20):
        problem = random_decode(random.getrandbits(31), head_dims=(64,), form=form)
        k_cache, v_cache, places = problem.cached(*problem.tensors(torch.bfloat16, "cuda")[1:])
        for name, value in places.items():
            wild = torch.randint(-(2**31), 2**31, value.shape, generator=draw)
            places[name] = wild.to(torch.int32).cuda()
        q = problem.tensors(torch.bfloat16, "cuda")[0]
        banded_attention_decode(q, k_cache, v_cache, problem.layout, impl="mma", **places)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_it_can_be_captured(step: tuple[torch.Tensor, ...]) -> None:
    q, k, v = step
    layout, lengths = BandLayout.spattention(4, 200), torch.tensor([150, 200], dtype=torch.int32).cuda()

    def run() -> torch.Tensor:
        return banded_attention_decode(q, k, v, layout, cache_lengths=lengths, impl="mma")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for first in (30, 7, 199):
        lengths.copy_(torch.tensor([first, 200]))
        graph.replay()
        assert torch.equal(captured, run())
