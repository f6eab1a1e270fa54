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

from spattn_tvm.families.shares import MOST_SHARES

from .blocks import check_buildable, match_call
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
        PARTS = T.int64()
        partial_o = T.match_buffer(partial_handle, (PARTS, head_dim), "float32", align=16)
        partial_sums = T.match_buffer(sums_handle, (PARTS, 4), "float32", align=16)
        call = T.meta_var(
            match_call(
                dtype, head_dim, scale, bound=("batches", "query_heads", "length", "documents"),
                q=q_handle, k=k_handle, v=v_handle, bands=bands_handle, boundaries=boundaries_handle,
                key_boundaries=key_boundaries_handle, key_ranges=key_ranges_handle, o=o_handle,
                lse=lse_handle,
            )
        )  # fmt: skip
        B, HQ, N = T.meta_var(call.of_queries)
        tiles: T.let[T.int32] = (
            tile_slots(call.length, call.documents, rows_of_tile) * call.batches * call.query_heads
        )
        room: T.let[T.int32] = T.cast(T.min(T.truncdiv(PARTS, B * HQ * N), T.int64(MOST_SHARES)), "int32")
        splits: T.let[T.int32] = T.max(T.min(T.truncdiv(blocks * workers, tiles), room), 1)
        shares = T.meta_var(
            SimpleNamespace(**vars(call), partial_o=partial_o, partial_sums=partial_sums, splits=splits)
        )
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": blocks}):
            tile = T.meta_var(SplitTile(decisions, head_dim, dtype, arch, shares))
            tile.run()
        with T.attr({"tirx.device_entry": True}):
            merge = T.meta_var(Merge(head_dim, dtype, shares))
            merge.run()

    return IRModule({"forward": forward})
