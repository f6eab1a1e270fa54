"""Train with fully sharded parameters (FSDP2) in two processes.

    python examples/fsdp2.py

Two processes with gloo on a CPU; on GPUs the same code runs with nccl, one process for each. Both runs,
sharded and not, take the same batches and end with the same losses.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from spattn_tvm import BandedAttention

RANKS, CONTEXT, WIDTH, STEPS = 2, 96, 128, 8


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (BandedAttention(WIDTH, 4, context_length=CONTEXT, rope_theta=1e4) for _ in range(2))
    return nn.Sequential(*layers)


def train(model: nn.Module, batches: list[Tensor]) -> list[float]:
    """Mean squared distance of what comes out to what went in; SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    losses = []
    for batch in batches:
        loss = (model(batch) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run(rank: int, batches: list[Tensor], folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    model = make_model()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Each rank has its rows of every batch.
    losses = train(model, [batch.chunk(RANKS)[rank] for batch in batches])
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    if rank == 0:
        torch.save(mean / RANKS, os.path.join(folder, "losses.pt"))
    dist.destroy_process_group()


def main() -> None:
    batches = [torch.randn(4, CONTEXT, WIDTH)] * STEPS
    alone = torch.tensor(train(make_model(), batches))
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, args=(batches, folder), nprocs=RANKS)
        sharded = torch.load(os.path.join(folder, "losses.pt"))
    print(f"one process {alone.tolist()}\ntwo, sharded {sharded.tolist()}")
    assert alone[-1] < alone[0]
    torch.testing.assert_close(sharded, alone, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    main()
