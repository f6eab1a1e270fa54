"""Rows of an accumulator to global memory, four lanes a row.

A lane of ``mma`` and ``wgmma`` holds columns ``8 n + 2 (lane % 4)`` and the next one of its rows. Written so,
a lane's stores are 4 bytes wide and a sector is written by two of them.
"""

# mypy: ignore-errors
from tvm.script import tirx as T

from .numbers import ALL_LANES


@T.inline
def store_row(value, columns, to, is_inside, convert, lane):
    """A row of ``columns`` (a multiple of 16) columns as two-byte numbers, 16 bytes a store.

    All lanes of a warp take part, whatever ``is_inside`` says: they transpose 4 x 4 words among four lanes.

    Parameters
    ----------
    value : callable
        ``value(n, e)``: the float32 of column ``8 * n + 2 * (lane % 4) + e``.
    columns : int
    to : callable
        ``to(column)``: global address of a column, a pointer or a uint64.
    is_inside : callable
        ``is_inside(column)``: whether a lane may store the eight (or, of the last 16, four) columns from
        ``column`` on.
    convert : str
        ``cvt.rn.bf16x2.f32`` or ``cvt.rn.f16x2.f32``.
    lane : int32
    """
    odd: T.bool = lane % 2 == 1
    upper: T.bool = lane % 4 >= 2
    for group in T.unroll(columns // 32):
        words = T.alloc_local((4,), "uint32")
        half = T.alloc_local((4,), "uint32")
        for i in T.unroll(4):
            T.ptx[convert](words[i], value(4 * group + i, 1), value(4 * group + i, 0))
        for i in T.unroll(2):
            give: T.uint32 = T.Select(odd, words[2 * i], words[2 * i + 1])
            got: T.uint32 = T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), give, 1, 32, 32)
            half[2 * i] = T.Select(odd, got, words[2 * i])
            half[2 * i + 1] = T.Select(odd, words[2 * i + 1], got)
        for i in T.unroll(2):
            give: T.uint32 = T.Select(upper, half[i], half[i + 2])
            got: T.uint32 = T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), give, 2, 32, 32)
            words[i] = T.Select(upper, got, half[i])
            words[i + 2] = T.Select(upper, half[i + 2], got)
        if is_inside(32 * group + 8 * (lane % 4)):
            T.ptx["st.global.v4.b32"](to(32 * group + 8 * (lane % 4)), words[0], words[1], words[2], words[3])
    if columns % 32 != 0:
        # Neighbours swap halves of the last two blocks of eight columns.
        pair = T.alloc_local((2,), "uint32")
        last: T.let = columns // 8 - 2
        for i in T.unroll(2):
            T.ptx[convert](pair[i], value(last + i, 1), value(last + i, 0))
        give: T.uint32 = T.Select(odd, pair[0], pair[1])
        got: T.uint32 = T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), give, 1, 32, 32)
        if is_inside(8 * last + 8 * (lane % 2) + 4 * (lane % 4 // 2)):
            T.ptx["st.global.v2.b32"](
                to(8 * last + 8 * (lane % 2) + 4 * (lane % 4 // 2)),
                T.Select(odd, got, pair[0]),
                T.Select(odd, pair[1], got),
            )
