"""One server of a fleet, as a device that kernels are uploaded to, run on and timed on.

The server needs TVM and nothing of this package. Kernels run there in TVM's own thread pool, and what is
timed is the kernel alone: the sums over grouped heads and the casts that a launch adds are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spattn_tvm.families.family import Sizes
from spattn_tvm.launch import finished
from spattn_tvm.target import MachineTarget, cuda_target, detect_cpu

from .fleet import Fleet, ServerLostError

if TYPE_CHECKING:
    from spattn_tvm.families.kernel import KernelSpec

    from .trial import TrialData

# The server ends a session, and with it a kernel that hangs, after this time; a session that is still of use
# is renewed before.
_SESSION_S = 150
_RENEW_BEFORE_S = 75
# As long as a session that somebody else's hanging kernel keeps busy, and a little.
_WAIT_S = 200.0
_L2_FLUSH_BYTES = 256 * 2**20


@dataclass
class _Argument:
    """A tensor on the server and what it is filled with before a checked run: `value`, or NaN."""

    remote: Any
    value: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype


class RemoteDevice:
    """A session with a free server of a fleet.

    Parameters
    ----------
    fleet : Fleet
    kind : {"cpu", "cuda"}
        The server's device to use.

    Raises
    ------
    ServerLostError
        When no server can be reached or becomes free.
    ValueError
        When the server has no such device, or can't use it.
    """

    def __init__(self, fleet: Fleet, kind: str) -> None:
        from tvm import rpc

        self._kind = kind
        try:
            host, port, password = fleet.claim(_WAIT_S)
            self.server = f"{host}:{port}"
            self._session = rpc.connect(host, port, password, session_timeout=_SESSION_S)
        except Exception as error:
            raise ServerLostError(str(error)) from error
        self._ends = time.monotonic() + _SESSION_S
        self.device = self._session.device(kind, 0)
        if not self.device.exist:
            raise ValueError(f"the server {self.server} has no {kind} device")
        try:
            self.device.sync()
        except Exception as error:
            text = " ".join(str(error).split())
            if "CUDA" not in text:
                raise
            raise ValueError(
                f"the server {self.server} can't use its GPU ({text}). A server beside PyTorch is started "
                "with --no-fork: CUDA does not outlive the fork of a session"
            ) from error
        self._inputs: dict[str, Any] = {}
        self._uploads = 0

    @property
    def is_ending(self) -> bool:
        """Whether the session may not last for another measurement."""
        return time.monotonic() > self._ends - _RENEW_BEFORE_S

    def is_alive(self) -> bool:
        """Whether the server still answers, and its device with it."""
        try:
            self._session.get_function("runtime.NumThreads")()
            self.device.sync()
        except Exception:
            return False
        return True

    @property
    def workers(self) -> int:
        """Threads of a CPU, multiprocessors of a GPU."""
        if self._kind == "cuda":
            return int(self.device.multi_processor_count)
        return int(self._session.get_function("runtime.NumThreads")())

    def facts(self) -> dict[str, str]:
        """As the log's facts of a local device: name, threads or multiprocessors."""
        if self._kind == "cuda":
            return {
                "name": str(self.device.device_name),
                "multiprocessors": str(self.workers),
                "compute_capability": str(self.device.compute_version),
            }
        return {"name": self._ask("target.llvm_get_system_cpu"), "threads": str(self.workers)}

    def target(self) -> MachineTarget:
        """The server's GPU; a CPU server says too little of itself.

        Raises
        ------
        ValueError
            For a GPU that no kernels are made for, or a CPU.
        """
        if self._kind != "cuda":
            raise ValueError("a server does not tell its CPU's instruction set: name it with --target")
        major, _, minor = str(self.device.compute_version).partition(".")
        return cuda_target(str(self.device.device_name), (int(major), int(minor)))

    def refusal(self, target: MachineTarget) -> str | None:
        """Why what is measured here would not be a result for a target, or None."""
        if self._kind == "cuda":
            found = self.target()
            if found == target:
                return None
            return f"the server {self.server} is a {found.folder}, and the search is for {target.folder}"
        if target != detect_cpu():
            return None  # named by whoever knows the servers
        import tvm_ffi

        here = str(tvm_ffi.get_global_func("target.llvm_get_system_cpu")())
        there = self._ask("target.llvm_get_system_cpu")
        if here == there:
            return None
        return (
            f"the server {self.server} has the CPU {there}, this machine, which the search is for, {here}: "
            "name the servers' CPU with --target, such as cpu-x86-64-v3-amd-23-49"
        )

    def _ask(self, name: str) -> str:
        try:
            return str(self._session.get_function(name)())
        except AttributeError:  # a server of TVM's runtime alone
            return "unknown"

    def kernel(self, path: Path, spec: KernelSpec, data: TrialData) -> RemoteKernel:
        """Upload a library; its arguments are the data's, which stay on the server between kernels."""
        self._uploads += 1
        name = f"{self._uploads}.so"  # to write over a library that is loaded kills the server
        self._session.upload(str(path), name)
        module = self._session.load_module(name)
        return RemoteKernel(self, module, spec, data)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, value: Tensor | None = None) -> Any:
        from tvm.runtime import empty

        remote = empty(tuple(shape), str(dtype).removeprefix("torch."), self.device)
        if value is not None:
            _upload(remote, value)
        return remote

    def input(self, name: str, value: Tensor) -> Any:
        if name not in self._inputs:
            self._inputs[name] = self.tensor(value.shape, value.dtype, value)
        return self._inputs[name]


def _upload(remote: Any, value: Tensor) -> None:
    from tvm.runtime import from_dlpack

    remote.copyfrom(from_dlpack(value.contiguous()))


def _download(remote: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    from tvm.runtime import from_dlpack

    result = torch.empty(shape, dtype=dtype)
    remote.copyto(from_dlpack(result))
    return result


class RemoteKernel:
    """A kernel on a server: calling it gives its outputs here, `time_us` runs it there."""

    def __init__(self, device: RemoteDevice, module: Any, spec: KernelSpec, data: TrialData) -> None:
        self._device, self._abi = device, spec.abi
        self._function = module[spec.direction]
        self._timer = module.time_evaluator(
            spec.direction,
            device.device,
            number=1,
            repeat=1,
            cache_flush_bytes=_L2_FLUSH_BYTES if data.target_kind == "cuda" else 0,
        )
        given = data.inputs
        batch, query_heads, queries, head_dim = data.q.shape
        _, kv_heads, keys, _ = data.k.shape
        workers = device.workers
        sizes = Sizes(batch, query_heads, kv_heads, queries, keys, head_dim, workers)
        self._written = []
        for output in self._abi.outputs:
            model = given.get(output.like, data.q)
            shape, name = output.written(sizes, tuple(model.shape), spec.dtype)
            dtype = getattr(torch, name)
            self._written.append(_Argument(device.tensor(shape, dtype), None, shape, dtype))
        self._scratch = []
        for item in self._abi.scratch:
            shape, dtype = item.shape(sizes), getattr(torch, item.dtype)
            zeros = torch.zeros(shape, dtype=dtype) if item.kept else None
            self._scratch.append(_Argument(device.tensor(shape, dtype, zeros), zeros, shape, dtype))
        inputs = [device.input(name, given[name]) for name in self._abi.inputs]
        written = [argument.remote for argument in (*self._written, *self._scratch)]
        # A problem's factor is positive: no ABI wants its sign elsewhere.
        self._arguments = (*inputs, *written, data.scale, workers)

    def __call__(self, data: TrialData) -> dict[str, Tensor]:
        for argument in (*self._written, *self._scratch):
            value = argument.value
            if value is None:
                value = torch.full(argument.shape, _poison(argument.dtype), dtype=argument.dtype)
            _upload(argument.remote, value)
        self._function(*self._arguments)
        self._device.device.sync()
        results = {}
        for output, argument in zip(self._abi.outputs, self._written, strict=True):
            written = _download(argument.remote, argument.shape, argument.dtype)
            model = data.inputs.get(output.like)
            results[output.name] = written if model is None else finished(output, written, model)
        return results

    def time_us(self) -> float:
        """One run, in microseconds, after one that warms up."""
        return float(self._timer(*self._arguments).mean) * 1e6


def _poison(dtype: torch.dtype) -> float:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
