"""Ranks of a group in processes of their own, kept for many calls."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# One import for all ranks; what is not installed is left out.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "rank_problems",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "transformers.models.llama.modeling_llama",
        "transformers.models.olmoe.modeling_olmoe",
        "spattn_tvm.integrations.transformers",
    ]
)


@cache
def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """The ranks as a mesh, made once: each group of a mesh has threads of its own until its process ends."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


class RankError(AssertionError):
    """What ranks raised: `of` has each rank's exception, or None."""

    def __init__(self, of: list[BaseException | None], text: str) -> None:
        super().__init__(text)
        self.of = of


def _serve(rank: int, ranks: int, folder: str, timeout_s: float, backend: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s)
    )
    while True:
        call = pipe.recv()
        if call is None:
            break
        function, arguments = call
        try:
            pipe.send((function(*arguments), None, ""))
        except Exception as error:
            pipe.send((None, error, traceback.format_exc()))
    # Ranks that lost each other can't take leave.
    os._exit(0)


class Ranks:
    """`ranks` processes; `call` runs a function in each of them at once."""

    def __init__(self, ranks: int, timeout_s: float = 60, backend: str = "gloo") -> None:
        self.ranks = ranks
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = _CONTEXT.Pipe()
            arguments = (rank, ranks, self._folder.name, timeout_s, backend, theirs)
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returns; RankError if one raises or ends."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, errors, texts = [], [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                result, error, text = pipe.recv() if pipe.poll(120) else (None, TimeoutError(), "no answer")
            except EOFError as ended:
                result, error, text = None, ended, "ended"
            results.append(result)
            errors.append(error)
            texts.append(f"rank {rank}: {text}")
        if any(error is not None for error in errors):
            raise RankError(errors, "\n".join(texts))
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
