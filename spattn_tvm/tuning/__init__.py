"""Searching for a problem's fastest decisions, and turning the logs into schedules that ship.

``tune`` measures candidates on this machine and logs them, ``distill`` re-measures the best ones and
writes records. Importing this package loads neither TVM nor xgboost.
"""

from __future__ import annotations

from .distill import compare_strategies, distill, write_comparison
from .log import curve, find_logs
from .search import SearchSettings, TuningResult, tune

__all__ = [
    "SearchSettings",
    "TuningResult",
    "compare_strategies",
    "curve",
    "distill",
    "find_logs",
    "tune",
    "write_comparison",
]
