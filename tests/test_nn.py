"""The module against its own formula in plain PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spattn_tvm.bands import BandLayout
from spattn_tvm.nn import BandedAttention, rotate
from spattn_tvm.reference import attention_mask


def by_complex_numbers(x: Tensor, theta: float) -> Tensor:
    """The rotary embedding as a product of complex numbers."""
    half = x.shape[-1] // 2
    turn = torch.polar(
        torch.ones(()).double(),
        torch.arange(x.shape[-2]).double()[:, None] * theta ** (-torch.arange(half).double() / half),
    )
    product = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((product.real, product.imag), -1).to(x.dtype)


def expected(module: BandedAttention, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    def heads(projection: torch.nn.Linear, count: int) -> Tensor:
        return projection(x).view(*x.shape[:2], count, module.head_dim).transpose(1, 2)

    q = heads(module.q_proj, module.num_heads)
    k, v = (heads(p, module.num_kv_heads) for p in (module.k_proj, module.v_proj))
    if module.rope_theta is not None:
        q, k = by_complex_numbers(q, module.rope_theta), by_complex_numbers(k, module.rope_theta)
    mask = attention_mask(module.layout, x.shape[1], cu_seqlens)
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=True)
    return module.out_proj(o.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_kv_heads", [None, 1, 2])
@pytest.mark.parametrize("rope_theta", [None, 100.0])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_output_and_gradients(
    bias: bool, num_kv_heads: int | None, rope_theta: float | None, impl: str
) -> None:
    torch.manual_seed(0)
    module = BandedAttention(128, 4, num_kv_heads=num_kv_heads, bias=bias, rope_theta=rope_theta, impl=impl)
    x = torch.randn(2, 45, 128, requires_grad=True)
    ours, theirs = module(x), expected(module, x)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    weights = torch.randn_like(ours)
    wanted = [x, *module.parameters()]
    for ours_grad, theirs_grad in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((theirs * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-4)


def test_packed_documents_equal_separate_calls() -> None:
    """With rotary positions that run on from document to document."""
    module = BandedAttention(64, 2, rope_theta=10.0, impl="reference").double()
    x = torch.randn(1, 30, 64).double()
    packed = module(x, torch.tensor([0, 11, 11, 30]))
    torch.testing.assert_close(packed[:, :11], module(x[:, :11]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed[:, 11:], module(x[:, 11:]), rtol=1e-9, atol=1e-9)
    assert (packed - module(x)).abs().max() > 1e-3


def test_layout_by_name_and_by_value() -> None:
    assert BandedAttention(64, 2).layout == BandLayout.spattention(2)
    assert BandedAttention(64, 2, layout="causal", context_length=9).layout == BandLayout.causal(2, 9)
    window = BandLayout.sliding_window(2, 5)
    module = BandedAttention(64, 2, layout=window, impl="reference")
    x = torch.randn(1, 20, 64)
    torch.testing.assert_close(module(x), expected(module, x))
    assert "sliding_window:heads=2,window=5" in repr(module)


def test_state_dict_names() -> None:
    names = {f"{p}.{n}" for p in ("q_proj", "k_proj", "v_proj", "out_proj") for n in ("weight", "bias")}
    assert set(BandedAttention(64, 2, bias=True).state_dict()) == names


def test_a_copy_works_like_the_original(tmp_path: Path) -> None:
    module = BandedAttention(64, 2, layout=BandLayout.custom([[(0, 3)], [(2, 9), (20, 30)]]), rope_theta=9.0)
    x = torch.randn(1, 40, 64)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(x), module(x))


def test_parameters_have_the_device_and_dtype_asked_for() -> None:
    module = BandedAttention(64, 2, bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert module(torch.empty(3, 7, 64, device="meta", dtype=torch.bfloat16)).shape == (3, 7, 64)


def test_rotation_keeps_scores_a_function_of_the_distance() -> None:
    q, k = (torch.randn(1, 1, 1, 32).double().expand(1, 1, 50, 32) for _ in range(2))
    scores = (rotate(q, 50.0) @ rotate(k, 50.0).mT)[0, 0]
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"embed_dim": 100, "num_heads": 3}, ValueError, "embed_dim must be a multiple .* 100 and 3"),
        ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_kv_heads": 0}, ValueError, "must be at least 1, got 128, 4 and 0"),
        ({"layout": BandLayout.causal(8)}, ValueError, "made for 8 heads, num_heads is 4"),
        (
            {"layout": BandLayout.causal(4, 10), "context_length": 12},
            ValueError,
            "has the context length 10, context_length is 12",
        ),
        ({"layout": "dense"}, ValueError, "unknown layout 'dense'"),
        ({"layout": 3}, TypeError, "layout must be a BandLayout or the name of one, got int"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta must be positive"),
        ({"embed_dim": 132, "rope_theta": 10.0}, ValueError, "even, got 10.0 and a head dim of 33"),
    ],
)
def test_message(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BandedAttention(**{"embed_dim": 128, "num_heads": 4, **arguments})
