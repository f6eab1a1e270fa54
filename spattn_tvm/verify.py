"""Runs a target's kernels, shipped and untuned, on fresh random problems and compares with the reference.

The rule, also of the benchmark: against float64, a result may be off by at most `ERROR_RATIO` times as much
as the same attention written as a few PyTorch operations in the inputs' dtype.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .accuracy import judge, plain_attention
from .bands import LIMIT, BandLayout
from .cache_forms import CachePlaces
from .families import families_on, find_family, find_space
from .families.kernel import KernelSpec
from .reference import attention_mask, reference_attention, reference_decode
from .target import MachineTarget

if TYPE_CHECKING:
    from .dispatch import Kernel
    from .store import ScheduleRecord


_UNTUNED = (("float32", 64), ("float32", 40), ("bfloat16", 128), ("float16", 64))


@dataclass(frozen=True)
class RandomProblem:
    """A problem that nobody chose: odd lengths, grouped queries, packed documents, strided inputs."""

    dtype: str
    head_dim: int
    batch: int
    query_heads: int
    kv_heads: int
    length: int
    layout: BandLayout
    offsets: tuple[int, ...] | None
    transposed: bool
    seed: int

    @classmethod
    def draw(cls, rng: random.Random, dtype: str, head_dim: int, max_length: int) -> RandomProblem:
        kv_heads = rng.choice((1, 2, 3))
        query_heads = kv_heads * rng.choice((1, 1, 2, 4))
        interesting = [n for n in (1, 2, 31, 64, 97, 127, 128, 129, 257, 509, 512, 513) if n <= max_length]
        length = rng.choice((rng.choice(interesting), rng.randint(1, max_length)))
        offsets = None
        if rng.random() < 0.4:
            inner = sorted(rng.randint(0, length) for _ in range(rng.randint(0, 5)))
            offsets = (0, *inner, length)
        return cls(
            dtype,
            head_dim,
            rng.choice((1, 1, 2)),
            query_heads,
            kv_heads,
            length,
            _random_layout(rng, query_heads, length),
            offsets,
            rng.random() < 0.5,
            rng.randrange(2**31),
        )

    def __str__(self) -> str:
        packed = f", documents {self.offsets}" if self.offsets else ""
        strided = ", (B,N,H,D) strides" if self.transposed else ""
        return (
            f"({self.batch},{self.query_heads}/{self.kv_heads},{self.length},{self.head_dim}) {self.dtype} "
            f"{self.layout.spec}{packed}{strided}, seed {self.seed}"
        )

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Normal random q, k, v, do in the dtype and dlse in float32."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def normal(heads: int) -> Tensor:
            shape = (self.batch, heads, self.length, self.head_dim)
            if self.transposed:
                shape = (self.batch, self.length, heads, self.head_dim)
            values = torch.randn(shape, generator=generator, device=device).to(getattr(torch, self.dtype))
            return values.transpose(1, 2) if self.transposed else values

        heads = {"q": self.query_heads, "k": self.kv_heads, "v": self.kv_heads, "do": self.query_heads}
        tensors = {name: normal(count) for name, count in heads.items()}
        shape = (self.batch, self.query_heads, self.length)
        return tensors | {"dlse": torch.randn(shape, generator=generator, device=device)}


@dataclass(frozen=True)
class RandomStep:
    """A step of decoding that nobody chose: ragged rows, padding, grouped queries, each form of a cache.

    Of each batch row the keys ``[start, length)`` exist; `rows` are those of a batch row's contiguous cache,
    of a page, or of all rings of a batch row, `slack` what a ring holds beyond what its heads need.
    """

    dtype: str
    head_dim: int
    query_heads: int
    kv_heads: int
    queries: int
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    layout: BandLayout
    form: str
    rows: int
    slack: int
    seed: int

    @classmethod
    def draw(cls, rng: random.Random, dtype: str, head_dim: int, max_length: int) -> RandomStep:
        kv_heads = rng.choice((1, 2, 3))
        query_heads = kv_heads * rng.choice((1, 1, 2, 4))
        longest = rng.choice((rng.randint(1, max_length), max_length))
        lengths = tuple(
            rng.choice((rng.randint(0, longest), longest)) for _ in range(rng.choice((1, 1, 2, 4)))
        )
        starts = tuple(rng.choice((0, 0, rng.randint(0, length))) for length in lengths)
        form = rng.choice(("contiguous", "paged", "ring"))
        rows = rng.choice((16, 48, 64, 256)) if form == "paged" else longest + rng.randint(0, 9)
        return cls(
            dtype,
            head_dim,
            query_heads,
            kv_heads,
            rng.choice((1, 1, 2, rng.randint(3, 16))),
            lengths,
            starts,
            _random_layout(rng, query_heads, longest, is_autoregressive=True),
            form,
            rows,
            rng.randint(0, 9),
            rng.randrange(2**31),
        )

    def __str__(self) -> str:
        return (
            f"({len(self.lengths)},{self.query_heads}/{self.kv_heads},{self.queries},{self.head_dim}) "
            f"{self.dtype} {self.layout.spec}, lengths {self.lengths} from {self.starts}, {self.form} cache "
            f"of {self.rows} rows, seed {self.seed}"
        )

    def _rings(self) -> list[tuple[int, int]]:
        bands, group = self.layout.bands(LIMIT), self.query_heads // self.kv_heads
        rings, base = [], 0
        for first in range(0, self.query_heads, group):
            reach = max((high for head in bands[first : first + group] for _, high in head), default=0)
            capacity = min(reach, max(self.lengths)) + self.queries + self.slack
            rings.append((base, capacity))
            base += capacity
        return rings

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """q and the caches, normal random in the dtype, and what says where the keys lie."""
        generator = torch.Generator(device).manual_seed(self.seed)
        dtype, batch = getattr(torch, self.dtype), len(self.lengths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, self.head_dim, generator=generator, device=device).to(dtype)

        def numbers(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        places = {"cache_lengths": numbers(self.lengths), "cache_starts": numbers(self.starts)}
        shape: tuple[int, ...] = (batch, self.kv_heads, self.rows)
        if self.form == "paged":
            columns = max(1, -(-max(self.lengths) // self.rows))
            pages = torch.randperm(batch * columns + 2, generator=generator, device=device)
            places["block_table"] = pages[: batch * columns].view(batch, columns).to(torch.int32)
            shape = (len(pages), self.kv_heads, self.rows)
        elif self.form == "ring":
            places["ring"] = numbers(self._rings())
            shape = (batch, sum(self._rings()[-1]))
        caches = {"k_cache": normal(*shape), "v_cache": normal(*shape)}
        if self.form == "contiguous":
            for b, (begin, end) in enumerate(zip(self.starts, self.lengths, strict=True)):
                for cache in caches.values():
                    cache[b, :, :begin] = cache[b, :, end:] = torch.nan
        return {"q": normal(batch, self.query_heads, self.queries), **caches, **places}


def _random_layout(
    rng: random.Random, heads: int, length: int, *, is_autoregressive: bool = False
) -> BandLayout:
    contexts = (length, length + rng.randint(0, length))
    context = rng.choice(contexts if is_autoregressive else (None, *contexts))
    name = rng.choice(
        (
            "spattention",
            "spattention",
            "exclusive",
            "local_only",
            "gapped",
            "causal",
            "equal_area",
            "window",
            "custom",
        )
    )
    if name == "window":
        return BandLayout.sliding_window(heads, rng.randint(1, length + 3))
    if name == "custom":
        edges = [sorted(rng.randint(0, length) for _ in range(4)) for _ in range(heads)]
        bands = [[(a, b), (c, d)][: rng.randint(0, 2)] for a, b, c, d in edges]
        return BandLayout.custom(bands, max(1, context or length))
    return getattr(BandLayout, name)(heads, context)


@dataclass(frozen=True)
class CheckedKernel:
    """A kernel to check, and where it comes from: ``"tuned"`` or ``"untuned"``."""

    spec: KernelSpec
    origin: str

    def __str__(self) -> str:
        return f"{self.spec} ({self.origin})"


def _distinct(kernels: Iterable[CheckedKernel]) -> list[CheckedKernel]:
    found: dict[KernelSpec, CheckedKernel] = {}
    for kernel in kernels:
        found.setdefault(kernel.spec, kernel)
    return list(found.values())


def kernels_of_records(records: Iterable[ScheduleRecord]) -> list[CheckedKernel]:
    """Each distinct kernel of some records."""
    return _distinct(CheckedKernel(record.kernel, "tuned") for record in records)


def kernels_of(target: MachineTarget) -> list[CheckedKernel]:
    """Each distinct kernel of the target's shipped records, and untuned ones of some dtypes and head dims:
    the fastest for bands of any width, and the deterministic ones where those are others."""
    from .store import load_records

    kernels = kernels_of_records(load_records(target.folder))
    for family in families_on(target):
        for direction in find_family(family).spaces:
            space = find_space(family, direction)
            for dtype, head_dim in _UNTUNED:
                if space.unsupported(head_dim, dtype, target) is not None:
                    continue
                for deterministic in (False, True):
                    for decisions in space.all_untuned(head_dim, dtype, target, deterministic):
                        spec = KernelSpec(family, direction, dtype, head_dim, decisions)
                        kernels.append(CheckedKernel(spec, "untuned"))
    return _distinct(kernels)


def check_kernel(kernel: Kernel, problem: RandomProblem, device: torch.device) -> str:
    """How a kernel's results on a problem are wrong; "" when they are right."""
    from .launch import Domain, launch

    results = kernel.abi.results
    has_gradients = "dq" in results
    t = problem.tensors(device)
    scale = problem.head_dim**-0.5
    offsets = torch.tensor(problem.offsets or (0, problem.length), dtype=torch.int32)

    def compute(attend: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, v = (t[name].to(dtype, copy=True).requires_grad_(has_gradients) for name in "qkv")
        o, lse = attend(q, k, v)
        found = {"o": o.detach(), "lse": lse.detach()}
        if has_gradients:
            # A keyless query's lse is -inf and carries no gradient.
            total = (o * t["do"].to(o.dtype)).sum() + (
                lse.masked_fill(lse == -torch.inf, 0.0) * t["dlse"]
            ).sum()
            found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(total, (q, k, v)), strict=True))
        return found

    mask = attention_mask(problem.layout, problem.length, offsets, device=device)
    exact = compute(
        lambda q, k, v: reference_attention(q, k, v, problem.layout, cu_seqlens=offsets), torch.float64
    )
    plain = compute(lambda q, k, v: plain_attention(q, k, v, mask, scale), t["q"].dtype)

    lengths = [end - begin for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    bands = torch.from_numpy(problem.layout.packed_table(lengths).copy()).to(device)
    given = {**t, **Domain.of_same_rows(bands, offsets.to(device))._asdict()}
    given |= {"o": exact["o"].to(t["q"].dtype), "lse": exact["lse"].float()}
    # Fills what the launcher allocates with NaN, so that a place that no kernel writes is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        outputs = launch(kernel, given, scale)
    finally:
        torch.use_deterministic_algorithms(False)
    return judge(dict(zip(results, outputs, strict=True)), exact, plain, problem.dtype)[1]


def check_step(kernel: Kernel, problem: RandomStep, device: torch.device) -> str:
    """How a decode kernel's results on a step are wrong; "" when they are right."""
    from .launch import launch_decode
    from .ops.band_tables import find_cache_domain

    given = problem.tensors(device)
    q, k, v = (given.pop(name) for name in ("q", "k_cache", "v_cache"))
    places = CachePlaces(**given)

    def compute(dtype: torch.dtype) -> dict[str, Tensor]:
        o, lse = reference_decode(q.to(dtype), k.to(dtype), v.to(dtype), problem.layout, **given)
        return {"o": o.to(dtype), "lse": lse}

    exact, plain = compute(torch.float64), compute(q.dtype)
    domain = find_cache_domain(problem.layout.spec, places, places.capacity(k))
    if places.ring is not None:
        k, v = k[:, None], v[:, None]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        o, lse = launch_decode(kernel, q, k, v, domain, problem.head_dim**-0.5)
    finally:
        torch.use_deterministic_algorithms(False)
    return judge({"o": o, "lse": lse}, exact, plain, problem.dtype)[1]


def check_randomly(
    kernel: Kernel, rng: random.Random, max_length: int, device: torch.device
) -> tuple[RandomProblem | RandomStep, str]:
    """A fresh problem of a kernel's direction, and how the kernel's results on it are wrong."""
    spec = kernel.spec
    assert spec is not None
    if spec.direction == "decode":
        step = RandomStep.draw(rng, spec.dtype, spec.head_dim, max_length)
        return step, check_step(kernel, step, device)
    problem = RandomProblem.draw(rng, spec.dtype, spec.head_dim, max_length)
    return problem, check_kernel(kernel, problem, device)


@dataclass
class Verification:
    """What `verify` found: problems checked, and a line for each that was wrong."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)


def verify(
    target: MachineTarget,
    problems: int = 200,
    *,
    max_length: int = 700,
    seed: int | None = None,
    kernels: Sequence[CheckedKernel] | None = None,
    report: Callable[[str], None] = lambda text: None,
    limit_s: float = math.inf,
) -> Verification:
    """Check kernels on their shares of `problems` fresh random problems.

    Parameters
    ----------
    target : MachineTarget
        This machine's.
    problems : int
        In all; each kernel gets at least one.
    max_length : int
        Longest sequence.
    seed : int, optional
        Of the problems; a fresh one when omitted.
    kernels : sequence of CheckedKernel, optional
        Those of `kernels_of` by default.
    report : callable
        Called with a line of progress.
    limit_s : float
        After so many seconds each kernel that is left gets one problem.

    Raises
    ------
    ValueError
        When the target's code can't run here.
    """
    reason = target.can_run_here()
    if reason is not None:
        raise ValueError(f"can't verify {target.folder} on this machine: {reason}")
    rng = random.Random(seed)
    device = torch.device(target.kind)
    kernels = kernels_of(target) if kernels is None else kernels
    result = Verification()
    until = time.monotonic() + limit_s
    for checked, count in _shares(kernels, problems):
        report(str(checked))
        try:
            kernel = _load(checked.spec, target)
        except Exception as error:  # the other kernels are still checked
            result.failures.append(f"{checked}: {type(error).__name__}: {error}")
            continue
        for done in range(count):
            if done and time.monotonic() > until:
                break
            try:
                problem, wrong = check_randomly(kernel, rng, max_length, device)
            except Exception as error:
                result.failures.append(f"{checked}: {type(error).__name__}: {error}")
                continue
            if wrong:
                result.failures.append(f"{checked}: {problem}: {wrong}")
            else:
                result.passed += 1
    return result


def _shares(kernels: Sequence[CheckedKernel], problems: int) -> Iterator[tuple[CheckedKernel, int]]:
    for index, kernel in enumerate(kernels):
        share = problems * (index + 1) // len(kernels) - problems * index // len(kernels)
        yield kernel, max(1, share)


def _load(spec: KernelSpec, target: MachineTarget) -> Kernel:
    from .build.kept_runtime import kept_runtime
    from .build.library_cache import compile_kernel
    from .dispatch import Kernel
    from .runtime import load_library

    path = compile_kernel(spec, target)
    function = load_library(path, spec.direction, cuda=target.kind == "cuda", shipped=kept_runtime(path))
    return Kernel(function, spec, path=path)
