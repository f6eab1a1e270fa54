"""Measured schedules and their lookup: what a search has found for a problem, on which chip, and how fast it
was.

Records live in ``schedules/<target folder>/<direction>-<dtype>-d<head_dim>.json``, a JSON object with the
format's number and a list of records in a stable order. They hold decisions, not code, so a record stays
valid as long as the space still offers its decisions.

They are optional: whatever is wrong with a file or a record, lookups go on without it, and say so once in a
process with a :class:`ScheduleWarning`. Writing loses nothing that it can't read: damaged records stay in
their file, a damaged file is set aside under another name.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from .families.kernel import KernelSpec
from .file_lock import file_lock
from .file_reading import parse_json, read_regular_file, set_aside, shown
from .problem import AttentionProblem
from .target import parse_target

# Of a file. 1 was a bare list of records; in 1 and 2 kernels have placeholders for the decisions of other
# structures.
FORMAT = 3
_LARGEST_FILE_BYTES = 64 * 2**20


class ScheduleWarning(UserWarning):
    """A schedule file, or a record in it, can't be used; kernels are chosen as if it weren't there."""


class _FutureFormatError(ValueError):
    """A file of a later version of this package."""


@dataclass(frozen=True)
class ScheduleRecord:
    """The fastest kernel of one family that was found for one problem, and the evidence for it.

    Parameters
    ----------
    problem : AttentionProblem
    target : str
        Folder name of the target that it was measured on (``MachineTarget.folder``).
    kernel : KernelSpec
        Of the problem's direction, dtype and head dim.
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
    kernel: KernelSpec
    latency_us: float
    workload_hash: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    date: str = ""
    source_log: str = ""
    resources: str = ""

    def __post_init__(self) -> None:
        if not self.kernel.serves(self.problem):
            raise ValueError(f"a kernel for {self.kernel} is none for {self.problem.key}")
        # An integer may be too large for a float, and then for every comparison and text made of it.
        if type(self.latency_us) not in (int, float) or not 0 < self.latency_us < 1e18:
            raise ValueError(f"latency_us must be a positive number, got {self.latency_us!r}")
        _require_folder(self.target)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "kernel"}
        return {
            "problem": self.problem.to_json(),
            "target": facts.pop("target"),
            "family": self.kernel.family,
            "decisions": dict(self.kernel.decisions),
            **{name: value for name, value in facts.items() if name not in ("problem", "versions")},
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
        needed = {"problem", "target", "family", "decisions", "latency_us"}
        fields = needed | (set(cls.__dataclass_fields__) - {"kernel"})
        if needed - set(data) or set(data) - fields:
            raise ValueError(
                f"a record has the fields {sorted(fields)}; missing {sorted(needed - set(data))}, "
                f"unknown {sorted(set(data) - fields)}"
            )
        for name in ("target", "family", "workload_hash", "device", "date", "source_log", "resources"):
            if not _is_text(data.get(name, "")):
                raise ValueError(f"{name} must be a string, got {data[name]!r}")
        versions = data.get("versions", {})
        if not isinstance(versions, dict) or not all(map(_is_text, [*versions, *versions.values()])):
            raise ValueError(f"versions must map names to strings, got {versions!r}")
        try:
            problem = AttentionProblem.from_json(data["problem"])
            facts = {name: value for name, value in data.items() if name not in ("family", "decisions")}
            kernel = KernelSpec.recorded(data["family"], problem, data["decisions"])
            return cls(**{**facts, "problem": problem, "kernel": kernel})
        except TypeError as error:
            raise ValueError(str(error)) from error


def _require_folder(name: str) -> None:
    """Raise ValueError unless a name is a target's folder: "cuda", say, names whatever this machine has."""
    if not name.startswith(("cpu-", "cuda-")) or parse_target(name).folder != name:
        raise ValueError(f"target must be a target's folder such as cuda-sm_90a-nvidia-h200, got {name!r}")


def _is_text(value: Any) -> bool:
    """A string that can be printed and written: JSON can spell half of a character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


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


def _warn(place: Path, text: str) -> None:
    """Say once in a process what is wrong with a file or a folder."""
    if str(place) in _warned:
        return
    _warned.add(str(place))
    warnings.warn(f"{shown(str(place))}: {text}", ScheduleWarning, stacklevel=2)


_warned: set[str] = set()


def _read_items(path: Path) -> list[Any]:
    """The records of a file as JSON values.

    Raises
    ------
    OSError, ValueError
        When it can't be read, or is no schedule file.
    """
    data = parse_json(read_regular_file(path, _LARGEST_FILE_BYTES))
    if isinstance(data, dict):
        number = data.get("format")
        if type(number) is not int or number < 1:
            raise ValueError(f"its format is {number!r}, which is no number of a format")
        if number > FORMAT:
            raise _FutureFormatError(
                f"its format is {number} and this version of spattn-tvm reads up to {FORMAT}"
            )
        data = data.get("records")
    if not isinstance(data, list):
        raise ValueError("it must hold a list of records")
    return data


def _readable(items: Iterable[Any], path: Path) -> tuple[list[ScheduleRecord], list[Any], list[str]]:
    """The records among a file's items, the items that are none, and why they are none."""
    records, others, reasons = [], [], []
    for index, item in enumerate(items):
        try:
            record = ScheduleRecord.from_json(item)
            if record.target != path.parent.name or _file_name(record.problem) != path.name:
                raise ValueError(f"it belongs to {record.target}/{_file_name(record.problem)}")
        except (ValueError, ArithmeticError, RecursionError) as error:
            others.append(item)
            reasons.append(f"record {index}: {shown(error)}")
        else:
            records.append(record)
    return records, others, reasons


def _read_file(path: Path) -> list[ScheduleRecord]:
    """What can be used of a file; warns of the rest."""
    try:
        items = _read_items(path)
    except _FutureFormatError as error:
        _warn(path, f"{error}; the file is ignored: install a newer spattn-tvm")
        return []
    except FileNotFoundError as error:
        if path.is_symlink():
            _warn(path, f"the link leads nowhere ({error.strerror}); it is ignored: restore or delete it")
        return []  # or deleted since the folder was listed
    except (OSError, ValueError) as error:
        _warn(path, f"no schedule file ({shown(error)}); it is ignored: restore or delete it")
        return []
    records, _, reasons = _readable(items, path)
    if reasons:
        more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        _warn(
            path,
            f"{reasons[0]}{more}; ignored, the other {len(records)} records are used: "
            "restore the file, or delete what is damaged",
        )
    return records


def list_folder(directory: Path, suffix: str = "") -> list[Path]:
    """The entries of a folder of schedules, in order; warns where there is something else in its place."""
    try:
        return sorted(entry for entry in directory.iterdir() if entry.name.endswith(suffix))
    except FileNotFoundError as error:
        if directory.is_symlink():
            _warn(directory, f"the link leads nowhere ({error.strerror}); it is ignored")
    except OSError as error:
        _warn(directory, f"no folder of schedules ({shown(error)}); it is ignored")
    return []


def load_records(folder: str, root: Path | None = None) -> list[ScheduleRecord]:
    """All records of a target, in file order.

    What can't be read is left out, with one :class:`ScheduleWarning` for each file.

    Parameters
    ----------
    folder : str
        ``MachineTarget.folder``.
    root : Path, optional
        Instead of :func:`schedules_root`.
    """
    directory = (root or schedules_root()) / folder
    files = [path for path in list_folder(directory, ".json") if not path.name.startswith(".")]
    return [record for path in files for record in _read_file(path)]


def target_folders(root: Path) -> list[str]:
    """The names of a root's folders that are targets, in order; warns of those that look like one."""
    names = []
    for entry in list_folder(root):
        if not entry.name.startswith(("cpu-", "cuda-")):
            continue
        try:
            _require_folder(entry.name)
        except ValueError as error:
            _warn(entry, f"the folder is no target's ({shown(error)}); it is ignored: rename or delete it")
        else:
            names.append(entry.name)
    return names


def _order(record: ScheduleRecord) -> tuple[Any, ...]:
    problem = record.problem
    return (
        problem.layout.spec,
        problem.length,
        problem.batch,
        problem.query_heads,
        problem.kv_heads,
        record.kernel.family,
        _is_reproducible(record),
    )


def _is_reproducible(record: ScheduleRecord) -> bool:
    try:
        return record.kernel.is_deterministic
    except (KeyError, ValueError):  # decisions that the family's space doesn't have any more, or not yet
        return False


def save_records(records: Iterable[ScheduleRecord], root: Path | None = None) -> list[Path]:
    """Write records; each replaces the one of the same problem, target and family.

    A record whose gradients are not bitwise reproducible and one whose are don't replace each other. Several
    processes may save at once. A file that is no schedule file is renamed to ``….json.damaged`` first, with a
    :class:`ScheduleWarning`; records that this version can't read stay in their file.

    Parameters
    ----------
    records : iterable of ScheduleRecord
    root : Path, optional
        Instead of :func:`schedules_root`.

    Returns
    -------
    list of Path
        The files written. Each is replaced in one step.

    Raises
    ------
    ValueError
        When a file is of a later version's format.
    OSError
        When a folder or a file can't be read or written, or something else is in a file's place.
    """
    root = root or schedules_root()
    new: dict[Path, list[ScheduleRecord]] = {}
    for record in records:
        new.setdefault(root / record.target / _file_name(record.problem), []).append(record)
    for path, added in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f".{path.name}.lock")):
            kept, others, _ = _readable(_items_to_keep(path), path)
            merged = {
                (record.problem, record.kernel.family, _is_reproducible(record)): record
                for record in [*kept, *added]
            }
            ordered = [record.to_json() for record in sorted(merged.values(), key=_order)]
            _replace(path, _text({"format": FORMAT, "records": [*ordered, *others]}))
    read_cached.cache_clear()
    return list(new)


def _items_to_keep(path: Path) -> list[Any]:
    """The records of a file that is about to be replaced; one that can't be understood is set aside."""
    try:
        items = _read_items(path)
        _text({"records": items})
        return items
    except _FutureFormatError as error:
        raise ValueError(
            f"{path} is not replaced: {error}; install a newer spattn-tvm, or save elsewhere"
        ) from error
    except FileNotFoundError:
        if not path.is_symlink():
            return []
        reason = "the link leads nowhere"
    except (ValueError, RecursionError) as error:  # also of what can be read but not written again
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is not replaced: {error}; move it away") from error
        reason = shown(error)
    aside = set_aside(path)
    _warn(aside, f"set aside, because it was no schedule file ({reason}): repair or delete it")
    return []


def _text(data: Any) -> bytes:
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a character in a damaged record that is kept
        text = json.dumps(data, indent=1).encode()
    return text + b"\n"


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step."""
    target = path.resolve()  # a link stays one
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


@lru_cache(maxsize=64)
def read_cached(root: Path, folder: str) -> tuple[ScheduleRecord, ...]:
    """`load_records`, read once until `clear_cache`."""
    return tuple(load_records(folder, root))


def clear_cache() -> None:
    """Forget what was read, so that the next lookup sees files written since by another process."""
    read_cached.cache_clear()
