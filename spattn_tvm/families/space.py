"""Decision spaces: what may be chosen for a kernel family, what is legal, and how a choice becomes TensorIR.

A family names the module-level :class:`Space` of each direction; :func:`spattn_tvm.families.find_space`
imports that module when it is first asked for, and none imports TVM before :attr:`Space.build` is called, so
dispatch can read choices and defaults without the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

Decisions = Mapping[str, int]
Choices = Mapping[str, tuple[int, ...]]
Structures = Mapping[str, Choices]

# By which features count rounds of a GPU, whatever the chip: only their scale hangs on it.
MULTIPROCESSORS = 132


def one_structure(choices: Callable[[int, str], Choices]) -> Callable[[int, str], Structures]:
    """For :attr:`Space.structures`: all kernels make the same decisions."""
    return lambda head_dim, dtype: {"": choices(head_dim, dtype)}


@lru_cache(maxsize=256)
def _told_apart(
    structures: Callable[[int, str], Structures], head_dim: int, dtype: str
) -> tuple[Structures, tuple[str, ...]]:
    """A space's structures, and the decisions that all make, each with values of its own: none if it is one.

    Kept, because a lookup asks for each record, and there is one for each new length.
    """
    found = structures(head_dim, dtype)
    if len(found) == 1:
        return found, ()
    shared = set.intersection(*(set(choices) for choices in found.values()))
    values = {name: [value for choices in found.values() for value in choices[name]] for name in shared}
    return found, tuple(name for name in sorted(shared) if len(set(values[name])) == len(values[name]))


@dataclass(frozen=True)
class Space:
    """The decisions of one kernel family and direction. Most fields are functions.

    Parameters
    ----------
    family : str
        Its name.
    direction : str
        ``"forward"``, ``"backward"`` or whatever else the family has kernels for.
    structures : (head_dim, dtype) -> dict[str, dict[str, tuple[int, ...]]]
        For a supported head dim and dtype name: of each structure that a kernel may have, by a name that
        people read, its decisions and the values that they may take. A decision that says nothing under a
        structure is not among its own. Several structures are told apart by a decision that all have, each
        with values of its own. :func:`one_structure` makes this of a space without.
    illegal : (decisions, head_dim, dtype, target) -> str or None
        Why a combination of a structure's values can't be built (shared memory, registers, divisibility),
        or None.
    features : (decisions, problem) -> list[float]
        What the cost model learns from besides the decisions; the same length for every structure.
    untuned : (head_dim, dtype, target, deterministic=False) -> dict[str, int]
        Legal decisions for any problem, chosen without a search; with ``deterministic`` such that
        ``is_deterministic`` holds. A space with `width_steps` takes ``width=0`` as well.
    build : (decisions, head_dim, dtype, target) -> tvm.IRModule
        The kernel, exporting one function named after the direction. Imports TVM.
    unsupported : (head_dim, dtype, target) -> str or None
        Why no decision of the space can serve a head dim, dtype or target, or None. Asked before the others.
    is_deterministic : (decisions) -> bool
        Whether results are bitwise equal from run to run. By default they are.
    width_steps : tuple of int
        Mean numbers of keys a query from which `untuned` has other decisions. It is given the greatest that
        a problem reaches, or 0, as ``width``.
    """

    family: str
    direction: str
    structures: Callable[[int, str], Structures]
    illegal: Callable[[Decisions, int, str, MachineTarget], str | None]
    features: Callable[[Decisions, AttentionProblem], list[float]]
    untuned: Callable[..., dict[str, int]]
    build: Callable[[Decisions, int, str, MachineTarget], Any]
    unsupported: Callable[[int, str, MachineTarget], str | None]
    is_deterministic: Callable[[Decisions], bool] = lambda decisions: True
    width_steps: tuple[int, ...] = ()

    def structure(self, decisions: Decisions, head_dim: int, dtype: str) -> str | None:
        """The structure of a kernel, by the decisions that tell structures apart; None if it is of none."""
        structures, telling = _told_apart(self.structures, head_dim, dtype)
        for name, choices in structures.items():
            if all(decisions.get(key) in choices[key] for key in telling):
                return name
        return None

    def names(self, head_dim: int, dtype: str) -> tuple[str, ...]:
        """The decisions of all structures, sorted."""
        return tuple(
            sorted({name for choices in self.structures(head_dim, dtype).values() for name in choices})
        )

    def without_idle(self, decisions: Decisions, head_dim: int, dtype: str) -> dict[str, int]:
        """Decisions without those that only other structures make: earlier versions recorded them too."""
        structure = self.structure(decisions, head_dim, dtype)
        if structure is None:
            return dict(decisions)
        idle = set(self.names(head_dim, dtype)) - set(self.structures(head_dim, dtype)[structure])
        return {name: value for name, value in decisions.items() if name not in idle}

    def untuned_at(
        self,
        mean_keys: float,
        head_dim: int,
        dtype: str,
        target: MachineTarget,
        deterministic: bool = False,
    ) -> dict[str, int]:
        """Decisions without a search for problems whose queries attend to so many keys on average."""
        if not self.width_steps:
            return self.untuned(head_dim, dtype, target, deterministic=deterministic)
        width = max((step for step in self.width_steps if step <= mean_keys), default=0)
        return self.untuned(head_dim, dtype, target, deterministic=deterministic, width=width)

    def all_untuned(
        self, head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False
    ) -> list[dict[str, int]]:
        """What `untuned_at` says for any problem, each once."""
        found: list[dict[str, int]] = []
        for width in (0, *self.width_steps):
            decisions = self.untuned_at(width, head_dim, dtype, target, deterministic)
            if decisions not in found:
                found.append(decisions)
        return found

    def rejection(self, decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
        """Why ``decisions`` can't be used (unsupported, misnamed, not offered or illegal), or None."""
        reason = self.unsupported(head_dim, dtype, target)
        if reason is not None:
            return reason
        structures, _ = _told_apart(self.structures, head_dim, dtype)
        structure = self.structure(decisions, head_dim, dtype)
        if structure is None:
            return f"{dict(decisions)} have none of the structures: {', '.join(structures)}"
        choices = structures[structure]
        of = f" of {structure}" if structure else ""
        if set(decisions) != set(choices):
            missing = sorted(set(choices) - set(decisions))
            unknown = sorted(set(decisions) - set(choices))
            return f"decisions{of} must name {sorted(choices)}: missing {missing}, unknown {unknown}"
        for name, value in decisions.items():
            if value not in choices[name]:
                return f"{name}={value!r} is not among the choices{of} {choices[name]}"
        return self.illegal(decisions, head_dim, dtype, target)
