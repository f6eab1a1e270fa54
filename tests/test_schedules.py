"""Every shipped schedule: legal decisions, evidence in its log, a kernel that computes the right thing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.choice import find_schedule
from spattn_tvm.dispatch import Kernel
from spattn_tvm.runtime import load_library
from spattn_tvm.store import ScheduleRecord, load_records
from spattn_tvm.target import detect_cpu, detect_cuda, parse_target
from spattn_tvm.tuning.log import read_measurements
from spattn_tvm.verify import check_randomly

ROOT = Path(__file__).resolve().parent.parent
RECORDS = [
    record
    for folder in sorted(path.name for path in (ROOT / "schedules").iterdir() if path.is_dir())
    for record in load_records(folder, ROOT / "schedules")
]


def test_schedules_are_shipped() -> None:
    assert RECORDS


@pytest.mark.parametrize(
    "record", RECORDS, ids=lambda record: f"{record.target}-{record.kernel.family}-{record.problem.key}"
)
def test_a_shipped_schedule_is_legal_and_has_its_evidence(record: ScheduleRecord) -> None:
    problem, target, kernel = record.problem, parse_target(record.target), record.kernel
    assert kernel.rejection(target) is None
    choice = find_schedule(
        problem,
        target,
        families=[kernel.family],
        deterministic=kernel.is_deterministic,
        root=ROOT / "schedules",
    )
    assert (choice.status, choice.kernel) == ("tuned", kernel)
    measured = read_measurements(ROOT / "autotune_logs" / record.source_log)
    assert any(item.kernel == kernel and item.error is None for item in measured)


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(
            record,
            marks=[pytest.mark.gpu] if parse_target(record.target).kind == "cuda" else [],
            id=f"{record.target}-{record.kernel.family}-{record.problem.key}",
        )
        for record in RECORDS
    ],
)
def test_a_shipped_schedule_computes_the_right_thing(record: ScheduleRecord) -> None:
    problem, kind = record.problem, parse_target(record.target).kind
    target = detect_cpu() if kind == "cpu" else detect_cuda(0)
    reason = record.kernel.rejection(target)
    if reason is not None:
        pytest.skip(f"tuned for {record.target}: {reason}")
    path = compile_kernel(record.kernel, target)
    function = load_library(path, problem.direction, cuda=kind == "cuda")
    kernel = Kernel(function, record.kernel, path=path)
    rng = random.Random()
    for _ in range(10):
        drawn, wrong = check_randomly(kernel, rng, 520, torch.device(kind))
        assert wrong == "", str(drawn)
