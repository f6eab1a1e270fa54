"""What surrounds a kernel call: which inputs are copied, the outputs' strides, factors below zero."""

from __future__ import annotations

import math

import pytest
import torch

from spattn_tvm import launch
from spattn_tvm.bands import BandLayout
from spattn_tvm.dispatch import Kernel
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.launch import Domain, launch_backward, launch_forward
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
        (half(3 * 5 * 64).as_strided((1, 3, 5, 64), (2**50, 320, 64, 1)), False),
        (half(3 * 64).as_strided((1, 3, 1, 64), (2**61 + 1, 64, 2**40, 1)), False),
        (half(64).as_strided((1, 1, 1, 64), (5, 2**45, 7, 1)), False),
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
    assert all(stride % 8 == 0 and stride < 2**39 for stride in found.stride()[:3])
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


DOMAIN = Domain.of_same_rows(torch.zeros(1, 4, 4, dtype=torch.int32), torch.tensor([0, 6], dtype=torch.int32))


def test_forward_outputs_have_the_strides_of_q_and_only_unreadable_inputs_are_copied() -> None:
    q = torch.randn(2, 6, 4, 32).transpose(1, 2)
    k = torch.randn(2, 2, 32, 6).transpose(2, 3)
    v = torch.randn(2, 2, 6, 40)[..., :32]
    forward = Recorder("forward")
    o, lse = launch_forward(forward.kernel, q, k, v, DOMAIN, 0.5)
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
    dq, dk, dv = launch_backward(backward.kernel, q, k, v, q, lse, q, lse, DOMAIN, 0.5)
    for gradient, model, heads_summed in ((dq, q, 1), (dk, k, 4 // kv_heads), (dv, v, 4 // kv_heads)):
        assert (gradient.dtype, gradient.shape, gradient.stride()) == (dtype, model.shape, model.stride())
        assert torch.equal(gradient, torch.full_like(model, heads_summed))
    for accumulator in backward.arguments[12:14]:
        assert isinstance(accumulator, torch.Tensor)
        assert (accumulator.dtype, accumulator.shape) == (torch.float32, q.shape)
        assert accumulator.is_contiguous()


@pytest.mark.parametrize("one_pass", [0, 1])
@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_a_kernel_gets_what_its_abi_names(one_pass: int, scale: float) -> None:
    """Scratch only where the decision asks for it, what is kept once for all calls, the sign apart."""
    q, k, v = (torch.randn(2, heads, 7, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    lse = torch.zeros(2, 4, 7)
    recorder = Recorder("backward", "hopper", one_pass=one_pass)
    given = [launch_backward(recorder.kernel, q, k, v, q, lse, q, lse, DOMAIN, scale) for _ in range(2)]
    arguments, abi = recorder.arguments, recorder.kernel.abi
    scratch = len(abi.inputs) + len(abi.outputs)
    stats, next_tile = arguments[scratch : scratch + 2]
    assert isinstance(stats, torch.Tensor) and isinstance(next_tile, torch.Tensor)
    assert (stats.shape, stats.dtype) == ((2, 4, 4, 4), torch.float32)
    assert (next_tile.tolist(), next_tile.dtype) == ([0, 0], torch.int32)
    first = recorder.arguments
    launch_backward(recorder.kernel, q, k, v, q, lse, q, lse, DOMAIN, scale)
    assert recorder.arguments[scratch + 1] is first[scratch + 1]
    assert recorder.arguments[scratch] is not first[scratch]
    others = [(s.shape, s.dtype) for s in arguments[scratch + 2 : -2]]  # type: ignore[attr-defined]
    sums, progress = ((2, 4, 7, 64), torch.float32), ((3 + 2 * 2,), torch.int32)
    assert others == ([sums, progress] if one_pass else [progress])
    sign = 1.0 if scale > 0 else math.copysign(1.0, scale) if scale else 0.0
    assert arguments[-2:] == (abs(scale) or 1.0, torch.get_num_threads())
    assert torch.equal(arguments[0], q * sign)  # type: ignore[arg-type]
    dq, dk, dv = given[-1]
    assert torch.equal(dq, torch.full_like(q, sign))
    assert torch.equal(dk, torch.ones_like(k)) and torch.equal(dv, torch.ones_like(v))


def test_calls_again_get_what_the_first_call_got() -> None:
    q, k, v = (torch.randn(2, heads, 7, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    recorder = Recorder("forward", "hopper")
    launch_forward(recorder.kernel, q, k, v, DOMAIN, 0.5)
    first = recorder.arguments
    again = launch.ready_forward(recorder.kernel, q, k, v, DOMAIN)
    kept = len(recorder.kernel.abi.inputs) + len(recorder.kernel.abi.outputs)
    for scale in (0.5, -0.5, 0.0):
        o, lse = again(q, k, v, scale)
        assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 4, 7), torch.float32)
        assert torch.equal(o, torch.ones_like(q))
        assert recorder.arguments[kept] is first[kept]
        assert recorder.arguments[-2] == (abs(scale) or 1.0)
    # What is read must lie at a multiple of 16 bytes.
    shifted = torch.randn(2 * 4 * 7 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 7, 64)
    again(shifted, k, v, 0.5)
    assert recorder.arguments[0].data_ptr() % 16 == 0  # type: ignore[attr-defined]
    assert torch.equal(recorder.arguments[0], shifted)  # type: ignore[arg-type]


def test_nothing_is_kept_for_each_length() -> None:
    """What lengths leave behind is a bounded number of shapes, and no tensor."""
    recorder = Recorder("forward")
    launch._layouts.cache_clear()
    for length in range(1, 1500):
        q = torch.empty(1, 1, length, 32)
        launch_forward(recorder.kernel, q, q, q, DOMAIN, 0.5)
    assert launch._layouts.cache_info().currsize <= 1024
    kept = [value for value in vars(launch).values() if hasattr(value, "cache_info")]
    assert kept and all(value.cache_info().currsize <= 1024 for value in kept)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [BandLayout.spattention(8), BandLayout.causal(8)])
@pytest.mark.parametrize("impl", ["auto", "mma"])
def test_a_size_of_one_may_have_any_stride(layout: BandLayout, impl: str) -> None:
    """To PyTorch such a tensor is contiguous; a TMA descriptor refuses the stride."""
    models = [torch.randn(8 * 256 * 64, device="cuda").to(torch.bfloat16) for _ in range(4)]
    q, k, v, do = (model.as_strided((1, 8, 256, 64), (3, 16384, 64, 1)) for model in models)
    one_head = torch.randn(2 * 256 * 64, device="cuda").to(torch.bfloat16)
    for tensors in (
        (q, k, v, do),
        (q, *(one_head[:16384].as_strided((1, 1, 256, 64), (5, 3, 64, 1)),) * 2, do),
    ):
        q, k, v = (tensor.detach().requires_grad_() for tensor in tensors[:3])
        wanted, _ = reference_attention(q, k, v, layout)
        wanted_gradients = torch.autograd.grad(wanted, (q, k, v), do.to(wanted.dtype))
        for _ in range(2):
            o = banded_attention(q, k, v, layout, impl=impl)
            found = (o, *torch.autograd.grad(o, (q, k, v), do))
            for result, expected in zip(found, (wanted, *wanted_gradients), strict=True):
                error = (result.float() - expected.float()).norm()
                assert error <= 2e-2 * expected.float().norm()


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
