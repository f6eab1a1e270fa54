"""A TensorIR module becomes a library of machine code, in this process."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spattn_tvm.target import MachineTarget

from .cubin import read_cubins
from .errors import KernelUnavailableError
from .resources import read_ptxas
from .toolchain import find_compiler, find_nvcc, run_compiler

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

# What nvcc compiles wherever it works: where its host compiler is too new for it, or the disk is full, it
# does not, and a kernel that it refused may be right.
_SMALLEST_KERNEL = "__global__ void nothing() {}\n"


# TVM 0.27 has no visitor of TIRx in Python: this is a launch in a host function's text.
_LAUNCH = re.compile(
    r'call_ffi_kernel\("(\w+)".*?, (?:T\.int64\()?(\d+)\)?, '
    r'launch_params=\[[^\]]*"tirx\.use_dyn_shared_memory"\]'
)


# A kernel that waits for the one before it may be launched under it (programmatic dependent launch).
_WAITS = re.compile(r'griddepcontrol\("wait"')
_LAUNCH_UNDER_LAST = "tirx.use_programtic_dependent_launch"  # TVM's spelling

_CUDA_COMPILE_CALLBACK = "tvm_callback_cuda_compile"


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


def _pipeline() -> str:
    """The name of TVM's pipeline for TIRx, at whose end kernels that wait for the one before them are to be
    launched under it: TVM's runtime does so, and none of its passes asks for it.
    """
    import tvm
    from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

    @tvm.transform.module_pass(opt_level=0)
    def launch_under_last(module: Any, context: Any) -> Any:
        for variable, function in module.functions_items():
            if _WAITS.search(str(function)):
                tags = [_LAUNCH_UNDER_LAST, *function.attrs["tirx.kernel_launch_params"]]
                module.update_func(variable, function.with_attr("tirx.kernel_launch_params", tags))
        return module

    def make() -> tuple[Any, Any, Any]:
        lowering, of_host, of_device = get_tir_pipeline("tirx")
        return lowering, of_host, lambda: tvm.transform.Sequential([of_device(), launch_under_last])

    register_tir_pipeline("spattn_tvm", make)
    return "spattn_tvm"


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

            def run_nvcc(*options: str) -> subprocess.CompletedProcess[str]:
                # Relative paths, of its own files too: fatbinary takes a comma in one for a separator.
                return subprocess.run(
                    [nvcc, *options, *architecture, source.name, "-o", output.name],
                    cwd=folder,
                    env={**os.environ, "TMPDIR": "."},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    check=False,
                )

            done = run_nvcc(*_NVCC_OPTIONS)
            if done.returncode:
                said_last = done.stdout.strip()[-4000:]
                source.write_text(_SMALLEST_KERNEL, encoding="utf-8")
                if run_nvcc("--fatbin").returncode:
                    raise KernelUnavailableError(f"{nvcc} compiles nothing for {target.arch}:\n{said_last}")
                raise RuntimeError(f"nvcc for {target.arch} failed:\n{said_last}")
            said.append(done.stdout)
            return output.read_bytes()

    tvm_ffi.register_global_func(_CUDA_COMPILE_CALLBACK, compile_cuda, override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(_CUDA_COMPILE_CALLBACK, original, override=True)


def compile_module(module: Any, target: MachineTarget, path: Path) -> dict[str, Any]:
    """Compile a TensorIR module in this process and export it as a library.

    A full disk or a fault of LLVM may end the process: :func:`compile_kernel` calls this in a child. A CUDA
    target needs ``libcuda.so.1`` in the process, a driver's or a stub's.

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
    KernelUnavailableError
        When a compiler is missing or compiles nothing at all.
    RuntimeError
        When the kernel can't be compiled, or no machine code for the GPU came out.
    """
    import tvm

    compiler = find_compiler()
    tvm_target = target.tvm_target()
    scheduled = all(func.attrs and "s_tir" in func.attrs for _, func in module.functions_items())
    options: dict[str, Any] = {} if scheduled else {"tir_pipeline": _pipeline()}
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
            run_compiler(["-O2", "-fPIC", "-c", str(source), "-o", str(launch)])
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
