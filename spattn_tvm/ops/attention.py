"""``banded_attention``: check the inputs, then attend."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.dispatch import implementations
from spattn_tvm.placement import Placement, check_placement
from spattn_tvm.torch_private import is_any_autocast_enabled, is_differentiated

from . import flops  # noqa: F401  (registers formulas)
from .operators import SAME_ROWS, are_plain, attend_by_operator, check_finite, is_watched
from .repeated_calls import attend_again, attend_eagerly, remember
from .sharded import attend_sharded, is_sharded
from .standard_graph import attend_by_standard_operators, writes_standard_graph
from .transforms import attend_transformed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise unless a tensor is strided."""
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: pack its sequences along the length and give their boundaries as "
            "cu_seqlens"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}: use {name}.to_dense()")


def _check_ranks(q: Any, k: Any, v: Any) -> None:
    for name, tensor, heads in (("q", q, "query heads"), ("k", k, "kv heads"), ("v", v, "kv heads")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, {heads}, length, head_dim), "
                f"got {tensor.dim()} in shape {tuple(tensor.shape)}"
            )


def check_kinds(names: str, q: Tensor, k: Tensor, v: Tensor, layout: BandLayout, impl: str) -> None:
    """Raise unless layout, `impl`, the tensors' dtypes and their devices are such as can be served."""
    if not isinstance(layout, BandLayout):
        raise TypeError(
            "layout must be a BandLayout such as BandLayout.spattention(num_heads), "
            f"got {type(layout).__name__}"
        )
    if impl not in implementations():
        raise ValueError(f"impl must be one of {', '.join(implementations())}, got {impl!r}")

    dtype, device = q.dtype, q.device
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(f"{names} must have one dtype, got {dtype}, {k.dtype} and {v.dtype}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if dtype is torch.float64 and impl not in ("auto", "reference"):
        raise TypeError(f"float64 is computed by impl='reference' only (or 'auto'), got impl={impl!r}")
    if k.device != device or v.device != device:
        raise ValueError(f"{names} must be on one device, got {device}, {k.device} and {v.device}")
    if not (q.is_cpu or q.is_cuda or q.is_meta):
        raise ValueError(f"banded attention runs on cpu and cuda devices, got tensors on {device}")


def check_head_dim(head_dim: int, dtype: torch.dtype, impl: str) -> None:
    """Raise unless kernels, or the reference if it will serve, take the head dim."""
    if impl != "reference" and dtype is not torch.float64 and (head_dim % 8 or not 32 <= head_dim <= 256):
        raise ValueError(
            f"head_dim must be a multiple of 8 from 32 to 256, got {head_dim}; impl='reference' takes any"
        )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, layout: BandLayout, impl: str) -> None:
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        _check_ranks(q, k, v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dense(name, tensor)
    q_shape, k_shape = q.shape, k.shape
    if len(q_shape) != 4 or len(k_shape) != 4 or v.dim() != 4:
        _check_ranks(q, k, v)
    check_kinds("q, k and v", q, k, v, layout, impl)
    if k_shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k_shape)} and {tuple(v.shape)}")
    batch, query_heads, length, head_dim = q_shape
    kv_batch, kv_heads, kv_length, kv_head_dim = k_shape
    if batch != kv_batch or head_dim != kv_head_dim:
        raise ValueError(
            "q, k and v must agree in batch and head_dim (dimensions 0 and 3), "
            f"got {tuple(q_shape)} and {tuple(k_shape)}"
        )
    if query_heads == 0 or kv_heads == 0 or length == 0 or kv_length == 0 or head_dim == 0:
        raise ValueError(
            "heads, lengths and head_dim must be at least 1 (only the batch may be empty), "
            f"got {tuple(q_shape)} and {tuple(k_shape)}"
        )
    if query_heads % kv_heads:
        raise ValueError(
            f"the number of query heads must be a multiple of the kv heads, got {query_heads} and {kv_heads}"
        )
    if query_heads != layout.num_heads:
        layout.check_heads(query_heads)
    check_head_dim(head_dim, q.dtype, impl)


def check_scale(scale: Any) -> float:
    """A factor of the scores as a float, or as the symbol that stands for it while a call is traced."""
    if isinstance(scale, Tensor) and torch.jit.is_tracing():
        scale = float(scale)  # made of a tensor's size, which is a tensor while torch.jit traces
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a float, got {scale!r} of type {type(scale).__name__}")
    if torch.compiler.is_dynamo_compiling() or isinstance(scale, (torch.SymInt, torch.SymFloat)):
        return scale  # a symbol has no value yet; the operator checks it
    check_finite(scale)
    return float(scale)


def with_autocast_dtype(tensor: Any, device_type: str) -> Any:
    """The tensor cast as PyTorch casts the arguments of a lower-precision operator: floating point, but not
    float64.
    """
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype is not torch.float64:
        return tensor.to(torch.get_autocast_dtype(device_type))
    return tensor


def _check_cu_seqlens(name: str, cu_seqlens: Any, device: torch.device) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    check_dense(name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must have shape (number of documents + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} must be on the device of q, {device}, got {cu_seqlens.device}")


def _check_documents(cu_seqlens: Any, cu_seqlens_k: Any, device: torch.device) -> None:
    _check_cu_seqlens("cu_seqlens", cu_seqlens, device)
    if cu_seqlens_k is not None:
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, device)
        if cu_seqlens_k.shape[0] != cu_seqlens.shape[0]:
            raise ValueError(
                "cu_seqlens_k must have as many documents as cu_seqlens, "
                f"got {cu_seqlens_k.shape[0] - 1} and {cu_seqlens.shape[0] - 1}"
            )


@overload
def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BandLayout,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool = False,
    impl: str = "auto",
) -> Tensor: ...
@overload
def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BandLayout,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    return_lse: Literal[True],
    deterministic: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BandLayout,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which each head attends to its own bands of distances.

    ``o_i = Σ_j softmax_j(scale * <q_i, k_j>) v_j`` over the keys j whose distance ``i - j`` lies in one of
    the head's bands. Sums are accumulated in float32. Differentiable once with respect to q, k and v,
    through o and lse. Under ``torch.autocast`` q, k and v are cast to the autocast dtype, as for
    ``scaled_dot_product_attention``.

    Parameters
    ----------
    q : Tensor
        ``(B, Hq, Nq, D)``: float32, bfloat16 or float16, on a CPU or CUDA device; float64 is served by the
        reference. Any strides; a tensor whose last dimension is not contiguous is copied. D: a multiple of
        8 from 32 to 256.
    k, v : Tensor
        ``(B, Hkv, Nk, D)``, dtype and device of q. ``Hq % Hkv == 0``: query head h reads head ``h // (Hq //
        Hkv)``.
    layout : BandLayout
        Bands of the Hq query heads, such as ``BandLayout.spattention(Hq, context_length)``. Without a
        context length the bands follow N = Nq = Nk, so that what a token sees depends on how many tokens
        come after it (``BandLayout.is_autoregressive``). Where q holds some of a model's heads,
        ``layout.heads(start, stop)`` has their bands.
    scale : float, optional
        Factor of the scores, ``D**-0.5`` by default.
    cu_seqlens : Tensor, optional
        ``(number of documents + 1,)`` int32 or int64, on the device of q: sorted boundaries, from 0 to at
        most N, of documents packed along the length, the same for each batch row. Bands end at a
        document's first token. If the layout has no context length, each document has the bands of its own
        length. Rows behind the last boundary belong to no document: o = 0, lse = -inf, zero gradients. The
        values are checked on the CPU only, because on a CUDA device they would have to be waited for:
        there kernels take their running maximum, clamped to ``[0, N]``, and what lies before the first or
        behind the last boundary belongs to no document. For the same reason a CUDA call does not compare
        the documents' lengths with the layout's context length.
    cu_seqlens_k : Tensor, optional
        With `cu_seqlens`, which then are the queries': ``(number of documents + 1,)``, boundaries of the
        documents' keys, from 0 to at most Nk; `cu_seqlens` by default. The queries of a document are its last
        ones.
    query_offset : int or Tensor, optional
        What makes a query's row its position among the keys: query row r attends to key row j at the
        distance ``r + query_offset - j``. An int, or an int32 or int64 tensor ``(B,)`` on the device of q.
        By default the queries are the last ones: ``Nk - Nq``, or ``kv_lengths - Nq``.
    kv_lengths, kv_starts : Tensor, optional
        ``(B,)`` int32 or int64, on the device of q: of a batch row's keys those from ``kv_starts[b]`` (0) to
        below ``kv_lengths[b]`` (Nk) exist. The others are never used, not even where they are NaN, and get
        gradients of zero. No value is read by the host; they are clamped to ``[0, Nk]``.
    return_lse : bool
        Also return the logarithm of the sum of exponentiated scores.
    deterministic : bool
        Ask for gradients that are bitwise equal from run to run; ``torch.use_deterministic_algorithms``
        asks as well. CPU kernels always are.
    impl : str
        ``"auto"`` takes the device's preferred kernel family, or one that is made for such problems, the
        eager reference for float64, and the reference with a warning where no kernel can serve.
        ``"reference"`` is that one; any other is the name of a kernel family (``"cpu"``, ``"hopper"``,
        ``"mma"``, ``"hopper_split"``, ``"mma_split"`` or a registered one), which is used or the call fails;
        the split ones, for few queries and many keys, have no backward.

    Returns
    -------
    o : Tensor
        ``(B, Hq, Nq, D)`` in the dtype and the dimension order of q. A query with no key has o = 0.
    lse : Tensor
        Only with ``return_lse``: ``(B, Hq, Nq)`` float32 (float64 for float64 inputs), natural logarithm,
        -inf for a query with no key.

    Raises
    ------
    TypeError
        Something that is not a tensor or a BandLayout, mixed or unsupported dtypes.
    ValueError
        Shapes, heads, devices or boundaries that do not fit, a sequence longer than the layout's context
        length, a scale that is not finite, an unknown `impl`. `query_offset`, `kv_lengths` or `kv_starts`
        beside `cu_seqlens`. A layout that is not autoregressive where Nq and Nk differ, or with one of
        `cu_seqlens_k`, `query_offset`, `kv_lengths` and `kv_starts`.

    Notes
    -----
    DTensors whose batch, heads or rows are sharded are attended as the whole tensors are, and o has the
    placements of q; sharded rows by :func:`~spattn_tvm.distributed.context_parallel_attention`.

    A NaN or an infinity in q, k, v or a gradient stays within its own document, batch row and head; one in k
    or v within the query heads that read it. Inside a document it may reach other rows, as it does in dense
    attention with a mask. A query row that is NaN has o and lse of NaN. A query with no key has zero
    gradients and adds to nobody's, whatever arrives for its o and lse, NaN included:
    ``torch.where(lse.isinf(), 0., loss(lse))`` is safe.

    Examples
    --------
    >>> q, k, v = (torch.randn(1, 8, 256, 64) for _ in range(3))
    >>> banded_attention(q, k, v, BandLayout.spattention(num_heads=8)).shape
    torch.Size([1, 8, 256, 64])
    """
    # 0.1 us less than asking for one kind of device.
    if is_any_autocast_enabled():
        device_type = "cuda" if isinstance(q, Tensor) and q.is_cuda else "cpu"
        if torch.is_autocast_enabled(device_type):
            q, k, v = (with_autocast_dtype(tensor, device_type) for tensor in (q, k, v))
    if scale is not None:
        scale = check_scale(scale)
    is_usual = cu_seqlens_k is None and query_offset is None and kv_lengths is None and kv_starts is None
    if cu_seqlens is None and is_usual and isinstance(layout, BandLayout):
        outputs = attend_again(q, k, v, layout.spec, impl, scale, deterministic, return_lse)
        if outputs is not None:
            return outputs

    _check_inputs(q, k, v, layout, impl)
    if is_sharded(q, k, v):
        by_row = {"query_offset": query_offset, "kv_lengths": kv_lengths, "kv_starts": kv_starts}
        shared = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "scale": scale, "impl": impl}
        shared |= {"deterministic": deterministic, "return_lse": return_lse}
        outputs = attend_sharded(banded_attention, q, k, v, layout, by_row, shared, can_share_rows=True)
        return cast("Tensor | tuple[Tensor, Tensor]", outputs)
    placement = Placement(cu_seqlens, cu_seqlens_k, query_offset, kv_lengths, kv_starts)
    check_placement(layout, q, k, placement)
    if cu_seqlens is not None:
        _check_documents(cu_seqlens, cu_seqlens_k, q.device)
    if scale is None:
        scale = check_scale(q.shape[3] ** -0.5)
    deterministic = bool(deterministic or torch.are_deterministic_algorithms_enabled())
    offset, offsets = (None, query_offset) if isinstance(query_offset, Tensor) else (query_offset, None)
    places = SAME_ROWS
    if cu_seqlens is not None or not is_usual:
        places = (cu_seqlens, cu_seqlens_k, offsets, kv_lengths, kv_starts)
    settings = (offset, layout.spec, scale, deterministic, impl)
    if not is_watched() and are_plain((q, k, v, *places)):
        o, lse = attend_eagerly(q, k, v, places, settings)
        if cu_seqlens is None and is_usual:
            remember(q, k, v, layout.spec, impl)
    elif writes_standard_graph():
        o, lse = attend_by_standard_operators(q, k, v, places, layout, scale, offset)
    elif torch.compiler.is_dynamo_compiling() or not is_differentiated():
        o, lse = attend_by_operator(q, k, v, places, settings)
    else:
        o, lse = attend_transformed(q, k, v, places, settings)
    return (o, lse) if return_lse else o
