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
per pass and peer: ``peer``, ``title``, ``pass``, ``status`` (ok, not available, wrong), ``reason``,
``median_ms``, ``min_ms``, ``p25_ms``, ``p75_ms``, ``rounds``, ``useful_tflops``, ``matmul_share``,
``peak_memory_mib`` (CUDA), ``same_mask``, ``errors``, ``ratio_to_dense``. Unmeasured figures are null.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bands import BandLayout
from .environment import device_facts, versions
from .problem import AttentionProblem
from .target import MachineTarget, detect_cpu, detect_cuda

if TYPE_CHECKING:
    import torch
    from rich.table import Table

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
FORMAT = 1
PASSES = ("forward", "backward", "forward_backward")


class PeerUnavailable(RuntimeError):
    """A peer that can't run on this problem or machine; its message says why."""


@dataclass(frozen=True)
class Peer:
    """One implementation to time.

    Parameters
    ----------
    name : str
        Short name, as given to ``--peers``.
    title : str
        What the table prints.
    kinds : tuple of {"cpu", "cuda"}
        Devices it exists for.
    same_mask : bool
        True when it computes the problem's own layout, False for dense causal attention.
    prepare : (problem, device) -> (q, k, v) -> o
        Builds masks, compiles and so on; raises `PeerUnavailable` (or anything else) when it can't.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    same_mask: bool
    prepare: Callable[[AttentionProblem, torch.device], Attention]

    def layout(self, problem: AttentionProblem) -> BandLayout:
        """The layout that this peer computes on ``problem``."""
        return problem.layout if self.same_mask else BandLayout.causal(problem.query_heads)


@dataclass
class Timing:
    """Result of one peer on one pass; times in milliseconds, memory in MiB, None where not measured."""

    peer: str
    title: str
    same_mask: bool
    pass_name: str
    status: str = "ok"
    reason: str = ""
    samples_ms: list[float] = field(default_factory=list)
    useful_flops: int = 0
    matmul_tflops: float | None = None
    peak_memory_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    ratio_to_dense: float | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def useful_tflops(self) -> float | None:
        return self.useful_flops / self.median_ms * 1e-9 if self.median_ms else None

    def to_json(self) -> dict[str, Any]:
        quartiles = statistics.quantiles(self.samples_ms, n=4) if len(self.samples_ms) > 1 else None
        tflops = self.useful_tflops
        share = tflops / self.matmul_tflops if tflops and self.matmul_tflops else None
        return {
            "peer": self.peer,
            "title": self.title,
            "pass": self.pass_name,
            "status": self.status,
            "reason": self.reason,
            "median_ms": self.median_ms,
            "min_ms": min(self.samples_ms) if self.samples_ms else None,
            "p25_ms": quartiles[0] if quartiles else None,
            "p75_ms": quartiles[2] if quartiles else None,
            "rounds": len(self.samples_ms),
            "useful_tflops": tflops,
            "matmul_share": share,
            "peak_memory_mib": self.peak_memory_mib,
            "same_mask": self.same_mask,
            "errors": self.errors,
            "ratio_to_dense": self.ratio_to_dense,
        }


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _dtype(problem: AttentionProblem) -> torch.dtype:
    import torch

    return getattr(torch, problem.dtype)


# Peers


# What each of our own peers asks `banded_attention` for.
OURS = {"ours": "auto", "mma": "mma"}


def _prepare_ours(impl: str) -> Callable[[AttentionProblem, torch.device], Attention]:
    def prepare(problem: AttentionProblem, device: torch.device) -> Attention:
        from .attention import banded_attention

        return lambda q, k, v: banded_attention(q, k, v, problem.layout, impl=impl)

    return prepare


def _prepare_sdpa(backend_name: str | None) -> Callable[[AttentionProblem, torch.device], Attention]:
    def prepare(problem: AttentionProblem, device: torch.device) -> Attention:
        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel

        gqa = problem.query_heads != problem.kv_heads
        if backend_name is None:
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        backend = getattr(SDPBackend, backend_name)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        return attend

    return prepare


def _prepare_flex(problem: AttentionProblem, device: torch.device) -> Attention:
    import torch
    import torch._functorch.config as functorch_config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from .reference import flex_mask_mod

    # Timing the backward pass alone keeps the graph, which donated buffers forbid.
    functorch_config.donated_buffer = False
    length = problem.length
    mask_mod = flex_mask_mod(problem.layout, length, device=device)
    try:
        block_mask = create_block_mask(
            mask_mod, None, problem.query_heads, length, length, device=device.type
        )
    except RuntimeError as error:
        raise PeerUnavailable(f"create_block_mask: {_first_line(error)}") from error
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = problem.query_heads != problem.kv_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)


def window_sizes(problem: AttentionProblem) -> list[tuple[int, int, int, int]]:
    """A layout as flash-sparse-attn 2 takes it: sink, far width, gap and near width of each key/value head.

    A head sees the distances ``[0, near)`` and ``[near + gap, near + gap + far)``.

    Raises
    ------
    PeerUnavailable
        For bands that do not start at distance 0, or differ between query heads of one key/value head.
    """
    group = problem.query_heads // problem.kv_heads
    bands = problem.layout.bands(problem.length)
    rows = []
    for first in range(0, problem.query_heads, group):
        head = bands[first]
        if any(other != head for other in bands[first : first + group]):
            raise PeerUnavailable("it has one pair of bands per key/value head, not per query head")
        if not head or head[0][0] != 0:
            raise PeerUnavailable("its near band starts at distance 0")
        near = head[0][1] + 1
        far_lo, far_hi = head[1] if len(head) > 1 else (near, near - 1)
        rows.append((0, far_hi - far_lo + 1, far_lo - near, near))
    return rows


def _prepare_flash_sparse(backend: str) -> Callable[[AttentionProblem, torch.device], Attention]:
    def prepare(problem: AttentionProblem, device: torch.device) -> Attention:
        import torch

        if importlib.util.find_spec("flash_sparse_attn") is None:
            raise PeerUnavailable("the package flash-sparse-attn is not installed")
        if backend == "cute":
            from flash_sparse_attn.ops.cute import flash_attn_func as function
        else:
            from flash_sparse_attn import flash_dense_attn_func as function
        sizes = torch.tensor(window_sizes(problem), dtype=torch.int32, device=device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # It takes (B, N, H, D); a transposed view, as its own users pass, costs nothing here.
            o = function(*(t.transpose(1, 2) for t in (q, k, v)), window_sizes=sizes, is_local=True)
            return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

        return attend

    return prepare


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("ours", "spattn-tvm", ("cpu", "cuda"), True, _prepare_ours(OURS["ours"])),
        Peer("mma", "spattn-tvm, portable kernels", ("cuda",), True, _prepare_ours(OURS["mma"])),
        Peer("sdpa", "PyTorch SDPA, dense causal", ("cpu",), False, _prepare_sdpa(None)),
        Peer("cudnn", "cuDNN SDPA, dense causal", ("cuda",), False, _prepare_sdpa("CUDNN_ATTENTION")),
        Peer("flash", "Flash SDPA, dense causal", ("cuda",), False, _prepare_sdpa("FLASH_ATTENTION")),
        Peer("flex", "FlexAttention, same mask", ("cpu", "cuda"), True, _prepare_flex),
        Peer("fsa", "flash-sparse-attn CuTe, same mask", ("cuda",), True, _prepare_flash_sparse("cute")),
        Peer(
            "fsa_triton",
            "flash-sparse-attn Triton, same mask",
            ("cuda",),
            True,
            _prepare_flash_sparse("triton"),
        ),
    )
}


def peers_for(kind: str) -> tuple[str, ...]:
    """Names of the peers that exist for a device kind (``"cpu"`` or ``"cuda"``), ours first."""
    return tuple(name for name, peer in PEERS.items() if kind in peer.kinds)


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

    from .reference import attention_mask, reference_attention
    from .verify import judge, plain_attention

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


class _CpuClock:
    """Wall time of a step after an idle gap, with as many calls as make a sample last some milliseconds."""

    matmul_size = 2048

    def __init__(self, idle_ms: float, sample_ms: float = 10.0) -> None:
        self.idle_ms, self.sample_ms = idle_ms, sample_ms

    def calls(self, step: Step) -> int:
        step()
        begin = time.perf_counter()
        step()
        once_ms = (time.perf_counter() - begin) * 1e3
        return max(1, min(1000, round(self.sample_ms / max(once_ms, 1e-3))))

    def measure_ms(self, step: Step, calls: int) -> float:
        time.sleep(self.idle_ms * 1e-3)
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - begin) * 1e3 / calls

    def peak_memory_mib(self, step: Step) -> float | None:
        return None

    def matmul_tflops(self, dtype: torch.dtype, device: torch.device) -> float:
        size = self.matmul_size if dtype.itemsize == 4 else self.matmul_size // 2
        return _matmul_rate(size, dtype, device, lambda step: self.measure_ms(step, 1), rounds=5)


class _CudaClock:
    """Device time of one call with a cold L2, between two events."""

    # About 1 ms on a 2 GHz chip: longer than an autograd call spends on the host.
    HEAD_START_CYCLES = 2_000_000

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.scratch = torch.empty(max(2 * l2_bytes, 64 << 20) // 4, dtype=torch.int32, device=device)

    def calls(self, step: Step) -> int:
        for _ in range(3):
            step()
        return 1

    def measure_ms(self, step: Step, calls: int) -> float:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.fill_(1)
        torch.cuda._sleep(self.HEAD_START_CYCLES)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak_memory_mib(self, step: Step) -> float | None:
        import torch

        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = step()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del result
        return peak / 2**20

    def matmul_tflops(self, dtype: torch.dtype, device: torch.device) -> float:
        return _matmul_rate(8192, dtype, device, lambda step: self.measure_ms(step, 1), rounds=10)


def _matmul_rate(
    size: int, dtype: torch.dtype, device: torch.device, measure: Callable[[Step], float], rounds: int
) -> float:
    import torch

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    milliseconds = statistics.median(measure(lambda: a @ b) for _ in range(rounds))
    return 2 * size**3 / milliseconds * 1e-9


# One problem


@contextmanager
def _step_of(pass_name: str, attend: Attention, inputs: _Inputs) -> Iterator[Step]:
    """The call that a pass times."""
    import torch

    if pass_name == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return attend(inputs.q, inputs.k, inputs.v)

        yield forward
        return
    q, k, v = inputs.leaves()
    if pass_name == "forward_backward":
        yield lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), inputs.grad)
        return
    o = attend(q, k, v)
    yield lambda: torch.autograd.grad(o, (q, k, v), inputs.grad, retain_graph=True)


def _outputs(pass_name: str, attend: Attention, inputs: _Inputs) -> dict[str, torch.Tensor]:
    import torch

    if pass_name == "forward":
        with torch.no_grad():
            return {"o": attend(inputs.q, inputs.k, inputs.v)}
    q, k, v = inputs.leaves()
    o = attend(q, k, v)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), inputs.grad)
    return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}


def _flops(problem: AttentionProblem, layout: BandLayout, pass_name: str) -> int:
    directions = ("forward", "backward") if pass_name == "forward_backward" else (pass_name,)
    return sum(
        int(dataclasses.replace(problem, layout=layout, direction=direction).useful_flops)
        for direction in directions
    )


def _time_pass(
    problem: AttentionProblem,
    pass_name: str,
    attends: dict[str, Attention],
    inputs: _Inputs,
    clock: _CpuClock | _CudaClock,
    *,
    rounds: int,
    budget_s: float,
    seed: int,
    report: Callable[[str], None],
) -> list[Timing]:
    timings = {name: Timing(name, PEERS[name].title, PEERS[name].same_mask, pass_name) for name in attends}
    steps: dict[str, tuple[Any, Step, int]] = {}
    for name, attend in attends.items():
        timing = timings[name]
        layout = PEERS[name].layout(problem)
        timing.useful_flops = _flops(problem, layout, pass_name)
        report(f"{pass_name}: checking {PEERS[name].title}")
        try:
            timing.errors, wrong = _check(_outputs(pass_name, attend, inputs), inputs, layout, problem, seed)
            if wrong:
                timing.status, timing.reason = "wrong", wrong
                continue
            context = _step_of(pass_name, attend, inputs)
            step = context.__enter__()
            steps[name] = (context, step, clock.calls(step))
            timing.peak_memory_mib = clock.peak_memory_mib(step)
        except Exception as error:  # a peer that can't run must not end the others
            timing.status, timing.reason = "not available", _first_line(error)

    begin = time.monotonic()
    for round_index in range(rounds if steps else 0):
        if round_index >= 5 and time.monotonic() - begin > budget_s:
            break
        report(f"{pass_name}: round {round_index + 1} of {rounds}")
        for name, (_, step, calls) in steps.items():
            timings[name].samples_ms.append(clock.measure_ms(step, calls))
    for context, _, _ in steps.values():
        context.__exit__(None, None, None)
    return list(timings.values())


def _fill_ratios(timings: Sequence[Timing], matmul_tflops: float) -> None:
    dense: dict[str, float] = {}
    for timing in timings:
        if not timing.same_mask and timing.median_ms is not None:
            dense[timing.pass_name] = min(timing.median_ms, dense.get(timing.pass_name, float("inf")))
    for timing in timings:
        timing.matmul_tflops = matmul_tflops
        if timing.median_ms is not None and timing.pass_name in dense:
            timing.ratio_to_dense = timing.median_ms / dense[timing.pass_name]


def _schedules(
    problem: AttentionProblem, q: torch.Tensor, passes: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """What dispatch chose for our own calls, and why; nothing more than a lookup once they have run."""
    from .dispatch import find_kernel

    chosen: dict[str, dict[str, Any]] = {}
    directions = ["forward"] if tuple(passes) == ("forward",) else ["forward", "backward"]
    for name, direction in itertools.product(names, directions):
        key = direction if name == "ours" else f"{name} {direction}"
        try:
            kernel = find_kernel(direction, q, problem.layout.spec, OURS[name], kv_heads=problem.kv_heads)
        except (ValueError, RuntimeError) as error:
            chosen[key] = {"status": "none", "reason": _first_line(error)}
            continue
        chosen[key] = {
            "family": kernel.family,
            "status": kernel.status,
            "reason": kernel.reason,
            "decisions": dict(kernel.decisions),
        }
    return chosen


def _benchmark_problem(
    problem: AttentionProblem,
    passes: Sequence[str],
    names: Sequence[str],
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
    for name in names:
        peer = PEERS[name]
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
            Timing(name, peer.title, peer.same_mask, pass_name, "not available", reason)
            for pass_name in passes
        ]
    for pass_name in passes:
        timings += _time_pass(
            problem,
            pass_name,
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
    order = {name: position for position, name in enumerate(names)}
    timings.sort(key=lambda timing: (passes.index(timing.pass_name), order[timing.peer]))
    return {
        "problem": problem.to_json(),
        "shape": describe(problem),
        "schedule": _schedules(problem, inputs.q, passes, [name for name in OURS if name in attends]),
        "matmul_tflops": matmul_tflops,
        "entries": [timing.to_json() for timing in timings],
    }


def describe(problem: AttentionProblem) -> str:
    """Such as ``(1,16,4096,64) float32 spattention``; ``16/4`` heads with grouped queries."""
    heads = str(problem.query_heads)
    if problem.kv_heads != problem.query_heads:
        heads += f"/{problem.kv_heads}"
    return (
        f"({problem.batch},{heads},{problem.length},{problem.head_dim}) {problem.dtype} {problem.layout.name}"
    )


def benchmark(
    problems: Sequence[AttentionProblem],
    *,
    passes: Sequence[str] = ("forward", "forward_backward"),
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
        Their ``direction`` is ignored: ``passes`` says what is timed.
    passes : sequence of {"forward", "backward", "forward_backward"}
        ``backward`` alone keeps the forward's graph; ``forward_backward`` is one autograd step.
    peers : sequence of str, optional
        Names of `PEERS`; all that exist for the device when omitted.
    device : str
        A PyTorch device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    rounds : int
        Timings per peer and pass, fewer (but 5) once ``budget_s`` seconds have gone into a pass.
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
        For an unknown pass or peer, or no problem.
    """
    import random

    import torch

    passes, names = tuple(passes), tuple(peers) if peers is not None else None
    if not problems:
        raise ValueError("benchmark needs at least one problem")
    for pass_name in passes:
        if pass_name not in PASSES:
            raise ValueError(f"unknown pass {pass_name!r}; known: {', '.join(PASSES)}")
    for name in names or ():
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    target = detect_cpu() if place.type == "cpu" else detect_cuda(place.index)
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
                    passes,
                    names if names is not None else peers_for(target.kind),
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


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write a report to ``folder/<target>/benchmarks/<date>.json``; `folder` is ``autotune_logs``, say."""
    stamp = datetime.datetime.fromisoformat(report["date"]).strftime("%Y-%m-%dT%H%M%SZ")
    path = folder / report["target"] / "benchmarks" / f"{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def tables(report: dict[str, Any]) -> list[Table]:
    """One rich table per problem of a report."""
    from rich.table import Table

    cuda = report["target"].startswith("cuda")
    unit, factor = ("TFLOP/s", 1.0) if cuda else ("GFLOP/s", 1e3)
    result_tables = []
    for result in report["results"]:
        table = Table(
            title=f"{result['shape']}, {report['threads']} threads" if not cuda else result["shape"]
        )
        table.add_column("pass")
        table.add_column("peer")
        for title in ("median ms", "p25-p75", f"useful {unit}", "of matmul", "vs dense", "max error"):
            table.add_column(title, justify="right")
        if cuda:
            table.add_column("peak MiB", justify="right")
        previous = ""
        notes: dict[str, None] = {}
        for entry in result["entries"]:
            shown = entry["pass"].replace("_", " + ") if entry["pass"] != previous else ""
            if shown and previous:
                table.add_section()
            previous = entry["pass"]
            if entry["median_ms"] is None:
                table.add_row(shown, entry["title"], entry["status"])
                notes.setdefault(f"{entry['title']}: {entry['reason']}")
                continue
            spread = "" if entry["p25_ms"] is None else f"{entry['p25_ms']:.3g}-{entry['p75_ms']:.3g}"
            cells = [
                shown,
                entry["title"],
                f"{entry['median_ms']:.4g}",
                spread,
                f"{entry['useful_tflops'] * factor:.4g}",
                f"{entry['matmul_share']:.0%}",
                "" if entry["ratio_to_dense"] is None else f"{entry['ratio_to_dense']:.3f}",
                f"{max(entry['errors'].values()):.1e}",
            ]
            if cuda:
                cells.append(f"{entry['peak_memory_mib']:.0f}")
            table.add_row(*cells)
        table.caption = "\n".join(notes)
        table.caption_justify = "left"
        result_tables.append(table)
    return result_tables
