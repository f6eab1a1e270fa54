"""Layouts against the per-pair definition, exhaustively at small sizes; closed forms against counting."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spattn_tvm.bands import EMPTY, LIMIT, BandLayout, merge_intervals

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


@given(layouts)
def test_spec_round_trip(layout):
    text = json.loads(json.dumps(layout.spec))
    again = BandLayout.from_spec(text)
    assert again == layout and hash(again) == hash(layout) and again.spec == layout.spec
    assert BandLayout.from_spec(layout.spec) is again
    assert pickle.loads(pickle.dumps(layout)) == layout


@given(layouts, layouts)
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
