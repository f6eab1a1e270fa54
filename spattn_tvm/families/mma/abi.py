"""The portable tensor-core family, and what its functions take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spattn_tvm.families.family import Abi, Family, Output, Scratch, Sizes
from spattn_tvm.families.shares import MOST_SHARES, scratch_of_shares

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

COPY_BYTES = 16  # of one cp.async


def _query_rows(n: Sizes) -> tuple[int, ...]:
    return n.batch, n.query_heads, n.queries


DOMAIN = ("bands", "cu_seqlens", "cu_seqlens_k", "key_ranges")

FORWARD = Abi(
    inputs=("q", "k", "v", *DOMAIN),
    outputs=(Output("o", like="q"), Output("lse", shape=_query_rows, dtype="float32")),
    alignment=COPY_BYTES,
)

BACKWARD = Abi(
    inputs=("q", "k", "v", "o", "lse", "do", "dlse", *DOMAIN),
    outputs=(Output("dq", like="q"), Output("dk", like="k"), Output("dv", like="v")),
    scratch=(
        Scratch("delta", shape=_query_rows, dtype="float32"),
        Scratch(
            "dq_sum", shape=lambda n: (*_query_rows(n), n.head_dim), dtype="float32", only_with="one_pass"
        ),
    ),
    alignment=COPY_BYTES,
)

# Blocks a multiprocessor, or waves of them, that a call's keys are split over at most.
DECODE_BLOCKS = 8
DECODE_ROWS = 16  # query rows of a block


def _parts(n: Sizes) -> int:
    """Blocks whose results another one merges; none where keys are not split, but no tensor is empty."""
    rows = n.query_heads // n.kv_heads * n.queries
    blocks = n.batch * n.kv_heads * -(-rows // DECODE_ROWS)
    most = DECODE_BLOCKS * n.workers
    return most if 2 * blocks <= most else 1


def _part_rows(n: Sizes) -> tuple[int, int]:
    return _parts(n), min(DECODE_ROWS, n.query_heads // n.kv_heads * n.queries)


DECODE = Abi(
    inputs=("q", "k", "v", "bands", "cache_lengths", "cache_starts", "block_table", "ring"),
    outputs=FORWARD.outputs,
    scratch=(
        *scratch_of_shares(_part_rows, 4),
        Scratch("arrived", shape=lambda n: (_parts(n),), dtype="int32", kept=True),
    ),
    alignment=COPY_BYTES,
)


SPLIT_BLOCKS = 4  # of a multiprocessor, at most
SPLIT_ROWS = 128  # query rows of a tile, by which calls are judged
# With so many multiprocessors for each tile at least, each is shared by two blocks at least. Sharing costs
# the way of float32 sums to memory and back, and a second kernel, which the keys of the longest tile must be
# worth. Where the Hopper family has a forward but none with split keys that was measured, they must be worth
# more; how much follows from the head dims below, not from its own. Measured on an H100 of 132
# multiprocessors, bfloat16, us:
#
# =====  ====  =================================  ================================
# tiles  keys  head dim 128: split, mma, hopper   head dim 64: split, mma, hopper
# =====  ====  =================================  ================================
#     8  1024  21.5, 41.4, 23.8
#    16   512  21.0, 28.0, 18.8                   18.1, 20.7, 16.0
#    16  1024  24.5, 41.5, 24.7                   20.9, 31.0, 22.0
#    16  4096  36.3, 126, 61.3                    27.8, 90.7, 56.6
#    32  1024  27.4, 42.7, 29.2                   22.4, 31.0, 27.0
#    64  1024  34.8, 44.2, 33.5                   26.9, 31.7, 28.2
#    64  2048  46.4, 73.0, 45.3
#    64  4096  68.3, 131, 74.4                    46.9, 91.8, 71.4
#    96  4096  111, 133, 75.7
# =====  ====  =================================  ================================
LEAST_MULTIPROCESSORS = 2
LEAST_KEYS = 256
LEAST_KEYS_BESIDE_HOPPER = 600  # and a quarter of the head dim more for each tile
HOPPER_HEAD_DIMS = (64, 128, 192)  # which it has in two-byte types
SPLIT_BY_HOPPER = (64, 128)  # of these, where its own kernels with split keys were measured, and faster


def query_tiles(batch: int, heads: int, queries: int) -> int:
    """Tiles of a call that is not packed."""
    return batch * heads * -(-queries // SPLIT_ROWS)


def _split_rows(n: Sizes) -> tuple[int]:
    """Rows of all shares."""
    splits = SPLIT_BLOCKS * n.workers // query_tiles(n.batch, n.query_heads, n.queries)
    return (max(1, min(MOST_SHARES, splits)) * n.batch * n.query_heads * n.queries,)


SPLIT_FORWARD = Abi(
    inputs=FORWARD.inputs,
    outputs=FORWARD.outputs,
    scratch=scratch_of_shares(_split_rows, 4),
    alignment=COPY_BYTES,
)


def _is_short_and_wide(problem: AttentionProblem, target: MachineTarget) -> bool:
    tiles = query_tiles(problem.batch, problem.query_heads, problem.length)
    least = LEAST_KEYS
    if target.arch == "sm_90a" and problem.dtype != "float32" and problem.head_dim in HOPPER_HEAD_DIMS:
        if problem.head_dim in SPLIT_BY_HOPPER:
            return False
        least = LEAST_KEYS_BESIDE_HOPPER + tiles * problem.head_dim // 4
    return tiles * LEAST_MULTIPROCESSORS <= target.multiprocessors and problem.most_keys >= least


def _runs_on(target: MachineTarget) -> bool:
    return target.kind == "cuda"


FAMILY = Family(
    name="mma",
    title="portable kernels",
    reference="spattn_tvm.families.mma.abi:FAMILY",
    runs_on=_runs_on,
    spaces={
        "forward": "spattn_tvm.families.mma.forward_space:FORWARD",
        "backward": "spattn_tvm.families.mma.backward_space:BACKWARD",
        "decode": "spattn_tvm.families.mma.decode_space:DECODE",
    },
    abis={"forward": FORWARD, "backward": BACKWARD, "decode": DECODE},
    sources=("spattn_tvm.families.mma", "spattn_tvm.families.shares", "spattn_tvm.domains"),
)

SPLIT = Family(
    name="mma_split",
    title="portable kernels, keys split over blocks",
    reference="spattn_tvm.families.mma.abi:SPLIT",
    runs_on=_runs_on,
    spaces={"forward": "spattn_tvm.families.mma.split_space:FORWARD"},
    abis={"forward": SPLIT_FORWARD},
    sources=FAMILY.sources,
    made_for=_is_short_and_wide,
)
