"""How a step is timed on a CPU and on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    Step = Callable[[], Any]


class CpuClock:
    """Wall time of a step after an idle gap, with as many calls as make a sample last some milliseconds."""

    matmul_size = 2048

    def __init__(self, idle_ms: float, sample_ms: float = 10.0) -> None:
        self.idle_ms, self.sample_ms = idle_ms, sample_ms

    def calls(self, step: Step) -> int:
        step()
        begin = time.perf_counter()
        step()
        once_ms = (time.perf_counter() - begin) * 1e3
        return max(1, min(1000, round(self.sample_ms / max(once_ms, 1e-3))))

    def measure_ms(self, step: Step, calls: int) -> float:
        time.sleep(self.idle_ms * 1e-3)
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - begin) * 1e3 / calls

    def wait(self) -> None:
        """Until all that was started is done."""

    def forget(self) -> None:
        """What compilers and allocators keep of a case that is over."""
        import torch

        torch.compiler.reset()

    def allocated_mib(self) -> float | None:
        return None

    def peak_memory_mib(self, step: Step) -> float | None:
        return None

    def matmul_tflops(self, dtype: torch.dtype, device: torch.device) -> float:
        size = self.matmul_size if dtype.itemsize == 4 else self.matmul_size // 2
        return _matmul_rate(size, dtype, device, lambda step: self.measure_ms(step, 1), rounds=5)


class CudaClock:
    """Device time of one call with a cold L2, between two events."""

    # About 1 ms on a 2 GHz chip: longer than an autograd call spends on the host.
    HEAD_START_CYCLES = 2_000_000

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.scratch = torch.empty(max(2 * l2_bytes, 64 << 20) // 4, dtype=torch.int32, device=device)

    def calls(self, step: Step) -> int:
        for _ in range(3):
            step()
        return 1

    def measure_ms(self, step: Step, calls: int) -> float:
        import torch

        from spattn_tvm.torch_private import cuda_sleep

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.fill_(1)
        cuda_sleep(self.HEAD_START_CYCLES)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        import gc

        import torch

        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()

    def allocated_mib(self) -> float | None:
        import torch

        return torch.cuda.memory_allocated(self.device) / 2**20

    def peak_memory_mib(self, step: Step) -> float | None:
        import torch

        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = step()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del result
        return peak / 2**20

    def matmul_tflops(self, dtype: torch.dtype, device: torch.device) -> float:
        return _matmul_rate(8192, dtype, device, lambda step: self.measure_ms(step, 1), rounds=10)


def _matmul_rate(
    size: int, dtype: torch.dtype, device: torch.device, measure: Callable[[Step], float], rounds: int
) -> float:
    import torch

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    milliseconds = statistics.median(measure(lambda: a @ b) for _ in range(rounds))
    return 2 * size**3 / milliseconds * 1e-9
