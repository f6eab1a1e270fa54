"""Loading kernel libraries: where TVM's runtime comes from, which thread pool runs, what errors say."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from spattn_tvm import runtime
from spattn_tvm.build.compile import compile_module
from spattn_tvm.runtime import load_library, load_runtime, runtime_folder
from spattn_tvm.target import detect_cpu


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports ``rows(a, b)``: b[i, j] = 2 * a[i, j] + i, parallel over i."""
    import tvm
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def rows(a_handle: T.handle, b_handle: T.handle):
        n = T.int32()
        a = T.match_buffer(a_handle, (n, 64), "float32")
        b = T.match_buffer(b_handle, (n, 64), "float32")
        for i in T.parallel(n):
            for j in T.vectorized(64):
                b[i, j] = a[i, j] * T.float32(2) + T.cast(i, "float32")

    path = tmp_path_factory.mktemp("library") / "rows.so"
    compile_module(tvm.IRModule({"rows": rows.with_attr("global_symbol", "rows")}), detect_cpu(), path)
    return path


def expected(a: torch.Tensor) -> torch.Tensor:
    return 2 * a + torch.arange(len(a), dtype=torch.float32)[:, None]


def run_elsewhere(code: str, **environment: str) -> dict:
    """What a fresh process prints as JSON."""
    # Loading a kernel in this process has set TVM's own defaults, which the other is to choose for itself.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TVM_")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


RUN = """
import json, os, sys, torch
torch.ones(3_000_000).exp()
before = sorted(os.sched_getaffinity(0))
from spattn_tvm.runtime import load_library
rows = load_library({path!r}, "rows")
a = torch.randn(1001, 64); b = torch.full_like(a, float("nan"))
threads = len(os.listdir("/proc/self/task"))
rows(a, b)
threads = len(os.listdir("/proc/self/task")) - threads
print(json.dumps(dict(
    right=torch.equal(b, 2 * a + torch.arange(1001.)[:, None]),
    tvm="tvm" in sys.modules, affinity=before == sorted(os.sched_getaffinity(0)), threads=threads)))
"""


def test_a_kernel_runs_without_the_compiler_and_leaves_the_affinity_alone(library: Path) -> None:
    for pool in ("openmp", "tvm"):
        answer = run_elsewhere(RUN.format(path=str(library)), SPATTN_THREAD_POOL=pool)
        assert {**answer, "threads": 0} == {"right": True, "tvm": False, "affinity": True, "threads": 0}


def test_a_kernel_shares_the_threads_of_pytorch(library: Path) -> None:
    code = RUN.format(path=str(library))
    for pool, new_threads in (("openmp", 0), ("tvm", 2)):
        answer = run_elsewhere(code, SPATTN_THREAD_POOL=pool, OMP_NUM_THREADS="3")
        assert answer["threads"] == new_threads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_computes_all_rows(library: Path, threads: int) -> None:
    rows = load_library(library, "rows")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 2, 3, 64, 1000):
            a = torch.randn(count, 64)
            b = torch.full_like(a, torch.nan)
            rows(a, b)
            assert torch.equal(b, expected(a))
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_python_threads_do_not_mix(library: Path) -> None:
    rows = load_library(library, "rows")

    def work(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            a = torch.randn(97, 64, generator=generator)
            b = torch.full_like(a, torch.nan)
            rows(a, b)
            if not torch.equal(b, expected(a)):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_a_worker_error_is_raised_in_the_caller(library: Path) -> None:
    """The launch entry itself, with a body that fails in every task but the first."""
    load_library(library, "rows")
    entry = getattr(ctypes.CDLL(str(library)), runtime.OPENMP_LAUNCH)
    body_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    seen: list[int] = []

    @body_type
    def fails(task: int, environment: int, data: int) -> int:
        seen.append(task)
        return -1 if task else 0

    entry.argtypes = [body_type, ctypes.c_void_p, ctypes.c_int]
    assert entry(fails, None, 2) == -1
    assert sorted(seen) == [0, 1]


def test_wrong_arguments_are_refused_by_the_kernel(library: Path) -> None:
    rows = load_library(library, "rows")
    with pytest.raises(Exception, match="float32"):
        rows(torch.randn(3, 64, dtype=torch.float64), torch.empty(3, 64))
    with pytest.raises(Exception, match="shape"):
        rows(torch.randn(3, 64), torch.empty(4, 64))


def test_a_missing_or_damaged_library_is_named(library: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no-such\.so"):
        load_library(tmp_path / "no-such.so", "rows")
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(RuntimeError, match=r"can't load the kernel library .*text\.so"):
        load_library(text, "rows")
    with pytest.raises(RuntimeError, match="exports no function 'columns'"):
        load_library(library, "columns")


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_loaded", {})
    monkeypatch.delitem(sys.modules, "tvm", raising=False)
    monkeypatch.delenv("SPATTN_TVM_RUNTIME", raising=False)


def make_runtime(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / runtime.RUNTIME_LIBRARY).write_bytes(b"")
    return folder


@pytest.mark.usefixtures("nothing_loaded")
def test_the_runtime_is_looked_for_in_the_documented_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, named = make_runtime(tmp_path / "bundle"), make_runtime(tmp_path / "named")
    spec = importlib.util.find_spec("tvm")
    installed = runtime_folder(bundle)
    assert installed.name == "lib"
    monkeypatch.setenv("SPATTN_TVM_RUNTIME", str(named))
    assert runtime_folder(bundle) == named
    monkeypatch.setenv("SPATTN_TVM_RUNTIME", str(named / runtime.RUNTIME_LIBRARY))
    assert runtime_folder(bundle) == named
    imported = types.ModuleType("tvm")  # its copy of the runtime is loaded already
    imported.__spec__ = spec
    monkeypatch.setitem(sys.modules, "tvm", imported)
    assert runtime_folder(bundle) == installed
    monkeypatch.delenv("SPATTN_TVM_RUNTIME")
    monkeypatch.setattr(runtime, "installed_runtime_folder", lambda: None)
    assert runtime_folder(bundle) == bundle
    runtime._loaded[runtime.RUNTIME_LIBRARY] = named / runtime.RUNTIME_LIBRARY
    assert runtime_folder(bundle) == named


@pytest.mark.usefixtures("nothing_loaded")
def test_a_missing_runtime_says_where_it_was_looked_for_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "installed_runtime_folder", lambda: None)
    with pytest.raises(RuntimeError, match=r"libtvm_runtime\.so not found .*pip install '\.\[compile\]'"):
        runtime_folder(tmp_path)
    monkeypatch.setenv("SPATTN_TVM_RUNTIME", str(tmp_path))
    with pytest.raises(RuntimeError, match="SPATTN_TVM_RUNTIME is"):
        load_runtime()


def test_compiling_works_beside_a_runtime_that_tvm_would_refuse(tmp_path: Path) -> None:
    installed = runtime.installed_runtime_folder()
    assert installed is not None
    (tmp_path / "runtime").mkdir()
    shutil.copy(installed / runtime.RUNTIME_LIBRARY, tmp_path / "runtime")
    code = (
        "import json, sys, torch; from spattn_tvm import BandLayout, banded_attention, reference_attention;"
        "from spattn_tvm.runtime import load_runtime; folder = load_runtime(); layout = BandLayout.causal(2);"
        "q = torch.randn(1, 2, 9, 32); o = banded_attention(q, q, q, layout, impl='cpu');"
        "torch.testing.assert_close(o, reference_attention(q, q, q, layout)[0]);"
        "print(json.dumps(dict(folder=str(folder), tvm='tvm' in sys.modules)))"
    )
    answer = run_elsewhere(
        code, SPATTN_TVM_RUNTIME=str(tmp_path / "runtime"), SPATTN_CACHE_DIR=str(tmp_path / "cache")
    )
    assert answer == {"folder": str(tmp_path / "runtime"), "tvm": False}


def test_settings_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "7")
    monkeypatch.setenv("TVM_BIND_THREADS", "1")
    runtime._set_thread_defaults()
    assert (os.environ["TVM_NUM_THREADS"], os.environ["TVM_BIND_THREADS"]) == ("7", "1")
