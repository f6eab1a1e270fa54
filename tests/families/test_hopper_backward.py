"""The Hopper backward: its space against the kernels' sizes, its machine code, both structures on a GPU."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields
from itertools import pairwise

import pytest
import torch
from length_problems import LengthProblem, tiled_problems, truth
from torch import Tensor

from spattn_tvm import BandLayout, launch
from spattn_tvm.bands import EMPTY
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.build.resources import SPILL_TOLERANCE_BYTES, library_metadata
from spattn_tvm.build.toolchain import compile_obstacle
from spattn_tvm.dispatch import Kernel
from spattn_tvm.families import find_space
from spattn_tvm.families.hopper.backward import build_hopper_backward
from spattn_tvm.families.hopper.backward_sizes import (
    BARRIER_BYTES,
    SHARED_LIMIT,
    dkv_arena,
    dq_arena,
    shared_bytes,
)
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.launch import Domain, launch_backward
from spattn_tvm.ops.band_tables import find_domain
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import reference_attention, reference_gradients
from spattn_tvm.runtime import load_library
from spattn_tvm.target import MachineTarget, parse_target

SPACE = find_space("hopper", "backward")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def one_pass_decisions(head_dim: int, dtype: str, target: MachineTarget) -> dict[str, int]:
    assert SPACE.cases is not None
    return SPACE.untuned(head_dim, dtype, target, case=max(SPACE.cases.values))


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
    for name, value in (("registers", 232), ("producer_registers", 40)):
        apart = {**decisions, f"dq_{name}": value}
        reason = SPACE.illegal(apart, head_dim, dtype, h200)
        assert f"one launch: dq_{name}={value}, dkv_{name}=" in str(reason)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_pass_is_the_default_for_wide_bands_only(head_dim: int, h200: MachineTarget) -> None:
    def chosen(layout: BandLayout, length: int, deterministic: bool = False) -> int:
        problem = AttentionProblem("backward", "bfloat16", 1, 16, 4, length, head_dim, layout)
        kernel = KernelSpec.untuned("hopper", problem, h200, deterministic)
        assert kernel.rejection(h200) is None
        return kernel.decisions["one_pass"]

    bands = BandLayout.spattention(16)
    assert [chosen(bands, length) for length in (512, 1024, 4096, 65536, 131072)] == [0, 0, 0, 1, 1]
    assert chosen(bands, 65536, deterministic=True) == 0
    assert chosen(BandLayout.causal(16), 16384) == 1
    assert chosen(BandLayout.sliding_window(16, 512), 131072) == 0
    assert chosen(BandLayout.custom([[] for _ in range(16)], 64), 64) == 0
    assert len(SPACE.all_untuned(head_dim, "bfloat16", h200)) == 2
    assert len(SPACE.all_untuned(head_dim, "bfloat16", h200, deterministic=True)) == 1


@pytest.mark.parametrize("head_dim", [64, 128])
def test_legal_decisions_fit_in_shared_memory_and_no_fitting_ones_are_lost(
    head_dim: int, h200: MachineTarget
) -> None:
    structures = list(SPACE.structures(head_dim, "bfloat16").values())
    draw = random.Random(head_dim)
    refused_for_memory = 0
    for _ in range(3000):
        decisions = {name: draw.choice(values) for name, values in draw.choice(structures).items()}
        most = max(shared_bytes(decisions, head_dim).values())
        reason = SPACE.illegal(decisions, head_dim, "bfloat16", h200)
        if reason is None:
            assert most <= SHARED_LIMIT
        elif "shared memory" in reason:
            refused_for_memory += 1
            assert most > SHARED_LIMIT
    assert refused_for_memory > 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_second_pass_leaves_the_memory_of_the_first_one_s_barriers_alone(head_dim: int) -> None:
    choices = SPACE.structures(head_dim, "bfloat16")["two passes"]
    draw = random.Random(head_dim)
    for _ in range(300):
        decisions = {name: draw.choice(values) for name, values in choices.items()}
        (first, first_bytes), (second, second_bytes) = (
            arena(decisions, head_dim) for arena in (dq_arena, dkv_arena)
        )
        barriers = range(first["full"], first["told"] + 2 * BARRIER_BYTES)
        assert all(
            first[name] < barriers.start for name in ("q", "do", "o", "k", "v", "info", "tile", "queue")
        )
        rings = ("info", "tile", "queue", "full")
        assert second["stats"] + 8 * decisions["dkv_queries"] * decisions["dkv_stages"] <= barriers.start
        assert all(second[name] < barriers.start for name in ("k", "v", "q", "do", "stats"))
        assert all(barriers.stop <= second[name] for name in rings)
        assert barriers.stop == first_bytes < second_bytes


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_pass_has_decisions_of_the_key_pass_and_no_others(head_dim: int, h200: MachineTarget) -> None:
    two_passes = SPACE.untuned(head_dim, "bfloat16", h200)
    choices = SPACE.structures(head_dim, "bfloat16")["one pass"]
    decisions = {**one_pass_decisions(head_dim, "bfloat16", h200), "dkv_stages": 2}
    assert SPACE.rejection(decisions, head_dim, "bfloat16", h200) is None
    assert not SPACE.is_deterministic(decisions)
    fits = []
    for stages in choices["dkv_stages"]:
        changed = {**decisions, "dkv_stages": stages}
        fits.append(shared_bytes(changed, head_dim)["one"] <= SHARED_LIMIT)
        assert fits[-1] == (SPACE.illegal(changed, head_dim, "bfloat16", h200) is None)
    assert fits.count(False) == {64: 0, 128: 4}[head_dim]
    idle = set(two_passes) - set(choices)
    assert idle == {name for name in two_passes if name.startswith("dq_")} | {"dkv_queries", "dkv_buffers"}
    for name in idle:
        reason = SPACE.rejection({**decisions, name: two_passes[name]}, head_dim, "bfloat16", h200)
        assert f"missing [], unknown ['{name}']" in str(reason)


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
    assert len(resources["kernels"]) == 2
    for kernel in resources["kernels"].values():
        assert kernel["spill_store_bytes"] <= SPILL_TOLERANCE_BYTES
    assert not [text for text in resources["warnings"] if "serialized" in text]
    # The second kernel waits by itself for the first one.
    assert b"programtic_dependent_launch" in path.read_bytes()


def kernel_of(structure: int, dtype: str, head_dim: int, target: MachineTarget) -> Kernel:
    """The kernel of one pass or of two, for a test on a GPU."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of sm_90")
    if compile_obstacle(target) is not None:
        pytest.skip(str(compile_obstacle(target)))
    decisions = SPACE.untuned(head_dim, dtype, target)
    if structure == 1:
        decisions = one_pass_decisions(head_dim, dtype, target)
    spec = KernelSpec("hopper", "backward", dtype, head_dim, decisions)
    return Kernel(load_library(compile_kernel(spec, target), "backward"), spec)


@dataclass
class Inputs:
    """What a backward kernel takes, on a GPU, and what it should give."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    do: Tensor
    dlse: Tensor
    bands: Tensor
    cu_seqlens: Tensor

    @classmethod
    def draw(
        cls,
        layout: BandLayout,
        shape: tuple[int, int, int, int, int],
        dtype: str,
        documents: list[int] | None,
    ) -> Inputs:
        batch, heads, kv_heads, length, head_dim = shape
        q, k, v, do = (
            torch.randn(batch, count, length, head_dim, device="cuda").to(DTYPES[dtype])
            for count in (heads, kv_heads, kv_heads, heads)
        )
        o, lse = reference_attention(q, k, v, layout, cu_seqlens=documents)
        dlse = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
        bands = torch.tensor(layout.table(length)[None], device="cuda")
        cu_seqlens = torch.tensor(documents or [0, length], dtype=torch.int32, device="cuda")
        return cls(q, k, v, o.to(q.dtype), lse.contiguous(), do, dlse, bands, cu_seqlens)

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def launch(self, kernel: Kernel, **changed: Tensor) -> dict[str, Tensor]:
        *given, bands, cu_seqlens = {**self.tensors(), **changed}.values()
        domain = Domain.of_same_rows(bands, cu_seqlens)
        gradients = launch_backward(kernel, *given, domain, self.q.shape[-1] ** -0.5)
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    def exact(self, layout: BandLayout, documents: list[int] | None) -> dict[str, Tensor]:
        gradients = reference_gradients(
            self.q, self.k, self.v, self.o, self.lse, self.do, self.dlse, layout,
            scale=self.q.shape[-1] ** -0.5, cu_seqlens=documents,
        )  # fmt: skip
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def assert_near(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        # At most 0.0056 in some hundred runs on an H200.
        worst = (gradient.float() - expected[name]).abs().max()
        assert worst <= 0.02 * expected[name].abs().max(), name


PROBLEMS = {
    "tails": (2, 4, 4, 333, "spattention", None),
    "groups": (1, 4, 1, 1000, "exclusive", None),
    # More pairs of batch row and key head than are worked on together: packs of two, and of one.
    "packs": (2, 24, 6, 300, "spattention", None),
    "pairs apart": (3, 16, 1, 200, "causal", [0, 65, 200]),
    "packed": (1, 8, 4, 1111, "spattention", [0, 7, 64, 700, 1111]),
    "dense": (2, 2, 2, 517, "causal", [0, 100, 101, 300, 517]),
    "single": (3, 2, 1, 1, "causal", None),
    "many tiles": (2, 16, 16, 2048, "spattention", None),
    # Boundaries at odd rows, rows before a band's first query, documents shorter than a band's start.
    "odd": (2, 5, 5, 777, "exclusive", [0, 0, 1, 130, 131, 131, 452, 453, 777]),
}
structures = pytest.mark.parametrize("structure", [2, 1], ids=["two passes", "one pass"])
shapes = pytest.mark.parametrize("dtype,head_dim", [(dtype, d) for dtype in DTYPES for d in (64, 128)])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("name", PROBLEMS)
@shapes
@structures
def test_the_gradients_are_the_reference_s(
    structure: int, dtype: str, head_dim: int, name: str, h200: MachineTarget
) -> None:
    kernel = kernel_of(structure, dtype, head_dim, h200)
    batch, heads, kv_heads, length, layout_name, documents = PROBLEMS[name]
    layout = getattr(BandLayout, layout_name)(heads, length)
    inputs = Inputs.draw(layout, (batch, heads, kv_heads, length, head_dim), dtype, documents)
    assert_near(inputs.launch(kernel), inputs.exact(layout, documents))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@shapes
@structures
def test_what_a_document_holds_stays_there(
    structure: int, dtype: str, head_dim: int, value: float, h200: MachineTarget
) -> None:
    """All rows of a document at once, of every input: what its neighbours get doesn't change."""
    kernel = kernel_of(structure, dtype, head_dim, h200)
    documents = [0, 1, 63, 130, 131, 195, 260, 389, 600]
    for layout in (BandLayout.spattention(4, 600), BandLayout.custom([[(3, 9)], [(0, 80)], [(65, 400)], []])):
        inputs = Inputs.draw(layout, (2, 4, 2, 600, head_dim), dtype, documents)
        clean = inputs.launch(kernel)
        for begin, end in pairwise(documents):
            poisoned = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
            for name in ("q", "k", "v", "o", "do", "dlse"):
                poisoned[name][:, :, begin:end] = value
            # As the forward leaves it: a query without keys is told by it.
            poisoned["lse"][:, :, begin:end].masked_fill_(inputs.lse[:, :, begin:end].isfinite(), value)
            for name, gradient in inputs.launch(kernel, **poisoned).items():
                gradient[:, :, begin:end] = clean[name][:, :, begin:end]
                scale = clean[name].float().abs().max()
                worst = (gradient.float() - clean[name].float()).abs().max()
                # Two passes add up in one order.
                assert worst <= (0 if structure == 2 else 0.01 * scale), (name, layout.spec, begin, end)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("documents", [None, [0, 1, 66, 131, 132, 500]])
@shapes
@structures
def test_a_query_without_keys_takes_no_part(
    structure: int, dtype: str, head_dim: int, documents: list[int] | None, h200: MachineTarget
) -> None:
    kernel = kernel_of(structure, dtype, head_dim, h200)
    # Bands that begin at odd distances: the chunk of the first queries with keys begins with one without.
    layout = BandLayout.custom([[(1, 30)], [(63, 63), (65, 200)], [(129, 490)], [(7, 12), (21, 21)]])
    inputs = Inputs.draw(layout, (1, 4, 2, 500, head_dim), dtype, documents)
    keyless = inputs.lse == -torch.inf
    assert keyless.any()
    arriving = {name: getattr(inputs, name).clone() for name in ("o", "do", "dlse")}
    for tensor in arriving.values():
        tensor[keyless] = torch.nan
    gradients = inputs.launch(kernel, **arriving)
    assert (gradients["dq"][keyless] == 0).all()
    assert_near(gradients, inputs.exact(layout, documents))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@shapes
@structures
def test_rows_without_bands_get_zero_gradients(
    structure: int, dtype: str, head_dim: int, h200: MachineTarget
) -> None:
    """A table of three rows: nothing for the first document and for the last one."""
    kernel = kernel_of(structure, dtype, head_dim, h200)
    begin, end, length = 131, 402, 700
    layout = BandLayout.spattention(4, length)
    inputs = Inputs.draw(layout, (1, 4, 2, length, head_dim), dtype, [0, begin, end, length])
    outside = torch.ones(length, dtype=torch.bool, device="cuda")
    outside[begin:end] = False
    expected = inputs.exact(layout, [0, begin, end, length])
    nothing = torch.tensor([EMPTY * 2] * 4, dtype=torch.int32, device="cuda")
    inputs.bands = torch.stack([nothing, inputs.bands[0], nothing])
    inputs.lse[:, :, outside] = -torch.inf
    for name in ("q", "k", "v", "o", "do", "dlse"):
        getattr(inputs, name)[:, :, outside] = torch.nan
    gradients = inputs.launch(kernel)
    for name, gradient in gradients.items():
        assert (gradient[:, :, outside] == 0).all(), name
        expected[name][:, :, outside] = 0
    assert_near(gradients, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@shapes
@structures
def test_any_number_of_ctas_ends_and_agrees(
    structure: int, dtype: str, head_dim: int, h200: MachineTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for other CTAs (in two passes a tile of keys, in one dQ) waits for none where one does all,
    for some that have not begun where the device does not hold all at once.
    """
    kernel = kernel_of(structure, dtype, head_dim, h200)
    layout = BandLayout.spattention(8, 1111)
    inputs = Inputs.draw(layout, (2, 8, 4, 1111, head_dim), dtype, [0, 7, 64, 700, 1111])
    exact = inputs.exact(layout, [0, 7, 64, 700, 1111])
    expected = inputs.launch(kernel)
    assert_near(expected, exact)
    for workers in (1, 2, 17, 1000):
        monkeypatch.setattr(launch, "_workers", lambda index, workers=workers: workers)
        gradients = inputs.launch(kernel)
        assert_near(gradients, exact)
        for name in gradients if structure == 2 else ():
            assert torch.equal(gradients[name], expected[name]), (name, workers)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@shapes
def test_warpgroups_of_a_tile_that_have_different_chunks(
    dtype: str, head_dim: int, h200: MachineTarget
) -> None:
    """Far bands leave the last keys without queries: where they end, a warpgroup has none of the chunks that
    others of its tile have, and is ahead of them by what it may hand back.
    """
    kernel = kernel_of(2, dtype, head_dim, h200)
    length, draw = 2048, random.Random(head_dim)
    begins = [length - 64 * draw.randint(1, 24) + draw.choice((-32, 0, 1, 32)) for _ in range(16)]
    layout = BandLayout.custom(
        [[(begin, min(begin + draw.choice((0, 3, 40, 300)), length - 1))] for begin in begins]
    )
    inputs = Inputs.draw(layout, (4, 16, 16, length, head_dim), dtype, None)
    first = inputs.launch(kernel)
    assert_near(first, inputs.exact(layout, None))
    for _ in range(20):
        for name, gradient in inputs.launch(kernel).items():
            assert torch.equal(gradient, first[name]), name


def check_lengths(kernel: Kernel, problem: LengthProblem, dtype: str) -> None:
    """NaN in keys that don't exist, and in whatever arrives for queries without keys."""
    q, k, v, do, dlse = problem.tensors(DTYPES[dtype], "cuda")
    places = problem.arguments("cuda")
    o, lse = reference_attention(q, k, v, problem.layout, **places)
    keyless, unused = ~problem.mask().any(-1), problem.unused()
    arriving = [o.to(q.dtype), do, dlse]
    for tensor in arriving:
        tensor[keyless] = torch.nan
    o, do, dlse = arriving
    domain = find_domain(problem.layout.spec, q, k, **places)
    scale = problem.head_dim**-0.5
    found = launch_backward(kernel, q, k, v, o, lse.contiguous(), do, dlse, domain, scale)
    gradients = dict(zip(("dq", "dk", "dv"), (tensor.cpu() for tensor in found), strict=True))
    assert (gradients["dq"][keyless] == 0).all()
    for name in ("dk", "dv"):
        assert (gradients[name].transpose(1, 2)[unused] == 0).all()
    assert_near(gradients, truth(problem, dtype=DTYPES[dtype]))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("name", tiled_problems(64))
@shapes
@structures
def test_queries_and_keys_that_are_not_the_same_rows(
    structure: int, dtype: str, head_dim: int, name: str, h200: MachineTarget
) -> None:
    kernel = kernel_of(structure, dtype, head_dim, h200)
    check_lengths(kernel, tiled_problems(head_dim)[name], dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("keys", [[0, 0, 0], [0, 200, 0]], ids=["none", "one row's"])
@shapes
@structures
def test_batch_rows_without_keys_get_zero_gradients(
    structure: int, dtype: str, head_dim: int, keys: list[int], h200: MachineTarget
) -> None:
    """Also where one kernel clears the sums of a head that no tile adds to, and converts them."""
    kernel = kernel_of(structure, dtype, head_dim, h200)
    layout = BandLayout.spattention(12, 1200)
    for seed in range(5):
        check_lengths(
            kernel, LengthProblem(3, 12, 1, 333, 200, head_dim, layout, {"kv_lengths": keys}, seed), dtype
        )


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@shapes
@structures
def test_what_a_document_with_keys_of_its_own_holds_stays_there(
    structure: int, dtype: str, head_dim: int, value: float, h200: MachineTarget
) -> None:
    """More keys than queries, fewer, and none; boundaries at odd rows."""
    kernel = kernel_of(structure, dtype, head_dim, h200)
    ends, key_ends = [0, 1, 63, 130, 131, 195, 260, 389, 600], [0, 140, 141, 141, 300, 433, 500, 701, 800]
    layout = BandLayout.custom([[(3, 9), (33, 90)], [(0, 80)], [(65, 400)], []])
    q, do = (torch.randn(2, 4, 600, head_dim, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    k, v = (torch.randn(2, 2, 800, head_dim, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    places = {
        "cu_seqlens": torch.tensor(ends, device="cuda"),
        "cu_seqlens_k": torch.tensor(key_ends, device="cuda"),
    }
    o, lse = reference_attention(q, k, v, layout, **places)
    domain = find_domain(layout.spec, q, k, **places)

    def launch(q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor) -> list[Tensor]:
        dlse = lse.masked_fill(lse == -torch.inf, 0)
        return list(launch_backward(kernel, q, k, v, o, lse, do, dlse, domain, head_dim**-0.5))

    tensors = [q, k, v, o.to(q.dtype), do, lse.contiguous()]
    clean = launch(*tensors)
    for rows, keys in zip(pairwise(ends), pairwise(key_ends), strict=True):
        poisoned = [tensor.clone() for tensor in tensors]
        for tensor in poisoned[:5]:
            begin, end = keys if tensor.shape[1] == 2 else rows
            tensor[:, :, begin:end] = value
        of_document = poisoned[5][:, :, rows[0] : rows[1]]
        of_document.masked_fill_(of_document.isfinite(), value)
        for gradient, same in zip(launch(*poisoned), clean, strict=True):
            begin, end = keys if gradient.shape[1] == 2 else rows
            gradient[:, :, begin:end] = same[:, :, begin:end]
            worst = (gradient.float() - same.float()).abs().max()
            # Two passes add up in one order.
            assert worst <= (0 if structure == 2 else 0.01 * same.float().abs().max()), (rows, keys)


@pytest.mark.parametrize("of_keys", [False, True])
def test_chunks_hold_what_a_band_gives_to_a_tile(of_keys: bool) -> None:
    """Of the rows that exist; none of them twice, none in vain."""
    pytest.importorskip("tvm")
    from spattn_tvm.families.hopper.backward_producers import Plan

    chance = random.Random(0)
    for _ in range(2000):
        plan = Plan(of_keys, chance.randint(1, 9), 2 * chance.randint(1, 4), 2, 2, 1, 1, (), (), 64)
        first, begin, low = chance.randint(0, 30), chance.randint(0, 30), chance.randint(-20, 40)
        last, end, high = (at + chance.randint(0, 20) for at in (first, begin, low))
        sign = -1 if of_keys else 1
        expected = [
            other
            for other in range(begin, end)
            if any(low <= sign * (row - other) <= high for row in range(first, last + 1))
        ]
        met_begin, met_end = plan.met(first, last, low, high, begin, end)
        assert list(range(met_begin, met_end)) == expected
        origin, count = (int(value) for value in plan.chunks(met_begin, met_end))
        if count:
            edge = origin + count * plan.chunk_rows
            assert (origin, origin % 2) == (met_begin // 2 * 2, 0) if of_keys else edge == met_end
            assert origin <= met_begin and met_end <= edge
            assert met_begin < origin + plan.chunk_rows and met_end > edge - plan.chunk_rows
        assert (count > 0) == bool(expected)


@pytest.mark.parametrize("most", [1, 2, 4, 8, 32])
def test_packs_count_the_query_heads_of_their_pairs(most: int) -> None:
    pytest.importorskip("tvm")
    from spattn_tvm.families.hopper.backward_one_pass import PACK_TILES, pack_pairs

    for slots in (1, 5, 64, 127, 128, 1000):
        assert int(pack_pairs(most, 1, slots)) == most
        for group in range(2, 40):
            pairs = int(pack_pairs(most, group, slots))
            assert 1 <= pairs <= most
            assert pairs == 1 or pairs * group <= 2 * most
            # As many query heads as without groups, and more only for the sake of tiles.
            assert pairs == most or (pairs + 1) * group > most
            assert pairs * group <= most or pairs == 1 or (pairs - 1) * slots < PACK_TILES
            assert pairs * slots >= PACK_TILES or pairs == most or (pairs + 1) * group > 2 * most
