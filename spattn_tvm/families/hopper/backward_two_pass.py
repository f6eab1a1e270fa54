"""The Hopper backward in two persistent passes: dQ, then dK and dV."""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import tvm
from tvm.script import tirx as T

from .backward_key_pass import key_pass, key_pass_maps
from .backward_query_pass import query_pass
from .backward_sizes import WARPGROUP_ROWS
from .parts import INF, match_tensors, rows_map

RESET_THREADS = 128


@T.inline
def reset(t):
    # What the passes share: the tile counters start at zero, and an odd Nq has one more row of statistics,
    # which must be finite.
    block = T.cta_id([(t.batches * t.query_heads + RESET_THREADS - 1) // RESET_THREADS])
    thread = T.thread_id([RESET_THREADS])
    row: T.int32 = block * RESET_THREADS + thread
    if row < 2:
        t.next_tile[row] = 0
    if row < t.batches * t.query_heads:
        if t.queries % 2 == 1:
            b: T.int32 = T.truncdiv(row, t.query_heads)
            t.stats[b, row - b * t.query_heads, t.queries // 2, 1] = T.float32(INF)
            t.stats[b, row - b * t.query_heads, t.queries // 2, 3] = T.float32(0)


def build_two_passes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> tvm.IRModule:
    """The backward in two passes, as :func:`.backward.build_hopper_backward` describes and checks it."""
    QUERY_ROWS = WARPGROUP_ROWS * decisions["dq_warpgroups"]
    KEY_ROWS = WARPGROUP_ROWS * decisions["dkv_warpgroups"]
    dq_pass = query_pass(decisions, head_dim, dtype)
    dkv_pass = key_pass(decisions, head_dim, dtype)

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
        scale: T.float32,
        workers: T.int32,
    ):
        t = T.meta_var(
            match_tensors(
                dtype, head_dim, q=q, k=k, v=v, o=o, lse=lse, do=do, dlse=dlse, bands=bands,
                cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, key_ranges=key_ranges, dq=dq, dk=dk, dv=dv,
                stats=stats, next_tile=next_tile,
            )
        )  # fmt: skip
        of_queries = T.meta_var(
            SimpleNamespace(
                q=rows_map(t.q, QUERY_ROWS),
                do=rows_map(t.do, QUERY_ROWS),
                o=rows_map(t.o, QUERY_ROWS),
                k=rows_map(t.k, decisions["dq_keys"]),
                v=rows_map(t.v, decisions["dq_keys"]),
            )
        )
        of_keys = T.meta_var(key_pass_maps(t, KEY_ROWS, decisions["dkv_queries"]))
        with T.attr({"tirx.device_entry": True}):
            reset(t)
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            dq_pass(t, of_queries, scale, workers)
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            dkv_pass(t, of_keys, scale, workers)

    return tvm.IRModule({"backward": backward})
