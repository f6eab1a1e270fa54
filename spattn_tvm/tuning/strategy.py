"""MetaSchedule as an ask-and-tell search over a space's decisions. The only module of this package that
needs TVM.

The traced program is the problem's workload (:mod:`spattn_tvm.tuning.workload`); its trace samples one
value for each decision of a structure and notes it on the workload's block, so that a trace is a set of
decisions and nothing else. MetaSchedule's evolutionary search, XGBoost model and JSON database do the
searching and the remembering. Its task scheduler is not used: it hands over a whole batch at a time, and a
search must be able to stop, record and resume after any single measurement.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
import xgboost
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule import _ffi_api
from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBConfig
from tvm.s_tir.meta_schedule.logging import get_logging_func

from spattn_tvm.families.space import Choices, Space, Structures
from spattn_tvm.file_reading import set_aside
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget

from .log import drop_torn_line
from .workload import DECISIONS_BLOCK, build_workload

STRATEGIES = ("evolutionary", "random")

# MetaSchedule's defaults suit spaces of millions of points and searches of thousands of trials. Each
# candidate costs about 0.5 ms of Python here, so a generation of 512 would take longer than measuring its
# winners.
_POPULATION = 128
_MEASURED_SHARE = 0.25
_GENERATIONS = 3
_RANDOM_SHARE = 0.1
_WARMUP_SAMPLES = 16
_DRAWS = 1000  # in which a legal candidate is found, or a structure has few that are left
# XGBModel weighs a sample by its score, best latency over latency, and so learns nothing from a failure
# that scores 0. Told that a failure is this much slower than the best, it learns where not to go.
_FAILURE_FACTOR = 2.5
_UNLIMITED = 1 << 20


def search_workload(problem: AttentionProblem, family: str, kernel: str) -> tvm.IRModule:
    """The problem's workload, marked with the kernel family and code that serve it: each is a task of its
    own."""
    function = build_workload(problem)[problem.direction].with_attr("global_symbol", "main")
    return tvm.IRModule(
        {"main": function.with_attr("spattn.family", family).with_attr("spattn.kernel", kernel)}
    )


def structural_digest(module: tvm.IRModule) -> str:
    """TVM's structural hash in hexadecimal: the same in every process, whatever the variables are called."""
    return f"{tvm_ffi.structural_hash(module) % 2**64:016x}"


def workload_hash(problem: AttentionProblem) -> str:
    """Identifies a problem's workload."""
    return structural_digest(build_workload(problem))


def kernel_hash(space: Space, problem: AttentionProblem, target: MachineTarget) -> str:
    """Identifies a kernel's code and its space, by its untuned kernels and the choices; 12 hexadecimal
    digits.

    Unlike a hash of the source text it does not change with a comment. Code that only other decisions reach
    does not enter it; results that such code has made stale are found when a log is distilled.
    """
    return _code_hash(space, problem.head_dim, problem.dtype, target)


@lru_cache(maxsize=64)
def _code_hash(space: Space, head_dim: int, dtype: str, target: MachineTarget) -> str:
    """Kept for the searches of one process, because a kernel takes seconds to write."""
    key = (head_dim, dtype, target)
    untuned = [decisions for asked in (False, True) for decisions in space.all_untuned(*key, asked)]
    distinct = {frozenset(decisions.items()): decisions for decisions in untuned}
    modules = [structural_digest(space.build(decisions, *key)) for decisions in distinct.values()]
    structures = [sorted(choices.items()) for choices in space.structures(head_dim, dtype).values()]
    return hashlib.sha256(" ".join(map(str, [*modules, *structures])).encode()).hexdigest()[:12]


def _sampled(trace: Any, structures: Structures) -> tuple[Choices, list[Any]]:
    """The choices that a trace samples, in this order, and the instructions that do."""
    samples, annotations = [], []
    for instruction in trace.insts:
        kind = instruction.kind.name
        if kind == "SampleCategorical":
            samples.append(instruction)
        elif kind == "Annotate" and len(structures) > 1 and not samples:
            annotations.append(instruction)
    if not annotations:
        (choices,) = structures.values()
    else:
        choices = list(structures.values())[int(annotations[0].inputs[1])]
    return choices, samples


def trace_decisions(trace: Any, structures: Structures) -> dict[str, int]:
    """The decisions that a trace made."""
    made = trace.decisions
    choices, samples = _sampled(trace, structures)
    return {
        name: int(values[int(made[sample])])
        for (name, values), sample in zip(choices.items(), samples, strict=True)
    }


def _sample_decisions(
    schedule: Schedule, structures: Structures, structure: str, given: Mapping[str, int] | None = None
) -> Schedule:
    """Sample each decision of a structure, or take the given one, and annotate the workload's block with it.

    Of several structures the block is first annotated with the number of this one.
    """
    block = schedule.get_sblock(DECISIONS_BLOCK)
    if len(structures) > 1:
        schedule.annotate(block, "spattn.structure", list(structures).index(structure))
    for name, values in structures[structure].items():
        index = None if given is None else tuple(values).index(given[name])
        value = schedule.sample_categorical(list(values), [1.0 / len(values)] * len(values), decision=index)
        schedule.annotate(block, f"spattn.{name}", value)
    return schedule


@tvm.ir.utils.derived_object
class _RejectIllegal(ms.postproc.PyPostproc):
    """Keeps a combination that the space calls illegal from ever being built."""

    def __init__(self, structures: Structures, illegal: Callable[[Mapping[str, int]], str | None]) -> None:
        super().__init__()
        self.structures = structures
        self.illegal = illegal

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        pass

    def apply(self, schedule: Schedule) -> bool:
        return self.illegal(trace_decisions(schedule.trace, self.structures)) is None

    def clone(self) -> _RejectIllegal:
        return _RejectIllegal(self.structures, self.illegal)


@tvm.ir.utils.derived_object
class _ChangeDecision(ms.mutator.PyMutator):
    """Changes one decision, or two at times, and never the structure; numbers move to a neighbouring value
    more often than far away."""

    def __init__(self, structures: Structures, random: np.random.Generator) -> None:
        super().__init__()
        self.structures = structures
        self.random = random

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        pass

    def apply(self, trace: Any, _: int) -> Any:
        choices, instructions = _sampled(trace, self.structures)
        samples = [
            (sample, len(values))
            for sample, values in zip(instructions, choices.values(), strict=True)
            if len(values) > 1
        ]
        if not samples:
            return None
        count = min(len(samples), 1 if self.random.random() < 0.75 else 2)
        for position in self.random.choice(len(samples), count, replace=False):
            sample, size = samples[position]
            old = int(trace.decisions[sample])
            if self.random.random() < 0.6:
                new = old + (1 if self.random.random() < 0.5 else -1)
                new = 1 if new < 0 else size - 2 if new >= size else new
            else:
                new = int(self.random.integers(size - 1))
                new += new >= old
            # with_decision drops what the postprocessors added; it takes a Python int only.
            trace = trace.with_decision(sample, int(new), remove_postproc=True)
        return trace

    def clone(self) -> _ChangeDecision:
        return _ChangeDecision(self.structures, self.random)


@tvm.ir.utils.derived_object
class _DecisionFeatures(ms.feature_extractor.PyFeatureExtractor):
    """One row for each candidate: the decisions themselves, those of other structures as missing values, then
    what the space derives from them."""

    def __init__(
        self, structures: Structures, derive: Callable[[Mapping[str, int]], Sequence[float]]
    ) -> None:
        super().__init__()
        self.structures = structures
        self.names = list(dict.fromkeys(name for choices in structures.values() for name in choices))
        self.derive = derive
        self.known: dict[tuple[float, ...], Any] = {}

    def extract_from(self, context: ms.TuneContext, candidates: Sequence[Any]) -> list[Any]:
        return [self._row(trace_decisions(candidate.sch.trace, self.structures)) for candidate in candidates]

    def _row(self, decisions: Mapping[str, int]) -> Any:
        # Generations share most of their members.
        key = tuple(decisions.get(name, math.nan) for name in self.names)
        if key not in self.known:
            row = np.asarray([[*key, *self.derive(decisions)]], dtype="float32")
            self.known[key] = tvm.runtime.tensor(row)
        return self.known[key]


@contextmanager
def _cost_model_settings(seed: int) -> Iterator[None]:
    """Random scores from a seed, and one thread.

    XGBModel draws its first scores from NumPy's global generator, and waking xgboost's threads takes longer
    than the work on a hundred candidates.
    """
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        with xgboost.config_context(nthread=1):
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _tune_context(
    module: tvm.IRModule, target: Any, generator: Any, strategy: Any, seed: int
) -> ms.TuneContext:
    """``ms.TuneContext(...)`` without its import of ``tvm.s_tir.tensor_intrin``, which takes 30 s and
    serves other spaces."""
    logger = logging.getLogger("spattn_tvm.tuning.metaschedule")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    context = ms.TuneContext.__new__(ms.TuneContext)
    context.__init_handle_by_constructor__(
        _ffi_api.TuneContext,
        module,
        target,
        generator,
        strategy,
        "main",
        1,  # threads: postprocessors and mutators are Python
        seed,
        get_logging_func(logger),
    )
    _ffi_api.TuneContextInitialize(context)
    return context


_DATABASE = ("database_workload.json", "database_tuning_record.json")


def forget_database(folder: Path) -> None:
    """Delete the database of a log folder: it follows from the measurements, and is written anew from them.

    To read one that is damaged ends the process: TVM takes an object where it expects a list for a pointer.
    """
    for name in _DATABASE:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            set_aside(path)
        path.unlink(missing_ok=True)


def open_database(folder: Path) -> Any:
    """The JSON database of a log folder, created when absent, without a line torn by a kill.

    Workloads and records name each other by line number, so a torn workload line, which can only be the
    last, is followed by no record of its own.
    """
    for name in _DATABASE:
        drop_torn_line(folder / name)
    return ms.database.JSONDatabase(work_dir=str(folder))


class DecisionSearch:
    """Proposes decisions, learns from their measured latencies and keeps each in the database.

    Parameters
    ----------
    space : Space
    problem : AttentionProblem
    target : MachineTarget
    folder : Path
        Holds the database's two files.
    strategy : {"evolutionary", "random"}
        ``"random"`` replays the trace with fresh samples: the control of the same space.
    seed : int
    kernel : str
        Identifies the kernel code; what other code measured is not learnt from.
    """

    def __init__(
        self,
        space: Space,
        problem: AttentionProblem,
        target: MachineTarget,
        folder: Path,
        strategy: str,
        seed: int,
        kernel: str = "",
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        head_dim, dtype = problem.head_dim, problem.dtype
        self._space, self._key = space, (head_dim, dtype)
        self._illegal = lambda decisions: space.illegal(decisions, head_dim, dtype, target)
        self.structures = space.structures(head_dim, dtype)
        self._seed = seed
        self._target = target.tvm_target()
        self._module = search_workload(problem, space.family, kernel)
        self._database = open_database(folder)
        self._workload = self._database.commit_workload(self._module)
        self._model = ms.cost_model.XGBModel(
            extractor=_DecisionFeatures(
                self.structures, lambda decisions: space.features(decisions, problem)
            ),
            config=XGBConfig(max_depth=6, eta=0.2, seed=seed, nthread=1),
            num_warmup_samples=_WARMUP_SAMPLES,
            adaptive_training=False,
            verbose_eval=0,
        )
        # A design space for each structure; traces mutate within theirs.
        generator = ms.space_generator.ScheduleFn(
            lambda schedule: [
                _sample_decisions(schedule.copy(), self.structures, structure)
                for structure in self.structures
            ],
            sch_rules=[],
            postprocs=[_RejectIllegal(self.structures, self._illegal)],
            mutator_probs={_ChangeDecision(self.structures, np.random.default_rng(seed)): 1.0},
        )
        if strategy == "evolutionary":
            search = ms.search_strategy.EvolutionarySearch(
                population_size=_POPULATION,
                init_measured_ratio=_MEASURED_SHARE,
                init_min_unmeasured=1,
                genetic_num_iters=_GENERATIONS,
                genetic_mutate_prob=0.85,
                eps_greedy=_RANDOM_SHARE,
            )
        else:
            search = ms.search_strategy.ReplayTrace()
        self._strategy = strategy
        self._context = _tune_context(self._module, self._target, generator, search, 1 + seed % (2**31 - 2))
        self._batches = self._batch_size = 0
        self._random = np.random.default_rng(seed)
        self._told: set[frozenset[tuple[str, int]]] = set()
        self._best_us = math.inf

    @property
    def size(self) -> int:
        """Number of combinations, the illegal ones included."""
        return sum(
            math.prod(len(values) for values in choices.values()) for choices in self.structures.values()
        )

    def offers(self, decisions: Mapping[str, int]) -> bool:
        """Whether the decisions are a point of the space, legal or not."""
        structure = self._space.structure(decisions, *self._key)
        if structure is None:
            return False
        choices = self.structures[structure]
        return set(decisions) == set(choices) and all(
            decisions[name] in values for name, values in choices.items()
        )

    def start(self, batch: int) -> None:
        """Begin; batches hold up to `batch` candidates."""
        self._batch_size = batch
        self._context.pre_tuning(
            max_trials=_UNLIMITED,
            num_trials_per_iter=batch,
            database=self._database,
            cost_model=self._model,
        )

    def candidate(self, decisions: Mapping[str, int]) -> Any:
        """A MetaSchedule candidate with given decisions."""
        schedule = Schedule(self._module, debug_mask="none", error_render_level="none")
        structure = self._space.structure(decisions, *self._key)
        assert structure is not None, f"{decisions} are of none of {', '.join(self.structures)}"
        _sample_decisions(schedule, self.structures, structure, decisions)
        return self._measure_candidate(schedule)

    @staticmethod
    def _measure_candidate(schedule: Schedule) -> Any:
        return ms.MeasureCandidate(schedule, ms.arg_info.ArgInfo.from_entry_func(schedule.mod))

    def record(self, known: Sequence[tuple[dict[str, int], float | None]]) -> list[Any]:
        """Add what the database lacks of earlier measurements to it; their candidates."""
        records = self._database.get_all_tuning_records()
        kept = {
            frozenset(trace_decisions(record.trace, self.structures).items())
            for record in records
            if record.workload.same_as(self._workload)
        }
        candidates = [self.candidate(decisions) for decisions, _ in known]
        for candidate, (decisions, latency) in zip(candidates, known, strict=True):
            if frozenset(decisions.items()) not in kept:
                self.keep(candidate, latency)
        return candidates

    def restore(self, known: Sequence[tuple[dict[str, int], float | None]]) -> None:
        """Learn what earlier sessions measured."""
        self.tell(self.record(known), [latency for _, latency in known])

    def ask(self) -> list[tuple[dict[str, int], Any]] | None:
        """The next batch as (decisions, candidate), possibly empty; None when the space is exhausted."""
        self._batches += 1
        if self._strategy == "evolutionary":
            drawn = self._shares_of_structures()
            if drawn:
                return drawn
        with _cost_model_settings(self._seed + self._batches):
            candidates = self._context.generate_measure_candidates()
        if candidates is None:
            return None
        return [(trace_decisions(c.sch.trace, self.structures), c) for c in candidates]

    def _shares_of_structures(self) -> list[tuple[dict[str, int], Any]]:
        """A batch of legal candidates, drawn in turn from those of several structures that are little known.

        Until the cost model has learnt, a generation's picks are random ones among what is new in it, and a
        structure of few points is rarely among them: one of 144 points beside one of 663 552 had 2 of 48.
        """
        drawn: list[tuple[dict[str, int], Any]] = []
        share = _WARMUP_SAMPLES // len(self.structures)
        known = Counter(self._space.structure(dict(decisions), *self._key) for decisions in self._told)
        unknown = [name for name in self.structures if known[name] < share]
        if len(self.structures) == 1 or not unknown:
            return drawn
        taken = set(self._told)
        for position in range(self._batch_size):
            choices = self.structures[unknown[position % len(unknown)]]
            for _ in range(_DRAWS):
                decisions = {name: int(self._random.choice(values)) for name, values in choices.items()}
                key = frozenset(decisions.items())
                if key not in taken and self._illegal(decisions) is None:
                    taken.add(key)
                    drawn.append((decisions, self.candidate(decisions)))
                    break
        return drawn

    def tell(self, candidates: Sequence[Any], latencies_us: Sequence[float | None]) -> None:
        """Results of candidates from `ask` or `candidate`; None is a failure. Trains the cost model."""
        self._best_us = min([self._best_us, *(latency for latency in latencies_us if latency is not None)])
        for candidate in candidates:
            self._told.add(frozenset(trace_decisions(candidate.sch.trace, self.structures).items()))
        results = []
        for latency in latencies_us:
            if latency is None and self._best_us < math.inf:
                latency = _FAILURE_FACTOR * self._best_us
            failed = None if latency is not None else "failed"
            results.append(ms.runner.RunnerResult(None if latency is None else [latency * 1e-6], failed))
        self._context.notify_runner_results(list(candidates), results)
        if self._strategy == "evolutionary" and candidates:
            with _cost_model_settings(self._seed):
                self._model.update(self._context, list(candidates), results)

    def keep(self, candidate: Any, latency_us: float | None) -> None:
        """Append one measurement to the database at once; a failure as MetaSchedule writes it, with 1e10
        s."""
        self._database.commit_tuning_record(
            ms.database.TuningRecord(
                candidate.sch.trace,
                self._workload,
                [1e10 if latency_us is None else latency_us * 1e-6],
                self._target,
                candidate.args_info,
            )
        )

    def close(self) -> None:
        self._context.post_tuning()


def best_in_database(
    folder: Path, problem: AttentionProblem, space: Space, kernel: str
) -> dict[str, int] | None:
    """Decisions of the fastest record of a problem, space and kernel code, replayed from a folder's
    database."""
    database = open_database(folder)
    record = database.query_tuning_record(search_workload(problem, space.family, kernel), None, "main")
    if record is None:
        return None
    return trace_decisions(record.trace, space.structures(problem.head_dim, problem.dtype))
