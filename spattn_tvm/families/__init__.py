"""The registry of kernel families: which there are, which run on a target, where their spaces are.

A new family, or a new direction of one, is files of its own wing and here at most a line. One from outside is
announced with :func:`register_family`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from .cpu.abi import FAMILY as CPU
from .family import Family
from .hopper.abi import FAMILY as HOPPER
from .hopper.abi import SPLIT as HOPPER_SPLIT
from .mma.abi import FAMILY as MMA
from .mma.abi import SPLIT as MMA_SPLIT
from .space import Space

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

# In order of preference, for a device that several run on.
_registered: dict[str, Family] = {
    family.name: family for family in (CPU, HOPPER, HOPPER_SPLIT, MMA, MMA_SPLIT)
}
_listeners: list[Callable[[], None]] = []


def call_on_registration(function: Callable[[], None]) -> None:
    """Have a function called whenever a family is registered or unregistered."""
    _listeners.append(function)


def _changed() -> None:
    find_space.cache_clear()
    for function in _listeners:
        function()


def family_names() -> tuple[str, ...]:
    """The registered families, the preferred first."""
    return tuple(_registered)


def register_family(family: Family, *, first: bool = False) -> None:
    """Let calls, searches and exports use a family that is not part of this package.

    Parameters
    ----------
    family : Family
        Other processes (compilers, measuring processes) import it under its `reference`.
    first : bool
        Whether ``impl="auto"`` prefers it to the families registered so far.

    Raises
    ------
    ValueError
        When another family has this name.
    """
    known = _registered.get(family.name)
    if known is family:
        return
    if known is not None:
        raise ValueError(f"there is a family {family.name!r} already, {known.reference}: choose another name")
    others = dict(_registered)
    _registered.clear()
    _registered.update({family.name: family, **others} if first else {**others, family.name: family})
    _changed()


def unregister_family(name: str) -> None:
    """Undo :func:`register_family`; nothing happens for an unknown name."""
    if _registered.pop(name, None) is not None:
        _changed()


def find_family(name: str) -> Family:
    """A registered family.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    family = _registered.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(f"unknown kernel family {name!r}; known: {', '.join(_registered)}")
    return family


def _imported(reference: str) -> object:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute, None)


def resolve_family(name: str) -> Family:
    """A registered family by its name, or one by ``module:ATTRIBUTE``, which is imported and registered.

    For names that come from the program or its user: whoever may write the text may run code.

    Raises
    ------
    ValueError
        For an unknown name, or when the attribute is no family.
    ModuleNotFoundError
        When there is no such module.
    """
    if ":" not in name:
        return find_family(name)
    for known in _registered.values():
        if known.reference == name:
            return known
    family = _imported(name)
    if not isinstance(family, Family):
        raise ValueError(f"{name} must be a Family, found {family!r}")
    if family.reference != name:
        raise ValueError(f"the family {family.name!r} at {name} calls itself {family.reference}")
    register_family(family)
    return family


def families_on(target: MachineTarget) -> tuple[str, ...]:
    """Families whose code runs on ``target``, those that are made for some problems alone among them."""
    return tuple(name for name, family in _registered.items() if family.runs_on(target))


def families_for(target: MachineTarget, problem: AttentionProblem | None = None) -> tuple[str, ...]:
    """Families that ``impl="auto"`` takes on ``target``, the preferred one first: those made for problems
    like ``problem``, then those made for any.
    """
    able = families_on(target)
    special = () if problem is None else tuple(name for name in able if is_made_for(name, problem, target))
    return (*special, *(name for name in able if _registered[name].made_for is None))


def is_made_for(name: str, problem: AttentionProblem, target: MachineTarget) -> bool:
    """Whether a registered family is made for some problems alone, and this is one on its target."""
    family = _registered.get(name)
    if family is None or family.made_for is None:
        return False
    return has_space(name, problem.direction) and family.made_for(problem, target)


def has_space(family: str, direction: str) -> bool:
    """Whether the family is registered and has kernels for this direction; nothing is imported."""
    return family in _registered and direction in _registered[family].spaces


@cache
def find_space(family: str, direction: str) -> Space:
    """The space of a family and direction; imports the family's module on first use.

    Raises
    ------
    ValueError
        For an unknown family, or a direction that it has no kernels for.
    """
    spaces = find_family(family).spaces
    if direction not in spaces:
        raise ValueError(f"the {family} family has no {direction}, only {', '.join(spaces)}")
    space = _imported(spaces[direction])
    if not isinstance(space, Space):
        raise TypeError(f"{spaces[direction]} must be a Space, found {space!r}")
    if (space.family, space.direction) != (family, direction):
        raise ValueError(
            f"{spaces[direction]} is a space of {space.family} {space.direction}, not {family} {direction}"
        )
    return space
