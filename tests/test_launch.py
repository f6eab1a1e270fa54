"""What surrounds a kernel call: which inputs are copied, the outputs' strides, factors below zero."""

from __future__ import annotations

import math

import pytest
import torch

from spattn_tvm import launch
from spattn_tvm.bands import BandLayout
from spattn_tvm.dispatch import Kernel
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.launch import launch_backward, launch_forward
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.reference import reference_attention


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "is_copied"),
    [
        (half(2, 3, 5, 64), False),
        (half(2, 5, 3, 64).transpose(1, 2), False),
        (half(2, 3, 5, 72)[..., :64], False),
        (half(2, 3, 5, 66)[..., :64], True),
        (half(1, 1, 5, 64).expand(2, 3, 5, 64), False),
        (half(2 * 3 * 5 * 64 + 8)[8:].view(2, 3, 5, 64), False),
        (half(2 * 3 * 5 * 64 + 3)[3:].view(2, 3, 5, 64), True),
        # To PyTorch they are contiguous.
        (half(2, 3, 1, 64).as_strided((2, 3, 1, 64), (192, 64, 7, 1)), False),
        (half(3 * 5 * 64).as_strided((1, 3, 5, 64), (3, 320, 64, 1)), False),
        (half(2 * 5 * 64).as_strided((2, 1, 5, 64), (320, 1, 64, 1)), False),
        (half(3 * 5 * 66).as_strided((1, 3, 5, 64), (3, 330, 66, 1)), True),
    ],
)
def test_what_a_kernel_reads_is_aligned_and_copied_only_where_it_must_be(
    tensor: torch.Tensor, is_copied: bool
) -> None:
    if 0 not in tensor.stride():
        tensor.copy_(torch.randn(tensor.shape))
    found = launch._readable(tensor, 16)
    assert torch.equal(found, tensor)
    assert found.data_ptr() % 16 == 0
    assert found.stride(3) == 1
    assert all(stride % 8 == 0 for stride in found.stride()[:3])
    assert (found.data_ptr() != tensor.data_ptr()) is is_copied
    assert launch._readable(tensor, 1) is tensor


def test_what_a_kernel_writes_is_the_result_with_other_strides_of_single_rows() -> None:
    model = half(3 * 5 * 64).as_strided((1, 3, 5, 64), (3, 320, 64, 1))
    output = torch.empty_like(model)
    written = launch._with_aligned_strides(output, 16)
    written.fill_(1.0)
    assert all(stride % 8 == 0 for stride in written.stride()[:3])
    assert torch.equal(output, torch.ones(1, 3, 5, 64, dtype=output.dtype))


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_a_positive_factor_gives_the_same_scores(scale: float) -> None:
    q = torch.randn(1, 2, 5, 32)
    sign, factor = launch._sign_for_queries(scale)
    assert factor > 0
    torch.testing.assert_close(q * sign * factor, q * scale)
    assert sign == (1 if scale > 0 else math.copysign(1, scale) if scale else 0)


class Recorder:
    """A kernel that fills its outputs with ones and keeps its arguments."""

    def __init__(self, direction: str, family: str = "cpu", **decisions: int) -> None:
        self.kernel = Kernel(self, KernelSpec(family, direction, "float32", 32, decisions))
        first = len(self.kernel.abi.inputs)
        self.outputs = slice(first, first + len(self.kernel.abi.outputs))

    def __call__(self, *arguments: object) -> None:
        self.arguments = arguments
        for output in arguments[self.outputs]:
            assert isinstance(output, torch.Tensor)
            output.fill_(1.0)


TABLES = (torch.zeros(1, 4, 4, dtype=torch.int32), torch.tensor([0, 6], dtype=torch.int32))


def test_forward_outputs_have_the_strides_of_q_and_only_unreadable_inputs_are_copied() -> None:
    q = torch.randn(2, 6, 4, 32).transpose(1, 2)
    k = torch.randn(2, 2, 32, 6).transpose(2, 3)
    v = torch.randn(2, 2, 6, 40)[..., :32]
    forward = Recorder("forward")
    o, lse = launch_forward(forward.kernel, q, k, v, *TABLES, 0.5)
    assert (o.stride(), o.dtype) == (q.stride(), q.dtype)
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 4, 6), torch.float32, True)
    given_q, given_k, given_v = forward.arguments[:3]
    assert given_q is q
    assert given_v is v
    assert isinstance(given_k, torch.Tensor)
    assert given_k.stride(3) == 1
    assert torch.equal(given_k, k)
    assert forward.arguments[-2:] == (0.5, torch.get_num_threads())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_backward_sums_the_heads_of_a_group_and_keeps_dtype_and_strides(
    dtype: torch.dtype, kv_heads: int
) -> None:
    q, k, v = (torch.randn(2, 6, heads, 32, dtype=dtype).transpose(1, 2) for heads in (4, kv_heads, kv_heads))
    lse = torch.zeros(2, 4, 6)
    backward = Recorder("backward")
    dq, dk, dv = launch_backward(backward.kernel, q, k, v, q, lse, q, lse, *TABLES, 0.5)
    for gradient, model, heads_summed in ((dq, q, 1), (dk, k, 4 // kv_heads), (dv, v, 4 // kv_heads)):
        assert (gradient.dtype, gradient.shape, gradient.stride()) == (dtype, model.shape, model.stride())
        assert torch.equal(gradient, torch.full_like(model, heads_summed))
    for accumulator in backward.arguments[10:12]:
        assert isinstance(accumulator, torch.Tensor)
        assert (accumulator.dtype, accumulator.shape) == (torch.float32, q.shape)
        assert accumulator.is_contiguous()


@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_factors_of_zero_and_below(scale: float, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tolerance = 1e-5 if device == "cpu" else 2e-2
    layout = BandLayout.spattention(4)
    q, k, v = (torch.randn(2, 4, 130, 64, device=device).to(dtype).requires_grad_() for _ in range(3))
    do = torch.randn(2, 4, 130, 64, device=device).to(dtype)
    o = banded_attention(q, k, v, layout, scale=scale)
    expected, _ = reference_attention(q, k, v, layout, scale=scale)
    ours = (o, *torch.autograd.grad(o, (q, k, v), do))
    theirs = (expected, *torch.autograd.grad(expected, (q, k, v), do.to(expected.dtype)))
    for found, wanted in zip(ours, theirs, strict=True):
        error = (found.float() - wanted.float()).norm()
        assert error <= tolerance * wanted.float().norm() + 1e-6
