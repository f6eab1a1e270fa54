"""Banded attention backward for CPUs: one deterministic pass, five matrix products a tile.

Of a dk or dv no two threads ever add to the same row at the same time: a thread owns whole query heads, or
there are phases (:mod:`.segments`). So sums have one fixed order. For a tile of queries (vector lanes) and a
tile of keys:

    scores[j, :]         = sum_d K[j, d] * query[d, :]             lanes are queries
    dscores[j, :]        = P[j, :] * (sum_d V[j, d] * doutput[d, :] - delta)
    dquery[d, :]        += sum_j K[j, d] * dscores[j, :]
    dv[j, :]            += sum_i P[j, i] * dO[i, :]                lanes are head dimensions
    dk[j, :]            += sum_i dscores[j, i] * Q[i, :]

``delta = rowsum(dO * O) - dlse`` (D in FlashAttention-2, arXiv 2307.08691). The other known structure,
separate passes for dq and for dk and dv, needs seven products.
"""

import math

from tvm import IRModule
from tvm.script import tirx as T

from spattn_tvm.domains.key_range import crosses_edge, document_keys, has_key, in_band, key_range
from spattn_tvm.domains.tiles import first_slot, table_row, tile_slots

from .abi import splits_heads
from .exponential import exp
from .register_tile import REGISTERS, fill, multiply_add, rows_of, widen
from .rows import find_document, strided_rows
from .segments import diagonals, segment_rows

# Of the plan of a call: rows of a segment, segments of a head, phases of the far and of the near band.
SEGMENT, SLOTS, PHASES = 0, 1, 2
PLAN_WORDS = 4

# Where a worker is.
BATCH, HEAD, KV_HEAD, NUMBER, DOCUMENT, LAST_DOCUMENT, ROW, ROW_END, SHIFT, KEY, KEY_END = range(11)
FIRST_KEY, KEYS, TURN = range(11, 14)
PLACE_WORDS = 14


def build_cpu_backward(decisions, head_dim: int, dtype: str) -> IRModule:
    """The backward kernel as TensorIR.

    Parameters
    ----------
    decisions : Mapping[str, int]
        ``query_rows``, ``key_rows``, ``key_unroll``, ``dim_unroll``, ``stage`` as in the forward kernel;
        ``gradient_unroll`` and ``gradient_lanes`` (key rows and head dimensions of a register tile of dk and
        dv; ``gradient_lanes`` divides ``head_dim``, ``gradient_unroll`` divides ``key_rows``).
    head_dim : int
        D.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``; sums are float32.

    Returns
    -------
    tvm.IRModule
        With one function ``backward(q, k, v, o, lse, do, dlse, bands, cu_seqlens, cu_seqlens_k, key_ranges,
        dq, dk, dv, dq_sum, scale, workers)``: shapes of q, k, v, o, lse and of what says where rows lie as in
        the forward kernel; do, dq like q; dlse float32 (B, Hq, Nq); dk and dv contiguous float32
        (B, Hq, Nk, D): gradients of each *query* head, to be summed over the heads that share a key head;
        dq_sum float32 (B, Hq, Nq, D) where heads are divided among the workers and dtype is not float32,
        else of any B.
    """
    R = decisions["query_rows"]
    KR = decisions["key_rows"]
    JU = decisions["key_unroll"]
    DU = decisions["dim_unroll"]
    GU = decisions["gradient_unroll"]
    GL = decisions["gradient_lanes"]
    stage = bool(decisions["stage"])
    D = head_dim
    LANES = math.gcd(D, 16)
    SR = KR if stage else 1

    @T.inline
    def find_row(row, rows, heads, place):
        """Of the rows of all heads: batch entry, head and number in its head."""
        place[BATCH] = row // rows // heads
        place[HEAD] = row // rows % heads
        place[ROW] = row % rows

    @T.inline
    def clear(tensor, rows, place, worker, workers):
        """Zeros in a worker's share of the rows of a (B, H, rows, D) tensor."""
        heads: T.let[T.int32] = T.cast(tensor.shape[1], "int32")
        total: T.let[T.int32] = T.cast(tensor.shape[0], "int32") * heads * rows
        share: T.let[T.int32] = (total + workers - 1) // workers
        for row in T.serial(worker * share, T.min(total, (worker + 1) * share)):
            find_row(row, rows, heads, place)
            for d in T.vectorized(D):
                tensor[place[BATCH], place[HEAD], place[ROW], d] = T.float32(0)

    @T.prim_func(s_tir=True)
    def backward(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        o_handle: T.handle,
        lse_handle: T.handle,
        do_handle: T.handle,
        dlse_handle: T.handle,
        bands_handle: T.handle,
        cu_seqlens_handle: T.handle,
        cu_seqlens_k_handle: T.handle,
        key_ranges_handle: T.handle,
        dq_handle: T.handle,
        dk_handle: T.handle,
        dv_handle: T.handle,
        dq_sum_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "backward", "tirx.noalias": True})
        B, HQ, HKV, N, NK = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        M, DOCUMENTS_1, RANGES, SUMS = T.int64(), T.int64(), T.int64(), T.int64()
        q = strided_rows(q_handle, (B, HQ, N, D), dtype)
        k = strided_rows(k_handle, (B, HKV, NK, D), dtype)
        v = strided_rows(v_handle, (B, HKV, NK, D), dtype)
        o = strided_rows(o_handle, (B, HQ, N, D), dtype)
        lse = T.match_buffer(lse_handle, (B, HQ, N), "float32", align=4)
        do = strided_rows(do_handle, (B, HQ, N, D), dtype)
        dlse = T.match_buffer(dlse_handle, (B, HQ, N), "float32", align=4)
        bands = T.match_buffer(bands_handle, (M, HQ, 4), "int32", align=4)
        cu_seqlens = T.match_buffer(cu_seqlens_handle, (DOCUMENTS_1,), "int32", align=4)
        cu_seqlens_k = T.match_buffer(cu_seqlens_k_handle, (DOCUMENTS_1,), "int32", align=4)
        key_ranges = T.match_buffer(key_ranges_handle, (RANGES, 3), "int32", align=4)
        dq = strided_rows(dq_handle, (B, HQ, N, D), dtype)
        dk = T.match_buffer(dk_handle, (B, HQ, NK, D), "float32", align=4)
        dv = T.match_buffer(dv_handle, (B, HQ, NK, D), "float32", align=4)
        dq_sum = T.match_buffer(dq_sum_handle, (SUMS, HQ, N, D), "float32", align=4)
        sums = dq if dtype == "float32" else dq_sum

        documents: T.let[T.int32] = T.cast(DOCUMENTS_1, "int32") - 1
        heads: T.let[T.int32] = T.cast(HQ, "int32")
        batch_heads: T.let[T.int32] = T.cast(B, "int32") * heads
        queries: T.let[T.int32] = T.cast(N, "int32")
        ranges: T.let[T.int32] = T.cast(RANGES, "int32")
        tables: T.let[T.int32] = T.cast(M, "int32")
        is_split: T.let[T.bool] = splits_heads(batch_heads, workers)
        # Read back from a buffer, a value is opaque to TVM's simplifier, as in the forward kernel.
        plan = T.alloc_buffer((PLAN_WORDS,), "int32")
        plan[SEGMENT] = T.max(1, queries)
        plan[SLOTS] = 1
        plan[PHASES] = 1
        plan[PHASES + 1] = 0
        if is_split:
            plan[PHASES] = 0
            plan[SEGMENT] = segment_rows(batch_heads, queries, workers, R)
            plan[SLOTS] = tile_slots(queries, documents, plan[SEGMENT])
        segment: T.let[T.int32] = plan[SEGMENT]
        slots: T.let[T.int32] = plan[SLOTS]  # of a head; each has a segment of a document, or none
        if is_split:
            for row, document, h, band in T.grid(T.max(1, ranges), documents, heads, 2):
                table: T.let[T.int32] = table_row(document, documents, tables)
                keys_there = T.meta_var(
                    document_keys(document, row, cu_seqlens, cu_seqlens_k, key_ranges, ranges)
                )
                found = T.meta_var(
                    diagonals(
                        bands[table, h, 2 - 2 * band],
                        bands[table, h, 3 - 2 * band],
                        cu_seqlens[document] + keys_there[2],
                        cu_seqlens[document + 1] - 1 + keys_there[2],
                        keys_there[0],
                        keys_there[1],
                        segment,
                    )
                )
                plan[PHASES + band] = T.max(plan[PHASES + band], found[1] - found[0])
        far_phases: T.let[T.int32] = plan[PHASES]
        phases: T.let[T.int32] = far_phases + plan[PHASES + 1]

        for worker in T.parallel(workers):
            place = T.alloc_buffer((PLACE_WORDS,), "int32", annotations=REGISTERS)
            clear(dk, T.cast(NK, "int32"), place, worker, workers)
            clear(dv, T.cast(NK, "int32"), place, worker, workers)
            if is_split:
                clear(sums, queries, place, worker, workers)

        for phase in T.serial(phases):
            for worker in T.parallel(workers):
                query = T.alloc_buffer((D, R), "float32")
                query_rows = T.alloc_buffer((R, D), "float32")
                doutput = T.alloc_buffer((D, R), "float32")
                doutput_rows = T.alloc_buffer((R, D), "float32")
                dquery = T.alloc_buffer((D, R), "float32")
                probabilities = T.alloc_buffer((KR, R), "float32")
                dscores = T.alloc_buffer((KR, R), "float32")
                key_scratch = T.alloc_buffer((SR, D), "float32")
                value_scratch = T.alloc_buffer((SR, D), "float32")
                row_lse = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
                delta = T.alloc_buffer((R,), "float32", annotations=REGISTERS)
                keyed = T.alloc_buffer((R,), "int32")
                query_tile = T.alloc_buffer((JU, R), "float32", annotations=REGISTERS)
                dim_tile = T.alloc_buffer((DU, R), "float32", annotations=REGISTERS)
                gradient_tile = T.alloc_buffer((GU, GL), "float32", annotations=REGISTERS)
                place = T.alloc_buffer((PLACE_WORDS,), "int32", annotations=REGISTERS)
                first_band: T.let[T.int32] = T.cast(is_split & (phase >= far_phases), "int32")
                bands_end: T.let[T.int32] = T.Select(is_split, first_band + 1, 2)
                diagonal: T.let[T.int32] = phase - first_band * far_phases

                @T.inline
                def enter(number):
                    """A head, or a slot of a head, and whose rows it has."""
                    place[BATCH] = number // slots // heads
                    place[HEAD] = number // slots % heads
                    place[KV_HEAD] = place[HEAD] // T.cast(HQ // HKV, "int32")
                    place[NUMBER] = 0
                    place[DOCUMENT] = 0
                    place[LAST_DOCUMENT] = documents - 1
                    if is_split:
                        find_document(cu_seqlens, number % slots, segment, place, DOCUMENT)
                        place[NUMBER] = number % slots - first_slot(
                            cu_seqlens[place[DOCUMENT]], place[DOCUMENT], segment
                        )

                @T.inline
                def enter_document(document):
                    """Its rows, or a segment of them, and the keys that they meet in this phase."""
                    table: T.let[T.int32] = table_row(document, documents, tables)
                    keys_of_document = T.meta_var(
                        document_keys(document, place[BATCH], cu_seqlens, cu_seqlens_k, key_ranges, ranges)
                    )
                    place[KEY] = keys_of_document[0]
                    place[KEY_END] = keys_of_document[1]
                    place[SHIFT] = keys_of_document[2]
                    place[ROW] = cu_seqlens[document] + place[NUMBER] * segment
                    place[ROW_END] = T.min(cu_seqlens[document + 1], place[ROW] + segment)
                    if is_split:
                        found = T.meta_var(
                            diagonals(
                                bands[table, place[HEAD], 2 - 2 * first_band],
                                bands[table, place[HEAD], 3 - 2 * first_band],
                                cu_seqlens[document] + place[SHIFT],
                                cu_seqlens[document + 1] - 1 + place[SHIFT],
                                place[KEY],
                                place[KEY_END],
                                segment,
                            )
                        )
                        # Where the segment of keys begins.
                        place[FIRST_KEY] = place[ROW] + place[SHIFT] - (found[0] + diagonal) * segment
                        place[KEY] = T.max(place[KEY], place[FIRST_KEY])
                        place[KEY_END] = T.min(place[KEY_END], place[FIRST_KEY] + segment)

                @T.inline
                def count_keys(document, first, last):
                    """Of the phase's band, for a tile or a segment of queries."""
                    table: T.let[T.int32] = table_row(document, documents, tables)
                    found = T.meta_var(
                        key_range(
                            first,
                            last,
                            bands[table, place[HEAD], 2 - 2 * first_band],
                            bands[table, place[HEAD], 3 - 2 * first_band],
                            place[KEY],
                        )
                    )
                    place[KEYS] = T.min(place[KEY_END], found[1]) - found[0]

                @T.inline
                def read_queries(query_begin, query_last, first, table):
                    """A tile of q, do and what is known of its rows, as vectors of queries and as rows."""
                    # Lanes past the end, and queries without keys whatever arrives for their o and lse,
                    # hold zeros and lse = inf, so that they add nothing anywhere.
                    for r in T.serial(R):
                        i: T.let[T.int32] = T.min(query_begin + r, query_last)
                        keyed[r] = T.cast(
                            (query_begin + r <= query_last)
                            & (
                                has_key(
                                    first + r,
                                    bands[table, place[HEAD], 0],
                                    bands[table, place[HEAD], 1],
                                    place[KEY],
                                    place[KEY_END],
                                )
                                | has_key(
                                    first + r,
                                    bands[table, place[HEAD], 2],
                                    bands[table, place[HEAD], 3],
                                    place[KEY],
                                    place[KEY_END],
                                )
                            ),
                            "int32",
                        )
                        is_nobody: T.let[T.bool] = keyed[r] == 0
                        b: T.let[T.int32] = place[BATCH]
                        h: T.let[T.int32] = place[HEAD]
                        row_lse[r] = T.Select(is_nobody, T.float32(math.inf), lse[b, h, i])
                        delta[r] = T.Select(is_nobody, T.float32(0), T.float32(0) - dlse[b, h, i])
                        for d in T.serial(D):
                            query_rows[r, d] = T.Select(
                                is_nobody, T.float32(0), T.cast(q[b, h, i, d], "float32")
                            )
                            query[d, r] = query_rows[r, d] * scale
                            doutput_rows[r, d] = T.Select(
                                is_nobody, T.float32(0), T.cast(do[b, h, i, d], "float32")
                            )
                            doutput[d, r] = doutput_rows[r, d]
                            delta[r] = delta[r] + doutput_rows[r, d] * T.Select(
                                is_nobody, T.float32(0), T.cast(o[b, h, i, d], "float32")
                            )
                    for d in T.serial(D):
                        fill(dquery, d, 1, R, lambda u, r: T.float32(0))

                @T.inline
                def score(keys, values, first, last, key_begin, count, low, high):
                    """P and dS of the tile and of ``count`` keys."""
                    groups: T.let[T.int32] = (count + JU - 1) // JU
                    masked: T.let[T.bool] = crosses_edge(
                        first, last, key_begin, key_begin + groups * JU - 1, low, high
                    )
                    for group in T.serial(groups):
                        fill(query_tile, 0, JU, R, lambda u, r: T.float32(0))
                        # Rows past the last key repeat it; nothing reads what they give.
                        multiply_add(
                            query_tile, JU, R, D,
                            lambda u, d: keys[T.min(group * JU + u, count - 1), d],
                            lambda d, r: query[d, r],
                        )  # fmt: skip
                        if masked:
                            fill(
                                query_tile, 0, JU, R,
                                lambda u, r: T.Select(
                                    in_band(first + r, key_begin + group * JU + u, low, high),
                                    query_tile[u, r],
                                    T.float32(-math.inf),
                                ),
                            )  # fmt: skip
                        fill(
                            probabilities, group * JU, JU, R,
                            lambda u, r: exp(query_tile[u, r] - row_lse[r]),
                        )  # fmt: skip
                        fill(query_tile, 0, JU, R, lambda u, r: T.float32(0))
                        multiply_add(
                            query_tile, JU, R, D,
                            lambda u, d: values[T.min(group * JU + u, count - 1), d],
                            lambda d, r: doutput[d, r],
                        )  # fmt: skip
                        fill(
                            dscores, group * JU, JU, R,
                            lambda u, r: probabilities[group * JU + u, r]
                            * (query_tile[u, r] - delta[r])
                            * scale,
                        )  # fmt: skip

                @T.inline
                def add_to_queries(keys, count):
                    for chunk in T.serial(D // DU):
                        fill(dim_tile, 0, DU, R, lambda u, r: dquery[chunk * DU + u, r])
                        multiply_add(
                            dim_tile, DU, R, count,
                            lambda u, j: keys[j, chunk * DU + u],
                            lambda j, r: dscores[j, r],
                        )  # fmt: skip
                        fill(dquery, chunk * DU, DU, R, lambda u, r: dim_tile[u, r])

                @T.inline
                def add_to_keys(gradient, weights, rows, key_begin, count, first, first_dim):
                    """Add ``sum_r weights[j, r] * rows[r, :]`` to each key of a register tile."""
                    fill(gradient_tile, 0, GU, GL, lambda u, lane: T.float32(0))
                    multiply_add(
                        gradient_tile, GU, GL, R,
                        lambda u, r: weights[first + u, r],
                        lambda r, lane: rows[r, first_dim + lane],
                    )  # fmt: skip
                    for u in T.unroll(GU):
                        if first + u < count:
                            for lane in T.vectorized(GL):
                                gradient[
                                    place[BATCH], place[HEAD], key_begin + first + u, first_dim + lane
                                ] = (
                                    gradient[
                                        place[BATCH], place[HEAD], key_begin + first + u, first_dim + lane
                                    ]
                                    + gradient_tile[u, lane]
                                )

                @T.inline
                def visit_keys(first, last, key_begin, count, low, high):
                    b: T.let[T.int32] = place[BATCH]
                    hk: T.let[T.int32] = place[KV_HEAD]
                    if stage:
                        widen(key_scratch, count, D, LANES, lambda j, d: k[b, hk, key_begin + j, d])
                        widen(value_scratch, count, D, LANES, lambda j, d: v[b, hk, key_begin + j, d])
                    keys = key_scratch if stage else rows_of(k, b, hk, key_begin, KR)
                    values = value_scratch if stage else rows_of(v, b, hk, key_begin, KR)
                    score(keys, values, first, last, key_begin, count, low, high)
                    add_to_queries(keys, count)
                    for group in T.serial((count + GU - 1) // GU):
                        for chunk in T.serial(D // GL):
                            add_to_keys(
                                dv, probabilities, doutput_rows, key_begin, count, group * GU, chunk * GL
                            )
                            add_to_keys(dk, dscores, query_rows, key_begin, count, group * GU, chunk * GL)

                @T.inline
                def write_queries(query_begin, query_last):
                    b: T.let[T.int32] = place[BATCH]
                    h: T.let[T.int32] = place[HEAD]
                    # Selected, because a key's infinity times a query's zero is NaN.
                    if is_split:
                        for r in T.serial(query_last - query_begin + 1):
                            for d in T.serial(D):
                                sums[b, h, query_begin + r, d] = sums[b, h, query_begin + r, d] + T.Select(
                                    keyed[r] == 0, T.float32(0), dquery[d, r]
                                )
                    else:
                        for r in T.serial(query_last - query_begin + 1):
                            for d in T.serial(D):
                                dq[b, h, query_begin + r, d] = T.Select(
                                    keyed[r] == 0, T.cast(0, dtype), T.cast(dquery[d, r], dtype)
                                )

                @T.inline
                def visit_document(document):
                    enter_document(document)
                    table: T.let[T.int32] = table_row(document, documents, tables)
                    for tile in T.serial((place[ROW_END] - place[ROW] + R - 1) // R):
                        query_begin: T.let[T.int32] = place[ROW] + tile * R
                        query_last: T.let[T.int32] = T.min(query_begin + R, place[ROW_END]) - 1
                        first: T.let[T.int32] = query_begin + place[SHIFT]
                        last: T.let[T.int32] = query_last + place[SHIFT]
                        count_keys(document, first, last)
                        if (place[KEYS] > 0) | ~is_split:
                            read_queries(query_begin, query_last, first, table)
                            for band in T.serial(first_band, bands_end):  # the far band, then the near one
                                low: T.let[T.int32] = bands[table, place[HEAD], 2 - 2 * band]
                                high: T.let[T.int32] = bands[table, place[HEAD], 3 - 2 * band]
                                keys_of_band = T.meta_var(key_range(first, last, low, high, place[KEY]))
                                begin: T.let[T.int32] = keys_of_band[0]
                                end: T.let[T.int32] = T.min(place[KEY_END], keys_of_band[1])
                                for key_tile in T.serial(T.max(0, end - begin + KR - 1) // KR):
                                    visit_keys(
                                        first, last, begin + key_tile * KR,
                                        T.min(KR, end - begin - key_tile * KR), low, high,
                                    )  # fmt: skip
                            write_queries(query_begin, query_last)

                place[TURN] = 0
                for number in T.serial(batch_heads * slots):
                    enter(number)
                    if is_split:
                        enter_document(place[DOCUMENT])
                        count_keys(
                            place[DOCUMENT], place[ROW] + place[SHIFT], place[ROW_END] - 1 + place[SHIFT]
                        )
                    if ~is_split | ((place[ROW] < place[ROW_END]) & (place[KEYS] > 0)):
                        if place[TURN] % workers == worker:
                            for document in T.serial(place[DOCUMENT], place[LAST_DOCUMENT] + 1):
                                visit_document(document)
                        place[TURN] = place[TURN] + 1

        if dtype != "float32":
            if is_split:
                for worker in T.parallel(workers):
                    place = T.alloc_buffer((PLACE_WORDS,), "int32", annotations=REGISTERS)
                    total: T.let[T.int32] = batch_heads * queries
                    share: T.let[T.int32] = (total + workers - 1) // workers
                    for row in T.serial(worker * share, T.min(total, (worker + 1) * share)):
                        find_row(row, queries, heads, place)
                        for chunk in T.serial(D // LANES):
                            for lane in T.vectorized(LANES):
                                dq[place[BATCH], place[HEAD], place[ROW], chunk * LANES + lane] = T.cast(
                                    sums[place[BATCH], place[HEAD], place[ROW], chunk * LANES + lane], dtype
                                )

    return IRModule({"backward": backward})
