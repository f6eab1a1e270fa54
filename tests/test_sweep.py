"""The property that matters most: on any problem, forward and backward, ours errs at most twice as much as
plain PyTorch in the same dtype.

1,000 problems by default; ``SPATTN_SWEEP=10000 pytest tests/test_sweep.py`` runs more, and with
``tests/test_cuda_kernels.py`` the GPU's. The other tests here ask whether the comparison would notice a wrong
kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from sweep import (
    DTYPES,
    STRIDES,
    SweepProblem,
    check_problem,
    make_inputs,
    plain_attention,
    plain_mask,
    problems,
)
from torch import Tensor

from spattn_tvm import launch
from spattn_tvm.bands import BandLayout
from spattn_tvm.dispatch import Kernel
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.band_tables import clear_tables
from spattn_tvm.reference import attention_mask, reference_attention

PROBLEMS = int(os.environ.get("SPATTN_SWEEP", "1000"))

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.timeout(240 + PROBLEMS)
@settings(max_examples=PROBLEMS, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_cpu_kernels_err_at_most_twice_as_much_as_plain_pytorch(problem: SweepProblem) -> None:
    check_problem(problem, impl="cpu")


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(problem=problems(longest=80))
def test_reference_and_yardstick_agree_in_float64(problem: SweepProblem) -> None:
    """Two implementations of the definition that share no code but ``BandLayout.bands``."""
    inputs = make_inputs(problem)
    mask = plain_mask(problem)
    reference_mask = attention_mask(
        problem.layout, problem.length, kv_length=problem.kv_length, **inputs.places
    )
    assert torch.equal(mask, reference_mask.expand_as(mask))
    q, k, v = (t.double() for t in (inputs.q, inputs.k, inputs.v))
    plain = plain_attention(q, inputs.without_nan(k), inputs.without_nan(v), mask, problem.scale)
    reference = reference_attention(q, k, v, problem.layout, scale=problem.scale, **inputs.places)
    for one, other in zip(plain, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(problem=problems(longest=60))
def test_strides_hold_the_same_values(problem: SweepProblem) -> None:
    for strides in set(STRIDES) - {"expanded"}:
        other = make_inputs(replace(problem, strides=(strides,) * 4, loss="both"))
        plain = make_inputs(replace(problem, strides=("bhnd",) * 4, loss="both"))
        assert torch.equal(other.q, plain.q)
        assert other.do is not None
        assert torch.equal(other.do, plain.do)


# --- would a wrong kernel be noticed? ------------------------------------------------------------------

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def typical(dtype: str, layout: BandLayout, *, packed: bool = False, seed: int = 0) -> SweepProblem:
    return SweepProblem(
        dtype=dtype,
        batch=1,
        kv_heads=2,
        group=2,
        length=97,
        head_dim=64,
        layout=layout,
        strides=("bhnd",) * 4,
        cu_seqlens=(0, 40, 97) if packed else None,
        scale=None,
        loss="both",
        seed=seed,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    o, lse = plain_attention(q, k, v, mask, None)
    return o, lse.float()


def from_mask(mask: Tensor) -> Attention:
    return lambda q, k, v: attend(q, k, v, mask)


BANDS = [[(0, 8), (20, 29)], [(0, 8), (40, 49)], [(3, 11)], [(0, 30)]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_implementation_passes(dtype: str) -> None:
    problem = typical(dtype, BandLayout.custom(BANDS))
    check_problem(problem, attention=from_mask(plain_mask(problem)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", range(4))
@pytest.mark.parametrize(("edge", "step"), [(0, 1), (0, -1), (1, 1), (1, -1)])
def test_a_band_edge_off_by_one_fails(dtype: str, head: int, edge: int, step: int) -> None:
    problem = typical(dtype, BandLayout.custom(BANDS))
    for band in range(len(BANDS[head])):
        wrong = [[list(interval) for interval in bands] for bands in BANDS]
        wrong[head][band][edge] += step
        if wrong[head][band][0] < 0:
            continue
        mask = plain_mask(replace(problem, layout=BandLayout.custom(wrong)))
        with pytest.raises(AssertionError, match="errs too much"):
            check_problem(problem, attention=from_mask(mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_of_one_query_fails(dtype: str) -> None:
    problem = typical(dtype, BandLayout.custom(BANDS))
    mask = plain_mask(problem)
    for query, key in ((96, 96), (50, 45), (50, 25)):
        assert mask[0, query, key]
        wrong = mask.clone()
        wrong[0, query, key] = False
        with pytest.raises(AssertionError, match="errs too much"):
            check_problem(problem, attention=from_mask(wrong))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_boundary_off_by_one_fails(dtype: str) -> None:
    problem = typical(dtype, BandLayout.custom(BANDS), packed=True)
    for boundary in (39, 41):
        mask = plain_mask(replace(problem, cu_seqlens=(0, boundary, 97)))
        with pytest.raises(AssertionError, match="errs too much"):
            check_problem(problem, attention=from_mask(mask))


class Altered(torch.autograd.Function):
    """The identity whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, tensor: Tensor, factor: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient * ctx.factor, None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["q", "k", "v", "lse"])
@pytest.mark.parametrize("factor", ["negative", "no last row", "no first head"])
def test_a_wrong_gradient_fails(dtype: str, which: str, factor: str) -> None:
    problem = typical(dtype, BandLayout.custom(BANDS))
    mask = plain_mask(problem)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def altered(tensor: Tensor) -> Tensor:
            factors = torch.ones(tensor.shape[:3], dtype=tensor.dtype)
            if factor == "negative":
                factors = -factors
            elif factor == "no last row":
                factors[:, :, -1] = 0
            else:
                factors[:, 0] = 0
            return Altered.apply(tensor, factors if tensor.dim() == 3 else factors[..., None])

        q, k, v = (altered(t) if n == which else t for n, t in (("q", q), ("k", k), ("v", v)))
        o, lse = attend(q, k, v, mask)
        return o, altered(lse) if which == "lse" else lse

    with pytest.raises(AssertionError, match="errs too much"):
        check_problem(problem, attention=attention)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_another_group_fail(dtype: str) -> None:
    problem = typical(dtype, BandLayout.custom(BANDS))
    mask = plain_mask(problem)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), mask)

    with pytest.raises(AssertionError, match="errs too much"):
        check_problem(problem, attention=attention)


def test_lse_of_a_query_without_a_key_must_be_minus_infinity() -> None:
    problem = typical("float32", BandLayout.custom(BANDS))
    mask = plain_mask(problem)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = attend(q, k, v, mask)
        return o, lse.clamp_min(-1e30)

    with pytest.raises(AssertionError, match="-inf exactly where"):
        check_problem(problem, attention=attention)


@pytest.mark.parametrize("output", [7, 8], ids=["o", "lse"])
def test_a_row_that_a_kernel_does_not_write_fails(output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = launch.launch_forward

    def forgetful(kernel: Kernel, *arguments: object) -> tuple[Tensor, Tensor]:
        def function(*inner: Tensor) -> None:
            written = inner[output].clone()
            kernel.function(*inner)
            inner[output][0, 1, 96] = written[0, 1, 96]

        return real(replace(kernel, function=function), *arguments)

    monkeypatch.setattr("spattn_tvm.ops.operators.launch_forward", forgetful)
    clear_tables()  # else a call like an earlier one goes past launch_forward
    with pytest.raises(AssertionError, match="holds NaN"):
        check_problem(typical("float32", BandLayout.causal(4)), impl="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_cpu_kernels_are_bitwise_repeatable(dtype: str) -> None:
    problem = replace(typical(dtype, BandLayout.spattention(4)), batch=3, length=211)
    inputs = make_inputs(problem)
    results = []
    for _ in range(4):
        leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        o, lse = banded_attention(*leaves, problem.layout, return_lse=True, impl="cpu")
        results.append(torch.autograd.grad((o, lse), leaves, (inputs.do, inputs.dlse)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
