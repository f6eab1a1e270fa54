"""What a measurement or a build was made with: versions of packages, and facts about the device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of Python and of some packages, without importing them; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """The same without what is not installed."""
    return {name: version for name, version in versions(packages).items() if version is not None}


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_facts(device: torch.device) -> dict[str, Any]:
    """A device's name and size: cores of a CPU that this process may use; of a GPU multiprocessors and
    memory in MiB, CUDA version of PyTorch and version of the driver (None where it is not told)."""
    import torch

    if device.type == "cpu":
        return {"name": _cpu_name(), "cores": available_cpus()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory // 2**20,
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    words = text.splitlines()[0].split()
    return next((word for word in words if word[:1].isdigit() and "." in word), None)
