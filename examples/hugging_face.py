"""Give a model of Hugging Face transformers bands, train it, save it, load it and generate.

    python examples/hugging_face.py

The model is a Llama with random weights, so that nothing is downloaded; any decoder whose attention goes
through transformers' AttentionInterface takes bands the same way.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spattn_tvm import BandLayout
from spattn_tvm.integrations.transformers import make_cache, register, set_layout

CONTEXT, HEADS = 96, 4


def make_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=None))
    set_layout(model, BandLayout.spattention(HEADS, CONTEXT))
    return model


def train(model: LlamaForCausalLM, steps: int = 40) -> list[float]:
    """Sequences that count upwards from a random number, some of them padded on the right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(2, 64, (8, 1)) + torch.arange(64)
        tokens = (tokens - 2) % 62 + 2
        mask = torch.arange(64) < torch.randint(32, 65, (8, 1))
        loss = model(tokens, attention_mask=mask.long(), labels=tokens.where(mask, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    model = make_model()
    losses = train(model)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[-1] < 0.3 * losses[0], losses

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        register()  # in a process that has not called set_layout
        model = LlamaForCausalLM.from_pretrained(folder).eval()
    prompt = torch.arange(10, 20)[None]
    ours = model.generate(prompt, cache=make_cache(model), max_new_tokens=12, do_sample=False)
    usual = model.generate(prompt, max_new_tokens=12, do_sample=False)  # with transformers' own cache
    print(ours[0].tolist())
    assert torch.equal(ours, usual)


if __name__ == "__main__":
    main()
