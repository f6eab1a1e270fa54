"""A process that builds or measures candidates for a search: ``python -m spattn_tvm.tuning.worker``.

Candidates are measured in the process itself, or by it on a server of a fleet. It reads one JSON request a
line from standard input and answers each with one JSON line on standard output. It stays alive between
requests, because importing TVM or PyTorch takes seconds, and it is a process of its own because a candidate
may crash or hang: whoever started it kills it and starts another.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spattn_tvm.families import resolve_family
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget

from .fleet import Fleet, ServerLostError

if TYPE_CHECKING:
    from torch import Tensor

    from .remote import RemoteDevice
    from .trial import TrialData

    Launcher = Callable[[TrialData], dict[str, Tensor]]

_PR_SET_PDEATHSIG = 1
# Compilers on all cores must not keep the process waiting that launches what is timed.
_BUILDER_NICENESS = 10


def _kernel_of(request: Mapping[str, Any]) -> KernelSpec:
    """The kernel that a request names; its family, which may be one from outside, is registered."""
    resolve_family(request["family"])
    return KernelSpec.from_json(request["kernel"])


def _warm(request: dict[str, Any]) -> dict[str, Any]:
    """Import what later requests need; for a GPU, also make the process known to its driver."""
    if "torch" not in request["modules"]:
        from spattn_tvm.build.toolchain import compile_only_here

        compile_only_here()
    for name in request["modules"]:
        importlib.import_module(name)
    if request.get("device") == "cuda":
        import torch

        torch.zeros(1, device="cuda")
    return {}


def _build(request: dict[str, Any]) -> dict[str, Any]:
    from spattn_tvm.build.library_cache import compile_kernel
    from spattn_tvm.build.resources import library_metadata
    from spattn_tvm.build.toolchain import compile_only_here

    compile_only_here()
    if os.nice(0) < _BUILDER_NICENESS:
        os.nice(_BUILDER_NICENESS - os.nice(0))
    path = compile_kernel(_kernel_of(request), MachineTarget(**request["target"]))
    return {"path": str(path), "resources": library_metadata(path).get("resources")}


class _Measurer:
    """Answers the requests of a measuring process, which prepares its data once."""

    def __init__(self) -> None:
        self._data: TrialData | None = None
        self._fleet: Fleet | None = None
        self._target: MachineTarget | None = None
        self._server: RemoteDevice | None = None
        self._anchors: dict[str, Launcher] = {}
        self._prepared: dict[str, Any] | None = None

    @property
    def data(self) -> TrialData:
        if self._data is None:
            raise RuntimeError("nothing can be measured before a 'prepare' request")
        return self._data

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        from .trial import TrialData

        # The comparison after a search takes the same data, whose reference at 65,536 tokens takes seconds.
        if request == self._prepared and self._fleet is None:
            return {}
        self._prepared = None
        cache = Path(request["cache"]) if request["cache"] else None
        problem = AttentionProblem.from_json(request["problem"])
        self._target = MachineTarget(**request["target"])
        self._fleet = Fleet(**request["fleet"]) if request["fleet"] else None
        self._anchors.clear()
        if self._fleet is None:
            self._data = None  # not two of them at a time
            self._data = TrialData(problem, self._target.kind, request["seed"], cache)
            self._prepared = request
            return {}
        self._data = TrialData(
            problem,
            "cpu",
            request["seed"],
            cache,
            clock=lambda kernel, data: kernel.time_us(),  # type: ignore[attr-defined]
            target_kind=self._target.kind,
        )
        self._server = None
        try:
            server = self._connect()
        except ServerLostError as error:
            return {"error": str(error), "lost": True}
        return {"server": server.server, "device": server.facts()}

    def _connect(self, lasting: bool = False) -> RemoteDevice:
        """The server in use; another session before this one's time is up, or if it is to be `lasting`."""
        from .remote import RemoteDevice

        assert self._fleet is not None and self._target is not None
        if self._server is None or self._server.is_ending or lasting:
            self._anchors.clear()
            self._server = None  # a server serves one session at a time
            server = RemoteDevice(self._fleet, self._target.kind)
            refusal = server.refusal(self._target)
            if refusal is not None:
                raise ValueError(refusal)
            self._server = server
        return self._server

    def _attempt(self, work: Callable[[], dict[str, Any]], lasting: bool = False) -> dict[str, Any]:
        """An answer which also says whether this process or its server is of no use any more."""
        if self._fleet is not None:
            try:
                self._connect(lasting)
            except Exception as error:
                return {"error": str(error), "lost": True}
        try:
            answer = work()
        except Exception as error:
            answer = {"error": _explained(error)}
            if self._server is None:
                answer["broken"] = _gpu_is_lost()
            elif not self._server.is_alive():
                answer = {"error": f"lost the server {self._server.server}: {answer['error']}", "lost": True}
                self._server = None
        return answer if self._server is None else {**answer, "server": self._server.server}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            launch = self._launch(request)
            wrong = self.data.wrong(self.data.outputs(launch)) or self._unsteady(request, launch)
            if wrong is not None:
                return {"error": wrong}
            anchor, best_us = request["anchor"], request["best_us"]
            if anchor is None:
                return {"latency_us": self.data.latency_us(launch, best_us)}
            path = anchor["path"]
            if path not in self._anchors:
                self._anchors[path] = self._launch(anchor)
            latency_us, slowdown = self.data.anchored_latency_us(
                launch, self._anchors[path], anchor["usual_us"], best_us
            )
            return {"latency_us": latency_us, "slowdown": slowdown}

        return self._attempt(work)

    def _unsteady(self, request: dict[str, Any], launch: Launcher) -> str | None:
        """Whether a GPU kernel that claims to be deterministic is not: a race that the tolerance hides."""
        import torch

        if self.data.target_kind != "cuda" or not _kernel_of(request).is_deterministic:
            return None
        first, second = (self.data.outputs(launch) for _ in range(2))
        differ = [name for name in first if not torch.equal(first[name], second[name])]
        return f"{', '.join(differ)} differs from run to run" if differ else None

    def compare(self, request: dict[str, Any]) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            launches = [self._launch(kernel) for kernel in request["kernels"]]
            wrong = [self.data.wrong(self.data.outputs(launch)) for launch in launches]
            correct = [launch for launch, error in zip(launches, wrong, strict=True) if error is None]
            latencies = iter(self.data.interleaved_us(correct, request["rounds"], request["limit_s"]))
            outcomes = [
                {"latency_us": next(latencies)} if error is None else {"error": error} for error in wrong
            ]
            return {"outcomes": outcomes}

        return self._attempt(work, lasting=True)

    def _launch(self, request: dict[str, Any]) -> Launcher:
        from spattn_tvm.dispatch import Kernel
        from spattn_tvm.launch import launch
        from spattn_tvm.runtime import load_library

        path, spec = Path(request["path"]), _kernel_of(request)
        if self._server is not None:
            return self._server.kernel(path, spec, self.data)
        kernel = Kernel(load_library(path, spec.direction), spec, path=path)
        names = kernel.abi.results
        return lambda data: dict(zip(names, launch(kernel, data.inputs, data.scale), strict=True))


def _gpu_is_lost() -> bool:
    """Whether every later call on the GPU would fail in this process, as after an illegal access."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _explained(error: Exception) -> str:
    # Errors of TVM carry pages of C++ frames; the message's start and the raising line say what happened.
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error)
    text = text if len(text) < 1500 else f"{text[:1000]} … {text[-400:]}"
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def _answer(handlers: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]], line: str) -> dict[str, Any]:
    request = json.loads(line)
    try:
        return handlers[request["do"]](request)
    except Exception as error:
        return {"error": _explained(error)}


def main() -> None:
    """Serve requests until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which then closes this process
    with contextlib.suppress(OSError, AttributeError):
        # Linux: a kernel that hangs must not outlive the search that started it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Whatever a kernel or a compiler prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    measurer = _Measurer()
    handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "warm": _warm,
        "build": _build,
        "prepare": measurer.prepare,
        "measure": measurer.measure,
        "compare": measurer.compare,
    }
    for line in sys.stdin:
        answers.write(json.dumps(_answer(handlers, line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
