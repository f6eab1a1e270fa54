"""Register tiles of the CPU kernels: a few rows of vector lanes that LLVM keeps in registers."""

from tvm.script import tirx as T

# Buffers so annotated stay on the stack whatever their size, where LLVM turns them into registers; others
# above 1 KiB come from TVM's workspace pool.
REGISTERS = {"disable_lower_builtin": True}


def rows_of(tensor, batch, head, first_row, rows):
    """``rows`` rows of a (B, H, N, D) tensor, from ``first_row`` on, as a matrix that shares its memory."""
    batch_stride, head_stride, row_stride, dim_stride = tensor.strides
    offset = batch * batch_stride + head * head_stride + first_row * row_stride
    return T.decl_buffer(
        (rows, tensor.shape[3]),
        tensor.dtype,
        tensor.data,
        strides=(row_stride, dim_stride),
        elem_offset=offset,
    )


@T.inline
def fill(target, first_row, rows, lanes, value):
    """``target[first_row + u, r] = value(u, r)``; the rows are unrolled, the lanes one vector operation."""
    for u in T.unroll(rows):
        for r in T.vectorized(lanes):
            target[first_row + u, r] = value(u, r)


@T.inline
def multiply_add(tile, rows, lanes, depth, left, right):
    """``tile[u, r] += sum_t left(u, t) * right(t, r)``: a matrix product, one broadcast times one vector."""
    for t in T.serial(depth):
        for u in T.unroll(rows):
            for r in T.vectorized(lanes):
                tile[u, r] = tile[u, r] + left(u, t) * right(t, r)


@T.inline
def widen(target, rows, dim, lanes, value):
    """``target[j, d] = float32(value(j, d))`` for ``rows`` rows, ``lanes`` at a time."""
    for j in T.serial(rows):
        for chunk in T.serial(dim // lanes):
            for lane in T.vectorized(lanes):
                target[j, chunk * lanes + lane] = T.cast(value(j, chunk * lanes + lane), "float32")


def _halves(tile, row, lanes, block, offset):
    """Of each block of a row and of the row ``block // 2`` further on, by turns, a half."""
    pair = [tile[row, T.Ramp(0, 1, lanes)], tile[row + block // 2, T.Ramp(0, 1, lanes)]]
    return T.Shuffle(
        pair,
        [
            source * lanes + place + offset + lane
            for place in range(0, lanes, block)
            for source in range(2)
            for lane in range(block // 2)
        ],
    )


@T.inline
def add_halves(tile, lanes, block):
    """From ``block`` rows, of which each has a block of so many lanes for some rows of the beginning, to half
    as many: the sums of the blocks' halves.
    """
    if block <= lanes:
        for u in T.unroll(block // 2):
            tile[u, T.Ramp(0, 1, lanes)] = _halves(tile, u, lanes, block, 0) + _halves(
                tile, u, lanes, block, block // 2
            )


@T.inline
def sum_rows(tile, lanes):
    """The sums of the ``lanes`` rows of a square tile, in its first row."""
    add_halves(tile, lanes, 16)
    add_halves(tile, lanes, 8)
    add_halves(tile, lanes, 4)
    add_halves(tile, lanes, 2)
