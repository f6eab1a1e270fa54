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


# These are written with TVM's builder: for a T.inline function, TVM asks Python for the source of all frames
# above, and a kernel that calls fifteen of them takes two or three times as long to parse.


def fill(target, first_row, rows, lanes, value):
    """``target[first_row + u, r] = value(u, r)``; the rows are unrolled, the lanes one vector operation."""
    with T.unroll(rows) as u, T.vectorized(lanes) as r:
        T.buffer_store(target, value(u, r), [first_row + u, r])


def multiply_add(tile, rows, lanes, depth, left, right):
    """``tile[u, r] += sum_t left(u, t) * right(t, r)``: a matrix product, one broadcast times one vector."""
    with T.serial(depth) as t, T.unroll(rows) as u, T.vectorized(lanes) as r:
        T.buffer_store(tile, tile[u, r] + left(u, t) * right(t, r), [u, r])


def widen(target, rows, dim, lanes, value):
    """``target[j, d] = float32(value(j, d))`` for ``rows`` rows, ``lanes`` at a time."""
    with T.serial(rows) as j, T.serial(dim // lanes) as chunk, T.vectorized(lanes) as lane:
        column = chunk * lanes + lane
        T.buffer_store(target, T.cast(value(j, column), "float32"), [j, column])


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


def add_halves(tile, lanes, block):
    """From ``block`` rows, of which each has a block of so many lanes for some rows of the beginning, to half
    as many: the sums of the blocks' halves.
    """
    if block <= lanes:
        with T.unroll(block // 2) as u:
            sums = _halves(tile, u, lanes, block, 0) + _halves(tile, u, lanes, block, block // 2)
            T.buffer_store(tile, sums, [u, T.Ramp(0, 1, lanes)])


def sum_rows(tile, lanes):
    """The sums of the ``lanes`` rows of a square tile, in its first row."""
    for block in (16, 8, 4, 2):
        add_halves(tile, lanes, block)
