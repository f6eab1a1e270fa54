"""Train a byte-level language model twice, with SPAttention and with dense attention, on real English text.

The text is CPython's own documentation topics (``pydoc_data.topics``, about 370 kB), which every Python
carries; every eighth topic is held out. Both models start from the same weights, see the same batches in the
same order and take turns every few steps, so that their losses and their speeds can be compared.

    python scripts/train_byte_lm.py --minutes 4
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spattn_tvm import BandLayout, banded_attention
from spattn_tvm.nn import rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

ROPE_THETA = 10_000.0
# Steps of one model before the other has its turn. Both thread pools spin for a while after their last piece
# of work, so a turn starts after a pause and its first step is not timed.
TURN_STEPS = 10
PAUSE_S = 0.1


@dataclass(frozen=True)
class Sizes:
    """Shape of the model and of a batch."""

    context: int
    batch: int
    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def spattention(sizes: Sizes) -> Attend:
    layout = BandLayout.spattention(sizes.heads, sizes.context)
    return lambda q, k, v: banded_attention(q, k, v, layout)


def dense(sizes: Sizes) -> Attend:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


VARIANTS: dict[str, Callable[[Sizes], Attend]] = {"SPAttention": spattention, "dense SDPA": dense}


class Block(nn.Module):
    """Pre-norm transformer block; `attend` is the only thing in which the two models differ."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = sizes.heads, attend
        self.attention_norm = nn.LayerNorm(sizes.width, bias=False)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        self.mlp_norm = nn.LayerNorm(sizes.width, bias=False)
        self.up = nn.Linear(sizes.width, 4 * sizes.width, bias=False)
        self.down = nn.Linear(4 * sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        # (B, N, H*D) -> (B, H, N, D) as a view: the kernels take any strides with a contiguous last one.
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q, ROPE_THETA), rotate(k, ROPE_THETA)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class ByteModel(nn.Module):
    """Next-byte logits ``(B, N, 256)`` of bytes ``(B, N)``."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, attend) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                depth_scale = (
                    (2 * sizes.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                )
                nn.init.normal_(weight, std=0.02 * depth_scale)

    def forward(self, text: Tensor) -> Tensor:
        x = self.byte(text)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.byte.weight.T

    def loss(self, text: Tensor) -> Tensor:
        """Mean cross entropy, in nats a byte, of ``text[:, 1:]`` given what stands before."""
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def load_text() -> tuple[Tensor, Tensor]:
    """Training and held-out bytes.

    Some topics repeat others ("async" is a part of "compound"): a paragraph is used once, and one that
    stands in the training text is not held out.
    """
    from pydoc_data.topics import topics

    parts: tuple[list[str], list[str]] = ([], [])
    for index, name in enumerate(sorted(topics)):
        parts[index % 8 == 2].extend(text.strip("\n") for text in topics[name].split("\n\n"))
    train = "\n\n".join(dict.fromkeys(parts[0]))
    held_out = "\n\n".join(text for text in dict.fromkeys(parts[1]) if text not in train)
    first, second = (
        torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() for text in (train, held_out)
    )
    return first, second


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    return text[starts[:, None] + torch.arange(context + 1)]


@dataclass
class Run:
    """One model in training and what was measured of it."""

    name: str
    model: ByteModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # nats a byte, one per step
    step_seconds: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # step, bits a byte

    @classmethod
    def start(cls, name: str, sizes: Sizes, seed: int, learning_rate: float) -> Run:
        torch.manual_seed(seed)
        model = ByteModel(sizes, VARIANTS[name](sizes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), fused=True)
        return cls(name, model, optimizer)

    def step(self, text: Tensor, learning_rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = learning_rate
        begin = time.perf_counter()
        loss = self.model.loss(text)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step_seconds.append(time.perf_counter() - begin)

    def __str__(self) -> str:
        recent = self.losses[-TURN_STEPS:]
        training = f"{sum(recent) / len(recent) / math.log(2):.3f} bits/byte, " if recent else ""
        return f"{self.name}: {training}held out {self.held_out[-1][1]:.3f}"

    @torch.no_grad()
    def evaluate(self, text: Tensor, context: int) -> None:
        """Bits a byte over `text`, in windows of `context` bytes."""
        starts = torch.arange(0, len(text) - context - 1, context)
        nats = 0.0
        for part in starts.split(max(1, 8192 // context)):
            nats += self.model.loss(windows(text, part, context)).item() * len(part)
        self.held_out.append((len(self.losses), nats / len(starts) / math.log(2)))


def learning_rate_at(progress: float, peak: float) -> float:
    """Linear warm-up over the first 5%, then a cosine to a tenth of the peak."""
    if progress < 0.05:
        return peak * max(progress, 0.002) / 0.05
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95)))


def median_step_seconds(run: Run) -> float:
    """Median over the steps that are not the first of a turn."""
    timed = sorted(s for index, s in enumerate(run.step_seconds) if index % TURN_STEPS)
    return timed[len(timed) // 2]


def train(
    sizes: Sizes, learning_rate: float, seed: int, *, steps: int | None = None, minutes: float | None = None
) -> list[Run]:
    """Train both models for a number of steps, or for as many as fit a time, evaluations included."""
    training, held_out = load_text()
    runs = [Run.start(name, sizes, seed, learning_rate) for name in VARIANTS]
    order = torch.Generator().manual_seed(seed)
    began = time.monotonic()
    made = 0
    while True:
        seconds = time.monotonic() - began
        progress = seconds / (60 * minutes) if minutes is not None else made / (steps or 1)
        if made % (5 * TURN_STEPS) == 0 or progress >= 1:
            for run in runs:
                run.evaluate(held_out, sizes.context)
            print(
                f"step {made:5d}, {min(progress, 1):4.0%}, {seconds:4.0f} s   " + "   ".join(map(str, runs)),
                flush=True,
            )
        if progress >= 1:
            return runs
        rate = learning_rate_at(progress, learning_rate)
        starts = torch.randint(len(training) - sizes.context, (TURN_STEPS, sizes.batch), generator=order)
        for run in runs:
            time.sleep(PAUSE_S)
            for start in starts:
                run.step(windows(training, start, sizes.context), rate)
        made += TURN_STEPS


def summarize(runs: list[Run], sizes: Sizes, seed: int) -> dict:
    steps = len(runs[0].losses)
    tokens = sizes.batch * sizes.context
    return {
        "format": 1,
        "sizes": vars(sizes) | {"parameters": sum(p.numel() for p in runs[0].model.parameters())},
        "steps": steps,
        "tokens": tokens * steps,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "models": {
            run.name: {
                "tokens_per_second": tokens / median_step_seconds(run),
                "final_training_bits_per_byte": sum(run.losses[-50:]) / len(run.losses[-50:]) / math.log(2),
                "held_out_bits_per_byte": run.held_out[-1][1],
                "held_out": run.held_out,
                "losses": run.losses,
            }
            for run in runs
        },
    }


def print_table(summary: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    sizes = summary["sizes"]
    table = Table(
        title=f"Byte-level language model, {sizes['parameters'] / 1e6:.1f} M parameters, "
        f"context {sizes['context']}, {summary['tokens'] / 1e6:.2f} M bytes seen, "
        f"{summary['threads']} threads"
    )
    table.add_column("attention")
    for title in ("tokens/s", "training bits/byte", "held-out bits/byte"):
        table.add_column(title, justify="right")
    for name, model in summary["models"].items():
        table.add_row(
            name,
            f"{model['tokens_per_second']:,.0f}",
            f"{model['final_training_bits_per_byte']:.3f}",
            f"{model['held_out_bits_per_byte']:.3f}",
        )
    Console().print(table)


def plot(summary: dict, path: Path) -> None:
    from spattn_tvm.plotting import plot_loss_curves

    series = []
    for name, model in summary["models"].items():
        losses = torch.tensor(model["losses"]) / math.log(2)
        window = min(20, len(losses))
        mean = losses.unfold(0, window, 1).mean(-1).tolist()
        series.append((f"{name}, training", [(window + step, value) for step, value in enumerate(mean)]))
        series.append((f"{name}, held out", model["held_out"]))
    speeds = ", ".join(
        f"{name} {m['tokens_per_second']:,.0f} tokens/s" for name, m in summary["models"].items()
    )
    plot_loss_curves(series, path, y_label="bits per byte", title=f"Byte-level language model: {speeds}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="train for about this long (overrides --steps)")
    parser.add_argument("--steps", type=int, default=400, help="steps of each model, rounded up to tens")
    parser.add_argument("--shape", default="1,8,2048,32", help="sequences, heads, bytes a sequence, head dim")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's choice by default)")
    parser.add_argument("--out", type=Path, default=Path("results/byte_lm"), help="folder for JSON and PNG")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    batch, heads, context, head_dim = map(int, arguments.shape.split(","))
    sizes = Sizes(context, batch, arguments.layers, heads, head_dim)
    runs = train(
        sizes, arguments.learning_rate, arguments.seed, steps=arguments.steps, minutes=arguments.minutes
    )
    summary = summarize(runs, sizes, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "byte_lm.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    plot(summary, arguments.out / "byte_lm.png")
    print_table(summary)
    print(f"Written: {arguments.out / 'byte_lm.json'}, {arguments.out / 'byte_lm.png'}")


if __name__ == "__main__":
    main()
