"""The inputs of a benchmark, the same for every peer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spattn_tvm.problem import AttentionProblem


@dataclass
class Inputs:
    """Normal random q, k, v and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    @classmethod
    def random(cls, problem: AttentionProblem, device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = getattr(torch, problem.dtype)

        def normal(heads: int) -> Tensor:
            shape = (problem.batch, heads, problem.length, problem.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        return cls(
            normal(problem.query_heads),
            normal(problem.kv_heads),
            normal(problem.kv_heads),
            normal(problem.query_heads),
        )

    @cached_property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v that ask for gradients; one set for all peers."""
        q, k, v = (t.detach().requires_grad_(True) for t in (self.q, self.k, self.v))
        return q, k, v
