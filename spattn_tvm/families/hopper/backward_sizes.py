"""Shared memory of the Hopper backward kernels: what lies where, and how many bytes in all."""

from __future__ import annotations

from collections.abc import Mapping

from spattn_tvm.target import shared_bytes_most

from .support import WARPGROUP_ROWS

SWIZZLE_ROW_BYTES = 128
BARRIER_BYTES = 8
# Of a chunk: first row, its band's lo and hi, a bit for each warpgroup that needs it (one pass: batch and
# head).
INFO_BYTES = 16
MET_BYTES = 8  # of a chunk of the one pass: the first row that meets the tile, and the one behind the last
# Of a tile: first row, where the rows of the other side begin that exist for it, where its own end, batch and
# head; chunks of each warpgroup (one pass: where the rows of the other side end), chunks in all.
TILE_INFO_BYTES = 32
TILE_COUNTS_AT = 16  # in those
QUEUE = 2  # tiles that the tile warp may be ahead of the chunk warp
QUEUE_INFO_BYTES = 48  # what `offer_tile` writes of one
ONE_PASS_QUERIES = 64  # of a chunk, where both passes are one
SHARED_LIMIT = shared_bytes_most("sm_90a")

Arena = tuple[dict[str, int], int]  # the byte offset of each region, and the bytes in all


class _Offsets:
    """Byte offsets into the one dynamic shared-memory buffer of a kernel."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self.size = 0

    def take(self, align: int, **regions: int) -> None:
        for name, count in regions.items():
            self.of[name] = (self.size + align - 1) // align * align
            self.size = self.of[name] + count

    def take_words(self, stages: int, buffers: int) -> None:
        self.take(
            16, info=stages * INFO_BYTES, tile=buffers * TILE_INFO_BYTES, queue=QUEUE * QUEUE_INFO_BYTES
        )

    def take_barriers(self, stages: int, buffers: int) -> None:
        counts = {
            "full": stages,
            "empty": stages,
            "tile_full": buffers,
            "tile_empty": buffers,
            "queue_full": QUEUE,
            "queue_empty": QUEUE,
            "chunk_landed": 1,
            "tile_landed": 1,
        }
        self.take(8, **{name: count * BARRIER_BYTES for name, count in counts.items()})


def holds_keys(head_dim: int) -> bool:
    """Whether the dK/dV pass keeps its tile of K and V in registers, as the dQ pass keeps Q and dO.

    Its products then read half of what they read from shared memory otherwise, and the next tile loads under
    all of this one. At head dim 128 there are no registers for it.
    """
    return head_dim == 64


def _dkv_data(decisions: Mapping[str, int], head_dim: int) -> _Offsets:
    row = head_dim * 2
    rows = WARPGROUP_ROWS * decisions["dkv_warpgroups"] * decisions["dkv_buffers"]
    ring = decisions["dkv_stages"] * decisions["dkv_queries"]
    arena = _Offsets()
    arena.take(1024, k=rows * row, v=rows * row, q=ring * row, do=ring * row)
    arena.take(128, stats=ring * 8)
    return arena


def _dq_data(decisions: Mapping[str, int], head_dim: int) -> _Offsets:
    row = head_dim * 2
    rows = WARPGROUP_ROWS * decisions["dq_warpgroups"]
    ring = decisions["dq_stages"] * decisions["dq_keys"]
    arena = _Offsets()
    arena.take(1024, q=rows * row, do=rows * row, o=rows * row, k=ring * row, v=ring * row)
    arena.take_words(decisions["dq_stages"], 1)
    return arena


def dq_arena(decisions: Mapping[str, int], head_dim: int) -> Arena:
    """The dQ pass: Q, dO and O of a tile, rings of K and V.

    Its barriers lie behind all data of the dK/dV pass, which follows in the same launch. PTX lets nobody use
    the memory of an mbarrier for anything else; where that pass had dO there, words of barriers that nobody
    used any more came back over what TMA had written, at a later proxy fence (seen on an H100).
    """
    arena = _dq_data(decisions, head_dim)
    arena.size = max(arena.size, _dkv_data(decisions, head_dim).size)
    arena.take_barriers(decisions["dq_stages"], 1)
    arena.take(8, told=2 * BARRIER_BYTES)
    return arena.of, arena.size


def dkv_arena(decisions: Mapping[str, int], head_dim: int) -> Arena:
    """The dK/dV pass: K and V of a tile, rings of Q, dO and two float32 a query."""
    arena = _dkv_data(decisions, head_dim)
    # Behind everything of the dQ pass: they are set up before it.
    arena.size = max(arena.size, dq_arena(decisions, head_dim)[1])
    arena.take_words(decisions["dkv_stages"], decisions["dkv_buffers"])
    arena.take_barriers(decisions["dkv_stages"], decisions["dkv_buffers"])
    return arena.of, arena.size


def one_pass_arena(decisions: Mapping[str, int], head_dim: int) -> Arena:
    """The one pass: the dK/dV pass's, two buffers of dS, and a chunk's dQ in float32."""
    row = head_dim * 2
    rows = WARPGROUP_ROWS * decisions["dkv_warpgroups"]
    ring = decisions["dkv_stages"] * ONE_PASS_QUERIES
    arena = _Offsets()
    arena.take(1024, k=rows * row, v=rows * row, q=ring * row, do=ring * row)
    arena.take(1024, ds=2 * rows * ONE_PASS_QUERIES * 2, sum=ONE_PASS_QUERIES * head_dim * 4)
    arena.take(128, stats=ring * 8)
    arena.take(8, met=decisions["dkv_stages"] * MET_BYTES)
    arena.take_words(decisions["dkv_stages"], 1)
    arena.take_barriers(decisions["dkv_stages"], 1)
    return arena.of, arena.size


def shared_bytes(decisions: Mapping[str, int], head_dim: int) -> dict[str, int]:
    """Dynamic shared memory that ``decisions`` ask for, in bytes: of the dQ pass its data alone, for the
    barriers of both passes lie behind that of either.
    """
    if decisions["one_pass"]:
        return {"one": one_pass_arena(decisions, head_dim)[1]}
    return {"dQ": _dq_data(decisions, head_dim).size, "dK/dV": dkv_arena(decisions, head_dim)[1]}
