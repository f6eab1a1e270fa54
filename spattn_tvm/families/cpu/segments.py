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

from typing import Any

from spattn_tvm.domains.key_range import maximum, minimum

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
