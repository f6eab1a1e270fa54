"""The reference where queries and keys are not the same rows: against the definition, pair by pair."""

import pytest
import torch
from length_problems import random_problem, truth

from spattn_tvm.bands import BandLayout
from spattn_tvm.reference import attention_mask, flex_mask_mod, reference_attention, reference_gradients

EXACT = {"rtol": 1e-9, "atol": 1e-9}
C16 = BandLayout.spattention(2, 16)


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_problems_in_float64(first):
    for seed in range(first, first + 20):
        problem = random_problem(seed, (8,))
        q, k, v, do, dlse = problem.tensors(torch.float64)
        dlse, given, mask = dlse.double(), problem.arguments(), problem.mask()
        found = attention_mask(problem.layout, problem.queries, kv_length=problem.keys, **given)
        assert torch.equal(found.expand(mask.shape), mask), problem
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        o, lse = reference_attention(*leaves, problem.layout, **given)
        loss = (o * do).sum() + torch.where(mask.any(-1), lse * dlse, 0.0).sum()
        results = [o, lse, *torch.autograd.grad(loss, leaves)]
        # A query without keys takes no part, whatever arrives for it.
        do = do.masked_fill(~mask.any(-1)[..., None], torch.nan)
        dlse = dlse.masked_fill(~mask.any(-1), torch.nan)
        results += reference_gradients(q, k, v, o.detach(), lse.detach(), do, dlse, problem.layout, **given)
        expected = truth(problem, dtype=torch.float64)
        names = ("o", "lse", "dq", "dk", "dv", "dq", "dk", "dv")
        for name, result in zip(names, results, strict=True):
            torch.testing.assert_close(
                result.detach(),
                expected[name],
                **EXACT,
                msg=lambda text, name=name, problem=problem: f"{name}, {problem}: {text}",
            )


def test_the_flex_mask_is_the_dense_one():
    for seed in range(60):
        problem = random_problem(seed, (8,))
        given = problem.arguments()
        mask_mod = flex_mask_mod(problem.layout, problem.queries, kv_length=problem.keys, **given)
        indices = [torch.arange(size) for size in problem.mask().shape]
        grid = torch.meshgrid(*indices, indexing="ij")
        assert torch.equal(mask_mod(*grid), problem.mask()), problem


ERRORS = [
    ({"query_offset": 1.0}, TypeError, "query_offset must be an int"),
    ({"query_offset": True}, TypeError, "query_offset must be an int"),
    ({"query_offset": torch.tensor([0.0])}, TypeError, "int32 or int64"),
    ({"query_offset": torch.tensor(0)}, ValueError, r"shape \(batch,\) = \(1,\)"),
    ({"kv_lengths": 3}, TypeError, "kv_lengths must be a torch.Tensor"),
    ({"kv_lengths": torch.tensor([3], dtype=torch.int16)}, TypeError, "int32 or int64"),
    ({"kv_starts": torch.tensor([3, 3])}, ValueError, r"got \(2,\)"),
    ({"kv_starts": torch.tensor([3], device="meta")}, ValueError, "device of q"),
    ({"cu_seqlens_k": torch.tensor([0, 8])}, ValueError, "needs cu_seqlens"),
    ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "give cu_seqlens_k"),
    ({"cu_seqlens": torch.tensor([0, 4]), "query_offset": 0}, ValueError, "exclude"),
    ({"cu_seqlens": torch.tensor([0, 4]), "kv_lengths": torch.tensor([3])}, ValueError, "exclude"),
    ({"cu_seqlens": torch.tensor([0, 4]), "cu_seqlens_k": torch.tensor([0, 2, 8])}, ValueError, "as many"),
    ({"cu_seqlens": torch.tensor([0, 4]), "cu_seqlens_k": torch.tensor([0, 9])}, ValueError, "cu_seqlens_k"),
    ({"query_offset": 13}, ValueError, "longer than the layout's context_length 16"),
]


@pytest.mark.parametrize("given,error,message", ERRORS)
def test_what_does_not_fit_raises(given, error, message):
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 8, 8)
    with pytest.raises(error, match=message):
        reference_attention(q, k, k, C16, **given)


GIVEN = [
    {},
    {"query_offset": 0},
    {"kv_lengths": torch.tensor([3])},
    {"kv_starts": torch.tensor([1])},
    {"cu_seqlens": torch.tensor([0, 4]), "cu_seqlens_k": torch.tensor([0, 8])},
]


@pytest.mark.parametrize("name", ["spattention", "exclusive", "local_only", "gapped", "equal_area"])
@pytest.mark.parametrize("given", GIVEN)
def test_a_layout_that_is_not_autoregressive_is_refused(name, given):
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 8, 8)
    layout = getattr(BandLayout, name)(2)
    with pytest.raises(ValueError, match="with the context length that the model is trained at"):
        reference_attention(q, k, k, layout, **given)
