"""Host memory that the processes of a group have mapped, in place of what GPUs map of each other."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from spattn_tvm.distributed.copy_engines import Block


class _Done:
    def wait(self) -> None: ...


class MappedHostMemory:
    """`Memory` of gloo ranks: streams do at once what they are told.

    The last rank has room for `most` bytes.
    """

    def __init__(self, folder: str, most: int = 2**40) -> None:
        self._folder, self._number = Path(folder), 0
        self._most = most if dist.get_rank() == dist.get_world_size() - 1 else 2**40
        self._maps: list[mmap.mmap] = []

    def _open(self, rank: int) -> mmap.mmap:
        with open(self._folder / f"{rank}.{self._number}", "r+b") as file:
            return mmap.mmap(file.fileno(), 0)

    def allocate(self, size: int) -> None:
        self._number += 1
        if size > self._most:
            raise MemoryError(f"{size} bytes")
        Path(self._folder, f"{dist.get_rank()}.{self._number}").write_bytes(bytes(size))

    def map(self) -> list[int]:
        self._maps = [self._open(rank) for rank in range(dist.get_world_size())]
        return [ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in self._maps]

    def begin(self) -> None: ...

    def copy(
        self, stream: int, target: int, target_pitch: int, source: int, source_pitch: int, block: Block
    ) -> None:
        for index in range(block.height):
            ctypes.memmove(target + index * target_pitch, source + index * source_pitch, block.width)

    def write(self, stream: int, address: int, value: int) -> None:
        ctypes.c_uint32.from_address(address).value = value

    def wait(self, stream: int, address: int, value: int) -> None:
        while (ctypes.c_uint32.from_address(address).value - value) % 2**32 >= 2**31:
            time.sleep(1e-4)

    def end(self, stream: int) -> _Done:
        return _Done()

    def release(self, addresses: Sequence[int], value: int) -> None:
        for address in addresses:
            ctypes.c_uint32.from_address(address).value = value

    def synchronize(self) -> None: ...

    def host_counter(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32)
