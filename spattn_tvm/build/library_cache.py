"""From decisions to a kernel library, cached on disk.

A library's name carries a hash of everything that shapes it: family, direction, dtype, head dim, decisions,
instruction set, TVM version and the source text of the kernel and space modules. A library that is already
there is found without importing TVM.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from spattn_tvm.families import resolve_family
from spattn_tvm.families.family import Family
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.runtime import forbids_tvm
from spattn_tvm.target import MachineTarget

from .compile import _OPENMP_LAUNCH_SOURCE, compile_module
from .toolchain import (
    _COMPILES_CUDA,
    CompilerMissingError,
    cache_dir,
    compile_environment,
    compile_obstacle,
    leave_out_torch,
    tvm_version,
)

_REPORT_SUFFIX = ".resources"


def _source_files(module: str) -> list[Path]:
    """The text of a module, or of a package with all its modules; it is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        return sorted(path for root in spec.submodule_search_locations for path in Path(root).rglob("*.py"))
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ValueError(
            f"the source text of {module} is not found, and kernels that come from it not cached"
        )
    return [Path(spec.origin)]


@cache
def source_hash(family: Family) -> str:
    """Hash of the source text that kernels of a family are made from."""
    digest = hashlib.sha256(_OPENMP_LAUNCH_SOURCE.encode())
    for module in family.sources:
        for path in _source_files(module):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _identity(spec: KernelSpec, target: MachineTarget) -> dict[str, Any]:
    return {
        **spec.to_json(),
        "target": target.tvm_config(),
        "tvm": tvm_version(),
        "sources": source_hash(spec.source),
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


def _compile_in_subprocess(request: dict[str, Any]) -> dict[str, Any]:
    """Compile in a process of its own: for CUDA, so that the stub does not end up in the user's."""
    environment = compile_environment(MachineTarget(**request["target"]))
    # The package may be importable only through this process's sys.path.
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    result = subprocess.run(
        [sys.executable, "-m", "spattn_tvm.build.library_cache"],
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
        kernel = request["kernel"]
        raise RuntimeError(f"compiling {kernel['family']} {kernel['direction']} failed: {reason}\n{details}")
    report = Path(request["output"]).with_suffix(_REPORT_SUFFIX)
    resources = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    return resources


def _build(request: dict[str, Any]) -> dict[str, Any]:
    target = MachineTarget(**request["target"])
    resolve_family(request["family"])  # one from outside is not registered in this process yet
    module = KernelSpec.from_json(request["kernel"]).build(target)
    return compile_module(module, target, Path(request["output"]))


def _build_apart(request: dict[str, Any]) -> None:
    """What the compiling process does: whatever TVM prints, the resources reach the asking process in a
    file."""
    resources = _build(request)
    report = Path(request["output"]).with_suffix(_REPORT_SUFFIX)
    report.write_text(json.dumps(resources), encoding="utf-8")


def compile_kernel(spec: KernelSpec, target: MachineTarget) -> Path:
    """The library of a kernel, from the disk cache or compiled now.

    Several processes may ask for the same kernel at once: one compiles, the others wait for it.

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
    RuntimeError
        When compiling fails.
    """
    identity = _identity(spec, target)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = cache_dir() / "kernels"
    path = folder / f"{spec.name}-{target.arch}-{digest[:20]}.so"
    if _is_intact(path, identity):
        return path
    reason = spec.rejection(target)
    if reason is not None:
        raise ValueError(f"{spec} with {spec.decisions}: {reason}")
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
                "kernel": spec.to_json(),
                "family": spec.source.reference,
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
