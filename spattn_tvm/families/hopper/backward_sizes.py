"""Shared memory of the Hopper backward kernels: what lies where, and how many bytes in all."""

from __future__ import annotations

from collections.abc import Mapping

WARPGROUP_ROWS = 64  # rows of one wgmma


SWIZZLE_ROW_BYTES = 128  # a shared-memory row of one 64-column plane, 128-byte swizzle


DTYPES = ("float16", "bfloat16")


BARRIER_BYTES = 8


# Of a chunk: first row, its band's lo and hi, a bit for each warpgroup that needs it.
INFO_BYTES = 16


# Of a tile: first row, its document's begin and end, batch and head; chunks for each warpgroup, chunks in all.
TILE_INFO_BYTES = 32


QUEUE = 2  # tiles that the tile warp may be ahead of the chunk warp


ONE_PASS_QUERIES = 64  # of a chunk, where both passes are one


SHARED_LIMIT = 232448  # bytes a CTA may use on sm_90


def _align(value: int, to: int) -> int:
    return (value + to - 1) // to * to


class _Arena:
    """Byte offsets into the one dynamic shared-memory buffer of a kernel."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int, align: int = 128) -> int:
        offset = _align(self.size, align)
        self.size = offset + count
        return offset


def dq_shared_bytes(decisions: Mapping[str, int], head_dim: int) -> int:
    """Dynamic shared memory of the dQ pass in bytes."""
    return _dq_arena(decisions, head_dim)[1]


def dkv_shared_bytes(decisions: Mapping[str, int], head_dim: int) -> int:
    """Dynamic shared memory of the dK/dV pass in bytes."""
    return _dkv_arena(decisions, head_dim)[1]


def one_pass_shared_bytes(decisions: Mapping[str, int], head_dim: int) -> int:
    """Dynamic shared memory of the one pass in bytes."""
    return one_pass_arena(decisions, head_dim)[1]


def _dq_arena(decisions: Mapping[str, int], head_dim: int) -> tuple[dict[str, int], int]:
    rows = WARPGROUP_ROWS * decisions["dq_warpgroups"]
    chunk = decisions["dq_keys"]
    stages = decisions["dq_stages"]
    arena = _Arena()
    at = {
        "q": arena.take(rows * head_dim * 2, 1024),
        "do": arena.take(rows * head_dim * 2, 1024),
        "o": arena.take(rows * head_dim * 2, 1024),
        "k": arena.take(stages * chunk * head_dim * 2, 1024),
        "v": arena.take(stages * chunk * head_dim * 2, 1024),
        "info": arena.take(stages * INFO_BYTES, 16),
        "tile": arena.take(TILE_INFO_BYTES, 16),
        "queue": arena.take(QUEUE * TILE_INFO_BYTES, 16),
        "full": arena.take(stages * BARRIER_BYTES, 8),
        "empty": arena.take(stages * BARRIER_BYTES, 8),
        "tile_full": arena.take(BARRIER_BYTES, 8),
        "tile_empty": arena.take(BARRIER_BYTES, 8),
        "queue_full": arena.take(QUEUE * BARRIER_BYTES, 8),
        "queue_empty": arena.take(QUEUE * BARRIER_BYTES, 8),
    }
    return at, arena.size


def _dkv_arena(decisions: Mapping[str, int], head_dim: int) -> tuple[dict[str, int], int]:
    rows = WARPGROUP_ROWS * decisions["dkv_warpgroups"]
    chunk = decisions["dkv_queries"]
    stages = decisions["dkv_stages"]
    buffers = decisions["dkv_buffers"]
    arena = _Arena()
    at = {
        "k": arena.take(buffers * rows * head_dim * 2, 1024),
        "v": arena.take(buffers * rows * head_dim * 2, 1024),
        "q": arena.take(stages * chunk * head_dim * 2, 1024),
        "do": arena.take(stages * chunk * head_dim * 2, 1024),
        "stats": arena.take(stages * chunk * 8, 128),
        "info": arena.take(stages * INFO_BYTES, 16),
        "tile": arena.take(buffers * TILE_INFO_BYTES, 16),
        "queue": arena.take(QUEUE * TILE_INFO_BYTES, 16),
        "full": arena.take(stages * BARRIER_BYTES, 8),
        "empty": arena.take(stages * BARRIER_BYTES, 8),
        "tile_full": arena.take(buffers * BARRIER_BYTES, 8),
        "tile_empty": arena.take(buffers * BARRIER_BYTES, 8),
        "queue_full": arena.take(QUEUE * BARRIER_BYTES, 8),
        "queue_empty": arena.take(QUEUE * BARRIER_BYTES, 8),
    }
    return at, arena.size


def one_pass_arena(decisions: Mapping[str, int], head_dim: int) -> tuple[dict[str, int], int]:
    """Byte offsets of the one pass in shared memory, and the bytes in all."""
    rows = WARPGROUP_ROWS * decisions["dkv_warpgroups"]
    chunk = ONE_PASS_QUERIES
    stages = decisions["dkv_stages"]
    arena = _Arena()
    at = {
        "k": arena.take(rows * head_dim * 2, 1024),
        "v": arena.take(rows * head_dim * 2, 1024),
        "q": arena.take(stages * chunk * head_dim * 2, 1024),
        "do": arena.take(stages * chunk * head_dim * 2, 1024),
        "ds": arena.take(2 * rows * chunk * 2, 1024),
        "sum": arena.take(chunk * head_dim * 4, 1024),
        "stats": arena.take(stages * chunk * 8, 128),
        "info": arena.take(stages * INFO_BYTES, 16),
        "tile": arena.take(TILE_INFO_BYTES, 16),
        "queue": arena.take(QUEUE * TILE_INFO_BYTES, 16),
        "full": arena.take(stages * BARRIER_BYTES, 8),
        "empty": arena.take(stages * BARRIER_BYTES, 8),
        "tile_full": arena.take(BARRIER_BYTES, 8),
        "tile_empty": arena.take(BARRIER_BYTES, 8),
        "queue_full": arena.take(QUEUE * BARRIER_BYTES, 8),
        "queue_empty": arena.take(QUEUE * BARRIER_BYTES, 8),
    }
    return at, arena.size
