"""What holds for all tests: ``gpu`` ones are skipped without a CUDA device, ``published`` ones unless
``SPATTN_TEST_ALL`` is set; the longest files come first.
"""

import os
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from spattn_tvm import launch
from spattn_tvm.families import family_names, unregister_family

if TYPE_CHECKING:
    from rank_processes import Ranks

# A first example may compile a kernel, which no per-example deadline allows for.
settings.register_profile("spattn", deadline=None, print_blob=True)
settings.load_profile("spattn")


# Processes that share a run take a file at a time: who takes one of these last keeps the others waiting.
LONGEST_FILES = (
    "test_documentation.py",
    "test_examples.py",
    "test_tuning.py",
    "test_compile_export.py",
    "test_cli.py",
    "test_families.py",
    "test_compilers.py",
    "test_rpc_tuning.py",
    "test_nonfinite.py",
    "test_sweep.py",
    "test_operators.py",
    "test_hopper_backward.py",
    "test_cross_compile.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    if not os.environ.get("SPATTN_TEST_ALL"):
        skip = pytest.mark.skip(reason="only scripts/test --all runs documentation and examples")
        for item in items:
            if "published" in item.keywords:
                item.add_marker(skip)
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


@pytest.fixture
def seed() -> int:
    """A fresh one each time, which a failure's report shows; ``SPATTN_TEST_SEED`` repeats it.

    No parameter of a test: processes that share a run must collect the same names.
    """
    value = int(os.environ.get("SPATTN_TEST_SEED") or random.randrange(2**32))
    print(f"SPATTN_TEST_SEED={value}")
    return value


def _ranks(count: int) -> Iterator["Ranks"]:
    from rank_processes import Ranks

    processes = Ranks(count)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def two() -> Iterator["Ranks"]:
    """Two processes of a gloo group, for a file's tests."""
    yield from _ranks(2)


@pytest.fixture(scope="module")
def four() -> Iterator["Ranks"]:
    """Four, as `two`."""
    yield from _ranks(4)


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
