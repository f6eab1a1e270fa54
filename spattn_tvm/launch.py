"""Around a kernel call: inputs that it can read, outputs, scratch and scalars, as the ABI of its family says.

The ABI is data (:mod:`spattn_tvm.families.family`); nothing here knows a family or a direction by name, but
that :func:`ready_forward` serves those that are called again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .families.family import Abi, Output, Scratch, Sizes
from .lasting import make_lasting
from .torch_private import current_device, current_stream, empty_on_cpu, empty_on_cuda, is_capturing

if TYPE_CHECKING:
    from .dispatch import Kernel

# (q, k, v, scale) -> (o, lse)
Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class Domain(NamedTuple):
    """Which keys the queries of a call attend to, as kernels take it: contiguous int32 tensors.

    Parameters
    ----------
    bands : Tensor
        ``(M, Hq, 4)``.
    cu_seqlens, cu_seqlens_k : Tensor
        ``(documents + 1,)``: boundaries of the documents' queries and of their keys, the same tensor where
        queries and keys are the same rows. The queries of a document are its last rows.
    key_ranges : Tensor
        ``(R, 3)``: where the keys begin and end, and what makes a query's row its position among them, for
        each batch row (R = B) or for all (R = 1), in place of what the boundaries say. R = 0: those hold.
    """

    bands: Tensor
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    key_ranges: Tensor

    @classmethod
    def of_same_rows(cls, bands: Tensor, cu_seqlens: Tensor) -> Domain:
        """Of a call with as many queries as keys."""
        return cls(bands, cu_seqlens, cu_seqlens, bands.new_empty((0, 3)))


class CacheDomain(NamedTuple):
    """Where the keys of a decoding call lie in its cache, as kernels take it: contiguous int32 tensors on the
    device, whose values no kernel trusts.

    Query row r of batch row b has the position ``cache_lengths[b] - Nq + r``. Position p of key/value head g
    is a row of k and v: ``k[b, g, p]``; of a paged cache ``k[block_table[b, p // page_size], g, p %
    page_size]``; of a ring ``k[b, 0, base + p % capacity]`` with ``(base, capacity) = ring[g]``.

    Kernels clamp: a start to at least 0, a length to what a contiguous or paged cache holds, for a ring to
    ``bands.LIMIT``, a page number to the pages that exist, a ring's capacity to at least 1, and the row that
    follows from it to those that exist.

    Parameters
    ----------
    bands : Tensor
        ``(1, Hq, 4)``.
    cache_lengths, cache_starts : Tensor
        ``(B,)``: where the keys of a batch row end and begin.
    block_table : Tensor
        ``(B, M)``; M = 0 where k and v are not pages.
    ring : Tensor
        ``(Hkv, 2)``; ``(0, 2)`` where k and v are no rings.
    """

    bands: Tensor
    cache_lengths: Tensor
    cache_starts: Tensor
    block_table: Tensor
    ring: Tensor


# What a caller of each direction has beside the domain, in the order in which families take it.
_FORWARD_TENSORS = ("q", "k", "v")
_BACKWARD_TENSORS = ("q", "k", "v", "o", "lse", "do", "dlse")


@cache
def _domain_of(abi: Abi, tensors: tuple[str, ...]) -> tuple[int, ...] | None:
    """Which parts of a domain a function takes behind these tensors; None if it takes other things."""
    rest = abi.inputs[len(tensors) :]
    if abi.inputs[: len(tensors)] != tensors or not set(rest) <= set(Domain._fields):
        return None
    return tuple(Domain._fields.index(name) for name in rest)


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _workers(index: int) -> int:
    return torch.get_num_threads() if index < 0 else _multiprocessors(index)


# Elements. A TMA descriptor takes strides below 2**40 bytes; only a dimension of size 1 can have larger ones.
_TOO_LARGE_STRIDE = 2**37


# --- inputs ----------------------------------------------------------------------------------------------


def _has_aligned_strides(tensor: Tensor, alignment: int) -> bool:
    """Whether rows are contiguous and every stride, also of a dimension of size 1, is a multiple and not
    larger than a TMA descriptor takes.
    """
    step = alignment // tensor.element_size() or 1
    b, h, n, d = tensor.stride()
    return d == 1 and not (b % step or h % step or n % step) and max(b, h, n) < _TOO_LARGE_STRIDE


def _with_aligned_strides(tensor: Tensor, alignment: int) -> Tensor:
    """The tensor with harmless strides of its dimensions of size 1, which say nothing: to PyTorch it is
    contiguous whatever they are, to a TMA descriptor they are strides."""
    if _has_aligned_strides(tensor, alignment):
        return tensor
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.as_strided(tensor.shape, [alignment if size == 1 else stride for size, stride in pairs])


def _is_aligned(tensor: Tensor, alignment: int) -> bool:
    return tensor.data_ptr() % alignment == 0 and _has_aligned_strides(tensor, alignment)


def _readable(tensor: Tensor, alignment: int) -> Tensor:
    """A tensor with contiguous rows as a kernel can read it: itself, a view of it, or a contiguous copy."""
    if alignment == 1 or _is_aligned(tensor, alignment):
        return tensor
    view = _with_aligned_strides(tensor, alignment)
    return view if _is_aligned(view, alignment) else tensor.clone(memory_format=torch.contiguous_format)


def _sign_for_queries(scale: float) -> tuple[float, float]:
    """A sign for the queries and a positive factor that together give the same scores."""
    if scale > 0:
        return 1.0, scale
    return (-1.0 if scale < 0 else 0.0), abs(scale) or 1.0


# --- outputs and scratch ---------------------------------------------------------------------------------


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for position in range(len(shape) - 1, 0, -1):
        strides[position - 1] = strides[position] * shape[position]
    return tuple(strides)


# Shape, strides and dtype of a tensor to allocate.
_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _layout(shape: tuple[int, ...], dtype: str) -> _Layout:
    return shape, _contiguous_strides(shape), getattr(torch, dtype)


@lru_cache(maxsize=1024)
def _layouts(
    abi: Abi, q_shape: torch.Size, k_shape: torch.Size, kv_heads: int, workers: int
) -> tuple[tuple[_Layout | None, ...], tuple[_Layout, ...]]:
    """Of the outputs that a kernel does not write in the shape of an input, and of the scratch."""
    batch, query_heads, queries, head_dim = q_shape
    sizes = Sizes(batch, query_heads, kv_heads, queries, k_shape[2], head_dim, workers)
    outputs = (
        None if output.like and not output.per_query_head else _layout(*output.written(sizes))
        for output in abi.outputs
    )
    return tuple(outputs), tuple(_layout(item.shape(sizes), item.dtype) for item in abi.scratch)


def _filled_on_cpu(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


def _filled_on_cuda(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


def _allocator(index: int) -> Callable[..., Tensor]:
    """Allocates a layout on the current device. The quick ways leave out what
    ``torch.use_deterministic_algorithms`` fills."""
    if torch.are_deterministic_algorithms_enabled():
        return _filled_on_cpu if index < 0 else _filled_on_cuda
    return empty_on_cpu if index < 0 else empty_on_cuda


@cache
def _kept_on_stream(abi: Abi, item: Scratch, layout: _Layout, index: int, stream: int) -> Tensor:
    shape, _, dtype = layout
    device = torch.device("cpu") if index < 0 else torch.device("cuda", index)
    return make_lasting(device, lambda: torch.zeros(shape, dtype=dtype, device=device))


def _kept(abi: Abi, item: Scratch, layout: _Layout, index: int) -> Tensor:
    """The stream's own. A captured graph may be replayed beside that stream's calls, so it gets its own,
    cleared by each replay.
    """
    if index < 0:
        return _kept_on_stream(abi, item, layout, index, 0)
    if is_capturing():
        return torch.zeros(layout[0], dtype=layout[2], device=f"cuda:{index}")
    return _kept_on_stream(abi, item, layout, index, current_stream(index))


def _scratch(
    kept: Sequence[Tensor | None], layouts: Sequence[_Layout], empty: Callable[..., Tensor]
) -> list[Tensor]:
    """Scratch for a call: what is kept, and else new."""
    return [empty(*layout) if zeros is None else zeros for zeros, layout in zip(kept, layouts, strict=True)]


def like(result: Tensor, model: Tensor) -> Tensor:
    """The result in the dtype and the strides of ``torch.empty_like(model)``; itself if it has them."""
    if result.dtype == model.dtype and model.is_contiguous() and result.stride() == model.stride():
        return result
    return torch.empty_like(model).copy_(result)


def finished(output: Output, written: Tensor, model: Tensor) -> Tensor:
    """What the caller gets of an output from what the kernel wrote.

    Parameters
    ----------
    output : Output
    written : Tensor
    model : Tensor
        The input that the output is like.
    """
    if not output.per_query_head:
        return written
    batch, heads, *rows = model.shape
    if written.shape[1] != heads:
        written = written.view(batch, heads, written.shape[1] // heads, *rows).sum(2)
    return like(written, model)


# --- calls -----------------------------------------------------------------------------------------------


def launch(kernel: Kernel, given: Mapping[str, Tensor], scale: float) -> tuple[Tensor, ...]:
    """Run a kernel of any direction.

    Parameters
    ----------
    kernel : Kernel
        From ``dispatch.find_kernel``.
    given : mapping of str to Tensor
        The inputs that its ABI names, of one device. What has four dimensions may have any strides.
    scale : float
        Factor of the scores.

    Returns
    -------
    tuple of Tensor
        The ABI's outputs in their order. One that is like an input has its dtype and the strides of
        ``torch.empty_like`` of it; where its rows are not contiguous, of a contiguous copy.
    """
    return tuple(_launch(kernel, [given[name] for name in kernel.abi.inputs], scale))


def _launch(kernel: Kernel, inputs: list[Tensor], scale: float) -> list[Tensor]:
    """`launch` with the inputs in the ABI's order."""
    index = inputs[0].get_device()
    if index >= 0 and index != current_device():
        # A compiled host function makes its tensors' device the current one and leaves it so.
        with torch.cuda.device(index):
            return _launch(kernel, inputs, scale)
    abi, workers, sign = kernel.abi, _workers(index), 1.0
    for position, tensor in enumerate(inputs):
        if not tensor.is_contiguous() and (tensor.ndim != 4 or tensor.stride(3) != 1):
            inputs[position] = tensor.contiguous()
    q, k = abi.positions
    k_shape = inputs[k].shape
    kv_heads = k_shape[1] if abi.ring is None else len(inputs[abi.ring]) or k_shape[1]
    layouts, scratch_layouts = _layouts(abi, inputs[q].shape, k_shape, kv_heads, workers)
    allocate = _allocator(index)
    outputs, unfinished = [], []
    for position, layout in zip(abi.models, layouts, strict=False):
        if layout is None:
            outputs.append(torch.empty_like(inputs[position]))
            continue
        if position >= 0:
            model = inputs[position]
            if model.dtype is layout[2] and model.shape == layout[0] and model.is_contiguous():
                outputs.append(torch.empty_like(model))
                continue
            unfinished.append(len(outputs))
        outputs.append(allocate(*layout))
    scratch = [
        _kept(abi, item, layout, index) if item.kept else allocate(*layout)
        for item, layout in zip(abi.scratch, scratch_layouts, strict=False)
    ]
    readable, writable = inputs, outputs
    if abi.positive_scale and scale <= 0:
        sign, scale = _sign_for_queries(scale)
        readable = [*inputs[:q], inputs[q] * sign, *inputs[q + 1 :]]
    alignment = abi.alignment
    if alignment > 1:
        readable = [t if t.ndim != 4 else _readable(t, alignment) for t in readable]
        writable = [t if t.ndim != 4 else _with_aligned_strides(t, alignment) for t in outputs]
    kernel.function(*readable, *writable, *scratch, scale, workers)
    for place in unfinished:
        outputs[place] = finished(abi.outputs[place], outputs[place], inputs[abi.models[place]])
    if sign != 1:
        for place, output in enumerate(abi.outputs):
            if output.has_sign:
                outputs[place].mul_(sign)
    return outputs


def _launch_on(
    kernel: Kernel, names: tuple[str, ...], tensors: list[Tensor], domain: Domain, scale: float
) -> Sequence[Tensor]:
    parts = _domain_of(kernel.abi, names)
    if parts is not None:
        return _launch(kernel, [*tensors, *[domain[part] for part in parts]], scale)
    return launch(kernel, {**dict(zip(names, tensors, strict=True)), **domain._asdict()}, scale)


def launch_forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, domain: Domain, scale: float
) -> tuple[Tensor, Tensor]:
    """Run a forward kernel.

    Parameters
    ----------
    kernel : Kernel
        From ``dispatch.find_kernel("forward", …)``.
    q : Tensor
        ``(B, Hq, Nq, D)``.
    k, v : Tensor
        ``(B, Hkv, Nk, D)`` in q's dtype and on its device.
    domain : Domain
    scale : float
        Factor of the scores.

    Returns
    -------
    o : Tensor
        ``torch.empty_like(q)``, filled; of ``q.contiguous()`` when q's last dimension is not contiguous.
    lse : Tensor
        ``(B, Hq, Nq)`` float32, contiguous.
    """
    o, lse = _launch_on(kernel, _FORWARD_TENSORS, [q, k, v], domain, scale)
    return o, lse


_DECODE_INPUTS = (*_FORWARD_TENSORS, *CacheDomain._fields)
# (q, k, v, cache_lengths, cache_starts, block_table, ring, scale) -> (o, lse)
Decode = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def launch_decode(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, domain: CacheDomain, scale: float
) -> tuple[Tensor, Tensor]:
    """Run a decode kernel.

    Parameters
    ----------
    kernel : Kernel
        From ``dispatch.find_kernel("decode", …)``.
    q : Tensor
        ``(B, Hq, Nq, D)``.
    k, v : Tensor
        ``(B, Hkv, S, D)``, pages ``(pages, Hkv, page_size, D)`` or rings ``(B, 1, R, D)``.
    domain : CacheDomain
    scale : float
        Factor of the scores.

    Returns
    -------
    o : Tensor
        ``torch.empty_like(q)``, filled; of ``q.contiguous()`` when q's last dimension is not contiguous.
    lse : Tensor
        ``(B, Hq, Nq)`` float32, contiguous.
    """
    if kernel.abi.inputs == _DECODE_INPUTS:
        o, lse = _launch(kernel, [q, k, v, *domain], scale)
    else:
        o, lse = launch(kernel, {"q": q, "k": k, "v": v, **domain._asdict()}, scale)
    return o, lse


def ready_decode(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, domain: CacheDomain) -> Decode | None:
    """`launch_decode` for many calls on tensors like these: what they have in common is settled once.

    Not while a CUDA graph is captured, whose memory is its own; what it returns may be called then.

    Parameters
    ----------
    kernel, q, k, v, domain
        As in :func:`launch_decode`.

    Returns
    -------
    callable
        Takes q, k, v and what says where the keys lie, of these shapes, strides, dtypes and device, on the
        stream that is current now, and the factor of the scores; returns o and lse. None where no call can
        be launched with less ado.
    """
    function, abi, index = kernel.function, kernel.abi, q.get_device()
    alignment, bands, o_like = abi.alignment, domain.bands, torch.empty_like(q)
    if (
        abi.inputs != _DECODE_INPUTS
        or abi.results != ("o", "lse")
        or [output.like for output in abi.outputs] != ["q", ""]
        or abi.positive_scale
        or not all(_has_aligned_strides(tensor, alignment) for tensor in (q, k, v, o_like))
        or not all(tensor.is_contiguous() for tensor in domain)
    ):
        return None
    workers = _workers(index)
    kv_heads = len(domain.ring) or k.shape[1]
    layouts, scratch_layouts = _layouts(abi, q.shape, k.shape, kv_heads, workers)
    assert layouts[1] is not None
    o_layout, lse_layout = (tuple(q.shape), o_like.stride(), q.dtype), layouts[1]
    pairs = tuple(zip(abi.scratch, scratch_layouts, strict=True))
    empty = empty_on_cpu if index < 0 else empty_on_cuda
    may_capture = any(item.kept for item in abi.scratch) and index >= 0 and current_stream(index) != 0
    kept = [_kept(abi, item, layout, index) if item.kept else None for item, layout in pairs]

    def launch_again(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache_lengths: Tensor,
        cache_starts: Tensor,
        block_table: Tensor,
        ring: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        if (
            (index >= 0 and (index != current_device() or (may_capture and is_capturing())))
            or (index < 0 and workers != torch.get_num_threads())
            or (alignment > 1 and (q.data_ptr() | k.data_ptr() | v.data_ptr()) % alignment)
        ):
            places = CacheDomain(bands, cache_lengths, cache_starts, block_table, ring)
            return launch_decode(kernel, q, k, v, places, scale)
        o, lse = empty(*o_layout), empty(*lse_layout)
        scratch = _scratch(kept, scratch_layouts, empty)
        function(
            q, k, v, bands, cache_lengths, cache_starts, block_table, ring, o, lse, *scratch, scale, workers
        )
        return o, lse

    return launch_again


def ready_forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, domain: Domain) -> Forward:
    """`launch_forward` for many calls on tensors like these: what they have in common is settled once.

    Not while a CUDA graph is captured, whose memory is its own; what it returns may be called then.

    Parameters
    ----------
    kernel, q, k, v, domain
        As in :func:`launch_forward`.

    Returns
    -------
    callable
        Takes q, k and v of these shapes, strides, dtypes and device, on the stream that is current now, and
        the factor of the scores; returns o and lse.
    """
    function, abi, index = kernel.function, kernel.abi, q.get_device()
    alignment = abi.alignment

    def launch_with_copies(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return launch_forward(kernel, q, k, v, domain, scale)

    parts = _domain_of(abi, _FORWARD_TENSORS)
    o_like = torch.empty_like(q)
    is_usual = (
        abi.results == ("o", "lse")
        and [output.like for output in abi.outputs] == ["q", ""]
        and abi.writes_results
        and all(_has_aligned_strides(tensor, alignment) for tensor in (q, k, v, o_like))
    )
    if not is_usual or parts is None:
        return launch_with_copies
    tables = tuple(domain[part] for part in parts)
    workers = _workers(index)
    layouts, scratch_layouts = _layouts(abi, q.shape, k.shape, k.shape[1], workers)
    o_shape, o_strides, dtype = tuple(q.shape), o_like.stride(), q.dtype
    assert layouts[1] is not None
    lse_shape, lse_strides, lse_dtype = layouts[1]
    pairs = zip(abi.scratch, scratch_layouts, strict=True)
    kept = tuple(_kept(abi, item, layout, index) if item.kept else None for item, layout in pairs)
    is_kept = all(item.kept for item in abi.scratch)
    any_scale = not abi.positive_scale
    any_call = any_scale and alignment == 1

    def launch_on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if not any_call and (
            not (any_scale or scale > 0) or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % alignment
        ):
            return launch_with_copies(q, k, v, scale)
        o = empty_on_cpu(o_shape, o_strides, dtype)
        lse = empty_on_cpu(lse_shape, lse_strides, lse_dtype)
        scratch = kept if is_kept else _scratch(kept, scratch_layouts, empty_on_cpu)
        function(q, k, v, *tables, o, lse, *scratch, scale, torch.get_num_threads())
        return o, lse

    if index < 0:
        return launch_on_cpu
    # CUDA captures no graph on its default stream.
    may_capture = any(item.kept for item in abi.scratch) and current_stream(index) != 0

    def launch_on_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if (
            index != current_device()
            or not (any_scale or scale > 0)
            or (may_capture and is_capturing())
            or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % alignment
        ):
            return launch_with_copies(q, k, v, scale)
        o = empty_on_cuda(o_shape, o_strides, dtype)
        lse = empty_on_cuda(lse_shape, lse_strides, lse_dtype)
        scratch = kept if is_kept else _scratch(kept, scratch_layouts, empty_on_cuda)
        function(q, k, v, *tables, o, lse, *scratch, scale, workers)
        return o, lse

    return launch_on_cuda


def launch_backward(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    domain: Domain,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a backward kernel.

    Parameters
    ----------
    kernel : Kernel
        From ``dispatch.find_kernel("backward", …)``.
    q, k, v, domain, scale
        As in :func:`launch_forward`.
    o, do : Tensor
        ``(B, Hq, Nq, D)``: the forward's output and the gradient with respect to it.
    lse, dlse : Tensor
        ``(B, Hq, Nq)`` float32: the forward's log-sum-exp and the gradient with respect to it.

    Returns
    -------
    dq, dk, dv : Tensor
        Each like ``torch.empty_like`` of q, k and v, in their dtype.
    """
    dq, dk, dv = _launch_on(kernel, _BACKWARD_TENSORS, [q, k, v, o, lse, do, dlse], domain, scale)
    return dq, dk, dv
