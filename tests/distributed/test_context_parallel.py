"""Attention over gloo ranks: results against one process, bytes against the closed forms; faults."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from rank_problems import (
    Problem,
    attend_here,
    compare_problems,
    compare_with_one_process,
    count_elements,
    draw_problem,
    draw_tensors,
)
from rank_processes import RankError, Ranks, mesh_of
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from spattn_tvm.bands import BandLayout
from spattn_tvm.distributed import Shards, context_parallel_attention, gather, plan_ranks
from spattn_tvm.ops.attention import banded_attention


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks(request.param)
    yield processes
    processes.close()


def simple(strategy: str = "heads", **changes: object) -> Problem:
    return replace(
        Problem(
            seed=5, batch=1, heads=4, kv_heads=2, length=64, head_dim=32,
            layout=BandLayout.spattention(4, 64), shards=Shards.contiguous(64, 2), boundaries=None,
            strategy=strategy, parts=None, impl="auto",
        ),
        **changes,
    )  # fmt: skip


def test_random_problems_equal_one_process(ranks: Ranks) -> None:
    ranks.call(compare_problems, [draw_problem(seed, ranks.ranks) for seed in range(24)])


@pytest.mark.parametrize("rows", [1, 9], ids=["all", "some"])
def test_rows_of_a_head_as_messages_of_their_own(ranks: Ranks, rows: int) -> None:
    """As on CUDA: all pieces, and those of at least `rows` rows beside packed ones."""
    problems = [draw_problem(1000 + 10 * rows + seed, ranks.ranks) for seed in range(10)]
    ranks.call(compare_problems, problems, rows * 32 * 4)


def test_checkpointed_problems_of_ranks_with_nothing_to_do(ranks: Ranks) -> None:
    """All ranks compute again, and so move again, or none does: those without heads or rows too."""
    problems = [draw_problem(2000 + seed, ranks.ranks) for seed in range(8)]
    empty = Shards(64, (((0, 64),), *((),) * (ranks.ranks - 1)))
    for strategy in ("heads", "bands"):
        shards = Shards.contiguous(64, ranks.ranks)
        one = BandLayout.spattention(1, 64)
        problems += [
            simple(strategy, heads=1, kv_heads=1, layout=one, shards=shards),
            simple(strategy, shards=empty),
            simple(strategy, shards=shards, parts=2, boundaries=(0, 7)),
        ]
    tolerance, dtype = 1e-5, torch.float32
    ranks.call(compare_problems, problems, None, tolerance, dtype, "cpu", True)


def test_elements_moved_are_the_plans(ranks: Ranks) -> None:
    for seed in range(100, 112):
        problem = draw_problem(seed, ranks.ranks, [("heads", "bands")[seed % 2]])
        plan = plan_ranks(
            problem.layout, problem.shards, kv_heads=problem.kv_heads, boundaries=problem.boundaries
        )
        traffic = plan.traffic[problem.strategy]
        row = problem.batch * problem.head_dim
        for rank, (forward, backward) in enumerate(ranks.call(count_elements, problem)):
            moved = (traffic.received[rank] * row, traffic.sent[rank] * row)
            assert tuple(map(sum, zip(*forward, strict=True))) == moved
            assert tuple(map(sum, zip(*backward, strict=True))) == moved[::-1]


@pytest.mark.parametrize("strategy", ["heads", "bands"])
def test_a_wrong_layout_is_seen(two: Ranks, strategy: str) -> None:
    """The comparison can fail."""
    with pytest.raises(RankError, match="o of rank"):
        two.call(_compare_with_another_layout, simple(strategy))


@pytest.mark.parametrize("strategy", ["heads", "bands"])
def test_nan_stays_with_its_document_and_keyless_queries_have_no_gradient(two: Ranks, strategy: str) -> None:
    two.call(_poison, simple(strategy, boundaries=(0, 40, 60), layout=BandLayout.exclusive(4, 64)))


def _poison(problem: Problem) -> None:
    rank = dist.get_rank()
    whole = draw_tensors(problem)
    rows = torch.arange(64)
    for tensor in whole[:3]:
        tensor[:, :, 45] = torch.nan
    inputs = [problem.shards.take(t, rank, 2).clone().requires_grad_() for t in whole[:3]]
    o = attend_here(problem, *inputs)
    gradients = torch.autograd.grad(o, inputs, problem.shards.take(whole[3], rank, 2))
    outside = problem.shards.take((rows < 40) | (rows >= 60), rank, 0)
    for tensor in (o, *gradients):
        assert tensor[:, :, outside].isfinite().all()
    behind = problem.shards.take(rows >= 60, rank, 0)
    for tensor in (o, *gradients):
        assert not tensor[:, :, behind].any()


def _compare_with_another_layout(problem: Problem) -> None:
    tensors = draw_tensors(problem)[:3]
    o = attend_here(problem, *(problem.shards.take(t, dist.get_rank(), 2) for t in tensors))
    whole = banded_attention(*tensors, BandLayout.exclusive(4, 64))
    assert torch.allclose(o, problem.shards.take(whole, dist.get_rank(), 2)), "o of rank"


# --- what users combine it with -------------------------------------------------------------------------


def _gather_back(shards: Shards) -> None:
    whole = torch.arange(2 * shards.length * 3.0).view(2, shards.length, 3)
    rows = shards.take(whole, dist.get_rank()).clone().requires_grad_()
    back = gather(rows, shards, dist.group.WORLD)
    assert torch.equal(back, whole)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((back * weights).sum(), rows)
    assert torch.equal(gradient, shards.take(weights, dist.get_rank()))


def test_gather_is_the_inverse_of_take(ranks: Ranks) -> None:
    for shards in (
        Shards.contiguous(17, ranks.ranks),
        Shards.contiguous(2, ranks.ranks),
        Shards.head_tail(31, ranks.ranks),
        Shards.per_document([0, 5, 5, 23], ranks.ranks),
    ):
        ranks.call(_gather_back, shards)


def _mesh_checkpoint_and_autocast(problem: Problem) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = mesh_of((world,), ("context",))
    q, k, v, do = (problem.shards.take(t, rank, 2).clone() for t in draw_tensors(problem))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    options = {"strategy": problem.strategy, "shards": problem.shards, "parts": problem.parts}
    plain = context_parallel_attention(*inputs, problem.layout, None, **options)
    expected = torch.autograd.grad(plain, inputs, do, retain_graph=True)
    # A second backward pass of the same graph.
    again = torch.autograd.grad(plain, inputs, do)
    for route in (
        lambda *tensors: context_parallel_attention(*tensors, problem.layout, mesh, **options),
        lambda *tensors: checkpoint(
            lambda *t: context_parallel_attention(*t, problem.layout, mesh["context"], **options),
            *tensors,
            use_reentrant=False,
        ),
        torch.compile(
            lambda *t: context_parallel_attention(*t, problem.layout, None, **options), backend="eager"
        ),
    ):
        o = route(*inputs)
        assert torch.equal(o, plain)
        for ours, first, second in zip(torch.autograd.grad(o, inputs, do), expected, again, strict=True):
            assert torch.equal(ours, first)
            assert torch.equal(ours, second)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = context_parallel_attention(*inputs, problem.layout, mesh, **options)
    assert o.dtype == torch.bfloat16
    gradients = torch.autograd.grad(o, inputs, do.bfloat16())
    torch.testing.assert_close(o.float(), plain, rtol=0.05, atol=0.05)
    for ours, exact in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact, rtol=0.1, atol=0.1)
    with torch.no_grad():
        assert torch.equal(context_parallel_attention(q, k, v, problem.layout, mesh, **options), plain)
    with torch.autograd.detect_anomaly(check_nan=True):
        context_parallel_attention(*inputs, problem.layout, mesh, **options).sum().backward()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("strategy", ["heads", "bands"])
def test_meshes_checkpoints_compile_autocast_and_second_backwards(
    two: Ranks, strategy: str, parts: int
) -> None:
    problem = simple(strategy, shards=Shards.head_tail(64, 2), parts=parts, kv_heads=4)
    two.call(_mesh_checkpoint_and_autocast, problem)


def _equal_shards_by_default() -> None:
    problem = simple()
    tensors = [problem.shards.take(t, dist.get_rank(), 2) for t in draw_tensors(problem)[:3]]
    documents = torch.tensor([0, 20, 64], dtype=torch.int32)
    o = context_parallel_attention(*tensors, problem.layout, None, cu_seqlens=documents, scale=0.3)
    whole = banded_attention(*draw_tensors(problem)[:3], problem.layout, cu_seqlens=documents, scale=0.3)
    torch.testing.assert_close(o, problem.shards.take(whole, dist.get_rank(), 2))


def test_shards_are_equal_by_default(two: Ranks) -> None:
    two.call(_equal_shards_by_default)


# --- faults ---------------------------------------------------------------------------------------------


def _call_with_own(problems: list[Problem], dtypes: list[torch.dtype], scale: float) -> None:
    rank = dist.get_rank()
    q, k, v, _ = (problems[rank].shards.take(t, rank, 2) for t in draw_tensors(problems[rank], dtypes[rank]))
    attend_here(problems[rank], q, k, v, scale=scale)


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"layout": BandLayout.causal(4)}, torch.float32, "layout spattention:heads=4,context=64 on rank 0 "),
        ({"shards": Shards.contiguous(62, 2), "length": 62}, torch.float32, r"\(1, 4, 62, 32\) on rank 1"),
        ({"shards": Shards.head_tail(64, 2)}, torch.float32, "shards .* against .* on rank 1"),
        ({"boundaries": (0, 30, 64)}, torch.float32, r"cu_seqlens None on rank 0 against \(0, 30, 64\)"),
        ({"kv_heads": 1}, torch.float32, "kv heads 2 on rank 0 against 1 on rank 1"),
        ({"batch": 2}, torch.float32, r"\(1, 4, 64, 32\) on rank 0 against \(2, 4, 64, 32\)"),
        ({}, torch.float16, "dtype torch.float32 on rank 0 against torch.float16 on rank 1"),
    ],
)
def test_ranks_that_differ_are_named_on_each_rank(
    two: Ranks, change: dict[str, object], dtype: torch.dtype, message: str
) -> None:
    problems = [simple(), simple(**change)]
    if "length" in change:
        problems[0] = replace(problems[0], shards=Shards.contiguous(60, 2), length=60)
    with pytest.raises(RankError, match=message) as caught:
        # A scale of its own, so that neither rank has compared a configuration like it.
        two.call(_call_with_own, problems, [torch.float32, dtype], 1 + len(message) / 64)
    assert [type(error).__name__ for error in caught.value.of] == ["RankMismatchError"] * 2
    # The group goes on.
    two.call(compare_with_one_process, simple())


def _differ_in_gradients(scale: float) -> None:
    problem, rank = simple(), dist.get_rank()
    q, k, v = (problem.shards.take(t, rank, 2).clone() for t in draw_tensors(problem)[:3])
    # No gradient is asked for on either.
    with torch.set_grad_enabled(rank == 0):
        attend_here(problem, q, k.requires_grad_(rank == 1), v, scale=scale)
    with pytest.raises(ValueError, match=r"requires grad \(False, True, False\) on rank 0 against"):
        attend_here(problem, q, k.requires_grad_(rank == 0), v, scale=2 * scale)


def test_gradients_that_one_rank_asks_for_are_named(two: Ranks) -> None:
    two.call(_differ_in_gradients, 0.77)


def _turn_copies_off_on_one_rank(scale: float) -> None:
    problem, rank = simple(), dist.get_rank()
    q, k, v = (problem.shards.take(t, rank, 2) for t in draw_tensors(problem)[:3])
    with (
        patch.dict(os.environ, {"SPATTN_PEER_COPIES": "01"[rank]}),
        pytest.raises(ValueError, match="copies turned off True on rank 0 against False on rank 1"),
    ):
        attend_here(problem, q, k, v, scale=scale)


def test_copies_that_one_rank_turned_off_are_named(two: Ranks) -> None:
    two.call(_turn_copies_off_on_one_rank, 0.79)


def test_a_rank_that_refuses_its_arguments_on_the_first_call_ends_the_others() -> None:
    processes = Ranks(3, timeout_s=30)
    try:
        good = simple(shards=Shards.contiguous(64, 3))
        bad = replace(good, layout=BandLayout.spattention(5, 64))
        begun = time.monotonic()
        with pytest.raises(RankError) as caught:
            processes.call(_call_with_own, [good, bad, good], [torch.float32] * 3, 1.0)
        assert time.monotonic() - begun < 20
        names = [type(error).__name__ for error in caught.value.of]
        assert names == ["RankMismatchError", "ValueError", "RankMismatchError"]
        assert "rank 1 refused its arguments: ValueError: the layout is made for 5" in str(caught.value.of[0])
    finally:
        processes.close()


def _call_unless(problem: Problem, absent: int, how: str, before: bool) -> None:
    tensors = [problem.shards.take(t, dist.get_rank(), 2) for t in draw_tensors(problem)[:3]]
    if not before:
        attend_here(problem, *tensors)
    if dist.get_rank() == absent:
        if how == "dies":
            os._exit(3)
        time.sleep(9)
        return
    attend_here(problem, *tensors)


def _deviate(problem: Problem) -> None:
    tensors = [problem.shards.take(t, dist.get_rank(), 2) for t in draw_tensors(problem)[:3]]
    attend_here(problem, *tensors)
    attend_here(problem, *tensors, scale=0.5 if dist.get_rank() == 1 else None)


def test_a_rank_that_deviates_later_ends_all_within_the_timeout() -> None:
    processes = Ranks(2, timeout_s=3)
    try:
        with pytest.raises(RankError, match="waited in vain") as caught:
            processes.call(_deviate, simple())
        assert [type(error) for error in caught.value.of] == [RuntimeError] * 2
    finally:
        processes.close()


@pytest.mark.parametrize("before", [True, False], ids=["first call", "later call"])
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_gone_ends_the_others_within_the_timeout(how: str, before: bool) -> None:
    processes = Ranks(3, timeout_s=4)
    try:
        problem = simple(shards=Shards.contiguous(64, 3))
        processes.call(_warm_up)
        begun = time.monotonic()
        with pytest.raises(RankError) as caught:
            processes.call(_call_unless, problem, 1, how, before)
        assert all(isinstance(caught.value.of[rank], RuntimeError) for rank in (0, 2))
        if how == "dies":
            assert time.monotonic() - begun < 15
        if before:
            assert "waited in vain for the other ranks' calls" in str(caught.value.of[0])
    finally:
        processes.close()


def _warm_up() -> None:
    dist.barrier()


def _refuse_alike() -> None:
    """What is wrong on all ranks is said before anything travels."""
    tensors = [torch.zeros(1, 4, 8, 32) for _ in range(3)]
    wide = [torch.zeros(1, 4, 8, 33) for _ in range(3)]
    mesh = mesh_of((2,))
    placed = [DTensor.from_local(tensor, mesh, [Shard(2)]) for tensor in tensors]
    cases: list[tuple[list[torch.Tensor], dict[str, Any], type[Exception], str]] = [
        (placed, {}, TypeError, "q is a DTensor: pass its local part, or call banded_attention"),
        ([tensor.long() for tensor in tensors], {}, TypeError, "dtype must be one of"),
        ([tensor.to("meta") for tensor in tensors], {}, ValueError, "got tensors on meta"),
        ([tensor.to_sparse() for tensor in tensors], {}, TypeError, "q must be a dense tensor"),
        (wide, {}, ValueError, "head_dim must be a multiple of 8"),
        (tensors, {"scale": float("inf")}, ValueError, "scale must be finite"),
        (tensors, {"parts": 0}, ValueError, "parts must be between 1 and .*, got 0"),
        (tensors, {"impl": "fast"}, ValueError, "impl must be one of"),
        (tensors, {"shards": 2}, TypeError, "shards must be Shards, got int"),
        (tensors, {"shards": Shards.contiguous(16, 3)}, ValueError, "for 3 ranks, the group has 2"),
        (tensors, {"cu_seqlens": [0, 2.5, 16]}, TypeError, "cu_seqlens must be integers"),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            context_parallel_attention(*given, BandLayout.causal(4), None, **options)


def _call_in_groups() -> None:
    """Groups of one, and of some ranks; those that are not among them are told."""
    rank, problem = dist.get_rank(), simple()
    whole = [tensor[:, :, :32] for tensor in draw_tensors(problem)[:3]]
    expected = banded_attention(*whole, problem.layout)
    alone = [dist.new_group([each]) for each in range(3)]
    outer = dist.new_group([0, 2])
    submesh = mesh_of((3,))
    shards = Shards.contiguous(32, 2)
    for strategy in ("heads", "bands"):
        o = context_parallel_attention(*whole, problem.layout, alone[rank], strategy=strategy)
        torch.testing.assert_close(o, expected)
        if rank != 1:
            own = [shards.take(tensor, rank // 2, 2) for tensor in whole]
            o = context_parallel_attention(*own, problem.layout, outer, strategy=strategy)
            torch.testing.assert_close(gather(o, shards, outer, 2), expected)
    if rank == 1:
        with pytest.raises(ValueError, match="rank 1 is not in the group"):
            context_parallel_attention(*whole, problem.layout, outer)
    with pytest.raises(ValueError, match="the shards are for 2 ranks, the group has 3"):
        gather(whole[0][:, :, :16], shards, submesh, 2)


def test_groups_of_some_ranks() -> None:
    processes = Ranks(3)
    try:
        processes.call(_call_in_groups)
    finally:
        processes.close()


def test_calls_without_ranks_are_refused() -> None:
    tensors = [torch.zeros(1, 4, 8, 32)] * 3
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized: call init"):
        context_parallel_attention(*tensors, BandLayout.causal(4), None)


def test_calls_that_are_wrong_on_all_ranks_are_refused(two: Ranks) -> None:
    two.call(_refuse_mesh)
    two.call(_refuse_alike)
    two.call(compare_with_one_process, simple())


def _refuse_mesh() -> None:
    tensors = [torch.zeros(1, 4, 8, 32)] * 3
    with pytest.raises(ValueError, match=r'the mesh has 2 dimensions: pass the one .* mesh\["context"\]'):
        context_parallel_attention(*tensors, BandLayout.causal(4), mesh_of((1, 2)))
    with pytest.raises(TypeError, match="group_or_mesh must be a ProcessGroup"):
        context_parallel_attention(*tensors, BandLayout.causal(4), "world")
