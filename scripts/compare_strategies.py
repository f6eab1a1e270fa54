"""Time the best of a search, of its random control and the untuned default in turns, in one process.

    spattn tune --shape 1,16,4096,64 --direction forward --budget 64
    spattn tune --shape 1,16,4096,64 --direction forward --budget 64 --strategy random --no-distill
    python scripts/compare_strategies.py            every search under autotune_logs/ that has a control

(``spattn tune --control`` does all three.) The medians go to ``comparison.json`` in the log folder of the
search, where scripts/update_readme.py looks; those of a second kernel family to ``comparison-<family>.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spattn_tvm.target import parse_target
from spattn_tvm.tuning import find_logs, write_comparison
from spattn_tvm.tuning.log import read_run


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
        sampled = read_run(folder / "random")["families"]
        for family in (name for name in read_run(folder)["families"] if name in sampled):
            comparison = write_comparison(folder, family, rounds=arguments.rounds)
            shown = ", ".join(f"{name} {us / 1e3:.4g} ms" for name, us in comparison["latency_us"].items())
            print(f"{folder.name}, {family}: {shown}")


if __name__ == "__main__":
    main()
