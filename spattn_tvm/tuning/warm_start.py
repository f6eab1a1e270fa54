"""What a search measures first: the kernels that were best for its problem's neighbours and on kin chips,
and the defaults of other problems.

Bands four times as wide, or a chip with the same instruction set, change the order of good kernels more than
the set of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from spattn_tvm.choice import kin_folders
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.problem import AttentionProblem, is_same_problem, problem_distance
from spattn_tvm.store import read_cached, schedules_root
from spattn_tvm.target import MachineTarget

from .distill import best_candidates
from .log import readable_logs

_OF_THE_PROBLEM = 8  # that were logged on kin chips
_NEIGHBOURS = 2  # records, and logged problems, that give their best


def warm_starts(
    family: str,
    problem: AttentionProblem,
    target: MachineTarget,
    log_root: Path,
    schedules: Path | None = None,
) -> list[KernelSpec]:
    """Kernels of a family for a problem, the most promising first, each once, and all legal on the target.

    Parameters
    ----------
    family : str
    problem : AttentionProblem
    target : MachineTarget
    log_root : Path
        Folder of the tuning logs: those of the very problem on kin chips give their eight best kernels, and
        the nearest other problems on any of the chips the best one.
    schedules : Path, optional
        Folder of the records, by default the one that dispatch reads: the nearest ones give their kernels.
    """
    found: dict[KernelSpec, None] = {}
    for kernel in chain(
        _of_records(family, problem, target, schedules or schedules_root()),
        _of_logs(family, problem, target, log_root),
        _of_other_cases(family, problem, target),
    ):
        kernel = replace(kernel, dtype=problem.dtype)
        if kernel.rejection(target) is None:
            found[kernel] = None
    return list(found)


def _of_other_cases(family: str, problem: AttentionProblem, target: MachineTarget) -> Iterator[KernelSpec]:
    own = KernelSpec.untuned(family, problem, target)  # which is measured anyway
    for decisions in own.space.all_untuned(problem.head_dim, problem.dtype, target):
        if decisions != own.decisions:
            yield KernelSpec.of(family, problem, decisions)


def _of_records(
    family: str, problem: AttentionProblem, target: MachineTarget, root: Path
) -> Iterator[KernelSpec]:
    records = [
        record
        for folder in (target.folder, *kin_folders(target, root))
        for record in read_cached(root, folder)
        if record.kernel.family == family
        and (record.problem.direction, record.problem.head_dim) == (problem.direction, problem.head_dim)
    ]
    records.sort(key=lambda record: problem_distance(problem, record.problem))
    distinct = dict.fromkeys(record.kernel for record in records)
    yield from islice(distinct, _NEIGHBOURS)


def _of_logs(
    family: str, problem: AttentionProblem, target: MachineTarget, log_root: Path
) -> Iterator[KernelSpec]:
    here: list[tuple[float, Path]] = []
    for folder in (target.folder, *kin_folders(target, log_root)):
        for log, run in readable_logs(log_root / folder):
            logged = AttentionProblem.from_json(run["problem"])
            if (logged.direction, logged.head_dim) != (problem.direction, problem.head_dim):
                continue
            if not is_same_problem(problem, logged):
                here.append((problem_distance(problem, logged), log))
            elif folder != target.folder:
                for _, measured in best_candidates([log], family, target)[:_OF_THE_PROBLEM]:
                    yield measured.kernel
    for _, log in sorted(here)[:_NEIGHBOURS]:
        for _, measured in best_candidates([log], family, target)[:1]:
            yield measured.kernel
