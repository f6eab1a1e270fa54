"""The Hopper backward in two persistent passes: dQ, then dK and dV."""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import tvm
from tvm.script import tirx as T

from spattn_tvm.domains.numbers import INF

from .backward_key_pass import key_pass, key_pass_maps
from .backward_query_pass import query_pass
from .parts import address, match_tensors, rows_map
from .support import WARPGROUP_ROWS

RESET_THREADS = 128
TURN = 1  # the named barrier between the passes


@T.inline
def reset(t):
    # What the passes share: the tile counters start at zero, and an odd Nq has one more row of statistics,
    # which must be finite.
    block = T.cta_id([(t.batches * t.query_heads + RESET_THREADS - 1) // RESET_THREADS])
    thread = T.thread_id([RESET_THREADS])
    T.ptx.griddepcontrol.launch_dependents()
    row: T.int32 = block * RESET_THREADS + thread
    if row < 2:
        t.next_tile[row] = 0
    if row < t.batches * t.kv_heads:
        t.progress[row] = 0
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

    THREADS = 128 * (decisions["dkv_warpgroups"] + 1)

    # Copies will write where threads have written.
    @T.inline
    def take_turn():
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.warp_sync()
        T.ptx.bar.sync(T.uint32(TURN), T.uint32(THREADS))

    # A CTA that finds no more tiles of queries goes on with tiles of keys. Their rings lie where the first
    # pass has none of its own, and are ready from the start.
    @T.inline
    def both_passes(t, of_queries, of_keys, scale, workers):
        block = T.cta_id([workers])
        warp = T.warp_id([THREADS // 32])
        thread = T.thread_id([THREADS])
        arena = T.alloc_buffer((max(dq_pass.bytes, dkv_pass.bytes),), "uint8", scope="shared.dyn", align=1024)
        base: T.uint32 = T.cuda.cvta_generic_to_shared(arena.data)
        first_at = T.meta_var(partial(address, base, dq_pass.offsets))
        second_at = T.meta_var(partial(address, base, dkv_pass.offsets))
        lane: T.int32 = thread % 32
        if thread == 0:
            dq_pass.start(first_at)
            dkv_pass.start(second_at)
        # CTAs start while the counters are still being cleared.
        T.ptx.griddepcontrol.wait()
        T.cuda.cta_sync()
        if warp < 4:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](decisions["dq_producer_registers"])
            dq_pass.produce(first_at, warp, lane, t, of_queries)
            take_turn()
            dkv_pass.produce(second_at, warp, lane, t, of_keys, block, workers)
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](decisions["dq_registers"])
            dq_pass.consume(first_at, warp, lane, t, scale)
            take_turn()
            dkv_pass.consume(second_at, warp, lane, t, scale)

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
        progress: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        t = T.meta_var(
            match_tensors(
                dtype, head_dim, q=q, k=k, v=v, o=o, lse=lse, do=do, dlse=dlse, bands=bands,
                cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, key_ranges=key_ranges, dq=dq, dk=dk, dv=dv,
                stats=stats, next_tile=next_tile, progress=progress,
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
            both_passes(t, of_queries, of_keys, scale, workers)

    return tvm.IRModule({"backward": backward})
