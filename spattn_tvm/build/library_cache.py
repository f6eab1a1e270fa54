"""From decisions to a kernel library, cached on disk.

A library's name carries a hash of everything that shapes it: family, direction, dtype, head dim, decisions,
instruction set, the versions and settings of TVM and nvcc, and the source text of the kernel, its space and
what compiles them. A library that is already there is found without importing TVM; another is compiled in a
child process.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from spattn_tvm.families.family import Family
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.file_lock import LockedError, file_lock
from spattn_tvm.target import MachineTarget

from .cache_folder import (
    build_folder,
    kernels_dir,
    make_private,
    make_way,
    mark_used,
    require_trusted,
    stat_own_file,
    sweep,
    unwritable,
)
from .compile import compile_module
from .compile_process import build
from .compilers import TIMEOUT_S, compile_apart
from .errors import CompilerMissingError
from .kept_runtime import keep_runtime, kept_runtime
from .resources import are_resources, library_metadata
from .toolchain import compile_obstacle, compiles_only, nvcc_release, tvm_versions

# A kernel takes a second or two: who waits longer wants to know for what.
NOTICE_AFTER_S = 3.0
_BUILDS_BETWEEN_SWEEPS = 32

_logger = logging.getLogger("spattn_tvm")

# Settings that TVM and nvcc read while they compile.
_SETTINGS = {
    "cpu": re.compile(r"TVM_COMPILE_\w+"),
    "cuda": re.compile(r"TVM_COMPILE_\w+|TVM_CUDA_\w+|TVM_KERNEL_DEBUG|NVCC_\w+"),
}


def _source_files(module: str) -> list[Path]:
    """The text of a module, or of a package with all its modules; it is not imported."""
    spec = None if module == "__main__" else importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        return sorted(path for root in spec.submodule_search_locations for path in Path(root).rglob("*.py"))
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ValueError(
            f"the source text of {module} is not found, and kernels that come from it can't be compiled: a "
            "family stands in a module that another process can import"
        )
    return [Path(spec.origin)]


@cache
def source_hash(family: Family) -> str:
    """Hash of the source text that kernels of a family are made by: its own, and what calls the compilers
    with which options.
    """
    digest = hashlib.sha256()
    for module in (*family.sources, compile_module.__module__):
        for path in _source_files(module):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _identity(spec: KernelSpec, target: MachineTarget) -> dict[str, Any]:
    """All that shapes a library; None for a tool that is not here. The linker does not: LLVM and nvcc write
    the machine code.
    """
    settings = sorted(name for name in os.environ if _SETTINGS[target.kind].fullmatch(name))
    identity = {
        **spec.to_json(),
        "target": target.tvm_config(),
        **_tvm_versions(),
        "sources": source_hash(spec.source),
        "settings": {name: os.environ[name] for name in settings},
    }
    return identity if target.kind == "cpu" else {**identity, "nvcc": nvcc_release()}


def _tvm_versions() -> dict[str, str | None]:
    try:
        return {**tvm_versions()}
    except CompilerMissingError:
        return {"tvm": None, "tvm_ffi": None}


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _find(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a library is there, whole, this user's or root's own, and what `identity` says."""
    found = stat_own_file(path)
    if found is None or stat_own_file(path.with_suffix(".json")) is None:
        return False
    metadata = library_metadata(path)
    try:
        intact = (
            all(metadata.get(key) == value for key, value in identity.items())
            and are_resources(metadata.get("resources", {}))
            and metadata.get("bytes") == found.st_size
            and metadata.get("sha256") == _file_sha256(path)
        )
    except (OSError, RecursionError):
        return False
    if intact:
        mark_used(path, found)
    return intact


def _prepared_elsewhere(stem: str, identity: Mapping[str, Any], folder: Path) -> Path | None:
    """Without nvcc or TVM: the newest library that any release of it made from the same kernel.

    Without TVM it must have left its runtime library. The settings are the compilers', and tell nothing here.
    """
    alike = {key: value for key, value in identity.items() if value is not None and key != "settings"}
    needs_runtime = identity["tvm"] is None
    paths = [path for path in folder.glob(f"{glob.escape(stem)}-*.so") if stat_own_file(path) is not None]
    for path in sorted(paths, key=lambda path: os.lstat(path).st_mtime, reverse=True):
        if _find(path, alike) and not (needs_runtime and kept_runtime(path) is None):
            return path
    return None


# One lock for each library that a thread of this process compiles.
_turns: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()
_turns_lock = threading.Lock()
# Libraries that this process has asked for: it may yet load them.
_in_use: set[Path] = set()
_builds = itertools.count()


def _renew_locks() -> None:
    global _turns_lock
    _turns_lock = threading.Lock()
    _turns.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """One thread and one process compile a kernel, the others wait, and say so when it takes long."""

    def tell(holder: str) -> None:
        _logger.warning("waiting for %s, which compiles %s", holder, path.name)

    lock = path.with_suffix(".lock")
    with _turns_lock:
        turn = _turns.setdefault(path, threading.Lock())
    if not turn.acquire(timeout=NOTICE_AFTER_S):
        tell("another thread")
        turn.acquire()
    try:
        with contextlib.ExitStack() as stack:
            try:
                make_way(lock)
                waiting = file_lock(lock, timeout_s=TIMEOUT_S, on_wait=tell, on_wait_after_s=NOTICE_AFTER_S)
                stack.enter_context(waiting)
            except LockedError:
                # Whoever holds it hangs, or its machine is gone: two may compile it, the last rename stays.
                pass
            except OSError as error:
                raise unwritable(path.parent, error) from error
            yield
    finally:
        turn.release()


def _compile(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    return build(request) if compiles_only() else compile_apart(request, folder)


def compile_kernel(spec: KernelSpec, target: MachineTarget) -> Path:
    """The library of a kernel, from the disk cache or compiled now.

    Several processes and threads may ask for the same kernel at once: one compiles, the others wait for it.
    Different kernels are compiled side by side.

    Parameters
    ----------
    spec : KernelSpec
    target : MachineTarget

    Returns
    -------
    Path
        A shared library that exports a function named after the direction; its metadata, with the registers
        and spills of a CUDA kernel, are beside it with the suffix ``.json``.

    Raises
    ------
    ValueError
        When the space refuses the decisions.
    CompilerMissingError
        When TVM, a C++ compiler or nvcc is missing; says how to get it.
    KernelUnavailableError
        When this machine can't compile now (a full disk, a limit), or others may write to the cache.
    RuntimeError
        When the kernel can't be compiled.
    """
    identity = _identity(spec, target)
    folder = kernels_dir()
    require_trusted(folder.parent, folder)
    stem = f"{spec.name}-{target.arch}"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = folder / f"{stem}-{digest[:20]}.so"
    if _find(path, identity):
        _in_use.add(path)
        return path
    if None in identity.values():
        prepared = _prepared_elsewhere(stem, identity, folder)
        if prepared is not None:
            _in_use.add(prepared)
            return prepared
    reason = spec.rejection(target)
    if reason is not None:
        raise ValueError(f"{spec} with {spec.decisions}: {reason}")
    obstacle = compile_obstacle(target)
    if obstacle is not None:
        raise CompilerMissingError(obstacle)
    make_private(folder)
    require_trusted(folder.parent, folder)
    with _only_one(path):
        if not _find(path, identity):
            request = {
                "kernel": spec.to_json(),
                "family": spec.source.reference,
                "target": {"kind": target.kind, "arch": target.arch, "model": target.model},
            }
            _add(path, identity, request)
    _in_use.add(path)
    if next(_builds) % _BUILDS_BETWEEN_SWEEPS == 0:
        sweep(folder, _in_use)
    return path


def _add(path: Path, identity: dict[str, Any], request: dict[str, Any]) -> None:
    """Compile a library into the cache, and keep what runs it."""
    keep_runtime(identity["tvm"])
    with build_folder(path.parent) as folder:
        output = folder / path.name
        resources = _compile({**request, "output": str(output)}, folder)
        if resources:
            identity = {**identity, "resources": resources}
        try:
            metadata = {**identity, "sha256": _file_sha256(output), "bytes": output.stat().st_size}
            description = output.with_suffix(".json")
            description.write_text(json.dumps(metadata, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            # The library last: its presence with matching metadata is what makes the entry complete.
            for made, final in ((description, path.with_suffix(".json")), (output, path)):
                os.chmod(made, 0o644)
                make_way(final)
                os.replace(made, final)
        except OSError as error:
            raise unwritable(path.parent, error) from error
