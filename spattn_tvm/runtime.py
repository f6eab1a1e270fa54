"""Loading compiled kernels with TVM's small runtime library, without TVM's compiler.

A kernel library needs ``libtvm_runtime.so`` (3 MB) in the process's global symbol scope, and
``libtvm_runtime_cuda.so`` as well when it holds GPU code. Both sit in the ``apache-tvm`` wheel, in every
exported bundle and beside the kernels in the cache; the ``tvm`` package itself is never imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from .extras import install_hint
from .provenance import available_cpus

RUNTIME_LIBRARY = "libtvm_runtime.so"
THREAD_POOLS = ("openmp", "tvm")  # what SPATTN_THREAD_POOL may be, the default first
CUDA_RUNTIME_LIBRARY = "libtvm_runtime_cuda.so"
_CUDART = "libcudart.so.13"
OPENMP_LAUNCH = "spattn_openmp_launch"

_lock = threading.Lock()
_loaded: dict[str, Path] = {}


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may have held it


def installed_runtime_folder() -> Path | None:
    """``tvm/lib`` of an installed ``apache-tvm``, found without importing it."""
    spec = importlib.util.find_spec("tvm")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(root) / "lib"
        if (folder / RUNTIME_LIBRARY).is_file():
            return folder
    return None


def named_runtime_folder() -> Path | None:
    """The folder that ``$SPATTN_TVM_RUNTIME`` names; None where it is not set.

    Raises
    ------
    RuntimeError
        When TVM's runtime library is not there.
    """
    named = os.environ.get("SPATTN_TVM_RUNTIME")
    if not named:
        return None
    folder = Path(named)
    folder = folder.parent if folder.is_file() else folder
    if not (folder / RUNTIME_LIBRARY).is_file():
        raise RuntimeError(f"$SPATTN_TVM_RUNTIME is {named!r}, where there is no {RUNTIME_LIBRARY}")
    return folder


def runtime_folder(shipped: Path | None = None) -> Path:
    """The folder whose TVM runtime library this process uses.

    The first that has it wins: the one already loaded in this process, ``$SPATTN_TVM_RUNTIME`` (a folder, or
    the library's path), the installed ``apache-tvm``, `shipped`: the folder of a bundle, or of the kernel
    cache. The installed one comes before that because a second copy in one process breaks a later
    ``import tvm``.

    Raises
    ------
    RuntimeError
        When there is none; says how to get it.
    """
    if RUNTIME_LIBRARY in _loaded:
        return _loaded[RUNTIME_LIBRARY].parent
    tried = []
    # An imported tvm has loaded its own copy already.
    named = None if "tvm" in sys.modules else named_runtime_folder()
    if named is not None:
        return named
    installed = installed_runtime_folder()
    if installed is not None:
        return installed
    tried.append("no package 'tvm' is installed")
    if shipped is not None:
        if (shipped / RUNTIME_LIBRARY).is_file():
            return shipped
        tried.append(f"{shipped} has none")
    raise RuntimeError(
        f"{RUNTIME_LIBRARY} not found ({'; '.join(tried)}): install TVM with "
        f"{install_hint('compile')}, or set SPATTN_TVM_RUNTIME to the folder that holds it"
    )


def _set_thread_defaults() -> None:
    """Settings that TVM reads when its thread pool starts; the user's own win."""
    # Without it TVM uses half of the cores on x86, and its pool can only be narrowed after its start.
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.setdefault("TVM_NUM_THREADS", str(available_cpus()))
    # TVM would pin the calling thread, which is PyTorch's, to its first cores.
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def _load_global(folder: Path, name: str) -> None:
    if name in _loaded:
        return
    path = (folder / name).resolve()
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeError(f"can't load {path}: {error}") from error
    _loaded[name] = path


def find_cudart() -> str | None:
    """Name or path of the ``libcudart.so.13`` that TVM's CUDA runtime links, which is then loaded; None where
    there is none. PyTorch may bring another major version.
    """
    installed = (
        path
        for root in sys.path
        for path in glob.glob(os.path.join(glob.escape(root), "nvidia", "*", "lib", _CUDART))
    )
    for path in (_CUDART, *installed):
        with contextlib.suppress(OSError):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return path
    return None


def load_runtime(*, cuda: bool = False, shipped: Path | None = None) -> Path:
    """Load TVM's runtime library into this process, once.

    Parameters
    ----------
    cuda : bool
        Load the CUDA part too.
    shipped : Path, optional
        Where to look when ``apache-tvm`` is not installed: the folder of a bundle, or of the kernel cache.

    Returns
    -------
    Path
        The folder it came from.

    Raises
    ------
    RuntimeError
        When a library is not found or can't be loaded.
    """
    with _lock:
        folder = runtime_folder(shipped)
        import tvm_ffi  # noqa: F401  (loads libtvm_ffi.so, which the runtime links)

        _set_thread_defaults()
        _load_global(folder, RUNTIME_LIBRARY)
        if cuda and CUDA_RUNTIME_LIBRARY not in _loaded:
            find_cudart()
            _load_global(folder, CUDA_RUNTIME_LIBRARY)
        return folder


@cache
def _openmp_is_loaded() -> bool:
    """Whether an OpenMP runtime is in the global scope; PyTorch puts its own there on Linux."""
    process = ctypes.CDLL(None)
    return hasattr(process, "GOMP_parallel") and hasattr(process, "omp_get_max_threads")


def _use_openmp_pool(path: str) -> bool:
    """Point a kernel library's parallel launch to the OpenMP pool that PyTorch uses; False when there is
    none.

    Two pools on the same cores starve each other: OpenMP's workers spin after each PyTorch operator while
    TVM's want to run. ``SPATTN_THREAD_POOL=tvm`` in the environment keeps TVM's.
    """
    if os.environ.get("SPATTN_THREAD_POOL") == THREAD_POOLS[1] or not _openmp_is_loaded():
        return False
    library = ctypes.CDLL(path)
    if not hasattr(library, OPENMP_LAUNCH):
        return False
    try:
        launch = ctypes.c_void_p.in_dll(library, "__TVMBackendParallelLaunch")
    except ValueError:
        return False
    launch.value = ctypes.cast(getattr(library, OPENMP_LAUNCH), ctypes.c_void_p).value
    return True


def load_library(
    path: str | os.PathLike[str], name: str, *, cuda: bool | None = None, shipped: Path | None = None
) -> Callable[..., Any]:
    """A function of a compiled kernel library.

    The caller vouches for the file: the system's loader kills the process on a library that was cut off. The
    disk cache and bundles compare its SHA-256 first.

    Parameters
    ----------
    path : path-like
        The library.
    name : str
        The function it exports: ``"forward"`` or ``"backward"``.
    cuda : bool, optional
        Whether it holds GPU code; by default whether PyTorch sees a CUDA device.
    shipped : Path, optional
        See :func:`load_runtime`.

    Returns
    -------
    callable
        Takes PyTorch tensors and numbers; launches on PyTorch's current stream. It stays valid for the life
        of the process.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    RuntimeError
        When it can't be loaded or exports no such function.
    """
    import torch  # puts OpenMP and libcudart in place before TVM's runtime asks for them
    import tvm_ffi

    resolved = Path(path).resolve()
    if not resolved.is_file():
        raise FileNotFoundError(f"no kernel library {resolved}")
    load_runtime(cuda=torch.cuda.is_available() if cuda is None else cuda, shipped=shipped)
    try:
        module = tvm_ffi.load_module(str(resolved))
    except Exception as error:
        raise RuntimeError(f"can't load the kernel library {resolved}: {error}") from error
    if not module.implements_function(name):
        raise RuntimeError(f"{resolved} exports no function {name!r}; it may be damaged: delete it")
    function = module.get_function(name)
    _use_openmp_pool(str(resolved))
    return function
