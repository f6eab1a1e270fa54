"""CUDA kernels under compute-sanitizer: addresses, shared-memory races, uninitialised reads.

racecheck doesn't see what ``wgmma`` and bulk copies read: two kernels, each with one barrier less before such
a read, gave it no hazard and us wrong numbers (compute-sanitizer 2025.3). That is for the numeric tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda_kernels import of_family

from spattn_tvm import BandLayout
from spattn_tvm.dispatch import find_kernel

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
TRAINING = Path(__file__).with_name("sanitized_problem.py")
DECODING = Path(__file__).with_name("sanitized_decode.py")
CASES = [
    of_family(family, dtype, head_dim, deterministic)
    for family, dtype, head_dim in (
        ("hopper", "bfloat16", 64),
        ("hopper", "float16", 128),
        ("mma", "float16", 64),
        ("mma", "bfloat16", 128),
        ("mma", "bfloat16", 256),
        ("mma", "float32", 64),
    )
    for deterministic in (True, False)
    if family == "mma" or deterministic  # the Hopper default is deterministic
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed"),
]


def watch(tool: str, program: Path, *arguments: str) -> None:
    """Fail unless the tool has nothing to say of a run of the program."""
    assert SANITIZER is not None
    # Allocations apart, so that an address beyond one is not inside another.
    paths = os.pathsep.join([str(program.parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1", PYTHONPATH=paths)
    done = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "7", sys.executable, str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = f"{done.stdout}\n{done.stderr}\nexit status {done.returncode}"
    assert re.search(r"SUMMARY: 0 (errors|hazards displayed)", said), said[-4000:]
    assert said.endswith("exit status 0"), said[-4000:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("family,dtype,head_dim,deterministic", CASES)
def test_a_sanitizer_finds_nothing(
    family: str, dtype: str, head_dim: int, deterministic: bool, tool: str
) -> None:
    # Compiled here, unwatched.
    q = torch.empty(1, 4, 8, head_dim, dtype=getattr(torch, dtype), device="cuda")
    for direction in ("forward", "backward"):
        find_kernel(direction, q, BandLayout.spattention(4).spec, family, deterministic, kv_heads=2)
    watch(tool, TRAINING, family, dtype, str(head_dim), str(deterministic))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("dtype,head_dim", [("bfloat16", 128), ("float16", 64), ("float32", 64)])
def test_a_sanitizer_finds_nothing_in_a_step_of_decoding(dtype: str, head_dim: int, tool: str) -> None:
    # Compiled here, unwatched.
    q = torch.empty(1, 4, 3, head_dim, dtype=getattr(torch, dtype), device="cuda")
    spec = BandLayout.spattention(4, 700).spec
    find_kernel("decode", q, spec, "mma", kv_heads=2, kv_length=1024)
    watch(tool, DECODING, dtype, str(head_dim))
