"""A step of decoding for CPUs: a few queries to the keys of a cache, which are read once.

A step is bound by memory, so what counts is that only the keys in the bands are read, each row of keys and
values once for all queries of all query heads that share it, and that all workers read. Of a batch row and a
key/value head the keys are the union of the bands of its query heads, walked run by run; they are divided
into equal parts, which are combined afterwards where there are several.

The vector lanes are dimensions of the head. ``lanes`` keys at a time are multiplied with a query, one vector
of partial sums for each, and those vectors are added up crosswise, two to one, until one is left that holds
the scores of all ``lanes`` keys: 3 operations a key, where adding up one vector after the other takes 16.
"""

from types import SimpleNamespace

from tvm import IRModule
from tvm.script import tirx as T

from .decode_partials import Partials
from .decode_worker import DecodeWorker
from .rows import strided_rows


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
        q = strided_rows(q_handle, (B, HQ, N, head_dim), dtype)
        k = strided_rows(k_handle, (KB, KH, KN, head_dim), dtype)
        v = strided_rows(v_handle, (KB, KH, KN, head_dim), dtype)
        bands = T.match_buffer(bands_handle, (1, HQ, 4), "int32", align=4)
        cache_lengths = T.match_buffer(cache_lengths_handle, (B,), "int32", align=4)
        cache_starts = T.match_buffer(cache_starts_handle, (B,), "int32", align=4)
        block_table = T.match_buffer(block_table_handle, (B, PAGES), "int32", align=4)
        ring = T.match_buffer(ring_handle, (RINGS, 2), "int32", align=4)
        o = strided_rows(o_handle, (B, HQ, N, head_dim), dtype)
        lse = T.match_buffer(lse_handle, (B, HQ, N), "float32", align=4)
        partial_o = T.match_buffer(partial_o_handle, (PARTIALS, ROWS, head_dim), "float32", align=4)
        partial_sums = T.match_buffer(partial_sums_handle, (PARTIALS, ROWS, 2), "float32", align=4)
        queries: T.let[T.int32] = T.cast(N, "int32")
        kv_heads: T.let[T.int32] = T.cast(T.Select(RINGS > 0, RINGS, KH), "int32")
        group: T.let[T.int32] = T.cast(HQ, "int32") // kv_heads
        shares: T.let[T.int32] = T.cast(B, "int32") * kv_heads
        parts: T.let[T.int32] = (decisions["parts"] * workers + shares - 1) // shares
        call = T.meta_var(
            SimpleNamespace(
                q=q, k=k, v=v, bands=bands, cache_lengths=cache_lengths, cache_starts=cache_starts,
                block_table=block_table, ring=ring, scale=scale, queries=queries, kv_heads=kv_heads,
                group=group, shares=shares, parts=parts, blocks=KB, rows=KN, pages=PAGES, rings=RINGS,
            )
        )  # fmt: skip
        partials = T.meta_var(Partials(o, lse, partial_o, partial_sums, decisions["lanes"]))
        for worker in T.parallel(workers):
            thread = T.meta_var(DecodeWorker(decisions, call, partials))
            thread.run(worker, workers)
        if parts > 1:
            for worker in T.parallel(workers):
                partials.combine(call, worker, workers)

    return IRModule({"decode": decode})
