"""One row of attention by one warp, in plain float32: right for scores of any size, and slow.

The forward's consumers multiply scores by their factor and subtract the row's reference, in one instruction.
This takes their place where such products are rounded by more than what exp2 can take, and where within one
chunk a score rises above the reference by more than what a float32 weight can be (88 nats).
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.key_range import document_keys
from spattn_tvm.domains.numbers import ALL_LANES, INF, LN2, LOG2E
from spattn_tvm.domains.tiles import table_row

from .parts import convert, dot2, element

_UNPACK_SOURCE = {
    "bfloat16": """
__device__ __forceinline__ float spattn_unpack(unsigned int pair, int upper) {
  return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16);
}
""",
    "float16": """
__device__ __forceinline__ float spattn_unpack(unsigned int pair, int upper) {
  float2 x = __half22float2(*reinterpret_cast<__half2*>(&pair));
  return upper ? x.y : x.x;
}
""",
}


def unpack(pair: Any, upper: int, dtype: str) -> Any:
    """One of two packed numbers as float32."""
    return T.cuda.func_call(
        "spattn_unpack", pair, upper, source_code=_UNPACK_SOURCE[dtype], return_type="float32"
    )


@T.inline
def load_pairs(pairs, row_at, lane, count):
    # Columns 2 * lane and the next one, of each 64.
    for i in T.unroll(count):
        T.ptx["ld.global.nc.u32"](pairs[i], row_at + T.Cast("uint64", lane * 4) + T.uint64(128 * i))


@T.inline
def attend_row(t, dtype, head_dim, scale, lane, b, h, query):
    """Write o and lse of a query, if it has keys; all lanes of a warp take part."""
    count = T.meta_var(head_dim // 64)
    q = T.alloc_local((count,), "uint32")
    row = T.alloc_local((count,), "uint32")
    output = T.alloc_local((2 * count,), "float32")
    dot = T.alloc_local((1,), "float32")
    scale2: T.float32 = scale * T.float32(LOG2E)
    top: T.float32 = T.float32(-INF)
    total: T.float32 = T.float32(0)
    for i in T.unroll(2 * count):
        output[i] = T.float32(0)
    document: T.int32 = 0
    while T.And(document < t.documents - 1, t.cu_seqlens[document + 1] <= query):
        document = document + 1
    begin, end, shift = T.meta_var(
        document_keys(document, b, t.cu_seqlens, t.cu_seqlens_k, t.key_ranges, t.ranges)
    )
    bands: T.int32 = table_row(document, t.documents, t.tables)
    load_pairs(q, element(t.q, b, h, query, 0), lane, count)
    band: T.int32 = 0
    while band < 2:
        key: T.int32 = T.max(begin, query + shift - t.bands[bands, h, 2 * band + 1])
        key_end: T.int32 = T.min(query + shift - t.bands[bands, h, 2 * band] + 1, end)
        while key < key_end:
            load_pairs(row, element(t.k, b, T.truncdiv(h, t.group), key, 0), lane, count)
            dot[0] = T.float32(0)
            for i in T.unroll(count):
                dot[0] = dot2(q[i], row[i], dot[0], dtype)
            for i in T.unroll(5):
                dot[0] = dot[0] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), dot[0], 1 << i, 32, 32)
            higher: T.float32 = T.max(top, dot[0])
            shrink: T.float32 = T.exp2((top - higher) * scale2)
            weight: T.float32 = T.exp2((dot[0] - higher) * scale2)
            top = higher
            total = total * shrink + weight
            load_pairs(row, element(t.v, b, T.truncdiv(h, t.group), key, 0), lane, count)
            for i in T.unroll(count):
                for e in T.unroll(2):
                    output[2 * i + e] = output[2 * i + e] * shrink + weight * unpack(row[i], e, dtype)
            key = key + 1
        band = band + 1
    if total != T.float32(0):
        for i in T.unroll(count):
            T.ptx[convert(dtype)](row[i], output[2 * i + 1] / total, output[2 * i] / total)
            T.ptx["st.global.u32"](
                element(t.o, b, h, query, 0) + T.Cast("uint64", lane * 4) + T.uint64(128 * i), row[i]
            )
        if lane == 0:
            t.lse[b, h, query] = top * scale + T.log2(total) * T.float32(LN2)
