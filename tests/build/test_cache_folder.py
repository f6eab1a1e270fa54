"""The folder of compiled kernels: who is trusted, what is swept out, how large it grows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from spattn_tvm import doctor
from spattn_tvm.build import cache_folder
from spattn_tvm.build.cache_folder import (
    build_folder,
    cache_dir,
    distrust,
    limit_mib,
    make_private,
    require_trusted,
    stat_own_file,
    sweep,
)
from spattn_tvm.build.errors import KernelUnavailableError

HOUR, DAY = 3600, 86400
HERE = socket.gethostname()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private cache folder."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(cache))
    return cache


def with_owner(monkeypatch: pytest.MonkeyPatch, path: Path, uid: int) -> None:
    """Let a file seem to belong to somebody."""
    for name in ("stat", "lstat"):
        original = getattr(os, name)

        def replaced(asked: object, *args: object, original: object = original, **kwargs: object) -> object:
            found = original(asked, *args, **kwargs)
            if str(asked) == str(path):
                return SimpleNamespace(
                    st_mode=found.st_mode, st_uid=uid, st_size=found.st_size, st_mtime=found.st_mtime
                )
            return found

        monkeypatch.setattr(cache_folder.os, name, replaced)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o720, 0o702, 0o2775])
def test_a_folder_that_others_may_write_to_is_refused_with_the_remedy(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(KernelUnavailableError, match=rf"others may write to .*{mode:04o}.*chmod 700"):
        require_trusted(folder)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o555, 0o500])
def test_a_folder_that_others_may_read_is_trusted(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    require_trusted(folder)
    folder.chmod(0o700)


def test_a_folder_of_somebody_else_is_refused_and_one_of_root_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder.os, "geteuid", lambda: 1234)
    for owner, is_trusted in ((1234, True), (0, True), (4321, False)):
        with monkeypatch.context() as patch:
            with_owner(patch, folder, owner)
            reason = distrust(folder)
            assert (reason is None) == is_trusted
            if reason:
                assert "belongs to uid 4321" in reason and "SPATTN_CACHE_DIR" in reason
    # Root trusts nobody else either.
    monkeypatch.setattr(cache_folder.os, "geteuid", lambda: 0)
    with_owner(monkeypatch, folder, 1234)
    assert "belongs to uid 1234" in (distrust(folder) or "")


def test_the_target_of_a_link_counts(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir(mode=0o700)
    link.symlink_to(target)
    assert distrust(link) is None
    target.chmod(0o777)
    assert "others may write" in (distrust(link) or "")


def test_what_is_not_there_is_no_reason_and_what_is_no_folder_is_one(tmp_path: Path) -> None:
    assert distrust(tmp_path / "none") is None
    (tmp_path / "file").touch()
    assert "is no folder" in (distrust(tmp_path / "file") or "")
    assert "can't be used" in (distrust(tmp_path / "file" / "inside") or "")


def test_a_file_counts_only_when_it_is_ones_own_and_regular(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "library.so"
    assert stat_own_file(path) is None
    path.write_bytes(b"1234")
    path.chmod(0o644)
    found = stat_own_file(path)
    assert found is not None and found.st_size == 4
    (folder / "link.so").symlink_to(path)
    assert stat_own_file(folder / "link.so") is None
    path.chmod(0o664)
    assert stat_own_file(path) is None
    path.chmod(0o644)
    with_owner(monkeypatch, path, os.geteuid() + 17)
    assert stat_own_file(path) is None


@pytest.mark.parametrize("umask", [0, 0o002, 0o077, 0o777])
def test_folders_are_made_for_one_user_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_private(tmp_path / "a" / "b")
        with build_folder(tmp_path / "a" / "b") as build:
            assert build.stat().st_mode & 0o777 == 0o700
            (build / "file").touch()
    finally:
        os.umask(before)
    for made in (tmp_path / "a", tmp_path / "a" / "b"):
        assert made.stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_made_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KernelUnavailableError, match="SPATTN_CACHE_DIR"):
        make_private(tmp_path / "file" / "inside")


def test_without_a_home_the_message_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", home)
        with pytest.raises(KernelUnavailableError, match=r"home directory.*SPATTN_CACHE_DIR"):
            cache_dir()
        finding = doctor._cache()
        assert (finding.status, "SPATTN_CACHE_DIR" in finding.remedy) == ("missing", True)
    for home_folder in ("", "relative", "."):
        monkeypatch.setenv("HOME", home_folder)
        with pytest.raises(KernelUnavailableError, match=rf"HOME is '{home_folder}'.*SPATTN_CACHE_DIR"):
            cache_dir()
    monkeypatch.setenv("SPATTN_CACHE_DIR", "relative")
    assert cache_dir() == Path.cwd() / "relative"


def aged(path: Path, age_s: float) -> Path:
    used = time.time() - age_s
    os.utime(path, (used, used), follow_symlinks=False)
    return path


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_processes_left_half_done_is_swept_and_nothing_else(folder: Path, dead: int) -> None:
    gone, alive = dead, os.getppid()
    cases = [
        (f".build-{gone}-abc_1-{HERE}/", 2 * HOUR, True),
        (f".build-{gone}-abc_2-{HERE}/", HOUR / 2, False),
        (f".build-{alive}-abc_3-{HERE}/", 2 * HOUR, False),
        (f".build-{alive}-abc_4-{HERE}/", 2 * DAY, True),
        (f".build-{gone}-abc_5-another-host/", 2 * HOUR, False),
        (f".build-{gone}-abc_6-another-host/", 2 * DAY, True),
        (".build-abcdef/", 2 * DAY, True),
        (".build-abcdeg/", 2 * HOUR, False),
        ("orphan.json", 2 * HOUR, True),
        ("new-orphan.json", HOUR / 2, False),
        ("alone.so", 2 * HOUR, True),
        ("new-alone.so", HOUR / 2, False),
        ("kernel.so", 300 * DAY, False),
        ("kernel.json", 300 * DAY, False),
        ("old.lock", 2 * DAY, True),
        ("old.lock.held", 2 * DAY, True),
        ("new.lock", 2 * HOUR, False),
        ("notes.txt", 300 * DAY, False),
    ]
    for name, age_s, _ in cases:
        path = folder / name
        if name.endswith("/"):
            path.mkdir()
            (path / "kernel.o").write_bytes(b"half")
        else:
            path.write_bytes(b"x")
        aged(path, age_s)
    sweep(folder)
    assert {name for name, _, _ in cases if not (folder / name).exists()} == {
        name for name, _, is_swept in cases if is_swept
    }


def add_kernel(folder: Path, name: str, age_s: float, size: int = 2**20) -> Path:
    path = folder / f"{name}.so"
    path.write_bytes(bytes(size))
    path.with_suffix(".json").write_bytes(b"{}")
    return aged(path, age_s)


def test_the_least_recently_used_kernels_go_first_and_those_in_use_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPATTN_CACHE_MAX_MIB", "3")
    kernels = {name: add_kernel(folder, name, age * DAY) for age, name in enumerate("edcba", start=1)}
    sweep(folder, {kernels["a"]})
    assert sorted(path.stem for path in folder.glob("*.so")) == ["a", "e"]
    assert sorted(path.stem for path in folder.glob("*.json")) == ["a", "e"]
    # What some process may be about to load stays above the limit too.
    for name in "uvwxyz":
        add_kernel(folder, name, 10)
    sweep(folder)
    assert sorted(path.stem for path in folder.glob("*.so")) == sorted("uvwxyz")


def test_below_the_limit_nothing_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPATTN_CACHE_MAX_MIB", "4")
    for age, name in enumerate("abc"):
        add_kernel(folder, name, (age + 2) * DAY)
    sweep(folder)
    assert len(list(folder.glob("*.so"))) == 3


def test_a_limit_that_is_no_number_is_named_and_the_default_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SPATTN_CACHE_MAX_MIB", raising=False)
    assert limit_mib() == 2048
    for text in ("lots", "-3", "1.5"):
        monkeypatch.setenv("SPATTN_CACHE_MAX_MIB", text)
        assert limit_mib() == 2048
        assert text in caplog.records[-1].getMessage()
    monkeypatch.setenv("SPATTN_CACHE_MAX_MIB", "0")
    assert limit_mib() == 0


def test_the_doctor_shows_the_cache_and_how_to_clear_it(folder: Path) -> None:
    (folder / "kernels").mkdir(mode=0o700)
    add_kernel(folder / "kernels", "a", 0)
    add_kernel(folder / "kernels", "b", 0)
    finding = doctor._cache()
    assert finding.status == "ok"
    assert f"{folder}: 2 kernels, 2.0 of 2048 MiB (SPATTN_CACHE_MAX_MIB)" in finding.text
    assert f"rm -r {folder}" in finding.text
    (folder / "kernels").chmod(0o777)
    finding = doctor._cache()
    assert finding.status == "missing" and "others may write" in finding.remedy
