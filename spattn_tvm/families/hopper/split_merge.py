"""How the Hopper forward with split keys puts the shares of a row together."""

# mypy: ignore-errors
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from spattn_tvm.domains.numbers import ALL_LANES, LN2
from spattn_tvm.domains.share_merge import ShareMerge
from spattn_tvm.domains.variables import scalar

from .attend_row import attend_row
from .parts import convert, element


class Merge(ShareMerge):
    """The second kernel; `run` is all of it.

    Beside a share's reference and sum it finds whether that reference is the one that rows begin with, and
    whether it is huge. As in the forward, a row is attended to again where some share's is huge, or no
    share's has risen; where one has, what shares of the lowest scores leave is right, and next to nothing.

    Parameters
    ----------
    head_dim : int
    dtype : {"bfloat16", "float16"}
    call : namespace
        As `ShareMerge`'s, and the forward's tensors and sizes and ``scale``.
    """

    def __init__(self, head_dim: int, dtype: str, call: SimpleNamespace) -> None:
        super().__init__(head_dim, convert(dtype), call)
        self.dtype = dtype

    def prepare(self) -> None:
        self.again = scalar("int32", T.int32(0))

    def address(self, column: Any) -> Any:
        return scalar("uint64", element(self.call.o, self.batch, self.head, self.query, column))

    @T.inline
    def weigh(self):
        has_keys: T.bool = self.sums[1] != T.float32(0)
        self.weigh_by_references()
        self.add_sums(has_keys)
        self.lse[0] = (self.top[0] + T.log2(self.total[0])) * T.float32(LN2)
        has_risen: T.bool = T.And(has_keys, self.sums[2] == T.float32(0))
        # Relative to a huge reference, which is rounded, even the greatest score may weigh 0.
        is_huge: T.bool = self.sums[3] != T.float32(0)
        self.again = T.Select(
            T.Or(
                T.cuda.any_sync(T.uint32(ALL_LANES), has_risen) == 0,
                T.cuda.any_sync(T.uint32(ALL_LANES), is_huge) != 0,
            ),
            1,
            0,
        )

    @T.inline
    def finish(self):
        if self.again != 0:
            T.cuda.warp_sync()
            call = T.meta_var(self.call)
            attend_row(
                call, self.dtype, self.head_dim, call.scale, self.lane, self.batch, self.head, self.query
            )  # fmt: skip
