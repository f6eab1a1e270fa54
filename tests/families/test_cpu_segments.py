"""The backward's division among threads: every pair once, no row for two threads, enough for each thread."""

import itertools

import numpy as np
import pytest

from spattn_tvm.bands import BandLayout

segments = pytest.importorskip("spattn_tvm.families.cpu.segments")
splits_heads = pytest.importorskip("spattn_tvm.families.cpu.abi").splits_heads


def pairs_of_segments(low, high, first, queries, key_begin, key_end, rows):
    """Of each phase: (queries, keys) of the pairs of segments, as half-open ranges of positions."""
    begin, end = segments.diagonals(low, high, first, first + queries - 1, key_begin, key_end, rows)
    for diagonal in range(begin, end):
        phase = []
        for row in range(first, first + queries, rows):
            key = row - diagonal * rows
            keys = max(key, key_begin), min(key + rows, key_end)
            rows_end = min(row + rows, first + queries)
            if min(keys[1], rows_end - low) > max(keys[0], row - high):
                phase.append(((row, rows_end), keys))
        yield phase


@pytest.mark.parametrize("rows", [1, 3, 4, 50])
def test_segments_cover_each_pair_once_and_a_phase_no_row_twice(rows):
    domains = [(0, 13, 0, 13), (0, 13, 2, 9), (5, 9, 0, 14), (-3, 11, 0, 8), (20, 3, 0, 6), (4, 1, 4, 5)]
    bands = [(0, 0), (0, 3), (2, 5), (4, 11), (0, 40), (-2, 1), (7, 6), (2**31 - 1, -1)]
    for (first, queries, key_begin, key_end), (low, high) in itertools.product(domains, bands):
        query, key = np.arange(first, first + queries)[:, None], np.arange(key_begin, key_end)[None]
        expected = (query - key >= low) & (query - key <= high)
        visits = np.zeros((queries, key_end - key_begin), int)
        for phase in pairs_of_segments(low, high, first, queries, key_begin, key_end, rows):
            for ranges in zip(*phase, strict=True):
                assert all(b <= c for (_, b), (c, _) in itertools.pairwise(sorted(ranges)))
            for (a, b), (c, d) in phase:
                visits[a - first : b - first, c - key_begin : d - key_begin] += 1
        assert visits.max(initial=0) <= 1 and (visits[expected] == 1).all()


def busy_share(layout, batch, length, threads):
    """Of the threads' time: pairs of a phase, dealt as the kernel does, over those of its busiest thread."""
    heads = layout.num_heads
    phases = {}
    if not splits_heads(batch * heads, threads):
        phases[0] = list(layout.pairs_per_head(length)) * batch
    else:
        rows = segments.segment_rows(batch * heads, length, threads, 16)
        for _, head, band in itertools.product(range(batch), range(heads), range(2)):
            low, high = layout.table(length)[head, 2 * band : 2 * band + 2].tolist()
            for number, phase in enumerate(pairs_of_segments(low, high, 0, length, 0, length, rows)):
                for (a, b), (c, d) in phase:
                    query = np.arange(a, b)
                    pairs = np.minimum(d - 1, query - low) - np.maximum(c, query - high) + 1
                    phases.setdefault((band, number), []).append(int(pairs.clip(0).sum()))
    done = sum(sum(work) for work in phases.values())
    taken = sum(max(sum(work[thread::threads]) for thread in range(threads)) for work in phases.values())
    return done / (taken * threads)


@pytest.mark.parametrize("threads", [2, 8, 16, 64])
@pytest.mark.parametrize(
    "batch,length,layout",
    [
        (1, 16384, BandLayout.spattention(4)),
        (1, 4096, BandLayout.spattention(16)),
        (1, 4096, BandLayout.causal(16)),
        (2, 5000, BandLayout.sliding_window(12, 1024)),
    ],
)
def test_threads_are_busy(batch, length, layout, threads):
    assert busy_share(layout, batch, length, threads) > 0.82
