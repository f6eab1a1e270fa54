"""The search for a problem's best decisions: propose, build, check, time, record, learn, until the budget
is spent."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spattn_tvm.build.resources import SPILL_TOLERANCE_BYTES, spilled_bytes
from spattn_tvm.extras import install_hint, missing_packages
from spattn_tvm.families import families_for, find_space, has_space, resolve_family
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.families.space import Space
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget

from .log import Measurement, TuningLog, log_folder, session_device, versions
from .measure import Meter, Outcome, ProcessMeter
from .workers import Workers

if TYPE_CHECKING:
    from .strategy import DecisionSearch

STRATEGIES = ("evolutionary", "random")

# Small batches let the cost model learn often; there is no point in fewer candidates than builders.
_LEAST_BATCH = 8
# Random sampling of a space that is nearly exhausted keeps hitting what it has seen.
_MOST_STALE_BATCHES = 25
# All latencies are relative to the default's. When it runs this much faster than when it was timed, for so
# many measurements in a row, other programs were busy then: it is timed again.
_RECOVERED = 0.87
_RECOVERED_FOR = 3
# What a second timing must gain, or the machine is as busy as it was.
_WORTH_RETAKING = 0.92
RETAKEN = "retaken"

# A kernel, and what the strategy knows it by.
_Proposal = tuple[KernelSpec, Any]


class DefaultFailedError(RuntimeError):
    """Not even a family's untuned default builds, runs and is correct, so no candidate is tried."""


@dataclass(frozen=True)
class TuningResult:
    """What a search found.

    Attributes
    ----------
    kernel, latency_us
        The fastest correct candidate of the log folder, this session's or an earlier one's; None without any.
    log_dir : Path
    trials, errors : int
        Candidates measured, and those of them that failed, over all sessions.
    ended : str
        ``"budget"``, ``"exhausted"`` (nothing new left in the space) or ``"interrupted"``.
    failures : dict[str, str]
        Families that could not be searched, and why.
    spilling : int
        Correct candidates that spill registers, by what ptxas said; only known for CUDA.
    """

    kernel: KernelSpec | None
    latency_us: float | None
    log_dir: Path
    trials: int
    errors: int
    ended: str
    failures: dict[str, str] = field(default_factory=dict)
    spilling: int = 0


@dataclass
class Budget:
    """Trials for each family, or minutes for all; earlier sessions of the log folder count."""

    trials: int | None
    minutes: float | None

    def __post_init__(self) -> None:
        if (self.trials is None) == (self.minutes is None):
            raise ValueError(
                f"give either trials or minutes, got trials={self.trials} and minutes={self.minutes}"
            )
        for name, value in (("trials", self.trials), ("minutes", self.minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class SearchSettings:
    """How to search; whatever the problem and the target.

    Parameters
    ----------
    trials : int, optional
        Candidates to measure for each family, failed ones included; 64 when `minutes` is not given either.
    minutes : float, optional
        Search time for all families together, in equal shares, instead of `trials`.
    strategy : {"evolutionary", "random"}
        ``"random"`` samples the same space without learning: the control. It is logged in a folder of its
        own.
    families : sequence of str, optional
        Kernel families to search, all that apply by default. ``module:ATTRIBUTE`` names a
        :class:`~spattn_tvm.families.family.Family` outside this package, which is then registered.
    seed : int
        Of the search and of the random data.
    log_root : path
        Logs go to ``<log_root>/<target folder>/<problem key>/``.
    schedules : Path, optional
        Records whose kernels an evolutionary search measures right after the default, with the best of the
        logs of kin chips and of neighbouring problems; by default those that dispatch reads.

    Raises
    ------
    ValueError
        For trials and minutes together, one that is not positive, or an unknown strategy.
    """

    trials: int | None = None
    minutes: float | None = None
    strategy: str = "evolutionary"
    families: Sequence[str] | None = None
    seed: int = 0
    log_root: Path | str = "autotune_logs"
    schedules: Path | None = None
    budget: Budget = field(init=False, repr=False)

    def __post_init__(self) -> None:
        trials = 64 if self.trials is None and self.minutes is None else self.trials
        object.__setattr__(self, "budget", Budget(trials, self.minutes))
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")


@dataclass
class _Interrupt:
    """Turns the first Ctrl-C into a flag; the second one is Python's own."""

    requested: bool = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        previous = signal.getsignal(signal.SIGINT)

        def handle(number: int, frame: Any) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, previous)

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


@dataclass(frozen=True)
class SearchProgress:
    """How far a search is.

    Attributes
    ----------
    search : str
        Direction and kernel family.
    done, total : float
        Trials, or seconds where the budget is a time.
    trials : str
        Trials done, in words.
    best_us : float or None
        Latency of the best so far in microseconds.
    """

    search: str
    done: float
    total: float
    trials: str
    best_us: float | None


class _Progress:
    """A line with trials done, best so far and time left, or a function that is told; silent when told so."""

    def __init__(self, shown: bool | Callable[[SearchProgress], None]) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._tell = None if isinstance(shown, bool) else shown
        self._search, self._total = "", 0.0
        if shown is True:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            self._bar = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=12),
                TextColumn("{task.fields[trials]}", table_column=Column(no_wrap=True)),
                TextColumn("best {task.fields[best]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(elapsed_when_finished=True),
            )

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, description: str, total: float, done: float) -> None:
        self._search, self._total = description, total
        if self._bar is not None:
            self._task = self._bar.add_task(description, total=total, completed=done, trials="0", best="—")

    def update(self, done: float, trials: str, best_us: float | None) -> None:
        if self._tell is not None:
            self._tell(SearchProgress(self._search, done, self._total, trials, best_us))
        if self._bar is not None:
            best = "—" if best_us is None else f"{best_us:,.1f} us"
            self._bar.update(self._task, completed=done, trials=trials, best=best)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)


# From what is measured so far, the time (time.monotonic) at which a search must have ended.
Deadline = Callable[[Sequence[Measurement]], float]


@dataclass
class _Session:
    """One call of :func:`tune`: the log, the budget and the clock that all families share."""

    log: TuningLog
    budget: Budget
    stopped: Callable[[], bool]
    progress: _Progress
    deadline: Deadline = lambda measured: math.inf
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._earlier_s = self.log.elapsed_s
        self._until_s = self._limit_s

    @property
    def _limit_s(self) -> float:
        """The search time of the log folder at which it ends."""
        minutes = math.inf if self.budget.minutes is None else self.budget.minutes
        left_s = self.deadline(self.log.measurements) - time.monotonic()
        return min(60 * minutes, self.elapsed_s + left_s)

    def allot(self, families: int) -> None:
        """Let the next one of so many families have its share of the time that is left."""
        elapsed_s = self.elapsed_s
        self._until_s = elapsed_s + max(0.0, self._limit_s - elapsed_s) / families

    @property
    def elapsed_s(self) -> float:
        return self._earlier_s + time.monotonic() - self.began

    def out_of_time(self) -> bool:
        return self.elapsed_s >= min(self._until_s, self._limit_s)

    def of_family(self, family: str, code: str) -> list[Measurement]:
        return [m for m in self.log.measurements if m.kernel.family == family and m.code == code]

    def begin(self, family: str, direction: str, code: str) -> None:
        """Show how far the search of a family is."""
        if self.budget.minutes is None:
            extent = float(self.budget.trials or 0), float(len(self.of_family(family, code)))
        else:
            extent = 60.0 * self.budget.minutes, self.elapsed_s
        self.progress.begin(f"{family} {direction}", *extent)

    def note(self, kernel: KernelSpec, code: str, outcome: Outcome) -> None:
        self.log.append(
            Measurement(
                kernel,
                code,
                outcome.latency_us,
                outcome.error,
                round(self.elapsed_s, 3),
                round(outcome.slowdown, 4),
                outcome.resources,
                outcome.server,
            )
        )

    def show(self, family: str, code: str) -> None:
        measured = self.of_family(family, code)
        failed = sum(m.error is not None for m in measured)
        of = "" if self.budget.trials is None else f"/{self.budget.trials}"
        text = f"{len(measured)}{of}" + (f", {failed} failed" if failed else "")
        done = len(measured) if self.budget.trials is not None else self.elapsed_s
        self.progress.update(done, text, _best_us(measured))


def _best_us(measured: Sequence[Measurement]) -> float | None:
    return min((m.latency_us for m in measured if m.latency_us is not None), default=None)


def run_search(
    search: DecisionSearch,
    meter: Meter,
    session: _Session,
    code: str,
    first: KernelSpec,
    first_alone: bool = True,
    also: Sequence[KernelSpec] = (),
) -> str:
    """Search one family until the budget is spent; returns why it ended.

    That is :data:`RETAKEN` when the default was found to have been timed on a busy machine: the log then
    states all latencies anew, and what `search` has learnt is of no use.

    Parameters
    ----------
    code : str
        Identifies the kernel code; what other code measured does not count.
    first : KernelSpec
        The untuned default. It is always measured, so that the result is never slower.
    first_alone : bool
        Whether it is measured before all others, which on a CPU are timed against it. On a GPU the other
        builders would have nothing to do meanwhile, for as long as each later batch takes.
    also : sequence of KernelSpec
        Measured right after the default: the default with deterministic results, what did well elsewhere.

    Raises
    ------
    DefaultFailedError
        When even the default fails.
    """
    family = first.family
    known = {m.kernel: m.latency_us for m in session.of_family(family, code)}
    batch_size = max(_LEAST_BATCH, getattr(meter, "builders", 1))

    def ask() -> list[_Proposal] | None:
        proposed = search.ask()
        if proposed is None:
            return None
        return [(replace(first, decisions=decisions), candidate) for decisions, candidate in proposed]

    recovered = 0
    search.start(batch_size)
    search.restore([(dict(kernel.decisions), latency) for kernel, latency in known.items()])
    stale = 0
    early = [(kernel, search.candidate(kernel.decisions)) for kernel in (first, *also)]
    proposed: list[_Proposal] | None
    if first in known:
        proposed, early = early, []
    elif first_alone:
        proposed, early = early[:1], early[1:]
    else:
        with_first = ask() or []
        proposed, early = [*early, *with_first[: max(0, batch_size - len(early))]], []
    while True:
        left = None if session.budget.trials is None else session.budget.trials - len(known)
        if (left is not None and left <= 0) or (known and session.out_of_time()):
            return "budget"
        if session.stopped():
            return "interrupted"
        if proposed is None or stale > _MOST_STALE_BATCHES:
            return "exhausted"

        fresh = _unmeasured(proposed, known)[:left]
        stale = 0 if fresh else stale + 1

        told = []
        best_us = _best_us(session.of_family(family, code))
        usual_us = known.get(first)
        anchor = None if usual_us is None else (first, usual_us)
        # The only reference to what is measured: when the loop is left, it ends.
        for arrived in _default_first(
            meter.measure([kernel for kernel, _ in fresh], best_us, anchor),
            fresh,
            None if first in known else first,
        ):
            for (kernel, candidate), outcome in arrived:
                session.note(kernel, code, outcome)
                search.keep(candidate, outcome.latency_us)
                known[kernel] = outcome.latency_us
                told.append((candidate, outcome.latency_us))
                if anchor is not None and outcome.error is None:
                    recovered = recovered + 1 if outcome.slowdown < _RECOVERED else 0
            session.show(family, code)
            if session.out_of_time():
                break
        search.tell([candidate for candidate, _ in told], [latency for _, latency in told])
        if session.stopped():
            return "interrupted"
        if recovered >= _RECOVERED_FOR and usual_us is not None:
            recovered = 0
            if _retake_default(first, usual_us, meter, session, code):
                return RETAKEN
        if not session.out_of_time():
            proposed, early = (early, []) if early else (ask(), [])


def _unmeasured(proposed: Sequence[_Proposal], known: Container[KernelSpec]) -> list[_Proposal]:
    """Those that are not known, each once: random sampling may repeat itself, and a resumed search proposes
    what an earlier session measured.
    """
    fresh: dict[KernelSpec, Any] = {}
    for kernel, candidate in proposed:
        if kernel not in known:
            fresh.setdefault(kernel, candidate)
    return list(fresh.items())


def _default_first(
    outcomes: Iterable[tuple[int, Outcome]], measured: Sequence[_Proposal], first: KernelSpec | None
) -> Iterator[list[tuple[_Proposal, Outcome]]]:
    """Outcomes as they come, but `first` before all others, which wait for it: it is the first line of a log,
    relative to which its curve is drawn.

    Raises
    ------
    DefaultFailedError
        When that one failed.
    """
    waiting: list[tuple[_Proposal, Outcome]] = []
    for position, outcome in outcomes:
        kernel, _ = measured[position]
        waiting.append((measured[position], outcome))
        if first is not None:
            if kernel != first:
                continue
            if outcome.error is not None:
                # The compiler, the device or the kernel's code is at fault, not this candidate. Failures
                # that such a session logged would never be measured again.
                raise DefaultFailedError(f"the untuned default of {first.family} fails: {outcome.error}")
            waiting = [waiting[-1], *waiting[:-1]]
            first = None
        yield waiting
        waiting = []


def _retake_default(first: KernelSpec, usual_us: float, meter: Meter, session: _Session, code: str) -> bool:
    """Time the default again; if it is faster by enough, state all latencies of the log anew."""
    for _, outcome in meter.measure([first], None):
        if outcome.latency_us is not None and outcome.latency_us < _WORTH_RETAKING * usual_us:
            session.log.rescale(first, code, outcome.latency_us)
            session.progress.say(
                f"the default took {usual_us:,.1f} us on a busy machine and takes "
                f"{outcome.latency_us:,.1f} us now: all latencies are stated anew"
            )
            return True
    return False


@dataclass
class _Searches:
    """The searches of one call of :func:`tune`, of a family each, over one log and its database."""

    problem: AttentionProblem
    target: MachineTarget
    settings: SearchSettings
    session: _Session
    interrupt: _Interrupt
    workers: Workers

    def run(self, family: str, space: Space) -> str:
        """Search a family; returns why it ended, as `run_search` does.

        Raises
        ------
        DefaultFailedError
            When even the default fails.
        """
        from .strategy import kernel_hash, workload_hash
        from .warm_start import warm_starts

        problem, target, settings, session = self.problem, self.target, self.settings, self.session
        code = kernel_hash(space, problem, target)
        session.log.note_family(family, {"workload_hash": workload_hash(problem), "kernel": code})
        search = self._open(family, code)
        session.log.drop_what_is_not_offered(code, family, search.offers)
        session.begin(family, problem.direction, code)

        def stopped() -> bool:
            # The default at least is measured, however little time there is.
            late = session.out_of_time() and bool(session.of_family(family, code))
            return self.interrupt.requested or late

        first = KernelSpec.untuned(family, problem, target)
        early = [KernelSpec.untuned(family, problem, target, deterministic=True)]
        if settings.strategy == "evolutionary":
            early += warm_starts(family, problem, target, Path(settings.log_root), settings.schedules)
        alone = target.kind == "cpu"
        with ProcessMeter(
            problem, target, seed=settings.seed, stopped=stopped, workers=self.workers
        ) as meter:
            while True:
                try:
                    ended = run_search(search, meter, session, code, first, alone, early)
                finally:
                    search.close()
                if ended != RETAKEN:
                    return ended
                self.rewrite_database(family)
                search = self._open(family, code)

    def rewrite_database(self, current: str = "") -> None:
        """The database from the measurements of all families; the current one's search adds its own."""
        from .strategy import forget_database

        problem, session = self.problem, self.session
        forget_database(session.log.folder)
        for family, facts in session.log.run["families"].items():
            if family == current or not has_space(family, problem.direction):
                continue
            space = find_space(family, problem.direction)
            if space.unsupported(problem.head_dim, problem.dtype, self.target) is not None:
                continue
            search = self._open(family, facts["kernel"])
            search.record(
                [
                    (dict(m.kernel.decisions), m.latency_us)
                    for m in session.of_family(family, facts["kernel"])
                    if search.offers(m.kernel.decisions)
                ]
            )

    def _open(self, family: str, code: str) -> DecisionSearch:
        from .strategy import DecisionSearch

        space, settings = find_space(family, self.problem.direction), self.settings
        folder = self.session.log.folder
        return DecisionSearch(
            space, self.problem, self.target, folder, settings.strategy, settings.seed, code
        )


def _supporting_spaces(
    problem: AttentionProblem, target: MachineTarget, families: Sequence[str] | None
) -> dict[str, Space]:
    names = families_for(target, problem) if families is None else tuple(families)
    spaces, refused = {}, []
    for reference in names:
        name = resolve_family(reference).name
        space = find_space(name, problem.direction)
        why = space.unsupported(problem.head_dim, problem.dtype, target)
        if why is None:
            spaces[name] = space
        else:
            refused.append(f"{name}: {why}")
    if not spaces or (families is not None and refused):
        raise ValueError(
            f"no kernel family to search for {problem.key} on {target.folder}; "
            + ("; ".join(refused) or "none is installed for this target")
        )
    return spaces


def _result(log: TuningLog, session: _Session, ended: str, failures: dict[str, str]) -> TuningResult:
    current = [
        m for name, facts in log.run["families"].items() for m in session.of_family(name, facts["kernel"])
    ]
    best = min(
        (m for m in current if m.latency_us is not None), key=lambda m: m.latency_us or 0.0, default=None
    )
    return TuningResult(
        kernel=best.kernel if best else None,
        latency_us=best.latency_us if best else None,
        log_dir=log.folder,
        trials=len(current),
        errors=sum(m.error is not None for m in current),
        ended=ended,
        failures=failures,
        spilling=sum(m.error is None and spilled_bytes(m.resources) > SPILL_TOLERANCE_BYTES for m in current),
    )


def tune(
    problem: AttentionProblem,
    target: MachineTarget,
    settings: SearchSettings | None = None,
    *,
    progress: bool | Callable[[SearchProgress], None] = True,
    workers: Workers | None = None,
    deadline: Deadline | None = None,
) -> TuningResult:
    """Search for the fastest decisions of a problem on this machine, or on a fleet's servers.

    Calling it again with the same arguments resumes: what the log folder holds is not measured again and
    counts towards the budget. Ctrl-C ends the search after the measurement in flight was dropped, and the
    best so far is returned.

    Parameters
    ----------
    problem : AttentionProblem
        Candidates run on random data of its shape and with its layout's band table.
    target : MachineTarget
        This machine's, or that of the fleet's servers.
    settings : SearchSettings, optional
        64 trials for each family by default.
    progress : bool or callable
        Whether to show a progress bar; or what is told how far the search is.
    workers : Workers, optional
        Processes that several searches for the target share; ``Workers(target, fleet=…)`` measures on a
        fleet.
    deadline : callable, optional
        Given the measurements so far, the ``time.monotonic()`` at which the search ends whatever the settings
        leave.

    Returns
    -------
    TuningResult

    Raises
    ------
    ValueError
        When the target is not this machine, or no family supports the problem.
    RuntimeError
        When TVM or xgboost is missing, or not even one family's untuned default builds, runs and is correct,
        or the fleet has no server left, or another process is searching the same problem with the same logs.
    """
    settings = SearchSettings() if settings is None else settings
    fleet = None if workers is None else workers.fleet
    reason = target.can_run_here() if fleet is None else None
    if reason is not None:
        raise ValueError(f"a search must run on its target {target.folder}: {reason}")
    spaces = _supporting_spaces(problem, target, settings.families)
    missing = missing_packages("tvm", "xgboost", *(("rich",) if progress is True else ()))
    if missing:
        raise RuntimeError(f"a search needs {' and '.join(missing)}: {install_hint('tune')}")

    folder = log_folder(Path(settings.log_root), target, problem, settings.strategy)
    interrupt = _Interrupt()
    failures: dict[str, str] = {}
    with (
        TuningLog(folder, problem, target, settings.strategy) as log,
        interrupt.watching(),
        _Progress(progress) as bar,
        ExitStack() as owned,
    ):
        if workers is None:
            workers = owned.enter_context(Workers(target))
        session = _Session(
            log, settings.budget, lambda: interrupt.requested, bar, deadline or (lambda measured: math.inf)
        )
        device = session_device(target) if fleet is None else {"name": f"servers of {fleet.key}"}
        log.begin_session({"seed": settings.seed, "versions": versions(), "device": device})
        ended = "failed"
        searches = _Searches(problem, target, settings, session, interrupt, workers)
        try:
            searches.rewrite_database()
            for position, (family, space) in enumerate(spaces.items()):
                session.allot(len(spaces) - position)
                try:
                    ended = searches.run(family, space)
                except DefaultFailedError as error:
                    failures[family] = str(error)
                if fleet is not None:
                    log.note_device({**workers.server_facts, "servers": sorted(workers.used_servers)})
                if ended == "interrupted":
                    break
            if len(failures) == len(spaces):
                raise DefaultFailedError("; ".join(failures.values()))
        finally:
            log.end_session(ended, session.elapsed_s)
        return _result(log, session, ended, failures)
