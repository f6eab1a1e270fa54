"""``torch.func`` and batches of gradients: the values of the reference, or a refusal that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_inputs import Recorder, draw, requiring_grad
from torch import Tensor
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from spattn_tvm.bands import BandLayout
from spattn_tvm.ops import transforms
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.operators import SAME_ROWS
from spattn_tvm.reference import reference_attention

LAYOUTS = [
    BandLayout.spattention(4),
    BandLayout.sliding_window(4, 3),
    BandLayout.custom([[(0, 2), (5, 6)], [(0, 40)], [(7, 40)], [(1, 1)]]),
]

FORWARD = torch.ops.spattn_tvm.banded_attention_forward.default
BACKWARD = torch.ops.spattn_tvm.banded_attention_backward.default

Attention = Callable[..., Tensor]
Route = Callable[[Attention, BandLayout, int, list[Tensor], list[Tensor]], Any]


def theirs(q: Tensor, k: Tensor, v: Tensor, layout: BandLayout, **options: Any) -> Tensor:
    return reference_attention(q, k, v, layout, **options)[0]


def of_lse(attention: Attention, *inputs: Any) -> Tensor:
    if attention is theirs:
        lse = reference_attention(*inputs)[1]
    else:
        lse = banded_attention(*inputs, return_lse=True)[1]
    return lse.clamp_min(-10.0)


def one_and_many(kv_heads: int = 2, size: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, and `size` of each along a dimension of its own."""
    drawn = [draw(kv_heads=kv_heads, length=23) for _ in range(size + 1)]
    return list(drawn[0]), [torch.stack(several) for several in zip(*drawn[1:], strict=True)]


def packed_by_element(attention: Attention, layout: BandLayout, one: list[Tensor], many: list[Tensor]) -> Any:
    boundaries = torch.tensor([[0, 5, 23], [0, 9, 23], [0, 0, 23]])

    def gradient(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Any:
        return grad(
            lambda q, k: attention(q, k, one[2], layout, cu_seqlens=cu_seqlens).square().sum(), argnums=(0, 1)
        )(q, k)

    if attention is theirs:  # which reads the boundaries on the host
        results = [gradient(many[0][i], many[1][i], boundaries[i]) for i in range(3)]
        return tuple(torch.stack(each) for each in zip(*results, strict=True))
    return vmap(gradient)(many[0], many[1], boundaries)


def gradient_of_a_map(attention: Attention, layout: BandLayout, one: list[Tensor], many: list[Tensor]) -> Any:
    q, k = requiring_grad(many[0], one[1])
    o = vmap(lambda q: attention(q, k, one[2], layout))(q)
    return torch.autograd.grad(o.square().sum(), (q, k))


def batched_gradients(attention: Attention, layout: BandLayout, one: list[Tensor], many: list[Tensor]) -> Any:
    leaves = requiring_grad(*one)
    o, lse = attention(*leaves, layout), of_lse(attention, *leaves, layout)
    gradients = torch.autograd.grad(o, leaves, many[0], is_grads_batched=True)
    of_both = torch.autograd.grad(
        (attention(*leaves, layout), lse), leaves, (many[0], many[0][..., 0]), is_grads_batched=True
    )
    return gradients, of_both


TRANSFORMS = {
    "grad": lambda A, layout, one, many: grad(
        lambda *inputs: A(*inputs, layout).square().sum(), argnums=(0, 1, 2)
    )(*one),
    "grad of lse": lambda A, layout, one, many: grad(lambda q: of_lse(A, q, *one[1:], layout).square().sum())(
        one[0]
    ),
    "vjp": lambda A, layout, one, many: vjp(lambda *inputs: A(*inputs, layout), *one)[1](many[0][0]),
    "jacrev": lambda A, layout, one, many: jacrev(
        lambda *inputs: A(*inputs, layout).sum((0, 1, 3)), argnums=(0, 1, 2)
    )(*one),
    "vmap": lambda A, layout, one, many: vmap(lambda *inputs: A(*inputs, layout), in_dims=(0, 3, 1))(
        many[0], many[1].movedim(0, 3), many[2].movedim(0, 1)
    ),
    "vmap of some": lambda A, layout, one, many: vmap(lambda k: A(one[0], k, one[2], layout), out_dims=2)(
        many[1]
    ),
    "vmap of vmap": lambda A, layout, one, many: vmap(
        vmap(lambda q, k, v: A(q, k, v, layout), in_dims=(0, None, 0)), in_dims=(None, 0, 0)
    )(many[0], many[1], torch.stack([many[2], many[2] + 1, -many[2]])),
    "vmap of grad": lambda A, layout, one, many: vmap(
        grad(lambda *inputs: A(*inputs, layout).square().sum(), argnums=(0, 1, 2)), in_dims=(0, None, 2)
    )(many[0], one[1], many[2].movedim(0, 2)),
    "grad of vmap": lambda A, layout, one, many: grad(
        lambda q, k, v: vmap(lambda q, k: A(q, k, v, layout))(q, k).square().sum(), argnums=(0, 1, 2)
    )(many[0], many[1], one[2]),
    "vmap with chunks": lambda A, layout, one, many: vmap(lambda *inputs: A(*inputs, layout), chunk_size=2)(
        *many
    ),
    "functionalize": lambda A, layout, one, many: functionalize(vmap(lambda q: A(q, *one[1:], layout)))(
        many[0]
    ),
    "boundaries by element": packed_by_element,
    "gradient of a map": gradient_of_a_map,
    "batched gradients": batched_gradients,
    "vectorized jacobian": lambda A, layout, one, many: torch.autograd.functional.jacobian(
        lambda *inputs: A(*inputs, layout)[1, :, 3:5], tuple(one), vectorize=True
    ),
}


@pytest.mark.parametrize(
    "most_elements", [2**24, 2 * 2 * 4 * 23 * 32, 1], ids=["at once", "by twos", "by ones"]
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_what_they_give_of_the_reference(
    name: str, most_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "_MOST_ELEMENTS", most_elements)
    for kv_heads, layout in zip((2, 4, 1), LAYOUTS, strict=True):
        one, many = one_and_many(kv_heads)
        ours = tree_leaves(TRANSFORMS[name](banded_attention, layout, one, many))
        expected = tree_leaves(TRANSFORMS[name](theirs, layout, one, many))
        assert len(ours) == len(expected) > 0
        for result, wanted in zip(ours, expected, strict=True):
            assert result.shape == wanted.shape
            torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_a_transform_can_be_traced(tracing_mode: str) -> None:
    (q, k, v), _ = one_and_many()
    function = grad(lambda q, k, v: banded_attention(q, k, v, LAYOUTS[0]).square().sum())
    graph = make_fx(function, tracing_mode=tracing_mode)(q, k, v)
    assert {FORWARD, BACKWARD} <= {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(2 * q, k, v), function(2 * q, k, v))


def test_transformed_calls_are_seen_by_modes() -> None:
    (_, k, v), many = one_and_many()
    with Recorder() as recorder:
        vmap(grad(lambda q: banded_attention(q, k, v, LAYOUTS[0]).square().sum()))(many[0])
    assert recorder.names.count(str(FORWARD)) == recorder.names.count(str(BACKWARD)) == 1


def test_the_operators_themselves_can_be_mapped() -> None:
    (q, k, v), many = one_and_many()
    settings = (None, LAYOUTS[0].spec, 0.3, False, "auto")
    o, lse = vmap(lambda q: FORWARD(q, k, v, *SAME_ROWS, *settings))(many[0])
    for index, each in enumerate(many[0]):
        expected_o, expected_lse = reference_attention(each, k, v, LAYOUTS[0], scale=0.3)
        torch.testing.assert_close(o[index], expected_o, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse[index], expected_lse, rtol=1e-4, atol=1e-4)
    gradients = vmap(lambda do: BACKWARD(do, None, q, k, v, o[0], lse[0], *SAME_ROWS, *settings))(many[0])
    for index, each in enumerate(many[0]):
        for ours, alone in zip(
            gradients, BACKWARD(each, None, q, k, v, o[0], lse[0], *SAME_ROWS, *settings), strict=True
        ):
            torch.testing.assert_close(ours[index], alone, rtol=1e-5, atol=1e-5)


def test_a_map_over_nothing_has_the_shape_of_its_elements() -> None:
    (q, k, v), _ = one_and_many()
    nothing, boundaries = q.new_empty((0, *q.shape)), torch.zeros((0, 3), dtype=torch.int64)
    own = BandLayout.spattention(4, 64)

    def attend(q: Tensor, **places: Tensor) -> Tensor:
        return banded_attention(q, k, v, own, **places)

    assert vmap(attend)(nothing).shape == nothing.shape
    assert vmap(attend, in_dims=2, out_dims=1)(nothing.movedim(0, 2)).shape == nothing.movedim(0, 1).shape
    assert vmap(grad(lambda q: attend(q).sum()))(nothing).shape == nothing.shape
    assert vmap(lambda ends: attend(q, cu_seqlens=ends))(boundaries).shape == nothing.shape
    lengths = boundaries[:, : len(q)]
    assert vmap(lambda lengths: attend(q, kv_lengths=lengths))(lengths).shape == nothing.shape


def attend(q: Tensor) -> Tensor:
    k, v = q[:, :2] * 0.7, q[:, 2:].sin()
    return banded_attention(q, k, v, LAYOUTS[0])


@pytest.mark.parametrize(
    ("transform", "instead"),
    [
        (lambda q: jvp(attend, (q,), (q,)), "no forward-mode derivative.*reverse mode"),
        (lambda q: jacfwd(lambda q: attend(q).sum((0, 1, 2)))(q), "no forward-mode derivative.*reverse mode"),
        (lambda q: hessian(lambda q: attend(q).sum())(q), "no forward-mode derivative.*reference_attention"),
        (lambda q: linearize(attend, q)[1](q), "no forward-mode derivative.*reverse mode"),
        (
            lambda q: vmap(lambda s: jvp(attend, (s * q,), (q,))[1])(torch.ones(2)),
            "no forward-mode derivative.*reverse mode",
        ),
        (
            lambda q: grad(lambda q: grad(lambda q: attend(q).square().sum())(q).square().sum())(q),
            "no second derivative.*reference_attention",
        ),
        (
            lambda q: jacrev(jacrev(lambda q: attend(q).square().sum()))(q),
            "no second derivative.*reference_attention",
        ),
        (functionalize(grad(lambda q: attend(q).sum())), "functionalize.*leave it out"),
        (grad(lambda q: functionalize(attend)(q).sum()), "functionalize.*leave it out"),
    ],
    ids=[
        "jvp",
        "jacfwd",
        "hessian",
        "linearize",
        "vmap of jvp",
        "grad of grad",
        "jacrev of jacrev",
        "functionalized gradient",
        "gradient of what is functionalized",
    ],
)
def test_what_is_not_supported_says_what_to_use(transform: Callable[[Tensor], Any], instead: str) -> None:
    q, _, _ = draw(length=9, batch=1)
    attend(q)
    attend(q)
    with pytest.raises(NotImplementedError, match=instead):
        transform(q)
