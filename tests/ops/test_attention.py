"""``banded_attention`` on packed documents, and without waiting for the GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_inputs import (
    LAYOUTS,
    SPATTENTION,
    close_to_reference,
    draw,
    draw_cuda,
    requiring_grad,
)

from spattn_tvm.bands import BandLayout, length_tables
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.band_tables import clear_tables


@pytest.mark.parametrize("context", [None, 64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_documents_equal_separate_calls(context: int | None, index_dtype: torch.dtype) -> None:
    q, k, v = draw(length=90)
    layout = BandLayout.spattention(4, context)
    offsets = [0, 0, 1, 40, 40, 90]
    spread = torch.tensor(offsets, dtype=index_dtype).repeat_interleave(2)[::2]
    assert not spread.is_contiguous()
    o = banded_attention(q, k, v, layout, cu_seqlens=spread)
    for begin, end in ((0, 1), (1, 40), (40, 90)):
        alone = banded_attention(*(t[:, :, begin:end] for t in (q, k, v)), layout)
        torch.testing.assert_close(o[:, :, begin:end], alone, rtol=1e-5, atol=1e-5)
    close_to_reference(
        lambda *t: banded_attention(*t, layout, cu_seqlens=spread, return_lse=True),
        q,
        k,
        v,
        layout,
        cu_seqlens=spread,
    )


def test_changed_boundaries_are_seen() -> None:
    """The boundaries' values are read in each call, also when the same tensor is changed in place."""
    q, k, v = draw(length=40)
    cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32)
    first = banded_attention(q, k, v, SPATTENTION, cu_seqlens=cu_seqlens)
    cu_seqlens[1] = 25
    second = banded_attention(q, k, v, SPATTENTION, cu_seqlens=cu_seqlens)
    fresh = banded_attention(q, k, v, SPATTENTION, cu_seqlens=torch.tensor([0, 25, 40]))
    assert torch.equal(second, fresh)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["spattention", "exclusive", "local_only", "gapped", "causal", "equal_area"])
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 33])
def test_tables_from_lengths_on_a_device_are_the_layouts_own(name: str, heads: int) -> None:
    layout = BandLayout(name, heads)
    lengths = [*range(130), 4096, 4097, 99991]
    tables = length_tables(layout, torch.tensor(lengths, dtype=torch.int32))
    assert tables.dtype == torch.int32
    np.testing.assert_array_equal(tables.numpy(), layout.packed_table(lengths))


def test_layouts_of_one_table_have_none_from_lengths() -> None:
    for layout in (BandLayout.equal_area(4, 9), BandLayout.sliding_window(4, 3), BandLayout.causal(4, 9)):
        with pytest.raises(ValueError, match="don't depend on the length"):
            length_tables(layout, torch.tensor([5], dtype=torch.int32))


# --- CUDA ----------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
CUDA_LAYOUTS = [*LAYOUTS[:3], BandLayout.causal(4), BandLayout.local_only(4, 300)]


@gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", CUDA_LAYOUTS, ids=lambda layout: layout.name)
def test_no_call_waits_for_the_gpu(layout: BandLayout, packed: bool) -> None:
    length = 11 if layout.context_length == 11 else 300
    q, k, v = requiring_grad(*draw_cuda(length=length))
    cu_seqlens = torch.tensor([0, 5, length], device="cuda") if packed else None
    banded_attention(q, k, v, layout, cu_seqlens=cu_seqlens).sum().backward()  # compiles, loads
    clear_tables()
    torch.cuda.set_sync_debug_mode("error")
    try:
        banded_attention(q, k, v, layout, cu_seqlens=cu_seqlens).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("layout", [*CUDA_LAYOUTS, BandLayout.equal_area(4)], ids=lambda layout: layout.name)
def test_packed_documents_on_cuda(layout: BandLayout) -> None:
    length = 11 if layout.context_length == 11 else 300
    q, k, v = draw_cuda(length=length)
    cu_seqlens = torch.tensor([0, 4, 4, length], device="cuda")
    close_to_reference(
        lambda *t: banded_attention(*t, layout, cu_seqlens=cu_seqlens, return_lse=True),
        q,
        k,
        v,
        layout,
        tolerance=2e-2,
        cu_seqlens=cu_seqlens,
    )
