"""The PyTorch operators ``spattn_tvm::banded_attention_forward`` and
``spattn_tvm::banded_attention_backward``.

Both carry the layout as its ``spec``, so a traced graph holds no table and serves every length. The band
table and the kernel are found when an operator runs.

A call has two routes to the same implementation. Eager calls take a plain ``torch.autograd.Function``:
through the dispatcher, a Python operator with a registered autograd formula cost 36 us a call where this
route costs 8 (PyTorch 2.13, medians over an empty implementation). Whatever needs to see an operator takes
the dispatcher: ``torch.compile``, ``torch.export``, dispatch and function modes, functorch, forward-mode
AD, tensor subclasses and the profiler.

An eager call that resembles an earlier one is recognised as a whole and launched with what was found then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .bands import EMPTY, BandLayout
from .dispatch import call_on_change, find_kernel
from .launch import Forward, current_stream, launch_backward, launch_forward, ready_forward
from .reference import reference_attention, reference_gradients

# Layout (BandLayout.spec), scale, deterministic, impl.
Settings = tuple[str, float, bool, str]

IMPLEMENTATIONS = ("auto", "reference", "cpu", "hopper", "mma")

_LIBRARY = torch.library.Library("spattn_tvm", "FRAGMENT")
_LIBRARY.define(
    "banded_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, str layout, float scale, "
    "bool deterministic, str impl) -> (Tensor o, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "banded_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor? cu_seqlens, str layout, float scale, bool deterministic, str impl) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    tags=torch.Tag.pt2_compliant_tag,
)

# --- band tables: int32 (M, Hq, 4), M = 1 or one row a document ----------------------------------------


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


def length_tables(layout: BandLayout, lengths: Tensor) -> Tensor | None:
    """``layout.packed_table`` in tensor operations on the device of `lengths`, without reading them on the
    host.

    Parameters
    ----------
    layout : BandLayout
        One whose bands follow the sequence's own length.
    lengths : Tensor
        ``(M,)`` int32 lengths of documents.

    Returns
    -------
    Tensor or None
        int32 ``(M, H, 4)``; None for ``equal_area``, whose edges take a search.
    """
    if layout.name == "equal_area":
        return None
    context = lengths[:, None]
    head = torch.arange(layout.num_heads, dtype=torch.int32, device=lengths.device)
    base = context // layout.num_heads
    extra = context - base * layout.num_heads
    width = base + (head < extra)
    start = head * base + torch.minimum(head, extra)
    last = start + width - 1
    if layout.name == "causal":
        near, far = (torch.zeros_like(start), (context - 1).expand_as(start)), None
    elif layout.name == "local_only":
        near, far = (torch.zeros_like(start), width), None
    elif layout.name == "exclusive":
        near, far = (start, last), None
    elif layout.name == "gapped":
        near, far = (start, start + width // 2 - 1), None
    else:
        assert layout.name == "spattention", layout.name
        touches = start <= width + 1
        near = (torch.zeros_like(start), torch.where(touches, torch.maximum(width, last), width))
        far = (start.masked_fill(touches, EMPTY[0]), last.masked_fill(touches, EMPTY[1]))
    empty_near = near[0] > near[1]
    columns = [near[0].masked_fill(empty_near, EMPTY[0]), near[1].masked_fill(empty_near, EMPTY[1])]
    if far is None:
        columns += [torch.full_like(start, EMPTY[0]), torch.full_like(start, EMPTY[1])]
    else:
        empty_far = far[0] > far[1]
        columns += [far[0].masked_fill(empty_far, EMPTY[0]), far[1].masked_fill(empty_far, EMPTY[1])]
    return torch.stack(columns, -1)


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


def clear_tables() -> None:
    """Forget the cached band tables. No captured CUDA graph may still need them."""
    _prepared.clear()
    for cached in (_unpacked, _packed_on_host, _table_of_each_length):
        cached.cache_clear()


# --- the implementation of both operators --------------------------------------------------------------


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _with_contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() or tensor.stride(-1) == 1 else tensor.contiguous()


def _like(result: Tensor, model: Tensor) -> Tensor:
    return torch.empty_like(model).copy_(result)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    layout: str,
    scale: float,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    q = _with_contiguous_rows(q)
    if q.shape[0] == 0:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=_lse_dtype(q.dtype))
    kernel = find_kernel("forward", q, layout, impl, deterministic, k.shape[1])
    if kernel.family == "reference":
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            o, lse = reference_attention(
                q, k, v, BandLayout.from_spec(layout), scale=scale, cu_seqlens=cu_seqlens
            )
            return _like(o, q), lse.to(_lse_dtype(q.dtype))
    bands, cu_seqlens = find_bands(layout, q, cu_seqlens)
    return launch_forward(kernel, q, k, v, bands, cu_seqlens, scale)


def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    layout: str,
    scale: float,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _with_contiguous_rows(q), _with_contiguous_rows(k), _with_contiguous_rows(v)
    if q.shape[0] == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    kernel = find_kernel("backward", q, layout, impl, deterministic, k.shape[1])
    if kernel.family == "reference":
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = reference_gradients(
                q, k, v, o, lse, do, dlse, BandLayout.from_spec(layout), scale=scale, cu_seqlens=cu_seqlens
            )
            return _like(dq, q), _like(dk, k), _like(dv, v)
    bands, cu_seqlens = find_bands(layout, q, cu_seqlens)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype).contiguous()
    return launch_backward(kernel, q, k, v, o, lse, do, dlse, bands, cu_seqlens, scale)


# --- registration --------------------------------------------------------------------------------------

_FORWARD = torch.ops.spattn_tvm.banded_attention_forward.default
_BACKWARD = torch.ops.spattn_tvm.banded_attention_backward.default

for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("banded_attention_forward", _forward, _device)
    _LIBRARY.impl("banded_attention_backward", _backward, _device)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    layout: str,
    scale: float,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    q = _with_contiguous_rows(q)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=_lse_dtype(q.dtype))


def _fake_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(_with_contiguous_rows(tensor)) for tensor in (q, k, v))
    return dq, dk, dv


torch.library.register_fake("spattn_tvm::banded_attention_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("spattn_tvm::banded_attention_backward", _fake_backward, lib=_LIBRARY)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None and dlse is None:
        return None, None, None
    q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    # With create_graph=True the gradients need a history that raises, which only the operator gives them.
    backward = _backward if not torch.is_grad_enabled() and is_plain(q, k, v) else _BACKWARD
    return backward(do, dlse, q, k, v, o, lse, cu_seqlens, *ctx.settings)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, do, dlse), None, None, None, None, None


def _refuse_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(
        "banded_attention has no second derivative: its backward can't be differentiated. For gradients of "
        "gradients use spattn_tvm.reference_attention, which is made of PyTorch operations"
    )


torch.library.register_autograd(
    "spattn_tvm::banded_attention_forward", _differentiate, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd(
    "spattn_tvm::banded_attention_backward", _refuse_second_derivative, lib=_LIBRARY
)


# --- eager calls ---------------------------------------------------------------------------------------

# Looked up once: attribute by attribute they would cost a call another 0.3 us.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_function_mode = torch._C._is_torch_function_mode_enabled
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_is_profiling = torch.autograd._profiler_enabled
_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_determinism_asked = torch._C._get_deterministic_algorithms


def is_plain(q: Any, k: Any, v: Any) -> bool:
    """Is this an eager call on CPU or on CUDA tensors, while nobody watches operators?"""
    return (
        not _is_compiling()
        and (type(q) is Tensor or type(q) is Parameter)
        and (type(k) is Tensor or type(k) is Parameter)
        and (type(v) is Tensor or type(v) is Parameter)
        and ((q.is_cuda and k.is_cuda and v.is_cuda) or (q.is_cpu and k.is_cpu and v.is_cpu))
        and not _dispatch_modes()
        and not _has_function_mode()
        and _functorch_level() is None
        and _tracing_state() is None
        and not _is_profiling()
        and forward_ad._current_level < 0
    )


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What serves calls like an earlier one, which was plain, unpacked and valid."""

    # Whether q, k and v are like those of the earlier call: types, dtypes, device, shapes, strides,
    # requires_grad, and the thread's dispatch keys. So no dispatch mode, functional transform, tracer or
    # autocast is active that was not then.
    serves: Callable[[Any, Any, Any], bool]
    launch: Forward
    requires_grad: bool
    scale: float
    # The stream is one of this device, -1 for the CPU; what was prepared is ordered on it.
    index: int
    stream: int


# By layout, `impl` and the shape of q, the latest first. Guards are tried one after the other, 0.3 us each.
_prepared: dict[tuple[str, str, torch.Size], list[_Prepared]] = {}
# What else such calls differ in by turns: keys' shapes, strides, dtypes, streams.
_MAX_PREPARED = 16
_MAX_SHAPES = 4096

call_on_change(_prepared.clear)


def remember(q: Tensor, k: Tensor, v: Tensor, layout: str, impl: str) -> None:
    """Let `attend_again` serve calls like this one, which was plain, unpacked and valid."""
    index = q.get_device()
    # What is allocated while a graph is captured is the graph's. The guard takes no tensor twice.
    if (index >= 0 and torch.cuda.is_current_stream_capturing()) or q is k or k is v or v is q:
        return
    if q.shape[0] == 0:
        return
    kernel = find_kernel("forward", q, layout, impl, kv_heads=k.shape[1])
    if kernel.family == "reference":
        return
    prepared = _Prepared(
        # The guard of torch.compile on its inputs takes 0.3 us where comparing the same in Python took 1.3.
        serves=torch._C._dynamo.guards.TensorGuards(
            q, k, v, dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check,
        launch=ready_forward(kernel, q, k, v, *find_bands(layout, q, None)),
        requires_grad=q.requires_grad or k.requires_grad or v.requires_grad,
        scale=q.shape[3] ** -0.5,
        index=index,
        stream=current_stream(index) if index >= 0 else 0,
    )
    if len(_prepared) >= _MAX_SHAPES:
        _prepared.clear()
    key = (layout, impl, q.shape)
    _prepared[key] = [prepared, *_prepared.get(key, ())[: _MAX_PREPARED - 1]]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        settings: Settings,
        launch: Forward | None,
    ) -> tuple[Tensor, Tensor]:
        if launch is None:
            o, lse = _forward(q, k, v, cu_seqlens, *settings)
        else:
            o, lse = launch(q, k, v, settings[1])
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, do, dlse), None, None, None


class _OutputAgain(torch.autograd.Function):
    """Without lse as an output: 0.5 us less."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, launch: Forward, settings: Settings) -> Tensor:
        o, lse = launch(q, k, v, settings[1])
        ctx.settings = settings
        # What save_for_backward and set_materialize_grads set; to call them takes another 0.4 us.
        ctx.to_save = (q, k, v, o, lse, None)
        ctx.materialize_grads = False
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, do, None), None, None


# Function.apply without the part that serves functorch, which is_plain excludes: 2 us less a call.
_apply = super(torch.autograd.Function, _Attention).apply
_apply_for_output = super(torch.autograd.Function, _OutputAgain).apply


def attend_again(
    q: Any, k: Any, v: Any, layout: str, impl: str, scale: float | None, deterministic: bool, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor] | None:
    """A call like one that `remember` knows, in as few steps as possible; differentiable.

    Parameters
    ----------
    q, k, v
        May be invalid.
    layout, impl : str
        ``BandLayout.spec``, and what should be one of `IMPLEMENTATIONS`.
    scale, deterministic, return_lse
        As in ``banded_attention``.

    Returns
    -------
    Tensor, or tuple of Tensor
        o, or o and lse; None for any other call.
    """
    if _is_dynamo_compiling() or _has_function_mode() or _is_profiling() or forward_ad._current_level >= 0:
        return None
    if type(q) is not Tensor and type(q) is not Parameter:
        return None
    for prepared in _prepared.get((layout, impl, q.shape), ()):
        if prepared.serves(q, k, v) and (
            prepared.index < 0 or prepared.stream == current_stream(prepared.index)
        ):
            break
    else:
        return None
    if scale is None:
        scale = prepared.scale
    if not (prepared.requires_grad and _is_grad_enabled()):
        o, lse = prepared.launch(q, k, v, scale)
        return (o, lse) if return_lse else o
    settings = (layout, scale, bool(deterministic or _is_determinism_asked()), impl)
    if return_lse:
        return _apply(q, k, v, None, settings, prepared.launch)
    return _apply_for_output(q, k, v, prepared.launch, settings)


def attend_eagerly(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """``banded_attention_forward`` past the dispatcher, for a plain call; differentiable, unchecked.

    Parameters
    ----------
    q, k, v, cu_seqlens
        As in ``banded_attention``.
    settings : (str, float, bool, str)
        The operator's further arguments: ``BandLayout.spec``, factor of the scores, whether gradients must
        be bitwise equal from run to run, and one of `IMPLEMENTATIONS`.

    Returns
    -------
    o : Tensor
        ``(B, Hq, N, D)`` in the dtype and the dimension order of q.
    lse : Tensor
        ``(B, Hq, N)`` float32, float64 for float64 inputs.
    """
    if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _apply(q, k, v, cu_seqlens, settings, None)
    return _forward(q, k, v, cu_seqlens, *settings)


def attend_by_operator(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """``banded_attention_forward`` through the dispatcher, for who needs to see an operator; unchecked."""
    # An operator with a registered backward drops tangents without a word.
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in (q, k, v)
    ):
        raise NotImplementedError("banded_attention has no forward-mode derivative: use backward")
    return _FORWARD(q, k, v, cu_seqlens, *settings)
