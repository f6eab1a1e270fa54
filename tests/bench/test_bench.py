"""The benchmark: nothing wrong is timed, nothing missing ends the others, peers take turns."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from spattn_tvm.bands import BandLayout
from spattn_tvm.bench import clocks, masked_peers, peers
from spattn_tvm.bench import report as reports
from spattn_tvm.bench import run as bench
from spattn_tvm.bench.case import Case
from spattn_tvm.bench.inputs import Inputs
from spattn_tvm.bench.samples import Samples
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import attention_mask, reference_attention


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks.CpuClock, "matmul_size", 128)


def problem(
    length: int = 70, heads: int = 4, kv_heads: int = 2, layout: BandLayout | None = None, dtype="float32"
) -> AttentionProblem:
    layout = BandLayout.spattention(heads) if layout is None else layout
    return AttentionProblem("forward", dtype, 2, heads, kv_heads, length, 32, layout)


def add_peer(monkeypatch: pytest.MonkeyPatch, name: str, prepare, same_mask: bool = True) -> None:
    monkeypatch.setitem(peers.PEERS, name, peers.Peer(name, name, ("cpu",), same_mask, prepare))


def right(case: Case, device: torch.device):
    cu_seqlens = case.cu_seqlens(device)
    return lambda q, k, v: reference_attention(q, k, v, case.problem.layout, cu_seqlens=cu_seqlens)[0]


def entries(report: dict) -> dict[tuple[str, str], dict]:
    return {(e["peer"], e["direction"]): e for e in report["results"][0]["entries"]}


def quick(problems, **options) -> dict:
    cases = [given if isinstance(given, Case) else Case(given) for given in problems]
    return bench.benchmark(cases, rounds=3, idle_ms=0.0, **options)


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


def wrong_band(case: Case, device: torch.device):
    problem = case.problem
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


def wrong_gradient(case: Case, device: torch.device):
    return lambda q, k, v: reference_attention(WrongGradient.apply(q), k, v, case.problem.layout)[0]


def not_a_number(case: Case, device: torch.device):
    def attend(q, k, v):
        o = reference_attention(q, k, v, case.problem.layout)[0]
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
    def absent(case: Case, device: torch.device):
        raise peers.PeerUnavailable("the package is not installed")

    def broken(case: Case, device: torch.device):
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
        def prepare(case: Case, device: torch.device):
            def attend(q, k, v):
                calls.append(name)
                return reference_attention(q, k, v, case.problem.layout)[0]

            return attend

        return prepare

    for name in "abc":
        add_peer(monkeypatch, name, named(name))
    monkeypatch.setattr(clocks.CpuClock, "calls", lambda self, step: 1)
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
        ({"cases": []}, "at least one case"),
        ({"cases": [Case(problem())], "steps": ("sideways",)}, "unknown step 'sideways'"),
        ({"cases": [Case(problem())], "peers": ("nobody",)}, "unknown peer 'nobody'"),
        ({"cases": [Case(problem())], "rounds": 0}, "rounds must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.benchmark(**arguments)


def test_threads_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    add_peer(monkeypatch, "right", right)
    before = torch.get_num_threads()
    quick([problem()], peers=("right",), steps=("forward",), threads=before + 1)
    assert torch.get_num_threads() == before


CASES = [
    Case(problem()),
    Case(problem(1)),
    Case(problem(90, 4, 1, BandLayout.exclusive(4), "bfloat16")),
    Case(problem(70, 4, 4, BandLayout.causal(4), "float16")),
    Case.packed(problem(150), 4),
    Case(problem(60, 3, 3, BandLayout.custom([[(2, 3), (6, 90)], [], [(0, 0)]], 90)), (0, 1, 30, 60)),
]


@pytest.mark.parametrize("case", CASES, ids=Case.describe)
def test_samples_are_the_reference_at_their_places(case: Case) -> None:
    inputs = Inputs.random(case.problem, torch.device("cpu"), 3)
    samples = Samples.draw(case, case.problem.layout, inputs, 4, gradients=True)
    exact = Inputs(*(t.double() for t in (inputs.q, inputs.k, inputs.v, inputs.grad)))
    expected = bench._outputs("backward", right(case, torch.device("cpu")), exact)
    for name, places in (
        ("o", samples.rows),
        ("dq", samples.rows),
        ("dk", samples.keys),
        ("dv", samples.keys),
    ):
        assert len(places) == len(samples.exact[name]) > 0
        for place, value, *plain in zip(places, samples.exact[name], *samples.plain[name], strict=True):
            torch.testing.assert_close(value, expected[name][place], rtol=1e-9, atol=1e-9)
            unit = torch.finfo(inputs.q.dtype).eps
            for one in plain:
                assert (one.double() - value).abs().max() < 40 * unit * max(1.0, value.abs().max())
    assert (
        samples.check({name: t.to(inputs.q.dtype) for name, t in expected.items()}, case.problem.dtype)[1]
        == ""
    )


def flash_attention(inputs: Inputs, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a right kernel gives: float32 sums; weights, their gradients and results rounded to bfloat16."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16().float()

    q, k, v, do = (tensor.float() for tensor in (inputs.q, inputs.k, inputs.v, inputs.grad))
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    k, v = (tensor.repeat_interleave(group, 1) for tensor in (k, v))
    scores = (scale * (q @ k.mT)).masked_fill(~mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    o = rounded(rounded(weights) @ v / weights.sum(-1, keepdim=True))
    weights = scores.softmax(-1)
    score_gradient = rounded(weights * (do @ v.mT - (do * o).sum(-1, keepdim=True)))
    of_heads = {"dk": scale * (score_gradient.mT @ q), "dv": rounded(weights).mT @ do}
    of_groups = {name: value.unflatten(1, (-1, group)).sum(2) for name, value in of_heads.items()}
    return {
        name: value.bfloat16()
        for name, value in {"o": o, "dq": scale * (score_gradient @ k), **of_groups}.items()
    }


def test_what_errs_by_its_dtype_alone_is_right() -> None:
    """With a seed at which the rows with two keys, whose gradients have the largest errors, err unusually."""
    seed = 1077
    layout = BandLayout.spattention(4)
    case = Case.packed(AttentionProblem("forward", "bfloat16", 1, 4, 2, 1024, 64, layout), 3)
    inputs = Inputs.random(case.problem, torch.device("cpu"), seed)
    outputs = flash_attention(inputs, attention_mask(layout, 1024, case.cu_seqlens(torch.device("cpu"))))
    assert Samples.draw(case, layout, inputs, seed, gradients=True).check(outputs, "bfloat16")[1] == ""


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=Case.describe)
def test_samples_lie_at_edges(case: Case) -> None:
    """Both ends of a document, and rows at which a band reaches its first key or has come in full."""
    layout = case.problem.layout
    begin, end = next(iter(case.documents))
    seen = set()
    for seed in range(6):
        inputs = Inputs.random(case.problem, torch.device("cpu"), seed)
        seen |= set(Samples.draw(case, layout, inputs, seed, gradients=False).rows)
    for head in range(case.problem.query_heads):
        bands = layout.bands(end - begin)[head]
        edges = {begin, end - 1} | {begin + d for band in bands for d in band if begin + d < end}
        rows = {row for _, h, row in seen if h == head}
        assert edges <= rows


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
def test_a_planted_value_at_an_edge_is_found(name: str) -> None:
    """One wrong element where a band has just come in full, at the end of a document, is not passed over."""
    case = Case.packed(problem(400), 3)
    inputs = Inputs.random(case.problem, torch.device("cpu"), 1)
    samples = Samples.draw(case, case.problem.layout, inputs, 2, gradients=True)
    outputs = bench._outputs("backward", right(case, torch.device("cpu")), inputs)
    assert samples.check(outputs, "float32")[1] == ""
    places = samples.rows if name in ("o", "dq") else samples.keys
    begin, end = next(iter(case.documents))
    bands = case.problem.layout.bands(end - begin)
    batch, head, edge = next(
        (b, h, row)
        for b, h, row in places
        if name[1:] in "kv" or any(row == begin + high for _, high in bands[h])
        if begin <= row < end
    )
    altered = {key: value.clone() for key, value in outputs.items()}
    altered[name][batch, head, edge, 3] += 1e-2
    reason = samples.check(altered, "float32")[1]
    assert reason.startswith(f"{name} is off") and f"batch {batch}, head {head}, row {edge}" in reason


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("band", [0, 1])
def test_an_edge_that_is_off_by_one_is_found(band: int, shift: int) -> None:
    """One band edge of one head moved by one distance: every sampled row and key of it sees that."""
    case = Case(problem(200, 4, 1))
    moved = [list(head) for head in case.problem.layout.bands(200)]
    low, high = moved[2][band]
    moved[2][band] = (low, high + shift)
    other = BandLayout.custom(moved, 200)
    inputs = Inputs.random(case.problem, torch.device("cpu"), 5)
    samples = Samples.draw(case, case.problem.layout, inputs, 6, gradients=True)
    outputs = bench._outputs("backward", lambda q, k, v: reference_attention(q, k, v, other)[0], inputs)
    reason = samples.check(outputs, "float32")[1]
    assert all(f"{name} is off" in reason for name in ("o", "dq", "dk", "dv"))


def test_results_that_differ_between_runs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsteady(case: Case, device: torch.device):
        calls = itertools.count()
        attend = right(case, device)
        return lambda q, k, v: attend(q, k, v) * (1 + 1e-7 * (next(calls) % 2))

    add_peer(monkeypatch, "unsteady", unsteady)
    add_peer(monkeypatch, "right", right)
    case = Case(problem(), deterministic=True)
    found = entries(quick([case], peers=("unsteady", "right"), steps=("forward",)))
    assert found["unsteady", "forward"]["reason"] == "o differ between two runs"
    assert found["right", "forward"]["status"] == "ok"


def test_plans_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        peers.PEERS, "planner", peers.Peer("planner", "p", ("cpu",), True, right, "mask plan")
    )
    result = quick([problem()], peers=("planner", "cudnn"), steps=("forward",))["results"][0]
    (name, plan), *others = result["plans"].items()
    assert (name, others, plan["what"]) == ("planner", [], "mask plan")
    assert plan["seconds"] >= 0 and plan["first_call_s"] > 0 and plan["memory_mib"] is None
    assert reports.plan_text(plan).startswith("mask plan, ")
    assert reports.plan_text({**plan, "what": ""}) == reports.plan_text(None) == ""


def test_packed_documents_count_their_own_pairs() -> None:
    case = Case.packed(problem(100), 3)
    assert list(case.documents) == [(0, 16), (16, 50), (50, 100)]
    pairs = sum(case.problem.layout.pairs(end - begin) for begin, end in case.documents)
    assert case.flops(case.problem.layout, "forward") == 2 * 4 * 32 * pairs
    with pytest.raises(ValueError, match="too few for 90 documents"):
        Case.packed(problem(100), 90)
    with pytest.raises(ValueError, match="rise from 0 to the length 70"):
        Case(problem(), (0, 50, 50, 70))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("length", [300, 512])
def test_block_lists_cover_the_mask(length: int, transposed: bool) -> None:
    layout = BandLayout.spattention(3)
    case = Case(AttentionProblem("forward", "bfloat16", 1, 3, 3, length, 64, layout))
    lists = masked_peers.block_lists(case, torch.device("cpu"), transposed)
    mask = attention_mask(layout, length)
    mask = mask.mT if transposed else mask
    blocks = -(-length // 128)
    for h, row, column in itertools.product(range(3), range(blocks), range(blocks)):
        inside = mask[h, row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
        kinds = [
            column in lists[f"{kind}_block_idx"][0, h, row, : lists[f"{kind}_block_cnt"][0, h, row]].tolist()
            for kind in ("mask", "full")
        ]
        assert not all(kinds) and any(kinds) >= bool(inside.any())
        assert not kinds[1] or bool(inside.all())


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4], CASES[5]], ids=Case.describe)
def test_interval_ends_name_the_same_mask(case: Case) -> None:
    length = case.problem.length
    ends = masked_peers.interval_ends(case, torch.device("cpu"))
    assert ends.shape == (case.problem.query_heads, 5, 2 * length)
    key = torch.arange(length)
    zero, a, b, c, d = ends[:, :, length:, None].unbind(1)
    mask = (key < zero) | ((key >= a) & (key < b)) | ((key >= c) & (key < d))
    expected = attention_mask(case.problem.layout, length, case.cu_seqlens(torch.device("cpu")))
    assert torch.equal(mask, expected.expand_as(mask))


@pytest.mark.parametrize("length", [64, 70])
def test_arithmetic_masks_are_the_layout(length: int) -> None:
    case = Case(problem(length, 4, 4))
    base, extra = masked_peers.shared_distances(case)
    head, i, j = torch.arange(4)[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    width, start = base + (head < extra), head * base + head.clamp(max=extra)
    d = i - j
    assert torch.equal(
        (d >= 0) & ((d <= width) | ((d >= start) & (d < start + width))),
        attention_mask(case.problem.layout, length),
    )
    with pytest.raises(peers.PeerUnavailable, match="not for exclusive"):
        masked_peers.shared_distances(Case(problem(70, layout=BandLayout.exclusive(4))))


@pytest.mark.parametrize("name", ["fa4_dense", "cudnn_flex", "fa4", "flex_flash", "fsa"])
def test_a_missing_package_is_the_reason(name: str) -> None:
    with pytest.raises(peers.PeerUnavailable, match="is not installed"):
        peers.PEERS[name].prepare(Case(problem()), torch.device("cpu"))


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


def test_a_stand_in_for_triton_kernels_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton_kernels", "triton_kernels.matmul_ogs", "triton_kernels.numerics"):
        monkeypatch.setitem(sys.modules, name, None)  # so that it is restored
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers.stand_in_for_triton_kernels()
    made = sys.modules["triton_kernels.matmul_ogs"]
    peers.stand_in_for_triton_kernels()
    assert sys.modules["triton_kernels.matmul_ogs"] is made and made.PrecisionConfig is object


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(AttentionProblem("forward", "bfloat16", 2, 4, 4, 1024, 64, BandLayout.spattention(4))),
        Case(AttentionProblem("forward", "bfloat16", 1, 6, 2, 1000, 128, BandLayout.spattention(6))),
        Case(AttentionProblem("forward", "bfloat16", 1, 4, 4, 640, 128, BandLayout.sliding_window(4, 200))),
        Case.packed(
            AttentionProblem("forward", "bfloat16", 1, 4, 2, 1024, 64, BandLayout.spattention(4)), 3, True
        ),
    ],
    ids=Case.describe,
)
def test_peers_on_cuda_are_right_or_say_why_not(case: Case) -> None:
    report = bench.benchmark([case], steps=("forward", "backward"), device="cuda", rounds=1)
    for entry in report["results"][0]["entries"]:
        assert entry["status"] != "wrong", (entry["peer"], entry["reason"], report["method"]["seed"])
        assert "TypeError" not in entry["reason"] and "AttributeError" not in entry["reason"], entry
        if entry["peer"] == "ours":
            assert entry["status"] == "ok", entry


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [BandLayout.spattention(2), BandLayout.causal(2)], ids=lambda x: x.name)
def test_samples_of_long_sequences_take_little_memory(layout: BandLayout) -> None:
    case = Case(AttentionProblem("forward", "bfloat16", 1, 2, 2, 131072, 128, layout))
    inputs = Inputs.random(case.problem, torch.device("cuda"), 0)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    Samples.draw(case, layout, inputs, 0, gradients=True)
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**30
