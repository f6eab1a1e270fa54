"""Eager steps of decoding past the dispatcher: one that resembles an earlier one is launched with what was
found then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from spattn_tvm.bands import BandLayout
from spattn_tvm.cache_forms import CachePlaces, rings_suffice
from spattn_tvm.dispatch import call_on_change
from spattn_tvm.launch import Decode, ready_decode
from spattn_tvm.torch_private import (
    count_dispatch_modes,
    current_stream,
    guard_inputs,
    has_function_mode,
    is_capturing,
    is_forward_mode,
    is_profiling,
)

from .band_tables import call_when_dropped, find_cache_domain, narrowed
from .decode_operator import find_decode_kernel
from .repeated_calls import CallCounts, make_room

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What serves steps like an earlier one, which was plain, valid and without gradient."""

    # Whether the tensors are like those of the earlier step, in all that does not lie in their values.
    serves: Callable[..., bool]
    launch: Decode
    scale: float
    # The largest length, and on a CPU the largest that needs no further check.
    capacity: int
    longest: int
    cache_starts: Tensor
    block_table: Tensor
    ring: Tensor
    # On a CPU, the values of rings that suffice whatever the lengths; they are compared in each step.
    ring_values: list[list[int]]
    index: int
    stream: int


_Key = tuple[str, str, torch.Size, torch.Size, tuple[bool, ...]]


def _key(layout: str, impl: str, q: Tensor, k_cache: Tensor, places: tuple[Any, ...]) -> _Key:
    _, starts, table, ring = places
    return layout, impl, q.shape, k_cache.shape, (starts is not None, table is not None, ring is not None)


_prepared: dict[_Key, _Prepared] = {}
# A cache that grows by a row a step has a shape that doesn't come again.
_counts = CallCounts()

call_on_change(_prepared.clear)
call_when_dropped(_prepared.clear)


def remember_step(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, places: CachePlaces, layout: str, impl: str
) -> None:
    """Let `decode_again` serve steps like this one, which was plain, valid and without gradient."""
    index = q.get_device()
    tensors = [q, k_cache, v_cache, *(place for place in places if place is not None)]
    if index < 0 and places.block_table is not None:
        return  # `decode_again` leaves it to the checks of its values
    if index < 0 and not rings_suffice(BandLayout.from_spec(layout), q, places.ring):
        return
    if (index >= 0 and is_capturing()) or len({id(tensor) for tensor in tensors}) < len(tensors):
        return
    key = _key(layout, impl, q, k_cache, places)
    if key not in _prepared and not _counts.is_worth_preparing(key, _prepared):
        return
    kernel = find_decode_kernel(q, k_cache, places, layout, impl)
    serves = guard_inputs(*tensors)
    if kernel.spec is None or serves is None or q.shape[0] == 0:
        return
    capacity = places.capacity(k_cache)
    domain = find_cache_domain(layout, places, capacity)
    k, v = (k_cache, v_cache) if places.ring is None else (k_cache[:, None], v_cache[:, None])
    launch = ready_decode(kernel, q, k, v, domain)
    if launch is None:
        return
    bands = BandLayout.from_spec(layout)
    longest = capacity if bands.context_length is None or bands.allow_longer else bands.context_length
    prepared = _Prepared(
        serves=serves,
        launch=launch,
        scale=q.shape[3] ** -0.5,
        capacity=capacity,
        longest=min(longest, capacity),
        cache_starts=domain.cache_starts,
        block_table=domain.block_table,
        ring=domain.ring,
        ring_values=[] if index >= 0 or places.ring is None else places.ring.tolist(),
        index=index,
        stream=current_stream(index) if index >= 0 else 0,
    )
    make_room(_prepared, key)
    _prepared[key] = prepared


def _lies_within(values: Tensor, largest: int) -> bool:
    numbers = values.tolist()
    return bool(min(numbers) >= 0 and max(numbers) <= largest)


def decode_again(
    q: Any, k_cache: Any, v_cache: Any, places: tuple[Any, ...], layout: str, impl: str, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """o and lse of a step like one that `remember_step` knows, in as few steps as possible; None for others.

    Parameters
    ----------
    q, k_cache, v_cache, places
        May be invalid.
    layout, impl : str
        ``BandLayout.spec``, and what should be one of :func:`~spattn_tvm.dispatch.implementations`.
    scale : float or None
    """
    if (
        _is_dynamo_compiling()
        or count_dispatch_modes()
        or has_function_mode()
        or is_profiling()
        or is_forward_mode()
    ):
        return None
    if type(q) is not Tensor and type(q) is not Parameter:
        return None
    try:
        # A nested tensor has no shape; the guard would end the process over it.
        if any(tensor is not None and tensor.is_nested for tensor in (k_cache, v_cache, *places)):
            return None
        prepared = _prepared.get(_key(layout, impl, q, k_cache, places))
    except (TypeError, RuntimeError, AttributeError):  # no tensors: see the checks
        return None
    if prepared is None or places[0] is None:
        return None
    lengths, starts, block_table, ring = places
    given = [place for place in places if place is not None]
    if not prepared.serves(q, k_cache, v_cache, *given) or (
        prepared.index >= 0
        and (prepared.stream != current_stream(prepared.index) or (prepared.stream and is_capturing()))
    ):
        return None
    if prepared.index < 0:
        # A CPU's values are checked; what is not simply right goes to where errors are raised.
        if block_table is not None or not _lies_within(lengths, prepared.longest):
            return None
        if ring is not None and ring.tolist() != prepared.ring_values:
            return None
        if starts is not None and not _lies_within(starts, prepared.longest):
            return None
    if ring is not None:
        k_cache, v_cache = k_cache.unsqueeze(1), v_cache.unsqueeze(1)
    return prepared.launch(
        q,
        k_cache,
        v_cache,
        narrowed(lengths, prepared.capacity),
        prepared.cache_starts if starts is None else narrowed(starts, prepared.capacity),
        prepared.block_table if block_table is None else block_table,
        prepared.ring if ring is None else ring,
        prepared.scale if scale is None else scale,
    )
