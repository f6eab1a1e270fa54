"""Banded attention backward for Hopper in one pass over key tiles: five products, dQ added up in global
memory.

Two kernels. The first computes the statistics of the queries; the second draws tiles of keys, as the dK/dV
pass of :mod:`.backward` does, and adds each chunk's dQ to float32 sums by bulk reductions of 16 KB. Adding
goes in no fixed order: gradients differ from run to run in the last bits.

**Clearing and converting** the sums, at the memory's speed, is hidden under the products, which leave the
memory idle. The first kernel clears the sums of the first pack of heads; a *converting warp* of each CTA
clears the others', then scales and converts those of a head as soon as its last tile is done. When no tile
is left, all computing warps help. At (1, 16, 16384, 128) both together cost 0.05 ms so (0.095 in kernels of
their own), of which the conversion, which competes for the L2, is most.

**The first kernel** is bound by the memory's latency: each thread loads four rows before it computes (3% less
time in all at (1, 16, 16384, 128), 1% at head dim 64), the heads that the second kernel begins with come
last, and the CTAs of that one start under the last of its own.

**Tiles are drawn late**, when all chunks of the one before are on their way. Drawn one earlier, with another
one waiting, they were shared out badly: at (1, 16, 8192, 128) causal, where a CTA has 8 tiles of 2 to 128
chunks, products ended between 0.88 and 1.29 ms (clocks read in the kernel). Early and late, ms in one run
(H100, bfloat16, with the first kernel as it is now; two passes: :mod:`.backward`):

======================= =========== ===== =====
(B, H, N, D)            layout      early late
======================= =========== ===== =====
(1, 16, 8192, 128)      causal      1.286 1.109
(1, 16, 32768, 128)     causal      18.9  18.4
(1, 32/8, 8192, 128)    causal      4.51  2.27
(1, 32/8, 8192, 128)    spattention 0.610 0.508
(1, 16/4, 16384, 128)   spattention 1.383 1.010
(1, 32/8, 32768, 128)   spattention 5.27  4.24
(1, 16, 16384, 128)     spattention 1.014 0.990
(1, 32, 32768, 128)     spattention 4.36  4.24
(1, 16, 65536, 128)     spattention 13.64 13.66
(1, 16, 16384, 64)      spattention 0.677 0.673
(1, 16, 16384, 64)      causal      3.05  2.93
======================= =========== ===== =====

**A chunk.** Scores, then dP; exponentials while dP runs; P is the register operand of dV, and dS, made
while dV runs, that of dK. dS also goes to shared memory, where both warpgroups meet once: each multiplies
all 128 keys by half of the columns of K. While dK runs, that dQ goes through shared memory to a *storing
warp*, which adds it to the sums, so that no consumer waits for a copy; the next chunk's scores are issued
before dK is awaited. dQ and the scores share registers.

**What is subtracted comes first.** The sums of the scores begin with -lse / scale and those of dP with
-delta, which one shared-memory load per pair of queries puts into the accumulators: no subtraction, and no
register or load for the statistics where products keep shared memory busy.

**Sums.** A warpgroup's columns of all queries of a head lie together, (B, Hq, 2, N, D / 2), so that a chunk
of 64 queries is one contiguous piece wherever it starts. The order of the columns is that of the
accumulators.

It is for wide bands and dense causal attention; bands of a few hundred distances are faster in two passes
(figures of both: :mod:`.backward_space`).

**What limits it.** At (1, 16, 65536, 128) the second kernel keeps the tensor cores active for 74% of the
cycles, shared memory for 82% and the L2 for 74% (ncu). By count, a chunk of 64 queries and 128 keys takes
2,560 clocks of products and moves 368 KB through shared memory, which are 2,944 clocks; it takes 3,540, and a
tile 12,000 besides its chunks (copies, the first chunk and the last, two stores). At 65,536 tokens the chip's
power sets its clock: 1.5 to 1.6 GHz, 1.7 at 16,384. Of 1.045 ms at 16,384 tokens, before tiles were drawn
late, the first kernel took 0.072, tiles 0.90, the conversion behind the last tile 0.02 to 0.045: without
statistics 1.004, without clearing 1.027, without converting 0.985, without all three 0.920, without
reductions too 0.865, without loads instead 0.875. Simulated with these clocks, the last tile ends 2% after
the mean at 16,384 tokens and 0.4% at 32 heads of 32,768.

**What did not pay.** The speed where this structure's in the same run is 1 (16 heads of 128, bfloat16,
spattention, and causal at 8,192 tokens; H100, but statistics between tiles, the line on top of that, and
packs at 16,384 tokens H200; KB through shared memory are for 64 queries; two numbers are two runs; "and" is
on top of the line above):

===================================================================== =========== =========== ======
variant                                                               16,384      65,536      causal
===================================================================== =========== =========== ======
dS from P in 16 bits, which frees 32 registers: 368 KB                0.99, 1.00  0.98, 0.98  0.98
and 80 columns of V in registers for the whole tile: 348 KB           0.99, 1.00  0.97, 0.97  0.98
dS from P, and dQ transposed, K^T dS^T: 368 KB                        0.96        0.94        0.98
and chunks of 80 queries, 2 stages: 349 KB                            0.97, 0.97  0.99, 1.00  0.93
and dP rounded before it is multiplied by P: 349 KB                   0.98        1.01        0.99
no wait for a tile's copies: K changes places with chunks of the ring 1.02        1.00        0.99
and chunks without pairs passed by a warpgroup                        1.00        0.97
sums to be converted prefetched to the L2                             1.00        0.96
dQ added from registers (red.global.add of 16 bytes)                  0.97        0.96
and statistics of all but the first pack under the products           0.99        0.99
and conversion by bulk copies                                         0.97        0.95
sums in blocks of 16 queries, -lse in the exponentials' FMA           0.99        1.00
dQ of the chunk before, so that no warpgroup waits for another        1.01        0.96
statistics of later packs by the idle warp, K and V to the L2 early   0.81        1.00
statistics of later packs by the computing warps, between tiles       0.97        1.00        1.00
and tiles of the last pack one head after the other                   0.98        1.01        0.90
packs of 8 heads                                                      0.99        0.97
packs of 2 heads                                                      0.99
two stages                                                                        1.00
dQ in the registers of dP                                                         0.96
the hand-over after the next scores are issued                                    0.92
a ring of its own for dO                                                          0.92
two buffers for dQ and one for dS, two stages                                     1.00
one arrival a warp instead of one a lane                                          0.95
lse and delta in registers                                                        0.97
the next chunk's exponentials under dQ and dK, dK from shared memory              0.85
===================================================================== =========== =========== ======

So a chunk does not wait for shared memory's bandwidth, nor a tile for its copies; what lies between a chunk's
dQ and the next scores counts for each chunk. Chunks of 80 have 4.1, 0.4 and 0.8% more rows. Statistics
between tiles (items of 256 to 1,024 queries, drawn in turn with the tiles of the pack before)
gain nothing at 32 heads of 32,768 either, 1.00, and lose 2% at head dim 64; by the idle warp they gained 6%
there at 16,384 tokens and lost 1% at 65,536. At head dim 64 all of K and V in registers, 176 KB instead of
208, are as fast as here, or 1% faster.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import tvm
from tvm.script import tirx as T

from spattn_tvm.domains.numbers import ALL_LANES, INF, LOG2E, LOWEST
from spattn_tvm.domains.tiles import tile_slots

from .backward_key_pass import key_pass_maps, key_plan, produce_for_keys, store_gradients
from .backward_producers import init_rings
from .backward_sizes import (
    BARRIER_BYTES,
    INFO_BYTES,
    MET_BYTES,
    ONE_PASS_QUERIES,
    SWIZZLE_ROW_BYTES,
    TILE_COUNTS_AT,
    one_pass_arena,
)
from .parts import (
    K_MAJOR,
    add_release,
    address,
    advance,
    arrive,
    convert,
    descriptor,
    dot2,
    element,
    here,
    hold,
    issue_left_shared,
    issue_sum,
    k_step,
    load_shared,
    mask_queries,
    match_tensors,
    matrix,
    named,
    row_step,
    wait_count,
    wgmma,
)
from .support import PLANE, WARPGROUP_ROWS

# Named barriers: all consumers; then of each warpgroup and the storing warp.
EXCHANGE, SUM_FULL, SUM_EMPTY = 1, 2, 4
WITH_STORING_WARP = 160  # threads
STORING_WARP = 2
THREADS = 256  # of the first kernel
PACK_TILES = 128  # at least, where a pack may have more heads for it
FORESEEN = 4  # rows that each of them loads before it computes
CONVERTING_WARP = 3
ITEM_ROWS = 128  # of a warpgroup's columns, that a warp clears or converts at a time
# Of the counters: items drawn to be cleared, cleared, drawn to be converted; then each key head's rows done.
TO_CLEAR, CLEARED, TO_CONVERT, ROWS_DONE = range(4)
REDUCE = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"


def statistics_pass(head_dim: int, dtype: str) -> Callable[..., None]:
    """The first kernel's body: statistics of the queries; the sums of the first heads and all counters start
    at zero.
    """
    D = head_dim
    LANES = D // 8
    ROWS = THREADS // LANES * FORESEEN

    @T.inline
    def run(t, together, scale):
        blocks: T.int32 = (t.queries + ROWS - 1) // ROWS  # of a head
        block = T.cta_id([t.batches * t.query_heads * ((t.queries + ROWS - 1) // ROWS)])
        thread = T.thread_id([THREADS])
        part: T.int32 = thread % LANES
        # The second kernel finds the heads that it begins with in the L2 cache.
        bh: T.int32 = t.batches * t.query_heads - 1 - T.truncdiv(block, blocks)
        b: T.int32 = T.truncdiv(bh, t.query_heads)
        h: T.int32 = bh - b * t.query_heads
        first: T.int32 = block % blocks * ROWS + thread // LANES
        query = T.alloc_local((FORESEEN,), "int32")
        o = T.alloc_local((4 * FORESEEN,), "uint32")
        do = T.alloc_local((4 * FORESEEN,), "uint32")
        lse = T.alloc_local((FORESEEN,), "float32")
        dlse = T.alloc_local((FORESEEN,), "float32")
        delta = T.alloc_local((FORESEEN,), "float32")
        T.ptx.griddepcontrol.launch_dependents()
        if block * THREADS + thread < 2:
            t.next_tile[thread] = 0
        if block * THREADS + thread < ROWS_DONE + t.batches * t.kv_heads:
            t.progress[block * THREADS + thread] = 0
        for i in T.unroll(FORESEEN):
            query[i] = T.min(first + i * (THREADS // LANES), t.queries - 1)
            T.ptx["ld.global.nc.v4.u32"](
                o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3], element(t.o, b, h, query[i], part * 8)
            )
            T.ptx["ld.global.nc.v4.u32"](
                do[4 * i], do[4 * i + 1], do[4 * i + 2], do[4 * i + 3],
                element(t.do, b, h, query[i], part * 8),
            )  # fmt: skip
            lse[i] = t.lse[b, h, query[i]]
            dlse[i] = t.dlse[b, h, query[i]]
        if T.truncdiv(h, t.group) * t.batches + b < together:
            for i in T.unroll(FORESEEN):
                sums_at: T.uint64 = T.reinterpret("uint64", t.dq_sum.data) + T.Cast(
                    "uint64", T.Cast("int64", bh) * t.queries + query[i]
                ) * T.uint64(D * 4)
                for half in T.unroll(2):
                    T.ptx["st.global.v4.f32"](
                        sums_at + T.Cast("uint64", part * 16) + T.uint64(half * D * 2),
                        T.float32(0), T.float32(0), T.float32(0), T.float32(0),
                    )  # fmt: skip
        for i in T.unroll(FORESEEN):
            delta[i] = T.float32(0)
            for j in T.unroll(4):
                delta[i] = dot2(o[4 * i + j], do[4 * i + j], delta[i], dtype)
            for j in T.unroll(LANES.bit_length() - 1):
                delta[i] = delta[i] + T.tvm_warp_shuffle_xor(ALL_LANES, delta[i], 1 << j, 32, 32)
        if part == 0:
            for i in T.unroll(FORESEEN):
                # What the products' sums begin with. A query without keys gets -inf, with which its
                # probabilities vanish; another one's must be finite, so that a masked score plus it is -inf,
                # not NaN.
                if lse[i] == T.float32(-INF):
                    delta[i] = T.float32(0)
                else:
                    lse[i] = T.float32(0) - lse[i] / scale
                    delta[i] = dlse[i] - delta[i]
                    if lse[i] == T.float32(INF):
                        lse[i] = T.float32(-LOWEST)
                t.stats[b, h, query[i] // 2, query[i] % 2] = lse[i]
                t.stats[b, h, query[i] // 2, query[i] % 2 + 2] = delta[i]
                if query[i] == t.queries - 1:
                    if t.queries % 2 == 1:
                        t.stats[b, h, query[i] // 2, 1] = T.float32(-INF)
                        t.stats[b, h, query[i] // 2, 3] = T.float32(0)

    return run


def item_blocks(t: SimpleNamespace) -> Any:
    """Items of a query head and a warpgroup's columns."""
    return (here(t.queries) + (ITEM_ROWS - 1)) // ITEM_ROWS


def clear_items(t: SimpleNamespace, together: int, warpgroups: int) -> Any:
    """Items of the heads that the first kernel does not clear."""
    pairs = T.max(here(t.batches) * t.kv_heads - together, 0)
    return pairs * t.group * warpgroups * item_blocks(t)


def sums_of(t: SimpleNamespace, head: Any, w: Any, row: Any, warpgroups: int, span: int) -> Any:
    """Global address of the sums of a row, in a warpgroup's columns; ``head`` counts b * Hq + h."""
    of_head = T.Cast("int64", head * warpgroups + w) * T.Cast("int64", t.queries)
    return T.reinterpret("uint64", t.dq_sum.data) + T.Cast(
        "uint64", of_head + T.Cast("int64", row)
    ) * T.uint64(span * 4)


@T.inline
def store_sums(plan, at, lane, t, span):
    # The storing warp: adds each chunk's dQ to the sums in global memory, of the queries that meet the tile
    # in its band. A chunk may hold others, even of other documents.
    cleared: T.int32 = 0
    stage: T.int32 = 0
    phase: T.int32 = 0
    tile_phase: T.int32 = 0
    left: T.int32 = 0
    row: T.int32 = 0
    first: T.int32 = 0
    count: T.int32 = 0
    head: T.int32 = 0
    storing: T.int32 = 1
    warpgroups = T.meta_var(plan.warpgroups)
    sum_bytes = T.meta_var(plan.chunk_rows * span * 4)
    for w in T.unroll(warpgroups):
        T.ptx.bar.arrive(T.uint32(SUM_EMPTY + w), T.uint32(WITH_STORING_WARP))
    while storing == 1:
        T.cuda.mbarrier_wait(at("tile_full"), tile_phase)
        tile_phase = tile_phase ^ 1
        left = load_shared(at("tile") + T.uint32(TILE_COUNTS_AT + 4 * warpgroups))
        if load_shared(at("tile")) < 0:
            storing = 0
        else:
            head = load_shared(at("tile") + T.uint32(12))
            if T.And(
                cleared == 0, head % t.kv_heads * t.batches + T.truncdiv(head, t.kv_heads) >= plan.together
            ):
                wait_count(t.progress, CLEARED, clear_items(t, plan.together, warpgroups))
                # The zeros were ordinary stores, what follows adds through the asynchronous proxy.
                T.ptx.fence.proxy.async_()
                cleared = 1
            while left > 0:
                for w in T.unroll(warpgroups):
                    T.ptx.bar.sync(T.uint32(SUM_FULL + w), T.uint32(WITH_STORING_WARP))
                    if w == 0:
                        row = load_shared(at("info", stage, INFO_BYTES))
                        first = load_shared(at("met", stage, MET_BYTES))
                        count = load_shared(at("met", stage, MET_BYTES) + T.uint32(4)) - first
                        head = load_shared(at("info", stage, INFO_BYTES) + T.uint32(12))
                        T.cuda.warp_sync()
                        if lane == 0:
                            arrive(at("empty", stage, BARRIER_BYTES))
                    if lane == 0:
                        T.ptx[REDUCE](
                            sums_of(t, head, w, first, warpgroups, span),
                            at("sum", w, sum_bytes) + T.Cast("uint32", (first - row) * (span * 4)),
                            T.Cast("uint32", count * (span * 4)),
                        )  # fmt: skip
                        T.ptx["cp.async.bulk.commit_group"]()
                for w in T.unroll(warpgroups):
                    if lane == 0:
                        T.ptx["cp.async.bulk.wait_group.read"](warpgroups - 1 - w)
                    T.cuda.warp_sync()
                    T.ptx.bar.arrive(T.uint32(SUM_EMPTY + w), T.uint32(WITH_STORING_WARP))
                advance(stage, phase, plan.stages)
                left = left - 1
            if lane == 0:
                head = load_shared(at("tile") + T.uint32(12))
                row = load_shared(at("tile"))
                count = T.min(load_shared(at("tile") + T.uint32(8)) - row, plan.rows)
                arrive(at("tile_empty"))
                T.ptx["cp.async.bulk.wait_group"](0)
                add_release(t.progress, ROWS_DONE + head, count)


@T.inline
def draw_item(t, counter, lane, item):
    T.ptx["atom.global.add.s32"](item[0], T.address_of(t.progress[counter]), T.if_then_else(lane == 0, 1, 0))
    item[0] = T.tvm_warp_shuffle(ALL_LANES, item[0], 0, 32, 32)


@T.inline
def locate_item(t, item, warpgroups, first_pair, b, h, w, row):
    # A pair of batch row and key head has the rows of its query heads, apart for each warpgroup's columns.
    blocks: T.int32 = item_blocks(t)
    segment: T.int32 = T.truncdiv(item, blocks)
    row = (item - segment * blocks) * ITEM_ROWS
    pair: T.int32 = T.truncdiv(segment, t.group * warpgroups)
    segment = segment - pair * (t.group * warpgroups)
    pair = pair + first_pair
    h = T.truncdiv(pair, t.batches)
    b = pair - h * t.batches
    h = h * t.group + segment // warpgroups
    w = segment % warpgroups


@T.inline
def clear_sums(t, lane, together, warpgroups, span):
    # The sums of all heads but the first pack's, which the first kernel cleared.
    item = T.alloc_local((1,), "int32")
    items: T.int32 = clear_items(t, together, warpgroups)
    b: T.int32 = 0
    h: T.int32 = 0
    w: T.int32 = 0
    row: T.int32 = 0
    draw_item(t, TO_CLEAR, lane, item)
    while item[0] < items:
        locate_item(t, item[0], warpgroups, together, b, h, w, row)
        piece: T.int32 = lane
        pieces: T.int32 = T.min(t.queries - row, ITEM_ROWS) * (span // 4)
        start: T.uint64 = sums_of(t, b * t.query_heads + h, w, row, warpgroups, span)
        while piece < pieces:
            T.ptx["st.global.v4.f32"](
                start + T.Cast("uint64", piece * 16), T.float32(0), T.float32(0), T.float32(0), T.float32(0)
            )
            piece = piece + 32
        T.cuda.warp_sync()
        if lane == 0:
            add_release(t.progress, CLEARED, 1)
        draw_item(t, TO_CLEAR, lane, item)


@T.inline
def convert_sums(t, lane, scale, together, warpgroups, span, convert_instruction, ahead):
    # dQ from its sums, `ahead` times a warp's 1 KB in flight. Of 16 columns a lane has two times 2t, 2t + 1,
    # 2t + 8 and 2t + 9, for t and t + 1.
    lanes = T.meta_var(span // 8)  # of a row
    step = T.meta_var(32 // lanes)  # rows
    item = T.alloc_local((1,), "int32")
    sums = T.alloc_local((8 * ahead,), "float32")
    words = T.alloc_local((4,), "uint32")
    b: T.int32 = 0
    h: T.int32 = 0
    w: T.int32 = 0
    row: T.int32 = 0
    draw_item(t, TO_CONVERT, lane, item)
    while item[0] < t.batches * t.query_heads * warpgroups * item_blocks(t):
        own: T.int32 = here(lane)
        locate_item(t, item[0], warpgroups, 0, b, h, w, row)
        if lane == 0:
            keys: T.int32 = t.keys
            if t.ranges > 0:
                keys = T.max(
                    t.key_ranges[T.min(b, t.ranges - 1), 1] - t.key_ranges[T.min(b, t.ranges - 1), 0], 0
                )
            if keys == 0:
                # No tile has waited for the zeros.
                wait_count(t.progress, CLEARED, clear_items(t, together, warpgroups))
            wait_count(t.progress, ROWS_DONE + b * t.kv_heads + T.truncdiv(h, t.group), keys)
        T.cuda.warp_sync()
        source: T.uint64 = sums_of(t, b * t.query_heads + h, w, row, warpgroups, span) + T.Cast(
            "uint64", own * 32
        )
        row = row + own // lanes
        target: T.uint64 = element(
            t.dq, b, h, row, w * span + (own % lanes // 2 ^ (row % 2)) * 16 + own % 2 * 4
        )
        left: T.int32 = T.min(t.queries - row, ITEM_ROWS - own // lanes)
        while left > 0:
            for i in T.unroll(ahead):
                for half in T.unroll(2):
                    if i * step < left:
                        T.ptx["ld.global.cg.v4.f32"](
                            sums[8 * i + 4 * half], sums[8 * i + 4 * half + 1],
                            sums[8 * i + 4 * half + 2], sums[8 * i + 4 * half + 3],
                            source + T.uint64(1024 * i + 16 * half),
                        )  # fmt: skip
            for i in T.unroll(ahead):
                if i * step < left:
                    for half in T.unroll(2):
                        for j in T.unroll(2):
                            T.ptx[convert_instruction](
                                words[2 * j + half],
                                sums[8 * i + 4 * half + 2 * j + 1] * scale,
                                sums[8 * i + 4 * half + 2 * j] * scale,
                            )
                    T.ptx["st.global.v2.u32"](target, words[0], words[1])
                    T.ptx["st.global.v2.u32"](target + T.uint64(16), words[2], words[3])
                target = target + T.Cast("uint64", t.dq.strides[2] * (2 * step))
            source = source + T.uint64(1024 * ahead)
            left = left - step * ahead
        T.cuda.warp_sync()
        draw_item(t, TO_CONVERT, lane, item)


def gradient_pass(decisions: Mapping[str, int], head_dim: int, dtype: str) -> Callable[..., None]:
    """The second kernel's body: tiles of keys, chunks of queries. Scores are transposed (keys in rows), so
    that P and dS leave the accumulators in the layout that the products with dO and Q take from registers.
    """
    D = head_dim
    ROW = SWIZZLE_ROW_BYTES
    W = decisions["dkv_warpgroups"]
    ROWS = WARPGROUP_ROWS * W
    CHUNK = ONE_PASS_QUERIES
    STAGES = decisions["dkv_stages"]
    OFFSETS, BYTES = one_pass_arena(decisions, D)
    # Columns of dQ that a warpgroup sums, and the bytes from those of one to those of the next in K.
    SPAN = D // W
    SLICE = SPAN * 2 if SPAN < PLANE else SPAN // PLANE * ROWS * ROW
    SCORE, OUTPUT, SUM, CONVERT = wgmma(CHUNK, dtype), wgmma(D, dtype), wgmma(SPAN, dtype), convert(dtype)
    PLAN = key_plan(decisions, D, CHUNK, 1, shared=True, chunk_others=1, tile_others=1, late=True)

    @T.inline
    def consume(at, warp, lane, t, scale):
        w: T.int32 = warp // 4 - 1
        my_row: T.int32 = w * WARPGROUP_ROWS + warp % 4 * 16 + lane // 4
        own_rows: T.uint32 = T.Cast("uint32", w * (WARPGROUP_ROWS * ROW))
        stats_lane: T.uint32 = T.Cast("uint32", lane % 4 * 16)
        s_acc = T.alloc_local((CHUNK // 2,), "float32")
        p_acc = T.alloc_local((CHUNK // 2,), "float32")
        own_acc = T.alloc_local((SPAN // 2,), "float32")
        sum_acc = T.meta_var(own_acc if D == 64 else s_acc)
        k_acc = T.alloc_local((D // 2,), "float32")
        v_acc = T.alloc_local((D // 2,), "float32")
        ps = T.alloc_local((CHUNK // 4,), "uint32")
        ds = T.alloc_local((CHUNK // 4,), "uint32")
        chunk = T.alloc_local((4,), "int32")
        tile = T.alloc_local((4,), "int32")
        steps = T.alloc_local((1,), "int32")
        # Where stmatrix puts this lane's row of dS: a query, this warpgroup's 64 keys of it, swizzled by the
        # query.
        frag_at: T.uint32 = at("ds", w * CHUNK + lane // 16 * 8 + lane % 8, ROW) + T.Cast(
            "uint32", ((warp % 4 * 2 + lane // 8 % 2) ^ lane % 8) * 16
        )
        stage: T.int32 = 0
        phase: T.int32 = 0
        tile_phase: T.int32 = 0
        prev: T.int32 = 0
        left: T.int32 = 0
        flip: T.uint32 = T.uint32(0)
        running: T.int32 = 1
        scale2: T.float32 = scale * T.float32(LOG2E)

        # What is subtracted from a product is what its sum begins with: -lse / scale of scores, -delta of dP.
        @T.inline
        def preset():
            for n in T.unroll(CHUNK // 8):
                T.ptx["ld.shared.v4.f32"](
                    s_acc[4 * n], s_acc[4 * n + 1], p_acc[4 * n], p_acc[4 * n + 1],
                    at("stats", stage, CHUNK * 8) + stats_lane + T.uint32(64 * n),
                )  # fmt: skip
            for n in T.unroll(CHUNK // 8):
                for j in T.unroll(2):
                    s_acc[4 * n + 2 + j] = s_acc[4 * n + j]
                    p_acc[4 * n + 2 + j] = p_acc[4 * n + j]

        # scores^T += K Q^T or dP^T += V dO^T of this warpgroup's keys.
        @T.inline
        def issue_product(out, kept, streamed):
            issue_left_shared(
                SCORE, out, CHUNK // 2, D, at(kept) + own_rows, ROWS,
                at(streamed, stage, PLAN.chunk_bytes), CHUNK, True,
            )  # fmt: skip

        # dQ = dS K: all keys of the tile, this warpgroup's columns.
        @T.inline
        def issue_queries():
            left_at: T.uint64 = matrix(K_MAJOR, at("ds") + flip)
            right_at: T.uint64 = matrix(descriptor(ROWS * ROW), at("k") + T.Cast("uint32", w * SLICE))
            T.ptx.wgmma.fence.sync.aligned()
            for step in T.unroll(ROWS // 16):
                T.ptx[SUM](
                    *[sum_acc[i] for i in range(SPAN // 2)],
                    left_at + k_step(CHUNK, step), right_at + row_step(step), T.bool(step > 0), 1, 1, 0, 1,
                )  # fmt: skip
            T.ptx.wgmma.commit_group.sync.aligned()

        # To the storing warp. In groups of 16 columns a lane has 2 and 2 of, which stand side by side in the
        # sums; the groups of odd queries are swapped in pairs, for the banks.
        @T.inline
        def hand_over_sum():
            T.ptx.bar.sync(T.Cast("uint32", SUM_EMPTY + w), T.uint32(WITH_STORING_WARP))
            odd: T.int32 = lane // 4 % 2
            sum_row: T.uint32 = at("sum", w, CHUNK * SPAN * 4) + T.Cast(
                "uint32", (warp % 4 * 16 + lane // 4) * (SPAN * 4) + odd * 64 + lane % 4 * 16
            )
            sum_other: T.uint32 = sum_row - T.Cast("uint32", odd * 128)
            for j in T.unroll(2):
                for m in T.unroll(SPAN // 16):
                    T.ptx["st.shared.v4.f32"](
                        (sum_row if m % 2 == 0 else sum_other) + T.uint32(j * 8 * SPAN * 4 + m * 64),
                        sum_acc[8 * m + 2 * j], sum_acc[8 * m + 2 * j + 1],
                        sum_acc[8 * m + 4 + 2 * j], sum_acc[8 * m + 5 + 2 * j],
                    )  # fmt: skip
            T.ptx.fence.proxy.async_.shared__cta()
            T.ptx.bar.arrive(T.Cast("uint32", SUM_FULL + w), T.uint32(WITH_STORING_WARP))

        @T.inline
        def begin_chunk():
            T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
            preset()
            issue_product(s_acc, "k", "q")

        # dP runs under the exponentials, dV under dS.
        @T.inline
        def score_gradients():
            T.ptx["ld.shared.v4.s32"](chunk[0], chunk[1], chunk[2], chunk[3], at("info", stage, INFO_BYTES))
            issue_product(p_acc, "v", "do")
            T.ptx.wgmma.wait_group.sync.aligned(1)
            hold(s_acc, CHUNK // 2)
            mask_queries(s_acc, CHUNK, lane, chunk, tile, w * WARPGROUP_ROWS, my_row)
            for n in T.unroll(CHUNK // 8):
                for j in T.unroll(4):
                    T.ptx["ex2.approx.ftz.f32"](s_acc[4 * n + j], s_acc[4 * n + j] * scale2)
                for j in T.unroll(2):
                    T.ptx[CONVERT](ps[2 * n + j], s_acc[4 * n + 2 * j + 1], s_acc[4 * n + 2 * j])
            issue_sum(OUTPUT, v_acc, D // 2, ps, at("do", stage, PLAN.chunk_bytes), CHUNK)
            T.ptx.wgmma.wait_group.sync.aligned(1)
            hold(p_acc, CHUNK // 2)
            for n in T.unroll(CHUNK // 8):
                for j in T.unroll(2):
                    T.ptx[CONVERT](
                        ds[2 * n + j],
                        s_acc[4 * n + 2 * j + 1] * p_acc[4 * n + 2 * j + 1],
                        s_acc[4 * n + 2 * j] * p_acc[4 * n + 2 * j],
                    )
                if n % 2 == 1:
                    T.ptx["stmatrix.sync.aligned.m8n8.x4.trans.shared.b16"](
                        frag_at + flip + T.uint32((n - 1) * 8 * ROW),
                        ds[2 * n - 2], ds[2 * n - 1], ds[2 * n], ds[2 * n + 1],
                    )  # fmt: skip
            T.ptx.fence.proxy.async_.shared__cta()
            T.ptx.wgmma.wait_group.sync.aligned(0)
            hold(v_acc, D // 2)
            prev = stage

        # Both warpgroups have written dS. Two buffers of it make a second barrier needless. Only numbers
        # watch over this one: without it dQ was wrong and racecheck silent, for it knows nothing of what
        # wgmma reads.
        @T.inline
        def begin_sums():
            T.ptx.bar.sync(T.uint32(EXCHANGE), T.uint32(128 * W))
            issue_queries()
            issue_sum(OUTPUT, k_acc, D // 2, ds, at("q", prev, PLAN.chunk_bytes), CHUNK)
            flip = flip ^ T.uint32(ROWS * CHUNK * 2)
            advance(stage, phase, STAGES)
            T.ptx.wgmma.wait_group.sync.aligned(1)
            hold(sum_acc, SPAN // 2)
            hand_over_sum()

        @T.inline
        def end_sums(pending):
            T.ptx.wgmma.wait_group.sync.aligned(pending)
            hold(k_acc, D // 2)
            arrive(at("empty", prev, BARRIER_BYTES))

        @T.inline
        def run_chunks():
            begin_chunk()
            score_gradients()
            left = left - 1
            while left > 0:
                begin_sums()
                begin_chunk()
                end_sums(1)
                score_gradients()
                left = left - 1
            begin_sums()
            end_sums(0)

        while running == 1:
            T.cuda.mbarrier_wait(at("tile_full"), tile_phase)
            tile_phase = tile_phase ^ 1
            T.ptx["ld.shared.v4.s32"](tile[0], tile[1], tile[2], tile[3], at("tile"))
            T.ptx["ld.shared.s32"](steps[0], at("tile") + T.uint32(TILE_COUNTS_AT + 4 * W))
            left = steps[0]
            if tile[0] < 0:
                running = 0
            else:
                for i in T.unroll(D // 2):
                    k_acc[i] = T.float32(0)
                    v_acc[i] = T.float32(0)
                if left > 0:
                    run_chunks()
                T.cuda.warp_sync()
                arrive(at("tile_empty"))
                store_gradients(t, tile, my_row, D, k_acc, v_acc, scale, CONVERT, lane)

    @T.inline
    def run(t, maps, together, scale, workers):
        block = T.cta_id([workers])
        warp = T.warp_id([4 * (W + 1)])
        thread = T.thread_id([128 * (W + 1)])
        arena = T.alloc_buffer((BYTES,), "uint8", scope="shared.dyn", align=1024)
        base: T.uint32 = T.cuda.cvta_generic_to_shared(arena.data)
        at = T.meta_var(partial(address, base, OFFSETS))
        lane: T.int32 = thread % 32
        if thread == 0:
            init_rings(PLAN, at)
        T.ptx.griddepcontrol.wait()
        T.cuda.cta_sync()
        plan = T.meta_var(replace(PLAN, together=together))
        if warp < 4:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](decisions["dkv_producer_registers"])
            produce_for_keys(plan, at, warp, lane, t, maps, block, workers, lambda b, h: None)
            if warp == STORING_WARP:
                store_sums(plan, at, lane, t, SPAN)
            if warp == CONVERTING_WARP:
                clear_sums(t, lane, together, W, SPAN)
                convert_sums(t, lane, scale, together, W, SPAN, CONVERT, 1)
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](decisions["dkv_registers"])
            consume(at, warp, lane, t, scale)
            convert_sums(t, lane, scale, together, W, SPAN, CONVERT, 4)

    return run


def pack_pairs(most: int, group: Any, slots: Any) -> Any:
    """Pairs of batch row and key head in a pack: at most ``most``, with as many query heads, or with up to
    twice as many where their tiles, ``slots`` each, would be fewer than multiprocessors.

    The sums of the first pack's query heads are cleared before the products, those of the last one's
    converted after them, and those of a pack are in the L2 cache together. With packs of 8 key heads and with
    2, ms on an H100 in one run (bfloat16) at (1, 32/8, 8192, 128): spattention 0.533 and 0.508, causal 2.48
    and 2.27; with 2 and with 1 (H200, statistics between tiles) 0.441 and 0.497, 2.34 and 2.78. With twice as
    many query heads everywhere and as now, on an H200: 0.963 and 0.921 at (1, 16/4, 16384, 128), 0.938 and
    0.924 at (1, 16/8, 16384, 128), 3.931 and 3.918 at (1, 32/8, 32768, 128), 12.93 and 12.68 at (1, 16/4,
    65536, 128); causal 4.53 and 4.61 (the least 4.11 and 4.11) at the first, 36.55 and 36.52 at the third.
    """
    twice = T.max(2 * most // group, 1)
    return T.min(most, T.min(T.max(most // group, (PACK_TILES + slots - 1) // slots), twice))


def build_one_pass(decisions: Mapping[str, int], head_dim: int, dtype: str) -> tvm.IRModule:
    """The backward in one pass, as :func:`.backward.build_hopper_backward` describes and checks it."""
    ROWS = WARPGROUP_ROWS * decisions["dkv_warpgroups"]
    TOGETHER = decisions["dkv_heads"]
    prepare = statistics_pass(head_dim, dtype)
    compute = gradient_pass(decisions, head_dim, dtype)

    @T.prim_func
    def backward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o: T.handle,
        lse: T.handle,
        do: T.handle,
        dlse: T.handle,
        bands: T.handle,
        cu_seqlens: T.handle,
        cu_seqlens_k: T.handle,
        key_ranges: T.handle,
        dq: T.handle,
        dk: T.handle,
        dv: T.handle,
        stats: T.handle,
        next_tile: T.handle,
        dq_sum: T.handle,
        progress: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        t = T.meta_var(
            match_tensors(
                dtype, head_dim, q=q, k=k, v=v, o=o, lse=lse, do=do, dlse=dlse, bands=bands,
                cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, key_ranges=key_ranges, dq=dq, dk=dk, dv=dv,
                stats=stats, next_tile=next_tile, dq_sum=dq_sum, progress=progress,
            )
        )  # fmt: skip
        together = T.meta_var(
            named("together", T.Bind(pack_pairs(TOGETHER, t.group, tile_slots(t.keys, t.documents, ROWS))))
        )
        maps = T.meta_var(key_pass_maps(t, ROWS, ONE_PASS_QUERIES))
        with T.attr({"tirx.device_entry": True}):
            prepare(t, together, scale)
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            compute(t, maps, together, scale, workers)

    return tvm.IRModule({"backward": backward})
