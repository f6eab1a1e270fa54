"""``python -m spattn_tvm``: the ``spattn`` command."""

from .cli import main

main()
