"""Rows that travel by copies into other ranks' memory: with memory of the host in place of that of GPUs."""

from __future__ import annotations

import ctypes
import gc
import random
import signal
import time
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from mapped_host_memory import MappedHostMemory
from rank_problems import Problem, attend_here, compare_problems, draw_problem, draw_tensors
from rank_processes import Ranks

from spattn_tvm.distributed import exchange, peer_copies, plan_ranks
from spattn_tvm.distributed.copy_engines import Block, blocks_of
from spattn_tvm.distributed.peer_copies import TAKE_IN, PeerCopies, Shipment
from spattn_tvm.torch_private import timeout_seconds


def compare_copied(problems: list[Problem], folder: str, most: int) -> tuple[int, int]:
    """Received bytes, and how often a place was used again."""
    copies = PeerCopies(dist.group.WORLD, MappedHostMemory(folder, most))
    again = 0
    place = copies._place

    def counting(size: int) -> tuple[int, int]:
        nonlocal again
        begin, last = place(size)
        again += last > 0
        return begin, last

    with (
        patch.object(exchange, "peer_copies", lambda group, device: copies),
        patch.object(copies, "_place", counting),
    ):
        compare_problems(problems)
    return copies.received, again


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Any:
    processes = Ranks(request.param)
    yield processes
    processes.close()


def test_random_problems_equal_one_process(ranks: Ranks, tmp_path: Path) -> None:
    problems = [draw_problem(3000 + seed, ranks.ranks) for seed in range(12)]
    largest = max(problems, key=lambda problem: problem.heads * problem.length)
    results = ranks.call(compare_copied, [*problems, largest, largest], str(tmp_path), 2**40)
    assert all(received > 0 and again > 2 for received, again in results)


def test_ranks_without_room_send_messages(ranks: Ranks, tmp_path: Path) -> None:
    """Small ones are copied still; which is decided by all ranks alike."""
    problems = [draw_problem(3100 + seed, ranks.ranks) for seed in range(8)]
    roomy = ranks.call(compare_copied, problems, str(tmp_path), 2**40)
    tight = ranks.call(compare_copied, problems, str(tmp_path), 2**15)
    assert all(0 < less[0] < more[0] for less, more in zip(tight, roomy, strict=True))


def count_copied(problem: Problem, folder: str) -> list[int]:
    """Received and sent bytes, forward, and forward and backward."""
    copies = PeerCopies(dist.group.WORLD, MappedHostMemory(folder))
    tensors = [problem.shards.take(tensor, dist.get_rank(), 2) for tensor in draw_tensors(problem)]
    inputs = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    with patch.object(exchange, "peer_copies", lambda group, device: copies):
        o = attend_here(problem, *inputs)
        forward = [copies.received, copies.sent]
        o.backward(tensors[3])
    return [*forward, copies.received, copies.sent]


def test_bytes_moved_are_the_plans(ranks: Ranks, tmp_path: Path) -> None:
    for seed in range(6):
        problem = draw_problem(3200 + seed, ranks.ranks, [("heads", "bands")[seed % 2]])
        plan = plan_ranks(
            problem.layout, problem.shards, kv_heads=problem.kv_heads, boundaries=problem.boundaries
        )
        traffic, row = plan.traffic[problem.strategy], problem.batch * problem.head_dim * 4
        there, back = traffic.received, traffic.sent
        assert ranks.call(count_copied, problem, str(tmp_path)) == [
            [there[rank] * row, back[rank] * row, *[(there[rank] + back[rank]) * row] * 2]
            for rank in range(ranks.ranks)
        ], problem


def _wait_for_nobody(folder: str) -> None:
    assert timeout_seconds(dist.group.WORLD) == 60
    with patch.object(peer_copies, "timeout_seconds", lambda group: 2.0):
        copies = PeerCopies(dist.group.WORLD, MappedHostMemory(folder))
    assert copies.reserve(8)
    if dist.get_rank() == 0:
        copies.start(Shipment.of(0, [[0, 0], [0, 0]], [[], []], [[], []]), [], [], [])


def test_a_rank_that_waits_in_vain_is_aborted(tmp_path: Path) -> None:
    processes = Ranks(2, timeout_s=60)
    try:
        with pytest.raises(AssertionError, match="rank 0: ended"):
            processes.call(_wait_for_nobody, str(tmp_path))
        processes.processes[0].join(30)
        assert processes.processes[0].exitcode == -signal.SIGABRT
    finally:
        processes.close()


def _take_places(folder: str, seed: int) -> None:
    drawn = random.Random(seed)
    copies = PeerCopies(dist.group.WORLD, MappedHostMemory(folder))
    assert copies.reserve(5000)
    taken: list[tuple[int, int]] = []
    waited = 0
    for number in range(1, 3000):
        copies._started = number
        size = drawn.choice([0, 1, 300, drawn.randrange(5000), 5000])
        begin, last = copies._place(size)
        assert begin >= 0 and begin + size <= copies._size and last < number
        waited = max(waited, last)
        overlapping = [
            earlier + 1
            for earlier, (first, end) in enumerate(taken)
            if max(first, begin) < min(end, begin + size)
        ]
        assert waited >= max(overlapping, default=0)
        taken.append((begin, begin + size))
    assert len(copies._places) <= copies._size // 256


def test_no_place_is_used_again_before_it_is_free(two: Ranks, tmp_path: Path) -> None:
    for seed in range(3):
        two.call(_take_places, str(tmp_path), seed)


class _Dawdling(MappedHostMemory):
    """Takes in late what some senders sent long ago."""

    def copy(self, stream: int, *arguments: Any) -> None:
        if stream == TAKE_IN and random.random() < 0.3:
            time.sleep(random.random() * 4e-3)
        super().copy(stream, *arguments)


def _ship(folder: str, seed: int, most: int) -> int:
    """Other sizes each time, so that what a rank sends comes to lie where others' was; how often."""
    drawn, rank, ranks = random.Random(seed), dist.get_rank(), dist.get_world_size()
    random.seed(seed * ranks + rank)
    copies = PeerCopies(dist.group.WORLD, _Dawdling(folder))
    assert copies.reserve((ranks - 1) * most)
    again = 0
    for number in range(60):
        sizes = [
            [drawn.choice([0, drawn.randint(1, most), most]) for _ in range(ranks)] for _ in range(ranks)
        ]
        sent = [
            torch.full((max(size, 1),), number * 16 + 4 * rank + peer, dtype=torch.int32).to(torch.uint8)
            for peer, size in enumerate(sizes[rank])
        ]
        received = [torch.zeros(sizes[sender][rank], dtype=torch.uint8) for sender in range(ranks)]

        def block(size: int) -> list[Block]:
            return [Block(0, size, size, 1)] if size else []

        shipment = Shipment.of(
            rank,
            sizes,
            [[(peer, each) for each in block(size)] for peer, size in enumerate(sizes[rank])],
            [[(0, sender, each) for each in block(sizes[sender][rank])] for sender in range(ranks)],
        )
        places = len(copies._places)
        addresses = [[each.data_ptr() for each in tensors] for tensors in (sent, received)]
        copies.start(shipment, *addresses, [*sent, *received]).wait()
        again += len(copies._places) <= places
        for sender in range(ranks):
            if sender != rank:
                expected = (number * 16 + 4 * sender + rank) % 256
                assert (received[sender] == expected).all(), (number, sender, rank)
    return again


def test_rows_are_taken_in_before_others_come_to_their_place(ranks: Ranks, tmp_path: Path) -> None:
    for seed in range(2):
        assert min(ranks.call(_ship, str(tmp_path), seed, 1000)) > 10


def _destroy_a_group(folder: str) -> None:
    group = dist.new_group()
    copies = peer_copies._of_group[group] = PeerCopies(group, MappedHostMemory(folder))
    assert copies.reserve(1000)
    ended = weakref.ref(copies)
    dist.destroy_process_group(group)
    del group, copies
    gc.collect()
    assert ended() is None and not peer_copies._of_group


def test_a_destroyed_group_takes_its_buffers_along(two: Ranks, tmp_path: Path) -> None:
    two.call(_destroy_a_group, str(tmp_path))


class _Faulty(MappedHostMemory):
    """The last rank's copies are "refused", for which the others wait a second, or "lost"."""

    def __init__(self, folder: str, fault: str) -> None:
        super().__init__(folder)
        self._fault = fault
        self._is_last = dist.get_rank() == dist.get_world_size() - 1

    def copy(self, *arguments: Any) -> None:
        if self._is_last and self._fault == "refused":
            raise RuntimeError("no engines")
        if not self._is_last or self._fault != "lost":
            super().copy(*arguments)

    def wait(self, stream: int, address: int, value: int) -> None:
        deadline = time.monotonic() + (1 if self._fault == "refused" else 60)
        while (ctypes.c_uint32.from_address(address).value - value) % 2**32 >= 2**31:
            if time.monotonic() > deadline:
                raise TimeoutError("no answer")
            time.sleep(1e-3)


def _probe(folder: str, fault: str) -> str:
    copies = PeerCopies(dist.group.WORLD, _Faulty(folder, fault))
    return copies.probe(torch.device("cpu"))


def test_copies_are_tried_before_they_are_used(ranks: Ranks, tmp_path: Path) -> None:
    last = ranks.ranks - 1
    assert ranks.call(_probe, str(tmp_path), "") == [""] * ranks.ranks
    answers = ranks.call(_probe, str(tmp_path), "refused")
    assert "no engines" in answers[last] and all("no answer" in each for each in answers[:last])
    answers = ranks.call(_probe, str(tmp_path), "lost")
    assert all("something else" in each for each in answers)


def _read_block(block: Block, owner: torch.Tensor) -> bytes:
    memory = owner.untyped_storage()
    first = owner.data_ptr() + block.address - memory.data_ptr()
    flat = bytes(memory.tolist())
    return b"".join(
        flat[first + index * block.pitch : first + index * block.pitch + block.width]
        for index in range(block.height)
    )


@pytest.mark.parametrize(
    ("heads", "step", "count"), [((1, 3), 2, 2), ((0, 1, 2), 1, 2), ((3, 0, 4), None, 6), ((2,), 1, 2)]
)
def test_blocks_are_the_rows_of_heads(heads: tuple[int, ...], step: int | None, count: int) -> None:
    tensor = torch.randn(2, 5, 7, 8)
    blocks = blocks_of(tensor, heads, step, 2, 3)
    assert len(blocks) == count
    expected = tensor[:, list(heads), 2:5].contiguous().flatten().view(torch.uint8).numpy().tobytes()
    assert b"".join(_read_block(block, tensor) for block in blocks) == expected
    assert blocks_of(tensor, heads, step, 2, 0) == []
