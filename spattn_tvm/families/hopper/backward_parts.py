"""Parts of the Hopper backward kernels: addresses, descriptors, tiles, rings of chunks and stores.

The inline functions change the variables that they are given, as if their text stood where they are called.
"""

# fmt: off
# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.tiles import first_slot

from .backward_sizes import BARRIER_BYTES, INFO_BYTES, QUEUE, TILE_INFO_BYTES

# Every lane arrives for what it has read itself. One for its warp, after a warp synchronisation, took about 1 % less time
# and left racecheck in doubt about the other lanes' reads.
LANES = 32

LOAD = "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
LOAD_STATS = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"

# Products of two packed pairs, added to a sum.
_DOT_SOURCE = {
    "bfloat16": """
__device__ __forceinline__ float spattn_dot2(unsigned int a, unsigned int b, float sum) {
  sum = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
  return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), sum);
}
""",
    "float16": """
__device__ __forceinline__ float spattn_dot2(unsigned int a, unsigned int b, float sum) {
  float2 x = __half22float2(*reinterpret_cast<__half2*>(&a));
  float2 y = __half22float2(*reinterpret_cast<__half2*>(&b));
  return fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
}
""",
}

# A loop that never repeats, for exp2 is never negative; see `pin`.
_PIN_SOURCE = """
__device__ __forceinline__ void spattn_pin(float p) {
  asm volatile("{\\n.reg .pred q;\\nspattn_again:\\nsetp.lt.f32 q, %0, 0f00000000;\\n@q nanosleep.u32 32;\\n@q bra spattn_again;\\n}" ::"f"(p) : "memory");
}
"""

_LOAD_SHARED_SOURCE = """
__device__ __forceinline__ int spattn_load_shared(unsigned int at) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
  return value;
}
"""

_BALLOT_SOURCE = """
__device__ __forceinline__ unsigned int spattn_ballot(int p) { return __ballot_sync(0xffffffffu, p); }
"""


def _hold_source(count: int) -> str:
    operands = ", ".join(f'"+f"(r[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void spattn_hold{count}(float* r) {{
  asm volatile("" : {operands} :: "memory");
}}
"""


def descriptor(plane_bytes: int) -> int:
    """Bits of a wgmma descriptor besides the address: 128-byte swizzle, 1024 bytes between groups of 8 rows."""
    return (1 << 62) | (64 << 32) | ((plane_bytes >> 4) << 16)


K_MAJOR = descriptor(16)


def address(base: Any, offsets: Mapping[str, int], name: str, index: Any = None, pitch: int = 0) -> Any:
    """Shared-memory address of element `index` (`pitch` bytes apart) of the region `name`."""
    start = base + T.uint32(offsets[name])
    return start if index is None else start + T.Cast("uint32", index) * T.uint32(pitch)


def element(start: Any, strides: tuple[Any, Any, Any], b: Any, h: Any, row: Any, col: Any) -> Any:
    """Global address of one element of a strided (B, H, N, D) tensor, in 64-bit arithmetic."""
    offset = sum(T.Cast("int64", i) * s for i, s in zip((b, h, row), strides, strict=True)) + T.Cast("int64", col)
    return T.reinterpret("uint64", start) + T.Cast("uint64", offset * 2)


def load_shared(at: Any) -> Any:
    """An int32 in shared memory."""
    return T.cuda.func_call("spattn_load_shared", at, source_code=_LOAD_SHARED_SOURCE, return_type="int32")


def ballot(condition: Any) -> Any:
    """Bit i of the result says whether the condition holds in lane i."""
    return T.cuda.func_call("spattn_ballot", T.Cast("int32", condition), source_code=_BALLOT_SOURCE, return_type="uint32")


def dot2(a: Any, b: Any, total: Any, dtype: str) -> Any:
    """`total` and the products of two pairs of `dtype`."""
    return T.cuda.func_call("spattn_dot2", a, b, total, source_code=_DOT_SOURCE[dtype], return_type="float32")


def pin(probability: Any) -> Any:
    """A branch never taken: without it ptxas moves the wait for the next product above the exponentials it should hide."""
    return T.cuda.func_call("spattn_pin", probability, source_code=_PIN_SOURCE)


def hold(accumulator: Any, count: int) -> Any:
    """Ties accumulator registers to this place: plain arithmetic on them must not move above the wait before it,
    or ptxas sees an accumulator read in flight and serializes every wgmma of the kernel (C7514)."""
    return T.cuda.func_call(f"spattn_hold{count}", accumulator.data, source_code=_hold_source(count))


@T.inline
def encode_rows(tmap, buffer, dtype, D, batch, heads, length, s0, s1, s2, rows):
    # A stride that no index ever multiplies may be anything in torch; the encoder wants multiples of 16 bytes.
    T.call_packed("runtime.cuTensorMapEncodeTiled", tmap, dtype, 5, buffer.data, 64, length, D // 64, heads, batch,
                  T.if_then_else(length == 1, T.int64(2 * D), s2 * 2), 128,
                  T.if_then_else(heads == 1, T.int64(2 * D), s1 * 2), T.if_then_else(batch == 1, T.int64(2 * D), s0 * 2),
                  64, rows, D // 64, 1, 1, 1, 1, 1, 1, 1, 0, 3, 2, 0)


@T.inline
def encode_stats(tmap, buffer, heads, pairs, queries):
    # Two queries are 16 bytes.
    T.call_packed("runtime.cuTensorMapEncodeTiled", tmap, "float32", 2, buffer.data, pairs * 4, heads, pairs * 16,
                  2 * queries, 1, 1, 1, 0, 0, 2, 0)


@T.inline
def init_barriers(first, count, arrivals):
    for s in T.unroll(count):
        T.ptx.mbarrier.init.shared.b64(first + T.uint32(s * BARRIER_BYTES), T.uint32(arrivals))


@T.inline
def arrive(barrier):
    T.ptx.mbarrier.arrive.shared.b64(barrier)


@T.inline
def advance(place, phase, places):
    place = place + 1
    if place == places:
        place = 0
        phase = phase ^ 1


@T.inline
def init_rings(at, stages, buffers, warpgroups):
    # A producer arrives once for what it hands over, each thread of the consumers for what it hands back.
    init_barriers(at("full"), stages, 1)
    init_barriers(at("empty"), stages, LANES * 4 * warpgroups)
    init_barriers(at("tile_full"), buffers, 1)
    init_barriers(at("tile_empty"), buffers, LANES * 4 * warpgroups)
    init_barriers(at("queue_full"), QUEUE, 1)
    init_barriers(at("queue_empty"), QUEUE, LANES)
    T.ptx.fence.mbarrier_init.release.cluster()


@T.inline
def draw_tile(counter, lane, fetched):
    # The number of the next tile, in lane 0. Asked for long before it is needed.
    T.ptx["atom.global.add.s32"](fetched[0], T.address_of(counter), T.if_then_else(lane == 0, 1, 0))


@T.inline
def locate_head(number, slots, batch, heads, together, slot, b, h):
    # Of tile `number`. A few heads at a time, so that what their tiles share stays in the L2; of those one slot after the
    # other, so that the longest tiles can come first.
    pack: T.int32 = T.truncdiv(number, slots * together)
    packed: T.int32 = T.min(batch * heads - pack * together, together)
    slot = T.truncdiv(number - pack * (slots * together), packed)
    h = number - pack * (slots * together) - slot * packed + pack * together
    b = h - T.truncdiv(h, batch) * batch
    h = T.truncdiv(h, batch)


@T.inline
def locate_rows(slot, rows, cu, docs, doc, begin, end, first):
    # The document of a slot and its first row there; the last slots of a document can be empty (first >= end).
    doc = 0
    doc_hi: T.int32 = docs - 1
    while doc < doc_hi:
        mid: T.int32 = (doc + doc_hi + 1) // 2
        if first_slot(cu[mid], mid, rows) <= slot:
            doc = mid
        else:
            doc_hi = mid - 1
    begin = cu[doc]
    end = cu[doc + 1]
    first = begin + (slot - first_slot(begin, doc, rows)) * rows


@T.inline
def offer_tile(at, place, place_phase, lane, first, begin, end, doc, b, h):
    # From the tile warp to the chunk warp.
    T.cuda.mbarrier_wait(at("queue_empty", place, BARRIER_BYTES), place_phase ^ 1)
    if lane == 0:
        T.ptx["st.shared.v4.s32"](at("queue", place, TILE_INFO_BYTES), first, begin, end, doc)
        T.ptx["st.shared.v2.s32"](at("queue", place, TILE_INFO_BYTES) + T.uint32(16), b, h)
        T.ptx.mbarrier.arrive.shared.b64(at("queue_full", place, BARRIER_BYTES))
    advance(place, place_phase, QUEUE)


@T.inline
def offer_no_more(at, place, place_phase, slab, tile_phase, lane):
    # To the chunk warp, and to the consumers.
    T.cuda.mbarrier_wait(at("queue_empty", place, BARRIER_BYTES), place_phase ^ 1)
    if lane == 0:
        T.ptx["st.shared.s32"](at("queue", place, TILE_INFO_BYTES), -1)
        T.ptx.mbarrier.arrive.shared.b64(at("queue_full", place, BARRIER_BYTES))
    T.cuda.mbarrier_wait(at("tile_empty", slab, BARRIER_BYTES), tile_phase ^ 1)
    if lane == 0:
        T.ptx["st.shared.v4.s32"](at("tile", slab, TILE_INFO_BYTES), -1, 0, 0, 0)
        T.ptx.mbarrier.arrive.shared.b64(at("tile_full", slab, BARRIER_BYTES))


@T.inline
def take_tile(at, place, place_phase, begin, end, doc, b, h):
    # The rest of what `offer_tile` wrote.
    begin = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(4))
    end = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(8))
    doc = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(12))
    b = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(16))
    h = load_shared(at("queue", place, TILE_INFO_BYTES) + T.uint32(20))
    T.cuda.warp_sync()
    arrive(at("queue_empty", place, BARRIER_BYTES))
    advance(place, place_phase, QUEUE)


@T.inline
def pass_chunk(at, stage, phase, stages, left):
    arrive(at("empty", stage, BARRIER_BYTES))
    advance(stage, phase, stages)
    left = left - 1


@T.inline
def find_chunk(at, w, stage, phase, stages, left, found, info, limit):
    # The next chunk that this warpgroup needs; chunks for others are handed back. While the output of a chunk
    # is still to be issued its stage is taken, so the search gives up before it would wait for that stage.
    found = 0
    skipped: T.int32 = 0
    searching: T.int32 = 1
    while searching == 1:
        T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
        T.ptx["ld.shared.v4.s32"](info[0], info[1], info[2], info[3], at("info", stage, INFO_BYTES))
        if ((info[3] >> w) & 1) == 1:
            found = 1
            searching = 0
            left = left - 1
        else:
            if skipped == limit:
                searching = 0
            else:
                pass_chunk(at, stage, phase, stages, left)
                skipped = skipped + 1


@T.inline
def pass_rest(at, stage, phase, stages, left):
    # The rest of the tile's chunks concern other warpgroups only.
    while left > 0:
        T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
        pass_chunk(at, stage, phase, stages, left)


@T.inline
def store_rows(values, count, j, factor, row_at, wanted, lane, turn, convert):
    # Neighbouring lanes swap halves of two 8-column blocks: a quad then writes whole 32-byte sectors.
    for n in T.unroll(count // 8):
        T.ptx[convert](turn[3 * n], values[8 * n + 2 * j + 1] * factor, values[8 * n + 2 * j] * factor)
        T.ptx[convert](turn[3 * n + 1], values[8 * n + 4 + 2 * j + 1] * factor, values[8 * n + 4 + 2 * j] * factor)
        turn[3 * n + 2] = T.tvm_warp_shuffle_xor(0xFFFFFFFF, T.if_then_else(lane % 2 == 0, turn[3 * n + 1], turn[3 * n]), 1, 32, 32)
    if wanted:
        for n in T.unroll(count // 8):
            T.ptx["st.global.v2.u32"](row_at + T.uint64(32 * n), T.if_then_else(lane % 2 == 0, turn[3 * n], turn[3 * n + 2]), T.if_then_else(lane % 2 == 0, turn[3 * n + 2], turn[3 * n + 1]))
