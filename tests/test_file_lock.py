"""Locks between processes and threads: one holder at a time, whatever becomes of it and its file system."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spattn_tvm import file_lock as module
from spattn_tvm.file_lock import LockedError, file_lock

COUNT = """
import sys
from pathlib import Path
from spattn_tvm import file_lock as module
if sys.argv[2] != "0":
    import fcntl
    def flock(handle, operation):
        raise OSError(int(sys.argv[2]), "no flock here")
    module.fcntl.flock = flock
path = Path(sys.argv[1])
for _ in range(40):
    with module.file_lock(path.with_suffix(".lock")):
        path.write_text(str(int(path.read_text()) + 1))
"""

HOLD = """
import sys, time
from pathlib import Path
from spattn_tvm.file_lock import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(
    params=[0, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=lambda number: f"errno {number}"
)
def refusal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """With flock, and on file systems that refuse it in their ways."""
    if request.param:

        def flock(handle: int, operation: int) -> None:
            raise OSError(request.param, "no flock here")

        monkeypatch.setattr(module.fcntl, "flock", flock)
    return int(request.param)


def test_processes_take_turns(refusal: int, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(counter), str(refusal)]) for _ in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert counter.read_text() == "120"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"], "a lock leaves its file behind"


def test_threads_take_turns(refusal: int, tmp_path: Path) -> None:
    inside, worst = 0, 0

    def work() -> None:
        nonlocal inside, worst
        for _ in range(5):
            with file_lock(tmp_path / "lock"):
                inside += 1
                worst = max(worst, inside)
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1


def test_whoever_does_not_wait_is_told_who_holds_it(refusal: int, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock(path):
        expected = rf"lock.* is held by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(LockedError, match=expected), file_lock(path, wait=False):
            pytest.fail("two hold it")
    with file_lock(path, wait=False):
        pass


def test_whoever_waits_is_told_once(refusal: int, tmp_path: Path) -> None:
    path, told = tmp_path / "lock", []
    entered = threading.Event()

    def hold() -> None:
        with file_lock(path):
            entered.set()
            time.sleep(0.4)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    with file_lock(path, on_wait=told.append):
        pass
    thread.join()
    assert told == [f"process {os.getpid()} on {socket.gethostname()}"]


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(LockedError, match=f"process {holder.pid} "), file_lock(path, wait=False):
        pytest.fail("two hold it")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with file_lock(path, wait=False):
        pass


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_without_flock_a_dead_holder_of_this_machine_is_replaced(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fcntl", None)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    held = tmp_path / "lock.held"
    held.write_text(f"process {dead.pid} on {socket.gethostname() if host == 'here' else 'another-host'}")
    if host == "here":
        with file_lock(tmp_path / "lock", wait=False):
            pass
        assert not held.exists()
    else:
        expected = r"lock\.held is held by process \d+ on another-host"
        with pytest.raises(LockedError, match=expected), file_lock(tmp_path / "lock", wait=False):
            pytest.fail("two hold it")
        assert held.exists()


def test_an_error_in_the_block_releases_it_and_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), file_lock(tmp_path / "lock"):
        _ = 1 / 0
    with file_lock(tmp_path / "lock", wait=False):
        pass
    with pytest.raises(OSError, match="No such file"), file_lock(tmp_path / "none" / "lock"):
        pass


def test_a_wait_ends_after_its_time_and_is_told_late(refusal: int, tmp_path: Path) -> None:
    path, told = tmp_path / "lock", []
    with (
        file_lock(path),
        pytest.raises(LockedError, match="still after 0 s"),
        file_lock(path, timeout_s=0.2, on_wait=told.append, on_wait_after_s=0.1),
    ):
        pytest.fail("two hold it")
    assert len(told) == 1
    with file_lock(path), pytest.raises(LockedError), file_lock(path, timeout_s=0.1, on_wait_after_s=9.0):
        pytest.fail("two hold it")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["released", "killed"])
def test_a_forked_child_does_not_keep_the_lock_of_its_parent(when: str, tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom spattn_tvm.file_lock import file_lock\n"
        "with file_lock(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.close(1); time.sleep(60); os._exit(0)\n"
        "    print(child, flush=True); sys.stdin.readline()\n"
        "print('released', flush=True); sys.stdin.readline()\n"
    )
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None and holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        if when == "killed":
            holder.kill()
            holder.wait()
        else:
            holder.stdin.write(b"\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == b"released\n"
        with file_lock(path, timeout_s=5):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.wait()


def test_a_forked_child_that_leaves_the_block_releases_nothing(refusal: int, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    left, leave = os.pipe()
    with file_lock(path):
        child = os.fork()
        if child:
            assert os.read(left, 1) == b"x"
            with pytest.raises(LockedError), file_lock(path, wait=False):
                pytest.fail("two hold it")
    if child == 0:
        os.write(leave, b"x")
        os._exit(0)
    os.waitpid(child, 0)
