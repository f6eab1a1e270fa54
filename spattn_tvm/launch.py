"""Allocation around a kernel call: outputs, accumulators and the workspaces of each family.

Inputs whose last dimension is not contiguous are copied. On CUDA so are those that a TMA descriptor can't
describe: an address or a stride that is no multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .torch_private import current_device, current_stream, empty_on_cpu, empty_on_cuda, is_capturing

if TYPE_CHECKING:
    from .dispatch import Kernel

Gradients = tuple[Tensor, Tensor, Tensor]
# (q, k, v, scale) -> (o, lse)
Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

_TMA_BYTES = 16


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _has_describable_strides(tensor: Tensor) -> bool:
    step = _TMA_BYTES // tensor.element_size()
    b, h, n, d = tensor.stride()
    return d == 1 and not (b % step or h % step or n % step)


def _is_describable(tensor: Tensor) -> bool:
    return tensor.data_ptr() % _TMA_BYTES == 0 and _has_describable_strides(tensor)


def _are_aligned(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (q.data_ptr() | k.data_ptr() | v.data_ptr()) % _TMA_BYTES == 0


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy if kernels can't read it in place."""
    if tensor.is_cpu:
        return tensor if tensor.stride(3) == 1 else tensor.contiguous()
    return tensor if _is_describable(tensor) else tensor.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=4096)
def _lse_model(shape: torch.Size, index: int) -> Tensor:
    """What ``torch.empty_like`` makes an lse from: 1 us less than ``torch.empty`` with a shape."""
    with torch.inference_mode(False):
        device = "cpu" if index < 0 else f"cuda:{index}"
        return torch.empty(1, dtype=torch.float32, device=device).expand(shape[:3])


def _like(result: Tensor, model: Tensor) -> Tensor:
    """The result in the dtype and the strides of ``torch.empty_like(model)``; itself if it has them."""
    if result.dtype == model.dtype and model.is_contiguous() and result.stride() == model.stride():
        return result
    return torch.empty_like(model).copy_(result)


@cache
def _kept_counters(direction: str, index: int, stream: int) -> Tensor:
    # Made outside of inference mode, because calls outside of it use them as well.
    with torch.inference_mode(False):
        return torch.zeros(2, dtype=torch.int32, device=f"cuda:{index}")


def _tile_counters(direction: str, index: int) -> Tensor:
    """Two int32 that hand out a Hopper kernel's tiles; each forward finds and leaves them zero.

    They are kept for each stream, whose calls follow one another. A captured graph may be replayed beside
    those, so it gets its own, cleared by each replay.
    """
    if is_capturing():
        return torch.zeros(2, dtype=torch.int32, device=f"cuda:{index}")
    return _kept_counters(direction, index, current_stream(index))


def _with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """Queries and a positive factor that give the same scores, and the sign that went into the queries.

    The Hopper kernels mask and find a row's maximum before they scale, which only a positive factor allows.
    """
    if scale > 0:
        return q, scale, 1.0
    sign = -1.0 if scale < 0 else 0.0
    return q * sign, abs(scale) or 1.0, sign


def launch_forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, bands: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Run a forward kernel.

    Parameters
    ----------
    kernel : Kernel
        From ``dispatch.find_kernel("forward", …)``.
    q : Tensor
        ``(B, Hq, N, D)``.
    k, v : Tensor
        ``(B, Hkv, N, D)`` in q's dtype and on its device.
    bands : Tensor
        int32 ``(M, Hq, 4)``, contiguous.
    cu_seqlens : Tensor
        int32 ``(num_documents + 1,)``, contiguous.
    scale : float
        Factor of the scores.

    Returns
    -------
    o : Tensor
        ``torch.empty_like(q)``, filled; of ``q.contiguous()`` when q's last dimension is not contiguous.
    lse : Tensor
        ``(B, Hq, N)`` float32, contiguous.
    """
    index = q.get_device()
    if index >= 0 and index != current_device():
        # A compiled host function makes its tensors' device the current one and leaves it so.
        with torch.cuda.device(index):
            return launch_forward(kernel, q, k, v, bands, cu_seqlens, scale)
    if not q.is_contiguous() and q.stride(3) != 1:
        q = q.contiguous()
    o = torch.empty_like(q)
    lse = torch.empty_like(_lse_model(q.shape, index))
    if index < 0:
        # The short way for calls that take microseconds: 2 us less than the other.
        k = k if k.is_contiguous() or k.stride(3) == 1 else k.contiguous()
        v = v if v.is_contiguous() or v.stride(3) == 1 else v.contiguous()
        kernel.function(q, k, v, bands, cu_seqlens, o, lse, scale, torch.get_num_threads())
        return o, lse
    # The usual case at once: rows of a CUDA kernel's head dims are multiples of 16 bytes.
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()) or not _are_aligned(q, k, v):
        q, k, v = _readable(q), _readable(k), _readable(v)
    if kernel.family == "hopper":
        if scale <= 0:
            q, scale, _ = _with_positive_scale(q, scale)
        counters = _tile_counters("forward", index)
        kernel.function(q, k, v, bands, cu_seqlens, o, lse, counters, scale, _multiprocessors(index))
    else:
        kernel.function(q, k, v, bands, cu_seqlens, o, lse, scale, _multiprocessors(index))
    return o, lse


def ready_forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, bands: Tensor, cu_seqlens: Tensor
) -> Forward:
    """`launch_forward` for many calls on tensors like these: what they have in common is settled once.

    Not while a CUDA graph is captured, whose memory is its own; what it returns may be called then.

    Parameters
    ----------
    kernel, q, k, v, bands, cu_seqlens
        As in :func:`launch_forward`.

    Returns
    -------
    callable
        Takes q, k and v of these shapes, strides, dtypes and device, on the stream that is current now, and
        the factor of the scores; returns o and lse.
    """
    function, index = kernel.function, q.get_device()
    is_readable = _has_describable_strides if index >= 0 else lambda tensor: tensor.stride(3) == 1

    def launch_with_copies(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return launch_forward(kernel, q, k, v, bands, cu_seqlens, scale)

    if not (is_readable(q) and is_readable(k) and is_readable(v)):
        return launch_with_copies
    batch, heads, length, head_dim = q.shape
    o_shape = (batch, heads, length, head_dim)
    o_strides, dtype = torch.empty_like(q).stride(), q.dtype
    lse_shape, lse_strides, lse_dtype = (batch, heads, length), (heads * length, length, 1), torch.float32

    def launch_on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o = empty_on_cpu(o_shape, o_strides, dtype)
        lse = empty_on_cpu(lse_shape, lse_strides, lse_dtype)
        function(q, k, v, bands, cu_seqlens, o, lse, scale, torch.get_num_threads())
        return o, lse

    if index < 0:
        return launch_on_cpu
    processors, stream = _multiprocessors(index), current_stream(index)

    def launch_on_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if index != current_device() or not _are_aligned(q, k, v):
            return launch_with_copies(q, k, v, scale)
        o = empty_on_cuda(o_shape, o_strides, dtype)
        lse = empty_on_cuda(lse_shape, lse_strides, lse_dtype)
        function(q, k, v, bands, cu_seqlens, o, lse, scale, processors)
        return o, lse

    if kernel.family != "hopper":
        return launch_on_cuda
    counters = _kept_counters("forward", index, stream)
    # CUDA captures no graph on its default stream.
    may_capture = stream != 0

    def launch_on_hopper(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        is_special = index != current_device() or scale <= 0 or (may_capture and is_capturing())
        if is_special or not _are_aligned(q, k, v):
            return launch_with_copies(q, k, v, scale)
        o = empty_on_cuda(o_shape, o_strides, dtype)
        lse = empty_on_cuda(lse_shape, lse_strides, lse_dtype)
        function(q, k, v, bands, cu_seqlens, o, lse, counters, scale, processors)
        return o, lse

    return launch_on_hopper


def _backward_cpu(kernel: Kernel, inputs: tuple[Tensor, ...], models: Gradients, scale: float) -> Gradients:
    """The kernel writes float32 dk and dv of each query head; heads that share a key head are summed here."""
    q, k, v = models
    dq = torch.empty_like(q)
    is_grouped = q.shape[1] != k.shape[1]
    if k.dtype is torch.float32 and not is_grouped and k.is_contiguous() and v.is_contiguous():
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        kernel.function(*inputs, dq, dk, dv, scale, torch.get_num_threads())
        return dq, dk, dv
    per_head = [torch.empty(q.shape, dtype=torch.float32) for _ in range(2)]
    kernel.function(*inputs, dq, *per_head, scale, torch.get_num_threads())
    if is_grouped:
        batch, kv_heads, length, head_dim = k.shape
        grouped = (batch, kv_heads, q.shape[1] // kv_heads, length, head_dim)
        per_head = [gradient.view(grouped).sum(2) for gradient in per_head]
    dk, dv = (_like(gradient, model) for gradient, model in zip(per_head, (k, v), strict=True))
    return dq, dk, dv


def _query_gradient_sums(kernel: Kernel, dq: Tensor) -> tuple[Tensor, ...]:
    """The float32 workspace in which a kernel of one pass adds up dq, which it clears itself."""
    if not kernel.decisions.get("one_pass"):
        return ()
    return (dq.new_empty(dq.shape, dtype=torch.float32),)


def _backward_mma(kernel: Kernel, inputs: tuple[Tensor, ...], models: Gradients, scale: float) -> Gradients:
    """The kernel has a workspace for delta, and in one pass one for the sum of dq."""
    dq, dk, dv = (torch.empty_like(model) for model in models)
    delta = torch.empty_like(inputs[4])
    sums = _query_gradient_sums(kernel, dq)
    kernel.function(*inputs, dq, dk, dv, delta, *sums, scale, _multiprocessors(dq.get_device()))
    return dq, dk, dv


def _backward_hopper(
    kernel: Kernel, inputs: tuple[Tensor, ...], models: Gradients, scale: float
) -> Gradients:
    """The kernel has a workspace for lse and delta, two queries a row, one for two tile counters, and in one
    pass one for the sum of dq.
    """
    dq, dk, dv = (torch.empty_like(model) for model in models)
    batch, heads, length, _ = dq.shape
    index = dq.get_device()
    stats = dq.new_empty((batch, heads, (length + 1) // 2, 4), dtype=torch.float32)
    counters = _tile_counters("backward", index)
    q, scale, sign = _with_positive_scale(inputs[0], scale)
    sums = _query_gradient_sums(kernel, dq)
    kernel.function(q, *inputs[1:], dq, dk, dv, stats, counters, *sums, scale, _multiprocessors(index))
    return dq if sign == 1 else dq.mul_(sign), dk, dv


_BACKWARD = {"cpu": _backward_cpu, "hopper": _backward_hopper, "mma": _backward_mma}


def launch_backward(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    bands: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> Gradients:
    """Run a backward kernel.

    Parameters
    ----------
    kernel : Kernel
        From ``dispatch.find_kernel("backward", …)``.
    q, k, v, bands, cu_seqlens, scale
        As in :func:`launch_forward`.
    o, do : Tensor
        ``(B, Hq, N, D)``: the forward's output and the gradient with respect to it.
    lse, dlse : Tensor
        ``(B, Hq, N)`` float32, contiguous: the forward's log-sum-exp and the gradient with respect to it.

    Returns
    -------
    dq, dk, dv : Tensor
        Each like ``torch.empty_like`` of q, k and v, in their dtype.
    """
    index = q.get_device()
    if index >= 0 and index != current_device():
        with torch.cuda.device(index):
            return launch_backward(kernel, q, k, v, o, lse, do, dlse, bands, cu_seqlens, scale)
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (q, k, v))
    inputs = (
        _readable(q),
        _readable(k),
        _readable(v),
        _readable(o),
        lse,
        _readable(do),
        dlse,
        bands,
        cu_seqlens,
    )
    return _BACKWARD[kernel.family](kernel, inputs, (q, k, v), scale)
