"""A family from outside: registered, it is a family like any other, from a first call to a loaded bundle."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_family

from spattn_tvm import bundle as bundle_module
from spattn_tvm import dispatch
from spattn_tvm.bands import BandLayout
from spattn_tvm.build.library_cache import compile_kernel, source_hash
from spattn_tvm.bundle import load_bundle
from spattn_tvm.choice import find_schedule
from spattn_tvm.dispatch import find_kernel, implementations
from spattn_tvm.export import export_bundle
from spattn_tvm.families import (
    families_for,
    families_on,
    family_names,
    find_family,
    find_space,
    is_made_for,
    register_family,
    resolve_family,
    unregister_family,
)
from spattn_tvm.families.family import Abi, Family, Output, Scratch
from spattn_tvm.families.kernel import FrozenDecisions, KernelSpec
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import reference_attention
from spattn_tvm.store import ScheduleRecord, load_records, save_records
from spattn_tvm.target import detect_cpu, parse_target
from spattn_tvm.tuning import SearchSettings, distill, tune
from spattn_tvm.tuning import workers as workers_module
from spattn_tvm.verify import kernels_of, verify

LAYOUT = BandLayout.spattention(4)
PROBLEM = AttentionProblem("forward", "float32", 2, 4, 2, 70, 32, LAYOUT)
SPEC = KernelSpec("cpu", "forward", "float32", 32, {"stage": 0, "key_rows": 96})


@pytest.fixture(autouse=True)
def _own_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SPATTN_SCHEDULES", str(tmp_path / "schedules"))
    monkeypatch.delenv("SPATTN_BUNDLE", raising=False)
    monkeypatch.setattr(bundle_module, "_registered", [])
    dispatch.clear_cache()
    yield
    dispatch.clear_cache()


@pytest.fixture
def toy() -> Family:
    register_family(toy_family.TOY)
    return toy_family.TOY


def draw(dtype: torch.dtype = torch.float32, length: int = 70) -> list[torch.Tensor]:
    return [
        torch.randn(2, length, heads, 32, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)
    ]


# --- the name of a kernel ---------------------------------------------------------------------------------


def test_a_kernel_is_a_value() -> None:
    other = KernelSpec("cpu", "forward", "float32", 32, {"key_rows": 96, "stage": 0})
    assert other == SPEC and hash(SPEC) == hash(other) and {SPEC: 1}[other] == 1
    assert SPEC.name == other.name
    assert SPEC.decisions == {"stage": 0, "key_rows": 96} and list(SPEC.decisions) == ["key_rows", "stage"]
    for changes in (
        {"family": "mma"},
        {"direction": "backward"},
        {"dtype": "bfloat16"},
        {"head_dim": 40},
        {"decisions": {"stage": 1, "key_rows": 96}},
        {"decisions": {"stage": 0}},
    ):
        changed = dataclasses.replace(SPEC, **changes)
        assert changed != SPEC and changed.name != SPEC.name
    assert pickle.loads(pickle.dumps(SPEC)) == SPEC
    assert KernelSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
    with pytest.raises(TypeError):
        SPEC.decisions["stage"] = 1  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.dtype = "float16"  # type: ignore[misc]
    given = {"stage": 0}
    kept = dataclasses.replace(SPEC, decisions=given)
    given["stage"] = 1
    assert kept.decisions == {"stage": 0}


@pytest.mark.parametrize("family", family_names())
def test_a_kernels_name_is_short_and_fit_for_a_file(family: str, tmp_path: Path) -> None:
    target = next(
        t for t in map(parse_target, ("x86-64-v3", "nvidia/h200")) if find_family(family).runs_on(t)
    )
    dtype = "float32" if target.kind == "cpu" else "bfloat16"
    for direction in find_family(family).spaces:
        decisions = find_space(family, direction).untuned(64, dtype, target)
        spec = KernelSpec(family, direction, dtype, 64, decisions)
        assert spec.name.startswith(f"{family}-{direction}-{dtype}-d64-") and len(spec.name) < 60
        (tmp_path / spec.name).touch()
        assert spec.rejection(target) is None
        assert spec.is_deterministic is find_space(family, direction).is_deterministic(decisions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "abacus"}, "unknown kernel family 'abacus'; known: cpu"),
        ({"family": ["cpu"]}, "unknown kernel family"),
        ({"direction": "sideways"}, "the cpu family has no 'sideways', only forward, backward, decode"),
        ({"dtype": "float64"}, "dtype must be one of float32"),
        ({"head_dim": 0}, "head_dim must be between 1 and .*, got 0"),
        ({"head_dim": True}, "head_dim must be an integer, got True"),
        ({"decisions": {"stage": True}}, "decisions must map names to integers"),
        ({"decisions": {"stage": 0.5}}, "decisions must map names to integers"),
        ({"decisions": {1: 1}}, "decisions must map names to integers"),
        ({"decisions": ["stage"]}, "decisions must map names to integers"),
    ],
)
def test_what_names_no_kernel_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        dataclasses.replace(SPEC, **changes)


def test_text_that_is_no_kernel_is_refused() -> None:
    data = SPEC.to_json()
    for bad in (None, [], {**data, "more": 1}, {k: v for k, v in data.items() if k != "dtype"}):
        with pytest.raises(ValueError, match="a kernel is a JSON object with the fields"):
            KernelSpec.from_json(bad)


def test_frozen_decisions_print_as_people_read_them() -> None:
    assert str(FrozenDecisions({"b": 2, "a": 1})) == "a=1, b=2"


# --- the registry -----------------------------------------------------------------------------------------


def test_the_package_prefers_a_chips_own_family() -> None:
    assert families_for(parse_target("nvidia/h200")) == ("hopper", "mma")
    assert families_for(parse_target("sm_80")) == ("mma",)
    assert families_for(parse_target("x86-64-v2")) == ("cpu",)


def test_a_family_made_for_some_problems_comes_first_for_them_alone() -> None:
    h200, wide = parse_target("nvidia/h200"), BandLayout.causal(4)
    few = AttentionProblem("forward", "bfloat16", 1, 4, 4, 100, 64, wide, kv_length=9000)
    assert families_for(parse_target("x86-64-v2"), few) == ("cpu",)
    # Head dims with kernels of one family, with more tiles than half of the multiprocessors, and with fewer
    # keys than they are worth.
    for head_dim, family, batches, keys, more in (
        (64, "hopper_split", 17, 390, 900),
        (128, "hopper_split", 17, 430, 1600),
        (192, "mma_split", 17, 780, 3600),
    ):
        short = dataclasses.replace(few, head_dim=head_dim)
        assert families_for(h200, short) == (family, "hopper", "mma")
        others = (
            dataclasses.replace(short, batch=batches),
            dataclasses.replace(short, kv_length=keys),
            dataclasses.replace(short, batch=batches - 1, kv_length=more),
            dataclasses.replace(short, direction="backward"),
        )
        for other in others:
            assert families_for(h200, other) == ("hopper", "mma")
        for changes in ({"batch": batches - 1}, {"kv_length": keys + 20}):
            assert families_for(h200, dataclasses.replace(short, **changes))[0] == family
    # Where no faster kernels are, fewer keys are worth it.
    for target, batches, changes in (
        ("sm_80", 14, {}),
        ("h200", 17, {"dtype": "float32"}),
        ("h200", 17, {"head_dim": 96}),
    ):
        some = dataclasses.replace(few, batch=batches - 1, kv_length=300, **changes)
        assert families_for(parse_target(target), some)[0] == "mma_split"
        for other in (dataclasses.replace(some, kv_length=200), dataclasses.replace(some, batch=batches)):
            assert "mma_split" not in families_for(parse_target(target), other)
    assert families_on(h200) == ("hopper", "hopper_split", "mma", "mma_split")


@pytest.mark.parametrize(
    "chip,multiprocessors", [("h100", 132), ("h100-pcie", 114), ("h20", 78), ("sm_90a", 132)]
)
@pytest.mark.parametrize("family,head_dim", [("hopper_split", 64), ("hopper_split", 128), ("mma_split", 192)])
def test_calls_with_more_tiles_than_fill_the_chip_are_not_for_it(
    family: str, head_dim: int, chip: str, multiprocessors: int
) -> None:
    most = multiprocessors // 2
    for tiles in (most, most + 1):
        layout = BandLayout.causal(tiles, 32768)
        short = AttentionProblem(
            "forward", "bfloat16", 1, tiles, tiles, 100, head_dim, layout, kv_length=32768
        )
        assert is_made_for(family, short, parse_target(chip)) == (tiles == most)


KERNELS = [
    (name, each)
    for name in ("cpu", "mma", "mma_split", "hopper", "hopper_split")
    for each in find_family(name).spaces
]


@pytest.mark.parametrize("family,direction", KERNELS)
def test_functions_take_what_the_abi_says(family: str, direction: str) -> None:
    """As many arguments, in all defaults: for bands of any width, and with each structure's scratch."""
    target = detect_cpu() if family == "cpu" else parse_target("nvidia/h100")
    space = find_space(family, direction)
    dtype = "float32" if family == "cpu" else "bfloat16"
    seen = set()
    for spec in {
        KernelSpec(family, direction, dtype, 64, decisions)
        for asked in (False, True)
        for decisions in space.all_untuned(64, dtype, target, asked)
    }:
        module = spec.build(target)
        numbers = 2  # the factor of the scores and the workers
        taken = len(spec.abi.inputs) + len(spec.abi.outputs) + len(spec.abi.scratch) + numbers
        assert len(module[direction].params) == taken, spec.decisions
        seen.add(taken)
    if family != "cpu" and direction == "backward":
        assert len(seen) == 2, "one pass has a workspace that two passes do not have"


@pytest.mark.parametrize("family,direction", KERNELS)
def test_structures_are_told_apart_and_have_features_of_one_length(family: str, direction: str) -> None:
    space, draw = find_space(family, direction), random.Random(family + direction)
    dtype = "float32" if family == "cpu" else "bfloat16"
    queries, layout = 1 if direction == "decode" else 512, BandLayout.spattention(4, 512)
    problem = AttentionProblem(direction, dtype, 1, 4, 4, queries, 64, layout, kv_length=512)
    lengths = set()
    structures = space.structures(64, dtype)
    assert len(structures) == (2 if direction == "backward" and family != "cpu" else 1)
    for name, choices in structures.items():
        for _ in range(20):
            decisions = {key: draw.choice(values) for key, values in choices.items()}
            assert space.structure(decisions, 64, dtype) == name
            assert space.without_idle(decisions, 64, dtype) == decisions
            lengths.add(len(space.features(decisions, problem)))
            others = {key: 1 for key in space.names(64, dtype) if key not in choices}
            assert space.without_idle({**decisions, **others}, 64, dtype) == decisions
    assert len(lengths) == 1


def test_what_is_of_no_structure_is_refused() -> None:
    space, h200 = find_space("hopper", "backward"), parse_target("nvidia/h200")
    decisions = space.untuned(64, "bfloat16", h200)
    for changed in ({**decisions, "one_pass": 7}, {k: v for k, v in decisions.items() if k != "one_pass"}):
        assert space.structure(changed, 64, "bfloat16") is None
        assert "have none of the structures: two passes, one pass" in str(
            space.rejection(changed, 64, "bfloat16", h200)
        )
    reason = space.rejection({**decisions, "dkv_queries": 7}, 64, "bfloat16", h200)
    assert reason == "dkv_queries=7 is not among the choices of two passes (32, 48, 64, 96)"


def test_a_family_is_registered_once_and_leaves_again(toy: Family) -> None:
    register_family(toy)
    assert family_names()[-1] == "toy" and implementations()[-1] == "toy"
    assert families_for(detect_cpu()) == ("cpu", "toy")
    with pytest.raises(ValueError, match="there is a family 'toy' already, toy_family:TOY"):
        register_family(dataclasses.replace(toy))
    unregister_family("toy")
    assert "toy" not in family_names()
    with pytest.raises(ValueError, match="impl must be one of auto, reference, cpu"):
        find_kernel("forward", draw()[0], LAYOUT.spec, "toy")


@pytest.mark.parametrize("name", ["auto", "reference", "", "a b", "a/b", "A", "1a", "a-b", "../a"])
def test_a_familys_name_is_fit_for_files_and_arguments(name: str) -> None:
    with pytest.raises(ValueError, match="a family's name is"):
        dataclasses.replace(toy_family.TOY, name=name)


def test_a_family_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="is not module:ATTRIBUTE"):
        dataclasses.replace(toy_family.TOY, reference="toy_family")
    with pytest.raises(ValueError, match=r"has spaces for .* and ABIs for"):
        dataclasses.replace(toy_family.TOY, abis={"forward": toy_family.FORWARD_ABI})
    with pytest.raises(ValueError, match="output 'o' is like 'x', which is no input"):
        Abi(("q",), (Output("o", like="x"),))
    with pytest.raises(ValueError, match="either like an input or has a shape"):
        Output("o")
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        Abi(("q",), (), (Scratch("s", lambda n: (1,), "float8"),))
    with pytest.raises(ValueError, match="goes into q, which is no input"):
        Abi(("k",), (), positive_scale=True)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("toy_family:FORWARD", ValueError, "must be a Family, found Space"),
        ("toy_family:NOTHING", ValueError, "must be a Family, found None"),
        ("no_such_module:FAMILY", ModuleNotFoundError, "no_such_module"),
        ("toy_family:ALIAS", ValueError, "calls itself toy_family:TOY"),
    ],
)
def test_a_reference_that_leads_to_no_family_is_refused(
    reference: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_family, "ALIAS", toy_family.TOY, raising=False)
    with pytest.raises(error, match=message):
        resolve_family(reference)


def test_text_in_a_file_never_imports_a_module() -> None:
    """Only who may run code names a module; a record or a bundle may not."""
    sys.modules.pop("antigravity", None)
    for text in ("antigravity:FAMILY", "toy_family:TOY"):
        with pytest.raises(ValueError, match="unknown kernel family"):
            KernelSpec.from_json({**SPEC.to_json(), "family": text})
    assert "antigravity" not in sys.modules


# --- from call to bundle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
@pytest.mark.parametrize("documents", [None, [0, 31, 31, 70]])
def test_a_call_runs_a_family_from_outside(
    toy: Family, scale: float | None, documents: list[int] | None
) -> None:
    q, k, v = draw()
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "return_lse": True}
    wanted, wanted_lse = reference_attention(q, k, v, LAYOUT, scale=scale, cu_seqlens=cu_seqlens)
    do, dlse = torch.randn_like(wanted), torch.randn_like(wanted_lse)
    wanted_gradients = torch.autograd.grad((wanted, wanted_lse), (q, k, v), (do, dlse))
    for _ in range(3):  # the second and the third take the short cut for repeated calls
        o, lse = banded_attention(q, k, v, LAYOUT, impl="toy", **options)
        torch.testing.assert_close(o, wanted)
        torch.testing.assert_close(lse, wanted_lse)
        assert o.stride() == q.stride()
        gradients = torch.autograd.grad((o, lse), (q, k, v), (do, dlse))
        for gradient, expected, model in zip(gradients, wanted_gradients, (q, k, v), strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
            assert gradient.stride() == model.stride()
    kernel = find_kernel("backward", q, LAYOUT.spec, "toy", kv_heads=2)
    assert kernel.spec == KernelSpec("toy", "backward", "float32", 32, toy_family.UNTUNED)


def test_inputs_that_are_not_aligned_are_copied_for_the_family_that_asks(toy: Family) -> None:
    q, k, v = (torch.randn(2 * heads * 70 * 32 + 1)[1:].view(2, heads, 70, 32) for heads in (4, 2, 2))
    expected, _ = reference_attention(q, k, v, LAYOUT)
    for _ in range(2):
        torch.testing.assert_close(banded_attention(q, k, v, LAYOUT, impl="toy"), expected)


def test_auto_prefers_what_is_registered_first() -> None:
    q, k, v = draw()
    assert find_kernel("forward", q, LAYOUT.spec).family == "cpu"
    banded_attention(q, k, v, LAYOUT)
    register_family(toy_family.TOY, first=True)
    assert find_kernel("forward", q, LAYOUT.spec).family == "toy"
    torch.testing.assert_close(banded_attention(q, k, v, LAYOUT), reference_attention(q, k, v, LAYOUT)[0])
    # It is float32 only.
    assert find_kernel("forward", q.to(torch.bfloat16), LAYOUT.spec).family == "cpu"
    unregister_family("toy")
    assert find_kernel("forward", q, LAYOUT.spec).family == "cpu"


def test_a_library_belongs_to_the_text_of_the_familys_own_modules(
    toy: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(toy_family.__file__).read_text(encoding="utf-8")
    module = tmp_path / "other_toy_family.py"
    module.write_text(text.replace("toy_family:", "other_toy_family:").replace('"toy"', '"other_toy"'))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SPATTN_CACHE_DIR", str(tmp_path / "cache"))
    family = resolve_family("other_toy_family:TOY")
    spec = KernelSpec("other_toy", "forward", "float32", 32, toy_family.UNTUNED)
    path = compile_kernel(spec, detect_cpu())
    assert path.name.startswith(spec.name) and compile_kernel(spec, detect_cpu()) == path
    assert source_hash(family) != source_hash(toy)
    module.write_text(module.read_text() + "# changed\n")
    source_hash.cache_clear()
    try:
        assert compile_kernel(spec, detect_cpu()) != path
    finally:
        source_hash.cache_clear()


def test_text_that_is_nowhere_can_not_be_told_apart() -> None:
    with pytest.raises(ValueError, match="the source text of no_such_module is not found"):
        source_hash(dataclasses.replace(toy_family.TOY, sources=("no_such_module",)))


def test_a_record_of_it_serves(toy: Family) -> None:
    target = detect_cpu()
    spec = KernelSpec.of("toy", PROBLEM, {**toy_family.UNTUNED, "repeats": 1})
    save_records([ScheduleRecord(PROBLEM, target.folder, spec, 3.5)])
    (record,) = load_records(target.folder)
    assert record.kernel == spec
    choice = find_schedule(PROBLEM, target, families=["toy"])
    assert (choice.kernel, choice.status) == (spec, "tuned")
    q = draw()[0]
    assert find_kernel("forward", q, LAYOUT.spec, "toy", kv_heads=2).spec == spec


def test_a_bundle_of_it_is_loaded_where_it_is_registered_and_refused_where_not(
    toy: Family, tmp_path: Path
) -> None:
    unregister_family("toy")
    register_family(toy, first=True)
    problems = [dataclasses.replace(PROBLEM, direction=direction) for direction in ("forward", "backward")]
    path = export_bundle(tmp_path / "bundle", problems, detect_cpu())
    bundle = load_bundle(path)
    assert {entry.kernel.family for entry in bundle.kernels} == {"toy"}
    q, k, v = draw()
    kernel = find_kernel("forward", q, LAYOUT.spec, kv_heads=2)
    assert kernel.path is not None and kernel.path.parent == path
    o = banded_attention(q, k, v, LAYOUT)
    torch.testing.assert_close(o, reference_attention(q, k, v, LAYOUT)[0])
    code = f"from spattn_tvm import load_bundle; load_bundle({str(path)!r}, register=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.returncode and "unknown kernel family 'toy'" in done.stderr
    code = f"import toy_family as t; from spattn_tvm.families import register_family as r; r(t.TOY)\n{code}"
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def test_it_is_verified(toy: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [kernel for kernel in kernels_of(detect_cpu()) if kernel.spec.family == "toy"]
    assert {kernel.spec.direction for kernel in kernels} == {"forward", "backward"}
    result = verify(detect_cpu(), 4 * len(kernels), kernels=kernels, max_length=200)
    assert result.failures == [] and result.passed == 4 * len(kernels)
    # One that is wrong is found out.
    register_family(toy_family.BROKEN_TOY)
    broken = toy_family.kernel(toy_family.BROKEN_TOY, fault=1)
    wrong = [dataclasses.replace(kernels[0], spec=broken)]
    assert verify(detect_cpu(), 8, kernels=wrong, max_length=200, seed=1).failures


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_it_is_tuned_by_its_name_alone(
    direction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels are built and measured by processes that have to find it themselves."""
    pytest.importorskip("xgboost")
    monkeypatch.setattr(workers_module, "available_cpus", lambda: 1)
    problem = dataclasses.replace(PROBLEM, direction=direction)
    result = tune(
        problem,
        detect_cpu(),
        SearchSettings(trials=5, families=["toy_family:TOY"], log_root=tmp_path / "logs"),
        progress=False,
    )
    assert result.errors == 0 and result.trials == 5 and result.kernel is not None
    assert result.kernel.family == "toy" and result.kernel.serves(problem)
    (record,) = distill(tmp_path / "logs", schedules=tmp_path / "schedules", top=2, rounds=3)
    assert record.kernel.family == "toy"
    assert find_schedule(problem, detect_cpu(), families=["toy"]).kernel == record.kernel
