"""Time attention of a sequence that ranks share: ours by each strategy, and its peers.

Each rank is a process, on GPUs with a card of its own (NCCL), else with its share of the CPU's cores (gloo).
All measure the same calls at the same time: a sample is the time of the slowest rank, a figure the median
over rounds. ``one`` is one rank alone with the whole sequence, against which speed-ups are.

Traffic is what torch.distributed's operators are called with, or what copy engines are told to copy from rank
to rank, counted on each rank in a forward and backward pass that is not timed, and compared with the plan's
closed form. A rank's own part is not counted; a reduction counts as its parts sent to where they are summed.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spattn_tvm.bands import BandLayout
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.provenance import available_cpus
from spattn_tvm.target import detect_cpu, detect_cuda

from .case import Case
from .inputs import Inputs
from .masked_peers import PeerUnavailable, first_line
from .report import report_head

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    Tensors = Sequence[torch.Tensor]

RANK_PEERS = {
    "one": "one rank, whole sequence",
    "heads": "ours, heads",
    "bands": "ours, bands",
    "all_gather": "all-gather of K and V, our kernel",
    "ring": "PyTorch context parallel, ring, dense SDPA",
}
RANK_STEPS = ("forward", "forward_backward")
SHARDINGS = ("contiguous", "head_tail")
_VERSIONED_PACKAGES = ("spattn-tvm", "torch", "apache-tvm", "apache-tvm-ffi")
_LEAST_SAMPLE_MS = 20.0
_MOST_CALLS = 50
# A rank may compile kernels while the others wait.
_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class _Task:
    problem: AttentionProblem
    ranks: int
    sharding: str
    peers: tuple[str, ...]
    steps: tuple[str, ...]
    device: str
    rounds: int
    seed: int
    parts: int | None


# --- what a rank calls ------------------------------------------------------------------------------------


def _gathered(tensor: torch.Tensor, shards: Any) -> torch.Tensor:
    """The whole sequence's rows from equal shards; gradients are summed and cut again."""
    import torch
    import torch.distributed as dist

    # From PyTorch 2.13 on by other names.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
            whole = rows.new_empty((shards.ranks * rows.shape[0], *rows.shape[1:]))
            all_gather(whole, rows.contiguous())
            return shards.join(whole.chunk(shards.ranks), 2)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            parts = [shards.take(gradients[0], rank, 2) for rank in range(shards.ranks)]
            summed = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
            reduce_scatter(summed, torch.cat(parts))
            return summed

    result: torch.Tensor = Gather.apply(tensor)
    return result


@contextmanager
def _attention_of(peer: str, task: _Task, inputs: Inputs, shards: Any) -> Iterator[Callable[..., Any]]:
    """A function of this rank's q, k and v, for as long as the peer needs its context."""
    import torch
    import torch.distributed as dist

    from spattn_tvm.distributed import context_parallel_attention
    from spattn_tvm.ops.attention import banded_attention

    layout, rank = task.problem.layout, dist.get_rank()
    if peer == "one":
        yield lambda q, k, v: banded_attention(q, k, v, layout)
    elif peer in ("heads", "bands"):
        yield lambda q, k, v: context_parallel_attention(
            q, k, v, layout, dist.group.WORLD, strategy=peer, shards=shards, parts=task.parts
        )
    elif peer == "all_gather":
        if layout.depends_on_length:
            layout = BandLayout.custom(layout.bands(task.problem.length))

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k, v = _gathered(k, shards), _gathered(v, shards)
            parts = [
                banded_attention(
                    q[:, :, at : at + rows],
                    k[:, :, : begin + rows],
                    v[:, :, : begin + rows],
                    layout,
                    query_offset=begin,
                )
                for begin, at, rows in shards.placed(rank)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

        yield attend
    else:
        yield from _ring(task)


def _ring(task: _Task) -> Iterator[Callable[..., Any]]:
    """PyTorch's context parallelism, keys going round; causal over all heads, whatever the layout."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from spattn_tvm.torch_private import send_keys_round

    if task.device == "cpu":
        raise PeerUnavailable("PyTorch's ring attention has no kernel for CPUs")
    if task.problem.dtype not in ("float16", "bfloat16"):
        raise PeerUnavailable("flash attention takes float16 and bfloat16")
    if not send_keys_round():
        raise PeerUnavailable("this PyTorch has no way to ask for a ring")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield from _round(init_device_mesh(task.device, (task.ranks,)), task.problem)


def _round(mesh: Any, problem: AttentionProblem) -> Iterator[Callable[..., Any]]:
    """As `_ring`, on a mesh, with the SDPA that is in PyTorch's module."""
    import torch
    from torch.distributed.tensor.experimental import context_parallel

    group = problem.query_heads // problem.kv_heads

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        # Looked up in the call: the context replaces it in its module.
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    # The context shards its buffers as our head-tail shards, and patches SDPA.
    position = torch.zeros(problem.length, device=mesh.device_type)
    with context_parallel(mesh, buffers=[position], buffer_seq_dims=[0]):
        yield attend


# --- traffic ----------------------------------------------------------------------------------------------


def _counter() -> Any:
    """A mode that adds up ``received`` and ``sent`` bytes of collectives, without what stays on the rank."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    from spattn_tvm.distributed.peer_copies import bytes_copied

    def bytes_of(tensors: Any) -> int:
        each = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        return sum(tensor.nbytes for tensor in each)

    class Counter(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.received = self.sent = self.copied = 0

        def __enter__(self) -> Any:
            self._copied = bytes_copied()
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            received, sent = bytes_copied()
            self.copied += received - self._copied[0]
            self.received += received - self._copied[0]
            self.sent += sent - self._copied[1]

        def _count_all_to_all(self, tensor: torch.Tensor, received: Any, sent: Any) -> None:
            ranks, rank = dist.get_world_size(), dist.get_rank()
            for name, sizes in (("received", received), ("sent", sent)):
                if sizes:
                    row = tensor.itemsize * math.prod(tensor.shape[1:])
                    moved = (sum(sizes) - sizes[rank]) * row
                else:
                    moved = tensor.nbytes * (ranks - 1) // ranks
                setattr(self, name, getattr(self, name) + moved)

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if any(issubclass(each, DTensor) for each in types):
                # Its own dispatch comes first, and calls here with what it moves.
                return NotImplemented
            others = dist.get_world_size() - 1
            name = func._schema.name
            if name == "c10d::alltoall_base_":
                self._count_all_to_all(args[0], args[3], args[4])
            elif name == "_c10d_functional::all_to_all_single":
                self._count_all_to_all(args[0], args[1], args[2])
            elif name == "c10d::send":
                self.sent += bytes_of(args[0])
            elif name == "c10d::recv_":
                self.received += bytes_of(args[0])
            elif name == "c10d::_allgather_base_":
                self.received += bytes_of(args[1]) * others
                self.sent += bytes_of(args[1]) * others
            elif name in ("c10d::_reduce_scatter_base_", "_c10d_functional::reduce_scatter_tensor"):
                whole = bytes_of(args[1] if name.startswith("c10d") else args[0])
                self.received += whole * others // (others + 1)
                self.sent += whole * others // (others + 1)
            elif name == "_c10d_functional::all_gather_into_tensor":
                self.received += bytes_of(args[0]) * others
                self.sent += bytes_of(args[0]) * others
            return func(*args, **(kwargs or {}))

    return Counter()


# --- a rank -----------------------------------------------------------------------------------------------


class _Rank:
    def __init__(self, task: _Task) -> None:
        import torch
        import torch.distributed as dist

        from spattn_tvm.distributed import Shards, plan_ranks

        self.task = task
        self.rank = dist.get_rank()
        self.device = torch.device(task.device, self.rank) if task.device == "cuda" else torch.device("cpu")
        problem = task.problem
        self.shards = getattr(Shards, task.sharding)(problem.length, task.ranks)
        self.head_tail = Shards.head_tail(problem.length, task.ranks)
        self.inputs = Inputs.random(problem, self.device, task.seed)
        self.plans = {
            strategy: plan_ranks(
                problem.layout,
                self.shards,
                kv_heads=problem.kv_heads,
                head_dim=problem.head_dim,
                itemsize=self.inputs.q.itemsize,
                strategy=strategy,
            )
            for strategy in ("heads", "bands")
        }

    def tensors_of(self, peer: str) -> list[torch.Tensor]:
        """q, k, v and the gradient of o, of this rank."""
        inputs = self.inputs
        whole = [inputs.q, inputs.k, inputs.v, inputs.grad]
        if peer != "one":
            shards = self.head_tail if peer == "ring" else self.shards
            whole = [shards.take(tensor, self.rank, 2).contiguous() for tensor in whole]
        return [tensor.detach() for tensor in whole]

    def everywhere(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.task.ranks
        dist.all_gather_object(gathered, value)
        return gathered

    def expected(self) -> list[torch.Tensor]:
        """o, dq, dk and dv of this rank's rows, computed here alone."""
        import torch

        from spattn_tvm.ops.attention import banded_attention

        q, k, v = self.inputs.leaves
        o = banded_attention(q, k, v, self.task.problem.layout)
        found = [o.detach(), *torch.autograd.grad(o, (q, k, v), self.inputs.grad)]
        return [self.shards.take(tensor, self.rank, 2).clone() for tensor in found]

    def _dense(self) -> torch.Tensor:
        """Causal o over all heads of the rows that the ring gives this rank."""
        import torch

        q, k, v = self.inputs.q, self.inputs.k, self.inputs.v
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head_tail.take(o, self.rank, 2)

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _sample_ms(self, step: Callable[[], Any], calls: int, alone: bool) -> float:
        """Of the slowest rank, or of rank 0 while the others wait."""
        import torch.distributed as dist

        self._wait()
        dist.barrier()
        self._wait()
        elapsed = 0.0
        if not alone or self.rank == 0:
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            self._wait()
            elapsed = (time.perf_counter() - begin) * 1e3 / calls
        return max(self.everywhere(elapsed))

    def entry(self, peer: str, expected: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
        """Check a peer, count what it moves, time it."""
        import torch

        task = self.task
        q, k, v, grad = self.tensors_of(peer)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        # Before SDPA is patched.
        dense = self._dense() if peer == "ring" and self.device.type == "cuda" else None
        with _attention_of(peer, task, self.inputs, self.shards) as attend:
            # Twice: a first call compiles, and the ranks compare their arguments.
            for _ in range(2):
                with _counter() as forward:
                    o = attend(*leaves)
                with _counter() as backward:
                    gradients = torch.autograd.grad(o, leaves, grad)
            errors = {}
            if peer not in ("one", "ring"):
                errors = {
                    name: _relative(ours, theirs)
                    for name, ours, theirs in zip(
                        ("o", "dq", "dk", "dv"), (o.detach(), *gradients), expected, strict=True
                    )
                }
            if dense is not None:
                errors = {"o": _relative(o.detach(), dense)}
            errors = {name: max(each[name] for each in self.everywhere(errors)) for name in errors}
            entries = []
            for step_name in task.steps:
                entry: dict[str, Any] = {
                    "peer": peer,
                    "title": RANK_PEERS[peer],
                    "direction": step_name,
                    "status": "ok",
                    "reason": "",
                    "median_ms": None,
                    "errors": errors,
                }
                moved = [forward] if step_name == "forward" else [forward, backward]
                entry["received_bytes"] = self.everywhere(sum(each.received for each in moved))
                entry["sent_bytes"] = self.everywhere(sum(each.sent for each in moved))
                entry["copied_bytes"] = self.everywhere(sum(each.copied for each in moved))
                entry |= self._closed_form(peer, step_name)
                if errors and not max(errors.values()) <= _tolerance(task.problem.dtype):
                    entry |= {"status": "wrong", "reason": f"relative errors {errors}"}
                    entries.append(entry)
                    continue
                with torch.no_grad() if step_name == "forward" else nullcontext():

                    def step(backward: bool = step_name != "forward") -> Any:
                        o = attend(*leaves)
                        return torch.autograd.grad(o, leaves, grad) if backward else o

                    alone = peer == "one"
                    first = self._sample_ms(step, 1, alone)
                    once = self._sample_ms(step, 1, alone)
                    calls = max(
                        1, min(_MOST_CALLS, math.ceil(_LEAST_SAMPLE_MS / max(min(first, once), 1e-3)))
                    )
                    samples = [self._sample_ms(step, calls, alone) for _ in range(task.rounds)]
                entries.append(
                    entry | {"median_ms": statistics.median(samples), "min_ms": min(samples), "calls": calls}
                )
        return entries

    def _closed_form(self, peer: str, step_name: str) -> dict[str, Any]:
        if peer not in ("heads", "bands", "all_gather"):
            return {}
        plan = self.plans["bands" if peer == "all_gather" else peer]
        traffic = plan.traffic[peer]
        problem = self.task.problem
        row = problem.batch * problem.head_dim * self.inputs.q.itemsize
        there, back = traffic.received, traffic.sent
        received = there if step_name == "forward" else [a + b for a, b in zip(there, back, strict=True)]
        found = {"planned_bytes": [rows * row for rows in received], "balance": traffic.balance}
        if peer == "all_gather":
            return found
        return found | {"parts": plan.parts_on(self.device.type, self.task.parts)}

    def measure(self) -> list[dict[str, Any]]:
        expected = self.expected()
        self.inputs.__dict__.pop("leaves", None)
        entries: list[dict[str, Any]] = []
        for peer in self.task.peers:
            try:
                found, obstacle = self.entry(peer, expected), ""
            except Exception as error:
                found = []
                obstacle = str(error) if isinstance(error, PeerUnavailable) else first_line(error)
            obstacles = [each for each in self.everywhere(obstacle) if each]
            if obstacles:
                found = [
                    {"peer": peer, "title": RANK_PEERS[peer], "direction": step, "status": "not available",
                     "reason": obstacles[0], "median_ms": None}
                    for step in self.task.steps
                ]  # fmt: skip
            entries += found
        alone = {entry["direction"]: entry.get("median_ms") for entry in entries if entry["peer"] == "one"}
        for entry in entries:
            ours, one = entry.get("median_ms"), alone.get(entry["direction"])
            entry["speed_up"] = one / ours if ours and one else None
        return entries


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root of the mean squared difference over that of what is expected."""
    if not theirs.numel():
        return 0.0
    difference = (ours.float() - theirs.float()).square().mean().sqrt()
    return float(difference / theirs.float().square().mean().sqrt().clamp_min(1e-30))


def _tolerance(dtype: str) -> float:
    """Two orders of summation, each rounded to the dtype once or twice."""
    return {"float32": 1e-4, "float64": 1e-9, "float16": 4e-3, "bfloat16": 3e-2}[dtype]


def _serve(rank: int, tasks: Sequence[_Task], folder: str) -> None:
    import torch
    import torch.distributed as dist

    ranks, is_cuda = tasks[0].ranks, tasks[0].device == "cuda"
    options: dict[str, Any] = {}
    if is_cuda:
        torch.cuda.set_device(rank)
        # What arrives lets kernels begin: it goes before blocks of kernels that have begun.
        high = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options = {"device_id": torch.device("cuda", rank), "pg_options": high}
    else:
        torch.set_num_threads(max(1, available_cpus() // ranks))
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=_TIMEOUT,
        **options,
    )
    try:
        for index, task in enumerate(tasks):
            entries = _Rank(task).measure()
            if rank == 0:
                Path(folder, f"{index}.json").write_text(json.dumps(entries), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # All is written. The ring's collectives keep threads of gloo's past the group, and one that lets go of a
    # tensor while Python ends aborts the process, and with it the benchmark (pytorch/pytorch#190489).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# --- the benchmark ----------------------------------------------------------------------------------------


def benchmark_ranks(
    problems: Sequence[AttentionProblem],
    ranks: int,
    *,
    shardings: Sequence[str] = ("contiguous",),
    peers: Sequence[str] | None = None,
    steps: Sequence[str] = RANK_STEPS,
    device: str = "cpu",
    rounds: int = 7,
    seed: int = 0,
    parts: int | None = None,
) -> dict[str, Any]:
    """Time attention of sequences that `ranks` processes share.

    Parameters
    ----------
    problems : sequence of AttentionProblem
        Their ``direction`` is ignored.
    ranks : int
        At least 2; on CUDA at most as many as there are GPUs.
    shardings : sequence of str
        Of ``"contiguous"`` and ``"head_tail"``; each problem is timed with each.
    peers : sequence of str, optional
        Names in `RANK_PEERS`; all by default.
    steps : sequence of str
        Of `RANK_STEPS`.
    device : {"cpu", "cuda"}
    rounds : int
        Samples of each peer and step.
    seed : int
        Of the inputs.
    parts : int, optional
        In how many the heads travel, as in ``context_parallel_attention``.

    Returns
    -------
    dict
        Of JSON values. ``results`` has, for each problem and sharding, ``entries``: for each peer and step
        ``median_ms`` of the slowest rank, ``speed_up`` over one rank, ``received_bytes`` and ``sent_bytes``
        as counted, ``copied_bytes`` of those received that copy engines brought, and ``planned_bytes``
        received by the closed form, each of all ranks, ``balance`` (mean over busiest of the pairs),
        ``parts`` of heads, ``errors`` against one rank (relative, of the worst rank), ``status`` and
        ``reason``.

    Raises
    ------
    ValueError
        No problem, an unknown peer, step, sharding or device, too few GPUs, or a length that is no multiple
        of twice the ranks, as the peers need.
    torch.multiprocessing.ProcessRaisedException
        A rank ended with an error.
    """
    import torch
    import torch.multiprocessing

    names = tuple(RANK_PEERS) if peers is None else tuple(peers)
    for what, given, known in (
        ("peer", names, tuple(RANK_PEERS)),
        ("step", tuple(steps), RANK_STEPS),
        ("sharding", tuple(shardings), SHARDINGS),
        ("device", (device,), ("cpu", "cuda")),
    ):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise ValueError(f"unknown {what} {(*unknown, None)[0]!r}; known: {', '.join(known)}")
    if not problems:
        raise ValueError("a benchmark of ranks needs a problem")
    if ranks < 2:
        raise ValueError(f"a benchmark of ranks needs at least 2, got {ranks}")
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise ValueError(f"{ranks} ranks need as many GPUs, this machine has {torch.cuda.device_count()}")
    for problem in problems:
        if problem.length % (2 * ranks):
            raise ValueError(
                f"the length must be a multiple of twice the {ranks} ranks, as peers need, got "
                f"{problem.length}"
            )
    tasks = [
        _Task(problem, ranks, sharding, names, tuple(steps), device, rounds, seed, parts)
        for problem in problems
        for sharding in shardings
    ]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_serve, (tasks, folder), nprocs=ranks)
        entries = [
            json.loads(Path(folder, f"{index}.json").read_text(encoding="utf-8"))
            for index in range(len(tasks))
        ]
    return {
        **report_head(
            1, detect_cpu() if device == "cpu" else detect_cuda(0), torch.device(device), _VERSIONED_PACKAGES
        ),
        "ranks": ranks,
        "method": {"rounds": rounds, "seed": seed, "statistic": "median of the slowest rank"},
        "results": [
            {
                "problem": task.problem.to_json(),
                "sharding": task.sharding,
                "shape": f"{Case(task.problem).describe()}, {ranks} ranks, {task.sharding}",
                "entries": each,
            }
            for task, each in zip(tasks, entries, strict=True)
        ],
    }


def rank_tables(report: Mapping[str, Any]) -> list[Table]:
    """One rich table for each problem and sharding of a report."""
    return [_table(result, report["target"]) for result in report["results"]]


def _table(result: Mapping[str, Any], target: str) -> Table:
    from rich.table import Table

    table = Table(title=f"{result['shape']}, {target}")
    for title in ("step", "peer"):
        table.add_column(title)
    for title in ("median ms", "speed-up", "received MiB", "planned MiB", "balance", "max error"):
        table.add_column(title, justify="right")
    for step in dict.fromkeys(entry["direction"] for entry in result["entries"]):
        for entry in (each for each in result["entries"] if each["direction"] == step):
            if entry["status"] != "ok":
                table.add_row(step, entry["title"], entry["status"], entry["reason"])
                continue
            received, planned = (
                f"{max(entry[name]) / 2**20:.4g}" if name in entry else ""
                for name in ("received_bytes", "planned_bytes")
            )
            table.add_row(
                step,
                entry["title"],
                f"{entry['median_ms']:.4g}",
                f"{entry['speed_up']:.2f}" if entry["speed_up"] else "",
                received,
                planned,
                f"{entry['balance']:.3f}" if "balance" in entry else "",
                f"{max(entry['errors'].values()):.1e}" if entry["errors"] else "",
            )
        table.add_section()
    return table
