"""Ours against its peers: correctness first, then interleaved medians in one process, written as JSON.

How a time is taken, and why:

- Every peer gets the same normal random inputs and is checked before it is timed. A wrong peer gets no time.
- Peers take turns within a round, so that a slow minute of the machine hits all of them; a figure is the
  median over rounds.
- On the CPU each timing follows an idle gap. PyTorch's and TVM's thread pools spin for a while after their
  last piece of work, and without the gap whoever comes second is timed with half of the cores taken (SDPA:
  twice its time on 2 cores).
- On CUDA the L2 cache is overwritten before each timing and a short device-side sleep lets the host run
  ahead, so that the two events around the call see device time only.

Useful operations count the pairs of the peer's own mask (``4*D`` a pair forward, ``10*D`` backward), so a
dense peer's TFLOP/s are those of dense causal attention. Correctness is told by sampled rows and keys
(:mod:`.samples`); a case that asks for deterministic results has every peer run twice and compares all bits.

The file that `write_report` makes holds ``format`` (2), ``date``, ``target``, ``device``, ``versions``,
``threads``, ``method`` and ``results``: per case its ``problem`` (``AttentionProblem.to_json``),
``boundaries`` of documents (empty: none packed), ``deterministic``, ``shape``, ``schedule`` (what dispatch
chose per direction, and why), ``matmul_tflops``, ``plans`` and ``entries``. A plan is, for each peer that
ran: ``what`` it makes for one length and mask ("" for nothing; another length needs another), ``seconds`` and
``memory_mib`` (CUDA) that takes, and ``first_call_s``, which compiles. An entry, one per step and peer:
``peer``, ``title``, ``direction`` (the step), ``status`` (ok, not available, wrong), ``reason``,
``median_ms``, ``min_ms``, ``p25_ms``, ``p75_ms``, ``rounds``, ``useful_tflops``, ``matmul_share``,
``peak_memory_mib`` (CUDA), ``same_mask``, ``errors``, ``ratio_to_dense``. Unmeasured figures are null.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spattn_tvm.bands import BandLayout
from spattn_tvm.target import MachineTarget, detect_cpu, detect_cuda

from .case import Case
from .clocks import CpuClock, CudaClock
from .inputs import Inputs
from .masked_peers import PeerUnavailable, first_line
from .peers import (
    OURS,
    Peer,
    find_peer,
    implementation_of,
    is_ours,
    peers_for,
)
from .report import FORMAT, Timing, fill_ratios, report_head
from .samples import Samples

if TYPE_CHECKING:
    import torch

    Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    Step = Callable[[], Any]

_VERSIONED_PACKAGES = (
    "spattn-tvm",
    "torch",
    "apache-tvm",
    "apache-tvm-ffi",
    "triton",
    "flash-sparse-attn",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
)
STEPS = ("forward", "backward", "forward_backward")


@contextmanager
def _step_of(step_name: str, attend: Attention, inputs: Inputs) -> Iterator[Step]:
    """The step itself."""
    import torch

    if step_name == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return attend(inputs.q, inputs.k, inputs.v)

        yield forward
        return
    q, k, v = inputs.leaves
    if step_name == "forward_backward":
        yield lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), inputs.grad)
        return
    o = attend(q, k, v)
    yield lambda: torch.autograd.grad(o, (q, k, v), inputs.grad, retain_graph=True)


def _outputs(step_name: str, attend: Attention, inputs: Inputs) -> dict[str, torch.Tensor]:
    import torch

    if step_name == "forward":
        with torch.no_grad():
            return {"o": attend(inputs.q, inputs.k, inputs.v)}
    q, k, v = inputs.leaves
    o = attend(q, k, v)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), inputs.grad)
    return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}


def _flops(case: Case, layout: BandLayout, step_name: str) -> int:
    directions = ("forward", "backward") if step_name == "forward_backward" else (step_name,)
    return sum(case.flops(layout, direction) for direction in directions)


@dataclass
class _Bench:
    """What is the same for every case of a run."""

    peers: Mapping[str, Peer]
    steps: tuple[str, ...]
    device: torch.device
    target: MachineTarget
    clock: CpuClock | CudaClock
    rounds: int
    budget_s: float
    seed: int


def _obstacle(outputs: dict[str, torch.Tensor], samples: Samples, case: Case, again: Step) -> tuple[Any, str]:
    """Errors of a peer's outputs, and why it is not timed ("" if it is)."""
    import torch

    errors, wrong = samples.check(outputs, case.problem.dtype)
    if not wrong and case.deterministic:
        repeated = again()
        differing = [name for name in outputs if not torch.equal(outputs[name], repeated[name])]
        if differing:
            wrong = f"{' and '.join(differing)} differ between two runs"
    return errors, wrong


def _time_step(
    bench: _Bench,
    case: Case,
    step_name: str,
    attends: dict[str, Attention],
    inputs: Inputs,
    samples: Mapping[bool, Samples],
    plans: dict[str, dict[str, Any]],
    report: Callable[[str], None],
) -> list[Timing]:
    peers, clock = bench.peers, bench.clock
    timings = {name: Timing(name, peers[name].title, peers[name].same_mask, step_name) for name in attends}
    steps: dict[str, tuple[Any, Step, int]] = {}
    for name, attend in attends.items():
        timing, peer = timings[name], peers[name]
        timing.useful_flops = _flops(case, peer.layout(case.problem), step_name)
        report(f"{step_name}: checking {peer.title}")

        def outputs(attend: Attention = attend) -> dict[str, torch.Tensor]:
            return _outputs(step_name, attend, inputs)

        try:
            begin = time.perf_counter()
            found = outputs()
            clock.wait()
            plans[name].setdefault("first_call_s", time.perf_counter() - begin)
            timing.errors, wrong = _obstacle(found, samples[peer.same_mask], case, outputs)
            del found
            if wrong:
                timing.status, timing.reason = "wrong", wrong
                continue
            context = _step_of(step_name, attend, inputs)
            step = context.__enter__()
            steps[name] = (context, step, clock.calls(step))
            timing.peak_memory_mib = clock.peak_memory_mib(step)
        except Exception as error:  # a peer that can't run must not end the others
            timing.status, timing.reason = "not available", first_line(error)

    begin = time.monotonic()
    for round_index in range(bench.rounds if steps else 0):
        if round_index >= 5 and time.monotonic() - begin > bench.budget_s:
            break
        report(f"{step_name}: round {round_index + 1} of {bench.rounds}")
        for name, (_, step, calls) in steps.items():
            timings[name].samples_ms.append(clock.measure_ms(step, calls))
    for context, _, _ in steps.values():
        context.__exit__(None, None, None)
    return list(timings.values())


def _schedules(case: Case, q: torch.Tensor, steps: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """What dispatch chose for our own calls, and why; nothing more than a lookup once they have run."""
    from spattn_tvm.dispatch import find_kernel

    chosen: dict[str, dict[str, Any]] = {}
    problem = case.problem
    directions = ["forward"] if tuple(steps) == ("forward",) else ["forward", "backward"]
    for name, direction in itertools.product(names, directions):
        key = direction if name == OURS else f"{name} {direction}"
        try:
            kernel = find_kernel(
                direction,
                q,
                problem.layout.spec,
                implementation_of(name),
                case.deterministic,
                kv_heads=problem.kv_heads,
            )
        except (ValueError, RuntimeError) as error:
            chosen[key] = {"status": "none", "reason": first_line(error)}
            continue
        chosen[key] = {
            "family": kernel.family,
            "status": kernel.status,
            "reason": kernel.reason,
            "decisions": {} if kernel.spec is None else dict(kernel.spec.decisions),
        }
    return chosen


def _prepare(
    bench: _Bench, case: Case, report: Callable[[str], None]
) -> tuple[dict[str, Attention], dict[str, dict[str, Any]], dict[str, str]]:
    """Who can run, what each made for it, and why others can't."""
    attends: dict[str, Attention] = {}
    plans: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for name, peer in bench.peers.items():
        report(f"preparing {peer.title}")
        if bench.target.kind not in peer.kinds:
            reasons[name] = f"not made for {bench.target.kind}"
            continue
        try:
            before, begin = bench.clock.allocated_mib(), time.perf_counter()
            attends[name] = peer.prepare(case, bench.device)
            bench.clock.wait()
        except PeerUnavailable as error:
            reasons[name] = str(error)
        except Exception as error:  # as above: the other peers go on
            reasons[name] = first_line(error)
        else:
            after = bench.clock.allocated_mib()
            plans[name] = {
                "what": peer.plan,
                "seconds": time.perf_counter() - begin,
                "memory_mib": None if before is None or after is None else after - before,
            }
    return attends, plans, reasons


def _benchmark_case(bench: _Bench, case: Case, report: Callable[[str], None]) -> dict[str, Any]:
    problem, peers = case.problem, bench.peers
    inputs = Inputs.random(problem, bench.device, bench.seed)
    attends, plans, reasons = _prepare(bench, case, report)
    timings = [
        Timing(name, peers[name].title, peers[name].same_mask, step_name, "not available", reason)
        for name, reason in reasons.items()
        for step_name in bench.steps
    ]
    samples: dict[bool, Samples] = {}
    gradients = bench.steps != ("forward",)
    for same_mask in sorted({peers[name].same_mask for name in attends}):
        report("computing samples in float64")
        layout = problem.layout if same_mask else BandLayout.causal(problem.query_heads)
        samples[same_mask] = Samples.draw(case, layout, inputs, bench.seed, gradients)
    for step_name in bench.steps:
        timings += _time_step(bench, case, step_name, attends, inputs, samples, plans, report)
    matmul_tflops = bench.clock.matmul_tflops(inputs.q.dtype, bench.device)
    fill_ratios(timings, matmul_tflops)
    order = {name: position for position, name in enumerate(peers)}
    timings.sort(key=lambda timing: (bench.steps.index(timing.step_name), order[timing.peer]))
    return {
        "problem": problem.to_json(),
        "boundaries": list(case.boundaries),
        "deterministic": case.deterministic,
        "shape": case.describe(),
        "schedule": _schedules(case, inputs.q, bench.steps, [name for name in attends if is_ours(name)]),
        "matmul_tflops": matmul_tflops,
        "plans": plans,
        "entries": [timing.to_json() for timing in timings],
    }


def find_device(name: str) -> torch.device:
    """The device of a name.

    Raises
    ------
    ValueError
        When it is neither the CPU nor a CUDA device that is there.
    """
    import torch

    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise ValueError(f"device must be cpu, cuda or a CUDA device such as cuda:1, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    if match[1] is not None:
        return torch.device("cuda", int(match[1]))
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def benchmark(
    cases: Sequence[Case],
    *,
    steps: Sequence[str] = ("forward", "forward_backward"),
    peers: Sequence[str] | None = None,
    device: str = "cpu",
    rounds: int = 15,
    budget_s: float = 60.0,
    idle_ms: float = 80.0,
    threads: int | None = None,
    seed: int | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time ours and its peers on the same inputs, interleaved, after checking each.

    Parameters
    ----------
    cases : sequence of Case
        One after the other; the ``direction`` of their problems is ignored: ``steps`` says what is timed.
    steps : sequence of {"forward", "backward", "forward_backward"}
        ``backward`` alone keeps the forward's graph; ``forward_backward`` is one autograd step.
    peers : sequence of str, optional
        Names of peers (see :mod:`.peers`); all that exist for the device when omitted.
    device : str
        A PyTorch device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    rounds : int
        Timings per peer and step, fewer (but 5) once ``budget_s`` seconds have gone into a step.
    idle_ms : float
        Idle milliseconds before each timing on the CPU.
    threads : int, optional
        CPU threads of PyTorch and of our kernels; PyTorch's setting when omitted.
    seed : int, optional
        For the inputs and the places that are checked; a fresh one when omitted. It is in the report.
    report : callable
        Called with a line of progress.

    Returns
    -------
    dict
        JSON-ready, as this module's docstring describes.

    Raises
    ------
    ValueError
        For an unknown step, peer or device, a CUDA device that isn't there, or no case.
    """
    import random

    import torch

    steps = tuple(steps)
    if not cases:
        raise ValueError("benchmark needs at least one case")
    for step_name in steps:
        if step_name not in STEPS:
            raise ValueError(f"unknown step {step_name!r}; known: {', '.join(STEPS)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    place = find_device(device)
    target = detect_cpu() if place.type == "cpu" else detect_cuda(place.index)
    chosen = peers_for(target) if peers is None else {name: find_peer(name, target) for name in peers}
    clock: CpuClock | CudaClock = CpuClock(idle_ms) if place.type == "cpu" else CudaClock(place)
    seed = random.randrange(2**31) if seed is None else seed
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    current_device = torch.cuda.device(place) if place.type == "cuda" else nullcontext()
    try:
        with current_device:
            bench = _Bench(chosen, steps, place, target, clock, rounds, budget_s, seed)
            results = []
            for case in cases:

                def report_case(text: str, case: Case = case) -> None:
                    report(f"{case.describe()} {text}")

                results.append(_benchmark_case(bench, case, report_case))
                clock.forget()
        return {
            **report_head(FORMAT, target, place, _VERSIONED_PACKAGES),
            "threads": torch.get_num_threads(),
            "method": {
                "rounds": rounds,
                "idle_ms": idle_ms if place.type == "cpu" else None,
                "l2": "cold" if place.type == "cuda" else None,
                "statistic": "median",
                "seed": seed,
            },
            "results": results,
        }
    finally:
        torch.set_num_threads(threads_before)
