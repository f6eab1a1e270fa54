"""Caches of several layers whose far keys wait in host memory, so that the device holds what steps read.

Between a head's near window and its far share keys wait, and nothing reads them. Here the host keeps, in
pinned memory, every key that the bands can still need, and the device the near window and the far share of
each key/value head alone, in one ring of rows: it is so small that it turns several times between the two,
and just large enough that no two keys which are needed share a row. Each step a row a head comes back, before
the first step that reads it: one gather for all layers, on a stream beside the step. A layer by itself would
wait for the bus longer than it attends (docs/generation.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, overload
from weakref import finalize

import torch
from torch import Tensor

from .bands import LIMIT, BandLayout, require_int
from .cache import BandedCache, outlasting_inference, rows_of_last
from .cache_forms import least_capacity, merged
from .problem import MAX_DECODE_QUERIES

# Of a batch's host memory, how much is on its way when its rows change places: 64 MiB of bfloat16 at D = 128.
_ROWS_ON_THEIR_WAY = 1 << 17


class _Ring(NamedTuple):
    """The rows of a key/value head on the device."""

    capacity: int
    near: int  # how many of the last keys are stored there
    far: list[tuple[int, int]]  # distances from the last key of those that come back from the host


def _ring_of(layout: BandLayout, heads: range, slack: int, ahead: int) -> _Ring:
    """The ring for some of a layout's query heads, which `ahead` rows come back early for."""
    spans = [(0, slack)]
    for head in layout.bands(LIMIT)[heads.start : heads.stop]:
        spans += [(max(0, low - ahead), high + slack) for low, high in head]
    near, *far = merged(spans)
    capacity = least_capacity([near, *far])
    if far and capacity > far[-1][1]:  # whatever is stored there stays as long as it is needed
        return _Ring(capacity, capacity, [])
    return _Ring(capacity, near[1] + 1, far)


class _Lanes(NamedTuple):
    """Where keys lie, on the device and on the host: int64 ``(X,)``, for each head of some layers, or for
    each of its spans of far keys.
    """

    first: Tensor  # row of the ring's first key in batch row 0, among all rows of the device's memory
    capacity: Tensor
    rows: Tensor  # from batch row to batch row
    to_value: Tensor  # from a key's row to its value's
    spare: Tensor  # for keys that are not there
    host_first: Tensor
    host_capacity: Tensor
    host_rows: Tensor
    low: Tensor  # distances from the last key
    high: Tensor

    def device_rows(self, position: Tensor) -> Tensor:
        """Rows of the keys at positions ``(B, N, X)``."""
        batch = torch.arange(position.shape[0], device=position.device)[:, None, None]
        return self.first + batch * self.rows + position % self.capacity

    def pairs(self, rows: Tensor) -> Tensor:
        """Each key's row and its value's, one behind the other."""
        return torch.stack((rows, rows + self.to_value), -1).reshape(-1)

    def host_rows_of(self, position: Tensor) -> Tensor:
        """Rows on the host of the pairs at positions ``(B, N, X)``, one behind the other."""
        batch = torch.arange(position.shape[0], device=position.device)[:, None, None]
        return (self.host_first + batch * self.host_rows + position % self.host_capacity).reshape(-1)


class _Mapped:
    """What torch makes a CUDA tensor of that lies in pinned host memory; it keeps this with the tensor."""

    def __init__(self, pinned: Tensor) -> None:
        self._pinned = pinned
        # Bytes, since the interface has no name for bfloat16.
        self.__cuda_array_interface__ = {
            "shape": (pinned.nbytes,),
            "typestr": "|u1",
            "data": (pinned.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


class _HostMemory:
    """Rows in host memory, as the device sees them.

    Parameters
    ----------
    rows, columns : int
    dtype : torch.dtype
    device : torch.device
        Memory is pinned for a CUDA device, and its own for others.

    Raises
    ------
    RuntimeError
        The device can't read pinned memory in place.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        if device.type != "cuda":
            self.seen = torch.empty((rows, columns), dtype=dtype, device=device)
            return
        with torch.cuda.device(device):
            pinned = torch.empty((rows, columns), dtype=dtype, pin_memory=True)
            seen = torch.as_tensor(_Mapped(pinned), device=device)
        if seen.data_ptr() != pinned.data_ptr():
            raise RuntimeError(f"{device} can't read pinned host memory in place, where far keys wait")
        self.seen = seen.view(dtype).view(rows, columns)
        finalize(self, _let_copies_end, pinned, device).atexit = False


def _let_copies_end(pinned: Tensor, device: torch.device) -> None:
    """Keep freed pinned memory from others until what runs on the device's current stream is done with it."""
    if not torch.cuda.is_current_stream_capturing():
        # The host's allocator waits for copies that it knows of, and for nothing else.
        copied = torch.empty(1, dtype=pinned.dtype, device=device)
        copied.copy_(pinned.view(-1)[:1], non_blocking=True)


def _copy_rows(to: Tensor, source: Tensor, indices: Tensor) -> None:
    """Make the rows `indices` of host memory ``(B, rows, 2 * D)`` the rows of another, or of the same."""
    most = max(1, _ROWS_ON_THEIR_WAY // max(len(source), len(to)))
    for part, of in zip(to.split(most, 1), source.split(most, 1), strict=True):
        part.copy_(of.index_select(0, indices))


class _Together:
    """What the layers of offloaded caches have in common: memory, turns, a stream beside their steps."""

    def __init__(self, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self._layers = layers
        self._dtype = dtype
        self._device = device
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._is_forked = False
        # Whose turn it is; of the step, how many tokens it has and how many keys came before them.
        self._next = 0
        self._tokens = 0
        self._length: int | None = 0

    def __reduce__(self) -> Any:
        raise TypeError(
            "offloaded caches can't be copied or pickled: their layers share host memory that a device reads "
            "in place"
        )

    # --- memory ---------------------------------------------------------------------------------------------

    def allocate(self, layers: Sequence[OffloadedLayer], batch: int) -> None:
        """Memory for all layers, and where in it each layer, head and far span has its rows."""
        head_dim = layers[0].head_dim
        sizes = [(layer.ring_rows, sum(layer.host_sizes) + 1) for layer in layers]
        rows, host_rows = (batch * sum(each) for each in zip(*sizes, strict=True))
        self._memory = torch.empty((2 * rows, head_dim), dtype=self._dtype, device=self._device)
        self.host_memory = _HostMemory(host_rows, 2 * head_dim, self._dtype, self._device)
        self._host = self.host_memory.seen
        heads: list[list[int]] = []
        spans: list[list[int]] = []
        begin = host_begin = 0
        for layer, (rows, host_rows) in zip(layers, sizes, strict=True):
            end, host_end = begin + 2 * batch * rows, host_begin + batch * host_rows
            both = self._memory[begin:end].view(2, batch, rows, head_dim)
            host = self._host[host_begin:host_end].view(batch, host_rows, -1)
            layer_spans = []
            first, host_first = begin, host_begin
            for ring, size in zip(layer.rings, layer.host_sizes, strict=True):
                lane = [
                    first,
                    ring.capacity,
                    rows,
                    batch * rows,
                    begin + rows - 1,
                    host_first,
                    size,
                    host_rows,
                ]
                heads.append([*lane, 0, 0])
                layer_spans += [[*lane, *span] for span in ring.far]
                first, host_first = first + ring.capacity, host_first + size
            layer.place(both[0], both[1], host, self._lanes(layer_spans))
            spans += layer_spans
            begin, host_begin = end, host_end
        self._heads, self._far = self._lanes(heads), self._lanes(spans)
        if self._beside is not None:
            # Freed in the middle of a step, this is not another's before the stream is done with it.
            self._memory.record_stream(self._beside)

    def _lanes(self, rows: list[list[int]]) -> _Lanes:
        table = torch.tensor(rows, dtype=torch.int64).view(-1, len(_Lanes._fields))
        return _Lanes(*table.to(self._device).unbind(1))

    # --- a step ---------------------------------------------------------------------------------------------

    @contextmanager
    def turn_of(self, layer: OffloadedLayer, count: int) -> Iterator[None]:
        """A layer's part of a step, which is over unless it raises.

        Raises
        ------
        ValueError
            Another layer's turn, other tokens than the layers before had, or compiled code.
        """
        if torch.compiler.is_compiling():
            raise ValueError(
                "offloaded caches can't be traced by torch.compile, whose graphs have no stream beside them: "
                "capture steps in a CUDA graph, or use a BandedCache"
            )
        if layer.index != self._next:
            raise ValueError(
                f"offloaded caches take turns, from the first layer to the last in each step: it is layer "
                f"{self._next}'s turn, got layer {layer.index}; reset them after a step that was given up"
            )
        if layer.index == 0:
            self._tokens, self._length = count, layer.known_length
        if count != self._tokens or layer.known_length != self._length:
            raise ValueError(
                f"all layers of offloaded caches see the same tokens: layer 0 got {self._tokens} after "
                f"{self._length}, layer {layer.index} {count} after {layer.known_length}"
            )
        yield
        self._next = (self._next + 1) % self._layers
        if not self._next:
            self._join()

    def move_rows(self, layer: OffloadedLayer, count: int) -> None:
        """What goes on beside a step of `count` keys, which a layer has stored.

        With the first layer rows come for the next steps, with the last one those of this step go.
        """
        if layer.index == 0 and len(self._far.low):
            with self._beside_the_step():
                self.fetch(self._far, count, layer.lengths)
        if layer.index == self._layers - 1:
            with self._beside_the_step():
                self._send(count, layer.lengths)

    def _beside_the_step(self) -> AbstractContextManager[Any]:
        if self._beside is None:
            return nullcontext()
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        self._is_forked = True
        return torch.cuda.stream(self._beside)

    def _join(self) -> None:
        if self._is_forked:
            torch.cuda.current_stream(self._device).wait_stream(self._beside)
            self._is_forked = False

    def fetch(self, far: _Lanes, count: int, lengths: Tensor) -> None:
        """Bring the `count` rows that came last within each far span's distances from the last key."""
        distance = far.low + torch.arange(count, device=self._device)[:, None]
        position = lengths[:, None, None] - 1 - distance
        is_there = (position >= 0) & (distance <= far.high)
        rows = torch.where(is_there, far.device_rows(position), far.spare)
        pairs = self._host.index_select(0, far.host_rows_of(position))
        self._memory.index_copy_(0, far.pairs(rows), pairs.view(-1, self._memory.shape[1]))

    def _send(self, count: int, lengths: Tensor) -> None:
        """Let the host have the last `count` rows of each head."""
        position = lengths[:, None, None] - count + torch.arange(count, device=self._device)[:, None]
        rows = self._heads.device_rows(position)
        pairs = self._memory.index_select(0, self._heads.pairs(rows))
        self._host.index_copy_(0, self._heads.host_rows_of(position), pairs.view(-1, self._host.shape[1]))

    def check_between_steps(self) -> None:
        """Raise a ValueError in the middle of a step."""
        if self._next:
            raise ValueError(
                f"a step ends with the last layer, and it is layer {self._next}'s turn: end it, or reset the "
                "caches"
            )

    def begin_again(self) -> None:
        """Give up a step."""
        self._join()
        self._next = 0


class OffloadedLayer(BandedCache):
    """The cache of one layer of :class:`OffloadedCaches`, which makes it.

    It is used as any :class:`~spattn_tvm.BandedCache`, the layers of a step in their turn: ``append`` and
    ``attend`` raise a ValueError too where it is another layer's. ``keys`` and ``values`` are what the device
    keeps.
    """

    def __init__(self, together: _Together, index: int, layout: BandLayout, **settings: Any) -> None:
        self._together = together
        self.index = index
        self.host = torch.empty(0)
        super().__init__(layout, **settings)
        self._most_at_once = min(self._most_at_once, MAX_DECODE_QUERIES)

    def _ring_sizes(self) -> tuple[list[int], list[int]]:
        ahead = min(self.slack + 1, MAX_DECODE_QUERIES)
        group = self.layout.num_heads // self.num_kv_heads
        self.rings = [
            _ring_of(self.layout, range(g * group, (g + 1) * group), self.slack, ahead)
            for g in range(self.num_kv_heads)
        ]
        self.host_sizes = [reach + 1 + self.slack for reach in self._reach]
        return [ring.capacity for ring in self.rings], [ring.near for ring in self.rings]

    def _allocate(self, batch_size: int, dtype: torch.dtype) -> None:
        pass  # one memory holds the rows of all layers

    @property
    def ring_rows(self) -> int:
        """Rows of a batch row on the device, one for what is not kept among them."""
        return self._rows

    def place(self, keys: Tensor, values: Tensor, host: Tensor, far: _Lanes) -> None:
        """Take one's part of the memory of all layers; `host` is ``(B, rows, 2 * D)``."""
        self.keys, self.values, self.host = keys, values, host
        self._far = far
        batch, device = keys.shape[0], keys.device
        self._place_rows(batch)
        base = [sum(self.host_sizes[:g]) for g in range(self.num_kv_heads)]
        first = torch.arange(batch, device=device)[:, None, None] * host.shape[1]
        self._host_capacity = torch.tensor(self.host_sizes, device=device)
        self._host_first = first + torch.tensor(base, device=device)
        self._host_spare = first + host.shape[1] - 1

    @property
    def host_nbytes(self) -> int:
        """Bytes of the keys and values that the host keeps."""
        return self.host.nbytes

    # --- a step ---------------------------------------------------------------------------------------------

    def _turn(self, count: int) -> AbstractContextManager[Any]:
        return self._together.turn_of(self, count)

    def _append(self, k: Tensor, v: Tensor, counts: Tensor | None, starts: Tensor | None) -> None:
        super()._append(k, v, counts, starts)
        if counts is None and k.shape[2] <= self._most_at_once:
            self._together.move_rows(self, k.shape[2])
        else:
            longest = max((high - low + 1 for ring in self.rings for low, high in ring.far), default=0)
            self._together.fetch(self._far, min(k.shape[2], longest), self.lengths)

    def _store(self, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
        super()._store(k, v, counts)
        count = k.shape[2]
        if counts is None and count <= self._most_at_once:
            return  # the rows of all layers go to the host together
        # Rows that nobody will need need not go over the bus.
        most = count if counts is not None else min(count, max(self.host_sizes))
        token = torch.arange(count - most, count, device=k.device)[:, None]
        there = count if counts is None else counts
        position = self.lengths[:, None, None] + token
        rows = position % self._host_capacity + self._host_first
        rows = rows_of_last(self._host_capacity, rows, token, there, self._host_spare)
        pairs = torch.cat((k[:, :, count - most :], v[:, :, count - most :]), 3).transpose(1, 2)
        self.host.view(-1, 2 * self.head_dim).index_copy_(
            0, rows.reshape(-1), pairs.reshape(-1, 2 * self.head_dim)
        )

    def _read(self, position: Tensor) -> tuple[Tensor, Tensor]:
        rows = position[:, :, None] % self._host_capacity + self._host_first
        pairs = self.host.view(-1, 2 * self.head_dim).index_select(0, rows.transpose(1, 2).reshape(-1))
        keys, values = pairs.split(self.head_dim, 1)
        return keys, values

    # --- rows of the batch ----------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """As of :class:`~spattn_tvm.BandedCache`; between two steps, of all layers."""
        self._together.check_between_steps()
        super().crop(tokens)

    def reset(self) -> None:
        super().reset()
        self._together.begin_again()

    def select(self, indices: Tensor) -> None:
        """Refused: one memory holds the rows of all layers, see ``OffloadedCaches.select``."""
        self._refuse_alone("select")

    def repeat(self, repeats: int) -> None:
        """Refused: one memory holds the rows of all layers, see ``OffloadedCaches.repeat``."""
        self._refuse_alone("repeat")

    def _refuse_alone(self, name: str) -> None:
        raise ValueError(
            f"{name} changes the batch, which the layers of offloaded caches have in common: call it on the "
            "OffloadedCaches"
        )

    def _take_memory(self, indices: Tensor, in_place: bool) -> None:
        self._together.check_between_steps()
        super()._take_memory(indices, in_place)
        _copy_rows(self.host, self.host, indices)

    def take_from(self, keys: Tensor, values: Tensor, host: Tensor, indices: Tensor) -> None:
        """Continue the rows `indices` of the memory that was this layer's."""
        self.keys.copy_(keys.index_select(0, indices))
        self.values.copy_(values.index_select(0, indices))
        _copy_rows(self.host, host, indices)
        self._take_lengths(indices, in_place=False)


class OffloadedCaches(Sequence[OffloadedLayer]):
    """Caches of a model's layers, made together; keys that no step reads yet wait in host memory.

    ``caches[i]`` is the cache of layer i, for ``attend``, ``append`` and ``BandedAttention(..., cache=)``. In
    each step the layers take turns, from the first to the last, each with as many tokens. The device keeps
    the near window and the far share of each key/value head, 0.15 of a dense cache for SPAttention with 16
    heads of keys, 0.24 with 8; the host what :class:`~spattn_tvm.BandedCache` keeps, in pinned memory where
    the device is a GPU (PyTorch takes a power of two of bytes there).

    Calls of up to 16 and ``slack + 1`` tokens read the device alone: the rows that later ones need come
    beside them, on a stream that forks from the current one in the first layer and joins it after the last.
    The host waits for nothing, and a CUDA graph may hold whole steps, of all layers. A longer call brings
    what its layer can need over the bus, to the device as long as it lasts. ``torch.compile`` does not trace
    any of this.

    Parameters
    ----------
    layouts : sequence of BandLayout
        Autoregressive bands of each layer.
    batch_size, num_kv_heads, head_dim, dtype, device, slack, max_length, count_on_host
        As of :class:`~spattn_tvm.BandedCache`, and the same for all layers.

    Raises
    ------
    ValueError, TypeError
        As of :class:`~spattn_tvm.BandedCache`, and no layer at all.
    RuntimeError
        A device that can't read pinned host memory in place.

    Examples
    --------
    >>> caches = OffloadedCaches(
    ...     [BandLayout.spattention(16, 4096)] * 2, batch_size=1, num_kv_heads=16, head_dim=64
    ... )
    >>> for cache in caches:
    ...     o = cache.attend(*(torch.randn(1, 16, 100, 64) for _ in range(3)))
    >>> caches.known_length
    100
    """

    def __init__(
        self,
        layouts: Sequence[BandLayout],
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
        if isinstance(layouts, (BandLayout, str)) or not len(layouts):
            raise ValueError(f"layouts must be those of one layer or more, got {layouts!r}")
        device = torch.empty(0, device=device).device
        self._together = _Together(len(layouts), dtype, device)
        self._layers = [
            OffloadedLayer(
                self._together,
                index,
                layout,
                batch_size=batch_size,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                device=device,
                slack=slack,
                max_length=max_length,
                count_on_host=count_on_host,
            )
            for index, layout in enumerate(layouts)
        ]
        with outlasting_inference():
            self._together.allocate(self._layers, self._layers[0].batch_size)

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> OffloadedLayer: ...
    @overload
    def __getitem__(self, index: slice) -> list[OffloadedLayer]: ...
    def __getitem__(self, index: int | slice) -> OffloadedLayer | list[OffloadedLayer]:
        return self._layers[index]

    def __iter__(self) -> Iterator[OffloadedLayer]:
        return iter(self._layers)

    @property
    def batch_size(self) -> int:
        return self._layers[0].batch_size

    @property
    def lengths(self) -> Tensor:
        """``(B,)`` int64 on the device: how many keys each row has seen, those of the first layer."""
        return self._layers[0].lengths

    @property
    def known_length(self) -> int | None:
        """How many keys each row has; None where only the device knows."""
        return self._layers[0].known_length

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values on the device."""
        return sum(layer.nbytes for layer in self)

    @property
    def host_nbytes(self) -> int:
        """Bytes of the keys and values in host memory."""
        return sum(layer.host_nbytes for layer in self)

    # --- rows of the batch, and back ------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` of each row in all layers; as of :class:`~spattn_tvm.BandedCache`."""
        for layer in self:
            layer.crop(tokens)

    def reset(self) -> None:
        """Forget everything, and a step that was not ended; the memory stays where it is."""
        for layer in self:
            layer.reset()

    def reorder(self, indices: Tensor) -> None:
        """Let row b continue what row ``indices[b]`` has seen (beam search); the memory stays where it is.

        All rows of the host go over the bus and back.
        """
        for layer in self:
            layer.reorder(indices)

    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices`, ``(B',)`` integers, in their order; one may come several times."""
        indices = self._layers[0].check_rows(indices)
        self._together.check_between_steps()
        held = self._together.host_memory  # until its rows were read
        before = [(layer.keys, layer.values, layer.host) for layer in self]
        with outlasting_inference():
            self._together.allocate(self._layers, len(indices))
        for layer, memories in zip(self, before, strict=True):
            layer.take_from(*memories, indices)
        del held

    def repeat(self, repeats: int) -> None:
        """Make `repeats` rows of each, side by side."""
        repeats = require_int("repeats", repeats, 1)
        self.select(torch.arange(self.batch_size, device=self.lengths.device).repeat_interleave(repeats))
