"""Schedule records: files on disk, and which record a lookup takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from spattn_tvm import store
from spattn_tvm.bands import BandLayout
from spattn_tvm.choice import NoKernelError, find_schedule
from spattn_tvm.families import find_space
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.store import ScheduleRecord, load_records, save_records
from spattn_tvm.target import MachineTarget, parse_target

HERE = MachineTarget("cpu", "x86-64-v4", "amd-25-17")
SIBLING = MachineTarget("cpu", "x86-64-v4", "intel-6-143")
OLDER = MachineTarget("cpu", "x86-64-v3", "amd-23-49")

BASE = AttentionProblem("forward", "float32", 1, 16, 16, 4096, 64, BandLayout.spattention(16))


def problem(**changes: object) -> AttentionProblem:
    return dataclasses.replace(BASE, **changes)


def legal_decisions(wanted: AttentionProblem, target: MachineTarget = HERE, **changes: int) -> dict[str, int]:
    space = find_space("cpu", wanted.direction)
    decisions = {**space.untuned(wanted.head_dim, wanted.dtype, target), **changes}
    assert space.rejection(decisions, wanted.head_dim, wanted.dtype, target) is None
    return decisions


def record(
    wanted: AttentionProblem = BASE, target: MachineTarget = HERE, latency_us: float = 100.0, **decisions: int
) -> ScheduleRecord:
    return ScheduleRecord(
        wanted,
        target.folder,
        "cpu",
        legal_decisions(wanted, target, **decisions),
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
    assert (choice.status, choice.decisions, choice.record) == ("tuned", wanted.decisions, wanted)
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
        ({"layout": BandLayout.causal(16)}, {"layout": BandLayout.causal(16), "length": 2048}),
        ({"kv_heads": 8}, {"kv_heads": 2}),
    ],
)
def test_the_nearest_record_of_the_chip_is_taken(tmp_path: Path, near: dict, far: dict) -> None:
    close, distant = record(problem(**near), head_major=0), record(problem(**far), latency_us=1.0)
    save_records([distant, close], tmp_path)
    choice = find_schedule(BASE, HERE, root=tmp_path)
    assert (choice.status, choice.record) == ("nearest", close)
    assert "nearest record" in choice.reason


def test_records_of_this_chip_come_before_those_of_its_instruction_set_and_other_sets_do_not_count(
    tmp_path: Path,
) -> None:
    older = record(target=OLDER)
    sibling = record(target=SIBLING)
    mine = record(problem(length=64))
    save_records([older], tmp_path)
    assert find_schedule(BASE, HERE, root=tmp_path).status == "untuned"
    save_records([sibling], tmp_path)
    choice = find_schedule(BASE, HERE, root=tmp_path)
    assert (choice.status, choice.record) == ("nearest", sibling)
    assert SIBLING.folder in choice.reason
    save_records([mine], tmp_path)
    assert find_schedule(BASE, HERE, root=tmp_path).record == mine


def test_the_default_is_taken_without_a_record_of_this_direction_and_head_dim(tmp_path: Path) -> None:
    save_records([record(problem(direction="backward")), record(problem(head_dim=128))], tmp_path)
    choice = find_schedule(BASE, HERE, root=tmp_path)
    assert choice.status == "untuned"
    assert choice.decisions == find_space("cpu", "forward").untuned(64, "float32", HERE)
    assert "no record" in choice.reason


@pytest.mark.parametrize("decisions", [{"query_rows": 7}, {"no_such_knob": 1}, None])
def test_decisions_that_the_space_no_longer_offers_are_passed_over_visibly(
    tmp_path: Path, decisions: dict[str, int] | None
) -> None:
    stale = {} if decisions is None else {**record().decisions, **decisions}
    save_records([dataclasses.replace(record(), decisions=stale)], tmp_path)
    choice = find_schedule(BASE, HERE, root=tmp_path)
    assert choice.status == "untuned"
    assert "ignored" in choice.reason
    assert BASE.key in choice.reason


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "{}",
        lambda text: text.replace('"latency_us": 100.0', '"latency_us": -1'),
        lambda text: text.replace('"latency_us": 100.0', '"latency_us": NaN'),
        lambda text: text.replace('"family": "cpu"', '"family": "abacus"'),
        lambda text: text.replace('"family"', '"familia"'),
        lambda text: text.replace('"length": 4096', '"length": "many"'),
        lambda text: text.replace('"query_rows": ', '"query_rows": 0.'),
        lambda text: text.replace(HERE.folder, SIBLING.folder),
        lambda text: text.replace('"date": "2026-11-24"', '"date": 5'),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage) -> None:
    (path,) = save_records([record()], tmp_path)
    text = path.read_text(encoding="utf-8")
    assert damage(text) != text
    path.write_text(damage(text), encoding="utf-8")
    with pytest.raises(ValueError, match=r"forward-float32-d64\.json"):
        find_schedule(BASE, HERE, root=tmp_path)


def test_saving_over_a_damaged_file_loses_nothing(tmp_path: Path) -> None:
    (path,) = save_records([record()], tmp_path)
    path.write_text("[", encoding="utf-8")
    with pytest.raises(ValueError, match="no schedule file"):
        save_records([record()], tmp_path)
    assert path.read_text(encoding="utf-8") == "["


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

            space = find_space(item.family, item.problem.direction)
            target = parse_target(item.target)
            reason = space.rejection(item.decisions, item.problem.head_dim, item.problem.dtype, target)
            assert reason is None, f"{folder.name}: {item.problem.key}: {reason}"
            assert find_schedule(item.problem, target, root=root).status == "tuned"


def test_records_are_json_that_people_can_read(tmp_path: Path) -> None:
    (path,) = save_records([record()], tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data[0]["problem"]["length"] == 4096
    assert list(data[0]["decisions"]) == sorted(data[0]["decisions"])
    assert path.read_text(encoding="utf-8").endswith("]\n")


def test_the_reason_says_how_the_other_families_did(tmp_path: Path) -> None:
    """Also where the records are another model's of the same instruction set."""
    h200, h100 = parse_target("nvidia/h200"), parse_target("nvidia/h100")
    wanted = problem(dtype="bfloat16", head_dim=128)
    records = [
        ScheduleRecord(wanted, h200.folder, family, space.untuned(128, "bfloat16", h200), latency_us)
        for family, latency_us in (("hopper", 134.0), ("mma", 209.0))
        for space in [find_space(family, "forward")]
    ]
    save_records(records[:1], tmp_path)
    assert "mma has no record of it" in find_schedule(wanted, h200, root=tmp_path).reason
    save_records(records[1:], tmp_path)
    for target, status in ((h200, "tuned"), (h100, "nearest")):
        choice = find_schedule(wanted, target, root=tmp_path)
        assert (choice.family, choice.status) == ("hopper", status)
        assert "hopper 134.0 us, mma 209.0 us" in choice.reason
    assert find_schedule(wanted, h200, families=["mma"], root=tmp_path).family == "mma"


def test_deterministic_results_can_be_asked_for(tmp_path: Path) -> None:
    h200 = parse_target("nvidia/h200")
    space = find_space("mma", "backward")
    wanted = problem(direction="backward", dtype="bfloat16", head_dim=128)
    fast, steady = (space.untuned(128, "bfloat16", h200, deterministic=asked) for asked in (False, True))
    assert (fast["one_pass"], steady["one_pass"]) == (1, 0)
    records = [
        ScheduleRecord(wanted, h200.folder, "mma", decisions, latency_us)
        for decisions, latency_us in ((fast, 740.0), (steady, 750.0))
    ]
    save_records(records, tmp_path)
    for asked, decisions in ((False, fast), (True, steady)):
        choice = find_schedule(wanted, h200, families=["mma"], deterministic=asked, root=tmp_path)
        assert (choice.status, choice.decisions) == ("tuned", decisions)
    save_records([dataclasses.replace(records[0], latency_us=700.0)], tmp_path)
    assert sorted(record.latency_us for record in load_records(h200.folder, tmp_path)) == [700.0, 750.0]
