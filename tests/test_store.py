"""Schedule records: files on disk, and which record a lookup takes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spattn_tvm import dispatch, store
from spattn_tvm.bands import BandLayout
from spattn_tvm.choice import Choice, NoKernelError, find_schedule
from spattn_tvm.families import find_space
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import reference_attention
from spattn_tvm.store import ScheduleRecord, ScheduleWarning, load_records, save_records
from spattn_tvm.target import MachineTarget, detect_cpu, parse_target

HERE = MachineTarget("cpu", "x86-64-v4", "amd-25-17")
SIBLING = MachineTarget("cpu", "x86-64-v4", "intel-6-143")
OLDER = MachineTarget("cpu", "x86-64-v3", "amd-23-49")

BASE = AttentionProblem("forward", "float32", 1, 16, 16, 4096, 64, BandLayout.spattention(16))


def problem(**changes: object) -> AttentionProblem:
    return dataclasses.replace(BASE, **changes)


def legal_kernel(wanted: AttentionProblem, target: MachineTarget = HERE, **changes: int) -> KernelSpec:
    space = find_space("cpu", wanted.direction)
    decisions = {**space.untuned(wanted.head_dim, wanted.dtype, target), **changes}
    kernel = KernelSpec.of("cpu", wanted, decisions)
    assert kernel.rejection(target) is None
    return kernel


def record(
    wanted: AttentionProblem = BASE, target: MachineTarget = HERE, latency_us: float = 100.0, **decisions: int
) -> ScheduleRecord:
    return ScheduleRecord(
        wanted,
        target.folder,
        legal_kernel(wanted, target, **decisions),
        latency_us,
        "abc",
        {"tvm": "0.27"},
        "a chip",
        "2026-11-24",
        "a/log",
    )


@pytest.fixture(autouse=True)
def _fresh_reads() -> None:
    store.clear_cache()


def test_records_come_back_from_disk_as_they_were_saved(tmp_path: Path) -> None:
    records = [record(), record(problem(length=512), latency_us=7.5), record(problem(direction="backward"))]
    paths = save_records(records, tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in paths} == {
        "cpu-x86-64-v4-amd-25-17/forward-float32-d64.json",
        "cpu-x86-64-v4-amd-25-17/backward-float32-d64.json",
    }
    assert sorted(load_records(HERE.folder, tmp_path), key=str) == sorted(records, key=str)


def test_a_saved_record_replaces_that_of_the_same_problem_and_the_file_does_not_depend_on_the_order(
    tmp_path: Path,
) -> None:
    first, second, better = record(), record(problem(length=512)), record(latency_us=50.0)
    save_records([first, second], tmp_path / "a")
    save_records([better], tmp_path / "a")
    save_records([second], tmp_path / "b")
    save_records([better], tmp_path / "b")
    texts = [
        next((tmp_path / name / HERE.folder).glob("*.json")).read_text(encoding="utf-8")
        for name in ("a", "b")
    ]
    assert texts[0] == texts[1]
    assert {item.latency_us for item in load_records(HERE.folder, tmp_path / "a")} == {50.0, 100.0}


def test_the_very_problem_is_tuned(tmp_path: Path) -> None:
    wanted = record(head_major=0)
    save_records([record(problem(length=2048)), wanted], tmp_path)
    choice = find_schedule(BASE, HERE, root=tmp_path)
    assert (choice.status, choice.kernel, choice.record) == ("tuned", wanted.kernel, wanted)
    assert "100.0 us" in choice.reason


def test_layouts_are_the_same_problem_when_their_intervals_are(tmp_path: Path) -> None:
    save_records([record()], tmp_path)
    spelled_out = problem(layout=BandLayout.spattention(16, 4096))
    other = problem(layout=BandLayout.spattention(16, 8192))
    assert find_schedule(spelled_out, HERE, root=tmp_path).status == "tuned"
    assert find_schedule(other, HERE, root=tmp_path).status == "nearest"


@pytest.mark.parametrize(
    ("near", "far"),
    [
        ({"length": 2048}, {"length": 1024}),
        ({"batch": 2}, {"batch": 8}),
        ({"length": 8192}, {"dtype": "bfloat16"}),
        ({"layout": BandLayout.causal(16), "length": 2048}, {"layout": BandLayout.causal(16)}),
        ({"length": 16384, "layout": BandLayout.sliding_window(16, 400)}, {"length": 1024}),
        ({"kv_heads": 8}, {"kv_heads": 2}),
    ],
)
def test_the_nearest_record_of_the_chip_is_taken(tmp_path: Path, near: dict, far: dict) -> None:
    close, distant = record(problem(**near), head_major=0), record(problem(**far), latency_us=1.0)
    save_records([distant, close], tmp_path)
    choice = find_schedule(BASE, HERE, root=tmp_path)
    assert (choice.status, choice.record) == ("nearest", close)
    assert "nearest record" in choice.reason


def test_a_chips_own_records_come_before_equally_near_ones_of_its_instruction_set_and_no_others_count(
    tmp_path: Path,
) -> None:
    older = record(target=OLDER)
    sibling = record(target=SIBLING)
    save_records([older], tmp_path)
    assert find_schedule(BASE, HERE, root=tmp_path).status == "untuned"
    save_records([sibling], tmp_path)
    choice = find_schedule(BASE, HERE, root=tmp_path)
    assert (choice.status, choice.record) == ("nearest", sibling)
    assert SIBLING.folder in choice.reason
    assert "another chip with x86-64-v4" in choice.reason
    far, near = record(problem(length=64)), record(problem(length=2048))
    save_records([far], tmp_path)
    assert find_schedule(BASE, HERE, root=tmp_path).record == sibling
    save_records([near], tmp_path)
    assert find_schedule(BASE, HERE, root=tmp_path).record == near


def test_the_default_is_taken_without_a_record_of_this_direction_and_head_dim(tmp_path: Path) -> None:
    save_records([record(problem(direction="backward")), record(problem(head_dim=128))], tmp_path)
    choice = find_schedule(BASE, HERE, root=tmp_path)
    assert choice.status == "untuned"
    assert choice.kernel == KernelSpec.untuned("cpu", BASE, HERE)
    assert "no record" in choice.reason


@pytest.mark.parametrize("decisions", [{"query_rows": 7}, {"no_such_knob": 1}, None])
def test_decisions_that_the_space_no_longer_offers_are_passed_over_visibly(
    tmp_path: Path, decisions: dict[str, int] | None
) -> None:
    stale = {} if decisions is None else {**record().kernel.decisions, **decisions}
    save_records([dataclasses.replace(record(), kernel=KernelSpec.of("cpu", BASE, stale))], tmp_path)
    choice = find_schedule(BASE, HERE, root=tmp_path)
    assert choice.status == "untuned"
    assert "ignored" in choice.reason
    assert BASE.key in choice.reason


FORMAT_FIELD = f'"format": {store.FORMAT}'
DAMAGED_FILES: dict[str, Callable[[Path, str], object]] = {
    "cut off": lambda path, text: path.write_text(text[: len(text) // 2]),
    "empty": lambda path, text: path.write_text(""),
    "no list": lambda path, text: path.write_text("{}"),
    "a string": lambda path, text: path.write_text('"records"'),
    "records are no list": lambda path, text: path.write_text('{"format": 2, "records": {"a": 1}}'),
    "merge conflict": lambda path, text: path.write_text(f"<<<<<<< ours\n{text}=======\n>>>>>>> theirs\n"),
    "deeply nested": lambda path, text: path.write_text("[" * 200_000),
    "a record nested deeply": lambda path, text: path.write_text(text.replace("[", "[" + "[" * 99_999, 1)),
    "invalid UTF-8": lambda path, text: path.write_bytes(b"\xff\xfe" + text.encode("utf-16-le")),
    "zeros": lambda path, text: path.write_bytes(bytes(4096)),
    "format of no kind": lambda path, text: path.write_text(text.replace(FORMAT_FIELD, '"format": "2"')),
    "format 0": lambda path, text: path.write_text(text.replace(FORMAT_FIELD, '"format": 0')),
    "format true": lambda path, text: path.write_text(text.replace(FORMAT_FIELD, '"format": true')),
    "too large": lambda path, text: os.truncate(path, 2**40),
    "a folder": lambda path, text: (path.unlink(), path.mkdir()),
    "a pipe": lambda path, text: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path, text: (path.unlink(), path.symlink_to("/dev/zero")),
    "a dangling link": lambda path, text: (path.unlink(), path.symlink_to("nowhere.json")),
    "a loop of links": lambda path, text: (path.unlink(), path.symlink_to(path.name)),
    "a socket": lambda path, text: (path.unlink(), make_socket(path)),
}


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def warnings_of(work: Callable[[], Choice]) -> tuple[Choice, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    assert all(issubclass(warning.category, ScheduleWarning) for warning in caught), caught
    return result, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_file_that_can_not_be_read_is_skipped_with_one_warning(name: str, tmp_path: Path) -> None:
    other = record(problem(dtype="bfloat16"), latency_us=7.0)
    path, good = save_records([record(), other], tmp_path)
    DAMAGED_FILES[name](path, path.read_text(encoding="utf-8"))
    choice, said = warnings_of(lambda: find_schedule(BASE, HERE, root=tmp_path))
    assert (choice.status, choice.record) == ("nearest", other), "the other file counts"
    (text,) = said
    assert text.startswith(f"{path}: ") and len(text) < 1000
    assert "ignored" in text and ("delete" in text or "update" in text)
    store.clear_cache()
    assert warnings_of(lambda: find_schedule(BASE, HERE, root=tmp_path)) == (choice, [])
    good.unlink()
    store.clear_cache()
    assert find_schedule(BASE, HERE, root=tmp_path).status == "untuned"


def test_a_file_of_a_later_format_is_skipped_and_never_replaced(tmp_path: Path) -> None:
    (path,) = save_records([record()], tmp_path)
    text = path.read_text(encoding="utf-8").replace(FORMAT_FIELD, f'"format": {store.FORMAT + 1}')
    path.write_text(text, encoding="utf-8")
    choice, said = warnings_of(lambda: find_schedule(BASE, HERE, root=tmp_path))
    assert choice.status == "untuned"
    assert (
        len(said) == 1
        and f"its format is {store.FORMAT + 1}" in said[0]
        and "install a newer spattn-tvm" in said[0]
    )
    with pytest.raises(ValueError, match=rf"format is {store.FORMAT + 1}.*install a newer spattn-tvm"):
        save_records([record()], tmp_path)
    assert path.read_text(encoding="utf-8") == text


def test_a_file_without_a_format_is_read_and_gets_one_when_it_is_written(tmp_path: Path) -> None:
    (path,) = save_records([record()], tmp_path)
    content = path.read_text(encoding="utf-8")
    old = json.dumps(json.loads(content)["records"])
    for text in (old, "\ufeff" + old, "\ufeff" + content):
        path.write_text(text, encoding="utf-8")
        store.clear_cache()
        choice, said = warnings_of(lambda: find_schedule(BASE, HERE, root=tmp_path))
        assert (choice.record, said) == (record(), [])
    save_records([record()], tmp_path)
    assert path.read_text(encoding="utf-8") == content


DAMAGED_RECORDS: dict[str, Callable[[dict], object]] = {
    "latency below 0": lambda item: item.update(latency_us=-1),
    "latency NaN": lambda item: item.update(latency_us=math.nan),
    "latency infinite": lambda item: item.update(latency_us=math.inf),
    "latency beyond floats": lambda item: item.update(latency_us=10**400),
    "latency true": lambda item: item.update(latency_us=True),
    "latency text": lambda item: item.update(latency_us="100"),
    "family": lambda item: item.update(family="abacus"),
    "family of no kind": lambda item: item.update(family=["cpu"]),
    "field missing": lambda item: item.pop("family"),
    "field unknown": lambda item: item.update(familia="cpu"),
    "length text": lambda item: item["problem"].update(length="many"),
    "length negative": lambda item: item["problem"].update(length=-4096),
    "length beyond floats": lambda item: item["problem"].update(length=10**400),
    "length beyond texts": lambda item: item["problem"].update(length=10**4000),
    "heads beyond kernels": lambda item: item["problem"].update(batch=2**31),
    "direction": lambda item: item["problem"].update(direction="sideways"),
    "layout": lambda item: item["problem"].update(layout="spiral:heads=16"),
    "layout of other heads": lambda item: item["problem"].update(layout="causal:heads=4"),
    "layout of no kind": lambda item: item["problem"].update(layout=[16]),
    "problem of no kind": lambda item: item.update(problem=[1, 2]),
    "a fraction": lambda item: item["decisions"].update(query_rows=0.5),
    "a truth": lambda item: item["decisions"].update(query_rows=True),
    "decisions of no kind": lambda item: item.update(decisions=["query_rows"]),
    "a date of no kind": lambda item: item.update(date=5),
    "half a character": lambda item: item.update(device="\ud800"),
    "versions of no kind": lambda item: item.update(versions={"tvm": None}),
    "another folder's": lambda item: item.update(target=SIBLING.folder),
    "a folder of no target": lambda item: item.update(target="cpu-abacus-1"),
    "a target that asks the machine": lambda item: item.update(target="cuda"),
    "a path": lambda item: item.update(target="../elsewhere"),
    "another file's": lambda item: item["problem"].update(dtype="float16"),
}


def damage_record(path: Path, change: Callable[[dict], object]) -> list[Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["records"].insert(0, json.loads(json.dumps(data["records"][0])))
    change(data["records"][0])
    path.write_text(json.dumps(data), encoding="utf-8")
    return data["records"]


@pytest.mark.parametrize("name", DAMAGED_RECORDS)
def test_of_a_file_with_a_damaged_record_only_that_is_skipped(name: str, tmp_path: Path) -> None:
    (path,) = save_records([record()], tmp_path)
    with unlimited_digits():
        damaged, _ = damage_record(path, DAMAGED_RECORDS[name])
    choice, said = warnings_of(lambda: find_schedule(BASE, HERE, root=tmp_path))
    assert (choice.status, choice.record) == ("tuned", record())
    (text,) = said
    assert text.startswith(f"{path}: record 0") and len(text) < 1000
    # What is not understood may be another version's, or mended: it stays.
    better = record(latency_us=50.0)
    save_records([better], tmp_path)
    assert load_records(HERE.folder, tmp_path) == [better]
    if "beyond texts" not in name:
        kept = json.loads(path.read_text(encoding="utf-8"))["records"]
        assert repr(kept[1:]) == repr([damaged])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@contextlib.contextmanager
def unlimited_digits() -> Iterator[None]:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_saving_over_a_damaged_file_loses_nothing(name: str, tmp_path: Path) -> None:
    (path,) = save_records([record()], tmp_path)
    DAMAGED_FILES[name](path, path.read_text(encoding="utf-8"))
    if path.is_symlink() or not path.is_file():
        if name == "a dangling link":
            with pytest.warns(ScheduleWarning, match="set aside"):
                save_records([record()], tmp_path)
            assert path.with_name(f"{path.name}.damaged").is_symlink()
            return
        kind = os.lstat(path).st_mode
        with pytest.raises(OSError, match=r"forward-float32-d64\.json"):
            save_records([record()], tmp_path)
        assert os.lstat(path).st_mode == kind
        return
    size = path.stat().st_size
    for count in range(2):
        with pytest.warns(ScheduleWarning, match=r"damaged(-1)?: set aside, because"):
            save_records([record()], tmp_path)
        assert load_records(HERE.folder, tmp_path) == [record()]
        aside = path.with_name(f"{path.name}.damaged{'-1' if count else ''}")
        assert aside.stat().st_size == size
        path.unlink()
        path.write_bytes(b"[")
        if size > 2**30:
            os.truncate(path, size)
        else:
            shutil.copyfile(aside, path)


def test_folders_that_are_none_of_a_target_do_not_count(tmp_path: Path) -> None:
    sibling = record(target=SIBLING)
    (path,) = save_records([sibling], tmp_path)
    for name in (
        "cpu-x86-64-v4",
        "cpu-x86-64-v4-Amd-25-17",
        "cpu-x86-64-v4-",
        "cpu-abacus",
        "cpu-x86-64-v4-ä",
    ):
        shutil.copytree(path.parent, tmp_path / name)
    (tmp_path / "cpu-x86-64-v4-file").write_text("")
    (tmp_path / "cpu-x86-64-v4-dangling").symlink_to("nowhere")
    (tmp_path / "cuda-sm_90a-nvidia-h200").symlink_to("cuda-sm_90a-nvidia-h200")
    choice, said = warnings_of(lambda: find_schedule(BASE, HERE, root=tmp_path))
    assert (choice.status, choice.record) == ("nearest", sibling)
    assert len(said) == len(set(said)) and all("ignored" in text for text in said)
    for name in ("Amd-25-17", "abacus", "file", "dangling", "ä"):
        assert any(name in text for text in said), name


@pytest.mark.parametrize("place", ["root missing", "root a file", "folder a file", "folder a loop", "denied"])
def test_there_may_be_no_folder_at_all(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "schedules"
    if place == "root a file":
        root.write_text("")
    elif place != "root missing":
        root.mkdir()
        if place == "folder a file":
            (root / HERE.folder).write_text("")
        elif place == "folder a loop":
            (root / HERE.folder).symlink_to(HERE.folder)
        else:
            (path,) = save_records([record()], root)
            original = os.open

            def refuse(name: Any, *rest: Any, **options: Any) -> int:
                if str(name) == str(path):
                    raise PermissionError(errno.EACCES, "Permission denied", str(name))
                return original(name, *rest, **options)

            monkeypatch.setattr(os, "open", refuse)
    choice, said = warnings_of(lambda: find_schedule(BASE, HERE, root=root))
    assert choice.status == "untuned"
    assert len(said) <= 2 and bool(said) == (place != "root missing")


def test_a_file_that_vanishes_after_the_folder_was_listed_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = save_records([record(), record(problem(dtype="bfloat16"))], tmp_path)
    listed = store.list_folder

    def list_and_delete(*arguments: Any) -> list[Path]:
        found = listed(*arguments)
        path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(store, "list_folder", list_and_delete)
    choice, said = warnings_of(lambda: find_schedule(BASE, HERE, root=tmp_path))
    assert (choice.status, said) == ("nearest", [])


def mutate_text(text: str, rng: random.Random) -> bytes:
    """Damage to the bytes: as a torn write, an editor or a bad disk leaves."""
    data = bytearray(text.encode())
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        place = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 40)]
        elif kind == 2:
            data[place:place] = bytes(
                rng.choice(b'[]{}",:0-9eNaI\\\x00\xff') for _ in range(rng.randrange(1, 5))
            )
        elif kind == 3:
            data[place:place] = data[place : place + rng.randrange(1, 200)]
        else:
            del data[place:]
            data += b" "
    return bytes(data)


ODD_VALUES = (
    *(
        None,
        True,
        False,
        "",
        "x",
        "cpu",
        "\ud800",
        "\x00",
        "a" * 10_000,
        [],
        [[]],
        {},
        {"a": {}},
        [1, "b", None],
    ),
    *(0, -1, 1, 7, 2**31, 2**63, 10**400, 1e308, 5e-324, math.nan, math.inf, -math.inf),
)


def mutate_value(data: Any, rng: random.Random) -> None:
    """Damage to the values: wrong types, numbers and names at a random place."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        node, key = rng.choice(places)
        if key not in node and isinstance(node, dict):
            continue
        kind = rng.randrange(6)
        if kind <= 2:
            node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind == 3 and isinstance(node, dict):
            del node[key]
        elif kind == 4 and isinstance(node, dict):
            node[rng.choice(("x", "", "length", "cpu", "\ud800"))] = node[key]
        elif isinstance(node[key], int) and not isinstance(node[key], bool):
            node[key] *= rng.choice((2, -1, 1000, 10**30))
        else:
            node[key] = [node[key]]


def test_no_mutation_of_a_file_stops_a_call(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    saved = [
        record(),
        record(problem(length=512), latency_us=7.5),
        record(problem(kv_heads=4), latency_us=9.0),
    ]
    reported = whole = 0
    for count in range(600):
        root = tmp_path / str(count)
        (path,) = save_records(saved, root)
        good = path.read_text(encoding="utf-8")
        if count % 2:
            path.write_bytes(mutate_text(good, rng))
        else:
            data = json.loads(good)
            mutate_value(data, rng)
            with unlimited_digits():
                path.write_text(json.dumps(data), encoding="utf-8")
        content = path.read_bytes()
        for target in (HERE, SIBLING):
            store.clear_cache()
            choice, said = warnings_of(
                lambda target=target, root=root: find_schedule(BASE, target, root=root)
            )
            assert choice.status in ("tuned", "nearest", "untuned")
            assert choice.kernel.rejection(target) is None
            if target is HERE:
                assert all(text.startswith(f"{path}: ") for text in said) and len(said) <= 1, (said, content)
                reported += len(said)
                usable = load_records(HERE.folder, root)
                whole += not said
                # Without a warning every record is there, or the damage left no trace in the JSON.
                lost = len(usable) < len(saved) and not said
                assert not lost or len(_items(content)) < len(saved), content
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                save_records([record(problem(length=99))], root)
            except ValueError as error:
                assert "its format is" in str(error)
            else:
                assert record(problem(length=99)) in load_records(HERE.folder, root)
    assert reported > 300 and whole > 10


def _items(content: bytes) -> list[Any]:
    data = json.loads(content.decode("utf-8-sig"))
    return data["records"] if isinstance(data, dict) else data


def test_a_call_runs_beside_broken_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = detect_cpu()
    wanted = dataclasses.replace(BASE, length=77, layout=BandLayout.spattention(16))
    good = ScheduleRecord(wanted, here.folder, KernelSpec.untuned("cpu", wanted, here), 5.0)
    (path,) = save_records([good], tmp_path)
    damage_record(path, DAMAGED_RECORDS["family"])
    os.mkfifo(path.with_name("forward-float16-d64.json"))
    monkeypatch.setenv("SPATTN_SCHEDULES", str(tmp_path))
    dispatch.clear_cache()
    q, k, v = (torch.randn(1, 16, 77, 64) for _ in range(3))
    with pytest.warns(ScheduleWarning) as said:
        o = banded_attention(q, k, v, wanted.layout)
    assert len(said) == 2
    torch.testing.assert_close(o, reference_attention(q, k, v, wanted.layout)[0], rtol=1e-4, atol=1e-5)
    assert dispatch.explain(wanted, here).status == "tuned"
    dispatch.clear_cache()


SAVE = """
import sys
from pathlib import Path
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.bands import BandLayout
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.store import ScheduleRecord, save_records
root, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for length in range(first, first + count):
    problem = AttentionProblem("forward", "float32", 1, 4, 4, length, 64, BandLayout.spattention(4))
    kernel = KernelSpec.of("cpu", problem, {"stage": 0})
    save_records([ScheduleRecord(problem, "cpu-x86-64-v4-amd-25-17", kernel, 1.0)], root)
"""


def test_saves_at_once_lose_nothing(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", SAVE, str(tmp_path), str(1 + 12 * index), "12"])
        for index in range(3)
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert [item.problem.length for item in load_records(HERE.folder, tmp_path)] == list(range(1, 37))
    assert len(list((tmp_path / HERE.folder).iterdir())) == 1


def test_a_linked_file_is_written_through_its_link(tmp_path: Path) -> None:
    (path,) = save_records([record()], tmp_path)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    save_records([record(latency_us=50.0)], tmp_path)
    assert path.is_symlink() and load_records(HERE.folder, tmp_path) == [record(latency_us=50.0)]


def test_a_problem_that_no_family_serves_says_why(tmp_path: Path) -> None:
    with pytest.raises(NoKernelError, match="20"):
        find_schedule(problem(head_dim=20), HERE, root=tmp_path)
    with pytest.raises(NoKernelError, match="nothing_such has no forward"):
        find_schedule(BASE, HERE, families=["nothing_such"], root=tmp_path)


def test_the_folder_of_schedules_is_the_one_set_or_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPATTN_SCHEDULES", str(tmp_path))
    assert store.schedules_root() == tmp_path
    save_records([record()])
    assert find_schedule(BASE, HERE).status == "tuned"
    monkeypatch.delenv("SPATTN_SCHEDULES")
    assert store.schedules_root().name == "schedules"


def test_every_shipped_record_is_readable_and_offered_by_its_space() -> None:
    root = store.schedules_root()
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        for item in load_records(folder.name, root):
            from spattn_tvm.target import parse_target

            target = parse_target(item.target)
            reason = item.kernel.rejection(target)
            assert reason is None, f"{folder.name}: {item.problem.key}: {reason}"
            families = [item.kernel.family]
            assert find_schedule(item.problem, target, families=families, root=root).status == "tuned"


def test_records_are_json_that_people_can_read(tmp_path: Path) -> None:
    (path,) = save_records([record()], tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["format"] == store.FORMAT
    (item,) = data["records"]
    assert item["problem"]["length"] == 4096
    assert list(item["decisions"]) == sorted(item["decisions"])
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_the_reason_says_how_the_other_families_did(tmp_path: Path) -> None:
    """Also where the records are another model's of the same instruction set."""
    h200, h100 = parse_target("nvidia/h200"), parse_target("nvidia/h100")
    wanted = problem(dtype="bfloat16", head_dim=128)
    records = [
        ScheduleRecord(wanted, h200.folder, KernelSpec.untuned(family, wanted, h200), latency_us)
        for family, latency_us in (("hopper", 134.0), ("mma", 209.0))
    ]
    save_records(records[:1], tmp_path)
    assert "mma has no record of it" in find_schedule(wanted, h200, root=tmp_path).reason
    save_records(records[1:], tmp_path)
    for target, status, where in ((h200, "tuned", "us; "), (h100, "nearest", "sm_90a; there ")):
        choice = find_schedule(wanted, target, root=tmp_path)
        assert (choice.kernel.family, choice.status) == ("hopper", status)
        assert f"{where}hopper 134.0 us, mma 209.0 us" in choice.reason
    assert find_schedule(wanted, h200, families=["mma"], root=tmp_path).kernel.family == "mma"


def test_deterministic_results_can_be_asked_for(tmp_path: Path) -> None:
    h200 = parse_target("nvidia/h200")
    space = find_space("mma", "backward")
    wanted = problem(direction="backward", dtype="bfloat16", head_dim=128)
    fast, steady = (space.untuned(128, "bfloat16", h200, deterministic=asked) for asked in (False, True))
    assert (fast["one_pass"], steady["one_pass"]) == (1, 0)
    records = [
        ScheduleRecord(wanted, h200.folder, KernelSpec.of("mma", wanted, decisions), latency_us)
        for decisions, latency_us in ((fast, 740.0), (steady, 750.0))
    ]
    save_records(records, tmp_path)
    for asked, decisions in ((False, fast), (True, steady)):
        choice = find_schedule(wanted, h200, families=["mma"], deterministic=asked, root=tmp_path)
        assert (choice.status, choice.kernel.decisions) == ("tuned", decisions)
    save_records([dataclasses.replace(records[0], latency_us=700.0)], tmp_path)
    assert sorted(record.latency_us for record in load_records(h200.folder, tmp_path)) == [700.0, 750.0]


@pytest.mark.parametrize(
    ("family", "deterministic", "placeholders"),
    [
        ("hopper", False, {"dkv_queries": 64, "dkv_buffers": 1, "dq_keys": 64, "dq_stages": 4}),
        ("mma", False, {"dq_warps": 4, "dq_rows": 32, "dq_blocks": 2}),
        ("mma", True, {"atomic_floats": 4}),
    ],
)
def test_records_of_earlier_versions_lose_what_says_nothing_under_their_structure(
    family: str, deterministic: bool, placeholders: dict[str, int], tmp_path: Path
) -> None:
    h200 = parse_target("nvidia/h200")
    wanted = problem(direction="backward", dtype="bfloat16", head_dim=128)
    kernel = KernelSpec.untuned(family, wanted, h200, deterministic)
    if family == "hopper":
        one_pass = {**kernel.decisions, "one_pass": 1, "dkv_stages": 3}
        kernel = KernelSpec.recorded(family, wanted, one_pass)
        assert set(one_pass) - set(kernel.decisions) >= set(placeholders)
    assert kernel.rejection(h200) is None
    (path,) = save_records([ScheduleRecord(wanted, h200.folder, kernel, 5.0)], tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["format"] = 2
    data["records"][0]["decisions"] |= placeholders
    path.write_text(json.dumps(data), encoding="utf-8")
    store.clear_cache()
    choice = find_schedule(wanted, h200, families=[family], deterministic=deterministic, root=tmp_path)
    assert (choice.status, choice.kernel) == ("tuned", kernel)
    # What no structure has is still refused.
    data["records"][0]["decisions"]["dq_wheels"] = 4
    path.write_text(json.dumps(data), encoding="utf-8")
    store.clear_cache()
    choice = find_schedule(wanted, h200, families=[family], deterministic=deterministic, root=tmp_path)
    assert choice.status == "untuned" and "unknown ['dq_wheels']" in choice.reason


def gpu_record(family: str, latency_us: float, **changes: Any) -> ScheduleRecord:
    wanted = problem(dtype="bfloat16", head_dim=128, **changes)
    h200 = parse_target("nvidia/h200")
    return ScheduleRecord(wanted, h200.folder, KernelSpec.untuned(family, wanted, h200), latency_us)


def test_a_record_of_narrow_bands_does_not_speak_for_wide_ones_whose_default_is_another(
    tmp_path: Path,
) -> None:
    """On its own chip and on a kin one; also where another family was measured beside."""
    h200, h100 = parse_target("nvidia/h200"), parse_target("nvidia/h100")

    def at(length: int, heads: int = 16) -> AttentionProblem:
        return problem(
            direction="backward", dtype="bfloat16", head_dim=128, length=length, query_heads=heads,
            kv_heads=heads, layout=BandLayout.spattention(heads),
        )  # fmt: skip

    measured = [
        ScheduleRecord(at(length), h200.folder, KernelSpec.untuned(family, at(length), h200), latency_us)
        for length, family, latency_us in (
            (4096, "hopper", 400.0),
            (4096, "mma", 300.0),
            (65536, "hopper", 13000.0),
            (65536, "mma", 20000.0),
        )
    ]
    save_records(measured[:2], tmp_path)
    for target, status in ((h200, "tuned"), (h100, "nearest")):
        assert find_schedule(at(4096), target, root=tmp_path).status == status
        assert find_schedule(at(2048), target, root=tmp_path).record == measured[1]
        choice = find_schedule(at(65536), target, root=tmp_path)
        assert (choice.status, choice.kernel) == (
            "untuned",
            KernelSpec.untuned("hopper", at(65536), h100),
        )
        assert "the default for 5769 keys a query; the nearest record" in choice.reason
        assert "has 361 keys a query, for which the default is another" in choice.reason
        # A family whose default is the same for all bands is served by what was measured.
        assert find_schedule(at(65536), target, root=tmp_path, families=["mma"]).record == measured[1]
    save_records(measured[2:], tmp_path)
    for target in (h200, h100):
        assert find_schedule(at(131072), target, root=tmp_path).record == measured[2]
        assert find_schedule(at(32768), target, root=tmp_path).record == measured[2]
        assert find_schedule(at(1024), target, root=tmp_path).record == measured[1]
    # A chip's own record of other bands comes behind its kin's of the very same.
    own = dataclasses.replace(measured[0], target=h100.folder)
    save_records([own], tmp_path)
    assert find_schedule(at(65536), h100, root=tmp_path).record == measured[2]
    assert find_schedule(at(2048), h100, root=tmp_path, families=["hopper"]).record == own


@pytest.mark.parametrize(("length", "nearest"), [(32768, 65536), (24000, 16384), (36000, 65536)])
@pytest.mark.parametrize("beside", [False, True])
def test_halfway_between_two_records_the_one_with_the_problems_default_serves(
    length: int, nearest: int, beside: bool, tmp_path: Path
) -> None:
    """At head dim 64 one pass is the default from 2,048 keys a query: at 32,768 tokens, and not at 16,384."""
    h100 = parse_target("nvidia/h100")

    def at(length: int) -> AttentionProblem:
        layout = BandLayout.spattention(16)
        return problem(
            direction="backward", dtype="bfloat16", head_dim=64, length=length, query_heads=16, kv_heads=16,
            layout=layout,
        )  # fmt: skip

    records = [
        ScheduleRecord(
            at(known), h100.folder, KernelSpec.untuned(family, at(known), h100), latency_us * slower
        )
        for known, latency_us in ((16384, 660.0), (65536, 8400.0))
        for family, slower in (("hopper", 1.0), ("mma", 1.5))[: 1 + beside]
    ]
    save_records(records, tmp_path)
    choice = find_schedule(at(length), h100, root=tmp_path)
    assert (choice.status, choice.kernel.family) == ("nearest", "hopper")
    assert choice.record is not None and choice.record.problem.length == nearest
    assert choice.kernel.decisions["one_pass"] == (nearest == 65536)


def test_a_family_serves_by_its_record_only_where_the_preferred_ones_were_measured_beside_it(
    tmp_path: Path,
) -> None:
    h200, h100 = parse_target("nvidia/h200"), parse_target("nvidia/h100")
    wanted = problem(dtype="bfloat16", head_dim=128)
    default = KernelSpec.untuned("hopper", wanted, h200)

    def chosen(*records: ScheduleRecord, target: MachineTarget = h200, families: Any = None) -> Choice:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        save_records(records, root)
        return find_schedule(wanted, target, root=root, families=families)

    alone = gpu_record("mma", 209.0)
    # A time is told where it is of this problem on this chip.
    for target, record, whose in (
        (h200, alone, "209.0 us were"),
        (h100, alone, f"nearest record, on {h200.folder}, another chip with sm_90a, was"),
        (h200, gpu_record("mma", 209.0, length=2048), "nearest record, at batch 1, .* length 2048, was"),
    ):
        choice = chosen(record, target=target)
        assert (choice.status, choice.kernel) == ("untuned", default)
        assert re.search(f"^hopper is preferred to mma, whose {whose} measured without it; ", choice.reason)
        assert f"no record of hopper for forward d128 on {target.folder}" in choice.reason
        assert ("209" in choice.reason) == (whose == "209.0 us were")
    assert chosen(alone, families=["mma"]).status == "tuned"

    elsewhere = gpu_record("hopper", 70.0, length=6000)
    choice = chosen(alone, elsewhere)
    assert (choice.kernel.family, choice.status, choice.record) == ("hopper", "nearest", elsewhere)

    for latency_us, family in ((134.0, "hopper"), (300.0, "mma")):
        choice = chosen(alone, gpu_record("hopper", latency_us))
        assert (choice.kernel.family, choice.status) == (family, "tuned"), (
            "both were measured: the faster serves"
        )
    # The preferred family needs nobody beside it.
    assert chosen(gpu_record("hopper", 134.0)).status == "tuned"
    # The same where the records are of another problem.
    near, beside = gpu_record("mma", 400.0, length=8192), gpu_record("hopper", 500.0, length=8192)
    assert chosen(near).kernel.family == "hopper"
    assert chosen(near, beside).record == near
