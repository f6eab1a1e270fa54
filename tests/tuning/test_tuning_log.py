"""The log of a search: one writer at a time, and nothing damaged in it stops a search or a distillation."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spattn_tvm.bands import BandLayout
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.file_lock import LockedError
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import detect_cpu
from spattn_tvm.tuning.log import (
    MEASUREMENTS,
    RUN,
    LogWarning,
    Measurement,
    TuningLog,
    comparable_measurements,
    curve,
    read_measurements,
    read_run,
    readable_logs,
)

PROBLEM = AttentionProblem("forward", "float32", 2, 4, 2, 128, 32, BandLayout.spattention(4, 128))
FACTS = {"kernel": "code", "workload_hash": "0"}


def measurement(rows: int, latency_us: float | None = None) -> Measurement:
    kernel = KernelSpec.of("cpu", PROBLEM, {"rows": rows})
    error = None if latency_us is not None else "wrong"
    return Measurement(kernel, "code", latency_us, error, float(rows))


def open_log(folder: Path) -> TuningLog:
    return TuningLog(folder, PROBLEM, detect_cpu(), "random")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The log of a finished session of eight trials, the third of which failed."""
    with open_log(tmp_path / "log") as log:
        log.begin_session({"seed": 0})
        log.note_family("cpu", FACTS)
        for rows in range(1, 9):
            log.append(measurement(rows, None if rows == 3 else 100.0 - rows))
        log.end_session("budget", 8.0)
    return tmp_path / "log"


WRITER = """
import sys
from pathlib import Path
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import detect_cpu
from spattn_tvm.tuning.log import TuningLog
problem = AttentionProblem.from_json(sys.argv[1])
log = TuningLog(Path(sys.argv[2]), problem, detect_cpu(), "random")
print("open", flush=True)
sys.stdin.read()
"""


def test_one_process_writes_at_a_time_and_a_killed_one_leaves_the_log_free(folder: Path) -> None:
    before = (folder / MEASUREMENTS).read_bytes()
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, json.dumps(PROBLEM.to_json()), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"open\n"
    with pytest.raises(LockedError, match=rf"another search's.*process {writer.pid} on .*another log root"):
        open_log(folder)
    assert (folder / MEASUREMENTS).read_bytes() == before
    assert len(read_measurements(folder)) == 8, "reading needs no lock"
    writer.kill()
    writer.wait()
    with open_log(folder) as log:
        assert len(log.measurements) == 8


def test_the_last_line_of_a_kernel_counts(folder: Path) -> None:
    with open_log(folder) as log:
        log.append(measurement(2, 7.0))
    measured = read_measurements(folder)
    assert [m.kernel.decisions["rows"] for m in measured] == list(range(1, 9))
    assert measured[1].latency_us == 7.0
    assert curve(folder) == (list(range(1, 9)), [99.0, *[7.0] * 7])


def test_a_default_timed_anew_scales_its_family_alone(folder: Path) -> None:
    with open_log(folder) as log:
        foreign = KernelSpec.of("mma", PROBLEM, {"rows": 1})
        log.append(Measurement(foreign, "code", 50.0, None, 9.0))
        log.begin_session({"seed": 1})
        log.rescale(measurement(1).kernel, "code", 9.9)
        in_memory = list(log.measurements)
    measured = read_measurements(folder)
    assert measured == in_memory
    expected = [None if rows == 3 else (100.0 - rows) / 10 for rows in range(1, 9)] + [50.0]
    assert [m.latency_us for m in measured] == pytest.approx(expected)
    assert read_run(folder)["sessions"][1]["retaken"][0]["to_us"] == 9.9


LINE_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda line: line[: len(line) // 2],
    "two in one": lambda line: line + line,
    "half over half": lambda line: line[: len(line) // 3] + line,
    "no object": lambda line: b"[1, 2]",
    "a number": lambda line: b"17",
    "zeros": lambda line: bytes(len(line)),
    "no UTF-8": lambda line: b"\xff\xfe" + line,
    "nested": lambda line: b"[" * 100_000,
    "field missing": lambda line: line.replace(b'"elapsed_s"', b'"elapsed"'),
    "field unknown": lambda line: line.replace(b'{"family"', b'{"x": 1, "family"'),
    "family": lambda line: line.replace(b'"cpu"', b'"cpx"'),
    "family of no kind": lambda line: line.replace(b'"cpu"', b"7"),
    "latency NaN": lambda line: line.replace(b'"latency_us":98.0', b'"latency_us":NaN'),
    "latency 0": lambda line: line.replace(b'"latency_us":98.0', b'"latency_us":0'),
    "latency below 0": lambda line: line.replace(b'"latency_us":98.0', b'"latency_us":-98.0'),
    "latency infinite": lambda line: line.replace(b'"latency_us":98.0', b'"latency_us":1e999'),
    "latency huge": lambda line: line.replace(b'"latency_us":98.0', b'"latency_us":1' + b"0" * 5000),
    "latency text": lambda line: line.replace(b'"latency_us":98.0', b'"latency_us":"98.0"'),
    "no result": lambda line: line.replace(b'"latency_us":98.0', b'"latency_us":null'),
    "two results": lambda line: line.replace(b'"error":null', b'"error":"wrong"'),
    "error of no kind": lambda line: line.replace(b'"error":null', b'"error":[]'),
    "decisions of no kind": lambda line: line.replace(b'{"rows":2}', b"[2]"),
    "a fraction": lambda line: line.replace(b'{"rows":2}', b'{"rows":2.5}'),
    "elapsed text": lambda line: line.replace(b'"elapsed_s":2.0', b'"elapsed_s":"2.0"'),
    "slowdown 0": lambda line: line.replace(b'"slowdown":1.0', b'"slowdown":0'),
    **{
        f"resources of no kind: {text.decode()}": lambda line, text=text: line.replace(
            b'"slowdown"', b'"resources":' + text + b',"slowdown"'
        )
        for text in (
            b"3",
            b'{"kernels":3}',
            b'{"kernels":{"a":[1]}}',
            b'{"kernels":{"a":{"registers":"many"}}}',
            b'{"warnings":"slow"}',
            b'{"warnings":[1]}',
        )
    },
}


@pytest.mark.parametrize("name", LINE_DAMAGES)
def test_a_damaged_line_is_named_and_set_aside(name: str, folder: Path) -> None:
    path = folder / MEASUREMENTS
    lines = path.read_bytes().splitlines()
    damaged = LINE_DAMAGES[name](lines[1])
    assert damaged != lines[1]
    path.write_bytes(b"\n".join([lines[0], damaged, *lines[2:]]) + b"\n")
    with pytest.warns(LogWarning, match=r"measurements\.jsonl, line 2 is left out"):
        assert [m.kernel.decisions["rows"] for m in comparable_measurements(folder)] == [1, *range(3, 9)]
    with pytest.warns(LogWarning, match=r"line 2 is set aside in measurements\.jsonl\.damaged"):
        log = open_log(folder)
    with log:
        assert len(log.measurements) == 7
        log.begin_session({"seed": 0})
        log.append(measurement(9, 1.0))
    assert (folder / f"{MEASUREMENTS}.damaged").read_bytes() == damaged + b"\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_measurements(folder)) == 8


def test_lines_of_a_family_that_is_not_registered_here_stay(folder: Path) -> None:
    path = folder / MEASUREMENTS
    foreign = path.read_bytes().splitlines()[1].replace(b'"cpu"', b'"elsewhere"')
    with path.open("ab") as file:
        file.write(foreign + b"\n")
    run = read_run(folder)
    run["families"]["elsewhere"] = FACTS
    (folder / RUN).write_text(json.dumps(run))
    with path.open("ab") as file:
        file.write(b"damaged\n")
    with pytest.warns(LogWarning, match="line 10"), open_log(folder) as log:
        assert len(log.measurements) == 8
        log.begin_session({"seed": 0})
        log.rescale(measurement(1).kernel, "code", 9.9)
    assert foreign in path.read_bytes().splitlines()


def test_decisions_that_the_space_never_had_are_set_aside(folder: Path) -> None:
    with pytest.warns(LogWarning, match=r"line 8 is set aside.*the space has no"), open_log(folder) as log:
        log.drop_what_is_not_offered("code", "cpu", lambda decisions: decisions["rows"] < 8)
        assert len(log.measurements) == 7
    assert len(read_measurements(folder)) == 7


RUN_DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text(path.read_text()[:100]),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[]"),
    "no UTF-8": lambda path: path.write_bytes(b"\xff" * 30),
    "problem": lambda path: change(path, problem={"direction": "sideways"}),
    "problem of no kind": lambda path: change(path, problem=7),
    "target of no kind": lambda path: change(path, target=None),
    "families of no kind": lambda path: change(path, families=["cpu"]),
    "a family of no kind": lambda path: change(path, families={"cpu": "code"}),
    "a family without code": lambda path: change(path, families={"cpu": {}}),
    "sessions of no kind": lambda path: change(path, sessions={}),
    "a session of no kind": lambda path: change(path, sessions=[3]),
    "a session's time": lambda path: change(path, sessions=[{"elapsed_s": "long"}]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", RUN_DAMAGES)
def test_damaged_metadata_are_set_aside_and_the_search_goes_on(name: str, folder: Path) -> None:
    RUN_DAMAGES[name](folder / RUN)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        read_run(folder)
    with pytest.warns(LogWarning, match=r"run\.json is damaged.*measurements are left out"):
        assert readable_logs(folder.parent) == []
    with pytest.warns(LogWarning, match=r"run\.json\.damaged"):
        log = open_log(folder)
    with log:
        assert len(log.measurements) == 8 and log.elapsed_s == 8.0
        log.begin_session({"seed": 0})
        log.note_family("cpu", FACTS)
    assert len(comparable_measurements(folder)) == 8
    assert [found for found, _ in readable_logs(folder.parent)] == [folder]


def test_measurements_without_metadata_are_said_to_be_left_out(folder: Path) -> None:
    (folder / RUN).unlink()
    with pytest.warns(LogWarning, match="it holds no run"):
        assert readable_logs(folder.parent) == []
    with open_log(folder) as log:
        assert len(log.measurements) == 8


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "loop"])
def test_something_else_in_the_place_of_the_measurements(kind: str, folder: Path) -> None:
    path = folder / MEASUREMENTS
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "dangling link" else path.name)
    with pytest.warns(LogWarning, match="left out"):
        assert read_measurements(folder) == []
    with pytest.warns(LogWarning, match=r"measurements\.jsonl\.damaged"), open_log(folder) as log:
        log.append(measurement(1, 1.0))
    assert len(read_measurements(folder)) == 1


def test_no_mutation_of_a_log_stops_reading_or_resuming_it(seed: int, folder: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    contents = {name: (folder / name).read_bytes() for name in (MEASUREMENTS, RUN)}
    for count in range(200):
        copy = tmp_path / str(count)
        copy.mkdir()
        for name, content in contents.items():
            data = bytearray(content)
            for _ in range(rng.choice((0, 1, 1, 3))):
                place = rng.randrange(len(data))
                if rng.random() < 0.5:
                    data[place] = rng.randrange(256)
                elif rng.random() < 0.5:
                    del data[place : place + rng.randrange(1, 60)]
                else:
                    data[place:place] = data[place : place + rng.randrange(1, 60)]
            (copy / name).write_bytes(data)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            readable_logs(copy)
            try:
                log = open_log(copy)
            except ValueError as error:
                assert "choose another log root" in str(error)  # the damage named another problem
                continue
            with log:
                log.begin_session({"seed": 0})
                log.note_family("cpu", FACTS)
                log.append(measurement(99, 1.0))
        assert all(issubclass(warning.category, LogWarning) for warning in said)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert comparable_measurements(copy)[-1] == measurement(99, 1.0)
