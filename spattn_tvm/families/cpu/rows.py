"""The tensors of a call as the CPU kernels see them."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.key_range import document_keys
from spattn_tvm.domains.tiles import first_slot, table_row


def strided_rows(handle: Any, shape: tuple[Any, ...], dtype: str) -> Any:
    """The (B, H, N, D) tensor behind a handle, of any strides but contiguous rows."""
    strides = (T.int64(), T.int64(), T.int64(), 1)
    return T.match_buffer(handle, shape, dtype, strides=strides, align=2, offset_factor=1)


class BandedRows:
    """What the forward and the backward take alike, in the function that is being parsed.

    Parameters
    ----------
    head_dim : int
    dtype : str
        Of q, k and v.
    q, k, v, bands, cu_seqlens, cu_seqlens_k, key_ranges : handles
        What they are says `build_cpu_forward`. The attributes of these names are buffers.

    Attributes
    ----------
    head_dim : int
    of_queries, of_statistics, of_key_gradients : tuple
        The shapes (B, Hq, Nq, D), (B, Hq, Nq) and (B, Hq, Nk, D).
    documents, heads, group, batch_heads, queries, keys, ranges, tables : int32
        How many there are; ``group`` query heads share a key head.
    """

    def __init__(
        self,
        head_dim: int,
        dtype: str,
        q: Any,
        k: Any,
        v: Any,
        bands: Any,
        cu_seqlens: Any,
        cu_seqlens_k: Any,
        key_ranges: Any,
    ) -> None:
        B, HQ, HKV, N, NK = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        M, DOCUMENTS_1, RANGES = T.int64(), T.int64(), T.int64()
        self.head_dim = head_dim
        self.of_queries = (B, HQ, N, head_dim)
        self.of_statistics = (B, HQ, N)
        self.of_key_gradients = (B, HQ, NK, head_dim)
        self.q = strided_rows(q, self.of_queries, dtype)
        self.k = strided_rows(k, (B, HKV, NK, head_dim), dtype)
        self.v = strided_rows(v, (B, HKV, NK, head_dim), dtype)
        self.bands = T.match_buffer(bands, (M, HQ, 4), "int32", align=4)
        self.cu_seqlens = T.match_buffer(cu_seqlens, (DOCUMENTS_1,), "int32", align=4)
        self.cu_seqlens_k = T.match_buffer(cu_seqlens_k, (DOCUMENTS_1,), "int32", align=4)
        self.key_ranges = T.match_buffer(key_ranges, (RANGES, 3), "int32", align=4)
        self.documents = T.cast(DOCUMENTS_1, "int32") - 1
        self.heads = T.cast(HQ, "int32")
        self.group = T.cast(HQ // HKV, "int32")
        self.batch_heads = T.cast(B, "int32") * self.heads
        self.queries = T.cast(N, "int32")
        self.keys = T.cast(NK, "int32")
        self.ranges = T.cast(RANGES, "int32")
        self.tables = T.cast(M, "int32")

    def bind_sizes(self) -> None:
        """Makes variables of the numbers, in the block that is being parsed."""
        self.documents = T.bind(self.documents)
        self.heads = T.bind(self.heads)
        self.batch_heads = T.bind(self.batch_heads)
        self.queries = T.bind(self.queries)
        self.ranges = T.bind(self.ranges)
        self.tables = T.bind(self.tables)

    def keys_of(self, document: Any, batch: Any) -> tuple[Any, Any, Any]:
        """The keys of a document's queries: begin, end and shift, as `document_keys` says."""
        return document_keys(
            document, batch, self.cu_seqlens, self.cu_seqlens_k, self.key_ranges, self.ranges
        )

    def table_of(self, document: Any) -> Any:
        """The row of `bands` that a document's queries obey."""
        return table_row(document, self.documents, self.tables)


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
