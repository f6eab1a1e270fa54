"""A process that builds or measures candidates for a search: ``python -m spattn_tvm.tuning.worker``.

It reads one JSON request a line from standard input and answers each with one JSON line on standard
output. It stays alive between requests, because importing TVM or PyTorch takes seconds, and it is a
process of its own because a candidate may crash or hang: whoever started it kills it and starts another.
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

from spattn_tvm.problem import AttentionProblem
from spattn_tvm.spaces import Space, find_space
from spattn_tvm.target import MachineTarget

if TYPE_CHECKING:
    from torch import Tensor

    from .trial import TrialData

_PR_SET_PDEATHSIG = 1


def resolve_space(family: str, direction: str) -> Space:
    """The space of a family's name, or of ``module:ATTRIBUTE``, which names a space that is not part of
    this package.

    Raises
    ------
    ValueError
        When there is none, or it is for the other direction.
    """
    module, _, attribute = family.partition(":")
    if not attribute:
        return find_space(family, direction)
    space = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(space, Space):
        raise ValueError(f"{family} must be a Space, found {space!r}")
    if space.direction != direction:
        raise ValueError(f"{family} is a space for {space.direction}, the problem is {direction}")
    return space


def _build(request: dict[str, Any]) -> dict[str, Any]:
    from spattn_tvm.compiler import compile_kernel, compile_module

    problem = AttentionProblem.from_json(request["problem"])
    target = MachineTarget(**request["target"])
    family, decisions = request["family"], request["decisions"]
    key = (problem.direction, problem.dtype, problem.head_dim)
    if ":" not in family:
        return {"path": str(compile_kernel(family, *key, decisions, target))}
    space = resolve_space(family, problem.direction)
    module = space.build(decisions, problem.head_dim, problem.dtype, target)
    path = Path(request["folder"]) / f"{request['name']}.so"
    compile_module(module, target, path)
    return {"path": str(path)}


class _Measurer:
    """Answers the requests of a measuring process, which prepares its data once."""

    def __init__(self) -> None:
        self._data: TrialData | None = None

    @property
    def data(self) -> TrialData:
        if self._data is None:
            raise RuntimeError("nothing can be measured before a 'prepare' request")
        return self._data

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        from .trial import TrialData

        cache = Path(request["cache"]) if request["cache"] else None
        problem = AttentionProblem.from_json(request["problem"])
        self._data = TrialData(problem, request["device"], request["seed"], cache)
        return {}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        launch = self._launch(request)
        wrong = self.data.wrong(self.data.outputs(launch))
        if wrong is not None:
            return {"error": wrong}
        anchor, best_us = request["anchor"], request["best_us"]
        if anchor is None:
            return {"latency_us": self.data.latency_us(launch, best_us)}
        latency_us, slowdown = self.data.anchored_latency_us(
            launch, self._launch(anchor), anchor["usual_us"], best_us
        )
        return {"latency_us": latency_us, "slowdown": slowdown}

    def compare(self, request: dict[str, Any]) -> dict[str, Any]:
        launches = [self._launch(kernel) for kernel in request["kernels"]]
        wrong = [self.data.wrong(self.data.outputs(launch)) for launch in launches]
        correct = [launch for launch, error in zip(launches, wrong, strict=True) if error is None]
        latencies = iter(self.data.interleaved_us(correct, request["rounds"]))
        return {
            "outcomes": [
                {"latency_us": next(latencies)} if error is None else {"error": error} for error in wrong
            ]
        }

    def _launch(self, request: dict[str, Any]) -> Callable[[TrialData], tuple[Tensor, ...]]:
        from spattn_tvm.dispatch import Kernel
        from spattn_tvm.launch import launch_backward, launch_forward
        from spattn_tvm.runtime import load_library

        direction = self.data.problem.direction
        path = Path(request["path"])
        kernel = Kernel(
            function=load_library(path, direction),
            family=resolve_space(request["family"], direction).family,
            direction=direction,
            decisions=request["decisions"],
            path=path,
        )
        if direction == "forward":
            return lambda d: launch_forward(kernel, d.q, d.k, d.v, d.bands, d.cu_seqlens, d.scale)
        return lambda d: launch_backward(
            kernel, d.q, d.k, d.v, d.o, d.lse, d.do, d.dlse, d.bands, d.cu_seqlens, d.scale
        )


def _answer(handlers: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]], line: str) -> dict[str, Any]:
    request = json.loads(line)
    try:
        return handlers[request["do"]](request)
    except Exception as error:
        # Errors of TVM carry pages of C++ frames; the message's start and the raising line say what happened.
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error)
        text = text if len(text) < 1500 else f"{text[:1000]} … {text[-400:]}"
        return {"error": f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"}


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
