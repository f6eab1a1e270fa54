"""TVM's small runtime library beside the kernels in the cache, so that they run without TVM.

A folder for each version of TVM that compiled some of them holds what a kernel loads, and a file with the
sizes and SHA-256 of it: the system's loader kills the process on a library that was cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from spattn_tvm.file_reading import parse_json
from spattn_tvm.runtime import CUDA_RUNTIME_LIBRARY, RUNTIME_LIBRARY, installed_runtime_folder

from .cache_folder import build_folder, cache_dir, distrust, make_private, make_way, stat_own_file, unwritable
from .resources import library_metadata

_LIST = "files.json"


def _folder(version: str) -> Path:
    return cache_dir() / f"runtime-{version}"


def _facts(path: Path) -> dict[str, int | str]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _is_whole(folder: Path) -> bool:
    listed = folder / _LIST
    if not folder.is_dir() or distrust(folder) is not None or stat_own_file(listed) is None:
        return False
    try:
        facts = parse_json(listed.read_bytes())
        return RUNTIME_LIBRARY in facts and all(
            stat_own_file(folder / name) is not None and _facts(folder / name) == facts[name]
            for name in facts
        )
    except (OSError, ValueError, TypeError):
        return False


def keep_runtime(version: str) -> None:
    """Copy the installed TVM's runtime library into the cache, unless it is there.

    Parameters
    ----------
    version : str
        Of the installed TVM.

    Raises
    ------
    KernelUnavailableError
        When the cache can't be written to.
    """
    installed, folder = installed_runtime_folder(), _folder(version)
    if installed is None or _is_whole(folder):
        return
    make_private(folder)
    with build_folder(folder) as build:
        try:
            facts = {}
            for name in (RUNTIME_LIBRARY, CUDA_RUNTIME_LIBRARY):
                if (installed / name).is_file():
                    shutil.copyfile(installed / name, build / name)
                    facts[name] = _facts(build / name)
            (build / _LIST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            for name in (*facts, _LIST):  # the list last: with it the folder is whole
                os.chmod(build / name, 0o644)
                make_way(folder / name)
                os.replace(build / name, folder / name)
        except OSError as error:
            raise unwritable(folder, error) from error


def kept_runtime(library: Path) -> Path | None:
    """The folder with the runtime library of the TVM that compiled a library of the cache; None where it is
    not there, or not whole, or others may write to it.
    """
    version = library_metadata(library).get("tvm")
    if not isinstance(version, str) or Path(version).name != version:
        return None
    folder = _folder(version)
    return folder if _is_whole(folder) else None
