"""From logs to schedules: a problem's best candidates are measured again, in turns, and the winner becomes
a record.

One measurement in a search is a single visit to a noisy machine, and the best of many is partly luck. The few
fastest candidates are therefore compared side by side before one of them ships, and with them the untuned
default, which says what the search has gained. What was compared stays beside the log, in
``distilled-<family>.json``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spattn_tvm.build.resources import describe_resources
from spattn_tvm.families import family_names, has_space
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.store import ScheduleRecord, load_records, save_records
from spattn_tvm.target import MachineTarget, parse_target

from .log import (
    Measurement,
    comparable_measurements,
    find_logs,
    now,
    read_run,
    readable_logs,
    session_device,
    versions,
)
from .measure import Outcome, ProcessMeter
from .workers import Workers

_TOP = 4
_TOP_DETERMINISTIC = 2
_ROUNDS = 9
# What takes no less than so much of the default's time is no better than it: a record also serves problems
# like its own, and stays when the default gets faster.
_NO_GAIN = 0.99
# A kernel whose latency in the search was so far from that of the comparison was searched on a busy machine.
_BUSY = 1.5


@dataclass(frozen=True)
class _Contestant:
    """A kernel in a comparison: one that a search found, that of the record so far, or an untuned default.

    Attributes
    ----------
    kernel : KernelSpec
    searched_us : float or None
        What its search, or its record, says; None of a default that neither names.
    source_log, workload_hash : str
        As in its record.
    """

    kernel: KernelSpec
    searched_us: float | None
    source_log: str
    workload_hash: str


def best_candidates(
    logs: Iterable[Path], family: str, target: MachineTarget
) -> list[tuple[Path, Measurement]]:
    """The different kernels in a problem's logs that were correct and that the space still offers, the
    fastest first."""
    found: dict[KernelSpec, tuple[Path, Measurement]] = {}
    for log in logs:
        for measurement in comparable_measurements(log):
            kernel = measurement.kernel
            if kernel.family != family or measurement.latency_us is None:
                continue
            if kernel.rejection(target) is not None:
                continue
            known = found.get(kernel)
            if known is None or measurement.latency_us < (known[1].latency_us or math.inf):
                found[kernel] = (log, measurement)
    return sorted(found.values(), key=lambda item: item[1].latency_us or math.inf)


def _contestants(
    logs: Sequence[Path], family: str, target: MachineTarget, top: int
) -> list[tuple[Path, Measurement]]:
    """The `top` fastest candidates, with the fastest two deterministic ones among them or added."""
    ranked = best_candidates(logs, family, target)
    deterministic = [item for item in ranked[top:] if item[1].kernel.is_deterministic]
    missing = _TOP_DETERMINISTIC - sum(m.kernel.is_deterministic for _, m in ranked[:top])
    return ranked[:top] + deterministic[: max(0, missing)]


def _joined(
    found: Sequence[_Contestant],
    records: Iterable[ScheduleRecord],
    defaults: Iterable[KernelSpec],
    target: MachineTarget,
) -> list[_Contestant]:
    """The contestants, with what they have to beat: the records' kernels that are still offered, and the
    untuned defaults.
    """
    contestants = {contestant.kernel: contestant for contestant in found}
    for record in records:
        if record.kernel.rejection(target) is None:
            joining = _Contestant(record.kernel, record.latency_us, record.source_log, record.workload_hash)
            contestants.setdefault(record.kernel, joining)
    for kernel in defaults:
        contestants.setdefault(kernel, replace(found[0], kernel=kernel, searched_us=None))
    return list(contestants.values())


def _winner(
    correct: Sequence[tuple[_Contestant, Outcome]], default: KernelSpec
) -> list[tuple[_Contestant, Outcome]]:
    """The fastest, or the default where that is as fast; none of none."""
    if not correct:
        return []
    fastest = min(correct, key=lambda item: item[1].latency_us or math.inf)
    enough_us = (fastest[1].latency_us or math.inf) / _NO_GAIN
    defaults = [item for item in correct if item[0].kernel == default]
    as_fast = [item for item in defaults if (item[1].latency_us or math.inf) <= enough_us]
    return as_fast or [fastest]


def _distill_family(
    logs: Sequence[Path],
    log_root: Path,
    family: str,
    problem: AttentionProblem,
    target: MachineTarget,
    top: int,
    rounds: int,
    limit_s: float,
    workers: Workers,
    records: Sequence[ScheduleRecord],
    report: Callable[[str], object],
) -> list[ScheduleRecord]:
    """The fastest kernel of the logs, the records so far and the defaults, and where its results are not
    bitwise reproducible the fastest whose are."""
    found = [
        _Contestant(
            measurement.kernel,
            measurement.latency_us or math.inf,
            log.relative_to(log_root).as_posix(),
            read_run(log)["families"][family]["workload_hash"],
        )
        for log, measurement in _contestants(logs, family, target, top)
    ]
    if not found:
        return []
    defaults = [KernelSpec.untuned(family, problem, target, asked) for asked in (False, True)]
    contestants = _joined(found, records, defaults, target)
    with ProcessMeter(problem, target, workers=workers) as meter:
        outcomes = meter.compare([contestant.kernel for contestant in contestants], rounds, limit_s)
    results = list(zip(contestants, outcomes, strict=True))
    correct = [(c, outcome) for c, outcome in results if outcome.latency_us is not None]
    if not correct:
        raise RuntimeError(
            f"none of the {len(contestants)} best candidates of {logs[0]} is correct any more: "
            f"{outcomes[0].error}"
        )
    winners = _winner(correct, defaults[0])
    if not winners[0][0].kernel.is_deterministic:
        winners += _winner([item for item in correct if item[0].kernel.is_deterministic], defaults[1])
    device = _device(target, workers)["name"]
    _write_results(logs[0] / f"distilled-{family}.json", results, winners, defaults[0], rounds, device)
    for text in _remarks(results, winners, records):
        report(text)
    return [_record(contestant, outcome, problem, target, workers) for contestant, outcome in winners]


def _remarks(
    results: Sequence[tuple[_Contestant, Outcome]],
    winners: Sequence[tuple[_Contestant, Outcome]],
    records: Sequence[ScheduleRecord],
) -> Iterator[str]:
    """What became of the records so far, and of what the search had timed."""
    outcomes = {contestant.kernel: outcome for contestant, outcome in results}
    for record in records:
        same_kind = [
            (contestant, outcome)
            for contestant, outcome in winners
            if contestant.kernel.is_deterministic == record.kernel.is_deterministic
        ]
        outcome = outcomes.get(record.kernel)
        if not same_kind:
            continue
        ((winner, won),) = same_kind
        known = f"the record so far ({record.latency_us:,.1f} us, {record.date[:10]})"
        if outcome is None:
            yield f"  {known} is replaced: its decisions are no longer offered"
        elif outcome.latency_us is None:
            yield f"  {known} is replaced: {outcome.error}"
        elif winner.kernel == record.kernel:
            yield f"  {known} stays the fastest and took {outcome.latency_us:,.1f} us in this comparison"
        else:
            yield (
                f"  {known} is replaced: side by side it took {outcome.latency_us:,.1f} us, "
                f"the new one {won.latency_us:,.1f} us"
            )
    for contestant, outcome in winners:
        measured_us = outcome.latency_us or math.inf
        searched_us = contestant.searched_us
        if searched_us is not None and not measured_us / _BUSY < searched_us < measured_us * _BUSY:
            yield (
                f"  the winner took {measured_us:,.1f} us, and {searched_us:,.1f} us when it was "
                "timed before: the machine was not equally busy"
            )


def _device(target: MachineTarget, workers: Workers) -> dict[str, Any]:
    return session_device(target) if workers.fleet is None else workers.server_facts


def _write_results(
    path: Path,
    results: Sequence[tuple[_Contestant, Outcome]],
    winners: Sequence[tuple[_Contestant, Outcome]],
    default: KernelSpec,
    rounds: int,
    device: str,
) -> None:
    """Put a comparison beside the log, in place of the family's last one."""
    won = [contestant.kernel for contestant, _ in winners]
    kernels = [
        {
            "decisions": dict(contestant.kernel.decisions),
            "latency_us": outcome.latency_us and round(outcome.latency_us, 3),
            "error": outcome.error,
            "is_default": contestant.kernel == default,
            "is_recorded": contestant.kernel in won,
            "is_deterministic": contestant.kernel.is_deterministic,
        }
        for contestant, outcome in results
    ]
    compared = {"date": now(), "device": device, "rounds": rounds, "kernels": kernels}
    path.write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")


def _record(
    contestant: _Contestant,
    outcome: Outcome,
    problem: AttentionProblem,
    target: MachineTarget,
    workers: Workers,
) -> ScheduleRecord:
    device = _device(target, workers)
    return ScheduleRecord(
        problem=problem,
        target=target.folder,
        kernel=contestant.kernel,
        latency_us=round(outcome.latency_us or math.inf, 3),
        workload_hash=contestant.workload_hash,
        versions=versions() | {name: str(device[name]) for name in ("cuda", "driver") if device.get(name)},
        device=device["name"],
        date=now(),
        source_log=contestant.source_log,
        resources=describe_resources(outcome.resources),
    )


def compare_strategies(
    log_dir: Path,
    family: str | None = None,
    *,
    rounds: int = 15,
    workers: Workers | None = None,
    limit_s: float = math.inf,
) -> dict[str, float]:
    """Median latency, in microseconds, of the untuned default and of each strategy's best, measured in turns.

    A search and its random control ran at different times, on a machine that may have been slower during one
    of them; only this tells which found the faster kernel.

    Parameters
    ----------
    log_dir : Path
        Log folder of a search, its control inside.
    family : str, optional
        Kernel family; the first one of the log by default.
    rounds : int
        Measurements of each.
    workers : Workers, optional
        Processes of a search for the target.
    limit_s : float
        After so many seconds of measuring there are no more rounds than three.

    Returns
    -------
    dict
        By ``"untuned"`` and the names of the strategies.

    Raises
    ------
    ValueError
        When this machine is not the log's target, or a strategy found no correct candidate.
    RuntimeError
        When a kernel does not build or is wrong.
    """
    logs = list(find_logs(Path(log_dir)))
    run = read_run(Path(log_dir))
    problem, target = AttentionProblem.from_json(run["problem"]), parse_target(run["target"])
    reason = target.can_run_here() if workers is None or workers.fleet is None else None
    if reason is not None:
        raise ValueError(f"{log_dir} must be measured on its target {target.folder}: {reason}")
    family = family or next(iter(run["families"]))
    contestants = {"untuned": KernelSpec.untuned(family, problem, target)}
    for log in sorted(logs, key=lambda log: len(log.parts)):  # the search before its controls
        best = best_candidates([log], family, target)
        if not best:
            raise ValueError(f"{log} holds no correct candidate of the {family} family")
        contestants[read_run(log)["strategy"]] = best[0][1].kernel
    with ProcessMeter(problem, target, workers=workers) as meter:
        outcomes = meter.compare(list(contestants.values()), rounds, limit_s)
    latencies = {}
    for name, outcome in zip(contestants, outcomes, strict=True):
        if outcome.latency_us is None:
            raise RuntimeError(f"the {name} kernel of {log_dir}: {outcome.error}")
        latencies[name] = outcome.latency_us
    return latencies


def write_comparison(
    log_dir: Path,
    family: str | None = None,
    *,
    rounds: int = 15,
    workers: Workers | None = None,
    limit_s: float = math.inf,
) -> dict[str, Any]:
    """What :func:`compare_strategies` finds, written to the log folder of the search.

    The file is ``comparison.json``, and ``comparison-<family>.json`` for families but the log's first.

    Returns
    -------
    dict
        ``"date"``, ``"family"``, ``"rounds"``, ``"trials"`` of each strategy and ``"latency_us"``.
    """
    families = list(read_run(Path(log_dir))["families"])
    family = family or families[0]
    comparison = {
        "date": now(),
        "family": family,
        "rounds": rounds,
        "trials": {
            read_run(folder)["strategy"]: sum(
                m.kernel.family == family for m in comparable_measurements(folder)
            )
            for folder in find_logs(Path(log_dir))
        },
        "latency_us": compare_strategies(log_dir, family, rounds=rounds, workers=workers, limit_s=limit_s),
    }
    name = "comparison.json" if family == families[0] else f"comparison-{family}.json"
    (Path(log_dir) / name).write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    return comparison


def distill(
    log_root: Path = Path("autotune_logs"),
    *,
    target: MachineTarget | None = None,
    problems: Sequence[AttentionProblem] | None = None,
    schedules: Path | None = None,
    top: int = _TOP,
    rounds: int = _ROUNDS,
    report: Callable[[str], object] = lambda text: None,
    workers: Workers | None = None,
    limit_s: float = math.inf,
) -> list[ScheduleRecord]:
    """Measure the best candidates of each logged problem side by side, and write the winners to
    ``schedules/``.

    The record so far takes part: it is replaced by what is faster in the same comparison, and otherwise
    stays, with its latency of today.

    Parameters
    ----------
    log_root : Path
        Logs of the target are searched below it, random controls included.
    target : MachineTarget, optional
        This machine's; its CPU by default.
    problems : sequence of AttentionProblem, optional
        Only these.
    schedules : Path, optional
        Folder to write to; by default the one that dispatch reads.
    top : int
        Candidates to compare for each problem and kernel family.
    rounds : int
        Measurements of each.
    report : callable
        Told a line of text before each comparison, and what became of the record so far.
    workers : Workers, optional
        Processes of a search for the target, whose fleet measures if it has one.
    limit_s : float
        Time for all comparisons, after which each makes three rounds.

    Returns
    -------
    list of ScheduleRecord
        One for each problem and family that has a correct candidate, and one more where the fastest is not
        deterministic and another candidate is. Written one problem at a time, so
        that an interruption keeps what is done.

    Raises
    ------
    ValueError
        When the target is not this machine, or there is no log of it.
    RuntimeError
        When no candidate of a problem is correct any more.
    """
    target = parse_target("cpu") if target is None else target
    reason = target.can_run_here() if workers is None or workers.fleet is None else None
    if reason is not None:
        raise ValueError(f"logs must be distilled on their target {target.folder}: {reason}")
    log_root = Path(log_root)
    by_problem: dict[AttentionProblem, list[Path]] = {}
    for log, run in readable_logs(log_root / target.folder):
        problem = AttentionProblem.from_json(run["problem"])
        if problems is None or problem in problems:
            by_problem.setdefault(problem, []).append(log)
    if not by_problem:
        raise ValueError(f"no log of a search for {target.folder} under {log_root}; run `spattn tune` first")
    records = []
    with ExitStack() as owned:
        if workers is None:
            workers = owned.enter_context(Workers(target))
        known = load_records(target.folder, schedules)
        until = time.monotonic() + limit_s
        work = [
            (problem, logs, family)
            for problem, logs in by_problem.items()
            for family in family_names()
            if has_space(family, problem.direction)
            and any(family in read_run(log)["families"] for log in logs)
        ]
        for position, (problem, logs, family) in enumerate(work):
            report(f"{problem.key}: comparing the best {family} candidates")
            before = [
                record for record in known if record.problem == problem and record.kernel.family == family
            ]
            share_s = max(0.0, until - time.monotonic()) / (len(work) - position)
            searched = [log for log in logs if family in read_run(log)["families"]]
            found = _distill_family(
                searched, log_root, family, problem, target, top, rounds, share_s, workers, before, report
            )
            save_records(found, schedules)
            records += found
    return records
