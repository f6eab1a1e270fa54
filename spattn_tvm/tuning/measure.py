"""Builds candidates in a pool of processes and measures them in another, one at a time, checked before
they are timed; or on a fleet's servers, one on each at a time.

A candidate that does not build, crashes, hangs or computes a wrong result yields an :class:`Outcome` with
an error; nothing that a candidate does ends the search.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget

from .workers import COMPARING, PREPARE_TIMEOUT_S, PREPARING, WARMING, Worker, Workers

BUILD_TIMEOUT_S = 180.0
# A GPU's candidate takes milliseconds; the rest is for loading it and for the check.
MEASURE_TIMEOUT_S = {"cpu": 60.0, "cuda": 20.0}
_ANCHOR = -1
_LONGEST_COMPARISON_S = 3600.0


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate.

    Attributes
    ----------
    latency_us : float or None
        Median; None when there is an error.
    error : str or None
    slowdown : float
        Of the machine during the measurement, 1 as usual.
    resources : dict or None
        What ptxas said of the candidate; see :func:`spattn_tvm.build.resources.read_ptxas`.
    server : str or None
        The fleet's server that measured it.
    """

    latency_us: float | None = None
    error: str | None = None
    slowdown: float = 1.0
    resources: dict[str, Any] | None = None
    server: str | None = None


class Meter(Protocol):
    """What a search needs to have candidates measured; :class:`ProcessMeter` is the real one."""

    def measure(
        self,
        batch: Sequence[KernelSpec],
        best_us: float | None,
        anchor: tuple[KernelSpec, float] | None = None,
    ) -> Iterator[tuple[int, Outcome]]:
        """Yield (position in the batch, outcome), each candidate once, as they become known.

        `best_us` is the fastest so far. `anchor` names a kernel and its usual latency, which tell the
        machine's present speed.
        """
        ...


def _named(kernel: KernelSpec) -> dict[str, Any]:
    """A kernel in a request to another process, which may not know its family yet."""
    return {"kernel": kernel.to_json(), "family": kernel.source.reference}


class ProcessMeter:
    """Builds and measures kernels for one problem, on this machine or a fleet's servers.

    Where this machine's CPU is what measures, nothing is built while something is timed.

    Parameters
    ----------
    problem : AttentionProblem
    target : MachineTarget
        Of this machine, or of the servers.
    seed : int
        Of the random inputs.
    stopped : callable
        Asked several times a second; once it says True the iteration ends, and what is in flight is dropped.
    workers : Workers, optional
        Those of earlier searches for the same target, which its owner closes; own ones by default.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        target: MachineTarget,
        *,
        seed: int = 0,
        stopped: Callable[[], bool] = lambda: False,
        workers: Workers | None = None,
    ) -> None:
        self._problem, self._target = problem, target
        self._seed, self._stopped = seed, stopped
        self._owns_workers = workers is None
        self._workers = Workers(target) if workers is None else workers
        self._fleet = self._workers.fleet
        self._is_local_cpu = target.kind == "cpu" and self._fleet is None
        self._timeout_s = MEASURE_TIMEOUT_S[target.kind]
        self._ready: set[Worker] = set()
        self._refusals: list[str] = []
        # Of a search for the workers' time: the comparison of its winners takes the same data.
        self._cache = self._workers.folder / f"{problem.key}-{seed}.pt"

    @property
    def builders(self) -> int:
        return len(self._workers.builders)

    def __enter__(self) -> ProcessMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes with their temporary files, unless they are shared."""
        if self._owns_workers:
            self._workers.close()
        else:
            self._workers.drop_jobs()

    def measure(
        self,
        batch: Sequence[KernelSpec],
        best_us: float | None,
        anchor: tuple[KernelSpec, float] | None = None,
    ) -> Iterator[tuple[int, Outcome]]:
        """See :class:`Meter`; candidates are timed against the anchor, since other programs share the
        machine.

        Raises
        ------
        RuntimeError
            When the measuring process can't even prepare the problem's data, or no server is left.
        """
        waiting = deque(enumerate(batch))
        built: deque[tuple[int, dict[str, Any]]] = deque()
        remaining = len(batch)
        retried: set[int] = set()
        usual: dict[str, Any] | None = None
        if anchor is not None and batch:
            waiting.appendleft((_ANCHOR, anchor[0]))
        try:
            while remaining and not self._stopped():
                self._feed_builders(waiting)
                # The imports of builders without work would disturb what is timed on the same CPU.
                if not self._is_local_cpu:
                    self._workers.warm()
                for runner in self._idle_runners():
                    if built and (usual is not None or anchor is None):
                        position, kernel = built.popleft()
                        request = {"do": "measure", **kernel, "best_us": best_us, "anchor": usual}
                        runner.send((position, kernel), request, self._timeout_s)
                        # Servers take turns, also where builds are what takes long.
                        self._workers.runners.remove(runner)
                        self._workers.runners.append(runner)
                for worker, job, answer in self._workers.finished():
                    if worker in self._workers.builders:
                        if job == _ANCHOR:
                            if anchor is None or "path" not in answer:
                                anchor = None  # it was measured before, so this is a fault of the moment
                            else:
                                usual = {**self._kernel(anchor[0], answer), "usual_us": anchor[1]}
                            continue
                        if "path" in answer:
                            built.append((job, self._kernel(batch[job], answer)))
                            continue
                        position, resources = job, None
                    elif job == PREPARING:
                        self._accept_prepare(worker, answer)
                        continue
                    else:
                        position, kernel = job
                        resources = kernel["resources"]
                        if "error" in answer:
                            self._distrust(worker, answer)
                            if answer.get("lost") and position not in retried:
                                # Nobody knows yet whether the candidate or the server is to blame.
                                retried.add(position)
                                built.append(job)
                                continue
                    remaining -= 1
                    outcome = Outcome(
                        answer.get("latency_us"),
                        answer.get("error"),
                        answer.get("slowdown", 1.0),
                        resources,
                        answer.get("server"),
                    )
                    if outcome.latency_us is not None:
                        best_us = min(outcome.latency_us, best_us or outcome.latency_us)
                    yield position, outcome
        finally:
            if remaining:
                self._ready -= {runner for runner in self._workers.runners if runner.busy}
                self._workers.drop_jobs()

    def compare(self, batch: Sequence[KernelSpec], rounds: int, limit_s: float = math.inf) -> list[Outcome]:
        """Outcome of each candidate; the correct ones are measured in turns by one process or server.

        Parameters
        ----------
        batch : sequence of KernelSpec
        rounds : int
            Samples of each.
        limit_s : float
            After so many seconds of measuring there are no more rounds than three.

        Raises
        ------
        RuntimeError
            When none of them builds, or one crashes.
        """
        waiting = deque(enumerate(batch))
        kernels: dict[int, dict[str, Any]] = {}
        failed: dict[int, str] = {}
        asked = False
        while not self._stopped():
            self._feed_builders(waiting)
            for runner in self._idle_runners():
                if len(kernels) + len(failed) == len(batch) and not asked:
                    asked = True
                    request = {
                        "do": "compare",
                        "kernels": [kernels[i] for i in sorted(kernels)],
                        "rounds": rounds,
                        "limit_s": min(limit_s, _LONGEST_COMPARISON_S),
                    }
                    runner.send(COMPARING, request, len(batch) * self._timeout_s)
            for worker, job, answer in self._workers.finished():
                if job == PREPARING:
                    self._accept_prepare(worker, answer)
                elif job == COMPARING and "error" in answer:
                    self._distrust(worker, answer)
                    if answer.get("lost"):
                        asked = False
                        continue
                    raise RuntimeError(
                        f"comparing {len(batch)} candidates of {batch[0].family}: {answer['error']}"
                    )
                elif job == COMPARING:
                    server = answer.get("server")
                    measured = dict(zip(sorted(kernels), answer["outcomes"], strict=True))
                    return [
                        Outcome(error=failed[i])
                        if i in failed
                        else Outcome(**measured[i], resources=kernels[i]["resources"], server=server)
                        for i in range(len(batch))
                    ]
                elif "error" in answer:
                    failed[job] = answer["error"]
                    if len(failed) == len(batch):
                        raise RuntimeError(f"none of {len(batch)} candidates builds: {answer['error']}")
                else:
                    kernels[job] = self._kernel(batch[job], answer)
        raise KeyboardInterrupt

    def _feed_builders(self, waiting: deque[tuple[int, KernelSpec]]) -> None:
        for worker in self._workers.builders:
            if not waiting:
                return
            if not worker.busy:
                position, kernel = waiting.popleft()
                request = {"do": "build", **_named(kernel), "target": asdict(self._target)}
                worker.send(position, request, BUILD_TIMEOUT_S)

    @staticmethod
    def _kernel(kernel: KernelSpec, answer: Mapping[str, Any]) -> dict[str, Any]:
        return {**_named(kernel), "path": answer["path"], "resources": answer.get("resources")}

    def _idle_runners(self) -> Iterator[Worker]:
        """Runners that can take a candidate now; the others are told to prepare."""
        candidates_wait = self._is_local_cpu and any(worker.busy for worker in self._workers.builders)
        for runner in list(self._workers.runners):
            if runner.busy:
                continue
            if runner not in self._ready or not runner.alive:
                self._send_prepare(runner)
            elif not candidates_wait:
                yield runner

    def _send_prepare(self, runner: Worker) -> None:
        self._ready.discard(runner)
        on_cpu = self._target.kind == "cpu" or self._fleet is not None
        is_preparing = any(other.job == PREPARING for other in self._workers.runners)
        if on_cpu and is_preparing and not self._cache.exists():
            # The reference takes seconds on a CPU: one process computes it for all.
            if not runner.alive:
                runner.send(WARMING, {"do": "warm", "modules": ["torch", "tvm"]}, PREPARE_TIMEOUT_S)
            return
        request = {
            "do": "prepare",
            "problem": self._problem.to_json(),
            "target": asdict(self._target),
            "seed": self._seed,
            "cache": str(self._cache) if on_cpu else None,
            "fleet": None if self._fleet is None else asdict(self._fleet),
        }
        runner.send(PREPARING, request, PREPARE_TIMEOUT_S)

    def _accept_prepare(self, runner: Worker, answer: Mapping[str, Any]) -> None:
        if "error" not in answer:
            self._ready.add(runner)
            if "server" in answer:
                self._workers.note_server(answer["server"], answer["device"])
            return
        if self._fleet is None or not answer.get("lost"):
            raise RuntimeError(f"{self._problem.key} can't be measured: {answer['error']}")
        self._retire(runner, answer["error"])

    def _distrust(self, runner: Worker, answer: Mapping[str, Any]) -> None:
        """After a failed measurement: is the process, or the server behind it, still of use?"""
        if answer.get("broken") or not runner.alive:
            self._ready.discard(runner)
            self._workers.replace(runner)
        elif answer.get("lost"):
            self._ready.discard(runner)
            assert self._fleet is not None
            if len(self._fleet.servers()) < len(self._workers.runners):
                self._retire(runner, answer["error"])

    def _retire(self, runner: Worker, reason: str) -> None:
        """Go on without one of the fleet's servers."""
        assert self._fleet is not None
        runner.kill()
        self._workers.runners.remove(runner)
        self._refusals.append(reason)
        if not self._workers.runners:
            raise RuntimeError(
                f"no server is left under the key {self._fleet.key!r} of the tracker "
                f"{self._fleet.address}: {'; '.join(dict.fromkeys(self._refusals))}. What was measured is "
                "in the log; start servers and give the same command to go on"
            )
