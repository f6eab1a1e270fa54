"""Band tables on the device of a call, as kernels take them: int32 (M, Hq, 4), for all documents or each."""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from spattn_tvm.bands import BandLayout, length_tables
from spattn_tvm.launch import (
    current_stream,
)


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    # A cached tensor outlives the mode it is made in, and autograd can't save an inference tensor.
    with torch.inference_mode(False):
        tensor = torch.from_numpy(np.array(array, dtype=np.int32))
        if device.type != "cuda":
            return tensor
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the band table of this layout and length is not on the GPU yet and can't be copied there "
                "while a CUDA graph is captured: call banded_attention with them once before, on that stream"
            )
        return tensor.pin_memory().to(device, non_blocking=True)


# The stream is part of the key because the copy is ordered on that stream and no other. Nothing is
# evicted: a captured CUDA graph keeps the addresses, and an entry is a few hundred bytes for each length
# seen.
@cache
def _unpacked(spec: str, length: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    table = BandLayout.from_spec(spec).table(length)
    return _upload(table[None], device), _upload(np.array([0, length]), device)


def _check_offsets(offsets: tuple[int, ...], length: int) -> None:
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start with 0, got {offsets[0]}")
    for index, (begin, end) in enumerate(pairwise(offsets)):
        if end < begin:
            raise ValueError(
                "cu_seqlens must be sorted, "
                f"got cu_seqlens[{index}] = {begin} and cu_seqlens[{index + 1}] = {end}"
            )
    if offsets[-1] != length:
        raise ValueError(f"cu_seqlens must end with the sequence length {length}, got {offsets[-1]}")


@lru_cache(maxsize=256)
def _packed_on_host(spec: str, length: int, offsets: tuple[int, ...]) -> Tensor:
    _check_offsets(offsets, length)
    layout = BandLayout.from_spec(spec)
    lengths = [end - begin for begin, end in pairwise(offsets)]
    layout.check_length(max(lengths))
    return _upload(layout.packed_table(lengths), torch.device("cpu"))


# Up to this size the tables of all lengths are kept on the GPU, and a packed call costs two small launches
# instead of about twenty.
_LOOKUP_BYTES = 32 * 2**20


@cache
def _table_of_each_length(spec: str, longest: int, device: torch.device, stream: int) -> Tensor | None:
    with torch.inference_mode(False), torch.no_grad():
        lengths = torch.arange(longest + 1, dtype=torch.int32, device=device)
        return length_tables(BandLayout.from_spec(spec), lengths)


def _packed_on_device(spec: str, length: int, cu_seqlens: Tensor, stream: int) -> Tensor:
    layout = BandLayout.from_spec(spec)
    if not layout.depends_on_length:
        return _unpacked(spec, 1, cu_seqlens.device, stream)[0]
    lengths = cu_seqlens.diff()
    # Rounded up, so that a new length rarely means new tables.
    longest = (1 << length.bit_length()) - 1
    fits = (longest + 1) * layout.num_heads * 16 <= _LOOKUP_BYTES
    if fits and not torch.cuda.is_current_stream_capturing():
        tables = _table_of_each_length(spec, longest, cu_seqlens.device, stream)
        if tables is not None:
            return tables[lengths]
    else:
        tables = length_tables(layout, lengths)
        if tables is not None:
            return tables
    # The documented exception: this copy waits for the GPU.
    return _upload(layout.packed_table(lengths.tolist()), cu_seqlens.device)


def find_bands(spec: str, q: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The band table and the document boundaries, as kernels take them."""
    device, length = q.device, q.shape[2]
    stream = current_stream(device.index) if q.is_cuda else 0
    if cu_seqlens is None:
        return _unpacked(spec, length, device, stream)
    cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    if q.is_cuda:
        return _packed_on_device(spec, length, cu_seqlens, stream), cu_seqlens
    return _packed_on_host(spec, length, tuple(cu_seqlens.tolist())), cu_seqlens
