"""A model of transformers under its tp_plan: each rank's heads have their own bands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from banded_models import CONTEXT, HEADS, VOCABULARY, make_model
from rank_processes import Ranks

from spattn_tvm.bands import BandLayout


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(1, VOCABULARY, (2, 37), generator=generator)


def _compare(folder: str) -> None:
    import transformers
    from transformers.distributed import DistributedConfig

    from spattn_tvm.integrations.transformers import make_cache, register

    register()
    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    tokens = _tokens()
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
    )
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] * 2 == HEADS * 32
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    for options in ({}, {"attention_mask": mask}):
        seen = options.get("attention_mask", torch.ones_like(tokens)).bool()
        expected, ours = whole(tokens, **options).logits, model(tokens, **options).logits
        torch.testing.assert_close(ours[seen], expected[seen], rtol=1e-3, atol=1e-3)
    model(tokens, labels=tokens).loss.backward()
    whole(tokens, labels=tokens).loss.backward()
    for name, parameter in whole.named_parameters():
        gradient = model.get_parameter(name).grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    with torch.no_grad():
        kwargs = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(tokens, **kwargs), whole.generate(tokens, **kwargs))
        with pytest.raises(ValueError, match="banded cache of a part of the heads"):
            model(tokens, past_key_values=make_cache(model))
    # What no parameter tells is not guessed.
    attention = whole.model.layers[0].self_attn
    from spattn_tvm.integrations.transformers import _heads_of_rank

    with pytest.raises(ValueError, match=rf"attends with 2 query heads, .* are for {HEADS}:"):
        _heads_of_rank(attention, 2, BandLayout.spattention(HEADS, CONTEXT))


def test_a_tp_plan_gives_each_rank_the_bands_of_its_heads(two: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("transformers.distributed")
    from spattn_tvm.integrations.transformers import register, set_layout

    register()
    model = make_model("llama")
    set_layout(model, BandLayout.spattention(HEADS, CONTEXT))
    model.set_attn_implementation("spattn")
    model.save_pretrained(tmp_path)
    two.call(_compare, str(tmp_path))
