"""Programs that tests run as a reader would."""

import subprocess
from typing import Any

# A thread of gloo's may be the last to hold a tensor that Python knows. If it lets go while Python ends, the
# process is aborted, its work done (pytorch/pytorch#190489): seen once, on a busy machine.
_ABORTED_AT_ITS_END = "terminate called without an active exception"


def run_program(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` returns of a text program; once more if PyTorch aborted it at its end."""
    done = subprocess.run(arguments, text=True, **options)
    if done.returncode and _ABORTED_AT_ITS_END in f"{done.stdout}{done.stderr}":
        done = subprocess.run(arguments, text=True, **options)
    return done
