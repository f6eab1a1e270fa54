"""What holds of every family whose forward splits keys over blocks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from length_problems import random_problem, truth
from torch import Tensor

from spattn_tvm import BandLayout, banded_attention
from spattn_tvm.choice import find_schedule
from spattn_tvm.dispatch import find_kernel
from spattn_tvm.families import find_space
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.store import ScheduleRecord, save_records
from spattn_tvm.target import MachineTarget


def check_features(family: str, short: AttentionProblem, target: MachineTarget) -> None:
    """They tell decisions apart that share out keys otherwise."""
    space = find_space(family, "forward")
    few = {**space.untuned(short.head_dim, short.dtype, target), "least_chunks": 8}
    assert all(math.isfinite(value) for value in space.features(few, short))
    narrow = dataclasses.replace(short, layout=BandLayout.sliding_window(short.query_heads, 256))
    assert space.features(few, narrow) != space.features({**few, "least_chunks": 1}, narrow)


def check_choice_beside_a_record(
    family: str, whole: str, short: AttentionProblem, target: MachineTarget, root: Path
) -> None:
    """A record of the family ``whole`` does not keep ``family`` from short calls; a time of its own may."""

    def record(name: str, latency_us: float) -> None:
        kernel = KernelSpec.untuned(name, short, target)
        save_records([ScheduleRecord(short, target.folder, kernel, latency_us)], root)

    record(whole, 130.0)
    choice = find_schedule(short, target, root=root)
    assert choice.kernel == KernelSpec.untuned(family, short, target)
    assert f"{family} is preferred to {whole}" in choice.reason
    more = dataclasses.replace(short, batch=9)
    assert find_schedule(more, target, root=root).kernel.family == whole
    # Measured beside it, the faster one serves.
    record(family, 150.0)
    assert find_schedule(short, target, root=root).kernel.family == whole


def check_random_problems(
    family: str, dtype: torch.dtype, head_dim: int, relative: float, problems: int
) -> None:
    """Against float64; the same bits twice."""
    for seed in range(problems):
        problem = random_problem(seed, (head_dim,))
        q, k, v, _, _ = problem.tensors(dtype, "cuda")
        given = problem.arguments("cuda")
        found = banded_attention(q, k, v, problem.layout, return_lse=True, impl=family, **given)
        again = banded_attention(q, k, v, problem.layout, return_lse=True, impl=family, **given)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True)), problem
        keyless, expected = ~problem.mask().any(-1), truth(problem, dtype=dtype)
        o, lse = (result.double().cpu() for result in found)
        assert torch.equal(lse == -torch.inf, keyless) and not o[keyless].any(), problem
        for result, exact in ((o, expected["o"]), (lse, expected["lse"])):
            error = (result - exact).masked_fill_(keyless[..., None] if result is o else keyless, 0.0).norm()
            size = exact.masked_fill(exact.isinf(), 0.0).norm()
            assert error <= relative * (size + 1), (float(error), float(size), problem)


def check_short_calls(family: str, whole: str, q: Tensor, k: Tensor, v: Tensor, layout: BandLayout) -> None:
    """They take ``family`` by themselves, agree with ``whole``, again and in CUDA graphs."""
    kernel = find_kernel("forward", q, layout.spec, kv_heads=k.shape[1], kv_length=k.shape[2])
    assert kernel.family == family
    expected = banded_attention(q, k, v, layout, impl=whole)
    torch.cuda.synchronize()
    found = [banded_attention(q, k, v, layout) for _ in range(5)]
    torch.testing.assert_close(found[0], expected, rtol=2e-2, atol=2e-3)
    assert all(torch.equal(found[0], other) for other in found)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        o = banded_attention(q, k, v, layout)
    for _ in range(3):
        o.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(o, found[0])
