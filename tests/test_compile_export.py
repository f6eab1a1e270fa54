"""``torch.compile`` and ``torch.export``, each in a process of its own.

A fresh process shows that tracing needs no kernel, no TVM and nothing that an earlier eager call left behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PRELUDE = """
import sys
import torch
from spattn_tvm import BandLayout, BandedAttention, banded_attention, reference_attention

torch.manual_seed(0)
LAYOUT = BandLayout.spattention(4)

def draw(length, *, batch=2, head_dim=32, dtype=torch.float32, grad=True):
    shapes = ((batch, length, 4, head_dim), (batch, length, 2, head_dim), (batch, length, 2, head_dim))
    return tuple(torch.randn(s, dtype=dtype).transpose(1, 2).detach().requires_grad_(grad) for s in shapes)

def check(function, length, layout=LAYOUT, tolerance=2e-5, **options):
    q, k, v = draw(length)
    o = function(q, k, v)
    expected, _ = reference_attention(q, k, v, layout, **options)
    torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), do)):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)
"""


def run(code: str) -> None:
    program = PRELUDE + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=280
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_serves_new_lengths_without_compiling_anew(backend: str) -> None:
    run(
        f"""
        from torch._dynamo.testing import CompileCounterWithBackend

        counter = CompileCounterWithBackend({backend!r})

        @torch.compile(fullgraph=True, backend=counter)
        def attend(q, k, v):
            return banded_attention(q * 2, k, v, LAYOUT, scale=0.125) + 0

        for length in (31, 64, 17, 128, 65, 33):
            check(attend, length, scale=0.25)
        # The first length is compiled as a constant; the second makes it a symbol, which serves the rest.
        assert counter.frame_count == 2, counter.frame_count
        """
    )


def test_compile_does_not_bake_in_the_table() -> None:
    run(
        """
        from torch._dynamo.testing import AotEagerAndRecordGraphs

        recorder = AotEagerAndRecordGraphs()
        attend = torch.compile(
            lambda q, k, v: banded_attention(q, k, v, LAYOUT), fullgraph=True, backend=recorder, dynamic=True
        )
        check(attend, 31)
        check(attend, 99)
        (graph,) = recorder.graphs
        (call,) = [n for n in graph.graph.nodes if "banded_attention_forward" in str(n.target)]
        assert LAYOUT.spec in call.args
        assert not list(graph.buffers()), "a graph holds no tensors of ours"
        """
    )


def test_compile_guards_on_the_layout() -> None:
    run(
        """
        attend = torch.compile(banded_attention, backend="aot_eager", fullgraph=True)
        others = (BandLayout.causal(4), BandLayout.sliding_window(4, 5), BandLayout.spattention(4, 70))
        for layout in (LAYOUT, *others):
            check(lambda q, k, v: attend(q, k, v, layout), 60, layout)
        """
    )


def test_compile_packed_autocast_lse_and_errors() -> None:
    run(
        """
        @torch.compile(fullgraph=True, backend="aot_eager")
        def packed(q, k, v, cu_seqlens):
            return banded_attention(q, k, v, LAYOUT, cu_seqlens=cu_seqlens)

        for offsets in ((0, 7, 50), (0, 20, 20, 50), (0, 13, 31, 60)):
            cu_seqlens = torch.tensor(offsets)
            check(lambda q, k, v: packed(q, k, v, cu_seqlens), offsets[-1], cu_seqlens=cu_seqlens)
        try:
            packed(*draw(50), torch.tensor([0, 30, 20, 50]))
            raise SystemExit("boundaries that are not sorted were accepted")
        except ValueError as error:
            assert "cu_seqlens must be sorted" in str(error), error

        @torch.compile(fullgraph=True, backend="aot_eager")
        def low(q, k, v):
            with torch.autocast("cpu", torch.bfloat16):
                return banded_attention(q, k, v, LAYOUT, return_lse=True)

        q, k, v = draw(40)
        o, lse = low(q, k, v)
        assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        expected = reference_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), LAYOUT)
        torch.testing.assert_close(o.float(), expected[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, expected[1], rtol=1e-3, atol=1e-3)
        (o.float().sum() + lse.sum()).backward()
        assert q.grad.dtype is torch.float32

        short = torch.compile(lambda q, k, v: banded_attention(q, k, v, BandLayout.causal(4, 30)),
                              backend="aot_eager")
        try:
            short(*draw(31))
            raise SystemExit("a sequence above the context was accepted")
        except Exception as error:
            assert "longer than the layout's context_length 30" in str(error), error
        """
    )


def test_compiled_module_trains_like_the_eager_one() -> None:
    run(
        """
        module = BandedAttention(64, 2, num_kv_heads=1, rope_theta=100.0)
        compiled = torch.compile(module, fullgraph=True)
        for length in (20, 33):
            x = torch.randn(2, length, 64, requires_grad=True)
            wanted = (x, *module.parameters())
            eager = torch.autograd.grad(module(x).square().sum(), wanted)
            traced = torch.autograd.grad(compiled(x).square().sum(), wanted)
            for a, b in zip(eager, traced):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        """
    )


def test_compiled_activation_checkpointing() -> None:
    run(
        """
        from torch.utils.checkpoint import checkpoint

        def block(q, k, v):
            return banded_attention(q.sin(), k, v, LAYOUT).cos()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def attend(q, k, v):
            return checkpoint(block, q, k, v, use_reentrant=False)

        q, k, v = draw(30)
        ours = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
        theirs = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        """
    )


def test_export_runs_at_other_lengths_and_after_saving(tmp_path: Path) -> None:
    program = tmp_path / "attention.pt2"
    run(
        f"""
        from torch.export import Dim

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = BandedAttention(64, 2, rope_theta=50.0)
            def forward(self, x):
                return self.attention(x)

        model = Model()
        exported = torch.export.export(model, (torch.randn(2, 24, 64),),
                                       dynamic_shapes=dict(x={{1: Dim("length", min=2, max=512)}}))
        assert not any(name.split(".")[0] in ("tvm", "tvm_ffi") for name in sys.modules), "tracing loaded TVM"
        inputs = [torch.randn(2, length, 64) for length in (24, 2, 77)]
        with torch.no_grad():
            for x in inputs:
                torch.testing.assert_close(exported.module()(x), model(x))
        torch.export.save(exported, {str(program)!r})
        torch.save([(x, model(x).detach()) for x in inputs], {str(program)!r} + ".data")
        """
    )
    run(
        f"""
        import spattn_tvm.ops.operators  # registers the operators

        loaded = torch.export.load({str(program)!r}).module()
        for x, expected in torch.load({str(program)!r} + ".data"):
            with torch.no_grad():
                torch.testing.assert_close(loaded(x), expected)
        """
    )


def test_fakes_and_gradients_need_neither_kernels_nor_tvm() -> None:
    run(
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            q, k, v = draw(50, dtype=torch.bfloat16)
            o, lse = banded_attention(q, k, v, LAYOUT, return_lse=True)
            assert (o.shape, o.dtype, o.stride()) == (q.shape, q.dtype, q.stride())
            assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
            (o.sum() + lse.sum()).backward()
            assert [t.grad.shape for t in (q, k, v)] == [t.shape for t in (q, k, v)]
        meta = banded_attention(*(torch.empty(2, h, 9, 64, device="meta") for h in (4, 2, 2)), LAYOUT)
        assert meta.shape == (2, 4, 9, 64)
        loaded = [name for name in sys.modules if name.split(".")[0] in ("tvm", "tvm_ffi", "xgboost")]
        assert not loaded, loaded
        """
    )
