"""Writing a bundle: the kernels of some problems, compiled for some targets, with all that runs them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .bundle import FORMAT, MANIFEST, VERSIONED_PACKAGES, file_sha256, read_manifest
from .choice import find_schedule
from .families import families_for, find_space, has_space
from .problem import AttentionProblem
from .provenance import installed_versions
from .runtime import CUDA_RUNTIME_LIBRARY, RUNTIME_LIBRARY, runtime_folder
from .target import MachineTarget, detect_cpu, parse_targets


def _holds_only_a_bundle(folder: Path) -> bool:
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError):
        return False
    return {entry.name for entry in folder.iterdir()} <= {MANIFEST, *files}


def export_bundle(
    path: str | os.PathLike[str],
    problems: AttentionProblem | Iterable[AttentionProblem],
    targets: MachineTarget | str | Iterable[MachineTarget] = "cpu",
    *,
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Compile the kernels of some problems and write them as a bundle.

    Parameters
    ----------
    path : path-like
        Folder to write: a new one, an empty one, or an older bundle, which is replaced.
    problems : AttentionProblem or iterable of them
        Each gets the kernel that dispatch would choose on each target, and, where that one's gradients are
        not bitwise reproducible, the one for ``deterministic=True``. A kernel serves every shape and layout
        of its direction, dtype and head dim; where another is chosen for much wider or narrower bands, or for
        many more or fewer tiles, that one is exported too. A training run needs both directions.
    targets : MachineTarget, str or iterable of MachineTarget
        This machine's or any others that this machine can compile for; a text names them as the command line
        does, such as ``"sm_80,sm_90a"``. Where the bundle runs, a call takes
        the kernel of the target that is nearest to its device.

    report : callable
        Called with a line of progress before each kernel is compiled.

    Returns
    -------
    Path
        The folder; :func:`~spattn_tvm.bundle.load_bundle` reads what is in it.

    Raises
    ------
    ValueError
        Without problems or targets, for a problem that no kernel serves on one of them, for a CPU of another
        architecture, or when `path` is taken by something else.
    RuntimeError
        When a compiler or TVM's runtime library is missing.
    """
    if isinstance(targets, str):
        targets = parse_targets(targets)
    targets = tuple(dict.fromkeys((targets,) if isinstance(targets, MachineTarget) else targets))
    if not targets:
        raise ValueError("a bundle needs at least one target, got none")
    for target in targets:
        if target.kind == "cpu" and (target.arch == "aarch64") != (detect_cpu().arch == "aarch64"):
            raise ValueError(
                f"a bundle for {target.folder} needs TVM's runtime library for {target.arch}; the one here "
                f"is for {detect_cpu().arch}: export it on such a machine"
            )
    problems = [problems] if isinstance(problems, AttentionProblem) else list(dict.fromkeys(problems))
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
            entry
            for target in targets
            for problem in problems
            for entry in _export(problem, target, build, report)
        ]
        names = [RUNTIME_LIBRARY] + (
            [CUDA_RUNTIME_LIBRARY] if any(target.kind == "cuda" for target in targets) else []
        )
        for name in names:
            shutil.copyfile(runtime_folder() / name, build / name)
        manifest = {
            "format": FORMAT,
            "targets": [asdict(target) for target in targets],
            "versions": installed_versions(VERSIONED_PACKAGES),
            "kernels": entries,
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(build.iterdir())
            },
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (build / MANIFEST).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(build, folder)
    return folder


def _of_other_cases(problem: AttentionProblem, target: MachineTarget) -> Iterator[AttentionProblem]:
    """Problems like one, for which the families' defaults are others."""
    for family in families_for(target):
        space = find_space(family, problem.direction) if has_space(family, problem.direction) else None
        if space is None or space.cases is None:
            continue
        if space.unsupported(problem.head_dim, problem.dtype, target) is None:
            yield from space.cases.others(problem, target)


def _export(
    problem: AttentionProblem, target: MachineTarget, folder: Path, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compile a problem's kernels into a folder; their entries in the manifest."""
    from .build.label import label_library
    from .build.library_cache import compile_kernel
    from .build.resources import describe_resources, library_metadata

    # The fastest comes first, so that it is the one of equally near kernels that a call takes.
    fastest, steady = (find_schedule(problem, target, deterministic=asked) for asked in (False, True))
    choices = [(problem, fastest)]
    if steady.kernel != fastest.kernel:
        choices.append((problem, steady))
    known = {fastest.kernel}
    # A family made for such problems alone serves no other call: one that takes any comes along.
    general = families_for(target)
    also = [problem] if general and fastest.kernel.family not in general else []
    for other in (*also, *_of_other_cases(problem, target)):
        choice = find_schedule(other, target, families=general)
        if choice.kernel not in known:
            known.add(choice.kernel)
            choices.append((other, choice))
    entries = []
    for served, choice in choices:
        report(f"{target.folder}, {served.key}: {choice.kernel.family}")
        library = compile_kernel(choice.kernel, target)
        if not (folder / library.name).exists():
            shutil.copyfile(library, folder / library.name)
            label_library(folder / library.name, choice.kernel, target)
        entries.append(
            {
                "problem": served.to_json(),
                "target": target.folder,
                "family": choice.kernel.family,
                "decisions": dict(choice.kernel.decisions),
                "status": choice.status,
                "reason": choice.reason,
                "library": library.name,
                "resources": describe_resources(library_metadata(library).get("resources")),
            }
        )
    return entries
