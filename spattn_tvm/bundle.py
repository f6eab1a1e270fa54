"""Exported kernels: a folder that runs without a compiler.

A bundle holds kernel libraries, TVM's runtime library and ``manifest.json``, which says what each kernel is
for and on which target, and carries the size and SHA-256 of every other file. Loading verifies all of them,
and that each library is the kernel that the manifest says it is, before any library is opened. The hashes
tell a damaged or incomplete copy from a good one; they are no signature, so load bundles only from where you
would install a package from. Nothing is unpickled.

A file is read once in a process; later its size, its times and its place on the disk tell whether it is still
the same.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build.label import contradiction
from .families import is_made_for
from .families.kernel import KernelSpec, is_far
from .file_reading import parse_json, read_regular_file, shown
from .problem import AttentionProblem, is_same_problem, problem_distance
from .runtime import RUNTIME_LIBRARY
from .target import MachineTarget

FORMAT = 5
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
VERSIONED_PACKAGES = ("spattn-tvm", "apache-tvm", "apache-tvm-ffi", "torch")
_STATUSES = ("tuned", "nearest", "untuned")
_LARGEST_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class BundledKernel:
    """One kernel of a bundle: what it was exported for, and what it is.

    Parameters
    ----------
    problem : AttentionProblem
        It also serves other shapes and layouts of this direction, dtype and head dim.
    kernel : KernelSpec
    status, reason : str
        As dispatch gave them at export.
    path : Path
        The library.
    target : MachineTarget
        What it was compiled for.
    """

    problem: AttentionProblem
    kernel: KernelSpec
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
        """Compare every file that may have changed with the manifest that was read; dispatch asks before it
        opens a library.

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
        this device: its very model, its instruction set, or one that it runs as well. A family made for such
        problems comes before others. A kernel for bands of another width, or another number of tiles, whose
        default is another serves only where there is no better (:func:`~spattn_tvm.families.kernel.is_far`).

        None if there is none for its direction, dtype and head dim, none whose results are bitwise
        reproducible where that is asked for, or the bundle is for other devices.
        """
        able = [
            entry
            for entry in self.kernels
            if _fits(entry, target)
            and entry.kernel.serves(problem)
            and (families is None or entry.kernel.family in families)
            and (not deterministic or entry.kernel.is_deterministic)
        ]
        return min(
            able,
            key=lambda entry: (
                _distance(entry.target, target),
                not is_made_for(entry.kernel.family, problem, target),
                not is_same_problem(problem, entry.problem),
                is_far(
                    entry.kernel.family,
                    problem,
                    entry.problem,
                    target,
                    deterministic,
                    measured=entry.status != "untuned",
                ),
                problem_distance(problem, entry.problem),
            ),
            default=None,
        )


def _distance(compiled: MachineTarget, device: MachineTarget) -> tuple[bool, bool]:
    return compiled.arch != device.arch, compiled.model != device.model


def _fits(entry: BundledKernel, device: MachineTarget) -> bool:
    """Whether the machine code runs on a device, and its shared memory is there."""
    if not entry.target.runs_on(device):
        return False
    if entry.target.arch == device.arch or device.kind == "cpu":
        return True
    return entry.kernel.rejection(device) is None


def _refuse(folder: Path, reason: str) -> ValueError:
    return ValueError(f"{folder} is refused as a bundle: {shown(reason, 1000)}")


def _typed(folder: Path, what: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _refuse(folder, f"{what} must be {kind.__name__}, got {value!r}")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)!r} stands in it twice")
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle's folder, its outermost values of the right types.

    Raises
    ------
    FileNotFoundError
        When there is none.
    ValueError
        When it is damaged, or something else than a plain file.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(f"no bundle folder {folder}")
    if path.is_symlink():
        raise _refuse(folder, f"{MANIFEST} is a link")
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{folder} is no bundle: it has no {MANIFEST}")
    try:
        text = read_regular_file(path, _LARGEST_MANIFEST_BYTES, follow_links=False)
        manifest = parse_json(text, object_pairs_hook=_unambiguous)
    except (OSError, ValueError) as error:
        raise _refuse(folder, f"{MANIFEST} is damaged ({shown(error)})") from error
    _typed(folder, MANIFEST, manifest, dict)
    if manifest.get("format") != FORMAT:
        raise _refuse(
            folder,
            f"its format is {manifest.get('format')!r} and this version reads {FORMAT}: export it again",
        )
    for name, kind in (("targets", list), ("versions", dict), ("kernels", list), ("files", dict)):
        _typed(folder, f"{name!r} of {MANIFEST}", manifest.get(name), kind)
    for name, expected in manifest["files"].items():
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise _refuse(folder, f"{name!r} is no plain file name")
        _typed(folder, f"the entry of {name}", expected, dict)
        _typed(folder, f"the size of {name}", expected.get("bytes"), int)
        _typed(folder, f"the hash of {name}", expected.get("sha256"), str)
    return manifest


_Signature = tuple[int, ...]
# By path: what the file system said of a file when it was read, and its SHA-256.
_known: dict[Path, tuple[_Signature, str]] = {}


def _signature(path: Path) -> _Signature:
    facts = os.stat(path, follow_symlinks=False)
    return facts.st_dev, facts.st_ino, facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def file_sha256(path: Path) -> str:
    """The SHA-256 of a plain file, read again only where it may have changed since this process read it."""
    signature = _signature(path)
    known = _known.get(path)
    if known is None or known[0] != signature:
        digest = hashlib.sha256(read_regular_file(path, signature[3], follow_links=False)).hexdigest()
        _known[path] = known = (signature, digest)
    return known[1]


def _verify_files(folder: Path, files: dict[str, Any]) -> None:
    for name, expected in files.items():
        path = folder / name
        if path.is_symlink():
            raise _refuse(folder, f"{name} is a link")
        if not path.is_file():
            raise _refuse(folder, f"{name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _refuse(
                folder, f"{name} has {size} bytes instead of {expected['bytes']}: cut off or altered"
            )
        try:
            digest = file_sha256(path)
        except (OSError, ValueError) as error:
            raise _refuse(folder, f"{name} can't be read ({error})") from error
        if digest != expected["sha256"]:
            raise _refuse(folder, f"{name} is altered: its SHA-256 is not the manifest's")
    extra = sorted({entry.name for entry in folder.iterdir()} - set(files) - {MANIFEST})
    if extra:
        raise _refuse(folder, f"it holds files that {MANIFEST} does not name: {', '.join(extra)}")


def _verify_kernels(folder: Path, kernels: Sequence[BundledKernel]) -> None:
    """Compare what the manifest says of each library with what the library is."""
    for path in dict.fromkeys(entry.path for entry in kernels):
        data = path.read_bytes()
        for index, entry in enumerate(kernels):
            if entry.path != path:
                continue
            reason = contradiction(data, entry.kernel, entry.target)
            if reason is not None:
                raise _refuse(folder, f"{path.name} is not the library of kernel {index}: {reason}")


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
    if values["status"] not in _STATUSES:
        raise _refuse(folder, f"kernel {index} has status {values['status']!r}")
    library = values.pop("library")
    if library not in files:
        raise _refuse(folder, f"the library {library!r} of kernel {index} is not among its files")
    try:
        problem = AttentionProblem.from_json(entry.get("problem"))
    except (TypeError, ValueError) as error:
        raise _refuse(folder, f"the problem of kernel {index} is damaged ({error})") from error
    try:
        kernel = KernelSpec.of(values.pop("family"), problem, values.pop("decisions"))
        _ = kernel.abi, kernel.is_deterministic
    except (ValueError, TypeError, KeyError) as error:
        raise _refuse(folder, f"kernel {index} is none that this process knows ({error})") from error
    name = values.pop("target")
    target = next((target for target in targets if target.folder == name), None)
    if target is None:
        raise _refuse(folder, f"the target {name!r} of kernel {index} is not among its targets")
    return BundledKernel(problem, kernel, path=folder / library, target=target, **values)


_registered: list[Bundle] = []
_listeners: list[Callable[[], None]] = []


def call_on_registration(function: Callable[[], None]) -> None:
    """Have a function called whenever a bundle is registered or unregistered."""
    _listeners.append(function)


def registered_bundles() -> list[Bundle]:
    """The bundles that calls may use, in the order in which they are asked."""
    return list(_registered)


def register_bundle(bundle: Bundle, *, first: bool = True) -> None:
    """Let calls use a bundle's kernels before anything that would be compiled.

    Parameters
    ----------
    bundle : Bundle
    first : bool
        Before the bundles registered so far, or behind them.
    """
    if bundle not in _registered:
        _registered.insert(0 if first else len(_registered), bundle)
    for function in _listeners:
        function()


def unregister_bundle(bundle: Bundle) -> None:
    """Undo :func:`register_bundle`."""
    if bundle in _registered:
        _registered.remove(bundle)
    for function in _listeners:
        function()


def load_bundle(path: str | os.PathLike[str], *, register: bool = True) -> Bundle:
    """Verify a bundle and let calls use its kernels.

    Parameters
    ----------
    path : path-like
        The bundle's folder. Setting ``$SPATTN_BUNDLE`` to it does the same on the first call.
    register : bool
        Whether dispatch uses it from now on, before anything it would compile; else call
        :func:`register_bundle` with the result.

    Returns
    -------
    Bundle

    Raises
    ------
    FileNotFoundError
        When there is no bundle at `path`.
    ValueError
        When it is altered, cut off, incomplete, of another format, holds files that its manifest does not
        name, or libraries that are not the kernels that it says they are.
    RuntimeError
        When it is made for another machine; says for which.
    """
    folder = Path(path).resolve()
    manifest = read_manifest(folder)
    files = manifest["files"]
    _verify_files(folder, files)
    try:
        targets = tuple(MachineTarget(**entry) for entry in manifest["targets"])
    except (TypeError, ValueError) as error:
        raise _refuse(folder, f"its targets are damaged ({error})") from error
    if not targets or not manifest["kernels"]:
        raise _refuse(folder, "it names no target, or no kernel")
    if RUNTIME_LIBRARY not in files:
        raise _refuse(folder, f"{RUNTIME_LIBRARY} is not among its files")
    obstacles = [target.can_run_here() for target in targets]
    if None not in obstacles:
        reasons = "; ".join(text for text in obstacles if text)
        raise RuntimeError(f"the bundle {folder} can't run on this machine: {reasons}")
    kernels = tuple(
        _read_kernel(folder, index, entry, files, targets) for index, entry in enumerate(manifest["kernels"])
    )
    _verify_kernels(folder, kernels)
    versions = {str(package): str(version) for package, version in manifest["versions"].items()}
    bundle = Bundle(folder, targets, kernels, versions, files)
    if register:
        register_bundle(bundle)
    return bundle
