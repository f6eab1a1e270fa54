"""What ranks move and attend, by counting each pair, against the closed forms."""

import itertools
import random
import statistics
import subprocess
import sys

import pytest
from rank_problems import draw_problem

from spattn_tvm.bands import BandLayout
from spattn_tvm.distributed import Shards, plan_ranks
from spattn_tvm.distributed.by_heads import _split
from spattn_tvm.distributed.planner import Share, _partition, deal_heads, documents_of


@pytest.mark.parametrize(
    ("length", "context", "heads", "ranks", "by_heads", "by_bands", "by_bands_on_average"),
    [
        (131072, 131072, 16, 4, 0.50, 0.37, 0.20),
        (131072, 131072, 16, 8, 0.25, 0.25, 0.145),
        (131072, 8192, 16, 4, 0.50, 0.044, 0.033),
        (2**20, 8192, 32, 32, 0.062, 0.004, 0.004),
    ],
)
def test_known_shares_of_an_all_gather(
    length: int, context: int, heads: int, ranks: int, by_heads: float, by_bands: float,
    by_bands_on_average: float,
) -> None:  # fmt: skip
    layout = BandLayout.spattention(heads, context, allow_longer=True)
    plan = plan_ranks(layout, Shards.contiguous(length, ranks))
    assert plan.relative("all_gather") == 1.0
    digits = 3 if by_bands < 0.1 else 2
    assert round(plan.relative("heads"), digits) == pytest.approx(by_heads, abs=0.0011)
    assert round(plan.relative("bands"), digits) == by_bands
    assert plan.relative("bands", statistics.mean) == pytest.approx(by_bands_on_average, abs=1e-3)


@pytest.mark.parametrize("seed", range(80))
def test_traffic_and_work_are_those_of_each_pair(seed: int) -> None:
    ranks = 2 + seed % 3
    problem = draw_problem(seed, ranks)
    layout, shards = problem.layout, problem.shards
    plan = plan_ranks(layout, shards, kv_heads=problem.kv_heads, boundaries=problem.boundaries)
    documents = documents_of(problem.boundaries, problem.length)
    owner = {row: rank for rank in range(ranks) for row in shards.position_ids(rank).tolist()}
    chunk = {row: (b, e) for held in shards.chunks for b, e in held for row in range(b, e)}
    group = problem.heads // problem.kv_heads
    fetched, pairs, by_head = set(), [0] * ranks, [0] * problem.heads
    for begin, end in documents:
        for head, bands in enumerate(layout.bands(end - begin)):
            for i in range(begin, end):
                for lo, hi in bands:
                    keys = range(max(begin, i - hi), i - lo + 1)
                    pairs[owner[i]] += len(keys)
                    by_head[head] += len(keys)
                    fetched.update(
                        (owner[i], head // group, j) for j in keys if j < chunk[i][0] and owner[j] != owner[i]
                    )
    received = [2 * sum(entry[0] == rank for entry in fetched) for rank in range(ranks)]
    sent = [2 * sum(owner[entry[2]] == rank for entry in fetched) for rank in range(ranks)]
    bands = plan.traffic["bands"]
    assert (list(bands.received), list(bands.sent)) == (received, sent)
    assert list(bands.pairs) == pairs

    heads = plan.traffic["heads"]
    rows = [shards.rows(rank) for rank in range(ranks)]
    for rank, share in enumerate(plan.shares):
        there = (problem.length - rows[rank]) * (len(share.query_heads) + 2 * len(share.kv_heads))
        back = rows[rank] * (problem.heads - len(share.query_heads))
        assert heads.received[rank] == there + back
        assert heads.pairs[rank] == sum(by_head[head] for head in share.query_heads)
    assert sum(heads.received) == sum(heads.sent)
    assert sum(bands.received) == sum(bands.sent)


@pytest.mark.parametrize("seed", range(60))
def test_heads_are_dealt_by_whole_groups_and_evenly(seed: int) -> None:
    drawn = random.Random(seed)
    kv_heads, group, ranks = drawn.randint(1, 7), drawn.randint(1, 4), drawn.randint(1, 4)
    loads = tuple(
        drawn.choice([0, drawn.randint(1, 9), drawn.randint(1, 1000)]) for _ in range(kv_heads * group)
    )
    shares = deal_heads(loads, kv_heads, ranks)
    assert len(shares) == ranks
    dealt = sorted(head for share in shares for head in share.query_heads)
    assert dealt == list(range(kv_heads * group))
    for share in shares:
        assert list(share.kv_heads) == sorted(set(share.kv_heads))
        assert all(heads and {head // group for head in heads} == {kv} for kv, heads in share.groups)
    busiest = max(sum(loads[head] for head in share.query_heads) for share in shares)
    if kv_heads >= ranks:
        assert sum(len(share.groups) for share in shares) == kv_heads
        weights = [sum(loads[kv * group : (kv + 1) * group]) for kv in range(kv_heads)]
        best = min(
            max(sum(w for w, r in zip(weights, deal, strict=True) if r == rank) for rank in range(ranks))
            for deal in itertools.product(range(ranks), repeat=kv_heads)
        )
        assert busiest <= best * 1.02
    else:
        assert busiest <= (sum(loads) / ranks + max(loads)) * 1.02


def test_equal_heads_are_dealt_in_equal_numbers() -> None:
    for heads, kv_heads, ranks in ((16, 16, 4), (16, 4, 4), (32, 8, 4), (16, 2, 4), (8, 1, 4), (12, 3, 4)):
        shares = deal_heads((7,) * heads, kv_heads, ranks)
        assert {len(share.query_heads) for share in shares} == {heads // ranks}


def test_more_ranks_than_heads() -> None:
    shares = deal_heads((5, 5), 1, 4)
    assert [share.query_heads for share in shares] == [(0,), (1,), (), ()]


def test_many_heads_take_no_time() -> None:
    loads = [random.Random(3).randint(1, 10**9) for _ in range(128)]
    parts = _partition(loads, 32, 128)
    assert sorted(index for part in parts for index in part) == list(range(128))
    assert max(sum(loads[index] for index in part) for part in parts) < 1.15 * sum(loads) / 32


def test_auto_weighs_bytes_and_balance() -> None:
    far = plan_ranks(BandLayout.spattention(16, 131072), Shards.contiguous(131072, 4))
    assert far.strategy == "heads"  # contiguous shards leave the first rank little to do
    assert far.traffic["bands"].balance < 0.8 < 0.95 < far.traffic["heads"].balance
    assert "0.500 of an all-gather against 0.370" in far.reason
    near = plan_ranks(BandLayout.spattention(16, 8192, allow_longer=True), Shards.contiguous(131072, 4))
    assert near.strategy == "bands"
    # One head too few for the ranks: one of them would idle.
    assert plan_ranks(BandLayout.causal(3), Shards.head_tail(4096, 4)).strategy == "bands"
    assert (
        plan_ranks(BandLayout.causal(16), Shards.head_tail(4096, 4), available=["heads"]).strategy == "heads"
    )


def test_bytes_of_near_bands_depend_on_neither_length_nor_ranks() -> None:
    layout = BandLayout.spattention(8, 256, allow_longer=True)
    received = {
        max(plan_ranks(layout, Shards.contiguous(1024 * ranks, ranks)).traffic["bands"].received)
        for ranks in (2, 4, 8)
    } | {
        max(plan_ranks(layout, Shards.contiguous(length, 4)).traffic["bands"].received)
        for length in (2048, 8192)
    }
    assert len(received) == 1


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys\nfrom spattn_tvm.bands import BandLayout\n"
        "from spattn_tvm.distributed import Shards, plan_ranks\n"
        "plan_ranks(BandLayout.spattention(16), Shards.contiguous(4096, 4))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "ring"}, "strategy must be 'auto', 'heads' or 'bands', got 'ring'"),
        ({"kv_heads": 3}, "must be a multiple of the kv heads, got 4 and 3"),
        ({"boundaries": [0, 99]}, "must not exceed the sequence's 64 rows, got 99"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_ranks(BandLayout.spattention(4), Shards.contiguous(64, 2), **options)
    with pytest.raises(ValueError, match="a sequence of 64 is longer than"):
        plan_ranks(BandLayout.spattention(4, 32), Shards.contiguous(64, 2))


def test_what_does_not_divide_is_between_the_first_and_the_last_part() -> None:
    for count in range(1, 20):
        share = Share(tuple((group, (group,)) for group in range(count)))
        for parts in range(1, count + 1):
            sizes = [len(part.groups) for part in _split(share, parts)]
            assert sum(sizes) == count and len(sizes) == parts
            assert sizes[0] == count // parts
            assert parts == 2 or sizes[-1] == count // parts
            assert max(sizes[1:-1], default=1) - min(sizes[1:-1], default=1) <= 1


def test_more_parts_hide_more_of_what_takes_longer():
    """One part where little travels; more where there is more to hide, at most a head each."""

    def parts(length: int, ranks: int = 4, strategy: str = "heads", heads: int = 64) -> int:
        shards = Shards.head_tail(length, ranks)
        plan = plan_ranks(BandLayout.spattention(heads, length), shards, strategy=strategy, head_dim=128)
        return plan.parts

    assert parts(1024) == parts(1024, strategy="bands") == 1
    counts = [parts(2**power) for power in range(10, 20)]
    assert counts == sorted(counts)
    assert 4 < counts[-1] <= 16
    assert parts(2**19, heads=8) == 2
    assert parts(2**19, heads=8, strategy="bands") <= 8
    assert parts(2**17, ranks=1) == 1
