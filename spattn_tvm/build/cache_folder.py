"""The folder that compiled kernels are kept in: whom it trusts, what is swept out, how large it grows.

A library in it runs with all rights of whoever loads it. It is therefore used only where nobody but its user
and root can write.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from .errors import KernelUnavailableError

CACHE_VARIABLE = "SPATTN_CACHE_DIR"
LIMIT_VARIABLE = "SPATTN_CACHE_MAX_MIB"
# About 10,000 kernels.
_DEFAULT_LIMIT_MIB = 2048

_HOUR_S, _DAY_S = 3600.0, 86400.0
# A kernel that was found or compiled so recently may be about to be loaded by some process.
_FRESH_S = 600.0

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_BUILD_NAME = re.compile(r"\.build-(\d+)-\w+-(.+)")

_logger = logging.getLogger("spattn_tvm")


def cache_dir() -> Path:
    """Where compiled kernels are kept: ``$SPATTN_CACHE_DIR``, else ``~/.cache/spattn_tvm``
    (``$XDG_CACHE_HOME``).

    Raises
    ------
    KernelUnavailableError
        When no such folder can be named, for want of a home folder; the message says what to set.
    """
    named = os.environ.get(CACHE_VARIABLE)
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        if named:
            return Path(named).expanduser().absolute()
        if root:
            return Path(root).absolute() / "spattn_tvm"
        home = Path.home()
        # An empty HOME is the root folder to Python, another relative one whatever folder a process is in.
        if not os.environ.get("HOME", "/") or not home.is_absolute():
            raise RuntimeError(f"HOME is {os.environ.get('HOME')!r}")
        return home / ".cache" / "spattn_tvm"
    except (OSError, RuntimeError) as error:
        raise KernelUnavailableError(
            f"there is no folder for compiled kernels ({error}): set {CACHE_VARIABLE} to a folder that this "
            "process may write to"
        ) from error


def kernels_dir() -> Path:
    """The libraries' own folder in :func:`cache_dir`."""
    return cache_dir() / "kernels"


def _user(uid: int) -> str:
    try:
        import pwd

        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except (ImportError, KeyError):
        return f"uid {uid}"


def _is_foreign(found: os.stat_result) -> bool:
    return hasattr(os, "geteuid") and found.st_uid not in (0, os.geteuid())


def _is_open_to_others(found: os.stat_result) -> bool:
    return hasattr(os, "geteuid") and bool(found.st_mode & _WRITABLE_BY_OTHERS)


def distrust(folder: Path) -> str | None:
    """Why libraries of a folder are not to be loaded and what to do about it; None when they may be, or when
    there is no such folder.
    """
    instead = f"set {CACHE_VARIABLE} to a folder of your own"
    try:
        found = os.stat(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"the cache of compiled kernels {folder} can't be used ({error}): {instead}"
    if not stat.S_ISDIR(found.st_mode):
        return f"the cache of compiled kernels {folder} is no folder: delete it, or {instead}"
    if _is_foreign(found):
        return (
            f"the cache of compiled kernels {folder} belongs to {_user(found.st_uid)}, and what is in it "
            f"would run as {_user(os.geteuid())}: {instead}"
        )
    if _is_open_to_others(found):
        return (
            f"others may write to the cache of compiled kernels {folder} (mode {found.st_mode & 0o7777:04o}),"
            f" and what they put there would run as {_user(os.geteuid())}: delete it, or `chmod 700` it if "
            f"all in it is yours, or {instead}"
        )
    return None


def require_trusted(*folders: Path) -> None:
    """Refuse to use folders that others can write to.

    Raises
    ------
    KernelUnavailableError
        With the reason and what to do.
    """
    for folder in folders:
        reason = distrust(folder)
        if reason is not None:
            raise KernelUnavailableError(reason)


def stat_own_file(path: Path) -> os.stat_result | None:
    """What ``lstat`` says of a regular file that nobody but its user and root can write, else None."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or _is_foreign(found) or _is_open_to_others(found):
        return None
    return found


def make_private(folder: Path) -> None:
    """Create a folder with its parents, each for this user alone whatever the umask; leave existing ones.

    Raises
    ------
    KernelUnavailableError
        When that fails, or the folder can't be written to.
    """
    try:
        for missing in reversed([folder, *folder.parents]):
            try:
                os.mkdir(missing, 0o700)
            except FileExistsError:
                continue
            except OSError:
                if missing.is_dir():  # on a read-only file system, or not ours to write
                    continue
                raise
            os.chmod(missing, 0o700)
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: BaseException | str) -> KernelUnavailableError:
    """The error of a cache folder that can't be written to."""
    return KernelUnavailableError(
        f"can't write compiled kernels to {folder} ({error}): make room there, or set {CACHE_VARIABLE} to a "
        "folder that this process may write to"
    )


@contextlib.contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """A folder for one build inside the cache, which is deleted with all that compilers leave in it.

    It carries the process's id and the machine's name, so that :func:`sweep` knows it when that is gone.

    Raises
    ------
    KernelUnavailableError
        When it can't be created.
    """
    try:
        made = tempfile.mkdtemp(f"-{socket.gethostname()}", f".build-{os.getpid()}-", folder)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        os.chmod(made, 0o700)
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def make_way(path: Path) -> None:
    """Remove a folder that stands where a file is to be written."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)


def mark_used(path: Path, found: os.stat_result) -> None:
    """Note that a library was used, at most once a day; silently not in a cache that is only readable."""
    if time.time() - found.st_mtime > _DAY_S:
        with contextlib.suppress(OSError):
            os.utime(path)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's process
        pass
    return False


def _is_left_over(name: str, age_s: float, names: Collection[str]) -> bool:
    """Whether a file or folder of the cache is what a process that is gone did not finish."""
    stem, suffix = os.path.splitext(name)
    if found := _BUILD_NAME.fullmatch(name):
        # A process of the same number and machine name may be in another container.
        gone = found[2] == socket.gethostname() and _is_gone(int(found[1]))
        return age_s > (_HOUR_S if gone else _DAY_S)
    if suffix in (".lock", ".held") or name.startswith(".build-"):
        return age_s > _DAY_S
    partner = {".json": ".so", ".so": ".json"}.get(suffix)
    return partner is not None and stem + partner not in names and age_s > _HOUR_S


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def limit_mib() -> int:
    """``$SPATTN_CACHE_MAX_MIB``: what the libraries in the cache may take together."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    if text.strip().isdecimal():
        return int(text)
    if text:
        _logger.warning("%s=%r is no number of MiB; taken: %d", LIMIT_VARIABLE, text, _DEFAULT_LIMIT_MIB)
    return _DEFAULT_LIMIT_MIB


def sweep(folder: Path, in_use: Collection[Path] = ()) -> None:
    """Delete what processes that are gone left half done, and the least recently used kernels above the
    limit.

    Parameters
    ----------
    folder : Path
    in_use : collection of Path
        Libraries that stay.
    """
    found: dict[str, os.stat_result] = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found[entry.name] = entry.stat(follow_symlinks=False)
    now = time.time()
    for name in list(found):
        if _is_left_over(name, now - found[name].st_mtime, found):
            _remove(folder / name)
            del found[name]
    kernels = [name for name in found if name.endswith(".so")]
    sizes = {
        name: found[name].st_size + (found[twin].st_size if (twin := name[:-2] + "json") in found else 0)
        for name in kernels
    }
    excess = sum(sizes.values()) - limit_mib() * 2**20
    for name in sorted(kernels, key=lambda name: found[name].st_mtime):
        if excess <= 0 or now - found[name].st_mtime < _FRESH_S:
            return
        path = folder / name
        if path not in in_use:
            _remove(path)
            _remove(path.with_suffix(".json"))
            excess -= sizes[name]


def describe_cache() -> tuple[Path, int, int]:
    """The cache folder, how many kernels are in it and how many bytes all of it takes.

    Raises
    ------
    KernelUnavailableError
        As :func:`cache_dir` does.
    """
    folder = cache_dir()
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(root, name)).st_size
    return folder, len(list((folder / "kernels").glob("*.so"))), size
