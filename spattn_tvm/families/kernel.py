"""The name of a kernel: what is built, cached, recorded, bundled, verified, searched and served."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from spattn_tvm.bands import require_int
from spattn_tvm.families import find_family, find_space
from spattn_tvm.problem import DTYPE_BYTES

from .family import Abi, Family
from .space import Space

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget


class FrozenDecisions(Mapping[str, int]):
    """Decisions in the order of their names, which never change: hashable, and equal to a dict of the same.

    Raises
    ------
    ValueError
        When they don't map names to integers.
    """

    __slots__ = ("_hash", "_values")

    def __init__(self, decisions: Mapping[str, int]) -> None:
        if not isinstance(decisions, Mapping) or not all(
            isinstance(name, str) and isinstance(value, int) and not isinstance(value, bool)
            for name, value in decisions.items()
        ):
            raise ValueError(f"decisions must map names to integers, got {decisions!r}")
        self._values = dict(sorted(decisions.items()))
        self._hash = hash(tuple(self._values.items()))

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDecisions, (self._values,)

    def __repr__(self) -> str:
        return repr(self._values)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._values.items())


@dataclass(frozen=True)
class KernelSpec:
    """One kernel, for any target that its family runs on. A value: hashable, comparable, sorted.

    Parameters
    ----------
    family : str
        A registered family.
    direction : str
        One that the family has kernels for.
    dtype : str
        Dtype of q, k and v: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    head_dim : int
    decisions : mapping of str to int
        A value for each choice of the space. Whether the space offers them is :meth:`rejection`'s to say.

    Raises
    ------
    ValueError, TypeError
        For an unknown family, direction or dtype, or values that make no kernel.
    """

    family: str
    direction: str
    dtype: str
    head_dim: int
    decisions: Mapping[str, int]

    def __post_init__(self) -> None:
        abis = find_family(self.family).abis
        if self.direction not in abis:
            raise ValueError(f"the {self.family} family has no {self.direction!r}, only {', '.join(abis)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        object.__setattr__(self, "head_dim", require_int("head_dim", self.head_dim, 1))
        if not isinstance(self.decisions, FrozenDecisions):
            object.__setattr__(self, "decisions", FrozenDecisions(self.decisions))

    @classmethod
    def of(cls, family: str, problem: AttentionProblem, decisions: Mapping[str, int]) -> KernelSpec:
        """The kernel of a family that serves a problem with some decisions."""
        return cls(family, problem.direction, problem.dtype, problem.head_dim, decisions)

    @classmethod
    def recorded(cls, family: str, problem: AttentionProblem, decisions: Mapping[str, int]) -> KernelSpec:
        """The kernel that a record or a log names, which an earlier version may have written: then with
        placeholders for the decisions of other structures, which are dropped.
        """
        kernel = cls.of(family, problem, decisions)
        own = kernel.space.without_idle(kernel.decisions, kernel.head_dim, kernel.dtype)
        return replace(kernel, decisions=own)

    @classmethod
    def untuned(
        cls, family: str, problem: AttentionProblem, target: MachineTarget, deterministic: bool = False
    ) -> KernelSpec:
        """The kernel that a family's space names for a problem without a search."""
        space = find_space(family, problem.direction)
        return cls.of(family, problem, space.untuned_for(problem, target, deterministic))

    def __str__(self) -> str:
        return f"{self.family} {self.direction} {self.dtype} head dim {self.head_dim}"

    @cached_property
    def name(self) -> str:
        """A short file-safe name: ``cpu-forward-float32-d64-`` and 8 hexadecimal digits of the decisions."""
        digest = hashlib.sha256(json.dumps(dict(self.decisions)).encode()).hexdigest()[:8]
        return f"{self.family}-{self.direction}-{self.dtype}-d{self.head_dim}-{digest}"

    @property
    def source(self) -> Family:
        """The family itself."""
        return find_family(self.family)

    @property
    def space(self) -> Space:
        """The space that the decisions are a point of; imports its module."""
        return find_space(self.family, self.direction)

    @cached_property
    def abi(self) -> Abi:
        """What its function takes."""
        return self.source.abis[self.direction].of(self.decisions)

    @cached_property
    def is_deterministic(self) -> bool:
        """Whether its results are bitwise equal from run to run."""
        return self.space.is_deterministic(self.decisions)

    def serves(self, problem: AttentionProblem) -> bool:
        """Whether it is made for the problem's direction, dtype and head dim; shapes and layouts are data."""
        return (self.direction, self.dtype, self.head_dim) == (
            problem.direction,
            problem.dtype,
            problem.head_dim,
        )

    def rejection(self, target: MachineTarget) -> str | None:
        """Why it can't be built for a target, or None."""
        return self.space.rejection(self.decisions, self.head_dim, self.dtype, target)

    def build(self, target: MachineTarget) -> Any:
        """Its ``tvm.IRModule``, which exports a function named after the direction. Imports TVM."""
        return self.space.build(self.decisions, self.head_dim, self.dtype, target)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values."""
        return {
            "family": self.family,
            "direction": self.direction,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "decisions": dict(self.decisions),
        }

    @classmethod
    def from_json(cls, data: Any) -> KernelSpec:
        """The kernel that `to_json` wrote.

        Raises
        ------
        ValueError, TypeError
            For unknown or missing fields, or values that the constructor refuses.
        """
        names = set(cls.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"a kernel is a JSON object with the fields {sorted(names)}, got {data!r}")
        return cls(**data)


def is_far(
    family: str,
    wanted: AttentionProblem,
    known: AttentionProblem,
    target: MachineTarget,
    deterministic: bool = False,
    *,
    measured: bool = True,
) -> bool:
    """Whether a kernel for a problem is none for another, because the family's own default is another
    kernel there: the bands are so much wider or narrower, or the tiles so many or few.

    Where the default is the same for both, a kernel that was `measured` is better evidence than it, and so it
    is where the space says that the problems are alike.
    """
    space = find_space(family, wanted.direction)
    if space.cases is None or (measured and space.cases.is_alike(wanted, known)):
        return False
    # In the wanted dtype, since a record of another one may serve.
    wanted_default, known_default = (
        space.untuned(
            wanted.head_dim,
            wanted.dtype,
            target,
            deterministic=deterministic,
            case=space.cases.of(problem, target),
        )
        for problem in (wanted, known)
    )
    return wanted_default != known_default
