"""The operators as citizens of PyTorch: their contract, gradients, modes and memory formats."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attention_inputs import (
    LAYOUTS,
    SPATTENTION,
    Recorder,
    close_to_reference,
    draw,
    draw_cuda,
    requiring_grad,
)
from torch import Tensor
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from spattn_tvm import dispatch
from spattn_tvm.bands import BandLayout
from spattn_tvm.ops import operators as torch_ops
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.band_tables import clear_tables
from spattn_tvm.reference import reference_attention

FORWARD = torch.ops.spattn_tvm.banded_attention_forward.default
BACKWARD = torch.ops.spattn_tvm.banded_attention_backward.default
# Keys are the queries' own rows: cu_seqlens_k, query_offsets, kv_lengths, kv_starts, query_offset.
ELSE = (None,) * 5

# --- the contract of operators -------------------------------------------------------------------------


def operator_arguments(dtype: torch.dtype, impl: str, packed: bool, grad: bool) -> tuple[Any, ...]:
    q, k, v = draw(dtype=dtype)
    if grad:
        q, k, v = requiring_grad(q, k, v)
    cu_seqlens = torch.tensor([0, 5, 5, 37], dtype=torch.int32) if packed else None
    return q, k, v, cu_seqlens, *ELSE, SPATTENTION.spec, 0.2, False, impl


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "impl"),
    [
        (torch.float32, "cpu"),
        (torch.bfloat16, "cpu"),
        (torch.float32, "reference"),
        (torch.float64, "auto"),
    ],
)
def test_opcheck_forward(dtype: torch.dtype, impl: str, packed: bool) -> None:
    torch.library.opcheck(FORWARD, operator_arguments(dtype, impl, packed, grad=True))
    torch.library.opcheck(FORWARD, operator_arguments(dtype, impl, packed, grad=False))


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize(("dtype", "impl"), [(torch.float32, "cpu"), (torch.float64, "auto")])
def test_opcheck_backward(dtype: torch.dtype, impl: str, with_dlse: bool) -> None:
    q, k, v, *rest = operator_arguments(dtype, impl, packed=False, grad=False)
    o, lse = FORWARD(q, k, v, *rest)
    dlse = torch.randn_like(lse) if with_dlse else None
    torch.library.opcheck(BACKWARD, (torch.randn_like(o), dlse, q, k, v, o, lse, *rest))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t.contiguous(),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: t[:1, :1].expand(t.shape),
        lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
        lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    ],
    ids=["bhnd", "bnhd", "last dim not contiguous", "expanded", "padded rows", "nbhd"],
)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_fakes_promise_the_strides_that_kernels_return(arrange: Callable[..., Tensor], impl: str) -> None:
    q, k, v = (arrange(t) for t in draw())
    arguments = (q, k, v, None, *ELSE, SPATTENTION.spec, 0.2, False, impl)
    o, lse = FORWARD(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = FORWARD(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    assert (o.stride(), lse.stride()) == (fake[0].stride(), fake[1].stride())
    assert o.stride(-1) == 1
    gradients = BACKWARD(torch.randn_like(o), None, q, k, v, o, lse, *arguments[3:])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = (mode.from_tensor(t) for t in (q, k, v, o, lse))
        fake = BACKWARD(mode.from_tensor(torch.randn_like(o)), None, *tensors, *arguments[3:])
    assert [t.stride() for t in gradients] == [t.stride() for t in fake]


def test_output_keeps_the_dimension_order_of_q() -> None:
    q, k, v = draw()
    o = banded_attention(q, k, v, SPATTENTION)
    assert o.transpose(1, 2).is_contiguous()
    assert banded_attention(q.contiguous(), k, v, SPATTENTION).is_contiguous()


# --- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("cu_seqlens", [None, (0, 4, 4, 11)])
@pytest.mark.parametrize("route", ["eager", "operator"])
def test_gradcheck(layout: BandLayout, cu_seqlens: tuple[int, ...] | None, route: str) -> None:
    inputs = requiring_grad(*draw(length=11, head_dim=5, batch=1, dtype=torch.float64))
    offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if route == "operator":
            o, lse = FORWARD(q, k, v, offsets, *ELSE, layout.spec, 0.4, False, "auto")
        else:
            o, lse = banded_attention(
                q, k, v, layout, scale=0.4, cu_seqlens=offsets, return_lse=True, impl="auto"
            )
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    assert gradcheck(attention, inputs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("route", ["eager", "operator"])
def test_float32_kernels_and_gradients(layout: BandLayout, route: str) -> None:
    q, k, v = draw(length=11)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if route == "operator":
            return FORWARD(q, k, v, None, *ELSE, layout.spec, 0.4, False, "cpu")
        return banded_attention(q, k, v, layout, scale=0.4, return_lse=True, impl="cpu")

    close_to_reference(attention, q, k, v, layout, scale=0.4)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("route", ["eager", "operator"])
def test_each_output_can_be_differentiated_alone(impl: str, route: str) -> None:
    q, k, v = draw()
    for output in (0, 1):
        ours, theirs = requiring_grad(q, k, v), requiring_grad(q, k, v)
        if route == "operator":
            results = FORWARD(*ours, None, *ELSE, SPATTENTION.spec, 32**-0.5, False, impl)
        else:
            results = banded_attention(*ours, SPATTENTION, return_lse=True, impl=impl)
        results[output].sum().backward()
        reference_attention(*theirs, SPATTENTION)[output].sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            expected = torch.zeros_like(b) if b.grad is None else b.grad
            torch.testing.assert_close(a.grad, expected, rtol=1e-4, atol=1e-4)


def test_only_some_inputs_need_gradients() -> None:
    q, k, v = draw()
    k.requires_grad_()
    banded_attention(q, k, v, SPATTENTION).sum().backward()
    assert q.grad is None
    assert v.grad is None
    expected = k.detach().requires_grad_()
    reference_attention(q, expected, v, SPATTENTION)[0].sum().backward()
    torch.testing.assert_close(k.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_broadcast_sum() -> None:
    """The gradient of a sum has strides of zero."""
    q, k, v = requiring_grad(*draw())
    o = banded_attention(q, k, v, SPATTENTION)
    ours = torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True)
    dense = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    for a, b in zip(ours, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("route", ["eager", "operator"])
def test_second_derivative_is_refused_clearly(route: str) -> None:
    q, k, v = requiring_grad(*draw(dtype=torch.float64))
    if route == "operator":
        o, _ = FORWARD(q, k, v, None, *ELSE, SPATTENTION.spec, 0.4, False, "auto")
    else:
        o = banded_attention(q, k, v, SPATTENTION)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"banded_attention has no second derivative.*reference_attention"
    ):
        dq.sum().backward()
    assert gradgradcheck(
        lambda q: reference_attention(q, k[:1, :, :3], v[:1, :, :3], SPATTENTION)[0],
        (q[:1, :, :3].detach().requires_grad_(),),
    )


def test_saved_tensors_are_guarded_against_changes_in_place() -> None:
    q, k, v = requiring_grad(*draw())
    k = k * 1
    o = banded_attention(q, k, v, SPATTENTION)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_no_memory_is_kept_without_gradients() -> None:
    q, k, v = requiring_grad(*draw())
    with torch.no_grad():
        assert not banded_attention(q, k, v, SPATTENTION).requires_grad
    assert banded_attention(q, k, v, SPATTENTION).requires_grad
    with torch.inference_mode():
        o = banded_attention(q, k, v, SPATTENTION)
        assert o.is_inference()
    torch.testing.assert_close(o, banded_attention(q, k, v, SPATTENTION))


def test_tables_made_in_inference_mode_serve_training() -> None:
    q, k, v = draw(length=23)
    clear_tables()
    with torch.inference_mode():
        banded_attention(q, k, v, SPATTENTION)
    close_to_reference(lambda *t: banded_attention(*t, SPATTENTION, return_lse=True), q, k, v)


def test_graph_is_freed() -> None:
    def live() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    def step() -> None:
        q, k, v = requiring_grad(*draw())
        banded_attention(q, k, v, SPATTENTION).sum().backward()

    step()
    before = live()
    for _ in range(5):
        step()
    assert live() == before


def test_activation_checkpointing() -> None:
    q, k, v = requiring_grad(*draw())
    weight = torch.randn(32, 32, requires_grad=True)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return banded_attention(q @ weight, k, v, SPATTENTION).relu()

    wanted = (q, k, v, weight)
    plain = torch.autograd.grad(block(q, k, v).sum(), wanted)
    for reentrant in (False, True):
        o = checkpoint(block, q, k, v, use_reentrant=reentrant)
        for tensor in wanted:
            tensor.grad = None
        o.sum().backward()
        for tensor, gradient in zip(wanted, plain, strict=True):
            assert torch.equal(tensor.grad, gradient)


def test_backward_is_bitwise_repeatable() -> None:
    q, k, v = draw(heads=8, length=200, head_dim=64)
    layout = BandLayout.spattention(8)
    results = []
    for _ in range(5):
        inputs = requiring_grad(q, k, v)
        o, lse = banded_attention(*inputs, layout, return_lse=True, deterministic=True)
        results.append((o, lse, *torch.autograd.grad((o, lse), inputs, (q, lse.detach()))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- autocast, modes, transforms -----------------------------------------------------------------------


def test_autocast_casts_like_scaled_dot_product_attention() -> None:
    q, k, v = requiring_grad(*draw())
    with torch.autocast("cpu", torch.bfloat16):
        o = banded_attention(q, k.bfloat16(), v, SPATTENTION)
    low = (q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert o.dtype is torch.bfloat16
    assert torch.equal(o, banded_attention(*low, SPATTENTION))
    o.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert banded_attention(*(t.double() for t in (q, k, v)), SPATTENTION).dtype is torch.float64


def test_autocast_does_not_reach_into_the_reference() -> None:
    q, k, v = draw()
    low = requiring_grad(q.bfloat16(), k.bfloat16(), v.bfloat16())
    plain = banded_attention(*low, SPATTENTION, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        inside = banded_attention(*low, SPATTENTION, impl="reference")
        gradients = torch.autograd.grad(inside.sum(), low)
    assert torch.equal(plain, inside)
    for a, b in zip(gradients, torch.autograd.grad(plain.sum(), low), strict=True):
        assert torch.equal(a, b)


def test_dispatch_modes_see_the_operators() -> None:
    q, k, v = requiring_grad(*draw())
    with Recorder() as recorder:
        banded_attention(q, k, v, SPATTENTION).sum().backward()
    assert "spattn_tvm.banded_attention_forward.default" in recorder.names
    assert "spattn_tvm.banded_attention_backward.default" in recorder.names
    assert not any("empty" in name for name in recorder.names), "the inside of an operator is not for modes"


def test_profiler_sees_the_operators() -> None:
    q, k, v = requiring_grad(*draw())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        banded_attention(q, k, v, SPATTENTION).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"spattn_tvm::banded_attention_forward", "spattn_tvm::banded_attention_backward"} <= names


def test_subclasses_reach_their_torch_dispatch() -> None:
    seen = []

    class Wrapper(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    q, k, v = (t.as_subclass(Wrapper) for t in draw())
    o = banded_attention(q, k, v, SPATTENTION)
    assert type(o) is Wrapper
    assert FORWARD in seen


def test_forward_mode_derivatives_are_refused() -> None:
    q, k, v = draw()
    expected = banded_attention(q, k, v, SPATTENTION)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            banded_attention(dual, k, v, SPATTENTION)
        assert torch.equal(banded_attention(q, k, v, SPATTENTION), expected)


def test_what_serves_a_call_is_found_anew_when_kernels_change(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw()
    for _ in range(2):
        banded_attention(q, k, v, SPATTENTION)
    found = []
    find_kernel = torch_ops.find_kernel

    def recording(*arguments: Any, **options: Any) -> Any:
        found.append(find_kernel(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(torch_ops, "find_kernel", recording)
    banded_attention(q, k, v, SPATTENTION)
    assert not found
    dispatch.clear_cache()
    banded_attention(q, k, v, SPATTENTION)
    assert {kernel.spec.direction for kernel in found} == {"forward"}


def test_layouts_of_equal_shapes_are_not_confused() -> None:
    q, k, v = draw()
    for layout in (*LAYOUTS, BandLayout.causal(4)):
        if layout.context_length is None:
            expected, _ = reference_attention(q, k, v, layout)
            for impl in ("auto", "reference", "cpu"):
                o = banded_attention(q, k, v, layout, impl=impl)
                torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)


def test_threads_share_no_state() -> None:
    """Calls of several shapes from several threads at once, the caches cold."""
    clear_tables()
    inputs = [requiring_grad(*draw(length=length)) for length in (5, 37, 64, 90) * 4]
    expected = [reference_attention(*each, SPATTENTION)[0] for each in inputs]

    def work(each: tuple[Tensor, ...]) -> Tensor:
        o = banded_attention(*each, SPATTENTION)
        o.sum().backward()
        return o

    with ThreadPoolExecutor(4) as pool:
        for o, wanted in zip(pool.map(work, inputs), expected, strict=True):
            torch.testing.assert_close(o, wanted, rtol=1e-5, atol=1e-5)


def test_empty_batch() -> None:
    for dtype in (torch.float32, torch.float64):
        q, k, v = requiring_grad(*draw(batch=0, dtype=dtype))
        o, lse = banded_attention(q, k, v, SPATTENTION, return_lse=True)
        assert (o.shape, lse.shape) == ((0, 4, 37, 32), (0, 4, 37))
        (o.sum() + lse.sum()).backward()
        assert [t.grad.shape for t in (q, k, v)] == [t.shape for t in (q, k, v)]


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_only_tensors_in_memory_are_plain(device: str, is_inference: bool) -> None:
    with torch.inference_mode(is_inference):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            tensor = torch.ones(2, 3, device=device).to(dtype)
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            assert torch_ops.are_plain((tensor, tensor.mT, parameter, None, tensor[:, 1:]))
        tensor = torch.ones(2, 3, device=device)
        with torch.autocast(device):
            assert torch_ops.are_plain((tensor,))
        for other in (
            tensor.to("meta"),
            tensor.to_sparse(),
            torch._neg_view(tensor),
            torch.complex(tensor, tensor).conj(),
            torch._efficientzerotensor(2, 3, device=device),
            torch._to_functional_tensor(tensor),
            torch.nested.nested_tensor([tensor]),
            tensor.as_subclass(torch.nn.Buffer),
        ):
            assert not torch_ops.are_plain((tensor, other))


@pytest.mark.gpu
def test_tensors_of_two_devices_are_not_plain() -> None:
    assert not torch_ops.are_plain((torch.ones(2), torch.ones(2, device="cuda")))


# --- CUDA ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_opcheck_on_cuda() -> None:
    q, k, v = requiring_grad(*draw_cuda(length=70))
    torch.library.opcheck(FORWARD, (q, k, v, None, *ELSE, SPATTENTION.spec, 0.2, False, "auto"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_q_decides() -> None:
    q, k, v = draw_cuda(length=70, device="cuda:1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o = banded_attention(q, k, v, SPATTENTION)
    assert o.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    expected, _ = reference_attention(q, k, v, SPATTENTION)
    torch.testing.assert_close(o.float(), expected, rtol=2e-2, atol=2e-2)
