"""A step of decoding for CPUs: a few queries to the keys of a cache, which are read once.

A step is bound by memory, so what counts is that only the keys in the bands are read, each row of keys and
values once for all queries of all query heads that share it, and that all workers read. Of a batch row and a
key/value head the keys are the union of the bands of its query heads, walked run by run; they are divided
into equal parts, which are combined afterwards where there are several.

The vector lanes are dimensions of the head. ``lanes`` keys at a time are multiplied with a query, one vector
of partial sums for each, and those vectors are added up crosswise, two to one, until one is left that holds
the scores of all ``lanes`` keys: 3 operations a key, where adding up one vector after the other takes 16.
"""

import math

from tvm import IRModule
from tvm.script import tirx as T

from spattn_tvm.bands import LIMIT
from spattn_tvm.domains.key_range import in_band, key_range

from .exponential import LN2, exp
from .forward import LOWEST
from .register_tile import REGISTERS, rows_of, widen

# Behind every position.
NOWHERE = 2**31 - 1


def value_columns(head_dim: int, lanes: int) -> int:
    """Columns of the output that stay in registers over a tile of keys: at most eight vectors."""
    return max(w for w in range(lanes, min(head_dim, 8 * lanes) + 1, lanes) if head_dim % w == 0)


def _halves(tile, row, lanes, block, offset):
    """Of each block of a row and of the row ``block // 2`` further on, by turns, a half."""
    pair = [tile[row, T.Ramp(0, 1, lanes)], tile[row + block // 2, T.Ramp(0, 1, lanes)]]
    return T.Shuffle(
        pair,
        [
            source * lanes + place + offset + lane
            for place in range(0, lanes, block)
            for source in range(2)
            for lane in range(block // 2)
        ],
    )


@T.inline
def add_halves(tile, lanes, block):
    """From ``block`` rows, of which each has a block of so many lanes for some rows of the beginning, to half
    as many: the sums of the blocks' halves.
    """
    if block <= lanes:
        for u in T.unroll(block // 2):
            tile[u, T.Ramp(0, 1, lanes)] = _halves(tile, u, lanes, block, 0) + _halves(
                tile, u, lanes, block, block // 2
            )


@T.inline
def sum_rows(tile, lanes):
    """The sums of the ``lanes`` rows of a square tile, in its first row."""
    add_halves(tile, lanes, 16)
    add_halves(tile, lanes, 8)
    add_halves(tile, lanes, 4)
    add_halves(tile, lanes, 2)


# Places of what a worker keeps of its part, and of what it knows of all.
BATCH, HEAD, BEGIN, END, FIRST, POSITION, LEFT, RUN_BEGIN, RUN_END, COUNT, BLOCK, ROW = range(12)
GROUP, PARTS = range(12, 14)


def _keys_of_band(place, bands, group, t):
    head, side = place[HEAD] * group + t // 2, t % 2 * 2
    keys = key_range(
        place[FIRST], place[END] - 1, bands[0, head, side], bands[0, head, side + 1], place[BEGIN]
    )
    return keys[0], T.min(place[END], keys[1])


@T.inline
def find_run(place, bands, group):
    """The keys from POSITION on that some head of the group attends to without a gap, as one band has them;
    RUN_BEGIN is NOWHERE behind the last one.
    """
    place[RUN_BEGIN] = NOWHERE
    for t in T.serial(2 * group):
        keys = T.meta_var(_keys_of_band(place, bands, group, t))
        if (keys[0] < keys[1]) & (keys[1] > place[POSITION]):
            place[RUN_BEGIN] = T.min(place[RUN_BEGIN], T.max(keys[0], place[POSITION]))
    place[RUN_END] = place[RUN_BEGIN]
    for t in T.serial(2 * group):
        keys = T.meta_var(_keys_of_band(place, bands, group, t))
        if keys[0] <= place[RUN_BEGIN]:
            place[RUN_END] = T.max(place[RUN_END], keys[1])


@T.inline
def write_row(o, lse, partial_o, partial_sums, sums, batch, head, query, part, row, dim, lanes, dtype):
    """The result of a query from the sums of all its keys; 0 and -inf if it has none."""
    sums[1] = partial_sums[part, row, 1]
    sums[0] = T.float32(1) / sums[1]
    for chunk in T.serial(dim // lanes):
        for lane in T.vectorized(lanes):
            o[batch, head, query, chunk * lanes + lane] = T.Select(
                sums[1] == T.float32(0),
                T.cast(0, dtype),
                T.cast(partial_o[part, row, chunk * lanes + lane] * sums[0], dtype),
            )
    lse[batch, head, query] = partial_sums[part, row, 0] + T.log2(sums[1]) * T.float32(LN2)


def build_cpu_decode(decisions, head_dim: int, dtype: str) -> IRModule:
    """The decode kernel as TensorIR.

    Parameters
    ----------
    decisions : Mapping[str, int]
        ``lanes`` (of a vector, and keys that are multiplied together; a power of two that divides
        ``head_dim``), ``key_rows`` (keys of a tile, between two rescalings; a multiple of ``lanes``),
        ``stage`` (1: copy keys and values of a tile to float32 scratch first), ``parts`` (at least so many
        for each worker, or one for each batch row and key/value head).
    head_dim : int
        D.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"`` of q, k, v and o; sums are float32.

    Returns
    -------
    tvm.IRModule
        With one function ``decode(q, k, v, bands, cache_lengths, cache_starts, block_table, ring, o, lse,
        partial_o, partial_sums, scale, workers)``: q, o (B, Hq, Nq, D), any strides with a contiguous last
        dimension, as k and v; the others as :class:`spattn_tvm.launch.CacheDomain` says; lse float32 (B, Hq,
        Nq), natural logarithm; partial_o and partial_sums float32 as the ABI says.
    """
    L = decisions["lanes"]
    KR = decisions["key_rows"]
    stage = bool(decisions["stage"])
    parts_a_worker = decisions["parts"]
    D = head_dim
    W = value_columns(D, L)
    SR = KR if stage else 1

    @T.prim_func(s_tir=True)
    def decode(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        bands_handle: T.handle,
        cache_lengths_handle: T.handle,
        cache_starts_handle: T.handle,
        block_table_handle: T.handle,
        ring_handle: T.handle,
        o_handle: T.handle,
        lse_handle: T.handle,
        partial_o_handle: T.handle,
        partial_sums_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "decode", "tirx.noalias": True})
        B, HQ, N, KB, KH, KN = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        PAGES, RINGS, PARTIALS, ROWS = T.int64(), T.int64(), T.int64(), T.int64()
        qb, qh, qn = T.int64(), T.int64(), T.int64()
        kb, kh, kn = T.int64(), T.int64(), T.int64()
        vb, vh, vn = T.int64(), T.int64(), T.int64()
        ob, oh, on = T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_handle, (B, HQ, N, D), dtype, strides=(qb, qh, qn, 1), align=2, offset_factor=1)
        k = T.match_buffer(
            k_handle, (KB, KH, KN, D), dtype, strides=(kb, kh, kn, 1), align=2, offset_factor=1
        )
        v = T.match_buffer(
            v_handle, (KB, KH, KN, D), dtype, strides=(vb, vh, vn, 1), align=2, offset_factor=1
        )
        bands = T.match_buffer(bands_handle, (1, HQ, 4), "int32", align=4)
        cache_lengths = T.match_buffer(cache_lengths_handle, (B,), "int32", align=4)
        cache_starts = T.match_buffer(cache_starts_handle, (B,), "int32", align=4)
        block_table = T.match_buffer(block_table_handle, (B, PAGES), "int32", align=4)
        ring = T.match_buffer(ring_handle, (RINGS, 2), "int32", align=4)
        o = T.match_buffer(o_handle, (B, HQ, N, D), dtype, strides=(ob, oh, on, 1), align=2, offset_factor=1)
        lse = T.match_buffer(lse_handle, (B, HQ, N), "float32", align=4)
        partial_o = T.match_buffer(partial_o_handle, (PARTIALS, ROWS, D), "float32", align=4)
        partial_sums = T.match_buffer(partial_sums_handle, (PARTIALS, ROWS, 2), "float32", align=4)
        queries: T.let[T.int32] = T.cast(N, "int32")
        kv_heads: T.let[T.int32] = T.cast(T.Select(RINGS > 0, RINGS, KH), "int32")
        heads_a_share: T.let[T.int32] = T.cast(HQ, "int32") // kv_heads
        shares: T.let[T.int32] = T.cast(B, "int32") * kv_heads
        parts_a_share: T.let[T.int32] = (parts_a_worker * workers + shares - 1) // shares
        for worker in T.parallel(workers):
            key_scratch = T.alloc_buffer((SR, D), "float32")
            value_scratch = T.alloc_buffer((SR, D), "float32")
            query = T.alloc_buffer((D,), "float32", annotations=REGISTERS)
            products = T.alloc_buffer((L, L), "float32", annotations=REGISTERS)
            scores = T.alloc_buffer((KR,), "float32", annotations=REGISTERS)
            lane_max = T.alloc_buffer((L,), "float32", annotations=REGISTERS)
            lane_sum = T.alloc_buffer((L,), "float32", annotations=REGISTERS)
            columns = T.alloc_buffer((W,), "float32", annotations=REGISTERS)
            sums = T.alloc_buffer((2,), "float32", annotations=REGISTERS)
            # Read back from a buffer, a value is opaque to TVM's simplifier, as in forward: compiling takes
            # 1.0 s instead of 5.6.
            place = T.alloc_buffer((14,), "int32", annotations=REGISTERS)
            place[GROUP] = heads_a_share
            place[PARTS] = parts_a_share
            group: T.let[T.int32] = place[GROUP]
            parts: T.let[T.int32] = place[PARTS]
            for turn in T.serial((parts * shares - worker + workers - 1) // workers):
                part: T.let[T.int32] = turn * workers + worker
                place[BATCH] = part // parts // kv_heads
                place[HEAD] = part // parts % kv_heads
                b: T.let[T.int32] = place[BATCH]
                g: T.let[T.int32] = place[HEAD]
                held: T.let[T.int64] = T.Select(
                    RINGS > 0, T.int64(LIMIT), T.Select(PAGES > 0, PAGES * KN, KN)
                )
                place[BEGIN] = T.max(0, cache_starts[b])
                place[END] = T.max(0, T.min(cache_lengths[b], T.cast(T.min(held, T.int64(LIMIT)), "int32")))
                place[FIRST] = place[END] - queries
                for row in T.serial(group * queries):
                    partial_sums[part, row, 0] = T.float32(LOWEST)
                    partial_sums[part, row, 1] = T.float32(0)
                    for chunk in T.serial(D // L):
                        for lane in T.vectorized(L):
                            partial_o[part, row, chunk * L + lane] = T.float32(0)

                # This part's keys among those of all runs.
                place[LEFT] = 0
                place[POSITION] = 0
                while place[POSITION] < NOWHERE:
                    find_run(place, bands, group)
                    place[LEFT] = place[LEFT] + (place[RUN_END] - place[RUN_BEGIN])
                    place[POSITION] = place[RUN_END]
                share: T.let[T.int32] = (place[LEFT] + parts - 1) // parts
                place[COUNT] = T.min(part % parts * share, place[LEFT])
                place[LEFT] = T.min(share, place[LEFT] - place[COUNT])
                place[POSITION] = 0
                while place[COUNT] > 0:
                    find_run(place, bands, group)
                    place[POSITION] = T.min(place[RUN_END], place[RUN_BEGIN] + place[COUNT])
                    place[COUNT] = place[COUNT] - (place[POSITION] - place[RUN_BEGIN])

                while place[LEFT] > 0:
                    find_run(place, bands, group)
                    key: T.let[T.int32] = place[RUN_BEGIN]
                    place[COUNT] = T.min(T.min(place[RUN_END] - key, place[LEFT]), KR)
                    place[BLOCK] = b
                    place[ROW] = key
                    if PAGES > 0:
                        place[ROW] = key % T.cast(KN, "int32")
                        place[BLOCK] = T.max(
                            0, T.min(block_table[b, key // T.cast(KN, "int32")], T.cast(KB, "int32") - 1)
                        )
                    if RINGS > 0:
                        capacity: T.let[T.int32] = T.max(1, ring[g, 1])
                        place[COUNT] = T.min(place[COUNT], capacity - key % capacity)
                        # Of any numbers, whose sum may not fit into 32 bits.
                        around: T.let[T.int64] = T.cast(ring[g, 0], "int64") + T.cast(key % capacity, "int64")
                        place[ROW] = T.cast(T.max(T.int64(0), T.min(around, KN - T.int64(1))), "int32")
                    place[COUNT] = T.min(place[COUNT], T.cast(KN, "int32") - place[ROW])
                    place[POSITION] = key + place[COUNT]
                    place[LEFT] = place[LEFT] - place[COUNT]
                    count: T.let[T.int32] = place[COUNT]
                    block: T.let[T.int32] = place[BLOCK]
                    kv_row: T.let[T.int32] = place[ROW]
                    kv_head: T.let[T.int32] = T.Select(RINGS > 0, 0, g)
                    if stage:
                        widen(key_scratch, count, D, L, lambda j, d: k[block, kv_head, kv_row + j, d])
                        widen(value_scratch, count, D, L, lambda j, d: v[block, kv_head, kv_row + j, d])
                    keys = key_scratch if stage else rows_of(k, block, kv_head, kv_row, KR)
                    values = value_scratch if stage else rows_of(v, block, kv_head, kv_row, KR)

                    for member in T.serial(group):
                        h: T.let[T.int32] = g * group + member
                        near_low: T.let[T.int32] = bands[0, h, 0]
                        near_high: T.let[T.int32] = bands[0, h, 1]
                        far_low: T.let[T.int32] = bands[0, h, 2]
                        far_high: T.let[T.int32] = bands[0, h, 3]
                        for r in T.serial(queries):
                            position: T.let[T.int32] = place[FIRST] + r
                            last: T.let[T.int32] = key + count - 1
                            if ((position - near_low >= key) & (position - near_high <= last)) | (
                                (position - far_low >= key) & (position - far_high <= last)
                            ):
                                row: T.let[T.int32] = member * queries + r
                                for chunk in T.serial(D // L):
                                    for lane in T.vectorized(L):
                                        query[chunk * L + lane] = (
                                            T.cast(q[b, h, r, chunk * L + lane], "float32") * scale
                                        )
                                for lane in T.vectorized(L):
                                    lane_max[lane] = T.float32(LOWEST)
                                for step in T.serial((count + L - 1) // L):
                                    for u in T.unroll(L):
                                        for lane in T.vectorized(L):
                                            products[u, lane] = T.float32(0)
                                    for chunk in T.serial(D // L):
                                        for u in T.unroll(L):
                                            for lane in T.vectorized(L):
                                                products[u, lane] = (
                                                    products[u, lane]
                                                    + query[chunk * L + lane]
                                                    * keys[T.min(step * L + u, count - 1), chunk * L + lane]
                                                )
                                    sum_rows(products, L)
                                    for lane in T.vectorized(L):
                                        scores[step * L + lane] = T.Select(
                                            (step * L + lane < count)
                                            & (
                                                in_band(position, key + step * L + lane, near_low, near_high)
                                                | in_band(position, key + step * L + lane, far_low, far_high)
                                            ),
                                            products[0, lane],
                                            T.float32(-math.inf),
                                        )
                                    for lane in T.vectorized(L):
                                        lane_max[lane] = T.max(lane_max[lane], scores[step * L + lane])

                                sums[0] = partial_sums[part, row, 0]
                                for lane in T.unroll(L):
                                    sums[0] = T.max(sums[0], lane_max[lane])
                                sums[1] = exp(partial_sums[part, row, 0] - sums[0])
                                for lane in T.vectorized(L):
                                    lane_sum[lane] = T.float32(0)
                                for step in T.serial((count + L - 1) // L):
                                    for lane in T.vectorized(L):
                                        scores[step * L + lane] = exp(scores[step * L + lane] - sums[0])
                                    for lane in T.vectorized(L):
                                        lane_sum[lane] = lane_sum[lane] + scores[step * L + lane]
                                for chunk in T.serial(D // W):
                                    for column in T.vectorized(W):
                                        columns[column] = partial_o[part, row, chunk * W + column] * sums[1]
                                    for j in T.serial(count):
                                        for column in T.vectorized(W):
                                            columns[column] = (
                                                columns[column] + scores[j] * values[j, chunk * W + column]
                                            )
                                    for column in T.vectorized(W):
                                        partial_o[part, row, chunk * W + column] = columns[column]
                                sums[1] = sums[1] * partial_sums[part, row, 1]
                                for lane in T.unroll(L):
                                    sums[1] = sums[1] + lane_sum[lane]
                                partial_sums[part, row, 0] = sums[0]
                                partial_sums[part, row, 1] = sums[1]

                if parts == 1:
                    for member in T.serial(group):
                        for r in T.serial(queries):
                            write_row(
                                o, lse, partial_o, partial_sums, sums, b, g * group + member, r, part,
                                member * queries + r, D, L, dtype,
                            )  # fmt: skip

        if parts_a_share > 1:
            for worker in T.parallel(workers):
                sums = T.alloc_buffer((2,), "float32", annotations=REGISTERS)
                place = T.alloc_buffer((2,), "int32", annotations=REGISTERS)
                place[0] = heads_a_share
                place[1] = parts_a_share
                group: T.let[T.int32] = place[0]
                parts: T.let[T.int32] = place[1]
                rows: T.let[T.int32] = shares * group * queries
                for turn in T.serial((rows - worker + workers - 1) // workers):
                    number: T.let[T.int32] = turn * workers + worker
                    share: T.let[T.int32] = number // (group * queries)
                    row: T.let[T.int32] = number % (group * queries)
                    first_part: T.let[T.int32] = share * parts
                    for other in T.serial(parts - 1):
                        part: T.let[T.int32] = first_part + 1 + other
                        sums[0] = T.max(partial_sums[first_part, row, 0], partial_sums[part, row, 0])
                        sums[1] = exp(partial_sums[part, row, 0] - sums[0])
                        sums[0] = exp(partial_sums[first_part, row, 0] - sums[0])
                        for chunk in T.serial(D // L):
                            for lane in T.vectorized(L):
                                partial_o[first_part, row, chunk * L + lane] = (
                                    partial_o[first_part, row, chunk * L + lane] * sums[0]
                                    + partial_o[part, row, chunk * L + lane] * sums[1]
                                )
                        partial_sums[first_part, row, 1] = (
                            partial_sums[first_part, row, 1] * sums[0] + partial_sums[part, row, 1] * sums[1]
                        )
                        partial_sums[first_part, row, 0] = T.max(
                            partial_sums[first_part, row, 0], partial_sums[part, row, 0]
                        )
                    write_row(
                        o, lse, partial_o, partial_sums, sums, share // kv_heads,
                        share % kv_heads * group + row // queries, row % queries, first_part, row,
                        D, L, dtype,
                    )  # fmt: skip

    return IRModule({"decode": decode})
