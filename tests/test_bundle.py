"""Bundles: exported kernels run without a compiler, and anything but an untouched bundle is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from spattn_tvm import bundle as bundle_module
from spattn_tvm import bundle as bundles
from spattn_tvm import dispatch
from spattn_tvm.bands import BandLayout
from spattn_tvm.bundle import MANIFEST, Bundle, BundledKernel, load_bundle
from spattn_tvm.dispatch import explain, find_kernel
from spattn_tvm.export import export_bundle
from spattn_tvm.families import find_space
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import reference_attention
from spattn_tvm.runtime import RUNTIME_LIBRARY
from spattn_tvm.target import MachineTarget, detect_cpu, parse_target

LAYOUT = BandLayout.spattention(4)
PROBLEMS = [
    AttentionProblem(direction, "float32", 2, 4, 2, 70, 32, LAYOUT) for direction in ("forward", "backward")
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(tmp_path_factory.mktemp("export") / "bundle", PROBLEMS, detect_cpu())


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _no_bundle_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SPATTN_BUNDLE", raising=False)
    monkeypatch.setattr(bundle_module, "_registered", [])
    monkeypatch.setattr(dispatch, "_environment_bundle", [])
    dispatch.clear_cache()
    yield
    dispatch.clear_cache()


# A machine without apache-tvm and without a compiler: `tvm` can't be found, PATH is empty.
BARE_MACHINE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tvm", "xgboost"):
            raise ModuleNotFoundError(f"no {name} on this machine", name=name)

import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tvm" else find_spec(name, *rest)
sys.meta_path.insert(0, Nothing())
import importlib.metadata
version = importlib.metadata.version
def installed(name):
    if name == "apache-tvm":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = installed
"""

TRAIN = """
import torch
from spattn_tvm import BandLayout, banded_attention, load_bundle
from spattn_tvm.reference import reference_attention
from spattn_tvm.runtime import RUNTIME_LIBRARY
{load}
layout = BandLayout.spattention(4)
for length in (70, 33):
    q, k, v = (torch.randn(1, heads, length, 32, requires_grad=True) for heads in (4, 2, 2))
    do = torch.randn(1, 4, length, 32)
    o = banded_attention(q, k, v, layout, impl="cpu")
    gradients = torch.autograd.grad(o, (q, k, v), do)
    expected, _ = reference_attention(q, k, v, layout)
    wanted = torch.autograd.grad(expected, (q, k, v), do)
    for ours, theirs in zip((o, *gradients), (expected, *wanted)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
assert "tvm" not in sys.modules and "xgboost" not in sys.modules
"""


def run_on_a_bare_machine(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(bundles.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", BARE_MACHINE + code],
        cwd=cwd,
        env={
            **os.environ,
            "PATH": "",
            "SPATTN_CACHE_DIR": str(cwd / "no-cache"),
            "PYTHONPATH": root,
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_bundle_trains_where_there_is_neither_tvm_nor_a_compiler(copy: Path, tmp_path: Path) -> None:
    result = run_on_a_bare_machine(TRAIN.format(load=f"load_bundle({str(copy)!r})"), tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_environment_variable_does_the_same(copy: Path, tmp_path: Path) -> None:
    result = run_on_a_bare_machine(TRAIN.format(load=""), tmp_path, SPATTN_BUNDLE=str(copy))
    assert result.returncode == 0, result.stderr[-3000:]


def test_that_machine_can_do_nothing_without_the_bundle(tmp_path: Path) -> None:
    result = run_on_a_bare_machine(TRAIN.format(load=""), tmp_path)
    assert result.returncode != 0
    assert "pip install '.[compile]'" in result.stderr


def test_the_manifest_says_what_is_in_it(exported: Path) -> None:
    manifest = json.loads((exported / MANIFEST).read_text(encoding="utf-8"))
    names = {path.name for path in exported.iterdir()}
    assert set(manifest["files"]) == names - {MANIFEST}
    assert "libtvm_runtime.so" in names
    assert len([name for name in names if name.startswith("cpu-")]) == 2
    assert manifest["versions"]["apache-tvm"]
    assert [AttentionProblem.from_json(entry["problem"]) for entry in manifest["kernels"]] == PROBLEMS
    assert all(entry["decisions"] for entry in manifest["kernels"])
    assert [MachineTarget(**target) for target in manifest["targets"]] == [detect_cpu()]
    assert {entry["target"] for entry in manifest["kernels"]} == {detect_cpu().folder}


def test_a_registered_bundle_serves_calls_and_says_so(copy: Path) -> None:
    loaded = load_bundle(copy)
    q, k, v = (torch.randn(2, heads, 70, 32) for heads in (4, 2, 2))
    kernel = find_kernel("forward", q, LAYOUT.spec)
    assert kernel.path is not None
    assert kernel.path.parent == loaded.path
    assert loaded.path.name in kernel.reason
    torch.testing.assert_close(banded_attention(q, k, v, LAYOUT), reference_attention(q, k, v, LAYOUT)[0])
    assert str(loaded.path) in str(explain(PROBLEMS[0], detect_cpu()))
    bundle_module.unregister_bundle(loaded)
    again = find_kernel("forward", q, LAYOUT.spec)
    assert again.path is not None
    assert again.path.parent != loaded.path


def test_a_bundle_without_registering_changes_nothing(copy: Path) -> None:
    loaded = load_bundle(copy, register=False)
    kernel = find_kernel("forward", torch.randn(2, 4, 70, 32), LAYOUT.spec)
    assert kernel.path is not None
    assert kernel.path.parent != loaded.path


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def library(folder: Path) -> Path:
    return next(folder.glob("cpu-forward-*.so"))


def flip_a_byte(folder: Path) -> None:
    data = bytearray(library(folder).read_bytes())
    data[len(data) // 2] ^= 1
    library(folder).write_bytes(data)


def cut_off(folder: Path) -> None:
    data = library(folder).read_bytes()
    library(folder).write_bytes(data[: len(data) // 2])


def replace_by_link(folder: Path) -> None:
    link = library(folder)
    link.symlink_to(link.rename(folder.parent / "elsewhere.so"))


def point_outside(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        outside = folder.parent / "outside.so"
        shutil.copyfile(library(folder), outside)

        def change(manifest: dict) -> None:
            manifest["files"][name] = manifest["files"][library(folder).name]
            manifest["kernels"][0]["library"] = name

        change_manifest(folder, change)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "altered library": (flip_a_byte, "is altered: its SHA-256"),
    "cut library": (cut_off, "cut off or altered"),
    "missing library": (lambda folder: library(folder).unlink(), "is missing"),
    "missing runtime": (
        lambda folder: (folder / "libtvm_runtime.so").unlink(),
        "libtvm_runtime.so is missing",
    ),
    "altered runtime": (
        lambda folder: (folder / "libtvm_runtime.so").write_bytes(b"x"),
        "cut off or altered",
    ),
    "extra file": (lambda folder: (folder / "extra.so").write_bytes(b""), "does not name: extra.so"),
    "extra folder": (lambda folder: (folder / "more").mkdir(), "does not name: more"),
    "link": (replace_by_link, "is a link"),
    "path upwards": (point_outside("../outside.so"), "no plain file name"),
    "absolute path": (point_outside("/etc/passwd"), "no plain file name"),
    "path downwards": (point_outside("more/inside.so"), "no plain file name"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json is damaged"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "must be dict"),
    "binary": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x80"), "manifest.json is damaged"),
    "format": (
        lambda folder: change_manifest(folder, lambda m: m.update(format=2)),
        "its format is 2 .* export it again",
    ),
    "no files": (
        lambda folder: change_manifest(folder, lambda m: m.pop("files")),
        "'files' of manifest.json",
    ),
    "runtime unnamed": (
        lambda folder: change_manifest(folder, lambda m: m["files"].pop(RUNTIME_LIBRARY)),
        "does not name: libtvm_runtime.so",
    ),
    "library unnamed": (
        lambda folder: change_manifest(folder, lambda m: m["kernels"][0].update(library="other.so")),
        "not among its files",
    ),
    "status": (
        lambda folder: change_manifest(folder, lambda m: m["kernels"][0].update(status="best")),
        "has status 'best'",
    ),
    "a text without end": (
        lambda folder: change_manifest(folder, lambda m: m["kernels"][0].update(status="best" * 10_000)),
        "has status 'bestbest",
    ),
    "decisions": (
        lambda folder: change_manifest(folder, lambda m: m["kernels"][0].update(decisions={"a": "b"})),
        "decisions must map names to integers",
    ),
    "problem": (
        lambda folder: change_manifest(folder, lambda m: m["kernels"][0]["problem"].update(length=-1)),
        "the problem of kernel 0 is damaged",
    ),
    "target": (
        lambda folder: change_manifest(folder, lambda m: m["targets"][0].update(kind="abacus")),
        "its targets are damaged",
    ),
    "target of a kernel": (
        lambda folder: change_manifest(folder, lambda m: m["kernels"][0].update(target="cuda-sm_80-generic")),
        "the target 'cuda-sm_80-generic' of kernel 0 is not among its targets",
    ),
}


def rehash(folder: Path) -> None:
    """What a packager does who trusts the files: sizes and hashes as they are."""

    def change(manifest: dict) -> None:
        for name in manifest["files"]:
            data = (folder / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    change_manifest(folder, change)


def replace_manifest(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / MANIFEST
        path.rename(folder.parent / "elsewhere.json")
        make(path)

    return damage


def swap(name: str) -> Callable[[Path], None]:
    def change(manifest: dict) -> None:
        first, second = manifest["kernels"]
        first[name], second[name] = second[name], first[name]

    return lambda folder: change_manifest(folder, change)


def alter(**values: object) -> Callable[[Path], None]:
    """The first kernel's problem."""
    return lambda folder: change_manifest(folder, lambda m: m["kernels"][0]["problem"].update(values))


def other_decision(folder: Path) -> None:
    decisions = find_space("cpu", "forward").structures(32, "float32")[""]

    def change(manifest: dict) -> None:
        entry = manifest["kernels"][0]
        name, values = next((n, v) for n, v in decisions.items() if len(v) > 1)
        entry["decisions"][name] = next(value for value in values if value != entry["decisions"][name])

    change_manifest(folder, change)


def other_target(folder: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["targets"].append({"kind": "cuda", "arch": "sm_80", "model": "generic"})
        manifest["kernels"][0]["target"] = "cuda-sm_80-generic"

    change_manifest(folder, change)


def without_label(folder: Path) -> None:
    data = library(folder).read_bytes()
    library(folder).write_bytes(data[: data.rindex(b"\nspattn-tvm kernel")])
    rehash(folder)


def label_on_other_code(folder: Path) -> None:
    """The forward's label behind the backward's code."""
    label = library(folder).read_bytes().rpartition(b"\nspattn-tvm kernel")
    other = next(folder.glob("cpu-backward-*.so")).read_bytes().rpartition(b"\nspattn-tvm kernel")
    library(folder).write_bytes(other[0] + label[1] + label[2])
    rehash(folder)


def set_bytes(place: int, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray(library(folder).read_bytes())
        data[place : place + len(content)] = content
        library(folder).write_bytes(data)
        rehash(folder)

    return damage


def in_place_of_library(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = library(folder)
        path.unlink()
        make(path)

    return damage


OTHER_PROCESSOR = (62 if detect_cpu().arch == "aarch64" else 183).to_bytes(2, "little")

DAMAGES |= {
    "swapped libraries": (swap("library"), "is not the library of kernel 0: it says that its kernel is"),
    "swapped problems": (swap("problem"), "kernel 0"),
    "swapped decisions": (swap("decisions"), "kernel 0"),
    "another direction": (alter(direction="backward"), "is not the library of kernel 0"),
    "another dtype": (alter(dtype="bfloat16"), "is not the library of kernel 0: it says that its kernel is"),
    "another head dim": (alter(head_dim=64), "is not the library of kernel 0: it says that its kernel is"),
    "another decision": (other_decision, "is not the library of kernel 0: it says that its kernel is"),
    "another family": (
        lambda folder: change_manifest(folder, lambda m: m["kernels"][0].update(family="mma")),
        "kernel 0",
    ),
    "another target": (other_target, "is not the library of kernel 0: it says that its target is"),
    "no targets": (
        lambda folder: change_manifest(folder, lambda m: m["targets"].clear()),
        "it names no target",
    ),
    "no kernels": (lambda folder: change_manifest(folder, lambda m: m["kernels"].clear()), "or no kernel"),
    "a size beyond kernels": (alter(length=10**400), "length must be between"),
    "no label": (without_label, "it does not say which kernel it is"),
    "a label on other code": (label_on_other_code, "it exports no function 'forward'"),
    "code for another processor": (set_bytes(18, OTHER_PROCESSOR), "its machine code is for"),
    "no library": (set_bytes(0, b"#!/bin/sh"), "it is no library of machine code"),
    "a pipe for a library": (in_place_of_library(os.mkfifo), "is missing"),
    "a folder for a library": (in_place_of_library(Path.mkdir), "is missing"),
    "linked manifest": (
        replace_manifest(lambda path: path.symlink_to("../elsewhere.json")),
        "manifest.json is a link",
    ),
    "dangling manifest": (replace_manifest(lambda path: path.symlink_to("none")), "manifest.json is a link"),
    "a pipe for a manifest": (replace_manifest(os.mkfifo), "manifest.json is damaged"),
    "a folder for a manifest": (replace_manifest(Path.mkdir), "manifest.json is damaged"),
    "huge manifest": (lambda folder: os.truncate(folder / MANIFEST, 2**34), "manifest.json is damaged"),
    "nested manifest": (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "nested too deeply"),
    "a name twice": (
        lambda folder: (folder / MANIFEST).write_text(
            (folder / MANIFEST).read_text().replace('"versions"', '"files": {}, "versions"', 1)
        ),
        "'files' stands in it twice",
    ),
    "manifest among the files": (
        lambda folder: change_manifest(
            folder, lambda m: m["files"].update({MANIFEST: {"bytes": 1, "sha256": "0"}})
        ),
        "no plain file name",
    ),
    "size of no kind": (
        lambda folder: change_manifest(
            folder, lambda m: m["files"][library(folder).name].update(bytes="many")
        ),
        "must be int",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_anything_but_an_untouched_bundle_is_refused(
    name: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = DAMAGES[name]
    monkeypatch.setattr(dispatch, "load_library", lambda *a, **k: pytest.fail("a library was opened"))
    load_bundle(copy, register=False)
    damage(copy)
    with pytest.raises(ValueError, match=f"copy is refused as a bundle: .*{message}") as refusal:
        load_bundle(copy)
    assert len(str(refusal.value)) < 1500
    assert bundle_module._registered == []


@pytest.mark.parametrize("arch", ["other cpu", "cuda"])
def test_a_bundle_for_another_machine_is_refused(arch: str, copy: Path) -> None:
    if arch == "cuda":
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        foreign = {"kind": "cuda", "arch": "sm_90a", "model": "nvidia-h200"}
    else:
        other = "aarch64" if detect_cpu().arch != "aarch64" else "x86-64-v4"
        foreign = {"kind": "cpu", "arch": other, "model": "generic"}
    change_manifest(copy, lambda manifest: manifest.update(targets=[foreign]))
    with pytest.raises(RuntimeError, match="can't run on this machine.*" + foreign["arch"]):
        load_bundle(copy)


def test_a_library_that_changed_after_loading_is_not_opened(copy: Path) -> None:
    load_bundle(copy)
    flip_a_byte(copy)
    with pytest.raises(ValueError, match="is altered"):
        find_kernel("forward", torch.randn(2, 4, 70, 32), LAYOUT.spec)


def test_files_are_read_once_in_a_process(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = bundle_module.read_regular_file

    def count(path: Path, *rest: int, **options: bool) -> bytes:
        read.append(path.name)
        return original(path, *rest, **options)

    monkeypatch.setattr(bundle_module, "read_regular_file", count)
    load_bundle(copy)
    assert sorted(read) == sorted(path.name for path in copy.iterdir())
    read.clear()
    for direction in ("forward", "backward"):
        kernel = find_kernel(direction, torch.randn(2, 4, 70, 32), LAYOUT.spec)
        assert kernel.path is not None and kernel.path.parent == copy.resolve()
    load_bundle(copy, register=False)
    assert read == [MANIFEST]
    library(copy).touch()
    load_bundle(copy, register=False)
    assert read == [MANIFEST, MANIFEST, library(copy).name]


def test_no_bundle_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no bundle folder"):
        load_bundle(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"it has no manifest\.json"):
        load_bundle(tmp_path)


def test_an_export_replaces_a_bundle_and_nothing_else(copy: Path, tmp_path: Path) -> None:
    assert export_bundle(copy, PROBLEMS[:1], detect_cpu()) == copy
    assert len(load_bundle(copy, register=False).kernels) == 1
    (copy / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds more than a bundle"):
        export_bundle(copy, PROBLEMS, detect_cpu())
    assert (copy / "thesis.tex").exists()
    webapp = tmp_path / "webapp"
    webapp.mkdir()
    (webapp / MANIFEST).write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match="holds more than a bundle"):
        export_bundle(webapp, PROBLEMS, detect_cpu())
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export_bundle(file, PROBLEMS, detect_cpu())
    with pytest.raises(ValueError, match="at least one problem"):
        export_bundle(tmp_path / "new", [], detect_cpu())
    with pytest.raises(ValueError, match="at least one target"):
        export_bundle(tmp_path / "new", PROBLEMS, [])
    assert not (tmp_path / "new").exists()


def test_the_nearest_of_several_kernels_serves(tmp_path: Path) -> None:
    problems = [
        AttentionProblem("forward", "float32", 1, 4, 4, length, 32, LAYOUT) for length in (16, 64, 1024)
    ]
    loaded = load_bundle(export_bundle(tmp_path / "bundle", problems, detect_cpu()), register=False)
    wanted = AttentionProblem("forward", "float32", 1, 4, 4, 80, 32, LAYOUT)
    nearest = loaded.nearest(wanted, detect_cpu())
    assert nearest is not None
    assert nearest.problem.length == 64
    assert (
        loaded.nearest(AttentionProblem("forward", "float32", 1, 4, 4, 80, 64, LAYOUT), detect_cpu()) is None
    )
    assert loaded.nearest(wanted, MachineTarget("cuda", "sm_90a")) is None
    assert loaded.nearest(wanted, detect_cpu(), families=("mma",)) is None


@pytest.mark.skipif(detect_cpu().arch not in ("x86-64-v3", "x86-64-v4"), reason="needs two levels below")
def test_a_device_takes_the_kernel_of_the_nearest_target(tmp_path: Path) -> None:
    older, newer = MachineTarget("cpu", "x86-64-v2"), MachineTarget("cpu", "x86-64-v3")
    path = export_bundle(tmp_path / "bundle", PROBLEMS[:1], [older, newer])
    loaded = load_bundle(path)
    assert loaded.targets == (older, newer) and len(loaded.kernels) == 2

    def served(device: MachineTarget) -> MachineTarget | None:
        kernel = loaded.nearest(PROBLEMS[0], device)
        return None if kernel is None else kernel.target

    assert served(newer) == newer
    assert served(older) == older
    assert served(MachineTarget("cpu", "x86-64")) is None
    assert served(MachineTarget("cpu", "aarch64")) is None
    q, k, v = (torch.randn(2, heads, 70, 32) for heads in (4, 2, 2))
    kernel = find_kernel("forward", q, LAYOUT.spec)
    assert "compiled for cpu-x86-64-v" in kernel.reason
    torch.testing.assert_close(banded_attention(q, k, v, LAYOUT), reference_attention(q, k, v, LAYOUT)[0])


def test_a_bundle_for_another_architecture_is_not_written(tmp_path: Path) -> None:
    other = MachineTarget("cpu", "x86-64" if detect_cpu().arch == "aarch64" else "aarch64")
    with pytest.raises(ValueError, match="export it on such a machine"):
        export_bundle(tmp_path / "new", PROBLEMS, other)
    assert not (tmp_path / "new").exists()


def test_a_call_that_asks_for_determinism_gets_the_bundled_kernel_that_has_it(tmp_path: Path) -> None:
    h200 = parse_target("nvidia/h200")
    problem = AttentionProblem("backward", "bfloat16", 4, 16, 16, 4096, 128, BandLayout.spattention(16))
    fast, steady = (
        BundledKernel(
            problem,
            KernelSpec.untuned("mma", problem, h200, deterministic=asked),
            "untuned",
            "",
            tmp_path / f"{asked}.so",
            h200,
        )
        for asked in (False, True)
    )
    assert Bundle(tmp_path, (h200,), (fast, steady), {}, {}).nearest(problem, h200) is fast
    for kernels, found in (((fast, steady), steady), ((fast,), None)):
        bundle = Bundle(tmp_path, (h200,), kernels, {}, {})
        assert bundle.nearest(problem, h200, deterministic=True) is found


def test_an_export_adds_the_deterministic_kernel_where_the_fastest_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_instead(*identity: object) -> Path:
        path = tmp_path / f"{len(list(tmp_path.glob('*.so')))}.so"
        path.write_bytes(repr(identity).encode())
        return path

    monkeypatch.setattr("spattn_tvm.build.library_cache.compile_kernel", write_instead)
    problems = [
        AttentionProblem("backward", dtype, 1, 4, 4, 64, 128, LAYOUT) for dtype in ("float32", "bfloat16")
    ]
    folder = export_bundle(tmp_path / "bundle", problems, parse_target("nvidia/h200"))
    kernels = json.loads((folder / MANIFEST).read_text())["kernels"]
    assert [(k["family"], k["decisions"]["one_pass"]) for k in kernels] == [
        ("mma", 1),
        ("mma", 0),
        ("hopper", 0),
        ("hopper", 1),
    ]


@pytest.mark.parametrize("exported", [4096, 65536])
def test_an_export_has_the_kernels_of_every_case(
    exported: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bands of every width and of few tiles; a call gets that of its own, whatever length was exported."""

    def write_instead(kernel: KernelSpec, target: MachineTarget) -> Path:
        path = tmp_path / f"{kernel.name}.so"
        path.write_bytes(kernel.name.encode())
        return path

    monkeypatch.setattr("spattn_tvm.build.library_cache.compile_kernel", write_instead)
    monkeypatch.setenv("SPATTN_SCHEDULES", str(tmp_path / "none"))
    h100 = parse_target("nvidia/h100")

    def problem(direction: str, length: int, layout: BandLayout | None = None) -> AttentionProblem:
        bands = layout or BandLayout.spattention(16)
        return AttentionProblem(direction, "bfloat16", 1, 16, 16, length, 128, bands)

    folder = export_bundle(
        tmp_path / "bundle", [problem("forward", exported), problem("backward", exported)], h100
    )
    entries = json.loads((folder / MANIFEST).read_text())["kernels"]
    kernels = tuple(
        BundledKernel(served, KernelSpec.of(e["family"], served, e["decisions"]), "untuned", "", folder, h100)
        for e in entries
        if (served := AttentionProblem.from_json(e["problem"]))
    )
    bundle = Bundle(folder, (h100,), kernels, {}, {})
    for direction in ("forward", "backward"):
        for length in (1024, 2048, 4096, 65536, 131072):
            for layout in (None, BandLayout.causal(16), BandLayout.sliding_window(16, 1024)):
                wanted = problem(direction, length, layout)
                for asked in (False, True):
                    found = bundle.nearest(wanted, h100, deterministic=asked)
                    assert found is not None
                    assert found.kernel == KernelSpec.untuned("hopper", wanted, h100, asked)
