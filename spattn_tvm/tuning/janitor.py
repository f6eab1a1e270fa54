"""What is left to do when a search is gone, however it ended: ``python janitor.py FOLDER``.

A killed search can't delete its temporary files, nor end the compilers that its processes started. This
process outlives it: it is told on standard input which process groups are at work, and when that closes it
ends those that still are and deletes the folder. It imports nothing of this package, to start in no time.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

_ATTEMPTS = 50
_PAUSE_S = 0.1


def main(folder: str) -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        word, _, number = line.partition(" ")
        (groups.add if word == "started" else groups.discard)(int(number))
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    # What was just killed may still be writing.
    for _ in range(_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1])
