"""DTensors, and ``BandedAttention`` under tensor, context and fully sharded data parallelism."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import RankError, Ranks, mesh_of
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from spattn_tvm.bands import BandLayout
from spattn_tvm.distributed import ContextParallel, HeadParallel, Shards
from spattn_tvm.nn import BandedAttention
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.decode import banded_attention_decode

LAYOUT = BandLayout.spattention(8, 64)
SWEEP = int(os.environ.get("SPATTN_SWEEP", "2"))


# --- DTensors ---------------------------------------------------------------------------------------------


def _draw(seed: int, kv_heads: int, batch: int = 4, rows: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, rows, 32, generator=generator) for heads in (8, kv_heads, kv_heads, 8)]


def _compare_dtensors(sizes: tuple[int, ...], cases: list[tuple[list[object], list[object], int]]) -> None:
    mesh = mesh_of(sizes)
    for seed, (q_placements, kv_placements, kv_heads) in enumerate(cases):
        *whole, do = _draw(seed, kv_heads)
        lengths = torch.tensor([40, 33, 27, 1], dtype=torch.int32)
        for options in ({}, {"kv_lengths": lengths, "query_offset": torch.zeros(4, dtype=torch.int32)}):
            plain = [tensor.clone().requires_grad_() for tensor in whole]
            expected = banded_attention(*plain, LAYOUT, return_lse=True, **options)
            wanted = torch.autograd.grad(expected[0], plain, do)
            leaves = [
                distribute_tensor(tensor, mesh, placements).requires_grad_()
                for tensor, placements in zip(
                    whole, (q_placements, kv_placements, kv_placements), strict=True
                )
            ]
            found = banded_attention(*leaves, LAYOUT, return_lse=True, **options)
            gradients = torch.autograd.grad(found[0], leaves, distribute_tensor(do, mesh, q_placements))
            for ours, theirs in zip((*found, *gradients), (*expected, *wanted), strict=True):
                assert isinstance(ours, DTensor)
                torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-5, atol=1e-5)
            assert list(found[0].placements) == q_placements
        # A step of decoding.
        q, k, v = (tensor.detach() for tensor in whole)
        step = banded_attention_decode(q[:, :, -1:], k, v, LAYOUT, cache_lengths=lengths)
        q, k, v = (
            distribute_tensor(tensor, mesh, placements)
            for tensor, placements in ((q[:, :, -1:], q_placements), (k, kv_placements), (v, kv_placements))
        )
        ours = banded_attention_decode(q, k, v, LAYOUT, cache_lengths=lengths)
        torch.testing.assert_close(ours.full_tensor(), step, rtol=1e-5, atol=1e-5)


def test_dtensors_sharded_by_batch_and_heads(two: Ranks, four: Ranks) -> None:
    """Heads have bands of their own; fewer key/value heads than ranks are read by several."""
    for placement in (Shard(0), Shard(1), Replicate()):
        two.call(_compare_dtensors, (2,), [([placement], [placement], 4), ([placement], [Replicate()], 1)])
    four.call(_compare_dtensors, (4,), [([Shard(1)], [Replicate()], 2), ([Shard(1)], [Shard(0)], 4)])
    four.call(
        _compare_dtensors,
        (2, 2),
        [
            ([Shard(0), Shard(1)], [Shard(0), Shard(1)], 8),
            ([Shard(1), Shard(1)], [Replicate(), Replicate()], 2),
            ([Shard(1), Shard(0)], [Shard(0), Shard(1)], 2),
        ],
    )


def _compare_rows(seed: int, sizes: tuple[int, ...], q_placed: list[Any], kv_placed: list[Any]) -> None:
    """Sequences of several lengths, equal shards, unequal ones and empty ones; documents."""
    mesh = mesh_of(sizes)
    drawn = random.Random(seed)
    layouts = [LAYOUT, BandLayout.exclusive(8), BandLayout.causal(8), BandLayout.sliding_window(8, 9)]
    for rows in (40, drawn.randint(20, 64), drawn.randint(1, 4)):
        *whole, do = _draw(seed, drawn.choice([8, 2, 1]), drawn.choice([1, 4]), rows)
        layout, options = drawn.choice(layouts), {"scale": 0.2} if drawn.random() < 0.5 else {}
        if drawn.random() < 0.5:
            boundaries = [0, *sorted(drawn.randint(0, rows) for _ in range(3))]
            options["cu_seqlens"] = torch.tensor(boundaries, dtype=torch.int32)
        plain = [tensor.clone().requires_grad_() for tensor in whole]
        expected = banded_attention(*plain, layout, **options)
        wanted = torch.autograd.grad(expected, plain, do)
        leaves = [
            distribute_tensor(tensor, mesh, placements).requires_grad_()
            for tensor, placements in zip(whole, (q_placed, kv_placed, kv_placed), strict=True)
        ]
        if "cu_seqlens" in options and drawn.random() < 0.5:
            replicated = [Replicate()] * mesh.ndim
            options["cu_seqlens"] = distribute_tensor(options["cu_seqlens"], mesh, replicated)
        found = banded_attention(*leaves, layout, **options)
        assert list(found.placements) == q_placed and found.shape == expected.shape
        gradients = torch.autograd.grad(found, leaves, distribute_tensor(do, mesh, q_placed))
        for name, ours, theirs in zip(
            ("o", "dq", "dk", "dv"), (found, *gradients), (expected, *wanted), strict=True
        ):
            case = f"{name} of {seed}, {sizes}, {q_placed}, {kv_placed}, {rows} rows, {layout.spec}"
            torch.testing.assert_close(
                ours.full_tensor(),
                theirs,
                rtol=1e-5,
                atol=1e-5,
                msg=lambda text, case=case: f"{case}: {text}",
            )


_BATCH, _HEADS, _ROWS, _WHOLE = Shard(0), Shard(1), Shard(2), Replicate()


@pytest.mark.parametrize(
    ("sizes", "q_placed", "kv_placed"),
    [
        ((2,), [_ROWS], [_ROWS]),
        ((4,), [_ROWS], [_ROWS]),
        # k and v as they come, moved to fit q.
        ((2,), [_ROWS], [_HEADS]),
        ((2,), [_HEADS], [_ROWS]),
        ((2,), [_WHOLE], [_ROWS]),
        ((2, 2), [_BATCH, _ROWS], [_BATCH, _ROWS]),
        ((2, 2), [_ROWS, _HEADS], [_ROWS, _HEADS]),
        ((2, 2), [_HEADS, _ROWS], [_WHOLE, _ROWS]),
        ((4, 1), [_ROWS, _ROWS], [_ROWS, _WHOLE]),
        ((2, 1, 2), [_BATCH, _HEADS, _ROWS], [_WHOLE, _ROWS, _BATCH]),
        ((1, 2, 2), [_BATCH, _HEADS, _ROWS], [_BATCH, _HEADS, _ROWS]),
    ],
)
def test_rows_that_ranks_share(
    two: Ranks, four: Ranks, sizes: tuple[int, ...], q_placed: list[Any], kv_placed: list[Any]
) -> None:
    ranks = two if sizes == (2,) else four
    for seed in range(SWEEP):
        ranks.call(_compare_rows, seed, sizes, q_placed, kv_placed)


def _compile(placement: Any) -> None:
    """Compiled, with the graph broken by what ranks exchange or not."""
    mesh = mesh_of((2,))
    *whole, do = _draw(3, 8, 1)
    leaves = [distribute_tensor(tensor, mesh, [placement]).requires_grad_() for tensor in whole]
    plain = [tensor.clone().requires_grad_() for tensor in whole]
    found = torch.compile(lambda *t: banded_attention(*t, LAYOUT).sin(), backend="aot_eager")(*leaves)
    expected = banded_attention(*plain, LAYOUT).sin()
    gradients = torch.autograd.grad(found, leaves, distribute_tensor(do, mesh, [placement]))
    wanted = torch.autograd.grad(expected, plain, do)
    for ours, theirs in zip((found, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-5, atol=1e-5)


def test_compiled_dtensors(two: Ranks) -> None:
    for placement in (Shard(2), Shard(1))[: SWEEP - 1]:  # seconds each
        two.call(_compile, placement)


def _refuse_rows() -> None:
    mesh = mesh_of((2,))
    q, k, v, _ = _draw(0, 8)
    rows = [distribute_tensor(tensor, mesh, [Shard(2)]) for tensor in (q, k, v)]
    lengths = torch.tensor([40, 33, 27, 1], dtype=torch.int32)
    for options, message in (
        ({"return_lse": True}, "returns no lse, which return_lse asks for: redistribute them to Replicate"),
        ({"kv_lengths": lengths}, "has no kv_lengths"),
        ({"query_offset": 3}, "has no query_offset"),
    ):
        with pytest.raises(ValueError, match=message):
            banded_attention(*rows, LAYOUT, **options)
    with pytest.raises(ValueError, match="no 40 queries for 39 keys"):
        shorter = [distribute_tensor(tensor[:, :, :39], mesh, [Shard(2)]) for tensor in (k, v)]
        banded_attention(rows[0], *shorter, LAYOUT)
    with pytest.raises(ValueError, match="a sequence of 40 is longer than the layout's context_length 32"):
        banded_attention(*rows, BandLayout.spattention(8, 32))
    with pytest.raises(ValueError, match="a step of decoding reads whole caches"):
        banded_attention_decode(
            distribute_tensor(q[:, :, -1:], mesh, [Replicate()]), *rows[1:], LAYOUT, cache_lengths=lengths
        )
    # Rows that one rank has alone are as good as whole ones.
    one = mesh_of((2, 1))
    alone = [distribute_tensor(tensor, one, [Shard(0), Shard(2)]) for tensor in (q, k, v)]
    o, lse = banded_attention(*alone, LAYOUT, return_lse=True, kv_lengths=lengths, query_offset=0)
    expected = banded_attention(q, k, v, LAYOUT, return_lse=True, kv_lengths=lengths, query_offset=0)
    torch.testing.assert_close((o.full_tensor(), lse.full_tensor()), expected, rtol=1e-5, atol=1e-5)


def _refuse_two_dimensions_of_rows() -> None:
    mesh = mesh_of((2, 2))
    rows = [distribute_tensor(tensor, mesh, [Shard(2), Shard(2)]) for tensor in _draw(0, 8)[:3]]
    with pytest.raises(
        ValueError, match="over 2 dimensions of the mesh, where context parallelism takes one"
    ):
        banded_attention(*rows, LAYOUT)


def test_rows_that_can_not_be_shared_are_refused(two: Ranks, four: Ranks) -> None:
    two.call(_refuse_rows)
    four.call(_refuse_two_dimensions_of_rows)


def _refuse_dtensors() -> None:
    mesh = mesh_of((2,))
    q, k, v, _ = _draw(0, 8)
    heads = distribute_tensor(q, mesh, [Shard(1)])
    with pytest.raises(TypeError, match="must all be DTensors or none, got DTensor, Tensor, Tensor"):
        banded_attention(heads, k, v, LAYOUT)
    layout = BandLayout.spattention(3, 64)
    three = [distribute_tensor(tensor[:, :3], mesh, [Shard(1)]) for tensor in (q, k, v)]
    with pytest.raises(ValueError, match="3 query heads can't be shared equally by 2 ranks"):
        banded_attention(*three, layout)
    # What is not reduced yet is.
    partial = [DTensor.from_local(tensor / 2, mesh, [Partial()]) for tensor in (q, k, v)]
    o = banded_attention(*partial, LAYOUT)
    torch.testing.assert_close(o.full_tensor(), banded_attention(q, k, v, LAYOUT), rtol=1e-5, atol=1e-5)


def test_dtensors_that_can_not_be_attended_are_refused(two: Ranks) -> None:
    two.call(_refuse_dtensors)


# --- BandedAttention --------------------------------------------------------------------------------------


def _make(kv_heads: int = 4) -> BandedAttention:
    torch.manual_seed(3)
    return BandedAttention(256, 8, layout=LAYOUT, num_kv_heads=kv_heads, bias=True, rope_theta=1e4)


def _train_on_a_mesh(sizes: tuple[int, int], strategy: str, is_fully_sharded: bool) -> None:
    mesh = mesh_of(sizes, ("context", "tensor"))
    shards = Shards.head_tail(56, sizes[0])
    whole, module = _make(), _make()
    x = torch.randn(2, 56, 256, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 56, 256, generator=torch.Generator().manual_seed(2))
    expected = whole(x)
    (expected * weights).sum().backward()

    state = module.state_dict()["_extra_state"]
    parallelize_module(module, mesh["tensor"], HeadParallel())
    parallelize_module(module, mesh["context"], ContextParallel(shards, strategy))
    if is_fully_sharded:
        fully_shard(module, mesh=mesh["context"])
    rank = mesh["context"].get_local_rank()
    rows = shards.take(x, rank).clone().requires_grad_()
    given = {"position_ids": shards.position_ids(rank)} if is_fully_sharded else {}
    o = module(rows, **given)
    torch.testing.assert_close(o, shards.take(expected, rank), rtol=1e-4, atol=1e-4)
    # Gradients of fully sharded parameters are means over their mesh.
    factor = sizes[0] if is_fully_sharded else 1
    (o * shards.take(weights, rank) * factor).sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(ours, DTensor), name
        gradient = ours.grad.full_tensor()
        if not is_fully_sharded:
            dist.all_reduce(gradient, group=mesh["context"].get_group())
        torch.testing.assert_close(
            gradient, theirs.grad, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n} {m}"
        )
    assert torch.equal(module.get_extra_state(), state)


@pytest.mark.parametrize("strategy", ["heads", "bands"])
def test_tensor_context_and_fully_sharded_parallelism_compose(four: Ranks, strategy: str) -> None:
    four.call(_train_on_a_mesh, (2, 2), strategy, True)


def test_tensor_and_context_parallelism_alone(two: Ranks) -> None:
    for sizes in ((1, 2), (2, 1)):
        two.call(_train_on_a_mesh, sizes, "auto", False)


def _train_on_sharded_rows(sizes: tuple[int, ...], position_ids: bool) -> None:
    """All of a module as DTensors on one mesh: rows by its first dimension, heads by its second, if any."""
    mesh = mesh_of(sizes)
    rows = [Shard(1), Replicate()][: mesh.ndim]

    def distribute(name: str, module: torch.nn.Module, mesh: Any) -> None:
        for key, parameter in [*module.named_parameters(recurse=False)]:
            placement = Replicate()
            if name == "out_proj":
                placement = Shard(1) if key == "weight" else Replicate()
            elif name:
                placement = Shard(0)
            placed = distribute_tensor(parameter, mesh, [Replicate(), placement][: mesh.ndim])
            module.register_parameter(key, torch.nn.Parameter(placed))

    whole, module = _make(), distribute_module(_make(), mesh, distribute)
    generator = torch.Generator().manual_seed(1)
    x, weights = torch.randn(2, 2, 51, 256, generator=generator)
    options, placed = {}, {}
    if position_ids:
        options = {"position_ids": torch.arange(7, 58).expand(2, 51)}
        placed = {"position_ids": distribute_tensor(options["position_ids"], mesh, rows)}
    expected = whole(x, **options)
    (expected * weights).sum().backward()
    o = module(distribute_tensor(x, mesh, rows), **placed)
    torch.testing.assert_close(o.full_tensor(), expected, rtol=1e-4, atol=1e-4)
    (o * distribute_tensor(weights, mesh, rows)).sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n} {m}"
        )


def test_a_module_of_sharded_rows(two: Ranks, four: Ranks) -> None:
    for position_ids in (False, True):
        two.call(_train_on_sharded_rows, (2,), position_ids)
    if SWEEP > 2:  # DTensor takes seconds to find out how to shard by two dimensions
        four.call(_train_on_sharded_rows, (2, 2), True)


def _decode_with_heads() -> None:
    mesh = mesh_of((2,))
    whole = _make().eval()
    module = parallelize_module(_make().eval(), mesh, HeadParallel())
    x = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = module.make_cache(2)
        steps = [module(chunk, cache=cache) for chunk in x.split([6, 1, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), whole(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="8 query and 1 key/value heads can't be shared equally by 2"):
        parallelize_module(_make(kv_heads=1), mesh, HeadParallel())
    with pytest.raises(TypeError, match="HeadParallel is for a BandedAttention, got Linear"):
        parallelize_module(torch.nn.Linear(2, 2), mesh, HeadParallel())
    shared = parallelize_module(_make(), mesh, ContextParallel())
    with pytest.raises(ValueError, match="goes with cu_seqlens, not with a cache"):
        shared(x, cache=shared.make_cache(2))


def test_heads_of_a_rank_decode_with_a_cache_of_their_own(two: Ranks) -> None:
    two.call(_decode_with_heads)


def test_a_wrong_slice_of_the_layout_is_seen(two: Ranks) -> None:
    """The comparison can fail."""
    with pytest.raises(RankError):
        two.call(_attend_with_the_first_heads)


def _attend_with_the_first_heads() -> None:
    q, k, v, _ = _draw(0, 8)
    own = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    o = banded_attention(q[:, own], k[:, own], v[:, own], LAYOUT.heads(0, 4))
    torch.testing.assert_close(o, banded_attention(q, k, v, LAYOUT)[:, own])
