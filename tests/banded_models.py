"""Tiny random models of Hugging Face transformers, and banded attention in them by its definition.

The definition is an attention function of its own: transformers' eager mask (causality, padding, packing)
and, over it, which distances each head attends to. Nothing of the adapter takes part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spattn_tvm.bands import LIMIT, BandLayout

HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY, CONTEXT = 4, 2, 32, 2, 97, 96
BY_DEFINITION = "banded_by_definition"


def _attend_by_definition(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **others: Any
) -> tuple[Tensor, None]:
    specs = module.config.spattn_layouts  # type: ignore[union-attr]
    layout = BandLayout.from_spec(specs[module.layer_idx])  # type: ignore[index]
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    sees = torch.zeros(layout.num_heads, queries, keys, dtype=torch.bool)
    for head, bands in enumerate(layout.bands(LIMIT if layout.is_autoregressive else keys)):
        for low, high in bands:
            sees[head] |= (distance >= low) & (distance <= high)
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    sees = sees.to(query.device) & (attention_mask == 0)
    scores = (query @ key.mT * query.shape[3] ** -0.5).masked_fill(~sees, torch.finfo(query.dtype).min)
    weights = scores.softmax(-1).masked_fill(~sees.any(-1, keepdim=True), 0.0)
    return (weights @ value).transpose(1, 2), None


def register_the_definition() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(BY_DEFINITION, _attend_by_definition)
    AttentionMaskInterface.register(BY_DEFINITION, eager_mask)


def make_model(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A model of ``"llama"``'s or ``"olmoe"``'s shape, without bands yet."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        # Weights that tell tokens apart: with the usual 0.02 all logits are near one another.
        "initializer_range": 0.1,
    }
    if kind == "olmoe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2}
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "olmoe": (transformers.OlmoeConfig, transformers.OlmoeForCausalLM),
    }[kind]
    torch.manual_seed(seed)
    return model_class(config_class(**(sizes | settings)))
