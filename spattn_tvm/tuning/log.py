"""The log of a search: what was measured, when and with what, in files that a killed process can't corrupt.

A log folder belongs to one problem, target and strategy::

    autotune_logs/<target>/<problem key>/            evolutionary search
    autotune_logs/<target>/<problem key>/random/     the control
        run.json                       problem, workload hashes, and one entry for each session
        measurements.jsonl             one line for each candidate: decisions, latency or error
        database_workload.json         MetaSchedule's own record of the same
        database_tuning_record.json

Every measurement is on disk before the next one starts, so a kill loses at most the one in flight. One
process writes to a folder at a time. A line that says nothing readable is set aside in
``measurements.jsonl.damaged`` by the next search, and left out by every other reader, with a
:class:`LogWarning` that names it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spattn_tvm.build.resources import are_resources
from spattn_tvm.families import family_names
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.file_lock import LockedError, file_lock
from spattn_tvm.file_reading import parse_json, read_regular_file, set_aside, shown
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.provenance import device_facts, installed_versions
from spattn_tvm.target import MachineTarget

MEASUREMENTS = "measurements.jsonl"
RUN = "run.json"
_LARGEST_FILE_BYTES = 2**30


class LogWarning(UserWarning):
    """Part of a tuning log can't be read and is left out."""


_VERSIONED_PACKAGES = (
    "spattn-tvm",
    "apache-tvm",
    "apache-tvm-ffi",
    "torch",
    "xgboost",
    "xgboost-cpu",
    "numpy",
)


@dataclass(frozen=True)
class Measurement:
    """One candidate's result.

    Attributes
    ----------
    kernel : KernelSpec
    code : str
        Hash of what the family builds from its untuned decisions; results of other kernel code are not
        comparable.
    latency_us : float or None
        Median time of one call, None when there is an error. Other programs' share is taken out of it.
    error : str or None
        Why there is no latency: it didn't build, crashed, took too long or computed a wrong result.
    elapsed_s : float
        Search time of the log folder up to this measurement, over all sessions.
    slowdown : float
        How much slower than at the start of the search the untuned default ran during this measurement; the
        clock showed about ``latency_us * slowdown``.
    resources : dict or None
        Registers and spills of a CUDA candidate; see :func:`spattn_tvm.build.resources.read_ptxas`.
    server : str or None
        Address of the fleet's server that measured it; None for this machine.
    """

    kernel: KernelSpec
    code: str
    latency_us: float | None
    error: str | None
    elapsed_s: float
    slowdown: float = 1.0
    resources: dict[str, Any] | None = None
    server: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values, without what is not known. Direction, dtype and head dim are the log's."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del facts["kernel"], facts["code"]
        always = ("latency_us", "error")
        return {
            "family": self.kernel.family,
            "kernel": self.code,
            "decisions": dict(self.kernel.decisions),
            **{name: value for name, value in facts.items() if value is not None or name in always},
        }

    @classmethod
    def from_json(cls, data: Any, problem: AttentionProblem) -> Measurement:
        """What `to_json` wrote to the log of a problem.

        Raises
        ------
        ValueError
            When it is no measurement.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a measurement is a JSON object, got {data!r}")
        facts = dict(data)
        for name, kinds in _KINDS.items():
            if name not in facts and name in ("family", "kernel", "decisions", "elapsed_s"):
                raise ValueError(f"a measurement has a {name!r}")
            if name in facts and type(facts[name]) not in kinds:
                raise ValueError(f"{name!r} can't be {facts[name]!r}")
        if facts.get("resources") is not None and not are_resources(facts["resources"]):
            raise ValueError(f"'resources' can't be {facts['resources']!r}")
        if set(facts) - set(_KINDS):
            raise ValueError(f"a measurement has no {sorted(set(facts) - set(_KINDS))}")
        for name in ("latency_us", "elapsed_s", "slowdown"):
            least = 0.0 if name == "elapsed_s" else 1e-9
            if facts.get(name) is not None and not least <= facts[name] < 1e18:
                raise ValueError(f"{name!r} can't be {facts[name]!r}")
        if (facts.get("latency_us") is None) == (facts.get("error") is None):
            raise ValueError("a measurement has either a latency or an error")
        facts = {"latency_us": None, "error": None, **facts}
        spec = KernelSpec.recorded(facts.pop("family"), problem, facts.pop("decisions"))
        return cls(spec, facts.pop("kernel"), **facts)


_KINDS: dict[str, tuple[type, ...]] = {
    "family": (str,),
    "kernel": (str,),
    "decisions": (dict,),
    "latency_us": (int, float, type(None)),
    "error": (str, type(None)),
    "elapsed_s": (int, float),
    "slowdown": (int, float),
    "resources": (dict, type(None)),
    "server": (str, type(None)),
}


def drop_torn_line(path: Path) -> None:
    """Cut a last line that a killed process did not finish."""
    if not path.exists():
        return
    text = read_regular_file(path, _LARGEST_FILE_BYTES)
    if text and not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def _read_lines(
    path: Path, problem: AttentionProblem, families: Collection[str]
) -> tuple[list[Measurement], list[bytes], list[tuple[int, bytes, str]]]:
    """The measurements of a file, the last of each kernel; the lines that can stay in it; and the damaged
    ones with their numbers and what is wrong with them.

    A line of one of the log's `families` that this process doesn't know is no damage.
    """
    found: dict[tuple[str, KernelSpec], Measurement] = {}
    good: list[bytes] = []
    damaged: list[tuple[int, bytes, str]] = []
    for number, line in enumerate(read_regular_file(path, _LARGEST_FILE_BYTES).split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            data = parse_json(line)
            if _is_foreign(data, families):
                good.append(line)
                continue
            measurement = Measurement.from_json(data, problem)
        except (ValueError, TypeError, RecursionError) as error:
            damaged.append((number, line, shown(error)))
        else:
            good.append(line)
            found[measurement.code, measurement.kernel] = measurement
    return list(found.values()), good, damaged


def _is_foreign(data: Any, families: Collection[str]) -> bool:
    """Whether a line is of a family of the log that nobody has registered in this process."""
    name = data.get("family") if isinstance(data, dict) else None
    return isinstance(name, str) and name in families and name not in family_names()


def read_measurements(log_dir: Path) -> list[Measurement]:
    """The measurements of a log folder in order; damaged lines and an unfinished last one are left out."""
    path = Path(log_dir) / MEASUREMENTS
    if not os.path.lexists(path):
        return []
    run = read_run(log_dir)
    problem = AttentionProblem.from_json(run["problem"])
    try:
        measurements, _, damaged = _read_lines(path, problem, run["families"])
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is left out: {shown(error)}", LogWarning, stacklevel=2)
        return []
    for number, _, reason in damaged:
        warnings.warn(f"{path}, line {number} is left out: {reason}", LogWarning, stacklevel=2)
    return measurements


def read_run(log_dir: Path) -> dict[str, Any]:
    """The metadata of a log folder.

    Raises
    ------
    ValueError
        When the folder holds none, or they are damaged.
    """
    path = Path(log_dir) / RUN
    if not os.path.lexists(path):
        raise ValueError(f"{log_dir} is not the log of a search: it holds no {RUN}")
    try:
        run = parse_json(read_regular_file(path, _LARGEST_FILE_BYTES))
        _check_run(run)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({shown(error)}): restore it, or tune the problem again, which writes it anew"
        ) from error
    return run


def _check_run(run: Any) -> None:
    if not isinstance(run, dict):
        raise ValueError(f"it must hold a JSON object, got {run!r}")
    AttentionProblem.from_json(run.get("problem"))  # type: ignore[arg-type]
    for name in ("target", "strategy"):
        if not isinstance(run.get(name), str):
            raise ValueError(f"{name!r} can't be {run.get(name)!r}")
    families, sessions = run.get("families"), run.get("sessions")
    if not isinstance(families, dict) or not isinstance(sessions, list):
        raise ValueError("'families' must be an object and 'sessions' a list")
    for facts in families.values():
        if not isinstance(facts, dict) or not all(
            isinstance(facts.get(name), str) for name in ("kernel", "workload_hash")
        ):
            raise ValueError(f"a family has a 'kernel' and a 'workload_hash', got {facts!r}")
    for session in sessions:
        if not isinstance(session, dict):
            raise ValueError(f"a session is an object, got {session!r}")
        elapsed_s = session.get("elapsed_s", 0.0)
        if type(elapsed_s) not in (int, float) or not 0 <= elapsed_s < math.inf:
            raise ValueError(f"'elapsed_s' can't be {elapsed_s!r}")


def comparable_measurements(log_dir: Path) -> list[Measurement]:
    """The measurements of a log folder that were made with its latest kernel code."""
    codes = {family: facts["kernel"] for family, facts in read_run(log_dir)["families"].items()}
    return [m for m in read_measurements(log_dir) if m.code == codes.get(m.kernel.family)]


def curve(log_dir: Path, family: str | None = None) -> tuple[list[int], list[float]]:
    """Best latency so far after each trial, for a tuning curve.

    Parameters
    ----------
    log_dir : Path
        A log folder.
    family : str, optional
        Only this family's trials.

    Returns
    -------
    trials : list[int]
        Counted from 1, failures included; starts with the first success.
    best_us : list[float]
        Same length.
    """
    trials: list[int] = []
    best: list[float] = []
    count = 0
    for measurement in comparable_measurements(log_dir):
        if family is not None and measurement.kernel.family != family:
            continue
        count += 1
        latency = measurement.latency_us
        if latency is None and not best:
            continue
        trials.append(count)
        best.append(min([*best[-1:], *([] if latency is None else [latency])]))
    return trials, best


def log_folder(log_root: Path, target: MachineTarget, problem: AttentionProblem, strategy: str) -> Path:
    """Where a problem's search is logged; the random control has a folder of its own inside."""
    folder = Path(log_root) / target.folder / problem.key
    return folder if strategy == "evolutionary" else folder / strategy


def find_logs(log_root: Path) -> Iterator[Path]:
    """Every log folder under a root, controls included, in a stable order."""
    for path in sorted(Path(log_root).rglob(RUN)):
        yield path.parent


def readable_logs(log_root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The log folders under a root with their metadata; warns of those whose metadata can't be read."""
    root, found = Path(log_root), []
    named = {path.parent for name in (RUN, MEASUREMENTS) for path in root.rglob(name)}
    for folder in sorted(named):
        try:
            found.append((folder, read_run(folder)))
        except ValueError as error:
            warnings.warn(f"{error}; its measurements are left out", LogWarning, stacklevel=2)
    return found


def now() -> str:
    """UTC date and time, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of what takes part in a measurement."""
    return installed_versions(_VERSIONED_PACKAGES)


def session_device(target: MachineTarget) -> dict[str, Any]:
    """Facts of the device that measures, and how many threads a CPU's kernels use."""
    import torch

    facts = device_facts(torch.device(target.kind))
    return facts if target.kind == "cuda" else {**facts, "threads": torch.get_num_threads()}


class TuningLog:
    """A log folder open for appending, by one process at a time until it is closed.

    What is damaged in it is set aside, with a :class:`LogWarning` that names the file and the line.

    Parameters
    ----------
    folder : Path
        Created when absent.
    problem, target, strategy
        Must be those of the folder's earlier sessions.

    Raises
    ------
    ValueError
        When the folder belongs to another problem, target or strategy.
    LockedError
        When another process writes to it; says which.
    """

    def __init__(self, folder: Path, problem: AttentionProblem, target: MachineTarget, strategy: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opening:
            try:
                opening.enter_context(file_lock(self.folder / ".lock", wait=False))
            except LockedError as error:
                raise LockedError(
                    f"{self.folder} is another search's ({error}): wait for it, or give another log root"
                ) from None
            for leftover in self.folder.glob("*.json*.*"):  # of a process killed while it wrote
                if leftover.suffix[1:].isdigit():
                    leftover.unlink(missing_ok=True)
            self.run = self._open_run(
                {"problem": problem.to_json(), "target": target.folder, "strategy": strategy}
            )
            self.measurements = self._open_measurements(problem)
            self._lock = opening.pop_all()

    def __enter__(self) -> TuningLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write."""
        self._lock.close()

    def _open_run(self, identity: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / RUN
        run: dict[str, Any] = {**identity, "families": {}, "sessions": []}
        if not os.path.lexists(path):
            return run
        try:
            found = read_run(self.folder)
        except ValueError as error:
            aside = set_aside(path)
            warnings.warn(f"{error}; it is now {aside.name}", LogWarning, stacklevel=4)
            return run
        for name, value in identity.items():
            if found[name] != value:
                raise ValueError(
                    f"{self.folder} holds the search of {name} {found[name]!r}, not of {value!r}; "
                    "choose another log root"
                )
        return found

    def _open_measurements(self, problem: AttentionProblem) -> list[Measurement]:
        path = self.folder / MEASUREMENTS
        if not os.path.lexists(path):
            return []
        try:
            drop_torn_line(path)
            measurements, good, damaged = _read_lines(path, problem, self.run["families"])
        except (OSError, ValueError) as error:
            aside = set_aside(path)
            warnings.warn(f"{path}: {error}; it is now {aside.name}", LogWarning, stacklevel=4)
            return []
        if damaged:
            self._set_lines_aside(damaged, good)
        return measurements

    def _set_lines_aside(self, damaged: Iterable[tuple[int, bytes, str]], good: Iterable[bytes]) -> None:
        path = self.folder / MEASUREMENTS
        aside = path.with_name(f"{MEASUREMENTS}.damaged")
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for _, line, _ in damaged)
        self._write(path, b"".join(line + b"\n" for line in good))
        for number, _, reason in damaged:
            warnings.warn(
                f"{path}, line {number} is set aside in {aside.name}: {reason}", LogWarning, stacklevel=5
            )

    def drop_what_is_not_offered(
        self, code: str, family: str, offers: Callable[[Mapping[str, int]], bool]
    ) -> None:
        """Set aside the lines of a family whose decisions its space can't have made."""
        good, damaged, lost = [], [], set()
        lines = (self.folder / MEASUREMENTS).read_bytes().split(b"\n") if self.measurements else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            data = parse_json(line)
            if (data["family"], data["kernel"]) == (family, code) and not offers(data["decisions"]):
                damaged.append((number, line, f"the space has no {shown(data['decisions'])}"))
                lost.add(tuple(sorted(data["decisions"].items())))
            else:
                good.append(line)
        if damaged:
            self._set_lines_aside(damaged, good)
            self.measurements = [
                m
                for m in self.measurements
                if (m.kernel.family, m.code) != (family, code)
                or tuple(m.kernel.decisions.items()) not in lost
            ]

    @property
    def elapsed_s(self) -> float:
        """Search time of all sessions; of a killed one up to its last measurement."""
        ended = [session.get("elapsed_s", 0.0) for session in self.run["sessions"]]
        return max([0.0, *ended, *(m.elapsed_s for m in self.measurements[-1:])])

    def begin_session(self, facts: Mapping[str, Any]) -> None:
        """Note the start of a session: seed, versions, device and whatever else `facts` says."""
        self.run["sessions"].append(
            {"started": now(), **facts, "first_trial": len(self.measurements), "ended": "killed"}
        )
        self._write_run()

    def note_device(self, facts: Mapping[str, Any]) -> None:
        """Say what has measured in this session, where that is known only now."""
        self.run["sessions"][-1]["device"] = dict(facts)
        self._write_run()

    def note_family(self, family: str, facts: Mapping[str, Any]) -> None:
        self.run["families"][family] = dict(facts)
        self._write_run()

    def end_session(self, reason: str, elapsed_s: float) -> None:
        """Note how the session ended; one that never gets here stays ``"killed"``."""
        session = self.run["sessions"][-1]
        session.update(
            ended=reason,
            finished=now(),
            trials=len(self.measurements) - session["first_trial"],
            elapsed_s=round(elapsed_s, 3),
        )
        self._write_run()

    def append(self, measurement: Measurement) -> None:
        """Hand one measurement to the operating system, where a kill of this process can't reach it."""
        with (self.folder / MEASUREMENTS).open("ab") as file:
            file.write(_line(measurement))
        self.measurements.append(measurement)

    def rescale(self, first: KernelSpec, code: str, latency_us: float) -> None:
        """State a family's latencies anew, after its default, which they are relative to, was timed again.

        Parameters
        ----------
        first : KernelSpec
            The default.
        code : str
            Of the kernels whose latencies are meant.
        latency_us : float
            Its latency now.
        """
        (old,) = [m for m in self.measurements if (m.code, m.kernel) == (code, first)]
        assert old.latency_us is not None
        factor = latency_us / old.latency_us
        changed = {
            id(m): replace(
                m,
                latency_us=None if m.latency_us is None else m.latency_us * factor,
                slowdown=round(m.slowdown / factor, 4),
            )
            for m in self.measurements
            if m.code == code and m.kernel.family == first.family
        }
        # Lines of families that are not known here stay.
        lines = (self.folder / MEASUREMENTS).read_bytes().split(b"\n")
        foreign = [
            line for line in lines if line.strip() and json.loads(line)["family"] not in family_names()
        ]
        self.measurements = [changed.get(id(m), m) for m in self.measurements]
        self._write(
            self.folder / MEASUREMENTS,
            b"".join([*map(_line, self.measurements), *(line + b"\n" for line in foreign)]),
        )
        self.run["sessions"][-1].setdefault("retaken", []).append(
            {"family": first.family, "from_us": old.latency_us, "to_us": latency_us, "trial": len(changed)}
        )
        self._write_run()

    def _write_run(self) -> None:
        self._write(self.folder / RUN, (json.dumps(self.run, indent=1) + "\n").encode())

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        """Replace a file in one step."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(path)


def _line(measurement: Measurement) -> bytes:
    return json.dumps(measurement.to_json(), separators=(",", ":")).encode() + b"\n"
