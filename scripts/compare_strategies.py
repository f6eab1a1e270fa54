"""Time the best of a search, of its random control and the untuned default in turns, in one process.

    spattn tune --shape 1,16,4096,64 --direction forward --trials 64
    spattn tune --shape 1,16,4096,64 --direction forward --trials 64 --strategy random --no-distill
    python scripts/compare_strategies.py            every search under autotune_logs/ that has a control

The medians go to ``comparison.json`` in the log folder of the search, where scripts/update_readme.py looks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from spattn_tvm.target import parse_target
from spattn_tvm.tuning import compare_strategies, find_logs
from spattn_tvm.tuning.log import comparable_measurements, now, read_run

COMPARISON = "comparison.json"


def compare(log_dir: Path, rounds: int) -> dict:
    """Medians by strategy, and with how many trials each found its best."""
    latencies = compare_strategies(log_dir, rounds=rounds)
    trials = {
        read_run(folder)["strategy"]: len(comparable_measurements(folder)) for folder in find_logs(log_dir)
    }
    return {"date": now(), "rounds": rounds, "trials": trials, "latency_us": latencies}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="*", type=Path, help="log folders; all with a control by default")
    parser.add_argument("--log-root", type=Path, default=Path("autotune_logs"))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    folders = arguments.logs or [
        folder
        for folder in find_logs(arguments.log_root)
        if (folder / "random").is_dir() and parse_target(read_run(folder)["target"]).can_run_here() is None
    ]
    if not folders:
        parser.error(f"no search with a random control for this machine under {arguments.log_root}")
    for folder in folders:
        comparison = compare(folder, arguments.rounds)
        (folder / COMPARISON).write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
        shown = ", ".join(f"{name} {us / 1e3:.4g} ms" for name, us in comparison["latency_us"].items())
        print(f"{folder.name}: {shown}")


if __name__ == "__main__":
    main()
