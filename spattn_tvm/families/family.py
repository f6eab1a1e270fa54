"""What a kernel family says of itself: where it runs, where its spaces are, and what its functions take.

A function takes tensors of the call, then what it writes, then scratch, then two numbers: the factor of the
scores, and the threads or multiprocessors that it may use. An :class:`Abi` lists them as data, which both who
launches a kernel in this process and who measures it on another machine read. Neither PyTorch nor TVM is
imported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from spattn_tvm.problem import DTYPE_BYTES

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Sizes(NamedTuple):
    """The sizes that the shapes of a call follow from; `workers` are threads or multiprocessors.

    `keys` are the rows that k has: of a paged cache those of a page.
    """

    batch: int
    query_heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    workers: int


Shape = Callable[[Sizes], tuple[int, ...]]


@dataclass(frozen=True)
class Output:
    """A result of the call: like an input, or of a shape of its own.

    Parameters
    ----------
    name : str
    like : str
        The input whose shape, dtype and dimension order the caller gets it in. Without one `shape` and
        `dtype` say it, and it is contiguous.
    shape : (Sizes) -> tuple of int
    dtype : str
    per_query_head : bool
        The kernel writes a contiguous float32 ``(batch, query_heads, keys, head_dim)``; whoever launches it
        sums the query heads of a group and casts the sum.
    has_sign : bool
        Of an ABI that takes positive factors only: it is to be multiplied by the sign of the factor.
    """

    name: str
    like: str = ""
    shape: Shape | None = None
    dtype: str = ""
    per_query_head: bool = False
    has_sign: bool = False

    def __post_init__(self) -> None:
        if bool(self.like) == (self.shape is not None) or (self.shape is not None) != bool(self.dtype):
            raise ValueError(f"output {self.name!r} is either like an input or has a shape and a dtype")
        if self.per_query_head and not self.like:
            raise ValueError(f"output {self.name!r} is summed over query heads into the shape of an input")

    def written(
        self, sizes: Sizes, model: tuple[int, ...] = (), dtype: str = ""
    ) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of what the kernel writes, given those of the input that the output is like."""
        if self.shape is not None:
            return self.shape(sizes), self.dtype
        if self.per_query_head:
            return (sizes.batch, sizes.query_heads, sizes.keys, sizes.head_dim), "float32"
        return model, dtype


@dataclass(frozen=True)
class Scratch:
    """What a kernel needs beside inputs and outputs; contiguous.

    Parameters
    ----------
    name : str
    shape : (Sizes) -> tuple of int
    dtype : str
    only_with : str
        The decision without which (0, or absent) the function has no such argument.
    kept : bool
        The first call finds zeros, and each leaves what the next one needs: one for each stream, whose calls
        follow one another, serves them all. Otherwise it holds anything, before and afterwards.
    """

    name: str
    shape: Shape
    dtype: str
    only_with: str = ""
    kept: bool = False


@dataclass(frozen=True, eq=False)
class Abi:
    """What the function of a family and direction takes, in this order: inputs, outputs, scratch, the factor
    of the scores (float32) and the workers (int32).

    Parameters
    ----------
    inputs : tuple of str
        Tensors of the call, by name. What has four dimensions needs a contiguous last one; the others
        are contiguous as they come.
    outputs : tuple of Output
        In the order in which the caller gets them.
    scratch : tuple of Scratch
    alignment : int
        Bytes that the address and the strides (of dimensions longer than 1) of a four-dimensional input are
        multiples of; others are copied. 1 for any.
    positive_scale : bool
        The kernel takes positive factors only; of another one the sign goes into q, and with that into the
        outputs that have it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    scratch: tuple[Scratch, ...] = ()
    alignment: int = 1
    positive_scale: bool = False
    _variants: dict[tuple[Scratch, ...], Abi] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for output in self.outputs:
            if output.like and output.like not in self.inputs:
                raise ValueError(f"output {output.name!r} is like {output.like!r}, which is no input")
        if self.positive_scale and "q" not in self.inputs:
            raise ValueError("the sign of a factor goes into q, which is no input")
        named = [(item.name, item.dtype) for item in self.outputs]
        for name, dtype in (*named, *((item.name, item.dtype) for item in self.scratch)):
            if dtype and dtype not in (*DTYPE_BYTES, "int32"):
                raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(output.name for output in self.outputs)

    @property
    def takes_other_keys(self) -> bool:
        """Whether a call may have other numbers of keys than of queries, or keys that don't exist."""
        return "key_ranges" in self.inputs or "cache_lengths" in self.inputs

    @cached_property
    def positions(self) -> tuple[int, int]:
        """Of q and k among the inputs."""
        return self.inputs.index("q"), self.inputs.index("k")

    @cached_property
    def ring(self) -> int | None:
        """The position of a ring's table, which has a row for each key/value head if the cache is one."""
        return self.inputs.index("ring") if "ring" in self.inputs else None

    @cached_property
    def models(self) -> tuple[int, ...]:
        """Of each output, the position of the input that it is like, or -1."""
        return tuple(self.inputs.index(output.like) if output.like else -1 for output in self.outputs)

    @cached_property
    def writes_results(self) -> bool:
        """Whether the kernel writes what the caller gets, with nothing left to do to any output."""
        return not any(output.per_query_head for output in self.outputs)

    def of(self, decisions: Mapping[str, int]) -> Abi:
        """The ABI of the kernel with these decisions: without the scratch that it has no argument for."""
        scratch = tuple(item for item in self.scratch if not item.only_with or decisions.get(item.only_with))
        if scratch == self.scratch:
            return self
        if scratch not in self._variants:
            self._variants[scratch] = Abi(
                self.inputs, self.outputs, scratch, self.alignment, self.positive_scale
            )
        return self._variants[scratch]


@dataclass(frozen=True, eq=False)
class Family:
    """Kernels that are built, run and searched in one way.

    Parameters
    ----------
    name : str
        What ``impl`` asks for; lower-case letters, digits and ``_``.
    reference : str
        ``module:ATTRIBUTE`` of this very object, by which another process finds it.
    runs_on : (target) -> bool
        Whether the machine code that it can make is for such a device.
    spaces : mapping of str to str
        For each direction that it has kernels for, ``module:ATTRIBUTE`` of the
        :class:`~spattn_tvm.families.space.Space`, imported when it is first asked for.
    abis : mapping of str to Abi
        For each of the same directions.
    title : str
        What a benchmark's table says of it; its name by default.
    made_for : (problem, target) -> bool
        For a family of kernels for some problems alone: whether a problem is one on a target that the family
        runs on. For those it is preferred to others, and for no other does ``impl="auto"`` take it.
    sources : tuple of str
        Modules, and packages with all their modules, from whose text the kernels come: a library in the cache
        is of use as long as none has changed. By default the module of `reference` alone.
    """

    name: str
    reference: str
    runs_on: Callable[[MachineTarget], bool]
    spaces: Mapping[str, str]
    abis: Mapping[str, Abi]
    title: str = ""
    sources: tuple[str, ...] = ()
    made_for: Callable[[AttentionProblem, MachineTarget], bool] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in ("auto", "reference"):
            raise ValueError(
                "a family's name is made of a-z, 0-9 and _, starts with a letter and is not 'auto' or "
                f"'reference', got {self.name!r}"
            )
        for text in (self.reference, *self.spaces.values()):
            if not _REFERENCE.fullmatch(text):
                raise ValueError(f"family {self.name}: {text!r} is not module:ATTRIBUTE")
        if set(self.spaces) != set(self.abis):
            raise ValueError(
                f"family {self.name} has spaces for {sorted(self.spaces)} and ABIs for {sorted(self.abis)}"
            )
        values: dict[str, Any] = {
            "spaces": MappingProxyType(dict(self.spaces)),
            "abis": MappingProxyType(dict(self.abis)),
            "sources": tuple(self.sources) or (self.reference.partition(":")[0],),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
