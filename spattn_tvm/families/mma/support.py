"""What the spaces of the portable tensor-core family share: which problems and chips it can serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spattn_tvm.target import MachineTarget

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = range(32, 257, 16)


def unsupported(head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    """Why the family can't serve a head dim, dtype or target, or None."""
    if target.kind != "cuda":
        return f"the mma family needs an NVIDIA GPU, not {target.folder}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not among {', '.join(DTYPES)}"
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is not a multiple of 16 from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
    return None
