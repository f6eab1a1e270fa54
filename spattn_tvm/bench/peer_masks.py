"""Masks of the sparse attentions that the SPAttention paper compares with.

Each is a rule first: does a query of a head see a key? Rules take tensors of numbers and broadcast, so that
they serve as FlexAttention's mask functions; the masks are the rules at all positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the numbers of a head, a query and a key, which broadcast, to whether the query sees the key."""


def _window(length: int, window: int | None) -> int:
    return max(1, min(256, length // 4)) if window is None else window


def longformer_rule(length: int, *, window: int | None = None, global_tokens: int | None = None) -> Rule:
    """Causal Longformer: the last `window` keys and the first `global_tokens` keys.

    The defaults are the SPAttention paper's: ``min(256, N // 4)`` (at least the query's own key) and
    ``min(16, max(1, N // 32))``.
    """
    near = _window(length, window)
    first = min(16, max(1, length // 32)) if global_tokens is None else global_tokens
    return lambda head, query, key: (query >= key) & ((query - key < near) | (key < first))


def bigbird_rule(
    length: int, *, window: int | None = None, global_tokens: int | None = None, stride: int | None = None
) -> Rule:
    """Causal BigBird: Longformer's keys and each key at a multiple of `stride` behind.

    Regular links stand for BigBird's random ones, so that the mask is the same in each run. The default
    stride is a quarter of the window.
    """
    near_or_global = longformer_rule(length, window=window, global_tokens=global_tokens)
    step = max(1, _window(length, window) // 4) if stride is None else stride

    def sees(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return near_or_global(head, query, key) | ((query >= key) & ((query - key) % step == 0))

    return sees


def reformer_rule(
    length: int, num_heads: int = 1, *, num_buckets: int | None = None, device: torch.device | str = "cpu"
) -> Rule:
    """Causal Reformer: the keys of the query's own bucket. Looks positions up in a table on `device`.

    Reformer hashes contents; a mask can't, so position ``p`` of head ``h`` falls into bucket
    ``(p * (2h + 1) * 2654435761 mod 2**32) * num_buckets >> 32``: fixed, close to even, and different for
    each head. The default number of buckets is ``max(2, N // 256)``, which gives buckets of about 256 keys.
    """
    num_buckets = max(2, length // 256) if num_buckets is None else num_buckets
    factor = (2 * torch.arange(num_heads) + 1) * 2654435761 % 2**32
    bucket = (torch.arange(length) * factor[:, None] % 2**32) * num_buckets >> 32
    bucket = bucket.to(device)
    return lambda head, query, key: (query >= key) & (bucket[head, query] == bucket[head, key])


def _mask(rule: Rule, length: int, num_heads: int = 1) -> Tensor:
    head, position = torch.arange(num_heads)[:, None, None], torch.arange(length)
    return rule(head, position[:, None], position).expand(num_heads, length, length)


def longformer_mask(length: int, *, window: int | None = None, global_tokens: int | None = None) -> Tensor:
    """`longformer_rule` at all positions. Bool ``(1, N, N)``."""
    return _mask(longformer_rule(length, window=window, global_tokens=global_tokens), length)


def bigbird_mask(
    length: int, *, window: int | None = None, global_tokens: int | None = None, stride: int | None = None
) -> Tensor:
    """`bigbird_rule` at all positions. Bool ``(1, N, N)``."""
    return _mask(bigbird_rule(length, window=window, global_tokens=global_tokens, stride=stride), length)


def reformer_mask(length: int, num_heads: int = 1, *, num_buckets: int | None = None) -> Tensor:
    """`reformer_rule` at all positions. Bool ``(H, N, N)``."""
    return _mask(reformer_rule(length, num_heads, num_buckets=num_buckets), length, num_heads)
