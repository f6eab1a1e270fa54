"""Fleet tuning: TVM's own tracker and two of its servers on this machine measure what is built here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import toy_family

pytest.importorskip("tvm")
pytest.importorskip("xgboost")
pytest.importorskip("tornado")

from typer.testing import CliRunner

from spattn_tvm import cli
from spattn_tvm.bands import BandLayout
from spattn_tvm.build.library_cache import compile_kernel
from spattn_tvm.dispatch import Kernel
from spattn_tvm.launch import Domain, launch_backward, launch_forward
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.provenance import available_cpus
from spattn_tvm.reference import reference_attention
from spattn_tvm.runtime import load_library
from spattn_tvm.store import load_records
from spattn_tvm.target import detect_cpu, detect_cuda
from spattn_tvm.tuning import workers as workers_module
from spattn_tvm.tuning.fleet import Fleet
from spattn_tvm.tuning.log import read_measurements, read_run
from spattn_tvm.tuning.measure import ProcessMeter
from spattn_tvm.tuning.workers import Workers

KEY = "spattn-test"
# Grouped queries: the server's kernel leaves the sums over heads that share a key head to its caller.
SHAPE = "2,4/2,160,32"
PROBLEM = AttentionProblem("forward", "float32", 2, 4, 2, 160, 32, BandLayout.spattention(4))


@dataclass
class _Services:
    tracker: str
    servers: dict[str, subprocess.Popen[bytes]]


def _start(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    # One group for the process and its own children, which a kill of it alone would leave behind.
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Both, because a process that has loaded a kernel has the second one set, and that is preferred.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with pytest.MonkeyPatch.context():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _serving(*environments: dict[str, str], options: Sequence[str] = ()) -> Iterator[_Services]:
    """A tracker, and a server for each environment, registered with it."""
    ports = [_free_port() for _ in range(1 + len(environments))]
    tracker = f"127.0.0.1:{ports[0]}"

    def addressed(port: int) -> tuple[str, ...]:
        return ("--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1))

    processes = [_start("tvm.exec.rpc_tracker", *addressed(ports[0]))]
    # A server that finds no tracker yet tries again only after 5 seconds.
    deadline = time.monotonic() + 60
    fleet = Fleet.parse(tracker, KEY)
    while True:
        try:
            assert fleet.servers() == []
            break
        except RuntimeError:
            assert time.monotonic() < deadline, "the tracker does not start"
            time.sleep(0.1)
    servers = {}
    for port, environment in zip(ports[1:], environments, strict=True):
        servers[f"127.0.0.1:{port}"] = _start(
            "tvm.exec.rpc_server",
            *addressed(port),
            "--tracker",
            tracker,
            "--key",
            KEY,
            *options,
            **environment,
        )
    try:
        while len(fleet.servers()) < len(servers):
            assert time.monotonic() < deadline, "the servers do not register"
            time.sleep(0.1)
        yield _Services(tracker, servers)
    finally:
        for process in (*servers.values(), *processes):
            _end(process)


@pytest.fixture(scope="module")
def services() -> Iterator[_Services]:
    with _serving({}, {}) as both:
        yield both


@pytest.fixture(autouse=True)
def _one_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process costs seconds of imports, more than these kernels take to build."""
    monkeypatch.setattr(workers_module, "available_cpus", lambda: 1)


def _tune(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["tune", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, f"{result.output}{result.exception or ''}"


def test_servers_share_a_search_whose_winners_are_right(services: _Services, tmp_path: Path) -> None:
    logs, schedules = tmp_path / "logs", tmp_path / "schedules"
    code, output = _tune(
        "--shape", SHAPE, "--budget", "6", "--rpc", services.tracker, "--key", KEY,
        "--log-root", str(logs), "--schedules", str(schedules), "--verify", "3",
    )  # fmt: skip
    assert code == 0, output
    assert "6 passed, 0 failed" in output
    used = set()
    for direction in ("forward", "backward"):
        (log,) = logs.glob(f"*/{direction}-*")
        measured = read_measurements(log)
        assert len(measured) == 6 and all(m.error is None and (m.latency_us or 0) > 0 for m in measured)
        device = read_run(log)["sessions"][0]["device"]
        assert device["threads"] == "1"
        used |= {m.server for m in measured}
        assert used <= set(device["servers"]) <= set(services.servers)
    assert used == set(services.servers), "one server did all the work"
    records = {record.problem.direction: record for record in load_records(detect_cpu().folder, schedules)}
    assert set(records) == {"forward", "backward"}
    assert all(record.device == device["name"] for record in records.values())

    generator = torch.Generator().manual_seed(time.time_ns() % 2**32)
    q, k, v = (torch.randn(2, heads, 160, 32, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    do = torch.randn(q.shape, generator=generator)
    o, lse = reference_attention(q, k, v, PROBLEM.layout)
    wanted = torch.autograd.grad(o, (q, k, v), do)
    bands = torch.from_numpy(PROBLEM.layout.table(160)[None].copy())
    domain = Domain.of_same_rows(bands, torch.tensor([0, 160], dtype=torch.int32))
    kernels = {}
    for direction, record in records.items():
        path = compile_kernel(record.kernel, detect_cpu())
        kernels[direction] = Kernel(load_library(path, direction), record.kernel)
    with torch.no_grad():
        actual, actual_lse = launch_forward(kernels["forward"], q, k, v, domain, 32**-0.5)
        torch.testing.assert_close(actual, o, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(actual_lse, lse, rtol=1e-4, atol=1e-5)
        gradients = launch_backward(
            kernels["backward"], q, k, v, o, lse, do, torch.zeros_like(lse), domain, 32**-0.5
        )
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_servers_that_own_a_gpu_each_share_a_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers_module, "available_cpus", available_cpus)
    logs, schedules = tmp_path / "logs", tmp_path / "schedules"
    # Without PyTorch, of which a server makes nothing, sessions begin sooner.
    gpus = [{"CUDA_VISIBLE_DEVICES": str(index), "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1"} for index in range(2)]
    with _serving(*gpus, options=["--no-fork"]) as both:
        code, output = _tune(
            "--shape", "2,4/2,300,32", "--dtype", "float16", "--direction", "forward", "--target", "cuda",
            "--family", "mma", "--budget", "4", "--rpc", both.tracker, "--key", KEY, "--log-root", str(logs),
            "--schedules", str(schedules), "--verify", "3",
        )  # fmt: skip
        assert code == 0, output
        (log,) = logs.glob("cuda-*/forward-*")
        measured = read_measurements(log)
        assert len(measured) == 4 and all((m.latency_us or 0) > 0 for m in measured), output
        assert {m.server for m in measured} == set(both.servers)
        assert "3 passed, 0 failed" in output
    target = detect_cuda(0)
    (record,) = load_records(target.folder, schedules)
    assert read_run(log)["sessions"][0]["device"]["name"] == record.device
    assert torch.cuda.get_device_name(0) in record.device


def test_a_wrong_kernel_is_found_out_on_a_server(services: _Services) -> None:
    target = detect_cpu()
    right, wrong = (toy_family.kernel(toy_family.BROKEN_TOY, repeats=1, fault=fault) for fault in (0, 1))
    fleet = Fleet.parse(services.tracker, KEY)
    with (
        Workers(target, fleet=fleet) as workers,
        ProcessMeter(PROBLEM, target, workers=workers) as meter,
    ):
        outcomes = dict(meter.measure([right, wrong], None))
        assert outcomes[0].error is None and (outcomes[0].latency_us or 0) > 0
        assert "is wrong" in (outcomes[1].error or "")

        # A kernel that crashes takes TVM's server with it: the search goes on with the other one, and when
        # that is gone too it says so.
        victim, survivor = services.servers.items()
        _end(victim[1])
        outcomes = dict(meter.measure([right], None))
        assert outcomes[0].server == survivor[0] and outcomes[0].error is None
        _end(survivor[1])
        with pytest.raises(RuntimeError, match=f"no server is left under the key '{KEY}'"):
            list(meter.measure([right], None))
    with pytest.raises(RuntimeError, match="it has no servers at all"):
        fleet.require_servers()


def test_servers_of_another_chip_are_refused() -> None:
    with Workers(detect_cpu()) as workers:
        workers.note_server("a:1", {"name": "znver4"})
        workers.note_server("b:2", {"name": "znver4"})
        with pytest.raises(RuntimeError, match="must be alike: c:3 is skylake"):
            workers.note_server("c:3", {"name": "skylake"})


def test_another_key_is_refused_and_names_the_known_ones(services: _Services, tmp_path: Path) -> None:
    process = _start(
        "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", str(_free_port()), "--port-end", "65535",
        "--tracker", services.tracker, "--key", "other",
    )  # fmt: skip
    try:
        other = Fleet.parse(services.tracker, "other")
        deadline = time.monotonic() + 60
        while not other.servers():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        code, output = _tune(
            "--shape", SHAPE, "--rpc", services.tracker, "--key", "nobody", "--log-root", str(tmp_path)
        )
        assert code != 0
        assert "no server is registered under the key 'nobody'" in output
        assert "it has servers under other" in output
    finally:
        _end(process)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1", "here:", ":9190", "here:port", "here:0", "here:70000", ""])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match="an RPC tracker's address is HOST:PORT"):
        Fleet.parse(address, KEY)


def test_key_and_address_belong_together() -> None:
    with pytest.raises(ValueError, match="give the key that the servers were started with"):
        Fleet.parse("127.0.0.1:9190", None)
    code, output = _tune("--key", KEY)
    assert code != 0 and "give its address, --rpc HOST:PORT" in output


def test_nobody_listens(tmp_path: Path) -> None:
    port = _free_port()
    began = time.monotonic()
    code, output = _tune("--rpc", f"127.0.0.1:{port}", "--key", KEY, "--log-root", str(tmp_path))
    assert code != 0 and f"no RPC tracker listens at 127.0.0.1:{port}" in output
    assert time.monotonic() - began < 10


def test_what_listens_is_no_tracker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4)
                connection.sendall(b"HTTP")

        thread = threading.Thread(target=greet)
        thread.start()
        fleet = Fleet("127.0.0.1", server.getsockname()[1], KEY)
        with pytest.raises(RuntimeError, match="is no RPC tracker"):
            fleet.servers()
        thread.join()
