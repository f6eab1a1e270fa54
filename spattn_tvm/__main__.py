"""The ``spattn`` command and ``python -m spattn_tvm``, which is the same.

What it is made of comes with an extra: without that the answer is one line.
"""

import sys

from .extras import install_hint, missing_packages


def main() -> None:
    """Entry point: the command, or how to get it."""
    missing = missing_packages("typer", "rich")
    if missing:
        sys.exit(f"error: the command needs {' and '.join(missing)}: {install_hint('cli')}")
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
