"""What this machine can run, which compilers and GPUs it has, what is missing and how to get it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .extras import install_hint
from .provenance import available_cpus, versions
from .runtime import THREAD_POOLS, find_cudart, named_runtime_folder
from .target import MachineTarget, detect_cpu, detect_cuda

TVM_VERSION = "0.27.0.post1"
# What TVM compiles with. From 0.1.15.post1 on, tvm.ir.save_json of an integer constant crashes the process.
FFI_VERSION = "0.1.14.post1"
# What compiled kernels were seen to run with.
FFI_VERSIONS = ("0.1.14.post1", "0.1.15.post2")
# TVM's runtime library for GPUs links the CUDA runtime of this major version.
CUDA_MAJOR = 13


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes
    ----------
    topic, text : str
        What was looked at and what was found.
    status : {"ok", "note", "missing"}
        ``note``: something optional is absent. ``missing``: attention can't run with kernels without it.
    remedy : str
        How to get it; empty when nothing is wrong.
    """

    topic: str
    text: str
    status: str = "ok"
    remedy: str = ""


def _version(package: str) -> str | None:
    return versions([package])[package]


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1 if "nvcc" in command[0] else 0].strip() if lines else command[0]


def _python() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")
    compiles = _version("apache-tvm")
    ffi = (FFI_VERSION,) if compiles else FFI_VERSIONS
    for package, known in (("torch", ()), ("apache-tvm-ffi", ffi)):
        found = _version(package)
        pinned = f"pip install {package}=={known[0]}" if known else f"pip install {package}"
        if found is None:
            yield Finding(package, "not installed", "missing", pinned)
        elif known and found not in known:
            yield Finding(package, f"{found}, made for {' and '.join(known)}", "note", pinned)
        else:
            yield Finding(package, found)
    if compiles is None:
        text = "not installed: only bundles and kernels in the cache run"
        yield Finding("apache-tvm", text, "note", install_hint("compile"))
    elif compiles != TVM_VERSION:
        text = f"{compiles}, made for {TVM_VERSION}"
        yield Finding("apache-tvm", text, "note", f"pip install apache-tvm=={TVM_VERSION}")
    else:
        yield Finding("apache-tvm", compiles)
    for name, distributions, lack, extra in (
        ("xgboost", ("xgboost-cpu", "xgboost"), "no search", "tune"),
        ("matplotlib", ("matplotlib",), "no plots", "plot"),
    ):
        version = next(filter(None, map(_version, distributions)), None)
        if version is None:
            yield Finding(name, f"not installed: {lack}", "note", install_hint(extra))
        else:
            yield Finding(name, version)


def _compilers(has_gpu: bool) -> Iterator[Finding]:
    from .build.toolchain import find_compiler, find_nvcc, nvcc_release

    try:
        compiler = find_compiler()
        yield Finding("C++ compiler", f"{_first_line([compiler, '--version'])} ({compiler})")
    except RuntimeError as error:
        text, _, remedy = str(error).partition(": ")
        yield Finding("C++ compiler", text, "missing" if _version("apache-tvm") else "note", remedy)
    nvcc = find_nvcc()
    if nvcc is not None:
        text = f"{_first_line([nvcc, '--version'])} ({nvcc})"
        if (nvcc_release() or "").startswith(f"V{CUDA_MAJOR}."):
            yield Finding("nvcc", text)
        else:
            yield Finding("nvcc", text, "note", f"CUDA kernels are made for the CUDA toolkit {CUDA_MAJOR}")
    elif has_gpu:
        yield Finding("nvcc", "not found", "note", "compiles CUDA kernels; install the CUDA toolkit 13")
    else:
        yield Finding("nvcc", "not found; only needed to compile for CUDA")


def _cpu() -> Iterator[Finding]:
    try:
        target = detect_cpu()
    except ValueError as error:
        yield Finding("CPU", str(error), "missing", "use impl='reference'")
        return
    threads = "?"
    if importlib.util.find_spec("torch") is not None:
        import torch

        threads = str(torch.get_num_threads())
    size = f"{available_cpus()} cores, {threads} PyTorch threads"
    yield Finding("CPU", f"{target.arch}, {target.model}, {size}")


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver serves; None where it does not tell."""
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _cuda() -> Finding:
    """Whether the libraries of CUDA that kernels on a GPU need are there."""
    driver, runtime = _driver_cuda(), find_cudart()
    if driver is not None and driver[0] < CUDA_MAJOR:
        text = f"the driver serves CUDA up to {driver[0]}.{driver[1]}, kernels on a GPU need {CUDA_MAJOR}"
        return Finding("CUDA", text, "missing", "install a driver of release 580 or newer")
    if runtime is None:
        text = f"libcudart.so.{CUDA_MAJOR} not found, which kernels on a GPU need"
        remedy = f"install PyTorch for CUDA {CUDA_MAJOR} (download.pytorch.org/whl/cu130), or the toolkit"
        return Finding("CUDA", text, "missing", remedy)
    serves = "" if driver is None else f", the driver serves CUDA up to {driver[0]}.{driver[1]}"
    return Finding("CUDA", f"runtime {runtime}{serves}")


def _gpus() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        return [
            Finding(
                "GPU", f"none (PyTorch {'with CUDA ' + built if built else 'without CUDA'}); CPU kernels only"
            )
        ]
    findings = [_cuda()]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )
        try:
            detect_cuda(index)
            findings.append(Finding(f"GPU {index}", text))
        except ValueError as error:
            findings.append(Finding(f"GPU {index}", text, "note", str(error)))
    return findings


def _targets() -> list[MachineTarget]:
    targets = []
    with contextlib.suppress(ValueError):
        targets.append(detect_cpu())
    if importlib.util.find_spec("torch") is not None:
        import torch

        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            try:
                targets.append(detect_cuda(index))
            except ValueError:
                continue
    return list(dict.fromkeys(targets))


def _cache() -> Finding:
    from .build.cache_folder import CACHE_VARIABLE, LIMIT_VARIABLE, describe_cache, distrust, limit_mib
    from .build.errors import KernelUnavailableError

    try:
        folder, count, size = describe_cache()
    except KernelUnavailableError as error:
        return Finding("kernel cache", str(error), "missing", f"set {CACHE_VARIABLE}")
    text = f"{folder}: {count} kernels, {size / 2**20:.1f} of {limit_mib()} MiB ({LIMIT_VARIABLE})"
    reason = distrust(folder) or distrust(folder / "kernels")
    if reason is not None:
        return Finding("kernel cache", text, "missing", reason)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return Finding("kernel cache", text, "note", f"can't be written to; another one: {CACHE_VARIABLE}")
    clear = f"; clear it: rm -r {shlex.quote(str(folder))}" if count else ""
    return Finding("kernel cache", f"{text}; another one: {CACHE_VARIABLE}{clear}")


def _kernels() -> Iterator[Finding]:
    from .store import load_records, schedules_root

    yield _cache()
    root = schedules_root()
    for target in _targets():
        records = load_records(target.folder)
        if records:
            yield Finding("schedules", f"{target.folder}: {len(records)} tuned problems")
        else:
            others = sorted(path.name for path in root.glob("*") if path.is_dir()) if root else []
            known = f"; shipped: {', '.join(others)}" if others else ""
            yield Finding(
                "schedules",
                f"{target.folder}: none, kernels run untuned{known}",
                "note",
                f"spattn tune --target {target.kind} --budget 10m",
            )


def _settings() -> Iterator[Finding]:
    """Variables of the environment that name nothing, and so do nothing or fail."""
    from .build.cache_folder import LIMIT_VARIABLE

    unset = "set another value, or unset it"
    try:
        named_runtime_folder()
    except RuntimeError as error:
        yield Finding("setting", str(error), "missing", unset)
    schedules = os.environ.get("SPATTN_SCHEDULES")
    if schedules and not Path(schedules).expanduser().is_dir():
        text = f"SPATTN_SCHEDULES={schedules} is no folder: kernels run untuned until a search makes it"
        yield Finding("setting", text, "note", unset)
    limit = os.environ.get(LIMIT_VARIABLE)
    if limit and not limit.strip().isdecimal():
        yield Finding("setting", f"{LIMIT_VARIABLE}={limit} is no number of MiB: the default", "note", unset)
    pool = os.environ.get("SPATTN_THREAD_POOL")
    if pool and pool not in THREAD_POOLS:
        text = f"SPATTN_THREAD_POOL={pool} is not among {', '.join(THREAD_POOLS)}: {THREAD_POOLS[0]} is taken"
        yield Finding("setting", text, "note", unset)


def _bundle() -> Iterator[Finding]:
    named = os.environ.get("SPATTN_BUNDLE")
    if not named:
        return
    from .bundle import load_bundle

    bundle = load_bundle(named, register=False)
    made_for = ", ".join(target.folder for target in bundle.targets)
    yield Finding("bundle", f"{bundle.path}: {len(bundle.kernels)} kernels for {made_for}")


def _examined(topic: str, look: Callable[[], Iterable[Finding]], remedy: str) -> Iterator[Finding]:
    """What was found until something failed, which is then a finding of its own."""
    try:
        yield from look()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        yield Finding(topic, str(error), "missing", remedy)


def examine() -> list[Finding]:
    """Everything that `spattn doctor` prints, in order; nothing is compiled and TVM is not imported."""
    gpus = _gpus()
    return [
        *_python(),
        *_compilers(any(gpu.topic != "GPU" for gpu in gpus)),
        *_cpu(),
        *gpus,
        *_examined("settings", _settings, "see the packages above"),
        *_examined("kernels", _kernels, "see the packages above, SPATTN_CACHE_DIR and SPATTN_SCHEDULES"),
        *_examined(
            "bundle", _bundle, "every call needs it: make it with spattn export, or unset SPATTN_BUNDLE"
        ),
    ]
