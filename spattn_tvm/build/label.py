"""What a kernel library says of itself, to be compared with what somebody else says of it.

An exported library carries a label behind its last section, where the system's loader doesn't look: the
kernel and the target that it was compiled for. Its machine code tells its processor, and the symbols its
direction.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.file_reading import parse_json
from spattn_tvm.target import MachineTarget

from .cubin import cubin_offsets

_MARK = b"\nspattn-tvm kernel: "
_LONGEST_LABEL = 1 << 16
_ELF = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_MACHINES = {62: "x86-64", 183: "aarch64"}


def _label(kernel: KernelSpec, target: MachineTarget) -> dict[str, Any]:
    # Models of one instruction set share a library.
    return {"kernel": kernel.to_json(), "target": {"kind": target.kind, "arch": target.arch}}


def label_library(path: Path, kernel: KernelSpec, target: MachineTarget) -> None:
    """Write into a library what it is."""
    text = json.dumps(_label(kernel, target), sort_keys=True).encode()
    with path.open("ab") as file:
        file.write(_MARK + text + b"\n")


def contradiction(data: bytes, kernel: KernelSpec, target: MachineTarget) -> str | None:
    """Why the bytes of a labelled library are not those of a kernel for a target, or None.

    Parameters
    ----------
    data : bytes
    kernel : KernelSpec
    target : MachineTarget
        Its model does not matter.
    """
    place = data.rfind(_MARK, max(0, len(data) - _LONGEST_LABEL))
    if place < 0:
        return "it does not say which kernel it is"
    try:
        found = parse_json(data[place + len(_MARK) :])
    except ValueError as error:
        return f"its label is damaged ({error})"
    wanted = _label(kernel, target)
    if found != wanted:
        for name in ("kernel", "target"):
            said = found.get(name) if isinstance(found, dict) else found
            if said != wanted[name]:
                return f"it says that its {name} is {said}, not {wanted[name]}"
        return f"its label is {found}"
    return _contradicting_code(data, kernel, target)


def processor(data: bytes) -> str | None:
    """What a library's host code is for, ``"x86-64"`` or ``"aarch64"``; None for anything else."""
    if not data.startswith(_ELF) or len(data) < 64:
        return None
    return _MACHINES.get(struct.unpack_from("<H", data, 18)[0])


def _contradicting_code(data: bytes, kernel: KernelSpec, target: MachineTarget) -> str | None:
    host = processor(data)
    if host is None:
        return "it is no library of machine code for x86-64 or aarch64"
    if target.kind == "cpu" and (host == "aarch64") != (target.arch == "aarch64"):
        return f"its machine code is for {host}, not {target.arch}"
    if f"\0__tvm_ffi_{kernel.direction}\0".encode() not in data:
        return f"it exports no function {kernel.direction!r}"
    if target.kind == "cuda":
        # The compute capability stands in the flags of the image's header.
        found = {int.from_bytes(data[at + 48 : at + 52], "little") >> 8 & 0xFF for at in cubin_offsets(data)}
        wanted = int("".join(filter(str.isdigit, target.arch)))
        if found != {wanted}:
            known = ", ".join(f"sm_{number}" for number in sorted(found)) or "no GPU"
            return f"its machine code is for {known}, not {target.arch}"
    return None
