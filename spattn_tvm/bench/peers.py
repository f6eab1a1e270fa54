"""The implementations that a benchmark compares, and how each is called."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spattn_tvm.bands import BandLayout
from spattn_tvm.families import families_for, family_names, find_family
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import MachineTarget

from .case import Case
from .masked_peers import (
    PeerUnavailable,
    prepare_cudnn_flex,
    prepare_flash_4,
    prepare_flash_4_dense,
    prepare_flex,
    require_package,
)

if TYPE_CHECKING:
    import torch

    Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
    prepare : (case, device) -> (q, k, v) -> o
        Builds masks and plans; raises `PeerUnavailable` (or anything else) when it can't.
    plan : str
        What `prepare` makes for one length and mask, and another length needs anew; "" when nothing.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    same_mask: bool
    prepare: Callable[[Case, torch.device], Attention]
    plan: str = ""

    def layout(self, problem: AttentionProblem) -> BandLayout:
        """The layout that this peer computes on ``problem``."""
        return problem.layout if self.same_mask else BandLayout.causal(problem.query_heads)


# The name of what `banded_attention` does of itself. A family that it does not prefer goes by its own name.
OURS = "ours"
# Of ranks that share a sequence, as `bench.ranks` names them: our ways to do it.
OUR_STRATEGIES = ("heads", "bands")


def is_ours(name: str) -> bool:
    """Whether a peer of this name is one of our own."""
    return name == OURS or name in OUR_STRATEGIES or name in family_names()


def implementation_of(name: str) -> str:
    """What a peer of our own asks `banded_attention` for."""
    return "auto" if name == OURS else name


def _prepare_ours(impl: str) -> Callable[[Case, torch.device], Attention]:
    def prepare(case: Case, device: torch.device) -> Attention:
        from spattn_tvm.ops.attention import banded_attention

        layout, cu_seqlens = case.problem.layout, case.cu_seqlens(device)
        return lambda q, k, v: banded_attention(
            q, k, v, layout, cu_seqlens=cu_seqlens, deterministic=case.deterministic, impl=impl
        )

    return prepare


def _prepare_sdpa(backend_name: str | None) -> Callable[[Case, torch.device], Attention]:
    def prepare(case: Case, device: torch.device) -> Attention:
        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if case.boundaries:
            raise PeerUnavailable("it knows no packed documents")
        gqa = case.problem.query_heads != case.problem.kv_heads
        if backend_name is None:
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        backend = getattr(SDPBackend, backend_name)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        return attend

    return prepare


def window_sizes(problem: AttentionProblem) -> list[tuple[int, int, int, int]]:
    """A layout as flash-sparse-attn 2 takes it: sink, far width, gap and near width of each key/value head.

    A head sees the distances ``[0, near)`` and ``[near + gap, near + gap + far)``.

    Raises
    ------
    PeerUnavailable
        For bands that do not start at distance 0, or differ between query heads of one key/value head.
    """
    group = problem.query_heads // problem.kv_heads
    bands = problem.layout.bands(problem.keys)
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


def stand_in_for_triton_kernels() -> None:
    """flash-sparse-attn imports triton_kernels for a projection that attention does not use."""
    if "triton_kernels" in sys.modules or importlib.util.find_spec("triton_kernels") is not None:
        return
    for name in ("triton_kernels", "triton_kernels.matmul_ogs", "triton_kernels.numerics"):
        module = types.ModuleType(name)
        for part in ("matmul_ogs", "PrecisionConfig", "FlexCtx", "InFlexData", "OutFlexData"):
            setattr(module, part, object)
        sys.modules[name] = module


def _prepare_flash_sparse(backend: str) -> Callable[[Case, torch.device], Attention]:
    def prepare(case: Case, device: torch.device) -> Attention:
        import torch

        require_package("flash_sparse_attn", "flash-sparse-attn")
        if case.boundaries:
            raise PeerUnavailable("it knows no packed documents here")
        if case.deterministic:
            raise PeerUnavailable("it has no deterministic mode")
        sizes = torch.tensor(window_sizes(case.problem), dtype=torch.int32, device=device)
        stand_in_for_triton_kernels()
        if backend == "cute":
            from flash_sparse_attn.ops.cute import flash_attn_func as function
        else:
            from flash_sparse_attn import flash_dense_attn_func as function

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # It takes (B, N, H, D); a transposed view, as its own users pass, costs nothing here.
            o = function(*(t.transpose(1, 2) for t in (q, k, v)), window_sizes=sizes, is_local=True)
            return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

        return attend

    return prepare


_CPU, _CUDA, _BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(OURS, "spattn-tvm", _BOTH, True, _prepare_ours("auto")),
        Peer("sdpa", "PyTorch SDPA, dense causal", _CPU, False, _prepare_sdpa(None)),
        Peer("cudnn", "cuDNN SDPA, dense causal", _CUDA, False, _prepare_sdpa("CUDNN_ATTENTION")),
        Peer("flash", "Flash SDPA, dense causal", _CUDA, False, _prepare_sdpa("FLASH_ATTENTION")),
        Peer("fa4_dense", "FlashAttention-4, dense causal", _CUDA, False, prepare_flash_4_dense),
        Peer("cudnn_flex", "cuDNN flex, interval mask", _CUDA, True, prepare_cudnn_flex, "mask plan"),
        Peer("fa4", "FlashAttention-4, same mask", _CUDA, True, prepare_flash_4, "block lists"),
        Peer("flex", "FlexAttention, same mask", _BOTH, True, prepare_flex("table"), "block mask"),
        Peer(
            "flex_arithmetic",
            "FlexAttention, arithmetic mask",
            _CUDA,
            True,
            prepare_flex("arithmetic"),
            "block mask",
        ),
        Peer(
            "flex_flash",
            "FlexAttention, FLASH backend",
            _CUDA,
            True,
            prepare_flex("arithmetic", backend="FLASH"),
            "block mask",
        ),
        Peer("fsa", "flash-sparse-attn CuTe, same mask", _CUDA, True, _prepare_flash_sparse("cute")),
        Peer(
            "fsa_triton", "flash-sparse-attn Triton, same mask", _CUDA, True, _prepare_flash_sparse("triton")
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
