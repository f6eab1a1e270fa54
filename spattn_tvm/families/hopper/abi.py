"""The Hopper family, and what its functions take.

Its kernels mask and find a row's maximum before they scale, which only a positive factor allows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spattn_tvm.families.family import Abi, Family, Output, Scratch, Sizes

if TYPE_CHECKING:
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
    sources=("spattn_tvm.families.hopper", "spattn_tvm.domains"),
)
