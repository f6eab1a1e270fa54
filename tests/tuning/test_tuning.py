"""The search: it measures, checks, records, resumes, survives kills, and finds what is there to be found.

Searches that must go wrong take their kernels from :mod:`toy_family`, where the broken ones are known
beforehand.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy_family

pytest.importorskip("tvm")
pytest.importorskip("xgboost")


from spattn_tvm.bands import BandLayout
from spattn_tvm.build.resources import describe_resources
from spattn_tvm.choice import find_schedule
from spattn_tvm.families import find_space, resolve_family
from spattn_tvm.families import kernel as kernel_module
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.families.space import Space, cases_by_width, one_structure
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import attention_mask, reference_attention
from spattn_tvm.store import ScheduleRecord, load_records, save_records
from spattn_tvm.target import MachineTarget, detect_cpu, detect_cuda, parse_target
from spattn_tvm.tuning import SearchSettings, compare_strategies, curve, distill, tune
from spattn_tvm.tuning import measure as measure_module
from spattn_tvm.tuning import workers as workers_module
from spattn_tvm.tuning.log import (
    MEASUREMENTS,
    RUN,
    LogWarning,
    Measurement,
    TuningLog,
    log_folder,
    read_measurements,
    read_run,
)
from spattn_tvm.tuning.measure import Outcome, ProcessMeter
from spattn_tvm.tuning.search import RETAKEN, Budget, _Progress, _Session, run_search
from spattn_tvm.tuning.strategy import DecisionSearch, best_in_database, forget_database, kernel_hash
from spattn_tvm.tuning.trial import TrialData
from spattn_tvm.tuning.warm_start import warm_starts
from spattn_tvm.tuning.worker import _Measurer
from spattn_tvm.tuning.workers import Workers
from spattn_tvm.tuning.workload import build_workload

# The package's attribute of this name is the function.
distill_module = sys.modules["spattn_tvm.tuning.distill"]
search_module = sys.modules["spattn_tvm.tuning.search"]
strategy_module = sys.modules["spattn_tvm.tuning.strategy"]

PROBLEM = AttentionProblem("forward", "float32", 2, 4, 2, 128, 32, BandLayout.spattention(4, 128))
FAMILY = "cpu"
TOY = toy_family.TOY.reference
RECORDS = "database_tuning_record.json"


def _keys(measurements: Sequence[Measurement]) -> list[tuple[Any, ...]]:
    return [tuple(m.kernel.decisions.items()) for m in measurements]


@pytest.fixture(scope="module", autouse=True)
def _one_builder() -> Iterator[None]:
    """Each process costs seconds of imports, more than these kernels take to build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers_module, "available_cpus", lambda: 1)
        # What is logged stays as it is, however busy this machine was; the test of that has a fake clock.
        patch.setattr(search_module, "_RECOVERED", 0.0)
        yield


# --- a real search ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("logs")
    return root, tune(PROBLEM, detect_cpu(), SearchSettings(trials=7, log_root=root), progress=False)


def test_search_returns_the_fastest_and_logs_everything(searched: tuple[Path, Any]) -> None:
    root, result = searched
    assert result.ended == "budget" and result.trials == 7 and result.errors == 0
    assert result.log_dir == root / detect_cpu().folder / PROBLEM.key
    measured = read_measurements(result.log_dir)
    assert len(measured) == 7 and len(set(_keys(measured))) == 7
    assert measured[0].kernel == KernelSpec.untuned("cpu", PROBLEM, detect_cpu())
    fastest = min(measured, key=lambda m: m.latency_us or math.inf)
    assert result.kernel == fastest.kernel and result.latency_us == fastest.latency_us
    session = read_run(result.log_dir)["sessions"][0]
    assert session["ended"] == "budget" and session["seed"] == 0 and session["trials"] == 7
    assert session["versions"]["apache-tvm"] and session["device"]["threads"]


def test_resume_measures_only_what_is_missing(searched: tuple[Path, Any]) -> None:
    root, first = searched
    before = (first.log_dir / MEASUREMENTS).read_bytes()
    again = tune(PROBLEM, detect_cpu(), SearchSettings(trials=7, log_root=root), progress=False)
    assert (first.log_dir / MEASUREMENTS).read_bytes() == before
    assert again.kernel == first.kernel and again.trials == 7
    more = tune(PROBLEM, detect_cpu(), SearchSettings(trials=9, log_root=root), progress=False)
    assert (first.log_dir / MEASUREMENTS).read_bytes().startswith(before)
    measured = read_measurements(more.log_dir)
    assert len(measured) == more.trials == 9 and len(set(_keys(measured))) == 9
    trials, best_us = curve(more.log_dir)
    assert trials == list(range(1, 10)) and best_us == sorted(best_us, reverse=True)
    assert best_us[-1] == more.latency_us


def test_database_replays_in_another_process(searched: tuple[Path, Any]) -> None:
    _, result = searched
    kernel = read_run(result.log_dir)["families"][FAMILY]["kernel"]
    best = min(
        (m for m in read_measurements(result.log_dir)), key=lambda m: m.latency_us or math.inf
    ).kernel.decisions
    script = (
        "import sys, pathlib, json\n"
        "from spattn_tvm.families import find_space\n"
        "from spattn_tvm.problem import AttentionProblem\n"
        "from spattn_tvm.tuning.strategy import best_in_database\n"
        "folder, problem, kernel = sys.argv[1:]\n"
        "problem = AttentionProblem.from_json(problem)\n"
        "space = find_space('cpu', 'forward')\n"
        "print(json.dumps(best_in_database(pathlib.Path(folder), problem, space, kernel)))"
    )
    arguments = [str(result.log_dir), json.dumps(PROBLEM.to_json()), kernel]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == best


def test_random_control_has_its_own_log(searched: tuple[Path, Any]) -> None:
    root, first = searched
    before = (first.log_dir / MEASUREMENTS).read_bytes()
    control = tune(
        PROBLEM, detect_cpu(), SearchSettings(trials=3, strategy="random", log_root=root), progress=False
    )
    assert control.log_dir == first.log_dir / "random"
    assert control.trials == 3 and len(set(_keys(read_measurements(control.log_dir)))) == 3
    assert read_run(control.log_dir)["strategy"] == "random"
    assert (first.log_dir / MEASUREMENTS).read_bytes() == before
    latencies = compare_strategies(first.log_dir, rounds=3)
    assert list(latencies) == ["untuned", "evolutionary", "random"]
    assert all(latency > 0 for latency in latencies.values())


def test_search_refuses_what_it_can_not_do(tmp_path: Path) -> None:
    target = detect_cpu()
    with pytest.raises(ValueError, match="float32 only"):
        tune(
            replace(PROBLEM, dtype="float16"),
            target,
            SearchSettings(trials=1, families=[TOY], log_root=tmp_path),
        )
    with pytest.raises(ValueError, match="must run on its target"):
        tune(
            PROBLEM,
            MachineTarget("cpu", "aarch64"),
            SearchSettings(trials=1, families=[TOY], log_root=tmp_path),
        )
    with pytest.raises(ValueError, match="either trials or minutes"):
        tune(PROBLEM, target, SearchSettings(trials=1, minutes=1.0, families=[TOY], log_root=tmp_path))
    with pytest.raises(ValueError, match="trials must be positive, got 0"):
        tune(PROBLEM, target, SearchSettings(trials=0, families=[TOY], log_root=tmp_path))
    with pytest.raises(ValueError, match="strategy must be one of"):
        tune(PROBLEM, target, SearchSettings(trials=1, strategy="clever", families=[TOY], log_root=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_comparison_takes_the_data_of_the_search_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another problem, or other random inputs, are prepared anew, and so is what could not be prepared."""
    measurer = _Measurer()
    target = asdict(detect_cpu())

    def prepared(problem: AttentionProblem, seed: int) -> TrialData:
        request = {"problem": problem.to_json(), "target": target, "seed": seed, "cache": None, "fleet": None}
        assert measurer.prepare(request) == {}
        return measurer.data

    first = prepared(PROBLEM, 0)
    assert prepared(PROBLEM, 0) is first
    other = prepared(PROBLEM, 1)
    assert other is not first and not torch.equal(other.q, first.q)
    assert prepared(replace(PROBLEM, batch=1), 1).problem.batch == 1
    with monkeypatch.context() as failing, pytest.raises(ZeroDivisionError):
        failing.setattr(TrialData, "_reference", lambda self: 1 / 0)
        prepared(PROBLEM, 1)
    with pytest.raises(RuntimeError, match="before a 'prepare' request"):
        _ = measurer.data
    assert torch.equal(prepared(PROBLEM, 1).q, other.q)


# --- broken candidates ------------------------------------------------------------------------------------


def test_broken_kernels_are_errors_and_never_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(measure_module.MEASURE_TIMEOUT_S, "cpu", 12.0)
    faults = [toy_family.kernel(toy_family.BROKEN_TOY, repeats=2, fault=fault) for fault in range(5)]
    with ProcessMeter(PROBLEM, detect_cpu()) as meter:
        outcomes = dict(meter.measure(faults, None))
        again = dict(meter.measure(faults[:1], None))
    assert outcomes[0].error is None and (outcomes[0].latency_us or 0) > 0
    assert "o is wrong" in (outcomes[1].error or "") or "lse is wrong" in (outcomes[1].error or "")
    assert "crashed with SIG" in (outcomes[2].error or "")
    assert outcomes[3].error == "no answer within 12 s"
    assert "planted build failure" in (outcomes[4].error or "")
    assert all(outcomes[fault].latency_us is None for fault in (1, 2, 3, 4))
    assert again[0].error is None, "a crash or a hang must not spoil the next measurement"


@pytest.mark.gpu
def test_a_gpu_survives_broken_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every later call in that process fails, and a kernel that hangs never ends."""
    monkeypatch.setitem(measure_module.MEASURE_TIMEOUT_S, "cuda", 15.0)
    faults = [toy_family.kernel(toy_family.BROKEN_CUDA_TOY, repeats=2, fault=fault) for fault in range(5)]
    target = detect_cuda()
    with Workers(target) as workers, ProcessMeter(PROBLEM, target, workers=workers) as meter:
        outcomes = dict(meter.measure(faults, None))
        again = dict(meter.measure(faults[:1], None))
        # The candidate against itself: their ratio is 1, whatever the machine's speed is.
        beside = dict(meter.measure(faults[:1], None, (faults[0], 1000.0)))
    assert beside[0].latency_us == pytest.approx(1000.0, rel=0.2)
    for outcome in (outcomes[0], again[0], beside[0]):
        assert outcome.error is None and 0 < (outcome.latency_us or 0) < 1e5
        assert describe_resources(outcome.resources).endswith("registers, no spills")
    assert "is wrong" in (outcomes[1].error or "")
    assert "CUDA error" in (outcomes[2].error or "")
    assert outcomes[3].error == "no answer within 15 s"
    assert "planted build failure" in (outcomes[4].error or "")


def test_search_stops_at_once_when_not_even_the_default_works(tmp_path: Path) -> None:
    unusable = dict(_FIRST, rows=256)
    for alone in (True, False):
        session, search = _fake_session(tmp_path / str(alone), "evolutionary", 0, Budget(9, None))
        with pytest.raises(RuntimeError, match="untuned default of cpu fails: planted"):
            run_search(search, _FakeMeter(), session, "fake", _fake(unusable), alone)
        assert not session.log.measurements


@pytest.mark.parametrize("alone", [True, False])
def test_the_deterministic_default_is_measured_too(alone: bool, tmp_path: Path) -> None:
    session, search = _fake_session(tmp_path, "random", 1, Budget(12, None))
    also = {**_FIRST, "order": 2}
    run_search(search, _FakeMeter(), session, "fake", _fake(_FIRST), alone, [_fake(also), _fake(_FIRST)])
    assert [m.kernel.decisions for m in session.log.measurements[:2]] == [_FIRST, also]
    assert len(set(_keys(session.log.measurements))) == 12


def test_the_default_may_be_one_of_the_first_batch(tmp_path: Path) -> None:
    session, search = _fake_session(tmp_path, "evolutionary", 1, Budget(20, None))
    meter = _FakeMeter(reverse=True)
    assert run_search(search, meter, session, "fake", _fake(_FIRST), first_alone=False) == "budget"
    assert _FIRST in meter.measured[1:9], "it is not measured together with others"
    assert session.log.measurements[0].kernel.decisions == _FIRST
    assert len(meter.measured) == 20 == len(set(_keys(session.log.measurements)))
    assert sum(m.error == "planted" for m in session.log.measurements) > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_check_accepts_plain_pytorch_and_rejects_a_shifted_band(dtype: str) -> None:
    layout = BandLayout.spattention(4, 512)
    shape = (dtype, 1, 4, 2, 512, 64)
    forward = TrialData(AttentionProblem("forward", *shape, layout), "cpu", seed=3)
    backward = TrialData(AttentionProblem("backward", *shape, layout), "cpu", seed=4)
    shifted = [[(lo, hi + (hi > 300)) for lo, hi in head] for head in layout.bands(512)]
    for data in (forward, backward):
        assert data.wrong(_plain(data, layout)) is None
        assert "wrong" in (data.wrong(_plain(data, BandLayout.custom(shifted))) or "")
        for name, good in data.expected.items():
            if (name in ("o", "lse")) == (data is forward):
                poisoned = {**data.expected, name: good.index_fill(2, torch.tensor([70]), math.nan)}
                assert name in (data.wrong(_only_outputs(data, poisoned)) or "")


def _only_outputs(data: TrialData, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ("o", "lse") if data.problem.direction == "forward" else ("dq", "dk", "dv")
    return {name: tensors[name] for name in names}


def _plain(data: TrialData, layout: BandLayout) -> dict[str, torch.Tensor]:
    """Masked softmax attention in the data's own dtype, with PyTorch's gradients."""
    q, k, v = (t.detach().requires_grad_() for t in (data.q, data.k, data.v))
    group = q.shape[1] // k.shape[1]
    mask = attention_mask(layout, q.shape[2])
    scores = (q.float() @ k.float().repeat_interleave(group, 1).mT) * data.scale
    scores = scores.masked_fill(~mask, -torch.inf)
    o = torch.softmax(scores, -1).to(q.dtype) @ v.repeat_interleave(group, 1)
    lse = torch.logsumexp(scores, -1)
    if data.problem.direction == "forward":
        return {"o": o.detach(), "lse": lse.detach()}
    loss = (o.float() * data.do.float()).sum() + (lse * data.dlse).sum()
    return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, (q, k, v)), strict=True))


@pytest.mark.alone
def test_a_busy_machine_is_taken_out_of_the_latency() -> None:
    data = TrialData(PROBLEM, "cpu", seed=0)

    def sleeper(milliseconds: float) -> Callable[[TrialData], None]:
        return lambda _: time.sleep(milliseconds * 1e-3)

    latency_us, slowdown = data.anchored_latency_us(sleeper(8), sleeper(6), usual_us=2000.0)
    assert 2.5 < slowdown < 4.5, "the anchor takes three times as long as usual"
    assert 1700 < latency_us < 3300
    assert data.latency_us(sleeper(8)) > 8000


def test_trial_data_is_not_degenerate() -> None:
    data = TrialData(replace(PROBLEM, direction="backward"), "cpu", seed=0)
    for tensor in (data.q, data.k, data.v, data.do, data.dlse, *data.expected.values()):
        assert tensor.std() > 0.05
    assert torch.equal(data.bands[0], torch.tensor(PROBLEM.layout.table(PROBLEM.length)))
    exact, _ = reference_attention(data.q.double(), data.k.double(), data.v.double(), PROBLEM.layout)
    torch.testing.assert_close(data.o.double(), exact, rtol=1e-5, atol=1e-5)


# --- kills ------------------------------------------------------------------------------------------------

_SEARCH = """
import sys
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import detect_cpu
from spattn_tvm.tuning import SearchSettings, tune
problem = AttentionProblem.from_json(sys.argv[1])
search = sys.modules["spattn_tvm.tuning.search"]
search._RECOVERED = 0.0  # what is logged stays as it is, however busy this machine was
result = tune(problem, detect_cpu(), SearchSettings(15, families=["toy_family:TOY"], log_root=sys.argv[2]))
print("ended", result.ended, result.trials)
"""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def _start_search(root: Path, least_lines: int) -> tuple[subprocess.Popen[str], Path]:
    """A search in a process of its own, once it has logged some measurements."""
    resolve_family(TOY)  # this process reads the log
    temporary = root / "tmp"
    temporary.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", _SEARCH, json.dumps(PROBLEM.to_json()), str(root)],
        env={**_environment(), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = log_folder(root, detect_cpu(), PROBLEM, "evolutionary")
    deadline = time.monotonic() + 120
    while len(read_measurements(folder)) < least_lines:
        assert process.poll() is None and time.monotonic() < deadline, "the search logs nothing"
        time.sleep(0.02)
    return process, folder


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _assert_nothing_stays(root: Path, workers: Sequence[int]) -> None:
    deadline = time.monotonic() + 20
    while any(_is_running(worker) for worker in workers) or any((root / "tmp").iterdir()):
        assert time.monotonic() < deadline, "workers or files outlive a killed search"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_process_and_no_file(number: signal.Signals, tmp_path: Path) -> None:
    process, _ = _start_search(tmp_path, least_lines=1)
    workers = _children(process.pid)
    assert len(workers) == 3 and len(list((tmp_path / "tmp").iterdir())) == 1
    process.send_signal(number)
    assert process.wait() == -number
    _assert_nothing_stays(tmp_path, workers)


def test_kill_loses_only_the_measurement_in_flight_and_ctrl_c_ends_in_order(tmp_path: Path) -> None:
    process, folder = _start_search(tmp_path, least_lines=2)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = (folder / MEASUREMENTS).read_bytes()
    before = read_measurements(folder)
    assert workers and read_run(folder)["sessions"][-1]["ended"] == "killed"
    # What a kill in the middle of a write leaves.
    for name in (MEASUREMENTS, RECORDS):
        with (folder / name).open("ab") as file:
            file.write(b'{"family":"toy_sp')
    _assert_nothing_stays(tmp_path, workers)

    process, folder = _start_search(tmp_path, least_lines=len(before) + 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    measured = read_measurements(folder)
    assert process.returncode == 0 and f"ended interrupted {len(measured)}" in output, output
    assert (folder / MEASUREMENTS).read_bytes().startswith(kept)
    assert len(before) + 2 <= len(measured) < 15 and len(set(_keys(measured))) == len(measured)
    assert len((folder / RECORDS).read_text().splitlines()) == len(measured)
    assert [session["ended"] for session in read_run(folder)["sessions"]] == ["killed", "interrupted"]
    assert not list((tmp_path / "tmp").iterdir())


# --- the searching itself ---------------------------------------------------------------------------------

_FAKE_CHOICES = {
    "rows": (8, 16, 32, 64, 128, 256),
    "keys": (8, 16, 32, 64, 128, 256),
    "unroll": (0, 1, 2, 4, 8),
    "order": (0, 1, 2),
    "parallel": (0, 1),
    "vector": (4, 8, 16),
}
_OPTIMUM = {"rows": 64, "keys": 32, "unroll": 4, "order": 1, "parallel": 1, "vector": 16}


def _fake_latency_us(decisions: Mapping[str, int]) -> float:
    distance = sum(
        weight * abs(_FAKE_CHOICES[name].index(decisions[name]) - _FAKE_CHOICES[name].index(_OPTIMUM[name]))
        for name, weight in {
            "rows": 0.3,
            "keys": 0.2,
            "unroll": 0.1,
            "order": 0.4,
            "parallel": 0.8,
            "vector": 0.3,
        }.items()
    )
    return 100.0 * (1.0 + distance)


class _FakeMeter:
    """Knows each candidate's latency; a rule says which ones fail. The machine is busy for the first few."""

    builders = 4

    def __init__(self, reverse: bool = False, busy: Sequence[float] = ()) -> None:
        self.measured: list[Mapping[str, int]] = []
        self.reverse, self.busy = reverse, list(busy)

    def measure(
        self,
        batch: Sequence[KernelSpec],
        best_us: float | None,
        anchor: tuple[KernelSpec, float] | None = None,
    ) -> Iterator[tuple[int, Outcome]]:
        for position, kernel in sorted(enumerate(batch), reverse=self.reverse, key=lambda item: item[0]):
            decisions = kernel.decisions
            self.measured.append(decisions)
            factor = self.busy.pop(0) if self.busy else 1.0
            if decisions["rows"] == 256:
                yield position, Outcome(error="planted")
            elif anchor is None:
                yield position, Outcome(latency_us=_fake_latency_us(decisions) * factor)
            else:
                slowdown = factor * _fake_latency_us(anchor[0].decisions) / anchor[1]
                yield (
                    position,
                    Outcome(latency_us=_fake_latency_us(decisions) * factor / slowdown, slowdown=slowdown),
                )


_FAKE_SPACE = Space(
    family="cpu",
    direction="forward",
    structures=one_structure(lambda head_dim, dtype: dict(_FAKE_CHOICES)),
    illegal=lambda decisions, *_: "too large" if decisions["rows"] * decisions["keys"] > 2**14 else None,
    features=lambda decisions, problem: [math.log2(decisions["rows"] * decisions["keys"])],
    untuned=lambda *_, **__: {name: values[0] for name, values in _FAKE_CHOICES.items()},
    build=lambda *_: None,
    unsupported=lambda *_: None,
)


_FIRST = {name: values[0] for name, values in _FAKE_CHOICES.items()}


def _fake(decisions: Mapping[str, int]) -> KernelSpec:
    return KernelSpec.of("cpu", PROBLEM, decisions)


def _fake_session(
    folder: Path, strategy: str, seed: int, budget: Budget, space: Space = _FAKE_SPACE
) -> tuple[_Session, DecisionSearch]:
    log = TuningLog(folder, PROBLEM, detect_cpu(), strategy)
    log.begin_session({"seed": seed})
    log.note_family("cpu", {"kernel": "fake", "workload_hash": "0"})
    search = DecisionSearch(space, PROBLEM, detect_cpu(), folder, strategy, seed, "fake")
    return _Session(log, budget, lambda: False, _Progress(False)), search


def _fake_search(
    folder: Path, strategy: str, seed: int, budget: Budget, space: Space = _FAKE_SPACE
) -> tuple[str, _FakeMeter, TuningLog]:
    session, search = _fake_session(folder, strategy, seed, budget, space)
    meter = _FakeMeter()
    ended = run_search(search, meter, session, "fake", _fake(_FIRST))
    search.close()
    session.log.end_session(ended, session.elapsed_s)
    session.log.close()
    return ended, meter, session.log


def test_evolutionary_search_finds_the_optimum_and_random_sampling_does_not(tmp_path: Path) -> None:
    # 3240 combinations, 72 trials: sampling has the optimum with probability 1/45.
    best = {}
    for strategy, seed in itertools.product(("evolutionary", "random"), (1, 2)):
        folder = tmp_path / f"{strategy}-{seed}"
        ended, meter, log = _fake_search(folder, strategy, seed, Budget(72, None))
        assert ended == "budget" and len(meter.measured) == 72 == len(set(_keys(log.measurements)))
        assert all(d["rows"] * d["keys"] <= 2**14 for d in meter.measured), "measured an illegal candidate"
        best[strategy, seed] = min(m.latency_us for m in log.measurements if m.latency_us is not None)
    assert min(best["evolutionary", 1], best["evolutionary", 2]) == 100.0
    assert best["evolutionary", 1] + best["evolutionary", 2] < best["random", 1] + best["random", 2]


# Two structures: a wide one of 1296 points, and a narrow one of 36 whose decisions it shares.
_STRUCTURES = {
    "wide": {"fused": (0,), **{name: _FAKE_CHOICES[name] for name in ("rows", "keys", "unroll", "order")}},
    "narrow": {"fused": (1,), "rows": _FAKE_CHOICES["rows"], "depth": (1, 2, 3, 4, 5, 6)},
}
_BEST_OF = {
    "wide": {"fused": 0, "rows": 64, "keys": 32, "unroll": 4, "order": 1},
    "narrow": {"fused": 1, "rows": 16, "depth": 5},
}


def _structured_latency_us(decisions: Mapping[str, int], better: str) -> float:
    """The other structure's best is 30% slower than the better one's."""
    name = "narrow" if decisions["fused"] else "wide"
    steps = sum(
        abs(values.index(decisions[key]) - values.index(_BEST_OF[name][key]))
        for key, values in _STRUCTURES[name].items()
    )
    return (100.0 if name == better else 130.0) * (1.0 + 0.3 * steps)


@pytest.mark.parametrize("better", ["wide", "narrow"])
def test_a_search_finds_the_best_of_either_structure(
    better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategy_module, "_POPULATION", 32)
    space = replace(
        _FAKE_SPACE,
        structures=lambda head_dim, dtype: _STRUCTURES,
        illegal=lambda decisions, *_: "fused=0 with 256 rows" if decisions["rows"] == 256 else None,
        features=lambda decisions, problem: [math.log2(decisions["rows"])],
    )
    untuned = {name: values[0] for name, values in _STRUCTURES["wide"].items()}

    class Meter(_FakeMeter):
        def measure(self, batch: Any, best_us: Any, anchor: Any = None) -> Iterator[tuple[int, Outcome]]:
            for position, kernel in enumerate(batch):
                self.measured.append(kernel.decisions)
                yield position, Outcome(latency_us=_structured_latency_us(kernel.decisions, better))

    session, search = _fake_session(tmp_path, "evolutionary", 3, Budget(48, None), space)
    meter = Meter()
    run_search(search, meter, session, "fake", _fake(untuned))
    found = best_in_database(tmp_path, PROBLEM, space, "fake")
    search.close()
    session.log.close()
    for decisions in meter.measured:
        assert set(decisions) == set(_STRUCTURES["narrow" if decisions["fused"] else "wide"])
        assert decisions["rows"] != 256, "measured an illegal candidate"
    assert sum(decisions["fused"] for decisions in meter.measured[:17]) == 8
    assert found == _BEST_OF[better]
    # A resumed search knows them again, whatever the structure.
    session, search = _fake_session(tmp_path, "evolutionary", 3, Budget(50, None), space)
    again = Meter()
    assert run_search(search, again, session, "fake", _fake(untuned)) == "budget"
    search.close()
    session.log.close()
    assert len(again.measured) == 2 and not set(map(str, again.measured)) & set(map(str, meter.measured))


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_RECOVERED", 0.87)


@pytest.mark.usefixtures("recovery")
@pytest.mark.parametrize("busy", [[18.0], [18.0] * 12, [18.0] * 9 + [5.0] * 8, [1.0, 30.0, 30.0, 1.0]])
def test_a_default_that_was_timed_on_a_busy_machine_is_timed_again(busy: list[float], tmp_path: Path) -> None:
    session, search = _fake_session(tmp_path, "evolutionary", 1, Budget(40, None))
    meter, retaken = _FakeMeter(busy=busy), 0
    while run_search(search, meter, session, "fake", _fake(_FIRST)) == RETAKEN:
        retaken += 1
        search.close()
        forget_database(tmp_path)
        search = DecisionSearch(_FAKE_SPACE, PROBLEM, detect_cpu(), tmp_path, "evolutionary", 1, "fake")
    search.close()
    session.log.end_session("budget", 1.0)
    assert bool(retaken) == (busy[0] > 1)
    measured = read_measurements(tmp_path)
    assert len(measured) == 40 == len(set(_keys(measured)))
    for measurement in measured:
        if measurement.latency_us is not None:
            assert measurement.latency_us == pytest.approx(_fake_latency_us(measurement.kernel.decisions))
    assert measured[0].kernel.decisions == _FIRST
    notes = read_run(tmp_path)["sessions"][0].get("retaken", [])
    assert len(notes) == retaken and all(note["to_us"] < note["from_us"] for note in notes)
    assert len((tmp_path / RECORDS).read_text().splitlines()) == 40
    assert (
        best_in_database(tmp_path, PROBLEM, _FAKE_SPACE, "fake")
        == min(measured, key=lambda m: m.latency_us or math.inf).kernel.decisions
    )


@pytest.mark.usefixtures("recovery")
def test_a_machine_that_stays_busy_is_no_reason_to_time_the_default_for_ever(tmp_path: Path) -> None:
    """The default runs faster beside the candidates than alone, which no second timing mends."""

    class Odd(_FakeMeter):
        def measure(self, batch: Any, best_us: Any, anchor: Any = None) -> Iterator[tuple[int, Outcome]]:
            for position, outcome in super().measure(batch, best_us, anchor):
                yield position, replace(outcome, slowdown=0.5) if anchor else outcome

    session, search = _fake_session(tmp_path, "random", 1, Budget(40, None))
    meter = Odd()
    assert run_search(search, meter, session, "fake", _fake(_FIRST)) == "budget"
    assert len(meter.measured) < 50


def test_resumed_search_keeps_learning_and_repeats_nothing(tmp_path: Path) -> None:
    _fake_search(tmp_path, "evolutionary", 1, Budget(40, None))
    (tmp_path / RECORDS).write_text("")  # as if every database write had been lost
    _, meter, log = _fake_search(tmp_path, "evolutionary", 1, Budget(80, None))
    assert len(meter.measured) == 40 and len(set(_keys(log.measurements))) == 80
    assert len((tmp_path / RECORDS).read_text().splitlines()) == 80
    assert min(m.latency_us for m in log.measurements if m.latency_us is not None) == 100.0
    best = best_in_database(tmp_path, PROBLEM, _FAKE_SPACE, "fake")
    assert best == _OPTIMUM


def test_kernel_hash_follows_the_kernel_and_not_its_spelling() -> None:
    space, target = find_space("cpu", "forward"), detect_cpu()
    known = kernel_hash(space, PROBLEM, target)
    again = [strategy_module._code_hash.__wrapped__(space, 32, "float32", target) for _ in range(2)]
    assert again == [known] * 2, "names of variables count"
    other = space.untuned(PROBLEM.head_dim, PROBLEM.dtype, target) | {"key_rows": 48}
    changed = replace(space, build=lambda decisions, *rest: space.build(other, *rest))
    assert kernel_hash(changed, PROBLEM, target) != known
    choices = space.structures(PROBLEM.head_dim, PROBLEM.dtype)[""]
    fewer = {"": {name: values[:2] for name, values in choices.items()}}
    assert kernel_hash(replace(space, structures=lambda *_: fewer), PROBLEM, target) != known


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_kernel_hash_has_the_defaults_of_every_case_and_the_deterministic_one(changed: int) -> None:
    """Of four kernels the last is no default."""

    def untuned(*_: Any, deterministic: bool = False, case: int = 0) -> dict[str, int]:
        return {"rows": 2 if deterministic else case // 100}

    def build(edited: int) -> Callable[..., Any]:
        lengths = {rows: 64 + rows + 10 * (rows == edited) for rows in range(4)}
        return lambda decisions, *_: build_workload(replace(PROBLEM, length=lengths[decisions["rows"]]))

    space = replace(_FAKE_SPACE, untuned=untuned, cases=cases_by_width(100), build=build(-1))
    other = replace(space, build=build(changed))
    hashes = [kernel_hash(item, PROBLEM, detect_cpu()) for item in (space, other)]
    assert (hashes[0] == hashes[1]) == (changed == 3)


def test_other_kernel_code_starts_afresh(tmp_path: Path) -> None:
    _fake_search(tmp_path, "random", 1, Budget(8, None))
    run = json.loads((tmp_path / RUN).read_text())
    run["families"]["cpu"]["kernel"] = "changed"
    (tmp_path / RUN).write_text(json.dumps(run))
    assert curve(tmp_path) == ([], [])
    assert best_in_database(tmp_path, PROBLEM, _FAKE_SPACE, "changed") is None
    assert best_in_database(tmp_path, PROBLEM, _FAKE_SPACE, "fake") is not None


def test_space_is_searched_to_its_end(tmp_path: Path) -> None:
    small = {name: values[:2] for name, values in _FAKE_CHOICES.items()}
    space = replace(_FAKE_SPACE, structures=one_structure(lambda head_dim, dtype: small))
    ended, _, log = _fake_search(tmp_path, "evolutionary", 0, Budget(500, None), space)
    assert ended == "exhausted"
    assert 48 < len(set(_keys(log.measurements))) <= 64


def test_minutes_are_counted_over_sessions(tmp_path: Path) -> None:
    ended, meter, log = _fake_search(tmp_path, "random", 1, Budget(None, 0.01))
    assert ended == "budget" and log.elapsed_s >= 0.5 and len(meter.measured) > 8
    ended, meter, _ = _fake_search(tmp_path, "random", 1, Budget(None, 0.01))
    assert ended == "budget" and not meter.measured


@pytest.mark.alone
def test_families_share_the_time_that_is_left(tmp_path: Path) -> None:
    session, _ = _fake_session(tmp_path, "random", 1, Budget(None, 0.02))
    session.allot(2)
    began = time.monotonic()
    while not session.out_of_time():
        time.sleep(0.01)
    assert 0.4 < time.monotonic() - began < 0.8, "half of 1.2 s"
    session.allot(1)
    while not session.out_of_time():
        time.sleep(0.01)
    assert 1.0 < time.monotonic() - began < 1.6


def test_distilling_compares_deterministic_candidates_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two fastest deterministic ones, however many others are faster."""
    space = replace(_FAKE_SPACE, is_deterministic=lambda decisions: decisions["order"] == 0)
    monkeypatch.setattr(kernel_module, "find_space", lambda family, direction: space)
    log = TuningLog(tmp_path, PROBLEM, detect_cpu(), "random")
    log.begin_session({"seed": 0})
    log.note_family("cpu", {"kernel": "fake", "workload_hash": "0"})
    for position, (order, unroll) in enumerate(itertools.product((1, 2, 0), (0, 1, 2))):
        decisions = {**_FIRST, "order": order, "unroll": unroll}
        log.append(Measurement(_fake(decisions), "fake", 10.0 + position, None, 0.0))
        log.append(Measurement(_fake({**decisions, "rows": 16}), "fake", None, "wrong", 0.0))
    found = distill_module._contestants([tmp_path], "cpu", detect_cpu(), top=3)
    assert [m.latency_us for _, m in found] == [10.0, 11.0, 12.0, 16.0, 17.0]
    found = distill_module._contestants([tmp_path], "cpu", detect_cpu(), top=7)
    assert [m.latency_us for _, m in found] == [*(10.0 + i for i in range(7)), 17.0]


class _FakeComparison:
    """What distilling asks of a meter: latencies by ``unroll``; 8 is wrong by now."""

    latencies: Mapping[int, float | None] = {}

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _FakeComparison:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compare(self, batch: Sequence[KernelSpec], rounds: int, limit_s: float) -> list[Outcome]:
        found = [self.latencies.get(kernel.decisions["unroll"]) for kernel in batch]
        return [Outcome(error="o is wrong") if us is None else Outcome(latency_us=us) for us in found]


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log root with one search, in which unroll 0, 1 and 2 took 10, 11 and 12 us."""
    monkeypatch.setattr(kernel_module, "find_space", lambda family, direction: _FAKE_SPACE)
    monkeypatch.setattr(distill_module, "ProcessMeter", _FakeComparison)
    folder = log_folder(tmp_path / "logs", detect_cpu(), PROBLEM, "evolutionary")
    with TuningLog(folder, PROBLEM, detect_cpu(), "evolutionary") as log:
        log.begin_session({"seed": 0})
        log.note_family("cpu", {"kernel": "fake", "workload_hash": "0"})
        for unroll in (0, 1, 2):
            log.append(Measurement(_fake({**_FIRST, "unroll": unroll}), "fake", 10.0 + unroll, None, 0.0))
    return tmp_path / "logs"


def _distill(logged: Path, latencies: Mapping[int, float | None]) -> tuple[ScheduleRecord, list[str]]:
    said: list[str] = []
    _FakeComparison.latencies = latencies
    workers: Any = SimpleNamespace(fleet=None)
    distill(logged, schedules=logged.parent / "schedules", workers=workers, report=said.append)
    (record,) = load_records(detect_cpu().folder, logged.parent / "schedules")
    return record, said[1:]


def _save(logged: Path, unroll: int, latency_us: float) -> None:
    kernel = _fake({**_FIRST, "unroll": unroll})
    record = ScheduleRecord(
        PROBLEM, detect_cpu().folder, kernel, latency_us, "1", date="2026-01-02", source_log="x"
    )
    save_records([record], logged.parent / "schedules")


def test_a_record_is_replaced_only_by_what_is_faster_beside_it(logged: Path) -> None:
    record, said = _distill(logged, {0: 13.0, 1: 10.0, 2: 12.0})
    assert (record.kernel.decisions["unroll"], record.latency_us, said) == (1, 10.0, [])
    # A later search has not found it; it was measured on a quieter machine.
    _save(logged, 4, 5.0)
    record, said = _distill(logged, {0: 13.0, 1: 10.0, 2: 12.0, 4: 9.0})
    assert (record.kernel.decisions["unroll"], record.latency_us, record.source_log) == (4, 9.0, "x")
    assert "(5.0 us, 2026-01-02) stays the fastest and took 9.0 us" in said[0]
    assert "9.0 us, and 5.0 us when it was timed before" in said[1]
    _save(logged, 4, 5.0)
    record, said = _distill(logged, {0: 13.0, 1: 8.0, 2: 12.0, 4: 9.0})
    assert (record.kernel.decisions["unroll"], record.latency_us) == (1, 8.0)
    assert "is replaced: side by side it took 9.0 us, the new one 8.0 us" in said[0]
    _save(logged, 8, 5.0)
    record, said = _distill(logged, {0: 13.0, 1: 8.0, 2: 12.0})
    assert record.latency_us == 8.0 and "is replaced: o is wrong" in said[0]
    save_records([replace(record, kernel=_fake({"gone": 1}))], logged.parent / "schedules")
    record, said = _distill(logged, {0: 13.0, 1: 8.0, 2: 12.0})
    assert record.latency_us == 8.0 and "no longer offered" in said[0]


def _distilled(logged: Path) -> dict[int, dict[str, Any]]:
    """What was compared, by ``unroll``."""
    folder = log_folder(logged, detect_cpu(), PROBLEM, "evolutionary")
    compared = json.loads((folder / "distilled-cpu.json").read_text())
    assert compared["rounds"] == 9 and compared["device"] and compared["date"]
    return {kernel["decisions"]["unroll"]: kernel for kernel in compared["kernels"]}


def _compared(compared: Mapping[int, Mapping[str, Any]], question: str) -> list[int]:
    return [unroll for unroll, kernel in compared.items() if kernel[question]]


def test_a_record_is_faster_than_the_default_or_is_the_default(logged: Path) -> None:
    """The default of unroll 0 takes part: one within 1% of it is no better."""
    for latencies, recorded in (
        ({0: 10.0, 1: 9.95, 2: 12.0}, 0),
        ({0: 10.0, 1: 9.85, 2: 12.0}, 1),
        ({0: None, 1: 13.0, 2: 12.0}, 2),
    ):
        record, _ = _distill(logged, latencies)
        assert (record.kernel.decisions["unroll"], record.latency_us) == (recorded, latencies[recorded])
        compared = _distilled(logged)
        assert {unroll: kernel["latency_us"] for unroll, kernel in compared.items()} == latencies
        assert _compared(compared, "is_default") == [0] and _compared(compared, "is_recorded") == [recorded]
        assert _compared(compared, "error") == [unroll for unroll, us in latencies.items() if us is None]


def test_a_default_that_no_search_has_timed_is_compared_too(
    logged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deterministic one as well, where others are not; it is recorded beside the fastest."""

    def untuned(*_: Any, deterministic: bool = False) -> dict[str, int]:
        return {**_FIRST, "unroll": 8, "order": int(deterministic), "rows": 16 if deterministic else 8}

    space = replace(_FAKE_SPACE, untuned=untuned, is_deterministic=lambda decisions: decisions["order"] == 1)
    monkeypatch.setattr(kernel_module, "find_space", lambda family, direction: space)
    _FakeComparison.latencies = {0: 13.0, 1: 10.0, 2: 12.0, 8: 11.0}
    workers: Any = SimpleNamespace(fleet=None)
    schedules = logged.parent / "schedules"
    found = distill(logged, schedules=schedules, workers=workers)
    assert [(record.kernel.decisions["unroll"], record.latency_us) for record in found] == [
        (1, 10.0),
        (8, 11.0),
    ]
    assert found[1].kernel.is_deterministic and found[1].workload_hash == found[0].workload_hash == "0"
    assert load_records(detect_cpu().folder, schedules) == found


def test_a_damaged_log_beside_it_stops_no_distillation(logged: Path) -> None:
    other = replace(PROBLEM, batch=1)
    for problem, strategy in ((PROBLEM, "random"), (other, "evolutionary")):
        folder = log_folder(logged, detect_cpu(), problem, strategy)
        folder.mkdir(parents=True)
        (folder / RUN).write_text("{")
    path = log_folder(logged, detect_cpu(), PROBLEM, "evolutionary") / MEASUREMENTS
    path.write_bytes(path.read_bytes().replace(b"11.0", b"11.0.0"))
    with pytest.warns(LogWarning) as said:
        record, _ = _distill(logged, {0: 13.0, 1: 8.0, 2: 12.0})
    assert record.kernel.decisions["unroll"] == 2
    texts = {str(warning.message) for warning in said}
    assert len([text for text in texts if "run.json is damaged" in text]) == 2
    assert any("measurements.jsonl, line 2 is left out" in text for text in texts)


def _log_of(
    root: Path, target: MachineTarget, problem: AttentionProblem, latencies: Mapping[int, float]
) -> None:
    """A log in which kernels took as long as `latencies` says, by ``key_rows``."""
    untuned = KernelSpec.untuned("cpu", problem, target)
    with TuningLog(log_folder(root, target, problem, "evolutionary"), problem, target, "evolutionary") as log:
        log.begin_session({"seed": 0})
        log.note_family("cpu", {"kernel": "fake", "workload_hash": "0"})
        for key_rows, latency_us in latencies.items():
            kernel = replace(untuned, decisions={**untuned.decisions, "key_rows": key_rows})
            log.append(Measurement(kernel, "fake", latency_us, None, 0.0))


def test_a_search_begins_with_what_did_well_elsewhere(tmp_path: Path) -> None:
    here, kin = detect_cpu(), replace(detect_cpu(), model="kin")
    other = MachineTarget("cpu", "x86-64-v2" if here.arch != "x86-64-v2" else "x86-64-v3")
    logs, schedules = tmp_path / "logs", tmp_path / "schedules"
    near, far = replace(PROBLEM, length=64), replace(PROBLEM, length=4096, layout=BandLayout.spattention(4))
    untuned = KernelSpec.untuned("cpu", PROBLEM, here).decisions

    def started() -> list[tuple[int, int]]:
        kernels = warm_starts("cpu", PROBLEM, here, logs, schedules)
        assert len(set(kernels)) == len(kernels) and all(k.rejection(here) is None for k in kernels)
        assert all(kernel.serves(PROBLEM) for kernel in kernels)
        return [(kernel.decisions["key_rows"], kernel.decisions["query_rows"]) for kernel in kernels]

    rows = untuned["query_rows"]
    assert started() == []
    _log_of(logs, here, PROBLEM, {48: 1.0})  # its own log is resumed anyway
    _log_of(logs, other, PROBLEM, {48: 1.0})
    assert started() == []
    _log_of(logs, here, far, {384: 5.0, 192: 4.0})
    _log_of(logs, kin, PROBLEM, {384: 9.0, 48: 8.0, 96: 7.0})
    assert started() == [(96, rows), (48, rows), (384, rows), (192, rows)]
    _log_of(logs, here, near, {48: 3.0, 96: 9.0})
    assert started() == [(96, rows), (48, rows), (384, rows), (192, rows)]
    small = {**untuned, "query_rows": 8}
    for target, problem, query in ((kin, near, small), (other, PROBLEM, untuned)):
        kernel = KernelSpec.of("cpu", problem, {**query, "key_rows": 192})
        save_records([ScheduleRecord(problem, target.folder, kernel, 1.0)], schedules)
    assert started() == [(192, 8), (96, rows), (48, rows), (384, rows), (192, rows)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_search_measures_the_defaults_of_other_problems_early(direction: str, tmp_path: Path) -> None:
    """Few tiles have others, and so have wide bands; not once more the problem's own."""
    target = parse_target("nvidia/h100")
    problem = AttentionProblem(direction, "float16", 4, 16, 16, 4096, 128, BandLayout.spattention(16))
    decisions = find_space("hopper", direction).all_untuned(128, "float16", target)
    own = KernelSpec.untuned("hopper", problem, target)
    others = [KernelSpec.of("hopper", problem, made) for made in decisions]
    others.remove(own)
    assert others and warm_starts("hopper", problem, target, tmp_path, tmp_path) == others


def test_early_candidates_follow_the_default_that_a_cpu_times_them_against(tmp_path: Path) -> None:
    session, search = _fake_session(tmp_path, "evolutionary", 1, Budget(12, None))
    anchors: list[tuple[int, bool]] = []

    class Meter(_FakeMeter):
        def measure(self, batch: Any, best_us: Any, anchor: Any = None) -> Iterator[tuple[int, Outcome]]:
            anchors.append((len(batch), anchor is not None))
            return super().measure(batch, best_us, anchor)

    early = [_fake({**_FIRST, "order": order, "parallel": 1}) for order in (0, 1, 2)]
    run_search(search, Meter(), session, "fake", _fake(_FIRST), True, early)
    search.close()
    session.log.close()
    assert [m.kernel for m in session.log.measurements[:4]] == [_fake(_FIRST), *early]
    assert anchors[:2] == [(1, False), (3, True)]


def test_log_belongs_to_one_problem(tmp_path: Path) -> None:
    with TuningLog(tmp_path, PROBLEM, detect_cpu(), "random") as log:
        log.begin_session({"seed": 0})
    with pytest.raises(ValueError, match="choose another log root"):
        TuningLog(tmp_path, replace(PROBLEM, batch=1), detect_cpu(), "random")
    with pytest.raises(ValueError, match="is not the log of a search"):
        read_run(tmp_path / "elsewhere")


def test_importing_the_package_does_not_import_the_compiler() -> None:
    script = "import sys, spattn_tvm.tuning; print([m for m in ('tvm', 'xgboost') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], env=_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# --- from logs to schedules -------------------------------------------------------------------------------


def test_distilled_record_is_found_as_tuned(searched: tuple[Path, Any], tmp_path: Path) -> None:
    root, result = searched
    target = detect_cpu()
    assert find_schedule(PROBLEM, target, root=tmp_path).status == "untuned"
    (record,) = distill(root, schedules=tmp_path, top=2, rounds=3)
    logs = (result.log_dir, result.log_dir / "random")
    measured = [m.kernel for log in logs for m in read_measurements(log) if m.error is None]
    assert record.kernel in measured
    assert record.problem == PROBLEM and record.target == target.folder and record.latency_us > 0
    assert record.source_log in [log.relative_to(root).as_posix() for log in logs]
    assert record.workload_hash and record.device and record.date and record.versions["apache-tvm"]
    found = find_schedule(PROBLEM, target, root=tmp_path)
    assert found.status == "tuned" and found.kernel == record.kernel and found.record == record


def test_distill_needs_a_log_of_this_machine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no log of a search"):
        distill(tmp_path)
    with pytest.raises(ValueError, match="must be distilled on their target"):
        distill(tmp_path, target=MachineTarget("cpu", "aarch64"))
