"""What compiling needs of a machine, and what is said where it is missing."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spattn_tvm.build import toolchain
from spattn_tvm.build.errors import CompilerMissingError
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.build.toolchain import compile_obstacle
from spattn_tvm.families import find_space
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.target import MachineTarget, detect_cpu, parse_target


def kernel(target: MachineTarget | None = None) -> KernelSpec:
    decisions = find_space("cpu", "backward").untuned(32, "float32", target or detect_cpu())
    return KernelSpec("cpu", "backward", "float32", 32, decisions)


def test_a_missing_linker_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CompilerMissingError, match=r"apt-get install g\+\+"):
        compile_kernel(kernel(), detect_cpu())
    assert "C++ compiler" in (compile_obstacle(detect_cpu()) or "")


def test_a_missing_tvm_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(CompilerMissingError, match=r"pip install '\.\[compile\]'"):
        compile_kernel(kernel(), detect_cpu())


def test_nothing_obstructs_compiling_for_this_cpu() -> None:
    assert compile_obstacle(detect_cpu()) is None


@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc")
def test_a_process_started_for_cuda_compiles_there_and_a_cpu_process_is_left_as_it_is() -> None:
    environment = toolchain.compile_environment(parse_target("nvidia/h200"))
    code = "import tvm; assert tvm.runtime.enabled('cuda')"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert toolchain.compile_environment(detect_cpu()) == dict(os.environ)


def test_another_architecture_needs_a_cross_compiler() -> None:
    other = "x86-64" if detect_cpu().arch == "aarch64" else "aarch64"
    assert "cross compiler" in (compile_obstacle(MachineTarget("cpu", other)) or "")
    with pytest.raises(CompilerMissingError, match="name a cross compiler in CXX"):
        target = MachineTarget("cpu", other)
        compile_kernel(kernel(target), target)
