"""Decision spaces: what may be chosen for a kernel family, what is legal, and how a choice becomes TensorIR.

A family names the module-level :class:`Space` of each direction; :func:`spattn_tvm.families.find_space`
imports that module when it is first asked for, and none imports TVM before :attr:`Space.build` is called, so
dispatch can read choices and defaults without the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from spattn_tvm.bands import BandLayout

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
class Cases:
    """Problems that have defaults of their own.

    Parameters
    ----------
    values : tuple of int
        All there are; 0, which `Space.untuned` takes for granted, among them.
    of : (problem, target) -> int
        The case of a problem on a target.
    shown : (problem) -> str
        What of a problem decides, for people: ``"361 keys a query"``.
    others : (problem, target) -> iterable of AttentionProblem
        Problems like one, of the other cases.
    is_alike : (problem, problem) -> bool
        Whether what was measured for one problem is better evidence for another than a default, though they
        are different cases.
    """

    values: tuple[int, ...]
    of: Callable[[AttentionProblem, MachineTarget], int]
    shown: Callable[[AttentionProblem], str]
    others: Callable[[AttentionProblem, MachineTarget], Iterable[AttentionProblem]]
    is_alike: Callable[[AttentionProblem, AttentionProblem], bool] = lambda wanted, known: False


# In |log2| of mean keys a query. Records are made at lengths four times apart: what lies between two of them
# is within a factor of two of one.
_FAR = 1.25


def cases_by_width(*steps: int) -> Cases:
    """Cases by the mean number of keys a query: the greatest step that a problem reaches, or 0."""

    def of(problem: AttentionProblem, target: MachineTarget) -> int:
        return max((step for step in steps if step <= problem.mean_keys), default=0)

    def others(problem: AttentionProblem, target: MachineTarget) -> Iterator[AttentionProblem]:
        edges = (0, *sorted(steps))
        for begin in edges:
            if begin != of(problem, target):
                # Causal bands have half their length of keys a query.
                layout, length = BandLayout.causal(problem.query_heads), 2 * begin or edges[1]
                yield replace(problem, layout=layout, length=length, kv_length=None)

    return Cases(
        values=(0, *steps),
        of=of,
        shown=lambda problem: f"{problem.mean_keys:.0f} keys a query",
        others=others,
        is_alike=lambda wanted, known: abs(math.log2(wanted.mean_keys / known.mean_keys)) <= _FAR,
    )


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
        ``is_deterministic`` holds. A space with `cases` takes ``case=0`` as well.
    build : (decisions, head_dim, dtype, target) -> tvm.IRModule
        The kernel, exporting one function named after the direction. Imports TVM.
    unsupported : (head_dim, dtype, target) -> str or None
        Why no decision of the space can serve a head dim, dtype or target, or None. Asked before the others.
    is_deterministic : (decisions) -> bool
        Whether results are bitwise equal from run to run. By default they are.
    cases : Cases, optional
        Between which problems `untuned` makes a difference.
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
    cases: Cases | None = None

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

    def untuned_for(
        self, problem: AttentionProblem, target: MachineTarget, deterministic: bool = False
    ) -> dict[str, int]:
        """Decisions without a search for a problem."""
        case = {} if self.cases is None else {"case": self.cases.of(problem, target)}
        return self.untuned(problem.head_dim, problem.dtype, target, deterministic=deterministic, **case)

    def all_untuned(
        self, head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False
    ) -> list[dict[str, int]]:
        """What `untuned_for` says of any problem, each once."""
        if self.cases is None:
            return [self.untuned(head_dim, dtype, target, deterministic=deterministic)]
        found: list[dict[str, int]] = []
        for case in self.cases.values:
            decisions = self.untuned(head_dim, dtype, target, deterministic=deterministic, case=case)
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
