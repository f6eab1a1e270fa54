"""An attention problem: the shapes, dtype, direction and layout that a kernel is tuned and measured for."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .bands import FLOPS_PER_PAIR, BandLayout, require_int

DIRECTIONS = tuple(FLOPS_PER_PAIR)
# What a step of training takes.
TRAINING = ("forward", "backward")
MAX_DECODE_QUERIES = 16
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def layout_key(layout: BandLayout) -> str:
    """Short filesystem-safe name of a layout; custom intervals and the heads of a part enter as a hash of the
    layout's spec.
    """
    parts = [layout.name]
    if layout.window is not None:
        parts.append(f"w{layout.window}")
    if layout.context_length is not None:
        parts.append(f"c{layout.context_length}")
    if layout.allow_longer:
        parts.append("longer")
    if layout.of_heads is not None:
        parts.append(f"of{layout.of_heads}")
    if layout.intervals is not None or layout.of_heads is not None:
        parts.append(hashlib.sha256(layout.spec.encode()).hexdigest()[:10])
    return "-".join(parts)


def useful_flops(layout: BandLayout, queries: int, keys: int, head_dim: int, direction: str) -> int:
    """Floating-point operations of the pairs that the last ``queries`` of ``keys`` positions attend to:
    ``4*D`` each forward and decoding, ``10*D`` backward.
    """
    flops = layout.useful_flops(keys, head_dim, direction)
    # What comes before the queries would be a sequence of its own.
    return flops - (layout.useful_flops(keys - queries, head_dim, direction) if keys > queries else 0)


def keys_read(layout: BandLayout, kv_heads: int, queries: int, keys: int) -> int:
    """Keys that the last ``queries`` of ``keys`` positions attend to, summed over the key/value heads: of
    each the union of its query heads' bands.
    """
    group = layout.num_heads // kv_heads
    bands = layout.bands(keys)
    read = 0
    for first in range(0, layout.num_heads, group):
        seen = 0
        ranges = [
            (max(0, keys - queries - high), keys - low)
            for head in bands[first : first + group]
            for low, high in head
        ]
        for begin, end in sorted(ranges):
            read += max(0, end - max(begin, seen))
            seen = max(seen, end)
    return read


@dataclass(frozen=True)
class AttentionProblem:
    """One direction of banded attention on inputs of one shape.

    Attributes
    ----------
    direction : str
        ``"forward"``, ``"backward"`` or ``"decode"``.
    dtype : str
        Dtype of q, k, v: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    batch, query_heads, kv_heads, length, head_dim : int
        q is ``(batch, query_heads, length, head_dim)``, k and v ``(batch, kv_heads, keys, head_dim)``.
    layout : BandLayout
        Its `num_heads` equals `query_heads`.
    kv_length : int, optional
        Number of keys, where it is not `length`; the queries are the last ones. For ``"decode"`` the keys
        in the cache.

    Raises
    ------
    ValueError, TypeError
        From the constructor: an unknown direction or dtype, a size below 1 or beyond what a layout can
        hold, heads that do not divide, a layout for another number of heads or a shorter context, or one that
        is not autoregressive although there are other numbers of keys, or where it decodes; more queries than
        a step of decoding has, or than keys.
    """

    direction: str
    dtype: str
    batch: int
    query_heads: int
    kv_heads: int
    length: int
    head_dim: int
    layout: BandLayout
    kv_length: int | None = None

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}, got {self.direction!r}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {tuple(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.kv_length == self.length:
            object.__setattr__(self, "kv_length", None)
        for name in ("batch", "query_heads", "kv_heads", "length", "head_dim", "kv_length"):
            value = getattr(self, name)
            if name != "kv_length" or value is not None:
                object.__setattr__(self, name, require_int(name, value, 1))
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads must be a multiple of kv_heads, got {self.query_heads} and {self.kv_heads}"
            )
        if not isinstance(self.layout, BandLayout):
            raise TypeError(f"layout must be a BandLayout, got {type(self.layout).__name__}")
        self.layout.check_heads(self.query_heads)
        if self.direction == "decode":
            if self.length > min(MAX_DECODE_QUERIES, self.keys):
                raise ValueError(
                    f"decode takes 1 to {MAX_DECODE_QUERIES} queries, no more than keys, got {self.length} "
                    f"and {self.keys}: longer chunks are served by forward"
                )
            self.layout.require_autoregressive("decoding")
        if self.kv_length is not None:
            self.layout.require_autoregressive(f"{self.length} queries to {self.kv_length} keys")
        self.layout.check_length(self.keys)

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.length if self.kv_length is None else self.kv_length

    @cached_property
    def mean_keys(self) -> float:
        """Keys that a query attends to, the mean over queries and heads, and at least 1: how wide the bands
        are. Documents are not known here, and are taken for one.
        """
        pairs = self.layout.pairs(self.keys)
        if self.keys > self.length:
            pairs -= self.layout.pairs(self.keys - self.length)
        return max(1.0, pairs / (self.query_heads * self.length))

    @cached_property
    def most_keys(self) -> int:
        """Keys of the query and head that attend to the most of them, and at least 1; documents as above."""
        last = self.keys - 1
        heads = self.layout.bands(self.keys)
        return max(1, *(sum(max(0, min(high, last) - low + 1) for low, high in bands) for bands in heads))

    @property
    def useful_flops(self) -> int:
        """Floating-point operations of the attended pairs: ``4*D`` each forward and decoding, ``10*D``
        backward.
        """
        return self.batch * useful_flops(self.layout, self.length, self.keys, self.head_dim, self.direction)

    @property
    def min_bytes(self) -> int:
        """Bytes that must move if each input is read once and each output written once.

        Forward: q, k, v in, o and lse out. Backward: q, k, v, o, do, lse, dlse in, dq, dk, dv out. Decode:
        as forward, but of the keys and values of a head only the union of its query heads' bands.
        """
        bytes_a_row = self.batch * self.head_dim * DTYPE_BYTES[self.dtype]
        query = bytes_a_row * self.query_heads * self.length
        if self.direction == "decode":
            key = bytes_a_row * keys_read(self.layout, self.kv_heads, self.length, self.keys)
        else:
            key = bytes_a_row * self.kv_heads * self.keys
        row = self.batch * self.query_heads * self.length * 4
        return 4 * query + 4 * key + 2 * row if self.direction == "backward" else 2 * query + 2 * key + row

    @property
    def key(self) -> str:
        """Short filesystem-safe name, such as ``forward-float32-b1-h16-k16-n4096-d64-spattention-c4096``."""
        return (
            f"{self.direction}-{self.dtype}-b{self.batch}-h{self.query_heads}-k{self.kv_heads}"
            f"-n{self.length}{'' if self.kv_length is None else f'-m{self.keys}'}"
            f"-d{self.head_dim}-{layout_key(self.layout)}"
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; the layout is its spec, and `kv_length` is left out where it is None."""
        data = {
            "direction": self.direction,
            "dtype": self.dtype,
            "batch": self.batch,
            "query_heads": self.query_heads,
            "kv_heads": self.kv_heads,
            "length": self.length,
            "head_dim": self.head_dim,
            "layout": self.layout.spec,
        }
        return data if self.kv_length is None else {**data, "kv_length": self.kv_length}

    @classmethod
    def from_json(cls, data: dict[str, Any] | str) -> AttentionProblem:
        """The problem that `to_json` wrote, given as the dict or its JSON text.

        Raises
        ------
        ValueError
            Unknown or missing fields, or values that the constructor refuses.
        """
        if isinstance(data, str):
            data = json.loads(data)
        if not isinstance(data, dict):
            raise ValueError(f"a problem is a JSON object, got {data!r}")
        names = set(cls.__dataclass_fields__) - {"kv_length"}
        if set(data) - {"kv_length"} != names:
            raise ValueError(
                f"a problem has the fields {sorted(names)} and may have kv_length; "
                f"missing {sorted(names - set(data))}, unknown {sorted(set(data) - names - {'kv_length'})}"
            )
        return cls(**{**data, "layout": BandLayout.from_spec(data["layout"])})


def problem_distance(wanted: AttentionProblem, known: AttentionProblem) -> float:
    """How far a problem is from one that was measured.

    The sum of ``|log2|`` of the ratios of mean keys a query (the width of the bands, which decides how long a
    tile's loop is), of query heads per key head, and, at half the weight, of queries in all (how many tiles
    there are), plus 1 for a layout of another name and 4 for another dtype: bands twice as wide weigh as much
    as another layout, and a record of the same dtype is preferred unless its bands are 16 times further off.
    """
    queries = [problem.batch * problem.query_heads * problem.length for problem in (wanted, known)]
    distance = abs(math.log2(wanted.mean_keys / known.mean_keys))
    distance += abs(math.log2(queries[0] / queries[1])) / 2
    distance += abs(math.log2((wanted.query_heads / wanted.kv_heads) / (known.query_heads / known.kv_heads)))
    distance += wanted.layout.name != known.layout.name
    return distance + 4 * (wanted.dtype != known.dtype)


def is_same_problem(wanted: AttentionProblem, known: AttentionProblem) -> bool:
    """Do the two do the same work? Layouts by the intervals they give at this length, not by their
    spelling.
    """
    if wanted == known:
        return True
    shapes = ("direction", "dtype", "batch", "query_heads", "kv_heads", "length", "keys", "head_dim")
    if any(getattr(wanted, name) != getattr(known, name) for name in shapes):
        return False
    if wanted.kv_length is not None:
        return wanted.layout.has_bands_of(known.layout)
    return bool((wanted.layout.table(wanted.length) == known.layout.table(known.length)).all())
