"""A variable of a kernel that is written as a class with inline parts."""

from __future__ import annotations

from typing import Any


def scalar(dtype: str, value: Any) -> Any:
    """A variable with a first value, in the function that is being parsed."""
    from tvm.script import tirx as T

    variable = T.local_scalar(dtype).scalar
    T.buffer_store(variable.source, value, [0])
    return variable
