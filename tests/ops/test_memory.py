"""Memory after many lengths: what is kept for each must not keep the heap from shrinking.

Each loop runs in a process of its own, beside the same loop with ``scaled_dot_product_attention``. A block of
some hundred bytes for each length, between the large ones that calls free, cost 1 MiB a length here.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.alone

LOOP = """
import contextlib, gc, os, sys
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from spattn_tvm.bands import BandLayout
from spattn_tvm.nn import BandedAttention
from spattn_tvm.ops.attention import banded_attention

kind, which, device, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
dtype = torch.bfloat16 if device == "cuda" else torch.float32
torch.set_num_threads(1)
layout = BandLayout.spattention(8)
module = BandedAttention(512, 8, device=device, dtype=dtype)

def attend(q, k, v, cu_seqlens=None):
    if which == "ours":
        return banded_attention(q, k, v, layout, cu_seqlens=cu_seqlens)
    return scaled_dot_product_attention(q, k, v, is_causal=True)

def step(length):
    if kind == "module":
        x = torch.randn(1, length, 512, device=device, dtype=dtype)
        with torch.no_grad():
            if which == "ours":
                return module(x)
            projections = (module.q_proj, module.k_proj, module.v_proj)
            q, k, v = (p(x).unflatten(-1, (8, 64)).transpose(1, 2) for p in projections)
            return module.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))
    q, k, v = (
        torch.randn(1, 8, length, 64, device=device, dtype=dtype, requires_grad=kind == "training")
        for _ in range(3)
    )
    if kind == "packed":
        attend(q, k, v, torch.tensor([0, length // 3, length // 2, length], device=device))
    elif kind == "training":
        for _ in range(3):
            q = attend(q, k, v)
        q.sum().backward()
    else:
        attend(q, k, v)

def used():
    gc.collect()
    device_mib = 0.0
    if device == "cuda":
        torch.cuda.synchronize()
        device_mib = torch.cuda.memory_reserved() / 2**20
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, device_mib

# Of itself PyTorch takes cuDNN's attention on a Hopper GPU, which builds a plan for every length.
with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device == "cuda" else contextlib.nullcontext():
    for length in range(16, 21):
        step(length)
    before = used()
    for length in range(21, 21 + count):
        step(length)
    print(*(after - start for after, start in zip(used(), before)))
"""


def growth(kind: str, device: str, count: int) -> list[list[float]]:
    """MiB of the host and of the device that the lengths cost, with bands and with dense attention."""
    loops = [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, kind, which, device, str(count)], stdout=subprocess.PIPE
        )
        for which in ("ours", "sdpa")
    ]
    printed = [loop.communicate()[0].split() for loop in loops]
    assert [loop.returncode for loop in loops] == [0, 0]
    return [[float(mib) for mib in numbers] for numbers in printed]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["forward", "training", "module", "packed"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_many_lengths_need_no_more_memory_than_dense_attention(kind: str, device: str) -> None:
    count = 3000 if device == "cuda" else 300 if kind == "training" else 450
    for ours, dense, of in zip(*growth(kind, device, count), ("host", "device"), strict=True):
        assert ours < dense + 100, f"{of}: {ours:.0f} MiB, dense attention {dense:.0f} MiB"
