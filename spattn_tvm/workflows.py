"""What the ``spattn`` command does, as functions: their results are values, their progress is told to a
callback.

The command line reads texts, calls these and prints what comes back.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .dispatch import Explanation
from .dispatch import explain as explain_dispatch
from .problem import AttentionProblem
from .store import ScheduleRecord
from .target import MachineTarget, parse_target
from .tuning.budget import TimePlan
from .tuning.distill import distill as distill_logs
from .tuning.distill import write_comparison
from .tuning.fleet import Fleet
from .tuning.log import log_folder, read_run
from .tuning.search import Deadline, DefaultFailedError, SearchProgress, SearchSettings, TuningResult
from .tuning.search import tune as search
from .tuning.workers import Workers
from .verify import Verification, kernels_of_records, verify

Report = Callable[[str], None]

# Seeds of NumPy and of the searches have 32 bits.
_LARGEST_SEED = 2**32 - 1


def _say_nothing(text: str) -> None:
    pass


def _listed(problems: AttentionProblem | Iterable[AttentionProblem]) -> list[AttentionProblem]:
    found = [problems] if isinstance(problems, AttentionProblem) else list(problems)
    if not found:
        raise ValueError("give at least one problem, got none")
    return found


def _target(target: MachineTarget | str) -> MachineTarget:
    return parse_target(target) if isinstance(target, str) else target


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` found.

    Attributes
    ----------
    results : tuple of TuningResult
        Of each search, in the order in which they ran; none of one whose default failed.
    comparisons : tuple of dict
        With `control`: what the searches of each problem and family found, timed in turns, in microseconds
        (``"latency_us"``).
    records : tuple of ScheduleRecord
        The winners that went to the schedules.
    verification : Verification or None
        The winners on random problems; None where that was not asked for or they don't run here.
    failures : tuple of str
        What went wrong, a line each; the rest was done all the same.
    interrupted : bool
        Ctrl-C ended it: the same call goes on from there.
    """

    results: tuple[TuningResult, ...]
    comparisons: tuple[dict[str, Any], ...]
    records: tuple[ScheduleRecord, ...]
    verification: Verification | None
    failures: tuple[str, ...]
    interrupted: bool


@dataclass
class _Findings:
    """What a call of :func:`tune` has found so far."""

    report: Report
    results: list[TuningResult] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    records: list[ScheduleRecord] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def search(
        self,
        problem: AttentionProblem,
        machine: MachineTarget,
        settings: SearchSettings,
        progress: bool | Callable[[SearchProgress], None],
        workers: Workers,
        deadline: Deadline | None,
    ) -> str | None:
        """Search a problem; returns why that ended, or None when the default failed."""
        try:
            result = search(problem, machine, settings, progress=progress, workers=workers, deadline=deadline)
        except DefaultFailedError as error:
            self.failures.append(f"{problem.key}: {error}")
            self.report(self.failures[-1])
            return None
        self.results.append(result)
        self.failures += [f"{problem.key}: {text}" for text in result.failures.values()]
        self.report(_described(result))
        return result.ended

    def distill(
        self,
        problem: AttentionProblem,
        machine: MachineTarget,
        log_root: Path,
        schedules: Path | None,
        workers: Workers,
        ends: float,
    ) -> None:
        """Put the winners of a problem into the schedules, until ``time.monotonic()`` is at `ends`."""
        try:
            self.records += distill_logs(
                log_root,
                target=machine,
                problems=[problem],
                schedules=schedules,
                report=self.report,
                workers=workers,
                limit_s=ends - time.monotonic(),
            )
        except RuntimeError as error:
            self.failures.append(f"{problem.key}: {error}")

    def tuning(self, verification: Verification | None, interrupted: bool) -> Tuning:
        return Tuning(
            tuple(self.results),
            tuple(self.comparisons),
            tuple(self.records),
            verification,
            tuple(self.failures),
            interrupted,
        )


def _described(result: TuningResult) -> str:
    found = (
        "none was correct"
        if result.kernel is None
        else f"{result.latency_us:,.1f} us with {result.kernel.family}, {result.kernel.decisions}"
    )
    failed = f"{result.errors} failed" + (f", {result.spilling} spill" if result.spilling else "")
    return f"best of {result.trials} trials ({failed}): {found}; log in {result.log_dir}"


def _compared(log_dir: Path, workers: Workers, limit_s: float, report: Report) -> list[dict[str, Any]]:
    sampled = read_run(log_dir / "random")["families"]
    families = [name for name in read_run(log_dir)["families"] if name in sampled]
    found = []
    for family in families:
        comparison = write_comparison(log_dir, family, workers=workers, limit_s=limit_s / len(families))
        latencies = comparison["latency_us"]
        shown = ", ".join(f"{name} {latency_us:,.1f} us" for name, latency_us in latencies.items())
        report(f"{family}, timed in turns: {shown}")
        found.append(comparison)
    return found


def described_record(record: ScheduleRecord) -> str:
    """A record in one line: its problem, latency and kernel."""
    spent = f" ({record.resources})" if record.resources else ""
    kernel = f"{record.kernel.family}, {record.kernel.decisions}"
    return f"{record.problem.key}: {record.latency_us:,.1f} us with {kernel}{spent}"


def tune(
    problems: AttentionProblem | Iterable[AttentionProblem],
    target: MachineTarget | str = "cpu",
    *,
    trials: int | None = None,
    minutes: float | None = None,
    strategy: str = "evolutionary",
    control: bool = False,
    families: Sequence[str] | None = None,
    fleet: Fleet | None = None,
    seed: int = 0,
    log_root: Path | str = "autotune_logs",
    distill: bool = True,
    verify_problems: int = 20,
    schedules: Path | None = None,
    report: Report = _say_nothing,
    progress: bool | Callable[[SearchProgress], None] = False,
) -> Tuning:
    """Search the fastest decisions for problems, compare the best, put the winners into the schedules and
    check them.

    Parameters
    ----------
    problems : AttentionProblem or iterable of them
    target : MachineTarget or str
        As the command line writes it, such as ``"cuda"``; where no `fleet` measures, this machine's.
    trials : int, optional
        Of each search, of which there is one for each problem and kernel family, and as many for the
        control; 64 when `minutes` is not given either.
    minutes : float, optional
        For everything together, comparisons and checks included, in place of `trials`.
    strategy : {"evolutionary", "random"}
        ``random`` samples the same space without a cost model.
    control : bool
        Search a second time at random, and compare what the two found.
    families : sequence of str, optional
        Kernel families to search, all that run on the target by default.
    fleet : Fleet, optional
        Servers that measure instead of this machine.
    seed : int
    log_root : path
        Folder of the logs; a search goes on where its log ended.
    distill : bool
        Put the winners into `schedules`, where the next call finds them.
    verify_problems : int
        Check each winner on so many random problems, if it runs here; 0: don't.
    schedules : Path, optional
        Folder for the winners; the one that dispatch reads by default.
    report : callable
        Called with each line that the command prints.
    progress : bool or callable
        Whether to show a progress bar (extra ``tune``); or a function that gets each
        :class:`~spattn_tvm.tuning.search.SearchProgress`.

    Raises
    ------
    ValueError
        For arguments that make no sense, a target that is not this machine, a problem no family supports.
    RuntimeError
        When what a search needs is not installed (says how to get it), or no server is left.

    Examples
    --------
    >>> import spattn_tvm
    >>> layout = spattn_tvm.BandLayout.spattention(16)
    >>> problem = spattn_tvm.AttentionProblem("forward", "float32", 1, 16, 16, 4096, 64, layout)
    >>> spattn_tvm.tune(problem, minutes=5, report=print).records[0].latency_us  # doctest: +SKIP
    """
    problems, machine = _listed(problems), _target(target)
    settings = SearchSettings(trials, minutes, strategy, families, seed, log_root, schedules)
    strategies = [strategy, "random"] if control and strategy != "random" else [strategy]
    reason = machine.can_run_here() if fleet is None else None
    if reason is not None:
        raise ValueError(
            f"a search must run on its target {machine.folder}, or on a fleet's servers: {reason}"
        )
    log_root = Path(log_root)
    plan = None
    if minutes is not None:
        plan = TimePlan(60 * minutes, verify_problems * len(problems), distill, control)
        settings = replace(settings, minutes=minutes / (len(problems) * len(strategies)))

    found = _Findings(report)
    with Workers(machine, fleet=fleet) as workers:
        for position, problem in enumerate(problems):
            ends = math.inf if plan is None else plan.problem_ends(len(problems) - position)
            for done, asked in enumerate(strategies):
                report(f"{problem.key} on {machine.folder}, {asked}")
                deadline = None if plan is None else plan.search_ends(ends, len(strategies) - done)
                ended = found.search(
                    problem, machine, replace(settings, strategy=asked), progress, workers, deadline
                )
                if ended == "interrupted":
                    report("interrupted: the same command goes on from here")
                    return found.tuning(None, interrupted=True)
                if ended is None:  # the other problems are still tuned
                    break
            else:
                if control:
                    left_s = (ends - time.monotonic()) / (2 if distill else 1)
                    logs = log_folder(log_root, machine, problem, "evolutionary")
                    found.comparisons += _compared(logs, workers, left_s, report)
                if distill:
                    found.distill(problem, machine, log_root, schedules, workers, ends)
    for record in found.records:
        report(described_record(record))
    verification = None
    if verify_problems and found.records and machine.can_run_here() is None:
        kernels = kernels_of_records(found.records)
        limit_s = math.inf if plan is None else plan.left_s
        verification = verify(
            machine, verify_problems * len(kernels), seed=seed, kernels=kernels, limit_s=limit_s
        )
        found.failures += verification.failures
        passed, failed = verification.passed, len(verification.failures)
        report(f"verified on random problems: {passed} passed, {failed} failed")
    for failure in found.failures:
        report(failure)
    return found.tuning(verification, interrupted=False)


def explain(
    problem: AttentionProblem, target: MachineTarget | str = "cpu", *, deterministic: bool = False
) -> Explanation:
    """Which kernel would serve a problem on a target, and why. Compiles and loads nothing.

    Parameters
    ----------
    problem : AttentionProblem
    target : MachineTarget or str
        This machine's or any other, such as ``"cuda"`` or ``"sm_90a"``.
    deterministic : bool
        Only kernels whose results are bitwise reproducible.

    Raises
    ------
    ValueError, RuntimeError
        As :func:`~spattn_tvm.target.parse_target` does.

    Examples
    --------
    >>> import spattn_tvm
    >>> layout = spattn_tvm.BandLayout.spattention(16)
    >>> problem = spattn_tvm.AttentionProblem("forward", "float32", 1, 16, 16, 4096, 64, layout)
    >>> spattn_tvm.explain(problem, "x86-64-v3").family
    'cpu'
    """
    return explain_dispatch(problem, _target(target), deterministic)


def benchmark(
    problems: AttentionProblem | Iterable[AttentionProblem],
    *,
    steps: Sequence[str] = ("forward", "forward_backward"),
    documents: int = 1,
    deterministic: bool = False,
    peers: Sequence[str] | None = None,
    device: str = "cpu",
    rounds: int = 15,
    budget_s: float = 60.0,
    idle_ms: float = 80.0,
    threads: int | None = None,
    seed: int | None = None,
    report: Report = _say_nothing,
) -> dict[str, Any]:
    """Check ours and its peers against float64, then time them in turns on the same inputs.

    Parameters
    ----------
    problems : AttentionProblem or iterable of them
        Of decoding, all of them or none; then `steps`, `documents`, `deterministic` and `budget_s` say
        nothing. Otherwise `steps` says what is timed, not their direction.
    steps : sequence of {"forward", "backward", "forward_backward"}
    documents : int
        Packed into each row, of lengths as 1 to 2 to 3 and so on.
    deterministic : bool
        Only what gives the same bits twice.
    peers, device, rounds, budget_s, idle_ms, threads, seed, report
        As :func:`spattn_tvm.bench.run.benchmark` takes them; `budget_s` and `idle_ms` in seconds and ms.

    Returns
    -------
    dict
        JSON-ready, as :mod:`spattn_tvm.bench.run` describes it (of decoding, :mod:`spattn_tvm.bench.decode`).
        Files of it are written by ``write_report`` and drawn by :mod:`spattn_tvm.plotting`.

    Raises
    ------
    ValueError
        For an unknown step, peer or device, or problems of decoding among others.
    """
    problems = _listed(problems)
    decoding = {problem.direction == "decode" for problem in problems}
    if len(decoding) > 1:
        raise ValueError("problems of decoding are benchmarked alone: call it once for them, once for others")
    seed = random.randrange(_LARGEST_SEED) if seed is None else seed
    if decoding == {True}:
        from .bench.decode import benchmark_decode

        return benchmark_decode(
            problems,
            peers=peers,
            device=device,
            rounds=rounds,
            idle_ms=idle_ms,
            threads=threads,
            seed=seed,
            report=report,
        )
    from .bench.case import Case
    from .bench.run import benchmark as benchmark_cases

    return benchmark_cases(
        [Case.packed(problem, documents, deterministic) for problem in problems],
        steps=steps,
        peers=peers,
        device=device,
        rounds=rounds,
        budget_s=budget_s,
        idle_ms=idle_ms,
        threads=threads,
        seed=seed,
        report=report,
    )
