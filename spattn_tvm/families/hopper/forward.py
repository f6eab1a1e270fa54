"""Banded attention forward for Hopper (sm_90a): TMA, wgmma, warp specialisation, a persistent grid.

One thread block per multiprocessor takes query tiles from an atomic counter until none is left. Its first
warpgroup moves: one thread decodes the next tile (heads, document, key ranges), another loads the tile's
queries and the keys and values of its far and near bands by TMA, the latter into two rings of chunks. The
other warpgroups compute: each owns 64 query rows, takes from the rings the chunks that its own rows attend
to, and lets the others pass.

Key ranges start at the band's edge, not at a multiple of the chunk (a TMA box may start at any row), and only
chunks that an edge crosses are masked. With 64-row warpgroups and 64-key chunks that executes 1.25 times the
useful products at 16 heads and N = 4096, the least that 64-row instructions allow.

A row keeps the reference that its first chunk gives it until its weights have outgrown that, so that most
chunks need no maximum. The softmax of a chunk runs beside the values' product of the one before: a branch
keeps it before the wait for that product, where ptxas would not leave it.

Measured on an H200, bfloat16, spattention, L2 cleared, medians of 40, in ms at (B, H, N, D), when each chunk
still had a maximum; a dash where the registers don't suffice or nothing was measured:

===================================  ================  =================  ================  ===============
warpgroups, chunk, queries, overlap  4, 16, 4096, 128  1, 16, 16384, 128  4, 32, 4096, 128  4, 16, 4096, 64
===================================  ================  =================  ================  ===============
3, 64, shared memory, yes            0.131             0.325              0.182             0.100
4, 64, shared memory, yes            -                 -                  -                 0.091
3, 64, registers, yes                -                 -                  -                 0.099
3, 64, registers, no                 0.136             0.346              0.185             -
3, 64, registers, no, two parts      0.133             0.329              0.186             -
3, 64, shared memory, no             0.143             0.386              0.191             -
2, 64, registers, yes                0.141             0.370              0.197             0.110
2, 64, shared memory, yes            0.143             0.382              0.199             -
2, 128, registers, yes               0.146             0.341              0.214             0.113
===================================  ================  =================  ================  ===============

Dense causal cuDNN took 0.472 and 1.712 in the same run. Chunks of 80 and 96 keys took 0.156 and 0.160. At (4,
16, 4096, 128) the tensor cores were busy 53 % of the time, issue slots 41 %, L2 66 %, memory 42 %: no unit is
full, the chain from scores to weights is long, which more warpgroups and overlap hide. Overlap across tiles
(the next tile's first scores issued before this one's output is written) did not pay: 0.133, 0.329, 0.186 and
0.091 ms where 0.131, 0.324, 0.182 and 0.090 were measured without it in the same run.

Since rows keep their reference, in one run on an H100 (medians of 11):

===========================================  ================  =================  =================
variant                                      4, 16, 4096, 128  1, 16, 16384, 128  1, 16, 65536, 128
===========================================  ================  =================  =================
the untuned decisions                        0.133             0.304              4.29
a maximum in each chunk                      0.140             0.337              5.13
softmax behind the wait                      0.134             0.310              4.54
2 warpgroups, chunks of 128, overlap         0.151             0.328              4.71
2 warpgroups, chunks of 64, overlap          0.147             0.351              5.50
3 warpgroups, chunks of 128, two parts       0.141             0.331              4.96
claim_lead 0                                 0.139             0.305              4.29
not dynamic                                  0.151             0.341              4.73
left-over rows in a document's first tile    0.134             0.306              4.33
===========================================  ================  =================  =================

At head dim 64 and (4, 16, 4096) 0.090, with a maximum in each chunk 0.096, with 3 warpgroups and chunks of
128 keys 0.103. head_group 1, 4, 8 and 16 are within 1 %; 64 takes 3 % more at 4096. In another run chunks of
128 keys lost with references that are kept, too, checked before the next chunk (4.53 where 64 keys took
4.29), and with maxima they took 4.84 with two parts, 5.01 with one, 5.33 with 2 warpgroups and overlap. By
count, blocks load 0.50 GB at (4, 16, 4096, 128), 3.8 TB/s from the L2; larger tiles, which would load less,
do not fit the registers.

Tiles are drawn late enough: a block claims its next tile when it has ``claim_lead`` chunks of this one still
to issue. Later still loses where tiles are short, us in one run on an H200 (bfloat16, medians of 9 to 25):

========================================  =====  =====  =====
claim_lead                                    0      1      2
========================================  =====  =====  =====
(4, 16, 4096, 128), spattention           133.2  130.3  129.9
(1, 16/4, 8192, 128), 5 documents          62.1   60.0   59.4
(1, 32/8, 8192, 128), spattention         131.7  129.3  128.7
(1, 16, 16384, 128), spattention          307.6  305.3  305.7
(1, 16, 8192, 128), causal                369.1  369.5  370.2
========================================  =====  =====  =====

(Counting chunks, blocks that drew a tile only when they are free would end 3 % after their mean at the first,
as they do now.)

The first tile is found before the barriers are made, and its queries, its first keys and values, the maps and
the tables are prefetched: of cold caches the latencies would add up. us in one run on an H200 (bfloat16,
medians, L2 cleared), without and with: 127.9 and 126.6 at (4, 16, 4096, 128), 88.3 and 87.1 at (4, 16, 4096,
64), 26.9 and 24.9 at (1, 16, 2048, 128), 16.8 and 15.8 at (1, 16, 1024, 128), 127.4 and 126.0 at (1, 32/8,
8192, 128), 63.8 and 62.5 with 1024 queries and 32768 keys of 16 heads, 51.5 and 51.3 at head dim 64; level
where bands are wide. Prefetched by another thread, behind the barriers' making, 1024 queries took 64.6. With
tables loaded, to the L1 cache, and masks only for warps whose rows an edge meets they took 61.8, but 55.1 at
head dim 64, and the first size 127.2.

With one tile for each block, 1024 queries and 32768 keys of 16 heads, tiles of 128 rows and chunks of 96
keys, neither the L2 nor the memory limits the chunks. Clocks read in the kernel, without prefetching (H200,
as us at 1.755 GHz): the tile is decoded after 1.6, its queries have come after 4.3, the first scores after
6.1; 45 chunks take 1.04 each, of which the tensor cores need 0.87, and 1.45 where an edge masks them; the
results are stored at 56.4, and the call takes 65. One key head for all, a sixteenth of the memory's bytes,
changes none but the first scores, after 5.1. Level or lost there, where 63.2 us were reached (with maps and
tables prefetched; one kernel's runs lie up to 3 apart): keys and values prefetched to the L2 four chunks
ahead 63.9, the far band's first ones 63.2 and, at once, 67.9; maps that promote to 256 bytes in the L2 63.5;
chunks of 128 keys in two stages 75.3.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm


def build_hopper_forward(decisions: Mapping[str, int], head_dim: int, dtype: str) -> tvm.IRModule:
    """Build the forward kernel for sm_90a.

    The module exports ``forward(q, k, v, bands, cu_seqlens, cu_seqlens_k, key_ranges, o, lse, counters,
    scale, workers)``: q and o (B, Hq, Nq, D), k and v (B, Hkv, Nk, D) of ``dtype``, any strides with a
    contiguous last dimension, base addresses and strides multiples of 16 bytes; bands int32 (M, Hq, 4), a
    document's row: table_row; cu_seqlens and cu_seqlens_k int32 (documents + 1,), sorted, from 0 to Nq and
    to Nk; key_ranges int32 (0, 1 or B, 3) as `document_keys` takes them, their keys in [0, Nk]; lse float32
    (B, Hq, Nq), contiguous, natural logarithm; counters int32 (2,), zero before the first call, left zero by
    each call, not shared by calls that may run at the same time; scale float32 > 0; workers int32, the number
    of thread blocks (one for each multiprocessor). B, Nq, Nk and the head counts must be positive. A query
    without keys gets o = 0 and lse = -inf. Masked keys of a visited chunk get the weight 0, so a NaN among
    the values there spreads, as it does in dense attention with a mask, but not to another document, nor from
    keys that don't exist.

    Parameters
    ----------
    decisions : mapping of str to int
        ``consumer_warpgroups`` (64 query rows each), ``key_rows`` of a chunk (a multiple of 16), ``stages``
        of each ring (a power of two: others cost divisions), ``overlap`` (1: the next chunk's scores are
        issued before the current values' product), ``weight_parts`` (without overlap: the values' product is
        issued in so many parts, each as soon as its weights are ready), ``queries_in_registers`` (0: two
        tiles of queries in shared memory, which frees D / 4 registers), ``rescale_threshold`` (in powers of
        two; output is rescaled only when a row's maximum grew by more, and with overlap only until all rows
        of a warp have seen a key, then when their weights have grown; 0: at each chunk), ``head_group``
        ((batch, head) pairs whose tiles are interleaved), ``consumer_registers`` (of each computing thread),
        ``dynamic`` (1: tiles from a counter, 0: every ``workers``-th tile), ``claim_lead`` (chunks that the
        loader has still to issue when the next tile is claimed).
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

    from .forward_blocks import ForwardBlocks
    from .parts import match_tensors

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
        counters: T.handle,
        scale: T.float32,
        workers: T.int32,
    ):
        T.func_attr({"global_symbol": "forward"})
        t = T.meta_var(
            match_tensors(
                dtype, head_dim, q=q, k=k, v=v, bands=bands, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
                key_ranges=key_ranges, o=o, lse=lse, counters=counters,
            )
        )  # fmt: skip
        maps = T.meta_var(blocks.maps(t))
        # With the 1, or ptxas ignores setmaxnreg.
        with T.attr({"tirx.device_entry": True, "tirx.launch_bounds_min_blocks_per_sm": 1}):
            blocks.run(t, maps, scale, workers)

    return IRModule({"forward": forward})
