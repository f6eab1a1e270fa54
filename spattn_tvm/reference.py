"""The oracle: banded attention in a few lines of eager PyTorch, and masks for other implementations.

Everything is computed from the definition, with a dense mask, chunk by chunk over the queries so that memory
stays far below ``N x N`` at usual lengths. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .bands import LIMIT, BandLayout
from .cache_forms import CachePlaces, check_cache, check_cache_values
from .placement import Placement, check_placement, clamp_offset, place_rows

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# 4 Mi scores a chunk: 32 MiB in float64, and still large enough for matrix products to dominate.
_CHUNK_SCORES = 2**22


def document_lengths(
    cu_seqlens: Tensor | Sequence[int] | None, length: int, name: str = "cu_seqlens"
) -> list[int]:
    """Lengths of the packed documents of a sequence of `length`; one document if `cu_seqlens` is None.

    Raises
    ------
    ValueError
        `cu_seqlens` is not one-dimensional, does not start at 0, decreases or ends beyond `length`.
    """
    if cu_seqlens is None:
        return [length]
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must be one-dimensional and int32 or int64, got "
                f"shape {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}"
            )
        offsets = cu_seqlens.tolist()
    else:
        offsets = [int(offset) for offset in cu_seqlens]
    lengths = [end - begin for begin, end in pairwise(offsets)]
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] > length or min(lengths) < 0:
        shown = offsets if len(offsets) <= 8 else [*offsets[:4], "…", *offsets[-3:]]
        raise ValueError(f"{name} must rise from 0 to at most the sequence length {length}, got {shown}")
    return lengths


@dataclass(frozen=True)
class _Packing:
    """Bands and the places of queries and keys as tensors; `row` and what follows are per query.

    ``R`` is 1, or the batch where each batch row has places of its own.
    """

    table: Tensor  # (M, H, 4)
    row: Tensor  # (Nq,) row of `table`
    begin: Tensor  # (R, Nq) first key of the query's document; behind all keys for a query of none
    end: Tensor  # (R, Nq) where those keys end
    shift: Tensor  # (R, Nq) what makes a query's row its position among the keys
    documents: list[tuple[int, int, int, int]]  # (first query, end, first key, end) of each
    host_shift: int | None  # of all queries, where the host knows it
    has_ranges: bool  # do `begin` and `end` say which of the only document's keys exist?

    def allowed(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The definition: may `query` of `head` attend to `key`? Broadcasts its arguments."""
        if len(self.begin) == 1:
            batch = torch.zeros_like(batch)
        distance = query + self.shift[batch, query] - key
        row = self.row[query]
        near = (distance >= self.table[row, head, 0]) & (distance <= self.table[row, head, 1])
        far = (distance >= self.table[row, head, 2]) & (distance <= self.table[row, head, 3])
        return (near | far) & (key >= self.begin[batch, query]) & (key < self.end[batch, query])

    def mask(self, first: int, last: int, first_key: int, last_key: int) -> Tensor:
        """Bool ``(R, H, last - first, last_key - first_key)`` of the queries ``[first, last)``."""
        device = self.row.device
        return self.allowed(
            torch.arange(len(self.begin), device=device)[:, None, None, None],
            torch.arange(self.table.shape[1], device=device)[:, None, None],
            torch.arange(first, last, device=device)[:, None],
            torch.arange(first_key, last_key, device=device),
        )

    def chunks(self, batch_heads: int) -> list[tuple[int, int, int, int]]:
        """Query ranges and the keys that each can see: (first, last, first_key, last_key).

        None reaches over two documents, because a weight of 0 times a NaN is NaN in a matrix product.
        """
        chunks = []
        for begin, end, first_key, end_key in self.documents:
            rows = max(16, _CHUNK_SCORES // max(1, batch_heads * (end_key - first_key)))
            for first in range(begin, end, rows):
                last = min(first + rows, end)
                reach = end_key
                if self.host_shift is not None:
                    reach = max(first_key, min(end_key, last + self.host_shift))
                chunks.append((first, last, first_key, reach))
        return chunks

    def existing(self, keys: Tensor) -> Tensor:
        """Keys or values ``(B, H, Nk, D)`` with zeros for those that don't exist, whatever is there."""
        if not self.has_ranges:
            return keys  # each chunk takes the keys of its document alone
        key = torch.arange(keys.shape[2], device=keys.device)
        outside = (key < self.begin[:, :1]) | (key >= self.end[:, :1])
        return keys.masked_fill(outside[:, None, :, None], 0.0)


def _pack(layout: BandLayout, q: Tensor, k: Tensor, placement: Placement) -> _Packing:
    check_placement(layout, q, k, placement)
    cu_seqlens, cu_seqlens_k, query_offset, kv_lengths, kv_starts = placement
    queries, keys, device = q.shape[2], k.shape[2], q.device
    own_bands = queries == keys and placement.has_own_keys
    lengths = document_lengths(cu_seqlens, queries)
    key_lengths = [keys] if cu_seqlens is None else lengths
    if cu_seqlens_k is not None:
        key_lengths = document_lengths(cu_seqlens_k, keys, "cu_seqlens_k")
        if len(key_lengths) != len(lengths):
            raise ValueError(
                "cu_seqlens_k must have as many documents as cu_seqlens, "
                f"got {len(key_lengths)} and {len(lengths)}"
            )
    if cu_seqlens is not None:
        layout.check_length(max(key_lengths))
    # Elsewhere a query sees the same intervals wherever it stands.
    table = layout.packed_table(lengths) if own_bands or cu_seqlens is not None else layout.table(LIMIT)[None]
    if cu_seqlens_k is not None:
        table = layout.table(LIMIT)[None]
    ends, key_ends = list(accumulate(lengths)), list(accumulate(key_lengths))
    documents = [
        (end - size, end, key_end - key_size, key_end)
        for size, end, key_size, key_end in zip(lengths, ends, key_lengths, key_ends, strict=True)
    ]
    by_row = any(isinstance(given, Tensor) for given in (query_offset, kv_lengths, kv_starts))
    row = torch.zeros(queries, dtype=torch.int64, device=device)
    if cu_seqlens is None:
        ranges = torch.empty((q.shape[0] if by_row else 1, 3), dtype=torch.int64, device=device)
        place_rows(ranges, queries, keys, query_offset, kv_lengths, kv_starts)
        begin, end, shift = (column[:, None].expand(-1, queries) for column in ranges.unbind(1))
        host_shift = None
        if not isinstance(query_offset, Tensor) and (query_offset is not None or kv_lengths is None):
            host_shift = keys - queries if query_offset is None else clamp_offset(query_offset, queries)
    else:
        begin = torch.full((1, queries), keys, dtype=torch.int64, device=device)
        end, shift = begin.clone(), torch.zeros_like(begin)
        for index, (first, last, first_key, last_key) in enumerate(documents):
            row[first:last] = index if len(table) > 1 else 0
            begin[0, first:last], end[0, first:last] = first_key, last_key
            shift[0, first:last] = last_key - last
        host_shift = 0 if cu_seqlens_k is None else None
    bands = torch.tensor(table, dtype=torch.int64, device=device)
    return _Packing(bands, row, begin, end, shift, documents, host_shift, by_row)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, layout: BandLayout) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise TypeError(f"{name} must be in 16 bits or more of floating point, got {tensor.dtype}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k, v must agree in batch and head_dim, and k with v in heads and length, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of kv heads, got {q.shape[1]} and {k.shape[1]}")
    if not isinstance(layout, BandLayout):
        raise TypeError(f"layout must be a BandLayout, got {type(layout).__name__}")
    layout.check_heads(q.shape[1])


def _promoted(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` under a bool mask that broadcasts to the scores; k and v have the heads of q."""
    has_key = mask.any(-1)
    # A query without keys takes no part, and whatever arrives for its results stops at the masked_fill that
    # made them.
    q = q.masked_fill(~has_key[..., None], 0.0)
    scores = (scale * (q @ k.mT)).masked_fill(~mask, -torch.inf)
    # Rows without a key must not produce -inf - -inf, neither here nor in the gradient. The maximum cancels
    # out of both results, so no gradient flows through it.
    row_max = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - row_max.masked_fill(~has_key[..., None], 0.0))
    row_sum = weights.sum(-1).masked_fill(~has_key, 1.0)
    lse = (row_max.squeeze(-1) + row_sum.log()).masked_fill(~has_key, -torch.inf)
    o = (weights @ v) / row_sum[..., None]
    return o.masked_fill(~has_key[..., None], 0.0), lse


def reference_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
    layout: BandLayout,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference_attention` written out, for places where autograd does not record.

    ``dS = P * (dP - (rowsum(do * o) - dlse))`` with ``P = exp(S - lse)`` and ``dP = do v^T``.

    Parameters
    ----------
    q, k, v, layout, scale, cu_seqlens, cu_seqlens_k, query_offset, kv_lengths, kv_starts
        As in `reference_attention`.
    o, do : Tensor
        ``(B, Hq, Nq, D)`` output and its gradient.
    lse, dlse : Tensor
        ``(B, Hq, Nq)`` and its gradient; None is zero.

    Returns
    -------
    dq, dk, dv : Tensor
        In the shapes of q, k, v, in the dtype of q promoted to at least float32.
    """
    _check_inputs(q, k, v, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    placement = Placement(cu_seqlens, cu_seqlens_k, query_offset, kv_lengths, kv_starts)
    packing = _pack(layout, q, k, placement)
    group = q.shape[1] // k.shape[1]
    q, k, v, o, lse, do = (_promoted(tensor) for tensor in (q, k, v, o, lse, do))
    k, v = (packing.existing(tensor).repeat_interleave(group, 1) for tensor in (k, v))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first, last, first_key, last_key in packing.chunks(q.shape[0] * q.shape[1]):
        rows, keys = slice(first, last), slice(first_key, last_key)
        mask = packing.mask(first, last, first_key, last_key)
        keyless = ~mask.any(-1)
        q_rows, do_rows = (tensor[:, :, rows].masked_fill(keyless[..., None], 0.0) for tensor in (q, do))
        scores = scale * (q_rows @ k[:, :, keys].mT)
        weights = torch.exp(scores - lse[:, :, rows, None]).masked_fill(~mask, 0.0)
        delta = (do_rows * o[:, :, rows]).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, :, rows, None].to(delta.dtype)
        dscores = weights * (do_rows @ v[:, :, keys].mT - delta)
        dscores = scale * dscores.masked_fill(~mask, 0.0)
        dq[:, :, rows] = (dscores @ k[:, :, keys]).masked_fill(keyless[..., None], 0.0)
        dk[:, :, keys] += dscores.mT @ q_rows
        dv[:, :, keys] += weights.mT @ do_rows
    return dq, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)


def _pack_shapes(
    layout: BandLayout, length: int, device: torch.device, placement: Placement, kv_length: int | None
) -> _Packing:
    batch = next((len(value) for value in placement[2:] if isinstance(value, Tensor) and value.dim()), 1)
    q, k = (
        torch.empty((batch, 1, rows, 0), device=device)
        for rows in (length, length if kv_length is None else kv_length)
    )
    return _pack(layout, q, k, placement)


def attention_mask(
    layout: BandLayout,
    length: int,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    kv_length: int | None = None,
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
) -> Tensor:
    """The dense mask of a layout, True where query i (row) attends to key j (column).

    Parameters
    ----------
    layout : BandLayout
    length : int
        Nq, the number of queries.
    cu_seqlens, cu_seqlens_k, query_offset, kv_lengths, kv_starts
        As in `reference_attention`.
    device : torch.device or str
    kv_length : int, optional
        Nk, the number of keys; Nq by default.

    Returns
    -------
    Tensor
        Bool ``(H, Nq, Nk)``; ``(B, H, Nq, Nk)`` where a tensor ``(B,)`` places queries or keys.
    """
    placement = Placement(cu_seqlens, cu_seqlens_k, query_offset, kv_lengths, kv_starts)
    packing = _pack_shapes(layout, length, torch.device(device), placement, kv_length)
    mask = packing.mask(0, length, 0, length if kv_length is None else kv_length)
    return mask if packing.has_ranges else mask[0]


def flex_mask_mod(
    layout: BandLayout,
    length: int,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    kv_length: int | None = None,
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
) -> MaskMod:
    """The same mask as a ``mask_mod(b, h, q_idx, kv_idx)`` for ``create_block_mask`` of FlexAttention.

    Parameters
    ----------
    layout, length, cu_seqlens, kv_length, cu_seqlens_k, query_offset, kv_lengths, kv_starts
        As in `attention_mask`.
    device : torch.device or str
        Where the attention runs: the mask reads the layout's table there.
    """
    placement = Placement(cu_seqlens, cu_seqlens_k, query_offset, kv_lengths, kv_starts)
    packing = _pack_shapes(layout, length, torch.device(device), placement, kv_length)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return packing.allowed(b, h, q_idx, kv_idx)

    return mask_mod


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BandLayout,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Banded attention by definition; differentiable, any strides, any device.

    Parameters
    ----------
    q : Tensor
        ``(B, Hq, Nq, D)``, floating point.
    k, v : Tensor
        ``(B, Hkv, Nk, D)`` in the dtype of q; query head h reads key/value head ``h // (Hq // Hkv)``.
    layout : BandLayout
        Bands of the ``Hq`` query heads.
    scale : float, optional
        Factor of the scores, ``D**-0.5`` by default.
    cu_seqlens : Tensor or sequence of int, optional
        Rising boundaries of packed documents, from 0 to at most Nq, the same for each batch row. Documents
        never attend to one another; with a layout without context length each document has the bands of its
        own length. Rows behind the last boundary belong to no document: they have and are no key.
    cu_seqlens_k : Tensor or sequence of int, optional
        With `cu_seqlens`: boundaries of the documents' keys, from 0 to at most Nk; `cu_seqlens` by default.
        The queries of a document are its last ones.
    query_offset : int or Tensor, optional
        What makes a query's row its position among the keys; an integer tensor ``(B,)`` for each batch row.
        By default the queries are the last ones: ``Nk - Nq``, or ``kv_lengths - Nq``.
    kv_lengths, kv_starts : Tensor, optional
        Integers ``(B,)``, clamped to ``[0, Nk]``: of a batch row's keys those from ``kv_starts[b]`` to below
        ``kv_lengths[b]`` exist, all by default. The others are never used, not even where they are NaN.

    Returns
    -------
    o : Tensor
        ``(B, Hq, Nq, D)``; 0 for a query with no key.
    lse : Tensor
        ``(B, Hq, Nq)`` natural logarithm of the sum of exponentiated scores; -inf for a query with no key.

    Both are computed and returned in the dtype of q promoted to at least float32.

    Notes
    -----
    A NaN or an infinity stays within its own document, batch row and head (in k or v: the query heads that
    read it); inside a document it may reach other rows. A query row that is NaN has o and lse of NaN. What
    arrives for o and lse of a query without keys is ignored, NaN included.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes, heads or places of queries and keys that do not fit, a sequence longer than the
        layout's context, and a layout that is not autoregressive where Nq and Nk differ or one of the four
        last arguments is given.
    """
    _check_inputs(q, k, v, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    placement = Placement(cu_seqlens, cu_seqlens_k, query_offset, kv_lengths, kv_starts)
    packing = _pack(layout, q, k, placement)
    group = q.shape[1] // k.shape[1]
    q, k, v = _promoted(q), _promoted(k), _promoted(v)
    k, v = (packing.existing(tensor).repeat_interleave(group, 1) for tensor in (k, v))
    chunks = packing.chunks(q.shape[0] * q.shape[1])
    # Keeping each chunk's scores for the backward would be N x N again.
    scores = q.shape[0] * q.shape[1] * sum((last - first) * (end - key) for first, last, key, end in chunks)
    recompute = scores > _CHUNK_SCORES and torch.is_grad_enabled()
    outputs, sums = [], []
    for first, last, first_key, last_key in chunks:
        if first_key == last_key:
            outputs.append(torch.zeros_like(q[:, :, first:last]))
            sums.append(q.new_full((*q.shape[:2], last - first), -torch.inf))
            continue
        mask = packing.mask(first, last, first_key, last_key)
        keys, values = k[:, :, first_key:last_key], v[:, :, first_key:last_key]
        inputs = (q[:, :, first:last], keys, values, mask, scale)
        if recompute:
            o, lse = checkpoint(attend_masked, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            o, lse = attend_masked(*inputs)
        outputs.append(o)
        sums.append(lse)
    # Rows of no document. A sum over nothing keeps q, k and v in the graph where there is no other.
    nothing = q[:, :, :0].sum() + k[:, :, :0].sum() + v[:, :, :0].sum()
    covered = packing.documents[-1][1]
    outputs.append(torch.zeros_like(q[:, :, covered:]) + nothing)
    sums.append(q.new_full((*q.shape[:2], q.shape[2] - covered), -torch.inf) + nothing)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _span_of_rings(layout: BandLayout, queries: int, rows: int, ends: Tensor) -> int:
    """How many of the last positions rings may have to hold keys of; `rows` are those of all rings."""
    bands = [band for head in layout.bands(LIMIT) for band in head]
    if any(high - low + queries > rows for low, high in bands):
        return rows  # only sequences that end before can be meant
    span = max([rows, *(high + queries for _, high in bands)])
    return min(span, max([rows, *ends.tolist()])) if ends.is_cpu else span


def reference_decode(
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
) -> tuple[Tensor, Tensor]:
    """A step of decoding by definition: each batch row's keys are gathered from the cache, then masked.

    Parameters
    ----------
    q : Tensor
        ``(B, Hq, Nq, D)``, floating point, 1 to 16 queries.
    k_cache, v_cache : Tensor
        In the dtype of q: ``(B, Hkv, S, D)``, pages ``(pages, Hkv, page_size, D)`` or rings ``(B, R, D)``.
    layout : BandLayout
        Bands of the ``Hq`` query heads.
    cache_lengths, cache_starts, block_table, ring
        As in ``banded_attention_decode``.
    scale : float, optional
        Factor of the scores, ``D**-0.5`` by default.

    Returns
    -------
    o : Tensor
        ``(B, Hq, Nq, D)``; 0 for a query with no key.
    lse : Tensor
        ``(B, Hq, Nq)``; -inf for a query with no key.

    Both are computed and returned in the dtype of q promoted to at least float32.

    Raises
    ------
    ValueError, TypeError
        As ``banded_attention_decode`` does.
    """
    places = CachePlaces(cache_lengths, cache_starts, block_table, ring)
    check_cache(layout, q, k_cache, v_cache, places)
    if q.is_cpu:
        check_cache_values(layout, q, k_cache, places)
    batch, heads, queries, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    q, device, capacity = _promoted(q), q.device, places.capacity(k_cache)
    ends = cache_lengths.clamp(0, capacity).long()
    begins = torch.zeros_like(ends) if cache_starts is None else cache_starts.clamp(0, capacity).long()
    low, high = (
        torch.tensor(layout.table(LIMIT), dtype=torch.int64, device=device).view(heads, 1, 2, 2).unbind(3)
    )
    kv_heads = places.kv_heads(k_cache)
    rows = capacity if ring is None else _span_of_rings(layout, queries, k_cache.shape[1], ends)
    head = torch.arange(kv_heads, device=device)[:, None]
    outputs, sums = [], []
    for row in range(batch):
        position = torch.arange(rows, device=device)
        if ring is not None:
            position = position + (ends[row] - rows).clamp_min(0)
        if block_table is not None:
            pages, page_size = k_cache.shape[0], k_cache.shape[2]
            page = block_table[row, position // page_size].long().clamp(0, pages - 1)
            k, v = (cache[page, head, position % page_size] for cache in (k_cache, v_cache))
        elif ring is not None:
            base, size = ring.long().unbind(1)
            place = (base[:, None] + position % size[:, None].clamp_min(1)).clamp(0, k_cache.shape[1] - 1)
            k, v = k_cache[row][place], v_cache[row][place]
        else:
            k, v = k_cache[row], v_cache[row]
        query = ends[row] - queries + torch.arange(queries, device=device)
        distance = (query[:, None] - position)[:, None]
        mask = ((distance >= low[:, :, :, None]) & (distance <= high[:, :, :, None])).any(2)
        mask &= (position >= begins[row]) & (position < ends[row])
        # What no query of the step reads may hold anything.
        used = mask.view(kv_heads, -1, rows).any(1)[..., None]
        k, v = (
            _promoted(rows_of).masked_fill(~used, 0.0).repeat_interleave(heads // kv_heads, 0)
            for rows_of in (k, v)
        )
        o, lse = attend_masked(q[row], k, v, mask, scale)
        outputs.append(o)
        sums.append(lse)
    if not outputs:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3])
    return torch.stack(outputs), torch.stack(sums)
