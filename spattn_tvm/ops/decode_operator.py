"""The PyTorch operator ``spattn_tvm::banded_attention_decode``: a few queries against the keys of a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spattn_tvm.bands import BandLayout
from spattn_tvm.cache_forms import CachePlaces, check_cache_values
from spattn_tvm.dispatch import Kernel, find_kernel
from spattn_tvm.launch import launch_decode, like
from spattn_tvm.reference import reference_decode

from .band_tables import find_cache_domain
from .operators import LIBRARY, check_finite, lse_dtype, new_outputs, schema_of, with_contiguous_rows


class DecodeCall(NamedTuple):
    """What the operator takes after q and the caches, in this order."""

    # CachePlaces.
    cache_lengths: Tensor
    cache_starts: Tensor | None
    block_table: Tensor | None
    ring: Tensor | None
    # Settings: BandLayout.spec, the factor of the scores.
    layout: str
    scale: float
    impl: str

    @property
    def places(self) -> CachePlaces:
        return CachePlaces(*self[:4])


LIBRARY.define(
    f"banded_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, {schema_of(DecodeCall)}) "
    "-> (Tensor o, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)

NO_GRADIENT = (
    "banded_attention_decode has no gradient: call it under torch.no_grad() or on tensors that don't require "
    "one; banded_attention(q, k, v, layout, kv_lengths=...) attends to a cache with gradients"
)


def find_decode_kernel(q: Tensor, k_cache: Tensor, places: CachePlaces, layout: str, impl: str) -> Kernel:
    """The kernel of a step; arguments as the operator's."""
    kv_heads = places.kv_heads(k_cache)
    rows = places.capacity(k_cache) if places.ring is None else k_cache.shape[1] // kv_heads
    # A cache that grows by a row a step would be another problem each time; kernels differ by far less.
    kv_length = max(q.shape[2], 1 << max(0, rows - 1).bit_length())
    return find_kernel("decode", q, layout, impl, kv_heads=kv_heads, kv_length=kv_length)


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operator itself, for eager calls past the dispatcher; arguments as checked there."""
    call = DecodeCall(*rest)
    places = call.places
    check_finite(call.scale)
    q = with_contiguous_rows(q)
    if q.shape[0] == 0:
        return new_outputs(q)
    kernel = find_decode_kernel(q, k_cache, places, call.layout, call.impl)
    layout = BandLayout.from_spec(call.layout)
    if kernel.spec is None:
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            o, lse = reference_decode(q, k_cache, v_cache, layout, scale=call.scale, **places._asdict())
            return like(o, q), lse.to(lse_dtype(q.dtype))
    if q.is_cpu:
        check_cache_values(layout, q, k_cache, places)
    domain = find_cache_domain(call.layout, places, places.capacity(k_cache))
    if places.ring is not None:
        k_cache, v_cache = k_cache[:, None], v_cache[:, None]
    return launch_decode(kernel, q, k_cache, v_cache, domain, call.scale)


DECODE = torch.ops.spattn_tvm.banded_attention_decode.default

for _device in ("CPU", "CUDA"):
    LIBRARY.impl("banded_attention_decode", decode, _device)


def _refuse_gradient(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(NO_GRADIENT)


def _refuse_map(info: Any, in_dims: Any, *inputs: Any) -> None:
    raise NotImplementedError(
        "banded_attention_decode has no vmap rule: make the mapped dimension part of the batch"
    )


torch.library.register_fake("spattn_tvm::banded_attention_decode", new_outputs, lib=LIBRARY)
torch.library.register_autograd("spattn_tvm::banded_attention_decode", _refuse_gradient, lib=LIBRARY)
torch.library.register_vmap("spattn_tvm::banded_attention_decode", _refuse_map, lib=LIBRARY)
