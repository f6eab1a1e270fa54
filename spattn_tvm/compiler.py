"""From decisions to a kernel library, cached on disk.

A library's name carries a hash of everything that shapes it: family, direction, dtype, head dim, decisions,
instruction set, TVM version and the source text of the kernel and space modules. A library that is already
there is found without importing TVM.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .cubin import read_cubins
from .runtime import forbids_tvm
from .spaces import FAMILIES, find_space
from .target import MachineTarget

_INSTALL_TVM = "install it with `pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1`"

# TVM runs a parallel loop on a thread pool of its own. Two pools on the same cores starve each other: between
# PyTorch operators on 2 cores, a kernel took 24.2 ms in TVM's pool against 16.7 ms alone, and a matrix
# product's mean rose from 5.7 to 13.1 ms (TVM_THREAD_POOL_SPIN_COUNT at its default; 6.6 ms at 0, where a
# small call costs 17 us instead of 5). Through this entry the kernel runs in the OpenMP pool that PyTorch
# runs in: 16.7 and 5.7 ms, 5 us. The references are weak, so that the library loads where there is no OpenMP;
# the loader then leaves TVM's pool in place. It has no TVM barrier: no kernel here asks for one inside a
# parallel loop.
_OPENMP_LAUNCH_SOURCE = """
#ifdef __cplusplus
extern "C" {
#endif
#define WEAK __attribute__((weak))
typedef struct { void *sync_handle; int num_task; } group_env;
typedef int (*parallel_body)(int task, group_env *env, void *data);
typedef struct { parallel_body body; void *data; int failed; } parallel_region;
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) WEAK;
extern int omp_get_thread_num(void) WEAK;
extern int omp_get_num_threads(void) WEAK;
extern int omp_get_max_threads(void) WEAK;
extern void TVMFFIErrorSetRaisedFromCStr(const char *, const char *) WEAK;

static void run_task(void *argument) {
  parallel_region *region = (parallel_region *)argument;
  group_env env = {0, omp_get_num_threads()};
  if (region->body(omp_get_thread_num(), &env, region->data) != 0)
    __atomic_store_n(&region->failed, 1, __ATOMIC_RELAXED);
}

__attribute__((visibility("default")))
int spattn_openmp_launch(parallel_body body, void *data, int num_task) {
  parallel_region region = {body, data, 0};
  int threads = num_task > 0 ? num_task : omp_get_max_threads();
  if (threads == 1) {
    group_env env = {0, 1};
    return body(0, &env, data);
  }
  GOMP_parallel(run_task, &region, (unsigned)threads, 0);
  if (region.failed && TVMFFIErrorSetRaisedFromCStr)
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a kernel failed in a worker thread");
  return region.failed ? -1 : 0;
}
#ifdef __cplusplus
}
#endif
"""

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

_REPORT_SUFFIX = ".resources"

# Set in a process that was started to compile for CUDA.
_COMPILES_CUDA = "SPATTN_COMPILES_CUDA"

# As TVM's own call of nvcc, which throws away what ptxas says of registers, spills and serialized wgmma.
_NVCC_OPTIONS = (
    "--fatbin",
    "-O3",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--use_fast_math",
    "--ptxas-options=-v,--register-usage-level=10,--warn-on-local-memory-usage",
)
# TVM 0.27 has no visitor of TIRx in Python: this is a launch in a host function's text.
_LAUNCH = re.compile(
    r'call_ffi_kernel\("(\w+)".*?, (?:T\.int64\()?(\d+)\)?, '
    r'launch_params=\[[^\]]*"tirx\.use_dyn_shared_memory"\]'
)
_CUDA_COMPILE_CALLBACK = "tvm_callback_cuda_compile"
# Bytes of spilled registers in a kernel below which nobody need look: a few at the entry cost nothing.
SPILL_TOLERANCE_BYTES = 32


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


@cache
def source_hash(family: str) -> str:
    """Hash of the source text that kernels of a family are made from: ``kernels/`` and ``spaces/`` without
    other families' files.
    """
    others = tuple(name for name in FAMILIES if name != family)
    digest = hashlib.sha256(_OPENMP_LAUNCH_SOURCE.encode())
    package = Path(__file__).parent
    for folder in ("kernels", "spaces"):
        for path in sorted((package / folder).glob("*.py")):
            if path.stem not in others and not path.stem.startswith(tuple(f"{name}_" for name in others)):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _identity(
    family: str,
    direction: str,
    dtype: str,
    head_dim: int,
    decisions: Mapping[str, int],
    target: MachineTarget,
) -> dict[str, Any]:
    return {
        "family": family,
        "direction": direction,
        "dtype": dtype,
        "head_dim": head_dim,
        "decisions": {name: int(decisions[name]) for name in sorted(decisions)},
        "target": target.tvm_config(),
        "tvm": tvm_version(),
        "sources": source_hash(family),
    }


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_intact(path: Path, identity: dict[str, Any]) -> bool:
    try:
        metadata = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return (
            all(metadata.get(key) == value for key, value in identity.items())
            and _file_sha256(path) == metadata["sha256"]
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return False


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the operating system releases it when the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes may compile the same kernel, and the last rename wins
        yield
        return
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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


def read_ptxas(text: str) -> dict[str, Any]:
    """What ``ptxas -v`` says of each kernel.

    Parameters
    ----------
    text : str
        Its output.

    Returns
    -------
    dict
        ``"kernels"``: by name the registers a thread, the bytes of its stack frame, of spill stores and
        spill loads, and of static shared memory (what a launch asks for on top is not known to ptxas).
        ``"warnings"``: its warnings and remarks on performance, such as that wgmma is serialized.
    """
    kernels: dict[str, dict[str, int]] = {}
    warnings: list[str] = []
    kernel: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '([^']+)'", line):
            kernel = kernels.setdefault(found[1], {})
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", line):
            names = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
            # Functions that are called, not inlined, have a line of their own; the kernel's is the first.
            for name, value in zip(names, found.groups(), strict=True):
                kernel.setdefault(name, int(value))
        elif found := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel["shared_bytes"] = int(shared[1]) if shared else 0
        elif "Local memory used" in line:
            continue  # the line of the spills says it too
        elif re.search(r"ptxas (warning|error)|Potential Performance Loss", line):
            warnings.append(re.sub(r"^ptxas \w+\s*:\s*", "", line.strip()))
    return {"kernels": kernels, "warnings": list(dict.fromkeys(warnings))}


def spilled_bytes(resources: Mapping[str, Any] | None) -> int:
    """Bytes of spill stores and loads of all kernels in a library's ``"resources"``; 0 where unknown."""
    kernels = (resources or {}).get("kernels", {}).values()
    return sum(k.get("spill_store_bytes", 0) + k.get("spill_load_bytes", 0) for k in kernels)


def describe_resources(resources: Mapping[str, Any] | None) -> str:
    """Such as ``168 registers, 12 bytes spilled, 224 KiB shared``, a kernel after the other; "" where nothing
    is known.
    """
    parts = []
    for kernel in (resources or {}).get("kernels", {}).values():
        if "registers" not in kernel:
            continue
        spilled = kernel.get("spill_store_bytes", 0) + kernel.get("spill_load_bytes", 0)
        spills = f"{spilled} bytes spilled" if spilled else "no spills"
        shared = kernel.get("shared_bytes", 0) + kernel.get("dynamic_shared_bytes", 0)
        parts.append(
            f"{kernel['registers']} registers, {spills}"
            + (f", {shared / 1024:.0f} KiB shared" if shared else "")
        )
    return "; ".join([*parts, *(resources or {}).get("warnings", [])])


def library_metadata(path: Path) -> dict[str, Any]:
    """What is known of a compiled library: family, decisions, target, ``"resources"``; or nothing."""
    try:
        metadata = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _record_launches(found: dict[str, int]) -> Any:
    """A TVM pass instrument that notes how much dynamic shared memory each kernel is launched with, which
    ptxas can't know.
    """
    from tvm.ir.instrument import pass_instrument

    @pass_instrument
    class Recorder:
        def run_after_pass(self, module: Any, info: Any) -> None:
            if info.name != "tirx.SplitHostDevice":
                return
            for _, function in module.functions_items():
                if not function.attrs.get("tirx.kernel_launch_params"):  # a host function
                    found.update((kernel, int(size)) for kernel, size in _LAUNCH.findall(str(function)))

    return Recorder()


@contextlib.contextmanager
def _recorded_nvcc(target: MachineTarget, said: list[str]) -> Iterator[None]:
    """Let TVM compile CUDA through a call of nvcc that keeps what ptxas says."""
    import tvm_ffi

    nvcc = find_nvcc()
    original = tvm_ffi.get_global_func(_CUDA_COMPILE_CALLBACK, allow_missing=True)
    if target.kind != "cuda" or nvcc is None or original is None:
        yield
        return
    capability = target.arch.removeprefix("sm_")

    def compile_cuda(code: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="spattn_tvm-") as folder:
            source, output = Path(folder) / "kernel.cu", Path(folder) / "kernel.fatbin"
            source.write_text(code, encoding="utf-8")
            architecture = ["-gencode", f"arch=compute_{capability},code=sm_{capability}"]
            done = subprocess.run(
                [nvcc, *_NVCC_OPTIONS, *architecture, str(source), "-o", str(output)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"nvcc for {target.arch} failed:\n{done.stdout.strip()[-4000:]}")
            said.append(done.stdout)
            return output.read_bytes()

    tvm_ffi.register_global_func(_CUDA_COMPILE_CALLBACK, compile_cuda, override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(_CUDA_COMPILE_CALLBACK, original, override=True)


def compile_module(module: Any, target: MachineTarget, path: Path) -> dict[str, Any]:
    """Compile a TensorIR module in this process and export it as a library.

    A CUDA target needs ``libcuda.so.1`` in this process, a driver's or a stub's: :func:`compile_kernel` sees
    to that.

    Parameters
    ----------
    module : tvm.IRModule
        Functions of the s_tir dialect, or of plain TIRx.
    target : MachineTarget
    path : Path
        The library to write.

    Returns
    -------
    dict
        For a CUDA target as :func:`read_ptxas`, with each kernel's number of tensor-core instructions and
        dynamic shared memory in bytes; what ptxas says is missing where nvcc does. Empty for a CPU.

    Raises
    ------
    RuntimeError
        When there is no linker, or no machine code for the GPU came out.
    """
    import tvm

    compiler = find_compiler()
    tvm_target = target.tvm_target()
    scheduled = all(func.attrs and "s_tir" in func.attrs for _, func in module.functions_items())
    options: dict[str, Any] = {} if scheduled else {"tir_pipeline": "tirx"}
    said: list[str] = []
    launched: dict[str, int] = {}
    instruments = [_record_launches(launched)] if target.kind == "cuda" else []
    with (
        tempfile.TemporaryDirectory(prefix="spattn_tvm-") as folder,
        tvm_target,
        _recorded_nvcc(target, said),
        tvm.transform.PassContext(instruments=instruments),
    ):
        addons = []
        if target.kind == "cpu":
            source, launch = Path(folder) / "openmp_launch.c", Path(folder) / "openmp_launch.o"
            source.write_text(_OPENMP_LAUNCH_SOURCE, encoding="utf-8")
            _run_compiler(["-O2", "-fPIC", "-c", str(source), "-o", str(launch)])
            addons = [str(launch)]
        library = tvm.compile(module, target=tvm_target, **options)
        library.export_library(str(path), addons=addons, cc=compiler)
    if target.kind == "cpu":
        return {}
    cubins = read_cubins(path.read_bytes())
    if not cubins:
        path.unlink()
        raise RuntimeError(
            f"TVM produced no machine code for {target.arch}: its CUDA runtime did not load in this process "
            "(libcuda.so.1 and libcudart.so.13 must be findable)"
        )
    resources = read_ptxas("\n".join(said))
    for name, count in cubins[0].tensor_core_instructions.items():
        kernel = resources["kernels"].setdefault(name, {})
        kernel["tensor_core_instructions"] = count
        kernel["dynamic_shared_bytes"] = launched.get(name, 0)
    return resources


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


def _compile_in_subprocess(request: dict[str, Any]) -> dict[str, Any]:
    """Compile in a process of its own: for CUDA, so that the stub does not end up in the user's."""
    environment = compile_environment(MachineTarget(**request["target"]))
    # The package may be importable only through this process's sys.path.
    paths = [str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    result = subprocess.run(
        [sys.executable, "-m", "spattn_tvm.compiler"],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
        reason = lines[-1] if lines else f"the compiling process ended with status {result.returncode}"
        details = "\n".join(lines[-40:])
        raise RuntimeError(
            f"compiling {request['family']} {request['direction']} failed: {reason}\n{details}"
        )
    report = Path(request["output"]).with_suffix(_REPORT_SUFFIX)
    resources = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    return resources


def _build(request: dict[str, Any]) -> dict[str, Any]:
    target = MachineTarget(**request["target"])
    space = find_space(request["family"], request["direction"])
    module = space.build(request["decisions"], request["head_dim"], request["dtype"], target)
    return compile_module(module, target, Path(request["output"]))


def _build_apart(request: dict[str, Any]) -> None:
    """What the compiling process does: whatever TVM prints, the resources reach the asking process in a
    file."""
    resources = _build(request)
    report = Path(request["output"]).with_suffix(_REPORT_SUFFIX)
    report.write_text(json.dumps(resources), encoding="utf-8")


def compile_kernel(
    family: str,
    direction: str,
    dtype: str,
    head_dim: int,
    decisions: Mapping[str, int],
    target: MachineTarget,
) -> Path:
    """The library of a kernel, from the disk cache or compiled now.

    Several processes may ask for the same kernel at once: one compiles, the others wait for it.

    Parameters
    ----------
    family : str
        Kernel family, such as ``"cpu"``.
    direction : {"forward", "backward"}
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    head_dim : int
    decisions : mapping
        A value for each of the space's choices.
    target : MachineTarget

    Returns
    -------
    Path
        A shared library that exports `direction`; its metadata, with the registers and spills of a CUDA
        kernel, are beside it with the suffix ``.json``.

    Raises
    ------
    ValueError
        When the space has no such family, or refuses the decisions.
    CompilerMissingError
        When TVM, a C++ compiler or nvcc is missing; says how to get it.
    RuntimeError
        When compiling fails.
    """
    identity = _identity(family, direction, dtype, head_dim, decisions, target)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = cache_dir() / "kernels"
    path = folder / f"{family}-{direction}-{dtype}-d{head_dim}-{target.arch}-{digest[:20]}.so"
    if _is_intact(path, identity):
        return path
    reason = find_space(family, direction).rejection(decisions, head_dim, dtype, target)
    if reason is not None:
        raise ValueError(f"{family} {direction} with {dict(decisions)}: {reason}")
    obstacle = compile_obstacle(target)
    if obstacle is not None:
        raise CompilerMissingError(obstacle)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock")
        lock.touch()
    except OSError as error:
        raise RuntimeError(
            f"can't write compiled kernels to {folder} ({error}): set SPATTN_CACHE_DIR to a folder that this "
            "process may write to"
        ) from error
    with _file_lock(lock):
        if _is_intact(path, identity):
            return path
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as build:
            output = Path(build) / path.name
            request = {
                "family": family,
                "direction": direction,
                "dtype": dtype,
                "head_dim": head_dim,
                "decisions": identity["decisions"],
                "target": {"kind": target.kind, "arch": target.arch, "model": target.model},
                "output": str(output),
            }
            apart = target.kind == "cuda" and _COMPILES_CUDA not in os.environ
            if apart or forbids_tvm():
                resources = _compile_in_subprocess(request)
            else:
                resources = _build(request)
            if resources:
                identity = {**identity, "resources": resources}
            metadata = {**identity, "sha256": _file_sha256(output), "bytes": output.stat().st_size}
            description = output.with_suffix(".json")
            description.write_text(json.dumps(metadata, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            # The library last: its presence with matching metadata is what makes the entry complete.
            os.replace(description, path.with_suffix(".json"))
            os.replace(output, path)
    return path


if __name__ == "__main__":
    leave_out_torch()
    _build_apart(json.load(sys.stdin))
