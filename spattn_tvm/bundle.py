"""Exported kernels: a folder that runs without a compiler.

A bundle holds kernel libraries, TVM's runtime library and ``manifest.json``, which says what each kernel is
for and on which target, and carries the size and SHA-256 of every other file. Loading verifies all of them
before any library is opened. The hashes tell a damaged or incomplete copy from a good one; they are no
signature, so load bundles only from where you would install a package from. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .environment import installed_versions
from .problem import AttentionProblem
from .runtime import CUDA_RUNTIME_LIBRARY, RUNTIME_LIBRARY, runtime_folder
from .spaces import find_space
from .store import find_schedule, is_deterministic, is_same_problem, problem_distance
from .target import MachineTarget, detect_cpu

FORMAT = 2
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_VERSIONED_PACKAGES = ("spattn-tvm", "apache-tvm", "apache-tvm-ffi", "torch")
_STATUSES = ("tuned", "nearest", "untuned")


@dataclass(frozen=True)
class BundledKernel:
    """One kernel of a bundle: what it was exported for, and what it is.

    Parameters
    ----------
    problem : AttentionProblem
        It also serves other shapes and layouts of this direction, dtype and head dim.
    family : str
    decisions : dict[str, int]
    status, reason : str
        As dispatch gave them at export.
    path : Path
        The library.
    target : MachineTarget
        What it was compiled for.
    """

    problem: AttentionProblem
    family: str
    decisions: dict[str, int]
    status: str
    reason: str
    path: Path
    target: MachineTarget


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Parameters
    ----------
    path : Path
        Its folder.
    targets : tuple of MachineTarget
        What its libraries were compiled for.
    kernels : tuple of BundledKernel
    versions : dict[str, str]
        Of the packages that made it.
    files : dict[str, dict]
        Size and SHA-256 of each file beside the manifest.
    """

    path: Path
    targets: tuple[MachineTarget, ...]
    kernels: tuple[BundledKernel, ...]
    versions: dict[str, str]
    files: dict[str, Any]

    def __hash__(self) -> int:
        return hash(self.path)

    def verify(self) -> None:
        """Compare every file with the manifest that was read; dispatch asks again before it opens a library.

        Raises
        ------
        ValueError
            When the folder has changed since.
        """
        _verify_files(self.path, self.files)

    def nearest(
        self,
        problem: AttentionProblem,
        target: MachineTarget,
        families: Sequence[str] | None = None,
        deterministic: bool = False,
    ) -> BundledKernel | None:
        """The kernel exported for the problem nearest to this one, among those for the target nearest to
        this device: its very model, its instruction set, or one that it runs as well.

        None if there is none for its direction, dtype and head dim, none whose results are bitwise
        reproducible where that is asked for, or the bundle is for other devices.
        """
        able = [
            kernel
            for kernel in self.kernels
            if _fits(kernel, target)
            and kernel.problem.direction == problem.direction
            and kernel.problem.dtype == problem.dtype
            and kernel.problem.head_dim == problem.head_dim
            and (families is None or kernel.family in families)
            and (not deterministic or is_deterministic(kernel))
        ]
        return min(
            able,
            key=lambda kernel: (
                _distance(kernel.target, target),
                not is_same_problem(problem, kernel.problem),
                problem_distance(problem, kernel.problem),
            ),
            default=None,
        )


def _distance(compiled: MachineTarget, device: MachineTarget) -> tuple[bool, bool]:
    return compiled.arch != device.arch, compiled.model != device.model


def _fits(kernel: BundledKernel, device: MachineTarget) -> bool:
    """Whether the machine code runs on a device, and its shared memory is there."""
    if not kernel.target.runs_on(device):
        return False
    if kernel.target.arch == device.arch or device.kind == "cpu":
        return True
    space, problem = find_space(kernel.family, kernel.problem.direction), kernel.problem
    return space.rejection(kernel.decisions, problem.head_dim, problem.dtype, device) is None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _holds_only_a_bundle(folder: Path) -> bool:
    try:
        files = _read_manifest(folder)["files"]
    except (OSError, ValueError):
        return False
    return {entry.name for entry in folder.iterdir()} <= {MANIFEST, *files}


def export_bundle(
    path: str | os.PathLike[str],
    problems: Iterable[AttentionProblem],
    targets: MachineTarget | Iterable[MachineTarget],
) -> Path:
    """Compile the kernels of some problems and write them as a bundle.

    Parameters
    ----------
    path : path-like
        Folder to write: a new one, an empty one, or an older bundle, which is replaced.
    problems : iterable of AttentionProblem
        Each gets the kernel that dispatch would choose on each target, and, where that one's gradients are
        not bitwise reproducible, the one for ``deterministic=True``. A kernel serves every shape and layout
        of its direction, dtype and head dim; a training run needs both directions.
    targets : MachineTarget or iterable of MachineTarget
        This machine's or any others that this machine can compile for. Where the bundle runs, a call takes
        the kernel of the target that is nearest to its device.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        Without problems or targets, for a problem that no kernel serves on one of them, for a CPU of another
        architecture, or when `path` is taken by something else.
    RuntimeError
        When a compiler or TVM's runtime library is missing.
    """
    targets = tuple(dict.fromkeys((targets,) if isinstance(targets, MachineTarget) else targets))
    if not targets:
        raise ValueError("a bundle needs at least one target, got none")
    for target in targets:
        if target.kind == "cpu" and (target.arch == "aarch64") != (detect_cpu().arch == "aarch64"):
            raise ValueError(
                f"a bundle for {target.folder} needs TVM's runtime library for {target.arch}; the one here "
                f"is for {detect_cpu().arch}: export it on such a machine"
            )
    problems = list(dict.fromkeys(problems))
    if not problems:
        raise ValueError("a bundle needs at least one problem, got none")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the bundle")
    if folder.is_dir() and any(folder.iterdir()) and not _holds_only_a_bundle(folder):
        raise ValueError(f"{folder} is not empty and holds more than a bundle: give a new folder")

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        build = Path(scratch) / "bundle"
        build.mkdir(mode=0o755)
        entries = [
            entry for target in targets for problem in problems for entry in _export(problem, target, build)
        ]
        names = [RUNTIME_LIBRARY] + (
            [CUDA_RUNTIME_LIBRARY] if any(target.kind == "cuda" for target in targets) else []
        )
        for name in names:
            shutil.copyfile(runtime_folder() / name, build / name)
        manifest = {
            "format": FORMAT,
            "targets": [asdict(target) for target in targets],
            "versions": installed_versions(_VERSIONED_PACKAGES),
            "kernels": entries,
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
                for file in sorted(build.iterdir())
            },
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (build / MANIFEST).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(build, folder)
    return folder


def _export(problem: AttentionProblem, target: MachineTarget, folder: Path) -> list[dict[str, Any]]:
    """Compile a problem's kernels into a folder; their entries in the manifest."""
    from .compiler import compile_kernel, describe_resources, library_metadata

    # The fastest comes first, so that it is the one of equally near kernels that a call takes.
    choices = [find_schedule(problem, target, deterministic=asked) for asked in (False, True)]
    entries = []
    for choice in choices if choices[0].decisions != choices[1].decisions else choices[:1]:
        library = compile_kernel(
            choice.family, problem.direction, problem.dtype, problem.head_dim, choice.decisions, target
        )
        if not (folder / library.name).exists():
            shutil.copyfile(library, folder / library.name)
        entries.append(
            {
                "problem": problem.to_json(),
                "target": target.folder,
                "family": choice.family,
                "decisions": dict(sorted(choice.decisions.items())),
                "status": choice.status,
                "reason": choice.reason,
                "library": library.name,
                "resources": describe_resources(library_metadata(library).get("resources")),
            }
        )
    return entries


def _refuse(folder: Path, reason: str) -> ValueError:
    return ValueError(f"{folder} is refused as a bundle: {reason}")


def _typed(folder: Path, what: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _refuse(folder, f"{what} must be {kind.__name__}, got {value!r}")
    return value


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(f"no bundle folder {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no bundle: it has no {MANIFEST}")
    try:
        manifest = _typed(folder, MANIFEST, json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError as error:
        raise _refuse(folder, f"{MANIFEST} is damaged ({error})") from error
    if manifest.get("format") != FORMAT:
        raise _refuse(folder, f"its format is {manifest.get('format')!r} and this version reads {FORMAT}")
    for name, kind in (("targets", list), ("versions", dict), ("kernels", list), ("files", dict)):
        _typed(folder, f"{name!r} of {MANIFEST}", manifest.get(name), kind)
    return manifest


def _verify_files(folder: Path, files: dict[str, Any]) -> None:
    for name, expected in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise _refuse(folder, f"{name!r} is no plain file name")
        _typed(folder, f"the entry of {name}", expected, dict)
        path = folder / name
        if path.is_symlink():
            raise _refuse(folder, f"{name} is a link")
        if not path.is_file():
            raise _refuse(folder, f"{name} is missing")
        size = path.stat().st_size
        if size != expected.get("bytes"):
            raise _refuse(
                folder, f"{name} has {size} bytes instead of {expected.get('bytes')}: cut off or altered"
            )
        if _sha256(path) != expected.get("sha256"):
            raise _refuse(folder, f"{name} is altered: its SHA-256 is not the manifest's")
    extra = sorted({entry.name for entry in folder.iterdir()} - set(files) - {MANIFEST})
    if extra:
        raise _refuse(folder, f"it holds files that {MANIFEST} does not name: {', '.join(extra)}")


def _read_kernel(
    folder: Path, index: int, entry: Any, files: dict[str, Any], targets: Sequence[MachineTarget]
) -> BundledKernel:
    _typed(folder, f"kernel {index}", entry, dict)
    values = {
        name: _typed(folder, f"{name!r} of kernel {index}", entry.get(name), kind)
        for name, kind in (
            ("family", str),
            ("decisions", dict),
            ("status", str),
            ("reason", str),
            ("library", str),
            ("target", str),
        )
    }
    for name, value in values["decisions"].items():
        _typed(folder, f"decision {name!r} of kernel {index}", value, int)
    if values["status"] not in _STATUSES:
        raise _refuse(folder, f"kernel {index} has status {values['status']!r}")
    library = values.pop("library")
    if library not in files:
        raise _refuse(folder, f"the library {library!r} of kernel {index} is not among its files")
    try:
        problem = AttentionProblem.from_json(entry.get("problem"))
    except (TypeError, ValueError) as error:
        raise _refuse(folder, f"the problem of kernel {index} is damaged ({error})") from error
    name = values.pop("target")
    target = next((target for target in targets if target.folder == name), None)
    if target is None:
        raise _refuse(folder, f"the target {name!r} of kernel {index} is not among its targets")
    return BundledKernel(problem, path=folder / library, target=target, **values)


def load_bundle(path: str | os.PathLike[str], *, register: bool = True) -> Bundle:
    """Verify a bundle and let calls use its kernels.

    Parameters
    ----------
    path : path-like
        The bundle's folder. Setting ``$SPATTN_BUNDLE`` to it does the same on the first call.
    register : bool
        Whether dispatch uses it from now on, before anything it would compile; else call
        ``dispatch.register_bundle`` with the result.

    Returns
    -------
    Bundle

    Raises
    ------
    FileNotFoundError
        When there is no bundle at `path`.
    ValueError
        When it is altered, cut off, incomplete, of another format, or holds files that its manifest does not
        name.
    RuntimeError
        When it is made for another machine; says for which.
    """
    folder = Path(path).resolve()
    manifest = _read_manifest(folder)
    files = manifest["files"]
    _verify_files(folder, files)
    try:
        targets = tuple(MachineTarget(**entry) for entry in manifest["targets"])
    except (TypeError, ValueError) as error:
        raise _refuse(folder, f"its targets are damaged ({error})") from error
    if RUNTIME_LIBRARY not in files:
        raise _refuse(folder, f"{RUNTIME_LIBRARY} is not among its files")
    obstacles = [target.can_run_here() for target in targets]
    if None not in obstacles:
        reasons = "; ".join(text for text in obstacles if text) or "it is made for no target"
        raise RuntimeError(f"the bundle {folder} can't run on this machine: {reasons}")
    kernels = tuple(
        _read_kernel(folder, index, entry, files, targets) for index, entry in enumerate(manifest["kernels"])
    )
    versions = {str(package): str(version) for package, version in manifest["versions"].items()}
    bundle = Bundle(folder, targets, kernels, versions, files)
    if register:
        from .dispatch import register_bundle

        register_bundle(bundle)
    return bundle
