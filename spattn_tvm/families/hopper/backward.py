"""Banded attention backward for Hopper (sm_90a) in TIRx: TMA, wgmma, warp specialisation, two passes in one
persistent launch.

:mod:`.backward_one_pass` is the other structure; it has the figures of both.

**Two passes instead of one.** A query tile's gradient takes three matrix products a block (scores, dP, dQ), a
key tile's four (scores, dP, dV, dK): seven where a single pass over key tiles needs five. In return nothing
is accumulated through global memory: no float32 dQ to clear, to add to and to convert (134 MB at (4, 16,
4096, 128): 0.08 ms at the memory's speed), no dS exchanged through shared memory, no barrier between
warpgroups. And the gradients are bitwise equal from run to run: each is summed by one warpgroup in one order.

**One launch.** A CTA that finds no more tiles of queries goes on with tiles of keys while others finish
theirs: one tail and one start instead of two of each, 4% at (4, 16, 4096, 128) and (16, 16, 1024, 128). An
idle warp counts the queries of each head whose statistics are stored, and a tile of keys waits until its
head's are complete. All tiles of queries are drawn before any of keys, by CTAs that run and wait for nobody,
so the wait ends however few CTAs the device holds at once.

**Who does what.** In both passes a CTA stays on its multiprocessor and draws tiles from a counter. The *tile
warp* draws them and loads what a tile keeps (Q, dO, O or K, V); the *chunk warp* walks the tile's bands and
fills a ring with chunks of the other side (K, V or Q, dO), across tiles; two *consumer warpgroups* own 64
rows of the tile each. What the producers know of a chunk (where it starts, its band, which warpgroups need
it) travels beside the data, so consumers keep no scheduling state: registers limit this kernel. A warpgroup
hands back at once the chunks that only the other needs: with bands of 256 distances it works on 5 chunks of
64 a band, where the tile of 128 rows has 6.

**Tiles of keys are drawn late**, when all chunks of the one before are on their way, as in one pass. Tiles of
queries are drawn one earlier: late, they lose at head dim 128. All early, keys late, and both late, ms in one
run (H200, bfloat16):

==================== ==================== ===== ===== =====
(B, H, N, D)         layout               early keys  both
==================== ==================== ===== ===== =====
(1, 16, 8192, 128)   spattention          0.324 0.306 0.308
(1, 16, 8192, 128)   sliding_window(1024) 0.365 0.356 0.362
(4, 16, 4096, 128)   spattention          0.384 0.381 0.391
(4, 32/8, 4096, 128) spattention          0.519 0.512 0.525
(16, 16, 1024, 128)  spattention          0.243 0.244 0.247
(1, 16, 16384, 64)   spattention          0.666 0.641 0.640
(1, 16, 8192, 64)    sliding_window(1024) 0.240 0.238 0.239
(4, 16, 4096, 64)    spattention          0.246 0.242 0.242
(4, 32/8, 4096, 64)  spattention          0.356 0.340 0.341
(16, 16, 1024, 64)   spattention          0.145 0.147 0.147
==================== ==================== ===== ===== =====

**Ranges.** TMA boxes may start at any row, so chunks of keys end and chunks of queries start exactly at a
band's edge (queries at an even one), and only the first and last ones of a band are masked.

Measured on an H200 (bfloat16, spattention, medians, L2 cleared; ms): (4, 16, 4096, 128) 0.40, (1, 16, 16384,
128) 1.07, (4, 32, 4096, 128) 0.57, (4, 16, 4096, 64) 0.26. Tensor cores are active for 57% (dQ) and 61%
(dK/dV) of the cycles at the first size (ncu); the loops alone reach about 80% by warp samples, the rest goes
to the starts and ends of tiles. That was before what follows, and K and V stood in shared memory at head dim
64, too; handing them back before a tile's last dS, not after it, took off 1 to 2%, as it still is at 128.

**Between chunks.** A consumer has no product of its own running from a chunk's dS to the next one's scores.
Who takes the next chunk is therefore asked before, under the exponentials, and without waiting: 2% at (4, 16,
4096, 64), 4% at (1, 16, 16384, 64), 1% at (4, 16, 4096, 128), on an H100. At head dim 64 both passes hold
their tile's operands in registers, and its shared memory takes the next tile under all of this one: 3% more
at the first size and 4% at (16, 16, 1024, 64), nothing at longer ones. These, the launch under the clearing
of counters and lse and dlse brought to the L2 early, before and after in one run: 0.266 and 0.251 at (4, 16,
4096, 64), 0.695 and 0.665 at (1, 16, 16384, 64), 0.409 and 0.404 at (4, 16, 4096, 128).

**What did not pay.** On the H200, a tile's last dQ product under the next tile's first scores: 0.41 and 0.59
instead of 0.40 and 0.57 at the first and third size, 1% less at the second. In ms on an H100 at (4, 16, 4096,
64), where one launch took 0.267 before the looks ahead and takes 0.251: tiles of queries and of keys in turn
from one counter, by packs of 1 to 8 heads, so that a head's tensors are still in the L2 cache, 0.272 to 0.277
(the DRAM was read for 294 instead of 308 MB: 264 tiles are in flight, about 8 heads; 0.404 instead of 0.410
at head dim 128); the next chunk's scores under this one's exponentials 0.276 in the dQ pass, 0.296 to 0.299
in both; three warpgroups of 160 registers with chunks of 48, 0.272 to 0.279 beside 0.260; dV stored under a
tile's last dK, 0.5% more, 2% at head dim 128, where it spills; there also lse and dlse loaded before a tile's
scores, 1% more.

By clocks read in the kernels at that size, a tile of 7 chunks a warpgroup took 13,800 in the dQ pass and
16,300 in the dK/dV pass, before the looks ahead: 62 and 71% in chunks but the first, 16 and 9% in the first,
4 and 7% in stores (9% at head dim 128: a third of their instructions select while words are transposed among
four lanes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .backward_sizes import SHARED_LIMIT, shared_bytes
from .support import DTYPES


def build_hopper_backward(decisions: Mapping[str, int], head_dim: int, dtype: str) -> Any:
    """The backward of banded attention as one function ``backward`` that launches its kernels.

    Exported: ``backward(q, k, v, o, lse, do, dlse, bands, cu_seqlens, cu_seqlens_k, key_ranges, dq, dk, dv,
    stats, next_tile, [dq_sum,] progress, scale, workers)``. Batch, heads, lengths, strides, layout and
    documents are data of the call. Nothing synchronises; nothing is allocated.

    ============== ======================= ============ ====================================================
    argument       shape                   dtype        meaning
    ============== ======================= ============ ====================================================
    q, o, do, dq   (B, Hq, Nq, D)          `dtype`      any strides with a contiguous last dimension
    k, v, dk, dv   (B, Hkv, Nk, D)         `dtype`      likewise; dk and dv are summed over the group
    lse, dlse      (B, Hq, Nq)             float32      contiguous; natural logarithm, -inf for a query with
                                                        no key
    bands          (M, Hq, 4)              int32        near_lo, near_hi, far_lo, far_hi; a document's row:
                                                        table_row
    cu_seqlens     (documents + 1,)        int32        first query of each document, and Nq; sorted, from 0
    cu_seqlens_k   (documents + 1,)        int32        likewise its keys, and Nk
    key_ranges     (0, 1 or B, 3)          int32        as document_keys takes them; their keys in [0, Nk]
    stats          (B, Hq, ceil(Nq/2), 4)  float32      workspace, written before it is read: of two queries,
                                                        lse in base 2 twice, then rowsum(do * o) - dlse twice;
                                                        in one pass -lse / scale, then dlse - rowsum(do * o)
    next_tile      (2,)                    int32        workspace: the tile counters, cleared by the first
                                                        kernel
    dq_sum         (B, Hq, Nq, D)          float32      only for ``one_pass``; contiguous workspace, written
                                                        before it is read
    progress       (3 + B * Hkv,)          int32        workspace: counts of what is done, cleared by the
                                                        first kernel
    scale          scalar                  float32      factor of the scores, positive
    workers        scalar                  int32        CTAs: the multiprocessors of the device
    ============== ======================= ============ ====================================================

    A query without keys has the gradient 0 whatever `do`, `dlse` and `o` hold there; a NaN or an infinity
    stays within its document. Keys that don't exist get 0, whatever k and v hold there.

    B, Hq, Hkv, Nq and Nk are at least 1. Inputs must suit TMA: addresses and the strides of dimensions longer
    than 1 are multiples of 16 bytes, the gradients' too. Offsets are 64-bit. Gradients of two passes are
    bitwise reproducible.

    Parameters
    ----------
    decisions : mapping of str to int
        ``one_pass`` (1: dQ is added up beside dK and dV, and of the others only those of ``dkv_`` count).
        ``dq_`` and ``dkv_`` each: ``warpgroups`` (consumers of 64 rows), ``stages`` (chunks in the ring),
        ``heads`` (whose tiles are drawn together), ``registers`` and ``producer_registers`` (a thread; as the
        warpgroups, of the launch, so the same for both passes);
        ``dq_keys`` and ``dkv_queries`` (rows of a chunk, a multiple of 16); ``dkv_buffers`` (tiles of K and V
        in shared memory).
    head_dim : int
        D: 64 or 128.
    dtype : str
        ``"float16"`` or ``"bfloat16"``.

    Returns
    -------
    tvm.IRModule
        For ``tvm.compile(..., tir_pipeline="tirx")`` with an sm_90a target.

    Raises
    ------
    ValueError
        For another head dim or dtype, or when a pass needs more shared memory than a CTA has.
    """
    if head_dim not in (64, 128):
        raise ValueError(f"head_dim must be 64 or 128, got {head_dim}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, needed in shared_bytes(decisions, head_dim).items():
        if needed > SHARED_LIMIT:
            raise ValueError(
                f"the {name} pass needs {needed} bytes of shared memory, a CTA has {SHARED_LIMIT}: "
                "fewer stages"
            )
    if decisions["one_pass"]:
        from .backward_one_pass import build_one_pass

        return build_one_pass(decisions, head_dim, dtype)
    from .backward_two_pass import build_two_passes

    return build_two_passes(decisions, head_dim, dtype)
