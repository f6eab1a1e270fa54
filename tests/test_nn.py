"""The module against its own formula in plain PyTorch."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.nn.functional import scaled_dot_product_attention

from spattn_tvm.bands import BandLayout
from spattn_tvm.cache import PagedCache
from spattn_tvm.nn import BandedAttention, rotate
from spattn_tvm.reference import attention_mask


def by_complex_numbers(x: Tensor, theta: float) -> Tensor:
    """The rotary embedding as a product of complex numbers."""
    half = x.shape[-1] // 2
    turn = torch.polar(
        torch.ones(()).double(),
        torch.arange(x.shape[-2]).double()[:, None] * theta ** (-torch.arange(half).double() / half),
    )
    product = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((product.real, product.imag), -1).to(x.dtype)


def expected(module: BandedAttention, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    def heads(projection: torch.nn.Linear, count: int) -> Tensor:
        return projection(x).view(*x.shape[:2], count, module.head_dim).transpose(1, 2)

    q = heads(module.q_proj, module.num_heads)
    k, v = (heads(p, module.num_kv_heads) for p in (module.k_proj, module.v_proj))
    if module.rope_theta is not None:
        q, k = by_complex_numbers(q, module.rope_theta), by_complex_numbers(k, module.rope_theta)
    mask = attention_mask(module.layout, x.shape[1], cu_seqlens)
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=True)
    return module.out_proj(o.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_kv_heads", [None, 1, 2])
@pytest.mark.parametrize("rope_theta", [None, 100.0])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_output_and_gradients(
    bias: bool, num_kv_heads: int | None, rope_theta: float | None, impl: str
) -> None:
    torch.manual_seed(0)
    module = BandedAttention(128, 4, num_kv_heads=num_kv_heads, bias=bias, rope_theta=rope_theta, impl=impl)
    x = torch.randn(2, 45, 128, requires_grad=True)
    ours, theirs = module(x), expected(module, x)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    weights = torch.randn_like(ours)
    wanted = [x, *module.parameters()]
    for ours_grad, theirs_grad in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((theirs * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-4)


def test_packed_documents_equal_separate_calls() -> None:
    """With rotary positions that run on from document to document."""
    module = BandedAttention(64, 2, rope_theta=10.0, impl="reference").double()
    x = torch.randn(1, 30, 64).double()
    packed = module(x, torch.tensor([0, 11, 11, 30]))
    torch.testing.assert_close(packed[:, :11], module(x[:, :11]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed[:, 11:], module(x[:, 11:]), rtol=1e-9, atol=1e-9)
    assert (packed - module(x)).abs().max() > 1e-3


def test_layout_by_name_and_by_value() -> None:
    assert BandedAttention(64, 2).layout == BandLayout.spattention(2)
    assert BandedAttention(64, 2, layout="causal", context_length=9).layout == BandLayout.causal(2, 9)
    window = BandLayout.sliding_window(2, 5)
    module = BandedAttention(64, 2, layout=window, impl="reference")
    x = torch.randn(1, 20, 64)
    torch.testing.assert_close(module(x), expected(module, x))
    assert "sliding_window:heads=2,window=5" in repr(module)


def test_state_dict_names() -> None:
    names = {f"{p}.{n}" for p in ("q_proj", "k_proj", "v_proj", "out_proj") for n in ("weight", "bias")}
    assert set(BandedAttention(64, 2, bias=True).state_dict()) == {*names, "_extra_state"}


# --- the layout in the state ------------------------------------------------------------------------------

LONG = BandLayout.custom([[(head, head + 9), (40 + head, 127)] for head in range(64)], 128)
LOADABLE = [
    (BandLayout.spattention(2, 64), BandLayout.spattention(2, 64)),
    (BandLayout.spattention(2), BandLayout.spattention(2)),
    # The same distances by another name, or for longer sequences.
    (BandLayout.spattention(2, 64), BandLayout.spattention(2, 64, allow_longer=True)),
    (BandLayout.sliding_window(2, 9), BandLayout.custom([[(0, 8)]] * 2, 100)),
    (LONG, LONG),
]
REFUSED = [
    (BandLayout.spattention(2, 64), BandLayout.causal(2, 64)),
    (BandLayout.spattention(2, 64), BandLayout.spattention(2, 65)),
    (BandLayout.spattention(2), BandLayout.spattention(2, 64)),
    (BandLayout.spattention(2, 64), BandLayout.spattention(2)),
    (BandLayout.spattention(2), BandLayout.equal_area(2)),
    (BandLayout.spattention(4, 64).heads(0, 2), BandLayout.spattention(4, 64).heads(2, 4)),
    (BandLayout.spattention(4).heads(0, 2), BandLayout.spattention(2)),
    (LONG, BandLayout.spattention(64)),
]


def module_of(layout: BandLayout, **options: Any) -> BandedAttention:
    return BandedAttention(8 * layout.num_heads, layout.num_heads, layout=layout, **options)


class Model(nn.Module):
    """Two attention layers, deeper than the module itself."""

    def __init__(self, layout: BandLayout, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(module_of(layout, **options) for _ in range(2))


def refusal(saved: BandLayout, own: BandLayout) -> str:
    return f"(?s)'{re.escape(saved.spec)}', the module has '{re.escape(own.spec)}'.*_extra_state"


def serialised(state: dict[str, Any]) -> dict[str, Any]:
    memory = io.BytesIO()
    torch.save(state, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


@pytest.mark.parametrize(("saved", "own"), LOADABLE)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_weights_load_into_the_same_bands(
    saved: BandLayout, own: BandLayout, strict: bool, assign: bool
) -> None:
    source, target = Model(saved), Model(own)
    keys = target.load_state_dict(serialised(source.state_dict()), strict=strict, assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert torch.equal(target.layers[1].q_proj.weight, source.layers[1].q_proj.weight)
    assert target.layers[1].layout == own


@pytest.mark.parametrize(("saved", "own"), REFUSED)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_weights_of_another_layout_are_refused(
    saved: BandLayout, own: BandLayout, strict: bool, assign: bool
) -> None:
    state = serialised(Model(saved).state_dict())
    with pytest.raises(RuntimeError, match=refusal(saved, own)) as refused:
        Model(own).load_state_dict(state, strict=strict, assign=assign)
    # Each layer is named, like parameters of other shapes.
    assert "layers.0: these weights" in str(refused.value) and "layers.1: these" in str(refused.value)
    with pytest.raises(RuntimeError, match="BandedAttention: these weights"):
        module_of(own).load_state_dict(module_of(saved).state_dict())


def test_a_state_without_the_entry_loads_into_any_layout() -> None:
    source = Model(BandLayout.spattention(2))
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("_extra_state")}
    assert len(state) == 8
    for layout in (BandLayout.spattention(2), BandLayout.causal(2, 99)):
        target = Model(layout)
        keys = target.load_state_dict(state)
        assert not keys.missing_keys and not keys.unexpected_keys
        assert torch.equal(target.layers[0].k_proj.weight, source.layers[0].k_proj.weight)
        assert target.layers[0].layout == layout
    # What else is missing or too much is still said.
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*layers\.1\.q_proj\.weight"):
        Model(BandLayout.causal(2)).load_state_dict({k: v for k, v in state.items() if "1.q_proj" not in k})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.more"):
        Model(BandLayout.causal(2)).load_state_dict({**state, "layers.0.more": torch.zeros(1)})


def test_a_damaged_entry_is_refused_and_one_without_values_is_not_compared() -> None:
    module = module_of(BandLayout.causal(2))
    state = module.state_dict()
    entry = state["_extra_state"]
    for damaged in (
        torch.full((256,), 77),
        torch.zeros(256),
        "nonsense",
        torch.full((3,), torch.nan),
        torch.tensor(5),
        torch.zeros(0),
        torch.full((256,), 2**40),
        entry.bool(),
        entry.to_sparse(),
        entry.to(torch.complex64),
        [entry],
        None,
    ):
        with pytest.raises(RuntimeError, match="the module has 'causal:heads=2'"):
            module.load_state_dict({**state, "_extra_state": damaged})
    module.load_state_dict({**state, "_extra_state": entry.view(16, -1)})
    module.load_state_dict({**state, "_extra_state": entry.to("meta")})
    module.load_state_dict({**state, "_extra_state": "causal:heads=2"})


def test_the_entry_survives_what_is_done_to_states() -> None:
    module, other = Model(LONG), Model(LONG)
    pairs = [(value, other.state_dict()[key]) for key, value in module.state_dict().items()]
    for blend in (
        lambda a, b: (a + b) / 2,
        lambda a, b: 0.999 * a + 0.001 * b,
        lambda a, b: torch.stack([a] * 9 + [b]).double().mean(0),
        lambda a, b: a.bfloat16(),
        lambda a, b: a.half(),
        lambda a, b: a.clone(),
    ):
        blended = [blend(*pair) for pair in pairs]
        module.load_state_dict(dict(zip(module.state_dict(), blended, strict=True)))


def test_a_module_that_is_made_on_meta_takes_a_state() -> None:
    source = Model(BandLayout.spattention(2, 64), impl="reference")
    with torch.device("meta"):
        target = Model(BandLayout.spattention(2, 64), impl="reference")
        other = Model(BandLayout.causal(2))
        state = source.state_dict()
    assert state["layers.0._extra_state"].device.type == "cpu"
    with pytest.raises(RuntimeError, match="these weights belong to"):
        other.load_state_dict(state, assign=True)
    target.load_state_dict(state, assign=True)
    x = torch.randn(1, 9, 16)
    assert torch.equal(target.layers[0](x), source.layers[0](x))


def test_compiled_modules_have_the_same_states() -> None:
    source, target = module_of(BandLayout.gapped(2, 64)), module_of(BandLayout.gapped(2, 64))
    torch.compile(target).load_state_dict(torch.compile(source).state_dict())
    assert torch.equal(target.out_proj.weight, source.out_proj.weight)
    with pytest.raises(RuntimeError, match="these weights belong to"):
        torch.compile(module_of(BandLayout.causal(2))).load_state_dict(torch.compile(source).state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints(tmp_path: Path) -> None:
    saved = BandLayout.spattention(2, 64)
    source = Model(saved)
    distributed_checkpoint.save(source.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    target, other = Model(saved), Model(BandLayout.spattention(2))
    for model in (target, other):
        state = model.state_dict()
        distributed_checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
        if model is target:
            model.load_state_dict(state)
        else:
            with pytest.raises(RuntimeError, match=refusal(saved, BandLayout.spattention(2))):
                model.load_state_dict(state)
    assert torch.equal(target.layers[0].v_proj.weight, source.layers[0].v_proj.weight)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "options", [{}, {"full_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}]
)
def test_sharded_modules(options: dict[str, bool], tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    def sharded(layout: BandLayout) -> Model:
        model = Model(layout)
        for layer in model.layers:
            fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        return fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))

    saved = BandLayout.spattention(2, 64)
    source, target, other = sharded(saved), sharded(saved), sharded(BandLayout.causal(2))
    state = get_model_state_dict(source, options=StateDictOptions(**options))
    distributed_checkpoint.save(state, checkpoint_id=tmp_path / "checkpoint")
    read = get_model_state_dict(target, options=StateDictOptions(**options))
    distributed_checkpoint.load(read, checkpoint_id=tmp_path / "checkpoint")
    loading = StateDictOptions(**options, broadcast_from_rank0="full_state_dict" in options)
    set_model_state_dict(target, read, options=loading)
    weights = [model.layers[1].q_proj.weight.full_tensor() for model in (source, target)]
    assert torch.equal(*weights)
    with pytest.raises(RuntimeError, match=refusal(saved, BandLayout.causal(2))):
        set_model_state_dict(other, state, options=StateDictOptions(**options))


def test_a_copy_works_like_the_original(tmp_path: Path) -> None:
    module = BandedAttention(64, 2, layout=BandLayout.custom([[(0, 3)], [(2, 9), (20, 30)]]), rope_theta=9.0)
    x = torch.randn(1, 40, 64)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


def test_parameters_have_the_device_and_dtype_asked_for() -> None:
    module = BandedAttention(64, 2, bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert module(torch.empty(3, 7, 64, device="meta", dtype=torch.bfloat16)).shape == (3, 7, 64)


def test_rotation_keeps_scores_a_function_of_the_distance() -> None:
    q, k = (torch.randn(1, 1, 1, 32).double().expand(1, 1, 50, 32) for _ in range(2))
    scores = (rotate(q, 50.0) @ rotate(k, 50.0).mT)[0, 0]
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"embed_dim": 100, "num_heads": 3}, ValueError, "embed_dim must be a multiple .* 100 and 3"),
        ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be between 1 and .*, got 0"),
        ({"embed_dim": -8}, ValueError, "embed_dim must be between 1 and .*, got -8"),
        ({"layout": BandLayout.causal(8)}, ValueError, "made for 8 query heads and q has 4: .*layout.heads"),
        (
            {"layout": BandLayout.causal(4, 10), "context_length": 12},
            ValueError,
            "has the context length 10, context_length is 12",
        ),
        ({"layout": "dense"}, ValueError, "unknown layout 'dense'"),
        ({"layout": 3}, TypeError, "layout must be a BandLayout or the name of one, got int"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta must be positive"),
        ({"rope_theta": math.nan}, ValueError, "rope_theta must be positive and finite"),
        ({"rope_theta": "10000"}, TypeError, "rope_theta must be a number or None, got '10000' of type str"),
        ({"rope_theta": True}, TypeError, "rope_theta must be a number or None, got True of type bool"),
        ({"embed_dim": 128.0}, TypeError, "embed_dim must be an integer, got 128.0 of type float"),
        ({"num_heads": True}, TypeError, "num_heads must be an integer, got True of type bool"),
        ({"num_kv_heads": "2"}, TypeError, "num_kv_heads must be an integer, got '2' of type str"),
        ({"embed_dim": 132, "rope_theta": 10.0}, ValueError, "even, got 10.0 and a head dim of 33"),
    ],
)
def test_message(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BandedAttention(**{"embed_dim": 128, "num_heads": 4, **arguments})


def test_sizes_may_be_of_numpy() -> None:
    module = BandedAttention(np.int64(128), num_heads=np.int32(4), num_kv_heads=np.int64(2))  # type: ignore[arg-type]
    sizes = (module.embed_dim, module.num_heads, module.num_kv_heads, module.head_dim)
    assert sizes == (128, 4, 2, 32) and all(type(size) is int for size in sizes)


def _module(**settings: Any) -> BandedAttention:
    torch.manual_seed(3)
    given = {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 1e3, "context_length": 64, **settings}
    return BandedAttention(128, **given)


@pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")
@pytest.mark.parametrize("rope_theta", [None, 1e3])
def test_with_a_cache_it_goes_on_where_it_was(rope_theta: float | None) -> None:
    module = _module(rope_theta=rope_theta)
    x = torch.randn(2, 64, 128)
    with torch.no_grad():
        expected = module(x)
        caches = (
            module.make_cache(2, slack=2),
            PagedCache(module.layout, batch_size=2, num_kv_heads=2, head_dim=32),
        )
        for cache in caches:
            chunks = x.split([30, 1, 1, 3, 20, 1, 8], 1)
            parts = [module(chunk, cache=cache) for chunk in chunks]
            torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)
            assert cache.known_length == 64


def test_quantized_projections_have_caches() -> None:
    module, x = _module(), torch.randn(1, 20, 128)

    class Quantized(nn.Module):
        def __init__(self, linear: nn.Linear, has_method: bool) -> None:
            super().__init__()
            self.linear = [linear]
            stored = torch.zeros(2, 2, dtype=torch.int8)
            self.weight = (lambda: stored) if has_method else stored

        def forward(self, x: Tensor) -> Tensor:
            return self.linear[0](x)  # type: ignore[no-any-return]

    expected = module(x)
    for has_method in (True, False):
        quantized = copy.deepcopy(module)
        quantized.k_proj = Quantized(module.k_proj, has_method)  # type: ignore[assignment]
        with torch.no_grad():
            cache = quantized.make_cache(1)
            parts = [quantized(part, cache=cache) for part in x.split((19, 1), 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)
        assert quantized.make_cache(1, dtype=torch.bfloat16).keys.dtype is torch.bfloat16


@pytest.mark.filterwarnings("ignore::spattn_tvm.FallbackWarning")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    """With NaN where there is padding, in a prompt and what follows it; in training too, on the left."""
    module = _module()
    lengths, longest, steps = [20, 13, 1], 20, 4
    rows = [torch.randn(1, length + steps, 128) for length in lengths]
    mask = torch.zeros(3, longest, dtype=torch.bool)
    x = torch.full((3, longest, 128), torch.nan)
    places = []
    for row, length in enumerate(lengths):
        place = slice(longest - length, None) if side == "left" else slice(0, length)
        x[row, place] = rows[row][0, :length]
        mask[row] = True
        mask[row, place] = False
        places.append(place)
    # A query of padding on the right sees the tokens before it, whose gradients it must not be NaN for.
    leaf = (x if side == "left" else x.nan_to_num(50.0)).clone().requires_grad_()
    y = module(leaf, key_padding_mask=mask)
    sum(y[row, place].square().sum() for row, place in enumerate(places)).backward()  # type: ignore[union-attr]
    with torch.no_grad():
        expected = [module(row) for row in rows]
        cache = module.make_cache(3)
        prompt = module(x, cache=cache, key_padding_mask=mask)
        for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
            for result in (y, prompt):
                torch.testing.assert_close(
                    result[row, place], expected[row][0, :length], atol=1e-5, rtol=1e-5
                )
        for step in range(steps):
            token = torch.cat([row[:, n + step : n + step + 1] for row, n in zip(rows, lengths, strict=True)])
            after = torch.stack([row[0, n + step] for row, n in zip(expected, lengths, strict=True)])
            torch.testing.assert_close(module(token, cache=cache)[:, 0], after, atol=1e-5, rtol=1e-5)
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        alone = rows[row][:, :length].clone().requires_grad_()
        module(alone).square().sum().backward()
        assert leaf.grad is not None and alone.grad is not None
        torch.testing.assert_close(leaf.grad[row, place], alone.grad[0], atol=1e-5, rtol=1e-4)


def test_padding_of_a_refused_call_is_forgotten() -> None:
    module, x, mask = _module(), torch.randn(2, 20, 128), torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :7] = True
    cache = module.make_cache(2)
    with torch.no_grad():
        expected, impl = module(x), module.impl
        module.impl = "foo"
        for tokens in (8, 20):
            with pytest.raises(ValueError, match="impl must be one of"):
                module(x[:, :tokens], cache=cache, key_padding_mask=mask[:, :tokens])
        module.impl = impl
        torch.testing.assert_close(module(x, cache=cache), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="row 0 has some already, 20"):
            module(x[:, :2], cache=cache, key_padding_mask=mask[:, 6:8])


def test_padding_whose_values_cannot_be_read() -> None:
    """In compiled code, in a map and of fake tensors; with a cache and without."""
    module, x, mask = _module(), torch.randn(2, 20, 128), torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :3] = mask[1, 15:] = True
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, caches = module(x, key_padding_mask=mask), [module.make_cache(2) for _ in range(2)]
        for y in (
            compiled(x, key_padding_mask=mask),
            compiled(x, key_padding_mask=mask, cache=caches[0]),
            torch.vmap(lambda *row: module(row[0], key_padding_mask=row[1]))(x[:, None], mask[:, None])[:, 0],
        ):
            torch.testing.assert_close(y[~mask], expected[~mask], atol=1e-5, rtol=1e-5)
        module(x, key_padding_mask=mask, cache=caches[1])
        steps = [module(x[:, :1], cache=cache) for cache in caches]
        torch.testing.assert_close(*steps, atol=1e-5, rtol=1e-5)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(tensor) for tensor in (x, mask)]
            for given in ({}, {"cache": _module().make_cache(2)}):
                y = module(fake[0], key_padding_mask=fake[1], **given)
                assert isinstance(y, FakeTensor) and y.shape == x.shape


def test_positions_are_for_the_rotation_alone() -> None:
    module, x = _module(), torch.randn(2, 30, 128)
    expected = module(x)
    shifted = torch.arange(30) + torch.tensor([[7], [400]])
    torch.testing.assert_close(module(x, position_ids=shifted), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(x, position_ids=shifted[0]), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(module(x, position_ids=2 * shifted), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 5]), "cache": True}, "cu_seqlens and cache exclude"),
        (
            {"cu_seqlens": torch.tensor([0, 5]), "key_padding_mask": torch.zeros(1, 5, dtype=torch.bool)},
            "cu_seqlens and key_padding_mask exclude",
        ),
        ({"cache": True, "batch": 3}, "the cache holds a batch of 3, got x with a batch of 1"),
        ({"position_ids": torch.arange(4)}, r"positions must have shape \(5,\) or \(1, 5\), got \(4,\)"),
        ({"cache": True, "layout": "exclusive"}, "the cache is made for exclusive:heads=4,context=64"),
        ({"context_length": None, "key_padding_mask": torch.ones(1, 5, dtype=torch.bool)}, "needs bands"),
    ],
)
def test_calls_that_cannot_be_right(given: dict[str, Any], message: str) -> None:
    module = _module(context_length=given.pop("context_length", 64))
    if given.pop("cache", False):
        made_for = _module(layout=given.pop("layout", "spattention"))
        given["cache"] = made_for.make_cache(given.pop("batch", 1))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        module(torch.randn(1, 5, 128), **given)
