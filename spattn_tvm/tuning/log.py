"""The log of a search: what was measured, when and with what, in files that a killed process can't corrupt.

A log folder belongs to one problem, target and strategy::

    autotune_logs/<target>/<problem key>/            evolutionary search
    autotune_logs/<target>/<problem key>/random/     the control
        run.json                       problem, workload hashes, and one entry for each session
        measurements.jsonl             one line for each candidate: decisions, latency or error
        database_workload.json         MetaSchedule's own record of the same
        database_tuning_record.json

Every measurement is on disk before the next one starts, so a kill loses at most the one in flight.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.provenance import device_facts, installed_versions
from spattn_tvm.target import MachineTarget

MEASUREMENTS = "measurements.jsonl"
RUN = "run.json"

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
        Registers and spills of a CUDA candidate; see :func:`spattn_tvm.compiler.read_ptxas`.
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
    def from_json(cls, data: dict[str, Any], problem: AttentionProblem) -> Measurement:
        """What `to_json` wrote to the log of a problem."""
        facts = dict(data)
        spec = KernelSpec.of(facts.pop("family"), problem, facts.pop("decisions"))
        return cls(spec, facts.pop("kernel"), **facts)


def drop_torn_line(path: Path) -> None:
    """Cut a last line that a killed process did not finish."""
    if not path.exists():
        return
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def read_measurements(log_dir: Path) -> list[Measurement]:
    """All measurements of a log folder in order; an unfinished last line is ignored."""
    path = Path(log_dir) / MEASUREMENTS
    if not path.exists():
        return []
    problem = AttentionProblem.from_json(read_run(log_dir)["problem"])
    lines = path.read_bytes().split(b"\n")[:-1]
    return [Measurement.from_json(json.loads(line), problem) for line in lines if line.strip()]


def read_run(log_dir: Path) -> dict[str, Any]:
    """The metadata of a log folder.

    Raises
    ------
    ValueError
        When the folder holds none.
    """
    path = Path(log_dir) / RUN
    if not path.exists():
        raise ValueError(f"{log_dir} is not the log of a search: it holds no {RUN}")
    return json.loads(path.read_text(encoding="utf-8"))


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
    """A log folder open for appending.

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
    """

    def __init__(self, folder: Path, problem: AttentionProblem, target: MachineTarget, strategy: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        drop_torn_line(self.folder / MEASUREMENTS)
        self.measurements = read_measurements(self.folder)
        identity = {"problem": problem.to_json(), "target": target.folder, "strategy": strategy}
        if (self.folder / RUN).exists():
            self.run = read_run(self.folder)
            for name, value in identity.items():
                if self.run[name] != value:
                    raise ValueError(
                        f"{self.folder} holds the search of {name} {self.run[name]!r}, not of {value!r}; "
                        "choose another log root"
                    )
        else:
            self.run = {**identity, "families": {}, "sessions": []}

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
        line = json.dumps(measurement.to_json(), separators=(",", ":")) + "\n"
        with (self.folder / MEASUREMENTS).open("ab") as file:
            file.write(line.encode())
        self.measurements.append(measurement)

    def _write_run(self) -> None:
        path = self.folder / RUN
        temporary = path.with_suffix(f".json.{os.getpid()}")
        temporary.write_text(json.dumps(self.run, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
