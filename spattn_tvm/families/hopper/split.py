"""Hopper forward for few queries and many keys: the keys of each tile split over blocks.

With fewer tiles of queries than multiprocessors the time of the forward is that of one tile's keys. Here a
tile's chunks, in the order in which the forward loads them, are shared out among blocks
(`tiles.share_of`), each of which works at its share as the forward does at a tile. It leaves float32 outputs,
not yet divided, and sums; a second kernel puts those of a row together, one warp for each row, always in the
same order. Where a tile's keys are one share, the blocks write the results and there is no second kernel.

Measured on an H100 (bfloat16, head dim 128, 16 heads, 32768 keys, L2 cleared, us), beside the other families
and twice the time of a copy of as many bytes, plus 10:

===========  =======  =====  =========  ======  =====
bands        queries  split  mma_split  hopper  bytes
===========  =======  =====  =========  ======  =====
spattention  128      30     36         60      49
spattention  256      36     45         71      51
spattention  384      40     56         73      54
spattention  512      52     66         72      55
spattention  640      55     82         75      57
spattention  768      58     111        77      59
spattention  1024     79     118        79      63
causal       128      113    123        394     197
causal       384      157    292        470     198
causal       768      281    661        471     199
===========  =======  =====  =========  ======  =====

The whole forward's figures are those of tiles of 192 rows; with tiles of 128 and chunks of 96 keys, which are
its default there, it takes 62 to 63 with 384 to 768 queries and 70 with 1024, where 6 tiles of 192 rows a
head keep 96 multiprocessors busy, and 4 shares of each, in three rounds, took 90.

Tiles of 128 rows took 30, 34, 46, 48, 62 and 69 with 128 to 768 queries. Level or lost with them: a second
kernel launched beforehand (programmatic dependent launch: up to 2 us less from 32 tiles on, 2 more with up to
4), chunks of 128 keys (1 to 3 more where keys are split), and those without overlap (3 to 10). Head dim 64
has such tiles and chunks of 128 keys as its default: 23, 28, 40 and 53 with 128, 256, 512 and 768 queries,
where `mma_split` took 28, 34, 48 and 61, `hopper` 56, 71, 72 and 73, and tiles of 192 rows 23, 29, 42 and 49.
At head dim 128 tiles of 128 rows with chunks of 96 keys took 33, 38, 45, 47 and 63 with 128, 256, 384, 512
and 640 queries, in a run in which tiles of 192 took 32, 38, 42, 54 and 58.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm


def build_hopper_split(decisions: Mapping[str, int], head_dim: int, dtype: str) -> tvm.IRModule:
    """Build the forward with split keys for sm_90a.

    The module exports ``forward(q, k, v, bands, cu_seqlens, cu_seqlens_k, key_ranges, o, lse, partial_o,
    partial_sums, counters, scale, workers)``: as `build_hopper_forward`'s, and float32, contiguous: partial_o
    (P, D) and partial_sums (P, 4), workspaces, where P / (B * Hq * Nq), rounded down and from 1 to 32, is
    what keys are split over.

    Parameters
    ----------
    decisions : mapping of str to int
        As `build_hopper_forward`'s, and ``least_chunks`` (that a share has, before keys are split further).
    head_dim : int
        A multiple of 64.
    dtype : {"bfloat16", "float16"}

    Returns
    -------
    tvm.IRModule
        For ``tvm.compile(..., tir_pipeline="tirx")``.

    Raises
    ------
    ValueError
        When the head dim, the dtype or the combination of decisions can't work.
    """
    from tvm import IRModule
    from tvm.script import tirx as T

    from spattn_tvm.families.shares import MOST_SHARES

    from .forward_blocks import ForwardBlocks
    from .parts import match_tensors
    from .split_merge import Merge

    blocks = ForwardBlocks(decisions, head_dim, dtype)

    @T.prim_func
    def forward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        bands: T.handle,
        cu_seqlens: T.handle,
        cu_seqlens_k: T.handle,
        key_ranges: T.handle,
        o: T.handle,
        lse: T.handle,
        partial_o: T.handle,
        partial_sums: T.handle,
        counters: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "forward"})
        t = T.meta_var(
            match_tensors(
                dtype, head_dim, q=q, k=k, v=v, bands=bands, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
                key_ranges=key_ranges, o=o, lse=lse, partial_o=partial_o, partial_sums=partial_sums,
                counters=counters,
            )
        )  # fmt: skip
        rows: T.let[T.int64] = T.cast(t.batches * t.query_heads, "int64") * T.cast(t.queries, "int64")
        shares: T.let[T.int64] = T.truncdiv(T.cast(t.partial_sums.shape[0], "int64"), rows)
        splits: T.let[T.int32] = T.cast(T.max(T.min(shares, T.int64(MOST_SHARES)), T.int64(1)), "int32")
        call = T.meta_var(SimpleNamespace(**vars(t), splits=splits, length=t.queries, scale=scale))
        maps = T.meta_var(blocks.maps(call))
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            blocks.run(call, maps, scale, workers)
        if splits > 1:
            with T.attr({"tirx.device_entry": True}):
                merge = T.meta_var(Merge(head_dim, dtype, call))
                merge.run()

    return IRModule({"forward": forward})
