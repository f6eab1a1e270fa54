"""Banded attention in standard operators, and what ONNX makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spattn_tvm import BandedAttention, BandLayout, banded_attention, reference_attention
from spattn_tvm.ops.operators import SAME_ROWS
from spattn_tvm.ops.standard_graph import attend_by_standard_operators, writes_standard_graph

# Heads without a key at all, without one for the first rows, and with two bands.
UNEVEN = BandLayout.custom([[(0, 3), (9, 20)], [(5, 90)], [], [(2, 2)]], 128)
LAYOUTS = [UNEVEN, BandLayout.gapped(4), BandLayout.equal_area(4, 64), BandLayout.sliding_window(4, 7)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.spec)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_reference(layout: BandLayout, dtype: torch.dtype) -> None:
    length = int(torch.randint(1, 65, ()))
    q, k, v = (torch.randn(2, heads, length, 32).to(dtype) for heads in (4, 2, 2))
    o, lse = attend_by_standard_operators(q, k, v, SAME_ROWS, layout, 0.2)
    exact, exact_lse = reference_attention(q.double(), k.double(), v.double(), layout, scale=0.2)
    assert o.dtype == dtype and lse.dtype == torch.float32
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(o.double(), exact, **close)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


class Model(torch.nn.Module):
    def __init__(self, layout: BandLayout) -> None:
        super().__init__()
        self.attention = BandedAttention(128, 4, layout=layout, num_kv_heads=2, rope_theta=1e4)
        self.out = torch.nn.Linear(128, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x + self.attention(x))


class Alone(torch.nn.Module):
    def __init__(self, layout: BandLayout, **settings: Any) -> None:
        super().__init__()
        self.layout, self.settings = layout, settings
        self.eval()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return banded_attention(q, k, v, self.layout, return_lse=True, **self.settings)


def exported(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], axis: int, path: Path) -> Any:
    """A session of onnxruntime over the graph, whose batch and length are dynamic."""
    import onnxruntime

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=128)
    shapes = tuple({0: batch, axis: length} for _ in inputs)
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} == {""}
    program.save(str(path))
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def results(session: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    names = [given.name for given in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(result) for result in session.run(None, feed)]


@pytest.fixture
def onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the extra onnx is not installed")


@pytest.mark.usefixtures("onnx")
def test_a_model_becomes_a_graph_of_standard_operators_of_any_length(tmp_path: Path) -> None:
    model = Model(BandLayout.spattention(4, 128)).eval()
    session = exported(model, (torch.randn(2, 50, 128),), 1, tmp_path / "model.onnx")
    for batch, length in ((2, 50), (1, 7), (3, 128)):
        x = torch.randn(batch, length, 128)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(results(session, x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("onnx")
def test_queries_without_keys_are_zeros_there_too(tmp_path: Path) -> None:
    inputs = tuple(torch.randn(2, heads, 40, 32) for heads in (4, 2, 2))
    session = exported(Alone(UNEVEN), inputs, 2, tmp_path / "alone.onnx")
    q, k, v = (torch.randn(1, heads, 33, 32) for heads in (4, 2, 2))
    o, lse = results(session, q, k, v)
    exact, exact_lse = reference_attention(q.double(), k.double(), v.double(), UNEVEN)
    torch.testing.assert_close(o.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert not o[:, 2].any() and lse[:, 2].max() == -torch.inf


@pytest.mark.usefixtures("onnx")
def test_what_a_graph_can_not_say_is_refused(tmp_path: Path) -> None:
    inputs = tuple(torch.randn(1, 2, 40, 32) for _ in range(3))
    bands = BandLayout.spattention(2)
    for model, message in (
        (Alone(bands), "follow the length, which is dynamic"),
        (Alone(bands, cu_seqlens=torch.tensor([0, 20, 40])), "neither packed documents"),
        (Alone(BandLayout.causal(2), kv_lengths=torch.tensor([30])), "neither packed documents"),
    ):
        with pytest.raises(Exception) as raised:
            exported(model, inputs, 2, tmp_path / "model.onnx")
        chain, error = "", raised.value
        while error is not None:
            chain, error = f"{chain}{error}\n", error.__cause__
        assert message in chain
    assert not writes_standard_graph()


def test_elsewhere_the_operator_stays() -> None:
    assert not writes_standard_graph()
    inputs = tuple(torch.randn(1, 2, 16, 32) for _ in range(3))
    program = torch.export.export(Alone(BandLayout.causal(2)), inputs)
    assert "spattn_tvm.banded_attention_forward" in str(program.graph)
