"""Parts of the Hopper kernels: tensors and their maps, addresses, barriers, products, masks.

The inline functions change the variables that they are given, as if their text stood where they are called.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from spattn_tvm.domains.numbers import INF, LOG2E, LOWEST

from .backward_sizes import BARRIER_BYTES, INFO_BYTES, SWIZZLE_ROW_BYTES
from .support import PLANE, WARPGROUP_ROWS

TAKERS_AT = 12  # in what a chunk's producer says of it
ANY_CHUNK = 1 << 30  # limit of a search that may wait
LEAST_LSE = LOWEST  # of a query with keys

LOAD = "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
LOAD_STATS = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
PREFETCH = "cp.async.bulk.prefetch.tensor.5d.L2.global.tile"
SHORT = {"bfloat16": "bf16", "float16": "f16"}

# Products of two packed pairs, added to a sum.
_DOT_SOURCE = {
    "bfloat16": """
__device__ __forceinline__ float spattn_dot2(unsigned int a, unsigned int b, float sum) {
  sum = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
  return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), sum);
}
""",
    "float16": """
__device__ __forceinline__ float spattn_dot2(unsigned int a, unsigned int b, float sum) {
  float2 x = __half22float2(*reinterpret_cast<__half2*>(&a));
  float2 y = __half22float2(*reinterpret_cast<__half2*>(&b));
  return fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
}
""",
}

# A loop that never repeats, for exp2 is never negative; see `pin`.
_PIN_SOURCE = """
__device__ __forceinline__ void spattn_pin(float p) {
  asm volatile(
      "{\\n.reg .pred q;\\nspattn_again:\\nsetp.lt.f32 q, %0, 0f00000000;\\n"
      "@q nanosleep.u32 32;\\n@q bra spattn_again;\\n}" ::"f"(p) : "memory");
}
"""

_LOAD_SHARED_SOURCE = """
__device__ __forceinline__ int spattn_load_shared(unsigned int at) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
  return value;
}
"""

_LOAD_IF_COMPLETE_SOURCE = """
__device__ __forceinline__ int spattn_load_if_complete(unsigned int barrier, int phase, unsigned int at) {
  int value;
  asm volatile(
      "{\\n.reg .pred p;\\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\\n"
      "mov.b32 %0, 0;\\n@p ld.shared.s32 %0, [%3];\\n}"
      : "=&r"(value) : "r"(barrier), "r"(phase), "r"(at) : "memory");
  return value;
}
"""

_BALLOT_SOURCE = """
__device__ __forceinline__ unsigned int spattn_ballot(int p) { return __ballot_sync(0xffffffffu, p); }
"""


_HERE_SOURCE = """
__device__ __forceinline__ int spattn_here(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
"""

_ADD_RELEASE_SOURCE = """
__device__ __forceinline__ void spattn_add_release(int* at, int count) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(at), "r"(count) : "memory");
}
"""

_WAIT_COUNT_SOURCE = """
__device__ __forceinline__ void spattn_wait_count(const int* at, int count) {
  int seen;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(at) : "memory");
    if (seen >= count) break;
    __nanosleep(500);
  }
}
"""


def _hold_source(count: int) -> str:
    operands = ", ".join(f'"+f"(r[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void spattn_hold{count}(float* r) {{
  asm volatile("" : {operands} :: "memory");
}}
"""


def wgmma(columns: int, dtype: str) -> str:
    """The product of 64 rows and 16 columns with 16 rows and ``columns`` columns, added up in float32."""
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{SHORT[dtype]}.{SHORT[dtype]}"


def convert(dtype: str) -> str:
    """Packs two float32."""
    return f"cvt.rn.{SHORT[dtype]}x2.f32"


def descriptor(plane_bytes: int) -> int:
    """Bits of a wgmma descriptor besides the address: 128-byte swizzle, 1024 bytes a group of 8 rows."""
    return (1 << 62) | (64 << 32) | ((plane_bytes >> 4) << 16)


K_MAJOR = descriptor(16)


def matrix(kind: int, at: Any) -> Any:
    """The descriptor of a matrix that begins at a shared-memory address."""
    return T.uint64(kind) + T.Cast("uint64", at >> T.uint32(4))


def k_step(rows: int, step: int) -> Any:
    """How far a descriptor moves to the 16 columns of ``step``, where planes of 64 have ``rows`` rows."""
    return T.uint64(step // 4 * (rows * SWIZZLE_ROW_BYTES // 16) + step % 4 * 2)


def row_step(step: int) -> Any:
    """How far a descriptor moves to the 16 rows of ``step``."""
    return T.uint64(step * (16 * SWIZZLE_ROW_BYTES // 16))


def address(base: Any, offsets: Mapping[str, int], name: str, index: Any = None, pitch: int = 0) -> Any:
    """Shared-memory address of element `index` (`pitch` bytes apart) of the region `name`."""
    start = base + T.uint32(offsets[name])
    return start if index is None else start + T.Cast("uint32", index) * T.uint32(pitch)


def named(name: str, value: Any) -> Any:
    """``value``, called ``name`` in the kernel's text, as an assignment there would call it."""
    IRBuilder.name(name, value)
    return value


def match_tensors(dtype: str, head_dim: int, **handles: Any) -> SimpleNamespace:
    """The arguments of a kernel as buffers, and their sizes as int32.

    ``q, k, v, o, do, dq, dk, dv`` have any strides but the last, which is 1. The shapes are 64-bit, because a
    stride is bound in the type of its buffer's shape.
    """
    sizes = {
        name: T.int64() for name in ("B", "HQ", "HKV", "N", "NK", "M", "boundaries", "R", "pairs", "counts")
    }
    parts = T.int64() if "partial_o" in handles else None
    batches, query_heads, kv_heads, queries, keys, tables, boundaries, ranges, pairs, counts = (
        named(name, size) for name, size in sizes.items()
    )
    t = SimpleNamespace()
    for name, handle in handles.items():
        heads, length = (kv_heads, keys) if name in ("k", "v", "dk", "dv") else (query_heads, queries)
        options: dict[str, Any] = {"dtype": "float32", "align": 16}
        if name in ("lse", "dlse"):
            shape = (batches, heads, length)
        elif name == "stats":
            shape = (batches, heads, pairs, 4)
        elif name == "dq_sum":
            shape = (batches, heads, length, T.int64(head_dim))
        elif name in ("partial_o", "partial_sums"):
            shape = (parts, head_dim if name == "partial_o" else 4)
        elif name == "bands":
            shape, options = (tables, heads, 4), {"dtype": "int32", "align": 4}
        elif name == "key_ranges":
            shape, options = (ranges, 3), {"dtype": "int32", "align": 4}
        elif name in ("cu_seqlens", "cu_seqlens_k", "next_tile", "counters", "progress"):
            shape = ({"next_tile": 2, "counters": 2, "progress": counts}.get(name, boundaries),)
            options = {"dtype": "int32", "align": 4}
        else:
            shape = (batches, heads, length, T.int64(head_dim))
            strides = (*(named(f"{name}_{axis}", T.int64()) for axis in "bhn"), T.int64(1))
            options = {"dtype": dtype, "align": 16, "strides": strides, "layout": None}
        setattr(t, name, named(name, T.match_buffer(handle, shape, **options)))

    def count(name: str, size: Any) -> Any:
        return named(name, T.Bind(T.Cast("int32", size)))

    t.batches, t.query_heads, t.kv_heads = (
        count("b", batches),
        count("hq", query_heads),
        count("hkv", kv_heads),
    )
    t.queries, t.keys = count("n", queries), count("nk", keys)
    t.tables, t.ranges = count("m", tables), count("r", ranges)
    t.documents = count("documents", boundaries - 1)
    t.group = named("group", T.Bind(t.query_heads // t.kv_heads))
    return t


def element(tensor: Any, b: Any, h: Any, row: Any, column: Any) -> Any:
    """Global address of one element of a (B, H, N, D) tensor of two-byte numbers, in 64-bit arithmetic."""
    places = zip((b, h, row), tensor.strides, strict=False)
    offset = sum(T.Cast("int64", place) * stride for place, stride in places) + T.Cast("int64", column)
    return T.reinterpret("uint64", tensor.data) + T.Cast("uint64", offset * 2)


def table_line(table: Any, line: Any) -> Any:
    """Global address of 128 bytes of an int32 table, the ``line``-th."""
    return T.reinterpret("uint64", table.data) + T.Cast("uint64", line * 128)


def band_row(bands: Any, heads: Any, row: Any, head: Any) -> Any:
    """Global address of a head's bands in row ``row`` of the table."""
    return T.reinterpret("uint64", bands.data) + T.Cast("uint64", (row * heads + head) * 16)


def load_shared(at: Any) -> Any:
    """An int32 in shared memory."""
    return T.cuda.func_call("spattn_load_shared", at, source_code=_LOAD_SHARED_SOURCE, return_type="int32")


def load_if_complete(barrier: Any, phase: Any, at: Any) -> Any:
    """An int32 in shared memory if that phase of the barrier is complete, else 0; waits for nothing."""
    return T.cuda.func_call(
        "spattn_load_if_complete", barrier, phase, at,
        source_code=_LOAD_IF_COMPLETE_SOURCE, return_type="int32",
    )  # fmt: skip


def here(value: Any) -> Any:
    """An int32 that is made where it stands. What is hoisted out of the branch of one producing warp takes
    a register of all of them.
    """
    return T.cuda.func_call("spattn_here", value, source_code=_HERE_SOURCE, return_type="int32")


def add_release(counters: Any, place: Any, count: Any) -> Any:
    """Add to a count in global memory, after everything that this thread has written or seen written."""
    return T.cuda.func_call(
        "spattn_add_release", T.address_of(counters[place]), count, source_code=_ADD_RELEASE_SOURCE
    )


def wait_count(counters: Any, place: Any, count: Any) -> Any:
    """Wait until that many have been counted; what they had written is seen afterwards."""
    return T.cuda.func_call(
        "spattn_wait_count", T.address_of(counters[place]), count, source_code=_WAIT_COUNT_SOURCE
    )


def ballot(condition: Any) -> Any:
    """Bit i of the result says whether the condition holds in lane i."""
    return T.cuda.func_call(
        "spattn_ballot", T.Cast("int32", condition), source_code=_BALLOT_SOURCE, return_type="uint32"
    )


def dot2(a: Any, b: Any, total: Any, dtype: str) -> Any:
    """`total` and the products of two pairs of `dtype`."""
    return T.cuda.func_call("spattn_dot2", a, b, total, source_code=_DOT_SOURCE[dtype], return_type="float32")


def pin(probability: Any) -> Any:
    """A branch never taken: without it ptxas moves the wait for the next product above the exponentials it
    should hide.
    """
    return T.cuda.func_call("spattn_pin", probability, source_code=_PIN_SOURCE)


def hold(accumulator: Any, count: int) -> Any:
    """Ties accumulator registers to this place: plain arithmetic on them must not move above the wait before
    it, or ptxas sees an accumulator read in flight and serializes every wgmma of the kernel (C7514).
    """
    return T.cuda.func_call(f"spattn_hold{count}", accumulator.data, source_code=_hold_source(count))


def rows_map(tensor: Any, rows: int) -> Any:
    """A TMA map of a (B, H, N, D) tensor for boxes of 64 columns, ``rows`` rows and all planes."""
    batch, heads, length, head_dim = tensor.shape
    # A stride that no index ever multiplies may be anything in torch; the encoder wants multiples of 16
    # bytes.
    steps = (
        T.if_then_else(count == 1, 2 * head_dim, 2 * stride)
        for count, stride in zip((length, heads, batch), tensor.strides[2::-1], strict=True)
    )
    row, head, batch_row = steps
    return _encoded(
        str(tensor.dtype), 5, tensor.data,
        PLANE, length, head_dim // PLANE, heads, batch,
        row, SWIZZLE_ROW_BYTES, head, batch_row,
        PLANE, rows, head_dim // PLANE, 1, 1,
        1, 1, 1, 1, 1, 0, 3, 2, 0,
    )  # fmt: skip


def statistics_map(stats: Any, queries: int) -> Any:
    """A TMA map for the statistics of ``queries`` queries, of which two are 16 bytes."""
    batch, heads, pairs, _ = stats.shape
    return _encoded(
        "float32", 2, stats.data, pairs * 4, batch * heads, pairs * 16, 2 * queries, 1, 1, 1, 0, 0, 2, 0
    )


def _encoded(*description: Any) -> Any:
    tensor_map = T.Bind(T.tvm_stack_alloca("tensormap", 1), T.handle("tensormap"))
    T.evaluate(T.call_packed("runtime.cuTensorMapEncodeTiled", tensor_map, *description))
    return named("tensor_map", tensor_map)


@T.inline
def arrive(barrier):
    T.ptx.mbarrier.arrive.shared.b64(barrier)


@T.inline
def advance(place, phase, places):
    place = place + 1
    if place == places:
        place = 0
        phase = phase ^ 1


@T.inline
def issue_left_shared(instruction, out, count, head_dim, left, left_rows, right, right_rows, adds):
    # out = left right^T, or out += left right^T if it `adds`; both with `head_dim` columns in shared memory,
    # 64 rows of the left one.
    overwriting = T.meta_var(-1 if adds else 0)  # the step that does not add
    left_at: T.uint64 = matrix(K_MAJOR, left)
    right_at: T.uint64 = matrix(K_MAJOR, right)
    T.ptx.wgmma.fence.sync.aligned()
    for step in T.unroll(head_dim // 16):
        T.ptx[instruction](
            *[out[i] for i in range(count)],
            left_at + k_step(left_rows, step), right_at + k_step(right_rows, step),
            T.bool(step > overwriting), 1, 1, 0, 0,
        )  # fmt: skip
    T.ptx.wgmma.commit_group.sync.aligned()


@T.inline
def issue_left_registers(instruction, out, count, head_dim, left, right, right_rows):
    # out = left right^T, the left one in registers
    right_at: T.uint64 = matrix(K_MAJOR, right)
    T.ptx.wgmma.fence.sync.aligned()
    for step in T.unroll(head_dim // 16):
        T.ptx[instruction](
            *[out[i] for i in range(count)], *[left[4 * step + i] for i in range(4)],
            right_at + k_step(right_rows, step), T.bool(step > 0), 1, 1, 0,
        )  # fmt: skip
    T.ptx.wgmma.commit_group.sync.aligned()


@T.inline
def load_fragment(fragment, start, at, rows, step, row_at, column, swizzle):
    # The 16 columns of `step` of 16 rows, where planes of 64 columns have `rows` rows. The 8 lanes of a
    # matrix take 8 rows, and the 16-byte column is swizzled by the row, as TMA did: of a lane, `row_at` is
    # its row's offset, `column` 0 or 1, `swizzle` the row modulo 8.
    T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
        *[fragment[start + i] for i in range(4)],
        at + T.uint32(step // 4 * rows * SWIZZLE_ROW_BYTES) + row_at
        + (((column + T.uint32(step % 4 * 2)) ^ swizzle) << T.uint32(4)),
    )  # fmt: skip


@T.inline
def issue_sum(instruction, out, count, left, right, right_rows):
    # out += left right, the left one in registers with as many columns as the right one has rows
    right_at: T.uint64 = matrix(descriptor(right_rows * SWIZZLE_ROW_BYTES), right)
    T.ptx.wgmma.fence.sync.aligned()
    for step in T.unroll(right_rows // 16):
        T.ptx[instruction](
            *[out[i] for i in range(count)], *[left[4 * step + i] for i in range(4)],
            right_at + row_step(step), T.bool(True), 1, 1, 1,
        )  # fmt: skip
    T.ptx.wgmma.commit_group.sync.aligned()


@T.inline
def hide(scores, place, is_seen):
    scores[place] = T.if_then_else(is_seen, scores[place], T.float32(-INF))


@T.inline
def mask_keys(scores, keys, lane, chunk, tile, first_row, row):
    # Rows are queries here, two of them 8 apart: `row` of the tile is the first, `first_row` its warpgroup's.
    # `chunk` and `tile` are the words that the producers sent; chunks that no edge crosses need no mask. No
    # chunk reaches beyond the keys that exist, but one may begin before them.
    first_query: T.int32 = tile[0] + first_row
    inside: T.bool = T.And(
        T.And(
            first_query - chunk[0] - (keys - 1) >= chunk[1],
            first_query + (WARPGROUP_ROWS - 1) - chunk[0] <= chunk[2],
        ),
        chunk[0] >= tile[1],
    )
    if T.Not(inside):
        query: T.int32 = tile[0] + row
        first: T.int32 = query - chunk[0] - lane % 4 * 2 - chunk[1]
        # How many distances of the band these two rows see.
        seen: T.uint32 = T.Cast("uint32", T.max(T.min(chunk[2], query - tile[1]) - chunk[1] + 1, 0))
        seen_below: T.uint32 = T.Cast("uint32", T.max(T.min(chunk[2], query + 8 - tile[1]) - chunk[1] + 1, 0))
        for n in T.unroll(keys // 8):
            for j in T.unroll(2):
                hide(scores, 4 * n + j, T.Cast("uint32", first - (8 * n + j)) < seen)
                hide(scores, 4 * n + 2 + j, T.Cast("uint32", first + 8 - (8 * n + j)) < seen_below)


@T.inline
def mask_queries(scores, queries, lane, chunk, tile, first_row, row):
    # Likewise where rows are keys, and a tile may reach beyond those that exist. What a chunk holds besides
    # its document's queries are zeros, and so are their statistics: their weight of 1 adds nothing.
    first_key: T.int32 = tile[0] + first_row
    inside: T.bool = T.And(
        T.And(
            chunk[0] - first_key - (WARPGROUP_ROWS - 1) >= chunk[1],
            chunk[0] + (queries - 1) - first_key <= chunk[2],
        ),
        first_key + WARPGROUP_ROWS <= tile[2],
    )
    if T.Not(inside):
        key: T.int32 = tile[0] + row
        first: T.int32 = chunk[0] + lane % 4 * 2 - key - chunk[1]
        width: T.int32 = chunk[2] - chunk[1] + 1
        seen: T.uint32 = T.Cast("uint32", T.Select(key < tile[2], width, 0))
        seen_below: T.uint32 = T.Cast("uint32", T.Select(key + 8 < tile[2], width, 0))
        for n in T.unroll(queries // 8):
            for j in T.unroll(2):
                hide(scores, 4 * n + j, T.Cast("uint32", first + (8 * n + j)) < seen)
                hide(scores, 4 * n + 2 + j, T.Cast("uint32", first - 8 + (8 * n + j)) < seen_below)


@T.inline
def settle_statistics(lse, delta, j):
    # From a query's lse to base 2. A query without keys gets +inf, with which its probabilities vanish. An
    # lse that base 2 can't hold is no sign of that, nor is NaN, which stays.
    if lse[j] == T.float32(-INF):
        lse[j] = T.float32(INF)
        delta[j] = T.float32(0)
    else:
        lse[j] = lse[j] * T.float32(LOG2E)
        if lse[j] == T.float32(-INF):
            lse[j] = T.float32(LEAST_LSE)


@T.inline
def pass_chunk(at, stage, phase, stages, left):
    arrive(at("empty", stage, BARRIER_BYTES))
    advance(stage, phase, stages)
    left = left - 1


@T.inline
def find_chunk(at, w, stage, phase, stages, left, found, chunk, limit):
    # The next chunk that this warpgroup needs; chunks for others are handed back. While the output of a chunk
    # is still to be issued its stage is taken, so the search gives up before it would wait for that stage.
    found = 0
    skipped: T.int32 = 0
    searching: T.int32 = 1
    while searching == 1:
        T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
        T.ptx["ld.shared.v4.s32"](chunk[0], chunk[1], chunk[2], chunk[3], at("info", stage, INFO_BYTES))
        if ((chunk[3] >> w) & 1) == 1:
            found = 1
            searching = 0
            left = left - 1
        else:
            if skipped == limit:
                searching = 0
            else:
                pass_chunk(at, stage, phase, stages, left)
                skipped = skipped + 1


@T.inline
def peek(at, stage, phase, stages, takers):
    # Who takes the chunk behind this one (a bit for each warpgroup), if it is there already.
    behind: T.int32 = stage
    behind_phase: T.int32 = phase
    advance(behind, behind_phase, stages)
    takers = load_if_complete(
        at("full", behind, BARRIER_BYTES), behind_phase, at("info", behind, INFO_BYTES) + T.uint32(TAKERS_AT)
    )


@T.inline
def find_next(at, w, stage, phase, stages, left, found, chunk, takers):
    # As `find_chunk` where a product is still to be issued; `takers` is what `peek` has seen before.
    if ((takers >> w) & 1) == 1:
        T.ptx["ld.shared.v4.s32"](chunk[0], chunk[1], chunk[2], chunk[3], at("info", stage, INFO_BYTES))
        found = 1
        left = left - 1
    else:
        find_chunk(at, w, stage, phase, stages, left, found, chunk, stages - 2)


@T.inline
def pass_rest(at, stage, phase, stages, left):
    # The rest of the tile's chunks concern other warpgroups only.
    while left > 0:
        T.cuda.mbarrier_wait(at("full", stage, BARRIER_BYTES), phase)
        pass_chunk(at, stage, phase, stages, left)
