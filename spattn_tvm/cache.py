"""Key/value caches of one layer: what its bands can still need, as a ring, or everything, in pages.

A key stays needed until its distance exceeds the largest one of the heads that read it. `BandedCache` keeps
that many keys of each key/value head and no more; `PagedCache` keeps all, in pages that it allocates as they
are needed. Both are appended to and read on their device. The host knows their lengths where nothing but
itself has changed them, and never waits for the device to tell, except where a method says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .bands import LIMIT, BandLayout, require_int
from .cache_forms import MAX_PAGE_SIZE, MIN_PAGE_SIZE
from .ops.attention import DTYPES, banded_attention
from .ops.decode import banded_attention_decode
from .placement import check_row_values
from .problem import MAX_DECODE_QUERIES
from .torch_private import has_values

_is_compiling = torch.compiler.is_compiling


def _reach(layout: BandLayout, num_kv_heads: int) -> list[int]:
    """The largest distance that a query head of each key/value head attends to; 0 where none attends."""
    bands = layout.bands(LIMIT)
    group = layout.num_heads // num_kv_heads
    return [
        max((hi for head in bands[g * group : (g + 1) * group] for _, hi in head), default=0)
        for g in range(num_kv_heads)
    ]


def _within(layout: BandLayout, max_length: int) -> BandLayout:
    """The layout for sequences of up to `max_length`, whose distances end there.

    So that a position beyond it, which only a device knows, sees a window rather than another key's row.
    """
    bands = layout.bands(LIMIT)
    if all(hi < max_length for head in bands for _, hi in head):
        return layout
    if layout.name == "causal":
        return BandLayout.causal(layout.num_heads, max_length, allow_longer=True)
    return BandLayout.custom(
        [[(lo, min(hi, max_length - 1)) for lo, hi in head if lo < max_length] for head in bands]
    )


def outlasting_inference() -> AbstractContextManager[Any]:
    """For what is allocated here: tensors made in inference mode can't be changed outside of it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def rows_of_last(last: Tensor, rows: Tensor, token: Tensor, counts: int | Tensor, spare: Tensor) -> Tensor:
    """Rows ``(B, N, Hkv)`` of the tokens ``(N, 1)`` that are among the `last` ``(Hkv,)`` of the `counts` that
    are there, of each batch row ``(B,)`` or of all; `spare` ``(B, 1, 1)`` of the others.
    """
    end = counts if isinstance(counts, int) else counts[:, None, None]
    return torch.where((token >= end - last) & (token < end), rows, spare)


class KeyValueCache(ABC):
    """What `BandedCache` and `PagedCache` have in common: lengths, and attention over what was stored.

    Attributes
    ----------
    layout : BandLayout
        Bands of the query heads.
    keys, values : Tensor
        The memory, in the cache's own order.
    lengths : Tensor
        ``(B,)`` int64 on the device: how many keys each row has seen, padding on the left included.
    starts : Tensor or None
        ``(B,)`` integers on the device: where each row's keys begin (left padding); None: at 0. May be set.
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self,
        layout: BandLayout,
        *,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        slack: int,
        max_length: int | None,
        count_on_host: bool,
        keeps_all: bool,
    ) -> None:
        if not isinstance(layout, BandLayout):
            raise TypeError(f"layout must be a BandLayout, got {type(layout).__name__}")
        layout.require_autoregressive("a cache")
        batch_size = require_int("batch_size", batch_size, 1)
        num_kv_heads = require_int("num_kv_heads", num_kv_heads, 1)
        head_dim = require_int("head_dim", head_dim, 1)
        slack = require_int("slack", slack, 0)
        if max_length is not None:
            max_length = require_int("max_length", max_length, 1)
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if layout.num_heads % num_kv_heads:
            raise ValueError(
                f"the query heads of the layout must be a multiple of num_kv_heads, got {layout.num_heads} "
                f"and {num_kv_heads}"
            )
        self._made_for = layout
        self.layout = layout if max_length is None or keeps_all else _within(layout, max_length)
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.slack = slack
        self.max_length = max_length
        with outlasting_inference():
            self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.starts: Tensor | None = None
        self._counts_on_host = count_on_host
        # How many keys each row has, where all have as many and the host knows it.
        self._length: int | None = 0 if count_on_host else None
        # How many it had at most: further back than `slack` from there, keys are overwritten.
        self._highest: int | Tensor = 0
        self._reach = _reach(self.layout, num_kv_heads)

    # --- what a cache holds ---------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def known_length(self) -> int | None:
        """How many keys each row has; None where only the device knows, which compiled code and rows of
        different lengths cause."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def serves(self, layout: BandLayout) -> bool:
        """Is the cache made for the bands of `layout`?"""
        return layout.spec == self._made_for.spec or layout.has_bands_of(self._made_for)

    def begin_rows(self, begin: Tensor) -> None:
        """Let the rows that have no key yet begin at these positions: what comes first is padded on the left.

        Parameters
        ----------
        begin : Tensor
            ``(B,)`` integers on the device.

        Raises
        ------
        TypeError
            Something other than integers.
        ValueError
            On the CPU, where a row has keys already and is told to begin behind them.
        """
        check_row_values("begin", begin, self.batch_size, self.lengths.device)
        if begin.device.type == "cpu" and has_values(begin):
            late = ((self.lengths > 0) & (begin > 0)).nonzero().flatten()
            if len(late):
                raise ValueError(
                    f"padding on the left belongs to a row's first tokens, and row {int(late[0])} has some "
                    f"already, {int(self.lengths[late[0]])}: begin at 0, or reset the cache"
                )
            if self.starts is None and not bool(begin.any()):
                return
        starts = torch.zeros_like(begin) if self.starts is None else self.starts
        self.starts = torch.where(self.lengths == 0, begin, starts)

    # --- appending and attending ----------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, *, counts: Tensor | None = None) -> None:
        """Store keys and values behind those of each row.

        Parameters
        ----------
        k, v : Tensor
            ``(B, Hkv, N, D)``, of the cache's dtype and device.
        counts : Tensor, optional
            ``(B,)`` integers on the device: how many of a row's N are its own, the first ones (padding on the
            right). From then on the host does not know the lengths.

        Raises
        ------
        ValueError
            Shapes that don't fit, a length beyond the layout's context or `max_length`, as far as the host
            knows it: of a cache on the CPU always, else where rows are of one length. Nothing is stored then.
        TypeError
            No tensors, another dtype.
        RuntimeError
            A gradient is asked for.
        """
        self._check(k, v, counts=counts)
        with self._turn(k.shape[2]):
            self._append(k, v, counts, self.starts)

    def _turn(self, count: int) -> AbstractContextManager[Any]:
        """Around what a call does with `count` valid tokens."""
        return nullcontext()

    def _append(self, k: Tensor, v: Tensor, counts: Tensor | None, starts: Tensor | None) -> None:
        count = k.shape[2]
        length = self._count(count, counts, starts)
        self._make_room(count)
        self._store(k, v, counts)
        self.lengths.add_(count if counts is None else counts)
        self._length = length

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        counts: Tensor | None = None,
        starts: Tensor | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Store keys and values, and attend with the queries of the same tokens to all that are needed.

        Parameters
        ----------
        q : Tensor
            ``(B, Hq, N, D)``. Few queries are served by ``banded_attention_decode`` from the cache itself;
            longer calls, a prompt among them, attend to what the cache has and to `k` before it is stored.
        k, v, counts
            As in `append`.
        scale : float, optional
            Factor of the scores, ``D**-0.5`` by default.
        starts : Tensor, optional
            ``(B,)`` integers on the device, for this call in place of the cache's `starts`.
        impl : str
            As in ``banded_attention``; ``"auto"`` or ``"reference"``.

        Returns
        -------
        Tensor
            ``(B, Hq, N, D)``.

        Raises
        ------
        RuntimeError
            A gradient is asked for.
        ValueError, TypeError
            As in `append`.
        """
        self._check(k, v, q, counts)
        with self._turn(k.shape[2]):
            return self._attend(q, k, v, scale, counts, starts, impl)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        counts: Tensor | None,
        starts: Tensor | None,
        impl: str,
    ) -> Tensor:
        if starts is None:
            starts = self.starts
        else:
            check_row_values("starts", starts, self.batch_size, self.lengths.device)
        count = q.shape[2]
        if count != k.shape[2]:
            raise ValueError(f"q, k and v must be of the same tokens, got {count} and {k.shape[2]}")
        if counts is None and count <= min(MAX_DECODE_QUERIES, self._most_at_once):
            self._append(k, v, None, starts)
            try:
                return banded_attention_decode(
                    q,
                    self.keys,
                    self.values,
                    self.layout,
                    cache_lengths=self.lengths,
                    cache_starts=starts,
                    scale=scale,
                    impl=impl,
                    **self._places(),
                )
            except BaseException:
                # Whoever makes the call again, as it should have been, must not find its keys there twice.
                self._go_back(count)
                raise
        self._count(count, counts, starts)
        o = self._attend_at_length(q, k, v, scale, counts, starts, impl)
        self._append(k, v, counts, starts)
        return o

    def _attend_at_length(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        counts: Tensor | None,
        starts: Tensor | None,
        impl: str,
    ) -> Tensor:
        length = None if self._is_host_blind() else self._length
        past = self._most_past if length is None else min(length, self._most_past)
        if past:
            position = torch.arange(-past, 0, device=self.lengths.device) + self.lengths[:, None]
            shape = (k.shape[0], k.shape[1], past, k.shape[3])
            past_k, past_v = self._read(position)
            k, v = torch.cat((past_k.view(shape), k), 2), torch.cat((past_v.view(shape), v), 2)
        places: dict[str, Any] = {}
        if length is None or starts is not None or counts is not None:
            # What lies before a row's first key may hold anything. The offset is the device's, so that nobody
            # takes it, or padding, for a position beyond the layout's context.
            places["kv_starts"] = (past if starts is None else starts + past) - self.lengths
            places["query_offset"] = torch.full_like(self.lengths, past)
        if counts is not None:
            places["kv_lengths"] = counts + past
        return banded_attention(q, k, v, self.layout, scale=scale, impl=impl, **places)

    def _check(self, k: Tensor, v: Tensor, q: Tensor | None = None, counts: Tensor | None = None) -> None:
        for name, tensor in (("k", k), ("v", v), ("q", k if q is None else q)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v)):
            raise RuntimeError("a cache has no gradient: attend under torch.no_grad() or without the cache")
        if k.shape != v.shape or k.dim() != 4:
            raise ValueError(
                f"k and v must have one shape (B, Hkv, N, D), got {tuple(k.shape)}, {tuple(v.shape)}"
            )
        batch, heads, count, head_dim = k.shape
        if (batch, heads, head_dim) != (self.batch_size, self.num_kv_heads, self.head_dim):
            raise ValueError(
                f"the cache holds a batch of {self.batch_size} with {self.num_kv_heads} heads of "
                f"{self.head_dim}, got k and v of {tuple(k.shape)}"
            )
        if k.dtype != self.keys.dtype or v.dtype != self.keys.dtype:
            raise TypeError(f"the cache holds {self.keys.dtype}, got k and v of {k.dtype} and {v.dtype}")
        device = self.keys.device
        if k.device != device or v.device != device:
            raise ValueError(f"the cache is on {device}, got k and v on {k.device} and {v.device}")
        if not count:
            raise ValueError(f"k and v must hold at least one token, got {tuple(k.shape)}")
        if counts is not None:
            check_row_values("counts", counts, batch, device)
            if (
                device.type == "cpu"
                and has_values(counts)
                and not 0 <= int(counts.min()) <= int(counts.max()) <= count
            ):
                raise ValueError(f"counts must be from 0 to the {count} tokens, got {counts.tolist()}")

    def _is_host_blind(self) -> bool:
        """Will what runs now run again without the host, which then can't count?"""
        return _is_compiling() or (self.keys.is_cuda and torch.cuda.is_current_stream_capturing())

    def _count(self, count: int, counts: Tensor | None, starts: Tensor | None) -> int | None:
        """The host's count after `count` more keys, None where it can't know; raises beyond the end."""
        if self._is_host_blind():
            return None
        length = None if self._length is None or counts is not None else self._length + count
        longest, tokens = length, length if starts is None else None
        if None in (longest, tokens) and self.lengths.is_cpu and has_values(self.lengths):
            ends = self.lengths + (count if counts is None else counts)
            longest = int(ends.max())
            tokens = longest if starts is None else max(0, int((ends - starts).max()))
        if tokens is not None:
            self.layout.check_length(tokens)
        if longest is not None and self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a sequence of {longest} is longer than the cache's max_length {self.max_length}"
            )
        return length

    def _store(self, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
        count = k.shape[2]
        position = self.lengths[:, None]
        if count > 1:
            position = position + torch.arange(count, device=position.device)
        rows = self._kept(self._rows_of(position), count, counts).reshape(-1)
        for memory, new in ((self.keys, k), (self.values, v)):
            # Projections leave tokens before heads in memory, which this order copies without another copy.
            memory.view(-1, self.head_dim).index_copy_(
                0, rows, new.transpose(1, 2).reshape(-1, self.head_dim)
            )

    # --- rows of the batch, and back ------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` of each row, as far as the cache still holds what came before them.

        Where only the device knows the lengths, the host waits for them here.

        Raises
        ------
        TypeError
            Something other than an integer.
        ValueError
            More than a row has, or together with earlier ones more than the cache's slack.
        """
        tokens = require_int("the number of tokens to forget", tokens, 0)
        if not tokens:
            return
        highest = self._highest_yet()
        if self._length is not None and isinstance(highest, int):
            length, back = self._length - tokens, highest - self._length + tokens
        else:
            length = int(self.lengths.min()) - tokens
            back = int((highest - self.lengths).max()) + tokens
        if length < 0:
            raise ValueError(f"crop of {tokens} tokens: a row has only {length + tokens}")
        if back > self.slack:
            raise ValueError(
                f"the cache goes back at most slack={self.slack} tokens from the longest it was, got {back}: "
                f"make it with slack={back}"
            )
        self._go_back(tokens)

    def _highest_yet(self) -> int | Tensor:
        if self._length is not None and isinstance(self._highest, int):
            return max(self._highest, self._length)
        return torch.maximum(self.lengths, torch.as_tensor(self._highest, device=self.lengths.device))

    def _go_back(self, tokens: int) -> None:
        self._highest = self._highest_yet()
        self.lengths.sub_(tokens)
        if self._length is not None:
            self._length -= tokens

    def reset(self) -> None:
        """Forget everything; the memory stays where it is."""
        self.lengths.zero_()
        self.starts = None
        self._length = 0 if self._counts_on_host else None
        self._highest = 0

    def reorder(self, indices: Tensor) -> None:
        """Let row b continue what row ``indices[b]`` has seen (beam search); the memory stays where it is.

        Parameters
        ----------
        indices : Tensor
            ``(B,)`` integers.

        Raises
        ------
        TypeError
            Something other than int32 or int64.
        ValueError
            Another shape; on the CPU, a row that is not there.
        """
        indices = self.check_rows(indices)
        if indices.shape != self.lengths.shape:
            raise ValueError(f"reorder takes one index a row, {self.batch_size}, got {tuple(indices.shape)}")
        self._take_rows(indices, in_place=True)

    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices`, ``(B',)`` integers, in their order; one may come several times.

        Raises as `reorder`, and for no row at all.
        """
        self._take_rows(self.check_rows(indices), in_place=False)

    def repeat(self, repeats: int) -> None:
        """Make `repeats` rows of each, side by side."""
        repeats = require_int("repeats", repeats, 1)
        rows = torch.arange(self.batch_size, device=self.lengths.device)
        self._take_rows(rows.repeat_interleave(repeats), in_place=False)

    def check_rows(self, indices: Any) -> Tensor:
        """The indices of rows on the cache's device; raises as `reorder`, and for no row at all."""
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
            got = getattr(indices, "dtype", type(indices).__name__)
            raise TypeError(f"indices must be a tensor of int32 or int64, got {got}")
        if indices.dim() != 1 or not indices.shape[0]:
            raise ValueError(f"indices must have shape (rows,) of at least one, got {tuple(indices.shape)}")
        indices = indices.to(self.lengths.device)
        if indices.is_cpu and has_values(indices):
            batch = self.batch_size
            if not 0 <= int(indices.min()) <= int(indices.max()) < batch:
                raise ValueError(f"indices must name rows from 0 to {batch - 1}, got {indices.tolist()}")
        return indices

    def _take_rows(self, indices: Tensor, in_place: bool) -> None:
        with outlasting_inference():
            self._take_memory(indices, in_place)
        self._take_lengths(indices, in_place)

    def _take_lengths(self, indices: Tensor, in_place: bool) -> None:
        with outlasting_inference():
            lengths = self.lengths.index_select(0, indices)
            self.lengths = self.lengths.copy_(lengths) if in_place else lengths
        if self.starts is not None:
            self.starts = self.starts.index_select(0, indices)
        if isinstance(self._highest, Tensor):
            self._highest = self._highest.index_select(0, indices)

    # --- what differs ---------------------------------------------------------------------------------------

    _most_at_once: int
    """How many queries may attend after their own keys are stored."""

    @property
    def _most_past(self) -> int:
        """How many of the keys before a call any of its queries can need."""
        return max(self._reach)

    @abstractmethod
    def _places(self) -> dict[str, Tensor]:
        """Further arguments of ``banded_attention_decode``."""

    @abstractmethod
    def _make_room(self, count: int) -> None:
        """Have memory for so many more keys a row."""

    @abstractmethod
    def _rows_of(self, position: Tensor) -> Tensor:
        """Where positions ``(B, N)`` lie: ``(B, N, Hkv)`` rows of the memory as rows of ``D``."""

    def _read(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B * Hkv * N, D)`` of positions ``(B, N)``."""
        rows = self._rows_of(position).transpose(1, 2).reshape(-1)
        keys, values = (
            memory.view(-1, self.head_dim).index_select(0, rows) for memory in (self.keys, self.values)
        )
        return keys, values

    @abstractmethod
    def _take_memory(self, indices: Tensor, in_place: bool) -> None: ...

    def _kept(self, rows: Tensor, count: int, counts: Tensor | None) -> Tensor:
        """`rows`, with others for what is not to be kept."""
        return rows


class BandedCache(KeyValueCache):
    """The keys that the bands of a layer can still need, each key/value head's as a ring.

    Position p of head g lies in row ``base[g] + p % capacity[g]`` of ``keys`` and ``values``, ``(B, R, D)``,
    with ``capacity[g]`` one more than the largest distance that a query head of g attends to, and `slack`
    more. SPAttention with 16 query heads needs 0.53 of a dense cache with 16 key/value heads, 0.56 with 8.

    Works under ``torch.compile`` and in CUDA graphs, where only the device counts: no address and no shape
    changes from call to call. With ``count_on_host=False`` a compiled step is not compiled again for the sake
    of a count.

    Parameters
    ----------
    layout : BandLayout
        Autoregressive bands of the query heads.
    batch_size, num_kv_heads, head_dim : int
    dtype : torch.dtype
    device : torch.device or str
    slack : int
        How many tokens `crop` may go back. Calls of up to ``slack + 1`` tokens are served from the ring.
    max_length : int, optional
        Longest sequence, where that is less than the layout's context length or there is none: ``causal``
        without a context length needs it.
    count_on_host : bool
        Whether the host keeps a count of its own, with which it checks lengths and reads no more than there
        is.

    Raises
    ------
    ValueError
        A layout that is not autoregressive, ``causal`` without an end, sizes that don't fit.
    TypeError
        No layout, sizes that are no integers, a dtype that isn't attended to.

    Examples
    --------
    >>> layout = BandLayout.spattention(16, 4096)
    >>> cache = BandedCache(layout, batch_size=1, num_kv_heads=16, head_dim=64)
    >>> prompt = [torch.randn(1, 16, 100, 64) for _ in range(3)]
    >>> cache.attend(*prompt).shape
    torch.Size([1, 16, 100, 64])
    """

    def __init__(
        self,
        layout: BandLayout,
        *,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        slack: int = MAX_DECODE_QUERIES - 1,
        max_length: int | None = None,
        count_on_host: bool = True,
    ) -> None:
        if getattr(layout, "is_autoregressive", False) and layout.depends_on_length and max_length is None:
            raise ValueError(
                f"a cache for {layout.spec} needs a max_length: its heads attend to every key there is"
            )
        super().__init__(
            layout,
            batch_size=batch_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            slack=slack,
            max_length=max_length,
            count_on_host=count_on_host,
            keeps_all=False,
        )
        capacity, last = self._ring_sizes()
        base = [sum(capacity[:g]) for g in range(num_kv_heads)]
        self._least_kept = min(last)
        self._most_at_once = slack + 1
        self.ring = torch.tensor(list(zip(base, capacity, strict=True)), dtype=torch.int32, device=device)
        self._capacity = torch.tensor(capacity, device=device)
        self._last = torch.tensor(last, device=device)
        # The last row takes what is not kept, so that nothing need be known about how much that is.
        self._rows = sum(capacity) + 1
        self._place_rows(batch_size)
        self._allocate(batch_size, dtype)

    def _ring_sizes(self) -> tuple[list[int], list[int]]:
        """Of each key/value head: rows of its ring, and how many of the last keys are stored there."""
        capacity = [reach + 1 + self.slack for reach in self._reach]
        return capacity, capacity

    def _allocate(self, batch_size: int, dtype: torch.dtype) -> None:
        shape = (batch_size, self._rows, self.head_dim)
        with outlasting_inference():
            self.keys = torch.empty(shape, dtype=dtype, device=self.lengths.device)
            self.values = torch.empty_like(self.keys)

    def _place_rows(self, batch_size: int) -> None:
        first = torch.arange(batch_size, device=self.ring.device)[:, None, None] * self._rows
        self._first = first + self.ring[:, 0].long()
        self._spare = first + self._rows - 1

    def _places(self) -> dict[str, Tensor]:
        return {"ring": self.ring}

    def _make_room(self, count: int) -> None:
        pass  # rings have theirs from the beginning

    def _rows_of(self, position: Tensor) -> Tensor:
        return position[:, :, None] % self._capacity + self._first

    def _kept(self, rows: Tensor, count: int, counts: Tensor | None) -> Tensor:
        if counts is None and count <= self._least_kept:
            return rows
        token = torch.arange(count, device=rows.device)[:, None]
        return rows_of_last(self._last, rows, token, count if counts is None else counts, self._spare)

    def _take_memory(self, indices: Tensor, in_place: bool) -> None:
        for name in ("keys", "values"):
            memory: Tensor = getattr(self, name)
            taken = memory.index_select(0, indices)
            setattr(self, name, memory.copy_(taken) if in_place else taken)
        if not in_place:
            self._place_rows(indices.shape[0])


class PagedCache(KeyValueCache):
    """All keys of a layer, in pages that are allocated as rows grow.

    ``keys`` and ``values`` are ``(pages, Hkv, page_size, D)``; ``block_table``, int32 ``(B, max_pages)``,
    says which page holds the positions from ``page_size * i`` on. Under ``torch.compile`` and in CUDA graphs
    nothing can be allocated: give `max_length`.

    Parameters
    ----------
    layout, batch_size, num_kv_heads, head_dim, dtype, device, count_on_host
        As in `BandedCache`.
    page_size : int
        Tokens a page, 16 to 256.
    max_length : int, optional
        Longest sequence; pages for it are allocated at once.

    Raises
    ------
    ValueError, TypeError
        As in `BandedCache`, and a page size out of bounds.
    """

    _most_at_once = MAX_DECODE_QUERIES

    def __init__(
        self,
        layout: BandLayout,
        *,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_size: int = 64,
        max_length: int | None = None,
        count_on_host: bool = True,
    ) -> None:
        super().__init__(
            layout,
            batch_size=batch_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            slack=LIMIT,
            max_length=max_length,
            count_on_host=count_on_host,
            keeps_all=True,
        )
        page_size = require_int("page_size", page_size, MIN_PAGE_SIZE, MAX_PAGE_SIZE)
        self.page_size = page_size
        self.keys = torch.empty((0, num_kv_heads, page_size, head_dim), dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.block_table = torch.empty((batch_size, 0), dtype=torch.int32, device=device)
        self._head = torch.arange(num_kv_heads, device=device)
        # No row has more keys than this.
        self._longest = 0
        self._allocate(max_length or 0)

    def _allocate(self, length: int) -> None:
        """Pages for rows of `length`; earlier ones keep their numbers and contents."""
        batch, had = self.block_table.shape
        more = -(-length // self.page_size) - had
        if more <= 0:
            return
        first = self.keys.shape[0]
        device = self.keys.device
        pages = torch.arange(first, first + batch * more, dtype=torch.int32, device=device)
        self.block_table = torch.cat((self.block_table, pages.view(batch, more)), 1)
        with outlasting_inference():
            new = self.keys.new_empty((batch * more, *self.keys.shape[1:]))
            self.keys = torch.cat((self.keys, new))
            self.values = torch.cat((self.values, new))

    def _make_room(self, count: int) -> None:
        if self.max_length is not None:
            return
        if self._is_host_blind():
            raise ValueError("pages can't be allocated in compiled code or a CUDA graph: give max_length")
        longest = self._longest + count
        if longest > self.block_table.shape[1] * self.page_size:
            # Pages for half as many more: copying what there is to make room costs a constant a token.
            most = self.layout.context_length or LIMIT
            self._allocate(max(longest, min(longest + longest // 2, most)))
        self._longest = longest

    @property
    def _most_past(self) -> int:
        return min(super()._most_past, self.block_table.shape[1] * self.page_size)

    def _places(self) -> dict[str, Tensor]:
        return {"block_table": self.block_table}

    def _rows_of(self, position: Tensor) -> Tensor:
        last = self.block_table.shape[1] * self.page_size - 1
        position = position.clamp(0, last)
        page = self.block_table.gather(1, position // self.page_size).long()
        head_row = (page[:, :, None] * self.num_kv_heads + self._head) * self.page_size
        return head_row + (position % self.page_size)[:, :, None]

    def _go_back(self, tokens: int) -> None:
        super()._go_back(tokens)
        self._longest -= tokens if self.max_length is None else 0

    def reset(self) -> None:
        super().reset()
        self._longest = 0

    def _take_memory(self, indices: Tensor, in_place: bool) -> None:
        pages = self.block_table.index_select(0, indices)
        if in_place:
            for memory in (self.keys, self.values):
                memory[self.block_table.flatten()] = memory.index_select(0, pages.flatten())
            return
        self.keys = self.keys.index_select(0, pages.flatten())
        self.values = self.values.index_select(0, pages.flatten())
        numbers = torch.arange(pages.numel(), dtype=torch.int32, device=pages.device)
        self.block_table = numbers.view(pages.shape)
