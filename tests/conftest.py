"""Tests marked ``gpu`` are skipped, with the reason, where PyTorch sees no CUDA device."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from spattn_tvm import launch
from spattn_tvm.families import family_names, unregister_family

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


@pytest.fixture(autouse=True)
def _families_of_the_package_alone() -> Iterator[None]:
    """What a test registers serves no other test."""
    known = family_names()
    yield
    for name in set(family_names()) - set(known):
        unregister_family(name)


@pytest.fixture(scope="module")
def poisoned_outputs() -> Iterator[None]:
    """Whatever a kernel is given to write holds NaN before, so that what it leaves out is seen."""

    def poisoning(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate

    class Poisoning:
        def __getattr__(self, name: str) -> Any:
            original = getattr(torch, name)
            return poisoning(original) if name in ("empty", "empty_like") else original

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "torch", Poisoning())
        for name in ("empty_on_cpu", "empty_on_cuda"):
            patch.setattr(launch, name, poisoning(getattr(launch, name)))
        patch.setattr(Tensor, "new_empty", poisoning(Tensor.new_empty))
        yield
