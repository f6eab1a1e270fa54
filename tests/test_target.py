"""Targets: detection from files, names and their round trip, and what code can run where."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from spattn_tvm import target as targets
from spattn_tvm.target import (
    MachineTarget,
    detect_cpu,
    detect_cuda,
    is_before_hopper,
    parse_target,
    registers_most,
    shared_bytes_most,
)

V2 = "fpu sse2 cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
V3 = V2 + " avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = V3 + " avx512f avx512bw avx512cd avx512dq avx512vl"


def cpuinfo(flags: str, vendor: str = "GenuineIntel", family: int = 6, model: int = 143) -> str:
    core = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nflags\t\t: {flags}\n"
    return f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}\n"


@pytest.mark.parametrize(
    ("flags", "arch"),
    [
        ("fpu sse2", "x86-64"),
        (V2, "x86-64-v2"),
        (V3, "x86-64-v3"),
        (V4, "x86-64-v4"),
        (V4.replace(" avx512vl", ""), "x86-64-v3"),
        (V4.replace(" sse4_2", ""), "x86-64"),
        (V3.replace(" fma", "") + " avx512f avx512bw avx512cd avx512dq avx512vl", "x86-64-v2"),
    ],
)
def test_instruction_set_level_needs_every_flag_of_its_own_and_the_lower_levels(
    flags: str, arch: str
) -> None:
    found = targets._parse_cpuinfo(cpuinfo(flags), "x86_64")
    assert found == MachineTarget("cpu", arch, "intel-6-143")


def test_model_names_vendor_family_and_model() -> None:
    found = targets._parse_cpuinfo(cpuinfo(V4, "AuthenticAMD", 25, 17), "x86_64")
    assert found.folder == "cpu-x86-64-v4-amd-25-17"
    arm = "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd0c\nFeatures : fp asimd\n\n"
    assert targets._parse_cpuinfo(arm, "aarch64").folder == "cpu-aarch64-arm-0x41-0xd0c"


def test_without_cpuinfo_the_architecture_alone_is_known() -> None:
    assert targets._parse_cpuinfo("", "x86_64") == MachineTarget("cpu", "x86-64", "generic")
    assert targets._parse_cpuinfo("", "arm64") == MachineTarget("cpu", "aarch64", "generic")
    with pytest.raises(ValueError, match="riscv64"):
        targets._parse_cpuinfo("", "riscv64")


def test_this_cpu_is_detected_and_its_code_runs_here() -> None:
    found = detect_cpu()
    assert found.kind == "cpu"
    assert found.can_run_here() is None
    assert parse_target("cpu") == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu-x86-64-v3", MachineTarget("cpu", "x86-64-v3")),
        ("x86-64", MachineTarget("cpu", "x86-64")),
        ("aarch64", MachineTarget("cpu", "aarch64")),
        ("sm_80", MachineTarget("cuda", "sm_80")),
        ("sm_90", MachineTarget("cuda", "sm_90a")),
        ("sm_90a", MachineTarget("cuda", "sm_90a")),
        ("nvidia/h200", MachineTarget("cuda", "sm_90a", "nvidia-h200")),
        ("H100", MachineTarget("cuda", "sm_90a", "nvidia-h100")),
        ("nvidia-a100", MachineTarget("cuda", "sm_80", "nvidia-a100")),
        ("rtx-4090", MachineTarget("cuda", "sm_89", "nvidia-rtx4090")),
        ("nvidia/h100-pcie", MachineTarget("cuda", "sm_90a", "nvidia-h100-pcie")),
        ("RTX4090-D", MachineTarget("cuda", "sm_89", "nvidia-rtx4090-d")),
        ("cpu-x86-64-v4-amd-25-17", MachineTarget("cpu", "x86-64-v4", "amd-25-17")),
        ("cpu-x86-64-amd-15-1", MachineTarget("cpu", "x86-64", "amd-15-1")),
        ("cuda-sm_90a-nvidia-h200", MachineTarget("cuda", "sm_90a", "nvidia-h200")),
    ],
)
def test_names_are_parsed_and_folders_round_trip(text: str, expected: MachineTarget) -> None:
    found = parse_target(text)
    assert found == expected
    assert parse_target(found.folder) == found


@pytest.mark.parametrize(
    "text", ["", "tpu", "sm_75", "cpu-", "cuda-sm_90a-", "cpu-x86-64-v9", "nvidia/k80", "../x"]
)
def test_an_unknown_name_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"known: cpu, cuda, .*cpu-x86-64-v4.*sm_90a.*nvidia/h200"):
        parse_target(text)


@pytest.mark.parametrize(
    ("kind", "arch", "model"),
    [
        ("tpu", "v5", "x"),
        ("cpu", "sm_80", "x"),
        ("cuda", "x86-64", "x"),
        ("cpu", "aarch64", "../up"),
        ("cpu", "aarch64", ""),
    ],
)
def test_a_target_of_unknown_parts_is_refused(kind: str, arch: str, model: str) -> None:
    with pytest.raises(ValueError, match=r"target|architecture"):
        MachineTarget(kind, arch, model)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100"),
        ("NVIDIA A10", "nvidia-a10"),
        ("NVIDIA A10G", "nvidia-a10g"),
        ("NVIDIA GeForce RTX 4090", "nvidia-rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "nvidia-geforce-rtx-4090-laptop-gpu"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "nvidia-h100-80gb-hbm3-mig-1g-10gb"),
        ("NVIDIA GH200 480GB", "nvidia-gh200"),
        ("NVIDIA A100-PCIE-40GB", "nvidia-a100"),
        ("NVIDIA H100 NVL", "nvidia-h100"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA H800 PCIe", "nvidia-h800-pcie"),
        ("NVIDIA GeForce RTX 4090 D", "nvidia-rtx4090-d"),
    ],
)
def test_cuda_models_drop_memory_sizes_and_what_makes_no_other_chip(name: str, model: str) -> None:
    assert targets._cuda_model(name) == model


@pytest.mark.parametrize(
    ("text", "multiprocessors"),
    [
        ("nvidia/h100", 132),
        ("cuda-sm_90a-nvidia-h100-pcie", 114),
        ("h20", 78),
        ("a100", 108),
        # Of the largest chip with the instruction set.
        ("cuda-sm_90a-nvidia-h100-80gb-hbm3-mig-1g-10gb", 132),
        ("sm_86", 84),
        # Of no such chip.
        ("cuda-sm_80-nvidia-h20", 108),
        ("cpu-x86-64-v3", 0),
    ],
)
def test_multiprocessors_are_the_models(text: str, multiprocessors: int) -> None:
    assert parse_target(text).multiprocessors == multiprocessors


@pytest.mark.gpu
def test_the_table_has_the_multiprocessors_of_this_gpu() -> None:
    found = detect_cuda(0)
    if found.folder != parse_target(found.model).folder:
        pytest.skip(f"{found.model} is not in the table")
    assert found.multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count


def test_code_runs_on_its_own_level_and_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "detect_cpu", lambda: MachineTarget("cpu", "x86-64-v3"))
    assert MachineTarget("cpu", "x86-64-v2").can_run_here() is None
    assert MachineTarget("cpu", "x86-64-v3", "other-1-1").can_run_here() is None
    assert "x86-64-v4" in (MachineTarget("cpu", "x86-64-v4").can_run_here() or "")
    assert "aarch64" in (MachineTarget("cpu", "aarch64").can_run_here() or "")


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_89", (8, 6), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 0), True),
        ("sm_100a", (10, 3), False),
    ],
)
def test_where_a_cubin_runs(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert targets._cubin_runs(arch, capability) is runs


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_is_refused_without_a_device() -> None:
    with pytest.raises(RuntimeError, match="no CUDA device 0"):
        detect_cuda(0)
    assert "no CUDA device" in (parse_target("h200").can_run_here() or "")


@pytest.mark.gpu
def test_the_gpu_is_detected_and_its_code_runs_here() -> None:
    found = detect_cuda(0)
    assert found.can_run_here(0) is None
    assert parse_target(found.folder) == found


def test_detection_imports_no_tvm() -> None:
    code = (
        "import sys; from spattn_tvm.target import detect_cpu, parse_target; detect_cpu().can_run_here();"
        "parse_target('h200').tvm_config(); assert not {'tvm', 'torch'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_llvm_knows_every_cpu_architecture_and_uses_wide_vectors() -> None:
    import tvm
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def double(a: T.Buffer((16,), "float32"), b: T.Buffer((16,), "float32")):
        for i in T.vectorized(16):
            b[i] = a[i] * T.float32(2)

    register = {"x86-64-v4": "zmm", "x86-64-v3": "ymm", "x86-64-v2": "xmm", "x86-64": "xmm", "aarch64": ".4s"}
    for arch, name in register.items():
        target = MachineTarget("cpu", arch).tvm_target()
        assembly = tvm.compile(double, target=target).mod.inspect_source("asm")
        assert name in assembly, arch
    assert dict(parse_target("h200").tvm_target().export())["arch"] == "sm_90a"


def test_what_the_blocks_of_a_multiprocessor_share() -> None:
    assert shared_bytes_most("sm_86") == 101376 and shared_bytes_most("sm_86", 2) == 50176
    assert registers_most(128, 2) == 255 and registers_most(128, 3) == 168 and registers_most(256, 2) == 128
    for arch in targets._CUDA_ARCHS:
        kibibytes = {"sm_80": 164, "sm_90a": 228, "sm_100a": 228}.get(arch, 100)
        for blocks in (1, 2, 3, 5):
            most = shared_bytes_most(arch, blocks)
            assert most % 128 == 0 and blocks * (most + 1024) <= 1024 * kibibytes
            assert blocks * (most + 128 + 1024) > 1024 * kibibytes
    assert [arch for arch in targets._CUDA_ARCHS if is_before_hopper(arch)] == ["sm_80", "sm_86", "sm_89"]
