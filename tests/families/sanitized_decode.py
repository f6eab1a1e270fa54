"""Small steps of decoding on the portable family, as a program for compute-sanitizer to watch.

``python sanitized_decode.py DTYPE HEAD_DIM`` fails if a result is wrong. Each form of a cache is read once as
it should be, with keys enough for several blocks, and once with numbers on the device that mean nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from decode_problems import FORMS, random_decode

from spattn_tvm import BandLayout, banded_attention_decode

LAYOUT = BandLayout.spattention(4, 700)


def run(dtype: torch.dtype, head_dim: int) -> None:
    """Two batch rows, grouped queries, padding, pages that are no power of two."""
    for seed, form in enumerate(FORMS):
        problem = replace(
            random_decode(seed, form=form),
            query_heads=4,
            kv_heads=2,
            queries=3,
            head_dim=head_dim,
            lengths=(700, 333),
            starts=(0, 100),
            layout=LAYOUT,
            page_size=48,
        )
        q, k, v = problem.tensors(dtype)
        k_cache, v_cache, places = problem.cached(k, v)
        # Moved rather than made on the GPU, so that next to no kernel but ours is watched.
        given = [tensor.cuda() for tensor in (q, k_cache, v_cache)]
        places = {name: value.to(torch.int32).cuda() for name, value in places.items()}
        results = banded_attention_decode(*given, LAYOUT, return_lse=True, impl="mma", **places)
        tolerance = 1e-5 if dtype is torch.float32 else 1e-2
        for name, result, value in zip(("o", "lse"), results, problem.truth(q, k, v), strict=True):
            error = ((result.cpu().double() - value).norm() / value.norm()).item()
            if not error < tolerance:
                raise SystemExit(f"{form}: {name} is wrong: relative error {error:.2e}")
        for wild in (-(2**31), -1, 2**30, 2**31 - 1):
            places = {name: torch.full_like(value, wild) for name, value in places.items()}
            banded_attention_decode(*given, LAYOUT, impl="mma", **places)
    torch.cuda.synchronize()


if __name__ == "__main__":
    run(getattr(torch, sys.argv[1]), int(sys.argv[2]))
