"""Random problems of attention over ranks: drawn alike on each rank, compared with one process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spattn_tvm.bands import BandLayout
from spattn_tvm.distributed import Shards, context_parallel_attention, exchange
from spattn_tvm.reference import reference_attention


@dataclass(frozen=True)
class Problem:
    seed: int
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    layout: BandLayout
    shards: Shards
    boundaries: tuple[int, ...] | None
    strategy: str
    parts: int | None
    impl: str


def draw_layout(random: random.Random, heads: int, length: int) -> BandLayout:
    kind = random.randrange(9)
    context = random.choice([None, length, length + 17, max(2, length // 3)])
    longer = context is not None and context < length
    if kind == 0:
        return BandLayout.sliding_window(heads, random.randint(1, length))
    if kind == 1:
        return BandLayout.causal(heads)
    if kind == 2:
        intervals = []
        for _ in range(heads):
            ends = sorted(random.randrange(length) for _ in range(4))
            intervals.append([(ends[0], ends[1]), (ends[2], ends[3])][: random.randrange(3)])
        return BandLayout.custom(intervals)
    if kind == 3:
        whole = BandLayout.spattention(heads + 3, context, allow_longer=longer)
        return whole.heads(random.sample(range(heads + 3), heads))
    names = ["spattention", "exclusive", "local_only", "gapped", "equal_area"]
    make = getattr(BandLayout, names[kind - 4])
    return make(heads, context, allow_longer=longer)


def draw_problem(seed: int, ranks: int, strategies: Sequence[str] = ("heads", "bands", "auto")) -> Problem:
    drawn = random.Random(seed)
    kv_heads = drawn.choice([1, 2, 3, 4, 5])
    heads = kv_heads * drawn.choice([1, 1, 2, 3])
    length = drawn.choice([drawn.randint(1, 12), drawn.randint(13, 90), drawn.randint(91, 220)])
    boundaries = None
    if drawn.random() < 0.45:
        end = length if drawn.random() < 0.7 else drawn.randint(0, length)
        inner = sorted(drawn.randint(0, end) for _ in range(drawn.randint(0, 5)))
        boundaries = (0, *inner, end)
    kinds = ["contiguous", "head_tail", "uneven"] + ["per_document"] * (boundaries is not None)
    kind = drawn.choice(kinds)
    if kind == "per_document":
        shards = Shards.per_document(boundaries, ranks, length)
    elif kind == "uneven":
        cuts = [0, *sorted(drawn.randint(0, length) for _ in range(2 * ranks - 1)), length]
        chunks = [(cuts[index], cuts[index + 1]) for index in range(2 * ranks)]
        drawn.shuffle(chunks)
        shards = Shards(length, tuple(tuple(chunks[2 * rank : 2 * rank + 2]) for rank in range(ranks)))
    else:
        shards = getattr(Shards, kind)(length, ranks)
    return Problem(
        seed=seed,
        batch=drawn.choice([1, 1, 2]),
        heads=heads,
        kv_heads=kv_heads,
        length=length,
        head_dim=32,
        layout=draw_layout(drawn, heads, length),
        shards=shards,
        boundaries=boundaries,
        strategy=drawn.choice(strategies),
        parts=drawn.choice([None, 1, 2, 3]),
        impl=drawn.choice(["auto", "auto", "reference"]),
    )


def draw_tensors(problem: Problem, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and do of the whole sequence."""
    generator = torch.Generator().manual_seed(problem.seed)
    return [
        torch.randn(
            problem.batch, problem.length, heads, problem.head_dim, generator=generator
        ).transpose(1, 2).to(dtype)
        for heads in (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    ]  # fmt: skip


def attend_here(problem: Problem, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return context_parallel_attention(
        q, k, v, problem.layout, dist.group.WORLD,
        **{"strategy": problem.strategy, "shards": problem.shards, "cu_seqlens": problem.boundaries,
           "parts": problem.parts, "impl": problem.impl} | options,
    )  # fmt: skip


def compare_with_one_process(
    problem: Problem,
    tolerance: float = 1e-5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    is_checkpointed: bool = False,
) -> None:
    """o, dq, dk and dv of this rank's rows against float64 of the whole sequence."""
    rank = dist.get_rank()
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    whole = [tensor.to(place) for tensor in draw_tensors(problem, dtype)]
    q, k, v, do = (problem.shards.take(tensor, rank, 2).detach() for tensor in whole)
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    attend = partial(attend_here, problem)
    o = checkpoint(attend, *inputs, use_reentrant=False) if is_checkpointed else attend(*inputs)
    gradients = torch.autograd.grad(o, inputs, do)

    exact = [tensor.double().requires_grad_() for tensor in whole[:3]]
    documents = None if problem.boundaries is None else torch.tensor(problem.boundaries, device=place)
    expected = reference_attention(*exact, problem.layout, cu_seqlens=documents)[0]
    wanted = torch.autograd.grad(expected, exact, whole[3].double())
    for name, ours, theirs in zip(("o", "dq", "dk", "dv"), (o, *gradients), (expected, *wanted), strict=True):
        assert ours.dtype == dtype, name
        theirs = problem.shards.take(theirs, rank, 2)
        scale = max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
        torch.testing.assert_close(
            ours.double(), theirs, rtol=tolerance, atol=tolerance * scale,
            msg=lambda text, name=name: f"{name} of rank {rank}, {problem}: {text}",
        )  # fmt: skip


def compare_problems(
    problems: Sequence[Problem],
    own_message_bytes: int | None = None,
    tolerance: float = 1e-5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    is_checkpointed: bool = False,
) -> None:
    """With `own_message_bytes`, rows of a head of that size are messages of their own."""
    least = {} if own_message_bytes is None else {device: own_message_bytes}
    with patch.dict(exchange._OWN_MESSAGE_BYTES, least):
        for problem in problems:
            compare_with_one_process(problem, tolerance, dtype, device, is_checkpointed)


@contextmanager
def counted_elements() -> Iterator[list[tuple[int, int]]]:
    """(received, sent) elements of each all-to-all, without those that stay on the rank."""
    counts: list[tuple[int, int]] = []
    original = dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, received: list[int], sent: list[int], **options: Any) -> Any:
        assert (sum(received), sum(sent)) == (output.numel(), input.numel())
        own = dist.get_rank()
        assert received[own] == sent[own]
        counts.append((sum(received) - received[own], sum(sent) - sent[own]))
        return original(output, input, received, sent, **options)

    dist.all_to_all_single = counting
    try:
        yield counts
    finally:
        dist.all_to_all_single = original


def count_elements(problem: Problem) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Of the forward pass, and of the backward pass."""
    tensors = [problem.shards.take(tensor, dist.get_rank(), 2) for tensor in draw_tensors(problem)]
    inputs = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    with counted_elements() as forward:
        o = attend_here(problem, *inputs)
    with counted_elements() as backward:
        o.backward(tensors[3])
    return forward, backward
