"""Which kernel a problem gets on a target: a measured one, the nearest that was measured, or the default."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .families import families_for, find_family, find_space, has_space
from .families.kernel import KernelSpec, is_far
from .problem import AttentionProblem, is_same_problem, problem_distance
from .store import ScheduleRecord, read_cached, schedules_root, target_folders
from .target import MachineTarget, parse_target

# In problem_distance: what bands four times as wide count.
_KINSHIP = 2.0


class NoKernelError(ValueError):
    """No kernel family can serve a problem on a target; the message says why not, for each family."""


@dataclass(frozen=True)
class Choice:
    """What a lookup decided: the kernel, how good the evidence is, and why.

    ``status`` is ``"tuned"`` (measured for this very problem on this chip), ``"nearest"`` (measured for
    another) or ``"untuned"`` (the space's default).
    """

    kernel: KernelSpec
    status: str
    reason: str
    record: ScheduleRecord | None = None


def _difference(wanted: AttentionProblem, record: ScheduleRecord, target: MachineTarget) -> str:
    known = record.problem
    parts = []
    if record.target != target.folder:
        parts.append(f"on {record.target}, another chip with {target.arch}")
    if known.dtype != wanted.dtype:
        parts.append(f"for {known.dtype}")
    if (known.batch, known.query_heads, known.kv_heads, known.length, known.keys) != (
        wanted.batch,
        wanted.query_heads,
        wanted.kv_heads,
        wanted.length,
        wanted.keys,
    ):
        parts.append(
            f"at batch {known.batch}, {known.query_heads} query and {known.kv_heads} key heads, "
            f"length {known.length}" + (f" of {known.keys} keys" if known.keys != known.length else "")
        )
    if known.layout != wanted.layout:
        parts.append(f"with layout {known.layout.name}, C = {known.layout.context_length or known.length}")
    return " ".join(parts)


def _other_families(chosen: ScheduleRecord, rivals: Sequence[ScheduleRecord], able: Sequence[str]) -> str:
    """What the families that were not chosen took for the chosen record's problem."""
    parts = []
    for family in able:
        if family == chosen.kernel.family:
            continue
        latencies = [record.latency_us for record in rivals if record.kernel.family == family]
        parts.append(f"{family} {min(latencies):.1f} us" if latencies else f"{family} has no record of it")
    return f"{chosen.kernel.family} {chosen.latency_us:.1f} us, {', '.join(parts)}" if parts else ""


def kin_folders(target: MachineTarget, root: Path) -> list[str]:
    """Names of a root's folders that are of other chips with the target's instruction set."""
    # By what a name means: "x86-64-" is a prefix of "x86-64-v3-" too.
    return [
        folder
        for folder in target_folders(root)
        if folder != target.folder
        and (parse_target(folder).kind, parse_target(folder).arch) == (target.kind, target.arch)
    ]


def _families(
    problem: AttentionProblem, target: MachineTarget, families: Sequence[str] | None, other_keys: bool
) -> tuple[list[str], list[str]]:
    """Families that can serve the problem, and why the others can't."""
    able, reasons = [], []
    for family in families_for(target, problem) if families is None else families:
        if not has_space(family, problem.direction):
            reasons.append(f"{family} has no {problem.direction}")
            continue
        if other_keys and not find_family(family).abis[problem.direction].takes_other_keys:
            reasons.append(f"{family} takes calls with as many queries as keys only, all of which exist")
            continue
        space = find_space(family, problem.direction)
        reason = space.unsupported(problem.head_dim, problem.dtype, target)
        if reason is None:
            able.append(family)
        else:
            reasons.append(f"{family}: {reason}")
    return able, reasons


class _Lookup:
    """What the records say of a problem on a target.

    Parameters
    ----------
    problem : AttentionProblem
    target : MachineTarget
    root : Path
        Of the records.
    able : sequence of str
        Families that can serve the problem.
    deterministic : bool

    Attributes
    ----------
    passed_over : list of str
        Records that their space no longer offers, and why.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        target: MachineTarget,
        root: Path,
        able: Sequence[str],
        deterministic: bool,
    ) -> None:
        self._problem, self._target, self._root = problem, target, root
        self._able, self._deterministic = able, deterministic
        self.passed_over: list[str] = []
        self._here = self._usable(target.folder)

    @cached_property
    def _elsewhere(self) -> list[ScheduleRecord]:
        folders = kin_folders(self._target, self._root)
        return [record for folder in folders for record in self._usable(folder)]

    def _kernel_of(self, record: ScheduleRecord) -> KernelSpec:
        """The record's kernel in the problem's dtype, which may be another than it was measured in."""
        return dataclasses.replace(record.kernel, dtype=self._problem.dtype)

    def _usable(self, folder: str) -> list[ScheduleRecord]:
        records = []
        for record in read_cached(self._root, folder):
            known = record.problem
            if (
                known.direction != self._problem.direction
                or known.head_dim != self._problem.head_dim
                or record.kernel.family not in self._able
            ):
                continue
            reason = self._kernel_of(record).rejection(self._target)
            if reason is not None:
                self.passed_over.append(f"{known.key} of {folder} ignored: {reason}")
            elif not self._deterministic or record.kernel.is_deterministic:
                records.append(record)
        return records

    def _nearness(self, record: ScheduleRecord) -> tuple[Any, ...]:
        distance = problem_distance(self._problem, record.problem)
        distance += _KINSHIP * (record.target != self._target.folder)
        # Halfway between two lengths the defaults know on which side: the time of the shorter says nothing.
        other_default = any(
            is_far(name, self._problem, record.problem, self._target, self._deterministic, measured=False)
            for name in self._able
        )
        return round(distance, 2), other_default, record.latency_us, record.problem.key, record.target

    def _nearest(self, known: Sequence[ScheduleRecord], names: Sequence[str]) -> list[ScheduleRecord]:
        """Those that count, the nearest first: a record speaks for what all families would do at its problem,
        beside which it was measured.
        """

        near = (record for record in known if not any(self._is_beyond(name, record) for name in names))
        return sorted(near, key=self._nearness)

    def choose(self, names: Sequence[str]) -> tuple[Choice, list[ScheduleRecord]]:
        """The choice among some families, and the records measured beside its own."""
        problem, target = self._problem, self._target
        known = [record for record in self._here if record.kernel.family in names]
        same = [record for record in known if is_same_problem(problem, record.problem)]
        if same:
            record = min(same, key=lambda item: item.latency_us)
            reason = f"measured for this problem on this chip: {record.latency_us:.1f} us"
            return Choice(self._kernel_of(record), "tuned", reason, record), same
        near = self._nearest(known, names)
        if not near or self._nearness(near[0])[0] > _KINSHIP:  # else no other chip's is nearer
            known += [record for record in self._elsewhere if record.kernel.family in names]
            near = self._nearest(known, names)
        if near:
            record = near[0]
            reason = f"nearest record, measured {_difference(problem, record, target)}"
            beside = [r for r in near if (r.problem, r.target) == (record.problem, record.target)]
            return Choice(self._kernel_of(record), "nearest", reason, record), beside
        kernel = KernelSpec.untuned(names[0], problem, target, self._deterministic)
        return Choice(kernel, "untuned", self._why_untuned(known, names)), []

    def _is_beyond(self, name: str, record: ScheduleRecord) -> bool:
        return is_far(name, self._problem, record.problem, self._target, self._deterministic)

    def _why_untuned(self, known: Sequence[ScheduleRecord], names: Sequence[str]) -> str:
        problem, target = self._problem, self._target
        if not known:
            wanted = f"{problem.direction} d{problem.head_dim}"
            of = "" if len(names) == len(self._able) else f" of {', '.join(names)}"
            return f"no record{of} for {wanted} on {target.folder} or its instruction set"
        beyond = min(known, key=self._nearness)
        family = next(name for name in names if self._is_beyond(name, beyond))
        cases = find_space(family, problem.direction).cases
        assert cases is not None, "what has no cases is not beyond"
        return (
            f"the default for {cases.shown(problem)}; the nearest record, measured "
            f"{_difference(problem, beyond, target)}, has {cases.shown(beyond.problem)}, for which the "
            "default is another"
        )


def find_schedule(
    problem: AttentionProblem,
    target: MachineTarget,
    *,
    families: Sequence[str] | None = None,
    root: Path | None = None,
    deterministic: bool = False,
    other_keys: bool = False,
) -> Choice:
    """Decisions for a problem on a target, from the records or the space's default.

    In this order: a record of the very problem on this chip (``tuned``); the record of this chip, or of
    another with the same instruction set, that is nearest by :func:`problem_distance`, where the other chip
    counts as much as bands four times as wide (``nearest``); the space's default (``untuned``). Only records
    of the same direction and head dim count, and of equally near ones those of a problem with the same
    default, and then the faster. One for bands so much wider or narrower, or for so many more or fewer tiles,
    that the default is another kernel there (:func:`~spattn_tvm.families.kernel.is_far`) does not count.

    A record decides between families only if those that are preferred to its own were measured beside it, for
    the same problem on the same chip: else the most preferred of them serves, with what is known of it alone.

    Parameters
    ----------
    problem : AttentionProblem
    target : MachineTarget
    families : sequence of str, optional
        Only these kernel families; by default all that run on the target.
    root : Path, optional
        Instead of :func:`schedules_root`.
    deterministic : bool
        Only kernels whose results are bitwise equal from run to run.
    other_keys : bool
        Only kernels that take keys that are not the queries' own rows; always so where the problem has other
        numbers of them.

    Returns
    -------
    Choice
        Its ``reason`` also says how the other families did, and names records that were passed over because
        the space no longer offers their decisions.

    Raises
    ------
    NoKernelError
        When no family can serve the problem, with each family's reason.
    """
    root = root or schedules_root()
    other_keys = other_keys or problem.keys != problem.length
    able, refusals = _families(problem, target, families, other_keys)
    if not able:
        detail = "; ".join(refusals) or "no kernel family runs there"
        raise NoKernelError(
            f"no kernel for {problem.direction} {problem.dtype} d{problem.head_dim} on {target.folder}: "
            f"{detail}"
        )

    lookup = _Lookup(problem, target, root, able, deterministic)
    choice, beside = lookup.choose(able)
    reason, record = choice.reason, choice.record
    if record is not None:
        measured = {other.kernel.family for other in beside}
        preferred = able[: able.index(choice.kernel.family)]
        unmeasured = [family for family in preferred if family not in measured]
        if unmeasured:
            # A time of another problem, or of another chip, is no measure of this one.
            difference = _difference(problem, record, target)
            known = f"nearest record, {difference}, was" if difference else f"{record.latency_us:.1f} us were"
            choice, _ = lookup.choose(unmeasured[:1])
            reason = (
                f"{choice.kernel.family} is preferred to {record.kernel.family}, whose {known} measured "
                f"without it; {choice.reason}"
            )
        else:
            others = _other_families(record, beside, able)
            there = "there " if choice.status == "nearest" else ""
            reason += f"; {there}{others}" if others else ""
    if lookup.passed_over:
        reason += f" ({'; '.join(lookup.passed_over)})"
    return dataclasses.replace(choice, reason=reason)
