"""The computing warpgroups of the Hopper forward: 64 query rows each, the softmax in registers."""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.numbers import ALL_LANES, INF, LN2, LOG2E
from spattn_tvm.domains.row_store import store_row
from spattn_tvm.domains.share_merge import share_row

from .attend_row import attend_row
from .forward_producers import arrive, wait
from .forward_sizes import (
    BATCH,
    FAR_CHUNKS,
    FAR_HI,
    FAR_LO,
    FAR_TOP,
    HEAD,
    KEY_BEGIN,
    LIVE,
    NEAR_CHUNKS,
    NEAR_HI,
    NEAR_LO,
    NEAR_TOP,
    QUERY0,
    QUERY_END,
    SHARE,
    Sizes,
)
from .parts import ballot, convert, element, wgmma
from .support import PLANE, WARPGROUP_ROWS

LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
LARGEST = 3.4028234663852886e38  # of float32
# Below this size in base 2 a reference that is rounded to float32 is off by at most 1/2, and so the weights
# by at most a factor of sqrt(2). (From 2**27 on by 2**8, which float16 can't hold beside the threshold's
# 2**8; from 2**31 on by 2**128.) References begin at its negative and only rise: none is larger on the way,
# and rows that end above it, or where they began, are attended to again. (Another factor for them, chosen at
# every chunk, took 2 % more time at head dim 64.)
HUGE_SCORE = 2.0**24
# A row keeps its reference until a thread's weights of it sum to more; with the next reference the largest
# such sum is 2**RAISED_EXPONENT. The former is what the dtype can hold, and in bfloat16 leaves room for the
# values. The latter leaves float16 weights their bits where there are many equal ones, and is so large that
# the factor from the largest float32 is no subnormal number, which would be taken for 0.
GROWN_SUM = {"bfloat16": 2.0**40, "float16": 2.0**14}
RAISED_EXPONENT = 7


def consumer(decisions: Mapping[str, int], c: Sizes, dtype: str) -> Callable[..., None]:
    """A warpgroup's work, an inline function of shared memory, tensors, the scale, and its warp and lane.

    Where keys are split, rows go to ``t.partial_o`` and ``t.partial_sums`` unless ``t.splits`` is 1.
    """
    SPLITS = "least_chunks" in decisions
    D = c.head_dim
    KEYS, STAGES, CHUNK, ROWS = c.keys, c.stages, c.chunk, c.rows
    OVERLAP = bool(decisions["overlap"])
    THRESHOLD = float(decisions["rescale_threshold"])
    PARTS = decisions["weight_parts"]
    Q_IN_REGISTERS = bool(decisions["queries_in_registers"])
    # An edge chunk of which this warpgroup's rows meet one half takes the products of that half.
    HALF = KEYS // 2 if KEYS % 32 == 0 and not OVERLAP else KEYS
    PV, PACK = wgmma(D, dtype), convert(dtype)
    # A row keeps its first reference while its weights' sum is small, so that the chunks that follow need no
    # maximum.
    KEEP = OVERLAP and THRESHOLD > 0
    GROWN = GROWN_SUM[dtype]
    # Registers of a thread: a warpgroup's 64 x n accumulator is n/2 floats, two rows (r and r + 8) of it.
    SCORES, WEIGHTS, OUTPUTS, QUERIES = KEYS // 2, KEYS // 4, D // 2, D // 4

    def ones(count: Any, keys: int) -> Any:
        """A word whose lowest ``count`` bits, of at most ``keys // 4``, are set."""
        word = (T.uint32(1) << T.cast(count, "uint32")) - T.uint32(1)
        return word if keys // 4 < 32 else T.Select(count >= 32, T.uint32(ALL_LANES), word)

    def columns_below(offset: Any, keys: int) -> Any:
        """Of a thread's columns, at 8 j + e: how many are at most ``offset`` behind the first."""
        return T.min(T.max(2 * (offset // 8) + T.min(offset % 8, 1) + 1, 0), keys // 4)

    @T.inline
    def consume(s, t, scale, warp, lane):
        warpgroup: T.int32 = warp // 4 - 1
        scale2: T.float32 = scale * T.float32(LOG2E)
        # Scaled it is still finite, so that a row that has seen no key weighs exp2(-inf - finite) = 0.
        huge: T.float32 = T.min(T.float32(HUGE_SCORE) / scale2, T.float32(LARGEST))
        my_row: T.int32 = (warp % 4) * 16 + lane // 4  # and 8 below
        my_column: T.int32 = (lane % 4) * 2  # and the next, of each 8
        queries = T.alloc_local((QUERIES,), "uint32")
        scores = T.alloc_local((SCORES,), "float32")
        weights = T.alloc_local((WEIGHTS,), "uint32")
        output = T.alloc_local((OUTPUTS,), "float32")
        row_max = T.alloc_local((2,), "float32")
        row_sum = T.alloc_local((2,), "float32")
        shrink = T.alloc_local((2,), "float32")
        again = T.alloc_local((2,), "uint32")
        unusual: T.int32 = 0
        shrinks: T.int32 = 0
        kept: T.int32 = 0  # whether each of the warp's rows has a reference to keep
        k_desc = T.alloc_local((1,), "uint64")
        v_desc = T.alloc_local((1,), "uint64")
        # Offsets in 16-byte units: 8 rows of 128 bytes are 64; V's planes are KEYS rows apart.
        T.cuda.wgmma.encode_matrix_descriptor(T.address_of(k_desc[0]), s.k.ptr_to([0]), 1, 64, 3)
        T.cuda.wgmma.encode_matrix_descriptor(T.address_of(v_desc[0]), s.v.ptr_to([0]), KEYS * 8, 64, 3)
        q_desc = T.alloc_local((1,), "uint64")
        if not Q_IN_REGISTERS:
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(q_desc[0]), s.q.ptr_to([0]), 1, 64, 3)
        k_at: T.int32 = 0
        v_at: T.int32 = 0
        tile_at: T.int32 = 0

        # Each computing warp arrives for itself, not one thread for its warpgroup: where chunks are let pass
        # no instruction keeps the four warps together, and one left two uses behind would wait for ever.
        @T.inline
        def arrive_warp(barrier):
            if lane == 0:
                arrive(s, barrier)

        @T.inline
        def pass_chunk(position, full, empty):
            ring: T.int32 = position % STAGES
            wait(s, full + ring, (position // STAGES) % 2)
            arrive_warp(empty + ring)
            position = position + 1

        # Keys and values in the loader's order: all keys of a tile first would wait for a slot that only
        # its values' passing frees.
        @T.inline
        def pass_chunks(count):
            pass_end: T.int32 = k_at + count
            while k_at < pass_end:
                pass_chunk(k_at, c.k_full, c.k_empty)
                pass_chunk(v_at, c.v_full, c.v_empty)

        @T.inline
        def load_queries():
            for step in T.unroll(D // 16):
                q_row: T.int32 = warpgroup * WARPGROUP_ROWS + (warp % 4) * 16 + lane % 16
                T.ptx[LDMATRIX](
                    queries[4 * step], queries[4 * step + 1],
                    queries[4 * step + 2], queries[4 * step + 3],
                    s.q.ptr_to([
                        (step // 4) * (ROWS * PLANE) + q_row * PLANE
                        + ((((step % 4) * 2 + lane // 16) ^ (q_row % 8)) * 8)
                    ]),
                )  # fmt: skip
            T.cuda.warp_sync()
            arrive_warp(c.q_empty)

        @T.inline
        def clear_rows():
            for r in T.unroll(2):
                row_max[r] = -huge
                row_sum[r] = T.float32(0)
            for i in T.unroll(OUTPUTS):
                output[i] = T.float32(0)
            kept = 0

        @T.inline
        def issue_scores(q_ring, keys, first):
            # Of `keys` keys of the chunk, from `first` on.
            k_ring: T.int32 = k_at % STAGES
            wait(s, c.k_full + k_ring, (k_at // STAGES) % 2)
            k_tile: T.uint64 = k_desc[0] + T.cast(k_ring * (CHUNK // 8) + first * 8, "uint64")
            T.ptx.wgmma.fence.sync.aligned()
            if Q_IN_REGISTERS:
                for step in T.unroll(D // 16):
                    T.ptx[wgmma(keys, dtype)](
                        *[scores[i] for i in range(keys // 2)],
                        queries[4 * step], queries[4 * step + 1],
                        queries[4 * step + 2], queries[4 * step + 3],
                        k_tile + T.uint64((step // 4) * (KEYS * 8) + (step % 4) * 2),
                        step > 0, 1, 1, 0,
                    )  # fmt: skip
            else:
                q_tile: T.uint64 = q_desc[0] + T.cast(
                    q_ring * (ROWS * D // 8) + warpgroup * (WARPGROUP_ROWS * 8), "uint64"
                )
                for step in T.unroll(D // 16):
                    T.ptx[wgmma(keys, dtype)](
                        *[scores[i] for i in range(keys // 2)],
                        q_tile + T.uint64((step // 4) * (ROWS * 8) + (step % 4) * 2),
                        k_tile + T.uint64((step // 4) * (KEYS * 8) + (step % 4) * 2),
                        step > 0, 1, 1, 0, 0,
                    )  # fmt: skip
            T.ptx.wgmma.commit_group.sync.aligned()

        @T.inline
        def wait_values():
            wait(s, c.v_full + v_at % STAGES, (v_at // STAGES) % 2)

        @T.inline
        def issue_output(part, parts, keys, first):
            v_tile: T.uint64 = v_desc[0] + T.cast(v_at % STAGES * (CHUNK // 8) + first * 8, "uint64")
            T.ptx.wgmma.fence.sync.aligned()
            for i in T.unroll(keys // 16 // parts):
                step: T.let = part * (keys // 16 // parts) + i
                T.ptx[PV](
                    *[output[i] for i in range(OUTPUTS)],
                    weights[4 * step], weights[4 * step + 1],
                    weights[4 * step + 2], weights[4 * step + 3],
                    v_tile + T.uint64(step * 128),
                    T.bool(True), 1, 1, 1,
                )  # fmt: skip
            T.ptx.wgmma.commit_group.sync.aligned()

        @T.inline
        def release_keys():
            arrive_warp(c.k_empty + k_at % STAGES)
            k_at = k_at + 1

        @T.inline
        def release_values():
            arrive_warp(c.v_empty + v_at % STAGES)
            v_at = v_at + 1

        # One bit for each of a row's columns that this thread holds: two instructions an element instead of
        # the three of two comparisons.
        @T.inline
        def mask(begin, row0, lo, hi, chunk_key, keys):
            for r in T.unroll(2):
                query: T.int32 = row0 + my_row + 8 * r
                least: T.int32 = T.max(begin, query - hi) - chunk_key - my_column - 1
                most: T.int32 = query - lo - chunk_key - my_column
                seen: T.uint32 = ones(columns_below(most, keys), keys) & ~ones(
                    columns_below(least, keys), keys
                )
                for j in T.unroll(keys // 8):
                    for e in T.unroll(2):
                        scores[4 * j + 2 * r + e] = T.Select(
                            ((seen >> T.cast(2 * j + e, "uint32")) & T.uint32(1)) != T.uint32(0),
                            scores[4 * j + 2 * r + e],
                            T.float32(-INF),
                        )

        # Choose each row's reference, near the maximum of its scores so far.
        @T.inline
        def find_maximum(keys):
            for r in T.unroll(2):
                top = T.alloc_local((1,), "float32")
                top[0] = T.max(scores[2 * r], scores[2 * r + 1])
                for j in T.unroll(keys // 8 - 1):
                    top[0] = T.max(top[0], T.max(scores[4 * j + 4 + 2 * r], scores[4 * j + 5 + 2 * r]))
                top[0] = T.max(top[0], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), top[0], 1, 32, 32))
                top[0] = T.max(top[0], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), top[0], 2, 32, 32))
                top[0] = T.max(top[0], row_max[r])
                if THRESHOLD > 0:
                    # Any reference near the maximum gives the same quotient; weights stay below
                    # 2**threshold, sums are float32.
                    grown: T.float32 = (top[0] - row_max[r]) * scale2
                    top[0] = T.Select(grown > T.float32(THRESHOLD), top[0], row_max[r])
                shrink[r] = T.exp2((row_max[r] - top[0]) * scale2)
                row_max[r] = top[0]
                row_sum[r] = row_sum[r] * shrink[r]

        # exp2 of a part of the chunk's scores, in place.
        @T.inline
        def weigh(part, parts, keys):
            for r in T.unroll(2):
                offset: T.float32 = row_max[r] * scale2
                for j in T.unroll(keys // 8 // parts):
                    for e in T.unroll(2):
                        i: T.let = 4 * (part * (keys // 8 // parts) + j) + 2 * r + e
                        scores[i] = T.exp2(scores[i] * scale2 - offset)
                        row_sum[r] = row_sum[r] + scores[i]

        @T.inline
        def pack_weights(part, parts, keys):
            for i in T.unroll(keys // 4 // parts):
                word: T.let = part * (keys // 4 // parts) + i
                T.ptx[PACK](weights[word], scores[2 * word + 1], scores[2 * word])

        @T.inline
        def shrink_output():
            for j in T.unroll(OUTPUTS // 4):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        output[4 * j + 2 * r + e] = output[4 * j + 2 * r + e] * shrink[r]

        @T.inline
        def find_kept():
            without: T.bool = T.Or(row_max[0] == -huge, row_max[1] == -huge)
            kept = T.Select(T.cuda.any_sync(T.uint32(ALL_LANES), without) == 0, 1, 0)

        # A higher reference for rows whose weights have outgrown theirs, for this chunk too. Where they
        # overflowed it is one that has the row attended to again.
        @T.inline
        def raise_references():
            for r in T.unroll(2):
                if kept != 0:
                    shrink[r] = T.float32(1)
                total = T.alloc_local((1,), "float32")
                total[0] = T.max(
                    row_sum[r], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), row_sum[r], 1, 32, 32)
                )
                total[0] = T.max(total[0], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), total[0], 2, 32, 32))
                if total[0] > T.float32(GROWN):
                    grown: T.float32 = (T.log2(total[0]) - T.float32(RAISED_EXPONENT)) / scale2
                    raised: T.float32 = T.min(row_max[r] + grown, T.float32(LARGEST))
                    factor: T.float32 = T.exp2((row_max[r] - raised) * scale2)
                    row_max[r] = raised
                    row_sum[r] = row_sum[r] * factor
                    shrink[r] = shrink[r] * factor
                    for j in T.unroll(KEYS // 8):
                        for e in T.unroll(2):
                            scores[4 * j + 2 * r + e] = scores[4 * j + 2 * r + e] * factor

        # This branch is also what keeps the weights before the wait for the last values' product: ptxas moves
        # the wait before them otherwise, and nothing runs beside that product.
        @T.inline
        def raise_references_if_needed():
            grew: T.bool = T.max(row_sum[0], row_sum[1]) > T.float32(GROWN)
            shrinks = T.cast(T.Or(kept == 0, T.cuda.any_sync(T.uint32(ALL_LANES), grew) != 0), "int32")
            if shrinks != 0:
                raise_references()

        # No wgmma is in flight here: a branch around part of a stage would serialise all of them.
        @T.inline
        def shrink_output_if_needed():
            if KEEP:
                if shrinks != 0:
                    shrink_output()
                    find_kept()
            elif THRESHOLD > 0:
                grew: T.bool = T.Or(shrink[0] < T.float32(1), shrink[1] < T.float32(1))
                if T.cuda.any_sync(T.uint32(ALL_LANES), grew) != 0:
                    shrink_output()
            else:
                shrink_output()

        # A tile: take this warpgroup's chunks, [near_first, near_last) and [far_first, far_last), and let the
        # others pass.
        @T.inline
        def run_tile():
            batch: T.int32 = s.words[BATCH]
            head: T.int32 = s.words[HEAD]
            begin: T.int32 = s.words[KEY_BEGIN]
            end: T.int32 = s.words[QUERY_END]
            near_lo: T.int32 = s.words[NEAR_LO]
            near_hi: T.int32 = s.words[NEAR_HI]
            far_lo: T.int32 = s.words[FAR_LO]
            far_hi: T.int32 = s.words[FAR_HI]
            near_top: T.int32 = s.words[NEAR_TOP]
            near_chunks: T.int32 = s.words[NEAR_CHUNKS]
            far_top: T.int32 = s.words[FAR_TOP]
            far_chunks: T.int32 = s.words[FAR_CHUNKS]
            share: T.int32 = 0
            if SPLITS:
                share = s.words[SHARE]
            row0: T.int32 = s.words[QUERY0] + warpgroup * WARPGROUP_ROWS
            # Every lane, since every lane has read the words.
            arrive(s, c.tile_empty)
            q_ring: T.int32 = tile_at % c.queries_slots
            wait(s, c.q_full + q_ring, (tile_at // c.queries_slots) % 2)
            tile_at = tile_at + 1
            if Q_IN_REGISTERS:
                load_queries()

            row_end: T.int32 = T.min(row0 + WARPGROUP_ROWS, end)
            near_bottom: T.int32 = T.max(begin, row0 - near_hi)
            near_end: T.int32 = T.min(row_end - near_lo, near_top)
            has_near: T.bool = T.And(row0 < end, near_bottom < near_end)
            near_first: T.int32 = T.Select(has_near, (near_top - near_end) // KEYS, near_chunks)
            near_last: T.int32 = T.Select(
                has_near, (near_top - near_bottom + (KEYS - 1)) // KEYS, near_chunks
            )
            far_bottom: T.int32 = T.max(begin, row0 - far_hi)
            far_end: T.int32 = T.min(row_end - far_lo, far_top)
            has_far: T.bool = T.And(row0 < end, far_bottom < far_end)
            far_first: T.int32 = T.Select(has_far, (far_top - far_end) // KEYS, far_chunks)
            far_last: T.int32 = T.Select(has_far, (far_top - far_bottom + (KEYS - 1)) // KEYS, far_chunks)
            if SPLITS:
                # The share may end before the band does.
                near_first = T.min(near_first, near_chunks)
                near_last = T.min(near_last, near_chunks)
                far_first = T.min(far_first, far_chunks)
                far_last = T.min(far_last, far_chunks)
            near_count: T.int32 = near_last - near_first
            chunks: T.int32 = near_count + far_last - far_first
            between: T.int32 = near_chunks - near_last + far_first

            # Mask the scores of `keys` keys from chunk_key on, if an edge crosses them; find their maximum,
            # if rows need it.
            @T.inline
            def reduce_scores(chunk_key, lo, hi, keys):
                if T.Or(
                    chunk_key + (keys - 1) > row0 - lo,
                    chunk_key < T.max(begin, row0 + (WARPGROUP_ROWS - 1) - hi),
                ):
                    mask(begin, row0, lo, hi, chunk_key, keys)
                if not KEEP:
                    find_maximum(keys)
                elif kept == 0:
                    find_maximum(keys)

            # What reduce_scores needs of chunk i: its first key and its band.
            @T.inline
            def find_chunk(i, chunk_key, lo, hi):
                near: T.bool = i < near_count
                chunk_key = T.Select(
                    near,
                    near_top - (near_first + i + 1) * KEYS,
                    far_top - (far_first + i - near_count + 1) * KEYS,
                )
                lo = T.Select(near, near_lo, far_lo)
                hi = T.Select(near, near_hi, far_hi)

            # A chunk's scores are issued before the values' product of the one before.
            @T.inline
            def run_overlapped():
                chunk_key: T.int32 = 0
                lo: T.int32 = 0
                hi: T.int32 = 0
                issue_scores(q_ring, KEYS, 0)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                release_keys()
                find_chunk(0, chunk_key, lo, hi)
                reduce_scores(chunk_key, lo, hi, KEYS)
                if KEEP:
                    find_kept()
                weigh(0, 1, KEYS)
                pack_weights(0, 1, KEYS)
                i: T.int32 = 1
                while i < chunks:
                    if i == near_count:
                        keys_end: T.int32 = k_at + between
                        while k_at < keys_end:
                            pass_chunk(k_at, c.k_full, c.k_empty)
                    issue_scores(q_ring, KEYS, 0)
                    wait_values()
                    issue_output(0, 1, KEYS, 0)
                    T.ptx.wgmma.wait_group.sync.aligned(1)
                    release_keys()
                    find_chunk(i, chunk_key, lo, hi)
                    reduce_scores(chunk_key, lo, hi, KEYS)
                    weigh(0, 1, KEYS)
                    if KEEP:
                        raise_references_if_needed()
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    release_values()
                    shrink_output_if_needed()
                    pack_weights(0, 1, KEYS)
                    if i == near_count:
                        values_end: T.int32 = v_at + between
                        while v_at < values_end:
                            pass_chunk(v_at, c.v_full, c.v_empty)
                    i = i + 1
                wait_values()
                issue_output(0, 1, KEYS, 0)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                release_values()

            # `keys` keys of a chunk, from `first` on.
            @T.inline
            def attend_to(chunk_key, lo, hi, keys, first, parts):
                issue_scores(q_ring, keys, first)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                release_keys()
                reduce_scores(chunk_key + first, lo, hi, keys)
                shrink_output_if_needed()
                wait_values()
                for part in T.unroll(parts):
                    weigh(part, parts, keys)
                    pack_weights(part, parts, keys)
                    issue_output(part, parts, keys, first)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                release_values()

            @T.inline
            def run_in_turn():
                chunk_key: T.int32 = 0
                lo: T.int32 = 0
                hi: T.int32 = 0
                i: T.int32 = 0
                while i < chunks:
                    if T.And(i == near_count, i > 0):
                        pass_chunks(between)
                    find_chunk(i, chunk_key, lo, hi)
                    if HALF < KEYS:
                        without_lower: T.bool = chunk_key + HALF <= T.max(begin, row0 - hi)
                        without_upper: T.bool = chunk_key + HALF >= row_end - lo
                        if T.Or(without_lower, without_upper):
                            # As an expression it costs registers: ptxas then waits for each product.
                            first: T.int32 = T.if_then_else(without_lower, HALF, 0)
                            attend_to(chunk_key, lo, hi, HALF, first, 1)
                        else:
                            attend_to(chunk_key, lo, hi, KEYS, 0, PARTS)
                    else:
                        attend_to(chunk_key, lo, hi, KEYS, 0, PARTS)
                    i = i + 1

            clear_rows()
            pass_chunks(near_first)
            if near_count == 0:
                pass_chunks(between)
            if chunks > 0:
                if OVERLAP:
                    run_overlapped()
                else:
                    run_in_turn()
            if not Q_IN_REGISTERS:
                arrive_warp(c.q_empty + q_ring)
            # What remains of the tile's chunks: all behind the near band if there was no far chunk.
            if T.And(near_count > 0, chunks == near_count):
                pass_chunks(between)
            pass_chunks(far_chunks - far_last)
            if SPLITS:
                if t.splits > 1:
                    store_share(share, batch, head, row0 + my_row, end)
                else:
                    finish_rows(batch, head, row0, end)
            else:
                finish_rows(batch, head, row0, end)

        @T.inline
        def finish_rows(batch, head, row0, end):
            store_rows(batch, head, row0 + my_row, end)
            if unusual != 0:
                attend_again(batch, head, row0 + warp % 4 * 16, end)

        # Of each row the output before it is divided, what its weights are relative to, rounded as they have
        # it, their sum, and whether that reference is the one that rows begin with, or huge: see `Merge`.
        @T.inline
        def store_share(share, batch, head, query, end):
            for r in T.unroll(2):
                add_lanes(r)
                row: T.int32 = query + 8 * r
                place: T.int64 = share_row(share, batch, head, row, t.batches, t.query_heads, t.queries)
                begins: T.bool = T.And(row_max[r] == -huge, row_sum[r] == row_sum[r])
                is_huge: T.bool = T.And(row_max[r] >= huge, row_max[r] <= T.float32(LARGEST))
                if row < end:
                    if lane % 4 == 0:
                        T.ptx["st.global.v4.f32"](
                            t.partial_sums.ptr_to([place, 0]), row_max[r] * scale2, row_sum[r],
                            T.cast(begins, "float32"), T.cast(is_huge, "float32"),
                        )  # fmt: skip
                    if row_sum[r] != T.float32(0):
                        for j in T.unroll(D // 8):
                            T.ptx["st.global.v2.f32"](
                                t.partial_o.ptr_to([place, 8 * j + my_column]),
                                output[4 * j + 2 * r], output[4 * j + 2 * r + 1],
                            )  # fmt: skip

        @T.inline
        def add_lanes(r):
            row_sum[r] = row_sum[r] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), row_sum[r], 1, 32, 32)
            row_sum[r] = row_sum[r] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), row_sum[r], 2, 32, 32)

        # Rows whose sum is 0 have no key: the largest weight of others is 1 at least. NaN stays NaN.
        @T.inline
        def store_rows(batch, head, query, end):
            for r in T.unroll(2):
                add_lanes(r)
                shrink[r] = T.float32(1) / row_sum[r]
                if T.And(lane % 4 == 0, query + 8 * r < end):
                    t.lse[batch, head, query + 8 * r] = T.Select(
                        row_sum[r] == T.float32(0),
                        T.float32(-INF),
                        row_max[r] * scale + T.log2(row_sum[r]) * T.float32(LN2),
                    )
            unusual = T.cuda.any_sync(
                T.uint32(ALL_LANES), T.max(T.fabs(row_max[0]), T.fabs(row_max[1])) >= huge
            )
            # Rarely taken: a selection of each element cost 1 % at (4, 16, 4096, 128).
            if unusual != 0:
                clear_rows_without_keys()
            for r in T.unroll(2):
                row_at: T.uint64 = element(t.o, batch, head, query + 8 * r, 0)
                store_row(
                    lambda n, e: output[4 * n + 2 * r + e] * shrink[r], D,
                    lambda column: row_at + T.Cast("uint64", 2 * column),
                    lambda column: query + 8 * r < end, PACK, lane,
                )  # fmt: skip

        # They may hold what a NaN among values made of the weight 0.
        @T.inline
        def clear_rows_without_keys():
            for r in T.unroll(2):
                if row_sum[r] == T.float32(0):
                    shrink[r] = T.float32(0)
                    for j in T.unroll(OUTPUTS // 4):
                        for e in T.unroll(2):
                            output[4 * j + 2 * r + e] = T.float32(0)

        # Their scores are huge, or all below what references begin with. (A row whose scores are NaN or
        # infinite would only be NaN again.)
        @T.inline
        def attend_again(batch, head, query0, end):
            for r in T.unroll(2):
                is_huge: T.bool = T.And(row_max[r] >= huge, row_max[r] <= T.float32(LARGEST))
                again[r] = ballot(
                    T.And(
                        query0 + lane // 4 + 8 * r < end,
                        T.if_then_else(row_max[r] == -huge, row_sum[r] == row_sum[r], is_huge),
                    )
                )
            T.cuda.warp_sync()
            row: T.int32 = 0
            while row < 16:
                bits: T.uint32 = T.if_then_else(row < 8, again[0], again[1])
                if (bits >> T.cast(row % 8 * 4, "uint32")) & T.uint32(1) != T.uint32(0):
                    attend_row(t, dtype, D, scale, lane, batch, head, query0 + row)
                row = row + 1

        running: T.int32 = 1
        while running == 1:
            wait(s, c.tile_full, tile_at % 2)
            running = s.words[LIVE]
            if running == 1:
                run_tile()

    return consume
