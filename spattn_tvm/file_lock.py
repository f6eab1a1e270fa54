"""One holder at a time of a thing that several processes write: a compiled kernel, a schedule file, a log."""

from __future__ import annotations

import contextlib
import errno
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
_POLL_S = 0.1


class LockedError(RuntimeError):
    """Another process holds the lock; the message says which."""


@contextlib.contextmanager
def file_lock(
    path: Path, *, wait: bool = True, on_wait: Callable[[str], object] = lambda holder: None
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
    on_wait : callable
        Told once who holds the lock, such as ``process 4711 on node3``, before waiting.

    Raises
    ------
    LockedError
        When it is held and ``wait`` is false.
    OSError
        When the file can't be created.
    """
    told = False

    def held(file: Path) -> None:
        nonlocal told
        holder = _holder(file)
        if not wait:
            raise LockedError(f"{file} is held by {holder}")
        if not told:
            told = True
            on_wait(holder)

    handle = _flock(path, held)
    made = None if handle is not None else _create(path.with_name(f"{path.name}.held"), held)
    try:
        yield
    finally:
        # Deleted before it is released: who waits on the deleted file sees that it is gone, and tries anew.
        for file in (path, made):
            if file is not None:
                with contextlib.suppress(OSError):
                    os.unlink(file)
        if handle is not None:
            os.close(handle)


def _flock(path: Path, held: Callable[[Path], None]) -> int | None:
    """An open file that holds the lock; None where the file system has no flock."""
    while fcntl is not None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held(path)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_same_file(handle, path):
                os.truncate(handle, 0)
                os.write(handle, _own_name().encode())
                return handle
            os.close(handle)
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_FLOCK:
                raise
            return None
        except BaseException:
            os.close(handle)
            raise
    return None


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _create(path: Path, held: Callable[[Path], None]) -> Path:
    """The lock as a file that only one process can create."""
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            if _is_abandoned(path):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                continue
            held(path)
            time.sleep(_POLL_S)
        else:
            os.write(handle, _own_name().encode())
            os.close(handle)
            return path


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
