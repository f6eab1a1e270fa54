"""Slots and tiles of packed documents: each row in one tile of its document, exhaustively at small sizes."""

import itertools

import numpy as np
import pytest

tiles = pytest.importorskip("spattn_tvm.domains.tiles")

PACKINGS = [
    list(itertools.accumulate(lengths, initial=0))
    for count in (1, 2, 4)
    for lengths in itertools.product((0, 1, 4, 9), repeat=count)
]


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_every_tile_of_every_document_has_its_own_slot(rows):
    for boundaries in PACKINGS:
        documents = len(boundaries) - 1
        slots = tiles.tile_slots(boundaries[-1], documents, rows)
        first = [tiles.first_slot(begin, m, rows) for m, begin in enumerate(boundaries[:-1])]
        assert first == sorted(set(first)), "a binary search needs strictly increasing first slots"
        owners = [
            (m, first[m] + tile)
            for m, (begin, end) in enumerate(itertools.pairwise(boundaries))
            for tile in range(-(-(end - begin) // rows))
        ]
        assert len({slot for _, slot in owners}) == len(owners)
        assert documents > 1 or slots == len(owners)
        for document, slot in owners:
            assert slot < slots
            assert max(m for m, begin in enumerate(first) if begin <= slot) == document


def test_chunks_cover_a_range_and_no_more():
    for begin, end, rows in itertools.product(range(-3, 9), range(-3, 9), (1, 2, 5)):
        assert tiles.chunk_count(begin, end, rows) == len(range(begin, end, rows))


def test_shares_of_a_tiles_chunks_follow_one_another_and_differ_by_one():
    for chunks, shares, least in itertools.product(range(20), (1, 2, 3, 7, 32), (1, 2, 4)):
        bounds = [tiles.share_of(chunks, share, shares, least) for share in range(shares)]
        ends = [0, *(after for _, after in bounds)]
        assert [first for first, _ in bounds] == ends[:-1] and ends[-1] == chunks
        sizes = [after - first for first, after in bounds if after > first]
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
        # As many as there may be.
        assert len(sizes) == min(shares, -(-chunks // least))


def test_shares_in_a_kernel_are_those_of_integers():
    import tvm
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def share_all(found_handle: T.handle, shares: T.int32):
        numbers = T.int32()
        found = T.match_buffer(found_handle, (numbers, shares, 2), "int32")
        for chunks in range(numbers):
            for share in range(shares):
                first, after = T.meta_var(tiles.share_of(chunks, share, shares, 2))
                found[chunks, share, 0] = first
                found[chunks, share, 1] = after

    share_all = tvm.compile(tvm.IRModule({"main": share_all}), target="llvm")["main"]
    for shares in (1, 3, 32):
        found = tvm.runtime.tensor(np.full((40, shares, 2), -1, dtype=np.int32))
        share_all(found, shares)
        expected = [[tiles.share_of(chunks, i, shares, 2) for i in range(shares)] for chunks in range(40)]
        assert found.numpy().tolist() == np.array(expected).tolist()


@pytest.fixture(scope="module")
def locate():
    """The inline functions, compiled for this CPU: what they find for all numbers of tiles."""
    import tvm
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def locate_all(
        boundaries_handle: T.handle,
        found_handle: T.handle,
        rows: T.int32,
        batches: T.int32,
        heads: T.int32,
        together: T.int32,
    ):
        bounds, numbers = T.int32(), T.int32()
        boundaries = T.match_buffer(boundaries_handle, (bounds,), "int32")
        found = T.match_buffer(found_handle, (numbers, 7), "int32")
        slots: T.let[T.int32] = tiles.tile_slots(boundaries[bounds - 1], bounds - 1, rows)
        for number in range(numbers):
            slot: T.int32 = 0
            batch: T.int32 = 0
            head: T.int32 = 0
            document: T.int32 = 0
            begin: T.int32 = 0
            end: T.int32 = 0
            first: T.int32 = 0
            tiles.locate_head(number, slots, batches, heads, together, slot, batch, head)
            tiles.locate_rows(slot, rows, boundaries, bounds - 1, document, begin, end, first)
            found[number, 0] = slot
            found[number, 1] = batch
            found[number, 2] = head
            found[number, 3] = document
            found[number, 4] = begin
            found[number, 5] = end
            found[number, 6] = first

    return tvm.compile(tvm.IRModule({"main": locate_all}), target="llvm")["main"]


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("batches,heads,together", [(1, 1, 1), (2, 3, 4), (3, 2, 8)])
def test_all_rows_of_all_heads_lie_in_one_tile(locate, rows, batches, heads, together):
    import tvm

    for boundaries in PACKINGS:
        documents, length = len(boundaries) - 1, boundaries[-1]
        slots = tiles.tile_slots(length, documents, rows)
        if slots == 0:
            continue
        found = tvm.runtime.tensor(np.full((slots * batches * heads, 7), -1, dtype=np.int32))
        locate(
            tvm.runtime.tensor(np.array(boundaries, dtype=np.int32)), found, rows, batches, heads, together
        )
        visits = np.zeros((batches, heads, length), dtype=int)
        for _, batch, head, document, begin, end, first in found.numpy().tolist():
            assert (begin, end) == (boundaries[document], boundaries[document + 1])
            assert first >= begin
            visits[batch, head, first : min(first + rows, end)] += 1
        assert (visits == 1).all(), boundaries


@pytest.mark.parametrize("documents", [1, 2, 3, 4, 9])
def test_a_documents_row_of_a_table(documents):
    def rows(tables):
        return [tiles.table_row(document, documents, tables) for document in range(documents)]

    assert rows(1) == [0] * documents
    assert rows(documents) == list(range(documents))
    if documents >= 3:
        assert rows(3) == [0, *[1] * (documents - 2), 2]
