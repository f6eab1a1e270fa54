"""Whether a peer computes what it should, told by sampled rows and columns.

Of o and dq single rows are compared, of dk and dv single keys; what they should be is computed in float64
from the rows and keys that their bands name, a block of the score matrix at a time. No tensor has N x N
elements, and 131,072 tokens of 32 heads fit beside the peers.

Samples lie where mistakes show: at both ends of documents, where a band first reaches a document's first key
and where it has come in full, next to the edges of tiles, and anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spattn_tvm.accuracy import judge
from spattn_tvm.bands import BandLayout, Bands

from .case import Case

if TYPE_CHECKING:
    from .inputs import Inputs

# Pairs of (batch, query head) whose rows are sampled, of (batch, key/value head) whose keys are, and samples
# of each, half of them anywhere. A key costs the rows of all queries that attend to it.
ROW_HEADS, KEY_HEADS = 16, 2
ROWS, KEYS = 24, 8
# Elements of a block of the score matrix: 128 MiB in float64.
BLOCK = 2**24


@dataclass
class _Block:
    """Some queries of one head against all their keys: weights and, with a gradient, that of the scores."""

    keys: Tensor
    weights: Tensor
    o: Tensor
    score_gradient: Tensor | None
    dq: Tensor | None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor | None,
    bands: Bands,
    begin: int,
    first: int,
    last: int,
    *,
    from_output: bool,
) -> _Block:
    """Attention of the queries ``first ... last`` of a document that begins at ``begin``; in q's dtype.

    ``k`` and ``v`` are ``(N, D)``; ``q`` and ``do`` hold those queries alone. `from_output`: the softmax's
    gradient takes its sum over keys from o, ``sum_j p_ij <do_i, v_j> = <do_i, o_i>``, as flash kernels do.
    """
    rows = torch.arange(first, last + 1, device=q.device)[:, None]
    keys, windows, allowed = [], [], []
    for low, high in bands:
        near, far = last - low + 1, max(begin, first - high)
        if far >= near:
            continue
        windows.append(slice(far, near))
        keys.append(torch.arange(far, near, device=q.device))
        distance = rows - keys[-1]
        allowed.append((distance >= low) & (distance <= high))
    if not keys:
        nothing = q.new_empty(len(rows), 0)
        zeros = torch.zeros_like(q)
        return _Block(rows.new_empty(0), nothing, zeros, None if do is None else nothing, zeros)
    there, mask = torch.cat(keys), torch.cat(allowed, 1)
    k, v = (t[windows[0]] if len(windows) == 1 else torch.cat([t[w] for w in windows]) for t in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = (scale * (q @ k.T)).masked_fill(~mask, -torch.inf)
    has_key = mask.any(1, keepdim=True)
    weights = scores.masked_fill(~has_key, 0.0).softmax(-1).masked_fill(~has_key, 0.0)
    o = weights @ v
    if do is None:
        return _Block(there, weights, o, None, None)
    weight_gradient = do @ v.T
    terms = do * o if from_output else weight_gradient * weights
    score_gradient = weights * (weight_gradient - terms.sum(-1, keepdim=True))
    return _Block(there, weights, o, score_gradient, scale * (score_gradient @ k))


def _key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    bands: Bands,
    begin: int,
    end: int,
    samples: list[int],
    *,
    from_output: bool,
) -> tuple[Tensor, Tensor]:
    """dk and dv of some keys of a document, of one query head; summed over blocks in at least float32."""
    device, head_dim = q.device, q.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros(len(samples), head_dim, dtype=dtype, device=device) for _ in range(2))
    positions = torch.tensor(samples, device=device)
    # Blocks of queries that attend to some sample, and of as few others as can be.
    ranges = sorted(
        (key + low, min(end, key + high + 1))
        for key in samples
        for low, high in bands
        if key + low < min(end, key + high + 1)
    )
    merged: list[list[int]] = []
    for first, stop in ranges:
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([first, stop])
    width = sum(min(end - begin, high - low + 1) for low, high in bands)
    rows = max(1, min(1024, BLOCK // max(1, width)))
    for first, stop in merged:
        for row in range(first, stop, rows):
            here = slice(row, min(row + rows, stop))
            block = _attend(
                q[here], k, v, do[here], bands, begin, row, here.stop - 1, from_output=from_output
            )
            assert block.score_gradient is not None
            chosen = positions[:, None] == block.keys  # a key may lie in the windows of both bands
            sample, column = chosen.nonzero(as_tuple=True)
            for total, factor, right in (
                (dk, block.score_gradient, q[here] * head_dim**-0.5),
                (dv, block.weights, do[here]),
            ):
                total.index_add_(0, sample, (factor[:, column].T @ right).to(dtype))
    return dk, dv


def _places(
    bands: Bands, begin: int, end: int, count: int, chooser: random.Random, of_keys: bool
) -> list[int]:
    """Rows of a document, the telling ones first."""
    edges = {begin, begin + 1, end - 1}
    for low, high in bands:
        for distance in (low, high):
            edge = end - 1 - distance if of_keys else begin + distance
            edges |= {edge - 1, edge, edge + 1}
    tile = begin + chooser.randrange(max(1, (end - begin) // 64)) * 64
    edges |= {tile, tile + 63}
    telling = [row for row in edges if begin <= row < end]
    chooser.shuffle(telling)
    anywhere = [chooser.randrange(begin, end) for _ in range(count)]
    return list(dict.fromkeys(telling[: count - count // 3] + anywhere))[:count]


@dataclass
class Samples:
    """Sampled places of a case under one layout, and what each result should be there.

    `exact` is float64. `plain`, ``(2, samples, D)``, has the same sums in the inputs' dtype, in two ways, and
    says what error is to be expected. The largest errors of a gradient are those of a few rows with two or
    three keys: by one way alone they were so small by chance in one of 500 seeds that a right kernel was
    called wrong.
    """

    rows: list[tuple[int, int, int]] = field(default_factory=list)
    keys: list[tuple[int, int, int]] = field(default_factory=list)
    exact: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def draw(cls, case: Case, layout: BandLayout, inputs: Inputs, seed: int, gradients: bool) -> Samples:
        """Choose places and compute what is there; `gradients` says whether dq, dk and dv are wanted."""
        problem = case.problem
        chooser = random.Random(seed)
        group = problem.query_heads // problem.kv_heads
        documents = list(case.documents)
        found = cls()

        def some_documents(count: int) -> list[tuple[int, int]]:
            return [documents[0], *chooser.sample(documents[1:], min(count - 1, len(documents) - 1))]

        every = [(b, h) for b in range(problem.batch) for h in range(problem.query_heads)]
        columns: dict[str, list[Tensor]] = {}

        def keep(kind: str, name: str, value: Tensor) -> None:
            columns.setdefault(f"{kind} {name}", []).append(value)

        ways = {
            "exact": (torch.float64, False),
            "plain": (inputs.q.dtype, False),
            "flash": (inputs.q.dtype, True),
        }
        for b, h in chooser.sample(every, min(ROW_HEADS, len(every))):
            chosen = some_documents(3)
            for begin, end in chosen:
                bands = layout.bands(end - begin)[h]
                for row in _places(bands, begin, end, -(-ROWS // len(chosen)), chooser, of_keys=False):
                    found.rows.append((b, h, row))
                    for kind, (dtype, from_output) in ways.items():
                        one = slice(row, row + 1)
                        reach = slice(max(begin, row - max((high for _, high in bands), default=0)), row + 1)
                        block = _attend(
                            inputs.q[b, h, one].to(dtype),
                            inputs.k[b, h // group, reach].to(dtype),
                            inputs.v[b, h // group, reach].to(dtype),
                            inputs.grad[b, h, one].to(dtype) if gradients else None,
                            bands,
                            begin - reach.start,
                            row - reach.start,
                            row - reach.start,
                            from_output=from_output,
                        )
                        keep(kind, "o", block.o)
                        if gradients:
                            assert block.dq is not None
                            keep(kind, "dq", block.dq)
        kv_heads = [(b, h) for b in range(problem.batch) for h in range(problem.kv_heads)]
        for b, h in chooser.sample(kv_heads, min(KEY_HEADS, len(kv_heads))) if gradients else []:
            chosen = some_documents(2)
            for begin, end in chosen:
                of_group = layout.bands(end - begin)[h * group : (h + 1) * group]
                bands = tuple(band for head in of_group for band in head)
                samples = _places(bands, begin, end, -(-KEYS // len(chosen)), chooser, of_keys=True)
                found.keys += [(b, h, key) for key in samples]
                for kind, (dtype, from_output) in ways.items():
                    sums: list[Tensor] | None = None
                    for query_head in range(h * group, (h + 1) * group):
                        parts = _key_gradients(
                            inputs.q[b, query_head].to(dtype),
                            inputs.k[b, h].to(dtype),
                            inputs.v[b, h].to(dtype),
                            inputs.grad[b, query_head].to(dtype),
                            of_group[query_head - h * group],
                            begin,
                            end,
                            samples,
                            from_output=from_output,
                        )
                        sums = (
                            list(parts) if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
                        )
                    assert sums is not None
                    for name, value in zip(("dk", "dv"), sums, strict=True):
                        keep(kind, name, value.to(dtype))
        for name in ("o", "dq", "dk", "dv") if gradients else ("o",):
            exact, *plain = (torch.cat(columns[f"{kind} {name}"]) for kind in ways)
            found.exact[name], found.plain[name] = exact, torch.stack(plain)
        return found

    def check(self, outputs: Mapping[str, Tensor], dtype: str) -> tuple[dict[str, float], str]:
        """Errors of a peer's outputs by name, and why they are wrong ("" if not).

        An error is the largest absolute difference at the samples over the largest absolute value there.
        """
        at = {"o": self.rows, "dq": self.rows, "dk": self.keys, "dv": self.keys}
        actual = {}
        for name, value in outputs.items():
            places = torch.tensor(at[name], device=value.device).T
            actual[name] = value[places[0], places[1], places[2]]
        errors, wrong = judge(actual, self.exact, self.plain, dtype)
        if wrong:
            name = wrong.split()[0]
            difference = (actual[name].double() - self.exact[name]).abs().nan_to_num(torch.inf).amax(-1)
            b, h, row = at[name][int(difference.argmax())]
            wrong += f" (worst at batch {b}, head {h}, row {row})"
        return errors, wrong
