"""The tensors of a call as the CPU kernels see them."""

from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.tiles import first_slot


def strided_rows(handle: Any, shape: tuple[Any, ...], dtype: str) -> Any:
    """The (B, H, N, D) tensor behind a handle, of any strides but contiguous rows."""
    strides = (T.int64(), T.int64(), T.int64(), 1)
    return T.match_buffer(handle, shape, dtype, strides=strides, align=2, offset_factor=1)


@T.inline
def find_document(boundaries, slot, rows, place, at):  # type: ignore[no-untyped-def]
    """The document of a slot (:mod:`spattn_tvm.domains.tiles`) goes to ``place[at]`` and ``place[at + 1]``,
    which hold the first and the last one."""
    while place[at] < place[at + 1]:
        middle: T.let[T.int32] = (place[at] + place[at + 1] + 1) // 2
        if first_slot(boundaries[middle], middle, rows) <= slot:
            place[at] = middle
        else:
            place[at + 1] = middle - 1
