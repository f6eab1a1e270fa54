"""The symbolic band arithmetic of the kernels against ``bands.py``, exhaustively at small sizes."""

import itertools

import numpy as np
import pytest
import torch

from spattn_tvm.bands import EMPTY, LIMIT, BandLayout

tvm = pytest.importorskip("tvm")

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


def test_has_key_tells_which_bands_give_a_position_a_key():
    intervals = [(0, 0), (0, 3), (2, 5), (4, 4), EMPTY]
    for (low, high), begin, end in itertools.product(intervals, range(3), range(7)):
        for position in (*range(-4, 14), -(2**30), LIMIT):
            expected = any(low <= position - key <= high for key in range(begin, end))
            assert key_range.has_key(position, low, high, begin, end) == expected, (position, low, high)


def test_document_keys_say_which_keys_a_query_row_stands_among():
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def find(
        boundaries_handle: T.handle,
        key_boundaries_handle: T.handle,
        ranges_handle: T.handle,
        found_handle: T.handle,
    ):
        T.func_attr({"global_symbol": "find"})
        BATCH, DOCUMENTS, RANGES = T.int32(), T.int32(), T.int32()
        boundaries = T.match_buffer(boundaries_handle, (DOCUMENTS + 1,), "int32")
        key_boundaries = T.match_buffer(key_boundaries_handle, (DOCUMENTS + 1,), "int32")
        ranges = T.match_buffer(ranges_handle, (RANGES, 3), "int32")
        found = T.match_buffer(found_handle, (BATCH, DOCUMENTS, 3), "int32")
        for b, document in T.grid(BATCH, DOCUMENTS):
            keys = T.meta_var(
                key_range.document_keys(document, b, boundaries, key_boundaries, ranges, RANGES)
            )
            found[b, document, 0] = keys[0]
            found[b, document, 1] = keys[1]
            found[b, document, 2] = keys[2]

    run = tvm.compile(tvm.IRModule({"find": find}), target="llvm")["find"]
    draw = np.random.default_rng()
    for batch, ranges in itertools.product((1, 3), (0, 1, 3)):
        if ranges > batch:
            continue
        documents = 1 if ranges else 4
        queries, keys = (
            np.concatenate(([0], np.sort(draw.integers(0, 50, documents)))).astype(np.int32) for _ in range(2)
        )
        rows = draw.integers(-9, 60, (ranges, 3)).astype(np.int32)
        found = torch.zeros((batch, documents, 3), dtype=torch.int32)
        run(
            *(torch.tensor(values) for values in (queries, keys)),
            torch.tensor(rows.tolist()).int().view(-1, 3),
            found,
        )
        for b, document in itertools.product(range(batch), range(documents)):
            expected = [keys[document], keys[document + 1], keys[document + 1] - queries[document + 1]]
            if ranges:
                expected = rows[b if ranges > 1 else 0].tolist()
            assert found[b, document].tolist() == list(expected), (batch, ranges, b, document)
            # The last query of a document of its own stands on its last key.
            if not ranges:
                assert queries[document + 1] - 1 + found[b, document, 2] == keys[document + 1] - 1
