"""Banded attention forward for any NVIDIA GPU from sm_80 on: ``mma.sync``, ``ldmatrix``, ``cp.async``.

A thread block owns one tile of query rows of one head, a warp 16 or 32 of its rows. All threads copy the keys
and values of the tile's near and far band, chunk by chunk, into a ring in shared memory; each warp computes
with the chunks that its own rows attend to and lets the others pass. Threads meet at two barriers a stage,
full and empty, so that a warp may be as many chunks before another as the ring has stages that are not being
filled.

Key ranges start at the band's edge, not at a multiple of the chunk. A chunk whose every pair is attended is
one step without a mask; a chunk that an edge crosses is taken in steps of ``edge_keys``, masked, of which
those that the warp's rows don't attend to are left out.

Measured on an H200, bfloat16, spattention, L2 cleared, medians of 21 and 15, in ms at (B, H, N, D); steps of
32 keys at an edge, groups of 8 heads:

================================================================  ================  =================
warps x rows, key rows, stages (ahead), asks for a chunk, blocks  4, 16, 4096, 128  1, 16, 16384, 128
================================================================  ================  =================
4 x 32, 32, 4 (2), before the scores, 2                           0.208             0.574
4 x 32, 32, 4 (3), after the scores, 2                            0.223             0.603
4 x 32, 32, 2 (1), after the scores, 2                            0.225             0.605
4 x 32, 64, 2 (1), after the weights, 2                           0.220             0.580
4 x 32, 64, 2 (1), after the scores, 2                            0.230             0.584
2 x 32, 32, 2 (1), after the scores, 4                            0.222             0.638
8 x 32, 64, 4 (2), before the scores, 1                           0.237             0.605
4 x 16, 32, 2 (1), after the scores, 3                            0.244             0.733
8 x 16, 32, 3 (1), before the scores, 1                           0.299             0.783
================================================================  ================  =================

Dense causal FlashAttention-2 (PyTorch's) made 306 and 325 TFLOP/s on the same chip, the first line 234 and
347 beside it. With one barrier of the whole block for each chunk, 64 key rows and 2 stages took 0.230 and
0.605; without that barrier (and wrong) 0.193 and 0.529, without loads as well 0.175 and 0.481, without
``exp2`` 0.223 and 0.583: it is waiting, not arithmetic, that there is to save. One barrier a stage, at which
a thread arrives when it is through with a chunk and its own copies of a later one are there, took 0.202 and
0.548 beside the first line's 0.203 and 0.554, but with two stages 0.232 and 0.609 beside 0.225 and 0.586:
then no warp gets ahead of another. Groups of 8 heads saved 1 to 2 % in each of six pairs. At
(4, 16, 4096, 64), three blocks of 4 x 32 rows and six stages (three ahead) took 0.119, four blocks of 4 x 16
rows and two stages of 64 keys 0.126.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .blocks import BLOCK, LOCATION_BYTES, check_buildable, element_bytes, lack_of_room, match_call, row_pitch

if TYPE_CHECKING:
    import tvm


def shared_bytes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> int:
    """Shared memory of a block: the query tile, a ring of chunks of keys and of values, the tile's words."""
    rows = decisions["warps"] * decisions["warp_rows"] + 2 * decisions["stages"] * decisions["key_rows"]
    return (
        rows * row_pitch(head_dim, dtype) * element_bytes(dtype) + LOCATION_BYTES + 16 * decisions["stages"]
    )


def registers_needed(decisions: Mapping[str, int], head_dim: int, dtype: str) -> int:
    """Registers of a thread: output, scores, the operands in flight, and 40 for the rest."""
    tiles = decisions["warp_rows"] // BLOCK
    keys = decisions["key_rows"]
    output, scores = tiles * head_dim // 2, tiles * keys // 2
    if dtype == "float32":
        # Weights are twice as many words as scores, which are gone by then.
        return output + 2 * scores + 16 * tiles + 16 + 76
    queries = tiles * head_dim // 4 if decisions["queries_in_registers"] else 8 * tiles
    return output + scores + queries + 8 + 32


def conflict(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> str | None:
    """Why the kernel can't be built with ``decisions`` for a chip of ``arch``; None if it can."""
    blocks, threads = decisions["blocks_per_multiprocessor"], 32 * decisions["warps"]
    needed = shared_bytes(decisions, head_dim, dtype), registers_needed(decisions, head_dim, dtype)
    reason = lack_of_room(*needed, threads, blocks, arch)
    if reason is not None:
        return reason
    if decisions["key_rows"] % decisions["edge_keys"]:
        return f"edge_keys={decisions['edge_keys']} does not divide key_rows={decisions['key_rows']}"
    if decisions["ahead"] >= decisions["stages"]:
        return f"ahead={decisions['ahead']} leaves none of stages={decisions['stages']} to compute with"
    if dtype == "float32" and decisions["queries_in_registers"]:
        return "queries_in_registers is for two-byte types: float32 queries and their rests are too many"
    return None


def build_mma_forward(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> tvm.IRModule:
    """Build the forward kernel for a chip of ``arch``.

    The module exports ``forward(q, k, v, bands, cu_seqlens, cu_seqlens_k, key_ranges, o, lse, scale,
    workers)``: q and o (B, Hq, Nq, D), k and v (B, Hkv, Nk, D) of ``dtype``, any strides with a contiguous
    last dimension, base addresses and strides multiples of 16 bytes; bands int32 (M, Hq, 4); cu_seqlens and
    cu_seqlens_k int32 (documents + 1,) of queries and of keys; key_ranges int32 (0, 1 or B, 3) as
    `document_keys` takes them; lse float32 (B, Hq, Nq), contiguous, natural logarithm; scale float32, of any
    sign; workers int32, not used. B, Nq, Nk and the head counts must be positive. A query without keys gets
    o = 0 and lse = -inf. Keys that don't exist are never read. Masked keys of a visited chunk get the weight
    0, so a NaN among the values there spreads, as it does in dense attention with a mask.

    Parameters
    ----------
    decisions : mapping of str to int
        ``warps`` of a thread block, ``warp_rows`` (query rows of each, 16 or 32: the operands from keys and
        values are loaded once for them), ``key_rows`` of a chunk, ``edge_keys`` (of a step where an edge
        crosses a chunk), ``stages`` of the ring, ``ahead`` (chunks that are on
        their way; the fewer of the stages, the further warps may drift apart), ``load_point`` (when a warp
        asks for the next one: 0 before a chunk's scores, 1 after them, 2 after the weights),
        ``queries_in_registers`` (0: loaded again for each step),
        ``rescale_threshold`` (in powers of two; output is rescaled only when a row's maximum grew by more;
        0: always), ``head_group`` ((batch, head) pairs whose tiles are interleaved),
        ``blocks_per_multiprocessor`` (that registers must suffice for).
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
    from tvm import IRModule
    from tvm.script import tirx as T

    from .forward_tile import ForwardTile

    check_buildable(conflict, decisions, head_dim, dtype, arch)

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
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "forward"})
        call = T.meta_var(
            match_call(
                dtype, head_dim, scale, q=q_handle, k=k_handle, v=v_handle, bands=bands_handle,
                boundaries=boundaries_handle, key_boundaries=key_boundaries_handle,
                key_ranges=key_ranges_handle, o=o_handle, lse=lse_handle,
            )
        )  # fmt: skip
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": decisions["blocks_per_multiprocessor"]})
        tile = T.meta_var(ForwardTile(decisions, head_dim, dtype, arch, call))
        tile.run()

    return IRModule({"forward": forward})
