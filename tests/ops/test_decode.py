"""``banded_attention_decode``: the function, its operator and the reference behind it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from decode_problems import DecodeProblem, random_decode
from torch import Tensor

from spattn_tvm import banded_attention_decode

DECODE = torch.ops.spattn_tvm.banded_attention_decode.default
SWEEP = int(os.environ.get("SPATTN_SWEEP", "60"))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def decode(problem: DecodeProblem, dtype: torch.dtype, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """(actual, expected) of o and lse."""
    q, k, v = problem.tensors(dtype)
    expected = problem.truth(q, k, v)
    k_cache, v_cache, places = problem.cached(k, v)
    found = banded_attention_decode(q, k_cache, v_cache, problem.layout, return_lse=True, **places, **options)
    return dict(zip(("o", "lse"), zip(found, expected, strict=True), strict=True))


@pytest.mark.parametrize("part", range(2))
def test_the_reference_on_random_steps(part: int) -> None:
    for seed in range(part, SWEEP, 2):
        problem = random_decode(seed)
        for actual, expected in decode(problem, torch.float64).values():
            assert actual.dtype is torch.float64
            torch.testing.assert_close(actual, expected, msg=lambda text, p=problem: f"{p}\n{text}")
