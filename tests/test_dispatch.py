"""Which kernel serves a call: the order of choices, their reasons, and what may and may not fall back."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from spattn_tvm import bundle as bundle_module
from spattn_tvm import dispatch, store
from spattn_tvm.bands import BandLayout
from spattn_tvm.build.errors import CompilerMissingError, KernelUnavailableError
from spattn_tvm.dispatch import FallbackWarning, explain, find_kernel
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.reference import reference_attention
from spattn_tvm.store import ScheduleRecord, save_records
from spattn_tvm.target import MachineTarget, detect_cpu, parse_target

LAYOUT = BandLayout.spattention(4)
PROBLEM = AttentionProblem("forward", "float32", 2, 4, 4, 70, 32, LAYOUT)


def query(dtype: torch.dtype = torch.float32, head_dim: int = 32) -> torch.Tensor:
    return torch.randn(2, 4, 70, head_dim).to(dtype)


@pytest.fixture(autouse=True)
def _own_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SPATTN_SCHEDULES", str(tmp_path / "schedules"))
    monkeypatch.delenv("SPATTN_BUNDLE", raising=False)
    monkeypatch.setattr(bundle_module, "_registered", [])
    dispatch.clear_cache()
    yield
    dispatch.clear_cache()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_kernel(*arguments: object) -> Path:
        raise CompilerMissingError("there is no compiler in this test")

    monkeypatch.setattr(dispatch, "compile_kernel", compile_kernel)


def tuned_record(problem: AttentionProblem = PROBLEM) -> ScheduleRecord:
    target = detect_cpu()
    return ScheduleRecord(
        problem,
        target.folder,
        KernelSpec.untuned("cpu", problem, target),
        12.5,
        device="this chip",
        date="2026-11-24",
        source_log="a/log",
    )


def test_a_cpu_call_gets_the_cpu_kernel_and_the_right_numbers() -> None:
    q, k, v = query(), query(), query()
    kernel = find_kernel("forward", q, LAYOUT.spec)
    assert (kernel.family, kernel.status) == ("cpu", "untuned")
    assert kernel.path is not None
    assert kernel.path.exists()
    assert kernel.spec == KernelSpec.untuned("cpu", PROBLEM, detect_cpu())
    torch.testing.assert_close(banded_attention(q, k, v, LAYOUT), reference_attention(q, k, v, LAYOUT)[0])


def test_status_follows_the_records() -> None:
    assert find_kernel("forward", query(), LAYOUT.spec).status == "untuned"
    save_records([tuned_record(dataclasses.replace(PROBLEM, length=35))])
    dispatch.clear_cache()
    nearest = find_kernel("forward", query(), LAYOUT.spec)
    assert (nearest.status, "length 35" in nearest.reason) == ("nearest", True)
    save_records([tuned_record()])
    dispatch.clear_cache()
    tuned = find_kernel("forward", query(), LAYOUT.spec)
    assert (tuned.status, "12.5 us" in tuned.reason) == ("tuned", True)
    assert find_kernel("forward", query(), BandLayout.causal(4).spec).status == "nearest"


def test_a_repeated_lookup_is_the_same_object_and_takes_under_a_microsecond_or_so() -> None:
    q, spec = query(), LAYOUT.spec
    kernel = find_kernel("forward", q, spec)
    assert find_kernel("forward", query(), spec) is kernel
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            find_kernel("forward", q, spec)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 3e-6  # 0.45 us on an idle core; the margin is for a busy one


def test_packed_documents_may_be_longer_together_than_the_context() -> None:
    assert find_kernel("forward", query(), BandLayout.spattention(4, 16).spec).family == "cpu"


def test_explicit_reference_and_float64_run_the_reference_silently() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_kernel("forward", query(), LAYOUT.spec, "reference").family == "reference"
        assert find_kernel("forward", query(torch.float64), LAYOUT.spec).family == "reference"


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_auto_falls_back_to_the_reference_once_visibly_and_correctly(kv_heads: int) -> None:
    q, k, v = (
        torch.randn(2, 70, heads, 32, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    )
    with pytest.warns(FallbackWarning, match="slow eager reference: there is no compiler") as caught:
        o, lse = banded_attention(q, k, v, LAYOUT, return_lse=True)
        assert find_kernel("forward", query()[:1], LAYOUT.spec).family == "reference"
    assert len(caught) == 1
    expected, expected_lse = reference_attention(q, k, v, LAYOUT)
    torch.testing.assert_close(o, expected.to(q.dtype))
    torch.testing.assert_close(lse, expected_lse)
    assert o.stride() == q.stride()
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    wanted = torch.autograd.grad(expected, (q, k, v), do.float())
    for gradient, other, model in zip(gradients, wanted, (q, k, v), strict=True):
        # The kernel's backward starts from the rounded o, autograd's from the exact one.
        torch.testing.assert_close(gradient, other, rtol=0.05, atol=0.02)
        assert gradient.stride() == model.stride()


@pytest.mark.usefixtures("no_compiler")
def test_an_explicit_family_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match="there is no compiler in this test"):
        find_kernel("forward", query(), LAYOUT.spec, "cpu")


@pytest.mark.parametrize("family", ["hopper", "mma"])
def test_a_family_of_another_device_is_refused_with_those_that_run(family: str) -> None:
    with pytest.raises(ValueError, match=rf"impl='{family}' can't run on {detect_cpu().folder}.*: cpu"):
        find_kernel("forward", query(), LAYOUT.spec, family)


def test_an_explicit_family_refuses_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got float64"):
        find_kernel("forward", query(torch.float64), LAYOUT.spec, "cpu")
    with pytest.raises(ValueError, match="head dim 20"):
        find_kernel("forward", query(head_dim=20), LAYOUT.spec, "cpu")
    with pytest.raises(ValueError, match="impl must be one of auto, reference, cpu"):
        find_kernel("forward", query(), LAYOUT.spec, "abacus")


def test_auto_with_a_head_dim_that_no_kernel_takes_falls_back_visibly() -> None:
    with pytest.warns(FallbackWarning, match="head dim 20"):
        assert find_kernel("forward", query(head_dim=20), LAYOUT.spec).family == "reference"


def test_a_damaged_schedule_file_is_no_reason_to_fall_back() -> None:
    (path,) = save_records([tuned_record()])
    path.write_text("[", encoding="utf-8")
    store.clear_cache()
    with pytest.warns(store.ScheduleWarning, match="no schedule file"):
        kernel = find_kernel("forward", query(), LAYOUT.spec)
    assert (kernel.family, kernel.status) == ("cpu", "untuned")


def test_the_table_of_known_calls_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MAX_ENTRIES", 8)
    for length in range(1, 30):
        find_kernel("forward", query()[:, :, :1].expand(2, 4, length, 32), LAYOUT.spec)
    assert len(dispatch._found) <= 8


def test_explain_says_what_why_and_where() -> None:
    target = detect_cpu()
    text = str(explain(PROBLEM, target))
    for part in (PROBLEM.key, target.folder, "runs on this machine", "untuned", "no record", "query_rows="):
        assert part in text
    save_records([tuned_record()])
    text = str(explain(PROBLEM, target))
    for part in ("tuned", "12.5 us on this chip, 2026-11-24", "a/log"):
        assert part in text
    longer = dataclasses.replace(PROBLEM, length=PROBLEM.length + 1)
    text = str(explain(longer, target))
    for part in ("nearest", f"12.5 us for {PROBLEM.key} on this chip, 2026-11-24", "a/log"):
        assert part in text
    far = MachineTarget("cpu", "aarch64") if target.arch != "aarch64" else parse_target("cpu-x86-64-v4")
    assert "does not run here" in str(explain(PROBLEM, far))
    unserved = dataclasses.replace(PROBLEM, head_dim=20)
    assert "reference (slow, eager)" in str(explain(unserved, target))


def test_a_call_with_a_compiled_kernel_imports_neither_tvm_nor_xgboost() -> None:
    banded_attention(query(), query(), query(), LAYOUT)  # compiled from here on
    code = (
        "import sys, torch; from spattn_tvm import BandLayout, banded_attention;"
        "q = torch.randn(2, 4, 70, 32); banded_attention(q, q, q, BandLayout.spattention(4), impl='cpu');"
        "assert not {'tvm', 'xgboost'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_a_gpu_call_runs_a_kernel_or_says_why_not() -> None:
    q = torch.randn(1, 4, 512, 128, dtype=torch.bfloat16, device="cuda")
    kernel = find_kernel("forward", q, LAYOUT.spec)
    if kernel.family == "reference":
        assert kernel.reason
    else:
        o = banded_attention(q, q, q, LAYOUT)
        torch.testing.assert_close(o.float(), reference_attention(q, q, q, LAYOUT)[0], rtol=2e-2, atol=2e-2)


def test_a_chip_that_no_kernel_is_made_for_falls_back_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    def detect() -> MachineTarget:
        raise ValueError("no CPU kernels for a 'vax' machine")

    monkeypatch.setattr(dispatch, "detect_cpu", detect)
    with pytest.warns(FallbackWarning, match="vax"):
        assert find_kernel("forward", query(), LAYOUT.spec).family == "reference"
    with pytest.raises(ValueError, match="vax"):
        find_kernel("forward", query(), LAYOUT.spec, "cpu")


def test_while_a_kernel_is_compiled_others_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    find_kernel("forward", query(), LAYOUT.spec)
    compile_kernel, started, go_on = dispatch.compile_kernel, threading.Event(), threading.Event()

    def slowly(spec: KernelSpec, target: MachineTarget) -> Path:
        if spec.head_dim == 64:
            started.set()
            assert go_on.wait(60)
        return compile_kernel(spec, target)

    monkeypatch.setattr(dispatch, "compile_kernel", slowly)
    dispatch.clear_cache()
    with ThreadPoolExecutor(2) as pool:
        cold = [pool.submit(find_kernel, "forward", query(head_dim=64), LAYOUT.spec) for _ in range(2)]
        assert started.wait(60)
        try:
            assert find_kernel("forward", query(), LAYOUT.spec).family == "cpu"
            assert find_kernel("forward", query(torch.float64), LAYOUT.spec).family == "reference"
            assert not any(future.done() for future in cold)
        finally:
            go_on.set()
        first, second = (future.result() for future in cold)
    assert first is second
    assert find_kernel("forward", query(head_dim=64), LAYOUT.spec) is first


def test_an_answer_that_was_under_way_when_all_were_forgotten_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_kernel = dispatch.compile_kernel

    def clearing(spec: KernelSpec, target: MachineTarget) -> Path:
        monkeypatch.setattr(dispatch, "compile_kernel", compile_kernel)
        dispatch.clear_cache()
        return compile_kernel(spec, target)

    monkeypatch.setattr(dispatch, "compile_kernel", clearing)
    first = find_kernel("forward", query(), LAYOUT.spec)
    second = find_kernel("forward", query(), LAYOUT.spec)
    assert first is not second
    assert find_kernel("forward", query(), LAYOUT.spec) is second


def test_what_could_not_be_compiled_is_tried_again_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel, tries = dispatch.compile_kernel, []

    def on_a_full_disk(spec: KernelSpec, target: MachineTarget) -> Path:
        tries.append(spec)
        raise KernelUnavailableError("the disk of this test is full")

    monkeypatch.setattr(dispatch, "compile_kernel", on_a_full_disk)
    with pytest.warns(FallbackWarning, match="the disk of this test is full") as caught:
        for length in (70, 71, 72):
            kernel = find_kernel("forward", torch.randn(2, 4, length, 32), LAYOUT.spec)
            assert (kernel.family, kernel.reason) == ("reference", "the disk of this test is full")
    assert (len(caught), len(tries)) == (1, 1)
    for _ in range(2):
        with pytest.raises(KernelUnavailableError, match="full"):
            find_kernel("forward", query(), LAYOUT.spec, "cpu")
    assert len(tries) == 3
    monkeypatch.setattr(dispatch, "compile_kernel", compile_kernel)
    assert find_kernel("forward", query(), LAYOUT.spec, "cpu").family == "cpu"
    assert find_kernel("forward", torch.randn(2, 4, 73, 32), LAYOUT.spec).family == "cpu"
    assert find_kernel("forward", query(), LAYOUT.spec).family == "reference"
    dispatch.clear_cache()
    assert find_kernel("forward", query(), LAYOUT.spec).family == "cpu"


def test_a_kernel_that_cannot_be_compiled_anywhere_is_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(spec: KernelSpec, target: MachineTarget) -> Path:
        raise RuntimeError("compiling cpu forward failed: the kernel is wrong")

    monkeypatch.setattr(dispatch, "compile_kernel", wrong)
    with pytest.raises(RuntimeError, match="the kernel is wrong"):
        find_kernel("forward", query(), LAYOUT.spec)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_while_another_thread_looks_for_a_kernel_is_not_stuck() -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with dispatch._lock:
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if dispatch._lock.acquire(timeout=5) else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    release.set()
    thread.join()
    assert status == 0
