"""Banded attention of one to sixteen queries over a cache, for any NVIDIA GPU from sm_80 on.

What counts is memory: of each key 4 D bytes are read, and 4 D operations done, where a chip does hundreds in
that time. So a block takes up to 16 rows, the (query head of a group, query) pairs that read one key/value
head, and reads the union of their bands once: as disjoint ranges of keys, cut into tiles. With one row,
fifteen sixteenths of a tensor-core product are for nothing, which costs nothing: keys arrive more slowly.

Each warp has tiles and a ring of its own, filled by ``cp.async``, and an online softmax of its own: no warp
waits for another before the end, where their sums are merged. Where batch rows and key/value heads are too
few to fill the chip, the tiles of each are shared out among several blocks, and the last of up to 16 to
arrive merges what they left in memory, in a fixed order, which saves the launch of a second kernel.

The cache is contiguous, paged or a ring: a lane finds the block and the row of its key while the tile before
is on its way. Lengths, starts, pages and capacities come from the device and are clamped.

Measured on an H100, bfloat16, D = 128, spattention, one query, in us; a copy of as many bytes (read and
written) beside it. 16 keys a tile but for the fifth line:

=================================  ======================  =======================  ================
warps, stages, blocks, waves       (1, 16, 131072) 130 MB  (32, 32, 32768) 1.06 GB  (8, 32/8, 32768)
=================================  ======================  =======================  ================
copy                               49.2                    351                      60.0
4, 2, 2, 1                         54.1                    364                      66.9
4, 3, 2, 1                         56.9                    368                      70.5
8, 2, 1, 1 (queries loaded again)  54.7                    364                      66.9
4, 2, 1, 1 (32 keys)               57.4                    370                      69.1
4, 2, 2, 2                         61.7                    364                      71.3
=================================  ======================  =======================  ================

PyTorch's dense attention over the same caches took 354, 5548 and 355. Pages of 16 and of 64 keys, and rings,
took 3 % longer than contiguous caches, a step of (1, 16, 1024) 9.2 beside 6.8 of a copy. Of the speed of a
copy, D = 64 and D = 256 reached 0.92 and 0.91, float32 0.94 at D = 64, 0.80 at 128 and 0.42 at 256, where two
warps a multiprocessor are all that there is room for. One key/value head of 32 query heads, (1, 32/1,
131072), took 44 beside 26, with hundreds of parts merged by a single block 105.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .blocks import BLOCK, check_buildable, match_rows
from .decode_sizes import conflict

if TYPE_CHECKING:
    import tvm


def build_mma_decode(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> tvm.IRModule:
    """Build the decode kernel for a chip of ``arch``.

    The module exports ``decode(q, k, v, bands, cache_lengths, cache_starts, block_table, ring, o, lse,
    partial_o, partial_sums, arrived, scale, workers)``. Of ``dtype``, any strides with a contiguous last
    dimension, base addresses and strides multiples of 16 bytes: q and o (B, Hq, Nq, D); k and v (B, Hkv, S,
    D), or (pages, Hkv, page_size, D), or (B, 1, R, D) of rings. int32: bands (1, Hq, 4); cache_lengths and
    cache_starts (B,); block_table (B, M), M = 0 without pages; ring (Hkv, 2) of base and capacity, or (0,
    2). float32, contiguous: lse (B, Hq, Nq), natural logarithm; partial_o (P, min(16, Hq / Hkv * Nq), D) and
    partial_sums (P, the same, 4), where P limits what keys are split over. arrived int32 (P,), zeros, which
    it leaves as zeros. scale float32, of any sign; workers int32, multiprocessors.

    Row r of q stands at position ``cache_lengths[b] - Nq + r`` and attends to the keys ``j >=
    cache_starts[b]`` whose distance lies in its head's bands. A query without keys gets o = 0 and lse =
    -inf. Slots that hold no key of the union of a block's bands are not read.

    Parameters
    ----------
    decisions : mapping of str to int
        ``warps`` of a block, ``key_rows`` of a tile, ``stages`` of a warp's ring (one of which it computes
        with), ``blocks_per_multiprocessor``, ``waves`` of such blocks that the keys are split over,
        ``least_tiles`` (of a warp, before its keys are split further), ``queries_in_registers`` (0: loaded
        again for each tile).
    head_dim : int
        A multiple of 16.
    dtype : {"bfloat16", "float16", "float32"}
    arch : str
        Such as ``"sm_80"``.

    Returns
    -------
    tvm.IRModule
        For ``tvm.compile(..., tir_pipeline="tirx")``.

    Raises
    ------
    ValueError
        When the head dim, the dtype or the combination of decisions can't work.
    """
    from types import SimpleNamespace

    from tvm import IRModule
    from tvm.script import tirx as T

    from .decode_tile import DecodeTile

    check_buildable(conflict, decisions, head_dim, dtype, arch)
    blocks = decisions["blocks_per_multiprocessor"] * decisions["waves"]

    @T.prim_func
    def decode(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        bands_handle: T.handle,
        lengths_handle: T.handle,
        starts_handle: T.handle,
        table_handle: T.handle,
        ring_handle: T.handle,
        o_handle: T.handle,
        lse_handle: T.handle,
        partial_handle: T.handle,
        sums_handle: T.handle,
        arrived_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "decode"})
        B, HQ, NQ, BLOCKS, HEADS, ROWS = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        TABLES, PAGES, RINGS, PARTS, PART_ROWS = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        bands = T.match_buffer(bands_handle, (1, HQ, 4), "int32")
        lengths = T.match_buffer(lengths_handle, (B,), "int32")
        starts = T.match_buffer(starts_handle, (B,), "int32")
        block_table = T.match_buffer(table_handle, (TABLES, PAGES), "int32")
        ring = T.match_buffer(ring_handle, (RINGS, 2), "int32")
        lse = T.match_buffer(lse_handle, (B, HQ, NQ), "float32")
        partial_o = T.match_buffer(partial_handle, (PARTS, PART_ROWS, head_dim), "float32", align=16)
        partial_sums = T.match_buffer(sums_handle, (PARTS, PART_ROWS, 4), "float32", align=8)
        arrived = T.match_buffer(arrived_handle, (PARTS,), "int32")
        of_queries, of_keys = T.meta_var((B, HQ, NQ)), T.meta_var((BLOCKS, HEADS, ROWS))
        rows = T.meta_var(
            match_rows(
                dtype, head_dim, of_queries, of_keys, q=q_handle, k=k_handle, v=v_handle, o=o_handle
            )
        )  # fmt: skip
        query_heads: T.let[T.int32] = T.cast(HQ, "int32")
        queries: T.let[T.int32] = T.cast(NQ, "int32")
        kv_heads: T.let[T.int32] = T.cast(T.Select(RINGS > 0, RINGS, HEADS), "int32")
        row_tiles: T.let[T.int32] = (T.truncdiv(query_heads, kv_heads) * queries + (BLOCK - 1)) // BLOCK
        items: T.let[T.int32] = T.cast(B, "int32") * kv_heads * row_tiles
        splits: T.let[T.int32] = T.max(T.truncdiv(T.min(blocks * workers, T.cast(PARTS, "int32")), items), 1)
        call = T.meta_var(
            SimpleNamespace(
                **vars(rows), lse=lse, bands=bands, lengths=lengths, starts=starts,
                block_table=block_table, ring=ring, partial_o=partial_o, partial_sums=partial_sums,
                arrived=arrived, scale=scale, query_heads=query_heads, kv_heads=kv_heads, queries=queries,
                blocks=T.cast(BLOCKS, "int32"), rows=T.cast(ROWS, "int32"), pages=T.cast(PAGES, "int32"),
                rings=T.cast(RINGS, "int32"), row_tiles=row_tiles, items=items, splits=splits,
            )
        )  # fmt: skip
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": decisions["blocks_per_multiprocessor"]})
        tile = T.meta_var(DecodeTile(decisions, head_dim, dtype, call))
        tile.run()

    return IRModule({"decode": decode})
