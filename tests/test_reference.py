"""The oracle against PyTorch's own attention with the dense mask, in float64 and with gradients."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from spattn_tvm import reference
from spattn_tvm.bands import BandLayout
from spattn_tvm.bench.peer_masks import bigbird_mask, longformer_mask, reformer_mask
from spattn_tvm.reference import (
    attention_mask,
    document_lengths,
    flex_mask_mod,
    reference_attention,
    reference_gradients,
)

FROM_CONTEXT = ("spattention", "exclusive", "local_only", "gapped", "causal", "equal_area")


def make_layouts(num_heads: int, length: int) -> list[BandLayout]:
    layouts = [getattr(BandLayout, name)(num_heads) for name in FROM_CONTEXT]
    layouts += [getattr(BandLayout, name)(num_heads, length + 9) for name in FROM_CONTEXT]
    layouts.append(BandLayout.sliding_window(num_heads, 3))
    layouts.append(BandLayout.custom([[(2, 4), (7, 30)], *[[]] * (num_heads - 1)]))
    return layouts


def make_qkv(batch, query_heads, kv_heads, length, head_dim, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, head_dim) for heads in (query_heads, kv_heads, kv_heads)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def mask_by_pairs(layout: BandLayout, length: int, offsets: list[int]) -> torch.Tensor:
    """The definition, one pair at a time."""
    mask = torch.zeros(layout.num_heads, length, length, dtype=torch.bool)
    for begin, end in pairwise(offsets):
        bands = layout.bands(end - begin)
        for h in range(layout.num_heads):
            for i in range(begin, end):
                for j in range(begin, i + 1):
                    mask[h, i, j] = any(lo <= i - j <= hi for lo, hi in bands[h])
    return mask


def dense_attention(q, k, v, mask, scale):
    """PyTorch's attention with a dense mask; lse from the masked scores. Needs a key in each row."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    lse = torch.logsumexp((scale * q @ k.mT).masked_fill(~mask, -torch.inf), -1)
    return o, lse


@pytest.mark.parametrize("length, offsets", [(1, None), (13, None), (13, [0, 4, 4, 5, 13]), (16, [0, 0, 16])])
def test_mask_equals_the_definition(length, offsets):
    for layout in make_layouts(3, length):
        expected = mask_by_pairs(layout, length, offsets or [0, length])
        assert torch.equal(attention_mask(layout, length, offsets), expected), layout.spec
        if offsets is None:
            assert tuple(expected.sum((1, 2)).tolist()) == layout.pairs_per_head(length)


@pytest.mark.parametrize("offsets", [None, [0, 70, 71, 71, 200]])
def test_flex_mask_equals_the_mask(offsets):
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    length = 200
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    for layout in make_layouts(3, length):
        mask_mod = flex_mask_mod(layout, length, cu_seqlens)
        expected = attention_mask(layout, length, cu_seqlens)
        assert torch.equal(create_mask(mask_mod, 1, 3, length, length, device="cpu")[0], expected), (
            layout.spec
        )
        block = create_block_mask(mask_mod, 1, 3, length, length, device="cpu", BLOCK_SIZE=64)
        tiles = torch.nn.functional.pad(expected, (0, 56, 0, 56)).view(3, 4, 64, 4, 64).any(-1).any(2)
        assert torch.equal(block.to_dense()[0].bool(), tiles), layout.spec


def test_flex_attention_agrees_with_the_reference():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout = BandLayout.spattention(4, 64)
    q, k, v = (tensor.detach() for tensor in make_qkv(1, 4, 4, 64, 8, dtype=torch.float32))
    block = create_block_mask(flex_mask_mod(layout, 64), 1, 4, 64, 64, device="cpu", BLOCK_SIZE=32)
    with pytest.warns(UserWarning, match="without torch.compile"):
        o = flex_attention(q, k, v, block_mask=block)
    torch.testing.assert_close(o, reference_attention(q, k, v, layout)[0])


@pytest.mark.parametrize("chunk_scores", [1, 2**22])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("offsets", [None, [0, 20, 21, 37]])
@pytest.mark.parametrize("name", ["spattention", "local_only", "causal", "equal_area"])
def test_forward_and_gradients_equal_dense_attention(name, offsets, kv_heads, chunk_scores, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_SCORES", chunk_scores)
    layout = getattr(BandLayout, name)(4, 40)
    inputs = make_qkv(2, 4, kv_heads, 37, 8)
    mask = mask_by_pairs(layout, 37, offsets or [0, 37])
    o, lse = reference_attention(*inputs, layout, scale=0.3, cu_seqlens=offsets)
    o_dense, lse_dense = dense_attention(*inputs, mask, 0.3)
    torch.testing.assert_close(o, o_dense)
    torch.testing.assert_close(lse, lse_dense)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    gradients = torch.autograd.grad((o, lse), inputs, (do, dlse))
    expected = torch.autograd.grad((o_dense, lse_dense), inputs, (do, dlse))
    torch.testing.assert_close(gradients, expected)
    written_out = reference_gradients(*inputs, o, lse, do, dlse, layout, scale=0.3, cu_seqlens=offsets)
    torch.testing.assert_close(written_out, expected)


@pytest.mark.parametrize("chunk_scores", [1, 2**22])
@pytest.mark.parametrize("name", ["exclusive", "gapped"])
def test_queries_without_keys_give_zeros_and_zero_gradients(name, chunk_scores, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_SCORES", chunk_scores)
    layout = getattr(BandLayout, name)(4, 37)
    inputs = make_qkv(2, 4, 2, 37, 8)
    q, k, v = inputs
    keyless = ~attention_mask(layout, 37).any(-1).expand(2, 4, 37)
    assert keyless.any() and not keyless.all()
    o, lse = reference_attention(q, k, v, layout)
    assert torch.equal(lse == -torch.inf, keyless)
    assert (o[keyless] == 0).all() and o.isfinite().all()

    # Dense attention with a row of its own for such a query, whose results are then dropped.
    mask = attention_mask(layout, 37) | torch.eye(37, dtype=torch.bool) & keyless[0, :, :, None]
    o_dense, lse_dense = dense_attention(q, k, v, mask, 8**-0.5)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    gradients = torch.autograd.grad((o, lse), inputs, (do, dlse), retain_graph=True)
    kept = (~keyless).double()
    expected = torch.autograd.grad((o_dense, lse_dense), inputs, (do * kept[..., None], dlse * kept))
    torch.testing.assert_close(gradients, expected)
    assert (gradients[0][keyless] == 0).all()
    torch.testing.assert_close(reference_gradients(*inputs, o, lse, do, dlse, layout), expected)
    # Whatever flows into such a query's lse stops there.
    poisoned = dlse.masked_fill(keyless, torch.nan)
    torch.testing.assert_close(torch.autograd.grad((o, lse), inputs, (do, poisoned)), expected)
    torch.testing.assert_close(reference_gradients(*inputs, o, lse, do, poisoned, layout), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_problems_equal_dense_attention(data):
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, 40))
    num_heads = kv_heads * group
    layout = data.draw(st.sampled_from(make_layouts(num_heads, length)))
    inner = data.draw(st.none() | st.lists(st.integers(0, length), max_size=3).map(sorted))
    offsets = None if inner is None else [0, *inner, length]
    inputs = make_qkv(data.draw(st.integers(1, 2)), num_heads, kv_heads, length, 4, seed=length)
    mask = mask_by_pairs(layout, length, offsets or [0, length])
    o, lse = reference_attention(*inputs, layout, cu_seqlens=offsets)
    safe = mask | ~mask.any(-1, keepdim=True)
    o_dense, lse_dense = dense_attention(*inputs, safe, 0.5)
    torch.testing.assert_close(o, o_dense * mask.any(-1)[..., None])
    torch.testing.assert_close(lse, lse_dense.masked_fill(~mask.any(-1), -torch.inf))


@pytest.mark.parametrize("layout", [BandLayout.spattention(4), BandLayout.equal_area(4, 20)], ids=str)
@pytest.mark.parametrize("offsets", [None, [0, 5, 11]])
def test_gradcheck(layout, offsets):
    inputs = make_qkv(1, 4, 2, 11, 3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference_attention(q, k, v, layout, cu_seqlens=offsets), inputs
    )


def test_gradcheck_with_queries_without_keys():
    layout = BandLayout.exclusive(4, 11)
    keyed = attention_mask(layout, 11).any(-1)

    def finite(q, k, v):
        o, lse = reference_attention(q, k, v, layout)
        return o, lse[:, keyed]

    assert torch.autograd.gradcheck(finite, make_qkv(1, 4, 2, 11, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_are_at_least_float32(dtype):
    inputs = make_qkv(1, 2, 1, 9, 8, dtype=dtype)
    layout = BandLayout.spattention(2)
    o, lse = reference_attention(*inputs, layout)
    expected = torch.promote_types(dtype, torch.float32)
    assert o.dtype == lse.dtype == expected
    o64, lse64 = reference_attention(*(tensor.double() for tensor in inputs), layout)
    torch.testing.assert_close(o.double(), o64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), lse64, rtol=1e-5, atol=1e-6)
    (o.sum() + lse.sum()).backward()
    assert [tensor.grad.dtype for tensor in inputs] == [dtype] * 3


def test_strides_do_not_matter():
    q, k, v = (tensor.detach() for tensor in make_qkv(2, 4, 4, 9, 8))
    layout = BandLayout.spattention(4)
    expected = reference_attention(q, k, v, layout)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(reference_attention(*transposed, layout), expected)


def test_documents_are_computed_alone():
    q, k, v = (tensor.detach() for tensor in make_qkv(2, 4, 2, 50, 8))
    offsets = [0, 13, 13, 14, 50]
    for layout in make_layouts(4, 50):
        o, lse = reference_attention(q, k, v, layout, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
        for begin, end in pairwise(offsets):
            part = [tensor[:, :, begin:end] for tensor in (q, k, v)]
            o_alone, lse_alone = reference_attention(*part, layout)
            torch.testing.assert_close(o[:, :, begin:end], o_alone)
            torch.testing.assert_close(lse[:, :, begin:end], lse_alone)


@pytest.mark.parametrize("chunk_scores", [1, 2**22])
@pytest.mark.parametrize("offsets", [[0, 13, 30], [0, 0], [0, 41]])
def test_rows_behind_the_last_boundary_belong_to_no_document(offsets, chunk_scores, monkeypatch):
    """They have o = 0, lse = -inf and zero gradients, and nobody sees them."""
    monkeypatch.setattr(reference, "_CHUNK_SCORES", chunk_scores)
    end = offsets[-1]
    for layout in make_layouts(4, 50):
        q, k, v = make_qkv(2, 4, 2, 50, 8)
        with torch.no_grad():
            for tensor in (q, k, v):
                tensor[:, :, end:] = torch.nan
        o, lse = reference_attention(q, k, v, layout, cu_seqlens=offsets)
        assert (o[:, :, end:] == 0).all() and (lse[:, :, end:] == -torch.inf).all()
        do, dlse = torch.randn_like(o), torch.randn_like(lse)
        do[:, :, end:] = dlse[:, :, end:] = torch.nan
        gradients = torch.autograd.grad((o, lse), (q, k, v), (do, dlse))
        written_out = reference_gradients(q, k, v, o, lse, do, dlse, layout, cu_seqlens=offsets)
        torch.testing.assert_close(written_out, gradients)
        assert all((gradient[:, :, end:] == 0).all() for gradient in gradients)
        parts = [tensor.detach()[:, :, :end].requires_grad_() for tensor in (q, k, v)]
        alone = reference_attention(*parts, layout, cu_seqlens=offsets)
        torch.testing.assert_close((o[:, :, :end], lse[:, :, :end]), alone)
        expected = torch.autograd.grad(alone, parts, (do[:, :, :end], dlse[:, :, :end]))
        torch.testing.assert_close(tuple(gradient[:, :, :end] for gradient in gradients), expected)
        mask = attention_mask(layout, 50, offsets)
        assert not mask[:, end:].any() and not mask[:, :, end:].any()


def test_empty_batch_and_empty_sequence():
    layout = BandLayout.spattention(4)
    for batch, length in [(0, 5), (2, 0)]:
        inputs = make_qkv(batch, 4, 2, length, 8)
        o, lse = reference_attention(*inputs, layout)
        assert o.shape == (batch, 4, length, 8) and lse.shape == (batch, 4, length)
        for gradients in (
            reference_gradients(*inputs, o, lse, o, lse, layout),
            torch.autograd.grad((o.sum(), lse.sum()), inputs),
        ):
            assert [g.shape for g in gradients] == [t.shape for t in inputs]


def test_large_scores_do_not_overflow():
    q, k, v = (tensor.detach().float() for tensor in make_qkv(1, 2, 2, 9, 8))
    o, lse = reference_attention(1e4 * q, k, v, BandLayout.causal(2))
    assert o.isfinite().all() and lse.isfinite().all()


def test_baseline_masks():
    length = 256
    window, global_tokens = min(256, length // 4), min(16, max(1, length // 32))
    longformer, bigbird = longformer_mask(length), bigbird_mask(length)
    reformer = reformer_mask(length, 4)
    assert longformer.shape == bigbird.shape == (1, length, length) and reformer.shape == (4, length, length)
    for i in range(0, length, 7):
        for j in range(length):
            near = j <= i and (i - j < window or j < global_tokens)
            assert longformer[0, i, j] == near
            assert bigbird[0, i, j] == (near or (j <= i and (i - j) % (window // 4) == 0))
    for mask in (longformer, bigbird, reformer):
        assert mask.diagonal(dim1=1, dim2=2).all() and not mask.triu(1).any()
    # Buckets: with the causal half mirrored the relation is an equivalence, and heads differ.
    same = (reformer | reformer.mT).double()
    assert torch.equal(same @ same > 0, same.bool())
    assert not torch.equal(reformer[0], reformer[1])
    assert torch.equal(reformer, reformer_mask(length, 4))
    share = reformer_mask(4096)[0].sum().item() / (4096 * 4097 / 2)
    assert share == pytest.approx(1 / 16, rel=0.1)
    for small in range(1, 40):
        for mask in (longformer_mask(small), bigbird_mask(small), reformer_mask(small, 2)):
            assert mask.diagonal(dim1=1, dim2=2).all() and not mask.triu(1).any()


@pytest.mark.parametrize(
    "offsets, message",
    [
        ([0], "rise from 0 to at most the sequence length 9, got \\[0\\]"),
        ([], "got \\[\\]"),
        ([1, 9], "got \\[1, 9\\]"),
        ([0, 10], "got \\[0, 10\\]"),
        ([0, 6, 4, 9], "got \\[0, 6, 4, 9\\]"),
        (torch.tensor([[0, 9]]), "one-dimensional"),
        (torch.tensor([0.0, 9.0]), "float32"),
    ],
)
def test_bad_cu_seqlens_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        document_lengths(offsets, 9)


def test_bad_inputs_are_refused():
    q, k, v = make_qkv(1, 4, 2, 9, 8)
    layout = BandLayout.spattention(4)
    with pytest.raises(ValueError, match=r"q must be \(batch, heads, length, head_dim\), got \(4, 9, 8\)"):
        reference_attention(q[0], k, v, layout)
    with pytest.raises(TypeError, match="one dtype"):
        reference_attention(q, k.float(), v, layout)
    for wrong, message in [
        (q.tolist(), r"q must be a torch\.Tensor, got list"),
        (q.to_sparse(), "q must be a dense tensor, got layout torch.sparse_coo"),
        (q.to(torch.float8_e4m3fn), "floating point, got torch.float8_e4m3fn"),
    ]:
        with pytest.raises(TypeError, match=message):
            reference_attention(wrong, wrong, wrong, layout)
    with pytest.raises(TypeError, match="layout must be a BandLayout, got str"):
        reference_attention(q, k, v, "spattention")
    with pytest.raises(ValueError, match="on one device, got meta, cpu, cpu"):
        reference_attention(q.to("meta"), k, v, layout)
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        reference_attention(q, k, v.long(), layout)
    with pytest.raises(ValueError, match="multiple of kv heads, got 4 and 3"):
        reference_attention(q, k[:, [0, 1, 1]], v[:, [0, 1, 1]], layout)
    with pytest.raises(ValueError, match="attention of 9 queries to 8 keys needs bands that"):
        reference_attention(q, k[:, :, 1:], v[:, :, 1:], layout)
    with pytest.raises(ValueError, match="made for 3 query heads and q has 4"):
        reference_attention(q, k, v, BandLayout.spattention(3))
    with pytest.raises(ValueError, match="9 is longer than the layout's context_length 8"):
        reference_attention(q, k, v, BandLayout.spattention(4, 8))
    # Documents, not the packed sequence, are what the context length limits.
    reference_attention(q, k, v, BandLayout.spattention(4, 8), cu_seqlens=[0, 4, 9])


def test_import_of_the_package_is_light():
    code = (
        "import sys, spattn_tvm; assert not {'torch', 'tvm', 'xgboost', 'numpy'} & set(sys.modules); "
        "spattn_tvm.BandLayout, spattn_tvm.reference_attention; "
        "assert not {'tvm', 'xgboost', 'matplotlib'} & set(sys.modules); "
        "assert 'reference_attention' in dir(spattn_tvm)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute():
    import spattn_tvm

    with pytest.raises(AttributeError, match="no attribute 'dense_attention'"):
        _ = spattn_tvm.dense_attention
