"""Banded sparse attention (SPAttention) with tuned TVM kernels behind an ordinary PyTorch function.

``banded_attention(q, k, v, layout)`` is the operator, ``BandLayout`` says which distances each head
attends to, ``BandedAttention`` is the module and ``reference_attention`` the eager oracle. ``tune``,
``explain``, ``export_bundle`` and ``benchmark`` are what the ``spattn`` command does.
Names are imported on first use, so that ``import spattn_tvm`` loads neither torch nor TVM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bands import BandLayout
    from .bundle import load_bundle
    from .cache import BandedCache, PagedCache
    from .dispatch import FallbackWarning
    from .export import export_bundle
    from .nn import BandedAttention
    from .offloaded import OffloadedCaches
    from .ops.attention import banded_attention
    from .ops.decode import banded_attention_decode
    from .ops.padding import pad, unpad
    from .problem import AttentionProblem
    from .reference import reference_attention
    from .workflows import benchmark, explain, tune

__version__ = "0.2.0"

__all__ = [
    "AttentionProblem",
    "BandLayout",
    "BandedAttention",
    "BandedCache",
    "FallbackWarning",
    "OffloadedCaches",
    "PagedCache",
    "banded_attention",
    "banded_attention_decode",
    "benchmark",
    "explain",
    "export_bundle",
    "load_bundle",
    "pad",
    "reference_attention",
    "register_operators",
    "tune",
    "unpad",
]

_MODULE_OF = {
    "AttentionProblem": "problem",
    "BandLayout": "bands",
    "BandedAttention": "nn",
    "BandedCache": "cache",
    "FallbackWarning": "dispatch",
    "OffloadedCaches": "offloaded",
    "PagedCache": "cache",
    "banded_attention": "ops.attention",
    "banded_attention_decode": "ops.decode",
    "benchmark": "workflows",
    "explain": "workflows",
    "export_bundle": "export",
    "load_bundle": "bundle",
    "pad": "ops.padding",
    "reference_attention": "reference",
    "tune": "workflows",
    "unpad": "ops.padding",
}


def register_operators() -> None:
    """Register the operators ``spattn_tvm::banded_attention_forward``, ``…_backward`` and
    ``…_decode`` with PyTorch.

    A process that loads a model which was exported (``torch.export.load``) or compiled ahead of time
    (AOTInductor) calls this first. Otherwise PyTorch could not know the operators by name and would say
    "could not find schema" or that an operator does not exist. Whoever uses ``banded_attention`` has them
    registered already; to call it again does nothing.

    Examples
    --------
    >>> import spattn_tvm
    >>> spattn_tvm.register_operators()
    >>> model = torch.export.load("model.pt2").module()  # doctest: +SKIP
    """
    importlib.import_module(".ops.decode", __name__)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
