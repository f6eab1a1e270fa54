"""The property that matters most: on any problem, forward and backward, ours errs at most twice as much as
plain PyTorch in the same dtype.

1,000 problems by default; ``SPATTN_SWEEP=10000 pytest tests/test_sweep.py`` runs more, and with
``tests/test_hopper.py`` the GPU's.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from sweep import SweepProblem, check_problem, problems

PROBLEMS = int(os.environ.get("SPATTN_SWEEP", "1000"))

sweep = settings(max_examples=PROBLEMS, suppress_health_check=list(HealthCheck))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.timeout(240 + PROBLEMS)
@sweep
@given(problem=problems())
def test_cpu_kernels_err_at_most_twice_as_much_as_plain_pytorch(problem: SweepProblem) -> None:
    check_problem(problem, impl="cpu")
