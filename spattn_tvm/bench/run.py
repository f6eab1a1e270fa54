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
dense peer's TFLOP/s are those of dense causal attention.

The file that `write_report` makes holds ``format`` (1), ``date``, ``target``, ``device``, ``versions``,
``threads``, ``method`` and ``results``: per problem its ``problem`` (``AttentionProblem.to_json``),
``shape``, ``schedule`` (what dispatch chose per direction, and why), ``matmul_tflops`` and ``entries``, one
per step and peer: ``peer``, ``title``, ``pass`` (the step), ``status`` (ok, not available, wrong),
``reason``, ``median_ms``, ``min_ms``, ``p25_ms``, ``p75_ms``, ``rounds``, ``useful_tflops``,
``matmul_share``, ``peak_memory_mib`` (CUDA), ``same_mask``, ``errors``, ``ratio_to_dense``. Unmeasured
figures are null.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spattn_tvm.bands import BandLayout
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.provenance import device_facts, versions
from spattn_tvm.target import MachineTarget, detect_cpu, detect_cuda

from .clocks import _CpuClock, _CudaClock
from .peers import (
    OURS,
    Peer,
    PeerUnavailable,
    _dtype,
    _first_line,
    find_peer,
    implementation_of,
    is_ours,
    peers_for,
)
from .report import FORMAT, Timing, _fill_ratios, describe

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
)
STEPS = ("forward", "backward", "forward_backward")


# Peers


# Inputs and the check


@dataclass
class _Inputs:
    """Normal random q, k, v and the gradient of the output, the same for every peer of a problem."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def random(cls, problem: AttentionProblem, device: torch.device, seed: int) -> _Inputs:
        import torch

        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(heads: int) -> torch.Tensor:
            shape = (problem.batch, heads, problem.length, problem.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(_dtype(problem))

        return cls(
            normal(problem.query_heads),
            normal(problem.kv_heads),
            normal(problem.kv_heads),
            normal(problem.query_heads),
        )

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (t.detach().clone().requires_grad_(True) for t in (self.q, self.k, self.v))
        return q, k, v


def _check(
    outputs: dict[str, torch.Tensor],
    inputs: _Inputs,
    layout: BandLayout,
    problem: AttentionProblem,
    seed: int,
) -> tuple[dict[str, float], str]:
    """Relative errors of o and, when present, dq, dk, dv against float64, and why they are wrong ("" if not).

    One randomly chosen key/value head of one batch entry is compared, with all query heads that read it: a
    bfloat16 score matrix of 16,384 rows then takes half a GiB instead of tens. An error is the largest
    absolute difference over the largest absolute value.
    """
    import random

    import torch

    from spattn_tvm.accuracy import judge, plain_attention
    from spattn_tvm.reference import attention_mask, reference_attention

    chooser = random.Random(seed)
    group = problem.query_heads // problem.kv_heads
    kv_head = chooser.randrange(problem.kv_heads)
    b = chooser.randrange(problem.batch)
    query_rows, key_rows = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
    of = {"o": query_rows, "dq": query_rows, "dk": key_rows, "dv": key_rows}
    part = BandLayout.custom(layout.bands(problem.length)[query_rows], problem.length)
    mask = attention_mask(part, problem.length, device=inputs.q.device)

    def exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference_attention(q, k, v, part)[0]

    def plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plain_attention(q, k, v, mask, problem.head_dim**-0.5)[0]

    def compute(attend: Attention, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        rows = {"q": query_rows, "k": key_rows, "v": key_rows}
        q, k, v = (
            getattr(inputs, name)[b : b + 1, rows[name]].to(dtype, copy=True).requires_grad_("dq" in outputs)
            for name in "qkv"
        )
        o = attend(q, k, v)
        result = {"o": o.detach()}
        if "dq" in outputs:
            gradients = torch.autograd.grad(o, (q, k, v), inputs.grad[b : b + 1, query_rows].to(dtype))
            result |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        return result

    exact, plain = compute(exactly, torch.float64), compute(plainly, _dtype(problem))
    errors, wrong = judge(
        {name: value[b : b + 1, of[name]] for name, value in outputs.items()}, exact, plain, problem.dtype
    )
    return errors, f"{wrong} (batch {b}, key/value head {kv_head})" if wrong else ""


# Clocks


# One problem


@contextmanager
def _step_of(step_name: str, attend: Attention, inputs: _Inputs) -> Iterator[Step]:
    """The step itself."""
    import torch

    if step_name == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return attend(inputs.q, inputs.k, inputs.v)

        yield forward
        return
    q, k, v = inputs.leaves()
    if step_name == "forward_backward":
        yield lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), inputs.grad)
        return
    o = attend(q, k, v)
    yield lambda: torch.autograd.grad(o, (q, k, v), inputs.grad, retain_graph=True)


def _outputs(step_name: str, attend: Attention, inputs: _Inputs) -> dict[str, torch.Tensor]:
    import torch

    if step_name == "forward":
        with torch.no_grad():
            return {"o": attend(inputs.q, inputs.k, inputs.v)}
    q, k, v = inputs.leaves()
    o = attend(q, k, v)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), inputs.grad)
    return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}


def _flops(problem: AttentionProblem, layout: BandLayout, step_name: str) -> int:
    directions = ("forward", "backward") if step_name == "forward_backward" else (step_name,)
    return sum(
        int(dataclasses.replace(problem, layout=layout, direction=direction).useful_flops)
        for direction in directions
    )


def _time_step(
    problem: AttentionProblem,
    step_name: str,
    peers: Mapping[str, Peer],
    attends: dict[str, Attention],
    inputs: _Inputs,
    clock: _CpuClock | _CudaClock,
    *,
    rounds: int,
    budget_s: float,
    seed: int,
    report: Callable[[str], None],
) -> list[Timing]:
    timings = {name: Timing(name, peers[name].title, peers[name].same_mask, step_name) for name in attends}
    steps: dict[str, tuple[Any, Step, int]] = {}
    for name, attend in attends.items():
        timing = timings[name]
        layout = peers[name].layout(problem)
        timing.useful_flops = _flops(problem, layout, step_name)
        report(f"{step_name}: checking {peers[name].title}")
        try:
            timing.errors, wrong = _check(_outputs(step_name, attend, inputs), inputs, layout, problem, seed)
            if wrong:
                timing.status, timing.reason = "wrong", wrong
                continue
            context = _step_of(step_name, attend, inputs)
            step = context.__enter__()
            steps[name] = (context, step, clock.calls(step))
            timing.peak_memory_mib = clock.peak_memory_mib(step)
        except Exception as error:  # a peer that can't run must not end the others
            timing.status, timing.reason = "not available", _first_line(error)

    begin = time.monotonic()
    for round_index in range(rounds if steps else 0):
        if round_index >= 5 and time.monotonic() - begin > budget_s:
            break
        report(f"{step_name}: round {round_index + 1} of {rounds}")
        for name, (_, step, calls) in steps.items():
            timings[name].samples_ms.append(clock.measure_ms(step, calls))
    for context, _, _ in steps.values():
        context.__exit__(None, None, None)
    return list(timings.values())


def _schedules(
    problem: AttentionProblem, q: torch.Tensor, steps: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """What dispatch chose for our own calls, and why; nothing more than a lookup once they have run."""
    from spattn_tvm.dispatch import find_kernel

    chosen: dict[str, dict[str, Any]] = {}
    directions = ["forward"] if tuple(steps) == ("forward",) else ["forward", "backward"]
    for name, direction in itertools.product(names, directions):
        key = direction if name == OURS else f"{name} {direction}"
        try:
            impl = implementation_of(name)
            kernel = find_kernel(direction, q, problem.layout.spec, impl, kv_heads=problem.kv_heads)
        except (ValueError, RuntimeError) as error:
            chosen[key] = {"status": "none", "reason": _first_line(error)}
            continue
        chosen[key] = {
            "family": kernel.family,
            "status": kernel.status,
            "reason": kernel.reason,
            "decisions": {} if kernel.spec is None else dict(kernel.spec.decisions),
        }
    return chosen


def _benchmark_problem(
    problem: AttentionProblem,
    steps: Sequence[str],
    peers: Mapping[str, Peer],
    device: torch.device,
    target: MachineTarget,
    clock: _CpuClock | _CudaClock,
    *,
    rounds: int,
    budget_s: float,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    inputs = _Inputs.random(problem, device, seed)
    attends: dict[str, Attention] = {}
    timings: list[Timing] = []
    for name, peer in peers.items():
        report(f"preparing {peer.title}")
        reason = "" if target.kind in peer.kinds else f"not made for {target.kind}"
        if not reason:
            try:
                attends[name] = peer.prepare(problem, device)
                continue
            except PeerUnavailable as error:
                reason = str(error)
            except Exception as error:  # as above: the other peers go on
                reason = _first_line(error)
        timings += [
            Timing(name, peer.title, peer.same_mask, step_name, "not available", reason)
            for step_name in steps
        ]
    for step_name in steps:
        timings += _time_step(
            problem,
            step_name,
            peers,
            attends,
            inputs,
            clock,
            rounds=rounds,
            budget_s=budget_s,
            seed=seed,
            report=report,
        )
    matmul_tflops = clock.matmul_tflops(_dtype(problem), device)
    _fill_ratios(timings, matmul_tflops)
    order = {name: position for position, name in enumerate(peers)}
    timings.sort(key=lambda timing: (steps.index(timing.step_name), order[timing.peer]))
    return {
        "problem": problem.to_json(),
        "shape": describe(problem),
        "schedule": _schedules(problem, inputs.q, steps, [name for name in attends if is_ours(name)]),
        "matmul_tflops": matmul_tflops,
        "entries": [timing.to_json() for timing in timings],
    }


def _find_device(name: str) -> torch.device:
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
    problems: Sequence[AttentionProblem],
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
    problems : sequence of AttentionProblem
        Their ``direction`` is ignored: ``steps`` says what is timed.
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
        For the inputs and the head that is checked; a fresh one when omitted. It is in the report.
    report : callable
        Called with a line of progress.

    Returns
    -------
    dict
        JSON-ready, as this module's docstring describes.

    Raises
    ------
    ValueError
        For an unknown step, peer or device, a CUDA device that isn't there, or no problem.
    """
    import random

    import torch

    steps = tuple(steps)
    if not problems:
        raise ValueError("benchmark needs at least one problem")
    for step_name in steps:
        if step_name not in STEPS:
            raise ValueError(f"unknown step {step_name!r}; known: {', '.join(STEPS)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    place = _find_device(device)
    target = detect_cpu() if place.type == "cpu" else detect_cuda(place.index)
    chosen = peers_for(target) if peers is None else {name: find_peer(name, target) for name in peers}
    clock: _CpuClock | _CudaClock = _CpuClock(idle_ms) if place.type == "cpu" else _CudaClock(place)
    seed = random.randrange(2**31) if seed is None else seed
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    current_device = torch.cuda.device(place) if place.type == "cuda" else nullcontext()
    try:
        with current_device:
            results = [
                _benchmark_problem(
                    problem,
                    steps,
                    chosen,
                    place,
                    target,
                    clock,
                    rounds=rounds,
                    budget_s=budget_s,
                    seed=seed,
                    report=lambda text, problem=problem: report(f"{describe(problem)} {text}"),  # type: ignore[misc]
                )
                for problem in problems
            ]
        return {
            "format": FORMAT,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "target": target.folder,
            "device": device_facts(place),
            "versions": versions(_VERSIONED_PACKAGES),
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
