"""Band tables and document boundaries as kernels get them: broken boundaries, many lengths, threads."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from spattn_tvm.bands import EMPTY, BandLayout
from spattn_tvm.ops import band_tables, repeated_calls
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.band_tables import find_domain
from spattn_tvm.reference import reference_attention

HEADS = 4
CPU = torch.device("cpu")
LAYOUTS = [
    BandLayout.spattention(HEADS),
    BandLayout.spattention(HEADS, 512),
    BandLayout.exclusive(HEADS),
    BandLayout.equal_area(HEADS),
    BandLayout.sliding_window(HEADS, 9),
    BandLayout.spattention(7).heads(2, 6),
    BandLayout.custom([[(0, 3), (9, 20)], [], [(2, 5)], [(0, 500)]]),
]
gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.fixture(autouse=True)
def poisoned(poisoned_outputs: None) -> Iterator[None]:
    band_tables.clear_tables()
    yield
    band_tables.clear_tables()


def draw(length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(2, length, heads, 64, device=device, dtype=dtype).transpose(1, 2)
        for heads in (HEADS, 2, 2)
    )


def draw_boundaries(length: int, rng: random.Random) -> list[int]:
    """Of several kinds: good ones, a tail, a head, unsorted, negative, too large for the length or int32."""
    offsets = [0, *sorted(rng.choices(range(length + 1), k=rng.randrange(6))), length]
    for _ in range(rng.choice([0, 0, 1, 3])):
        place = rng.randrange(len(offsets))
        offsets[place] = rng.choice(
            [
                offsets[place],
                rng.randrange(length + 1),
                -rng.randrange(1, 9),
                length + rng.randrange(1, 9),
                2**32 + rng.randrange(length + 1),
                -(2**32) + rng.randrange(length + 1),
                2**62,
            ]
        )
    return offsets if len(offsets) > 2 or rng.random() < 0.5 else offsets[:1] + [rng.randrange(length + 1)]


def clamped(offsets: Iterable[int], length: int) -> list[int]:
    return list(accumulate((min(max(offset, 0), length) for offset in offsets), max))


def are_good(offsets: list[int], length: int) -> bool:
    return offsets[0] == 0 and offsets[-1] <= length and offsets == sorted(offsets)


def by_document(
    q: Tensor, k: Tensor, v: Tensor, layout: BandLayout, offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """o and lse in float64, of one call of the reference a document; rows of none are 0 and -inf."""
    o = q * 0 + (k.sum() + v.sum()) * 0
    lse = q.new_full(q.shape[:3], -torch.inf)
    for begin, end in pairwise(offsets):
        if begin < end:
            rows = slice(begin, end)
            part = reference_attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], layout)
            o, lse = torch.cat((o[:, :, :begin], part[0], o[:, :, end:]), 2), lse.clone()
            lse[:, :, rows] = part[1]
    return o, lse


def check(layout: BandLayout, length: int, cu_seqlens: Tensor, offsets: list[int], impl: str) -> None:
    is_cuda = cu_seqlens.is_cuda
    dtype = torch.bfloat16 if is_cuda else torch.float32
    tolerance = 2e-2 if is_cuda else 3e-5
    inputs = draw(length, cu_seqlens.device.type, dtype)
    ours = tuple(t.detach().requires_grad_() for t in inputs)
    theirs = tuple(t.detach().double().requires_grad_() for t in inputs)
    o, lse = banded_attention(*ours, layout, cu_seqlens=cu_seqlens, return_lse=True, impl=impl)
    expected = by_document(*theirs, layout, offsets)
    torch.testing.assert_close(o.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=tolerance, atol=tolerance)
    do = torch.randn_like(o)
    # A row of no document takes no part, whatever arrives for it.
    for rows in (slice(0, offsets[0]), slice(offsets[-1], length)):
        do[:, :, rows] = torch.randn(()).item() * 100
    gradients = torch.autograd.grad(o, ours, do)
    wanted = torch.autograd.grad(expected[0], theirs, do.double())
    outside = torch.ones(length, dtype=torch.bool)
    outside[offsets[0] : offsets[-1]] = False
    for gradient, right in zip(gradients, wanted, strict=True):
        assert not gradient[:, :, outside].any()
        torch.testing.assert_close(gradient.double(), right, rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.spec[:24])
def test_boundaries_on_the_cpu_are_refused_or_right(layout: BandLayout, dtype: torch.dtype) -> None:
    rng = random.Random(f"{layout.spec} {dtype}")
    good = 0
    for _ in range(30):
        length = rng.choice([1, 2, 17, 64, 97, 160])
        offsets = draw_boundaries(length, rng)
        if dtype is torch.int32:
            offsets = [min(max(offset, -(2**31)), 2**31 - 1) for offset in offsets]
        cu_seqlens = torch.tensor(offsets, dtype=dtype)
        if are_good(offsets, length):
            good += 1
            check(layout, length, cu_seqlens, offsets, rng.choice(["cpu", "auto"]))
        else:
            for impl in ("cpu", "reference"):
                with pytest.raises(ValueError, match="cu_seqlens must"):
                    banded_attention(*draw(length), layout, cu_seqlens=cu_seqlens, impl=impl)
    assert good > 3


def test_a_boundary_that_wraps_around_in_int32_is_refused() -> None:
    cu_seqlens = torch.tensor([0, 2**32 + 2, 4])
    with pytest.raises(ValueError, match="4294967298"):
        banded_attention(*draw(4), LAYOUTS[0], cu_seqlens=cu_seqlens)


@gpu
@pytest.mark.parametrize("impl", ["mma", "hopper"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.spec[:24])
def test_boundaries_on_cuda_are_clamped(layout: BandLayout, dtype: torch.dtype, impl: str) -> None:
    if impl == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    rng = random.Random(f"{layout.spec} {dtype} {impl}")
    for _ in range(40):
        length = rng.choice([1, 17, 64, 130, 300, 500])
        offsets = draw_boundaries(length, rng)
        if dtype is torch.int32:
            offsets = [min(max(offset, -(2**31)), 2**31 - 1) for offset in offsets]
        cu_seqlens = torch.tensor(offsets, dtype=dtype, device="cuda")
        check(layout, length, cu_seqlens, clamped(offsets, length), impl)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.spec[:24])
def test_tables_and_boundaries_of_packed_calls(layout: BandLayout, device: str) -> None:
    """What kernels get on a CUDA device, by the same operations: rows of no document have empty bands."""
    rng = random.Random(layout.spec)
    for _ in range(100):
        length = rng.choice([1, 2, 17, 100, 400])
        offsets = draw_boundaries(length, rng)
        cu_seqlens = torch.tensor(offsets, device=device)
        bands, boundaries, *_ = band_tables._packed(layout, length, cu_seqlens, length, None)
        expected = [0, *clamped(offsets, length), length]
        assert boundaries.dtype == bands.dtype == torch.int32
        assert boundaries.tolist() == expected
        documents = len(expected) - 1
        rows = bands.cpu().numpy()
        if len(rows) != documents:
            assert rows.shape == (3, HEADS, 4)
            rows = rows[[0, *[1] * (documents - 2), 2]]
        empty = np.tile(np.array(EMPTY), (HEADS, 2))
        for m, (begin, end) in enumerate(pairwise(expected)):
            is_nobodys = m in (0, documents - 1)
            if begin < end or is_nobodys:
                np.testing.assert_array_equal(rows[m], empty if is_nobodys else layout.table(end - begin))


@pytest.mark.parametrize("device", DEVICES)
def test_tables_that_are_too_large_to_keep_are_made_for_the_call(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets = torch.tensor([2, 5, 5, 40, 90], device=device)
    for layout in (BandLayout.spattention(HEADS), BandLayout.equal_area(HEADS)):
        kept = band_tables._packed(layout, 100, offsets, 100, None)
        band_tables.clear_tables()
        with monkeypatch.context() as patch:
            patch.setattr(band_tables, "_LOOKUP_BYTES", 1000)
            made = band_tables._packed(layout, 100, offsets, 100, None)
        assert all(torch.equal(*pair) for pair in zip(kept, made, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_tables_of_many_lengths_and_layouts_at_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more than are kept, from several threads: what was found stays right while it is held."""
    monkeypatch.setattr(band_tables, "_MAX_ENTRIES", 40)
    layouts = [*LAYOUTS, BandLayout.causal(3), BandLayout.local_only(5, 600)]

    def find(index: int) -> tuple[BandLayout, int, Tensor, Tensor]:
        layout, length = layouts[index % len(layouts)], 1 + index * 7 % 499
        q = torch.empty(1, layout.num_heads, length, 64, device="meta")
        found = band_tables._find_bands(layout, length, torch.device(device)).single
        assert q.shape[1] == found.shape[1]
        return layout, length, found, band_tables._find_ends(length, torch.device(device))

    with ThreadPoolExecutor(4) as pool:
        held = list(pool.map(find, range(600)))
    for layout, length, bands, ends in held:
        assert ends.tolist() == [0, length]
        np.testing.assert_array_equal(bands.cpu().numpy(), layout.table(length)[None])
    assert len(band_tables._entries) <= 40


def test_calls_like_an_earlier_one_end_with_the_tables() -> None:
    inputs = draw(33)
    for _ in range(2):
        banded_attention(*inputs, LAYOUTS[0])
    assert repeated_calls._prepared
    band_tables.clear_tables()
    assert not repeated_calls._prepared


@pytest.mark.parametrize("device", DEVICES)
def test_values_that_travel_as_arguments_of_kernels(device: str) -> None:
    rng = np.random.default_rng()
    for shape in ((1, 1, 4), (3, 33, 4), (3, 128, 4)):
        values = rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
        values.flat[0], values.flat[-1] = EMPTY
        written = band_tables._written_by_launches(values, torch.device(device))
        assert written.dtype == torch.int32
        np.testing.assert_array_equal(written.cpu().numpy(), values)


def test_tables_made_in_inference_mode_can_be_used_outside() -> None:
    q = torch.empty(1, HEADS, 23, 64)
    with torch.inference_mode():
        for cu_seqlens in (None, torch.tensor([0, 9])):
            for layout in LAYOUTS:
                find_domain(layout.spec, q, q, cu_seqlens)
    kept = [*band_tables._entries.values(), *band_tables._lookups.values()]
    tensors = [t for entry in kept for t in (entry if isinstance(entry, tuple) else (entry,))]
    assert tensors
    assert not any(tensor.is_inference() for tensor in tensors)
