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
