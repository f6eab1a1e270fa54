"""Measured schedules and their lookup: what a search has found for a problem, on which chip, and how fast it
was.

Records live in ``schedules/<target folder>/<direction>-<dtype>-d<head_dim>.json``, a list of JSON objects in
a stable order. They hold decisions, not code, so a record stays valid as long as the space still offers its
decisions.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .problem import AttentionProblem
from .spaces import FAMILIES, families_for, find_space, has_space
from .target import MachineTarget, parse_target

if TYPE_CHECKING:
    from .bundle import BundledKernel


class NoKernelError(ValueError):
    """No kernel family can serve a problem on a target; the message says why not, for each family."""


@dataclass(frozen=True)
class ScheduleRecord:
    """The fastest decisions found for one problem by one kernel family, and the evidence for them.

    Parameters
    ----------
    problem : AttentionProblem
    target : str
        Folder name of the target that it was measured on (``MachineTarget.folder``).
    family : str
    decisions : dict[str, int]
    latency_us : float
        Median time of a call, in microseconds.
    workload_hash : str
        Structural hash of the workload that the search ran on.
    versions : dict[str, str]
        Of TVM, PyTorch, and for CUDA of the toolkit and the driver.
    device : str
        Name of the chip, as its driver or ``/proc/cpuinfo`` gives it.
    date : str
        Day of the measurement, ISO 8601.
    source_log : str
        The log that it was distilled from, relative to ``autotune_logs/``.
    resources : str
        Registers and spilled bytes of each of its CUDA kernels, as ptxas gave them.
    """

    problem: AttentionProblem
    target: str
    family: str
    decisions: dict[str, int]
    latency_us: float
    workload_hash: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    date: str = ""
    source_log: str = ""
    resources: str = ""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        if not isinstance(self.decisions, dict) or not all(
            isinstance(name, str) and isinstance(value, int) and not isinstance(value, bool)
            for name, value in self.decisions.items()
        ):
            raise ValueError(f"decisions must map names to integers, got {self.decisions!r}")
        if not isinstance(self.latency_us, int | float) or not 0 < self.latency_us < math.inf:
            raise ValueError(f"latency_us must be a positive number, got {self.latency_us!r}")
        parse_target(self.target)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values."""
        return {
            **asdict(self),
            "problem": self.problem.to_json(),
            "decisions": dict(sorted(self.decisions.items())),
            "versions": dict(sorted(self.versions.items())),
        }

    @classmethod
    def from_json(cls, data: Any) -> ScheduleRecord:
        """The record that `to_json` wrote.

        Raises
        ------
        ValueError
            For unknown or missing fields, or values that make no record.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a record is a JSON object, got {data!r}")
        fields = cls.__dataclass_fields__
        needed = {"problem", "target", "family", "decisions", "latency_us"}
        if needed - set(data) or set(data) - set(fields):
            raise ValueError(
                f"a record has the fields {sorted(fields)}; missing {sorted(needed - set(data))}, "
                f"unknown {sorted(set(data) - set(fields))}"
            )
        for name in ("target", "workload_hash", "device", "date", "source_log", "resources"):
            if not isinstance(data.get(name, ""), str):
                raise ValueError(f"{name} must be a string, got {data[name]!r}")
        if not isinstance(data.get("versions", {}), dict):
            raise ValueError(f"versions must be an object, got {data['versions']!r}")
        try:
            return cls(**{**data, "problem": AttentionProblem.from_json(data["problem"])})
        except TypeError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Choice:
    """What a lookup decided: the family and its decisions, how good the evidence is, and why.

    ``status`` is ``"tuned"`` (measured for this very problem on this chip), ``"nearest"`` (measured for
    another) or ``"untuned"`` (the space's default).
    """

    family: str
    decisions: dict[str, int]
    status: str
    reason: str
    record: ScheduleRecord | None = None


def schedules_root() -> Path:
    """The folder that schedules are read from and written to.

    ``$SPATTN_SCHEDULES`` if set, else ``schedules/`` of the source tree in an editable install, else the
    folder inside the installed package. It may not exist yet.
    """
    named = os.environ.get("SPATTN_SCHEDULES")
    if named:
        return Path(named).expanduser()
    package = Path(__file__).resolve().parent
    if not (package / "schedules").is_dir() and (package.parent / "pyproject.toml").is_file():
        return package.parent / "schedules"
    return package / "schedules"


def _file_name(problem: AttentionProblem) -> str:
    return f"{problem.direction}-{problem.dtype}-d{problem.head_dim}.json"


def _read_file(path: Path, folder: str) -> list[ScheduleRecord]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, list):
            raise ValueError("the file must hold a list of records")
    except ValueError as error:
        raise ValueError(f"{path} is no schedule file: {error}; restore or delete it") from error
    records = []
    for index, item in enumerate(data):
        try:
            record = ScheduleRecord.from_json(item)
            if record.target != folder or _file_name(record.problem) != path.name:
                raise ValueError(f"it belongs to {record.target}/{_file_name(record.problem)}")
        except ValueError as error:
            raise ValueError(
                f"record {index} of {path} is damaged: {error}; restore or delete the file"
            ) from error
        records.append(record)
    return records


def load_records(folder: str, root: Path | None = None) -> list[ScheduleRecord]:
    """All records of a target, in file order.

    Parameters
    ----------
    folder : str
        ``MachineTarget.folder``.
    root : Path, optional
        Instead of :func:`schedules_root`.

    Raises
    ------
    ValueError
        For a damaged file; names it.
    """
    directory = (root or schedules_root()) / folder
    return [record for path in sorted(directory.glob("*.json")) for record in _read_file(path, folder)]


def _order(record: ScheduleRecord) -> tuple[Any, ...]:
    problem = record.problem
    return (
        problem.layout.spec,
        problem.length,
        problem.batch,
        problem.query_heads,
        problem.kv_heads,
        record.family,
        is_deterministic(record),
    )


def is_deterministic(record: ScheduleRecord | BundledKernel) -> bool:
    """Whether a recorded or bundled kernel's results are bitwise equal from run to run."""
    return find_space(record.family, record.problem.direction).is_deterministic(record.decisions)


def save_records(records: Iterable[ScheduleRecord], root: Path | None = None) -> list[Path]:
    """Write records; each replaces the one of the same problem, target and family.

    A record whose gradients are not bitwise reproducible and one whose are don't replace each other.

    Parameters
    ----------
    records : iterable of ScheduleRecord
    root : Path, optional
        Instead of :func:`schedules_root`.

    Returns
    -------
    list of Path
        The files written. Each is replaced in one step.
    """
    root = root or schedules_root()
    new: dict[Path, list[ScheduleRecord]] = {}
    for record in records:
        new.setdefault(root / record.target / _file_name(record.problem), []).append(record)
    for path, added in new.items():
        kept = _read_file(path, path.parent.name) if path.exists() else []
        merged = {
            (record.problem, record.family, is_deterministic(record)): record for record in [*kept, *added]
        }
        text = json.dumps(
            [record.to_json() for record in sorted(merged.values(), key=_order)], indent=1, ensure_ascii=False
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    _read_cached.cache_clear()
    return list(new)


@lru_cache(maxsize=64)
def _read_cached(root: Path, folder: str) -> tuple[ScheduleRecord, ...]:
    return tuple(load_records(folder, root))


def clear_cache() -> None:
    """Forget what was read, so that the next lookup sees files written since by another process."""
    _read_cached.cache_clear()


def problem_distance(wanted: AttentionProblem, known: AttentionProblem) -> float:
    """How far a problem is from one that was measured.

    The sum of ``|log2|`` of the ratios of length, of batch times query heads and of queries per key head,
    plus 1 for a layout of another name and 4 for another dtype: a doubled length weighs as much as another
    layout, and a record of the same dtype is preferred unless its shape is 16 times further off.
    """
    ratios = (
        wanted.length / known.length,
        wanted.batch * wanted.query_heads / (known.batch * known.query_heads),
        (wanted.query_heads / wanted.kv_heads) / (known.query_heads / known.kv_heads),
    )
    distance = sum(abs(math.log2(ratio)) for ratio in ratios)
    distance += wanted.layout.name != known.layout.name
    return distance + 4 * (wanted.dtype != known.dtype)


def is_same_problem(wanted: AttentionProblem, known: AttentionProblem) -> bool:
    """Do the two do the same work? Layouts by the intervals they give at this length, not by their
    spelling.
    """
    if wanted == known:
        return True
    shapes = ("direction", "dtype", "batch", "query_heads", "kv_heads", "length", "head_dim")
    if any(getattr(wanted, name) != getattr(known, name) for name in shapes):
        return False
    return bool((wanted.layout.table(wanted.length) == known.layout.table(known.length)).all())


def _difference(wanted: AttentionProblem, record: ScheduleRecord, target: MachineTarget) -> str:
    known = record.problem
    parts = []
    if record.target != target.folder:
        parts.append(f"on {record.target}")
    if known.dtype != wanted.dtype:
        parts.append(f"for {known.dtype}")
    if (known.batch, known.query_heads, known.kv_heads, known.length) != (
        wanted.batch,
        wanted.query_heads,
        wanted.kv_heads,
        wanted.length,
    ):
        parts.append(
            f"at batch {known.batch}, {known.query_heads} query and {known.kv_heads} key heads, "
            f"length {known.length}"
        )
    if known.layout != wanted.layout:
        parts.append(f"with layout {known.layout.name}, C = {known.layout.context_length or known.length}")
    return " ".join(parts)


def _other_families(chosen: ScheduleRecord, rivals: Sequence[ScheduleRecord], able: Sequence[str]) -> str:
    """What the families that were not chosen took for the chosen record's problem."""
    parts = []
    for family in able:
        if family == chosen.family:
            continue
        latencies = [record.latency_us for record in rivals if record.family == family]
        parts.append(f"{family} {min(latencies):.1f} us" if latencies else f"{family} has no record of it")
    return f"; {chosen.family} {chosen.latency_us:.1f} us, {', '.join(parts)}" if parts else ""


def _other_models(target: MachineTarget, root: Path) -> list[str]:
    prefix = f"{target.kind}-{target.arch}-"
    folders = sorted(path.name for path in root.glob(f"{prefix}*") if path.is_dir())
    names = []
    for folder in folders:
        # "x86-64-" is a prefix of "x86-64-v3-" too.
        with_model = parse_target(folder)
        if with_model.arch == target.arch and folder != target.folder:
            names.append(folder)
    return names


def _families(
    problem: AttentionProblem, target: MachineTarget, families: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Families that can serve the problem, and why the others can't."""
    able, reasons = [], []
    for family in families_for(target) if families is None else families:
        if not has_space(family, problem.direction):
            reasons.append(f"{family} has no {problem.direction}")
            continue
        space = find_space(family, problem.direction)
        reason = space.unsupported(problem.head_dim, problem.dtype, target)
        if reason is None:
            able.append(family)
        else:
            reasons.append(f"{family}: {reason}")
    return able, reasons


def find_schedule(
    problem: AttentionProblem,
    target: MachineTarget,
    *,
    families: Sequence[str] | None = None,
    root: Path | None = None,
    deterministic: bool = False,
) -> Choice:
    """Decisions for a problem on a target, from the records or the space's default.

    In this order: a record of the very problem on this chip (``tuned``); the record of this chip nearest by
    :func:`problem_distance`; the nearest of another chip with the same instruction set (both ``nearest``);
    the space's default (``untuned``). Only records of the same direction and head dim count, and of equally
    near ones the faster.

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

    Returns
    -------
    Choice
        Its ``reason`` also says how the other families did, and names records that were passed over because
        the space no longer offers their decisions.

    Raises
    ------
    NoKernelError
        When no family can serve the problem, with each family's reason.
    ValueError
        For a damaged schedule file; names it.
    """
    root = root or schedules_root()
    able, refusals = _families(problem, target, families)
    if not able:
        detail = "; ".join(refusals) or "no kernel family runs there"
        raise NoKernelError(
            f"no kernel for {problem.direction} {problem.dtype} d{problem.head_dim} on {target.folder}: "
            f"{detail}"
        )

    passed_over: list[str] = []

    def usable(folder: str) -> list[ScheduleRecord]:
        records = []
        for record in _read_cached(root, folder):
            known = record.problem
            if (
                known.direction != problem.direction
                or known.head_dim != problem.head_dim
                or record.family not in able
            ):
                continue
            space = find_space(record.family, problem.direction)
            reason = space.rejection(record.decisions, problem.head_dim, problem.dtype, target)
            if reason is not None:
                passed_over.append(f"{known.key} of {folder} ignored: {reason}")
            elif not deterministic or space.is_deterministic(record.decisions):
                records.append(record)
        return records

    def remark(text: str) -> str:
        return text if not passed_over else f"{text} ({'; '.join(passed_over)})"

    here = usable(target.folder)
    same = [record for record in here if is_same_problem(problem, record.problem)]
    if same:
        record = min(same, key=lambda item: item.latency_us)
        reason = f"measured for this problem on this chip: {record.latency_us:.1f} us"
        reason = remark(reason + _other_families(record, same, able))
        return Choice(record.family, record.decisions, "tuned", reason, record)

    def nearest(records: Iterable[ScheduleRecord]) -> ScheduleRecord | None:
        return min(
            records,
            key=lambda item: (problem_distance(problem, item.problem), item.latency_us, item.problem.key),
            default=None,
        )

    candidates = here or [record for folder in _other_models(target, root) for record in usable(folder)]
    found = nearest(candidates)
    if found is not None:
        reason = f"nearest record, measured {_difference(problem, found, target)}"
        rivals = [
            record
            for record in candidates
            if (record.problem, record.target) == (found.problem, found.target)
        ]
        reason = remark(reason + _other_families(found, rivals, able))
        return Choice(found.family, found.decisions, "nearest", reason, found)

    family = able[0]
    decisions = find_space(family, problem.direction).untuned(
        problem.head_dim, problem.dtype, target, deterministic=deterministic
    )
    reason = remark(
        f"no record for {problem.direction} d{problem.head_dim} on {target.folder} or its instruction set"
    )
    return Choice(family, decisions, "untuned", reason)
