"""Which kernel serves a call, and why.

A call first looks in registered bundles, then for a schedule (``tuned``, ``nearest``, ``untuned``) whose
library is compiled on first use and kept on disk. Where no kernel can serve it, ``impl="auto"`` takes the
eager reference and says so once in a :class:`FallbackWarning`; an explicit ``impl`` raises instead.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bands import BandLayout
from .build.errors import KernelUnavailableError
from .build.kept_runtime import kept_runtime
from .build.library_cache import compile_kernel
from .build.toolchain import compile_obstacle
from .bundle import (
    Bundle,
    BundledKernel,
    call_on_registration,
    load_bundle,
    register_bundle,
    registered_bundles,
)
from .choice import Choice, NoKernelError, find_schedule
from .families import call_on_registration as call_on_family_registration
from .families import families_for, families_on, family_names, find_family
from .families.family import Abi
from .families.kernel import KernelSpec
from .problem import AttentionProblem, is_same_problem
from .runtime import load_library
from .target import MachineTarget, detect_cpu, detect_cuda

_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Each new shape, length and layout is an entry; a training run has a few, a server with free lengths has
# many.
_MAX_ENTRIES = 4096


class FallbackWarning(UserWarning):
    """A call runs on the eager reference, which is correct and slow, because no kernel can serve it here."""


_NO_ABI = Abi((), ())


@dataclass(frozen=True, slots=True)
class Kernel:
    """What serves a call.

    Parameters
    ----------
    function : callable
        The compiled function, with the arguments of its family.
    spec : KernelSpec or None
        Which kernel it is; None for the reference.
    status : {"tuned", "nearest", "untuned", "reference"}
    reason : str
        One sentence: why this one.
    path : Path or None
        Its library.

    Attributes
    ----------
    abi : Abi
        What the function takes; nothing for the reference.
    """

    function: Callable[..., Any]
    spec: KernelSpec | None
    status: str = "untuned"
    reason: str = ""
    path: Path | None = None
    abi: Abi = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "abi", _NO_ABI if self.spec is None else self.spec.abi)

    @property
    def family(self) -> str:
        """The kernel family, or ``"reference"``."""
        return "reference" if self.spec is None else self.spec.family


_lock = threading.RLock()
_found: dict[Any, Kernel] = {}
_functions: dict[tuple[Path, str], Callable[..., Any]] = {}
_compiled_paths: dict[tuple[KernelSpec, MachineTarget], Path | KernelUnavailableError] = {}
# Replaced whenever earlier answers may no longer hold: one that was under way then is not kept.
_generation = object()
_environment_bundle: list[str] = []
_warned: set[str] = set()
_listeners: list[Callable[[], None]] = []


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may have held it


def implementations() -> tuple[str, ...]:
    """What ``impl`` may be: ``"auto"``, ``"reference"`` and the registered kernel families."""
    return ("auto", "reference", *family_names())


# Files whose frames lie between the caller and a call: ours, PyTorch's and those of its traced graphs.
_INSIDE = (
    os.path.dirname(__file__) + os.sep,
    os.path.dirname(torch.__file__) + os.sep,
    "<eval_with_key>",
)


def caller_stacklevel() -> int:
    """The `stacklevel` with which a warning by the calling function names the line that called us.

    In a backward pass that line called ``backward``, in a module the module.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_code.co_filename.startswith(_INSIDE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


def _no_function(*arguments: object) -> None:
    raise RuntimeError("the reference is not a compiled kernel")


def _target_of(device: torch.device) -> MachineTarget:
    try:
        if device.type == "cuda":
            return detect_cuda(torch.cuda.current_device() if device.index is None else device.index)
        if device.type == "cpu":
            return detect_cpu()
    except ValueError as error:  # a chip that no kernels are made for
        raise NoKernelError(str(error)) from error
    raise NoKernelError(f"no kernels for tensors on {device}; known: cpu, cuda")


def call_on_change(function: Callable[[], None]) -> None:
    """Have a function called whenever earlier answers of `find_kernel` may no longer hold."""
    _listeners.append(function)


def _forget() -> None:
    global _generation
    _generation = object()
    _found.clear()
    for function in _listeners:
        function()


call_on_registration(_forget)
call_on_family_registration(_forget)


def clear_cache() -> None:
    """Forget which kernel serves which call, and what schedules were read; libraries stay loaded."""
    from . import store

    with _lock:
        _forget()
        _compiled_paths.clear()
        _warned.clear()
        store.clear_cache()


def _bundles_in_use() -> list[Bundle]:
    """Registered bundles, with the one that ``$SPATTN_BUNDLE`` names, which is loaded on first use."""
    path = os.environ.get("SPATTN_BUNDLE", "")
    if path and path not in _environment_bundle:
        bundle = load_bundle(path, register=False)
        _environment_bundle.append(path)
        register_bundle(bundle, first=False)
    return registered_bundles()


def _function(path: Path, direction: str, **options: Any) -> Callable[..., Any]:
    key = (path, direction)
    if key not in _functions:
        _functions[key] = load_library(path, direction, **options)
    return _functions[key]


def _bundled_status(problem: AttentionProblem, bundle: Bundle, entry: BundledKernel) -> tuple[str, str]:
    status = entry.status
    if status == "tuned" and not is_same_problem(problem, entry.problem):
        status = "nearest"
    # The name alone: reasons end up in benchmark reports, which are to be shared.
    return status, (
        f"bundle {bundle.path.name!r}, compiled for {entry.target.folder}, exported for {entry.problem.key}: "
        f"{entry.reason}"
    )


def _takes_other_keys(family: str, direction: str) -> bool:
    abi = find_family(family).abis.get(direction)
    return abi is not None and abi.takes_other_keys


def _from_bundles(
    problem: AttentionProblem,
    target: MachineTarget,
    families: tuple[str, ...],
    deterministic: bool,
    other_keys: bool,
) -> Kernel | None:
    if other_keys:
        families = tuple(name for name in families if _takes_other_keys(name, problem.direction))
    for bundle in _bundles_in_use():
        entry = bundle.nearest(problem, target, families, deterministic)
        if entry is None:
            continue
        status, reason = _bundled_status(problem, bundle, entry)
        if (entry.path, problem.direction) not in _functions:
            bundle.verify()
        function = _function(entry.path, problem.direction, cuda=target.kind == "cuda", shipped=bundle.path)
        return Kernel(function, entry.kernel, status, reason, entry.path)
    return None


def _library(spec: KernelSpec, target: MachineTarget, again: bool) -> Path:
    """Its path, which takes 2 ms to find on disk, too much for each new length. Unless asked to try again,
    what could not be compiled is not tried for the next length either.
    """
    known = _compiled_paths.get((spec, target))
    if isinstance(known, Path):
        return known
    if known is not None and not again:
        raise known.with_traceback(None)
    try:
        path = compile_kernel(spec, target)
    except KernelUnavailableError as error:
        _compiled_paths[spec, target] = error
        raise
    _compiled_paths[spec, target] = path
    return path


def _compiled(target: MachineTarget, choice: Choice, again: bool) -> Kernel:
    spec = choice.kernel
    path = _library(spec, target, again)
    with _lock:
        shipped = None if (path, spec.direction) in _functions else kept_runtime(path)
        function = _function(path, spec.direction, cuda=target.kind == "cuda", shipped=shipped)
    return Kernel(function, spec, choice.status, choice.reason, path)


def _families(impl: str, target: MachineTarget, problem: AttentionProblem) -> tuple[str, ...]:
    if impl == "auto":
        return families_for(target, problem)
    able = families_on(target)
    if impl not in able:
        runs = ", ".join(able) or "none"
        raise NoKernelError(f"impl={impl!r} can't run on {target.folder}; families that run there: {runs}")
    return (impl,)


def _problem(
    direction: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    kv_heads: int,
    spec: str,
    kv_length: int | None,
) -> AttentionProblem:
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        known = ", ".join(_DTYPE_NAMES.values())
        raise NoKernelError(f"kernels take {known}, got {str(dtype).removeprefix('torch.')}")
    batch, heads, length, head_dim = shape
    layout = BandLayout.from_spec(spec)
    if layout.context_length is not None and max(length, kv_length or 0) > layout.context_length:
        # Packed documents may be longer together than the context, and so may the rows of a cache; what can
        # be checked was checked by the caller.
        layout = dataclasses.replace(layout, allow_longer=True)
    return AttentionProblem(direction, name, batch, heads, kv_heads, length, head_dim, layout, kv_length)


def _reference(reason: str) -> Kernel:
    return Kernel(_no_function, None, "reference", reason)


def _find(
    direction: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    layout: str,
    impl: str,
    kv_heads: int | None,
    deterministic: bool,
    kv_length: int | None,
) -> Kernel:
    if impl not in implementations():
        raise ValueError(f"impl must be one of {', '.join(implementations())}, got {impl!r}")
    if impl == "reference":
        return _reference("asked for by impl='reference'")
    if impl == "auto" and dtype is torch.float64:
        return _reference("float64 is what the reference is for")
    try:
        problem = _problem(direction, dtype, shape, kv_heads or shape[1], layout, kv_length)
        target = _target_of(device)
        families = _families(impl, target, problem)
        other_keys = kv_length is not None
        with _lock:
            kernel = _from_bundles(problem, target, families, deterministic, other_keys)
            if kernel is not None:
                return kernel
            choice = find_schedule(
                problem, target, families=families, deterministic=deterministic, other_keys=other_keys
            )
        # Outside the lock: while one kernel is compiled, all others are found.
        return _compiled(target, choice, again=impl != "auto")
    except (NoKernelError, KernelUnavailableError) as error:
        if impl != "auto":
            raise
        reason = str(error)
    with _lock:
        is_new = reason not in _warned
        _warned.add(reason)
    if is_new:
        warnings.warn(
            f"banded attention runs on the slow eager reference: {reason}",
            FallbackWarning,
            caller_stacklevel(),
        )
    return _reference(reason)


def find_kernel(
    direction: str,
    q: Tensor,
    layout: str,
    impl: str = "auto",
    deterministic: bool = False,
    kv_heads: int | None = None,
    kv_length: int | None = None,
) -> Kernel:
    """The kernel of a call; the first time for a shape it may be compiled, which takes seconds.

    Parameters
    ----------
    direction : {"forward", "backward"}
    q : Tensor
        ``(B, Hq, Nq, D)``; its shape, dtype and device matter.
    layout : str
        ``BandLayout.spec``.
    impl : str
        ``"auto"``, ``"reference"`` or a kernel family, which is never replaced by another.
    deterministic : bool
        Only a kernel whose results are bitwise equal from run to run.
    kv_heads : int, optional
        Key heads, where they differ from the query heads.
    kv_length : int, optional
        Number of keys of a call whose keys are not the queries' own rows, or don't all exist.

    Returns
    -------
    Kernel
        Without a spec, which is the reference, for float64, and with a :class:`FallbackWarning` where no
        kernel can serve; it stays so until :func:`clear_cache`.

    Raises
    ------
    ValueError
        For an unknown `impl`, or an explicit one that can't serve the call, with the reason.
    RuntimeError
        For an explicit `impl` that can't be compiled here (no compiler, a full disk); or when compiling fails
        for a reason that lies in the kernel.
    """
    key = (direction, q.dtype, q.device, q.shape, layout, impl, kv_heads, deterministic, kv_length)
    kernel = _found.get(key)
    if kernel is None:
        generation = _generation
        kernel = _find(*key)
        with _lock:
            if generation is _generation:
                if len(_found) >= _MAX_ENTRIES:
                    _found.clear()
                kernel = _found.setdefault(key, kernel)
    return kernel


@dataclass(frozen=True)
class Explanation:
    """Which kernel would serve a problem, and why; as text the lines that ``spattn explain`` prints.

    Parameters
    ----------
    problem : AttentionProblem
    target : MachineTarget
    family : str
        The kernel family, or ``"reference"``.
    status : {"tuned", "nearest", "untuned", "reference"}
    reason : str
        One sentence: why this one.
    decisions : dict
        Of the kernel; empty for the reference.
    latency_us : float or None
        As measured for the record that serves, on what ``facts`` names; None without one.
    facts : tuple of (str, str)
        All that is known, as topics and texts.
    """

    problem: AttentionProblem
    target: MachineTarget
    family: str
    status: str
    reason: str
    decisions: dict[str, int]
    latency_us: float | None
    facts: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return _aligned(self.facts)


def explain(problem: AttentionProblem, target: MachineTarget, deterministic: bool = False) -> Explanation:
    """Which kernel would serve a problem on a target and why. Compiles and loads nothing.

    Parameters
    ----------
    problem : AttentionProblem
    target : MachineTarget
        This machine's or any other.
    deterministic : bool
        As in :func:`find_kernel`.
    """
    obstacle = target.can_run_here()
    facts = [("problem", problem.key), ("target", target.folder)]
    facts.append(("here", "runs on this machine" if obstacle is None else f"does not run here: {obstacle}"))

    def explained(
        kernel: KernelSpec | None, status: str, reason: str, latency_us: float | None = None
    ) -> Explanation:
        family, decisions = ("reference", {}) if kernel is None else (kernel.family, dict(kernel.decisions))
        return Explanation(problem, target, family, status, reason, decisions, latency_us, tuple(facts))

    for bundle in _bundles_in_use() if obstacle is None else []:
        entry = bundle.nearest(problem, target, families_for(target, problem), deterministic)
        if entry is not None:
            status, reason = _bundled_status(problem, bundle, entry)
            facts += [
                ("family", entry.kernel.family),
                ("status", status),
                ("reason", reason),
                ("bundle", str(bundle.path)),
                ("decisions", str(entry.kernel.decisions)),
            ]
            return explained(entry.kernel, status, reason)
    try:
        choice = find_schedule(problem, target, deterministic=deterministic)
    except NoKernelError as error:
        facts += [("family", "reference (slow, eager)"), ("reason", str(error))]
        return explained(None, "reference", str(error))
    facts += [
        ("family", choice.kernel.family),
        ("status", choice.status),
        ("reason", choice.reason),
        ("decisions", str(choice.kernel.decisions)),
    ]
    record = choice.record
    if record is not None:
        of = "" if choice.status == "tuned" else f" for {record.problem.key}"
        facts.append(("measured", f"{record.latency_us:.1f} us{of} on {record.device}, {record.date}"))
        facts.append(("log", record.source_log))
        if record.resources:
            facts.append(("ptxas", record.resources))
    missing = compile_obstacle(target)
    if missing is not None:
        facts.append(("compiler", missing))
    latency_us = None if record is None else record.latency_us
    return explained(choice.kernel, choice.status, choice.reason, latency_us)


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
