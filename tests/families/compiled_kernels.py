"""GPU kernels, compiled for chips that needn't be here, and their machine code."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spattn_tvm.build.cubin import cubin_offsets
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.build.toolchain import compile_obstacle
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.target import MachineTarget


def require_nvcc(target: MachineTarget) -> None:
    """Skip the test where nothing can be compiled for a chip."""
    obstacle = compile_obstacle(target)
    if obstacle is not None or shutil.which("nvcc") is None:
        pytest.skip(obstacle or "nvcc is not installed")


def compiled(
    family: str, direction: str, head_dim: int, decisions: Mapping[str, int], target: MachineTarget
) -> tuple[Path, dict[str, Any]]:
    """A library in bfloat16, compiled here, and what each of its kernels takes of a multiprocessor."""
    require_nvcc(target)
    library = compile_kernel(KernelSpec(family, direction, "bfloat16", head_dim, decisions), target)
    return library, json.loads(library.with_suffix(".json").read_text())["resources"]["kernels"]


def machine_code(library: Path) -> str:
    """The text of a library's machine code; the test is skipped where nothing reads it."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    data = library.read_bytes()
    (start,) = cubin_offsets(data)
    cubin = library.with_suffix(".cubin")
    cubin.write_bytes(data[start:])
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
