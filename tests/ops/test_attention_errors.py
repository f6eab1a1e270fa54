"""Each kind of bad input has its own message, raised before anything is computed."""

from __future__ import annotations

import linecache
import math
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attention_inputs import Recorder
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spattn_tvm import dispatch
from spattn_tvm.bands import BandLayout
from spattn_tvm.ops.attention import banded_attention

LAYOUT = BandLayout.spattention(4, 64)


def tensors(
    batch: int = 1, heads: int = 4, kv_heads: int = 2, length: int = 16, head_dim: int = 32, **options: Any
) -> dict[str, Tensor]:
    return {
        "q": torch.randn(batch, heads, length, head_dim, **options),
        "k": torch.randn(batch, kv_heads, length, head_dim, **options),
        "v": torch.randn(batch, kv_heads, length, head_dim, **options),
    }


GOOD = tensors()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": None}, TypeError, "q must be a torch.Tensor, got NoneType"),
        ({"v": [1.0]}, TypeError, "v must be a torch.Tensor, got list"),
        (
            {"q": GOOD["q"][0]},
            ValueError,
            r"q must have 4 dimensions \(batch, query heads, length, head_dim\), got 3 in shape \(4, ",
        ),
        (
            {"k": GOOD["k"][None]},
            ValueError,
            r"k must have 4 dimensions .* got 5 in shape \(1, 1, 2, 16, 32\)",
        ),
        ({"v": GOOD["v"][0, 0]}, ValueError, r"v must have 4 dimensions .* got 2 in shape \(16, 32\)"),
        (
            {"k": GOOD["k"].bfloat16()},
            TypeError,
            "q, k and v must have one dtype, got torch.float32, torch.bfloat16 and torch.float32",
        ),
        (
            {"v": GOOD["v"].double()},
            TypeError,
            "q, k and v must have one dtype, got torch.float32, torch.float32 and torch.float64",
        ),
        (
            {name: tensor.to(torch.int32) for name, tensor in GOOD.items()},
            TypeError,
            "dtype must be one of .*, got torch.int32",
        ),
        (
            {name: tensor.to(torch.float8_e4m3fn) for name, tensor in GOOD.items()},
            TypeError,
            "dtype must be one of .*, got torch.float8_e4m3fn",
        ),
        (
            {name: tensor.double() for name, tensor in GOOD.items()} | {"impl": "cpu"},
            TypeError,
            "float64 is computed by impl='reference' only .* got impl='cpu'",
        ),
        (
            {"v": tensors(length=17)["v"]},
            ValueError,
            r"k and v must have one shape, got \(1, 2, 16, 32\) and \(1, 2, 17, 32\)",
        ),
        ({"q": tensors(batch=2)["q"]}, ValueError, r"must agree in batch and head_dim"),
        ({"q": tensors(head_dim=40)["q"]}, ValueError, r"must agree in batch and head_dim"),
        (
            tensors(kv_heads=3),
            ValueError,
            "query heads must be a multiple of the kv heads, got 4 and 3",
        ),
        (tensors(heads=2, kv_heads=4), ValueError, "must be a multiple of the kv heads, got 2 and 4"),
        (
            tensors(heads=8),
            ValueError,
            "made for 4 query heads and q has 8: make it with num_heads=8",
        ),
        (
            tensors(length=65),
            ValueError,
            "sequence of 65 is longer than the layout's context_length 64",
        ),
        (tensors(length=0), ValueError, r"lengths and head_dim must be at least 1 .* got \(1, 4, 0, 32\)"),
        (tensors(head_dim=0), ValueError, r"must be at least 1 .* got \(1, 4, 16, 0\)"),
        (tensors(heads=0, kv_heads=0), ValueError, r"must be at least 1 .* got \(1, 0, 16, 32\)"),
        (tensors(kv_heads=0), ValueError, r"must be at least 1 .* and \(1, 0, 16, 32\)"),
        (tensors(head_dim=24), ValueError, "multiple of 8 from 32 to 256, got 24"),
        (tensors(head_dim=36), ValueError, "multiple of 8 from 32 to 256, got 36"),
        (tensors(head_dim=264), ValueError, "multiple of 8 from 32 to 256, got 264"),
        ({"layout": "spattention"}, TypeError, "layout must be a BandLayout .* got str"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, cpu, .*mma_split, got 'fast'"),
        ({"impl": ["cpu"]}, ValueError, r"impl must be one of .*, got \['cpu'\]"),
        ({"impl": None}, ValueError, "impl must be one of .*, got None"),
        ({"impl": {}}, ValueError, r"impl must be one of .*, got \{\}"),
        ({"layout": [1]}, TypeError, "layout must be a BandLayout .* got list"),
        *(
            (
                {name: torch.nested.nested_tensor([GOOD[name][0]] * 2, layout=layout)},
                TypeError,
                f"{name} is a nested tensor: pack its sequences along the length .* cu_seqlens",
            )
            for name in "qkv"
            for layout in (torch.strided, torch.jagged)
        ),
        *(
            ({name: change(GOOD[name])}, TypeError, f"{name} must be a dense tensor, got layout {layout}")
            for name in "qkv"
            for change, layout in (
                (Tensor.to_sparse, "torch.sparse_coo"),
                (Tensor.to_mkldnn, "torch._mkldnn"),
                (lambda tensor: tensor[0, 0].to_sparse_csr(), "torch.sparse_csr"),
            )
        ),
        (
            {"cu_seqlens": torch.tensor([0, 16]).to_sparse()},
            TypeError,
            "cu_seqlens must be a dense tensor, got layout torch.sparse_coo",
        ),
        (
            {"cu_seqlens": torch.nested.nested_tensor([torch.tensor([0, 16])])},
            TypeError,
            "cu_seqlens is a nested tensor",
        ),
        (
            {name: tensor.cfloat() for name, tensor in GOOD.items()},
            TypeError,
            "dtype must be one of .*, got torch.complex64",
        ),
        (
            {name: tensor > 0 for name, tensor in GOOD.items()},
            TypeError,
            "dtype must be one of .*, got torch.bool",
        ),
        (
            {name: torch.quantize_per_tensor(GOOD[name], 0.1, 0, torch.qint8) for name in "qkv"},
            TypeError,
            "dtype must be one of .*, got torch.qint8",
        ),
        ({"scale": "0.1"}, TypeError, "scale must be a float, got '0.1' of type str"),
        ({"scale": 1j}, TypeError, "scale must be a float, got 1j of type complex"),
        ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ({"scale": 10**400}, ValueError, "scale must be finite, got an integer that no float"),
        ({"scale": -math.inf}, ValueError, "scale must be finite, got -inf"),
        (
            {"scale": torch.tensor(0.1)},
            TypeError,
            r"scale must be a float, got tensor\(0.1000\) of type Tensor",
        ),
        ({"scale": True}, TypeError, "scale must be a float, got True of type bool"),
        ({"k": GOOD["k"].to("meta")}, ValueError, "must be on one device, got cpu, meta and cpu"),
        ({"cu_seqlens": [0, 16]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        (
            {"cu_seqlens": torch.tensor([0.0, 16.0])},
            TypeError,
            "cu_seqlens must be int32 or int64, got torch.float32",
        ),
        (
            {"cu_seqlens": torch.tensor([[0, 16]])},
            ValueError,
            r"cu_seqlens must have shape \(number of documents \+ 1,\), got \(1, 2\)",
        ),
        ({"cu_seqlens": torch.tensor([0])}, ValueError, r"cu_seqlens must have shape .* got \(1,\)"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, r"got \(0,\)"),
        (
            {"cu_seqlens": torch.tensor([0, 16], device="meta")},
            ValueError,
            "cu_seqlens must be on the device of q, cpu, got meta",
        ),
        ({"cu_seqlens": torch.tensor([1, 16])}, ValueError, "cu_seqlens must start with 0, got 1"),
        (
            {"cu_seqlens": torch.tensor([0, 8, 17])},
            ValueError,
            "must not exceed the sequence length 16, got 17",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 9, 8, 16])},
            ValueError,
            r"cu_seqlens must be sorted, got cu_seqlens\[1\] = 9 and cu_seqlens\[2\] = 8",
        ),
        (
            {"cu_seqlens": torch.tensor([0, -1, 16])},
            ValueError,
            r"must be sorted, got cu_seqlens\[0\] = 0 and cu_seqlens\[1\] = -1",
        ),
        (
            tensors(length=100) | {"cu_seqlens": torch.tensor([0, 20, 100])},
            ValueError,
            "sequence of 80 is longer than the layout's context_length 64",
        ),
    ],
)
def test_message(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    # A good call of the same shapes before must not make a bad one pass.
    banded_attention(**GOOD, layout=LAYOUT)
    arguments = {**GOOD, "layout": LAYOUT, **changes}
    for watching in (nullcontext, Recorder, torch.inference_mode, torch.profiler.profile):
        with pytest.raises(error, match=message), watching():
            banded_attention(**arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_values_of_cu_seqlens_are_checked_by_every_implementation(impl: str) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must"):
        banded_attention(**GOOD, layout=LAYOUT, cu_seqlens=torch.tensor([0, 9, 8, 16]), impl=impl)


@pytest.mark.parametrize(
    "changes",
    [
        {"q": GOOD["q"].to_sparse()},
        {"k": torch.nested.nested_tensor([GOOD["k"][0]] * 2)},
        {"v": GOOD["v"].to_mkldnn()},
        {"impl": ["cpu"]},
    ],
    ids=["sparse", "nested", "mkldnn", "impl"],
)
def test_what_is_wrong_with_one_call_is_not_remembered(changes: dict[str, Any]) -> None:
    expected = banded_attention(**GOOD, layout=LAYOUT)
    for _ in range(3):
        with pytest.raises((TypeError, ValueError)):
            banded_attention(**{**GOOD, "layout": LAYOUT, **changes})
        assert torch.equal(banded_attention(**GOOD, layout=LAYOUT), expected)


class Module(torch.nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return banded_attention(*inputs, LAYOUT)


@pytest.mark.parametrize("caller", ["function", "module", "backward", "checkpoint", "vmap"])
def test_the_fallback_warning_names_the_callers_line(caller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_schedule(problem: Any, *arguments: Any, **options: Any) -> Any:
        if problem.direction == ("backward" if caller == "backward" else "forward"):
            raise dispatch.NoKernelError("none for a test")
        return original(problem, *arguments, **options)

    original = dispatch.find_schedule
    monkeypatch.setattr(dispatch, "find_schedule", find_schedule)
    dispatch.clear_cache()
    leaves = tuple(tensor.requires_grad_() for tensor in tensors().values())
    module = Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if caller == "function":
            banded_attention(*leaves, LAYOUT)  # function
        elif caller == "module":
            module(*leaves)  # not this line, but the module's own call
        elif caller == "backward":
            o = module(*leaves)
            o.sum().backward()  # backward
        elif caller == "checkpoint":
            checkpoint(banded_attention, *leaves, LAYOUT, use_reentrant=False)  # checkpoint
        elif caller == "vmap":
            torch.func.vmap(banded_attention, (0, 0, 0, None))(*(t[None] for t in leaves), LAYOUT)  # vmap
    dispatch.clear_cache()
    (warning,) = [w for w in caught if issubclass(w.category, dispatch.FallbackWarning)]
    line = linecache.getline(warning.filename, warning.lineno)
    expected = "return banded_attention(*inputs, LAYOUT)" if caller == "module" else f"# {caller}\n"
    assert warning.filename == __file__
    assert expected in line


@pytest.mark.parametrize("impl", ["hopper", "mma"])
def test_a_family_asked_for_by_name_is_used_or_refused(impl: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=impl):
        banded_attention(**GOOD, layout=LAYOUT, impl=impl)


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="cpu and cuda devices"):
        banded_attention(**{name: FakeDevice(tensor) for name, tensor in GOOD.items()}, layout=LAYOUT)


class FakeDevice(Tensor):
    """A tensor that says it lives elsewhere; this machine has no third device to put one on."""

    @staticmethod
    def __new__(cls, tensor: Tensor) -> Tensor:
        return tensor.as_subclass(cls)

    is_cpu = False

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("xpu")


def test_packed_sequence_may_be_longer_than_the_context_when_no_document_is() -> None:
    inputs = tensors(length=100)
    o = banded_attention(**inputs, layout=LAYOUT, cu_seqlens=torch.tensor([0, 60, 100]), impl="reference")
    second = banded_attention(*(inputs[name][:, :, 60:] for name in "qkv"), layout=LAYOUT, impl="reference")
    torch.testing.assert_close(o[:, :, 60:], second)


@pytest.mark.gpu
def test_mixed_devices_are_refused() -> None:
    cuda = {name: tensor.cuda() for name, tensor in GOOD.items()}
    with pytest.raises(ValueError, match="must be on one device, got cuda:0, cpu and cuda:0"):
        banded_attention(cuda["q"], GOOD["k"], cuda["v"], LAYOUT)
    with pytest.raises(ValueError, match="cu_seqlens must be on the device of q, cuda:0, got cpu"):
        banded_attention(**cuda, layout=LAYOUT, cu_seqlens=torch.tensor([0, 16]))
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        banded_attention(**cuda, layout=LAYOUT, impl="cpu")
