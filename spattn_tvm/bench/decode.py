"""Time steps of decoding: ours and its peers on the same queries and cache, interleaved, after checking each.

A step is bound by memory, so that a peer is measured by the bytes that the layout needs of a step (the union
of a group's bands once, queries and results), also one that reads more, and by the rate at which the device
copies memory. The cache is contiguous and full.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import detect_cpu, detect_cuda

from .clocks import CpuClock, CudaClock
from .peers import stand_in_for_triton_kernels, window_sizes
from .report import report_head

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    Step = Callable[[], torch.Tensor]

# More than any cache: what is copied comes from memory.
_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
_VERSIONED_PACKAGES = ("spattn-tvm", "torch", "apache-tvm", "apache-tvm-ffi", "flash-sparse-attn")


@dataclass(frozen=True)
class _Inputs:
    problem: AttentionProblem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def random(cls, problem: AttentionProblem, device: torch.device, seed: int) -> _Inputs:
        import torch

        generator = torch.Generator(device).manual_seed(seed)

        def normal(heads: int, rows: int) -> torch.Tensor:
            shape = (problem.batch, heads, rows, problem.head_dim)
            dtype = getattr(torch, problem.dtype)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        return cls(
            problem,
            normal(problem.query_heads, problem.length),
            normal(problem.kv_heads, problem.keys),
            normal(problem.kv_heads, problem.keys),
            torch.full((problem.batch,), problem.keys, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class StepPeer:
    """One implementation of a step: for which devices, whether it sees the layout's keys alone, how it is
    prepared (``prepare`` raises where it can't run), and in how many calls of its function.
    """

    title: str
    kinds: tuple[str, ...]
    same_mask: bool
    prepare: Callable[[_Inputs], Step]
    calls: Callable[[_Inputs], int] = lambda inputs: 1


def _ours(inputs: _Inputs) -> Step:
    from spattn_tvm.ops.decode import banded_attention_decode

    layout = inputs.problem.layout
    return lambda: banded_attention_decode(inputs.q, inputs.k, inputs.v, layout, cache_lengths=inputs.lengths)


def _sdpa(backend: str | None) -> Callable[[_Inputs], Step]:
    def prepare(inputs: _Inputs) -> Step:
        from contextlib import nullcontext

        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.bias import causal_lower_right

        problem = inputs.problem
        mask = None if problem.length == 1 else causal_lower_right(problem.length, problem.keys)
        gqa = problem.query_heads != problem.kv_heads

        def step() -> torch.Tensor:
            with nullcontext() if backend is None else sdpa_kernel([getattr(SDPBackend, backend)]):
                return F.scaled_dot_product_attention(
                    inputs.q, inputs.k, inputs.v, attn_mask=mask, enable_gqa=gqa
                )

        return step

    return prepare


def _flash_attn_4(inputs: _Inputs) -> Step:
    if importlib.util.find_spec("flash_attn") is None:
        raise RuntimeError("the package flash-attn-4 is not installed")
    from flash_attn.cute import flash_attn_func

    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))

    def step() -> torch.Tensor:
        o = flash_attn_func(q, k, v, causal=True)
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    return step


# flash-sparse-attn's kernels multiply the index of a row of the batch, or of a head, by a stride in 32 bits.
_REACH = 2**31 - 1


def _flash_sparse_calls(inputs: _Inputs) -> int:
    """As many as it takes for each to reach its part of the batch."""
    rows = 1 + _REACH // inputs.k.stride(0)
    return math.ceil(inputs.problem.batch / rows)


def _flash_sparse(inputs: _Inputs) -> Step:
    import torch

    if importlib.util.find_spec("flash_sparse_attn") is None:
        raise RuntimeError("the package flash-sparse-attn is not installed")
    if inputs.problem.length != 1:
        raise RuntimeError("it decodes one query at a time")
    if (inputs.problem.kv_heads - 1) * inputs.k.stride(1) > _REACH:
        raise RuntimeError(f"offsets of 32 bits do not reach the last of {inputs.problem.kv_heads} heads")
    sizes = torch.tensor(window_sizes(inputs.problem), dtype=torch.int32, device=inputs.q.device)
    stand_in_for_triton_kernels()
    from flash_sparse_attn import flash_dense_attn_with_kvcache_func

    q, k, v = inputs.q[:, :, 0], inputs.k.transpose(1, 2), inputs.v.transpose(1, 2)
    calls = _flash_sparse_calls(inputs)
    parts = list(zip(*(tensor.chunk(calls) for tensor in (q, k, v)), strict=True))

    def step() -> torch.Tensor:
        found = [
            flash_dense_attn_with_kvcache_func(*part, window_sizes=sizes, is_local=True) for part in parts
        ]
        return (found[0] if calls == 1 else torch.cat(found))[:, :, None]

    return step


STEP_PEERS: Mapping[str, StepPeer] = {
    "ours": StepPeer("spattn-tvm", ("cpu", "cuda"), True, _ours),
    "sdpa": StepPeer("PyTorch SDPA, dense", ("cpu", "cuda"), False, _sdpa(None)),
    "cudnn": StepPeer("cuDNN SDPA, dense", ("cuda",), False, _sdpa("CUDNN_ATTENTION")),
    "flash": StepPeer("Flash SDPA, dense", ("cuda",), False, _sdpa("FLASH_ATTENTION")),
    "fa4": StepPeer("flash-attn-4, dense", ("cuda",), False, _flash_attn_4),
    "fsa": StepPeer("flash-sparse-attn, same mask", ("cuda",), True, _flash_sparse, _flash_sparse_calls),
}


def _error(inputs: _Inputs, peer: StepPeer, o: torch.Tensor) -> float:
    """The largest difference from float64 over the largest value, of the first key/value head of the batch's
    first row and of the last head of its last row, which lies farthest in memory.
    """
    from spattn_tvm.bands import BandLayout
    from spattn_tvm.reference import reference_decode

    problem = inputs.problem
    group = problem.query_heads // problem.kv_heads
    errors = []
    for row, head in {(0, 0), (problem.batch - 1, problem.kv_heads - 1)}:
        rows, heads = slice(row, row + 1), slice(head * group, (head + 1) * group)
        layout = problem.layout.heads(heads.start, heads.stop) if peer.same_mask else BandLayout.causal(group)
        exact, _ = reference_decode(
            inputs.q[rows, heads].double(),
            inputs.k[rows, head : head + 1].double(),
            inputs.v[rows, head : head + 1].double(),
            layout,
            cache_lengths=inputs.lengths[rows],
        )
        errors.append(float((o[rows, heads].double() - exact).abs().max() / exact.abs().max()))
    # A NaN is the largest of all, which `max` does not know.
    return math.nan if any(map(math.isnan, errors)) else max(errors)


# Of the largest value of o: half a unit of it, and what the probabilities are rounded to before.
_ALLOWED = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def _copy_rate(clock: CpuClock | CudaClock, device: torch.device) -> float:
    """Bytes read and written a second where memory is copied, the best of some rounds."""
    import torch

    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best_ms = min(clock.measure_ms(lambda: target.copy_(source), 1) for _ in range(7))
    return 2 * source.nbytes / best_ms * 1e3


_LOST = "a peer's kernel has made the device useless for this process: leave that peer out"


def _is_lost(place: torch.device) -> bool:
    """Whether a kernel read or wrote where it may not, after which a process can't use the device."""
    import torch

    if place.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(place)
    except RuntimeError:
        return True
    return False


def _time_problem(
    problem: AttentionProblem,
    names: Sequence[str],
    place: torch.device,
    clock: CpuClock | CudaClock,
    copied: float,
    rounds: int,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    report(f"{problem.key}: preparing")
    entries: dict[str, dict[str, Any]] = {}
    steps: dict[str, tuple[Step, int]] = {}
    inputs = None if _is_lost(place) else _Inputs.random(problem, place, seed)
    for name in names:
        peer = STEP_PEERS[name]
        entry = entries[name] = {"peer": name, "title": peer.title, "same_mask": peer.same_mask}
        try:
            if place.type not in peer.kinds:
                raise RuntimeError(f"not made for {place.type}")
            if inputs is None:
                raise RuntimeError(_LOST)
            step = peer.prepare(inputs)
            entry["calls"] = peer.calls(inputs)
            entry["error"] = _error(inputs, peer, step())
            is_right = entry["error"] <= _ALLOWED[problem.dtype]
            entry["status"] = "ok" if is_right else "wrong"
            if is_right:
                steps[name] = step, clock.calls(step)
        except Exception as error:  # the other peers go on
            entry |= {"status": "not available", "reason": f"{type(error).__name__}: {error}"}
    if _is_lost(place):
        for name in steps:
            entries[name] |= {"status": "not available", "reason": _LOST}
        steps.clear()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(rounds):
        report(f"{problem.key}: round {round_index + 1} of {rounds}")
        for name, (step, calls) in steps.items():
            samples[name].append(clock.measure_ms(step, calls))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    dense = min((medians[name] for name in medians if not STEP_PEERS[name].same_mask), default=None)
    for name, median in medians.items():
        rate = problem.min_bytes / median * 1e3
        entries[name] |= {
            "median_ms": median,
            "min_ms": min(samples[name]),
            "needed_gb_s": rate * 1e-9,
            "of_copy": rate / copied,
            "of_dense": None if dense is None else median / dense,
        }
    return {
        "problem": problem.to_json(),
        "needed_bytes": problem.min_bytes,
        "entries": list(entries.values()),
    }


def _measured(
    problems: Sequence[AttentionProblem],
    peers: Sequence[str] | None,
    place: torch.device,
    rounds: int,
    idle_ms: float,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    import torch

    target = detect_cpu() if place.type == "cpu" else detect_cuda(place.index or 0)
    clock: CpuClock | CudaClock = CpuClock(idle_ms) if place.type == "cpu" else CudaClock(place)
    names = peers or [name for name, peer in STEP_PEERS.items() if place.type in peer.kinds]
    copied = _copy_rate(clock, place)
    head = report_head(1, target, place, _VERSIONED_PACKAGES)
    with torch.no_grad():
        results = [
            _time_problem(problem, names, place, clock, copied, rounds, seed, report) for problem in problems
        ]
    return {
        **head,
        "threads": torch.get_num_threads(),
        "copy_gb_s": copied * 1e-9,
        "method": {"rounds": rounds, "seed": seed, "statistic": "median"},
        "results": results,
    }


def benchmark_decode(
    problems: Sequence[AttentionProblem],
    *,
    peers: Sequence[str] | None = None,
    device: str = "cpu",
    rounds: int = 15,
    idle_ms: float = 80.0,
    threads: int | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time a step of each problem.

    Parameters
    ----------
    problems : sequence of AttentionProblem
        Of the direction ``"decode"``.
    peers : sequence of str, optional
        Names in `STEP_PEERS`; all that exist for the device when omitted.
    device : {"cpu", "cuda"}
    rounds : int
        Timings of each peer.
    idle_ms : float
        Idle milliseconds before each timing on the CPU.
    threads : int, optional
        CPU threads of PyTorch and of our kernels; PyTorch's setting when omitted.
    seed : int
        Of the inputs.
    report : callable
        Called with a line of progress.

    Returns
    -------
    dict
        Of JSON values: ``copy_gb_s`` of the device, and for each problem its ``needed_bytes`` and for each
        peer ``median_ms``, ``needed_gb_s`` (the needed bytes over the time), ``of_copy`` (that over the copy
        rate), ``of_dense`` (the time over that of the fastest dense peer) and ``error``.

    Raises
    ------
    ValueError
        For an unknown peer, a problem of another direction, or none.
    """
    import torch

    if not problems or any(problem.direction != "decode" for problem in problems):
        raise ValueError("a benchmark of decoding needs problems of the direction decode")
    unknown = sorted(set(peers or ()) - set(STEP_PEERS))
    if unknown:
        raise ValueError(f"unknown peer {unknown[0]!r}; known: {', '.join(STEP_PEERS)}")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        return _measured(problems, peers, torch.device(device), rounds, idle_ms, seed, report)
    finally:
        torch.set_num_threads(threads_before)


def decode_table(report: Mapping[str, Any]) -> Table:
    """A rich table of a report."""
    from rich.table import Table

    table = Table(title=f"decode on {report['target']}, copies at {report['copy_gb_s']:.4g} GB/s")
    for title in ("problem", "peer"):
        table.add_column(title)
    for title in ("median ms", "needed GB/s", "of copy", "vs dense", "error"):
        table.add_column(title, justify="right")
    for result in report["results"]:
        shown = AttentionProblem.from_json(result["problem"]).key
        for entry in result["entries"]:
            calls = entry.get("calls", 1)
            title = entry["title"] if calls == 1 else f"{entry['title']}, in {calls} calls"
            if entry["status"] != "ok":
                table.add_row(shown, title, entry["status"], entry.get("reason", ""))
            else:
                ratio = "" if entry["of_dense"] is None else f"{entry['of_dense']:.3f}"
                table.add_row(
                    shown,
                    title,
                    f"{entry['median_ms']:.4g}",
                    f"{entry['needed_gb_s']:.4g}",
                    f"{entry['of_copy']:.0%}",
                    ratio,
                    f"{entry['error']:.1e}",
                )
            shown = ""
        table.add_section()
    return table
