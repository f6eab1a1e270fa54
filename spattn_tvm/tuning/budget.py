"""A tuning command's time: so much for all of it, imports, comparisons and checks included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .log import Measurement
from .search import Deadline

# Python's start and end, which the command itself doesn't see.
_AROUND_S = 3.0
# Of a comparison: preparing the data, whose reference is on disk by then; and loading and checking a kernel.
_PREPARING_S = 2.0
_CHECKING_S = 0.2
_CONTESTANTS = 7
_WINNER_ROUNDS = 9
_CONTROL_ROUNDS = 15
_RECENT = 5
# Of the check: its start, and a random problem with its reference.
_VERIFYING_START_S = 2.0
_VERIFYING_S = 0.12
_VERIFYING_SHARE = 0.1


@dataclass
class TimePlan:
    """How a command that began just now divides its time.

    Parameters
    ----------
    total_s : float
    verified : int
        Random problems that winners are checked on in the end.
    distills, controls : bool
        Whether each problem's searches are followed by a comparison of the winners, and of the strategies.
    """

    total_s: float
    verified: int = 0
    distills: bool = True
    controls: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Time until the command should be over."""
        return max(0.0, self.began + self.total_s - _AROUND_S - time.monotonic())

    def problem_ends(self, problems_left: int) -> float:
        """When (``time.monotonic``) the next of so many problems must be done with."""
        checked_s = _VERIFYING_START_S + _VERIFYING_S * self.verified if self.verified else 0.0
        verifying_s = min(checked_s, _VERIFYING_SHARE * self.total_s)
        return time.monotonic() + max(0.0, self.left_s - verifying_s) / problems_left

    def search_ends(self, problem_ends: float, searches_left: int) -> Deadline:
        """When the next of a problem's searches must end so that its comparisons are over in time."""
        began = time.monotonic()

        def deadline(measured: Sequence[Measurement]) -> float:
            return began + (problem_ends - self._comparing_s(measured) - began) / searches_left

        return deadline

    def _comparing_s(self, measured: Sequence[Measurement]) -> float:
        families = {m.kernel.family for m in measured}
        of_each = [self._family_s([m for m in measured if m.kernel.family == name]) for name in families]
        return sum(of_each) or _PREPARING_S * (self.distills + self.controls)

    def _family_s(self, measured: Sequence[Measurement]) -> float:
        latencies = [m.latency_us * 1e-6 for m in measured if m.latency_us is not None]
        if not latencies:
            return 0.0
        slowdown = statistics.median(m.slowdown for m in measured[-_RECENT:])
        best = sorted(latencies)[:_CONTESTANTS]
        seconds = 0.0
        if self.distills:
            runs_s = (2 * _WINNER_ROUNDS + 3) * statistics.mean(best) * slowdown
            seconds += _PREPARING_S + len(best) * (_CHECKING_S + runs_s)
        if self.controls:
            runs_s = (2 * _CONTROL_ROUNDS + 3) * (latencies[0] + 2 * best[0]) * slowdown
            seconds += _PREPARING_S + 3 * _CHECKING_S + runs_s
        return seconds
