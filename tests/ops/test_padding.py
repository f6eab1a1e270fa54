"""Padded batches: tokens are where they were, and nothing of the padding is left."""

from __future__ import annotations

import pytest
import torch

from spattn_tvm import pad, unpad
from spattn_tvm.ops.padding import token_range


def test_what_is_unpadded_comes_back_in_its_places() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (3, 7), (4, 33)):
        mask = torch.rand(shape, generator=generator) < 0.4
        values = torch.randn((*shape, 2, 3), generator=generator, requires_grad=True)
        packed = unpad(values, mask)
        lengths = (~mask).sum(1).tolist()
        assert packed.cu_seqlens.diff().tolist() == lengths
        assert packed.cu_seqlens.dtype is torch.int32
        at = 0
        for row, length in enumerate(lengths):
            assert torch.equal(packed.values[0, at : at + length], values[row][~mask[row]])
            at += length
        assert packed.values.shape[1] == at
        back = pad(packed.values * 2, packed)
        assert torch.equal(back, torch.where(mask[..., None, None], 0.0, values * 2))
        (gradient,) = torch.autograd.grad(back.sum(), values)
        assert torch.equal(gradient, torch.where(mask[..., None, None], 0.0, 2.0).expand_as(values))


def test_tokens_lie_between_padding_on_both_sides() -> None:
    rows = ["....", "PP..", "..PP", "P..P", "PPPP"]
    mask = torch.tensor([[letter == "P" for letter in row] for row in rows])
    begin, end = token_range(mask, mask.shape)
    assert begin.tolist()[:4] == [0, 2, 0, 1]
    assert end.tolist()[:4] == [4, 4, 2, 3]
    assert begin[4] == end[4] == 0


def test_masks_that_cannot_be_right_are_refused() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"bool tensor, True where there is padding, got torch\.int64"):
        unpad(torch.ones(2, 3, 1), mask.long())
    with pytest.raises(ValueError, match=r"\(2, 4\), got \(2, 3\)"):
        unpad(torch.ones(2, 4, 1), mask)
    packed = unpad(torch.ones(2, 3, 1), mask)
    for wrong in (torch.ones(1, 3, 1), torch.ones(2, 6, 1), torch.ones(1, 7)):
        with pytest.raises(ValueError, match=r"values must have shape \(1, 6, \.\.\.\)"):
            pad(wrong, packed)
    with pytest.raises(TypeError, match="packed must be what unpad returned, got Tensor"):
        pad(torch.ones(1, 6), mask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(batch, length, \.\.\.\), got \(3,\)"):
        unpad(torch.ones(3), mask)
    mask[1, 1] = True
    with pytest.raises(ValueError, match="row 1 of key_padding_mask has padding between its tokens"):
        token_range(mask, mask.shape)
