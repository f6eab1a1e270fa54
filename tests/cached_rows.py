"""What the rows of a batch have seen, and what is right to attend to of it: nothing is cached."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.reference import reference_attention

HEAD_DIM = 32
CONTEXT = 80


def draw_layout(chance: random.Random, heads: int, context: int = CONTEXT) -> BandLayout:
    name = chance.choice(
        (
            "spattention",
            "spattention",
            "exclusive",
            "local_only",
            "gapped",
            "equal_area",
            "causal",
            "window",
            "custom",
        )
    )
    if name == "window":
        return BandLayout.sliding_window(heads, chance.randint(1, 3 * context // 8))
    if name == "custom":
        edges = [sorted(chance.sample(range(3 * context // 4), 4)) for _ in range(heads)]
        return BandLayout.custom([[e[:2], e[2:]][: chance.randint(0, 2)] for e in edges])
    return getattr(BandLayout, name)(heads, context)


class Rows:
    """What each row of a batch has seen, and from it what is right: nothing is cached."""

    def __init__(self, layout: BandLayout, batch: int) -> None:
        self.layout = layout
        self.keys = [torch.empty(1, 0, 0, HEAD_DIM) for _ in range(batch)]
        self.values = list(self.keys)
        self.starts = [0] * batch

    def attend(self, q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
        outputs = torch.full_like(q, torch.nan)
        for row, count in enumerate(counts):
            seen = [
                torch.cat((old, new[row : row + 1, :, :count].cpu()), 2)
                if old.numel()
                else new[row : row + 1, :, :count].cpu()
                for old, new in ((self.keys[row], k), (self.values[row], v))
            ]
            self.keys[row], self.values[row] = seen
            start = self.starts[row]
            keys, values = (tensor[:, :, start:].double() for tensor in seen)
            if not keys.shape[2] or not count:
                continue
            own = min(count, keys.shape[2])
            queries = q[row : row + 1, :, count - own : count].cpu().double()
            o = reference_attention(queries, keys, values, self.layout)[0]
            outputs[row, :, count - own : count] = o[0]
        return outputs


def draw(chance: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(chance.randrange(2**31)))


def compare(o: Tensor, expected: Tensor) -> None:
    has_meaning = ~expected.isnan()
    torch.testing.assert_close(o.cpu()[has_meaning], expected[has_meaning], atol=1e-5, rtol=1e-5)


def change_rows(chance: random.Random, cache: Any, seen: Sequence[Rows], most_back: int | None) -> int:
    """Reorder, select, repeat or crop a cache by chance, or do nothing, and what was seen alike.

    Returns how many tokens of each row were forgotten: at most `most_back`, and nothing is cropped where that
    is None.
    """
    batch, device = len(seen[0].keys), cache.lengths.device
    action, order, back = chance.random(), list(range(batch)), 0
    if action < 0.1:
        order = [chance.randrange(batch) for _ in range(batch)]
        cache.reorder(torch.tensor(order, device=device))
    elif action < 0.15:
        order = [chance.randrange(batch) for _ in range(chance.randint(1, 3))]
        cache.select(torch.tensor(order, device=device))
    elif action < 0.2 and batch == 1:
        order = [0, 0]
        cache.repeat(2)
    elif action < 0.4 and most_back is not None:
        back = chance.randint(0, most_back)
        cache.crop(back)
    for rows in seen:
        for tensors in (rows.keys, rows.values):
            tensors[:] = [tensors[row][:, :, : tensors[row].shape[2] - back] for row in order]
        rows.starts = [rows.starts[row] for row in order]
    return back
