"""The registry of kernel families: which spaces exist, and which run on a target, the preferred first."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Protocol

from .space import DIRECTIONS, Space

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget


_MODULES: dict[tuple[str, str], str] = {
    ("cpu", "forward"): "spattn_tvm.families.cpu.space",
    ("cpu", "backward"): "spattn_tvm.families.cpu.space",
    ("mma", "forward"): "spattn_tvm.families.mma.forward_space",
    ("mma", "backward"): "spattn_tvm.families.mma.backward_space",
    ("hopper", "forward"): "spattn_tvm.families.hopper.forward_space",
    ("hopper", "backward"): "spattn_tvm.families.hopper.backward_space",
}


def families_for(target: MachineTarget) -> tuple[str, ...]:
    """Families of this installation whose code runs on ``target``, the preferred one first."""
    if target.kind == "cpu":
        names: tuple[str, ...] = ("cpu",)
    else:
        names = ("hopper", "mma") if target.arch == "sm_90a" else ("mma",)
    return tuple(name for name in names if any(has_space(name, direction) for direction in DIRECTIONS))


@cache
def has_space(family: str, direction: str) -> bool:
    """Whether the family's module for this direction is installed; nothing is imported."""
    module = _MODULES.get((family, direction))
    return module is not None and importlib.util.find_spec(module) is not None


@cache
def find_space(family: str, direction: str) -> Space:
    """The space of a family and direction; imports the family's module on first use.

    Raises
    ------
    ValueError
        For an unknown family or direction, or one that has no kernels yet.
    """
    if not has_space(family, direction):
        known = ", ".join(f"{f} {d}" for f, d in _MODULES if has_space(f, d))
        raise ValueError(f"no kernels of family {family!r} for direction {direction!r}; known: {known}")
    module = importlib.import_module(_MODULES[family, direction])
    space = getattr(module, direction.upper(), None)
    if not isinstance(space, Space):
        raise TypeError(f"{module.__name__} must define {direction.upper()} as a Space, found {space!r}")
    return space


class Recorded(Protocol):
    """What a schedule record and a bundle's entry have in common."""

    @property
    def problem(self) -> AttentionProblem: ...

    @property
    def family(self) -> str: ...

    @property
    def decisions(self) -> dict[str, int]: ...


def is_deterministic(record: Recorded) -> bool:
    """Whether a recorded or bundled kernel's results are bitwise equal from run to run."""
    return find_space(record.family, record.problem.direction).is_deterministic(record.decisions)
