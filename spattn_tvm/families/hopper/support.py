"""What the spaces of the Hopper family share: which problems and chips it can serve."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spattn_tvm.target import MachineTarget

DTYPES = ("float16", "bfloat16")
WARPGROUP_ROWS = 64  # of one wgmma
PLANE = 64  # columns of a swizzled row of 128 bytes: a tile of more columns lies in planes


def unsupported(head_dims: Collection[int], head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    """Why a pass with kernels for `head_dims` can't serve a head dim, dtype or target, or None."""
    if target.kind != "cuda" or target.arch != "sm_90a":
        return f"Hopper's instructions (TMA, wgmma) need sm_90a, not {target.folder}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not among {', '.join(DTYPES)}"
    if head_dim not in head_dims:
        return f"head dim {head_dim} is not among {', '.join(map(str, head_dims))}"
    return None
