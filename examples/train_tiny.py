"""Train a tiny language model whose layers are BandedAttention, then continue a text with a cache.

    python examples/train_tiny.py

The text repeats itself every 24 bytes, so that a model that learns to look back one period predicts it: the
loss falls from 5.5 to below 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spattn_tvm import BandedAttention

CONTEXT, HEADS, WIDTH = 128, 4, 128
TEXT = "bands of distances, he: " * 200


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = BandedAttention(WIDTH, HEADS, context_length=CONTEXT, rope_theta=1e4)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, cache=None) -> Tensor:
        x = x + self.attention(self.before_attention(x), cache=cache)
        return x + self.mlp(self.before_mlp(x))


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, caches=(None, None)) -> Tensor:
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.head(x)


def train(model: LanguageModel, text: Tensor, steps: int = 60) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        begins = torch.randint(len(text) - CONTEXT - 1, (8,))
        rows = torch.stack([text[begin : begin + CONTEXT + 1] for begin in begins.tolist()])
        logits = model(rows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def continue_text(model: LanguageModel, prompt: Tensor, tokens: int) -> Tensor:
    """Greedy; a step reads only what the bands can see of the keys that are kept."""
    caches = [block.attention.make_cache(batch_size=1) for block in model.blocks]
    made = [model(prompt[None], caches)[0, -1:].argmax(-1)]
    while len(made) < tokens:
        made.append(model(made[-1][None], caches)[0, -1:].argmax(-1))
    return torch.cat(made)


def main() -> None:
    torch.manual_seed(0)
    text = torch.tensor([*TEXT.encode()])
    model = LanguageModel()
    losses = train(model, text)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[-1] < 1, losses

    prompt, tokens = text[:60], 40
    continued = continue_text(model, prompt, tokens)
    print(repr(bytes(continued.tolist()).decode(errors="replace")))
    # The cache gives what the whole sequence gives.
    with torch.no_grad():
        logits = model(torch.cat((prompt, continued))[None, :-1])[0]
    assert torch.equal(logits[len(prompt) - 1 :].argmax(-1), continued)


if __name__ == "__main__":
    main()
