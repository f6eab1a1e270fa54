"""One problem's data in a measuring process: random inputs, the reference result, the check and the clock."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spattn_tvm.cache_forms import CachePlaces
from spattn_tvm.ops.band_tables import find_cache_domain
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import reference_attention, reference_gradients
from spattn_tvm.torch_private import cuda_sleep

# Largest error of a row of o, dq, dk or dv relative to the row's norm, and of an lse. Float32 kernels
# reach 1e-6; half precision rounds P and dS to 2**-11 or 2**-8. One key more or less in a band of 1000
# changes a row by about 3e-2 and its lse by 1e-3.
_ROW_ERROR = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_LSE_ERROR = {"float32": 5e-5, "float16": 5e-4, "bfloat16": 5e-4}

_SECONDS = 1.0
_LEAST_REPEATS = 3
_MOST_REPEATS = 50
_HOPELESS = 2.0
_L2_FLUSH_BYTES = 256 * 2**20
# About 1 ms on a 2 GHz chip, in which the host runs ahead: compilers keep all cores busy meanwhile.
_HEAD_START_CYCLES = 2_000_000


Launch = Callable[["TrialData"], object]
Clock = Callable[[Launch, "TrialData"], float]


class TrialData:
    """Inputs of a problem, its real band table, and the reference result to compare with.

    Parameters
    ----------
    problem : AttentionProblem
    device : str
        ``"cpu"`` or ``"cuda"``: where the data are.
    seed : int
        Of the random inputs.
    cache : Path, optional
        Keeps the reference result for the next process of the same search: on a CPU it takes seconds.
    clock : callable, optional
        Times one run in microseconds, where something else than the device runs the kernels.
    target_kind : str, optional
        ``"cpu"`` or ``"cuda"``: what runs the kernels; the device by default.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        device: str,
        seed: int,
        cache: Path | None = None,
        *,
        clock: Clock | None = None,
        target_kind: str | None = None,
    ) -> None:
        self.problem = problem
        self.device = torch.device(device)
        self.target_kind = target_kind or self.device.type
        self._clock = clock
        self._flushed: Tensor | None = None
        self.scale = problem.head_dim**-0.5
        dtype = getattr(torch, problem.dtype)
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        rows = (problem.batch, problem.query_heads, problem.length)
        keys = (problem.batch, problem.kv_heads, problem.keys)
        self.q = normal(*rows, problem.head_dim).to(dtype)
        self.k = normal(*keys, problem.head_dim).to(dtype)
        self.v = normal(*keys, problem.head_dim).to(dtype)
        self.do = normal(*rows, problem.head_dim).to(dtype)
        self.dlse = normal(*rows)
        self.bands = torch.tensor(problem.layout.table(problem.keys)[None], device=self.device)
        self.cu_seqlens = torch.tensor([0, problem.length], dtype=torch.int32, device=self.device)
        self.cu_seqlens_k = torch.tensor([0, problem.keys], dtype=torch.int32, device=self.device)
        self.key_ranges = torch.empty((0, 3), dtype=torch.int32, device=self.device)
        # The keys of a step of decoding, in a contiguous cache that is full.
        full = CachePlaces(torch.full((problem.batch,), problem.keys, device=self.device))
        places = find_cache_domain(problem.layout.spec, full, problem.keys)
        self.cache = {name: place for name, place in places._asdict().items() if name != "bands"}
        if cache is not None and cache.exists():
            expected = torch.load(cache, weights_only=True)
        else:
            expected = self._reference()
            if cache is not None:
                partial = cache.with_suffix(f".{os.getpid()}")
                torch.save(expected, partial)
                partial.replace(cache)
        self.o = expected["o"].to(dtype)
        self.lse = expected["lse"]
        self.expected = expected

    def _reference(self) -> dict[str, Tensor]:
        layout, scale = self.problem.layout, self.scale
        q, k, v = self.q.float(), self.k.float(), self.v.float()
        with torch.no_grad():
            o, lse = reference_attention(q, k, v, layout, scale=scale)
            expected = {"o": o, "lse": lse}
            if self.problem.direction == "backward":
                gradients = reference_gradients(
                    q, k, v, o, lse, self.do.float(), self.dlse, layout, scale=scale
                )
                expected.update(zip(("dq", "dk", "dv"), gradients, strict=True))
        return expected

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a kernel of any direction may take, by the names of its ABI."""
        tensors = ("q", "k", "v", "o", "lse", "do", "dlse")
        names = (*tensors, "bands", "cu_seqlens", "cu_seqlens_k", "key_ranges")
        return {**{name: getattr(self, name) for name in names}, **self.cache}

    def outputs(self, launch: Callable[[TrialData], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a launch computes, by name, from output buffers that PyTorch fills with NaN first."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return launch(self)
        finally:
            torch.use_deterministic_algorithms(False)

    def wrong(self, outputs: dict[str, Tensor]) -> str | None:
        """How an output differs from the reference, or None when all agree."""
        for name, actual in outputs.items():
            expected = self.expected[name]
            if actual.shape != expected.shape:
                return f"{name} has the shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
            if name == "lse":
                error, limit = _lse_error(actual, expected), _LSE_ERROR[self.problem.dtype]
            else:
                error, limit = _row_error(actual, expected), _ROW_ERROR[self.problem.dtype]
            if not error <= limit:
                return f"{name} is wrong: error {error:.3g}, at most {limit:.3g} is accepted"
        return None

    def latency_us(self, launch: Launch, best_us: float | None = None) -> float:
        """Median time of a launch in microseconds, after a warm-up.

        Parameters
        ----------
        launch : callable
        best_us : float, optional
            A launch that takes more than twice as long is measured less carefully.
        """
        sample = self._sampler()
        estimate = min(sample(launch, self), sample(launch, self))
        hopeless = best_us is not None and estimate > _HOPELESS * best_us
        repeats = 1 if hopeless else _repeats(estimate)
        return statistics.median([estimate, *(sample(launch, self) for _ in range(repeats))])

    def anchored_latency_us(
        self, launch: Launch, anchor: Launch, usual_us: float, best_us: float | None = None
    ) -> tuple[float, float]:
        """The same on a machine that other programs share: between two runs of another kernel each time.

        Parameters
        ----------
        launch : callable
        anchor : callable
            The other kernel.
        usual_us : float
            What one run of it takes when the machine is as fast as the result is to be stated for.
        best_us : float, optional
            As in :meth:`latency_us`.

        Returns
        -------
        latency_us : float
            Median ratio to the runs of the anchor before and after, times `usual_us`.
        slowdown : float
            Median time of the anchor over `usual_us`.
        """
        sample = self._sampler()
        sample(anchor, self)
        sample(launch, self)
        before = [sample(anchor, self)]
        ratios: list[float] = []
        repeats = _LEAST_REPEATS
        while len(ratios) < repeats:
            time_us = sample(launch, self)
            before.append(sample(anchor, self))
            ratios.append(2 * time_us / (before[-2] + before[-1]))
            if len(ratios) == 1:
                hopeless = best_us is not None and ratios[0] * usual_us > _HOPELESS * best_us
                repeats = 2 if hopeless else _repeats(time_us + before[-1])
        return statistics.median(ratios) * usual_us, statistics.median(before) / usual_us

    def _sampler(self) -> Clock:
        if self._clock is not None:
            return self._clock
        # PyTorch's threads spin for a while after the check, and would share the cores with the kernel's.
        time.sleep(0.02)
        return self._cuda_sample if self.device.type == "cuda" else _cpu_sample

    def _cuda_sample(self, launch: Launch, data: TrialData) -> float:
        if self._flushed is None:
            self._flushed = torch.empty(_L2_FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.fill_(1)
        cuda_sleep(_HEAD_START_CYCLES)
        start.record()
        launch(data)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def interleaved_us(
        self, launches: Sequence[Launch], rounds: int, limit_s: float = math.inf
    ) -> list[float]:
        """Median time of each launch in microseconds, taken in turns so that a slow spell hits all of
        them; after `limit_s` seconds of it, three rounds are enough."""
        until = time.monotonic() + limit_s
        sample = self._sampler()
        times: list[list[float]] = [[] for _ in launches]
        for launch in launches:
            sample(launch, self)
        for done in range(rounds):
            if done >= _LEAST_REPEATS and time.monotonic() > until:
                break
            for launch, collected in zip(launches, times, strict=True):
                sample(launch, self)
                collected.append(sample(launch, self))
        return [statistics.median(collected) for collected in times]


def _repeats(sample_us: float) -> int:
    return int(min(max(_SECONDS * 1e6 / sample_us, _LEAST_REPEATS), _MOST_REPEATS))


def _cpu_sample(launch: Launch, data: TrialData) -> float:
    start = time.perf_counter_ns()
    launch(data)
    return (time.perf_counter_ns() - start) * 1e-3


def _row_error(actual: Tensor, expected: Tensor) -> float:
    """Largest norm of a row's error, relative to the row's norm plus the mean norm: a row may be 0 by
    cancellation."""
    norms = expected.norm(dim=-1)
    errors = (actual.float() - expected).norm(dim=-1) / (norms + norms.mean() + 1e-3)
    return _largest(errors)


def _lse_error(actual: Tensor, expected: Tensor) -> float:
    empty = expected == -torch.inf
    if not torch.equal(actual == -torch.inf, empty):
        return float("inf")
    return _largest((actual - expected).masked_fill(empty, 0.0).abs())


def _largest(errors: Tensor) -> float:
    """The maximum; NaN if any is NaN."""
    return float(errors.max()) if errors.numel() else 0.0
