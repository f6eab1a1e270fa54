"""Layouts against the per-pair definition, exhaustively at small sizes; closed forms against counting."""

from __future__ import annotations

import ast
import itertools
import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spattn_tvm
from spattn_tvm import bands
from spattn_tvm.bands import EMPTY, LAYOUT_NAMES, LIMIT, BandLayout, length_tables, merge_intervals

CONTEXTS = range(1, 21)
HEADS = range(1, 25)
FROM_CONTEXT = ("spattention", "exclusive", "local_only", "gapped", "causal", "equal_area")


def defined_distances(name: str, context: int, num_heads: int) -> list[set[int]]:
    """Semantics, word for word, as sets of distances per head; equal_area by trying every edge."""
    base, extra = context // num_heads, context % num_heads
    heads = []
    for h in range(num_heads):
        width = base + (1 if h < extra else 0)
        start = h * base + min(h, extra)
        local = set(range(width + 1))
        share = set(range(start, start + width))
        heads.append(
            {
                "spattention": local | share,
                "exclusive": share,
                "local_only": local,
                "gapped": set(range(start, start + width // 2)),
                "causal": set(range(context)),
                "equal_area": local,
            }[name]
        )
    if name == "equal_area":
        below = [sum(context - d for d in range(edge)) for edge in range(context + 1)]
        sharing = min(num_heads, context)
        edge = 0
        for h in range(sharing):
            # Candidates leave at least one distance for this head and for each one after it.
            candidates = range(edge + 1, context - (sharing - h - 1) + 1)
            goal = (h + 1) * below[-1]
            end = min(candidates, key=lambda e: (abs(below[e] * sharing - goal), e))
            heads[h] |= set(range(edge, end))
            edge = end
        assert edge == context
    return heads


def runs(distances: set[int]) -> tuple[tuple[int, int], ...]:
    """Maximal runs of consecutive distances, as closed intervals."""
    begins = sorted(d for d in distances if d - 1 not in distances)
    ends = sorted(d for d in distances if d + 1 not in distances)
    return tuple(zip(begins, ends, strict=True))


def distances_of(bands, limit: int) -> list[set[int]]:
    return [{d for lo, hi in head for d in range(lo, min(hi, limit) + 1)} for head in bands]


@pytest.mark.parametrize("name", FROM_CONTEXT)
def test_layout_equals_its_definition_at_all_small_sizes(name):
    for context in CONTEXTS:
        for num_heads in HEADS:
            expected = tuple(runs(head) for head in defined_distances(name, context, num_heads))
            fixed = getattr(BandLayout, name)(num_heads, context)
            own = getattr(BandLayout, name)(num_heads)
            assert own.bands(context) == expected, (context, num_heads)
            for length in {1, 2, context // 2, context - 1, context} - {0}:
                assert fixed.bands(length) == expected, (context, num_heads, length)
            assert all(len(head) <= 2 for head in expected)


@pytest.mark.parametrize("name", FROM_CONTEXT)
def test_work_and_coverage_equal_counting_at_all_small_sizes(name):
    for context in CONTEXTS:
        for num_heads in HEADS:
            layout = getattr(BandLayout, name)(num_heads, context, allow_longer=True)
            heads = defined_distances(name, context, num_heads)
            for length in {1, context // 2, context, context + 3} - {0}:
                counted = tuple(sum(max(0, length - d) for d in head) for head in heads)
                assert layout.pairs_per_head(length) == counted, (context, num_heads, length)
                assert layout.pairs(length) == sum(counted)
                seen = [sum(d in head for head in heads) for d in range(length)]
                coverage = layout.coverage(length)
                assert coverage.distances == length
                assert coverage.seen == sum(times >= 1 for times in seen)
                assert coverage.seen_once == sum(times == 1 for times in seen)
                assert coverage.is_complete == all(seen)
                assert coverage.is_exclusive == all(times <= 1 for times in seen)
                if sum(counted):
                    assert layout.load(length) == tuple(pairs / sum(counted) for pairs in counted)


def executed_by_loops(layout: BandLayout, length: int, query_rows: int, key_rows: int) -> int:
    total = 0
    for head in layout.bands(length):
        for q0 in range(0, length, query_rows):
            tile = range(q0, min(q0 + query_rows, length))
            for lo, hi in head:
                touched = [j for j in range(length) if any(lo <= i - j <= hi for i in tile)]
                if touched:
                    keys = touched[-1] - touched[0] + 1
                    total += query_rows * (-(-keys // key_rows) * key_rows)
    return total


@pytest.mark.parametrize("query_rows, key_rows", [(1, 1), (4, 1), (4, 3), (3, 8), (32, 4)])
@pytest.mark.parametrize("name", FROM_CONTEXT)
def test_executed_pairs_equal_counting(name, query_rows, key_rows):
    for context, num_heads in [(1, 1), (1, 3), (7, 3), (16, 4), (19, 5), (20, 24)]:
        layout = getattr(BandLayout, name)(num_heads, context)
        for length in {1, 2, context // 2, context} - {0}:
            if length <= context:
                expected = executed_by_loops(layout, length, query_rows, key_rows)
                assert layout.executed_pairs(length, query_rows, key_rows) == expected
    # One query and one key at a time, nothing is computed that is not attended.
    assert layout.executed_pairs(context, 1, 1) == layout.pairs(context)


def test_executed_pairs_of_a_custom_layout_with_a_hole():
    layout = BandLayout.custom([[(2, 3), (9, 11)], []])
    for length in (0, 1, 3, 13, 40):
        for query_rows, key_rows in [(1, 1), (8, 4), (5, 7)]:
            expected = executed_by_loops(layout, length, query_rows, key_rows)
            assert layout.executed_pairs(length, query_rows, key_rows) == expected


def test_sliding_window():
    layout = BandLayout.sliding_window(3, 5, 32)
    assert layout.bands(32) == (((0, 4),),) * 3
    assert layout.pairs(7) == 3 * sum(7 - d for d in range(5))
    assert BandLayout.sliding_window(3, 5).bands(1000) == layout.bands(32)
    assert BandLayout.sliding_window(2, 1).bands(9) == (((0, 0),),) * 2


def test_work_at_4096_is_a_factor_5_67_below_dense_causal_attention():
    dense, ours = BandLayout.causal(16, 4096), BandLayout.spattention(16, 4096)
    assert dense.pairs(4096) / ours.pairs(4096) == pytest.approx(5.67, abs=0.005)


@pytest.mark.parametrize("num_heads", [2, 16, 32, 64])
def test_factor_below_dense_causal_attention_for_long_sequences(num_heads):
    length = 2**28
    dense, ours = BandLayout.causal(num_heads, length), BandLayout.spattention(num_heads, length)
    factor = dense.pairs(length) / ours.pairs(length)
    # Shares: N**2 / 2 in all. Local windows: N**2/H - (N/H)**2 / 2 for each head but the first, whose
    # share contains its window.
    assert factor == pytest.approx((num_heads / 2) / (1.5 - 1.5 / num_heads + 0.5 / num_heads**2), rel=1e-6)
    if num_heads >= 16:  # the usual rounding of that formula
        assert factor == pytest.approx((num_heads / 2) / (1.5 - 2 / num_heads), rel=0.03)


def test_dense_causal_pairs_and_flops():
    layout = BandLayout.causal(2, 4096)
    assert layout.pairs_per_head(4096) == (4096 * 4097 // 2,) * 2
    assert layout.useful_flops(4096, 64) == 4 * 64 * layout.pairs(4096)
    assert layout.useful_flops(4096, 64, "backward") == 10 * 64 * layout.pairs(4096)
    with pytest.raises(ValueError, match="sideways"):
        layout.useful_flops(4096, 64, "sideways")


@given(st.integers(1, 400), st.integers(1, 40))
def test_shares_partition_the_distances(context, num_heads):
    for name in ("exclusive", "equal_area"):
        edges = getattr(BandLayout, name)(num_heads, context).edges(context)
        assert len(edges) == num_heads + 1
        assert edges[0] == 0 and edges[-1] == context
        assert all(a <= b for a, b in pairwise(edges))
    coverage = BandLayout.exclusive(num_heads, context).coverage()
    assert coverage.is_complete and coverage.is_exclusive
    widths = np.diff(BandLayout.exclusive(num_heads, context).edges(context))
    assert widths.max() - widths.min() <= 1


@given(st.integers(1, 2**20), st.integers(1, 128))
def test_equal_area_shares_hold_equal_numbers_of_pairs(context, num_heads):
    edges = BandLayout.equal_area(num_heads, context).edges(context)
    areas = [
        sum(range(context - b + 1, context - a + 1))
        if b - a < 50
        else (b - a) * (2 * context - a - b + 1) // 2
        for a, b in pairwise(edges)
    ]
    assert sum(areas) == context * (context + 1) // 2
    # An edge is off by at most half the pairs of a distance, a share by at most its two edges' worth.
    if num_heads * 4 <= context:
        goal = sum(areas) / num_heads
        assert all(abs(area - goal) <= context for area in areas)


def test_equal_area_balances_better_than_equal_width():
    def spread(name):
        edges = getattr(BandLayout, name)(16, 4096).edges(4096)
        areas = [(b - a) * (2 * 4096 - a - b + 1) // 2 for a, b in pairwise(edges)]
        return max(areas) / min(areas)

    assert spread("spattention") > 25
    assert spread("equal_area") < 1.01
    balanced = BandLayout.equal_area(16, 4096)
    assert balanced.coverage().is_complete
    # The local window is spattention's.
    assert [head[0] for head in balanced.bands(4096)][4:] == [(0, 256)] * 12


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda t: (t[0], t[0] + t[1])), max_size=4
        ),
        min_size=1,
        max_size=4,
    )
)
def test_custom_merges_to_the_same_distances_or_refuses(intervals):
    expected = tuple(runs(head) for head in distances_of(intervals, 100))
    assert tuple(merge_intervals(head) for head in intervals) == expected
    if max(len(head) for head in expected) > 2:
        with pytest.raises(ValueError, match="disjoint intervals after merging"):
            BandLayout.custom(intervals)
    else:
        layout = BandLayout.custom(intervals, 64)
        assert layout.bands(64) == expected
        assert layout == BandLayout.custom(expected, 64)
        assert layout.num_heads == len(intervals)
        assert BandLayout.from_spec(layout.spec) == layout


layouts = st.one_of(
    st.builds(
        lambda name, heads, context, longer: getattr(BandLayout, name)(
            heads, context, allow_longer=longer and context is not None
        ),
        st.sampled_from(FROM_CONTEXT),
        st.integers(1, 200),
        st.none() | st.integers(1, LIMIT),
        st.booleans(),
    ),
    st.builds(
        BandLayout.sliding_window, st.integers(1, 99), st.integers(1, LIMIT), st.none() | st.integers(1, 9)
    ),
    st.builds(
        BandLayout.custom,
        st.lists(
            st.lists(st.tuples(st.integers(0, 9), st.integers(9, 99)), max_size=2), min_size=1, max_size=9
        ),
        st.none() | st.integers(1, LIMIT),
    ),
)


@st.composite
def parts(draw):
    """A layout, or some of its heads, taken up to twice."""
    layout = draw(layouts)
    for _ in range(draw(st.integers(0, 2))):
        heads = draw(st.permutations(range(layout.num_heads)))
        layout = layout.heads(heads[: draw(st.integers(1, layout.num_heads))])
    return layout


@given(parts())
def test_spec_round_trip(layout):
    text = json.loads(json.dumps(layout.spec))
    again = BandLayout.from_spec(text)
    assert again == layout and hash(again) == hash(layout) and again.spec == layout.spec
    assert BandLayout.from_spec(layout.spec) is again
    assert pickle.loads(pickle.dumps(layout)) == layout


@given(parts(), parts())
def test_equal_layouts_are_those_with_equal_specs(a, b):
    assert (a == b) == (a.spec == b.spec)


def test_specs_are_readable():
    assert BandLayout.spattention(16, 4096).spec == "spattention:heads=16,context=4096"
    assert BandLayout.causal(2).spec == "causal:heads=2"
    assert BandLayout.sliding_window(8, 256, 4096, allow_longer=True).spec == (
        "sliding_window:heads=8,window=256,context=4096,longer=1"
    )
    assert (
        BandLayout.custom([[(0, 3), (8, 15)], []], 64).spec == "custom:heads=2,context=64,bands=0-3+8-15/none"
    )
    part = BandLayout.spattention(16, 4096).heads([4, 5, 6, 7, 12, 1])
    assert part.spec == "spattention:heads=6,of=16,take=4-7+12+1,context=4096"
    assert len({BandLayout.causal(2), BandLayout.causal(2), BandLayout.causal(3)}) == 2


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "expected 'name:heads"),
        ("spattention", "expected 'name:heads"),
        ("dense:heads=4", "expected 'name:heads"),
        ("causal:", "at most once"),
        ("causal:heads", "at most once"),
        ("causal:heads=4,", "at most once"),
        ("causal:heads=4,heads=4", "at most once"),
        ("causal:heads=4,colour=1", "colour=1"),
        ("causal:context=4", "heads= is missing"),
        ("causal:heads=-4", "non-negative integer, got '-4'"),
        ("causal:heads= 4", "non-negative integer"),
        ("causal:heads=0", "between 1 and"),
        ("causal:heads=4,context=0", "between 1 and"),
        ("causal:heads=4,context=1e3", "1e3"),
        ("causal:heads=4,longer=1", "needs a context_length"),
        ("causal:heads=4,context=8,longer=2", "longer must be 0 or 1"),
        ("causal:heads=4,window=3", "takes no window"),
        ("causal:heads=1,bands=0-1", "takes no intervals"),
        ("custom:heads=1", "needs intervals"),
        ("custom:heads=2,bands=0-1", "1 heads have intervals, num_heads is 2"),
        ("custom:heads=1,bands=", "got ''"),
        ("custom:heads=1,bands=1", "got '1'"),
        ("custom:heads=1,bands=3-1", "lo > hi"),
        ("custom:heads=1,bands=0-1+3-4+6-7", "3 disjoint intervals"),
        ("custom:heads=1,bands=0-99999999999", "largest distance"),
        ("sliding_window:heads=4", "needs a window, .* 'sliding_window:window=256'"),
        ("spattention:heads=2,of=4", "belong together"),
        ("spattention:heads=2,take=0-1", "belong together"),
        ("spattention:heads=2,of=4,take=0-2", "take=0-2 are 3 heads, heads=2"),
        ("spattention:heads=2,of=4,take=0-9999999999", "are 10000000000 heads, heads=2"),
        ("spattention:heads=900000000,of=900000000,take=0-899999999", "are 900000000 heads"),
        ("causal:heads=900000000", "between 1 and 65536, got 900000000"),
        ("spattention:heads=1,of=900000000,take=5", "between 1 and 65536, got 900000000"),
        ("custom:heads=1,bands=0-\u0663", "a head's bands read like"),
        (f"custom:heads=1,bands=0-{'9' * 5000}", "a head's bands read like"),
        ("spattention:heads=2,of=4,take=3-4", "has the heads 0 to 3, got 4"),
        ("spattention:heads=2,of=4,take=1+1", "head 1 twice"),
        ("spattention:heads=2,of=4,take=0,1", "each at most once, got '1'"),
        ("spattention:heads=2,of=4,take=0+-1", "got '-1'"),
        ("spattention:heads=2,of=4,take=", "got ''"),
        ("causal:heads=2,of=4,take=0-1", "a 'causal' layout of its own"),
        ("custom:heads=1,of=4,take=0,bands=0-1", "a 'custom' layout of its own"),
    ],
)
def test_malformed_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as info:
        BandLayout.from_spec(spec)
    assert repr(spec) in str(info.value)


def test_from_spec_refuses_other_types():
    with pytest.raises(TypeError, match="a layout's spec is a string, got 7"):
        BandLayout.from_spec(7)


@pytest.mark.parametrize(
    "intervals, message",
    [
        ([[(0, 1)], [(-1, 4)]], r"head 1: interval \[-1, 4\] has a negative distance"),
        ([[(5, 4)]], r"head 0: interval \[5, 4\] has lo > hi"),
        ([[(0, 0), (2, 2), (4, 4)]], r"\[\(0, 0\), \(2, 2\), \(4, 4\)\] are 3 disjoint intervals"),
        ([[(0, 1, 2)]], r"pair \(lo, hi\) of distances, got \(0, 1, 2\)"),
        ([[(0, 2**30)]], "exceeds the largest distance"),
        ([], "num_heads must be between 1 and"),
    ],
)
def test_bad_intervals_are_refused_with_their_values(intervals, message):
    with pytest.raises(ValueError, match=message):
        BandLayout.custom(intervals)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"distances of interval \(0, 1.5\) must be integers"):
        BandLayout.custom([[(0, 1.5)]])
    with pytest.raises(
        TypeError, match=r"head 0: a head's bands are a list of pairs \(lo, hi\), got \(0, 7\)"
    ):
        BandLayout.custom([(0, 7)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"num_heads must be an integer, got 2\.0"):
        BandLayout.spattention(2.0, 4)
    with pytest.raises(TypeError, match="context_length must be an integer, got True"):
        BandLayout.spattention(2, True)
    with pytest.raises(ValueError, match=r"num_heads must be between 1 and .*, got 0"):
        BandLayout.spattention(0)
    with pytest.raises(ValueError, match=r"window must be between 1 and .*, got 0"):
        BandLayout.sliding_window(2, 0)
    with pytest.raises(ValueError, match="unknown layout 'dense'"):
        BandLayout("dense", 2)
    with pytest.raises(ValueError, match="does not partition"):
        BandLayout.causal(2, 8).edges(8)
    with pytest.raises(ValueError, match="give a length"):
        BandLayout.spattention(2).coverage()
    with pytest.raises(ValueError, match=r"length must be between 0 and .*, got -1"):
        BandLayout.spattention(2).bands(-1)
    with pytest.raises(ValueError, match="query_rows must be between 1"):
        BandLayout.spattention(2).executed_pairs(4, 0, 1)


def test_context_length_is_enforced_unless_longer_is_allowed():
    layout = BandLayout.spattention(4, 16)
    layout.check_length(16)
    with pytest.raises(ValueError, match="a sequence of 17 is longer than the layout's context_length 16"):
        layout.check_length(17)
    BandLayout.spattention(4, 16, allow_longer=True).check_length(17)
    BandLayout.spattention(4).check_length(10**6)
    assert BandLayout.spattention(4).depends_on_length
    assert not layout.depends_on_length
    assert not BandLayout.sliding_window(4, 8).depends_on_length
    assert not BandLayout.custom([[(0, 1)]]).depends_on_length


def test_table_is_the_bands_as_int32():
    layout = BandLayout.custom([[(8, 15), (0, 3)], [(4, 9)], []])
    table = layout.table(64)
    assert table.dtype == np.int32 and table.flags.c_contiguous
    assert table.tolist() == [[0, 3, 8, 15], [4, 9, *EMPTY], [*EMPTY, *EMPTY]]
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1
    assert layout.table(64) is table is BandLayout.from_spec(layout.spec).table(32)


def test_packed_table_has_a_row_per_document_only_when_bands_follow_the_length():
    lengths = [5, 0, 12]
    own = BandLayout.spattention(4)
    table = own.packed_table(lengths)
    assert table.shape == (3, 4, 4) and table.dtype == np.int32
    for row, length in zip(table, lengths, strict=True):
        assert (row == own.table(length)).all()
    fixed = BandLayout.spattention(4, 12)
    assert fixed.packed_table(lengths).shape == (1, 4, 4)
    assert (fixed.packed_table(lengths)[0] == fixed.table(5)).all()


def test_largest_context_stays_inside_int32():
    for name in FROM_CONTEXT:
        layout = getattr(BandLayout, name)(1, LIMIT)
        assert layout.table(LIMIT).max() <= 2**30
        assert layout.pairs(LIMIT) <= LIMIT * (LIMIT + 1) // 2
    with pytest.raises(ValueError, match="context_length must be between 1"):
        BandLayout.causal(1, LIMIT + 1)


# --- parts of a layout ------------------------------------------------------------------------------------


@given(layouts, st.data())
def test_a_part_has_the_bands_of_its_heads(layout, data):
    order = data.draw(st.permutations(range(layout.num_heads)))
    taken = order[: data.draw(st.integers(1, layout.num_heads))]
    length = data.draw(st.integers(1, 300))
    part = layout.heads(taken)
    assert part.num_heads == len(taken)
    assert part.bands(length) == tuple(layout.bands(length)[head] for head in taken)
    assert (part.table(length) == layout.table(length)[taken]).all()
    assert (part.packed_table([3, 0, 41]) == layout.packed_table([3, 0, 41])[:, taken]).all()
    assert part.pairs_per_head(length) == tuple(layout.pairs_per_head(length)[head] for head in taken)
    assert part.pairs(length) == sum(part.pairs_per_head(length))
    assert part.coverage(length).seen <= layout.coverage(length).seen
    assert part.executed_pairs(length, 1, 1) == part.pairs(length)
    for name in ("name", "context_length", "allow_longer", "depends_on_length", "is_autoregressive"):
        assert getattr(part, name) == getattr(layout, name)
    # Of a part, indices count its own heads.
    again = data.draw(st.permutations(range(len(taken))))
    assert part.heads(again) == layout.heads([taken[head] for head in again])
    assert BandLayout.from_spec(part.spec) == part


def test_parts_of_all_devices_are_the_whole():
    for layout in (
        BandLayout.spattention(6), BandLayout.equal_area(6, 100), BandLayout.gapped(6, 7),
        BandLayout.custom([[(0, h)] for h in range(6)]), BandLayout.sliding_window(6, 9),
    ):  # fmt: skip
        ranks = [layout.heads(start, start + 2) for start in (0, 2, 4)]
        joined = sum((rank.bands(77) for rank in ranks), ())
        assert joined == layout.bands(77)
        assert layout.heads(0, 6) is not layout and layout.heads(0, 6) == layout == layout.heads(range(6))
        assert layout.heads(2, 4) == layout.heads([2, 3]) == layout.heads(np.arange(2, 4))
        assert layout.heads(2, 4) == layout.heads(torch.arange(2, 4)) == layout.heads(h for h in (2, 3))
        assert len({*ranks}) == (1 if layout.name == "sliding_window" else 3)


def test_a_part_is_not_a_layout_for_fewer_heads():
    whole, fewer = BandLayout.spattention(16, 4096), BandLayout.spattention(4, 4096)
    assert whole.heads(0, 4) != fewer
    assert whole.heads(0, 4).bands(4096) != fewer.bands(4096)
    # Where heads are alike, it is.
    assert BandLayout.causal(16).heads(3, 7) == BandLayout.causal(4)
    assert BandLayout.sliding_window(16, 9, 20).heads([5]) == BandLayout.sliding_window(1, 9, 20)


@pytest.mark.parametrize("layout", [BandLayout.spattention(4), BandLayout.causal(4, 9)], ids=str)
def test_bad_heads_are_refused(layout):
    for arguments, error, message in [
        (([],), ValueError, "at least one head"),
        ((2, 2), ValueError, "at least one head"),
        ((3, 1), ValueError, "at least one head"),
        ((0, 5), ValueError, "heads 0 to 3, got 4"),
        ((-1, 2), ValueError, "heads 0 to 3, got -1"),
        (([0, -1],), ValueError, "heads 0 to 3, got -1"),
        (([1, 2, 1],), ValueError, "head 1 twice"),
        # Without end, or nearly so.
        ((0, 2**70), ValueError, "heads 0 to 3, got 4"),
        ((range(2**60),), ValueError, "heads 0 to 3, got 4"),
        ((itertools.count(),), ValueError, "heads 0 to 3, got 4"),
        ((itertools.repeat(2),), ValueError, "head 2 twice"),
        ((2,), TypeError, "a sequence of indices, or start and stop; got 2 alone"),
        (([0.0],), TypeError, "index is an integer, got 0.0"),
        (([True],), TypeError, "index is an integer, got True"),
        (("01",), TypeError, "index is an integer, got '0'"),
        ((0, "2"), TypeError, "index is an integer, got '2'"),
        (([0], 2), TypeError, r"index is an integer, got \[0\]"),
    ]:
        with pytest.raises(error, match=message):
            layout.heads(*arguments)


def test_edges_and_parts():
    with pytest.raises(ValueError, match="only all heads partition the distances"):
        BandLayout.spattention(4, 8).heads(0, 2).edges(8)
    with pytest.raises(FrozenInstanceError):
        BandLayout.spattention(4, 8).heads(0, 2).of_heads = 3


def test_heads_that_do_not_fit_name_the_way_out():
    layout = BandLayout.spattention(16, 64)
    layout.check_heads(16)
    with pytest.raises(
        ValueError, match=r"made for 16 query heads and q has 4: .*layout\.heads\(start, start \+ 4\)"
    ):
        layout.check_heads(4)
    with pytest.raises(ValueError, match="made for 16 query heads and q has 32: make it with num_heads=32"):
        layout.check_heads(32)


def test_autoregressive_layouts():
    for name in FROM_CONTEXT:
        make = getattr(BandLayout, name)
        assert make(4, 64).is_autoregressive and make(4, 64).heads(1, 3).is_autoregressive
        assert make(4).is_autoregressive == make(4).heads(1, 3).is_autoregressive == (name == "causal")
        # What the first 20 of 40 tokens see is what 20 tokens see, or it is not.
        first, alone = make(4).table(40), make(4).table(20)
        sees_the_same = all(
            {d for lo, hi in head for d in range(lo, min(hi, 19) + 1)}
            == {d for lo, hi in other for d in range(lo, min(hi, 19) + 1)}
            for head, other in zip(make(4).bands(40), make(4).bands(20), strict=True)
        )
        assert sees_the_same == make(4).is_autoregressive, (first, alone)
    assert BandLayout.sliding_window(4, 3).is_autoregressive
    assert BandLayout.custom([[(0, 3)]]).is_autoregressive
    BandLayout.causal(4).require_autoregressive("decoding")
    with pytest.raises(
        ValueError, match=r"decoding needs .* spattention:heads=4 do: .*spattention\(4, context_length=4096\)"
    ):
        BandLayout.spattention(4).require_autoregressive("decoding")
    with pytest.raises(ValueError, match=r"gapped\(8, context_length=4096\)"):
        BandLayout.gapped(8).heads(2, 4).require_autoregressive("decoding")


# --- one table of layouts ---------------------------------------------------------------------------------


@given(parts())
def test_the_table_of_a_device_is_that_of_the_host(layout):
    lengths = [*range(1, 45), 128, 300, 4095, 4096, 0]
    if not layout.depends_on_length:
        with pytest.raises(ValueError, match="don't depend on the length"):
            length_tables(layout, torch.tensor(lengths))
        return
    tables = length_tables(layout, torch.tensor(lengths, dtype=torch.int32))
    assert tables.dtype == torch.int32 and tables.shape == (len(lengths), layout.num_heads, 4)
    expected = np.stack([layout.table(length) for length in lengths])
    np.testing.assert_array_equal(tables.numpy(), expected)


def test_the_largest_length_stays_inside_int32_on_a_device():
    for name in FROM_CONTEXT:
        for layout in (getattr(BandLayout, name)(1), getattr(BandLayout, name)(7).heads([6, 0])):
            length = LIMIT if name != "equal_area" else 2**26
            tables = length_tables(layout, torch.tensor([length], dtype=torch.int32))
            np.testing.assert_array_equal(tables[0].numpy(), layout.table(length))


def test_a_new_layout_is_one_entry(monkeypatch):
    """Host, device, spec and parts follow from what one place says of it."""
    kind = bands._Kind(lambda heads: [(heads.begin, heads.end - 1), (0, 0)])
    monkeypatch.setitem(bands._KINDS, "own_and_self", kind)
    layout = BandLayout("own_and_self", 4)
    assert layout.bands(10) == (((0, 2),), ((0, 0), (3, 5)), ((0, 0), (6, 7)), ((0, 0), (8, 9)))
    assert BandLayout.from_spec("own_and_self:heads=4") == layout
    assert layout.heads([3, 1]).bands(10) == (((0, 0), (8, 9)), ((0, 0), (3, 5)))
    tables = length_tables(layout, torch.tensor([10, 1], dtype=torch.int32))
    np.testing.assert_array_equal(tables.numpy(), layout.packed_table([10, 1]))
    assert not layout.is_autoregressive


def test_an_unknown_layout_is_refused_without_assertions():
    code = """
import torch
from spattn_tvm import bands
assert False
layout = bands.BandLayout.spattention(4)
object.__setattr__(layout, "name", "nonsense")
for read in (
    lambda: bands.length_tables(layout, torch.tensor([5], dtype=torch.int32)),
    lambda: layout.table(5), lambda: layout.bands(5), lambda: layout.heads(0, 2),
    lambda: bands.BandLayout("nonsense", 4), lambda: bands.BandLayout.from_spec("nonsense:heads=4"),
):
    try:
        print("accepted", read())
    except (KeyError, ValueError) as error:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * 6, done.stdout


def test_no_behaviour_of_the_package_rests_on_an_assertion():
    """``python -O`` leaves them out. Inside TensorIR an assertion is the kernel's own; that something is not
    None may be said to a type checker, since a use of None fails by itself.
    """

    def narrows(test):
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return all(narrows(value) for value in test.values)
        return isinstance(test, ast.Compare) and ast.unparse(test).endswith(" is not None")

    def is_kernel(node):
        return any("prim_func" in ast.unparse(d) or "inline" in ast.unparse(d) for d in node.decorator_list)

    def assertions(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and is_kernel(node):
            return
        if isinstance(node, ast.Assert) and not narrows(node.test):
            yield node.lineno
        for child in ast.iter_child_nodes(node):
            yield from assertions(child)

    root = Path(spattn_tvm.__file__).parent
    found = [
        f"{path.relative_to(root)}:{line}"
        for path in sorted(root.rglob("*.py"))
        for line in assertions(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []
    assert tuple(bands._KINDS) == LAYOUT_NAMES
