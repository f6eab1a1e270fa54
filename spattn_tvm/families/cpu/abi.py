"""The CPU family, and what its functions take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spattn_tvm.families.family import Abi, Family, Output, Scratch, Sizes
from spattn_tvm.families.shares import scratch_of_shares

if TYPE_CHECKING:
    from spattn_tvm.target import MachineTarget

# With so many heads a thread, threads that take every so many-th head finish within about 15% of one another.
HEADS_PER_THREAD = 2


def splits_heads(batch_heads: Any, threads: Any) -> Any:
    """Whether the backward divides heads among threads (:mod:`.segments`); of numbers or expressions."""
    return (batch_heads < HEADS_PER_THREAD * threads) & (threads > 1)


def _dq_sum(n: Sizes) -> tuple[int, ...]:
    batch = n.batch if splits_heads(n.batch * n.query_heads, n.workers) else 0
    return batch, n.query_heads, n.queries, n.head_dim


FORWARD = Abi(
    inputs=("q", "k", "v", "bands", "cu_seqlens", "cu_seqlens_k", "key_ranges"),
    outputs=(
        Output("o", like="q"),
        Output("lse", shape=lambda n: (n.batch, n.query_heads, n.queries), dtype="float32"),
    ),
)

BACKWARD = Abi(
    inputs=("q", "k", "v", "o", "lse", "do", "dlse", "bands", "cu_seqlens", "cu_seqlens_k", "key_ranges"),
    outputs=(
        Output("dq", like="q"),
        Output("dk", like="k", per_query_head=True),
        Output("dv", like="v", per_query_head=True),
    ),
    # A float32 kernel adds in dq itself and never touches this memory.
    scratch=(Scratch("dq_sum", shape=_dq_sum, dtype="float32"),),
)

# Parts that a step of decoding is divided into, for each worker, so that uneven ones fill the workers.
DECODE_PARTS = 8


def _partial_rows(n: Sizes) -> tuple[int, int]:
    """Parts, each of a batch row's keys of one key/value head, and the query rows that read that head."""
    return n.batch * n.kv_heads + DECODE_PARTS * n.workers, n.query_heads // n.kv_heads * n.queries


DECODE = Abi(
    inputs=("q", "k", "v", "bands", "cache_lengths", "cache_starts", "block_table", "ring"),
    outputs=FORWARD.outputs,
    scratch=scratch_of_shares(_partial_rows, 2),
)


def _runs_on(target: MachineTarget) -> bool:
    return target.kind == "cpu"


FAMILY = Family(
    name="cpu",
    reference="spattn_tvm.families.cpu.abi:FAMILY",
    runs_on=_runs_on,
    spaces={
        "forward": "spattn_tvm.families.cpu.space:FORWARD",
        "backward": "spattn_tvm.families.cpu.space:BACKWARD",
        "decode": "spattn_tvm.families.cpu.decode_space:DECODE",
    },
    abis={"forward": FORWARD, "backward": BACKWARD, "decode": DECODE},
    sources=("spattn_tvm.families.cpu", "spattn_tvm.domains"),
)
