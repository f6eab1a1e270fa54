"""Compiling in child processes: a compiler that meets a full disk ends its process, not the user's.

Each serves one request at a time and is kept for the next. They are started with the interpreter, the import
path and the environment of this process, but never run its main module.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing.spawn
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from spattn_tvm.provenance import available_cpus
from spattn_tvm.target import MachineTarget

from .cache_folder import CACHE_VARIABLE, unwritable
from .compile_process import REQUEST
from .errors import CompilerMissingError, KernelUnavailableError
from .toolchain import compile_environment

# nvcc takes a minute for the largest kernels of a search.
TIMEOUT_S = 900.0
_STDERR_KEPT = 65536
_PROBE_BYTES = 2**20
_LAST_BREATH_S = 1.0
# What a process reads only at its start: the loader's paths, and the compiler that TVM asks for its triple.
_READ_AT_START = re.compile(r"LD_\w+|PYTHON\w+|PATH|CXX|CC")
# How compilers word the limits of a machine. LLVM and ld end by themselves and leave no errno.
_MACHINE_LIMITS = re.compile(
    r"No space left on device|File too large|File size limit exceeded|Disk quota exceeded"
    r"|Read-only file system|Cannot allocate memory|[Oo]ut of memory|memory exhausted|std::bad_alloc"
    r"|bad allocation|MemoryError"
    r"|failed to map segment|Resource temporarily unavailable|Too many open files|Input/output error"
    r"|Killed|died due to signal (9|25)"
)
# Signals that say something of the machine and its limits; the others tell of a fault in a compiler.
_FROM_OUTSIDE = {
    name: reason
    for name, reason in (
        ("SIGKILL", "the machine or a container may be out of memory"),
        ("SIGTERM", "something ended it"),
        ("SIGXFSZ", "the limit of a file's size, `ulimit -f`"),
        ("SIGXCPU", "the limit of CPU time, `ulimit -t`"),
        ("SIGBUS", "a file system may be full"),
    )
    if hasattr(signal, name)
}


def find_python() -> str:
    """An interpreter like this process's own.

    That is what ``multiprocessing.set_executable`` named, or ``sys.executable``; in a program that embeds
    Python or was frozen, where that is the program itself, the interpreter of its installation.

    Raises
    ------
    CompilerMissingError
        When there is none.
    """
    named = os.fsdecode(multiprocessing.spawn.get_executable() or "")
    if named and named != sys.executable:
        return named
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable or "", getattr(sys, "_base_executable", None) or ""]
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        candidates += [os.path.join(prefix, "bin", version), os.path.join(prefix, "python.exe")]
    if getattr(sys, "frozen", False):
        candidates = []
    for candidate in candidates:
        name = os.path.basename(candidate).lower()
        if name.startswith(("python", "pypy")) and shutil.which(candidate):
            return candidate
    raise CompilerMissingError(
        "compiling a kernel needs a Python interpreter of its own, and sys.executable is "
        f"{sys.executable!r}: name one of the same version with multiprocessing.set_executable(path), or run "
        "an exported bundle"
    )


def _command() -> list[str]:
    flags = [
        flag
        for flag, is_set in (
            ("-E", sys.flags.ignore_environment),
            ("-s", sys.flags.no_user_site),
            ("-S", sys.flags.no_site),
        )
        if is_set
    ]
    paths = []
    for entry in (*filter(lambda entry: isinstance(entry, str), sys.path), str(Path(__file__).parents[2])):
        with contextlib.suppress(OSError):  # a current folder that was deleted
            paths.append(os.path.abspath(entry))
    version = tuple(sys.version_info[:2])
    # The path comes before the first import, which the folder where this process runs must not answer.
    start = (
        f"import sys; sys.path[:] = {list(dict.fromkeys(paths))!a}\n"
        f"if sys.version_info[:2] != {version}: sys.exit('it is Python ' + sys.version + ', not {version}')\n"
        f"from spattn_tvm.build.compile_process import serve; serve({os.getpid()})"
    )
    return [find_python(), *flags, "-W", "ignore", "-c", start]


class _Compiler:
    """One process that compiles."""

    def __init__(self, command: list[str], environment: dict[str, str], key: object) -> None:
        self.key = key
        self._received = {"stdout": b"", "stderr": b""}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the user's process, which ends this one
                bufsize=0,
            )
        except OSError as error:
            raise KernelUnavailableError(
                f"can't start a process to compile in ({command[0]}: {error})"
            ) from error
        assert self._process.stdout is not None and self._process.stderr is not None
        self._streams = {"stdout": self._process.stdout, "stderr": self._process.stderr}
        for stream in self._streams.values():
            os.set_blocking(stream.fileno(), False)
        _all.add(self)

    def send(self, folder: Path) -> None:
        self._received["stderr"] = b""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receive() tells of the death
            self._process.stdin.write(json.dumps(str(folder)).encode() + b"\n")

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """The next answer; None when the process has ended.

        Raises
        ------
        TimeoutError
            After the deadline.
        """
        with selectors.DefaultSelector() as selector:
            for name, stream in self._streams.items():
                selector.register(stream, selectors.EVENT_READ, name)
            while True:
                line, newline, rest = self._received["stdout"].partition(b"\n")
                if newline:
                    self._received["stdout"] = rest
                    return json.loads(line)
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                for key, _ in selector.select(min(left_s, 3600.0)):
                    chunk = os.read(key.fd, 65536)
                    self._received[key.data] += chunk
                    if not chunk:
                        selector.unregister(key.fileobj)
                        if key.data == "stdout":
                            return None
                self._received["stderr"] = self._received["stderr"][-_STDERR_KEPT:]

    def last_words(self) -> str:
        """What a process that has ended wrote to standard error."""
        text = self._received["stderr"].decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-40:])

    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int | None:
        """The exit status of a process that has closed its answers; None when somebody else took it, as with
        SIGCHLD ignored."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_BREATH_S)
        self.kill()
        return self._process.returncode or None

    def kill(self) -> None:
        """End the process with the compilers that it runs."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed before
            self._received["stderr"] += os.read(self._streams["stderr"].fileno(), _STDERR_KEPT)
        self._close()

    def abandon(self) -> None:
        """Leave the process to the one that started it, from which this one was forked."""
        self._process.returncode = 0
        self._close()

    def _close(self) -> None:
        for stream in (self._process.stdin, *self._streams.values()):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


# One for each CPU: compilers on fewer would make every one of them late.
_slots = threading.BoundedSemaphore(available_cpus())
_lock = threading.Lock()
_idle: list[_Compiler] = []
_all: weakref.WeakSet[_Compiler] = weakref.WeakSet()


def _forget_after_fork() -> None:
    global _slots, _lock
    _slots, _lock = threading.BoundedSemaphore(available_cpus()), threading.Lock()
    for compiler in list(_all):
        compiler.abandon()
    _all.clear()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


@atexit.register
def end_compilers() -> None:
    """End the processes that wait for a request."""
    with _lock:
        idle = [*_idle]
        _idle.clear()
    for compiler in idle:
        compiler.kill()


def _take(key: object) -> _Compiler | None:
    """An idle process that was started alike."""
    with _lock:
        for compiler in [compiler for compiler in _idle if compiler.ended()]:
            _idle.remove(compiler)
            compiler.kill()
        for compiler in _idle:
            if compiler.key == key:
                _idle.remove(compiler)
                return compiler
    return None


def _ask(folder: Path, environment: dict[str, str]) -> tuple[dict[str, Any] | None, _Compiler]:
    """An answer, or None, and the process that gave it or died over it."""
    command = _command()
    key = (command, sorted(item for item in environment.items() if _READ_AT_START.fullmatch(item[0])))
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        idle = _take(key)
        compiler = _Compiler(command, environment, key) if idle is None else idle
        try:
            if idle is None and compiler.receive(deadline) is None:
                status = _status_text(compiler.wait())
                raise KernelUnavailableError(
                    f"the process to compile in {status} at its start: {compiler.last_words()}"
                )
            compiler.send(folder)
            answer = compiler.receive(deadline)
        except TimeoutError:
            compiler.kill()
            raise KernelUnavailableError(f"a kernel was not compiled within {TIMEOUT_S:.0f} s") from None
        except BaseException:
            compiler.kill()
            raise
        # One that was idle may just have gone.
        if answer is not None or idle is None:
            return answer, compiler
        compiler.kill()


def _status_text(status: int | None) -> str:
    if status is None:
        return "ended without an answer"
    if status > 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    reason = _FROM_OUTSIDE.get(name)
    return f"was ended by {name}" + (f" ({reason})" if reason else "")


def _obstacle(folder: Path, text: str) -> str | None:
    """What of this machine made a compiler fail that said `text`; None when that seems to be the kernel."""
    if found := _MACHINE_LIMITS.search(text):
        return found[0]
    try:
        probe = folder / "probe"
        probe.write_bytes(bytes(_PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def compile_apart(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compile in a child process, and wait for it.

    Parameters
    ----------
    request : dict
        As :func:`spattn_tvm.build.compile_process.build` takes it.
    folder : Path
        What the compilers write in between goes there too; it is deleted by the caller.

    Returns
    -------
    dict
        As :func:`spattn_tvm.build.compile.compile_module`.

    Raises
    ------
    CompilerMissingError, KernelUnavailableError
        When a compiler is missing or can't run on this machine: a full disk, a limit, no answer in time.
    RuntimeError
        When the kernel can't be compiled.
    KeyboardInterrupt
        At once; the child and what it started are gone then.
    """
    what = f"{request['kernel']['family']} {request['kernel']['direction']}"
    environment = compile_environment(MachineTarget(**request["target"]))
    try:
        text = json.dumps({**request, "environment": environment})
        (folder / REQUEST).write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    with _slots:
        answer, compiler = _ask(folder, environment)
        if answer is not None:
            with _lock:
                _idle.append(compiler)
    if answer is None:
        status = compiler.wait()
        words = compiler.last_words()
        message = f"compiling {what} failed: the compiling process {_status_text(status)}"
        from_outside = status is None or f"{_status_text(status)}".endswith(")")
        obstacle = _obstacle(folder, words)
        if obstacle is not None or from_outside:
            raise _machine_error(message, obstacle, folder)
        raise RuntimeError(f"{message}\n{words}")
    if "resources" in answer:
        return answer["resources"]
    if answer["kind"] == "missing":
        raise CompilerMissingError(answer["error"])
    message = f"compiling {what} failed: {answer['error'][-2000:]}"
    obstacle = _obstacle(folder, answer["details"])
    if answer["kind"] == "unavailable" or obstacle is not None:
        raise _machine_error(message, obstacle, folder)
    raise RuntimeError(f"{message}\n{answer['details']}")


def _machine_error(message: str, obstacle: str | None, folder: Path) -> KernelUnavailableError:
    said = f" ({obstacle})" if obstacle and obstacle not in message else ""
    return KernelUnavailableError(
        f"{message}{said}; compilers write to {folder.parent}, another folder: {CACHE_VARIABLE}"
    )
