"""The processes that build and measure candidates, and what each is busy with."""

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spattn_tvm.build.toolchain import compile_environment
from spattn_tvm.provenance import available_cpus
from spattn_tvm.target import MachineTarget

from .fleet import Fleet

PREPARE_TIMEOUT_S = 600.0
WARMING, PREPARING, COMPARING = "warm", "prepare", "compare"
_POLL_S = 0.1
_MOST_BUILDERS = 16


class Scratch:
    """A temporary folder that is gone when its owner is, however that ends, and with it the process groups
    that were started for it; see :mod:`.janitor`.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="spattn-tuning-"))
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("janitor.py")), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def tell(self, word: str, group: int) -> None:
        """Say that a process group has ``started`` or ``ended``."""
        assert self._janitor.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # without a janitor, or after close()
            self._janitor.stdin.write(f"{word} {group}\n".encode())
            self._janitor.stdin.flush()

    def close(self) -> None:
        """Delete the folder."""
        assert self._janitor.stdin is not None
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(BrokenPipeError):
            self._janitor.stdin.close()
        self._janitor.wait()


class Worker:
    """One worker process and the request that it is busy with."""

    def __init__(
        self, scratch: Scratch, threads: int | None = None, compiles_for: MachineTarget | None = None
    ) -> None:
        self._scratch, self._threads, self._compiles_for = scratch, threads, compiles_for
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
        environment["TMPDIR"] = str(self._scratch.folder)  # also for the compilers that it starts
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
        self._scratch.tell("started", self._process.pid)
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
        self._scratch.tell("ended", self._process.pid)
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
        measuring = 1 if fleet is None else len(fleet.require_servers())
        self._scratch = Scratch()
        self.builders = [Worker(self._scratch, threads=1, compiles_for=target) for _ in range(count)]
        threads = torch.get_num_threads()
        self.runners = [Worker(self._scratch, threads=threads) for _ in range(measuring)]
        # A fault on a GPU ends the process that caused it. The next one is ready by then.
        self.spare = Worker(self._scratch) if target.kind == "cuda" and fleet is None else None
        self.used_servers: set[str] = set()
        self.server_facts: dict[str, Any] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def all(self) -> list[Worker]:
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
                worker.send(WARMING, {"do": "warm", "modules": ["tvm"]}, PREPARE_TIMEOUT_S)
        self.warm_spare()

    def warm_spare(self) -> None:
        if self.spare is not None and not self.spare.alive:
            request = {"do": "warm", "modules": ["torch"], "device": self.target.kind}
            self.spare.send(WARMING, request, PREPARE_TIMEOUT_S)

    def replace(self, runner: Worker) -> None:
        """End a measuring process that can't be trusted any more; the spare one takes its place."""
        runner.kill()
        if self.spare is not None:
            self.runners[self.runners.index(runner)], self.spare = self.spare, runner
            self.warm_spare()

    def finished(self) -> list[tuple[Worker, Any, dict[str, Any]]]:
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
            if answer is not None and job != WARMING:
                finished.append((worker, job, answer))
        return finished

    def drop_jobs(self) -> None:
        """End whatever is in flight. Only what is busy has to start anew."""
        for worker in self.all:
            if worker.busy and worker.job != WARMING:
                worker.kill()

    @property
    def folder(self) -> Path:
        """For temporary files; gone when the workers are."""
        return self._scratch.folder

    def close(self) -> None:
        """End all processes and delete their files."""
        for worker in self.all:
            worker.kill()
        self._scratch.close()
