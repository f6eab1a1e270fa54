"""Tests marked ``gpu`` are skipped, with the reason, where PyTorch sees no CUDA device."""

import pytest
import torch
from hypothesis import settings

# A first example may compile a kernel, which no per-example deadline allows for.
settings.register_profile("spattn", deadline=None, print_blob=True)
settings.load_profile("spattn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"no CUDA device for PyTorch {torch.__version__}")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
