"""How the backward is divided among threads: whole heads, or segments of heads in phases.

Where there are enough heads, each is one thread's. Otherwise a document's queries, and at the same steps its
keys, are cut into segments of one length, and a band into *diagonals*: the pairs of segments with one
difference of their numbers. In a diagonal each segment of queries meets one segment of keys, and each of keys
one of queries, so that its pairs can be computed at the same time and nothing is added to by two threads;
one diagonal after the other is a phase. All orders of sums follow from the segments' length, so a result
depends on the number of threads, and on nothing else that differs between two runs.

The functions take and return TensorIR expressions or Python integers. Whether heads are divided at all says
``abi.splits_heads``, because memory is needed for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.script import tirx as T

from spattn_tvm.domains.key_range import maximum, minimum
from spattn_tvm.domains.tiles import tile_slots

from .abi import splits_heads

if TYPE_CHECKING:
    from .rows import BandedRows

# Pairs of segments in the longest phase, for each thread. The last round of a phase may be incomplete: with
# 16 threads at (1, 4, 16384) spattention 94% of the threads' time is work, with half as many segments 86%.
SEGMENTS_PER_THREAD = 16
# Each phase reads a tile of queries again. At (1, 16, 4096, 64) segments of 512 rows take 7% more time of
# all threads together than whole heads, of 256 rows 15%.
SHORTEST_SEGMENT = 128


def segment_rows(batch_heads: Any, queries: Any, threads: Any, step: int) -> Any:
    """Rows of a segment, a multiple of ``step``, where heads are divided.

    Short enough for `SEGMENTS_PER_THREAD`, but not shorter than `SHORTEST_SEGMENT` unless threads would
    stay idle.
    """
    total = queries * batch_heads
    balanced = -(-total // (SEGMENTS_PER_THREAD * threads))
    busy = -(-total // threads)
    rows = maximum(maximum(balanced, 1), minimum(SHORTEST_SEGMENT, busy))
    return -(-rows // step) * step


def diagonals(
    low: Any, high: Any, first: Any, last: Any, key_begin: Any, key_end: Any, rows: Any
) -> tuple[Any, Any]:
    """The first diagonal of a band in a document, and the one behind its last.

    The document's queries have the positions ``first ... last``, its keys ``[key_begin, key_end)``. Segment 0
    of both begins at ``first``.
    """
    nearest, farthest = maximum(low, first - (key_end - 1)), minimum(high, last - key_begin)
    begin = nearest // rows
    return begin, maximum(begin, -(-farthest // rows) + 1)


# Of a call's plan: rows of a segment, segments of a head, phases of the far and of the near band.
SEGMENT, SLOTS, PHASES = 0, 1, 2
PLAN_WORDS = 4


class Division:
    """How a call is divided, in the function that is being parsed.

    Parameters
    ----------
    call : BandedRows
        With its sizes bound.
    workers : int32
        Threads.
    step : int
        What the rows of a segment are a multiple of.

    Attributes
    ----------
    is_split : bool
        Whether heads are divided. If not, a head is one segment and there is one phase, of both bands.
    segment, slots : int32
        Rows of a segment; slots of a head, of which each has a segment of a document, or none.
    phases, far_phases : int32
        In all, and those of the far band, which come first. After `find_phases`.
    """

    def __init__(self, call: BandedRows, workers: Any, step: int) -> None:
        self.call, self.workers, self.step = call, workers, step
        self.is_split = T.bind(splits_heads(call.batch_heads, workers))

    @T.inline
    def find_phases(self):  # type: ignore[no-untyped-def]
        call = T.meta_var(self.call)
        # Read back from a buffer, a value is opaque to TVM's simplifier, as in the worker's place.
        plan = T.alloc_buffer((PLAN_WORDS,), "int32")
        plan[SEGMENT] = T.max(1, call.queries)
        plan[SLOTS] = 1
        plan[PHASES] = 1
        plan[PHASES + 1] = 0
        if self.is_split:
            plan[PHASES] = 0
            plan[SEGMENT] = segment_rows(call.batch_heads, call.queries, self.workers, self.step)
            plan[SLOTS] = tile_slots(call.queries, call.documents, plan[SEGMENT])
        self.bind_segments(plan)
        if self.is_split:
            for row, document, h, band in T.grid(T.max(1, call.ranges), call.documents, call.heads, 2):
                table: T.let[T.int32] = call.table_of(document)
                keys = T.meta_var(call.keys_of(document, row))
                found = T.meta_var(self.diagonals(document, table, h, band, *keys))
                plan[PHASES + band] = T.max(plan[PHASES + band], found[1] - found[0])
        self.bind_phases(plan)

    def bind_segments(self, plan: Any) -> None:
        self.segment = T.bind(plan[SEGMENT])
        self.slots = T.bind(plan[SLOTS])

    def bind_phases(self, plan: Any) -> None:
        self.far_phases = T.bind(plan[PHASES])
        self.phases = T.bind(self.far_phases + plan[PHASES + 1])

    def diagonals(
        self, document: Any, table: Any, head: Any, band: Any, key_begin: Any, key_end: Any, shift: Any
    ) -> tuple[Any, Any]:
        """Those of a head's band (the far one is 0) in a document, as :func:`diagonals` counts them."""
        call = self.call
        return diagonals(
            call.bands[table, head, 2 - 2 * band],
            call.bands[table, head, 3 - 2 * band],
            call.cu_seqlens[document] + shift,
            call.cu_seqlens[document + 1] - 1 + shift,
            key_begin,
            key_end,
            self.segment,
        )
