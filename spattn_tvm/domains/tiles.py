"""Tiles of rows: how many a sequence has, whose rows one holds, what it meets on the other side.

The tiles of all documents of a sequence are numbered by *slots*: tile t of a document has the slot
``first_slot(begin, document, rows) + t``. The number of slots is known without reading the boundaries, so
that a launch needs no copy from the device; some slots hold no row. One (batch, head) pair after the other
has these slots, a few pairs interleaved.

A kernel goes from the number of a tile to its rows, and from there to its loops, in three steps (the inline
functions change the variables that they are given, as if their text stood where they are called)::

    slots: T.int32 = tile_slots(length, documents, ROWS)    # so slots * batches * heads tiles in all
    locate_head(number, slots, batches, heads, together, slot, batch, head)
    locate_rows(slot, ROWS, boundaries, documents, document, begin, end, first)
    if first < end:                                         # else the slot holds no row
        last: T.int32 = T.min(first + ROWS, end) - 1
        keys = T.meta_var(key_range(first, last, low, high, begin))       # of a tile of queries
        queries = T.meta_var(query_range(first, last, low, high, end))    # of a tile of keys

``boundaries`` are sorted, start with 0 and end with the sequence length. The functions without ``T.inline``
take and return TensorIR expressions or Python integers, which is how the tests compare them with
``bands.py``.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .key_range import maximum
from .variables import scalar


def tile_slots(length: Any, documents: Any, rows: int) -> Any:
    """Slots of one sequence: of one document as many as it has tiles, else an upper bound of all tiles."""
    of_one, of_several = (length + (rows - 1)) // rows, length // rows + documents
    if isinstance(documents, int):
        return of_one if documents == 1 else of_several
    return T.Select(documents == 1, of_one, of_several)


def first_slot(document_begin: Any, document: Any, rows: int) -> Any:
    """The slot of a document's first tile.

    ``ceil(n / rows) <= (begin + n) // rows - begin // rows + 1``, so a document's tiles never reach the next
    document's first slot, and the slots of documents strictly increase: a binary search finds a slot's owner.
    """
    return document_begin // rows + document


def table_row(document: Any, documents: Any, tables: Any) -> Any:
    """The row of a band table ``(tables, heads, 4)`` that holds the bands of a document.

    A table has one row for all documents, or a row for each, or three: for the first document, for those
    between, and for the last one. A packed call's first and last documents are the rows that belong to none
    of the caller's documents.
    """
    if isinstance(document, int):
        shared = tables - 1 if document == documents - 1 else min(document, tables // 2)
        return document if tables == documents else shared
    shared = T.Select(document == documents - 1, tables - 1, T.min(document, tables // 2))
    return T.Select(tables == documents, document, shared)


def chunk_count(begin: Any, end: Any, rows: int) -> Any:
    """Chunks of ``rows`` that cover ``[begin, end)``; none when it is empty."""
    return maximum(end - begin + (rows - 1), 0) // rows


def share_of(chunks: Any, share: Any, shares: Any, least: int) -> Any:
    """The first and the last chunk, exclusive, of one of the shares of a tile's chunks.

    Shares differ by one chunk at most; the last of them are empty where the tile has fewer than ``least``
    chunks for each.
    """
    if isinstance(chunks, int):
        wanted = max(min(shares, chunk_count(0, chunks, least)), 1)
        each, longer = divmod(chunks, wanted)  # shares of one chunk more
        first, after = (min(each * i + min(i, longer), chunks) for i in (share, share + 1))
        return first, after
    wanted = scalar("int32", T.max(T.min(shares, chunk_count(0, chunks, least)), 1))
    each = scalar("int32", T.truncdiv(chunks, wanted))
    longer = scalar("int32", chunks - each * wanted)
    begin = each * share + T.min(share, longer)
    first = scalar("int32", T.Select(share < wanted, begin, chunks))
    after = T.Select(share < wanted, first + each + T.Select(share < longer, 1, 0), chunks)
    return first, after


@T.inline
def locate_head(number, slots, batches, heads, together, slot, batch, head):  # type: ignore[no-untyped-def]
    """The slot, batch row and head of tile ``number``.

    ``together`` (batch, head) pairs at a time, so that what their tiles share stays in the L2 cache; of those
    one slot after the other, so that the longest tiles of all can come first.
    """
    pack: T.int32 = T.truncdiv(number, slots * together)
    packed: T.int32 = T.min(batches * heads - pack * together, together)
    slot = T.truncdiv(number - pack * (slots * together), packed)
    head = number - pack * (slots * together) - slot * packed + pack * together
    batch = head - T.truncdiv(head, batches) * batches
    head = T.truncdiv(head, batches)


@T.inline
def locate_rows(slot, rows, boundaries, documents, document, begin, end, first):  # type: ignore[no-untyped-def]
    """The document of a slot, its bounds, and the slot's first row; ``first >= end`` if it holds no row."""
    document = 0
    last_document: T.int32 = documents - 1
    while document < last_document:
        middle: T.int32 = (document + last_document + 1) // 2
        if first_slot(boundaries[middle], middle, rows) <= slot:
            document = middle
        else:
            last_document = middle - 1
    begin = boundaries[document]
    end = boundaries[document + 1]
    first = begin + (slot - first_slot(begin, document, rows)) * rows
