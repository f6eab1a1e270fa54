"""From decisions to a kernel library, cached on disk.

A library's name carries a hash of everything that shapes it: family, direction, dtype, head dim, decisions,
instruction set, TVM version and the source text of the kernel and space modules. A library that is already
there is found without importing TVM.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from spattn_tvm.families import find_space
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


@cache
def source_hash(family: str) -> str:
    """Hash of the source text that kernels of a family are made from: its own folder and ``domains/``."""
    digest = hashlib.sha256(_OPENMP_LAUNCH_SOURCE.encode())
    package = Path(__file__).parents[1]
    for folder in (package / "families" / family, package / "domains"):
        for path in sorted(folder.glob("*.py")):
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
