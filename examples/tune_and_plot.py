"""Search a kernel's decisions for this CPU, put the winner into a schedules folder and draw the search.

    python examples/tune_and_plot.py

Six trials, so that it ends soon; a search that finds something takes minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from spattn_tvm import BandLayout
from spattn_tvm.plotting import plot_tuning_curve
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import parse_target
from spattn_tvm.tuning import curve, distill, tune

TRIALS = 6


def main() -> None:
    problem = AttentionProblem("forward", "float32", 1, 4, 4, 512, 32, BandLayout.spattention(4, 512))
    target = parse_target("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        logs, schedules = Path(scratch) / "autotune_logs", Path(scratch) / "schedules"
        result = tune(problem, target, trials=TRIALS, log_root=logs, schedules=schedules)
        trials, best_us = curve(result.log_dir)
        print(f"{result.trials} trials: untuned {best_us[0]:.0f} us, best {best_us[-1]:.0f} us")
        assert trials[-1] <= TRIALS and min(best_us) == best_us[-1]

        picture = plot_tuning_curve(
            [(problem.direction, list(zip(trials, best_us, strict=True)))], Path(scratch) / "tuning.png"
        )
        print(f"{picture.name}: {picture.stat().st_size / 1024:.0f} KiB")

        # The best candidates are timed side by side; the winner becomes a record that calls find.
        (record,) = distill(logs, target=target, schedules=schedules)
        print(f"{record.kernel.name}: {dict(record.kernel.decisions)}")


if __name__ == "__main__":
    main()
