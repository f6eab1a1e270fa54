"""``banded_attention_decode``: a few queries against the keys of a cache."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spattn_tvm.bands import BandLayout
from spattn_tvm.cache_forms import CachePlaces, check_cache
from spattn_tvm.torch_private import is_any_autocast_enabled, is_forward_mode

from .attention import check_dense, check_head_dim, check_kinds, check_scale, with_autocast_dtype
from .decode_operator import DECODE, NO_GRADIENT, decode
from .operators import are_plain, is_watched
from .repeated_steps import decode_again, remember_step
from .sharded import attend_sharded, is_sharded


def _check_inputs(q: Any, k_cache: Any, v_cache: Any, layout: Any, impl: str) -> None:
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
    if q.dim() != 4:
        raise ValueError(
            f"q must have 4 dimensions (batch, query heads, queries, head_dim), got {q.dim()} in shape "
            f"{tuple(q.shape)}"
        )
    check_kinds("q, k_cache and v_cache", q, k_cache, v_cache, layout, impl)
    check_head_dim(q.shape[3], q.dtype, impl)


def _check_shards(q: Any, k_cache: Any, v_cache: Any, block_table: Any, ring: Any) -> None:
    """Raise where a shard of a dimension is no shard of batch rows or heads."""
    if ring is not None:
        raise ValueError(
            "rings of all heads lie in one buffer, which can't be sharded: give each rank its own"
        )
    if block_table is not None and any(
        placement.is_shard(0)
        for tensor in (q, k_cache, v_cache)
        for placement in getattr(tensor, "placements", ())
    ):
        raise ValueError("pages belong to no batch row: with a block_table only heads can be sharded")


def _check_no_gradient(tensors: tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(NO_GRADIENT)
    if is_forward_mode() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(NO_GRADIENT)


@overload
def banded_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BandLayout,
    *,
    cache_lengths: Tensor,
    cache_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    ring: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...
@overload
def banded_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BandLayout,
    *,
    cache_lengths: Tensor,
    cache_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    ring: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def banded_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BandLayout,
    *,
    cache_lengths: Tensor,
    cache_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    ring: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A step of decoding: 1 to 16 queries a batch row attend to a cache, in each head's bands of distances.

    The cache holds the keys and values of these queries already. Only the keys in the bands are read, each
    once for all query heads that share it. Not differentiable. No value of a tensor is read by the host on
    CUDA devices, so that a step can be captured into a CUDA graph.

    Parameters
    ----------
    q : Tensor
        ``(B, Hq, Nq, D)``, 1 to 16 queries: float32, bfloat16 or float16, on a CPU or CUDA device; float64 is
        served by the reference. Any strides. D: a multiple of 8 from 32 to 256.
    k_cache, v_cache : Tensor
        In the dtype and on the device of q, in one of three forms. Contiguous: ``(B, Hkv, S, D)``. Paged:
        ``(pages, Hkv, page_size, D)``, with `block_table`; page sizes from 16 to 256. Rings: ``(B, R, D)``,
        with `ring`. Any strides; one whose last dimension is not contiguous is copied, all of it. Under
        ``torch.autocast`` q and the caches are cast, so keep the caches in that dtype.
    layout : BandLayout
        Bands of the Hq query heads; one that is autoregressive (with a context length, or without need of
        one).
    cache_lengths : Tensor
        ``(B,)`` int32 or int64: how many keys of a batch row there are, those of this call included. Query
        row r has the position ``cache_lengths[b] - Nq + r``.
    cache_starts : Tensor, optional
        ``(B,)`` int32 or int64: the position of the first key (left padding), 0 by default.
    block_table : Tensor, optional
        ``(B, max_pages)`` int32: position p lies in row ``p % page_size`` of page ``block_table[b, p //
        page_size]``.
    ring : Tensor, optional
        ``(Hkv, 2)`` int32 of (base, capacity): position p of key/value head g lies in row ``base[g] + p %
        capacity[g]``. A capacity is at least the largest distance of the head's bands plus Nq, or such that
        no two keys which the queries attend to share a row.
    scale : float, optional
        Factor of the scores, ``D**-0.5`` by default.
    return_lse : bool
        Also return the logarithm of the sum of exponentiated scores.
    impl : str
        As in :func:`~spattn_tvm.banded_attention`.

    Returns
    -------
    o : Tensor
        ``(B, Hq, Nq, D)`` in the dtype and the dimension order of q; 0 for a query with no key.
    lse : Tensor
        Only with ``return_lse``: ``(B, Hq, Nq)`` float32 (float64 for float64 inputs), natural logarithm,
        -inf for a query with no key.

    Raises
    ------
    TypeError
        Something that is not a tensor or a BandLayout, mixed or unsupported dtypes.
    ValueError
        Shapes, heads or devices that do not fit, more than 16 queries, `block_table` together with `ring`, a
        scale that is not finite, an unknown `impl`, and a layout that is not autoregressive. On a CPU also
        lengths, page numbers and rings that lead out of the cache, and a sequence longer than the layout's
        context length; on CUDA devices they are clamped, so that no memory but the cache's is read.
    RuntimeError
        Where a gradient is asked for.

    Notes
    -----
    What no query of the step attends to may hold anything, NaN included.

    Examples
    --------
    >>> layout = BandLayout.spattention(num_heads=8, context_length=1024)
    >>> q, cache = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 2, 1024, 64)
    >>> banded_attention_decode(q, *cache, layout, cache_lengths=torch.tensor([700, 23])).shape
    torch.Size([2, 8, 1, 64])
    """
    if is_any_autocast_enabled():
        device_type = "cuda" if isinstance(q, Tensor) and q.is_cuda else "cpu"
        if torch.is_autocast_enabled(device_type):
            q, k_cache, v_cache = (with_autocast_dtype(t, device_type) for t in (q, k_cache, v_cache))
    places = (cache_lengths, cache_starts, block_table, ring)
    if scale is not None:
        scale = check_scale(scale)
    if isinstance(layout, BandLayout):
        outputs = decode_again(q, k_cache, v_cache, places, layout.spec, impl, scale)
        if outputs is not None:
            return outputs if return_lse else outputs[0]

    _check_inputs(q, k_cache, v_cache, layout, impl)
    if is_sharded(q, k_cache, v_cache):
        _check_shards(q, k_cache, v_cache, block_table, ring)
        by_row = {"cache_lengths": cache_lengths, "cache_starts": cache_starts, "block_table": block_table}
        shared = {"scale": scale, "return_lse": return_lse, "impl": impl}
        outputs = attend_sharded(
            banded_attention_decode, q, k_cache, v_cache, layout, by_row, shared, can_share_rows=False
        )
        return cast("Tensor | tuple[Tensor, Tensor]", outputs)
    places = CachePlaces(*places)
    check_cache(layout, q, k_cache, v_cache, places)
    if scale is None:
        scale = check_scale(q.shape[3] ** -0.5)
    _check_no_gradient((q, k_cache, v_cache))
    tensors = (q, k_cache, v_cache, *places)
    if is_watched() or not are_plain(tensors):
        o, lse = DECODE(*tensors, layout.spec, scale, impl)
    else:
        o, lse = decode(*tensors, layout.spec, scale, impl)
        if not any(tensor.requires_grad for tensor in tensors if tensor is not None):
            remember_step(q, k_cache, v_cache, places, layout.spec, impl)
    return (o, lse) if return_lse else o
