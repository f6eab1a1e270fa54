"""The wheel, the pinned environment, what the base package needs and what an import loads."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_package_schedules_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "spattn_tvm").rglob("*.py")}
    assert modules <= names
    schedules = [path for path in (ROOT / "schedules").rglob("*") if path.is_file()]
    assert {f"spattn_tvm/{path.relative_to(ROOT).as_posix()}" for path in schedules} <= names
    assert "spattn_tvm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    # Scratch, logs, tests and environments stay out.
    tops = {name.split("/")[0] for name in names}
    assert tops == {"spattn_tvm", "spattn_tvm-0.2.0.dist-info"}
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "spattn = spattn_tvm.__main__:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_wheel_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True, timeout=120)
    code = """
import torch, spattn_tvm
from spattn_tvm import BandLayout, banded_attention, reference_attention
from spattn_tvm.store import schedules_root
print(spattn_tvm.__file__)
print(schedules_root(), schedules_root().is_dir())
torch.manual_seed(0)
q, k, v = (torch.randn(1, 4, 77, 32, requires_grad=True) for _ in range(3))
layout = BandLayout.spattention(4)
o = banded_attention(q, k, v, layout)
exact = reference_attention(q.double(), k.double(), v.double(), layout)[0]
grads = torch.autograd.grad(o.square().sum(), (q, k, v))
expected = torch.autograd.grad(exact.square().sum(), (q, k, v))
print(max(float((a - b).abs().max()) for a, b in zip((o, *grads), (exact, *expected))) < 1e-4)
"""
    module, schedules, right = run_python(code, empty, PYTHONPATH=str(site)).splitlines()
    assert Path(module).is_relative_to(site)
    assert schedules == f"{site / 'spattn_tvm' / 'schedules'} True"
    assert right == "True"
    assert list(empty.iterdir()) == []
    help_text = subprocess.run(
        [sys.executable, str(site / "bin" / "spattn"), "--help"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert "doctor" in help_text


def test_import_is_quick_and_loads_no_compiler(tmp_path: Path) -> None:
    code = """
import sys, time
import torch
begin = time.perf_counter()
import spattn_tvm
seconds = time.perf_counter() - begin
print(seconds)
from spattn_tvm import BandLayout, BandedAttention, banded_attention, load_bundle, reference_attention
import spattn_tvm.cli, spattn_tvm.dispatch, spattn_tvm.bundle
print([name for name in ("tvm", "xgboost", "matplotlib") if name in sys.modules])
"""
    # The best of three: the machine may be busy with something else.
    outputs = [run_python(code, tmp_path).splitlines() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in outputs) < 0.1
    assert {loaded for _, loaded in outputs} == {"[]"}


# Extras that scripts/test does not need: they are not in its environment. What builds the site has its own.
APART = {"docs", "onnx"}


def pinned(environment: str) -> dict[str, list[Requirement]]:
    lines = (ROOT / "requirements" / f"{environment}.txt").read_text().splitlines()
    found: dict[str, list[Requirement]] = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


@pytest.mark.parametrize("environment", ["cpu", "docs"])
def test_every_pin_is_exact(environment: str) -> None:
    for requirements in pinned(environment).values():
        for requirement in requirements:
            assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), str(requirement)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_satisfy_the_project_on_each_python(python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [text for extra, texts in extras.items() if extra not in APART for text in texts]
    wanted = {"cpu": [*project["dependencies"], *needed], "docs": extras["docs"]}
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    for file, text in ((file, text) for file, texts in wanted.items() for text in texts):
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        if requirement.name == project["name"]:
            assert requirement.extras <= set(project["optional-dependencies"])
            continue
        chosen = [
            pin for pin in pinned(file)[canonicalize_name(requirement.name)]
            if pin.marker is None or pin.marker.evaluate(environment)
        ]  # fmt: skip
        assert len(chosen) == 1, f"{requirement.name} has {len(chosen)} pins for Python {python}"
        (specifier,) = chosen[0].specifier
        assert requirement.specifier.contains(specifier.version), (
            f"{chosen[0]} does not satisfy {requirement}"
        )


def test_this_environment_is_the_pinned_one() -> None:
    for name, requirements in pinned("cpu").items():
        applying = [r for r in requirements if r.marker is None or r.marker.evaluate()]
        if not applying:
            continue  # a backport for an older Python
        (pin,) = applying
        assert pin.specifier.contains(importlib.metadata.version(name)), f"{name} is not at its pin {pin}"


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def closure(names: Iterable[str]) -> set[str]:
    """Distributions that some need, themselves included, of those that are installed."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            needs = map(Requirement, importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [
            canonicalize_name(need.name)
            for need in needs
            if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return found


def test_the_version_is_one() -> None:
    code = "import spattn_tvm; print(spattn_tvm.__version__)"
    (version,) = run_python(code, ROOT, PYTHONPATH=str(ROOT)).splitlines()
    newest = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert version == project()["version"] == newest[1]


def base() -> set[str]:
    return closure(Requirement(text).name for text in project()["dependencies"])


def test_the_base_package_is_small_beside_torch() -> None:
    size = 0
    for name in base() - closure(["torch"]):
        for path in importlib.metadata.files(name) or ():
            file = Path(str(path.locate()))
            size += file.stat().st_size if file.is_file() else 0
    size += sum(path.stat().st_size for path in (ROOT / "spattn_tvm").rglob("*.py"))
    assert 2**20 < size < 100e6, f"{size / 1e6:.0f} MB"


# A process in which nothing can be imported or found that the base package does not bring.
BASE_ONLY = """
import importlib.metadata, importlib.util, sys
allowed = set({allowed!r})
owners = importlib.metadata.packages_distributions()
normal = lambda name: name.lower().replace("_", "-").replace(".", "-")
blocked = {{m for m, names in owners.items() if not allowed & set(map(normal, names))}} - {{"spattn_tvm"}}
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] in blocked else find_spec(name, *rest)
)
version = importlib.metadata.version
def installed(name):
    if normal(name) not in allowed | {{"spattn-tvm"}}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = installed
assert {{"tvm", "typer", "rich", "matplotlib", "xgboost"}} <= blocked
"""

CALL = """
import torch
from spattn_tvm import BandLayout, banded_attention, reference_attention
torch.manual_seed(3)
layout = BandLayout.spattention(4, 96)
q, k, v = (torch.randn(1, 4, 83, 32) for _ in range(3))
o = banded_attention(q, k, v, layout, impl="cpu")
torch.testing.assert_close(o, reference_attention(q, k, v, layout)[0], rtol=1e-4, atol=1e-5)
"""

WITHOUT_EXTRAS = """
import runpy
def said(act):
    try:
        act()
    except (ImportError, RuntimeError, SystemExit) as error:
        print(str(error).replace(chr(10), "<newline>"))
q = q.bfloat16()
said(lambda: banded_attention(q, q, q, layout, impl="cpu"))
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import detect_cpu
from spattn_tvm.tuning import SearchSettings, tune
problem = AttentionProblem("forward", "float32", 1, 4, 4, 96, 32, layout)
said(lambda: tune(problem, detect_cpu(), SearchSettings(trials=1)))
from spattn_tvm.plotting import plot_layout
said(lambda: plot_layout(layout, "bands.png"))
sys.argv[1:] = ["doctor"]
said(lambda: runpy.run_module("spattn_tvm", run_name="__main__"))
said(lambda: __import__("spattn_tvm.integrations.transformers"))
"""


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one kernel, compiled by a process that has everything."""
    folder = tmp_path_factory.mktemp("filled")
    run_python(CALL, folder, SPATTN_CACHE_DIR=str(folder / "cache"), PYTHONPATH=str(ROOT))
    return folder / "cache"


def in_base(code: str, folder: Path, cache: Path) -> list[str]:
    """Lines that a process prints that has the base package only, and no compiler."""
    text = BASE_ONLY.format(allowed=sorted(base())) + code
    environment = {"SPATTN_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "PATH": ""}
    return run_python(text, folder, **environment).splitlines()


def test_cached_kernels_run_with_the_base_package_only(filled_cache: Path, tmp_path: Path) -> None:
    said = in_base(CALL + WITHOUT_EXTRAS, tmp_path, filled_cache)
    assert [re.findall(r"`pip install '\.\[(\w+)\]'`", line) for line in said] == [
        ["compile"],
        ["tune"],
        ["plot"],
        ["cli"],
        ["hf"],
    ]
    assert not [line for line in said if "<newline>" in line]
    assert not list(tmp_path.iterdir())


def test_without_its_runtime_a_cached_kernel_is_not_there(filled_cache: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(filled_cache, tmp_path / "cache"))
    next(cache.glob("runtime-*/libtvm_runtime.so")).unlink()
    code = CALL.partition("o = banded")[0] + "\ntry:\n    banded_attention(q, k, v, layout, impl='cpu')\n"
    code += "except RuntimeError as error:\n    print(error)\n"
    (said,) = in_base(code, tmp_path, cache)
    assert "needs TVM, which is not installed" in said


@pytest.mark.network
@pytest.mark.skipif(os.environ.get("SPATTN_NETWORK") != "1", reason="SPATTN_NETWORK=1 installs packages")
@pytest.mark.parametrize("version", ["0.1.14.post1", "0.1.15.post2"])
def test_a_bundle_runs_under_each_tvm_ffi(version: str, tmp_path: Path) -> None:
    bundle, site = tmp_path / "bundle", tmp_path / "site"
    shape = ["--shape", "1,4,96,32", "--direction", "forward"]
    subprocess.run(
        [sys.executable, "-m", "spattn_tvm", "export", str(bundle), *shape], cwd=ROOT, check=True, timeout=120
    )
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, f"apache-tvm-ffi=={version}"], check=True, timeout=240)
    code = BASE_ONLY.format(allowed=sorted(base())) + CALL
    code += f"import tvm_ffi\nassert tvm_ffi.__file__.startswith({str(site)!r})\nprint('ran')\n"
    environment = {"SPATTN_BUNDLE": str(bundle), "PYTHONPATH": f"{site}:{ROOT}", "PATH": ""}
    assert run_python(code, tmp_path, SPATTN_CACHE_DIR=str(tmp_path / "none"), **environment) == "ran\n"
