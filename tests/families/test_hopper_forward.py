"""What the Hopper forward can be built with; on a GPU, what it gives, with keys split over blocks
too (the rest of which is in test_hopper_split.py)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from length_problems import tiled_problems, truth
from torch import Tensor

from spattn_tvm import BandLayout
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.build.toolchain import compile_obstacle
from spattn_tvm.choice import find_schedule
from spattn_tvm.dispatch import Kernel
from spattn_tvm.families import find_space
from spattn_tvm.families.hopper.forward import build_hopper_forward
from spattn_tvm.families.hopper.forward_sizes import (
    SHARED_BYTES_MOST,
    entry_registers,
    producer_registers,
    shared_bytes,
)
from spattn_tvm.families.hopper.forward_space import keys_of_tiles
from spattn_tvm.families.hopper.split import build_hopper_split
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.launch import launch_forward
from spattn_tvm.ops.band_tables import find_domain
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import attention_mask
from spattn_tvm.runtime import load_library
from spattn_tvm.store import ScheduleRecord, save_records
from spattn_tvm.target import MachineTarget, parse_target

SPACE = find_space("hopper", "forward")
SPLIT = {"least_chunks": 1}  # the decision that keys are split over blocks by


@pytest.fixture
def h200() -> MachineTarget:
    return parse_target("nvidia/h200")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_the_untuned_decisions_are_legal(head_dim: int, dtype: str, h200: MachineTarget) -> None:
    for decisions in SPACE.all_untuned(head_dim, dtype, h200):
        assert SPACE.rejection(decisions, head_dim, dtype, h200) is None


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
    with pytest.raises(ValueError, match=message):
        build_hopper_split({**decisions, **SPLIT}, 128, "bfloat16")


@pytest.mark.parametrize("build", [build_hopper_forward, build_hopper_split])
def test_builders_refuse_head_dims_and_dtypes_without_kernels(
    build: Callable[..., object], h200: MachineTarget
) -> None:
    decisions = {**SPACE.untuned(128, "bfloat16", h200), **SPLIT}
    with pytest.raises(ValueError, match="dtype must be 'bfloat16' or 'float16', got 'float32'"):
        build(decisions, 128, "float32")
    with pytest.raises(ValueError, match="head_dim must be a multiple of 64, got 96"):
        build(decisions, 96, "bfloat16")


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


def chunk(
    queries: int, keys: int, layout: BandLayout, batch: int = 1, head_dim: int = 128
) -> AttentionProblem:
    heads = layout.num_heads
    return AttentionProblem("forward", "bfloat16", batch, heads, heads, queries, head_dim, layout, keys)


@pytest.mark.parametrize(("rows", "chunk_keys"), [(128, 96), (192, 64)])
def test_the_keys_of_tiles_are_those_that_their_queries_attend_to(rows: int, chunk_keys: int) -> None:
    draw = random.Random(rows)
    for _ in range(20):
        queries = draw.randint(1, 700)
        keys = queries + draw.choice((0, draw.randint(0, 500)))
        low = draw.randint(0, 90)
        layout = BandLayout.custom([[(low, low + draw.randint(0, 300))], [(0, 7), (150, 900)], []])
        found = keys_of_tiles(chunk(queries, keys, layout), rows, chunk_keys)
        for head, bands in enumerate(layout.bands(keys)):
            parts = [BandLayout.custom([[band]]) for band in bands]
            masks = [attention_mask(part, keys)[0, keys - queries :] for part in parts]
            for tile, first in enumerate(reversed(range(0, queries, rows))):
                read = [int(mask[first : first + rows].any(0).sum()) for mask in masks]
                assert found[head, tile] == sum(math.ceil(n / chunk_keys) * chunk_keys for n in read)


def test_few_tiles_have_shapes_by_when_the_last_multiprocessor_ends(h200: MachineTarget) -> None:
    """16 heads and 32768 keys, and what was fastest of 2 warpgroups (rows of 128) and 3 (192)."""
    bands, pcie = BandLayout.spattention(16, 32768), parse_target("nvidia/h100-pcie")

    def warpgroups(problem: AttentionProblem, target: MachineTarget = h200) -> int:
        kernel = KernelSpec.untuned("hopper", problem, target)
        assert kernel.rejection(target) is None
        return kernel.decisions["consumer_warpgroups"]

    found = [warpgroups(chunk(n, 32768, bands)) for n in (1024, 1536, 2048, 3072, 4096, 6144)]
    assert found == [2, 3, 2, 3, 3, 3]
    # 128 tiles of 128 rows go round once on 132 multiprocessors, twice on 114, as 96 of 192 rows do once.
    assert warpgroups(chunk(1024, 32768, bands), pcie) == 3
    # The last tiles of many sequences matter little, whatever their number.
    assert {warpgroups(chunk(1024, 32768, bands, batch)) for batch in range(8, 30)} == {3}
    assert warpgroups(chunk(1024, 1024, BandLayout.spattention(16))) == 2
    wide, narrow = (chunk(1024, 32768, bands), chunk(1024, 1024, BandLayout.spattention(16)))
    rows = [KernelSpec.untuned("hopper", problem, h200).decisions["key_rows"] for problem in (wide, narrow)]
    assert rows[0] > rows[1], "larger chunks where there are many"


def test_a_record_of_many_tiles_does_not_speak_for_few(h200: MachineTarget, tmp_path: Path) -> None:
    """Nor one of few for many; one of the same case does, whatever its bands."""
    bands = BandLayout.spattention(16, 32768)
    many, few = chunk(8192, 32768, bands), chunk(2048, 32768, bands)
    for recorded, other in ((many, few), (few, many)):
        root = tmp_path / str(recorded.length)
        space = SPACE.untuned_for(recorded, h200) | {"head_group": 16}
        kernel = KernelSpec.of("hopper", recorded, space)
        save_records([ScheduleRecord(recorded, h200.folder, kernel, 100.0)], root)
        assert find_schedule(recorded, h200, families=["hopper"], root=root).status == "tuned"
        choice = find_schedule(other, h200, families=["hopper"], root=root)
        assert (choice.status, choice.kernel) == ("untuned", KernelSpec.untuned("hopper", other, h200))
        assert f"the default for {16 * other.length // 128} tiles of 128 queries" in choice.reason
    choice = find_schedule(chunk(9000, 32768, bands), h200, families=["hopper"], root=tmp_path / "8192")
    assert choice.status == "nearest"


def kernel_of(changes: dict[str, int], dtype: str, head_dim: int, target: MachineTarget) -> Kernel:
    """The kernel with the untuned decisions but for some, for a test on a GPU: one that splits keys if they
    say how far.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of sm_90")
    if compile_obstacle(target) is not None:
        pytest.skip(str(compile_obstacle(target)))
    family = "hopper_split" if "least_chunks" in changes else "hopper"
    space = find_space(family, "forward")
    decisions = {**space.untuned(head_dim, dtype, target), **changes}
    assert space.rejection(decisions, head_dim, dtype, target) is None
    spec = KernelSpec(family, "forward", dtype, head_dim, decisions)
    return Kernel(load_library(compile_kernel(spec, target), "forward"), spec)


LARGE_CHUNKS = {
    "consumer_warpgroups": 2, "consumer_registers": 240, "key_rows": 128, "stages": 2, "overlap": 0,
    "queries_in_registers": 0,
}  # fmt: skip
variants = pytest.mark.parametrize(
    "changes,dtype,head_dim",
    [
        ({}, "bfloat16", 64),
        ({}, "float16", 64),
        ({}, "bfloat16", 128),
        ({}, "float16", 128),
        ({}, "bfloat16", 192),
        (LARGE_CHUNKS, "bfloat16", 128),
        (SPLIT, "bfloat16", 64),
        (SPLIT, "float16", 64),
        (SPLIT, "bfloat16", 128),
        (SPLIT, "float16", 128),
        (SPLIT, "bfloat16", 192),
        *(
            (SPACE.untuned(head_dim, dtype, parse_target("nvidia/h100"), case=case), dtype, head_dim)
            for case in (1, 2)
            for head_dim, dtype in ((64, "float16"), (128, "bfloat16"))
        ),
    ],
)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("name", tiled_problems(64))
@variants
def test_queries_and_keys_that_are_not_the_same_rows(
    changes: dict[str, int], dtype: str, head_dim: int, name: str, h200: MachineTarget
) -> None:
    kernel = kernel_of(changes, dtype, head_dim, h200)
    problem, torch_dtype = tiled_problems(head_dim)[name], getattr(torch, dtype)
    q, k, v, _, _ = problem.tensors(torch_dtype, "cuda")
    assert k.isnan().any() == problem.unused().any()
    domain = find_domain(problem.layout.spec, q, k, **problem.arguments("cuda"))
    o, lse = (tensor.cpu() for tensor in launch_forward(kernel, q, k, v, domain, head_dim**-0.5))
    expected, keyless = truth(problem, dtype=torch_dtype), ~problem.mask().any(-1)
    assert torch.equal(lse == -torch.inf, keyless)
    assert (o[keyless] == 0).all()
    torch.testing.assert_close(lse.double(), expected["lse"], rtol=1e-4, atol=1e-4)
    assert (o.double() - expected["o"]).norm() <= 5e-3 * expected["o"].norm()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("changes", [{}, SPLIT])
@pytest.mark.parametrize("dtype,head_dim", [("bfloat16", 64), ("float16", 128)])
def test_chunks_of_a_prompt_equal_one_call(
    changes: dict[str, int], dtype: str, head_dim: int, h200: MachineTarget
) -> None:
    kernel, layout = kernel_of(changes, dtype, head_dim, h200), BandLayout.spattention(4, 1100)
    q, k, v = (
        torch.randn(2, heads, 1001, head_dim, device="cuda").to(getattr(torch, dtype)) for heads in (4, 2, 2)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, **places: Any) -> tuple[Tensor, Tensor]:
        domain = find_domain(layout.spec, q, k, **places)
        return launch_forward(kernel, q, k, v, domain, head_dim**-0.5)

    whole, whole_lse = attend(q, k, v)
    for begin, end in ((0, 1), (1, 64), (64, 513), (513, 1000), (1000, 1001)):
        chunk = q[:, :, begin:end]
        cache = [torch.cat((t[:, :, :end], torch.full_like(t[:, :, end:], torch.nan)), 2) for t in (k, v)]
        for o, lse in (
            attend(chunk, k[:, :, :end], v[:, :, :end]),
            attend(chunk, k, v, query_offset=begin),
            attend(chunk, *cache, kv_lengths=torch.tensor([end, end], device="cuda")),
        ):
            torch.testing.assert_close(lse, whole_lse[:, :, begin:end], rtol=1e-5, atol=1e-5)
            # Other tiles mean other maxima, so that other weights are rounded.
            difference = (o - whole[:, :, begin:end]).float().norm()
            assert difference <= 5e-3 * whole[:, :, begin:end].float().norm()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("changes", [{}, SPLIT])
@pytest.mark.parametrize("dtype,head_dim", [("bfloat16", 64), ("float16", 128)])
def test_what_a_document_with_keys_of_its_own_holds_stays_there(
    changes: dict[str, int], dtype: str, head_dim: int, value: float, h200: MachineTarget
) -> None:
    kernel = kernel_of(changes, dtype, head_dim, h200)
    ends, key_ends = [0, 1, 63, 130, 131, 195, 260, 389, 600], [0, 140, 141, 141, 300, 433, 500, 701, 800]
    layout = BandLayout.custom([[(3, 9), (33, 90)], [(0, 80)], [(65, 400)], []])
    q, k, v = (
        torch.randn(2, heads, length, head_dim, device="cuda").to(getattr(torch, dtype))
        for heads, length in ((4, 600), (2, 800), (2, 800))
    )
    places = {
        "cu_seqlens": torch.tensor(ends, device="cuda"),
        "cu_seqlens_k": torch.tensor(key_ends, device="cuda"),
    }
    domain = find_domain(layout.spec, q, k, **places)
    clean = launch_forward(kernel, q, k, v, domain, head_dim**-0.5)
    for (begin, end), keys in zip(pairwise(ends), pairwise(key_ends), strict=True):
        poisoned = [tensor.clone() for tensor in (q, k, v)]
        for tensor, rows in zip(poisoned, ((begin, end), keys, keys), strict=True):
            tensor[:, :, slice(*rows)] = value
        for result, same in zip(
            launch_forward(kernel, *poisoned, domain, head_dim**-0.5), clean, strict=True
        ):
            result[:, :, begin:end] = same[:, :, begin:end]
            assert torch.equal(result, same), (begin, end, keys)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, layout: BandLayout, scale: float) -> tuple[Tensor, ...]:
    """Of (1, H, N, D), in float64: o, lse, and the greatest scores, NaN for queries without keys."""
    mask = attention_mask(layout, q.shape[2], device=q.device)
    scores = (scale * (q.double() @ k.double().mT)).masked_fill(~mask, -torch.inf)
    top = scores.amax(-1)
    o = scores.softmax(-1).nan_to_num(0) @ v.double()
    return o, scores.logsumexp(-1), top.masked_fill(top == -torch.inf, torch.nan)


BANDS = BandLayout.custom([[(0, 1100)], [(0, 40), (100, 260)], [(7, 190)], [(0, 0), (65, 500)]])
# Scores of a run of keys, beside small ones: near and beyond what a row's first reference can be kept for,
# what float32 weights can be, and what float16 can.
HEIGHTS = {
    "jumps": ((0, 20, -50, 60, 88, 89, 90, 100, 130, -1000), (1, 80)),
    "jumps at chunks": ((0, 8, 9.5, 10, 27, 28, 30, 69, 88, 200), (64, 64)),
    "single keys": ((0, 0, 0, 0, 0, 0, 0, 30, 70, 88, 91, 300), (1, 9)),
    "small steps": ((0, 3, 5.5, 6, 8, 9.75, 11), (1, 80)),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("name", HEIGHTS)
@variants
def test_rows_whose_scores_jump(
    changes: dict[str, int], dtype: str, head_dim: int, name: str, h200: MachineTarget
) -> None:
    kernel, (heights, runs) = kernel_of(changes, dtype, head_dim, h200), HEIGHTS[name]
    draw = random.Random(name)
    q, k, v = (torch.randn(1, 4, 1025, head_dim, device="cuda") for _ in range(3))
    q, k = 0.2 * q, 0.2 * k
    q[..., 0] = 1
    for head in range(4):
        column: list[float] = []
        while len(column) < 1025:
            column += [draw.choice(heights)] * draw.randint(*runs)
        k[0, head, :, 0] = torch.tensor(column[:1025])
    q, k, v = (tensor.to(getattr(torch, dtype)) for tensor in (q, k, v))
    o, lse = launch_forward(kernel, q, k, v, find_domain(BANDS.spec, q, k), 1.0)
    expected, expected_lse, _ = exact_attention(q, k, v, BANDS, 1.0)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)
    atol = 2e-2 if dtype == "bfloat16" else 3e-3
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=atol * v.abs().max().item())


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("low", [-1e4, -6e4])
@pytest.mark.parametrize("factor", [1.0, 100.0, 6e4])
@variants
def test_scores_far_below_a_rows_others_leave_nothing_behind(
    changes: dict[str, int], dtype: str, head_dim: int, factor: float, low: float, h200: MachineTarget
) -> None:
    """The keys that are read first, the last ones, have the lowest scores; of some rows all keys have."""
    kernel = kernel_of(changes, dtype, head_dim, h200)
    q, k, v = (torch.randn(1, 4, 700, head_dim, device="cuda") for _ in range(3))
    q, k = 0.2 * q, 0.2 * k
    q[..., 0], k[..., 0] = factor, 0
    k[:, :, 350:, 0] = low
    q, k, v = (tensor.to(getattr(torch, dtype)) for tensor in (q, k, v))
    o, lse = launch_forward(kernel, q, k, v, find_domain(BANDS.spec, q, k), 1.0)
    expected, expected_lse, top = exact_attention(q, k, v, BANDS, 1.0)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)
    assert not o.isnan().any()
    # Where all are low, float32 rounds what tells one from the other.
    clear = ~(top < -1000)
    atol = 2e-2 if dtype == "bfloat16" else 3e-3
    torch.testing.assert_close(o.double()[clear], expected[clear], rtol=0, atol=atol * v.abs().max().item())


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("high", [1e3, 1.1e4, 2.3e4, 3e4])
@variants
def test_scores_far_above_a_rows_others_are_not_lost(
    changes: dict[str, int], dtype: str, head_dim: int, high: float, h200: MachineTarget
) -> None:
    """Relative to a reference that is rounded by more than 128, every weight may be 0."""
    kernel = kernel_of(changes, dtype, head_dim, h200)
    q, k, v = (torch.randn(1, 4, 700, head_dim, device="cuda") for _ in range(3))
    q, k = 0.2 * q, 0.2 * k
    q[..., 0], k[..., 0] = 6e4, 0
    k[:, :, 350:, 0] = high
    q, k, v = (tensor.to(getattr(torch, dtype)) for tensor in (q, k, v))
    o, lse = launch_forward(kernel, q, k, v, find_domain(BANDS.spec, q, k), 1.0)
    expected_lse = exact_attention(q, k, v, BANDS, 1.0)[1]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)
    assert (o.abs() <= v.abs().max()).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("sign", [1, -1, 0], ids=["positive", "negative", "of both signs"])
@pytest.mark.parametrize("size", [30.0, 1e3, 1e4, 1e9, 1e15])
@variants
def test_where_one_score_is_far_above_the_others_it_takes_all(
    changes: dict[str, int], dtype: str, head_dim: int, size: float, sign: int, h200: MachineTarget
) -> None:
    if dtype == "float16" and size > 1e4:
        pytest.skip("float16 ends at 65504")
    kernel, compared = kernel_of(changes, dtype, head_dim, h200), 0
    for scale in (head_dim**-0.5, 0.02, 3 / head_dim):
        q, k, v = (torch.randn(1, 4, 700, head_dim, device="cuda") for _ in range(3))
        if sign:
            q, k = q.abs() * sign, k.abs()
        q, k, v = (tensor.to(getattr(torch, dtype)) for tensor in (q * size, k * size, v))
        o, lse = launch_forward(kernel, q, k, v, find_domain(BANDS.spec, q, k), scale)
        scores = (scale * (q.double() @ k.double().mT)).masked_fill(
            ~attention_mask(BANDS, 700, device="cuda"), -torch.inf
        )
        expected, expected_lse, _ = exact_attention(q, k, v, BANDS, scale)
        mine, other = scores.topk(2)[0].unbind(-1)
        # Rounded as a float32 product is, the best must still be the best by enough to take all.
        clear = (mine - other > 1e-5 * mine.abs() + 30) | (expected_lse == -torch.inf)
        assert not o.isnan().any()
        torch.testing.assert_close(o.double()[clear], expected[clear], rtol=1e-2, atol=1e-2)
        most = float((scale * (q.double() @ k.double().mT)).abs().max())
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-3 + 1e-5 * most)
        compared += int(clear.sum())
    assert compared


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype,head_dim", [("bfloat16", 64), ("float16", 64), ("float16", 128)])
def test_equal_scores_of_more_keys_than_float16_counts(
    dtype: str, head_dim: int, h200: MachineTarget
) -> None:
    kernel, layout, length = kernel_of({}, dtype, head_dim, h200), BandLayout.causal(1), 150_000
    q, v = (torch.rand(1, 1, length, head_dim, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    k = torch.zeros_like(q)
    o, lse = launch_forward(kernel, q, k, v, find_domain(layout.spec, q, k), 1.0)
    count = torch.arange(1, length + 1, device="cuda", dtype=torch.float64)
    # One after the other, so many float32 additions of the same number may err in the same direction.
    torch.testing.assert_close(lse[0, 0].double(), count.log(), rtol=0, atol=2e-3)
    expected = v[0, 0].double().cumsum(0) / count[:, None]
    torch.testing.assert_close(o[0, 0].double(), expected, rtol=5e-3, atol=1e-4)
