"""Who holds which rows, and cutting and joining tensors by it."""

import random

import pytest
import torch

from spattn_tvm.distributed import Shards


def draw(seed: int) -> tuple[Shards, list[int]]:
    drawn = random.Random(seed)
    ranks, length = drawn.randint(1, 6), drawn.randint(1, 200)
    boundaries = [0, *sorted(drawn.randint(0, length) for _ in range(drawn.randint(1, 5)))]
    made = [
        Shards.contiguous(length, ranks),
        Shards.head_tail(length, ranks),
        Shards.per_document(boundaries, ranks, length),
    ]
    return drawn.choice(made), boundaries


@pytest.mark.parametrize("seed", range(60))
def test_take_and_join_are_inverse_and_each_row_is_held_once(seed: int) -> None:
    shards, boundaries = draw(seed)
    whole = torch.randn(3, shards.length, 2, requires_grad=True)
    parts = [shards.take(whole, rank) for rank in range(shards.ranks)]
    assert [part.shape[1] for part in parts] == [shards.rows(rank) for rank in range(shards.ranks)]
    assert torch.equal(shards.join(parts), whole)
    (gradient,) = torch.autograd.grad(shards.join(parts).square().sum(), whole)
    assert torch.equal(gradient, 2 * whole)

    positions = torch.arange(shards.length)
    begins = torch.tensor([max(b for b in boundaries if b <= i) for i in range(shards.length)])
    for rank in range(shards.ranks):
        assert torch.equal(shards.position_ids(rank), shards.take(positions, rank, 0))
        wanted = shards.take(positions - begins, rank, 0)
        assert torch.equal(shards.position_ids(rank, boundaries), wanted)
        assert torch.equal(shards.position_ids(rank, torch.tensor(boundaries)), wanted)


@pytest.mark.parametrize("seed", range(30))
def test_owners_of_rows(seed: int) -> None:
    shards, _ = draw(seed)
    drawn = random.Random(seed)
    begin, end = sorted(drawn.randint(0, shards.length) for _ in range(2))
    held = {}
    for rank, at, first, last in shards.owned((begin, end)):
        own = shards.position_ids(rank).tolist()
        assert own[at : at + last - first] == list(range(first, last))
        held.update(dict.fromkeys(range(first, last), rank))
    assert list(held) == list(range(begin, end))


def test_what_the_kinds_are() -> None:
    assert Shards.contiguous(10, 4).chunks == (((0, 3),), ((3, 6),), ((6, 9),), ((9, 10),))
    assert [Shards.contiguous(5, 4).rows(rank) for rank in range(4)] == [2, 2, 1, 0]
    # The two in the middle touch.
    assert Shards.head_tail(16, 2).chunks == (((0, 4), (12, 16)), ((4, 12),))
    assert Shards.head_tail(15, 2).chunks == (((0, 4), (12, 15)), ((4, 12),))
    assert Shards.per_document([0, 8, 12], 2).chunks == (((0, 2), (6, 9), (11, 12)), ((2, 6), (9, 11)))
    # What is behind the last document is cut as well.
    assert Shards.per_document([0, 8], 2, 12) == Shards.per_document([0, 8, 12], 2)
    for sizes in ([4], [1, 3], [2, 0, 2]):
        chunks = Shards.contiguous(sum(sizes), 1).chunks
        assert chunks == (((0, 4),),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shards(4, (((0, 2),), ((3, 4),))), "no rank holds the rows 2 to 2"),
        (lambda: Shards(4, (((0, 3),), ((2, 4),))), "two ranks hold the rows 2 to 2"),
        (lambda: Shards(4, (((0, 3),),)), "the ranks hold 3 rows of 4"),
        (lambda: Shards.contiguous(0, 2), "length must be between 1 and .*, got 0"),
        (lambda: Shards.head_tail(8, 0), "ranks must be between 1 and .*, got 0"),
        (lambda: Shards.per_document([0, 5, 3], 2), "cu_seqlens must rise from 0"),
        (lambda: Shards.per_document([0, 5], 2, 4), "cu_seqlens ends at 5, beyond the sequence's 4 rows"),
        (lambda: Shards.contiguous(8, 2).take(torch.zeros(1, 7), 0), "the whole sequence has 8 rows"),
        (lambda: Shards.contiguous(8, 2).take(torch.zeros(1, 8), -1), "for the ranks 0 to 1 .* got rank -1"),
        (lambda: Shards.contiguous(8, 2).rows(2), "for the ranks 0 to 1 of a group, got rank 2"),
        (lambda: Shards.contiguous(8, 2).join([torch.zeros(1, 4), torch.zeros(1, 3)]), "rank 1 holds 4 rows"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
