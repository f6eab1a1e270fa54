"""Peers whose mask is a program or a list made for one length: FlexAttention, cuDNN's interval mask and
FlashAttention-4's lists of blocks. None of them makes an N x N tensor, but FlexAttention up to 16,384 tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spattn_tvm.bands import BandLayout

from .case import Case

if TYPE_CHECKING:
    import torch

    Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BLOCK = 128
# FlexAttention's own way to a block mask evaluates every pair of a head.
LONGEST_EVALUATED = 16384


class PeerUnavailable(RuntimeError):
    """A peer that can't run on this problem or machine; its message says why."""


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def require_package(module: str, package: str) -> None:
    """Raises `PeerUnavailable` when a package is not installed."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    if not found:
        raise PeerUnavailable(f"the package {package} is not installed")


def shared_distances(case: Case) -> tuple[int, int]:
    """``(base, extra)`` of a layout whose bands are arithmetic on the head: the distances ``[0, width]`` and
    ``[start, start + width)`` with ``width = base + (h < extra)`` and ``start = h * base + min(h, extra)``.

    Raises
    ------
    PeerUnavailable
        For another layout, and for packed documents.
    """
    problem = case.problem
    if case.boundaries:
        raise PeerUnavailable("its mask knows no packed documents")
    context = problem.layout.context_length or problem.length
    form = BandLayout.spattention(problem.query_heads, context)
    if form.table(problem.length).tolist() != problem.layout.table(problem.length).tolist():
        raise PeerUnavailable(f"its mask is written for spattention, not for {problem.layout.name}")
    return divmod(context, problem.query_heads)


def block_lists(case: Case, device: torch.device, transposed: bool = False) -> dict[str, torch.Tensor]:
    """Blocks of 128 x 128 pairs that a mask meets in part (``mask``) or in full (``full``).

    For each head and block of queries (`transposed`: of keys) the number of blocks of the other side, int32
    ``(1, H, blocks)`` by the name ``…_block_cnt``, and their numbers, int32 ``(1, H, blocks, blocks)``,
    ``…_block_idx``, of which the first so many count.
    """
    import torch

    length = case.problem.length
    block = torch.arange(-(-length // BLOCK), device=device)
    distance = (block[:, None] - block) * BLOCK * (-1 if transposed else 1)
    low, high = distance - (BLOCK - 1), distance + (BLOCK - 1)
    lists: dict[str, list[torch.Tensor]] = {}
    for head in case.problem.layout.bands(length):
        hit, full = (torch.zeros_like(distance, dtype=torch.bool) for _ in range(2))
        for first, last in head:
            hit |= (high >= first) & (low <= last)
            full |= (low >= first) & (high <= last)
        for kind, chosen in (("mask", hit & ~full), ("full", full)):
            lists.setdefault(f"{kind}_block_cnt", []).append(chosen.sum(-1).int())
            order = torch.argsort((~chosen).int(), dim=-1, stable=True)
            lists.setdefault(f"{kind}_block_idx", []).append(order.int())
    return {name: torch.stack(rows)[None].contiguous() for name, rows in lists.items()}


def interval_ends(case: Case, device: torch.device) -> torch.Tensor:
    """cuDNN's form of a mask: int32 ``(H, 5, B * N)``, so that a query's keys are ``[0, F0)``, ``[F1, F2)``
    and ``[F3, F4)``; here the first is empty, the others are the far and the near band.
    """
    import torch

    problem = case.problem
    ends = torch.zeros(problem.query_heads, 5, problem.length, dtype=torch.int32, device=device)
    for begin, end in case.documents:
        row = torch.arange(begin, end, dtype=torch.int32, device=device)
        for h, head in enumerate(problem.layout.bands(end - begin)):
            for place, (low, high) in zip((3, 1), head, strict=False):
                ends[h, place, begin:end] = (row - high).clamp(min=begin)
                ends[h, place + 1, begin:end] = (row - low + 1).clamp(min=begin)
    return ends.repeat(1, 1, problem.batch).contiguous()


def prepare_flex(mask: str, backend: str | None = None) -> Callable[[Case, torch.device], Attention]:
    """FlexAttention with the layout's table in its mask (``"table"``) or arithmetic on the head."""

    def prepare(case: Case, device: torch.device) -> Attention:
        import torch
        from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

        from spattn_tvm.reference import flex_mask_mod
        from spattn_tvm.torch_private import forbid_donated_buffers

        problem, length = case.problem, case.problem.length
        if backend == "FLASH":
            require_package("flash_attn.cute", "flash-attn-4")
            if case.deterministic:
                raise PeerUnavailable("it has no deterministic mode")
        mask_mod: Any
        if mask == "table":
            mask_mod = flex_mask_mod(problem.layout, length, case.cu_seqlens(device), device=device)
        else:
            base, extra = shared_distances(case)

            def even(b: Any, h: Any, i: Any, j: Any) -> Any:
                d = i - j
                return (d >= 0) & ((d <= base) | ((d >= h * base) & (d < (h + 1) * base)))

            def uneven(b: Any, h: Any, i: Any, j: Any) -> Any:
                d = i - j
                width, start = base + (h < extra), h * base + torch.clamp(h, max=extra)
                return (d >= 0) & ((d <= width) | ((d >= start) & (d < start + width)))

            mask_mod = uneven if extra else even
        # Timing the backward pass alone keeps the graph, which donated buffers forbid.
        forbid_donated_buffers()
        if length <= LONGEST_EVALUATED:
            try:
                block_mask = create_block_mask(
                    mask_mod, None, problem.query_heads, length, length, device=device.type
                )
            except RuntimeError as error:
                raise PeerUnavailable(f"create_block_mask: {first_line(error)}") from error
        elif case.boundaries:
            raise PeerUnavailable("its block mask of packed documents takes N x N bytes a head")
        else:
            lists = block_lists(case, device)
            block_mask = BlockMask.from_kv_blocks(
                *(lists[f"{kind}_block_{what}"] for kind in ("mask", "full") for what in ("cnt", "idx")),
                BLOCK_SIZE=BLOCK,
                mask_mod=mask_mod,
                seq_lengths=(length, length),
            )
        compiled = torch.compile(flex_attention, dynamic=False)
        options: dict[str, Any] = {"kernel_options": {"BACKEND": backend}} if backend else {}
        options["enable_gqa"] = problem.query_heads != problem.kv_heads
        return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, **options)

    return prepare


def prepare_cudnn_flex(case: Case, device: torch.device) -> Attention:
    """cuDNN Frontend's ``flex_attention`` with an interval mask."""
    require_package("cudnn.flex_attention", "nvidia-cudnn-frontend")
    import torch
    from cudnn.flex_attention import create_mask_plan, flex_attn_func

    problem = case.problem
    like = [
        torch.empty(
            (problem.batch, problem.length, heads, problem.head_dim),
            dtype=getattr(torch, problem.dtype),
            device=device,
            requires_grad=True,
        )
        for heads in (problem.query_heads, problem.kv_heads, problem.kv_heads)
    ]
    plan = create_mask_plan(interval_ends(case, device), *like, build_backward=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attn_func(*rows, mask_plan=plan, deterministic=case.deterministic).transpose(1, 2)

    return attend


def _flash_4(case: Case, **options: Any) -> Attention:
    from flash_attn.cute.interface import flash_attn_func

    if case.problem.query_heads != case.problem.kv_heads and "mask_mod" in options:
        options["pack_gqa"] = False  # the mask is told the query head

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o = flash_attn_func(
            *(t.transpose(1, 2) for t in (q, k, v)), deterministic=case.deterministic, **options
        )
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    return attend


def prepare_flash_4_dense(case: Case, device: torch.device) -> Attention:
    """flash-attn-4's dense causal kernels: what tensor cores give when nothing is left out."""
    require_package("flash_attn.cute", "flash-attn-4")
    if case.boundaries:
        raise PeerUnavailable("it knows no packed documents here")
    return _flash_4(case, causal=True)


def prepare_flash_4(case: Case, device: torch.device) -> Attention:
    """flash-attn-4: its causal and window kernels for those layouts, else a mask and lists of blocks."""
    require_package("flash_attn.cute", "flash-attn-4")
    if case.boundaries:
        raise PeerUnavailable("it knows no packed documents here")
    layout = case.problem.layout
    if layout.name == "causal":
        return _flash_4(case, causal=True)
    if layout.name == "sliding_window" and layout.window is not None:
        return _flash_4(case, window_size=(layout.window - 1, 0))
    base, extra = shared_distances(case)

    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def even(b, h, m, n, info, aux):  # type: ignore[no-untyped-def]
        d = m - n
        zero = utils.scalar_to_ssa(cutlass.Int32(0), cutlass.Int32)
        width = utils.scalar_to_ssa(cutlass.Int32(base), cutlass.Int32)
        return (d >= zero) & ((d <= width) | ((d >= h * width) & (d < h * width + width)))

    @cute.jit
    def uneven(b, h, m, n, info, aux):  # type: ignore[no-untyped-def]
        d = m - n
        zero = utils.scalar_to_ssa(cutlass.Int32(0), cutlass.Int32)
        narrow = utils.scalar_to_ssa(cutlass.Int32(base), cutlass.Int32)
        wide = utils.scalar_to_ssa(cutlass.Int32(base + 1), cutlass.Int32)
        wider = utils.scalar_to_ssa(cutlass.Int32(extra), cutlass.Int32)
        first = (d <= wide) | ((d >= h * wide) & (d < h * wide + wide))
        rest = (d <= narrow) | ((d >= h * narrow + wider) & (d < h * narrow + wider + narrow))
        return (d >= zero) & (((h < wider) & first) | ((h >= wider) & rest))

    forward, backward = (
        BlockSparseTensorsTorch(**block_lists(case, device, transposed), block_size=(BLOCK, BLOCK))
        for transposed in (False, True)
    )
    return _flash_4(
        case,
        mask_mod=uneven if extra else even,
        block_sparse_tensors=forward,
        block_sparse_tensors_bwd=backward,
    )
