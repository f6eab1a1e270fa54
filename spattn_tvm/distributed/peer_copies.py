"""Rows that travel between GPUs of one host by copy engines, through memory that all ranks have mapped.

NCCL's kernels run on the multiprocessors that attention needs, and want what they send in one piece. Here a
rank writes rows from where they lie into a buffer of the receiver, who copies them from there to where they
belong: both by copy engines, on streams of their own, while attention runs. Counters in the same memory, that
streams write and wait for, say what has arrived and what may be overwritten. No kernel takes part, and the
host waits for nothing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from spattn_tvm.torch_private import timeout_seconds

from .copy_engines import Block, CopyEngines

SEND, TAKE_IN = 0, 1  # streams

_COUNTER_BYTES = 128  # a line of the L2 cache each
_ALIGNMENT = 256
_PROBE_BYTES = 2**25
_PROBE_SECONDS = 10.0


class Memory(Protocol):
    """Buffers that the ranks of a group have mapped, and two streams, `SEND` and `TAKE_IN`, that copy between
    them and count in them, each in its order. One for all that is sent: copies to several ranks take turns on
    a GPU's links anyway.
    """

    def allocate(self, size: int) -> None:
        """Make a buffer of zeros; what was there before is no longer used."""

    def map(self) -> list[int]:
        """Addresses of all ranks' buffers; by all ranks together."""

    def begin(self) -> None:
        """Let both streams wait for what the caller's stream has to do by now."""

    def copy(
        self, stream: int, target: int, target_pitch: int, source: int, source_pitch: int, block: Block
    ) -> None:
        """A block's pieces, from address to address."""

    def write(self, stream: int, address: int, value: int) -> None:
        """Store a counter, after all that the stream did before."""

    def wait(self, stream: int, address: int, value: int) -> None:
        """Until a counter is at least `value`."""

    def end(self, stream: int) -> Any:
        """What has ``wait``, which lets the caller's stream wait for what this one has to do by now."""

    def release(self, addresses: Sequence[int], value: int) -> None:
        """Store counters for which streams wait, whatever these do."""

    def synchronize(self) -> None:
        """Let the host wait for all streams."""

    def host_counter(self) -> Tensor:
        """A counter that streams write and the host reads: int32 ``()``, 0."""


@dataclass(frozen=True)
class Shipment:
    """What the ranks send each other in one go, but for the addresses of the tensors.

    Attributes
    ----------
    room : int
        Bytes that arrive at the rank to which most is sent.
    sent, received : int
        Bytes of this rank.
    sends : tuple of (int, int, tuple of (int, Block))
        Each other rank, where there what it is sent begins, and the blocks, one after the other, each with
        the index of its tensor; a block's address counts from the tensor's.
    receives : tuple of (int, tuple of (int, int, Block))
        Each other rank, and where what it sends is, and belongs.
    """

    room: int
    sent: int
    received: int
    sends: tuple[tuple[int, int, tuple[tuple[int, Block], ...]], ...]
    receives: tuple[tuple[int, tuple[tuple[int, int, Block], ...]], ...]

    @classmethod
    def of(
        cls,
        rank: int,
        sizes: Sequence[Sequence[int]],
        sources: Sequence[Sequence[tuple[int, Block]]],
        targets: Sequence[Sequence[tuple[int, int, Block]]],
    ) -> Shipment:
        """A rank's.

        Parameters
        ----------
        rank : int
        sizes : sequence of sequence of int
            Bytes that rank s sends rank r, ``sizes[s][r]``; the same on all ranks.
        sources : sequence of sequence of (int, Block)
            What this rank sends each rank, of which tensor; nothing itself.
        targets : sequence of sequence of (int, int, Block)
            From which of its bytes on what each rank sends belongs where, in which tensor.
        """
        ranks = len(sizes)

        def before(sender: int, receiver: int) -> int:
            return sum(sizes[other][receiver] for other in range(sender) if other != receiver)

        # Each begins with the rank behind it: none is everybody's first.
        peers = [(rank + step) % ranks for step in range(1, ranks)]
        return cls(
            room=max(before(ranks, receiver) for receiver in range(ranks)),
            sent=sum(block.size for peer in peers for _, block in sources[peer]),
            received=before(ranks, rank),
            sends=tuple((peer, before(rank, peer), tuple(sources[peer])) for peer in peers),
            receives=tuple(
                (peer, tuple((before(peer, rank) + at, index, block) for at, index, block in targets[peer]))
                for peer in reversed(peers)
            ),
        )


@dataclass
class Transfer:
    """What one call of `PeerCopies.start` set going."""

    ends: Sequence[Any]
    kept: Sequence[Tensor]

    def wait(self) -> None:
        """Let the current stream wait for what arrives, and until what was sent may be overwritten."""
        for end in self.ends:
            end.wait()
        self.ends, self.kept = (), ()


class PeerCopies:
    """Transfers among the ranks of a group. All ranks start the same ones in the same order.

    Attributes
    ----------
    rank, ranks : int
    received, sent : int
        Bytes so far.
    """

    def __init__(self, group: dist.ProcessGroup, memory: Memory) -> None:
        # A group that is destroyed takes its buffers along: what is kept for it must not keep it.
        self._group, self._memory = weakref.ref(group), memory
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.received = self.sent = 0
        self._header = -(-2 * self.ranks * _COUNTER_BYTES // _ALIGNMENT) * _ALIGNMENT
        self._started = 0
        self._addresses: list[int] = []
        self._size = self._next = 0
        self._refused: int | None = None
        # Number, begin and end of the transfers for which none has waited that came to the same place.
        self._places: deque[tuple[int, int, int]] = deque()
        self._done = memory.host_counter()
        self._watch = _Watch(self._done, timeout_seconds(group), self.rank)

    def _everywhere(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value, group=self._group())
        return found

    def _all_can(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:
            warnings.warn(f"no buffer for rows of other ranks: {error}", stacklevel=2)
            self._everywhere(False)
            return False
        return all(self._everywhere(True))

    def reserve(self, size: int) -> bool:
        """Have buffers for transfers of up to `size` bytes to a rank; False where a rank has no room.

        Where they must grow the ranks' hosts wait for each other, and for their transfers.
        """
        size = 2 * max(_aligned(size), _ALIGNMENT)  # one arrives while the one before is taken in
        if size <= self._size or (self._refused is not None and size >= self._refused):
            return size <= self._size
        self._memory.synchronize()
        self._everywhere(None)
        self._addresses, self._size = [], 0

        def allocate() -> None:
            self._memory.allocate(self._header + size)

        def map_all() -> None:
            self._addresses = self._memory.map()

        if self._all_can(allocate) and self._all_can(map_all):
            self._size = size
        else:
            self._refused = size
        self._started = self._next = 0
        self._places.clear()
        self._watch.forget()
        self._done.zero_()
        self._everywhere(None)
        return self._size > 0

    def _arrived(self, rank: int, sender: int) -> int:
        """Where `rank` finds the number of the last transfer of which all of `sender` is there."""
        return self._addresses[rank] + 2 * sender * _COUNTER_BYTES

    def _taken_in(self, rank: int, receiver: int) -> int:
        """Where `rank` finds the number of the last transfer that `receiver` has taken in from it."""
        return self._addresses[rank] + (2 * receiver + 1) * _COUNTER_BYTES

    def _place(self, size: int) -> tuple[int, int]:
        """Where the buffers have room for a transfer, and the last one that was there."""
        places, begin = self._places, self._next
        if begin + size > self._size:
            # What still lies behind is older than what lies in front, for which this one waits.
            while places and places[0][1] >= begin:
                places.popleft()
            begin = 0
        end = self._next = begin + _aligned(size)
        last = 0
        # Each rank takes transfers in in their order: whoever waited for one waited for all before.
        while places and places[0][1] < end and begin < places[0][2]:
            last = places.popleft()[0]
        if begin < end:
            places.append((self._started, begin, end))
        return begin, last

    def start(
        self, shipment: Shipment, sources: Sequence[int], targets: Sequence[int], kept: Sequence[Tensor]
    ) -> Transfer:
        """Send and receive. There must be room: `reserve`.

        Parameters
        ----------
        shipment : Shipment
        sources, targets : sequence of int
            Addresses of its tensors.
        kept : sequence of Tensor
            Whose memory that is.
        """
        self._started += 1
        number, rank, memory = self._started, self.rank, self._memory
        self._watch.expect(number)
        begin, last = self._place(shipment.room)
        base = self._header + begin
        memory.begin()
        for peer, at, blocks in shipment.sends:
            if last:
                memory.wait(SEND, self._taken_in(rank, peer), last)
            there = self._addresses[peer] + base + at
            for index, block in blocks:
                memory.copy(SEND, there, block.width, sources[index] + block.address, block.pitch, block)
                there += block.size
            memory.write(SEND, self._arrived(peer, rank), number)
        ends = [memory.end(SEND)]
        here = self._addresses[rank] + base
        for sender, pieces in shipment.receives:
            memory.wait(TAKE_IN, self._arrived(rank, sender), number)
            for at, index, block in pieces:
                memory.copy(
                    TAKE_IN, targets[index] + block.address, block.pitch, here + at, block.width, block
                )
        # Where this sender's rows were, others' will be: it may go on when all are taken in.
        for sender, _ in shipment.receives:
            memory.write(TAKE_IN, self._taken_in(sender, rank), number)
        ends.append(memory.end(TAKE_IN))
        memory.write(TAKE_IN, self._done.data_ptr(), number)
        self.sent += shipment.sent
        self.received += shipment.received
        return Transfer(ends, kept)

    def probe(self, device: torch.device) -> str:
        """Send some bytes to and fro: what is wrong, nothing where they arrive. By all ranks together."""
        width, height, rounds = 512, 2, 4
        if not self.reserve(_PROBE_BYTES):
            return "no room for buffers"
        # The rank that sends, and the one that receives; what lies between the pieces stays where it is.
        pairs = torch.arange(self.ranks, dtype=torch.uint8, device=device)
        outgoing = (pairs + self.rank * self.ranks)[:, None].repeat(1, 2 * height * width)
        arriving = torch.zeros(self.ranks, height * width, dtype=torch.uint8, device=device)
        expected = (pairs * self.ranks + self.rank)[:, None].expand_as(arriving).clone()
        expected[self.rank] = 0
        sizes = [[height * width] * self.ranks] * self.ranks
        shipment = Shipment.of(
            self.rank,
            sizes,
            [[(index, Block(0, 2 * width, width, height))] for index in range(self.ranks)],
            [[(0, index, Block(0, width, width, height))] for index in range(self.ranks)],
        )
        there, here = ([each.data_ptr() for each in rows] for rows in (outgoing, arriving))
        try:
            transfers = [self.start(shipment, there, here, (outgoing, arriving)) for _ in range(rounds)]
            deadline = time.monotonic() + _PROBE_SECONDS
            while int(self._done) != rounds and time.monotonic() < deadline:
                time.sleep(1e-3)
            if int(self._done) != rounds:
                raise TimeoutError(f"copies took more than {_PROBE_SECONDS} s")
            for transfer in transfers:
                transfer.wait()
        except Exception as error:
            self._watch.forget()
            counters = [
                counter(self.rank, other)
                for other in range(self.ranks)
                for counter in (self._arrived, self._taken_in)
            ]
            self._memory.release(counters, rounds)
            return f"{type(error).__name__}: {error}"
        self.received = self.sent = 0
        return "" if torch.equal(arriving, expected) else "copies arrive as something else"


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# --- ranks that don't answer ------------------------------------------------------------------------------


class _Watch:
    """Ends the process where a transfer has not ended in time, as NCCL does for its own: a stream that waits
    for another rank can't be called back.

    It reads a counter in the host's memory and calls nothing of CUDA's, which would break a graph that
    another thread captures.
    """

    def __init__(self, done: Tensor, seconds: float, rank: int) -> None:
        self._done, self._seconds, self._rank = done, seconds, rank
        self._deadlines: deque[tuple[int, float]] = deque()
        self._lock = threading.Lock()
        self._is_watching = False

    def expect(self, number: int) -> None:
        with self._lock:
            self._deadlines.append((number, time.monotonic() + self._seconds))
            if not self._is_watching:
                self._is_watching = True
                threading.Thread(target=self._run, name="spattn-transfers", daemon=True).start()

    def forget(self) -> None:
        """What was expected has ended."""
        with self._lock:
            self._deadlines.clear()

    def _run(self) -> None:
        while True:
            done = int(self._done) % 2**32
            with self._lock:
                while self._deadlines and (done - self._deadlines[0][0]) % 2**32 < 2**31:
                    self._deadlines.popleft()
                if not self._deadlines:
                    self._is_watching = False
                    return
                if time.monotonic() > self._deadlines[0][1]:
                    break
            time.sleep(min(0.5, self._seconds / 4))
        print(
            f"rank {self._rank} waited in vain for rows of others: one ended, hangs, or called with other "
            "arguments; it is aborted",
            file=sys.stderr,
            flush=True,
        )
        os.abort()


# --- which groups can -------------------------------------------------------------------------------------

# Of each group, its transfers; None where its ranks can't write to each other's memory.
_of_group: WeakKeyDictionary[dist.ProcessGroup, PeerCopies | None] = WeakKeyDictionary()


def _obstacle(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why this rank's GPU can't write to the others' memory; empty if it can."""
    card = str(torch.cuda.get_device_properties(device).uuid)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (socket.gethostname(), card), group=group)
    if len({host for host, _ in found}) > 1:
        return "ranks on several hosts"
    if len({card for _, card in found}) < len(found):
        return "ranks that share a GPU"
    return ""


def _all_obstacles(group: dist.ProcessGroup, obstacle: str) -> str:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, obstacle, group=group)
    return "; ".join(f"{text} (rank {rank})" for rank, text in enumerate(found) if text)


def _set_up(group: dist.ProcessGroup, device: torch.device) -> PeerCopies | str:
    """Transfers that have been tried, or what is in their way; the same kind on all ranks."""
    memory: Memory | None = None
    obstacle = _obstacle(group, device)
    if not obstacle:
        try:
            memory = CopyEngines(group, device)
        except Exception as error:
            obstacle = f"{type(error).__name__}: {error}"
    obstacle = _all_obstacles(group, obstacle)
    if obstacle or memory is None:
        return obstacle
    copies = PeerCopies(group, memory)
    return _all_obstacles(group, copies.probe(device)) or copies


def are_turned_off() -> bool:
    """By ``SPATTN_PEER_COPIES=0`` in the environment."""
    return os.environ.get("SPATTN_PEER_COPIES") == "0"


def peer_copies(group: dist.ProcessGroup, device: torch.device) -> PeerCopies | None:
    """The transfers of a group whose ranks' GPUs can write to each other's memory, else None, with a warning.

    Found out on the first call, which all ranks make. ``SPATTN_PEER_COPIES=0`` in the environment of all
    ranks turns them off.
    """
    if device.type != "cuda" or dist.get_world_size(group) == 1:
        return None
    # Counters go on from call to call, which a graph that is captured would not.
    if torch.cuda.is_current_stream_capturing() or are_turned_off():
        return None
    if group not in _of_group:
        found = _set_up(group, device)
        if isinstance(found, str):
            warnings.warn(
                f"rows travel by messages of the process group and not by copy engines: {found}", stacklevel=2
            )
        _of_group[group] = None if isinstance(found, str) else found
    return _of_group[group]


def bytes_copied() -> tuple[int, int]:
    """What this process's transfers have received and sent so far, of all groups."""
    each = [copies for copies in _of_group.values() if copies is not None]
    return sum(copies.received for copies in each), sum(copies.sent for copies in each)
