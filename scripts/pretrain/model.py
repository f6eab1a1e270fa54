"""The model of a run: transformers' OLMoE or Llama with attention by name, its loss and its work.

Layers that are all banded run through ``spattn_tvm.integrations.transformers``, as any model with
``set_layout`` does. Others go through an attention function of this file: SDPA (cuDNN first) for dense
attention over joined documents, FlexAttention for the rest, which the CPU computes with SDPA and a mask; and
all of them where ranks share the sequences, dense ones then as causal bands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from config import BANDED, Config
from context import SharedBatch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from spattn_tvm import BandLayout
from spattn_tvm.bench.peer_masks import Rule, bigbird_rule, longformer_rule, reformer_rule
from spattn_tvm.integrations.transformers import (
    LAYOUTS_KEY,
    banded_attention_forward,
    banded_mask,
    set_layout,
)

PEERS = "spattn_peers"
EXPERTS = "spattn_grouped_mm"
# cuDNN's kernels are the fastest dense ones on Hopper; the others serve where it can't.
DENSE_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Whose heads all see the same keys: one mask serves them.
ALIKE = ("dense", "sliding_window", "longformer", "bigbird")
RULE_ROWS = 256  # queries whose pairs are counted at a time
BLOCK = 128  # queries and keys of a block of FlexAttention's masks
PAIRS_AT_A_TIME = 1 << 27  # that a block mask is made of: a few hundred MB


# --- attention by name ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """What a layer attends to and by which means.

    Attributes
    ----------
    name : str
        As in the configuration.
    means : str
        ``"bands"`` (this package), ``"sdpa"``, ``"flex"``, ``"eager"`` or ``"bound"``.
    layout : BandLayout or None
        Of banded layers and, as causal, of dense ones.
    """

    name: str
    means: str
    layout: BandLayout | None


@cache
def layers_of(config: Config) -> tuple[Layer, ...]:
    """The layers of a configuration."""
    heads, context = config.model.heads, config.data.context
    window = config.attention.window or max(1, 2 * context // heads)
    wanted = config.attention.implementation
    layers = []
    for name in config.names:
        if name == "sliding_window":
            layout: BandLayout | None = BandLayout.sliding_window(heads, min(window, context), context)
        elif name in BANDED:
            layout = getattr(BandLayout, name)(heads, context)
        else:
            layout = BandLayout.causal(heads) if name == "dense" else None
        if name == "bound":
            means = "bound"
        elif wanted != "auto":
            means = wanted
        elif name in BANDED or config.train.context_parallel > 1:
            means = "bands"
        else:
            means = "sdpa" if name == "dense" and config.data.documents == "joined" else "flex"
        layers.append(Layer(name, means, layout))
    return tuple(layers)


@cache
def rule_of(layer: Layer, heads: int, context: int, device: torch.device) -> Rule:
    """Which keys a query of a head sees, by positions within their document."""
    if layer.name == "dense":
        return lambda head, query, key: query >= key
    if layer.layout is not None:
        near_low, near_high, far_low, far_high = (
            torch.tensor(layer.layout.table(context)).to(device).unbind(1)
        )

        def in_bands(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            d = query - key
            near = (d >= near_low[head]) & (d <= near_high[head])
            return near | ((d >= far_low[head]) & (d <= far_high[head]))

        return in_bands
    if layer.name == "longformer":
        return longformer_rule(context)
    if layer.name == "bigbird":
        return bigbird_rule(context)
    return reformer_rule(context, heads, device=device)


def _in_one_document(rule: Rule) -> Callable[..., Tensor]:
    """A rule as a mask function of sequences that are one document each."""

    # FlexAttention's kernels hand over the number of the sequence also where one mask serves all of them.
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(head, query, key)

    return sees


def _within_documents(rule: Rule, positions: Tensor) -> Callable[..., Tensor]:
    """A rule at positions ``(B, N)``, which start again with each document, as a mask function."""
    document = (positions == 0).cumsum(1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[batch, query] == document[batch, key]
        return same & rule(head, positions[batch, query], positions[batch, key])

    return sees


@cache
def compiled_for(function: FunctionType, layer: Layer, heads: int, context: int) -> Callable[..., Any]:
    """A function that takes the mask of a layer, compiled for that layer's rule alone.

    Dynamo keeps what it compiled with the code of a function, for all rules together, and from the ninth on
    (``torch._dynamo.config.recompile_limit``) runs FlexAttention unfused with no more than a warning. So each
    rule gets code of its own, and what exceeds the limit nevertheless raises.

    Parameters
    ----------
    function : function
        ``create_block_mask`` or ``flex_attention``.
    layer, heads, context
        As of `rule_of`.
    """
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, dynamic=False, fullgraph=True)


def block_mask(sees: Callable[..., Tensor], masks: int, length: int, device: torch.device) -> BlockMask:
    """What ``create_block_mask(sees, 1, masks, length, length)`` gives, some rows of blocks at a time.

    For a mask that serves a whole run: compiled, that function took Triton minutes at 16,384 tokens (PyTorch
    2.11), and not compiled it holds all pairs of all heads at once.
    """
    blocks = -(-length // BLOCK)
    place = torch.arange(blocks * BLOCK, dtype=torch.int32, device=device)
    key, batch = place[None], place.new_zeros(())
    rows = max(1, PAIRS_AT_A_TIME // (BLOCK * BLOCK * blocks)) * BLOCK
    counts = []
    for head in torch.arange(masks, dtype=torch.int32, device=device):
        for query in place[:, None].split(rows):
            # What pads the last block has no position of its own.
            seen = sees(batch, head, query.clamp(max=length - 1), key.clamp(max=length - 1))
            seen = seen & (query < length) & (key < length)
            counts.append(seen.view(-1, BLOCK, blocks, BLOCK).sum((1, 3), dtype=torch.int32))
    count = torch.cat(counts).view(1, masks, blocks, blocks)
    found = []
    for chosen in ((count > 0) & (count < BLOCK * BLOCK), count == BLOCK * BLOCK):
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        found += [chosen.sum(-1, dtype=torch.int32), order.int()]
    return BlockMask.from_kv_blocks(*found, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length))


def _make_mask(layer: Layer, heads: int, context: int, positions: Tensor | None, device: torch.device) -> Any:
    """FlexAttention's blocks on CUDA; bool ``(B, H or 1, N, N)``, or broadcasting so, elsewhere and for eager
    attention. Without positions each sequence is one document of the context's length.
    """
    batch, length = (1, context) if positions is None else positions.shape
    masks = 1 if layer.name in ALIKE else heads
    rule = rule_of(layer, heads, context, device)
    sees = _in_one_document(rule) if positions is None else _within_documents(rule, positions)
    if layer.means == "flex" and device.type == "cuda":
        if positions is None:
            return block_mask(sees, masks, length, device)
        make = compiled_for(create_block_mask, layer, heads, context)
        return make(sees, batch, masks, length, length, device=device)
    place = torch.arange(length, device=device)
    head = torch.arange(masks, device=device)[:, None, None]
    return sees(torch.arange(batch, device=device)[:, None, None, None], head, place[:, None], place)


class BatchAttention:
    """What the attention function needs of a batch beside tensors.

    No dataclass and no container: those FSDP2 takes apart, for tensors to cast, and puts together again.

    Attributes
    ----------
    layers : tuple of Layer
    masks : dict of Layer to Tensor or BlockMask
        Of the layers that have some.
    shared : SharedBatch or None
    """

    def __init__(
        self, layers: tuple[Layer, ...], masks: dict[Layer, Any], shared: SharedBatch | None = None
    ) -> None:
        self.layers, self.masks, self.shared = layers, masks, shared


def peer_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    batch: BatchAttention | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function, in transformers' form, of models with a layer that is not banded, and of ranks
    that share a batch's sequences.
    """
    if batch is None:
        raise ValueError("attention by name runs inside of LanguageModel, which hands it the layers' masks")
    layer, shared = batch.layers[module.layer_idx], batch.shared
    if layer.means == "bands" and shared is None:
        return banded_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    # Autocast leaves queries and keys in float32 behind their norms, and casts for PyTorch's operators only.
    query, key = query.to(value.dtype), key.to(value.dtype)
    groups = query.shape[1] // key.shape[1]
    if layer.means == "bound":
        o = query + key.repeat_interleave(groups, 1) + value.repeat_interleave(groups, 1)
    elif shared is not None:
        assert layer.layout is not None
        o = shared.attend(query, key, value, layer.layout, scaling)
    elif layer.means == "sdpa":
        with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
            o = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
            )
    elif isinstance(mask := batch.masks.get(layer), BlockMask):
        attend = compiled_for(flex_attention, layer, query.shape[1], query.shape[2])
        o = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=groups > 1)
    else:
        assert mask is not None
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
        # A query without keys (of "exclusive") has no weights, as in the specification.
        weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
        o = weights.to(value.dtype) @ value
    return o.transpose(1, 2).contiguous(), None


def _experts_in_autocast(module: nn.Module, *arguments: Tensor) -> Tensor:
    """Grouped GEMMs, which autocast does not know: their weights are cast here."""
    weight: Any = module.down_proj
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind) or weight.dtype == torch.get_autocast_dtype(kind):
        return grouped_mm_experts_forward(module, *arguments)
    cast = {name: w.to(torch.get_autocast_dtype(kind)) for name, w in module.named_parameters(recurse=False)}
    return torch.func.functional_call(module, cast, arguments)


def _register() -> None:
    AttentionInterface.register(PEERS, peer_attention_forward)
    AttentionMaskInterface.register(PEERS, banded_mask)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_in_autocast)


# --- the model --------------------------------------------------------------------------------------------


def _chunk_nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def nats_in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Cross-entropy of each token, float32 ``(T,)``, with the logits of `chunk` tokens at a time.

    Parameters
    ----------
    hidden : Tensor
        ``(T, W)``.
    weight : Tensor
        ``(V, W)``.
    targets : Tensor
        int64 ``(T,)``.
    chunk : int
    """
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_chunk_nats(h, weight, t) for h, t in parts])
    return torch.cat(
        [
            checkpoint(_chunk_nats, h, weight, t, use_reentrant=False, preserve_rng_state=False)
            for h, t in parts
        ]
    )


class LanguageModel(nn.Module):
    """A causal language model whose forward pass is its loss, so that DDP and FSDP2 wrap all of it.

    With a group it computes some rows of each sequence, and the group's other ranks the rest.
    """

    def __init__(self, config: Config, vocabulary: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        _register()
        self.group = group
        self.config = config
        self.layers = layers_of(config)
        self.all_banded = all(layer.means == "bands" for layer in self.layers)
        self._joined_masks: dict[Layer, Any] = {}
        shape = config.model
        sizes: dict[str, Any] = {
            # Padded for the tensor cores.
            "vocab_size": -(-vocabulary // 64) * 64,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": config.data.context,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "use_cache": False,
        }
        if shape.kind == "olmoe":
            experts = EXPERTS if shape.experts_implementation == "grouped_mm" else "eager"
            sizes |= {"num_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
            self.model: Any = OlmoeForCausalLM(OlmoeConfig(**sizes, experts_implementation=experts))
        else:
            self.model = LlamaForCausalLM(LlamaConfig(**sizes))
        if self.all_banded and group is None:
            set_layout(self.model, [layer.layout for layer in self.layers])
        else:
            bands = [layer.layout.spec if layer.means == "bands" else None for layer in self.layers]
            setattr(self.model.config, LAYOUTS_KEY, bands)
            self.model.set_attn_implementation(PEERS)
        if config.train.activation_checkpointing:
            self.model.activation_checkpointing_enable()

    def _masks(self, positions: Tensor) -> dict[Layer, Any]:
        masks: dict[Layer, Any] = {}
        is_joined = self.config.data.documents == "joined"
        if is_joined:
            masks = self._joined_masks
        for layer in self.layers:
            if layer.means in ("flex", "eager") and layer not in masks:
                masks[layer] = _make_mask(
                    layer,
                    self.config.model.heads,
                    self.config.data.context,
                    None if is_joined else positions,
                    positions.device,
                )
        return masks

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of windows of tokens.

        Parameters
        ----------
        tokens : Tensor
            int64 ``(B, C + 1)``; the same for all ranks of a group.
        positions : Tensor
            int64 ``(B, C)``: of the inputs, within their documents.

        Returns
        -------
        loss : Tensor
            Scalar, to minimize: mean cross-entropy in nats a token, and of experts the balancing loss. Of a
            group's rank what its rows add to it, times the number of ranks.
        nats : Tensor
            float32 ``(B, C)``: cross-entropy of each token, without gradient.
        """
        is_joined = self.config.data.documents == "joined"
        shared = None if self.group is None else SharedBatch.of(positions, is_joined, self.group)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if is_joined:
            positions = torch.arange(positions.shape[1], device=positions.device)[None]
        arguments: dict[str, Any] = {}
        if shared is not None:
            positions = positions.expand(inputs.shape)
            inputs, targets, positions = (shared.own(rows) for rows in (inputs, targets, positions))
            arguments["batch"] = BatchAttention(self.layers, {}, shared)
        elif not self.all_banded:
            arguments["batch"] = BatchAttention(self.layers, self._masks(positions))
        shape = self.config.model
        if shape.kind == "olmoe":
            arguments["output_router_logits"] = True
        outputs = self.model.model(input_ids=inputs, position_ids=positions, **arguments)
        hidden = outputs.last_hidden_state.flatten(0, 1)
        nats = nats_in_chunks(
            hidden, self.model.lm_head.weight, targets.flatten(), self.config.train.loss_chunk
        )
        router = None
        if shape.kind == "olmoe" and shape.router_loss:
            router = (outputs.router_logits, shape.experts, shape.experts_per_token)
        if shared is None:
            loss = nats.mean()
            if router is not None:
                loss = loss + shape.router_loss * load_balancing_loss_func(*router)
            return loss, nats.detach().view(targets.shape)
        loss = nats.sum() / tokens[:, 1:].numel()
        if router is not None:
            loss = loss + shape.router_loss * shared.balancing_loss(*router)
        return shared.ranks * loss, shared.whole(nats.detach().view(targets.shape))


def save_model(
    config: Config, vocabulary: int, weights: dict[str, Tensor], folder: Path, separator: int
) -> bool:
    """Write a model that ``from_pretrained`` and ``generate`` take, its bands in its configuration.

    Parameters
    ----------
    config : Config
    vocabulary : int
        Of the tokenizer.
    weights : dict of str to Tensor
        State of a `LanguageModel`.
    folder : Path
    separator : int
        The token that documents begin with.

    Returns
    -------
    bool
        False, and nothing is written, where a layer has a mask that transformers does not know.
    """
    layouts = [layer.layout for layer in layers_of(config)]
    if None in layouts or "bound" in config.names:
        return False
    # Whoever loads it has the whole sequences.
    config = replace(config, train=replace(config.train, context_parallel=1))
    with torch.device("meta"):
        model = LanguageModel(config, vocabulary).model
    if set(config.names) == {"dense"}:
        delattr(model.config, LAYOUTS_KEY)
    else:
        set_layout(model, layouts)
    model.config.use_cache = model.generation_config.use_cache = True
    for entries in (model.config, model.generation_config):
        entries.bos_token_id = entries.eos_token_id = separator
    model.save_pretrained(
        folder, state_dict={name.removeprefix("model."): weight for name, weight in weights.items()}
    )
    return True


# --- work -------------------------------------------------------------------------------------------------


@cache
def _pairs_up_to(layer: Layer, heads: int, context: int) -> Tensor:
    """int64 ``(C + 1,)``: pairs that all heads attend to in a document of each length up to the context."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rule, key = rule_of(layer, heads, context, device), torch.arange(context, device=device)
    counts = torch.zeros(context + 1, dtype=torch.int64)
    masks = 1 if layer.name in ALIKE else heads
    for head in torch.arange(masks, device=device):
        for first in range(0, context, RULE_ROWS):
            rows = key[first : first + RULE_ROWS, None]
            counts[first + 1 : first + 1 + len(rows)] += rule(head, rows, key).sum(1).cpu()
    return counts.cumsum(0) * (heads // masks)


@cache
def pairs(layer: Layer, heads: int, context: int, length: int) -> int:
    """(query, key) pairs that all heads attend to in a document of `length`; of the bound none."""
    if layer.means == "bound":
        return 0
    if layer.layout is not None:
        return layer.layout.pairs(length)
    return int(_pairs_up_to(layer, heads, context)[length])


def document_lengths(config: Config, positions: Tensor) -> list[int]:
    """Lengths of the documents, or pieces of them, in rows of positions on the host."""
    if config.data.documents == "joined":
        return [positions.shape[1]] * positions.shape[0]
    starts = (positions == 0).flatten().nonzero().flatten().tolist()
    return [end - begin for begin, end in zip(starts, [*starts[1:], positions.numel()], strict=True)]


def matmul_flops_per_token(config: Config, vocabulary: int) -> int:
    """``6 P`` of the weights that a token meets, its experts and the output layer among them."""
    shape = config.model
    head_dim = shape.hidden // shape.heads
    width = 2 * head_dim * (shape.heads + shape.kv_heads)  # q and o, k and v
    of_layer = shape.hidden * (width + 3 * shape.intermediate)
    if shape.kind == "olmoe":
        of_layer = shape.hidden * (width + 3 * shape.intermediate * shape.experts_per_token + shape.experts)
    return 6 * (shape.layers * of_layer + shape.hidden * (-(-vocabulary // 64) * 64))


def attention_flops(config: Config, lengths: list[int]) -> int:
    """``12 D`` for each pair: two products forward, four backward; what is recomputed does not count."""
    shape = config.model
    total = sum(
        pairs(layer, shape.heads, config.data.context, length)
        for layer in layers_of(config)
        for length in lengths
    )
    return 12 * (shape.hidden // shape.heads) * total
