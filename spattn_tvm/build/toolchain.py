"""What compiling needs of the machine: TVM, a C++ compiler, nvcc, a driver or its stub, a cache folder."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from spattn_tvm.target import MachineTarget

_INSTALL_TVM = "install it with `pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1`"


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


# Set in a process that was started to compile for CUDA.
_COMPILES_CUDA = "SPATTN_COMPILES_CUDA"


class CompilerMissingError(RuntimeError):
    """A kernel would have to be compiled, and TVM, a C++ compiler or nvcc is missing."""


def cache_dir() -> Path:
    """Where compiled kernels are kept: ``$SPATTN_CACHE_DIR``, else ``~/.cache/spattn_tvm``
    (``$XDG_CACHE_HOME``).
    """
    named = os.environ.get("SPATTN_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "spattn_tvm"


def tvm_version() -> str:
    """Version of the installed ``apache-tvm``, without importing it.

    Raises
    ------
    CompilerMissingError
        When it is not installed; says how to get it.
    """
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        reason = f"compiling a kernel needs TVM, which is not installed: {_INSTALL_TVM}"
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


def _run_compiler(arguments: list[str]) -> None:
    result = subprocess.run([find_compiler(), *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(
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
    folder.mkdir(parents=True, exist_ok=True)
    if not library.exists():
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as build:
            code, built = Path(build) / "stub.c", Path(build) / "libcuda.so.1"
            code.write_text(source, encoding="utf-8")
            _run_compiler(
                ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", str(code), "-o", str(built)]
            )
            os.replace(built, library)
    return folder


def compile_obstacle(target: MachineTarget) -> str | None:
    """What this machine lacks to compile for a target and how to get it, or None."""
    try:
        tvm_version()
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

    For CUDA it makes a driver library findable, a stub's where there is no driver, and lets
    :func:`compile_kernel` compile in that process. For a CPU it is this process's environment.
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
    environment[_COMPILES_CUDA] = "1"
    return environment


def leave_out_torch() -> None:
    """Keep ``import tvm`` from importing PyTorch in a process that only compiles: with CUDA that is 6 of its
    8 seconds.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
