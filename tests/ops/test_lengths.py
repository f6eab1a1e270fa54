"""``banded_attention`` where queries and keys are not the same rows: the function and its operators."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from length_problems import LengthProblem, random_problem, truth
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spattn_tvm import dispatch
from spattn_tvm.bands import BandLayout
from spattn_tvm.dispatch import FallbackWarning
from spattn_tvm.ops import band_tables
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.reference import reference_attention

FORWARD = torch.ops.spattn_tvm.banded_attention_forward.default
LAYOUT = BandLayout.spattention(4, 256)
# Of the norm of each result; the absolute part is for results of nearly nothing.
RELATIVE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.2e-2, 1e-2), torch.float16: (2e-3, 1e-3)}


def attend(problem: LengthProblem, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Results of a problem; NaN arrives for o and lse of queries without keys."""
    device = options.pop("device", "cpu")
    q, k, v, do, dlse = problem.tensors(dtype, device)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    given = problem.arguments(device)
    o, lse = banded_attention(*leaves, problem.layout, return_lse=True, **given, **options)
    keyless = ~problem.mask().any(-1).to(device)
    do, dlse = do.masked_fill(keyless[..., None], torch.nan), dlse.masked_fill(keyless, torch.nan)
    gradients = torch.autograd.grad((o, lse), leaves, (do, dlse))
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (o.detach(), lse.detach(), *gradients), strict=True))


def check(problem: LengthProblem, dtype: torch.dtype, **options: Any) -> None:
    expected, found = truth(problem, dtype=dtype), attend(problem, dtype, **options)
    unused, keyless = problem.unused(), ~problem.mask().any(-1)
    relative, absolute = RELATIVE[dtype]
    for name, exact in expected.items():
        result = found[name].double().cpu()
        assert not result.isnan().any(), (name, problem)
        if name == "lse":
            assert torch.equal(result == -torch.inf, keyless), problem
            result, exact = (tensor.masked_fill(keyless, 0.0) for tensor in (result, exact))
        elif name in ("o", "dq"):
            assert not result[keyless].any(), (name, problem)
        else:
            assert not result.transpose(1, 2)[unused].any(), (name, problem)
        error, size = float((result - exact).norm()), float(exact.norm())
        assert error <= relative * size + absolute, (name, error, size, problem)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("first", range(0, 300, 30))
def test_random_problems(first: int, impl: str) -> None:
    for seed in range(first, first + 30):
        problem = random_problem(seed, head_dims=(32, 64))
        check(problem, (torch.float32, torch.float32, torch.bfloat16)[seed % 3], impl=impl)


def draw(queries: int, keys: int, batch: int = 2, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 4, queries, 32, **options)
    k, v = (torch.randn(batch, 2, keys, 32, **options) for _ in range(2))
    return q, k, v


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("layout", [LAYOUT, BandLayout.causal(4), BandLayout.exclusive(4, 200)])
def test_chunks_of_a_prompt_equal_one_call(layout: BandLayout) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in draw(187, 187))
    fixed = layout if layout.context_length else BandLayout.causal(4, 187)
    whole, whole_lse = banded_attention(q, k, v, fixed, return_lse=True)
    do, dlse = torch.randn_like(whole), torch.randn_like(whole_lse)
    expected = torch.autograd.grad(
        (whole, whole_lse), (q, k, v), (do, dlse.masked_fill(whole_lse.isinf(), 0))
    )
    chunks = []
    for begin, end in ((0, 1), (1, 64), (64, 150), (150, 187)):
        # A cache that holds what was seen, and one whose later rows are not written yet.
        seen = banded_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], layout, return_lse=True)
        k_cache, v_cache = (
            torch.cat((t[:, :, :end], torch.full_like(t[:, :, end:], torch.nan)), 2) for t in (k, v)
        )
        lengths = torch.full((2,), end)
        cached = banded_attention(
            q[:, :, begin:end], k_cache, v_cache, layout, kv_lengths=lengths, return_lse=True
        )
        offset = banded_attention(q[:, :, begin:end], k, v, layout, query_offset=begin, return_lse=True)
        for other in (cached, offset):
            for result, same in zip(other, seen, strict=True):
                torch.testing.assert_close(result, same, **CLOSE)
        chunks.append(cached)
    o, lse = (torch.cat(parts, 2) for parts in zip(*chunks, strict=True))
    torch.testing.assert_close(o, whole, **CLOSE)
    torch.testing.assert_close(lse, whole_lse, **CLOSE)
    found = torch.autograd.grad((o, lse), (q, k, v), (do, dlse.masked_fill(lse.isinf(), 0)))
    for result, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(result, gradient, rtol=1e-3, atol=1e-4)


def test_padding_on_either_side_changes_nothing() -> None:
    q, k, v = draw(40, 90, batch=1)
    expected = banded_attention(q, k, v, LAYOUT, return_lse=True)
    nothing = torch.full((1, 2, 13, 32), torch.nan)
    padded = [torch.cat((nothing, tensor, nothing), 2) for tensor in (k, v)]
    starts, lengths = torch.tensor([13], dtype=torch.int32), torch.tensor([103])
    found = banded_attention(q, *padded, LAYOUT, kv_lengths=lengths, kv_starts=starts, return_lse=True)
    for result, same in zip(found, expected, strict=True):
        torch.testing.assert_close(result, same, **CLOSE)


def test_values_are_clamped_before_they_are_cast() -> None:
    q, k, v = draw(7, 20)
    for name, values, same in (
        ("kv_lengths", [2**32 + 5, -(2**40)], [20, 0]),
        ("kv_starts", [2**32 + 5, -(2**33) + 1], [20, 0]),
        ("query_offset", [2**32 + 5, -(2**32) + 5], [2**29, -7]),
    ):
        found = banded_attention(q, k, v, LAYOUT, return_lse=True, **{name: torch.tensor(values)})
        expected = banded_attention(q, k, v, LAYOUT, return_lse=True, **{name: torch.tensor(same)})
        for result, other in zip(found, expected, strict=True):
            assert torch.equal(result, other), name


def test_no_table_is_kept_for_an_offset() -> None:
    q, k, v = draw(1, 300)
    banded_attention(q, k, v, LAYOUT, query_offset=3)
    kept = len(band_tables._entries)
    for offset in range(-3, 255):
        banded_attention(q, k, v, LAYOUT, query_offset=offset)
    assert len(band_tables._entries) == kept


@pytest.mark.parametrize("given", ["last", "offset", "rows", "packed"])
def test_opcheck(given: str) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in draw(9, 21))
    none = [None] * 6
    if given == "offset":
        none[5] = 4
    elif given == "rows":
        none[2:5] = torch.tensor([3, 15]), torch.tensor([21, 16]), torch.tensor([0, 2], dtype=torch.int32)
    elif given == "packed":
        none[:2] = torch.tensor([0, 4, 9]), torch.tensor([0, 15, 21])
    torch.library.opcheck(FORWARD, (q, k, v, *none, LAYOUT.spec, 0.2, False, "cpu"))


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, offset: int | None, lengths: Tensor | None) -> Tensor:
        return banded_attention(q, k, v, LAYOUT, query_offset=offset, kv_lengths=lengths)


def test_compiled_with_dynamic_lengths() -> None:
    torch._dynamo.reset()
    statistics = torch._dynamo.utils.counters["stats"]  # of this process since it began
    graphs = statistics["unique_graphs"]
    compiled = torch.compile(Attend(), fullgraph=True, dynamic=True)
    for queries, keys, offset in ((5, 9, None), (7, 31, None), (11, 40, 3), (12, 44, 30), (13, 45, 17)):
        q, k, v = (tensor.requires_grad_() for tensor in draw(queries, keys))
        for lengths in (None, torch.tensor([keys, keys - 3])):
            found, expected = compiled(q, k, v, offset, lengths), Attend()(q, k, v, offset, lengths)
            torch.testing.assert_close(found, expected, **CLOSE)
            do = torch.randn_like(found)
            for result, gradient in zip(
                torch.autograd.grad(found, (q, k, v), do),
                torch.autograd.grad(expected, (q, k, v), do),
                strict=True,
            ):
                torch.testing.assert_close(result, gradient, **CLOSE)
    assert statistics["unique_graphs"] - graphs <= 8


@pytest.mark.parametrize("with_lengths", [False, True])
def test_exported_with_dynamic_lengths(with_lengths: bool) -> None:
    queries, keys = torch.export.Dim("queries", max=100), torch.export.Dim("keys", max=200)
    example = (*draw(8, 24), None, torch.tensor([24, 20]) if with_lengths else None)
    program = torch.export.export(
        Attend(),
        example,
        dynamic_shapes=({2: queries}, {2: keys}, {2: keys}, None, {} if with_lengths else None),
    )
    for sizes in ((8, 24), (3, 99), (50, 7)):
        q, k, v = draw(*sizes)
        lengths = torch.tensor([sizes[1], 5]) if with_lengths else None
        torch.testing.assert_close(program.module()(q, k, v, None, lengths), Attend()(q, k, v, None, lengths))


@pytest.mark.parametrize("mapped", [False, True])
def test_vmap(mapped: bool) -> None:
    many = [torch.stack(parts) for parts in zip(*(draw(6, 15) for _ in range(3)), strict=True)]
    lengths = torch.tensor([[15, 3], [1, 8], [9, 15]])

    def one(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return banded_attention(q, k, v, LAYOUT, kv_lengths=lengths, kv_starts=torch.tensor([1, 0]))

    given = lengths if mapped else lengths[0]
    found = torch.vmap(one, in_dims=(0, 0, 0, 0 if mapped else None))(*many, given)
    for index, result in enumerate(found):
        expected = one(*(tensor[index] for tensor in many), given[index] if mapped else given)
        torch.testing.assert_close(result, expected, **CLOSE)


def test_flops_are_those_of_the_attended_pairs() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in draw(30, 100))
    cases: list[dict[str, Any]] = [
        {},
        {"query_offset": 20},
        {"query_offset": -4},
        {"cu_seqlens": [0, 10, 30], "cu_seqlens_k": [0, 60, 95]},
    ]
    for places in cases:
        problem = LengthProblem(2, 2, 2, 30, 100, 32, LAYOUT, places)
        with FlopCounterMode(display=False) as counter:
            banded_attention(q, k, v, LAYOUT, **problem.arguments()).sum().backward()
        assert counter.get_total_flops() == 14 * 32 * int(problem.mask().sum())


Q, K = torch.zeros(2, 4, 6, 32), torch.zeros(2, 2, 10, 32)
ROWS = torch.tensor([1, 2])
ERRORS = [
    ({"query_offset": 0.5}, TypeError, "query_offset must be an int or an integer tensor"),
    ({"query_offset": False}, TypeError, "query_offset must be an int or an integer tensor"),
    ({"query_offset": ROWS.float()}, TypeError, r"query_offset must be int32 or int64, got torch\.float32"),
    ({"kv_lengths": 5}, TypeError, "kv_lengths must be a torch.Tensor, got int"),
    ({"kv_lengths": ROWS[None]}, ValueError, r"\(2,\), got \(1, 2\)"),
    ({"kv_starts": ROWS.short()}, TypeError, "kv_starts must be int32 or int64"),
    ({"kv_starts": ROWS.to("meta")}, ValueError, "kv_starts must be on the device of q, cpu, got meta"),
    ({"cu_seqlens_k": torch.tensor([0, 10])}, ValueError, "cu_seqlens_k needs cu_seqlens"),
    ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "got 6 queries and 10 keys: give cu_seqlens_k too"),
    *(
        (
            {"cu_seqlens": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 9]), name: ROWS},
            ValueError,
            name,
        )
        for name in ("query_offset", "kv_lengths", "kv_starts")
    ),
    (
        {"cu_seqlens": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 9])},
        ValueError,
        "as many documents as cu_seqlens, got 1 and 2",
    ),
    (
        {"cu_seqlens": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 11])},
        ValueError,
        "cu_seqlens_k must not exceed the sequence length 10, got 11",
    ),
    (
        {"cu_seqlens": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 9, 5])},
        ValueError,
        r"cu_seqlens_k must be sorted, got cu_seqlens_k\[1\] = 9",
    ),
    ({"query_offset": 251}, ValueError, "a sequence of 257 is longer than the layout's context_length 256"),
]


@pytest.mark.parametrize(("given", "error", "message"), ERRORS)
def test_what_does_not_fit_raises(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        banded_attention(Q, K, K, LAYOUT, **given)


@pytest.mark.parametrize("name", ["spattention", "exclusive", "local_only", "gapped", "equal_area"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"query_offset": 0},
        {"query_offset": ROWS},
        {"kv_lengths": ROWS},
        {"kv_starts": ROWS},
        {"cu_seqlens": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 10])},
    ],
)
def test_a_layout_that_is_not_autoregressive_is_refused(name: str, given: dict[str, Any]) -> None:
    layout = getattr(BandLayout, name)(4)
    with pytest.raises(ValueError, match="make the layout with the context length that the model"):
        banded_attention(Q, K, K, layout, **given)
    if given:
        with pytest.raises(ValueError, match="make the layout with the context length that the model"):
            banded_attention(Q, K[:, :, :6], K[:, :, :6], layout, **given)


def test_a_family_that_takes_the_queries_own_keys_only_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_family

    from spattn_tvm.families import register_family, unregister_family

    q, k, v = draw(6, 10)
    register_family(toy_family.TOY, first=True)
    try:
        with pytest.raises(ValueError, match="toy takes calls with as many queries as keys only"):
            banded_attention(q, k, v, LAYOUT, impl="toy")
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            found = banded_attention(q, k, v, LAYOUT)
        torch.testing.assert_close(found, reference_attention(q, k, v, LAYOUT)[0], **CLOSE)
        monkeypatch.setattr(dispatch, "families_for", lambda target, problem: ("toy",))
        dispatch.clear_cache()
        with pytest.warns(FallbackWarning, match="as many queries as keys only"):
            found = banded_attention(q, k, v, LAYOUT)
        torch.testing.assert_close(found, reference_attention(q, k, v, LAYOUT)[0], **CLOSE)
    finally:
        unregister_family("toy")
        dispatch.clear_cache()
