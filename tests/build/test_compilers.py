"""Compiling in child processes: the user's process survives what ends a compiler, nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spattn_tvm.build import compilers
from spattn_tvm.build.errors import CompilerMissingError, KernelUnavailableError
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.build.toolchain import find_compiler
from spattn_tvm.families import find_space
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.target import detect_cpu

# In a process of its own: one call with the CPU's kernel, compared with the reference.
CALL = """
import os, sys, signal, threading, time, warnings
import torch
from spattn_tvm import BandLayout, banded_attention, reference_attention
layout = BandLayout.causal(2)
def call(impl="auto", head_dim=32):
    q, k, v = torch.randn(3, 1, 2, 33, head_dim)
    o = banded_attention(q, k, v, layout, impl=impl)
    torch.testing.assert_close(o, reference_attention(q, k, v, layout)[0])
def children():
    return [int(pid) for task in os.listdir("/proc/self/task")
            for pid in open(f"/proc/self/task/{task}/children").read().split()]
"""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def run(
    code: str, cache: Path, *, flags: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *flags, "-c", CALL + code],
        env={**os.environ, "SPATTN_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def left_over(cache: Path) -> list[str]:
    return [path.name for path in (cache / "kernels").glob("*") if path.suffix not in (".so", ".json")]


def write_compiler(folder: Path, body: str) -> str:
    """A C++ compiler that does `body` but when asked for its machine; ``$REAL`` is the one in its place."""
    path = folder / "cxx"
    path.write_text(
        f"#!/bin/sh\nREAL={find_compiler()}\n"
        f'case "$*" in *-dumpmachine*) exec $REAL -dumpmachine;; esac\n{body}\n'
    )
    path.chmod(0o755)
    return str(path)


FALLBACK = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    call()
print("warned:", *[str(w.message) for w in caught])
try:
    call("cpu")
except RuntimeError as error:
    print("raised:", type(error).__name__, error)
else:
    print("nothing was raised")
"""


@LINUX
def test_a_limit_of_file_sizes_is_a_visible_fallback_or_an_exception(tmp_path: Path) -> None:
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n" + FALLBACK
    answer = run(code, tmp_path)
    assert answer.returncode == 0, answer.stderr[-3000:]
    # TVM's runtime is kept beside the kernels, and may be the first that is too large.
    first = r"(compiling cpu forward|can't write compiled kernels)"
    assert re.search(f"warned: banded attention runs on the slow eager reference: {first}", answer.stdout)
    assert re.search(f"raised: KernelUnavailableError {first}", answer.stdout)
    assert "File too large" in answer.stdout or "SIGXFSZ" in answer.stdout
    assert "SPATTN_CACHE_DIR" in answer.stdout
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'ld: final link failed: No space left on device' >&2; exit 1", "No space left on device"),
        ("echo 'cc1plus: fatal error: nothing works here' >&2; exit 1", "nothing works here"),
        (
            "kill -KILL $PPID; sleep 60",
            r"ended by SIGKILL \(the machine or a container may be out of memory\)",
        ),
    ],
    ids=["full disk", "broken", "SIGKILL"],
)
def test_what_a_machine_lacks_is_told_apart_from_a_fault_of_a_kernel(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", write_compiler(tmp_path, body))
    with pytest.raises(KernelUnavailableError, match=message):
        compile_forward(tmp_path / "cache", monkeypatch)
    assert left_over(tmp_path / "cache") == []


def compile_forward(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(cache))
    decisions = find_space("cpu", "forward").untuned(32, "float32", detect_cpu())
    return compile_kernel(KernelSpec("cpu", "forward", "float32", 32, decisions), detect_cpu())


def test_a_crash_of_a_compiler_is_no_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", write_compiler(tmp_path, "kill -SEGV $PPID; sleep 60"))
    with pytest.raises(RuntimeError, match="ended by SIGSEGV") as caught:
        compile_forward(tmp_path / "cache", monkeypatch)
    assert not isinstance(caught.value, KernelUnavailableError)


def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "TIMEOUT_S", 6.0)
    monkeypatch.setenv("CXX", write_compiler(tmp_path, f"echo $$ >{tmp_path}/pid; sleep 300"))
    with pytest.raises(KernelUnavailableError, match="not compiled within 6 s"):
        compile_forward(tmp_path / "cache", monkeypatch)
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert left_over(tmp_path / "cache") == []


def is_gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process ends in time; one that is only waiting for its parent to take note has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@LINUX
@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.2, 2.5])
def test_ctrl_c_is_a_keyboard_interrupt_and_ends_the_child(after_s: float, tmp_path: Path) -> None:
    code = (
        "interrupt = threading.Timer(float(os.environ['AFTER']), os.killpg, (os.getpgrp(), signal.SIGINT))\n"
        "try:\n"
        "    interrupt.start()\n"
        "    call('cpu')\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', *children())\n"
    )
    # Slow enough that the compiling always takes longer.
    compiler = write_compiler(tmp_path, 'sleep 3; exec $REAL "$@"')
    process = subprocess.Popen(
        [sys.executable, "-c", CALL + code],
        env={
            **os.environ,
            "SPATTN_CACHE_DIR": str(tmp_path / "cache"),
            "AFTER": str(after_s),
            "CXX": compiler,
        },
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.communicate(timeout=120)[0].split() == ["interrupted"]
    assert process.returncode == 0
    assert left_over(tmp_path / "cache") == []


@LINUX
@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with a forked child"])
def test_the_compiler_dies_with_its_user(fork: bool, tmp_path: Path) -> None:
    code = (
        "import spattn_tvm.build.compilers as c\n"
        "def watch():\n"
        "    while not children(): time.sleep(0.02)\n"
        "    print(*children(), flush=True)\n"
        "    if os.environ['FORK']:\n"
        "        time.sleep(0.5); child = os.fork()\n"
        "        if child == 0: os.close(1); time.sleep(60); os._exit(0)\n"
        "        print(child, flush=True)\n"
        "    else: print(0, flush=True)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "call('cpu')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", CALL + code],
        env={
            **os.environ,
            "SPATTN_CACHE_DIR": str(tmp_path / "cache"),
            "FORK": "1" if fork else "",
            "CXX": write_compiler(tmp_path, "sleep 60"),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    compiler, child = int(process.stdout.readline().split()[0]), int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        assert is_gone(compiler)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)


@LINUX
@pytest.mark.parametrize(
    ("flags", "before"),
    [
        ((), "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"),
        ((), "signal.signal(signal.SIGCHLD, lambda *a: os.waitpid(-1, os.WNOHANG))"),
        ((), "signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))"),
        ((), "os.close(0)"),
        ((), "os.close(0); os.close(1); os.close(2)"),
        ((), "sys.stdin = sys.stdout = sys.stderr = None"),
        (("-I",), ""),
        (("-E", "-s", "-W", "error"), "warnings.simplefilter('default')"),
        ((), "os.umask(0)"),
        ((), "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"),
        ((), "os.environ['TMPDIR'] = '/proc/nonexistent'"),
        ((), "import types; sys.modules['__main__'] = types.ModuleType('__main__')"),
    ],
    ids=[
        "SIGCHLD ignored",
        "SIGCHLD handled",
        "signals blocked",
        "stdin closed",
        "no standard files",
        "no standard streams",
        "isolated",
        "warnings are errors",
        "umask 0",
        "no current folder",
        "no TMPDIR",
        "no main module",
    ],
)
def test_any_process_can_compile(flags: tuple[str, ...], before: str, tmp_path: Path) -> None:
    package = Path(compilers.__file__).parents[2]
    code = f"{before}\ncall('cpu'); open({str(tmp_path / 'done')!r}, 'w').close(); os._exit(0)\n"
    result = subprocess.run(
        [sys.executable, *flags, "-c", f"import sys; sys.path.insert(0, {str(package)!r})\n" + CALL + code],
        env={**os.environ, "SPATTN_CACHE_DIR": str(tmp_path / "cache")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0 and (tmp_path / "done").exists(), result.stderr[-3000:]
    assert left_over(tmp_path / "cache") == []
    assert all(path.stat().st_mode & 0o022 == 0 for path in (tmp_path / "cache").rglob("*"))


@LINUX
def test_forked_processes_and_threads_compile_for_themselves(tmp_path: Path) -> None:
    code = (
        "import multiprocessing\n"
        "def work(head_dim): call('cpu', head_dim)\n"
        "if __name__ == '__main__':\n"
        "    call('cpu')\n"
        "    context = multiprocessing.get_context('fork')\n"
        "    forked = [context.Process(target=work, args=(d,), daemon=True) for d in (32, 64, 64)]\n"
        "    threads = [threading.Thread(target=work, args=(d,)) for d in (96, 128, 128)]\n"
        "    for task in forked + threads: task.start()\n"
        "    for task in forked + threads: task.join(100)\n"
        "    assert [p.exitcode for p in forked] == [0, 0, 0]\n"
        "    call('cpu', 48)\n"
    )
    answer = run(code, tmp_path, OMP_NUM_THREADS="1")
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 5
    assert left_over(tmp_path) == []


@LINUX
def test_a_process_is_kept_for_the_next_kernel_and_replaced_when_it_is_gone(tmp_path: Path) -> None:
    code = (
        "call('cpu'); first = children(); call('cpu', 64); assert children() == first and len(first) == 1\n"
        "os.kill(first[0], signal.SIGKILL); time.sleep(0.2)\n"
        "call('cpu', 96); second = children(); assert len(second) == 1 and second != first\n"
        "print(*second)\n"
    )
    answer = run(code, tmp_path)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert is_gone(int(answer.stdout), 1.0)


@LINUX
def test_an_idle_process_ends_by_itself(tmp_path: Path) -> None:
    request = "import spattn_tvm.build.compile_process as c; c.IDLE_S = 0.3; c.serve({})"
    process = subprocess.Popen(
        [sys.executable, "-c", request.format(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert b"ready" in process.stdout.readline()
    assert process.wait(10) == 0


def test_a_process_that_cannot_start_is_a_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "_command", lambda: [sys.executable, "-c", "raise SystemExit('no tvm')"])
    with pytest.raises(KernelUnavailableError, match=r"status 1 at its start: no tvm"):
        compile_forward(tmp_path, monkeypatch)
    monkeypatch.setattr(compilers, "_command", lambda: ["/proc/nonexistent/python"])
    with pytest.raises(KernelUnavailableError, match=r"can't start a process .*nonexistent"):
        compile_forward(tmp_path, monkeypatch)


def test_the_interpreter_of_an_embedding_program_is_found_or_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilers.multiprocessing.spawn, "get_executable", lambda: sys.executable)
    assert compilers.find_python() == sys.executable
    monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
    monkeypatch.setattr(compilers.multiprocessing.spawn, "get_executable", lambda: sys.executable)
    found = compilers.find_python()
    assert Path(found).name.startswith("python") and Path(found).exists()
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(CompilerMissingError, match=r"uwsgi.*multiprocessing\.set_executable"):
        compilers.find_python()
    monkeypatch.setattr(compilers.multiprocessing.spawn, "get_executable", lambda: b"/opt/python3")
    assert compilers.find_python() == "/opt/python3"


def test_another_version_of_python_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = compilers._command()
    version = str(tuple(sys.version_info[:2]))
    command[-1] = command[-1].replace(version, "(3, 1)")
    assert "(3, 1)" in command[-1]
    monkeypatch.setattr(compilers, "_command", lambda: command)
    with pytest.raises(KernelUnavailableError, match=r"it is Python 3.*not \(3, 1\)"):
        compile_forward(tmp_path, monkeypatch)


def test_compiling_imports_no_torch_in_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = tmp_path / "poison" / "torch"
    poison.mkdir(parents=True)
    (poison / "__init__.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.syspath_prepend(str(poison.parent))
    assert compile_forward(tmp_path / "cache", monkeypatch).is_file()
