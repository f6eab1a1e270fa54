"""Masks of the sparse attentions that the SPAttention paper compares with."""

from __future__ import annotations

import torch
from torch import Tensor


def _positions(length: int) -> tuple[Tensor, Tensor]:
    position = torch.arange(length)
    return position[:, None], position[None, :]


def longformer_mask(length: int, *, window: int | None = None, global_tokens: int | None = None) -> Tensor:
    """Causal Longformer: the last `window` keys and the first `global_tokens` keys. Bool ``(1, N, N)``.

    The defaults are the SPAttention paper's: ``min(256, N // 4)`` (at least the query's own key) and
    ``min(16, max(1, N // 32))``.
    """
    query, key = _positions(length)
    window = max(1, min(256, length // 4)) if window is None else window
    global_tokens = min(16, max(1, length // 32)) if global_tokens is None else global_tokens
    return ((query >= key) & ((query - key < window) | (key < global_tokens)))[None]


def bigbird_mask(
    length: int, *, window: int | None = None, global_tokens: int | None = None, stride: int | None = None
) -> Tensor:
    """Causal BigBird: Longformer's keys and each key at a multiple of `stride` behind. Bool ``(1, N, N)``.

    Regular links stand for BigBird's random ones, so that the mask is the same in each run. The default
    stride is a quarter of the window.
    """
    query, key = _positions(length)
    window = max(1, min(256, length // 4)) if window is None else window
    stride = max(1, window // 4) if stride is None else stride
    near_or_global = longformer_mask(length, window=window, global_tokens=global_tokens)
    return near_or_global | ((query >= key) & ((query - key) % stride == 0))[None]


def reformer_mask(length: int, num_heads: int = 1, *, num_buckets: int | None = None) -> Tensor:
    """Causal Reformer: the keys of the query's own bucket. Bool ``(H, N, N)``.

    Reformer hashes contents; a mask can't, so position ``p`` of head ``h`` falls into bucket
    ``(p * (2h + 1) * 2654435761 mod 2**32) * num_buckets >> 32``: fixed, close to even, and different for
    each head. The default number of buckets is ``max(2, N // 256)``, which gives buckets of about 256 keys.
    """
    query, key = _positions(length)
    num_buckets = max(2, length // 256) if num_buckets is None else num_buckets
    factor = (2 * torch.arange(num_heads) + 1) * 2654435761 % 2**32
    bucket = (torch.arange(length) * factor[:, None] % 2**32) * num_buckets >> 32
    return (query >= key) & (bucket[:, :, None] == bucket[:, None, :])
