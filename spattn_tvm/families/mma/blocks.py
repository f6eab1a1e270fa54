"""What the portable tensor-core kernels are made of: tiles in shared memory, 16 x 16 blocks in registers.

No instruction here is newer than sm_80. Nothing imports TVM until a kernel is built.

- `row_pitch`: how tiles lie in shared memory: rows of ``row_pitch`` elements, an odd number of 16-byte units,
  so that eight rows of one column, or of one pair of columns, are in different banks, wherever a tile's first
  row is.
- `locate_macro`: from a tile's number to its document, head, first row and bands.
- `wait_macro`: waits at an mbarrier.
- `StridedTensor`: a (B, H, N, D) argument of any strides, and where its rows start; `match_rows`: those of a
  function; `match_call`: what the forwards and the backward take alike.
- `row_loader_macro`: rows of such a tensor to shared memory by ``cp.async``; `RowCopies`: what each thread
  does for it.
- `Blocks`: operands of a 16 x 16 x 16 product from shared memory or from accumulators, the product, and the
  way of an accumulator's rows to global memory.

A product ``C += A B`` of blocks (A is m x k, B is k x n) keeps C in eight floats of each thread: element
``4 * tile + 2 * r + e`` is row ``lane // 4 + 8 * r``, of the block's left (tile 0) or right half. Its column
depends on how B was loaded: `Blocks.column`. Both halves of the work, k order of A and of B, agree in all
loads and in `Blocks.a_from_sums`, so every A goes with every B.

float32 operands are split into a TF32 number and the TF32 number nearest to the rest; three products of
the parts, summed apart and then added in float32, err as little as a float32 product does. (Tensor cores cut
sums off rather than round them, which long chains of additions would turn into a bias.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from spattn_tvm.target import is_before_hopper, registers_most, shared_bytes_most

from .support import DTYPES, HEAD_DIMS

BLOCK = 16
LEAST_SCALE = 1e-30  # of scores, in place of 0, which would make 0 * -inf of a masked one

# What `locate_macro` tells about a tile, as int32 words.
LOCATION_WORDS = 11
LOCATION_BYTES = 4 * LOCATION_WORDS + 4  # in shared memory: a multiple of 16
(BATCH, HEAD, ROW0, DOC_END, KEY_BEGIN, KEY_END, SHIFT, NEAR_LO, NEAR_HI, FAR_LO, FAR_HI) = range(
    LOCATION_WORDS
)


def element_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def row_pitch(columns: int, dtype: str) -> int:
    """Elements from a row to the next in shared memory; `columns` is a multiple of 16."""
    return columns + 16 // element_bytes(dtype)


def locate_macro(rows: int, group: int) -> Callable[..., None]:
    """The macro ``locate(words, number, call)`` for a call of `match_call`.

    It finds tile `number` of queries of all (`domains/tiles.py`) and writes `LOCATION_WORDS` words: ROW0 and
    DOC_END are rows of queries, to which SHIFT is added to compare them with keys. There is nothing to do in
    a tile whose ROW0 is not below its DOC_END.

    The last rows come first: they have the most keys, so the longest tiles lead and the multiprocessors end
    together.
    """
    from tvm.script import tirx as T

    from spattn_tvm.domains.key_range import document_keys
    from spattn_tvm.domains.tiles import locate_head, locate_rows, table_row, tile_slots

    @T.inline
    def locate(words, number, call):
        documents, heads = T.meta_var(call.documents), T.meta_var(call.query_heads)
        slots: T.int32 = tile_slots(call.length, documents, rows)
        slot: T.int32 = 0
        batch: T.int32 = 0
        head: T.int32 = 0
        document: T.int32 = 0
        begin: T.int32 = 0
        end: T.int32 = 0
        row0: T.int32 = 0
        locate_head(number, slots, call.batches, heads, group, slot, batch, head)
        # Head 0 last: its two bands coincide in the paper's layout, so it is the lightest.
        head = T.Select(head == heads - 1, 0, head + 1)
        locate_rows(slots - 1 - slot, rows, call.boundaries, documents, document, begin, end, row0)
        table: T.int32 = table_row(document, documents, call.tables)
        keys = T.meta_var(
            document_keys(
                document, batch, call.boundaries, call.key_boundaries, call.key_ranges, call.num_ranges
            )
        )
        words[BATCH] = batch
        words[HEAD] = head
        words[ROW0] = row0
        words[DOC_END] = end
        words[KEY_BEGIN] = keys[0]
        words[KEY_END] = keys[1]
        words[SHIFT] = keys[2]
        words[NEAR_LO] = call.bands[table, head, 0]
        words[NEAR_HI] = call.bands[table, head, 1]
        words[FAR_LO] = call.bands[table, head, 2]
        words[FAR_HI] = call.bands[table, head, 3]

    return locate


def wait_macro(arch: str) -> Callable[..., None]:
    """The macro ``wait(barrier, phase)``: until the phase of that parity of an mbarrier in shared memory is
    over. From sm_90 on the thread sleeps meanwhile; before, it can only ask again.
    """
    from tvm.script import tirx as T

    @T.inline
    def sleep(barrier, phase):
        T.cuda.mbarrier_wait(barrier, phase)

    @T.inline
    def spin(barrier, phase):
        done = T.alloc_local((1,), "uint32")
        done[0] = T.uint32(0)
        while done[0] == T.uint32(0):
            T.ptx["mbarrier.test_wait.parity.shared.b64"](done[0], barrier, T.cast(phase, "uint32"))

    return spin if is_before_hopper(arch) else sleep


def greatest(scores: Any, first: Any, keys: int) -> Any:
    """The greatest of a lane's scores in one row: pairs ``first``, ``first + 4``, ... of each block."""
    from tvm.script import tirx as T

    level = [scores[first + 4 * n + e] for n in range(keys // 8) for e in range(2)]
    while len(level) > 1:
        level = [T.max(*level[i : i + 2]) for i in range(0, len(level), 2)]
    return level[0]


def lack_of_room(needed: int, registers: int, threads: int, blocks: int, arch: str) -> str | None:
    """What a multiprocessor of `arch` lacks to hold `blocks` of so many bytes of shared memory and of so many
    `threads` with about so many `registers` each; None if nothing.
    """
    limit, most = shared_bytes_most(arch, blocks), registers_most(threads, blocks)
    if needed > limit:
        return f"{needed} bytes of shared memory, each of {blocks} blocks has {limit} on {arch}"
    if registers > most:
        return f"about {registers} registers are needed, each of {blocks} x {threads} threads has {most}"
    return None


def check_buildable(
    conflict: Callable[[Mapping[str, int], int, str, str], str | None],
    decisions: Mapping[str, int],
    head_dim: int,
    dtype: str,
    arch: str,
) -> None:
    """ValueError when the head dim, the dtype or the decisions, by a kernel's `conflict`, can't work."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if head_dim not in HEAD_DIMS:
        least, *_, most = HEAD_DIMS
        raise ValueError(f"head_dim must be a multiple of {BLOCK} from {least} to {most}, got {head_dim}")
    reason = conflict(decisions, head_dim, dtype, arch)
    if reason is not None:
        raise ValueError(f"{reason}: choose other decisions than {dict(decisions)}")


class StridedTensor:
    """A (B, H, N, D) argument of the function that is being parsed; its last dimension is contiguous.

    Parameters
    ----------
    handle : the argument
    shape : of B, H, N (int64 variables or expressions) and D
    dtype : str

    Attributes
    ----------
    strides : three int64, of B, H and N, in elements
    flat : a buffer of one dimension: indexing the tensor itself would ignore its strides
    """

    def __init__(self, handle: Any, shape: tuple[Any, Any, Any, int], dtype: str) -> None:
        from tvm.script import tirx as T

        self._T = T
        # 64-bit, because a stride is bound in the type of its buffer's shape.
        self.strides = (T.int64(), T.int64(), T.int64())
        self._shape = (shape[0] * self.strides[0],)
        self._tensor = T.match_buffer(handle, shape, dtype, strides=(*self.strides, 1), align=16)
        self._dtype = dtype

    def flatten(self) -> None:
        self.flat = self._T.decl_buffer(self._shape, self._dtype, data=self._tensor.data)

    @property
    def row_stride(self) -> Any:
        return self.strides[2]

    def origin(self, batch: Any, head: Any) -> Any:
        """Element (int64) where the rows of a head start."""
        T = self._T
        return T.cast(batch, "int64") * self.strides[0] + T.cast(head, "int64") * self.strides[1]

    def row(self, batch: Any, head: Any, row: Any) -> Any:
        """Element (int64) where a row starts."""
        return self.origin(batch, head) + self._T.cast(row, "int64") * self.strides[2]


def match_rows(
    dtype: str,
    head_dim: int,
    of_queries: tuple[Any, Any, Any],
    of_keys: tuple[Any, Any, Any],
    **handles: Any,
) -> SimpleNamespace:
    """The (B, H, N, D) arguments of a function, by name; behind all its other arguments, because their `flat`
    buffers are declared here.

    Parameters
    ----------
    dtype : str
    head_dim : int
    of_queries, of_keys : B, H and N (int64 variables or expressions)
    handles
        The arguments; ``k, v, dk, dv`` are rows of keys, others of queries.
    """
    tensors = {}
    for name, handle in handles.items():
        shape = of_keys if name in ("k", "v", "dk", "dv") else of_queries
        tensors[name] = StridedTensor(handle, (*shape, head_dim), dtype)
    for tensor in tensors.values():
        tensor.flatten()
    return SimpleNamespace(**tensors)


# Of a call, as `match_call` says.
SIZES = (
    "batches", "query_heads", "kv_heads", "length", "key_length", "documents", "tables", "num_ranges"
)  # fmt: skip


def match_call(
    dtype: str, head_dim: int, scale: Any, bound: Sequence[str] = (), **handles: Any
) -> SimpleNamespace:
    """What a forward or a backward is called with, in the function that is being parsed; behind its other
    arguments, as `match_rows`.

    Parameters
    ----------
    dtype : str
        Of the rows.
    head_dim : int
    scale : float32
    bound : names of `SIZES`
        Those that are variables of the host's; the others are worked out where they are used.
    handles
        The arguments: int32 ``bands`` (M, Hq, 4), ``boundaries`` and ``key_boundaries`` (documents + 1,),
        ``key_ranges`` (0, 1 or B, 3); float32, contiguous, where there are, ``lse, dlse, delta`` (B, Hq, Nq)
        and ``dq_sum`` (B, Hq, Nq, D); others as `match_rows` takes them.

    Returns
    -------
    namespace
        Buffers and each `StridedTensor` by name; ``scale``; int32 ``batches, query_heads, kv_heads, length``
        (of queries), ``key_length, documents, tables, num_ranges``; ``of_queries``, int64 (B, Hq, Nq).
    """
    from tvm.script import tirx as T
    from tvm.script.ir_builder import IRBuilder

    def named(name: str, value: Any) -> Any:
        IRBuilder.name(name, value)  # as an assignment in the function would; errors at a call say it
        return value

    sizes = {name: named(name, T.int64()) for name in ("B", "HQ", "HKV", "N", "NK", "M", "BOUNDS", "RANGES")}
    B, HQ, HKV, N, NK, M, BOUNDS, RANGES = sizes.values()
    known: dict[str, tuple[tuple[Any, ...], str, int]] = {
        "bands": ((M, HQ, 4), "int32", 4),
        "boundaries": ((BOUNDS,), "int32", 4),
        "key_boundaries": ((BOUNDS,), "int32", 4),
        "key_ranges": ((RANGES, 3), "int32", 4),
        "lse": ((B, HQ, N), "float32", 4),
        "dlse": ((B, HQ, N), "float32", 4),
        "delta": ((B, HQ, N), "float32", 4),
        "dq_sum": ((B, HQ, N, head_dim), "float32", 16),
    }
    call = SimpleNamespace(scale=scale, of_queries=(B, HQ, N))
    for name, (shape, kind, align) in known.items():
        if name in handles:
            buffer = T.match_buffer(handles.pop(name), shape, kind, align=align)
            setattr(call, name, named(name, buffer))
    vars(call).update(vars(match_rows(dtype, head_dim, (B, HQ, N), (B, HKV, NK), **handles)))
    for name, count in zip(SIZES, (B, HQ, HKV, N, NK, BOUNDS, M, RANGES), strict=True):
        value = T.cast(count, "int32") - 1 if name == "documents" else T.cast(count, "int32")
        setattr(call, name, named(name, T.bind(value)) if name in bound else value)
    return call


class RowCopies:
    """How the threads of a block copy `rows` rows that lie side by side to shared memory, by ``cp.async``.

    Each thread has some rows, from `own_row` on, and some 16-byte units of each, from `own_column` on.

    Parameters
    ----------
    rows : int
    columns : int
        Elements of a row.
    dtype : str
    threads : int
    """

    def __init__(self, rows: int, columns: int, dtype: str, threads: int) -> None:
        self._unit, self.pitch = 16 // element_bytes(dtype), row_pitch(columns, dtype)
        # Of a row's units, as many side by side as a power of two divides: no division by 3, 5 or 7.
        units = columns // self._unit
        self._abreast = min(units & -units, threads)
        self.copy = self._copy_macro(rows, units // self._abreast, threads // self._abreast)

    def own_row(self, thread: Any) -> Any:
        return thread // self._abreast

    def own_column(self, thread: Any) -> Any:
        return thread % self._abreast * self._unit

    def _copy_macro(self, rows: int, turns: int, high: int) -> Callable[..., None]:
        """The macro ``copy(target, place, source, start, stride, own, row0, first, end)``.

        The thread's first unit goes from element ``start`` (int64) of ``source``, a flat buffer whose rows
        are ``stride`` (int64) elements apart, to element ``place`` of the shared buffer ``target``; ``own``
        is its `own_row`. Of the rows, ``row0`` and on, those outside of ``first <= r < end`` become zeros
        without being read; either bound may be None. The caller commits the group and waits.
        """
        from tvm.script import tirx as T

        across = self._abreast * self._unit
        command = "cp.async.cg.shared.global.L2::128B"

        def is_inside(row: Any, first: Any, end: Any) -> Any:
            if first is None:
                return row < end
            return row >= first if end is None else T.And(row >= first, row < end)

        @T.inline
        def copy(target, place, source, start, stride, own, row0, first, end):
            is_whole = T.meta_var(first is None and end is None)
            for i in T.unroll((rows + high - 1) // high):
                if not is_whole:
                    row: T.int32 = row0 + own + i * high
                    bytes_read: T.uint32 = T.Select(is_inside(row, first, end), T.uint32(16), T.uint32(0))
                for j in T.unroll(turns):
                    if T.Or(rows % high == 0, own + i * high < rows):
                        T.ptx[command](
                            target.ptr_to([place + (i * high * self.pitch + j * across)]),
                            source.ptr_to([start + T.int64(i * high) * stride + T.int64(j * across)]),
                            16,
                            *([] if is_whole else [bytes_read]),
                        )

        return copy


def row_loader_macro(
    rows: int, columns: int, dtype: str, threads: int, whole: bool = True
) -> Callable[..., None]:
    """The macro ``load_rows(target, at, source, origin, stride, row0, first, end, thread)``.

    All `threads` copy rows ``row0 ... row0 + rows - 1`` of ``source`` (a flat buffer; row r starts at
    element ``origin + r * stride``, both int64) to element ``at`` of the shared buffer ``target`` on. Rows
    outside of ``first <= r < end`` become zeros without being read. The caller commits the group and waits.
    ``whole`` says whether tiles that lie inside have instructions of their own; without, ``first`` may be
    None where no row lies before it.
    """
    from tvm.script import tirx as T

    copies = RowCopies(rows, columns, dtype, threads)

    @T.inline
    def load_rows(target, at, source, origin, stride, row0, first, end, thread):
        own: T.int32 = copies.own_row(thread)
        column: T.int32 = copies.own_column(thread)
        place: T.int32 = at + own * copies.pitch + column
        start: T.int64 = origin + T.cast(row0 + own, "int64") * stride + T.cast(column, "int64")
        # A test for each row costs half of what its copies cost, and most tiles need none.
        if whole and T.And(row0 >= first, row0 + rows <= end):
            copies.copy(target, place, source, start, stride, own, row0, None, None)
        else:
            copies.copy(target, place, source, start, stride, own, row0, first, end)

    return load_rows


class Blocks:
    """Operands of 16 x 16 x 16 products of one dtype, from tiles in shared memory of one pitch.

    The methods emit TensorIR into the function that is being parsed. A ``lane_…`` offset, an int32 made once
    in the kernel, is added to the element where a block starts in its tile (``row * pitch + column``) to
    make the ``index`` of a load. ``words`` are local uint32 buffers, of which an operand takes `words`
    elements from a constant ``at`` on; ``sums`` local float32 buffers, of which C takes eight.

    Parameters
    ----------
    dtype : {"bfloat16", "float16", "float32"}
    pitch : int
        From `row_pitch`.
    """

    def __init__(self, dtype: str, pitch: int) -> None:
        from tvm.script import tirx as T

        self._T = T
        self.pitch = pitch
        self.is_split = dtype == "float32"
        self.words = 16 if self.is_split else 4  # of one operand: float32 has 8 heads, then 8 rests
        short = {"bfloat16": "bf16", "float16": "f16", "float32": "tf32"}[dtype]
        shape = "m16n8k8" if self.is_split else "m16n8k16"
        self._product = f"mma.sync.aligned.{shape}.row.col.f32.{short}.{short}.f32"
        self.pack = f"cvt.rn.{short}x2.f32"  # (to, upper, lower)

    # Where a lane's elements are. A transposed block lies in shared memory with k along the columns of B (as
    # keys do in scores = queries keys^T) or with k along the rows of A.
    def lane_a(self, lane: Any) -> Any:
        """For `load_a`: A lies as m rows of k."""
        if self.is_split:
            return lane // 4 * self.pitch + lane % 4 * 2
        return lane % 16 * self.pitch + lane // 16 * 8

    def lane_a_transposed(self, lane: Any) -> Any:
        """For `load_a_transposed`: A lies as k rows of m."""
        if self.is_split:
            return lane % 4 * (2 * self.pitch) + lane // 4
        return (lane % 8 + lane // 16 * 8) * self.pitch + lane // 8 % 2 * 8

    def lane_b(self, lane: Any) -> Any:
        """For `load_b`: B lies as k rows of n."""
        if self.is_split:
            return lane % 4 * (2 * self.pitch) + lane // 4 * 2
        return lane % 16 * self.pitch + lane // 16 * 8

    def lane_b_transposed(self, lane: Any) -> Any:
        """For `load_b_transposed`: B lies as n rows of k."""
        if self.is_split:
            return lane // 4 * self.pitch + lane % 4 * 2
        return (lane % 8 + lane // 16 * 8) * self.pitch + lane // 8 % 2 * 8

    def column(self, lane: Any, tile: int, e: int, transposed: bool) -> Any:
        """Column in its block of C's element ``4 * tile + 2 * r + e``, `transposed` as B's load was."""
        if self.is_split and not transposed:
            return lane % 4 * 4 + 2 * e + tile
        return 8 * tile + lane % 4 * 2 + e

    def load_a(self, words: Any, at: int, tile: Any, index: Any) -> None:
        if not self.is_split:
            self._load_matrices(words, at, tile, index, "")
            return
        for step in range(2):
            for r in range(2):
                pair = self._load_pair(tile, index + (8 * r * self.pitch + 8 * step))
                for e in range(2):
                    self._split(words, at + 4 * step + 2 * e + r, pair[e])

    def load_a_transposed(self, words: Any, at: int, tile: Any, index: Any) -> None:
        if not self.is_split:
            self._load_matrices(words, at, tile, index, ".trans")
            return
        for step in range(2):
            for e in range(2):
                for r in range(2):
                    value = self._load_one(tile, index + ((8 * step + e) * self.pitch + 8 * r))
                    self._split(words, at + 4 * step + 2 * e + r, value)

    def load_b(self, words: Any, at: int, tile: Any, index: Any) -> None:
        if not self.is_split:
            self._load_matrices(words, at, tile, index, ".trans")
            return
        for step in range(2):
            for e in range(2):
                pair = self._load_pair(tile, index + (8 * step + e) * self.pitch)
                for half in range(2):
                    self._split(words, at + 4 * half + 2 * step + e, pair[half])

    def load_b_transposed(self, words: Any, at: int, tile: Any, index: Any) -> None:
        if not self.is_split:
            self._load_matrices(words, at, tile, index, "")
            return
        for half in range(2):
            for step in range(2):
                pair = self._load_pair(tile, index + (8 * half * self.pitch + 8 * step))
                for e in range(2):
                    self._split(words, at + 4 * half + 2 * step + e, pair[e])

    def a_from_sums(self, words: Any, at: int, sums: Any, sums_at: int) -> None:
        """The A operand whose k are the columns of a C (made with a transposed B)."""
        T = self._T
        for tile in range(2):
            for r in range(2):
                low = sums_at + 4 * tile + 2 * r
                if self.is_split:
                    for e in range(2):
                        self._split(words, at + 4 * tile + 2 * e + r, sums[low + e])
                else:
                    T.evaluate(T.ptx[self.pack](words[at + 2 * tile + r], sums[low + 1], sums[low]))

    def multiply(self, sums: Any, sums_at: int, a: Any, a_at: int, b: Any, b_at: int) -> None:
        """C += A B."""
        T = self._T
        for half in range(2):
            c = [sums[sums_at + 4 * half + i] for i in range(4)]
            if not self.is_split:
                operands = [*(a[a_at + i] for i in range(4)), *(b[b_at + 2 * half + i] for i in range(2))]
                T.evaluate(T.ptx[self._product](*c, *operands, *c))
                continue
            block = T.alloc_local((4,), "float32")
            part = [block[i] for i in range(4)]
            before = [T.float32(0)] * 4
            # The small products first, while the sum is small.
            for a_rest, b_rest in ((8, 0), (0, 8), (0, 0)):
                for step in range(2):
                    operands = [
                        *(a[a_at + a_rest + 4 * step + i] for i in range(4)),
                        *(b[b_at + b_rest + 4 * half + 2 * step + i] for i in range(2)),
                    ]
                    T.evaluate(T.ptx[self._product](*part, *operands, *before))
                    before = part
            for i in range(4):
                T.buffer_store(sums, sums[sums_at + 4 * half + i] + block[i], [sums_at + 4 * half + i])

    def store_row(
        self,
        sums: Any,
        sums_at: Any,
        r: Any,
        count: int,
        factor: Any,
        lane: Any,
        to: Callable[[Any], Any],
        is_inside: Callable[[Any], Any],
    ) -> None:
        """Row ``lane // 4 + 8 * r`` of `count` blocks side by side, times `factor`, to global memory.

        C was made with a B that was not transposed. ``to(column)`` is the address of a column,
        ``is_inside(column)`` says whether columns from there on may be written. All lanes take part.
        """
        T = self._T

        def scaled(n: Any, offset: Any) -> Any:
            return sums[sums_at + 8 * n + 2 * r + offset] * factor

        if not self.is_split:
            from spattn_tvm.domains.row_store import store_row

            store_row(
                lambda n, e: scaled(n // 2, n % 2 * 4 + e), BLOCK * count, to, is_inside, self.pack, lane
            )
            return
        for n in range(count):
            column = BLOCK * n + lane % 4 * 4
            words = [T.reinterpret("uint32", scaled(n, self.neighbour(i))) for i in range(4)]
            with T.If(is_inside(column)), T.Then():
                T.evaluate(T.ptx["st.global.v4.b32"](to(column), *words))

    def neighbour(self, i: Any) -> Any:
        """Where the i-th of the four elements that a lane has of a row of C stands behind the first, such
        that those of float32 are four columns side by side (B not transposed).
        """
        tile, e = (i % 2, i // 2) if self.is_split else (i // 2, i % 2)
        return 4 * tile + e

    def _load_matrices(self, words: Any, at: int, tile: Any, index: Any, transposed: str) -> None:
        T = self._T
        load = f"ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16"
        T.evaluate(T.ptx[load](*(words[at + i] for i in range(4)), tile.ptr_to([index])))

    def _load_one(self, tile: Any, index: Any) -> Any:
        T = self._T
        value = T.alloc_local((1,), "float32")
        T.evaluate(T.ptx["ld.shared.f32"](value[0], tile.ptr_to([index])))
        return value[0]

    def _load_pair(self, tile: Any, index: Any) -> list[Any]:
        T = self._T
        values = T.alloc_local((2,), "float32")
        T.evaluate(T.ptx["ld.shared.v2.f32"](values[0], values[1], tile.ptr_to([index])))
        return [values[0], values[1]]

    def _split(self, words: Any, at: int, value: Any) -> None:
        T = self._T
        # Round to the ten bits after the point that TF32 has. The rest is exact; of its twelve bits the
        # tensor core cuts one, which is as near as rounding. A NaN of all ones wraps to -0 in the head and
        # stays NaN in the rest, which must not be rounded so.
        head = (T.reinterpret("uint32", value) + T.uint32(0x1000)) & T.uint32(0xFFFFE000)
        T.buffer_store(words, head, [at])
        rest = value - T.reinterpret("float32", words[at])
        T.buffer_store(words, T.reinterpret("uint32", rest), [at + 8])
