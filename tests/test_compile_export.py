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


def run(code: str, prelude: str = PRELUDE) -> None:
    program = prelude + textwrap.dedent(code)
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
        import spattn_tvm

        spattn_tvm.register_operators()
        spattn_tvm.register_operators()
        loaded = torch.export.load({str(program)!r}).module()
        for x, expected in torch.load({str(program)!r} + ".data"):
            with torch.no_grad():
                torch.testing.assert_close(loaded(x), expected)
        """
    )


def test_registering_the_operators_is_one_call_in_a_fresh_process(tmp_path: Path) -> None:
    """AOTInductor's model runs past Python's dispatch, by the operator's schema alone."""
    package = tmp_path / "attention.pt2"
    run(
        f"""
        class Model(torch.nn.Module):
            def forward(self, q, k, v):
                return banded_attention(q, k, v, LAYOUT, scale=0.3) * 2

        inputs = draw(30, grad=False)
        exported = torch.export.export(Model(), inputs)
        torch._inductor.aoti_compile_and_package(exported, package_path={str(package)!r})
        torch.save((inputs, Model()(*inputs)), {str(package)!r} + ".data")
        """
    )
    program = f"""
        import sys
        import spattn_tvm
        assert "torch" not in sys.modules
        spattn_tvm.register_operators()
        spattn_tvm.register_operators()
        import torch
        model = torch._inductor.aoti_load_package({str(package)!r})
        inputs, expected = torch.load({str(package)!r} + ".data")
        torch.testing.assert_close(model(*inputs), expected)
        """
    run(program, prelude="")


SCALES = """
def attend_with(scale, **options):
    return torch.compile(
        lambda q, k, v, *rest: banded_attention(q, k, v, layout, scale=scale(q, *rest)),
        fullgraph=True, **options,
    )

class Scaled(torch.nn.Module):
    factor = 1.0
    def forward(self, q, k, v):
        return banded_attention(q, k, v, LAYOUT, scale=self.factor * 0.5)

class Dynamic(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
    def forward(self, q, k, v):
        return banded_attention(q, k, v, LAYOUT, scale=self.scale(q))

def check_dims(function, scale, layout=LAYOUT):
    for length, head_dim in ((31, 32), (64, 64), (17, 40), (90, 96)):
        q, k, v = draw(length, head_dim=head_dim)
        o = function(q, k, v)
        expected, _ = reference_attention(q, k, v, layout, scale=scale(q))
        torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)
        do = torch.randn_like(o)
        ours, theirs = (torch.autograd.grad(each, (q, k, v), do) for each in (o, expected))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
"""


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_scale_may_be_a_symbol(backend: str) -> None:
    run(
        f"""
        from torch._dynamo.testing import CompileCounterWithBackend

        layouts = (LAYOUT, BandLayout.spattention(4, 4096), BandLayout.equal_area(4), BandLayout.causal(4))
        for layout in layouts[: 4 if {backend!r} == "aot_eager" else 1]:
            for scale in (
                lambda q: q.shape[-1] ** -0.5, lambda q: 2 / q.shape[-1], lambda q: q.shape[-1] // 32
            ):
                torch._dynamo.reset()
                counter = CompileCounterWithBackend({backend!r})
                check_dims(attend_with(scale, backend=counter, dynamic=True), scale, layout)
                assert counter.frame_count == 1, counter.frame_count

        layout = LAYOUT
        module = Scaled()
        # PyTorch compiles anew for each value of a float that is not made of sizes, as for SDPA's scale.
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend={backend!r})
        for factor in (1.0, 0.3, -0.2, 0.0, 0.7, 1.5):
            module.factor = factor
            check(compiled, 30, scale=factor * 0.5, tolerance=1e-4)
        for factor in (float("inf"), float("nan")):
            module.factor = factor
            try:
                compiled(*draw(30))
                raise SystemExit("a scale that is not finite was accepted")
            except ValueError as error:
                assert "scale must be finite" in str(error), error
        """,
        prelude=PRELUDE + SCALES,
    )


def test_a_scale_may_be_read_from_a_tensor() -> None:
    run(
        """
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            layout = LAYOUT
            attend = attend_with(lambda q, scale: scale.item(), backend="aot_eager")
            for scale in (0.5, 0.25, -0.125):
                check(lambda q, k, v: attend(q, k, v, torch.tensor(scale)), 30, scale=scale, tolerance=1e-4)
        """,
        prelude=PRELUDE + SCALES,
    )


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_head_dim_and_length_unknown(strict: bool) -> None:
    run(
        f"""
        from torch.export import Dim

        for scale in (lambda q: None, lambda q: q.shape[-1] ** -0.5, lambda q: 3 / q.shape[-1]):
            for length, head_dim in ((Dim("length", min=2, max=512), 8 * Dim("eighth", min=4, max=32)),
                                     (Dim.AUTO, Dim.AUTO)):
                sizes = {{2: length, 3: head_dim}}
                exported = torch.export.export(
                    Dynamic(scale), draw(24, head_dim=64, grad=False),
                    dynamic_shapes=dict(q=sizes, k=sizes, v=sizes), strict={strict},
                )
                check_dims(exported.module(), scale)
        """,
        prelude=PRELUDE + SCALES,
    )


def test_compiled_calls_refuse_what_eager_ones_do() -> None:
    run(
        """
        q, k, v = draw(30, grad=False)
        for change, message in (
            (dict(scale=True), "scale must be a float, got True"),
            (dict(scale="0.1"), "scale must be a float, got '0.1'"),
            (dict(scale=torch.tensor(0.1)), "scale must be a float"),
            (dict(scale=float("nan")), "scale must be finite"),
            (dict(impl=["cpu"]), "impl must be one of"),
            (dict(k=k.to_sparse()), "k must be a dense tensor"),
        ):
            torch._dynamo.reset()
            arguments = {"q": q, "k": k, "v": v, "layout": LAYOUT, **change}
            try:
                torch.compile(banded_attention, backend="aot_eager")(**arguments)
                raise SystemExit(f"{change} was accepted")
            except Exception as error:
                assert message in str(error), (change, error)
        """
    )


def test_compiled_autograd() -> None:
    run(
        """
        q, k, v = draw(30)
        expected = torch.autograd.grad(reference_attention(q, k, v, LAYOUT)[0].square().sum(), (q, k, v))

        for _ in range(3):
            for leaf in (q, k, v):
                leaf.grad = None
            loss = banded_attention(q, k, v, LAYOUT).square().sum()
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
                loss.backward()
            for leaf, gradient in zip((q, k, v), expected):
                torch.testing.assert_close(leaf.grad, gradient, rtol=1e-3, atol=1e-3)
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
