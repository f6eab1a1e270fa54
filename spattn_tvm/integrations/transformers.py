"""Bands in models of Hugging Face transformers: training, and ``generate()`` over caches.

`register` makes ``attn_implementation="spattn"`` known: an attention function, the mask function that belongs
to it, and the rule that a model whose configuration holds bands runs with them. `set_layout` gives a model
its bands; they are stored in its configuration and come back with ``from_pretrained``.

What a model asks for that bands can't do is refused, never ignored. A mask function sees what the attention
function can't (padding, packing, how far a cache has come) and hands it on once for all layers, as an int32
tensor ``(B, 1, K, 1)`` in place of a mask: the number of keys of each row (``K = 1``), the first of them
and that number (``K = 2``), or behind three entries positions that start again with each packed sequence, for
models that don't hand position_ids on. Padding on the right is behind all queries whose results mean
something.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spattn_tvm.bands import BandLayout
from spattn_tvm.cache import BandedCache, KeyValueCache, PagedCache
from spattn_tvm.extras import install_hint
from spattn_tvm.offloaded import OffloadedCaches
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.decode import banded_attention_decode
from spattn_tvm.problem import MAX_DECODE_QUERIES
from spattn_tvm.torch_private import assert_async, has_values, keep_address

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        LinearAttentionCacheLayerMixin,
    )
    from transformers.masking_utils import causal_mask_function
except ImportError as error:
    raise ImportError(f"this needs transformers 5.24 or newer ({error}): {install_hint('hf')}") from error

_is_compiling = torch.compiler.is_compiling

LAYOUTS_KEY = "spattn_layouts"
"""The configuration's entry: ``BandLayout.spec`` of each layer."""

PACKING_KEY = "spattn_packing"
"""The configuration's entry: False where compiled code need not look for packed sequences."""

# By spec, for `torch.compile`, which reads a dictionary and would trace the parsing of a text.
_layouts: dict[str, BandLayout] = {}
_names: list[str] = []
# Of a layout, a rank's part with so many heads.
_parts: dict[tuple[str, int, int], BandLayout] = {}


# --- layouts in a configuration ---------------------------------------------------------------------------


def _parse(specs: Sequence[str]) -> None:
    for spec in specs:
        if spec not in _layouts:
            _layouts[spec] = BandLayout.from_spec(spec)


def _layout_of(module: nn.Module) -> BandLayout:
    config: Any = module.config
    specs = getattr(config, LAYOUTS_KEY, None)
    index = getattr(module, "layer_idx", None)
    if specs is None:
        raise ValueError(
            f"{type(module).__name__} runs with banded attention and its configuration has no "
            f"{LAYOUTS_KEY}: give the model its bands with set_layout(model, layout)"
        )
    if not isinstance(specs, (list, tuple)):
        raise TypeError(
            f"{LAYOUTS_KEY} in a configuration is a list of a layout's spec a layer, got {specs!r}"
        )
    if index is None or not 0 <= index < len(specs):
        raise ValueError(f"{type(module).__name__} is layer {index}, and {len(specs)} layers have bands")
    spec = specs[index]
    if spec not in _layouts:
        _parse([spec])
    return _layouts[spec]


def _heads_of_rank(module: nn.Module, heads: int, layout: BandLayout) -> BandLayout:
    """The part of a layer's layout for the query heads that arrive, which are fewer than the layer's under a
    ``tp_plan``: of the ranks among which a projection's rows are sharded each has an equal part, in order.
    """
    is_sharded = False
    for parameter in module.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            continue
        is_sharded = True
        for axis, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
            if placement.is_shard(0) and mesh.size(axis) * heads == layout.num_heads:
                key = (layout.spec, mesh.get_local_rank(axis), heads)
                if key not in _parts:
                    _parts[key] = layout.heads(key[1] * heads, (key[1] + 1) * heads)
                return _parts[key]
    if not is_sharded:
        raise ValueError(
            f"{type(module).__name__} attends with {heads} query heads, and its bands {layout.spec} are for "
            f"{layout.num_heads}: give the model others with set_layout(model, layout)"
        )
    raise ValueError(
        f"{type(module).__name__} attends with {heads} of {layout.num_heads} query heads, and which ones "
        "does not follow from its parameters: give it a tp_plan that shards projections by columns into "
        "equal parts of whole heads"
    )


def set_layout(
    model: PreTrainedModel,
    layout: BandLayout | str | Sequence[BandLayout | str | None],
    *,
    name: str = "spattn",
    packing: bool = True,
) -> None:
    """Give a model bands, and its configuration the text that brings them back.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder whose attention goes through transformers' ``AttentionInterface``, or a model that has one
        beside other parts (an encoder of pictures), which keep theirs.
    layout : BandLayout, str, or a sequence of these and None
        Of all layers, or of each. A string is a ``BandLayout.spec``; None is dense causal attention.
    name : str
        The attention implementation, as in `register`, which this calls.
    packing : bool
        False where no sequences are packed by `position_ids` alone: compiled code, which can't read them,
        then need not be made for as many documents as tokens, and raises if there are some after all.

    Raises
    ------
    ValueError
        A layout for another number of heads, as many layouts as there are not layers, a model without
        attention, or one that does not take attention functions.
    TypeError
        Something that is no layout, or no model of transformers.
    """
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):  # a wrapper hands on its model's
        raise TypeError(f"model must be a PreTrainedModel of transformers, got {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    heads, layers = (getattr(config, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
    if not heads or not layers:
        raise ValueError(f"{type(model).__name__} has no attention heads that its configuration tells of")
    given = [layout] * layers if layout is None or isinstance(layout, (BandLayout, str)) else list(layout)
    if len(given) != layers:
        raise ValueError(f"the model has {layers} layers, got {len(given)} layouts")
    specs = []
    for index, one in enumerate(given):
        if one is None:
            one = BandLayout.causal(heads)
        elif isinstance(one, str):
            one = BandLayout.from_spec(one)
        elif not isinstance(one, BandLayout):
            raise TypeError(f"layer {index}: a layout is a BandLayout, its spec or None, got {one!r}")
        if one.num_heads != heads:
            raise ValueError(f"layer {index}: the layout has {one.num_heads} heads, the model {heads}")
        specs.append(one.spec)
    register(name)
    if not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__} does not take attention functions of others")
    _parse(specs)
    setattr(config, LAYOUTS_KEY, specs)
    setattr(config, PACKING_KEY, packing)
    model.set_attn_implementation(_for_decoder(model.config, config, name) or name)
    _keep_name(model.config, name)
    _keep_name(config, name)


def _for_decoder(config: Any, decoder: Any, name: str) -> str | dict[str, Any] | None:
    """What gives the decoder alone an implementation (``set_attn_implementation``); None if it is no part.

    An encoder of pictures beside it keeps its own.
    """
    if config is decoder:
        return name
    for key in config.sub_configs:
        part = getattr(config, key, None)
        found = None if part is None else _for_decoder(part, decoder, name)
        if found is not None:
            return {key: found}
    return None


def _leave_to_decoder(config: Any, decoder: Any) -> None:
    """Give parts of a model that have no bands the implementation that transformers chooses."""
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None and part is not decoder:
            if part._attn_implementation in _names:
                part._attn_implementation_internal = None
            _leave_to_decoder(part, decoder)


def _keep_name(config: Any, name: str) -> None:
    # transformers reads this entry and does not write it. With it, a process that has not registered the name
    # refuses the checkpoint rather than running it dense.
    config.attn_implementation = name


# --- what a forward pass knows of its keys ------------------------------------------------------------------


def _refuse(what: str) -> None:
    raise ValueError(f"banded attention has no {what}")


def _check_mask_function(function: Any) -> None:
    """Raise unless a mask function is causal, at most within packed sequences."""
    if function is causal_mask_function:
        return
    name = getattr(function, "__qualname__", repr(function)).partition(".")[0]
    if name.startswith(("bidirectional", "sliding_window_bidirectional")):
        _refuse("bidirectional or cross attention, which the model asks for")
    if name not in ("and_masks", "packed_sequence_mask_function", "remap_positions_for_packed_sequence"):
        _refuse(f"mask of the kind {name}: it is causal in each sequence")
    for cell in getattr(function, "__closure__", None) or ():
        inner = cell.cell_contents
        for part in inner if isinstance(inner, tuple) else (inner,):
            if callable(part) and not isinstance(part, Tensor):
                _check_mask_function(part)


def _first_tokens(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first True of each row of a mask ``(B, L)``, and are all True from there to the last one?"""
    place = torch.arange(mask.shape[1], device=mask.device)
    end = torch.where(mask, place + 1, 0).amax(1)
    begin = torch.minimum(torch.where(mask, place, mask.shape[1]).amin(1), end)
    return begin, (end - begin == mask.sum(1)).all()


def _check_padding(mask: Tensor | None, batch: int, length: int | Tensor) -> None:
    """Raise unless a mask has a row for each row and an entry for each token."""
    if mask is None:
        return
    is_short = mask.dim() == 2 and isinstance(length, int) and mask.shape[1] < length
    if mask.dim() != 2 or mask.shape[0] != batch or is_short:
        tokens = length if isinstance(length, int) else "tokens"
        raise ValueError(
            f"attention_mask is of shape ({batch}, {tokens}) here, an entry for each token, cached ones "
            f"included, got {tuple(mask.shape)}"
        )


# K of the mask of a layer that has a window or chunks of its own; what is behind it are positions.
_OWN_WINDOW = 3

_HOLES = (
    "attention_mask has padding between a row's tokens, which bands would count as distance: pad prompts on "
    "the left, where nothing is appended, or pack"
)


def banded_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Tensor:
    """The mask function: where each row's keys are, in place of a mask.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, use_vmap,
    device, settings
        What transformers hands a function of its ``AttentionMaskInterface``.

    Returns
    -------
    Tensor
        int32 ``(B, 1, K, 1)``, see the module's description; with ``K = 3`` for a window or chunks of the
        model's own, which no layer may take, and ``K = 3 + N`` for packed sequences. Of four dimensions, so
        that transformers takes it for a mask that was made by the user, and hands it on as it is.

    Raises
    ------
    ValueError
        Masks that are not causal, padding between tokens.
    """
    if local_size is not None:
        # Some models make this mask whether or not a layer takes it: the layer that does is refused.
        return torch.full((batch_size, 1, _OWN_WINDOW, 1), local_size, dtype=torch.int32, device=device)
    if kv_offset:
        _refuse(f"cache that forgets its first keys, and this one starts at {kv_offset}")
    if use_vmap:
        _refuse("masks of the user's own (or_mask_function, and_mask_function)")
    if not _is_compiling():
        _check_mask_function(mask_function)
    length = q_offset + q_length
    _check_padding(attention_mask, batch_size, length)
    # Are the keys of the call all there are, as the host knows? Then there is nothing to say but how many.
    # While torch.jit traces, sizes are tensors; those of a cache that only the device knows always are.
    is_known = isinstance(length, (int, torch.SymInt)) or (
        isinstance(q_offset, int) and torch.jit.is_tracing()
    )
    is_all = is_known and length == kv_length
    if attention_mask is not None:
        begin, is_whole = _first_tokens(attention_mask[:, :kv_length])
        # A step of decoding waits for nothing. Longer calls do, once for all layers, as transformers' own.
        if not has_values(attention_mask) or (q_length == 1 and attention_mask.is_cuda):
            assert_async(is_whole, _HOLES)
        elif not is_whole:
            raise ValueError(_HOLES)
        elif q_length > 1 and is_all and bool(attention_mask.all()):
            attention_mask = None
    if attention_mask is None and is_all:
        if mask_function is causal_mask_function:
            return torch.full((batch_size, 1, 1, 1), length, dtype=torch.int32, device=device)
        positions = _packed_positions(mask_function, batch_size, q_length, device)
        unused = positions.new_zeros(batch_size, _OWN_WINDOW)
        return torch.cat((unused, positions), 1).int()[:, None, :, None]
    if isinstance(length, Tensor):
        last = length.to(device).expand(batch_size)
    else:
        last = torch.full((batch_size,), length, device=device)
    if attention_mask is None:
        begin = torch.zeros_like(last)
    return torch.stack((begin, last), 1).int()[:, None, :, None]


def _packed_positions(
    mask_function: Any, batch: int, length: int | Tensor, device: torch.device | str
) -> Tensor:
    """Positions ``(B, N)`` that go on where a token sees the one before it."""
    row = torch.arange(batch, device=device)[:, None]
    place = torch.arange(length, device=device)[None]
    sees = mask_function(row, torch.zeros_like(row), place, (place - 1).clamp(min=0))
    return place + (~sees).cumsum(1)


def _documents(position_ids: Tensor, batch: int) -> tuple[Tensor | None, bool]:
    """Boundaries of sequences that are packed one after the other, which start where positions don't go on.

    Returns
    -------
    cu_seqlens : Tensor or None
        int32 boundaries; None for one sequence a row.
    flattens : bool
        Whether they are those of the flattened batch, because rows differ.
    """
    flattens = position_ids.shape[0] > 1 and batch > 1
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    starts = starts.flatten()
    tokens = starts.shape[0]
    if not has_values(position_ids):
        # As many boundaries as there could be, for a static shape: what is too many are empty documents.
        place = torch.arange(tokens, device=starts.device)
        ends = torch.where(starts, place, tokens).sort().values
        # A value to pad with would be taken for a constant.
        return torch.cat((ends, ends.new_full((1,), tokens))).int(), flattens
    first = starts.nonzero().flatten()
    if first.shape[0] == position_ids.shape[0]:
        return None, False
    return torch.nn.functional.pad(first, (0, 1), value=tokens).int(), flattens


def _check_one_sequence(position_ids: Tensor, places: Tensor, message: str) -> None:
    """Raise where positions of a row say that it is several sequences, which would see one another.

    Padding has positions of any kind, and where it begins on the right is not known: then a sequence starts
    where a token is not behind the one before it, and is followed by the next.
    """
    if places.shape[2] == 1:
        starts_again = position_ids.diff(dim=1) != 1
    else:
        before, here, after = position_ids[:, :-2], position_ids[:, 1:-1], position_ids[:, 2:]
        begin, length = places[:, 0, :, 0].unbind(1)
        place = torch.arange(1, position_ids.shape[1] - 1, device=position_ids.device)
        is_inside = place + length[:, None] - position_ids.shape[1] > begin[:, None]
        starts_again = (here <= before) & (after == here + 1) & is_inside
    if not has_values(starts_again):
        assert_async(~starts_again.any(), message)
    elif bool(starts_again.any()):
        raise ValueError(message)


_PACKED = "position_ids start again within a row, and set_layout was told packing=False"

_PACKED_AND_PADDED = (
    "position_ids start again within a row that attention_mask pads: pack without padding, and without a mask"
)

_PACKED_AND_CACHED = (
    "position_ids start again within a row whose keys are cached: pack without a cache (use_cache=False)"
)

_OTHER_BOUNDARIES = (
    "cu_seq_lens_k are not cu_seq_lens_q: in self-attention each document has as many keys as queries"
)

_SEQ_IDX = (
    "seq_idx changes where position_ids go on, and attention goes by these: give position_ids that start "
    "again with each packed sequence, or cu_seq_lens_q"
)


def _seen(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors and their versions, by which a later layer knows them again; those of inference have none."""
    return tuple((t, None if t is None or t.is_inference() else t._version) for t in tensors)


def _is_known(places: Tensor, seen: tuple[Any, ...]) -> bool:
    """Did a layer before this one look at these tensors? The mask of a forward pass is one tensor."""
    known = getattr(places, "_spattn_seen", ())
    return len(known) == len(seen) and all(
        a[0] is b[0] and a[1] == b[1] for a, b in zip(known, seen, strict=True)
    )


def _check_boundaries(places: Tensor, queries: Tensor, keys: Tensor | None) -> None:
    """Raise where keys have other boundaries than queries."""
    if keys is None or keys is queries:
        return
    if keys.shape != queries.shape:
        raise ValueError(_OTHER_BOUNDARIES)
    if not has_values(keys):
        assert_async((keys == queries).all(), _OTHER_BOUNDARIES)
        return
    seen = _seen(queries, keys)
    if _is_known(places, seen):
        return
    if not torch.equal(keys, queries):
        raise ValueError(_OTHER_BOUNDARIES)
    places._spattn_seen = seen  # type: ignore[attr-defined]


def _packing(
    position_ids: Tensor | None, seq_idx: Tensor | None, places: Tensor, is_cached: bool, may_pack: bool
) -> tuple[Tensor | None, bool]:
    """`_documents`, found by the first of the layers that are given the same positions."""
    is_read = all(given is None or has_values(given) for given in (position_ids, seq_idx))
    seen = _seen(position_ids, seq_idx) if is_read else None
    if seen is not None and _is_known(places, seen):
        return places._spattn_documents  # type: ignore[attr-defined]
    found: tuple[Tensor | None, bool] = (None, False)
    if position_ids is not None:
        if places.shape[2] == 2 or is_cached:
            message = _PACKED_AND_CACHED if is_cached else _PACKED_AND_PADDED
            _check_one_sequence(position_ids, places, message)
        elif seen is None and not may_pack:
            assert_async((position_ids.diff(dim=1) == 1).all(), _PACKED)
        else:
            found = _documents(position_ids, places.shape[0])
    if seq_idx is not None:
        is_ignored = seq_idx.diff(dim=-1) != 0
        if position_ids is not None:
            is_ignored = is_ignored & (position_ids.diff(dim=1) == 1)
        if seen is None:
            assert_async(~is_ignored.any(), _SEQ_IDX)
        elif bool(is_ignored.any()):
            raise ValueError(_SEQ_IDX)
    if seen is not None:
        places._spattn_seen, places._spattn_documents = seen, found  # type: ignore[attr-defined]
    return found


# --- the attention function ---------------------------------------------------------------------------------

# Arguments that say nothing about what is attended to.
_HARMLESS = frozenset(("num_items_in_batch", "cache_position", "max_length_q", "max_length_k"))
_REFUSED = {
    "softcap": "softcap of the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "sliding_window": "window of the model's own beside its bands",
    "position_bias": "position bias",
    "head_mask": "head mask",
    "output_attentions": "attention weights to output",
}


def _check_arguments(
    module: nn.Module, dropout: float, is_causal: bool | None, others: dict[str, Any]
) -> None:
    for name, value in others.items():
        if value is None or value is False:
            continue
        if name in _REFUSED:
            _refuse(f"{_REFUSED[name]} ({name}={value if isinstance(value, (int, float)) else '…'})")
        if isinstance(value, Tensor) and name not in _HARMLESS:
            _refuse(f"argument {name}, and won't ignore it")
    if dropout:
        _refuse(f"dropout, and the model asks for attention_dropout={dropout}")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        _refuse(f"bidirectional or cross attention, which {type(module).__name__} asks for")


def _check_places(module: nn.Module, places: Tensor | None) -> None:
    if places is None:
        raise ValueError(
            "banded attention was not told where keys are: the attention function is registered without its "
            "mask function, or the model makes no masks; call spattn_tvm.integrations.transformers.register()"
        )
    is_ours = isinstance(places, Tensor) and places.dim() == 4 and places.dtype is torch.int32
    if not (is_ours and places.shape[1] == places.shape[3] == 1):
        raise ValueError(
            f"banded attention takes no mask of 4 dimensions, got {tuple(places.shape)} "
            f"({getattr(places, 'dtype', type(places).__name__)}): "
            "give a 2-D attention_mask for padding, position_ids or cu_seq_lens_q for packed sequences"
        )
    if places.shape[2] == _OWN_WINDOW:
        config: Any = module.config
        sizes = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items() if size is not None)
        _refuse(
            f"window or chunk of the model's own, which its configuration asks for ({asked}) in layer "
            f"{getattr(module, 'layer_idx', None)}"
        )


def _bands_of(module: nn.Module, heads: int, band_cache: KeyValueCache | None) -> BandLayout:
    """The layer's bands, of those heads alone that the call has."""
    layout = _layout_of(module)
    if band_cache is not None and not band_cache.serves(layout):
        raise ValueError(
            f"the cache of layer {module.layer_idx} is made for {band_cache.layout.spec}, and the layer has "
            f"{layout.spec}: make it with make_cache(model)"
        )
    if heads == layout.num_heads:
        return layout
    if band_cache is not None:
        _refuse("banded cache of a part of the heads: generate with a cache of transformers' own")
    return _heads_of_rank(module, heads, layout)


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BandLayout,
    scaling: float | None,
    boundaries: Tensor,
    flattens: bool,
) -> Tensor:
    """Packed sequences, ``(B, N, Hq, D)``; `flattens` and `boundaries` are those of `_documents`."""
    if not flattens:
        o = banded_attention(query, key, value, layout, scale=scaling, cu_seqlens=boundaries)
        return o.transpose(1, 2)
    rows = query.shape[0], query.shape[2]
    query, key, value = (t.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for t in (query, key, value))
    o = banded_attention(query, key, value, layout, scale=scaling, cu_seqlens=boundaries)
    return o.transpose(1, 2).unflatten(1, rows)[0]


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, layout: BandLayout, scaling: float | None, places: Tensor
) -> Tensor:
    """One sequence a row, ``(B, Nq, Hq, D)``: whole, or a step or chunk at its end; padded or not."""
    queries, is_padded = query.shape[2], places.shape[2] == 2
    wants_gradient = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )
    if queries != key.shape[2] and queries <= MAX_DECODE_QUERIES and not wants_gradient:
        o = banded_attention_decode(
            query,
            key,
            value,
            layout,
            cache_lengths=places[:, 0, -1, 0],
            cache_starts=places[:, 0, 0, 0] if is_padded else None,
            scale=scaling,
        )
    elif is_padded:
        begin, length = places[:, 0, :, 0].unbind(1)
        o = banded_attention(
            query,
            key,
            value,
            layout,
            scale=scaling,
            query_offset=length - queries,
            kv_starts=begin,
            kv_lengths=length,
        )
    else:
        o = banded_attention(query, key, value, layout, scale=scaling)
    return o.transpose(1, 2)


def banded_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    band_cache: KeyValueCache | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function, in the form of transformers' ``AttentionInterface``.

    Parameters
    ----------
    module : nn.Module
        The attention layer: its ``config`` and ``layer_idx`` name its bands.
    query, key, value : Tensor
        ``(B, Hq, Nq, D)`` and ``(B, Hkv, Nk, D)``.
    attention_mask : Tensor
        What `banded_mask` returned.
    dropout, scaling, is_causal, position_ids, cu_seq_lens_q, cu_seq_lens_k, seq_idx, others
        What models hand on. Positions matter where they say that sequences are packed; where there are
        boundaries, these count.
    band_cache : KeyValueCache, optional
        What the keys go into and the past ones come from; `BandedLayer` and `PagedLayer` put it here.

    Returns
    -------
    o : Tensor
        ``(B, Nq, Hq, D)``.
    None
        In place of attention weights.

    Raises
    ------
    ValueError
        What bands can't do, by its name.
    """
    _check_arguments(module, dropout, is_causal, others)
    batch, heads, queries, _ = query.shape
    layout = _bands_of(module, heads, band_cache)
    _check_places(module, attention_mask)
    if value.shape[3] != query.shape[3]:
        _refuse(f"values of another head dim than the keys' ({value.shape[3]} and {query.shape[3]})")
    assert attention_mask is not None
    is_padded = attention_mask.shape[2] == 2
    is_first = queries == key.shape[2]

    if cu_seq_lens_q is not None:
        if is_padded or batch > 1 or not is_first or band_cache is not None:
            _refuse(
                "packed sequences (cu_seq_lens_q) beside padding, a cache or several rows: one row holds all"
            )
        _check_boundaries(attention_mask, cu_seq_lens_q, cu_seq_lens_k)
        return _attend_packed(query, key, value, layout, scaling, cu_seq_lens_q, flattens=False), None
    if cu_seq_lens_k is not None:
        _refuse("packed keys (cu_seq_lens_k) without packed queries: give cu_seq_lens_q too")

    documents, flattens = None, False
    positions = position_ids if position_ids is not None and position_ids.dim() == 2 else None
    if positions is None and attention_mask.shape[2] > _OWN_WINDOW:
        positions = attention_mask[:, 0, _OWN_WINDOW:, 0]
    if queries > 1 and (positions is not None or seq_idx is not None):
        is_cached = band_cache is not None or not is_first
        may_pack = getattr(module.config, PACKING_KEY, True)
        documents, flattens = _packing(positions, seq_idx, attention_mask, is_cached, may_pack)

    if band_cache is not None:
        starts = attention_mask[:, 0, 0, 0] if is_padded else None
        return band_cache.attend(query, key, value, scale=scaling, starts=starts).transpose(1, 2), None
    if documents is not None:
        return _attend_packed(query, key, value, layout, scaling, documents, flattens), None
    return _attend_rows(query, key, value, layout, scaling, attention_mask), None


# --- caches -------------------------------------------------------------------------------------------------


class _Layer(CacheLayerMixin):
    """A layer of transformers' ``Cache`` over one of ours, made at the first keys."""

    is_sliding = False

    def __init__(self, config: Any, layout: BandLayout, is_static: bool, settings: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.settings = settings
        self.is_compileable = is_static
        self.cache: KeyValueCache | None = None

    def _make(self, layout: BandLayout, **sizes: Any) -> KeyValueCache:
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if _is_compiling():
            raise ValueError(
                "compiled code can't make a cache: call cache.early_initialization(...) before it"
            )
        batch, heads, _, head_dim = key_states.shape
        self.cache = self._make(
            self.layout,
            batch_size=batch,
            num_kv_heads=heads,
            head_dim=head_dim,
            dtype=key_states.dtype,
            device=key_states.device,
            count_on_host=not self.is_compileable,
            **self.settings,
        )
        if self.is_compileable:
            for tensor in (self.cache.keys, self.cache.values, self.cache.lengths):
                keep_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the cache to the attention function, which stores the keys; they are returned as they are."""
        if self.config._attn_implementation not in _names:
            raise ValueError(
                f"this cache keeps what bands need, and the model runs {self.config._attn_implementation!r}: "
                "use another cache, or set_layout(model, layout)"
            )
        arguments = kwargs.get("kwargs")
        if arguments is None:
            raise ValueError(
                "this model's attention does not tell its cache what the attention function is called with: "
                "use a DynamicCache or StaticCache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        arguments["band_cache"] = self.cache
        return key_states, value_states

    @property
    def batch_size(self) -> int:
        return -1 if self.cache is None else self.cache.batch_size

    def get_seq_length(self) -> Any:
        if self.cache is None:
            return 0
        known = None if self.is_compileable else self.cache.known_length
        return self.cache.lengths[0] if known is None else known

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.is_compileable:
            return self.get_max_length(), 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.settings.get("max_length") or self.layout.context_length or -1

    def reset(self) -> None:
        if self.cache is not None:
            self.cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if self.cache is not None:
            self.cache.crop(-tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.cache.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            self.cache.select(indices)

    def offload(self) -> None:
        raise NotImplementedError("caches of bands are offloaded by make_cache(model, offload=True)")

    def prefetch(self) -> None:
        raise NotImplementedError("caches of bands are offloaded by make_cache(model, offload=True)")


class BandedLayer(_Layer):
    """Keeps the keys that the layer's bands can still need, as a :class:`~spattn_tvm.BandedCache`."""

    is_croppable = True

    def _make(self, layout: BandLayout, **sizes: Any) -> KeyValueCache:
        return BandedCache(layout, **sizes)


class _Offloaded:
    """The caches of a model's layers, made together at the first keys of one of them."""

    def __init__(self, layouts: list[BandLayout]) -> None:
        self.layouts = layouts
        self.caches: OffloadedCaches | None = None

    def layer(self, index: int, **sizes: Any) -> KeyValueCache:
        if self.caches is None:
            self.caches = OffloadedCaches(self.layouts, **sizes)
        return self.caches[index]


class OffloadedLayer(_Layer):
    """Keeps on the device the keys that steps read, as a layer of :class:`~spattn_tvm.OffloadedCaches`."""

    is_croppable = True

    def __init__(
        self, config: Any, layout: BandLayout, settings: dict[str, Any], together: _Offloaded, index: int
    ) -> None:
        super().__init__(config, layout, False, settings)
        self.together = together
        self.index = index

    def _make(self, layout: BandLayout, **sizes: Any) -> KeyValueCache:
        return self.together.layer(self.index, **sizes)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.index == 0 and self.together.caches is not None:
            self.together.caches.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.index == 0 and self.together.caches is not None:
            self.together.caches.select(indices)


class PagedLayer(_Layer):
    """Keeps all keys in pages, as a :class:`~spattn_tvm.PagedCache`."""

    is_croppable = True

    def _make(self, layout: BandLayout, **sizes: Any) -> KeyValueCache:
        return PagedCache(layout, **sizes)


def _layers_without_keys(config: Any) -> dict[int, Any]:
    """transformers' own layers of a cache, by index, for those of a model that don't attend: convolutions and
    linear attention keep a state of fixed size."""
    found = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if not isinstance(layer, CacheLayerMixin):
            found[index] = layer
        elif isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"layer {index} of the model has linear attention beside attention, and no cache of bands "
                "keeps both: use a DynamicCache or StaticCache"
            )
    return found


def make_cache(
    model: PreTrainedModel | PreTrainedConfig,
    kind: str = "banded",
    *,
    max_length: int | None = None,
    is_static: bool = False,
    offload: bool = False,
    **settings: Any,
) -> Cache:
    """A cache for ``generate(..., cache=cache)``, one layer for each of the model's.

    Parameters
    ----------
    model : PreTrainedModel or PreTrainedConfig
        With bands. Layers of it that keep a state in place of keys (convolutions, linear attention) get
        transformers' own.
    kind : str
        ``"banded"`` keeps what the bands can still need, ``"paged"`` everything, in pages.
    max_length : int, optional
        Longest sequence, padding included. Layers that are dense need it for ``"banded"``.
    is_static : bool
        Whether a step of decoding will be compiled: then only the device counts, and layers that have no end
        of their own need `max_length`. Where prompts run in compiled code too, call the cache's
        ``early_initialization`` before.
    offload : bool
        Whether keys that no step reads yet wait in host memory (:class:`~spattn_tvm.OffloadedCaches`): of
        kind ``"banded"``, all layers on one device, of one shape, and none skipped. Beams send whole caches
        over the bus.
    **settings
        Further arguments of :class:`~spattn_tvm.BandedCache` (`slack`, how far assisted decoding can go back)
        or :class:`~spattn_tvm.PagedCache` (`page_size`).

    Returns
    -------
    Cache

    Raises
    ------
    ValueError
        A model without bands, layouts that are not autoregressive, an unknown kind, layers that share keys
        or have linear attention beside attention; `offload` of a cache that is paged or static.
    """
    layers = {"banded": BandedLayer, "paged": PagedLayer}
    if kind not in layers:
        raise ValueError(f"kind must be one of {', '.join(layers)}, got {kind!r}")
    if offload and (kind != "banded" or is_static):
        what = "a static cache, whose steps are compiled" if is_static else f"kind {kind!r}"
        raise ValueError(f"only what bands need is offloaded, by steps that are not compiled: got {what}")
    config: Any = getattr(model, "config", model)
    config = config.get_text_config(decoder=True)
    specs = getattr(config, LAYOUTS_KEY, None)
    if specs is None:
        raise ValueError("the model has no bands: give it some with set_layout(model, layout)")
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise ValueError(
            "layers of this model attend to the keys of other layers, which caches of bands do not hand out: "
            "use a DynamicCache or StaticCache"
        )
    layouts = [BandLayout.from_spec(spec) for spec in specs]
    others = _layers_without_keys(config)
    for index, layout in enumerate(layouts):
        if index in others:
            continue
        layout.require_autoregressive("generation")
        if kind == "banded" and layout.depends_on_length and max_length is None:
            raise ValueError(
                f"a layer of the model is dense ({layout.spec}): give max_length, or kind='paged'"
            )
        if is_static and max_length is None and (kind == "paged" or layout.context_length is None):
            raise ValueError(
                f"a static cache has an end, and {kind} layers of {layout.spec} none: give max_length"
            )
    settings = {"max_length": max_length, **settings}
    if offload:
        with_keys = [index for index in range(len(layouts)) if index not in others]
        together = _Offloaded([layouts[index] for index in with_keys])
        for number, index in enumerate(with_keys):
            others[index] = OffloadedLayer(config, layouts[index], settings, together, number)
    return Cache(
        layers=[
            others.get(index) or layers[kind](config, layout, is_static, settings)
            for index, layout in enumerate(layouts)
        ]
    )


# --- registration -------------------------------------------------------------------------------------------


def _watch_models() -> None:
    """Let a model whose configuration holds bands run with them, unless another attention is asked for."""
    original = PreTrainedModel.get_correct_attn_implementation

    def with_bands(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        decoder = self.config.get_text_config(decoder=True)
        specs = getattr(decoder, LAYOUTS_KEY, None)
        if specs is None or not _names or requested_attention not in (None, *_names):
            return original(self, requested_attention, is_init_check)
        name = requested_attention or _names[0]
        _parse(specs)
        _keep_name(self.config, name)
        if is_init_check and _for_decoder(self.config, decoder, name) not in (None, name):
            # Parts are made after the whole, by what their configurations say. Only the decoder has bands.
            _leave_to_decoder(self.config, decoder)
            if decoder._attn_implementation is None:
                decoder._attn_implementation = name
            return original(self, None, is_init_check)
        return original(self, name, is_init_check)

    PreTrainedModel.get_correct_attn_implementation = with_bands


def register(name: str = "spattn") -> None:
    """Make banded attention known to transformers as ``attn_implementation=name``.

    Registers the attention function and its mask function, and lets a model whose configuration holds bands
    (`set_layout`) run with them when it is loaded, unless another implementation is asked for by name. To
    call it again does nothing.

    Parameters
    ----------
    name : str

    Raises
    ------
    ValueError
        The name of another implementation.
    """
    if name in _names:
        return
    if (
        name == "eager"
        or name in AttentionInterface._global_mapping
        or name in AttentionMaskInterface._global_mapping
    ):
        raise ValueError(f"{name!r} is another attention implementation's name")
    AttentionInterface.register(name, banded_attention_forward)
    AttentionMaskInterface.register(name, banded_mask)
    if not _names:
        _watch_models()
    _names.append(name)
