"""The benchmark: nothing wrong is timed, nothing missing ends the others, peers take turns."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from spattn_tvm.bands import BandLayout
from spattn_tvm.bench import clocks, peers
from spattn_tvm.bench import report as reports
from spattn_tvm.bench import run as bench
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import attention_mask, reference_attention


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks._CpuClock, "matmul_size", 128)


def problem(length: int = 70, heads: int = 4, kv_heads: int = 2) -> AttentionProblem:
    layout = BandLayout.spattention(heads)
    return AttentionProblem("forward", "float32", 2, heads, kv_heads, length, 32, layout)


def add_peer(monkeypatch: pytest.MonkeyPatch, name: str, prepare, same_mask: bool = True) -> None:
    monkeypatch.setitem(peers.PEERS, name, peers.Peer(name, name, ("cpu",), same_mask, prepare))


def right(problem: AttentionProblem, device: torch.device):
    return lambda q, k, v: reference_attention(q, k, v, problem.layout)[0]


def entries(report: dict) -> dict[tuple[str, str], dict]:
    return {(e["peer"], e["pass"]): e for e in report["results"][0]["entries"]}


def quick(problems, **options) -> dict:
    return bench.benchmark(problems, rounds=3, idle_ms=0.0, **options)


def test_right_peers_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    add_peer(monkeypatch, "right", right)
    found = entries(quick([problem()], peers=("right", "sdpa"), steps=bench.STEPS))
    assert len(found) == 6
    for (peer, step_name), entry in found.items():
        assert entry["status"] == "ok", entry
        assert entry["rounds"] == 3
        assert 0 < entry["min_ms"] <= entry["median_ms"]
        assert set(entry["errors"]) == ({"o"} if step_name == "forward" else {"o", "dq", "dk", "dv"})
        assert max(entry["errors"].values()) < 1e-5
        if peer == "sdpa":
            assert entry["ratio_to_dense"] == 1.0
    ours, dense = found["right", "forward"], found["sdpa", "forward"]
    assert ours["ratio_to_dense"] == pytest.approx(ours["median_ms"] / dense["median_ms"])


@pytest.mark.parametrize("step_name", bench.STEPS)
def test_useful_flops_are_of_the_own_mask(monkeypatch: pytest.MonkeyPatch, step_name: str) -> None:
    add_peer(monkeypatch, "right", right)
    found = entries(quick([problem()], peers=("right", "sdpa"), steps=(step_name,)))
    operations = {"forward": 4, "backward": 10, "forward_backward": 14}[step_name]
    for peer, layout in (("right", BandLayout.spattention(4)), ("sdpa", BandLayout.causal(4))):
        entry = found[peer, step_name]
        pairs = 2 * sum(
            sum(max(0, 70 - d) for lo, hi in head for d in range(lo, min(hi, 69) + 1))
            for head in layout.bands(70)
        )
        expected = operations * 32 * pairs / entry["median_ms"] * 1e-9
        assert entry["useful_tflops"] == pytest.approx(expected)
        assert entry["matmul_share"] > 0


def wrong_band(problem: AttentionProblem, device: torch.device):
    bands = [
        [(lo, hi + 1) for lo, hi in head[:1]] + list(head[1:])
        for head in problem.layout.bands(problem.length)
    ]
    layout = BandLayout.custom(bands, problem.length + 1)
    return lambda q, k, v: reference_attention(q, k, v, layout)[0]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: torch.Tensor) -> torch.Tensor:
        return q.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 1.001


def wrong_gradient(problem: AttentionProblem, device: torch.device):
    return lambda q, k, v: reference_attention(WrongGradient.apply(q), k, v, problem.layout)[0]


def not_a_number(problem: AttentionProblem, device: torch.device):
    def attend(q, k, v):
        o = reference_attention(q, k, v, problem.layout)[0]
        return torch.where(torch.arange(o.shape[2])[:, None] == 69, torch.nan, o)

    return attend


@pytest.mark.parametrize(
    ("prepare", "step_name", "output"),
    [
        (wrong_band, "forward", "o"),
        (wrong_gradient, "forward_backward", "dq"),
        (not_a_number, "forward", "o"),
    ],
)
def test_a_wrong_peer_is_never_timed(
    monkeypatch: pytest.MonkeyPatch, prepare, step_name: str, output: str
) -> None:
    add_peer(monkeypatch, "bad", prepare)
    add_peer(monkeypatch, "right", right)
    found = entries(quick([problem()], peers=("bad", "right"), steps=(step_name,)))
    bad = found["bad", step_name]
    assert bad["status"] == "wrong"
    assert f"{output} is" in bad["reason"]
    assert bad["median_ms"] is None
    assert bad["rounds"] == 0
    assert found["right", step_name]["status"] == "ok"


def test_an_absent_peer_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(problem: AttentionProblem, device: torch.device):
        raise peers.PeerUnavailable("the package is not installed")

    def broken(problem: AttentionProblem, device: torch.device):
        def attend(q, k, v):
            raise NotImplementedError("no such kernel\nlong explanation")

        return attend

    add_peer(monkeypatch, "absent", absent)
    add_peer(monkeypatch, "broken", broken)
    add_peer(monkeypatch, "right", right)
    found = entries(quick([problem()], peers=("absent", "broken", "cudnn", "right"), steps=("forward",)))
    assert found["absent", "forward"]["reason"] == "the package is not installed"
    assert found["broken", "forward"]["reason"] == "NotImplementedError: no such kernel"
    assert found["cudnn", "forward"]["reason"] == "not made for cpu"
    assert {name for name, _ in found if found[name, "forward"]["status"] == "not available"} == {
        "absent",
        "broken",
        "cudnn",
    }
    assert found["right", "forward"]["status"] == "ok"


def test_peers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def named(name: str):
        def prepare(problem: AttentionProblem, device: torch.device):
            def attend(q, k, v):
                calls.append(name)
                return reference_attention(q, k, v, problem.layout)[0]

            return attend

        return prepare

    for name in "abc":
        add_peer(monkeypatch, name, named(name))
    monkeypatch.setattr(clocks._CpuClock, "calls", lambda self, step: 1)
    quick([problem()], peers=tuple("abc"), steps=("forward",))
    assert calls[-9:] == list("abc" * 3)


def test_times_are_medians() -> None:
    timing = reports.Timing(
        "p", "p", True, "forward", samples_ms=[3.0, 1.0, 100.0], useful_flops=6_000_000_000
    )
    assert timing.median_ms == 3.0
    assert timing.useful_tflops == pytest.approx(2.0)
    assert timing.to_json()["min_ms"] == 1.0


def test_report_survives_json_and_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_peer(monkeypatch, "right", right)
    add_peer(monkeypatch, "bad", wrong_band)
    report = quick([problem(), problem(33)], peers=("right", "bad"), steps=("forward",), threads=1)
    path = reports.write_report(report, tmp_path)
    assert path.parent == tmp_path / report["target"] / "benchmarks"
    again = json.loads(path.read_text())
    assert again == report
    assert again["threads"] == 1
    assert [AttentionProblem.from_json(r["problem"]).length for r in again["results"]] == [70, 33]
    assert again["versions"]["torch"] == torch.__version__

    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in reports.tables(again):
        console.print(table)
    text = console.export_text()
    assert "(2,4/2,70,32) float32 spattention, 1 threads" in text
    assert "bad: o is off by" in text


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"problems": []}, "at least one problem"),
        ({"problems": [problem()], "steps": ("sideways",)}, "unknown step 'sideways'"),
        ({"problems": [problem()], "peers": ("nobody",)}, "unknown peer 'nobody'"),
        ({"problems": [problem()], "rounds": 0}, "rounds must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.benchmark(**arguments)


def test_threads_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    add_peer(monkeypatch, "right", right)
    before = torch.get_num_threads()
    quick([problem()], peers=("right",), steps=("forward",), threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("seed", range(2))
def test_check_sees_every_output(seed: int) -> None:
    """Each of the four outputs is compared: one altered element of the chosen head is found."""
    p = problem(40, 4, 2)
    inputs = bench._Inputs.random(p, torch.device("cpu"), seed)
    outputs = bench._outputs("forward_backward", right(p, torch.device("cpu")), inputs)
    assert bench._check(outputs, inputs, p.layout, p, seed)[1] == ""
    for name in outputs:
        found = 0
        for b, head in itertools.product(range(2), range(outputs[name].shape[1])):
            altered = {key: value.clone() for key, value in outputs.items()}
            altered[name][b, head, 7, 3] += 1e-2
            found += name in bench._check(altered, inputs, p.layout, p, seed)[1]
        group = outputs[name].shape[1] // 2
        assert found == group, f"{name}: one key/value head of one batch entry is checked"


@pytest.mark.parametrize(
    "layout",
    [
        BandLayout.spattention(4, 70),
        BandLayout.local_only(4, 70),
        BandLayout.sliding_window(4, 9),
        BandLayout.custom([[(0, 3), (4, 8)], [(0, 0), (2, 2)], [(0, 69)], [(0, 5), (60, 69)]], 70),
    ],
)
def test_window_sizes_name_the_same_mask(layout: BandLayout) -> None:
    problem = AttentionProblem("forward", "bfloat16", 1, 4, 4, 70, 64, layout)
    distance = torch.arange(70)[:, None] - torch.arange(70)
    for (sink, far, gap, near), expected in zip(
        peers.window_sizes(problem), attention_mask(layout, 70), strict=True
    ):
        assert sink == 0
        mask = (distance < near) | ((distance >= near + gap) & (distance < near + gap + far))
        assert torch.equal(mask & (distance >= 0), expected)


@pytest.mark.parametrize(
    ("layout", "kv_heads", "message"),
    [
        (BandLayout.exclusive(4, 70), 4, "starts at distance 0"),
        (BandLayout.spattention(4, 70), 2, "per key/value head"),
    ],
)
def test_masks_that_window_sizes_cannot_name(layout: BandLayout, kv_heads: int, message: str) -> None:
    problem = AttentionProblem("forward", "bfloat16", 1, 4, kv_heads, 70, 64, layout)
    with pytest.raises(peers.PeerUnavailable, match=message):
        peers.window_sizes(problem)
