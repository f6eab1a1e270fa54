"""Tensors that outlast the call they are made in and serve every stream.

Memory that a call allocates can belong to a pool that is about to be captured into a CUDA graph, or be
ordered on that call's stream alone. What is kept for later calls must have neither property.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")


@cache
def _streams(index: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(index, priority=-1)]


def _make_on_own_stream(index: int, make: Callable[[], Result]) -> Result:
    streams = _streams(index)
    with torch.cuda.device(index):
        while True:
            with torch.cuda.stream(streams[-1]):
                # PyTorch has few streams and hands them out by turns, so another thread may capture on ours.
                if torch.cuda.is_current_stream_capturing():
                    streams.append(torch.cuda.Stream(index, priority=-1))
                    continue
                result = make()
                event = torch.cuda.Event()
                event.record()
                # Waits for what `make` has begun, not for anything that the caller's streams do.
                event.synchronize()
                return result


def make_lasting(device: torch.device, make: Callable[[], Result]) -> Result:
    """What a function makes, as tensors for calls of any stream, thread and mode.

    On CUDA it runs in a thread and on a stream of its own: pools of memory are chosen by thread (by
    ``torch.cuda.use_mem_pool`` and by ``torch.compile``'s CUDA graphs while they warm up), and so are modes.
    It is complete when this function returns. Not while the calling thread captures a graph.

    Parameters
    ----------
    device : torch.device
        A CPU, or a CUDA device with an index.
    make : callable
        Without arguments; what it launches goes to the device's current stream.
    """
    if device.type != "cuda":
        # Autograd can't save an inference tensor.
        with torch.inference_mode(False):
            return make()
    with ThreadPoolExecutor(1, "spattn-tables") as thread:
        return thread.submit(_make_on_own_stream, device.index or 0, make).result()
