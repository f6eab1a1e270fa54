"""The two small kernels of the portable backward: one before its passes, one behind the pass that sums dQ.

Both only move data, a row by as many lanes as it has units of 16 bytes, and run at the memory's speed.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.numbers import ALL_LANES

from .blocks import BLOCK, Blocks, element_bytes

THREADS = 256

_DOT_SOURCE = {
    "bfloat16": """
__device__ __forceinline__ float spattn_dot(unsigned int a, unsigned int b, float sum) {
  sum = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
  return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), sum);
}
""",
    "float16": """
__device__ __forceinline__ float spattn_dot(unsigned int a, unsigned int b, float sum) {
  float2 x = __half22float2(*reinterpret_cast<__half2*>(&a));
  float2 y = __half22float2(*reinterpret_cast<__half2*>(&b));
  return fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
}
""",
    "float32": """
__device__ __forceinline__ float spattn_dot(unsigned int a, unsigned int b, float sum) {
  return fmaf(__uint_as_float(a), __uint_as_float(b), sum);
}
""",
}


def dot(a: Any, b: Any, total: Any, dtype: str) -> Any:
    """`total` and the products of what two words hold of `dtype`."""
    return T.cuda.func_call("spattn_dot", a, b, total, source_code=_DOT_SOURCE[dtype], return_type="float32")


def lanes_of_row(units: int) -> int:
    """Lanes that share a row of so many units: a power of two, at most a warp."""
    return min(32, 1 << (units - 1).bit_length())


@T.inline
def locate_row(number, rows, heads, length, batch, head, position):
    # What is beyond the last row does that row again: shuffles need all lanes.
    row: T.int32 = T.min(number, rows - 1)
    pair: T.int32 = T.truncdiv(row, length)
    position = row - pair * length
    batch = T.truncdiv(pair, heads)
    head = pair - batch * heads


@T.inline
def make_delta(o, do, dlse, delta, dq_sum, shape, head_dim, dtype):
    """delta = rowsum(dO * O) - dlse; and dq_sum, unless it is None, is cleared."""
    rows, heads, length = (
        T.meta_var(shape[0] * shape[1] * shape[2]),
        T.meta_var(shape[1]),
        T.meta_var(shape[2]),
    )
    unit = T.meta_var(16 // element_bytes(dtype))  # elements of 16 bytes
    units = T.meta_var(head_dim // unit)
    lanes = T.meta_var(lanes_of_row(units))
    block = T.cta_id([(rows + (THREADS // lanes - 1)) // (THREADS // lanes)])
    thread = T.thread_id([THREADS])
    lane: T.int32 = thread % lanes
    batch: T.int32 = 0
    head: T.int32 = 0
    position: T.int32 = 0
    locate_row(block * (THREADS // lanes) + thread // lanes, rows, heads, length, batch, head, position)
    o_at: T.int64 = o.row(batch, head, position) + T.cast(lane * unit, "int64")
    do_at: T.int64 = do.row(batch, head, position) + T.cast(lane * unit, "int64")
    total = T.alloc_local((1,), "float32")
    left = T.alloc_local((4,), "uint32")
    right = T.alloc_local((4,), "uint32")
    total[0] = T.float32(0)
    for step in T.unroll((units + lanes - 1) // lanes):
        column: T.let = step * lanes * unit
        if lane + step * lanes < units:
            T.ptx["ld.global.nc.v4.u32"](*[left[i] for i in range(4)], o.flat.ptr_to([o_at + column]))
            T.ptx["ld.global.nc.v4.u32"](*[right[i] for i in range(4)], do.flat.ptr_to([do_at + column]))
            for i in T.unroll(4):
                total[0] = dot(left[i], right[i], total[0], dtype)
            if dq_sum is not None:
                for i in T.unroll(unit // 4):
                    T.ptx["st.global.v4.f32"](
                        dq_sum.ptr_to([batch, head, position, lane * unit + column + 4 * i]),
                        *[T.float32(0)] * 4,
                    )
    for i in T.unroll((lanes - 1).bit_length()):
        total[0] = total[0] + T.tvm_warp_shuffle_xor(ALL_LANES, total[0], 1 << i, 32, 32)
    if lane == 0:
        delta[batch, head, position] = total[0] - dlse[batch, head, position]


@T.inline
def cast_sum(dq_sum, dq, scale, shape, head_dim, dtype):
    """dq out of dq_sum, whose columns lie as `Blocks.neighbour` names them."""
    rows, heads, length = (
        T.meta_var(shape[0] * shape[1] * shape[2]),
        T.meta_var(shape[1]),
        T.meta_var(shape[2]),
    )
    blocks = T.meta_var(Blocks(dtype, head_dim))
    units = T.meta_var(head_dim // 4)
    lanes = T.meta_var(lanes_of_row(units))
    block = T.cta_id([(rows + (THREADS // lanes - 1)) // (THREADS // lanes)])
    thread = T.thread_id([THREADS])
    lane: T.int32 = thread % lanes
    batch: T.int32 = 0
    head: T.int32 = 0
    position: T.int32 = 0
    locate_row(block * (THREADS // lanes) + thread // lanes, rows, heads, length, batch, head, position)
    # A lane has two columns of each half of 16, with its neighbour's four of one; of float32 it has four.
    mine: T.int32 = lane * 4 if blocks.is_split else lane // 4 * BLOCK + lane % 2 * 8 + lane % 4 // 2 * 4
    to: T.int64 = dq.row(batch, head, position) + T.cast(mine, "int64")
    sums = T.alloc_local((4,), "float32")
    swapped = T.alloc_local((2,), "float32")
    words = T.alloc_local((2,), "uint32")
    for step in T.unroll((units + lanes - 1) // lanes):
        is_inside: T.bool = lane + step * lanes < units
        for i in T.unroll(4):
            sums[i] = T.float32(0)
        if is_inside:
            T.ptx["ld.global.v4.f32"](
                *[sums[i] for i in range(4)],
                dq_sum.ptr_to([batch, head, position, lane * 4 + step * lanes * 4]),
            )
        if not blocks.is_split:
            is_even: T.bool = lane % 2 == 0
            for e in T.unroll(2):
                swapped[e] = T.tvm_warp_shuffle_xor(
                    ALL_LANES, T.if_then_else(is_even, sums[2 + e], sums[e]), 1, 32, 32
                )
            for e in T.unroll(2):
                sums[2 + e] = T.if_then_else(is_even, swapped[e], sums[2 + e])
                sums[e] = T.if_then_else(is_even, sums[e], swapped[e])
        if is_inside:
            if blocks.is_split:
                T.ptx["st.global.v4.f32"](
                    dq.flat.ptr_to([to + step * lanes * 4]), *[sums[i] * scale for i in range(4)]
                )
            else:
                for i in T.unroll(2):
                    T.ptx[blocks.pack](words[i], sums[2 * i + 1] * scale, sums[2 * i] * scale)
                T.ptx["st.global.v2.b32"](dq.flat.ptr_to([to + step * lanes * 4]), words[0], words[1])
