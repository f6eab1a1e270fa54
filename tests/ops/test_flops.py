"""``FlopCounterMode`` counts the pairs that are attended, whatever route a call takes."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import draw, requiring_grad
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from spattn_tvm.bands import BandLayout
from spattn_tvm.ops.attention import banded_attention
from spattn_tvm.ops.decode_operator import DECODE, DecodeCall
from spattn_tvm.ops.operators import BACKWARD, FORWARD, Call
from spattn_tvm.reference import attention_mask

LAYOUTS = [
    BandLayout.spattention(4),
    BandLayout.spattention(4, 64),
    BandLayout.exclusive(4, 50),
    BandLayout.equal_area(4),
    BandLayout.causal(4),
    BandLayout.custom([[(0, 2), (5, 6)], [], [(7, 40)], [(1, 1)]]),
]


def counted(layout: BandLayout, *, impl: str = "auto", backward: bool = True, packed: object = None) -> int:
    leaves = requiring_grad(*draw(length=47, batch=3))
    with FlopCounterMode(display=False) as counter:
        o = banded_attention(*leaves, layout, cu_seqlens=packed, impl=impl)
        if backward:
            o.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.spec)
def test_the_mask_is_counted(layout: BandLayout, impl: str) -> None:
    pairs = 3 * int(attention_mask(layout, 47).sum())
    for _ in range(2):
        assert counted(layout, impl=impl, backward=False) == pairs * 4 * 32
        assert counted(layout, impl=impl) == pairs * (4 + 10) * 32
    offsets = torch.tensor([0, 0, 11, 30, 47])
    pairs = 3 * int(attention_mask(layout, 47, offsets).sum())
    assert counted(layout, impl=impl, packed=offsets) == pairs * (4 + 10) * 32


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.spec)
def test_boundaries_without_values_give_an_upper_bound(layout: BandLayout) -> None:
    def of_fakes(length: int) -> int:
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            banded_attention(*draw(length=length, batch=1), layout, cu_seqlens=torch.tensor([0, 1, length]))
        return counter.get_total_flops()

    longest = layout.context_length or 100
    bound = of_fakes(100)
    for cuts in ([], [3], [50], [40, 50], [20, 40, 60, 80], [1, 2, 3]):
        lengths = torch.tensor([0, *cuts, 100]).diff().tolist()
        if max(lengths) <= longest:
            assert sum(layout.useful_flops(length, 32) for length in lengths) <= bound
    alone = min(longest, 100)
    assert bound <= -(-100 // alone) * layout.useful_flops(alone, 32)


def test_operators_whose_arguments_are_named_are_counted() -> None:
    layout = BandLayout.spattention(4, 64)
    q, k, v = draw(length=47, batch=2)
    call = Call(None, None, None, None, None, None, layout.spec, 0.2, False, "reference")
    o, lse = FORWARD(q, k, v, *call)
    step = DecodeCall(torch.tensor([47, 3]), None, None, None, layout.spec, 0.2, "reference")
    for operator, tensors, rest in (
        (FORWARD, (q, k, v), call),
        (BACKWARD, (o, None, q, k, v, o, lse), call),
        (DECODE, (q[:, :, -1:], k, v), step),
    ):
        counts = []
        for named in (False, True):
            with FlopCounterMode(display=False) as counter:
                operator(*tensors, **rest._asdict()) if named else operator(*tensors, *rest)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
