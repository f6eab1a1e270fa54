"""The disk cache of compiled kernels: what names an entry, what repairs it, what missing tools say."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spattn_tvm.build import library_cache, toolchain
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.build.toolchain import CompilerMissingError, compile_obstacle
from spattn_tvm.families import find_space
from spattn_tvm.families.kernel import KernelSpec
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
        "built = []; build = c._build; c._build = lambda r: (built.append(r), build(r));"
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


def forbid_building(request: object) -> None:
    raise AssertionError("it was compiled again")


def test_three_processes_compile_a_kernel_once_and_leave_nothing_else(cache: Path) -> None:
    suffixes = sorted(path.suffix for path in (cache / "kernels").iterdir())
    assert suffixes == [".json", ".lock", ".so"]


def test_a_compiled_kernel_is_found_again_with_its_metadata(
    in_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_cache, "_build", forbid_building)
    path = compile_backward()
    metadata = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert metadata["decisions"] == decisions()
    assert (metadata["family"], metadata["direction"]) == ("cpu", "backward")
    assert metadata["tvm"] == importlib.metadata.version("apache-tvm")
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


@pytest.mark.parametrize(
    "change",
    ["decisions", "arch", "version", "sources", "dtype", "head_dim"],
)
def test_everything_that_shapes_a_kernel_is_in_its_name(
    change: str, in_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = compile_backward()

    class ReachedTheBuild(Exception):
        pass

    def build(request: dict) -> None:
        assert Path(request["output"]).name != known.name
        raise ReachedTheBuild

    monkeypatch.setattr(library_cache, "_build", build)
    target, dtype, head_dim, values = detect_cpu(), DTYPE, HEAD_DIM, decisions()
    if change == "decisions":
        choices = find_space("cpu", "backward").choices(HEAD_DIM, DTYPE)
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
    elif change == "version":
        monkeypatch.setattr(library_cache, "tvm_version", lambda: "0.0")
    elif change == "sources":
        monkeypatch.setattr(library_cache, "source_hash", lambda family: "other")
    elif change == "dtype":
        dtype = "bfloat16"
        values = find_space("cpu", "backward").untuned(head_dim, dtype, target)
    else:
        head_dim = 64
        values = find_space("cpu", "backward").untuned(head_dim, dtype, target)
    with pytest.raises(ReachedTheBuild):
        compile_kernel(KernelSpec("cpu", "backward", dtype, head_dim, values), target)
    assert not list((in_cache / "kernels").glob(".build-*"))


def test_the_chip_model_is_not_in_its_name(in_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_cache, "_build", forbid_building)
    here = detect_cpu()
    other = MachineTarget(here.kind, here.arch, "some-other-chip")
    assert compile_kernel(kernel(), other) == compile_backward()


@pytest.mark.parametrize("victim", [".so", ".json"])
@pytest.mark.parametrize("damage", ["truncated", "gone", "altered"])
def test_a_damaged_entry_is_compiled_again(
    victim: str, damage: str, in_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compile_backward()
    good = path.read_bytes()
    target = path.with_suffix(victim)
    content = target.read_bytes()
    if damage == "gone":
        target.unlink()
    elif damage == "truncated":
        target.write_bytes(content[: len(content) // 2])
    else:
        target.write_bytes(content.replace(content[100:104], b"~~~~"))
    monkeypatch.setattr(library_cache, "_build", lambda request: Path(request["output"]).write_bytes(good))
    assert compile_backward() == path
    assert path.read_bytes() == good
    assert library_cache._is_intact(path, json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def test_a_failed_build_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))

    def build(request: dict) -> None:
        Path(request["output"]).write_bytes(b"half a library")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(library_cache, "_build", build)
    with pytest.raises(RuntimeError, match="no space left"):
        compile_backward()
    assert not [path for path in (tmp_path / "kernels").iterdir() if path.suffix != ".lock"]


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


def test_a_missing_linker_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CompilerMissingError, match=r"apt-get install g\+\+"):
        compile_backward()
    assert "C++ compiler" in (compile_obstacle(detect_cpu()) or "")


def test_a_missing_tvm_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path))

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(CompilerMissingError, match="pip install apache-tvm"):
        compile_backward()


def test_nothing_obstructs_compiling_for_this_cpu() -> None:
    assert compile_obstacle(detect_cpu()) is None


@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc")
def test_a_process_started_for_cuda_compiles_there_and_a_cpu_process_is_left_as_it_is() -> None:
    environment = toolchain.compile_environment(parse_target("nvidia/h200"))
    code = "import tvm; assert tvm.runtime.enabled('cuda')"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert environment["SPATTN_COMPILES_CUDA"] == "1"
    assert toolchain.compile_environment(detect_cpu()) == dict(os.environ)


def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="SPATTN_CACHE_DIR"):
        compile_backward()


def test_another_architecture_needs_a_cross_compiler() -> None:
    other = "x86-64" if detect_cpu().arch == "aarch64" else "aarch64"
    assert "cross compiler" in (compile_obstacle(MachineTarget("cpu", other)) or "")
    with pytest.raises(CompilerMissingError, match="name a cross compiler in CXX"):
        target = MachineTarget("cpu", other)
        compile_kernel(kernel(target), target)
