"""The disk cache of compiled kernels: what names an entry, what repairs it, who waits for whom."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spattn_tvm.build import library_cache, toolchain
from spattn_tvm.build.errors import KernelUnavailableError
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.families import find_space
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.file_lock import file_lock
from spattn_tvm.target import MachineTarget, detect_cpu, parse_target

HEAD_DIM, DTYPE = 32, "float32"


def decisions(target: MachineTarget | None = None) -> dict[str, int]:
    return find_space("cpu", "backward").untuned(HEAD_DIM, DTYPE, target or detect_cpu())


def kernel(target: MachineTarget | None = None, **changes: int) -> KernelSpec:
    return KernelSpec("cpu", "backward", DTYPE, HEAD_DIM, {**decisions(target), **changes})


def compile_backward(**changes: int) -> Path:
    return compile_kernel(kernel(**changes), detect_cpu())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds one kernel, filled by three processes that asked for it at once."""
    folder = tmp_path_factory.mktemp("cache")
    code = (
        "import sys, spattn_tvm.build.library_cache as c; from spattn_tvm.families import find_space;"
        "from spattn_tvm.families.kernel import KernelSpec;"
        "from spattn_tvm.target import detect_cpu; t = detect_cpu();"
        f"d = find_space('cpu', 'backward').untuned({HEAD_DIM}, '{DTYPE}', t);"
        "built = []; build = c._compile; c._compile = lambda r, f: (built.append(r), build(r, f))[1];"
        f"s = KernelSpec('cpu', 'backward', '{DTYPE}', {HEAD_DIM}, d);"
        "print(c.compile_kernel(s, t), len(built), sep='|')"
    )
    environment = {**os.environ, "SPATTN_CACHE_DIR": str(folder)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=240)[0].strip().split("|") for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len({path for path, _ in answers}) == 1
    assert sorted(count for _, count in answers) == ["0", "0", "1"]
    return folder


@pytest.fixture
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(cache))
    return cache


def forbid_building(request: object, folder: Path) -> None:
    raise AssertionError("it was compiled again")


def writing(content: bytes) -> Callable[[dict, Path], dict]:
    """Compiles whatever it is asked for to the same bytes."""

    def compile_it(request: dict, folder: Path) -> dict:
        Path(request["output"]).write_bytes(content)
        return {}

    return compile_it


def test_three_processes_compile_a_kernel_once_and_leave_nothing_else(cache: Path) -> None:
    suffixes = sorted(path.suffix for path in (cache / "kernels").iterdir())
    assert suffixes == [".json", ".so"]


def test_a_compiled_kernel_is_found_again_with_its_metadata(
    in_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_cache, "_compile", forbid_building)
    path = compile_backward()
    metadata = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert metadata["decisions"] == decisions()
    assert (metadata["family"], metadata["direction"]) == ("cpu", "backward")
    assert metadata["tvm"] == importlib.metadata.version("apache-tvm")
    assert metadata["tvm_ffi"] == importlib.metadata.version("apache-tvm-ffi")
    assert metadata["bytes"] == path.stat().st_size


def test_finding_a_kernel_imports_no_tvm(in_cache: Path) -> None:
    code = (
        "import sys; from spattn_tvm.build.library_cache import compile_kernel;"
        "from spattn_tvm.families import find_space;"
        "from spattn_tvm.families.kernel import KernelSpec;"
        "from spattn_tvm.target import detect_cpu; t = detect_cpu();"
        f"d = find_space('cpu', 'backward').untuned({HEAD_DIM}, '{DTYPE}', t);"
        f"compile_kernel(KernelSpec('cpu', 'backward', '{DTYPE}', {HEAD_DIM}, d), t);"
        "assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_space_needs_tvm_before_a_kernel_is_built() -> None:
    # Where only a bundle runs, there is none.
    code = (
        "import sys; sys.modules['tvm'] = None\n"
        "from spattn_tvm.families import family_names, find_family, find_space\n"
        "from spattn_tvm.target import parse_target\n"
        "for family in family_names():\n"
        "    targets = map(parse_target, ('x86-64-v3', 'nvidia/h200'))\n"
        "    target = next(t for t in targets if find_family(family).runs_on(t))\n"
        "    dtype = 'float32' if target.kind == 'cpu' else 'bfloat16'\n"
        "    for direction in find_family(family).spaces:\n"
        "        space = find_space(family, direction)\n"
        "        decisions = space.untuned(64, dtype, target)\n"
        "        assert space.rejection(decisions, 64, dtype, target) is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class ReachedTheBuildError(Exception):
    pass


def name_of_build(spec: KernelSpec, target: MachineTarget, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a library that is not in the cache."""
    names = []

    def compile_it(request: dict, folder: Path) -> dict:
        names.append(Path(request["output"]).name)
        raise ReachedTheBuildError

    with monkeypatch.context() as patch:
        patch.setattr(library_cache, "_compile", compile_it)
        with pytest.raises(ReachedTheBuildError):
            compile_kernel(spec, target)
    return names[0]


@pytest.mark.parametrize(
    "change",
    ["decisions", "arch", "tvm", "tvm_ffi", "sources", "compile.py", "settings", "dtype", "head_dim"],
)
def test_everything_that_shapes_a_kernel_is_in_its_name(
    change: str, in_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = compile_backward()
    target, dtype, head_dim, values = detect_cpu(), DTYPE, HEAD_DIM, decisions()
    if change == "decisions":
        choices = find_space("cpu", "backward").structures(HEAD_DIM, DTYPE)[""]
        space = find_space("cpu", "backward")
        values = next(
            candidate
            for name, offered in choices.items()
            for value in offered
            if (candidate := {**values, name: value}) != values
            and space.rejection(candidate, HEAD_DIM, DTYPE, target) is None
        )
    elif change == "arch":
        target = MachineTarget("cpu", "x86-64-v2")
        values = decisions(target)
    elif change.startswith("tvm"):
        versions = {**toolchain.tvm_versions(), change: "0.0"}
        monkeypatch.setattr(library_cache, "tvm_versions", lambda: versions)
    elif change == "sources":
        monkeypatch.setattr(library_cache, "source_hash", lambda family: "other")
    elif change == "compile.py":
        library_cache.source_hash.cache_clear()
        read = Path.read_bytes
        monkeypatch.setattr(
            Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == "compile.py" else b"")
        )
        monkeypatch.setattr(library_cache, "source_hash", library_cache.source_hash.__wrapped__)
    elif change == "settings":
        monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")
    elif change == "dtype":
        dtype = "bfloat16"
        values = find_space("cpu", "backward").untuned(head_dim, dtype, target)
    else:
        head_dim = 64
        values = find_space("cpu", "backward").untuned(head_dim, dtype, target)
    spec = KernelSpec("cpu", "backward", dtype, head_dim, values)
    assert name_of_build(spec, target, monkeypatch) != known.name
    assert not list((in_cache / "kernels").glob(".build-*"))


def test_settings_and_the_release_of_nvcc_are_in_the_name_of_a_cuda_kernel(
    in_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h200 = parse_target("nvidia/h200")
    spec = KernelSpec(
        "mma", "forward", "bfloat16", 64, find_space("mma", "forward").untuned(64, "bfloat16", h200)
    )
    monkeypatch.setattr(library_cache, "compile_obstacle", lambda target: None)
    monkeypatch.setattr(library_cache, "nvcc_release", lambda: "V13.0.88")
    names = [name_of_build(spec, h200, monkeypatch)]
    for variable in ("NVCC_APPEND_FLAGS", "TVM_CUDA_PTXAS_REG_LEVEL"):
        monkeypatch.setenv(variable, "-G")
        names.append(name_of_build(spec, h200, monkeypatch))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert name_of_build(spec, h200, monkeypatch) == names[-1]
    monkeypatch.setattr(library_cache, "nvcc_release", lambda: "V13.1.2")
    names.append(name_of_build(spec, h200, monkeypatch))
    assert len(set(names)) == 4


def test_without_nvcc_a_library_of_any_release_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    h200 = parse_target("nvidia/h200")
    decisions = find_space("mma", "forward").untuned(64, "bfloat16", h200)
    spec = KernelSpec("mma", "forward", "bfloat16", 64, decisions)
    monkeypatch.setattr(library_cache, "compile_obstacle", lambda target: None)
    monkeypatch.setattr(library_cache, "nvcc_release", lambda: "V13.0.88")
    monkeypatch.setattr(library_cache, "_compile", writing(b"library"))
    made = compile_kernel(spec, h200)
    monkeypatch.setattr(library_cache, "nvcc_release", lambda: None)
    monkeypatch.setattr(library_cache, "_compile", forbid_building)
    assert compile_kernel(spec, h200) == made
    made.write_bytes(b"another")
    with pytest.raises(AssertionError, match="compiled again"):
        compile_kernel(spec, h200)


def test_the_chip_model_is_not_in_its_name(in_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_cache, "_compile", forbid_building)
    here = detect_cpu()
    other = MachineTarget(here.kind, here.arch, "some-other-chip")
    assert compile_kernel(kernel(), other) == compile_backward()


def copied(cache: Path, folder: Path) -> Path:
    """The library in a cache of its own, which may be damaged."""
    shutil.copytree(cache, folder)
    return next((folder / "kernels").glob("*.so"))


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "gone": lambda path: path.unlink(),
    "altered": lambda path: path.write_bytes(path.read_bytes().replace(path.read_bytes()[100:104], b"~~~~")),
    "empty": lambda path: path.write_bytes(b""),
    "nested": lambda path: path.write_bytes(b"[" * 100_000),
    "nested objects": lambda path: path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a list": lambda path: path.write_bytes(b"[1, 2]"),
    "other types": lambda path: path.write_bytes(b'{"sha256": [], "bytes": {}, "family": 3}'),
    "no UTF-8": lambda path: path.write_bytes(b'{"family": "\xff"}'),
    "huge": lambda path: os.truncate(path, 2**34),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "in it").touch()),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "writable by others": lambda path: path.chmod(0o666),
}


@pytest.mark.parametrize("victim", [".so", ".json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_compiled_again(
    victim: str, damage: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(cache, tmp_path / "cache")
    good = path.read_bytes()
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "cache"))
    DAMAGE[damage](path.with_suffix(victim))
    built = []

    def compile_it(request: dict, folder: Path) -> dict:
        built.append(request)
        Path(request["output"]).write_bytes(good)
        return {}

    monkeypatch.setattr(library_cache, "_compile", compile_it)
    assert compile_backward() == path
    assert len(built) == 1
    assert path.read_bytes() == good
    assert compile_backward() == path
    assert len(built) == 1
    assert sorted(entry.suffix for entry in path.parent.iterdir()) == [".json", ".so"]


@pytest.mark.parametrize(
    "resources", [None, [], {"kernels": []}, {"kernels": {"a": 1}}, {"warnings": {}}, {"warnings": [None]}]
)
def test_an_entry_with_resources_that_no_compiler_told_is_compiled_again(
    resources: object, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tuner looks for spills in, and an export describes."""
    path = copied(cache, tmp_path / "cache")
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "cache"))
    description = path.with_suffix(".json")
    metadata = json.loads(description.read_text(encoding="utf-8"))
    found = library_cache._find(path, {})
    description.write_text(json.dumps({**metadata, "resources": resources}), encoding="utf-8")
    assert found and not library_cache._find(path, {})
    told = {"kernels": {"a": {"registers": 168, "shared_bytes": 0}}, "warnings": ["wgmma is serialized"]}
    description.write_text(json.dumps({**metadata, "resources": told}), encoding="utf-8")
    assert library_cache._find(path, {})


def test_a_lock_that_is_a_folder_is_in_nobodys_way(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(cache, tmp_path / "cache")
    good = path.read_bytes()
    path.unlink()
    path.with_suffix(".lock").mkdir()
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library_cache, "_compile", writing(good))
    assert compile_backward() == path


@pytest.mark.parametrize(("family", "name"), [("cpu", "cpu"), ("mma", "nvidia/h100")])
def test_a_cache_folder_may_have_any_name(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of CUDA's tools, fatbinary takes a comma in a path for the end of it."""
    target = parse_target(name)
    if toolchain.compile_obstacle(target) is not None:
        pytest.skip(str(toolchain.compile_obstacle(target)))
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "a, b=c 'd' %s $e é"))
    decisions = find_space(family, "forward").untuned(32, "float32", target)
    assert compile_kernel(KernelSpec(family, "forward", "float32", 32, decisions), target).exists()


def test_a_failed_build_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))

    def compile_it(request: dict, folder: Path) -> dict:
        Path(request["output"]).write_bytes(b"half a library")
        raise RuntimeError("the kernel is wrong")

    monkeypatch.setattr(library_cache, "_compile", compile_it)
    with pytest.raises(RuntimeError, match="the kernel is wrong"):
        compile_backward()
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_full_disk_is_said_with_the_variable_that_moves_the_cache(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library_cache, "_compile", writing(b"x"))

    def write_text(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    with monkeypatch.context() as patch, pytest.raises(KernelUnavailableError, match="SPATTN_CACHE_DIR") as e:
        patch.setattr(Path, "write_text", write_text)
        compile_backward()
    assert os.strerror(number) in str(e.value)
    assert list((tmp_path / "kernels").iterdir()) == []


def test_threads_compile_a_kernel_once_and_different_ones_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    together = threading.Barrier(2, timeout=20)
    built = []

    def compile_it(request: dict, folder: Path) -> dict:
        built.append(request["kernel"]["head_dim"])
        together.wait()  # both kernels are under way
        Path(request["output"]).write_bytes(b"library")
        return {}

    monkeypatch.setattr(library_cache, "_compile", compile_it)
    space, target = find_space("cpu", "backward"), detect_cpu()
    specs = [KernelSpec("cpu", "backward", DTYPE, dim, space.untuned(dim, DTYPE, target)) for dim in (32, 64)]
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda spec: compile_kernel(spec, detect_cpu()), specs * 3))
    assert sorted(built) == [32, 64]
    assert paths == paths[:2] * 3


@pytest.mark.parametrize("other", ["thread", "process"])
def test_whoever_waits_long_says_for_what(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library_cache, "NOTICE_AFTER_S", 0.2)
    started = threading.Event()

    def compile_it(request: dict, folder: Path) -> dict:
        started.set()
        time.sleep(1.0)
        Path(request["output"]).write_bytes(b"library")
        return {}

    monkeypatch.setattr(library_cache, "_compile", compile_it)
    if other == "thread":
        thread = threading.Thread(target=compile_backward)
        thread.start()
        started.wait()
        compile_backward()
        thread.join()
        expected = "waiting for another thread, which compiles cpu-backward-float32-d32"
    else:
        (tmp_path / "kernels").mkdir(mode=0o700)
        name = name_of_build(kernel(), detect_cpu(), monkeypatch)
        code = (
            "import sys, time; from pathlib import Path; from spattn_tvm.file_lock import file_lock\n"
            "with file_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(1)"
        )
        lock = tmp_path / "kernels" / name.replace(".so", ".lock")
        holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        compile_backward()
        expected = f"waiting for process {holder.pid} on"
        assert holder.wait() == 0
    assert [record.message for record in caplog.records if expected in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1


def test_a_holder_that_hangs_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library_cache, "TIMEOUT_S", 0.3)
    (tmp_path / "kernels").mkdir(mode=0o700)
    name = name_of_build(kernel(), detect_cpu(), monkeypatch)
    monkeypatch.setattr(library_cache, "_compile", writing(b"x"))
    with file_lock(tmp_path / "kernels" / name.replace(".so", ".lock")):
        assert compile_backward().name == name


def test_finding_a_library_takes_about_2_ms(in_cache: Path) -> None:
    compile_backward()
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        compile_backward()
        best = min(best, time.perf_counter() - start)
    assert best < 6e-3  # 1.6 ms on an idle core


def test_a_library_is_marked_as_used_once_a_day(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(cache, tmp_path / "cache")
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "cache"))
    for age_s, is_marked in ((3600, False), (90_000, True)):
        used = time.time() - age_s
        os.utime(path, (used, used))
        compile_backward()
        assert (path.stat().st_mtime > used + 1) == is_marked


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"query_rows": 7}, r"query_rows=7 is not among"), ({"colour": 1}, r"unknown \['colour'\]")],
)
def test_decisions_outside_the_space_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_backward(**changes)


def test_unknown_families_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"abacus.*known: cpu"):
        KernelSpec("abacus", "forward", DTYPE, HEAD_DIM, {})


def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="SPATTN_CACHE_DIR"):
        compile_backward()
