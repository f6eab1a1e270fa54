"""The optional parts of the package: what each is for, and how it is installed.

The package is in no index: what is installed is a checkout or a wheel that was built from one.
"""

from __future__ import annotations

import importlib.util


def install_hint(extra: str) -> str:
    """How an extra is installed, to stand behind a colon or "install it with"."""
    return f"`pip install '.[{extra}]'` in a checkout, or the same with the wheel's path in place of the dot"


def missing_packages(*modules: str) -> list[str]:
    """Those of some modules that are not installed; none is imported."""
    return [name for name in modules if importlib.util.find_spec(name) is None]
