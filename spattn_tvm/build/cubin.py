"""Machine code for NVIDIA GPUs inside a kernel library: which chips it is for, and whether it uses their
tensor cores.

A library embeds a cubin, an ELF image of its own. No disassembler is needed to tell tensor-core instructions
from others: from sm_80 to sm_120a an instruction takes 16 bytes and its lowest 12 bits are the opcode.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = b"\x7fELF"
_MACHINE_CUDA = 190
_INSTRUCTION_BYTES = 16
# As nvdisasm 13 names them: HMMA (mma.sync) on sm_80, sm_89, sm_100a and sm_120a; HGMMA (wgmma) on sm_90a,
# where bits 10 and 11 say where its operands come from.
_HMMA = 0x23C
_HGMMA = 0x1F0


@dataclass(frozen=True)
class Cubin:
    """One image.

    Attributes
    ----------
    capability : tuple[int, int]
        Compute capability that it was compiled for.
    instructions : dict[str, int]
        Of each kernel, by name.
    tensor_core_instructions : dict[str, int]
        How many of those are HMMA or HGMMA.
    """

    capability: tuple[int, int]
    instructions: dict[str, int]
    tensor_core_instructions: dict[str, int]


def read_cubins(data: bytes) -> list[Cubin]:
    """The images in a library's bytes."""
    return [_read(data, offset) for offset in cubin_offsets(data)]


def cubin_offsets(data: bytes) -> Iterator[int]:
    """Where the images begin in a library's bytes."""
    offset = data.find(_MAGIC, len(_MAGIC))  # the library itself is an ELF file too
    while offset >= 0:
        if int.from_bytes(data[offset + 18 : offset + 20], "little") == _MACHINE_CUDA:
            yield offset
        offset = data.find(_MAGIC, offset + 1)


def _read(data: bytes, offset: int) -> Cubin:
    (flags,) = struct.unpack_from("<I", data, offset + 48)
    (table,) = struct.unpack_from("<Q", data, offset + 40)
    size, count, names_index = struct.unpack_from("<HHH", data, offset + 58)
    sections = [struct.unpack_from("<IIQQQQ", data, offset + table + index * size) for index in range(count)]
    names = offset + sections[names_index][4]
    instructions, on_tensor_cores = {}, {}
    for name_offset, _, _, _, start, length in sections:
        begin = names + name_offset
        name = data[begin : data.index(b"\0", begin)].decode()
        if not name.startswith(".text."):
            continue
        opcodes = [
            int.from_bytes(data[place : place + 2], "little") & 0xFFF
            for place in range(offset + start, offset + start + length, _INSTRUCTION_BYTES)
        ]
        kernel = name.removeprefix(".text.")
        instructions[kernel] = len(opcodes)
        on_tensor_cores[kernel] = sum(opcode == _HMMA or opcode & 0x3FF == _HGMMA for opcode in opcodes)
    major, minor = divmod(flags >> 8 & 0xFF, 10)
    return Cubin((major, minor), instructions, on_tensor_cores)
