"""The Hopper family, and what its functions take.

Its kernels mask and find a row's maximum before they scale, which only a positive factor allows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from spattn_tvm.families.family import Abi, Family, Output, Scratch, Sizes
from spattn_tvm.families.shares import MOST_SHARES, scratch_of_shares

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

TMA_BYTES = 16  # what a TMA descriptor's address and strides are multiples of


def _query_rows(n: Sizes) -> tuple[int, ...]:
    return n.batch, n.query_heads, n.queries


# They hand out a kernel's tiles. The forward's last CTA clears them; the backward's first kernel does.
NEXT_TILE = Scratch("next_tile", shape=lambda n: (2,), dtype="int32", kept=True)

FORWARD = Abi(
    inputs=("q", "k", "v", "bands", "cu_seqlens", "cu_seqlens_k", "key_ranges"),
    outputs=(Output("o", like="q"), Output("lse", shape=_query_rows, dtype="float32")),
    scratch=(NEXT_TILE,),
    alignment=TMA_BYTES,
    positive_scale=True,
)

# What a share costs beside its products, and what putting shares together costs, in times of a tile: those
# with which `split_shares` finds what was fastest at 4096 keys and 16 to 128 tiles.
SHARE_COST = 0.1
MERGE_COST = 0.15


def split_rows(head_dim: int) -> int:
    """Query rows of a tile where keys are split: of the tiles that were measured fastest."""
    return 192 if head_dim == 128 else 128


def split_tiles(batch: int, heads: int, queries: int, head_dim: int) -> int:
    """Tiles of a call with split keys that is not packed."""
    return batch * heads * -(-queries // split_rows(head_dim))


@lru_cache(maxsize=1024)
def split_shares(tiles: int, workers: int) -> int:
    """What the keys of each of so many tiles are split over: one where the tiles are enough for the blocks.

    The blocks take one share after the other: of all numbers the one with the least ``rounds * (1 / shares +
    SHARE_COST) + MERGE_COST``, in times of a tile; one share costs neither.
    """

    def cost(shares: int) -> float:
        if shares == 1:
            return 1.0
        return -(-tiles * shares // workers) * (1 / shares + SHARE_COST) + MERGE_COST

    return 1 if tiles >= workers else min(range(1, MOST_SHARES + 1), key=cost)


def _share_rows(n: Sizes) -> tuple[int]:
    """Rows of all shares, or one, which no share is kept in."""
    shares = split_shares(split_tiles(n.batch, n.query_heads, n.queries, n.head_dim), n.workers)
    return (shares * n.batch * n.query_heads * n.queries if shares > 1 else 1,)


SPLIT_FORWARD = Abi(
    inputs=FORWARD.inputs,
    outputs=FORWARD.outputs,
    scratch=(
        *scratch_of_shares(_share_rows, 4),
        NEXT_TILE,
    ),
    alignment=TMA_BYTES,
    positive_scale=True,
)

BACKWARD = Abi(
    inputs=("q", "k", "v", "o", "lse", "do", "dlse", "bands", "cu_seqlens", "cu_seqlens_k", "key_ranges"),
    outputs=(Output("dq", like="q", has_sign=True), Output("dk", like="k"), Output("dv", like="v")),
    scratch=(
        # lse and delta of two queries a row
        Scratch("stats", shape=lambda n: (n.batch, n.query_heads, (n.queries + 1) // 2, 4), dtype="float32"),
        NEXT_TILE,
        Scratch(
            "dq_sum", shape=lambda n: (*_query_rows(n), n.head_dim), dtype="float32", only_with="one_pass"
        ),
        # One pass: how far clearing and converting the sums, and the tiles of each key head, have come. Two:
        # how many of its queries each key head has the statistics of.
        Scratch("progress", shape=lambda n: (3 + n.batch * n.kv_heads,), dtype="int32"),
    ),
    alignment=TMA_BYTES,
    positive_scale=True,
)


def _runs_on(target: MachineTarget) -> bool:
    return target.kind == "cuda" and target.arch == "sm_90a"


FAMILY = Family(
    name="hopper",
    reference="spattn_tvm.families.hopper.abi:FAMILY",
    runs_on=_runs_on,
    spaces={
        "forward": "spattn_tvm.families.hopper.forward_space:FORWARD",
        "backward": "spattn_tvm.families.hopper.backward_space:BACKWARD",
    },
    abis={"forward": FORWARD, "backward": BACKWARD},
    sources=("spattn_tvm.families.hopper", "spattn_tvm.families.shares", "spattn_tvm.domains"),
)


# For which calls keys are split: with two multiprocessors for each tile at least (with fewer each tile is one
# share, and the whole forward has tiles as small), and so many keys and more for each tile, by head dim.
# Measured on an H100 of 132 multiprocessors, bfloat16, L2 cleared, us, beside the whole forward with the
# tiles that it has where they are many:
#
# =====  ====  ============  ====  ======  =====  ====  ===========  ====  ======
# head dim 128                             head dim 64
# ---------------------------------------  --------------------------------------
# tiles  keys  split         mma   hopper  tiles  keys  split        mma   hopper
# =====  ====  ============  ====  ======  =====  ====  ===========  ====  ======
#    16   512  17.1          19.3  15.8
#    16  1024  19.4          23.7  22.4       16  1024  15.7         20.1  19.4
#    16  2048  22.8          27.1  34.2       16  4096  22.8         28.2  55.9
#    32  1024  21.1          25.3  23.8       32  4096  27.5         34.0  70.5
#    48  1024  26.2          31.1  23.6       64  1024  21.8         24.0  23.4
#    48  2048  33.6          42.8  38.1       64  4096  40.4         47.6  72.4
#    48  4096  48.6          63.2  66.8       96  4096  52.7         61.4  72.6
#    64  4096  57.8          111   76.8      128  4096  53.3         77.3  73.7
#    96  4096  78.9 (89.8)   118   78.5
# =====  ====  ============  ====  ======  =====  ====  ===========  ====  ======
#
# (In brackets with 4 shares where one is as fast as the whole forward.) 64 tiles of 4 sequences with 128
# queries and 2048 keys each, which are bound by memory, took 49.8 and 44.3 in the whole forward. With small
# tiles that took, at 128 tiles and 4096 keys, 69.7 at head dim 128 (of 192 rows 96 tiles), 52.3 at 64.
LEAST_MULTIPROCESSORS = 2
LEAST_KEYS = 360
MORE_KEYS = {64: 10, 128: 20}


def _is_short_and_wide(problem: AttentionProblem, target: MachineTarget) -> bool:
    if problem.head_dim not in MORE_KEYS or problem.dtype == "float32":
        return False
    tiles = split_tiles(problem.batch, problem.query_heads, problem.length, problem.head_dim)
    least = LEAST_KEYS + MORE_KEYS[problem.head_dim] * tiles
    is_short = LEAST_MULTIPROCESSORS * tiles <= target.multiprocessors
    return is_short and problem.most_keys >= least


SPLIT = Family(
    name="hopper_split",
    title="Hopper kernels, keys split over blocks",
    reference="spattn_tvm.families.hopper.abi:SPLIT",
    runs_on=_runs_on,
    spaces={"forward": "spattn_tvm.families.hopper.split_space:FORWARD"},
    abis={"forward": SPLIT_FORWARD},
    sources=FAMILY.sources,
    made_for=_is_short_and_wide,
)
