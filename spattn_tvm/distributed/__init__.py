"""Attention over a sequence that several ranks share: each moves what its bands need.

``context_parallel_attention`` is the operator, ``Shards`` says which rows are on which rank (and cuts inputs,
position ids and labels accordingly), ``plan_ranks`` what a strategy moves, in closed form and without torch.
``HeadParallel`` and ``ContextParallel`` are styles for ``parallelize_module``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import context_parallel_attention
    from .exchange import gather
    from .planner import plan_ranks
    from .shards import Shards
    from .styles import ContextParallel, HeadParallel

__all__ = [
    "ContextParallel",
    "HeadParallel",
    "Shards",
    "context_parallel_attention",
    "gather",
    "plan_ranks",
]

_MODULE_OF = {
    "ContextParallel": "styles",
    "HeadParallel": "styles",
    "Shards": "shards",
    "context_parallel_attention": "attention",
    "gather": "exchange",
    "plan_ranks": "planner",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
