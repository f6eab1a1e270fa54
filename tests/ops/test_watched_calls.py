"""Whoever watches or changes operators meets the same ones, whether or not calls like these came before."""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_inputs import FunctionRecorder, Recorder, draw, requiring_grad
from torch import Tensor
from torch.autograd.graph import (
    allow_mutation_on_saved_tensors,
    register_multi_grad_hook,
    save_on_cpu,
    saved_tensors_hooks,
)
from torch.utils._debug_mode import DebugMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from spattn_tvm import dispatch
from spattn_tvm.bands import BandLayout
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.reference import reference_attention

LOCAL, GLOBAL = BandLayout.sliding_window(4, 8), BandLayout.causal(4)
FORWARD = torch.ops.spattn_tvm.banded_attention_forward.default
BACKWARD = torch.ops.spattn_tvm.banded_attention_backward.default


class HiddenRecorder(Recorder):
    """As selective checkpointing's modes, which the guards of torch.compile don't see."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


@contextmanager
def recording(make: Callable[[], Any], names: Callable[[Any], Any]) -> Iterator[list[str]]:
    """What a watcher has seen, once it has left."""
    seen: list[str] = []
    with make() as watcher:
        yield seen
    seen += names(watcher)


@contextmanager
def execution_trace() -> Iterator[list[str]]:
    """It observes all threads, without a profiler in any of them."""
    seen: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        observer = torch.profiler.ExecutionTraceObserver().register_callback(str(path))
        observer.start()
        yield seen
        observer.stop()
        observer.unregister_callback()
        seen += [node["name"] for node in json.loads(path.read_text())["nodes"]]


@contextmanager
def profiler_of_another_thread() -> Iterator[list[str]]:
    """A profiler that another thread started for all of them."""
    seen: list[str] = []
    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    profiler = torch.profiler.profile(experimental_config=config)
    for act in (profiler.start, profiler.stop):
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        if act == profiler.start:
            yield seen
    seen += [event.name for event in profiler.events()]


WATCHERS: dict[str, Callable[[], Any]] = {
    "dispatch mode": lambda: recording(Recorder, lambda w: w.names),
    "hidden dispatch mode": lambda: recording(HiddenRecorder, lambda w: w.names),
    "function mode": lambda: recording(FunctionRecorder, lambda w: w.names),
    "profiler": lambda: recording(torch.profiler.profile, lambda w: [e.name for e in w.events()]),
    "autograd profiler": lambda: recording(
        torch.autograd.profiler.profile, lambda w: [e.name for e in w.function_events]
    ),
    "flop counter": lambda: recording(
        lambda: FlopCounterMode(display=False), lambda w: map(str, w.get_flop_counts()["Global"])
    ),
    "execution trace": execution_trace,
    "profiler of another thread": profiler_of_another_thread,
    "debug mode": lambda: recording(DebugMode, lambda w: w.debug_string().split()),
}


def leaves_and_gradients(length: int) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
    """Leaves, a gradient of the output, and what the reference gives for it."""
    leaves = requiring_grad(*draw(length=length))
    o, _ = reference_attention(*leaves, GLOBAL)
    do = torch.randn_like(o)
    return leaves, do, [o.detach(), *torch.autograd.grad(o, leaves, do)]


def close(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("name", WATCHERS)
def test_a_watcher_sees_the_pass_that_it_watches(name: str, return_lse: bool) -> None:
    leaves, do, expected = leaves_and_gradients(length=31)

    def attend() -> Tensor:
        outputs = banded_attention(*leaves, GLOBAL, return_lse=return_lse)
        return outputs[0] if return_lse else outputs

    for _ in range(2):
        attend()
    for watched in ("forward", "backward", "both", "forward"):
        seen: list[list[str]] = []
        with WATCHERS[name]() if watched != "backward" else nullcontext([]) as forward:
            o = attend()
        with WATCHERS[name]() if watched != "forward" else nullcontext([]) as backward:
            gradients = torch.autograd.grad(o, leaves, do)
        seen = [forward, backward]
        close([o.detach(), *gradients], expected)
        for names, direction in zip(seen, ("forward", "backward"), strict=True):
            # A backward pass meets no function mode, whoever calls it.
            is_watched = watched in (direction, "both") and (name, direction) != ("function mode", "backward")
            assert any(f"banded_attention_{direction}" in each for each in names) == is_watched, names


def test_watchers_of_other_threads_are_not_met() -> None:
    leaves, do, expected = leaves_and_gradients(length=33)
    for _ in range(2):
        banded_attention(*leaves, GLOBAL)
    results: dict[str, Any] = {}

    def elsewhere(o: Tensor) -> None:
        with HiddenRecorder() as recorder:
            results["gradients"] = torch.autograd.grad(o, leaves, do, retain_graph=True)
            results["again"] = banded_attention(*leaves, GLOBAL)
        results["names"] = recorder.names

    for _ in range(2):
        with HiddenRecorder() as here:
            o = banded_attention(*leaves, GLOBAL)
            thread = threading.Thread(target=elsewhere, args=(o,))
            thread.start()
            thread.join()
        assert here.names.count(str(FORWARD)) == 1
        assert str(BACKWARD) not in here.names
        assert results["names"].count(str(FORWARD)) == results["names"].count(str(BACKWARD)) == 1
        close([o.detach(), *results["gradients"]], expected)
        close([*torch.autograd.grad(results["again"], leaves, do)], expected[1:])


# --- selective checkpointing ---------------------------------------------------------------------------


def saving(policy: CheckpointPolicy, chosen: tuple[Any, ...]) -> Any:
    def choose(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if operator in chosen else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, choose)


def ours(x: Tensor, layout: BandLayout) -> Tensor:
    return banded_attention(x, x * 1.5, x.sin(), layout)


def with_lse(x: Tensor, layout: BandLayout) -> Tensor:
    o, lse = banded_attention(x, x * 1.5, x.sin(), layout, return_lse=True)
    return o * lse.sigmoid()[..., None]


def theirs(x: Tensor, layout: BandLayout) -> Tensor:
    return reference_attention(x, x * 1.5, x.sin(), layout)[0]


def theirs_with_lse(x: Tensor, layout: BandLayout) -> Tensor:
    o, lse = reference_attention(x, x * 1.5, x.sin(), layout)
    return o * lse.sigmoid()[..., None]


CONTEXTS: dict[str, Any] = {
    "save attention": saving(CheckpointPolicy.MUST_SAVE, (FORWARD,)),
    "prefer to save attention": saving(CheckpointPolicy.PREFER_SAVE, (FORWARD,)),
    "save others": saving(CheckpointPolicy.MUST_SAVE, (torch.ops.aten.sin.default,)),
    "recompute attention": saving(CheckpointPolicy.MUST_RECOMPUTE, (FORWARD,)),
    "list": partial(create_selective_checkpoint_contexts, [FORWARD]),
    "plain": None,
}


@pytest.mark.parametrize("between", ["nothing", "clear_cache", "other calls", "profiler", "thread"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_selective_checkpointing(name: str, between: str) -> None:
    options = {} if CONTEXTS[name] is None else {"context_fn": CONTEXTS[name]}
    for attend, expected in ((ours, theirs), (with_lse, theirs_with_lse)):
        for length, _ in itertools.product((41, 57), range(3)):
            x = torch.randn(2, 4, length, 32, requires_grad=True)
            y = checkpoint(
                lambda x, attend=attend: attend(attend(x, LOCAL), GLOBAL), x, use_reentrant=False, **options
            )
            loss = attend(y, LOCAL).square().sum()
            if between == "clear_cache":
                dispatch.clear_cache()
            elif between == "other calls":
                attend(x.detach(), LOCAL), attend(x.detach(), GLOBAL)
            if between == "thread":
                thread = threading.Thread(target=loss.backward)
                thread.start()
                thread.join()
            else:
                with torch.profiler.profile() if between == "profiler" else nullcontext():
                    loss.backward()
            z = x.detach().requires_grad_()
            expected(expected(expected(z, LOCAL), GLOBAL), LOCAL).square().sum().backward()
            torch.testing.assert_close(x.grad, z.grad, rtol=1e-3, atol=1e-3)


def test_what_a_policy_saves_is_not_computed_again() -> None:
    x = torch.randn(2, 4, 45, 32, requires_grad=True)
    for _ in range(3):
        with HiddenRecorder() as recorder:
            y = checkpoint(
                lambda x: ours(ours(x, LOCAL), GLOBAL),
                x,
                use_reentrant=False,
                context_fn=CONTEXTS["save attention"],
            )
            y.square().sum().backward()
        assert recorder.names.count(str(FORWARD)) == recorder.names.count(str(BACKWARD)) == 2


@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_recomputing_by_the_other_route(watched: str) -> None:
    """A plain checkpoint compares what both runs save."""
    x = torch.randn(2, 4, 47, 32, requires_grad=True)
    for _ in range(3):
        z = x.detach().requires_grad_()
        with Recorder() if watched == "forward" else nullcontext():
            y = checkpoint(lambda x: with_lse(ours(x, LOCAL), GLOBAL), z, use_reentrant=False)
        with Recorder() if watched == "backward" else nullcontext():
            y.square().sum().backward()
        expected = x.detach().requires_grad_()
        theirs_with_lse(theirs(expected, LOCAL), GLOBAL).square().sum().backward()
        torch.testing.assert_close(z.grad, expected.grad, rtol=1e-3, atol=1e-3)


# --- saved tensors -------------------------------------------------------------------------------------


def strided(tensor: Tensor) -> Tensor:
    """A copy whose last dimension is not contiguous and whose others are out of order."""
    order = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def offset(tensor: Tensor) -> Tensor:
    """A copy at an address that is aligned to nothing, with gaps between its rows."""
    padded = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)[..., 1:-2]
    return padded.copy_(tensor)


UNPACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided,
    "offset": offset,
    "negated": lambda tensor: torch._neg_view(-tensor),
    "imaginary": lambda tensor: torch.complex(tensor * 2, -tensor).conj().imag,
    "double": lambda tensor: tensor.double() if tensor.is_floating_point() and tensor.dim() != 4 else tensor,
    "subclass": lambda tensor: tensor.as_subclass(torch.nn.Buffer),
    "expanded": lambda tensor: torch.stack([tensor] * 2, -1)[..., 0],
}


@pytest.mark.parametrize("route", ["eager", "watched"])
@pytest.mark.parametrize("name", UNPACKED)
def test_hooks_may_unpack_tensors_with_another_arrangement(name: str, route: str) -> None:
    leaves, do, expected = leaves_and_gradients(length=35)
    for return_lse in (False, True, False, True):
        packed: list[Tensor] = []

        def pack(tensor: Tensor, packed: list[Tensor] = packed) -> int:
            packed.append(tensor.detach())
            return len(packed) - 1

        def unpack(index: int, packed: list[Tensor] = packed) -> Tensor:
            return UNPACKED[name](packed[index])

        with Recorder() if route == "watched" else nullcontext(), saved_tensors_hooks(pack, unpack):
            outputs = banded_attention(*leaves, GLOBAL, return_lse=return_lse)
            o = outputs[0] if return_lse else outputs
            assert len(packed) == 5, "q, k, v, o, lse"
            close([o.detach(), *torch.autograd.grad(o, leaves, do)], expected)


def test_saved_tensors_may_wait_elsewhere_and_be_changed_meanwhile() -> None:
    leaves, do, expected = leaves_and_gradients(length=36)
    for _ in range(3):
        with save_on_cpu():
            o = banded_attention(*leaves, GLOBAL)
        close([o.detach(), *torch.autograd.grad(o, leaves, do)], expected)
        with allow_mutation_on_saved_tensors():
            q, k, v = (leaf * 1 for leaf in leaves)
            o = banded_attention(q, k, v, GLOBAL)
            k.zero_()
            close([*torch.autograd.grad(o, leaves, do)], expected[1:])


# --- debuggers, tracers and other observers ------------------------------------------------------------


def test_anomaly_mode_names_the_call_whose_gradient_is_nan() -> None:
    leaves, do, _ = leaves_and_gradients(length=38)
    for _ in range(3):
        with torch.autograd.detect_anomaly(check_nan=True):
            o = banded_attention(*leaves, GLOBAL)
            torch.autograd.grad(o, leaves, do, retain_graph=True)
            with (
                pytest.warns(UserWarning, match="Traceback of forward call"),
                pytest.raises(RuntimeError, match="returned nan values"),
            ):
                torch.autograd.grad(o, leaves, torch.full_like(do, torch.nan))


def test_hooks_on_the_graph_are_called_once() -> None:
    leaves, do, expected = leaves_and_gradients(length=39)
    for return_lse in (False, True, False, True):
        outputs = banded_attention(*leaves, GLOBAL, return_lse=return_lse)
        o = outputs[0] if return_lse else outputs
        calls: list[str] = []
        o.register_hook(lambda gradient, calls=calls: calls.append("tensor"))
        o.grad_fn.register_prehook(lambda gradients, calls=calls: calls.append("before"))
        o.grad_fn.register_hook(lambda inputs, outputs, calls=calls: calls.append("after"))
        handle = register_multi_grad_hook(leaves, lambda gradients, calls=calls: calls.append("leaves"))
        fresh = [leaf.detach() for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        o.backward(do)
        handle.remove()
        assert calls == ["tensor", "before", "after", "leaves"]
        close([leaf.grad for leaf in leaves], expected[1:])
        assert all(torch.equal(a, b) for a, b in zip(fresh, leaves, strict=True))


def test_fake_tensors_stay_fake() -> None:
    q, k, v = draw(length=40)
    for _ in range(2):
        banded_attention(q, k, v, GLOBAL)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        o = banded_attention(q, k, v, GLOBAL)
    assert isinstance(o, torch._subclasses.FakeTensor)


@pytest.mark.parametrize("scale", [None, 0.3, "size"])
def test_traced_calls_hold_the_operator(scale: Any) -> None:
    q, k, v = draw(length=42)
    for _ in range(2):
        banded_attention(q, k, v, GLOBAL)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return banded_attention(q, k, v, GLOBAL, scale=q.shape[-1] ** -0.5 if scale == "size" else scale)

    traced = torch.jit.trace(attend, (q, k, v))
    assert "spattn_tvm::banded_attention_forward" in str(traced.graph)
    torch.testing.assert_close(traced(2 * q, k, v), attend(2 * q, k, v))


# --- tensors whose bytes are not their values ----------------------------------------------------------

LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda tensor: torch._neg_view(-tensor),
    "imaginary": lambda tensor: torch.complex(tensor * 2, -tensor).conj().imag,
    "real view": lambda tensor: torch.view_as_real(torch.complex(tensor * 2, -tensor).conj().resolve_conj())[
        ..., 1
    ],
    "negated twice": lambda tensor: torch._neg_view(torch._neg_view(tensor)),
}


@pytest.mark.parametrize("route", ["eager", "watched"])
@pytest.mark.parametrize("name", LAZY)
def test_lazily_negated_inputs_and_gradients(name: str, route: str) -> None:
    leaves, do, expected = leaves_and_gradients(length=43)
    _, lse = reference_attention(*leaves, GLOBAL)
    dlse = torch.randn_like(lse)
    of_both = torch.autograd.grad(reference_attention(*leaves, GLOBAL), leaves, (do, dlse), allow_unused=True)
    for _ in range(2):
        banded_attention(*leaves, GLOBAL)
        banded_attention(*(leaf.detach() for leaf in leaves), GLOBAL)
    for chosen in ((0,), (1,), (2,), (0, 1, 2), ()):
        with Recorder() if route == "watched" else nullcontext():
            q, k, v = (LAZY[name](leaf) if i in chosen else leaf for i, leaf in enumerate(leaves))
            for _ in range(2):
                o, lse = banded_attention(q, k, v, GLOBAL, return_lse=True)
                alone = banded_attention(q, k, v, GLOBAL)
                with torch.no_grad():
                    close([banded_attention(q, k, v, GLOBAL)], expected[:1])
                for gradient in (do, LAZY[name](do)):
                    close([*torch.autograd.grad(alone, leaves, gradient, retain_graph=True)], expected[1:])
                for gradients in ((LAZY[name](do), dlse), (do, LAZY[name](dlse))):
                    close([*torch.autograd.grad((o, lse), leaves, gradients, retain_graph=True)], [*of_both])


@pytest.mark.parametrize("route", ["eager", "watched"])
def test_gradients_that_are_zero_without_memory(route: str) -> None:
    leaves, do, expected = leaves_and_gradients(length=44)
    for _ in range(3):
        with Recorder() if route == "watched" else nullcontext():
            o, lse = banded_attention(*leaves, GLOBAL, return_lse=True)
            nothing = torch._efficientzerotensor(o.shape), torch._efficientzerotensor(lse.shape)
            for gradient in torch.autograd.grad((o, lse), leaves, nothing, retain_graph=True):
                assert not gradient.any()
            close([*torch.autograd.grad((o, lse), leaves, (do, nothing[1]))], expected[1:])
            zero = torch._efficientzerotensor(leaves[0].shape)
            torch.testing.assert_close(
                banded_attention(zero, *leaves[1:], GLOBAL), ours_of_zero(leaves), rtol=1e-4, atol=1e-4
            )


def ours_of_zero(leaves: tuple[Tensor, ...]) -> Tensor:
    return reference_attention(torch.zeros_like(leaves[0]), *leaves[1:], GLOBAL)[0]
