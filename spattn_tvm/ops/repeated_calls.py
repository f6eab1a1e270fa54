"""Eager calls past the dispatcher: one that resembles an earlier one is launched with what was found then."""

from __future__ import annotations

from collections.abc import Callable, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from spattn_tvm.dispatch import call_on_change, find_kernel
from spattn_tvm.launch import (
    Forward,
    ready_forward,
)
from spattn_tvm.torch_private import (
    apply_past_functorch,
    count_dispatch_modes,
    current_stream,
    guard_inputs,
    has_function_mode,
    is_capturing,
    is_forward_mode,
    is_profiling,
    keep_for_backward,
)

from .band_tables import call_when_dropped, find_domain
from .operators import (
    SAME_ROWS,
    Places,
    Settings,
    find_gradients,
    run_forward,
)

# Looked up once: attribute by attribute they would cost a call another 0.1 us.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_determinism_asked = torch.are_deterministic_algorithms_enabled


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
# Each has guards on the heap, amid what calls allocate and free.
_MAX_SHAPES = 64
# Calls of a shape before it takes the place of the one that was prepared first. Where every shape does that,
# as in training on ever new lengths, guards lie wherever memory was taken and keep all of it: 500 lengths of
# 1,800 tokens on (4 MiB a tensor, three calls and a backward pass each) kept 1,000 MiB when the second call
# sufficed.
_OFTEN = 100
_MAX_COUNTED = 4096


class CallCounts:
    """How often calls came that nothing is prepared for."""

    def __init__(self) -> None:
        self._counts: dict[Any, int] = {}

    def is_worth_preparing(self, key: Any, prepared: Sized) -> bool:
        """Counts a call: what came once, or what would take another's place and is rare, is not worth it."""
        count = self._counts.pop(key, 0) + 1
        if count > (1 if len(prepared) < _MAX_SHAPES else _OFTEN):
            return True
        if len(self._counts) >= _MAX_COUNTED:
            self._counts.clear()
        self._counts[key] = count
        return False


def make_room(prepared: dict[Any, Any], key: Any) -> None:
    """Let the first that was prepared go where another one than `key` must."""
    if key not in prepared and len(prepared) >= _MAX_SHAPES:
        with suppress(KeyError, StopIteration, RuntimeError):  # another thread may be doing the same
            del prepared[next(iter(prepared))]


_counts = CallCounts()

call_on_change(_prepared.clear)
call_when_dropped(_prepared.clear)


def remember(q: Tensor, k: Tensor, v: Tensor, layout: str, impl: str) -> None:
    """Let `attend_again` serve calls like this one, which was plain, unpacked and valid."""
    index = q.get_device()
    # What is allocated while a graph is captured is the graph's. The guard takes no tensor twice.
    if (index >= 0 and torch.cuda.is_current_stream_capturing()) or q is k or k is v or v is q:
        return
    if q.shape[0] == 0:
        return
    key = (layout, impl, q.shape)
    if key not in _prepared and not _counts.is_worth_preparing(key, _prepared):
        return
    kv_length = None if q.shape[2] == k.shape[2] else k.shape[2]
    kernel = find_kernel("forward", q, layout, impl, kv_heads=k.shape[1], kv_length=kv_length)
    if kernel.spec is None:
        return
    serves = guard_inputs(q, k, v)
    if serves is None:
        return
    prepared = _Prepared(
        serves=serves,
        launch=ready_forward(kernel, q, k, v, find_domain(layout, q, k)),
        requires_grad=q.requires_grad or k.requires_grad or v.requires_grad,
        scale=q.shape[3] ** -0.5,
        index=index,
        stream=current_stream(index) if index >= 0 else 0,
    )
    make_room(_prepared, key)
    _prepared[key] = [prepared, *_prepared.get(key, ())[: _MAX_PREPARED - 1]]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        places: Places,
        settings: Settings,
        launch: Forward | None,
    ) -> tuple[Tensor, Tensor]:
        if launch is None:
            o, lse = run_forward(q, k, v, *places, *settings)
        else:
            o, lse = launch(q, k, v, settings[2])
        ctx.settings = settings
        keep_for_backward(ctx, (q, k, v, o, lse) if places is SAME_ROWS else (q, k, v, o, lse, *places))
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *find_gradients(ctx, do, dlse), None, None, None


class _OutputAgain(torch.autograd.Function):
    """Without lse as an output: 0.5 us less."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, launch: Forward, settings: Settings) -> Tensor:
        o, lse = launch(q, k, v, settings[2])
        ctx.settings = settings
        keep_for_backward(ctx, (q, k, v, o, lse))
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor | None) -> tuple[Tensor | None, ...]:
        return *find_gradients(ctx, do, None), None, None


_apply = apply_past_functorch(_Attention)
_apply_for_output = apply_past_functorch(_OutputAgain)


def attend_again(
    q: Any, k: Any, v: Any, layout: str, impl: str, scale: float | None, deterministic: bool, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor] | None:
    """A call like one that `remember` knows, in as few steps as possible; differentiable.

    Parameters
    ----------
    q, k, v
        May be invalid.
    layout, impl : str
        ``BandLayout.spec``, and what should be one of :func:`~spattn_tvm.dispatch.implementations`.
    scale, deterministic, return_lse
        As in ``banded_attention``.

    Returns
    -------
    Tensor, or tuple of Tensor
        o, or o and lse; None for any other call.
    """
    # What `is_watched` asks, less what shows in the thread's dispatch keys, which the guard compares:
    # functional transforms and tracers. So would dispatch modes, but some of them hide from it.
    if (
        _is_dynamo_compiling()
        or count_dispatch_modes()
        or has_function_mode()
        or is_profiling()
        or is_forward_mode()
    ):
        return None
    if type(q) is not Tensor and type(q) is not Parameter:
        return None
    try:
        # A nested tensor has no shape; the guard would end the process over it.
        resembling = () if k.is_nested or v.is_nested else _prepared.get((layout, impl, q.shape), ())
    except (TypeError, RuntimeError, AttributeError):  # an `impl`, a nested q or no tensors: see the checks
        return None
    # While a graph is captured, what it uses must be kept for it, which the other routes see to.
    for prepared in resembling:
        if prepared.serves(q, k, v) and (
            prepared.index < 0
            or (
                prepared.stream == current_stream(prepared.index) and not (prepared.stream and is_capturing())
            )
        ):
            break
    else:
        return None
    if scale is None:
        scale = prepared.scale
    if not (prepared.requires_grad and _is_grad_enabled()):
        o, lse = prepared.launch(q, k, v, scale)
        return (o, lse) if return_lse else o
    settings = (None, layout, scale, bool(deterministic or _is_determinism_asked()), impl)
    if return_lse:
        return _apply(q, k, v, SAME_ROWS, settings, prepared.launch)
    return _apply_for_output(q, k, v, prepared.launch, settings)


def attend_eagerly(
    q: Tensor, k: Tensor, v: Tensor, places: Places, settings: Settings
) -> tuple[Tensor, Tensor]:
    """``banded_attention_forward`` past the dispatcher, for a plain call; differentiable, unchecked.

    Parameters
    ----------
    q, k, v
        As in ``banded_attention``.
    places : Places
        Tensors that say where queries and keys lie; `SAME_ROWS` where there are none.
    settings : (int or None, str, float, bool, str)
        The operator's further arguments: an offset of the queries known here, ``BandLayout.spec``, factor of
        the scores, whether gradients must be bitwise equal from run to run, and one of
        :func:`~spattn_tvm.dispatch.implementations`.

    Returns
    -------
    o : Tensor
        ``(B, Hq, Nq, D)`` in the dtype and the dimension order of q.
    lse : Tensor
        ``(B, Hq, Nq)`` float32, float64 for float64 inputs.
    """
    if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _apply(q, k, v, places, settings, None)
    return run_forward(q, k, v, *places, *settings)
