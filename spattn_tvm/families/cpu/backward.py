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

from __future__ import annotations

import math
from types import SimpleNamespace

from tvm import IRModule
from tvm.script import tirx as T

from .backward_worker import BackwardWorker
from .register_tile import REGISTERS
from .rows import BandedRows, strided_rows
from .segments import Division

# The row that a worker clears or casts.
BATCH, HEAD, ROW = range(3)


@T.inline
def find_row(number, rows, heads, place):
    """Of the rows of all heads: batch entry, head and number in its head."""
    place[BATCH] = number // rows // heads
    place[HEAD] = number // rows % heads
    place[ROW] = number % rows


@T.inline
def clear(tensor, rows, call, place, worker, workers):
    """Zeros in a worker's share of the rows of a (B, H, rows, D) tensor."""
    total: T.let[T.int32] = call.batch_heads * rows
    share: T.let[T.int32] = (total + workers - 1) // workers
    for number in T.serial(worker * share, T.min(total, (worker + 1) * share)):
        find_row(number, rows, call.heads, place)
        for d in T.vectorized(call.head_dim):
            tensor[place[BATCH], place[HEAD], place[ROW], d] = T.float32(0)


@T.inline
def cast(source, target, dtype, call, place, worker, workers):
    """A worker's share of the rows of one (B, H, N, D) tensor to another."""
    lanes = T.meta_var(math.gcd(call.head_dim, 16))
    total: T.let[T.int32] = call.batch_heads * call.queries
    share: T.let[T.int32] = (total + workers - 1) // workers
    for number in T.serial(worker * share, T.min(total, (worker + 1) * share)):
        find_row(number, call.queries, call.heads, place)
        for chunk in T.serial(call.head_dim // lanes):
            for lane in T.vectorized(lanes):
                target[place[BATCH], place[HEAD], place[ROW], chunk * lanes + lane] = T.cast(
                    source[place[BATCH], place[HEAD], place[ROW], chunk * lanes + lane], dtype
                )


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
    is_summed_in_dq = dtype == "float32"

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
        SUMS = T.int64()
        call = T.meta_var(
            BandedRows(
                head_dim, dtype, q_handle, k_handle, v_handle, bands_handle, cu_seqlens_handle,
                cu_seqlens_k_handle, key_ranges_handle,
            )
        )  # fmt: skip
        dq = strided_rows(dq_handle, call.of_queries, dtype)
        dk = T.match_buffer(dk_handle, call.of_key_gradients, "float32", align=4)
        dv = T.match_buffer(dv_handle, call.of_key_gradients, "float32", align=4)
        dq_sum = T.match_buffer(dq_sum_handle, (SUMS, *call.of_queries[1:]), "float32", align=4)
        sums = dq if is_summed_in_dq else dq_sum
        rows = T.meta_var(
            SimpleNamespace(
                o=strided_rows(o_handle, call.of_queries, dtype),
                lse=T.match_buffer(lse_handle, call.of_statistics, "float32", align=4),
                do=strided_rows(do_handle, call.of_queries, dtype),
                dlse=T.match_buffer(dlse_handle, call.of_statistics, "float32", align=4),
                dq=dq, dk=dk, dv=dv, sums=sums,
            )
        )  # fmt: skip
        call.bind_sizes()
        division = T.meta_var(Division(call, workers, decisions["query_rows"]))
        division.find_phases()

        for worker in T.parallel(workers):
            place = T.alloc_buffer((3,), "int32", annotations=REGISTERS)
            clear(dk, call.keys, call, place, worker, workers)
            clear(dv, call.keys, call, place, worker, workers)
            if division.is_split:
                clear(sums, call.queries, call, place, worker, workers)
        for phase in T.serial(division.phases):
            for worker in T.parallel(workers):
                thread = T.meta_var(BackwardWorker(decisions, dtype, call, rows, division, scale))
                thread.run(phase, worker, workers)
        if not is_summed_in_dq:
            if division.is_split:
                for worker in T.parallel(workers):
                    place = T.alloc_buffer((3,), "int32", annotations=REGISTERS)
                    cast(sums, dq, dtype, call, place, worker, workers)

    return IRModule({"backward": backward})
