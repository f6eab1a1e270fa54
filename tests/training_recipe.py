"""The training recipe's scripts, which import one another by their bare names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts/pretrain"
NAMES = ("config", "context", "data", "model", "train", "tables", "throughput")


def import_recipe() -> SimpleNamespace:
    """The scripts as modules, for a process of which they are the only ones of these names."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


@contextmanager
def imported_recipe() -> Iterator[SimpleNamespace]:
    """The same, and nothing of it is left behind."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield import_recipe()
    for name in NAMES:
        del sys.modules[name]
    torch.use_deterministic_algorithms(deterministic)
