"""Decision spaces: what may be chosen for a kernel family, what is legal, and how a choice becomes TensorIR.

A family names the module-level :class:`Space` of each direction; :func:`spattn_tvm.families.find_space`
imports that module when it is first asked for, and none imports TVM before :attr:`Space.build` is called, so
dispatch can read choices and defaults without the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

Decisions = Mapping[str, int]


@dataclass(frozen=True)
class Space:
    """The decisions of one kernel family and direction. All fields but the first two are functions.

    Parameters
    ----------
    family : str
        Its name.
    direction : str
        ``"forward"``, ``"backward"`` or whatever else the family has kernels for.
    choices : (head_dim, dtype) -> dict[str, tuple[int, ...]]
        The values that each decision may take, for a supported head dim and dtype name.
    illegal : (decisions, head_dim, dtype, target) -> str or None
        Why a combination of values from ``choices`` can't be built (shared memory, registers, divisibility),
        or None.
    features : (decisions, problem) -> list[float]
        What the cost model learns from; the same length for every decision of the space.
    untuned : (head_dim, dtype, target, deterministic=False) -> dict[str, int]
        Legal decisions for any problem, chosen without a search; with ``deterministic`` such that
        ``is_deterministic`` holds.
    build : (decisions, head_dim, dtype, target) -> tvm.IRModule
        The kernel, exporting one function named after the direction. Imports TVM.
    unsupported : (head_dim, dtype, target) -> str or None
        Why no decision of the space can serve a head dim, dtype or target, or None. Asked before the others.
    is_deterministic : (decisions) -> bool
        Whether results are bitwise equal from run to run. By default they are.
    """

    family: str
    direction: str
    choices: Callable[[int, str], dict[str, tuple[int, ...]]]
    illegal: Callable[[Decisions, int, str, MachineTarget], str | None]
    features: Callable[[Decisions, AttentionProblem], list[float]]
    untuned: Callable[..., dict[str, int]]
    build: Callable[[Decisions, int, str, MachineTarget], Any]
    unsupported: Callable[[int, str, MachineTarget], str | None]
    is_deterministic: Callable[[Decisions], bool] = lambda decisions: True

    def rejection(self, decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
        """Why ``decisions`` can't be used (unsupported, misnamed, not offered or illegal), or None."""
        reason = self.unsupported(head_dim, dtype, target)
        if reason is not None:
            return reason
        choices = self.choices(head_dim, dtype)
        if set(decisions) != set(choices):
            missing = sorted(set(choices) - set(decisions))
            unknown = sorted(set(decisions) - set(choices))
            return f"decisions must name {sorted(choices)}: missing {missing}, unknown {unknown}"
        for name, value in decisions.items():
            if value not in choices[name]:
                return f"{name}={value!r} is not among the choices {choices[name]}"
        return self.illegal(decisions, head_dim, dtype, target)
