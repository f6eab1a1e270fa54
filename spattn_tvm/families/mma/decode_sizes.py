"""Sizes of the portable decode: what a block keeps in shared memory and registers, and what fits a chip.

Everything here is known before a kernel is built, and nothing imports TVM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .abi import DECODE_BLOCKS
from .blocks import BLOCK, element_bytes, lack_of_room, row_pitch


class Words(NamedTuple):
    """Where a block's 32-bit words are, behind its tiles."""

    spans: int  # of 16 rows: begin and end, near and far
    begins: int  # of 32 ranges
    ends: int
    firsts: int  # tiles before each of them, and of all
    ticket: int
    tiles: int  # of each tile in a ring the first key, and where they end
    stats: int  # each warp's maximum and sum of 16 rows
    end: int


def words(decisions: Mapping[str, int]) -> Words:
    """The words of a block."""
    warps, tiles = decisions["warps"], decisions["warps"] * decisions["stages"]
    sizes = (64, 32, 32, 33, 1, 2 * tiles, warps * 2 * BLOCK)
    at = [0]
    for size in sizes:
        at.append(at[-1] + size)
    return Words(*at[:-1], end=(at[-1] + 3) // 4 * 4)


def warp_ring_bytes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> int:
    """Of the tiles of keys and of values that one warp is loading or reading."""
    row = row_pitch(head_dim, dtype) * element_bytes(dtype)
    return 2 * decisions["stages"] * decisions["key_rows"] * row


def shared_bytes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> int:
    """Shared memory of a block: its queries, a ring for each warp, its words."""
    queries = BLOCK * row_pitch(head_dim, dtype) * element_bytes(dtype)
    rings = decisions["warps"] * warp_ring_bytes(decisions, head_dim, dtype)
    return queries + rings + 4 * words(decisions).end


def flying_bytes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> int:
    """Bytes of keys and values that a multiprocessor has on their way while it computes."""
    tile = 2 * decisions["key_rows"] * head_dim * element_bytes(dtype)
    return decisions["blocks_per_multiprocessor"] * decisions["warps"] * (decisions["stages"] - 1) * tile


def registers_needed(decisions: Mapping[str, int], head_dim: int, dtype: str) -> int:
    """Registers of a thread: output, scores, the operands in flight, and 56 for the rest."""
    output, scores = head_dim // 2, decisions["key_rows"] // 2
    if dtype == "float32":
        # Weights are twice as many words as scores; queries and keys of one step, split.
        return output + 2 * scores + 32 + 60
    queries = head_dim // 4 if decisions["queries_in_registers"] else 4
    return output + scores + scores // 2 + queries + 8 + 56


def conflict(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> str | None:
    """Why the kernel can't be built with ``decisions`` for a chip of ``arch``; None if it can."""
    blocks, threads = decisions["blocks_per_multiprocessor"], 32 * decisions["warps"]
    needed = shared_bytes(decisions, head_dim, dtype), registers_needed(decisions, head_dim, dtype)
    reason = lack_of_room(*needed, threads, blocks, arch)
    if reason is not None:
        return reason
    if blocks * decisions["waves"] > DECODE_BLOCKS:
        return (
            f"{decisions['waves']} waves of {blocks} blocks a multiprocessor are more than the "
            f"{DECODE_BLOCKS} that there is scratch for"
        )
    if dtype == "float32" and decisions["queries_in_registers"]:
        return "queries_in_registers is for two-byte types: float32 queries and their rests are too many"
    return None
