"""Export compiled kernels, then run them in a process that has no compiler.

    python examples/export_and_serve.py

Where the kernels are served, torch, numpy and apache-tvm-ffi are all that is needed: the second process
refuses to import TVM and xgboost and has an empty PATH.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from spattn_tvm import AttentionProblem, BandLayout, export_bundle

SERVE = """
import sys, time
for name in ("tvm", "xgboost"):
    sys.modules[name] = None  # an import of it fails

import torch
from spattn_tvm import BandLayout, banded_attention, reference_attention

layout = BandLayout.spattention(4, 512)
q, k, v = (torch.randn(2, 4, 300, 32, requires_grad=True) for _ in range(3))
begin = time.perf_counter()
o = banded_attention(q, k, v, layout, impl="cpu")  # raises rather than falling back
o.sum().backward()
print(f"first call, forward and backward: {time.perf_counter() - begin:.2f} s")
torch.testing.assert_close(o, reference_attention(q, k, v, layout)[0], atol=1e-5, rtol=1e-5)
"""


def main() -> None:
    # A kernel serves every shape and layout of its direction, dtype and head dim.
    layout = BandLayout.spattention(4, 512)
    directions = ("forward", "backward")
    problems = [AttentionProblem(direction, "float32", 1, 4, 4, 512, 32, layout) for direction in directions]
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export_bundle(Path(scratch, "bundle"), problems, "cpu")
        for path in sorted(bundle.iterdir()):
            print(f"{path.stat().st_size / 1024:8.0f} KiB  {path.name}")
        # An empty cache folder: what runs comes from the bundle.
        served = {"SPATTN_BUNDLE": str(bundle), "SPATTN_CACHE_DIR": f"{scratch}/cache", "PATH": ""}
        subprocess.run([sys.executable, "-c", SERVE], env=os.environ | served, check=True)


if __name__ == "__main__":
    main()
