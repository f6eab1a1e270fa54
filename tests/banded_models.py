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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **others: Any,
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
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = (query @ key.mT * scale).masked_fill(~sees, torch.finfo(query.dtype).min)
    weights = scores.softmax(-1).masked_fill(~sees.any(-1, keepdim=True), 0.0)
    return (weights @ value).transpose(1, 2), None


def register_the_definition() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(BY_DEFINITION, _attend_by_definition)
    AttentionMaskInterface.register(BY_DEFINITION, eager_mask)


_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}

# What transformers 5.24 has besides, by the names of its classes, and what a tiny one needs to be said. Each
# of the first eight differs in something that concerns attention; the others run in a sweep.
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": HEAD_DIM},
    "Phi3": {},
    "Gemma": {"head_dim": HEAD_DIM},
    "Granite": {},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": HEADS * HEAD_DIM},
    "Qwen2Moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Cohere": {},
    "GPT2": {},
    "Glm4": {"head_dim": HEAD_DIM},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Olmo2": {},
    "Qwen2": {},
    "Qwen3Moe": {**_EXPERTS, "head_dim": HEAD_DIM},
    "Qwen3Next": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 32,
        "head_dim": HEAD_DIM,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "SmolLM3": {},
    "StableLm": {},
    "Starcoder2": {"sliding_window": None},
}


def make_model(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A model of ``"llama"``'s or ``"olmoe"``'s shape, or of classes named `kind`, without bands yet."""
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
    name = {"llama": "Llama", "olmoe": "Olmoe"}.get(kind, kind)
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}ForCausalLM", None) or getattr(
        transformers, f"{name}LMHeadModel"
    )
    torch.manual_seed(seed)
    return model_class(config_class(**(sizes | OTHER_MODELS.get(kind, {}) | settings)))
