"""The CPU's decode kernel against the definition, over forms of a cache and decisions of its space."""

from __future__ import annotations

import os
import random

import pytest
import torch
from decode_problems import DecodeProblem, random_decode

from spattn_tvm.bands import BandLayout
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.cache_forms import CachePlaces
from spattn_tvm.dispatch import Kernel
from spattn_tvm.families import find_space
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.launch import launch_decode
from spattn_tvm.ops.band_tables import find_cache_domain
from spattn_tvm.runtime import load_library
from spattn_tvm.target import detect_cpu, parse_target

SWEEP = int(os.environ.get("SPATTN_SWEEP", "60"))
SPACE = find_space("cpu", "decode")
# Of o and lse: half a unit of a value below 4, and the order of float32 sums.
ERROR = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def load(dtype: str, head_dim: int, **decisions: int) -> Kernel:
    target = detect_cpu()
    chosen = {**SPACE.untuned(head_dim, dtype, target), **decisions}
    spec = KernelSpec("cpu", "decode", dtype, head_dim, chosen)
    assert spec.rejection(target) is None
    path = compile_kernel(spec, target)
    return Kernel(load_library(path, "decode"), spec, path=path)


def check(kernel: Kernel, problem: DecodeProblem, scale: float | None = None) -> None:
    assert kernel.spec is not None
    dtype = getattr(torch, kernel.spec.dtype)
    q, k, v = problem.tensors(dtype)
    expected = problem.truth(q, k, v, scale)
    k, v, places = problem.cached(k, v)
    given = CachePlaces(**places)
    domain = find_cache_domain(problem.layout.spec, given, given.capacity(k))
    if problem.form == "ring":
        k, v = k[:, None], v[:, None]
    torch.use_deterministic_algorithms(True)  # outputs and scratch are NaN first
    try:
        found = launch_decode(kernel, q, k, v, domain, problem.head_dim**-0.5 if scale is None else scale)
    finally:
        torch.use_deterministic_algorithms(False)
    allowed = ERROR[dtype] * max(1.0, 4 * (scale or 0.0))
    for actual, exact in zip(found, expected, strict=True):
        assert torch.equal(actual.isinf(), exact.isinf()), problem
        error = (actual.double() - exact).masked_fill(exact.isinf(), 0.0).abs()
        assert not error.numel() or float(error.max()) <= allowed, (float(error.max()), problem)


@pytest.mark.parametrize("name", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64"])
def test_the_default_is_legal_everywhere(name: str) -> None:
    target = parse_target(name)
    for head_dim in (32, 40, 72, 256):
        decisions = SPACE.untuned(head_dim, "bfloat16", target)
        assert SPACE.rejection(decisions, head_dim, "bfloat16", target) is None


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_random_steps(threads: int) -> None:
    kernel, before = load("float32", 32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(threads, threads + SWEEP):
            check(kernel, random_decode(seed))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 40), ("float16", 32)])
def test_half_precision(dtype: str, head_dim: int) -> None:
    kernel = load(dtype, head_dim)
    for seed in range(1000, 1000 + SWEEP // 2):
        check(kernel, random_decode(seed, head_dims=(head_dim,)))


def test_random_decisions() -> None:
    rng, target = random.Random(), detect_cpu()
    for _ in range(2):
        head_dim, dtype = rng.choice((32, 40, 72, 256)), rng.choice(("float32", "bfloat16"))
        choices = SPACE.structures(head_dim, dtype)[""]
        while True:
            decisions = {name: rng.choice(values) for name, values in choices.items()}
            if SPACE.illegal(decisions, head_dim, dtype, target) is None:
                break
        kernel = load(dtype, head_dim, **decisions)
        for seed in rng.sample(range(10**6), 10):
            check(kernel, random_decode(seed, head_dims=(head_dim,), longest=900))


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_any_scale(scale: float) -> None:
    kernel = load("float32", 32)
    for seed in range(10):
        check(kernel, random_decode(seed), scale)


def test_many_query_heads_of_one_key_head_and_many_parts() -> None:
    """Heads' bands that lie apart, next to one another and within one another; parts without keys."""
    kernel, before = load("float32", 32), torch.get_num_threads()
    bands = [[(3, 5)], [(6, 40)], [], [(0, 90), (200, 210)], [(10, 12), (300, 399)], [(399, 399)]]
    layout = BandLayout.custom(bands, 500)
    torch.set_num_threads(16)
    try:
        for form in ("contiguous", "paged", "ring"):
            for lengths in ((500, 1, 0), (400,), (7, 250)):
                problem = DecodeProblem(form, 6, 1, 3, 32, lengths, None, layout, 16, False, 5)
                check(kernel, problem)
    finally:
        torch.set_num_threads(before)


def test_no_value_leads_out_of_the_cache() -> None:
    """Wrong values, which on a device nobody knows: the results are of no use, but there are some."""
    kernel, layout = load("float32", 32), BandLayout.spattention(4, 300)
    q, pages, rings = torch.randn(2, 4, 2, 32), torch.randn(9, 2, 16, 32), torch.randn(2, 1, 50, 32)
    lengths = torch.tensor([2**40, -7])
    wrong = torch.tensor([-5, 2**31 - 1, 9, -(2**31), 3] * 8, dtype=torch.int32).view(2, 20)
    for dtype in (torch.int64, torch.int32):
        starts = torch.tensor([-9, 2**31 - 1])
        given = lengths.clamp(-(2**31), 2**31 - 1).to(dtype), starts.to(dtype)
        for cache, table in ((pages, wrong), (torch.randn(2, 2, 50, 32), None)):
            domain = find_cache_domain(
                layout.spec, CachePlaces(*given, table), 320 if table is not None else 50
            )
            o, lse = launch_decode(kernel, q, cache, cache, domain, 0.2)
            assert o[0].isfinite().all() and (o[1] == 0).all() and (lse[1] == -torch.inf).all()
    for base, capacity in ((-9, 3), (2**31 - 70, 60), (2**31 - 5, 60), (45, 1000), (3, -4), (0, 0)):
        ring = torch.tensor([[base, capacity]] * 2, dtype=torch.int32)
        domain = find_cache_domain(layout.spec, CachePlaces(torch.tensor([290, 4]), ring=ring), 1000)
        o, lse = launch_decode(kernel, q, rings, rings, domain, 0.2)
        assert o.isfinite().all() and lse.isfinite().all(), (base, capacity)


def test_a_query_that_is_nan_stays_nan_alone() -> None:
    kernel, layout = load("float32", 32), BandLayout.spattention(4, 300)
    q, (k, v) = torch.randn(2, 4, 2, 32), torch.randn(2, 2, 2, 290, 32)
    q[0, 1, 1, 3] = torch.nan
    domain = find_cache_domain(layout.spec, CachePlaces(torch.tensor([290, 11])), 290)
    o, lse = launch_decode(kernel, q, k, v, domain, 0.2)
    is_nan = torch.zeros(2, 4, 2, dtype=torch.bool)
    is_nan[0, 1, 1] = True
    assert torch.equal(lse.isnan(), is_nan) and torch.equal(o.isnan().all(-1), is_nan)
    assert torch.equal(o.isnan().any(-1), is_nan)
