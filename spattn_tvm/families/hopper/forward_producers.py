"""The two loading threads of the Hopper forward: one decodes tiles, the other (a warp) loads them."""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm.script import tirx as T

from spattn_tvm.domains.key_range import document_keys, key_range
from spattn_tvm.domains.tiles import (
    chunk_count,
    locate_head,
    locate_rows,
    share_of,
    table_row,
    tile_slots,
)

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
from .parts import LOAD, PREFETCH, table_line
from .support import PLANE

# Slots of a sequence from which on its first tile comes last. Measured on an H100 (bfloat16, spattention,
# ms), without and with: 0.1311 and 0.1299 at (4, 16, 4096, 128), which has 22 slots; 0.0876 and 0.0863 at
# (1, 24, 6000, 128); 0.2383 and 0.2365 at (2, 32, 8192, 128) with 8 key heads; 0.0582 and 0.0587 at (1, 12,
# 5000, 128); level at 16384 and more tokens and, at head dim 64, at 8192. With fewer slots it lost: 0.1064
# and 0.1126 with 6, at (16, 16, 1024, 128); 0.0887 and 0.0897 with 16, at (4, 16, 4096, 64). At (4, 16, 4096,
# 128) the first two tiles last won 0.3 % where the first one won 1.1 %, and the first three nothing.
MANY_SLOTS = 20


@T.inline
def wait(s, barrier, phase):
    T.cuda.mbarrier_wait(s.barriers.ptr_to([barrier]), phase)


@T.inline
def arrive(s, barrier):
    T.ptx.mbarrier.arrive.shared.b64(s.barriers.ptr_to([barrier]))


def decoder(decisions: Mapping[str, int], c: Sizes) -> tuple[Callable[..., None], Callable[..., None]]:
    """The decoding thread's work: two inline functions.

    The first, of tensors, their maps and the thread's block, finds the block's first tile; the second, of
    shared memory, tensors, the block, the number of blocks and that tile's slot, batch row and head, tells it
    and all others. Apart from the loader, so that the latencies of a ticket, two boundaries and four band
    edges, and the divisions, don't hold up the loads.

    With the decision ``least_chunks`` keys are split: a tile is handed out ``t.splits`` times, each time with
    a share of its chunks, one of the near band's ends and the far band's beginning or both.
    """

    DYNAMIC = bool(decisions["dynamic"])
    GROUP = decisions["head_group"]
    LEAST_CHUNKS = decisions.get("least_chunks", 0)

    # The keys of `[begin, end)` that one band gives to a tile: `[top - chunks * keys, top)`, read from the
    # top down, so that no chunk reaches beyond the keys that exist.
    @T.inline
    def tell_band(words, names, first, last, lo, hi, begin, end):
        lo_at, hi_at, top_at, chunks_at = T.meta_var(names)
        key_begin, key_end = T.meta_var(key_range(first, last, lo, hi, begin))
        top: T.int32 = T.min(key_end, end)
        words[lo_at] = lo
        words[hi_at] = hi
        words[top_at] = top
        words[chunks_at] = chunk_count(key_begin, top, c.keys)

    # Last queries first: a later query has no fewer keys, so the longest tiles lead and the blocks end
    # together. Head 0 last: its near and far band coincide in the paper's layout, so it is the lightest. A
    # group of heads is finished before the next one starts, so that its keys and values stay in the L2 cache
    # between the near and the far band's reading (all heads at once would read 1.5 times the bytes at (4, 32,
    # 4096, 128)). The first tile of each pair comes after all others of all pairs, if there are many: it is
    # short, and when short tiles are left the blocks end together.
    @T.inline
    def locate(t, number, slots, slot, batch, head):
        late: T.int32 = 0
        if LEAST_CHUNKS == 0:
            late = T.Select(slots >= MANY_SLOTS, 1, 0)
        early: T.int32 = (slots - late) * (t.batches * t.query_heads)
        if number < early:
            locate_head(number, slots - late, t.batches, t.query_heads, GROUP, slot, batch, head)
            slot = slots - 1 - slot
        else:
            pairs: T.int32 = t.batches * t.query_heads
            locate_head(number - early, 1, t.batches, t.query_heads, pairs, slot, batch, head)
            slot = 0
        head = (head + 1) % t.query_heads

    # The first tile, and what it needs on its way to the L2 cache while barriers are made and tables read:
    # where caches are cold their latencies would add up. Which keys these are is a guess, right where one
    # document's queries are its last rows and see themselves.
    @T.inline
    def find_first(t, maps, block, slot, batch, head):
        slots: T.int32 = tile_slots(t.queries, t.documents, c.rows)
        tile: T.int32 = block
        if LEAST_CHUNKS > 0:
            tile = T.truncdiv(block, t.splits)
        if tile < slots * t.batches * t.query_heads:
            locate(t, tile, slots, slot, batch, head)
            if T.And(t.documents == 1, t.ranges == 0):
                T.ptx[PREFETCH](T.address_of(maps.q), 0, slot * c.rows, 0, head, batch)
                if LEAST_CHUNKS == 0:
                    top: T.int32 = T.min((slot + 1) * c.rows - t.queries, 0) + t.keys
                    T.ptx[PREFETCH](T.address_of(maps.k), 0, top - c.keys, 0, head // t.group, batch)
                    T.ptx[PREFETCH](T.address_of(maps.v), 0, top - c.keys, 0, head // t.group, batch)

    # Of both bands' chunks those of a share, in the order in which they are loaded.
    @T.inline
    def take_share(words, share, splits):
        near: T.int32 = words[NEAR_CHUNKS]
        chunks: T.int32 = near + words[FAR_CHUNKS]
        bounds = T.meta_var(share_of(chunks, share, splits, LEAST_CHUNKS))
        first: T.int32 = bounds[0]
        after: T.int32 = bounds[1]
        near_first: T.int32 = T.min(first, near)
        near_after: T.int32 = T.min(after, near)
        words[SHARE] = share
        words[NEAR_TOP] = words[NEAR_TOP] - near_first * c.keys
        words[NEAR_CHUNKS] = near_after - near_first
        words[FAR_TOP] = words[FAR_TOP] - (first - near_first) * c.keys
        words[FAR_CHUNKS] = after - near_after - (first - near_first)

    @T.inline
    def decode(s, t, block, workers, slot, batch, head):
        slots: T.int32 = tile_slots(t.queries, t.documents, c.rows)
        tiles: T.int32 = slots * t.batches * t.query_heads
        share: T.int32 = 0
        if LEAST_CHUNKS > 0:
            tiles = tiles * t.splits
            share = T.truncmod(block, t.splits)
        tile: T.int32 = block
        word_phase: T.int32 = 0
        document: T.int32 = 0
        begin: T.int32 = 0
        end: T.int32 = 0
        first: T.int32 = 0
        while tile < tiles:
            locate_rows(slot, c.rows, t.cu_seqlens, t.documents, document, begin, end, first)
            if first < end:
                keys_of_document = T.meta_var(
                    document_keys(document, batch, t.cu_seqlens, t.cu_seqlens_k, t.key_ranges, t.ranges)
                )
                key_begin: T.int32 = keys_of_document[0]
                key_end: T.int32 = keys_of_document[1]
                # A query's position is its row and a shift. Taken off the bands, the shift leaves nothing to
                # do to those who compare distances of rows.
                shift: T.int32 = keys_of_document[2]
                document = table_row(document, t.documents, t.tables)
                last: T.int32 = T.min(first + c.rows, end) - 1
                near_lo: T.int32 = t.bands[document, head, 0] - shift
                near_hi: T.int32 = t.bands[document, head, 1] - shift
                far_lo: T.int32 = t.bands[document, head, 2] - shift
                far_hi: T.int32 = t.bands[document, head, 3] - shift
                s.words[LIVE] = 1
                s.words[BATCH] = batch
                s.words[HEAD] = head
                s.words[QUERY0] = first
                s.words[QUERY_END] = end
                s.words[KEY_BEGIN] = key_begin
                near = T.meta_var((NEAR_LO, NEAR_HI, NEAR_TOP, NEAR_CHUNKS))
                tell_band(s.words, near, first, last, near_lo, near_hi, key_begin, key_end)
                far = T.meta_var((FAR_LO, FAR_HI, FAR_TOP, FAR_CHUNKS))
                tell_band(s.words, far, first, last, far_lo, far_hi, key_begin, key_end)
                if LEAST_CHUNKS > 0:
                    take_share(s.words, share, t.splits)
                arrive(s, c.tile_full)
                # Not before the loader nears this tile's end: blocks that claim early end apart (by 7 % of
                # the kernel's time at (4, 16, 4096, 128) when the ticket was drawn a tile ahead).
                wait(s, c.tile_empty, word_phase)
                word_phase = word_phase ^ 1
            if DYNAMIC:
                ticket = T.alloc_local((1,), "uint32")
                T.ptx.atom.global_.add.u32(ticket[0], t.counters.ptr_to([0]), T.uint32(1))
                tile = T.cast(ticket[0], "int32") + workers
            else:
                tile = tile + workers
            if tile < tiles:
                whole: T.int32 = tile
                if LEAST_CHUNKS > 0:
                    whole = T.truncdiv(tile, t.splits)
                    share = tile - whole * t.splits
                locate(t, whole, slots, slot, batch, head)
        s.words[LIVE] = 0
        arrive(s, c.tile_full)
        if DYNAMIC:
            # The last block to run out of tiles leaves the counters as the next call needs them.
            finished = T.alloc_local((1,), "uint32")
            T.ptx.atom.global_.add.u32(finished[0], t.counters.ptr_to([1]), T.uint32(1))
            if T.cast(finished[0], "int32") == workers - 1:
                t.counters[0] = 0
                t.counters[1] = 0

    return find_first, decode


@T.inline
def prefetch_tables(t, lane):
    # Of each the first 4 KB.
    if lane * 32 < t.tables * t.query_heads * 4:
        T.ptx["prefetch.global.L2"](table_line(t.bands, lane))
    if lane * 32 <= t.documents:
        T.ptx["prefetch.global.L2"](table_line(t.cu_seqlens, lane))
        T.ptx["prefetch.global.L2"](table_line(t.cu_seqlens_k, lane))
    if lane * 32 < t.ranges * 3:
        T.ptx["prefetch.global.L2"](table_line(t.key_ranges, lane))


def loader(decisions: Mapping[str, int], c: Sizes) -> Callable[..., None]:
    """The loading warp's work, an inline function of shared memory, tensors, their maps and the lane.

    One lane issues the copies; all of them set to zero what a box of values holds before the keys that exist
    for the tile, such as another document's: its weight would be 0, but 0 times a NaN or an infinity is NaN.
    """
    LEAD = decisions["claim_lead"]
    UNITS = 8  # of 16 bytes, in a row of a plane

    @T.inline
    def copy(tensor_map, to, row, head, batch, barrier, bytes_):
        T.ptx.mbarrier.arrive.expect_tx.shared.b64(barrier, T.uint32(bytes_))
        T.ptx[LOAD](to, T.address_of(tensor_map), 0, row, 0, head, batch, barrier)

    @T.inline
    def clear_values(s, stage, rows, lane):
        unit: T.int32 = lane
        while unit < rows * UNITS:
            for plane in T.unroll(c.head_dim // PLANE):
                T.ptx["st.shared.v4.s32"](
                    s.v.ptr_to([stage * c.chunk + plane * (c.keys * PLANE) + unit * (PLANE // UNITS)]),
                    0, 0, 0, 0,
                )  # fmt: skip
            unit = unit + 32
        # Ordinary stores, then products that read them through the asynchronous proxy.
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.warp_sync()

    @T.inline
    def load_chunk(s, maps, position, key0, head, batch, begin, landed_phase, lane):
        stage: T.int32 = position % c.stages
        empty_phase: T.int32 = (position // c.stages) % 2 ^ 1
        # Rows of the box before the document's keys, where there are such rows.
        strangers: T.int32 = T.Select(begin > 0, T.max(begin - key0, 0), 0)
        landing: T.int32 = T.Select(strangers > 0, c.v_landed, c.v_full + stage)
        wait(s, c.k_empty + stage, empty_phase)
        if lane == 0:
            copy(maps.k, s.k.ptr_to([stage * c.chunk]), key0, head, batch,
                 s.barriers.ptr_to([c.k_full + stage]), c.chunk * 2)  # fmt: skip
        wait(s, c.v_empty + stage, empty_phase)
        if lane == 0:
            copy(maps.v, s.v.ptr_to([stage * c.chunk]), key0, head, batch,
                 s.barriers.ptr_to([landing]), c.chunk * 2)  # fmt: skip
        if strangers > 0:
            wait(s, c.v_landed, landed_phase)
            landed_phase = landed_phase ^ 1
            clear_values(s, stage, strangers, lane)
            if lane == 0:
                arrive(s, c.v_full + stage)
        position = position + 1

    @T.inline
    def load(s, t, maps, lane):
        position: T.int32 = 0
        order: T.int32 = 0  # of the tile among this block's
        landed_phase: T.int32 = 0
        live: T.int32 = 1
        while live == 1:
            wait(s, c.tile_full, order % 2)
            live = s.words[LIVE]
            if live == 1:
                batch: T.int32 = s.words[BATCH]
                head: T.int32 = s.words[HEAD]
                query0: T.int32 = s.words[QUERY0]
                begin: T.int32 = s.words[KEY_BEGIN]
                near_top: T.int32 = s.words[NEAR_TOP]
                near_chunks: T.int32 = s.words[NEAR_CHUNKS]
                far_top: T.int32 = s.words[FAR_TOP]
                chunks: T.int32 = near_chunks + s.words[FAR_CHUNKS]
                q_slot: T.int32 = order % c.queries_slots
                wait(s, c.q_empty + q_slot, (order // c.queries_slots) % 2 ^ 1)
                order = order + 1
                if lane == 0:
                    copy(maps.q, s.q.ptr_to([q_slot * (c.rows * c.head_dim)]), query0, head, batch,
                         s.barriers.ptr_to([c.q_full + q_slot]), c.rows * c.head_dim * 2)  # fmt: skip
                kv_head: T.int32 = head // t.group
                chunk: T.int32 = 0
                if chunks <= LEAD:
                    arrive(s, c.tile_empty)
                while chunk < chunks:
                    key0: T.int32 = T.Select(
                        chunk < near_chunks,
                        near_top - (chunk + 1) * c.keys,
                        far_top - (chunk - near_chunks + 1) * c.keys,
                    )
                    load_chunk(s, maps, position, key0, kv_head, batch, begin, landed_phase, lane)
                    chunk = chunk + 1
                    if chunk == chunks - LEAD:
                        arrive(s, c.tile_empty)

    return load
