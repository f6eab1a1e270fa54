"""Search a kernel's decisions for this CPU, put the winner into a schedules folder and draw the search.

    python examples/tune_and_plot.py

Six trials, so that it ends soon; a search that finds something takes minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import spattn_tvm
from spattn_tvm import AttentionProblem, BandLayout
from spattn_tvm.plotting import plot_tuning_curve
from spattn_tvm.tuning import curve

TRIALS = 6


def main() -> None:
    problem = AttentionProblem("forward", "float32", 1, 4, 4, 512, 32, BandLayout.spattention(4, 512))
    with tempfile.TemporaryDirectory() as scratch:
        # The best candidates are timed side by side; the winner becomes a record and is checked on random
        # problems. Without `schedules` the record goes where calls find it.
        found = spattn_tvm.tune(
            problem,
            trials=TRIALS,
            log_root=f"{scratch}/autotune_logs",
            schedules=Path(scratch, "schedules"),
            verify_problems=3,
            report=print,
        )
        (result,), (record,) = found.results, found.records
        assert not found.failures, found.failures
        trials, best_us = curve(result.log_dir)
        print(f"{result.trials} trials: untuned {best_us[0]:.0f} us, best {best_us[-1]:.0f} us")
        assert trials[-1] <= TRIALS and min(best_us) == best_us[-1]
        assert record.problem == problem

        points = list(zip(trials, best_us, strict=True))
        picture = plot_tuning_curve([(problem.direction, points)], Path(scratch, "tuning.png"))
        print(f"{picture.name}: {picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
