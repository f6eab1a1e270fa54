"""A call like an earlier one gives what the operator gives: values, errors, gradients, visibility."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_inputs import (
    SPATTENTION,
    FunctionRecorder,
    Recorder,
    draw,
    draw_cuda,
    requiring_grad,
)
from torch import Tensor

from spattn_tvm.ops import repeated_calls
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.band_tables import clear_tables
from spattn_tvm.reference import reference_attention

FORWARD = torch.ops.spattn_tvm.banded_attention_forward.default


@pytest.fixture(autouse=True)
def nothing_prepared() -> None:
    """Where tables are full, a shape must come often to get a place."""
    repeated_calls._prepared.clear()


def with_stride_of_one_row(t: Tensor, stride: int) -> Tensor:
    return t.as_strided(t.shape, (stride, *t.stride()[1:]))


ARRANGEMENTS = {
    "bhnd": lambda t: t.contiguous(),
    "bnhd": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last dim not contiguous": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:1, :1].expand(t.shape),
    "padded rows": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "odd rows": lambda t: torch.cat((t, t[..., :3]), -1)[..., : t.shape[-1]],
    "odd stride of one row": lambda t: with_stride_of_one_row(t[:1].contiguous(), 3),
    "huge stride of one row": lambda t: with_stride_of_one_row(t[:1].contiguous(), 2**50),
}


def has_been_prepared(q: Tensor, k: Tensor, v: Tensor, impl: str = "auto") -> bool:
    return any(
        prepared.serves(q, k, v)
        for prepared in repeated_calls._prepared.get((SPATTENTION.spec, impl, q.shape), ())
    )


def outputs_and_gradients(leaves: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Of calls that differentiate o alone, o with lse, and nothing."""
    alone = banded_attention(*leaves, SPATTENTION, deterministic=True, **options)
    both = banded_attention(*leaves, SPATTENTION, deterministic=True, return_lse=True, **options)
    with torch.no_grad():
        neither = banded_attention(*leaves, SPATTENTION, return_lse=True, **options)
    assert alone.requires_grad
    assert all(output.requires_grad for output in both)
    assert not any(output.requires_grad for output in neither)
    generator = torch.Generator(alone.device).manual_seed(1)
    do, dlse = (torch.empty_like(output.detach()).normal_(generator=generator) for output in (alone, both[1]))
    return [
        alone.detach(),
        *(output.detach() for output in both),
        *neither,
        *torch.autograd.grad(alone, leaves, do),
        *torch.autograd.grad(both, leaves, (do, dlse)),
    ]


@pytest.mark.parametrize("scale", [None, 0.3, -0.3, 0])
@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_repeated_calls_give_what_the_first_gave(name: str, scale: float | None, device: str) -> None:
    inputs = draw() if device == "cpu" else draw_cuda()
    leaves = requiring_grad(*(ARRANGEMENTS[name](t) for t in inputs))
    clear_tables()
    first = outputs_and_gradients(leaves, scale=scale)
    assert has_been_prepared(*leaves)
    for _ in range(2):
        for result, expected in zip(outputs_and_gradients(leaves, scale=scale), first, strict=True):
            assert result.stride() == expected.stride()
            assert torch.equal(result, expected)
    expected_o, expected_lse = reference_attention(
        *(t.detach().double() for t in leaves), SPATTENTION, scale=scale
    )
    tolerance = 3e-5 if device == "cpu" else 2e-2
    torch.testing.assert_close(first[3].double(), expected_o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first[4].double(), expected_lse, rtol=tolerance, atol=tolerance)


def test_one_tensor_given_twice() -> None:
    """The guard takes no tensor twice, so nothing must pile up."""
    q, k, _ = draw()
    expected = banded_attention(q, k, k.clone(), SPATTENTION)
    clear_tables()
    for _ in range(3):
        assert torch.equal(banded_attention(q, k, k, SPATTENTION), expected)
    assert not repeated_calls._prepared


def test_invalid_calls_are_refused_after_valid_ones_of_the_same_shapes() -> None:
    q, k, v = draw()
    for _ in range(2):
        banded_attention(q, k, v, SPATTENTION)
    assert has_been_prepared(q, k, v)
    with pytest.raises(TypeError, match="one dtype"):
        banded_attention(q, k.double(), v, SPATTENTION)
    with pytest.raises(ValueError, match="on one device"):
        banded_attention(q, k, v.to("meta"), SPATTENTION)
    with pytest.raises(ValueError, match="agree in batch"):
        banded_attention(q, k[..., :-1], v[..., :-1], SPATTENTION)
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        banded_attention(q, None, v, SPATTENTION)
    with pytest.raises(ValueError, match="impl must be one of"):
        banded_attention(q, k, v, SPATTENTION, impl="fastest")
    with pytest.raises(TypeError, match="scale must be a float"):
        banded_attention(q, k, v, SPATTENTION, scale=True)
    with pytest.raises(ValueError, match="scale must be finite"):
        banded_attention(q, k, v, SPATTENTION, scale=float("inf"))


def test_whoever_watches_operators_sees_repeated_calls() -> None:
    q, k, v = draw()
    for _ in range(2):
        banded_attention(q, k, v, SPATTENTION)
    assert has_been_prepared(q, k, v)
    with Recorder() as recorder:
        banded_attention(q, k, v, SPATTENTION)
    assert recorder.names == ["spattn_tvm.banded_attention_forward.default"]
    with FunctionRecorder() as functions:
        banded_attention(q, k, v, SPATTENTION)
    assert str(FORWARD) in functions.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        banded_attention(q, k, v, SPATTENTION)
    assert "spattn_tvm::banded_attention_forward" in {event.name for event in profile.events()}
    # q itself, inside a transform of something else.
    torch.func.vmap(lambda x: (x, banded_attention(q, k, v, SPATTENTION))[0])(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            banded_attention(dual, k, v, SPATTENTION)


def test_repeated_calls_follow_autocast() -> None:
    q, k, v = draw()
    inputs = {dtype: tuple(t.to(dtype) for t in (q, k, v)) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(3):
        for given in inputs.values():
            assert banded_attention(*given, SPATTENTION).dtype is given[0].dtype
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype):
                    assert banded_attention(*given, SPATTENTION).dtype is dtype


def test_repeated_calls_follow_the_gradient_modes() -> None:
    leaves = requiring_grad(*draw())
    constants = tuple(t.detach() for t in leaves)
    for _ in range(3):
        assert banded_attention(*leaves, SPATTENTION).requires_grad
        assert not banded_attention(*constants, SPATTENTION).requires_grad
        assert banded_attention(constants[0], constants[1], leaves[2], SPATTENTION).requires_grad
        with torch.no_grad():
            assert not banded_attention(*leaves, SPATTENTION).requires_grad
        with torch.inference_mode():
            assert banded_attention(*constants, SPATTENTION).is_inference()
        assert not banded_attention(*constants, SPATTENTION).is_inference()


def test_second_derivative_of_repeated_calls_is_refused() -> None:
    q, k, v = requiring_grad(*draw())
    for _ in range(3):
        o = banded_attention(q, k, v, SPATTENTION)
        (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="banded_attention has no second derivative"):
            dq.sum().backward()


def test_repeated_calls_guard_what_they_saved() -> None:
    leaves = requiring_grad(*draw())
    for changed in (0, 1, 2, 0):
        q, k, v = (t * 1 for t in leaves)
        o = banded_attention(q, k, v, SPATTENTION)
        (q, k, v)[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()
        o, lse = banded_attention(*leaves, SPATTENTION, return_lse=True)
        with torch.no_grad():
            lse.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()


class Discarding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


@pytest.mark.parametrize("return_lse", [False, True])
def test_no_gradient_in_gives_none_out(return_lse: bool) -> None:
    leaves = requiring_grad(*draw())
    for _ in range(3):
        outputs = banded_attention(*leaves, SPATTENTION, return_lse=return_lse)
        Discarding.apply(outputs[0] if return_lse else outputs).sum().backward()
        assert all(leaf.grad is None for leaf in leaves)


def test_many_shapes_by_turns() -> None:
    inputs = [draw(length=length) for length in range(1, 40)]
    expected = [reference_attention(*each, SPATTENTION)[0] for each in inputs]
    for _ in range(2):
        for each, wanted in zip(inputs, expected, strict=True):
            for _ in range(2):
                torch.testing.assert_close(banded_attention(*each, SPATTENTION), wanted, rtol=1e-5, atol=1e-5)
    assert all(has_been_prepared(*each) for each in inputs), "calls by turns are prepared over and over"


def test_lengths_that_do_not_come_often_take_no_place() -> None:
    """What is kept for each of ever new lengths would pin the heap wherever they are."""
    most = repeated_calls._MAX_SHAPES
    for length in range(1, most + 40):
        inputs = draw(length=length)
        expected = reference_attention(*inputs, SPATTENTION)[0]
        for _ in range(3):
            torch.testing.assert_close(banded_attention(*inputs, SPATTENTION), expected, rtol=1e-5, atol=1e-5)
    assert [shape[2] for _, _, shape in repeated_calls._prepared] == list(range(1, most + 1))
    for _ in range(repeated_calls._OFTEN):
        banded_attention(*inputs, SPATTENTION)
    assert has_been_prepared(*inputs)
    assert [shape[2] for _, _, shape in repeated_calls._prepared] == [*range(2, most + 1), most + 39]


def test_many_strides_by_turns() -> None:
    """More than are kept for one shape."""
    padded = [[torch.zeros(*t.shape[:3], t.shape[3] + pad)[..., : t.shape[3]].copy_(t) for t in draw()]
              for pad in range(20)]  # fmt: skip
    expected = [reference_attention(*each, SPATTENTION)[0] for each in padded]
    for _ in range(2):
        for each, wanted in zip(padded, expected, strict=True):
            torch.testing.assert_close(banded_attention(*each, SPATTENTION), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_repeated_calls_copy_what_is_not_aligned() -> None:
    """Shape and strides are those of the earlier call, the address is not."""

    def placed(tensor: Tensor, offset: int) -> Tensor:
        flat = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype, device="cuda")
        return flat[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)

    inputs = tuple(t.contiguous() for t in draw_cuda())
    for _ in range(2):
        expected = banded_attention(*inputs, SPATTENTION)
    for moved in range(3):
        for offset in (0, 1, 8, 4):
            given = [placed(t, offset if index == moved else 0) for index, t in enumerate(inputs)]
            assert has_been_prepared(*given)
            assert torch.equal(banded_attention(*given, SPATTENTION), expected)


@pytest.mark.gpu
def test_a_graph_captured_after_repeated_calls_runs_beside_them() -> None:
    """The graph must not share the tile counters of the calls on its stream."""
    q, k, v = draw_cuda(heads=4, kv_heads=4, length=3000)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = banded_attention(q, k, v, SPATTENTION)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = banded_attention(q, k, v, SPATTENTION)
    for _ in range(20):
        graph.replay()
        with torch.cuda.stream(stream):
            eager = [banded_attention(q, k, v, SPATTENTION) for _ in range(3)]
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)
        assert all(torch.equal(o, expected) for o in eager)
