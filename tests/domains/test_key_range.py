"""The symbolic band arithmetic of the kernels against ``bands.py``, exhaustively at small sizes."""

import itertools

import numpy as np
import pytest

from spattn_tvm.bands import BandLayout

key_range = pytest.importorskip("spattn_tvm.domains.key_range")


def layouts():
    for heads, context in itertools.product((1, 2, 3, 5), (1, 2, 7, 13)):
        yield BandLayout.spattention(heads, context)
        yield BandLayout.exclusive(heads, context)
        yield BandLayout.gapped(heads, context)
        yield BandLayout.equal_area(heads, context)
    yield BandLayout.custom([[(2, 3), (6, 9)], [], [(0, 0)]], 13)


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("key_rows", [1, 2, 5])
def test_tiles_visit_exactly_the_attended_pairs(rows, key_rows):
    """Walking the tiles as the kernels do counts each attended pair once and no other pair."""
    for layout in layouts():
        length = layout.context_length
        table = layout.table(length)
        for head in range(layout.num_heads):
            visits = np.zeros((length, length), dtype=int)
            for query_begin in range(0, length, rows):
                query_last = min(query_begin + rows, length) - 1
                for low, high in (table[head, 2:].tolist(), table[head, :2].tolist()):
                    begin, end = key_range.key_range(query_begin, query_last, low, high, 0)
                    for key_begin in range(begin, end, key_rows):
                        key_last = min(key_begin + key_rows, end) - 1
                        masked = key_range.crosses_edge(
                            query_begin, query_last, key_begin, key_last, low, high
                        )
                        for query in range(query_begin, query_last + 1):
                            for key in range(key_begin, key_last + 1):
                                inside = key_range.in_band(query, key, low, high)
                                assert masked or inside, (layout.spec, head, query, key)
                                visits[query, key] += inside
            expected = np.zeros_like(visits)
            for query, key in itertools.product(range(length), repeat=2):
                bands = layout.bands(length)[head]
                expected[query, key] = any(low <= query - key <= high for low, high in bands)
            np.testing.assert_array_equal(visits, expected, err_msg=f"{layout.spec} head {head}")


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("query_rows", [1, 2, 5])
def test_tiles_of_keys_meet_exactly_the_queries_that_attend_to_them(rows, query_rows):
    for layout in layouts():
        length = layout.context_length
        table = layout.table(length)
        for head in range(layout.num_heads):
            visits = np.zeros((length, length), dtype=int)
            for key_begin in range(0, length, rows):
                key_last = min(key_begin + rows, length) - 1
                for low, high in (table[head, :2].tolist(), table[head, 2:].tolist()):
                    begin, end = key_range.query_range(key_begin, key_last, low, high, length)
                    # No chunk is visited in vain: its first query attends to some key of the tile.
                    for query_begin in range(begin, end, query_rows):
                        queries = range(query_begin, min(query_begin + query_rows, end))
                        pairs = list(itertools.product(queries, range(key_begin, key_last + 1)))
                        inside = [key_range.in_band(query, key, low, high) for query, key in pairs]
                        assert any(inside), (layout.spec, head, query_begin)
                        for pair, is_inside in zip(pairs, inside, strict=True):
                            visits[pair] += is_inside
            expected = np.zeros_like(visits)
            bands = layout.bands(length)[head]
            for query, key in itertools.product(range(length), repeat=2):
                expected[query, key] = any(low <= query - key <= high for low, high in bands)
            np.testing.assert_array_equal(visits, expected, err_msg=f"{layout.spec} head {head}")


def test_the_first_query_with_keys_and_all_behind_it_have_some():
    for layout in layouts():
        length = layout.context_length
        table = layout.table(length)
        for head, bands in enumerate(layout.bands(length)):
            first = key_range.first_query_with_keys(0, int(table[head, 0]), int(table[head, 2]))
            for query in range(length):
                has_key = any(low <= query - key <= high for low, high in bands for key in range(length))
                assert has_key == (query >= first), (layout.spec, head, query)
