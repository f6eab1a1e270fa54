"""One holder at a time of a thing that several processes write: a compiled kernel, a schedule file, a log."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# A file system without flock: NFS without its lock daemon, Lustre mounted without it, some FUSE ones.
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_POLL_S = 0.01, 0.25

# Open files of the locks that this process holds. A forked child inherits them, and flock's lock lasts until
# the last copy is closed: it must not outlive its holder in a child that knows nothing of it.
_held: set[int] = set()


def _leave_to_parent() -> None:
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


class LockedError(RuntimeError):
    """Another process holds the lock; the message says which."""


@contextlib.contextmanager
def file_lock(
    path: Path,
    *,
    wait: bool = True,
    timeout_s: float = math.inf,
    on_wait: Callable[[str], object] = lambda holder: None,
    on_wait_after_s: float = 0.0,
) -> Iterator[None]:
    """Hold an exclusive lock, between processes and between threads, while the block runs.

    The lock is flock's, so that it ends with the process however that dies. Where the file system has no
    flock, it is the existence of a second file with the suffix ``.held``: one left behind by a process of
    this machine that is gone is taken over, one of another machine must be deleted by hand.

    Parameters
    ----------
    path : Path
        A file of the lock's own, in an existing folder; it is there while the lock is held.
    wait : bool
        Whether to wait for another holder.
    timeout_s : float
        How long to wait at most.
    on_wait : callable
        Told once who holds the lock, such as ``process 4711 on node3``.
    on_wait_after_s : float
        After how much waiting it is told.

    Raises
    ------
    LockedError
        When it is held and ``wait`` is false, or still held after ``timeout_s``.
    OSError
        When the file can't be created.
    """
    queue = _Queue(timeout_s if wait else 0.0, on_wait, on_wait_after_s)
    handle = _flock(path, queue)
    made = None if handle is not None else path.with_name(f"{path.name}.held")
    if made is not None:
        handle = _create(made, queue)
    assert handle is not None
    try:
        yield
    finally:
        if handle in _held:  # not in a child that was forked inside the block
            # Deleted before it is released: who waits on the deleted file sees that it is gone, and tries
            # anew.
            for file in (path, made):
                if file is not None:
                    with contextlib.suppress(OSError):
                        os.unlink(file)
            _release(handle)


def _release(handle: int) -> None:
    _held.discard(handle)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a copy that a child inherited must not keep it locked
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


class _Queue:
    """One wait for a lock."""

    def __init__(self, timeout_s: float, on_wait: Callable[[str], object], on_wait_after_s: float) -> None:
        self._start = time.monotonic()
        self._timeout_s, self._on_wait, self._on_wait_after_s = timeout_s, on_wait, on_wait_after_s
        self._told = False
        self._pause, self._longest_pause = _POLL_S

    def stand(self, file: Path) -> None:
        """Pass a moment.

        Raises
        ------
        LockedError
            When the time is up.
        """
        waited = time.monotonic() - self._start
        if waited >= self._timeout_s:
            after = f", still after {waited:.0f} s" if self._timeout_s else ""
            raise LockedError(f"{file} is held by {_holder(file)}{after}")
        if waited >= self._on_wait_after_s and not self._told:
            self._told = True
            self._on_wait(_holder(file))
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, self._longest_pause)


def _flock(path: Path, queue: _Queue) -> int | None:
    """An open file that holds the lock; None where the file system has no flock."""
    while fcntl is not None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        _held.add(handle)
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    queue.stand(path)
            if _is_same_file(handle, path):
                _sign(handle)
                return handle
            _release(handle)
        except OSError as error:
            _release(handle)
            if error.errno not in _NO_FLOCK:
                raise
            return None
        except BaseException:
            _release(handle)
            raise
    return None


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _create(path: Path, queue: _Queue) -> int:
    """The lock as a file that only one process can create, open."""
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            if _is_abandoned(path):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                continue
            queue.stand(path)
        else:
            _held.add(handle)
            _sign(handle)
            return handle


def _sign(handle: int) -> None:
    with contextlib.suppress(OSError):  # on a full disk a lock is held without a name
        os.truncate(handle, 0)
        os.write(handle, _own_name().encode())


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:200] or "another process"
    except OSError:
        return "another process"


def _is_abandoned(path: Path) -> bool:
    """Whether a lock file is that of a process of this machine that is gone."""
    words = _holder(path).split()
    if len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdigit():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's process
        pass
    return False
