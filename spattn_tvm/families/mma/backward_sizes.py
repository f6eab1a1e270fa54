"""Sizes of the portable backward: what each pass keeps in shared memory and registers, and what fits a chip.

Everything here is known before a kernel is built, and nothing imports TVM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spattn_tvm.target import is_before_hopper

from .blocks import BLOCK, element_bytes, lack_of_room

PAD = 16  # bytes behind a row in shared memory
INFO_BYTES = 16  # of a chunk: first row, its band's lo and hi, which band of which head
TILE_WORDS = 12  # what a tile's threads rarely look up: a multiple of 4, so that it is one of 16 bytes
KEPT_WORDS = 4  # the last of them, where each thread keeps those itself


def _align(value: int, to: int) -> int:
    return (value + to - 1) // to * to


@dataclass(frozen=True)
class Pass:
    """Sizes of one of the two passes; everything here is known before the kernel is built."""

    keys: bool  # whether the rows of a tile are keys
    head_dim: int
    element: int  # bytes
    warps: int  # along the rows
    split: int  # warps that share rows, each accumulating its part of the head dimension
    exchange: bool  # whether those share the scores too; without, each makes all of them
    rows: int  # of a warp
    strip: int  # columns that a warp computes at once
    chunk: int  # columns of a stage
    stages: int
    hold: bool  # row operands in registers
    heads: int  # whose tiles are interleaved
    blocks: int  # a multiprocessor should hold
    one_pass: bool
    vector: int  # floats of one atomic add

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.split

    @property
    def tile(self) -> int:
        return self.warps * self.rows

    @property
    def pitch(self) -> int:
        return self.head_dim * self.element + PAD

    @property
    def steps(self) -> int:
        """Products that a score takes along the head dimension."""
        return self.head_dim // BLOCK

    @property
    def row_blocks(self) -> int:
        return self.rows // 16

    @property
    def out_columns(self) -> int:
        """Head dimension that a warp accumulates, in steps of 16; the last's may reach beyond the end."""
        return _align(-(-self.head_dim // self.split), 16)

    @property
    def accumulators(self) -> int:
        return self.rows * self.out_columns // 32

    @property
    def scores(self) -> int:
        return self.rows * self.strip // 32

    @property
    def drifts(self) -> bool:
        """Whether warps wait only for what they need of each other; else the whole block meets."""
        return self.stages > 1

    @property
    def looks_up(self) -> bool:
        """Whether what a chunk's loads need of its tile is in shared memory, not in every thread's registers.

        The deterministic dK/dV pass at head dim 128 then spills nothing: 0.785 against 0.805 ms at
        (4, 16, 4096, 128) in bfloat16 on an H100. One pass took 0.726 against 0.711, two at head dim 64 0.432
        against 0.428.
        """
        return not self.one_pass and self.head_dim == 128 and self.element == 2

    @property
    def tile_words(self) -> int:
        return TILE_WORDS if self.looks_up else TILE_WORDS - KEPT_WORDS

    @property
    def exchange_bytes(self) -> int:
        """Of one of the two buffers of P or dS (one without drifting warps)."""
        return self.tile * self.exchange_pitch

    @property
    def exchange_pitch(self) -> int:
        return self.chunk * self.element + PAD

    @property
    def dq_warps(self) -> tuple[int, int]:
        """How the warps share a chunk's dQ in one pass: along queries, along the head dimension."""
        best = (1, 1)
        least = math.inf
        for along in range(1, self.chunk // 16 + 1):
            if self.chunk % (16 * along):
                continue
            across = min(self.warps * self.split // along, self.head_dim // 16)
            if across == 0:
                continue
            columns = _align(-(-self.head_dim // across), 16)
            rows = self.chunk // along
            # The slowest warp's products, and what it loads for them.
            work = rows * columns + 4 * (rows + columns)
            if work < least:
                best, least = (along, across), work
        return best

    @property
    def dq_keys(self) -> int:
        """Keys that dQ takes or leaves together."""
        return self.tile // 2 if self.tile % 128 == 0 else self.tile

    @property
    def dq_rows(self) -> int:
        return self.chunk // self.dq_warps[0]

    @property
    def dq_columns(self) -> int:
        return _align(-(-self.head_dim // self.dq_warps[1]), 16)

    @property
    def offsets(self) -> dict[str, int]:
        """Byte offsets in shared memory, and under ``"end"`` the size."""
        at = {"first": 0, "second": self.tile * self.pitch}
        end = 2 * self.tile * self.pitch
        for name in ("third", "fourth"):
            at[name] = end
            end += self.stages * self.chunk * self.pitch
        for name, is_used in (("p", self.exchange), ("ds", self.exchange or self.one_pass)):
            at[name] = end
            end += (2 if self.drifts else 1) * self.exchange_bytes if is_used else 0
        at["lse"] = end
        end += self.stages * self.chunk * 4 if self.keys else 0
        at["delta"] = end
        end += self.stages * self.chunk * 4 if self.keys else 0
        at["info"] = _align(end, 16)
        at["arrived"] = at["info"] + self.stages * INFO_BYTES
        at["left"] = at["arrived"] + 8
        at["tile"] = at["left"] + 8
        at["end"] = at["tile"] + 4 * self.tile_words
        return at

    @property
    def shared_bytes(self) -> int:
        # Columns beyond the head dimension are read, never used, and must lie inside the allocation.
        beyond = self.out_columns * self.split + self.dq_columns * self.dq_warps[1] - 2 * self.head_dim
        return self.offsets["end"] + beyond * self.element

    @property
    def registers(self) -> int:
        """Estimate of what a thread needs."""
        outputs = (2 if self.keys else 1) * self.accumulators
        scores = 2 * self.scores
        packed = self.scores * self.element // 4
        fragments = (8 * self.row_blocks * self.steps if self.hold else 4 * self.row_blocks) + 8
        if self.element == 4:
            fragments = 2 * fragments + 48  # high and low parts, and the own sums of products in flight
        dq = self.dq_rows * self.dq_columns // 32 if self.one_pass else 0
        return outputs + max(scores + packed, dq) + fragments + 26


def passes(decisions: Mapping[str, int], head_dim: int, dtype: str) -> tuple[Pass, ...]:
    """The passes that decisions name: that of dQ, where there is one, and that of dK and dV."""
    element = element_bytes(dtype)
    exchange = decisions["dkv_strips"] == 0
    one_pass = bool(decisions["one_pass"])
    dkv = Pass(
        keys=True,
        head_dim=head_dim,
        element=element,
        warps=decisions["dkv_warps"],
        split=decisions["dkv_split"],
        exchange=exchange,
        rows=decisions["dkv_rows"],
        strip=decisions["dkv_strip"],
        chunk=decisions["dkv_strip"] * (decisions["dkv_split"] if exchange else decisions["dkv_strips"]),
        stages=decisions["dkv_stages"],
        hold=bool(decisions["dkv_hold"]),
        heads=decisions["dkv_heads"],
        blocks=decisions["dkv_blocks"],
        one_pass=one_pass,
        vector=decisions["atomic_floats"] if one_pass else 1,
    )
    if one_pass:
        return (dkv,)
    dq = Pass(
        keys=False,
        head_dim=head_dim,
        element=element,
        warps=decisions["dq_warps"],
        split=1,
        exchange=False,
        rows=decisions["dq_rows"],
        strip=decisions["dq_strip"],
        chunk=decisions["dq_strip"] * decisions["dq_strips"],
        stages=decisions["dq_stages"],
        hold=bool(decisions["dq_hold"]),
        heads=decisions["dq_heads"],
        blocks=decisions["dq_blocks"],
        one_pass=False,
        vector=1,
    )
    return dq, dkv


def _pass_conflict(part: Pass, arch: str) -> str | None:
    if part.exchange and part.split == 1:
        return "a warp that shares its rows with none has nothing to exchange (dkv_strips=0)"
    if part.hold and part.element == 4:
        return "hold is for 2-byte types: float32 operands are split where they are used"
    if part.split * 16 > part.head_dim:
        return f"{part.split} warps for a head dim of {part.head_dim}"
    if part.threads > 512:
        return f"{part.threads} threads"
    return lack_of_room(part.shared_bytes, part.registers, part.threads, part.blocks, arch)


def conflict(decisions: Mapping[str, int], head_dim: int, dtype: str, arch: str) -> str | None:
    """Why a chip can't run the kernel with these decisions, or would spill registers; None if it can."""
    if decisions["one_pass"] and decisions["atomic_floats"] > 1 and is_before_hopper(arch):
        return f"atomic_floats={decisions['atomic_floats']} needs sm_90, not {arch}"
    for part in passes(decisions, head_dim, dtype):
        reason = _pass_conflict(part, arch)
        if reason is not None:
            return f"{'dK/dV' if part.keys else 'dQ'} pass: {reason}"
    return None
