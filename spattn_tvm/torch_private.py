"""Every private name of PyTorch that this package uses, each with a public replacement.

PyTorch may rename them in any release. A replacement gives the same results and costs time: where a question
about the thread's state can't be asked, its answer is the one that leads a call to the dispatcher, which
knows. ``PRIVATE_NAMES`` lists what was looked for, so that a test can take away one after the other.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

PRIVATE_NAMES: list[str] = []
_MISSING = object()


def _find(path: str) -> Any:
    """What stands at a dotted path below ``torch``, or `_MISSING`."""
    PRIVATE_NAMES.append(path)
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, _MISSING)
        if found is _MISSING:
            return _MISSING
    return found


def _find_or(path: str, replacement: Any) -> Any:
    found = _find(path)
    return replacement if found is _MISSING else found


# --- who watches this thread ---------------------------------------------------------------------------

# How many dispatch modes are active, PyTorch's own among them.
count_dispatch_modes: Callable[[], int] = _find_or("_C._len_torch_dispatch_stack", lambda: 1)
has_function_mode: Callable[[], bool] = _find_or("_C._is_torch_function_mode_enabled", lambda: True)
# Inside of vmap, grad and their like.
is_transformed: Callable[[], bool] = _find_or("_C._are_functorch_transforms_active", lambda: True)
_is_profiled_here: Callable[[], bool] = _find_or("autograd._profiler_enabled", lambda: True)


def _find_observers() -> Callable[[], bool]:
    """PyTorch's own question before each operator. Python can ask for this thread's profilers alone, and not
    for those of all threads (``profile_all_threads``, ``ExecutionTraceObserver``).
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found: Any = ctypes.PyDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)._ZN2at12hasCallbacksEv
    except (OSError, AttributeError):
        return _is_profiled_here
    found.argtypes, found.restype = (), ctypes.c_bool
    return cast("Callable[[], bool]", found)


is_profiling: Callable[[], bool] = _find_observers()
_interpreters = _find("_C._functorch.get_interpreter_stack")
_Transform = _find("_C._functorch.TransformType")

if _MISSING in (_interpreters, _Transform):
    is_differentiated = is_transformed

    def is_functionalized() -> bool:
        """Inside of ``torch.func.functionalize``, under any other transforms?"""
        return False

else:

    def is_differentiated() -> bool:
        """Inside of ``torch.func.grad``, ``vjp`` or ``jvp``, under any other transforms?"""
        return any(each.key() in (_Transform.Grad, _Transform.Jvp) for each in _interpreters() or ())

    def is_functionalized() -> bool:
        """Inside of ``torch.func.functionalize``, under any other transforms?"""
        return any(each.key() == _Transform.Functionalize for each in _interpreters() or ())


is_any_autocast_enabled: Callable[[], bool] = _find_or(
    "_C._is_any_autocast_enabled",
    lambda: torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
)

if _find("autograd.forward_ad._current_level") is _MISSING:

    def is_forward_mode() -> bool:
        """Could a tensor have a tangent?"""
        return True

else:
    _forward_ad = torch.autograd.forward_ad

    def is_forward_mode() -> bool:
        """Could a tensor have a tangent?"""
        return _forward_ad._current_level >= 0


# --- what kind of tensor -------------------------------------------------------------------------------

_dispatch_keys = _find("_C._dispatch_keys")
_key, _key_set = _find("_C.DispatchKey"), _find("_C.DispatchKeySet")

if _MISSING in (_dispatch_keys, _key, _key_set):

    def is_ordinary(tensor: Tensor) -> bool:
        """Do a tensor's bytes hold its values? False for lazy negative, conjugate and zero tensors, wrappers
        of functional transforms, sparse, nested and meta tensors.
        """
        return False

else:

    def _ordinary_keys(device: str) -> tuple[int, int]:
        """Dispatch keys of strided tensors, made in inference mode and outside of it."""
        inference = _key_set(getattr(_key, device)) | _key_set(getattr(_key, f"Autocast{device}"))
        autograd = _key_set(_key.ADInplaceOrView) | _key_set(getattr(_key, f"Autograd{device}"))
        return inference.raw_repr(), (inference | autograd).raw_repr()

    _ORDINARY_KEYS = frozenset((*_ordinary_keys("CPU"), *_ordinary_keys("CUDA")))

    def is_ordinary(tensor: Tensor) -> bool:
        """Do a tensor's bytes hold its values? False for lazy negative, conjugate and zero tensors, wrappers
        of functional transforms, sparse, nested and meta tensors.
        """
        return _dispatch_keys(tensor).raw_repr() in _ORDINARY_KEYS


_FakeTensor: Any = _find_or("_subclasses.FakeTensor", ())


def has_values(tensor: Tensor) -> bool:
    """Can the host read a tensor's values, here and now, and go by them? Not while code is compiled or traced
    or a CUDA graph captured, which serves other values later, and not of fake and meta tensors, nor of the
    elements of a map.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if isinstance(tensor, _FakeTensor) or tensor.is_meta:
        return False
    if is_transformed() and not is_ordinary(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


_TensorGuards = _find("_C._dynamo.guards.TensorGuards")


def guard_inputs(*tensors: Tensor) -> Callable[..., bool] | None:
    """A function that says whether as many tensors are like these: types, dtypes, device, shapes, strides,
    requires_grad, and the thread's dispatch keys. None where nothing can say so quickly: the guard of
    torch.compile on its inputs takes 0.3 us for three, comparing the same in Python took 1.3.
    """
    if _TensorGuards is _MISSING:
        return None
    return _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


# --- autograd.Function ---------------------------------------------------------------------------------


_FunctionBase = _find("_C._FunctionBase")


def apply_past_functorch(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without the part that serves functional transforms: 2 us less a call."""
    return function.apply if _FunctionBase is _MISSING else super(torch.autograd.Function, function).apply


if _MISSING in (_find("_C._FunctionBase.to_save"), _find("_C._FunctionBase.materialize_grads")):

    def keep_for_backward(ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
        """Save tensors, and let gradients that are not there arrive as None."""
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

else:

    def keep_for_backward(ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
        """Save tensors, and let gradients that are not there arrive as None."""
        # What the two methods set; to call them takes another 0.4 us.
        ctx.to_save = tensors
        ctx.materialize_grads = False


# --- memory and CUDA -----------------------------------------------------------------------------------

# What code from torch.compile allocates with, past the dispatcher: half the time of torch.empty_like.
# (shape, strides, dtype), on the current CUDA device.
empty_on_cpu: Callable[..., Tensor] = _find_or(
    "_C._dynamo.guards._empty_strided_cpu",
    lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype),
)
empty_on_cuda: Callable[..., Tensor] = _find_or(
    "_C._dynamo.guards._empty_strided_cuda",
    lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device="cuda"),
)


def _add_one_by_one(tensors: list[Tensor], values: list[int]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.add_(value)


# Adds a number to each of many tensors, in place and with few launches, whose arguments the numbers are.
add_to_each: Callable[[list[Tensor], list[int]], object] = _find_or("_foreach_add_", _add_one_by_one)
# A CPU build of PyTorch has none of the following, and no CUDA tensor to ask them for.
current_device: Callable[[], int] = _find_or(
    "_C._cuda_getDevice", lambda: torch.cuda.current_device() if torch.cuda.is_available() else -1
)
current_stream: Callable[[int], int] = _find_or(
    "_C._cuda_getCurrentRawStream",
    lambda index: torch.cuda.current_stream(index).cuda_stream if torch.cuda.is_available() else 0,
)
is_capturing: Callable[[], bool] = _find_or(
    "_C._cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
# Keeps the GPU busy for some cycles. Without it a timing of microseconds holds some launch time.
cuda_sleep: Callable[[int], None] = _find_or("cuda._sleep", lambda cycles: None)


def _assert_now(condition: Tensor, message: str) -> None:
    if not bool(condition):
        raise RuntimeError(message)


# On a GPU the host does not wait for the answer.
assert_async: Callable[[Tensor, str], object] = _find_or("_assert_async", _assert_now)


def keep_address(tensor: Tensor) -> None:
    """Tell compiled functions, whose modules this does not import before, that a tensor stays where it is."""
    try:
        from torch._dynamo import mark_static_address
    except ImportError:
        return
    mark_static_address(tensor)


def send_keys_round() -> bool:
    """Let PyTorch's context parallelism send keys from rank to rank; False where that can't be asked for."""
    try:
        from torch.distributed.tensor.experimental._attention import set_rotate_method
    except ImportError:
        return False
    set_rotate_method("alltoall")
    return True


class SymmetricMemory:
    """Buffers that the ranks of a group, on GPUs of one host, have mapped into each other's address spaces.

    Raises
    ------
    ImportError
        From the constructor: this PyTorch has none.
    """

    def __init__(self) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._symmetric_memory: Any = symmetric_memory

    def empty(self, size: int, device: torch.device) -> Tensor:
        """uint8 ``(size,)``; other ranks can map it."""
        return cast("Tensor", self._symmetric_memory.empty(size, dtype=torch.uint8, device=device))

    def addresses(self, buffer: Tensor, group: Any) -> list[int]:
        """Where each rank's buffer begins, for this rank; by all ranks together, of one size."""
        handle = self._symmetric_memory.rendezvous(buffer, group)
        offset = buffer.data_ptr() - handle.buffer_ptrs[handle.rank]
        return [address + offset for address in handle.buffer_ptrs]


def timeout_seconds(group: Any) -> float:
    """After how long the ranks of a group give each other up."""
    from torch.distributed.constants import default_pg_timeout

    try:
        timeout = group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        timeout = default_pg_timeout
    return float(timeout.total_seconds())


def forbid_donated_buffers() -> None:
    """Let compiled functions keep their graph, so that a backward pass can be run again and again."""
    try:
        import torch._functorch.config as functorch_config
    except ImportError:
        return
    functorch_config.donated_buffer = False
