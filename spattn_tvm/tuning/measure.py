"""Builds candidates in a pool of processes and measures them in another, one at a time, checked before
they are timed; or on a fleet's servers, one on each at a time.

A candidate that does not build, crashes, hangs or computes a wrong result yields an :class:`Outcome` with
an error; nothing that a candidate does ends the search.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from spattn_tvm.compiler import compile_environment
from spattn_tvm.environment import available_cpus
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget

from .fleet import Fleet

BUILD_TIMEOUT_S = 180.0
# A GPU's candidate takes milliseconds; the rest is for loading it and for the check.
MEASURE_TIMEOUT_S = {"cpu": 60.0, "cuda": 20.0}
PREPARE_TIMEOUT_S = 600.0
_POLL_S = 0.1
_MOST_BUILDERS = 16
_ANCHOR = -1
_WARMING, _PREPARING, _COMPARING = "warm", "prepare", "compare"


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
        What ptxas said of the candidate; see :func:`spattn_tvm.compiler.read_ptxas`.
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
        batch: Sequence[Mapping[str, int]],
        best_us: float | None,
        anchor: tuple[Mapping[str, int], float] | None = None,
    ) -> Iterator[tuple[int, Outcome]]:
        """Yield (position in the batch, outcome), each candidate once, as they become known.

        `best_us` is the fastest so far. `anchor` names decisions and their usual latency, which tell the
        machine's present speed.
        """
        ...


class _Worker:
    """One worker process and the request that it is busy with."""

    def __init__(self, threads: int | None = None, compiles_for: MachineTarget | None = None) -> None:
        self._threads, self._compiles_for = threads, compiles_for
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: Any = None
        self._received = b""
        self._deadline = 0.0
        self._timeout = 0.0
        self.job: Any = None

    @property
    def busy(self) -> bool:
        return self.job is not None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        # A builder for CUDA compiles in its own process, which needs a driver library or a stub of one.
        target = self._compiles_for
        environment = dict(os.environ) if target is None else compile_environment(target)
        environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._received = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "spattn_tvm.tuning.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def send(self, job: Any, request: Mapping[str, Any], timeout: float) -> None:
        """Give the process, started if need be, one request; `job` is the caller's name for it."""
        if not self.alive:
            self.start()
        assert self._process is not None and self._process.stdin is not None
        self.job, self._timeout, self._deadline = job, timeout, time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError):  # receive() reports the death
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any] | None:
        """The answer to the request, an ``{"error": …}`` when the process died or took too long, or None
        as yet."""
        assert self._process is not None and self._process.stdout is not None
        ended = False
        while chunk := self._process.stdout.read():
            self._received += chunk
        if chunk == b"":
            ended = True
        line, newline, rest = self._received.partition(b"\n")
        if newline:
            self.job, self._received = None, rest
            return json.loads(line)
        if ended:
            code = self._process.wait()
            if code < 0:
                answer = {"error": f"the process crashed with {signal.Signals(-code).name}"}
            else:
                answer = {"error": f"the process ended with exit code {code}: {self._last_words()}"}
        elif time.monotonic() > self._deadline:
            answer = {"error": f"no answer within {self._timeout:.0f} s"}
        else:
            return None
        self.job = None
        self.kill()
        return answer

    def _last_words(self) -> str:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 600))
        return self._stderr.read().decode(errors="replace").strip() or "nothing on standard error"

    @property
    def stdout(self) -> Any:
        assert self._process is not None
        return self._process.stdout

    def kill(self) -> None:
        self.job = None
        if self._process is None:
            return
        # Its session is its own: a compiler that it started must not go on using a core.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process = None


class Workers:
    """The processes of one or more searches for a target, which share them: their imports take seconds.

    Parameters
    ----------
    target : MachineTarget
    fleet : Fleet, optional
        Its servers measure instead of this machine.
    builders : int, optional
        Building processes; by default one for each CPU, at most 16.

    Raises
    ------
    RuntimeError
        When the fleet's tracker does not answer, or no server is registered under its key.
    """

    def __init__(
        self, target: MachineTarget, *, fleet: Fleet | None = None, builders: int | None = None
    ) -> None:
        import torch

        self.target, self.fleet = target, fleet
        count = builders or min(_MOST_BUILDERS, available_cpus())
        self.builders = [_Worker(threads=1, compiles_for=target) for _ in range(count)]
        measuring = 1 if fleet is None else len(fleet.require_servers())
        self.runners = [_Worker(threads=torch.get_num_threads()) for _ in range(measuring)]
        # A fault on a GPU ends the process that caused it. The next one is ready by then.
        self.spare = _Worker() if target.kind == "cuda" and fleet is None else None
        self.used_servers: set[str] = set()
        self.server_facts: dict[str, Any] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def all(self) -> list[_Worker]:
        return [*self.builders, *self.runners, *([self.spare] if self.spare else [])]

    def note_server(self, server: str, facts: dict[str, Any]) -> None:
        """Remember a server that takes part.

        Raises
        ------
        RuntimeError
            When it is another chip than those before.
        """
        known = self.server_facts.get("name", facts["name"])
        if facts["name"] != known:
            raise RuntimeError(
                f"the servers must be alike: {server} is {facts['name']}, {', '.join(self.used_servers)} "
                f"{known}; give each chip a key of its own"
            )
        self.used_servers.add(server)
        self.server_facts = facts

    def warm(self) -> None:
        """Have idle processes do their imports, while others already work."""
        for worker in self.builders:
            if not worker.alive:
                worker.send(_WARMING, {"do": "warm", "modules": ["tvm"]}, PREPARE_TIMEOUT_S)
        self.warm_spare()

    def warm_spare(self) -> None:
        if self.spare is not None and not self.spare.alive:
            request = {"do": "warm", "modules": ["torch"], "device": self.target.kind}
            self.spare.send(_WARMING, request, PREPARE_TIMEOUT_S)

    def replace(self, runner: _Worker) -> None:
        """End a measuring process that can't be trusted any more; the spare one takes its place."""
        runner.kill()
        if self.spare is not None:
            self.runners[self.runners.index(runner)], self.spare = self.spare, runner
            self.warm_spare()

    def finished(self) -> list[tuple[_Worker, Any, dict[str, Any]]]:
        """Wait a moment; (worker, job, answer) of each request that is done."""
        busy = [worker for worker in self.all if worker.busy]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ)
            selector.select(_POLL_S)
        finished = []
        for worker in busy:
            job = worker.job
            answer = worker.receive()
            if answer is not None and job != _WARMING:
                finished.append((worker, job, answer))
        return finished

    def drop_jobs(self) -> None:
        """End whatever is in flight. Only what is busy has to start anew."""
        for worker in self.all:
            if worker.busy and worker.job != _WARMING:
                worker.kill()

    def close(self) -> None:
        """End all processes."""
        for worker in self.all:
            worker.kill()


class ProcessMeter:
    """Builds and measures candidates of one family for one problem, on this machine or a fleet's servers.

    Where this machine's CPU is what measures, nothing is built while something is timed.

    Parameters
    ----------
    family : str
        Family name, or ``module:ATTRIBUTE`` of a :class:`~spattn_tvm.spaces.Space` outside this package.
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
        family: str,
        problem: AttentionProblem,
        target: MachineTarget,
        *,
        seed: int = 0,
        stopped: Callable[[], bool] = lambda: False,
        workers: Workers | None = None,
    ) -> None:
        self._family, self._problem, self._target = family, problem, target
        self._seed, self._stopped = seed, stopped
        self._owns_workers = workers is None
        self._workers = Workers(target) if workers is None else workers
        self._fleet = self._workers.fleet
        self._is_local_cpu = target.kind == "cpu" and self._fleet is None
        self._timeout_s = MEASURE_TIMEOUT_S[target.kind]
        self._ready: set[_Worker] = set()
        self._refusals: list[str] = []
        self._folder = Path(tempfile.mkdtemp(prefix="spattn-tuning-"))
        self._cache = self._folder / "reference.pt"
        self._built = 0

    @property
    def builders(self) -> int:
        return len(self._workers.builders)

    def __enter__(self) -> ProcessMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, unless they are shared, and delete the temporary files."""
        if self._owns_workers:
            self._workers.close()
        else:
            self._workers.drop_jobs()
        shutil.rmtree(self._folder, ignore_errors=True)

    def measure(
        self,
        batch: Sequence[Mapping[str, int]],
        best_us: float | None,
        anchor: tuple[Mapping[str, int], float] | None = None,
    ) -> Iterator[tuple[int, Outcome]]:
        """See :class:`Meter`; on a CPU, which other programs share, candidates are timed against the anchor.

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
        if anchor is not None and self._target.kind == "cpu" and batch:
            waiting.appendleft((_ANCHOR, anchor[0]))
        try:
            while remaining and not self._stopped():
                self._feed_builders(waiting)
                # The imports of builders without work would disturb what is timed on the same CPU.
                if not self._is_local_cpu:
                    self._workers.warm()
                for runner in self._idle_runners():
                    if built and (usual is not None or anchor is None or self._target.kind != "cpu"):
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
                    elif job == _PREPARING:
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

    def compare(self, batch: Sequence[Mapping[str, int]], rounds: int) -> list[Outcome]:
        """Outcome of each candidate; the correct ones are measured in turns by one process or server.

        Parameters
        ----------
        batch : sequence of decisions
        rounds : int
            Samples of each.

        Raises
        ------
        RuntimeError
            When one of them does not build or crashes.
        """
        waiting = deque(enumerate(batch))
        kernels: dict[int, dict[str, Any]] = {}
        asked = False
        while not self._stopped():
            self._feed_builders(waiting)
            for runner in self._idle_runners():
                if len(kernels) == len(batch) and not asked:
                    asked = True
                    request = {
                        "do": "compare",
                        "kernels": [kernels[i] for i in range(len(batch))],
                        "rounds": rounds,
                    }
                    runner.send(_COMPARING, request, len(batch) * self._timeout_s)
            for worker, job, answer in self._workers.finished():
                if job == _PREPARING:
                    self._accept_prepare(worker, answer)
                elif "error" in answer:
                    if job == _COMPARING:
                        self._distrust(worker, answer)
                    if answer.get("lost"):
                        asked = False
                        continue
                    raise RuntimeError(
                        f"comparing {len(batch)} candidates of {self._family}: {answer['error']}"
                    )
                elif job == _COMPARING:
                    server = answer.get("server")
                    return [
                        Outcome(**outcome, resources=kernels[i]["resources"], server=server)
                        for i, outcome in enumerate(answer["outcomes"])
                    ]
                else:
                    kernels[job] = self._kernel(batch[job], answer)
        raise KeyboardInterrupt

    def _feed_builders(self, waiting: deque[tuple[int, Mapping[str, int]]]) -> None:
        for worker in self._workers.builders:
            if not waiting:
                return
            if not worker.busy:
                position, decisions = waiting.popleft()
                self._built += 1
                request = {
                    "do": "build",
                    "family": self._family,
                    "problem": self._problem.to_json(),
                    "target": asdict(self._target),
                    "decisions": dict(decisions),
                    "folder": str(self._folder),
                    "name": f"candidate-{self._built}",
                }
                worker.send(position, request, BUILD_TIMEOUT_S)

    def _kernel(self, decisions: Mapping[str, int], answer: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "family": self._family,
            "decisions": dict(decisions),
            "path": answer["path"],
            "resources": answer.get("resources"),
        }

    def _idle_runners(self) -> Iterator[_Worker]:
        """Runners that can take a candidate now; the others are told to prepare."""
        candidates_wait = self._is_local_cpu and any(worker.busy for worker in self._workers.builders)
        for runner in list(self._workers.runners):
            if runner.busy:
                continue
            if runner not in self._ready or not runner.alive:
                self._send_prepare(runner)
            elif not candidates_wait:
                yield runner

    def _send_prepare(self, runner: _Worker) -> None:
        self._ready.discard(runner)
        on_cpu = self._target.kind == "cpu" or self._fleet is not None
        is_preparing = any(other.job == _PREPARING for other in self._workers.runners)
        if on_cpu and is_preparing and not self._cache.exists():
            # The reference takes seconds on a CPU: one process computes it for all.
            if not runner.alive:
                runner.send(_WARMING, {"do": "warm", "modules": ["torch", "tvm"]}, PREPARE_TIMEOUT_S)
            return
        request = {
            "do": "prepare",
            "problem": self._problem.to_json(),
            "target": asdict(self._target),
            "seed": self._seed,
            "cache": str(self._cache) if on_cpu else None,
            "fleet": None if self._fleet is None else asdict(self._fleet),
        }
        runner.send(_PREPARING, request, PREPARE_TIMEOUT_S)

    def _accept_prepare(self, runner: _Worker, answer: Mapping[str, Any]) -> None:
        if "error" not in answer:
            self._ready.add(runner)
            if "server" in answer:
                self._workers.note_server(answer["server"], answer["device"])
            return
        if self._fleet is None or not answer.get("lost"):
            raise RuntimeError(f"{self._problem.key} can't be measured: {answer['error']}")
        self._retire(runner, answer["error"])

    def _distrust(self, runner: _Worker, answer: Mapping[str, Any]) -> None:
        """After a failed measurement: is the process, or the server behind it, still of use?"""
        if answer.get("broken") or not runner.alive:
            self._ready.discard(runner)
            self._workers.replace(runner)
        elif answer.get("lost"):
            self._ready.discard(runner)
            assert self._fleet is not None
            if len(self._fleet.servers()) < len(self._workers.runners):
                self._retire(runner, answer["error"])

    def _retire(self, runner: _Worker, reason: str) -> None:
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
