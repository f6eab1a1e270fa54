"""Random steps of decoding, in each form of a cache, and what is right for them.

The truth is computed from the definition, head by head and query by query, in float64: nothing of the package
but a layout's intervals takes part. Whatever no query attends to is NaN in the caches.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spattn_tvm.bands import LIMIT, BandLayout
from spattn_tvm.cache_forms import least_capacity, merged

LAYOUTS = ("spattention", "exclusive", "local_only", "gapped", "equal_area", "causal", "sliding", "custom")
FORMS = ("contiguous", "paged", "ring")


@dataclass(frozen=True)
class DecodeProblem:
    """A step of decoding; lengths and starts are those of the batch rows."""

    form: str
    query_heads: int
    kv_heads: int
    queries: int
    head_dim: int
    lengths: tuple[int, ...]
    starts: tuple[int, ...] | None
    layout: BandLayout
    page_size: int
    strided: bool
    seed: int

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def mask(self) -> Tensor:
        """Bool ``(B, Hq, Nq, longest)``."""
        longest = max(1, *self.lengths)
        mask = torch.zeros(self.batch, self.query_heads, self.queries, longest, dtype=torch.bool)
        for b, end in enumerate(self.lengths):
            begin = self.starts[b] if self.starts else 0
            for h, bands in enumerate(self.layout.bands(LIMIT)):
                for r in range(self.queries):
                    position = end - self.queries + r
                    for low, high in bands:
                        first, last = max(begin, position - high), min(end - 1, position - low)
                        mask[b, h, r, first : max(first, last + 1)] = True
        return mask

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q and, by position, k and v ``(B, Hkv, longest, D)``: NaN where no query attends."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.query_heads, self.queries, self.head_dim)
        if self.strided:
            q = torch.randn(shape[0], shape[2], shape[1], shape[3], generator=generator).transpose(1, 2)
        else:
            q = torch.randn(shape, generator=generator)
        mask = self.mask()
        used = mask.view(self.batch, self.kv_heads, -1, mask.shape[3]).any(2)[..., None]
        shape = (self.batch, self.kv_heads, mask.shape[3], self.head_dim)
        k, v = (
            torch.randn(shape, generator=generator).masked_fill(~used, torch.nan).to(dtype) for _ in range(2)
        )
        return q.to(dtype).to(device), k.to(device), v.to(device)

    def cached(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The keys and values in a cache of the problem's form, and the arguments that say where they lie."""
        rng = random.Random(self.seed)
        places: dict[str, Tensor] = {}
        index = torch.int32 if self.seed % 2 else torch.int64
        places["cache_lengths"] = torch.tensor(self.lengths, dtype=index)
        if self.starts is not None:
            places["cache_starts"] = torch.tensor(self.starts, dtype=torch.int32)
        if self.form == "contiguous":
            caches = [self._contiguous(tensor, rng.randint(0, 40)) for tensor in (k, v)]
            spare = max(cache.shape[2] for cache in caches)
            caches = [
                torch.cat((c, c.new_full((*c.shape[:2], spare - c.shape[2], c.shape[3]), torch.nan)), 2)
                for c in caches
            ]
        elif self.form == "paged":
            places["block_table"] = self._block_table(k.shape[2], rng)
            caches = [self._paged(tensor, places["block_table"]) for tensor in (k, v)]
        else:
            places["ring"] = self._ring(rng)
            caches = [self._ring_rows(tensor, places["ring"]) for tensor in (k, v)]
        if self.strided and self.form != "ring":
            caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
        places = {name: value.to(k.device) for name, value in places.items()}
        return caches[0], caches[1], places

    @staticmethod
    def _contiguous(tensor: Tensor, spare: int) -> Tensor:
        empty = tensor.new_full((*tensor.shape[:2], spare, tensor.shape[3]), torch.nan)
        return torch.cat((tensor, empty), 2)

    def _block_table(self, longest: int, rng: random.Random) -> Tensor:
        columns = -(-longest // self.page_size) + rng.randint(0, 2)
        count = columns * self.batch
        pages = torch.tensor(rng.sample(range(count + 3), count), dtype=torch.int32).view(self.batch, -1)
        for b, end in enumerate(self.lengths):
            pages[b, -(-end // self.page_size) :] = -1
        return pages

    def _paged(self, tensor: Tensor, table: Tensor) -> Tensor:
        pages = table.numel() + 3
        shape = (pages, self.kv_heads, self.page_size, self.head_dim)
        cache = tensor.new_full(shape, torch.nan)
        for b, end in enumerate(self.lengths):
            for first in range(0, end, self.page_size):
                rows = tensor[b, :, first : min(end, first + self.page_size)]
                cache[table[b, first // self.page_size], :, : rows.shape[1]] = rows
        return cache

    def _ring(self, rng: random.Random) -> Tensor:
        group, bands = self.query_heads // self.kv_heads, self.layout.bands(LIMIT)
        rows, base = [], rng.randint(0, 3)
        for head in range(self.kv_heads):
            of_head = bands[head * group : (head + 1) * group]
            reach = max((high for each in of_head for _, high in each), default=0)
            capacity = min(reach, max(self.lengths)) + self.queries + rng.choice((0, 0, rng.randint(1, 9)))
            if self.seed % 3 == 0 and any(of_head):
                # It turns between the bands, and no two keys that are needed share a row.
                needed = [(low, high + self.queries - 1) for each in of_head for low, high in each]
                capacity = min(capacity, least_capacity(merged(needed)))
            rows.append((base, capacity))
            base += capacity + rng.randint(0, 2)
        return torch.tensor(rows, dtype=torch.int32)

    def _ring_rows(self, tensor: Tensor, ring: Tensor) -> Tensor:
        rows = int(ring.sum(1).max()) + 2
        cache = tensor.new_full((self.batch, rows, self.head_dim), torch.nan)
        for b, end in enumerate(self.lengths):
            for head, (base, capacity) in enumerate(ring.tolist()):
                used = (~tensor[b, head, :end, 0].isnan()).nonzero()[:, 0]
                cache[b, base + used % capacity] = tensor[b, head, used]
        return cache

    def truth(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """o and lse in float64."""
        scale = self.head_dim**-0.5 if scale is None else scale
        group = self.query_heads // self.kv_heads
        mask = self.mask()
        q, k, v = (tensor.cpu().double() for tensor in (q, k, v))
        k, v = (tensor.nan_to_num().repeat_interleave(group, 1) for tensor in (k, v))
        scores = (scale * (q @ k.mT)).masked_fill(~mask, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
        return weights @ v, lse


def random_layout(rng: random.Random, heads: int, longest: int) -> BandLayout:
    """One whose context is at least as long as the longest sequence."""
    name = rng.choice(LAYOUTS)
    context = longest + rng.choice((0, rng.randint(0, longest)))
    if name == "causal":
        return BandLayout.causal(heads)
    if name == "sliding":
        return BandLayout.sliding_window(heads, rng.randint(1, longest + 3))
    if name == "custom":
        edges = [sorted(rng.randint(0, longest) for _ in range(4)) for _ in range(heads)]
        bands = [[(a, b), (c, d)][: rng.randint(0, 2)] for a, b, c, d in edges]
        return BandLayout.custom(bands, max(1, context))
    layout: Any = getattr(BandLayout, name)
    return layout(heads, max(1, context))


def random_decode(
    seed: int, *, head_dims: tuple[int, ...] = (32,), longest: int = 400, form: str | None = None
) -> DecodeProblem:
    """A step that nobody chose: ragged and empty rows, padding, grouped queries, all forms."""
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 2, 3))
    query_heads = kv_heads * rng.choice((1, 1, 2, 4, 5))
    queries = rng.choice((1, 1, 2, 3, rng.randint(4, 16)))
    size = rng.choice((1, 17, longest))
    lengths = tuple(rng.choice((rng.randint(0, size), size, queries)) for _ in range(rng.choice((1, 2, 3))))
    starts = None
    if rng.random() < 0.4:
        starts = tuple(rng.choice((0, rng.randint(0, end))) for end in lengths)
    return DecodeProblem(
        form or rng.choice(FORMS),
        query_heads,
        kv_heads,
        queries,
        rng.choice(head_dims),
        lengths,
        starts,
        random_layout(rng, query_heads, max(1, *lengths)),
        rng.choice((16, 32, 48, 100)),
        rng.random() < 0.4,
        seed,
    )
