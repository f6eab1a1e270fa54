"""What a block of the Hopper forward needs of its multiprocessor, and which decisions can't work."""

from __future__ import annotations

from collections.abc import Mapping

from spattn_tvm.target import registers_at_launch, shared_bytes_most

from .support import WARPGROUP_ROWS

PRODUCER_REGISTERS_LEAST = 24
SHARED_BYTES_MOST = shared_bytes_most("sm_90a") - 1024  # which aligning the arena may take

# What the decoding thread tells the others about a tile, as int32 words in shared memory.
TILE_WORDS = 16
LIVE, BATCH, HEAD, QUERY0, QUERY_END, KEY_BEGIN, NEAR_LO, NEAR_HI, FAR_LO, FAR_HI = range(10)
NEAR_TOP, NEAR_CHUNKS, FAR_TOP, FAR_CHUNKS, SHARE = range(10, 15)
# Barriers besides the rings': queries full and empty (two each), tile full and empty, values landed.
OTHER_BARRIERS = 7


def entry_registers(warpgroups: int) -> int:
    """Registers of each thread at launch: what the hardware can give all threads, in steps of 8."""
    return registers_at_launch(128 * warpgroups)


def producer_registers(consumer_warpgroups: int, consumer_registers: int) -> int:
    """What the loading warpgroup may keep so that the consumers can have theirs.

    The pool is what the block was launched with, not the whole register file: two consumers at 240 leave 24
    of 168, and asking for more hangs the block in ``setmaxnreg``.
    """
    entry = entry_registers(consumer_warpgroups + 1)
    return entry - consumer_warpgroups * (consumer_registers - entry)


def shared_bytes(decisions: Mapping[str, int], head_dim: int) -> int:
    """Shared memory of a block: two rings, the query tile, the tile's words and the barriers."""
    return Sizes(decisions, head_dim).shared_bytes


def least_stages(decisions: Mapping[str, int]) -> int:
    """Ring depth below which the overlapped loop can deadlock.

    Between the near and the far band a warpgroup lets pass up to ``(rows - 64) // key_rows + 1`` key chunks
    while it still holds one value chunk, and the loader issues each chunk's keys before its values.
    """
    if not decisions["overlap"]:
        return 2
    return WARPGROUP_ROWS * (decisions["consumer_warpgroups"] - 1) // decisions["key_rows"] + 2


def consumer_registers_needed(decisions: Mapping[str, int], head_dim: int) -> int:
    """Registers of a computing thread: output, scores, weights beside them, queries, and 32 for the rest.

    ptxas spilled nothing where these fit, and serialised every wgmma (C7512) where they did not: 160 of 160
    and 112 of 112 fitted, 176 of 160 and 128 of 112 did not.
    """
    keys = decisions["key_rows"]
    weights = keys // 4 if decisions["overlap"] else 0
    queries = head_dim // 4 if decisions["queries_in_registers"] else 0
    return head_dim // 2 + keys // 2 + weights + queries + 32


def conflict(decisions: Mapping[str, int], head_dim: int) -> str | None:
    """Why the kernel can't be built with ``decisions``, or would be wrong or hang; None if it can."""
    warpgroups, registers = decisions["consumer_warpgroups"], decisions["consumer_registers"]
    if shared_bytes(decisions, head_dim) > SHARED_BYTES_MOST:
        return f"{shared_bytes(decisions, head_dim)} bytes of shared memory, a block has {SHARED_BYTES_MOST}"
    if decisions["stages"] < least_stages(decisions):
        return f"stages={decisions['stages']} can deadlock, {least_stages(decisions)} are needed"
    if registers < entry_registers(warpgroups + 1):
        return f"consumer_registers={registers} is less than a thread has at launch"
    if producer_registers(warpgroups, registers) < PRODUCER_REGISTERS_LEAST:
        return f"consumer_registers={registers} leaves the loader {producer_registers(warpgroups, registers)}"
    if consumer_registers_needed(decisions, head_dim) > registers:
        needed = consumer_registers_needed(decisions, head_dim)
        return f"about {needed} registers are needed, consumer_registers={registers}"
    if decisions["overlap"] and decisions["weight_parts"] != 1:
        return "weight_parts is for kernels without overlap"
    if decisions["key_rows"] // 16 % decisions["weight_parts"]:
        return f"weight_parts={decisions['weight_parts']} does not divide {decisions['key_rows'] // 16} steps"
    if decisions["queries_in_registers"] and not decisions["overlap"] and decisions["key_rows"] == head_dim:
        # Seen at 64 and 64: wrong results, and in the SASS the same registers in both products.
        return "ptxas 13.0 keeps queries and weights of one size in the same registers"
    return None


class Sizes:
    """Sizes of a kernel with ``decisions``, and where what lies in its shared memory.

    Attributes
    ----------
    head_dim, keys, stages, consumers, rows, queries_slots : int
        Columns, keys of a chunk, chunks of each ring, computing warpgroups, queries of a tile, tiles of
        queries in shared memory.
    chunk : int
        Elements of a chunk.
    k_at, v_at, q_at, words_at, barriers_at, shared_bytes : int
        In bytes. 128-byte swizzled tiles need 1024-byte alignment, which every size here keeps.
    k_full, v_full, k_empty, v_empty, q_full, q_empty, tile_full, tile_empty, v_landed, barriers : int
        The number of the first barrier of each kind, and of all.
    """

    def __init__(self, decisions: Mapping[str, int], head_dim: int) -> None:
        self.head_dim = head_dim
        self.keys = decisions["key_rows"]
        self.stages = decisions["stages"]
        self.consumers = decisions["consumer_warpgroups"]
        self.rows = WARPGROUP_ROWS * self.consumers
        self.queries_slots = 1 if decisions["queries_in_registers"] else 2
        self.chunk = self.keys * head_dim
        self.k_at = 0
        self.v_at = self.k_at + self.stages * self.chunk * 2
        self.q_at = self.v_at + self.stages * self.chunk * 2
        self.words_at = self.q_at + self.queries_slots * self.rows * head_dim * 2
        self.barriers_at = self.words_at + 4 * TILE_WORDS
        self.k_full, self.v_full, self.k_empty, self.v_empty = (i * self.stages for i in range(4))
        first = 4 * self.stages
        self.q_full, self.q_empty, self.tile_full, self.tile_empty = (first + i for i in (0, 2, 4, 5))
        self.v_landed = first + 6
        self.barriers = first + OTHER_BARRIERS
        self.shared_bytes = self.barriers_at + 8 * self.barriers
