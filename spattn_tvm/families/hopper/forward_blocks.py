"""A thread block of the Hopper forward: its shared memory, its barriers and who does what."""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T

from .forward_consumer import consumer
from .forward_producers import decoder, loader, prefetch_tables
from .forward_sizes import TILE_WORDS, Sizes, conflict, producer_registers
from .parts import rows_map
from .support import PLANE


class ForwardBlocks:
    """The kernel that attends; `run` is all of it.

    Parameters
    ----------
    decisions, head_dim, dtype
        As `build_hopper_forward`'s; with ``least_chunks`` keys are split, see `decoder` and `consumer`.

    Raises
    ------
    ValueError
        When the head dim, the dtype or the combination of decisions can't work.
    """

    def __init__(self, decisions: Mapping[str, int], head_dim: int, dtype: str) -> None:
        if dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype must be 'bfloat16' or 'float16', got {dtype!r}")
        if head_dim % PLANE:
            raise ValueError(f"head_dim must be a multiple of {PLANE}, got {head_dim}")
        reason = conflict(decisions, head_dim)
        if reason is not None:
            raise ValueError(f"{reason}: choose other decisions than {dict(decisions)}")
        self.sizes = c = Sizes(decisions, head_dim)
        self.dtype = dtype
        self.find_first, self.decode = decoder(decisions, c)
        self.load = loader(decisions, c)
        self.consume = consumer(decisions, c, dtype)
        self.threads = 128 * (c.consumers + 1)
        self.consumer_registers = decisions["consumer_registers"]
        self.loader_registers = producer_registers(c.consumers, self.consumer_registers)

    def maps(self, t: SimpleNamespace) -> SimpleNamespace:
        """The tensors' maps. Rows before a tensor's first or behind its last are filled with zeros."""
        c = self.sizes
        return SimpleNamespace(q=rows_map(t.q, c.rows), k=rows_map(t.k, c.keys), v=rows_map(t.v, c.keys))

    def share(self, arena: Any) -> SimpleNamespace:
        """The regions of shared memory as buffers."""
        c = self.sizes

        def region(count: int, kind: str, at: int, size: int) -> Any:
            return T.decl_buffer((count,), kind, data=arena.data, elem_offset=at // size, scope="shared.dyn")

        return SimpleNamespace(
            k=region(c.stages * c.chunk, self.dtype, c.k_at, 2),
            v=region(c.stages * c.chunk, self.dtype, c.v_at, 2),
            q=region(c.queries_slots * c.rows * c.head_dim, self.dtype, c.q_at, 2),
            words=region(TILE_WORDS, "int32", c.words_at, 4),
            barriers=region(c.barriers, "uint64", c.barriers_at, 8),
        )

    @T.inline
    def init_barriers(self, s, first, count, arrivals):
        for i in T.unroll(count):
            T.ptx.mbarrier.init.shared.b64(s.barriers.ptr_to([first + i]), T.uint32(arrivals))

    # The loader arrives once for what it hands over, each computing warp for what it hands back, and each
    # thread for the words of a tile that it has read.
    @T.inline
    def init_all_barriers(self, s):
        c = T.meta_var(self.sizes)
        self.init_barriers(s, c.k_full, c.stages, 1)
        self.init_barriers(s, c.v_full, c.stages, 1)
        self.init_barriers(s, c.k_empty, c.stages, 4 * c.consumers)
        self.init_barriers(s, c.v_empty, c.stages, 4 * c.consumers)
        self.init_barriers(s, c.q_full, c.queries_slots, 1)
        self.init_barriers(s, c.q_empty, c.queries_slots, 4 * c.consumers)
        self.init_barriers(s, c.tile_full, 1, 1)
        self.init_barriers(s, c.tile_empty, 1, 128 * c.consumers + 32)
        self.init_barriers(s, c.v_landed, 1, 1)
        T.ptx.fence.mbarrier_init.release.cluster()
        T.ptx.fence.proxy.async_.shared__cta()

    @T.inline
    def run(self, t, maps, scale, workers):
        block = T.cta_id([workers])
        warp = T.warp_id([self.threads // 32])
        lane = T.lane_id([32])
        thread = T.thread_id([self.threads])
        arena = T.alloc_buffer((self.sizes.shared_bytes,), "uint8", scope="shared.dyn", align=1024)
        s = T.meta_var(self.share(arena))
        # The block's first tile, known before the others are decoded.
        slot: T.int32 = 0
        batch: T.int32 = 0
        head: T.int32 = 0
        if thread == 32:
            self.find_first(t, maps, block, slot, batch, head)
        if warp == 2:
            prefetch_tables(t, lane)
        if thread == 96:
            T.ptx["prefetch.tensormap"](T.address_of(maps.q))
            T.ptx["prefetch.tensormap"](T.address_of(maps.k))
            T.ptx["prefetch.tensormap"](T.address_of(maps.v))
        if thread == 0:
            self.init_all_barriers(s)
        T.cuda.cta_sync()
        if warp < 4:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](self.loader_registers)
            if thread == 32:
                self.decode(s, t, block, workers, slot, batch, head)
            if warp == 0:
                self.load(s, t, maps, lane)
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](self.consumer_registers)
            self.consume(s, t, scale, warp, lane)
