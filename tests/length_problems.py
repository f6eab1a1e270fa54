"""Random problems in which queries and keys are not the same rows, and what is right for them.

The truth is computed from the definition, pair by pair, in float64: nothing of the package but a layout's
intervals takes part.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spattn_tvm.bands import LIMIT, BandLayout

LAYOUTS = ("spattention", "exclusive", "local_only", "gapped", "equal_area", "causal", "sliding", "custom")


@dataclass
class LengthProblem:
    """Shapes, and `places`: the arguments that say where queries and keys lie, tensors as lists."""

    batch: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    head_dim: int
    layout: BandLayout
    places: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """`places` as an implementation takes them, of int32 or int64 by chance."""
        chance = random.Random(self.seed)
        dtypes = (torch.int32, torch.int64)
        return {
            name: torch.tensor(value, dtype=chance.choice(dtypes), device=device)
            if isinstance(value, list)
            else value
            for name, value in self.places.items()
        }

    def mask(self) -> Tensor:
        """Bool ``(B, Hq, Nq, Nk)``, from the definition."""
        mask = np.zeros((self.batch, self.kv_heads * self.group, self.queries, self.keys), dtype=bool)
        for b, (rows, keys, offset) in self._spans():
            position = np.arange(rows.start, rows.stop)[:, None] + offset
            distance = position - np.arange(keys.start, keys.stop)[None, :]
            for head, bands in enumerate(self.layout.bands(LIMIT)):
                for low, high in bands:
                    high = 2**62 if high == LIMIT - 1 else high  # causal, which sees all of any past
                    mask[b, head, rows, keys] |= (distance >= low) & (distance <= high)
        return torch.from_numpy(mask)

    def _spans(self) -> list[tuple[int, tuple[slice, slice, int]]]:
        """(batch row, (its queries, the keys that exist for them, what makes a row a key's position))."""
        places, spans = self.places, []
        for b in range(self.batch):
            if "cu_seqlens" in places:
                ends = places["cu_seqlens"]
                key_ends = places.get("cu_seqlens_k", ends)
                for (begin, end), (first, last) in zip(pairwise(ends), pairwise(key_ends), strict=True):
                    spans.append((b, (slice(begin, end), slice(first, last), last - end)))
                continue
            first = min(max(places.get("kv_starts", [0] * self.batch)[b], 0), self.keys)
            last = min(max(places.get("kv_lengths", [self.keys] * self.batch)[b], 0), self.keys)
            offset = places.get("query_offset")
            if isinstance(offset, list):
                offset = offset[b]
            if offset is None:
                offset = last - self.queries
            offset = min(max(offset, -(2**40)), 2**40)
            spans.append((b, (slice(0, self.queries), slice(first, max(first, last)), offset)))
        return spans

    def unused(self) -> Tensor:
        """Bool ``(B, Nk)``: keys that don't exist."""
        unused = torch.ones(self.batch, self.keys, dtype=torch.bool)
        for b, (_, keys, _) in self._spans():
            unused[b, keys] = False
        return unused

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, do, dlse; NaN in the keys and values that don't exist."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        heads = self.kv_heads * self.group
        q, do = (draw(self.batch, self.queries, heads, self.head_dim).transpose(1, 2) for _ in range(2))
        k, v = (draw(self.batch, self.kv_heads, self.keys, self.head_dim) for _ in range(2))
        unused = self.unused().to(device)[:, None, :, None]
        k, v = (tensor.masked_fill(unused, torch.nan) for tensor in (k, v))
        return q, k, v, do, draw(self.batch, heads, self.queries).float()


def _random_layout(chance: random.Random, heads: int, longest: int) -> BandLayout:
    name = chance.choice(LAYOUTS)
    context = chance.choice((longest, longest + chance.randrange(4), 3 * longest))
    if name == "sliding":
        return BandLayout.sliding_window(heads, chance.randint(1, longest), chance.choice((None, context)))
    if name == "causal":
        return BandLayout.causal(heads, chance.choice((None, context)))
    if name == "custom":
        intervals = []
        for _ in range(heads):
            edges = sorted(chance.sample(range(longest + 8), 4))
            intervals.append([edges[:2], edges[2:]][: chance.randint(0, 2)])
        return BandLayout.custom(intervals)
    return getattr(BandLayout, name)(heads, context)


def _boundaries(chance: random.Random, documents: int, end: int) -> list[int]:
    last = end if chance.random() < 0.7 else chance.randint(0, end)
    return [0, *sorted(chance.randint(0, last) for _ in range(documents - 1)), last]


def random_problem(seed: int, head_dims: tuple[int, ...] = (32, 40, 64)) -> LengthProblem:
    """One of every kind: chunked prefill, caches with padding on both sides, packed documents."""
    chance = random.Random(seed)
    batch, kv_heads, group = chance.randint(1, 3), chance.choice((1, 2, 3)), chance.choice((1, 1, 2, 4))
    queries = chance.choice((1, 2, 7, 16, 33, 64, 97, chance.randint(1, 150)))
    keys = chance.choice((1, 5, 16, 63, 64, 130, queries, chance.randint(1, 260)))
    places: dict[str, Any] = {}
    kind = chance.choice(("last", "offset", "rows", "rows", "packed"))
    if kind == "offset":
        places["query_offset"] = chance.choice(
            (0, keys - queries, -queries - 5, -1, keys, chance.randint(-queries, keys + 20))
        )
    elif kind == "rows":

        def values(*special: int) -> list[int]:
            return [chance.choice((*special, chance.randint(0, keys))) for _ in range(batch)]

        if chance.random() < 0.7:
            places["kv_lengths"] = values(0, 1, keys, keys + 3, -4, 2**31 - 1)
        if chance.random() < 0.6:
            places["kv_starts"] = values(0, 0, keys, -2)
        if chance.random() < 0.4 or not places:
            places["query_offset"] = values(-queries, -1, keys - queries, keys, -(2**31), 2**30)
        elif chance.random() < 0.3:
            places["query_offset"] = chance.randint(-5, keys + 5)
    elif kind == "packed":
        documents = chance.randint(1, 5)
        places["cu_seqlens"] = _boundaries(chance, documents, queries)
        places["cu_seqlens_k"] = _boundaries(chance, documents, keys)
    longest = max(keys, queries + max([keys, *[v for v in places.values() if isinstance(v, int)]]))
    return LengthProblem(
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        queries=queries,
        keys=keys,
        head_dim=chance.choice(head_dims),
        layout=_random_layout(chance, kv_heads * group, longest),
        places=places,
        seed=seed,
    )


def truth(
    problem: LengthProblem, scale: float | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """o, lse, dq, dk, dv in float64, of the tensors rounded to `dtype`."""
    q, k, v, do, dlse = (tensor.double() for tensor in problem.tensors(dtype))
    mask = problem.mask()
    q, k, v = (tensor.nan_to_num(0.0).requires_grad_() for tensor in (q, k, v))
    scale = problem.head_dim**-0.5 if scale is None else scale
    k_all, v_all = (tensor.repeat_interleave(problem.group, 1) for tensor in (k, v))
    has_key = mask.any(-1)
    scores = (scale * q @ k_all.mT).masked_fill(~mask, -torch.inf)
    safe = scores.masked_fill(~has_key[..., None], 0.0)
    weights = safe.softmax(-1).masked_fill(~mask, 0.0)
    o, lse = weights @ v_all, safe.logsumexp(-1)
    loss = (o * do).sum() + (lse * dlse).masked_fill(~has_key, 0.0).sum()
    gradients = torch.autograd.grad(loss, (q, k, v))
    results = {"o": o.detach(), "lse": lse.detach().masked_fill(~has_key, -torch.inf)}
    return results | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def tiled_problems(head_dim: int) -> dict[str, LengthProblem]:
    """Longer than the tiles of any family, with every kind of end inside of them."""
    spattention, exclusive = BandLayout.spattention(4, 1200), BandLayout.exclusive(4, 1200)
    # Bands that begin and end at odd distances, and queries between them that have no key.
    odd = BandLayout.custom([[(1, 30)], [(63, 63), (65, 200)], [(129, 490)], [(7, 12), (301, 801)]])
    padded = {"kv_lengths": [512, 447], "kv_starts": [63, 129], "query_offset": [70, 301]}
    apart = {"cu_seqlens": [0, 7, 140, 140, 333, 590], "cu_seqlens_k": [0, 300, 301, 444, 700, 899]}
    fewer = {"cu_seqlens": [0, 1, 66, 400, 777], "cu_seqlens_k": [0, 1, 130, 131, 402]}
    extreme = {"query_offset": [2**31 - 1, -(2**31)]}
    problems: dict[str, tuple[int, int, BandLayout, dict[str, Any]]] = {
        "more keys": (333, 777, spattention, {}),
        "more queries": (700, 131, odd, {}),
        "one query": (1, 1111, spattention, {}),
        "inside": (401, 900, odd, {"query_offset": 203}),
        "before all keys": (300, 200, odd, {"query_offset": -450}),
        "behind all keys": (257, 130, exclusive, {"query_offset": 701}),
        "ends inside": (515, 300, odd, {"query_offset": 64}),
        "lengths": (129, 640, spattention, {"kv_lengths": [517, 0]}),
        "padded on both sides": (255, 513, odd, padded),
        "starts behind ends": (130, 260, spattention, {"kv_lengths": [99, 260], "kv_starts": [100, 260]}),
        "extreme offsets": (200, 300, BandLayout.causal(4), extreme),
        "packed apart": (600, 901, odd, apart),
        "packed, fewer keys": (777, 402, spattention, fewer),
    }
    return {
        name: LengthProblem(2, 2, 2, queries, keys, head_dim, layout, places, seed)
        for seed, (name, (queries, keys, layout, places)) in enumerate(problems.items())
    }
