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

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from spattn_tvm.bands import BandLayout
from spattn_tvm.dispatch import Kernel, find_kernel
from spattn_tvm.launch import Domain, launch_backward, launch_forward, like
from spattn_tvm.placement import Placement
from spattn_tvm.reference import reference_attention, reference_gradients
from spattn_tvm.torch_private import (
    count_dispatch_modes,
    has_function_mode,
    is_forward_mode,
    is_ordinary,
    is_profiling,
    is_transformed,
)

from .band_tables import find_domain


class Call(NamedTuple):
    """What both operators take after their tensors, in this order."""

    # Where queries and keys lie, by tensors.
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    query_offsets: Tensor | None
    kv_lengths: Tensor | None
    kv_starts: Tensor | None
    # Settings: an offset known here, BandLayout.spec, the factor of the scores.
    query_offset: int | None
    layout: str
    scale: float
    deterministic: bool
    impl: str

    @property
    def placement(self) -> Placement:
        offset = self.query_offset if self.query_offsets is None else self.query_offsets
        return Placement(self.cu_seqlens, self.cu_seqlens_k, offset, self.kv_lengths, self.kv_starts)


# The tensors and the settings of a Call.
Places = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
SAME_ROWS: Places = (None, None, None, None, None)
Settings = tuple[int | None, str, float, bool, str]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int | None: "SymInt?",
    str: "str",
    float: "Scalar",
    bool: "bool",
}


def schema_of(call: type) -> str:
    """A named tuple's fields as arguments of an operator's schema."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(call).items())


LIBRARY = torch.library.Library("spattn_tvm", "FRAGMENT")
LIBRARY.define(
    f"banded_attention_forward(Tensor q, Tensor k, Tensor v, {schema_of(Call)}) -> (Tensor o, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "banded_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{schema_of(Call)}) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=torch.Tag.pt2_compliant_tag,
)

# --- the implementation of both operators --------------------------------------------------------------


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the sums of scores of tensors of a dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, whose last dimension is contiguous."""
    return tensor if tensor.is_contiguous() or tensor.stride(-1) == 1 else tensor.contiguous()


def new_outputs(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """o and lse of a call, not written: what compilers know of them."""
    q = with_contiguous_rows(q)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


def check_finite(scale: float) -> None:
    """Raise unless a factor of the scores is finite."""
    try:
        is_finite = math.isfinite(scale)
    except OverflowError:  # an int beyond every float, whose digits may be too many to print
        raise ValueError("scale must be finite, got an integer that no float can hold") from None
    if not is_finite:
        raise ValueError(f"scale must be finite, got {scale}")


def _find(direction: str, q: Tensor, k: Tensor, call: Call) -> tuple[Kernel, Domain | None]:
    """The kernel that serves a call, and which keys its queries attend to unless that is the reference."""
    # Not by `Call.placement`: each eager backward comes by here, and that costs 2 us.
    cu_seqlens, cu_seqlens_k, offsets, kv_lengths, kv_starts, offset, layout, _, deterministic, impl = call
    offset = offset if offsets is None else offsets
    is_usual = cu_seqlens_k is None and offset is None and kv_lengths is None and kv_starts is None
    # Number of keys of a call whose keys are not the queries' own rows, or don't all exist; else None.
    kv_length = None if is_usual and q.shape[2] == k.shape[2] else k.shape[2]
    kernel = find_kernel(direction, q, layout, impl, deterministic, k.shape[1], kv_length)
    if kernel.spec is None:
        return kernel, None
    return kernel, find_domain(layout, q, k, cu_seqlens, cu_seqlens_k, offset, kv_lengths, kv_starts)


def run_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call = Call(*rest)
    check_finite(call.scale)
    q = with_contiguous_rows(q)
    if q.shape[0] == 0:
        return new_outputs(q)
    kernel, domain = _find("forward", q, k, call)
    if domain is None:
        layout = BandLayout.from_spec(call.layout)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            o, lse = reference_attention(q, k, v, layout, scale=call.scale, **call.placement._asdict())
            return like(o, q), lse.to(lse_dtype(q.dtype))
    return launch_forward(kernel, q, k, v, domain, call.scale)


def _backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*rest)
    q, k, v = with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v)
    # Hooks on saved tensors may have given them other strides, or another precision.
    o, lse, do = o.to(q.dtype), lse.to(lse_dtype(q.dtype)).contiguous(), do.to(q.dtype)
    if q.shape[0] == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    kernel, domain = _find("backward", q, k, call)
    if domain is None:
        layout = BandLayout.from_spec(call.layout)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = reference_gradients(
                q, k, v, o, lse, do, dlse, layout, scale=call.scale, **call.placement._asdict()
            )
            return like(dq, q), like(dk, k), like(dv, v)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype).contiguous()
    return launch_backward(kernel, q, k, v, o, lse, do, dlse, domain, call.scale)


# --- registration --------------------------------------------------------------------------------------

FORWARD = torch.ops.spattn_tvm.banded_attention_forward.default
BACKWARD = torch.ops.spattn_tvm.banded_attention_backward.default

for _device in ("CPU", "CUDA"):
    LIBRARY.impl("banded_attention_forward", run_forward, _device)
    LIBRARY.impl("banded_attention_backward", _backward, _device)


def _fake_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(with_contiguous_rows(tensor)) for tensor in (q, k, v))
    return dq, dk, dv


torch.library.register_fake("spattn_tvm::banded_attention_forward", new_outputs, lib=LIBRARY)
torch.library.register_fake("spattn_tvm::banded_attention_backward", _fake_backward, lib=LIBRARY)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, *rest[: len(SAME_ROWS)])
    ctx.settings = rest[len(SAME_ROWS) :]
    ctx.set_materialize_grads(False)


def find_gradients(
    ctx: Any, do: Tensor | None, dlse: Tensor | None, operator: Callable[..., Any] = BACKWARD
) -> tuple[Tensor | None, ...]:
    """dq, dk and dv from what `save` or its like saved; by the operator if somebody watches."""
    if do is None and dlse is None:
        return None, None, None
    q, k, v, o, lse, *places = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    tensors = (do, dlse, q, k, v, o, lse, *(places or SAME_ROWS))
    # With create_graph=True the gradients need a history that raises, which only the operator gives them.
    is_eager = not torch.is_grad_enabled() and not is_watched() and are_plain(tensors)
    return (_backward if is_eager else operator)(*tensors, *ctx.settings)


def differentiate(
    ctx: Any, do: Tensor | None, dlse: Tensor | None, operator: Callable[..., Any] = BACKWARD
) -> tuple[Tensor | None, ...]:
    """A gradient, or None, for each input of the forward operator."""
    others = len(SAME_ROWS) + len(ctx.settings)
    return *find_gradients(ctx, do, dlse, operator), *[None] * others


def refuse_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "banded_attention has no second derivative: its backward can't be differentiated. For gradients of "
        "gradients use spattn_tvm.reference_attention, which is made of PyTorch operations"
    )


def refuse_forward_mode(*arguments: Any) -> None:
    raise NotImplementedError(
        "banded_attention has no forward-mode derivative (jvp, jacfwd, hessian): use reverse mode "
        "(vjp, jacrev), or spattn_tvm.reference_attention, which is made of PyTorch operations"
    )


torch.library.register_autograd(
    "spattn_tvm::banded_attention_forward", differentiate, setup_context=save, lib=LIBRARY
)
torch.library.register_autograd(
    "spattn_tvm::banded_attention_backward", refuse_second_derivative, lib=LIBRARY
)


# --- eager calls ---------------------------------------------------------------------------------------


def is_watched() -> bool:
    """Does somebody see, change or record the operators that this thread calls?

    Compilers and tracers, dispatch modes (also those that hide from the guards of torch.compile, such as
    selective checkpointing's), function modes, profilers, functional transforms and forward-mode AD.
    """
    return (
        torch.compiler.is_compiling()
        or count_dispatch_modes() > 0
        or has_function_mode()
        or is_profiling()
        or is_forward_mode()
        or is_transformed()
        or torch.jit.is_tracing()
    )


def are_plain(tensors: tuple[Any, ...]) -> bool:
    """Are these tensors of CPU memory alone, or of CUDA memory alone, whose bytes hold their values? None is
    no tensor.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return all((type(t) is Tensor or type(t) is Parameter) and is_ordinary(t) for t in given) and (
        all(t.is_cpu for t in given) or all(t.is_cuda for t in given)
    )


def attend_by_operator(
    q: Tensor, k: Tensor, v: Tensor, places: Places, settings: Settings
) -> tuple[Tensor, Tensor]:
    """``banded_attention_forward`` through the dispatcher, for who needs to see an operator; unchecked."""
    # An operator with a registered backward drops tangents without a word.
    if is_forward_mode() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (q, k, v)):
        refuse_forward_mode()
    return FORWARD(q, k, v, *places, *settings)
