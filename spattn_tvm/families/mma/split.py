"""Banded attention forward for few queries and many keys: the keys of each tile split over blocks.

With fewer tiles of queries than multiprocessors, as in the last chunks of a prompt or in its continuation,
the time is that of one tile's keys, however few bytes they are. Here a tile's chunks, in the order in which
the forward walks them, are shared out among blocks; each leaves float32 outputs, not yet divided, and sums,
and a second kernel puts those of a row together, one warp for each row, always in the same order. (Were it
the last block of a tile to arrive, as in the decode, it would read a megabyte alone.)

The shares of a tile differ by one chunk at most. Their number follows from the places for blocks that the
chip has, and is bounded by the lanes of the warp that puts them together.

Measured on an H100 (bfloat16, head dim 128, 16 heads, L2 cleared, us), beside the other families and twice
the time of a copy of as many bytes, plus 10:

=======  ======  =====  ===  ======  =====
queries  keys    split  mma  hopper  bytes
=======  ======  =====  ===  ======  =====
128      8192    24     42   25      32
128      32768   36     126  61      49
256      16384   34     71   44      40
256      32768   45     130  83      52
512      32768   68     131  74      56
768      32768   111    133  76      60
1024     32768   120    140  80      66
=======  ======  =====  ===  ======  =====

From 64 tiles on products are the bound, not bytes: 512 queries that attend to 4096 keys each in 16 heads are
16.6 GFLOP, in 56 us 300 TFLOP/s, of which the second kernel and two launches take 10 us; `mma` makes 350 with
the chip full. 1024 queries in 66 us would be 500 TFLOP/s; whole sequences of 16384 tokens run at 610 in the
Hopper family, whose keys are not split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .abi import MOST_SPLITS
from .blocks import check_buildable, match_rows
from .forward import conflict

if TYPE_CHECKING:
    import tvm


def build_mma_split(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> tvm.IRModule:
    """Build the forward with split keys for a chip of ``arch``.

    The module exports ``forward(q, k, v, bands, cu_seqlens, cu_seqlens_k, key_ranges, o, lse, partial_o,
    partial_sums, scale, workers)``: as `build_mma_forward`'s, and float32, contiguous: partial_o (P, D) and
    partial_sums (P, 4), workspaces, where P / (B * Hq * Nq), at least 1, limits what keys are split over;
    workers int32, multiprocessors.

    Parameters
    ----------
    decisions : mapping of str to int
        As `build_mma_forward`'s, and ``least_chunks`` (that a share has, before keys are split further).
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

    from spattn_tvm.domains.tiles import tile_slots

    from .split_tile import Merge, SplitTile

    check_buildable(conflict, decisions, head_dim, dtype, arch)
    blocks = decisions["blocks_per_multiprocessor"]
    rows_of_tile = decisions["warps"] * decisions["warp_rows"]

    @T.prim_func
    def forward(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        bands_handle: T.handle,
        boundaries_handle: T.handle,
        key_boundaries_handle: T.handle,
        key_ranges_handle: T.handle,
        o_handle: T.handle,
        lse_handle: T.handle,
        partial_handle: T.handle,
        sums_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "forward"})
        B, HQ, HKV, N, NK = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        M, BOUNDS, RANGES, PARTS = T.int64(), T.int64(), T.int64(), T.int64()
        bands = T.match_buffer(bands_handle, (M, HQ, 4), "int32")
        boundaries = T.match_buffer(boundaries_handle, (BOUNDS,), "int32")
        key_boundaries = T.match_buffer(key_boundaries_handle, (BOUNDS,), "int32")
        key_ranges = T.match_buffer(key_ranges_handle, (RANGES, 3), "int32")
        lse = T.match_buffer(lse_handle, (B, HQ, N), "float32")
        partial_o = T.match_buffer(partial_handle, (PARTS, head_dim), "float32", align=16)
        partial_sums = T.match_buffer(sums_handle, (PARTS, 4), "float32", align=16)
        of_queries, of_keys = T.meta_var((B, HQ, N)), T.meta_var((B, HKV, NK))
        rows = T.meta_var(
            match_rows(
                dtype, head_dim, of_queries, of_keys, q=q_handle, k=k_handle, v=v_handle, o=o_handle
            )
        )  # fmt: skip
        batches: T.let[T.int32] = T.cast(B, "int32")
        query_heads: T.let[T.int32] = T.cast(HQ, "int32")
        length: T.let[T.int32] = T.cast(N, "int32")
        documents: T.let[T.int32] = T.cast(BOUNDS, "int32") - 1
        tiles: T.let[T.int32] = tile_slots(length, documents, rows_of_tile) * batches * query_heads
        room: T.let[T.int32] = T.cast(T.min(T.truncdiv(PARTS, B * HQ * N), T.int64(MOST_SPLITS)), "int32")
        splits: T.let[T.int32] = T.max(T.min(T.truncdiv(blocks * workers, tiles), room), 1)
        call = T.meta_var(
            SimpleNamespace(
                **vars(rows), lse=lse, bands=bands, boundaries=boundaries, key_boundaries=key_boundaries,
                key_ranges=key_ranges, scale=scale, batches=batches, query_heads=query_heads,
                kv_heads=T.cast(HKV, "int32"), length=length, documents=documents,
                tables=T.cast(M, "int32"), num_ranges=T.cast(RANGES, "int32"), partial_o=partial_o,
                partial_sums=partial_sums, splits=splits,
            )
        )  # fmt: skip
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": blocks}):
            tile = T.meta_var(SplitTile(decisions, head_dim, dtype, arch, call))
            tile.run()
        with T.attr({"tirx.device_entry": True}):
            merge = T.meta_var(Merge(head_dim, dtype, call))
            merge.run()

    return IRModule({"forward": forward})
