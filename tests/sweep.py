"""Random problems of banded attention, and the comparison that judges an implementation on one.

The measure is the error against float64 on the same rounded inputs. An implementation may err at most
twice as much as plain PyTorch does in the problem's dtype (`plain_attention`: matmul, softmax, matmul and
autograd), for each output by two norms: over the whole tensor, which is steady on random data, and of the
worst row, which one wrong row can't hide from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from length_problems import LengthProblem
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.reference import reference_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUTPUTS = ("o", "lse", "dq", "dk", "dv")
STRIDES = ("bhnd", "bnhd", "fused", "padded", "expanded", "last")

# Rounding errors vary by chance and by order of summation: below this much of the size of the summed terms,
# an error says nothing. It judges the problems whose plain result happens to be (nearly) exact, as with one
# key for each query. In 1,500 float32 problems the most that twice the plain error needed on top was 2.8
# float32 epsilons over a whole tensor and 8.4 in the worst row. In half precision the floor is the root mean
# square of one rounding of each term. A key left out or added changes a row by the size of a whole term.
WHOLE_FLOOR = 6 * torch.finfo(torch.float32).eps
ROW_FLOOR = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class SweepProblem:
    """One problem; equal fields give equal data.

    Attributes
    ----------
    dtype : str
    batch, kv_heads, group, length, head_dim : int
        There are ``kv_heads * group`` query heads and `length` queries.
    layout : BandLayout
    strides : tuple of str
        Memory layout of q, k, v and do, from `STRIDES`.
    cu_seqlens : tuple of int, or None
        Its last boundary may lie below `length`: the rows behind it belong to no document.
    scale : float or None
    loss : str
        What is differentiated: ``"o"``, ``"lse"`` or ``"both"``.
    seed : int
    kv_length : int, optional
        Number of keys, `length` by default.
    places : dict
        Of ``cu_seqlens_k, query_offset, kv_lengths, kv_starts`` those that are given, tensors as lists.
    """

    dtype: str
    batch: int
    kv_heads: int
    group: int
    length: int
    head_dim: int
    layout: BandLayout
    strides: tuple[str, str, str, str]
    cu_seqlens: tuple[int, ...] | None
    scale: float | None
    loss: str
    seed: int
    kv_length: int | None = None
    places: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        return self.length if self.kv_length is None else self.kv_length

    @property
    def placed(self) -> LengthProblem:
        """Where its queries and keys lie."""
        packed = {} if self.cu_seqlens is None else {"cu_seqlens": list(self.cu_seqlens)}
        return LengthProblem(
            self.batch, self.kv_heads, self.group, self.length, self.keys, self.head_dim, self.layout,
            packed | self.places, self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """`places` are the arguments that say where queries and keys lie; `unused`, bool ``(B, 1, Nk, 1)``, are
    the keys that don't exist: k and v are NaN there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor | None
    dlse: Tensor | None
    places: dict[str, Any]
    unused: Tensor

    def without_nan(self, keys: Tensor) -> Tensor:
        """k or v with zeros for the keys that don't exist."""
        return keys.masked_fill(self.unused, 0.0)


def _strided(values: Tensor, strides: str) -> Tensor:
    """The values (B, H, N, D) in another memory layout; NaN fills the memory that does not belong to the
    tensor.
    """
    batch, heads, length, head_dim = values.shape
    if strides == "bhnd":
        return values.contiguous()
    if strides == "bnhd":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "fused":
        memory = values.new_full((batch, length, 3, heads, head_dim), torch.nan)
        result = memory[:, :, 1].transpose(1, 2)
    elif strides == "padded":
        memory = values.new_full((batch, heads + 1, length + 3, head_dim + 8), torch.nan)
        result = memory[:, :heads, 2 : 2 + length, :head_dim]
    elif strides == "expanded":
        return values[:1, :1].contiguous().expand(values.shape)
    else:
        assert strides == "last", strides
        memory = values.new_full((batch, heads, head_dim, length + 1), torch.nan)
        result = memory[..., :length].mT
    result.copy_(values)
    return result


def make_inputs(problem: SweepProblem, device: torch.device | str = "cpu") -> Inputs:
    """Standard normal tensors of the problem, drawn on the device: for a GPU the host would take longest."""
    generator = torch.Generator(device).manual_seed(problem.seed)
    query_heads = problem.kv_heads * problem.group
    unused = problem.placed.unused().to(device)[:, None, :, None]

    def draw(heads: int, rows: int) -> Tensor:
        shape = (problem.batch, heads, rows, problem.head_dim)
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[problem.dtype])

    def draw_keys(strides: str) -> Tensor:
        # All rows of an expanded tensor are one, whose keys exist where one of theirs does.
        nobody = unused.all(0, keepdim=True) if strides == "expanded" else unused
        keys = draw(problem.kv_heads, problem.keys)
        return _strided(keys.masked_fill(nobody, torch.nan), strides)

    q = _strided(draw(query_heads, problem.length), problem.strides[0])
    k, v = draw_keys(problem.strides[1]), draw_keys(problem.strides[2])
    do = _strided(draw(query_heads, problem.length), problem.strides[3])
    dlse = torch.randn(q.shape[:3], generator=generator, device=device)
    return Inputs(
        q,
        k,
        v,
        None if problem.loss == "lse" else do,
        None if problem.loss == "o" else dlse,
        problem.placed.arguments(device),
        unused,
    )


def plain_mask(problem: SweepProblem, device: torch.device | str = "cpu") -> Tensor:
    """Bool (Hq, Nq, Nk), or (B, Hq, Nq, Nk) where there are `places`, from the definition, in plain loops
    over heads and documents.
    """
    if problem.places or problem.keys != problem.length:
        return problem.placed.mask().to(device)
    offsets = problem.cu_seqlens or (0, problem.length)
    shape = (problem.kv_heads * problem.group, problem.length, problem.length)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    for begin, end in pairwise(offsets):
        position = torch.arange(end - begin, device=device)
        distance = position[:, None] - position[None, :]
        for head, bands in enumerate(problem.layout.bands(end - begin)):
            for lo, hi in bands:
                mask[head, begin:end, begin:end] |= (distance >= max(lo, 0)) & (distance <= hi)
    return mask


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype is torch.float16 and a.device.type == "cpu":
        # Same rounding (float32 sums, float16 result), 20 times faster than PyTorch's float16 product on a
        # CPU.
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(o, lse) by matmul, masked softmax and matmul in the dtype of the inputs: the yardstick."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = _matmul(q, k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf)
    keyless = ~mask.any(-1)
    scores = scores.masked_fill(keyless[..., None], 0.0)
    weights = scores.softmax(-1).masked_fill(keyless[..., None], 0.0)
    lse = scores.logsumexp(-1).masked_fill(keyless, -torch.inf)
    return _matmul(weights, v), lse


def _term_magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor | None,
    dlse: Tensor | None,
    mask: Tensor,
    scale: float | None,
) -> dict[str, Tensor]:
    """For each output the root of the summed squares of the terms it is made of (float64): the size that
    independent rounding errors have in units of epsilon, however much the terms themselves cancel."""
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    keyless = ~mask.any(-1)
    scores = (scale * (q @ k.mT)).masked_fill(~mask, -torch.inf).masked_fill(keyless[..., None], 0.0)
    weights = scores.softmax(-1).masked_fill(~mask, 0.0)
    squared = {"q": q.square(), "k": k.square(), "v": v.square()}
    score_error = scale**2 * (squared["q"] @ squared["k"].mT)
    # An error of a score, and one rounding of its own, is a relative error of its weight.
    weight_error = weights.square() * (1 + score_error)
    dp = torch.zeros_like(weights)
    if do is not None:
        dp = do.square() @ squared["v"].mT
        exact_dp = do @ v.mT
        centred = exact_dp - (weights * exact_dp).sum(-1, keepdim=True)
    else:
        centred = dp
    delta = (weights.square() * dp).sum(-1, keepdim=True) + dp.new_tensor(0.0)
    if dlse is not None:
        delta = delta + dlse.square()[..., None]
        centred = centred + dlse[..., None]
    ds = scale**2 * (weight_error * centred.square() + weights.square() * (dp + delta))

    def over_groups(squares: Tensor) -> Tensor:
        return squares.unflatten(1, (-1, group)).sum(2)

    squares = {
        "o": weight_error @ squared["v"],
        "lse": 1 + (weights.square() * score_error).sum(-1),
        "dq": ds @ squared["k"],
        "dk": over_groups(ds.mT @ squared["q"]),
        "dv": over_groups(weight_error.mT @ (torch.zeros_like(q) if do is None else do.square())),
    }
    return {name: value.sqrt() for name, value in squares.items()}


Attention = Callable[..., tuple[Tensor, Tensor]]


def _run(attention: Attention, inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of ``attention(q, k, v) -> (o, lse)``, computed in `dtype`."""

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
        return tensor.requires_grad_()

    q, k, v = leaf(inputs.q), leaf(inputs.k), leaf(inputs.v)
    o, lse = attention(q, k, v)
    outputs, gradients = [], []
    if inputs.do is not None:
        outputs.append(o)
        gradients.append(inputs.do.to(o.dtype))
    if inputs.dlse is not None:
        outputs.append(lse)
        gradients.append(inputs.dlse.to(lse.dtype))
    dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), gradients, allow_unused=True, materialize_grads=True)
    return {"o": o.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


@dataclass(frozen=True)
class Comparison:
    """Errors of one output; `whole` and `worst_row` are (error, allowed) pairs."""

    output: str
    whole: tuple[float, float]
    worst_row: tuple[float, float]

    @property
    def ratio(self) -> float:
        """The larger error in units of what is allowed; above 1 is wrong."""
        pairs = (self.whole, self.worst_row)
        return max(error / allowed if allowed else (math.inf if error else 0.0) for error, allowed in pairs)


def _row_norms(tensor: Tensor) -> Tensor:
    return tensor.norm(dim=-1) if tensor.dim() == 4 else tensor.abs()


def _compare(output: str, ours: Tensor, plain: Tensor, exact: Tensor, magnitude: Tensor) -> Comparison:
    if output == "lse":
        keyless = exact == -torch.inf
        assert torch.equal(ours == -torch.inf, keyless), "lse must be -inf exactly where a query has no key"
        ours, plain, exact = (t.masked_fill(keyless, 0.0) for t in (ours, plain, exact))
    ours_rows = _row_norms(ours.double() - exact)
    plain_rows = _row_norms(plain.double() - exact)
    term_rows = _row_norms(magnitude)
    rounding = 0.0 if ours.dtype is torch.float32 else torch.finfo(ours.dtype).eps / math.sqrt(12)
    whole_floor, row_floor = max(WHOLE_FLOOR, rounding), max(ROW_FLOOR, rounding)
    whole = (float(ours_rows.norm()), float(2 * plain_rows.norm() + whole_floor * term_rows.norm()))
    worst_row = (float(ours_rows.max()), float(2 * plain_rows.max() + row_floor * term_rows.max()))
    return Comparison(output, whole, worst_row)


def check_problem(
    problem: SweepProblem,
    device: torch.device | str = "cpu",
    impl: str = "auto",
    attention: Attention | None = None,
    *,
    deterministic: bool = False,
) -> list[Comparison]:
    """Run one problem and raise AssertionError where an output is wrong.

    Parameters
    ----------
    impl, deterministic
        As in ``banded_attention``.
    attention : callable, optional
        ``(q, k, v) -> (o, lse)`` to judge in place of ``banded_attention``.

    Returns
    -------
    list of Comparison
        One for each of `OUTPUTS`.
    """
    inputs = make_inputs(problem, device)
    mask = plain_mask(problem, device)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return banded_attention(
            q,
            k,
            v,
            problem.layout,
            scale=problem.scale,
            return_lse=True,
            deterministic=deterministic,
            impl=impl,
            **inputs.places,
        )

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return plain_attention(q, inputs.without_nan(k), inputs.without_nan(v), mask, problem.scale)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference_attention(q, k, v, problem.layout, scale=problem.scale, **inputs.places)

    threads = torch.get_num_threads()
    # Kernels share their work out among any number of threads.
    torch.set_num_threads(1 + problem.seed % 3)
    try:
        result = _run(attention or ours, inputs)
    finally:
        torch.set_num_threads(threads)
    yardstick = _run(plain, inputs)
    truth = _run(exact, inputs, torch.float64)
    k, v = inputs.without_nan(inputs.k), inputs.without_nan(inputs.v)
    doubles = [None if t is None else t.double() for t in (inputs.q, k, v, inputs.do, inputs.dlse)]
    magnitudes = _term_magnitudes(*doubles, mask, problem.scale)

    expected_dtypes = dict.fromkeys(OUTPUTS, inputs.q.dtype) | {"lse": torch.float32}
    comparisons = []
    for output in OUTPUTS:
        value = result[output]
        assert value.dtype == expected_dtypes[output], f"{output} has dtype {value.dtype}"
        assert value.shape == truth[output].shape, f"{output} has shape {tuple(value.shape)}"
        assert not value.isnan().any(), f"{output} holds NaN"
        comparison = _compare(output, value, yardstick[output], truth[output], magnitudes[output])
        assert comparison.ratio <= 1, (
            f"{output} errs too much: whole tensor {comparison.whole[0]:.3g}, "
            f"allowed {comparison.whole[1]:.3g}; "
            f"worst row {comparison.worst_row[0]:.3g}, allowed {comparison.worst_row[1]:.3g}"
        )
        comparisons.append(comparison)
    keyless = ~mask.any(-1, keepdim=True)
    for output, nothing in (("o", keyless), ("dq", keyless), ("dk", inputs.unused), ("dv", inputs.unused)):
        rest = result[output].masked_fill(~nothing, 0.0)
        assert not rest.any(), f"{output} is not 0 of a query without keys, or of a key that doesn't exist"
    return comparisons


# --- strategies ----------------------------------------------------------------------------------------

HEAD_DIMS = (32, 40, 64, 96, 128, 256)
_POWERS = (2, 4, 8, 16, 32, 64, 128, 256)
_PRIMES = (2, 3, 5, 7, 13, 31, 61, 97, 127, 191, 251, 293)


def lengths(longest: int) -> st.SearchStrategy[int]:
    """1, primes, powers of two and their neighbours, and any other, up to `longest`."""
    special = {1, *_PRIMES, *(power + step for power in _POWERS for step in (-1, 0, 1))}
    return st.sampled_from(sorted(n for n in special if n <= longest)) | st.integers(1, longest)


@st.composite
def layouts(
    draw: st.DrawFn, heads: int, length: int, longest_document: int, autoregressive: bool = False
) -> BandLayout:
    """Any layout for `heads` query heads that accepts documents of `longest_document`, at times a part of
    one for more heads.
    """
    if draw(st.integers(0, 3)) == 0:
        of_heads = heads + draw(st.integers(1, 5))
        order = draw(st.permutations(range(of_heads)))
        whole = draw(whole_layouts(of_heads, length, longest_document, autoregressive))
        return whole.heads(order[:heads])
    return draw(whole_layouts(heads, length, longest_document, autoregressive))


@st.composite
def whole_layouts(
    draw: st.DrawFn, heads: int, length: int, longest_document: int, autoregressive: bool
) -> BandLayout:
    name = draw(
        st.sampled_from(
            (
                "spattention",
                "exclusive",
                "local_only",
                "gapped",
                "causal",
                "equal_area",
                "sliding_window",
                "custom",
            )
        )
    )
    needs_context = autoregressive and name not in ("causal", "sliding_window", "custom")
    context, longer = draw(
        st.sampled_from(((longest_document if needs_context else None, False), (longest_document, False)))
        | st.tuples(st.integers(longest_document, 4 * length), st.just(False))
        | st.tuples(st.integers(1, length), st.just(True))
    )
    if name == "sliding_window":
        return BandLayout.sliding_window(
            heads, draw(st.integers(1, length + 2)), context, allow_longer=longer
        )
    if name == "custom":
        edges = st.lists(st.integers(0, length + 3), unique=True, min_size=0, max_size=4)
        intervals = []
        for _ in range(heads):
            ends = sorted(draw(edges))
            # An odd end is an interval of one distance.
            intervals.append([(ends[i], ends[min(i + 1, len(ends) - 1)]) for i in range(0, len(ends), 2)])
        return BandLayout.custom(intervals, context, allow_longer=longer)
    return getattr(BandLayout, name)(heads, context, allow_longer=longer)


@st.composite
def places(draw: st.DrawFn, batch: int, queries: int, keys: int) -> dict[str, Any]:
    """`SweepProblem.places` of a call that is not packed; at times none, which makes the queries the last
    rows.
    """

    def rows(*special: int) -> st.SearchStrategy[list[int]]:
        value = st.sampled_from(special) | st.integers(0, keys)
        return st.lists(value, min_size=batch, max_size=batch)

    given = {}
    if draw(st.booleans()):
        given["kv_lengths"] = draw(rows(0, 1, keys, keys + 3, -4, 2**31 - 1))
    if draw(st.booleans()):
        given["kv_starts"] = draw(rows(0, 0, keys, -2, 2**31 - 1))
    offset = draw(st.sampled_from(("none", "int", "tensor")))
    if offset == "int":
        special = st.sampled_from((-(2**40), -queries - 5, -queries, -1, 0, keys - queries, keys))
        given["query_offset"] = draw(special | st.integers(-queries, keys + 20))
    elif offset == "tensor":
        special = (-(2**31), -queries, -1, keys - queries, keys, 2**30, 2**31 - 1)
        given["query_offset"] = draw(rows(*special))
    return given


def boundaries(length: int, documents: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Of so many documents in `length` rows, of which the last may belong to none."""
    inner = st.lists(st.integers(0, length), min_size=documents, max_size=documents)
    return st.tuples(inner, st.booleans()).map(
        lambda drawn: (0, *sorted(drawn[0])[:-1], length if drawn[1] else max(drawn[0]))
    )


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    head_dims: tuple[int, ...] = HEAD_DIMS,
    longest: int = 300,
    most_heads: int = 8,
    most_scores: int = 2**18,
) -> SweepProblem:
    """A problem with at most `most_scores` entries in its dense score matrix; in half of them queries and
    keys are not the same rows.
    """
    length = draw(lengths(longest))
    other_rows = draw(st.booleans())
    kv_length = draw(lengths(longest)) if other_rows else length
    kv_heads = draw(st.integers(1, 4))
    group = draw(st.sampled_from((1, 1, 2, 3, 4, 8)).filter(lambda g: g * kv_heads <= most_heads))
    heads = kv_heads * group
    affordable = max(1, most_scores // (heads * length * kv_length))
    batch = draw(st.integers(1, min(3, affordable)))
    cu_seqlens = None
    longest_document = length
    packed = draw(st.integers(0, 2)) == 0
    given = draw(places(batch, length, kv_length)) if other_rows and not packed else {}
    if other_rows:
        offset = given.get("query_offset", 0)
        longest_document = max(length, kv_length, length + offset if isinstance(offset, int) else 0)
    if packed and other_rows:
        documents = draw(st.integers(1, 6))
        cu_seqlens = draw(boundaries(length, documents))
        given["cu_seqlens_k"] = list(draw(boundaries(kv_length, documents)))
    elif packed:
        inner = draw(st.lists(st.integers(0, length), max_size=6))
        last = draw(st.sampled_from((length, length, max(inner, default=0))) | st.integers(0, length))
        cu_seqlens = (0, *sorted(offset for offset in inner if offset <= last), last)
        longest_document = max(1, *(b - a for a, b in pairwise(cu_seqlens)))
    return SweepProblem(
        dtype=draw(st.sampled_from(dtypes)),
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        length=length,
        head_dim=draw(st.sampled_from(head_dims)),
        layout=draw(layouts(heads, max(length, longest_document), longest_document, other_rows)),
        strides=draw(st.tuples(*[st.sampled_from(STRIDES)] * 4)),
        cu_seqlens=cu_seqlens,
        scale=draw(st.sampled_from((None, None, 0.05, 0.5, -0.2, 0.0))),
        loss=draw(st.sampled_from(("o", "both", "both", "lse"))),
        seed=draw(st.integers(0, 2**32 - 1)),
        kv_length=kv_length if other_rows else None,
        places=given,
    )
