"""Copies and counters on streams, through the CUDA driver: what PyTorch has no functions for.

``cuMemcpy2DAsync`` between GPUs runs on copy engines, as do counters by ``cuStreamWriteValue32`` and
``cuStreamWaitValue32`` without a kernel. Buffers that all ranks have mapped are PyTorch's symmetric memory.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spattn_tvm.torch_private import SymmetricMemory

_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ: compares modulo 2**32
_MOST_PITCH = 2**31 - 1  # CU_DEVICE_ATTRIBUTE_MAX_PITCH


class Block(NamedTuple):
    """`height` pieces of `width` bytes, `pitch` bytes apart."""

    address: int
    pitch: int
    width: int
    height: int

    @property
    def size(self) -> int:
        return self.width * self.height


def blocks_of(tensor: Tensor, heads: Sequence[int], step: int | None, begin: int, rows: int) -> list[Block]:
    """Rows of some heads of a tensor ``(B, heads, rows, D)``, each head's rows contiguous.

    `step` is by how much the heads ascend, None where that differs. Addresses count from the tensor's.
    """
    size = tensor.itemsize
    width, pitch = rows * tensor.shape[3] * size, tensor.stride(1) * size
    if not width or not heads:
        return []
    blocks = []
    for batch in range(tensor.shape[0]):
        first = (batch * tensor.stride(0) + begin * tensor.shape[3]) * size
        if step is not None and width <= step * pitch <= _MOST_PITCH:
            blocks.append(Block(first + heads[0] * pitch, step * pitch, width, len(heads)))
        else:
            blocks += [Block(first + head * pitch, width, width, 1) for head in heads]
    return blocks


class _Copy2D(ctypes.Structure):
    """``CUDA_MEMCPY2D``."""

    _fields_ = [
        (f"{side}_{name}", kind)
        for side in ("source", "target")
        for name, kind in (
            ("x", ctypes.c_size_t),
            ("y", ctypes.c_size_t),
            ("memory_type", ctypes.c_int),
            ("host", ctypes.c_void_p),
            ("device", ctypes.c_uint64),
            ("array", ctypes.c_void_p),
            ("pitch", ctypes.c_size_t),
        )
    ] + [("width", ctypes.c_size_t), ("height", ctypes.c_size_t)]


class CopyEngines:
    """`Memory` of GPUs of one host.

    Raises
    ------
    RuntimeError, OSError, AttributeError
        From the constructor: no CUDA driver with these functions, or no symmetric memory in this PyTorch.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._symmetric = SymmetricMemory()
        self._group, self._device = weakref.ref(group), device
        library = ctypes.CDLL("libcuda.so.1")
        stream, address = ctypes.c_void_p, ctypes.c_uint64
        self._copy = library.cuMemcpyDtoDAsync_v2
        self._copy.argtypes = (address, address, ctypes.c_size_t, stream)
        self._copy_2d = library.cuMemcpy2DAsync_v2
        self._copy_2d.argtypes = (ctypes.POINTER(_Copy2D), stream)
        self._write, self._wait = library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2
        for function in (self._write, self._wait):
            function.argtypes = (stream, address, ctypes.c_uint32, ctypes.c_uint)
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        self._handles = [each.cuda_stream for each in self._streams]
        # Read before the call returns.
        self._pieces = _Copy2D(source_memory_type=_UNIFIED, target_memory_type=_UNIFIED)
        self._buffer: Tensor | None = None

    def _check(self, what: str, code: int) -> None:
        if code:
            raise RuntimeError(f"{what} on {self._device} failed with error {code} of the CUDA driver")

    def allocate(self, size: int) -> None:
        self._buffer = None
        # What PyTorch's allocator keeps for later is room as well, but not for this.
        torch.cuda.empty_cache()
        self._buffer = self._symmetric.empty(size, self._device).zero_()
        torch.cuda.synchronize(self._device)

    def map(self) -> list[int]:
        assert self._buffer is not None
        return self._symmetric.addresses(self._buffer, self._group())

    def begin(self) -> None:
        event = torch.cuda.current_stream(self._device).record_event()
        for stream in self._streams:
            stream.wait_event(event)

    def copy(
        self, stream: int, target: int, target_pitch: int, source: int, source_pitch: int, block: Block
    ) -> None:
        _, _, width, height = block
        if height == 1 or (source_pitch == width and target_pitch == width):
            self._check(
                "cuMemcpyDtoDAsync", self._copy(target, source, width * height, self._handles[stream])
            )
            return
        pieces = self._pieces
        pieces.source_device, pieces.source_pitch = source, source_pitch
        pieces.target_device, pieces.target_pitch = target, target_pitch
        pieces.width, pieces.height = width, height
        self._check("cuMemcpy2DAsync", self._copy_2d(ctypes.byref(pieces), self._handles[stream]))

    def write(self, stream: int, address: int, value: int) -> None:
        code = self._write(self._handles[stream], address, value % 2**32, 0)
        self._check("cuStreamWriteValue32", code)

    def wait(self, stream: int, address: int, value: int) -> None:
        code = self._wait(self._handles[stream], address, value % 2**32, _AT_LEAST)
        self._check("cuStreamWaitValue32", code)

    def end(self, stream: int) -> Any:
        return self._streams[stream].record_event()

    def release(self, addresses: Sequence[int], value: int) -> None:
        stream = torch.cuda.Stream(self._device)
        for address in addresses:
            self._check("cuStreamWriteValue32", self._write(stream.cuda_stream, address, value, 0))
        stream.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def host_counter(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32, pin_memory=True)
