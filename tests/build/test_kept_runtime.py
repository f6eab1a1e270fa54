"""TVM's runtime library in the kernel cache: what is kept, and when it may be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spattn_tvm.build import kept_runtime as module
from spattn_tvm.build.kept_runtime import keep_runtime, kept_runtime
from spattn_tvm.runtime import CUDA_RUNTIME_LIBRARY, RUNTIME_LIBRARY


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel in a cache, by a TVM whose runtime library is a few bytes."""
    installed = tmp_path / "tvm" / "lib"
    installed.mkdir(parents=True)
    (installed / RUNTIME_LIBRARY).write_bytes(b"runtime")
    (installed / CUDA_RUNTIME_LIBRARY).write_bytes(b"cuda")
    monkeypatch.setattr(module, "installed_runtime_folder", lambda: installed)
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "kernels" / "kernel.so"
    path.parent.mkdir(parents=True, mode=0o700)
    path.with_suffix(".json").write_text(json.dumps({"tvm": "1.2.3"}))
    return path


def test_both_libraries_are_kept_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_runtime(library) is None
    keep_runtime("1.2.3")
    folder = kept_runtime(library)
    assert folder is not None
    assert (folder / RUNTIME_LIBRARY).read_bytes() == b"runtime"
    assert (folder / CUDA_RUNTIME_LIBRARY).read_bytes() == b"cuda"
    assert not list(folder.glob(".build-*"))
    monkeypatch.setattr(module, "build_folder", lambda folder: pytest.fail("written again"))
    keep_runtime("1.2.3")


@pytest.mark.parametrize("version", [None, 7, "1.2.4", "../kernels", "a/b"])
def test_a_kernel_of_another_tvm_has_none(library: Path, version: object) -> None:
    keep_runtime("1.2.3")
    library.with_suffix(".json").write_text(json.dumps({"tvm": version}))
    assert kept_runtime(library) is None


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda folder: (folder / RUNTIME_LIBRARY).write_bytes(b"run"),
    "altered": lambda folder: (folder / CUDA_RUNTIME_LIBRARY).write_bytes(b"code"),
    "gone": lambda folder: (folder / RUNTIME_LIBRARY).unlink(),
    "not listed": lambda folder: (folder / "files.json").write_text("{}"),
    "list is none": lambda folder: (folder / "files.json").write_text("[7"),
    "list is another": lambda folder: (folder / "files.json").write_text(json.dumps([RUNTIME_LIBRARY])),
    "file of others": lambda folder: (folder / RUNTIME_LIBRARY).chmod(0o666),
    "folder of others": lambda folder: folder.chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_not_loaded_and_is_replaced(library: Path, damage: str) -> None:
    keep_runtime("1.2.3")
    folder = kept_runtime(library)
    assert folder is not None
    DAMAGE[damage](folder)
    assert kept_runtime(library) is None
    if damage == "folder of others":
        folder.chmod(0o700)
    keep_runtime("1.2.3")
    assert kept_runtime(library) == folder
    assert (folder / CUDA_RUNTIME_LIBRARY).read_bytes() == b"cuda"
