"""Kernels for GPUs that aren't here: what nvcc makes of them, read from the machine code itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("tvm")

from spattn_tvm import bundle, cli
from spattn_tvm.bands import BandLayout
from spattn_tvm.build.cubin import read_cubins
from spattn_tvm.build.label import contradiction, label_library
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.build.resources import (
    SPILL_TOLERANCE_BYTES,
    describe_resources,
    library_metadata,
    read_ptxas,
    spilled_bytes,
)
from spattn_tvm.build.toolchain import find_nvcc
from spattn_tvm.bundle import MANIFEST, Bundle, load_bundle
from spattn_tvm.families import find_space, has_space
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget, parse_target, parse_targets

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
HEAD_DIM = 64


@dataclass(frozen=True)
class _Case:
    family: str
    direction: str
    dtype: str
    arch: str

    def __str__(self) -> str:
        return f"{self.family}-{self.direction}-{self.dtype}-{self.arch}"


CASES = [
    *(_Case("mma", "forward", "bfloat16", arch) for arch in ARCHITECTURES),
    _Case("mma", "backward", "bfloat16", "sm_80"),
    _Case("mma", "backward", "float16", "sm_120a"),
    _Case("mma", "decode", "bfloat16", "sm_90a"),
    _Case("hopper", "forward", "bfloat16", "sm_90a"),
    _Case("hopper", "backward", "float16", "sm_90a"),
]


def _compile(case: _Case) -> Path:
    target = parse_target(case.arch)
    space = find_space(case.family, case.direction)
    assert space.unsupported(HEAD_DIM, case.dtype, target) is None
    decisions = space.untuned(HEAD_DIM, case.dtype, target)
    return compile_kernel(KernelSpec(case.family, case.direction, case.dtype, HEAD_DIM, decisions), target)


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[_Case, Any]]:
    """Futures of all libraries, two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        cases = [case for case in CASES if has_space(case.family, case.direction)]
        yield {case: pool.submit(_compile, case) for case in cases}


def _disassembler() -> str | None:
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    beside = Path(find_nvcc() or "nvcc").resolve().parent
    return shutil.which("nvdisasm", path=os.pathsep.join(map(str, (*homes, beside)))) or shutil.which(
        "nvdisasm"
    )


@needs_nvcc
@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code_is_for_the_chip_uses_its_tensor_cores_and_does_not_spill(
    case: _Case, compiled: dict[_Case, Any], tmp_path: Path
) -> None:
    if case not in compiled:
        pytest.skip(f"no {case.family} {case.direction} here")
    path = compiled[case].result()
    data = path.read_bytes()
    (cubin,) = read_cubins(data)
    assert MachineTarget("cuda", case.arch).arch in (
        f"sm_{''.join(map(str, cubin.capability))}{a}" for a in ("", "a")
    )
    assert max(cubin.tensor_core_instructions.values()) >= 8
    resources = library_metadata(path)["resources"]
    assert set(resources["kernels"]) == set(cubin.instructions)
    for name, kernel in resources["kernels"].items():
        assert 0 < kernel["registers"] <= 255
        assert kernel["tensor_core_instructions"] == cubin.tensor_core_instructions[name]
        shared = kernel["shared_bytes"] + kernel["dynamic_shared_bytes"]
        assert shared <= 227 * 1024 and (shared > 1024 or not kernel["tensor_core_instructions"])
    assert spilled_bytes(resources) <= SPILL_TOLERANCE_BYTES, describe_resources(resources)
    assert not [text for text in resources["warnings"] if "serialized" in text]

    nvdisasm = _disassembler()
    if nvdisasm is not None:
        image = tmp_path / "kernel.cubin"
        image.write_bytes(data[data.index(b"\x7fELF", 4) :])
        listing = subprocess.run([nvdisasm, str(image)], check=True, capture_output=True, text=True).stdout
        mnemonic = "HGMMA" if case.family == "hopper" else "HMMA"
        named = len(re.findall(rf"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?{mnemonic}\b", listing, re.MULTILINE))
        assert named == sum(cubin.tensor_core_instructions.values())


@needs_nvcc
def test_one_bundle_for_many_gpus_gives_each_its_own_kernel(
    compiled: dict[_Case, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_space("mma", "forward"):
        pytest.skip("no mma forward here")
    for case, future in compiled.items():
        if (case.family, case.direction) == ("mma", "forward"):
            future.result()  # or the export would compile it again
    shape = f"1,4,256,{HEAD_DIM}"
    result = CliRunner().invoke(
        cli.app,
        ["export", str(tmp_path / "bundle"), "--target", "sm_80,sm_89,sm_120a", "--shape", shape]
        + ["--dtype", "bfloat16", "--direction", "forward"],
    )
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    assert len(re.findall(r"^cuda-sm_\w+-generic, forward-.* registers", result.output, re.MULTILINE)) == 3
    manifest = json.loads((tmp_path / "bundle" / MANIFEST).read_text())
    libraries = {entry["target"]: entry["library"] for entry in manifest["kernels"]}
    assert len(set(libraries.values())) == 3
    for target, library in libraries.items():
        (cubin,) = read_cubins((tmp_path / "bundle" / library).read_bytes())
        assert parse_target(target).arch.removesuffix("a") == f"sm_{''.join(map(str, cubin.capability))}"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="can't run on this machine: it needs a CUDA device of sm_80"):
            load_bundle(tmp_path / "bundle")

    monkeypatch.setattr(MachineTarget, "can_run_here", lambda self, index=None: None)
    loaded = load_bundle(tmp_path / "bundle", register=False)
    problem = AttentionProblem("forward", "bfloat16", 1, 4, 4, 256, HEAD_DIM, BandLayout.spattention(4))
    assert _served(loaded, problem, "a100") == "sm_80"
    assert _served(loaded, problem, "rtx4090") == "sm_89"
    assert _served(loaded, problem, "rtx5090") == "sm_120a"
    # It has no code of its own. sm_80's runs there, if the shared memory that it asks for is enough.
    kernel = next(entry.kernel for entry in loaded.kernels if entry.target.arch == "sm_80")
    refusal = kernel.rejection(parse_target("rtx3090"))
    assert _served(loaded, problem, "rtx3090") == ("sm_80" if refusal is None else None)
    assert _served(loaded, problem, "h200") is None
    assert _served(loaded, problem, "b200") is None
    assert _served(loaded, problem, "x86-64-v3") is None
    # A label that is as false as the manifest: the machine code tells.
    ours, others = (next(e for e in loaded.kernels if e.target.arch == arch) for arch in ("sm_80", "sm_89"))
    assert contradiction(ours.path.read_bytes(), ours.kernel, ours.target) is None
    label_library(others.path, ours.kernel, ours.target)
    found = contradiction(others.path.read_bytes(), ours.kernel, ours.target)
    assert found == "its machine code is for sm_89, not sm_80"


def _served(loaded: Bundle, problem: AttentionProblem, device: str) -> str | None:
    kernel = loaded.nearest(problem, parse_target(device))
    return None if kernel is None else kernel.target.arch


def test_code_that_asks_for_more_than_a_device_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = AttentionProblem("forward", "bfloat16", 1, 4, 4, 256, HEAD_DIM, BandLayout.spattention(4))
    a100, rtx3090 = parse_target("a100"), parse_target("rtx3090")
    spec = KernelSpec("mma", "forward", "bfloat16", HEAD_DIM, {})
    kernel = bundle.BundledKernel(problem, spec, "untuned", "", Path("k.so"), parse_target("sm_80"))
    loaded = Bundle(Path("bundle"), (kernel.target,), (kernel,), {}, {})

    def rejection(self: KernelSpec, target: MachineTarget) -> str | None:
        return "100 KiB" if target == rtx3090 else None

    monkeypatch.setattr(KernelSpec, "rejection", rejection)
    assert loaded.nearest(problem, a100) is kernel
    assert loaded.nearest(problem, rtx3090) is None


def test_which_code_runs_on_which_chip() -> None:
    chips = {name: parse_target(name) for name in ("a100", "rtx3090", "l40s", "h200", "b200", "rtx5090")}
    runs = {
        arch: [name for name, chip in chips.items() if parse_target(arch).runs_on(chip)]
        for arch in ARCHITECTURES
    }
    assert runs == {
        "sm_80": ["a100", "rtx3090", "l40s"],
        "sm_86": ["rtx3090", "l40s"],
        "sm_89": ["l40s"],
        "sm_90a": ["h200"],
        "sm_100a": ["b200"],
        "sm_120a": ["rtx5090"],
    }
    assert not parse_target("x86-64-v2").runs_on(chips["a100"])


def test_lists_of_targets() -> None:
    assert parse_targets("sm_80, h200,sm_80") == (parse_target("sm_80"), parse_target("nvidia/h200"))
    for text in ("", " , "):
        with pytest.raises(ValueError, match="at least one target"):
            parse_targets(text)
    with pytest.raises(ValueError, match="unknown target 'sm_33'"):
        parse_targets("sm_80,sm_33")


def test_ptxas_output_is_read_kernel_by_kernel() -> None:
    resources = read_ptxas(
        """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'b'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    8 bytes stack frame, 4 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 2048 bytes smem
ptxas info    : Compile time = 510.512 ms
ptxas warning : Local memory used for function 'a', size of stack frame: 8 bytes
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
    )
    names = ("registers", "stack_bytes", "spill_store_bytes", "spill_load_bytes", "shared_bytes")
    assert resources["kernels"] == {
        "a": dict(zip(names, (168, 8, 4, 40, 2048), strict=True)),
        "b": dict(zip(names, (32, 0, 0, 0, 0), strict=True)),
    }
    (warning,) = resources["warnings"]
    assert warning.endswith("wgmma.mma_async instructions are serialized in 'b'")
    assert spilled_bytes(resources) == 44 > SPILL_TOLERANCE_BYTES
    assert describe_resources(resources) == (
        f"168 registers, 44 bytes spilled, 2 KiB shared; 32 registers, no spills; {warning}"
    )
    assert spilled_bytes(None) == 0 and describe_resources({}) == ""
