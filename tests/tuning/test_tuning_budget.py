"""The time of a tuning command: every part of it gets its share, and the sum is what was asked for."""

from __future__ import annotations

import time

import pytest

from spattn_tvm.bands import BandLayout
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.tuning.budget import TimePlan
from spattn_tvm.tuning.log import Measurement

PROBLEM = AttentionProblem("forward", "float32", 2, 4, 2, 128, 32, BandLayout.spattention(4, 128))


def measured(*latencies_ms: float, slowdown: float = 1.0, family: str = "cpu") -> list[Measurement]:
    return [
        Measurement(KernelSpec.of(family, PROBLEM, {"rows": index}), "code", 1e3 * ms, None, 0.0, slowdown)
        for index, ms in enumerate(latencies_ms)
    ]


def test_problems_share_what_the_check_leaves() -> None:
    plan, now = TimePlan(200.0, verified=40), time.monotonic()
    one, four = (plan.problem_ends(problems) - now for problems in (1, 4))
    assert 180.0 < one < 195.0 and four == pytest.approx(one / 4, abs=0.1)
    late = TimePlan(200.0, verified=40, began=now - 150.0)
    assert 30.0 < late.problem_ends(1) - now < 45.0
    over = TimePlan(200.0, began=now - 300.0)
    assert over.left_s == 0.0 and over.problem_ends(3) - now == pytest.approx(0.0, abs=0.1)


def test_a_search_ends_early_enough_for_what_follows_it() -> None:
    now = time.monotonic()

    def left_s(plan: TimePlan, found: list[Measurement], searches: int = 1) -> float:
        return plan.search_ends(now + 100.0, searches)(found) - now

    plan = TimePlan(1000.0)
    fast, slow = left_s(plan, measured(*[1.0] * 9)), left_s(plan, measured(*[200.0] * 9))
    # Seven contestants in nine rounds of two runs: 126 runs.
    assert 90.0 < fast < 98.0 and 100.0 - 126 * 0.2 * 1.6 < slow < 100.0 - 126 * 0.2
    assert left_s(plan, measured(*[100.0] * 9, slowdown=2.0)) == pytest.approx(slow, abs=0.1)
    assert left_s(plan, measured(*[1.0] * 9), searches=2) == pytest.approx(fast / 2, abs=0.1)
    with_control = left_s(TimePlan(1000.0, controls=True), measured(*[200.0] * 9))
    assert with_control < slow - 90 * 0.2
    both = left_s(plan, measured(*[200.0] * 9) + measured(*[200.0] * 9, family="mma"))
    assert 100.0 - both == pytest.approx(2 * (100.0 - slow), abs=0.1)
    bare = TimePlan(1000.0, distills=False)
    assert left_s(bare, measured(*[200.0] * 9)) == pytest.approx(100.0, abs=0.1)
    assert left_s(plan, []) > 90.0
