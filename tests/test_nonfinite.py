"""NaN and infinity: where they may go and where never, what a query without keys makes of them, and scores
at the end of float32's range.

A NaN or an infinity stays within its own document, its batch row and the heads that read it. Inside a
document it may reach other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch
from sweep import DTYPES
from torch import Tensor

from spattn_tvm import BandLayout, banded_attention, reference_attention
from spattn_tvm.reference import attention_mask

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

OUTPUTS = ("o", "lse", "dq", "dk", "dv")


def _hopper(*values: object) -> object:
    lacking = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
    skip = pytest.mark.skipif(lacking, reason="needs a GPU of sm_90")
    return pytest.param("hopper", *values, marks=[pytest.mark.gpu, skip])


# (implementation, dtype, head dim)
KERNELS = [
    ("reference", "float32", 64),
    ("reference", "bfloat16", 64),
    *(("cpu", dtype, 64) for dtype in DTYPES),
    *(pytest.param("mma", dtype, 64, marks=pytest.mark.gpu) for dtype in DTYPES),
    pytest.param("mma", "bfloat16", 128, marks=pytest.mark.gpu),
    *(_hopper(dtype, head_dim) for dtype in ("bfloat16", "float16") for head_dim in (64, 128)),
]
kernels = pytest.mark.parametrize("impl,dtype,head_dim", KERNELS)
values = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])

BATCH, HEADS, KV_HEADS = 2, 4, 2
GROUP = HEADS // KV_HEADS


@dataclass
class Call:
    """Inputs of one call, forward and backward; `run` computes with an implementation."""

    layout: BandLayout
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor
    cu_seqlens: Tensor | None = None
    scale: float | None = None

    def changed(self, name: str, index: tuple[object, ...], value: float) -> Call:
        """The same call with another value at one place of one input."""
        tensor = getattr(self, name).clone()
        tensor[index] = value
        return Call(**{**self.__dict__, name: tensor})

    def mask(self) -> Tensor:
        """Bool (H, N, N) of what attends to what."""
        return attention_mask(self.layout, self.q.shape[2], self.cu_seqlens, device=self.q.device)

    def keyless(self) -> Tensor:
        """Bool (B, H, N) of the queries without keys."""
        return ~self.mask().any(-1).expand(self.q.shape[:3])

    def run(self, impl: str, *, deterministic: bool = False) -> dict[str, Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (self.q, self.k, self.v)]
        o, lse = banded_attention(
            *leaves, self.layout, scale=self.scale, cu_seqlens=self.cu_seqlens, return_lse=True, impl=impl,
            deterministic=deterministic,
        )  # fmt: skip
        gradients = torch.autograd.grad((o, lse), leaves, (self.do, self.dlse))
        return dict(zip(OUTPUTS, (o.detach(), lse.detach(), *gradients), strict=True))

    def exact(self) -> dict[str, Tensor]:
        leaves = [tensor.detach().double().requires_grad_() for tensor in (self.q, self.k, self.v)]
        o, lse = reference_attention(*leaves, self.layout, scale=self.scale, cu_seqlens=self.cu_seqlens)
        gradients = torch.autograd.grad((o, lse), leaves, (self.do.double(), self.dlse.double()))
        return dict(zip(OUTPUTS, (o.detach(), lse.detach(), *gradients), strict=True))


def draw(
    layout: BandLayout, impl: str, dtype: str, head_dim: int, length: int, offsets: tuple[int, ...] | None
) -> Call:
    device = "cuda" if impl in ("mma", "hopper") else "cpu"

    def random(heads: int) -> Tensor:
        return torch.randn(BATCH, heads, length, head_dim, device=device).to(DTYPES[dtype])

    return Call(
        layout,
        random(HEADS),
        random(KV_HEADS),
        random(KV_HEADS),
        random(HEADS),
        torch.randn(BATCH, HEADS, length, device=device),
        None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device=device),
    )


def assert_near(result: Tensor, expected: Tensor, name: str) -> None:
    """Equal but for rounding, infinities and NaN included."""
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[result.dtype]
    if name == "lse":
        tolerance = 5e-3
    torch.testing.assert_close(
        result.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )  # fmt: skip


def reach(name: str, batch: int, head: int, rows: slice) -> dict[str, tuple[object, ...]]:
    """Where in each output the value of one input may be seen; `head` counts the input's own heads."""
    if name in ("k", "v"):
        query_heads, kv_head = slice(head * GROUP, (head + 1) * GROUP), head
    else:
        query_heads, kv_head = slice(head, head + 1), head // GROUP
    places: dict[str, tuple[object, ...]] = {"dq": (batch, query_heads, rows)}
    places["dk"] = places["dv"] = (batch, kv_head, rows)
    if name not in ("do", "dlse"):
        places["o"] = places["lse"] = (batch, query_heads, rows)
    return places


LAYOUTS: dict[str, Callable[[], BandLayout]] = {
    "spattention": lambda: BandLayout.spattention(HEADS),
    "exclusive": lambda: BandLayout.exclusive(HEADS, 400),
    "custom": lambda: BandLayout.custom([[(0, 3), (70, 90)], [(5, 200)], [], [(0, 0)]]),
}
PACKINGS = {
    "one": (200, None),
    "packed": (333, (0, 7, 8, 8, 71, 135, 136, 300, 333)),
}


@kernels
@values
@pytest.mark.parametrize("name", ["q", "k", "v", "do", "dlse"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_it_stays_in_its_document_batch_row_and_heads(
    name: str, packing: str, value: float, impl: str, dtype: str, head_dim: int
) -> None:
    length, offsets = PACKINGS[packing]
    # Only on a GPU are there two ways to compute.
    ways = (False, True) if impl in ("mma", "hopper") else (False,)
    for layout, deterministic in product((make() for make in LAYOUTS.values()), ways):
        call = draw(layout, impl, dtype, head_dim, length, offsets)
        clean = call.run(impl, deterministic=deterministic)
        heads = getattr(call, name).shape[1]
        for begin, end in pairwise(offsets or (0, length)):
            if begin == end:
                continue
            batch, head = (int(torch.randint(most, ())) for most in (BATCH, heads))
            position = int(torch.randint(begin, end, ()))
            poisoned = call.changed(name, (batch, head, position), value)
            places = reach(name, batch, head, slice(begin, end))
            for output, result in poisoned.run(impl, deterministic=deterministic).items():
                if output in places:
                    result[places[output]] = clean[output][places[output]]
                assert_near(result, clean[output], f"{output}, {layout.spec}, {(batch, head, position)}")


@kernels
@pytest.mark.parametrize("offsets", [(0, 7, 8, 8, 71, 135, 136, 300), (0, 64), (0, 1), (0, 0)])
def test_rows_of_no_document_reach_nobody(
    offsets: tuple[int, ...], impl: str, dtype: str, head_dim: int
) -> None:
    tail = slice(offsets[-1], None)
    for layout in (make() for make in LAYOUTS.values()):
        call = draw(layout, impl, dtype, head_dim, 333, offsets)
        expected = call.exact()
        for name in ("q", "k", "v", "do", "dlse"):
            call = call.changed(name, (slice(None), slice(None), tail), math.nan)
        result = call.run(impl)
        for output in OUTPUTS:
            assert_near(result[output], expected[output], output)
            end = -torch.inf if output == "lse" else 0
            assert (result[output][:, :, tail] == end).all(), output


@kernels
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_nan_query_stays_nan(packing: str, impl: str, dtype: str, head_dim: int) -> None:
    length, offsets = PACKINGS[packing]
    for layout in (make() for make in LAYOUTS.values()):
        call = draw(layout, impl, dtype, head_dim, length, offsets)
        mask = call.mask()
        for head in range(HEADS):
            rows = mask[head].any(-1).nonzero().flatten().tolist()
            for position in {*rows[:1], *rows[-1:], *rows[len(rows) // 2 :][:1]}:
                channel = int(torch.randint(head_dim, ()))
                result = call.changed("q", (1, head, position, channel), math.nan).run(impl)
                for output in ("o", "lse", "dq"):
                    assert result[output][1, head, position].isnan().all(), (output, head, position)
                attended = mask[head, position]
                for output in ("dk", "dv"):
                    assert result[output][1, head // GROUP, attended].isnan().all(), (output, head, position)


@kernels
def test_a_nan_key_reaches_every_query_of_its_group_that_sees_it(
    impl: str, dtype: str, head_dim: int
) -> None:
    call = draw(BandLayout.spattention(HEADS), impl, dtype, head_dim, 333, PACKINGS["packed"][1])
    mask = call.mask()
    for position in (3, 70, 71, 140, 332):
        result = call.changed("k", (0, 1, position, 5), math.nan).run(impl)
        for head in (2, 3):
            seeing = mask[head, :, position]
            assert result["lse"][0, head, seeing].isnan().all()
            assert result["o"][0, head, seeing].isnan().all()


KEYLESS = {
    "exclusive": lambda: BandLayout.exclusive(HEADS, 200),
    "gapped": lambda: BandLayout.gapped(HEADS),
    "far": lambda: BandLayout.custom([[(64, 128)], [(1, 1)], [], [(30, 50), (150, 400)]]),
}


@kernels
@pytest.mark.parametrize("layout", KEYLESS)
@pytest.mark.parametrize("offsets", [None, (0, 1, 65, 66, 200)])
@values
def test_what_arrives_for_a_query_without_keys_is_ignored(
    layout: str, offsets: tuple[int, ...] | None, value: float, impl: str, dtype: str, head_dim: int
) -> None:
    call = draw(KEYLESS[layout](), impl, dtype, head_dim, 200, offsets)
    keyless = call.keyless()
    assert keyless.any() and not keyless.all()
    expected = call.changed("do", (keyless,), 0.0).changed("dlse", (keyless,), 0.0).exact()
    for name in ("do", "dlse"):
        result = call.changed(name, (keyless,), value).run(impl)
        for output in OUTPUTS:
            assert_near(result[output], expected[output], output)
        assert (result["o"][keyless] == 0).all()
        assert (result["lse"][keyless] == -torch.inf).all()
        assert (result["dq"][keyless] == 0).all()


@kernels
def test_a_loss_of_lse_that_skips_queries_without_keys(impl: str, dtype: str, head_dim: int) -> None:
    """The usual way to write it gives them a gradient of 0 * inf = NaN."""
    call = draw(BandLayout.exclusive(HEADS), impl, dtype, head_dim, 150, None)

    def loss(lse: Tensor) -> Tensor:
        return torch.where(lse.isinf(), 0.0, lse * (0.1 * lse).exp()).sum()

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (call.q, call.k, call.v)]
    _, lse = banded_attention(*leaves, call.layout, return_lse=True, impl=impl)
    (dlse,) = torch.autograd.grad(loss(lse), lse, retain_graph=True)
    assert torch.equal(dlse.isnan(), call.keyless())
    gradients = torch.autograd.grad(loss(lse), leaves)
    call.dlse = dlse.nan_to_num(0.0)
    call.do = torch.zeros_like(call.do)
    expected = call.exact()
    for output, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert_near(gradient, expected[output], output)


@kernels
@values
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_query_without_keys_is_nothing_to_keys_that_it_does_not_see(
    name: str, value: float, impl: str, dtype: str, head_dim: int
) -> None:
    """In the same document, where such a value may reach other rows."""
    for layout in (make() for make in KEYLESS.values()):
        call = draw(layout, impl, dtype, head_dim, 200, None)
        keyless = call.keyless()
        for position in (slice(None), slice(0, 1), slice(63, 65)):
            result = call.changed(name, (slice(None), slice(None), position), value).run(impl)
            assert (result["o"][keyless] == 0).all()
            assert (result["lse"][keyless] == -torch.inf).all()
            assert (result["dq"][keyless] == 0).all()


@kernels
def test_a_nan_query_without_keys_has_no_result(impl: str, dtype: str, head_dim: int) -> None:
    call = draw(BandLayout.exclusive(HEADS), impl, dtype, head_dim, 150, None)
    keyless = call.keyless()
    result = call.changed("q", (keyless,), math.nan).run(impl)
    assert (result["o"][keyless] == 0).all()
    assert (result["lse"][keyless] == -torch.inf).all()
    assert (result["dq"][keyless] == 0).all()


@kernels
@pytest.mark.parametrize("score", [-3.2e38, 3.2e38])
@pytest.mark.parametrize("equal", [True, False])
def test_scores_at_the_end_of_the_range_are_finite(
    score: float, equal: bool, impl: str, dtype: str, head_dim: int
) -> None:
    """Equal scores average the values, others pick the largest; times log2(e) each would be infinite."""
    call = draw(BandLayout.spattention(HEADS), impl, dtype, head_dim, 150, (0, 20, 150))
    size = 2.0**15 if dtype == "float16" else 2.0**62
    call.q = torch.zeros_like(call.q)
    call.q[..., 1] = math.copysign(size, score)
    call.k = torch.zeros_like(call.k)
    call.k[..., 1] = size
    if not equal:
        # Steps of 1/128, exact in each dtype and far more than the exponential can span.
        call.k[..., 1] *= 1 - torch.randperm(150, device=call.k.device)[None, None] % 64 / 128
    call.scale = abs(score) / size**2
    expected, result = call.exact(), call.run(impl)
    # Gradients take the weights from lse, whose last place is worth 2e31 here.
    for output in ("o", "lse"):
        assert result[output].isfinite().all(), output
        unit = expected[output].abs().max()
        assert_near(result[output] / unit, expected[output] / unit, output)
