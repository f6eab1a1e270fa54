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

from .bands import BandLayout

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# 4 Mi scores a chunk: 32 MiB in float64, and still large enough for matrix products to dominate.
_CHUNK_SCORES = 2**22


def document_lengths(cu_seqlens: Tensor | Sequence[int] | None, length: int) -> list[int]:
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
                "cu_seqlens must be one-dimensional and int32 or int64, "
                f"got shape {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}"
            )
        offsets = cu_seqlens.tolist()
    else:
        offsets = [int(offset) for offset in cu_seqlens]
    lengths = [end - begin for begin, end in pairwise(offsets)]
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] > length or min(lengths) < 0:
        shown = offsets if len(offsets) <= 8 else [*offsets[:4], "…", *offsets[-3:]]
        raise ValueError(f"cu_seqlens must rise from 0 to at most the sequence length {length}, got {shown}")
    return lengths


@dataclass(frozen=True)
class _Packing:
    """Bands and document boundaries as tensors; `row` and `begin` are per position."""

    table: Tensor  # (M, H, 4)
    row: Tensor  # (N,) row of `table`
    begin: Tensor  # (N,) first token of the position's document; N for a position of none
    documents: list[tuple[int, int]]  # (first token, end) of each

    def allowed(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The definition: may `query` of `head` attend to `key`? Broadcasts its arguments."""
        distance = query - key
        row = self.row[query]
        near = (distance >= self.table[row, head, 0]) & (distance <= self.table[row, head, 1])
        far = (distance >= self.table[row, head, 2]) & (distance <= self.table[row, head, 3])
        return (near | far) & (key >= self.begin[query])

    def mask(self, first: int, last: int, first_key: int) -> Tensor:
        """Bool ``(H, last - first, last - first_key)`` of the queries ``[first, last)``."""
        device = self.row.device
        return self.allowed(
            torch.arange(self.table.shape[1], device=device)[:, None, None],
            torch.arange(first, last, device=device)[None, :, None],
            torch.arange(first_key, last, device=device)[None, None, :],
        )

    def chunks(self, batch_heads: int) -> list[tuple[int, int, int]]:
        """Query ranges and the first key that each can see: (first, last, first_key).

        None reaches over two documents, because a weight of 0 times a NaN is NaN in a matrix product.
        """
        chunks = []
        for begin, end in self.documents:
            rows = max(16, _CHUNK_SCORES // max(1, batch_heads * (end - begin)))
            chunks += [(first, min(first + rows, end), begin) for first in range(begin, end, rows)]
        return chunks


def _pack(
    layout: BandLayout, length: int, cu_seqlens: Tensor | Sequence[int] | None, device: torch.device
) -> _Packing:
    lengths = document_lengths(cu_seqlens, length)
    layout.check_length(max(lengths))
    table = torch.tensor(layout.packed_table(lengths), dtype=torch.int64, device=device)
    ends = list(accumulate(lengths))
    documents = [(end - size, end) for size, end in zip(lengths, ends, strict=True)]
    row = torch.zeros(length, dtype=torch.int64, device=device)
    begin = torch.full_like(row, length)
    for index, (first, end) in enumerate(documents):
        row[first:end] = index if len(table) > 1 else 0
        begin[first:end] = first
    return _Packing(table, row, begin, documents)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, layout: BandLayout) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            "q, k, v must agree in batch, length and head_dim, and k with v in heads, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of kv heads, got {q.shape[1]} and {k.shape[1]}")
    layout.check_heads(q.shape[1])


def _promoted(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference_attention` written out, for places where autograd does not record.

    ``dS = P * (dP - (rowsum(do * o) - dlse))`` with ``P = exp(S - lse)`` and ``dP = do v^T``.

    Parameters
    ----------
    q, k, v, layout, scale, cu_seqlens
        As in `reference_attention`.
    o, do : Tensor
        ``(B, Hq, N, D)`` output and its gradient.
    lse, dlse : Tensor
        ``(B, Hq, N)`` and its gradient; None is zero.

    Returns
    -------
    dq, dk, dv : Tensor
        In the shapes of q, k, v, in the dtype of q promoted to at least float32.
    """
    _check_inputs(q, k, v, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    packing = _pack(layout, q.shape[2], cu_seqlens, q.device)
    group = q.shape[1] // k.shape[1]
    q, k, v, o, lse, do = (_promoted(tensor) for tensor in (q, k, v, o, lse, do))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first, last, first_key in packing.chunks(q.shape[0] * q.shape[1]):
        rows, keys = slice(first, last), slice(first_key, last)
        mask = packing.mask(first, last, first_key)
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


def attention_mask(
    layout: BandLayout,
    length: int,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The dense mask of a layout: bool ``(H, N, N)``, True where query i (row) attends to key j (column)."""
    return _pack(layout, length, cu_seqlens, torch.device(device)).mask(0, length, 0)


def flex_mask_mod(
    layout: BandLayout,
    length: int,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> MaskMod:
    """The same mask as a ``mask_mod(b, h, q_idx, kv_idx)`` for ``create_block_mask`` of FlexAttention.

    Parameters
    ----------
    device : torch.device or str
        Where the attention runs: the mask reads the layout's table there.
    """
    packing = _pack(layout, length, cu_seqlens, torch.device(device))

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return packing.allowed(h, q_idx, kv_idx)

    return mask_mod


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BandLayout,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Banded attention by definition; differentiable, any strides, any device.

    Parameters
    ----------
    q : Tensor
        ``(B, Hq, N, D)``, floating point.
    k, v : Tensor
        ``(B, Hkv, N, D)`` in the dtype of q; query head h reads key/value head ``h // (Hq // Hkv)``.
    layout : BandLayout
        Bands of the ``Hq`` query heads.
    scale : float, optional
        Factor of the scores, ``D**-0.5`` by default.
    cu_seqlens : Tensor or sequence of int, optional
        Rising boundaries of packed documents, from 0 to at most N, the same for each batch row. Documents
        never attend to one another; with a layout without context length each document has the bands of its
        own length. Rows behind the last boundary belong to no document: they have and are no key.

    Returns
    -------
    o : Tensor
        ``(B, Hq, N, D)``; 0 for a query with no key.
    lse : Tensor
        ``(B, Hq, N)`` natural logarithm of the sum of exponentiated scores; -inf for a query with no key.

    Both are computed and returned in the dtype of q promoted to at least float32.

    Notes
    -----
    A NaN or an infinity stays within its own document, batch row and head (in k or v: the query heads that
    read it); inside a document it may reach other rows. A query row that is NaN has o and lse of NaN. What
    arrives for o and lse of a query without keys is ignored, NaN included.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes, heads or `cu_seqlens` that do not fit, or a sequence longer than the layout's context.
    """
    _check_inputs(q, k, v, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    packing = _pack(layout, q.shape[2], cu_seqlens, q.device)
    group = q.shape[1] // k.shape[1]
    q, k, v = _promoted(q), _promoted(k), _promoted(v)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    chunks = packing.chunks(q.shape[0] * q.shape[1])
    # Keeping each chunk's scores for the backward would be N x N again.
    scores = q.shape[0] * q.shape[1] * sum((last - first) * (last - key) for first, last, key in chunks)
    recompute = scores > _CHUNK_SCORES and torch.is_grad_enabled()
    outputs, sums = [], []
    for first, last, first_key in chunks:
        mask = packing.mask(first, last, first_key)
        inputs = (q[:, :, first:last], k[:, :, first_key:last], v[:, :, first_key:last], mask, scale)
        if recompute:
            o, lse = checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            o, lse = _attend(*inputs)
        outputs.append(o)
        sums.append(lse)
    # Rows of no document. A sum over nothing keeps q, k and v in the graph where there is no other.
    nothing = q[:, :, :0].sum() + k[:, :, :0].sum() + v[:, :, :0].sum()
    covered = packing.documents[-1][1]
    outputs.append(torch.zeros_like(q[:, :, covered:]) + nothing)
    sums.append(q.new_full((*q.shape[:2], q.shape[2] - covered), -torch.inf) + nothing)
    return torch.cat(outputs, 2), torch.cat(sums, 2)
