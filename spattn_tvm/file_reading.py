"""Reading files that anybody may have damaged, replaced or put there: what is in them, or a ValueError."""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SHOWN_CHARACTERS = 240
_LONGEST_INTEGER = 1000


def read_regular_file(path: Path, largest_bytes: int, *, follow_links: bool = True) -> bytes:
    """The bytes of a file; a pipe, which would keep the reader waiting, a device or a folder is refused.

    Raises
    ------
    OSError
        When it can't be opened.
    ValueError
        When it is no regular file, or larger than `largest_bytes`.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is no regular file")
        if facts.st_size > largest_bytes:
            raise ValueError(f"it has {facts.st_size} bytes, more than {largest_bytes}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _integer(digits: str) -> int | str:
    # Python refuses the longest ones. As a text it makes what it stands in unreadable, not the whole file.
    return int(digits) if len(digits) < _LONGEST_INTEGER else digits


def parse_json(data: bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte-order mark; the hook is that of `json.loads`.

    Raises
    ------
    ValueError
        When it is none, or nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), parse_int=_integer, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def set_aside(path: Path) -> Path:
    """Rename a damaged file to the first free one of ``….damaged``, ``….damaged-1`` and so on."""
    names = (f"{path.name}.damaged{f'-{count}' if count else ''}" for count in itertools.count())
    aside = next(place for name in names if not os.path.lexists(place := path.with_name(name)))
    os.rename(path, aside)
    return aside


def shown(text: object, most: int = _SHOWN_CHARACTERS) -> str:
    """Text for a message: of so many letters at most, and printable everywhere."""
    line = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return line if len(line) <= most else f"{line[:most]} …"
