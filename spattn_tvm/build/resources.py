"""What a compiled kernel needs: registers, spills and shared memory, as ptxas and the launch tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spattn_tvm.file_reading import parse_json, read_regular_file

# Bytes of spilled registers in a kernel below which nobody need look: a few at the entry cost nothing.
SPILL_TOLERANCE_BYTES = 32
_MOST_METADATA_BYTES = 2**20


def read_ptxas(text: str) -> dict[str, Any]:
    """What ``ptxas -v`` says of each kernel.

    Parameters
    ----------
    text : str
        Its output.

    Returns
    -------
    dict
        ``"kernels"``: by name the registers a thread, the bytes of its stack frame, of spill stores and
        spill loads, and of static shared memory (what a launch asks for on top is not known to ptxas).
        ``"warnings"``: its warnings and remarks on performance, such as that wgmma is serialized.
    """
    kernels: dict[str, dict[str, int]] = {}
    warnings: list[str] = []
    kernel: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '([^']+)'", line):
            kernel = kernels.setdefault(found[1], {})
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", line):
            names = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
            # Functions that are called, not inlined, have a line of their own; the kernel's is the first.
            for name, value in zip(names, found.groups(), strict=True):
                kernel.setdefault(name, int(value))
        elif found := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel["shared_bytes"] = int(shared[1]) if shared else 0
        elif "Local memory used" in line:
            continue  # the line of the spills says it too
        elif re.search(r"ptxas (warning|error)|Potential Performance Loss", line):
            warnings.append(re.sub(r"^ptxas \w+\s*:\s*", "", line.strip()))
    return {"kernels": kernels, "warnings": list(dict.fromkeys(warnings))}


def are_resources(value: object) -> bool:
    """Whether something that was read from a file is of the form that `read_ptxas` returns."""
    if not isinstance(value, dict):
        return False
    kernels, warnings = value.get("kernels", {}), value.get("warnings", [])
    return (
        isinstance(kernels, dict)
        and all(isinstance(facts, dict) for facts in kernels.values())
        and all(type(number) is int for facts in kernels.values() for number in facts.values())
        and isinstance(warnings, list)
        and all(isinstance(text, str) for text in warnings)
    )


def spilled_bytes(resources: Mapping[str, Any] | None) -> int:
    """Bytes of spill stores and loads of all kernels in a library's ``"resources"``; 0 where unknown."""
    kernels = (resources or {}).get("kernels", {}).values()
    return sum(k.get("spill_store_bytes", 0) + k.get("spill_load_bytes", 0) for k in kernels)


def describe_resources(resources: Mapping[str, Any] | None) -> str:
    """Such as ``168 registers, 12 bytes spilled, 224 KiB shared``, a kernel after the other; "" where nothing
    is known.
    """
    parts = []
    for kernel in (resources or {}).get("kernels", {}).values():
        if "registers" not in kernel:
            continue
        spilled = kernel.get("spill_store_bytes", 0) + kernel.get("spill_load_bytes", 0)
        spills = f"{spilled} bytes spilled" if spilled else "no spills"
        shared = kernel.get("shared_bytes", 0) + kernel.get("dynamic_shared_bytes", 0)
        parts.append(
            f"{kernel['registers']} registers, {spills}"
            + (f", {shared / 1024:.0f} KiB shared" if shared else "")
        )
    return "; ".join([*parts, *(resources or {}).get("warnings", [])])


def library_metadata(path: Path) -> dict[str, Any]:
    """What is known of a compiled library: family, decisions, target, ``"resources"``; or nothing, whatever
    stands in the place of its description."""
    try:
        metadata = parse_json(read_regular_file(path.with_suffix(".json"), _MOST_METADATA_BYTES))
    except (OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
