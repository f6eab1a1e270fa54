"""Measure a step's forward and backward pass, and with the optimizer, at one context length.

    python scripts/pretrain/throughput.py scripts/pretrain/configs/throughput/olmoe.toml \
        --set data.context=65536 --set attention.name=dense --out results/pretrain/throughput/h100.jsonl

Appends a line of JSON, which tables.py makes the table of. Tokens are random: nothing is learnt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from config import Config, ConfigError, add_arguments, load_arguments
from model import LanguageModel, attention_flops, matmul_flops_per_token
from train import autocast, make_optimizer, peak_flops, peak_memory_bytes, placed, wrap

from spattn_tvm.provenance import device_facts, installed_versions


def _median_seconds(work: Callable[[], None], device: torch.device, warmup: int, repeats: int) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(config: Config, vocabulary: int, warmup: int, repeats: int) -> dict[str, Any]:
    """Tokens a second and MFU of all processes, and peak memory of this one.

    Parameters
    ----------
    config : Config
        Its ``train.micro_batch`` sequences of ``data.context`` random tokens, one document each, make a step
        of a process, or of ``train.context_parallel`` processes that share them.
    vocabulary, warmup, repeats : int
    """
    with placed(config) as place:
        torch.manual_seed(config.train.seed)
        with place.device:
            model = LanguageModel(config, vocabulary, place.group)
        wrapped = wrap(model, config, place)
        optimizer = make_optimizer(wrapped, config)
        batch, context = config.train.micro_batch, config.data.context
        tokens = torch.randint(vocabulary, (batch, context + 1), device=place.device)
        positions = torch.arange(context, device=place.device).expand(batch, context)

        def forward_backward() -> None:
            optimizer.zero_grad(set_to_none=True)
            with autocast(config, place):
                loss, _ = wrapped(tokens, positions)
            loss.backward()

        def with_optimizer() -> None:
            forward_backward()
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), config.train.clip)
            optimizer.step()

        tokens_of_all = place.batches * batch * context
        flops = tokens_of_all * matmul_flops_per_token(config, vocabulary)
        flops += place.batches * attention_flops(config, [context] * batch)
        peak = peak_flops(config, place.device)
        found: dict[str, Any] = {}
        for name, work in (("forward_backward", forward_backward), ("with_optimizer", with_optimizer)):
            seconds = _median_seconds(work, place.device, warmup, repeats)
            found[name] = {
                "seconds": seconds,
                "tokens_per_second": tokens_of_all / seconds,
                "mfu": flops / seconds / (peak * place.world) if peak else None,
            }
        facts = device_facts(place.device)
        return found | {
            "label": config.label,
            "context": context,
            "layers": config.model.layers,
            "processes": place.world,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "peak_memory_bytes": peak_memory_bytes(place.device),
            "device": facts["name"],
            "facts": facts,
            "config": config.as_dict(),
            "versions": installed_versions(("torch", "transformers", "spattn-tvm", "apache-tvm")),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, which is appended to")
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    try:
        config = load_arguments(arguments)
        line = measure(config, arguments.vocabulary, arguments.warmup, arguments.repeats)
    except ConfigError as error:
        sys.exit(str(error))
    if int(os.environ.get("RANK", 0)):
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(
        f"{line['label']} at {line['context']:,}: "
        f"{line['forward_backward']['tokens_per_second']:,.0f} tokens/s, forward + backward"
    )


if __name__ == "__main__":
    main()
