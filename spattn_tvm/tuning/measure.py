"""Builds candidates in a pool of processes and measures them in another, one at a time, checked before
they are timed.

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
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget

BUILD_TIMEOUT_S = 180.0
MEASURE_TIMEOUT_S = 60.0
PREPARE_TIMEOUT_S = 600.0
_POLL_S = 0.1
_MOST_BUILDERS = 16
_ANCHOR = -1


@dataclass(frozen=True)
class Outcome:
    """Median latency in microseconds or why there is none, and the machine's slowdown, 1 as usual."""

    latency_us: float | None = None
    error: str | None = None
    slowdown: float = 1.0


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
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process = None


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ProcessMeter:
    """Builds and measures candidates of one family for one problem on this machine.

    On a CPU nothing is built while something is timed; with CUDA the builders keep working.

    Parameters
    ----------
    family : str
        Family name, or ``module:ATTRIBUTE`` of a :class:`~spattn_tvm.spaces.Space` outside this package.
    problem : AttentionProblem
    target : MachineTarget
        The target of this machine.
    seed : int
        Of the random inputs.
    stopped : callable
        Asked several times a second; once it says True the iteration ends, and what is in flight is dropped.
    builders : int, optional
        Building processes; by default one for each CPU, at most 16.
    """

    def __init__(
        self,
        family: str,
        problem: AttentionProblem,
        target: MachineTarget,
        *,
        seed: int = 0,
        stopped: Callable[[], bool] = lambda: False,
        builders: int | None = None,
    ) -> None:
        import torch

        self._family, self._problem, self._target = family, problem, target
        self._seed, self._stopped = seed, stopped
        count = builders or min(_MOST_BUILDERS, available_cpus())
        self._builders = [_Worker(threads=1, compiles_for=target) for _ in range(count)]
        self._runner = _Worker(threads=torch.get_num_threads())
        self._ready = False
        self._folder = Path(tempfile.mkdtemp(prefix="spattn-tuning-"))
        self._built = 0

    @property
    def builders(self) -> int:
        return len(self._builders)

    def __enter__(self) -> ProcessMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and delete the temporary files."""
        for worker in (*self._builders, self._runner):
            worker.kill()
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
            When the measuring process can't even prepare the problem's data.
        """
        waiting = deque(enumerate(batch))
        built: deque[tuple[int, dict[str, Any]]] = deque()
        remaining = len(batch)
        usual: dict[str, Any] | None = None
        if anchor is not None and self._target.kind == "cpu" and batch:
            waiting.appendleft((_ANCHOR, anchor[0]))
        while remaining and not self._stopped():
            self._feed_builders(waiting)
            building = any(worker.busy for worker in self._builders)
            if not self._runner.busy:
                if not (self._ready and self._runner.alive):
                    self._send_prepare()
                elif built and (self._target.kind == "cuda" or not building):
                    position, kernel = built.popleft()
                    request = {"do": "measure", **kernel, "best_us": best_us, "anchor": usual}
                    self._runner.send(position, request, MEASURE_TIMEOUT_S)
            for worker, job, answer in self._finished():
                if job == _ANCHOR:
                    if anchor is not None and "path" in answer:
                        usual = {**self._kernel(anchor[0], answer["path"]), "usual_us": anchor[1]}
                    continue
                if worker is not self._runner and "path" in answer:
                    built.append((job, self._kernel(batch[job], answer["path"])))
                    continue
                if worker is self._runner:
                    if job == "prepare":
                        self._accept_prepare(answer)
                        continue
                    if "error" in answer and self._target.kind == "cuda":
                        worker.kill()  # after an illegal access every later call in that process fails too
                remaining -= 1
                outcome = Outcome(answer.get("latency_us"), answer.get("error"), answer.get("slowdown", 1.0))
                if outcome.latency_us is not None:
                    best_us = min(outcome.latency_us, best_us or outcome.latency_us)
                yield job, outcome

    def compare(self, batch: Sequence[Mapping[str, int]], rounds: int) -> list[Outcome]:
        """Outcome of each candidate; the correct ones are measured in turns.

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
        while not self._stopped():
            self._feed_builders(waiting)
            if not self._runner.busy:
                if not self._ready:
                    self._send_prepare()
                elif len(kernels) == len(batch):
                    request = {
                        "do": "compare",
                        "kernels": [kernels[i] for i in range(len(batch))],
                        "rounds": rounds,
                    }
                    self._runner.send("compare", request, len(batch) * MEASURE_TIMEOUT_S)
            for worker, job, answer in self._finished():
                if job == "prepare":
                    self._accept_prepare(answer)
                elif "error" in answer:
                    raise RuntimeError(
                        f"comparing {len(batch)} candidates of {self._family}: {answer['error']}"
                    )
                elif worker is self._runner:
                    return [Outcome(**outcome) for outcome in answer["outcomes"]]
                else:
                    kernels[job] = self._kernel(batch[job], answer["path"])
        raise KeyboardInterrupt

    def _feed_builders(self, waiting: deque[tuple[int, Mapping[str, int]]]) -> None:
        for worker in self._builders:
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

    def _kernel(self, decisions: Mapping[str, int], path: str) -> dict[str, Any]:
        return {"family": self._family, "decisions": dict(decisions), "path": path}

    def _send_prepare(self) -> None:
        request = {
            "do": "prepare",
            "problem": self._problem.to_json(),
            "device": self._target.kind,
            "seed": self._seed,
            "cache": str(self._folder / "reference.pt") if self._target.kind == "cpu" else None,
        }
        self._ready = False
        self._runner.send("prepare", request, PREPARE_TIMEOUT_S)

    def _accept_prepare(self, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            raise RuntimeError(f"{self._problem.key} can't be measured: {answer['error']}")
        self._ready = True

    def _finished(self) -> list[tuple[_Worker, Any, dict[str, Any]]]:
        """Wait a moment; (worker, job, answer) of each request that is done."""
        busy = [worker for worker in (*self._builders, self._runner) if worker.busy]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ)
            selector.select(_POLL_S)
        finished = []
        for worker in busy:
            job = worker.job
            answer = worker.receive()
            if answer is not None:
                finished.append((worker, job, answer))
        return finished
