"""The portable tensor-core family, and what its functions take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spattn_tvm.families.family import Abi, Family, Output, Scratch, Sizes

if TYPE_CHECKING:
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
        Scratch("partial_o", shape=lambda n: (*_part_rows(n), n.head_dim), dtype="float32"),
        Scratch("partial_sums", shape=lambda n: (*_part_rows(n), 4), dtype="float32"),
        Scratch("arrived", shape=lambda n: (_parts(n),), dtype="int32", kept=True),
    ),
    alignment=COPY_BYTES,
)


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
    sources=("spattn_tvm.families.mma", "spattn_tvm.domains"),
)
