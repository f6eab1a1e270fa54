"""The process that compiles: it answers requests one after the other, because importing TVM takes most of a
second.

A request is a JSON line on standard input, a folder's path, in which ``request.json`` says what to build;
an answer is a JSON line on standard output. What TVM and the compilers print goes to standard error. The
process ends when nothing asks for a while, and with everything that it started when its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from spattn_tvm.families import resolve_family
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.target import MachineTarget

from .compile import compile_module
from .errors import CompilerMissingError, KernelUnavailableError
from .toolchain import compile_only_here

# A training step's second kernel follows its first within seconds. An idle process holds 200 MB.
IDLE_S = 60.0
REQUEST = "request.json"
_PARENT_POLL_S = 2.0


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Compile, in this process, what a request of ``library_cache.compile_kernel`` names."""
    resolve_family(request["family"])  # one from outside is not registered in this process yet
    target = MachineTarget(**request["target"])
    module = KernelSpec.from_json(request["kernel"]).build(target)
    return compile_module(module, target, Path(request["output"]))


def _end() -> None:
    """End this process and the compilers that it runs; it leads a group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _read_requests(requests: queue.SimpleQueue[str], parent: int) -> None:
    """Pass on what the parent writes. A child that it forked may hold the pipe open after its death."""
    received = b""
    while True:
        ready, _, _ = select.select([0], [], [], _PARENT_POLL_S)
        if os.getppid() != parent:
            _end()
        if ready:
            chunk = os.read(0, 65536)
            if not chunk:
                _end()
            *lines, received = (received + chunk).split(b"\n")
            for line in lines:
                requests.put(json.loads(line))


def _answer(folder: Path) -> dict[str, Any]:
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    os.environ.clear()
    os.environ.update(request["environment"])
    # What TVM and the compilers leave in between goes where the library goes: one disk, one sweep.
    for name in ("TMPDIR", "TEMP", "TMP"):
        os.environ[name] = str(folder)
    tempfile.tempdir = str(folder)
    try:
        return {"resources": build(request)}
    except Exception as error:
        kind = "failed"
        if isinstance(error, CompilerMissingError):
            kind = "missing"
        elif isinstance(error, (KernelUnavailableError, MemoryError)) or getattr(error, "errno", None):
            kind = "unavailable"
        words = str(error).strip() or type(error).__name__
        return {"error": words, "kind": kind, "details": traceback.format_exc()[-8000:]}


def serve(parent: int) -> None:
    """Answer the requests of the process with the id `parent`."""
    # A process may start with SIGCHLD ignored: then no compiler's exit status is known.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("500")  # if one must go for want of memory, this one
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests, parent), daemon=True).start()
    compile_only_here()
    import tvm  # noqa: F401

    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    with contextlib.suppress(queue.Empty):
        while True:
            answer = _answer(Path(requests.get(timeout=IDLE_S)))
            print(json.dumps(answer), file=answers, flush=True)
    sys.stderr.flush()
    os._exit(0)
