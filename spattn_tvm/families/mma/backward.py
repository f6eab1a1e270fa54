"""Banded attention backward for any NVIDIA GPU from sm_80 on: ``mma.sync``, ``ldmatrix``, ``cp.async``.

**One shape of work for two passes.** A tile keeps the *rows* of one side in shared memory, *chunks* of the
other side's rows (the columns of its score matrix) stream past through a ring:

========  =================  =================  ==============================  =============================
pass      rows               columns            accumulates                     executed products a pair
========  =================  =================  ==============================  =============================
dQ        queries (Q, dO)    keys (K, V)        dQ += dS K                      3
dK, dV    keys (K, V)        queries (Q, dO)    dK += dS^T Q, dV += P^T dO      4, or 5 with dQ by atomics
========  =================  =================  ==============================  =============================

Scores come out with the tile's rows in rows in both, so that P and dS leave the accumulators as the left
operands of the next products. With ``one_pass`` the second pass makes dQ too: dS goes through shared
memory, its product with K is added into a float32 ``dq_sum`` by atomics, and a last kernel scales and casts
it. Without, each gradient is summed by one warp in one order, so it is bitwise equal from run to run.

**Wide outputs.** dK and dV of 16 keys at head dim 256 are 256 registers a thread. ``dkv_split`` warps share
rows: each makes the scores of its part of the columns, takes its own P and dS from registers and the
others' through shared memory, and accumulates its part of the head dimension. With 32 rows a warp, that
also halves what ``ldmatrix`` reads for a product.

**Warps drift.** With two stages or more no barrier holds the block together. Every thread *arrives* when
its copies of the next chunk and its part of dS are there, which is waited for before dQ and the next chunk,
and has *left* when it is through with a chunk's rows, which is waited for before they are overwritten.
Buffers of P and dS alternate. Warps that share rows meet once a chunk.

**Shared memory** rows are padded by 16 bytes: with a row of an even number of 16-byte units, the pitch is
an odd number of them, so 8 consecutive rows lie in different banks, for ``ldmatrix`` as for the 4-byte
loads that float32 needs where 2-byte types have ``ldmatrix.trans``. Offsets inside a tile are immediates.

**float32** runs as three TF32 products: `blocks.py` says how and with what error.

Measured on an H200 (bfloat16, spattention, L2 cleared, medians of 11 calls; ms and useful TFLOP/s):

=====================================================  =================  ==================  ================
structure (tile rows x warps that share rows)          4, 16, 4096, 128   1, 16, 16384, 128   4, 16, 4096, 64
=====================================================  =================  ==================  ================
one pass, 128 keys x 2, chunks of 64                   0.667 (181)        1.71 (283)          -
the same with a barrier of the block instead           0.716 (169)        1.91 (254)          -
one pass, 64 keys x 2, one stage, two blocks           0.733 (165)        2.10 (231)          -
one pass, 128 keys x 1, 32 rows a warp                 -                  -                   0.359 (169)
two passes, 128 keys x 2, chunks of 64                 0.791 (153)        2.16 (224)          -
two passes, 64 keys x 2, one stage, two blocks         0.773 (157)        2.25 (215)          -
two passes, 64 keys x 1, 16 rows a warp                0.815 (148)        2.45 (198)          -
two passes, 128 keys x 1, 32 rows a warp               -                  -                   0.414 (147)
=====================================================  =================  ==================  ================

In the first row the key pass takes 0.538 ms, of which the atomic adds are 0.053; delta and clearing dq_sum
take 0.068, casting it 0.051: the last two run at the memory's speed. Own P and dS out of registers were
worth 0.027 ms, warps that drift 0.05. Adds of two floats instead of four cost 0.11 ms in the first row and
0.33 in the second. What did not help: a barrier of the block before dQ beside one of the sharing warps
(0.745), two or four rows at once in the kernels that move data, dQ of a chunk beside the next chunk's
scores, upper keys a chunk ahead of lower ones, delta inside the dQ pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .backward_sizes import conflict, passes
from .blocks import SIZES, check_buildable, match_call


def build_mma_backward(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> Any:
    """The backward of banded attention as one function ``backward`` that launches three kernels: delta, then
    the dQ and the dK/dV pass, or the one pass and the kernel that scales and casts dq_sum.

    Exported: ``backward(q, k, v, o, lse, do, dlse, bands, cu_seqlens, cu_seqlens_k, key_ranges, dq, dk, dv,
    delta, [dq_sum,] scale, workers)``.
    Batch, heads, lengths, strides, layout and documents are data of the call. Nothing synchronises; nothing
    is allocated.

    ============== ================ ========= ================================================================
    argument       shape            dtype     meaning
    ============== ================ ========= ================================================================
    q, o, do, dq   (B, Hq, Nq, D)   `dtype`   any strides with a contiguous last dimension
    k, v, dk, dv   (B, Hkv, Nk, D)  `dtype`   likewise; dk and dv are summed over the group in registers
    lse, dlse      (B, Hq, Nq)      float32   contiguous; natural logarithm, -inf for a query with no key
    bands          (M, Hq, 4)       int32     near_lo, near_hi, far_lo, far_hi; a document's row: table_row
    cu_seqlens     (documents + 1,) int32     first query of each document, and Nq
    cu_seqlens_k   (documents + 1,) int32     first key of each document, and Nk
    key_ranges     (0, 1 or B, 3)   int32     as `document_keys` takes them
    delta          (B, Hq, Nq)      float32   workspace, contiguous: rowsum(do * o) - dlse
    dq_sum         (B, Hq, Nq, D)   float32   workspace, contiguous, with ``one_pass`` only; cleared here
    scale          scalar           float32   factor of the scores, of any sign
    workers        scalar           int32     multiprocessors of the device; not used
    ============== ================ ========= ================================================================

    B, Hq, Hkv, Nq and Nk are at least 1; addresses and the strides of dimensions longer than 1 are multiples
    of 16 bytes. Offsets are 64-bit. Keys that don't exist are never read, and queries without keys in their
    own tile alone, whose rows of dq are then cleared.

    Parameters
    ----------
    decisions : mapping of str to int
        ``one_pass``; ``dq_`` and ``dkv_`` each: ``warps`` (along the tile's rows), ``rows`` (of a warp, 16
        or 32), ``strip`` (columns that a warp computes at once), ``strips`` (in a chunk, the columns of a
        stage; ``dkv_strips`` = 0: one for each of the warps that share rows, which exchange P and dS),
        ``stages`` (of the ring, 1: loads wait for the products), ``hold`` (the tile's rows as operands in
        registers), ``heads`` (whose tiles are interleaved), ``blocks`` (that a multiprocessor should hold,
        which limits registers); ``dkv_split`` (warps that share rows); ``atomic_floats`` (of one atomic
        add, with ``one_pass``; more than 1 from sm_90 on).
    head_dim : int
        D: a multiple of 16 up to 256.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    arch : str
        ``"sm_80"`` and so on: what a block may have of shared memory and registers, and whether atomic adds
        of several floats exist.

    Returns
    -------
    tvm.IRModule
        For ``tvm.compile(..., tir_pipeline="tirx")`` with a CUDA target.

    Raises
    ------
    ValueError
        For another head dim or dtype, and where the decisions don't suit the chip.
    """
    from types import SimpleNamespace

    from tvm import IRModule, tirx
    from tvm.script import tirx as T

    from .backward_pass import TilePass
    from .backward_rows import cast_sum, make_delta

    check_buildable(conflict, decisions, head_dim, dtype, arch)
    one_pass = bool(decisions["one_pass"])
    *of_dq, dkv_sizes = passes(decisions, head_dim, dtype)

    @T.prim_func
    def backward(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        o_handle: T.handle,
        lse_handle: T.handle,
        do_handle: T.handle,
        dlse_handle: T.handle,
        bands_handle: T.handle,
        boundaries_handle: T.handle,
        key_boundaries_handle: T.handle,
        key_ranges_handle: T.handle,
        dq_handle: T.handle,
        dk_handle: T.handle,
        dv_handle: T.handle,
        delta_handle: T.handle,
        dq_sum_handle: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        call = T.meta_var(
            match_call(
                dtype, head_dim, scale, bound=SIZES, q=q_handle, k=k_handle, v=v_handle, o=o_handle,
                lse=lse_handle, do=do_handle, dlse=dlse_handle, bands=bands_handle,
                boundaries=boundaries_handle, key_boundaries=key_boundaries_handle,
                key_ranges=key_ranges_handle, dq=dq_handle, dk=dk_handle, dv=dv_handle, delta=delta_handle,
                dq_sum=dq_sum_handle,
            )
        )  # fmt: skip
        rows = T.meta_var(math.prod(call.of_queries))
        bands = T.meta_var(call.bands)
        flat_lse = T.decl_buffer((rows,), "float32", data=call.lse.data)
        flat_delta = T.decl_buffer((rows,), "float32", data=call.delta.data)
        # In two passes there is none, and nobody looks at this one.
        flat_sum = T.decl_buffer(
            (rows * head_dim,), "float32", data=call.dq_sum.data if one_pass else call.delta.data
        )
        flat_bands = T.decl_buffer((math.prod(bands.shape),), "int32", data=bands.data)
        flat = T.meta_var({"lse": flat_lse, "delta": flat_delta, "dq_sum": flat_sum, "bands": flat_bands})
        flattened = T.meta_var(SimpleNamespace(**(vars(call) | flat)))
        shape = T.meta_var((call.batches, call.query_heads, call.length))

        with T.attr({"tirx.device_entry": True}):
            cleared = T.meta_var(call.dq_sum if one_pass else None)
            make_delta(call.o, call.do, call.dlse, call.delta, cleared, shape, head_dim, dtype)
        if not one_pass:
            dq_sizes = T.meta_var(of_dq[0])
            with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": dq_sizes.blocks}):
                dq_pass = T.meta_var(TilePass(dq_sizes, dtype, arch, flattened))
                dq_pass.run()
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": dkv_sizes.blocks}):
            dkv_pass = T.meta_var(TilePass(dkv_sizes, dtype, arch, flattened))
            dkv_pass.run()
        if one_pass:
            with T.attr({"tirx.device_entry": True}):
                cast_sum(call.dq_sum, call.dq, scale, shape, head_dim, dtype)

    if not one_pass:
        kept = [param for param in backward.params if param.name != "dq_sum"]
        backward = tirx.PrimFunc(kept, backward.body, backward.ret_type, backward.attrs)
    return IRModule({"backward": backward})
