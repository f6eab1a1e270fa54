"""Compile a whole model ahead of time with AOTInductor, then load it in a process of its own.

    python examples/aot_inductor.py

The package calls the operator spattn_tvm::banded_attention_forward by name, so that a process that loads it
registers the operators first.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from spattn_tvm import BandedAttention

LOAD = """
import sys, torch, spattn_tvm

spattn_tvm.register_operators()
folder = sys.argv[1]
model = torch._inductor.aoti_load_package(f"{folder}/model.pt2")
for x, expected in torch.load(f"{folder}/examples.pt"):
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    print(tuple(x.shape), "as the eager model")
"""


def main() -> None:
    model = BandedAttention(128, num_heads=4, context_length=256, rope_theta=1e4).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # Any length up to the context is served by one package.
        length = torch.export.Dim("length", min=2, max=256)
        x = torch.randn(2, 100, 128)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: length}})
        torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        print(f"package of {Path(folder, 'model.pt2').stat().st_size / 1024:.0f} KiB")
        inputs = [torch.randn(2, rows, 128) for rows in (100, 33, 256)]
        torch.save([(x, model(x)) for x in inputs], f"{folder}/examples.pt")
        subprocess.run([sys.executable, "-c", LOAD, folder], check=True)


if __name__ == "__main__":
    main()
