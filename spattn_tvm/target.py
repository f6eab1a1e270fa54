"""This machine, or a named chip, as a compilation target.

A :class:`MachineTarget` names the instruction set that kernels are compiled for (``arch``) and the chip
model that schedules were measured on (``model``). Detection reads files and, for CUDA, asks PyTorch; TVM is
imported only by :meth:`MachineTarget.tvm_target`.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

GENERIC_MODEL = "generic"

# Flags of /proc/cpuinfo that each level adds, from the x86-64 psABI ("abm" is the kernel's name for LZCNT).
_X86_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("x86-64-v2", frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"})),
    ("x86-64-v3", frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})),
    ("x86-64-v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
)
_CPU_ARCHS = ("x86-64", *(level for level, _ in _X86_LEVELS), "aarch64")


class _Chip(NamedTuple):
    arch: str
    multiprocessors: int


# By the words of its name that make it another chip. Multiprocessors from NVIDIA's architecture whitepapers
# (A100, GA102, Ada, H100, RTX Blackwell) and, of cards that none names, from the CUDA cores of their data
# sheets: 64 a multiprocessor on sm_80, else 128. H20 and B200, for which neither says it: as CUDA reports it.
_CHIPS: dict[str, _Chip] = {
    "a100": _Chip("sm_80", 108),
    "a10": _Chip("sm_86", 72),
    "a40": _Chip("sm_86", 84),
    "rtx3090": _Chip("sm_86", 82),
    "l40s": _Chip("sm_89", 142),
    "rtx4090": _Chip("sm_89", 128),
    "rtx4090-d": _Chip("sm_89", 114),
    "h100": _Chip("sm_90a", 132),
    "h100-pcie": _Chip("sm_90a", 114),
    "h200": _Chip("sm_90a", 132),
    "h800": _Chip("sm_90a", 132),
    "h800-pcie": _Chip("sm_90a", 114),
    "h20": _Chip("sm_90a", 78),
    "gh200": _Chip("sm_90a", 132),
    "b200": _Chip("sm_100a", 148),
    "rtx5090": _Chip("sm_120a", 170),
}
# From sm_90 on, code for the "a" variant may use the chip's own instructions (wgmma, TMA) and every chip of
# that compute capability runs it.
_CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


def _capability(arch: str) -> tuple[int, int]:
    """``"sm_90a"`` → (9, 0)."""
    major, minor = divmod(int(re.sub(r"\D", "", arch)), 10)
    return major, minor


_ARCH_OF_CAPABILITY = {_capability(arch): arch for arch in _CUDA_ARCHS}

# Shared memory in KiB that a thread block can have (CUDA programming guide, compute capabilities). The blocks
# of a multiprocessor share 1 KiB more, and each takes as much beside its own.
_SHARED_KIB_OF_BLOCK = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120a": 99}
_REGISTERS_OF_MULTIPROCESSOR = 65536
_REGISTERS_OF_THREAD = 255


def is_before_hopper(arch: str) -> bool:
    """Whether a CUDA instruction set lacks what came with sm_90, in its code for every chip of that
    capability: threads that sleep at an mbarrier, atomic adds of several floats.
    """
    return _capability(arch) < (9, 0)


def shared_bytes_most(arch: str, blocks: int = 1) -> int:
    """Shared memory in bytes that a thread block can have when `blocks` of them run on a multiprocessor."""
    of_block = _SHARED_KIB_OF_BLOCK[arch] * 1024
    shared = (of_block + 1024) // blocks - 1024
    return min(shared // 128 * 128, of_block)


def registers_at_launch(threads: int, blocks: int = 1) -> int:
    """Registers that a block's threads are allotted each when `blocks` blocks of `threads` run on a
    multiprocessor. From sm_90a on warpgroups may hand them to one another.
    """
    return _REGISTERS_OF_MULTIPROCESSOR // (threads * blocks) // 8 * 8


def registers_most(threads: int, blocks: int = 1) -> int:
    """Registers that a thread can have when `blocks` blocks of `threads` run on a multiprocessor."""
    return min(registers_at_launch(threads, blocks), _REGISTERS_OF_THREAD)


@dataclass(frozen=True)
class MachineTarget:
    """What a kernel is compiled for, and the chip its schedule was measured on.

    Parameters
    ----------
    kind : {"cpu", "cuda"}
    arch : str
        Instruction set: ``"x86-64"``, ``"x86-64-v2"`` to ``"x86-64-v4"`` or ``"aarch64"`` on a CPU,
        ``"sm_80"`` and so on with CUDA.
    model : str
        Slug of the chip model (``"amd-25-17"``, ``"nvidia-h200"``), or ``"generic"`` when only the
        instruction set is known.
    """

    kind: str
    arch: str
    model: str = GENERIC_MODEL

    def __post_init__(self) -> None:
        known = {"cpu": _CPU_ARCHS, "cuda": _CUDA_ARCHS}.get(self.kind)
        if known is None:
            raise ValueError(f"target kind must be 'cpu' or 'cuda', got {self.kind!r}")
        if self.arch not in known:
            raise ValueError(f"unknown {self.kind} architecture {self.arch!r}; known: {', '.join(known)}")
        # A model "v3" of x86-64 would make the folder name of another instruction set.
        if not re.fullmatch(r"(?!v\d)[a-z0-9]+(-[a-z0-9]+)*", self.model):
            raise ValueError(f"target model must be a slug of a-z, 0-9 and '-', got {self.model!r}")

    @property
    def folder(self) -> str:
        """Folder name under ``schedules/`` and ``autotune_logs/``; :func:`parse_target` reads it back."""
        return f"{self.kind}-{self.arch}-{self.model}"

    @property
    def multiprocessors(self) -> int:
        """Multiprocessors of the chip model, by which a call is judged to fill it or not; 0 of a CPU.

        Of a model that isn't known, such as a slice of a chip (MIG), those of the largest known chip with its
        instruction set. They are not read from the device: a search, an export from another machine and the
        call must judge alike. What a kernel is launched with is read from it.
        """
        known = _CHIPS.get(self.model.removeprefix("nvidia-"))
        if known is not None and known.arch == self.arch:
            return known.multiprocessors
        return max((chip.multiprocessors for chip in _CHIPS.values() if chip.arch == self.arch), default=0)

    def tvm_target(self) -> Any:
        """The ``tvm.target.Target`` to compile with. Imports TVM."""
        from tvm.target import Target

        return Target(self.tvm_config())

    def tvm_config(self) -> dict[str, Any]:
        """The arguments of :meth:`tvm_target` as a JSON-ready dictionary, without importing TVM."""
        if self.kind == "cuda":
            return {"kind": "cuda", "arch": self.arch}
        if self.arch == "aarch64":
            return {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "generic", "mattr": ["+neon"]}
        return {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": self.arch}

    def runs_on(self, device: MachineTarget) -> bool:
        """Whether machine code for this target runs on a chip that is described by another one.

        On a CPU every level includes the lower ones. A cubin runs on its own compute capability, and unless
        it is an "a" variant on later minors of the same major: sm_80 on sm_86, but not on sm_90a.
        """
        if self.kind != device.kind:
            return False
        if self.kind == "cuda":
            return _cubin_runs(self.arch, _capability(device.arch))
        if "aarch64" in (self.arch, device.arch):
            return self.arch == device.arch
        return _CPU_ARCHS.index(self.arch) <= _CPU_ARCHS.index(device.arch)

    def can_run_here(self, device_index: int | None = None) -> str | None:
        """Why code for this target can't run on this machine, or None when it can.

        Parameters
        ----------
        device_index : int, optional
            CUDA device to ask about; any device will do when omitted.
        """
        if self.kind == "cpu":
            here = detect_cpu()
            return (
                None if self.runs_on(here) else f"it is compiled for {self.arch} and this CPU is {here.arch}"
            )

        import torch

        if not torch.cuda.is_available():
            return (
                f"it needs a CUDA device of {self.arch} and PyTorch {torch.__version__} sees no CUDA device"
            )
        indices = range(torch.cuda.device_count()) if device_index is None else (device_index,)
        seen = []
        for index in indices:
            capability = torch.cuda.get_device_capability(index)
            if _cubin_runs(self.arch, capability):
                return None
            seen.append(
                f"{torch.cuda.get_device_name(index)} (compute capability {capability[0]}.{capability[1]})"
            )
        return f"it is compiled for {self.arch} and the device is {', '.join(seen)}"


def _cubin_runs(arch: str, capability: tuple[int, int]) -> bool:
    """A cubin runs on its own compute capability, and unless it is an "a" variant on later minors."""
    major, minor = _capability(arch)
    if arch.endswith("a"):
        return (major, minor) == tuple(capability)
    return major == capability[0] and minor <= capability[1]


def _x86_level(flags: frozenset[str]) -> str:
    level = "x86-64"
    for name, needed in _X86_LEVELS:
        if not needed <= flags:
            break
        level = name
    return level


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or GENERIC_MODEL


def _parse_cpuinfo(text: str, machine: str) -> MachineTarget:
    first = text.split("\n\n", 1)[0]
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    if machine in ("aarch64", "arm64"):
        implementer, part = fields.get("CPU implementer"), fields.get("CPU part")
        model = f"arm-{_slug(implementer)}-{_slug(part)}" if implementer and part else GENERIC_MODEL
        return MachineTarget("cpu", "aarch64", model)
    if machine not in ("x86_64", "amd64"):
        raise ValueError(f"no CPU kernels for a {machine!r} machine; known: x86_64, aarch64")
    vendor = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(fields.get("vendor_id", ""), "")
    vendor = vendor or _slug(fields.get("vendor_id", ""))
    family, number = fields.get("cpu family"), fields.get("model")
    model = f"{vendor}-{_slug(family)}-{_slug(number)}" if family and number else GENERIC_MODEL
    return MachineTarget("cpu", _x86_level(frozenset(fields.get("flags", "").split())), model)


@cache
def detect_cpu() -> MachineTarget:
    """This machine's CPU.

    Without ``/proc/cpuinfo`` (macOS, Windows) the answer is the lowest instruction set of the architecture.

    Raises
    ------
    ValueError
        On an architecture that is neither x86-64 nor aarch64.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return _parse_cpuinfo(text, platform.machine().lower())


def _cuda_model(name: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` → ``"nvidia-h100"``; unknown chips, MIG and laptop parts stay whole."""
    slug = _slug(name)
    words = set(re.sub(r"\brtx-(\d)", r"rtx\1", slug).split("-"))
    if not {"mig", "laptop"} & words:
        named = [chip for chip in _CHIPS if words.issuperset(chip.split("-"))]
        if named:
            return f"nvidia-{max(named, key=len)}"
    return slug if slug.startswith("nvidia") else f"nvidia-{slug}"


def cuda_target(name: str, capability: tuple[int, int]) -> MachineTarget:
    """The target of a GPU with a name as its driver gives it.

    Raises
    ------
    ValueError
        When no kernels are made for its compute capability.
    """
    arch = _ARCH_OF_CAPABILITY.get((capability[0], capability[1]))
    if arch is None:
        known = ", ".join(_CUDA_ARCHS)
        raise ValueError(
            f"no kernels for {name}, compute capability {capability[0]}.{capability[1]}; known: {known}"
        )
    return MachineTarget("cuda", arch, _cuda_model(name))


@cache
def detect_cuda(index: int = 0) -> MachineTarget:
    """CUDA device ``index`` of this machine, as PyTorch sees it.

    Raises
    ------
    RuntimeError
        Without such a device.
    ValueError
        When no kernels are made for its compute capability.
    """
    import torch

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RuntimeError(f"no CUDA device {index}: PyTorch {torch.__version__} sees {count} CUDA devices")
    return cuda_target(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def parse_targets(text: str) -> tuple[MachineTarget, ...]:
    """Different targets from a comma-separated list of names, in its order; see :func:`parse_target`.

    Raises
    ------
    ValueError, RuntimeError
        As :func:`parse_target` does; or for an empty list.
    """
    names = [name for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"name at least one target, got {text!r}")
    return tuple(dict.fromkeys(parse_target(name) for name in names))


def parse_target(text: str) -> MachineTarget:
    """A target from its name.

    Parameters
    ----------
    text : str
        ``"cpu"`` or ``"cuda"`` (this machine), an instruction set (``"cpu-x86-64-v3"``, ``"x86-64-v3"``,
        ``"sm_80"``), a chip (``"nvidia/h200"``, ``"h200"``) or a schedule folder's name
        (``"cuda-sm_90a-nvidia-h200"``).

    Raises
    ------
    ValueError
        For a name that means nothing here; lists the known ones.
    RuntimeError
        For ``"cuda"`` on a machine without a CUDA device.
    """
    name = text.strip().lower()
    if name == "cpu":
        return detect_cpu()
    if name == "cuda":
        return detect_cuda(0)
    letters = re.sub(r"^nvidia[/-]", "", name).replace("-", "")
    for chip, facts in _CHIPS.items():
        if letters == chip.replace("-", ""):
            return MachineTarget("cuda", facts.arch, f"nvidia-{chip}")
    for kind, archs in (("cpu", _CPU_ARCHS), ("cuda", _CUDA_ARCHS)):
        rest = name.removeprefix(f"{kind}-")
        for arch in sorted(archs, key=len, reverse=True):
            plain = arch.removesuffix("a") if kind == "cuda" else arch
            for spelling in (arch, plain):
                if rest == spelling:
                    return MachineTarget(kind, arch)
                if rest.startswith(f"{spelling}-"):
                    try:
                        return MachineTarget(kind, arch, rest[len(spelling) + 1 :])
                    except ValueError:
                        continue
    raise ValueError(
        f"unknown target {text!r}; known: cpu, cuda, "
        + ", ".join(f"cpu-{arch}" for arch in _CPU_ARCHS)
        + ", "
        + ", ".join(_CUDA_ARCHS)
        + ", "
        + ", ".join(f"nvidia/{chip}" for chip in _CHIPS)
    )
