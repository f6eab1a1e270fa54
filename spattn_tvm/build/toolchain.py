"""What compiling needs of the machine: TVM, a C++ compiler, nvcc, a driver or its stub, a cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from spattn_tvm.extras import install_hint
from spattn_tvm.target import MachineTarget

from .cache_folder import (
    build_folder,
    cache_dir,
    make_private,
    make_way,
    require_trusted,
    stat_own_file,
    sweep,
    unwritable,
)
from .errors import CompilerMissingError, KernelUnavailableError

# The driver symbols that libtvm_runtime_cuda.so links. Without them the library does not load, and then TVM
# exports a CUDA kernel as source text only. 100 is CUDA_ERROR_NO_DEVICE.
_DRIVER_SYMBOLS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)


def tvm_versions() -> dict[str, str]:
    """Versions of the installed ``apache-tvm`` (``"tvm"``) and ``apache-tvm-ffi`` (``"tvm_ffi"``), without
    importing them.

    Raises
    ------
    CompilerMissingError
        When one is not installed; says how to get it.
    """
    packages = {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
    try:
        return {name: importlib.metadata.version(package) for name, package in packages.items()}
    except importlib.metadata.PackageNotFoundError:
        reason = f"compiling a kernel needs TVM, which is not installed: {install_hint('compile')}"
        raise CompilerMissingError(reason) from None


def find_compiler() -> str:
    """The C++ compiler that links kernel libraries: ``$CXX``, ``$CC``, else the first of g++, gcc, clang++,
    clang, c++ and cc.

    Raises
    ------
    CompilerMissingError
        When there is none; says how to get it.
    """
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang", "c++", "cc"]
    for name in names:
        found = shutil.which(name) if name else None
        if found:
            return found
    raise CompilerMissingError(
        "linking a kernel needs a C++ compiler, and none of g++, gcc, clang++, clang, c++ and cc is on PATH: "
        "install one (Debian, Ubuntu: `apt-get install g++`), name it in CXX, or run an exported bundle, "
        "which needs none"
    )


def run_compiler(arguments: list[str]) -> None:
    """Run the C++ compiler on source text of this package, which compiles wherever a compiler works."""
    result = subprocess.run([find_compiler(), *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise KernelUnavailableError(
            f"{find_compiler()} {' '.join(arguments)} failed:\n{result.stderr.strip()[-2000:]}"
        )


def find_nvcc() -> str | None:
    """The nvcc of ``$CUDA_HOME`` or ``$CUDA_PATH``, on PATH, or of ``/usr/local/cuda``; None without one."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(root) / "bin" / "nvcc") for root in roots if root]
    for candidate in (*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if found := shutil.which(candidate):
            return found
    return None


@cache
def _release_of(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace", check=False)
    found = re.search(r"V\d+[\d.]*", done.stdout)
    return found[0] if found else "unknown"


def nvcc_release() -> str | None:
    """The release of :func:`find_nvcc`, such as ``V13.0.88``; asked once in a process, which takes 6 ms."""
    nvcc = find_nvcc()
    try:
        return None if nvcc is None else _release_of(nvcc)
    except OSError:
        return "unknown"


def _toolkit_folders() -> list[str]:
    """Library folders of the CUDA toolkit whose ``nvcc`` would run, for ``libcudart.so.13``."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = find_nvcc()
    if nvcc:
        roots.append(Path(nvcc).resolve().parent.parent)
    roots += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-13*"), reverse=True)]
    roots += [Path(entry) / "nvidia" / "cu13" for entry in sys.path if entry]
    folders = [root / name for root in roots for name in ("lib64", "lib")]
    return [str(folder) for folder in folders if (folder / "libcudart.so.13").exists()]


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _driver_stub() -> Path:
    """Folder of a ``libcuda.so.1`` that lets TVM compile for CUDA where there is no driver; every call
    fails.
    """
    source = "".join(f"int {name}(void) {{ return 100; }}\n" for name in _DRIVER_SYMBOLS)
    source = f'#ifdef __cplusplus\nextern "C" {{\n#endif\n{source}#ifdef __cplusplus\n}}\n#endif\n'
    folder = cache_dir() / f"cuda-stub-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    library = folder / "libcuda.so.1"
    require_trusted(folder.parent, folder)
    if stat_own_file(library) is None:
        make_private(folder)
        with build_folder(folder) as build:
            code, built = build / "stub.c", build / "libcuda.so.1"
            try:
                code.write_text(source, encoding="utf-8")
                run_compiler(
                    ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", str(code), "-o", str(built)]
                )
                os.chmod(built, 0o755)
                make_way(library)
                os.replace(built, library)
            except OSError as error:
                raise unwritable(folder, error) from error
        sweep(folder)
    return folder


def compile_obstacle(target: MachineTarget) -> str | None:
    """What this machine lacks to compile for a target and how to get it, or None."""
    try:
        tvm_versions()
        compiler = find_compiler()
    except RuntimeError as error:
        return str(error)
    if target.kind == "cpu":
        links_for = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=False)
        machine = links_for.stdout.strip()
        if machine.startswith("aarch64") != (target.arch == "aarch64"):
            return (
                f"{compiler} links for {machine or 'an unknown machine'}, not for {target.arch}: name a "
                "cross compiler in CXX, such as aarch64-linux-gnu-g++ (Debian, Ubuntu: g++-aarch64-linux-gnu)"
            )
    if target.kind == "cuda" and find_nvcc() is None and not _has_driver():
        return (
            "compiling for CUDA needs nvcc (CUDA toolkit 13) on PATH: install it, or run an exported bundle, "
            "which needs no compiler"
        )
    return None


def compile_environment(target: MachineTarget) -> dict[str, str]:
    """Environment for a process that compiles for a target, which a search starts once for many kernels.

    For CUDA it makes a driver library findable, a stub's where there is no driver. For a CPU it is this
    process's environment.
    """
    environment = dict(os.environ)
    if target.kind != "cuda":
        return environment
    folders = _toolkit_folders()
    if not _has_driver():
        folders.insert(0, str(_driver_stub()))
    if find_nvcc() is not None:
        environment.setdefault("TVM_CUDA_COMPILE_MODE", "nvcc")
    folders += [folder for folder in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(folders)
    return environment


_only_compiles = False


def compile_only_here() -> None:
    """Say that this process was started to compile and may end over it: kernels are compiled in it, not in a
    child, and ``import tvm`` leaves PyTorch out, which with CUDA is 6 of its 8 seconds.

    For CUDA it must have been started in :func:`compile_environment`.
    """
    global _only_compiles
    _only_compiles = True
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            import tvm  # noqa: F401
        finally:
            del sys.modules["torch"]


def compiles_only() -> bool:
    """Whether :func:`compile_only_here` was called in this process."""
    return _only_compiles
