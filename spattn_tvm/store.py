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
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from .families import is_deterministic
from .families.space import FAMILIES
from .problem import AttentionProblem
from .target import parse_target


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
    read_cached.cache_clear()
    return list(new)


@lru_cache(maxsize=64)
def read_cached(root: Path, folder: str) -> tuple[ScheduleRecord, ...]:
    """`load_records`, read once until `clear_cache`."""
    return tuple(load_records(folder, root))


def clear_cache() -> None:
    """Forget what was read, so that the next lookup sees files written since by another process."""
    read_cached.cache_clear()
