"""One small problem on a CUDA family, forward and backward, as a program for compute-sanitizer to watch.

``python sanitized_problem.py FAMILY DTYPE HEAD_DIM DETERMINISTIC`` fails if a result is wrong.
"""

from __future__ import annotations

import sys

import torch

from spattn_tvm import BandLayout, banded_attention, reference_attention

DOCUMENTS = (0, 131, 329)
SCALE = -0.3  # negative, for which some kernels change the queries first


def run(family: str, dtype: torch.dtype, head_dim: int, deterministic: bool) -> None:
    """Two documents of no round length, two query heads a key head, gradients of o and of lse."""
    layout = BandLayout.spattention(4)
    drawn = [torch.randn(1, heads, DOCUMENTS[-1], head_dim).to(dtype) for heads in (4, 2, 2)]
    upstream = torch.randn(1, 4, DOCUMENTS[-1], head_dim).to(dtype), torch.randn(1, 4, DOCUMENTS[-1])
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)

    # Moved rather than made on the GPU, so that next to no kernel but ours is watched.
    leaves = [tensor.cuda().requires_grad_() for tensor in drawn]
    outputs = banded_attention(
        *leaves,
        layout,
        scale=SCALE,
        cu_seqlens=cu_seqlens.cuda(),
        return_lse=True,
        deterministic=deterministic,
        impl=family,
    )
    gradients = torch.autograd.grad(outputs, leaves, [tensor.cuda() for tensor in upstream])
    results = [tensor.detach().cpu().double() for tensor in (*outputs, *gradients)]

    exact = [tensor.double().requires_grad_() for tensor in drawn]
    expected = reference_attention(*exact, layout, scale=SCALE, cu_seqlens=cu_seqlens)
    wanted = torch.autograd.grad(expected, exact, [tensor.double() for tensor in upstream])
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for name, result, value in zip(
        ("o", "lse", "dq", "dk", "dv"), results, (*expected, *wanted), strict=True
    ):
        error = ((result - value).norm() / value.norm()).item()
        if not error < tolerance:
            raise SystemExit(f"{name} is wrong: relative error {error:.2e}")


if __name__ == "__main__":
    run(sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True")
