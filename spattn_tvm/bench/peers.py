"""The implementations that a benchmark compares, and how each is called."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spattn_tvm.bands import BandLayout
from spattn_tvm.families import families_for, family_names, find_family
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget

if TYPE_CHECKING:
    import torch

    Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    Step = Callable[[], Any]


class PeerUnavailable(RuntimeError):
    """A peer that can't run on this problem or machine; its message says why."""


@dataclass(frozen=True)
class Peer:
    """One implementation to time.

    Parameters
    ----------
    name : str
        Short name, as given to ``--peers``.
    title : str
        What the table prints.
    kinds : tuple of {"cpu", "cuda"}
        Devices it exists for.
    same_mask : bool
        True when it computes the problem's own layout, False for dense causal attention.
    prepare : (problem, device) -> (q, k, v) -> o
        Builds masks, compiles and so on; raises `PeerUnavailable` (or anything else) when it can't.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    same_mask: bool
    prepare: Callable[[AttentionProblem, torch.device], Attention]

    def layout(self, problem: AttentionProblem) -> BandLayout:
        """The layout that this peer computes on ``problem``."""
        return problem.layout if self.same_mask else BandLayout.causal(problem.query_heads)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _dtype(problem: AttentionProblem) -> torch.dtype:
    import torch

    return getattr(torch, problem.dtype)


# The name of what `banded_attention` does of itself. A family that it does not prefer goes by its own name.
OURS = "ours"


def is_ours(name: str) -> bool:
    """Whether a peer of this name is one of our own."""
    return name == OURS or name in family_names()


def implementation_of(name: str) -> str:
    """What a peer of our own asks `banded_attention` for."""
    return "auto" if name == OURS else name


def _prepare_ours(impl: str) -> Callable[[AttentionProblem, torch.device], Attention]:
    def prepare(problem: AttentionProblem, device: torch.device) -> Attention:
        from spattn_tvm.ops.attention import banded_attention

        return lambda q, k, v: banded_attention(q, k, v, problem.layout, impl=impl)

    return prepare


def _prepare_sdpa(backend_name: str | None) -> Callable[[AttentionProblem, torch.device], Attention]:
    def prepare(problem: AttentionProblem, device: torch.device) -> Attention:
        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel

        gqa = problem.query_heads != problem.kv_heads
        if backend_name is None:
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        backend = getattr(SDPBackend, backend_name)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        return attend

    return prepare


def _prepare_flex(problem: AttentionProblem, device: torch.device) -> Attention:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from spattn_tvm.reference import flex_mask_mod
    from spattn_tvm.torch_private import forbid_donated_buffers

    # Timing the backward pass alone keeps the graph, which donated buffers forbid.
    forbid_donated_buffers()
    length = problem.length
    mask_mod = flex_mask_mod(problem.layout, length, device=device)
    try:
        block_mask = create_block_mask(
            mask_mod, None, problem.query_heads, length, length, device=device.type
        )
    except RuntimeError as error:
        raise PeerUnavailable(f"create_block_mask: {_first_line(error)}") from error
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = problem.query_heads != problem.kv_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)


def window_sizes(problem: AttentionProblem) -> list[tuple[int, int, int, int]]:
    """A layout as flash-sparse-attn 2 takes it: sink, far width, gap and near width of each key/value head.

    A head sees the distances ``[0, near)`` and ``[near + gap, near + gap + far)``.

    Raises
    ------
    PeerUnavailable
        For bands that do not start at distance 0, or differ between query heads of one key/value head.
    """
    group = problem.query_heads // problem.kv_heads
    bands = problem.layout.bands(problem.length)
    rows = []
    for first in range(0, problem.query_heads, group):
        head = bands[first]
        if any(other != head for other in bands[first : first + group]):
            raise PeerUnavailable("it has one pair of bands per key/value head, not per query head")
        if not head or head[0][0] != 0:
            raise PeerUnavailable("its near band starts at distance 0")
        near = head[0][1] + 1
        far_lo, far_hi = head[1] if len(head) > 1 else (near, near - 1)
        rows.append((0, far_hi - far_lo + 1, far_lo - near, near))
    return rows


def _prepare_flash_sparse(backend: str) -> Callable[[AttentionProblem, torch.device], Attention]:
    def prepare(problem: AttentionProblem, device: torch.device) -> Attention:
        import torch

        if importlib.util.find_spec("flash_sparse_attn") is None:
            raise PeerUnavailable("the package flash-sparse-attn is not installed")
        if backend == "cute":
            from flash_sparse_attn.ops.cute import flash_attn_func as function
        else:
            from flash_sparse_attn import flash_dense_attn_func as function
        sizes = torch.tensor(window_sizes(problem), dtype=torch.int32, device=device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # It takes (B, N, H, D); a transposed view, as its own users pass, costs nothing here.
            o = function(*(t.transpose(1, 2) for t in (q, k, v)), window_sizes=sizes, is_local=True)
            return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

        return attend

    return prepare


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(OURS, "spattn-tvm", ("cpu", "cuda"), True, _prepare_ours("auto")),
        Peer("sdpa", "PyTorch SDPA, dense causal", ("cpu",), False, _prepare_sdpa(None)),
        Peer("cudnn", "cuDNN SDPA, dense causal", ("cuda",), False, _prepare_sdpa("CUDNN_ATTENTION")),
        Peer("flash", "Flash SDPA, dense causal", ("cuda",), False, _prepare_sdpa("FLASH_ATTENTION")),
        Peer("flex", "FlexAttention, same mask", ("cpu", "cuda"), True, _prepare_flex),
        Peer("fsa", "flash-sparse-attn CuTe, same mask", ("cuda",), True, _prepare_flash_sparse("cute")),
        Peer(
            "fsa_triton",
            "flash-sparse-attn Triton, same mask",
            ("cuda",),
            True,
            _prepare_flash_sparse("triton"),
        ),
    )
}


def _family_peer(name: str, kind: str) -> Peer:
    title = f"spattn-tvm, {find_family(name).title or name}"
    return Peer(name, title, (kind,), True, _prepare_ours(name))


def peers_for(target: MachineTarget) -> dict[str, Peer]:
    """The peers that exist for a device, by name: ours, its families but the preferred one, others."""
    able = {name: peer for name, peer in PEERS.items() if target.kind in peer.kinds}
    families = {name: _family_peer(name, target.kind) for name in families_for(target)[1:]}
    return {OURS: able.pop(OURS), **families, **able}


def find_peer(name: str, target: MachineTarget) -> Peer:
    """A peer by its name, also one that does not exist for the device.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if name in PEERS:
        return PEERS[name]
    if name not in family_names():
        known = ", ".join(dict.fromkeys((*peers_for(target), *PEERS)))
        raise ValueError(f"unknown peer {name!r}; known: {known}")
    peer = _family_peer(name, target.kind)
    return peer if name in families_for(target) else dataclasses.replace(peer, kinds=())
