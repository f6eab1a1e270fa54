"""A multi-head self-attention module around ``banded_attention``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bands import MAX_HEADS, BandLayout, require_int
from .cache import BandedCache, KeyValueCache
from .ops.attention import banded_attention
from .ops.padding import token_range
from .ops.sharded import replicate_like
from .torch_private import has_values


def rotate(x: Tensor, theta: float, positions: Tensor | None = None) -> Tensor:
    """Rotary position embedding (Su et al., 2021, arXiv 2104.09864), in the pairing of GPT-NeoX and Llama.

    Element c and element ``c + D/2`` of a row at position p are turned by the angle ``p * theta**(-2c/D)``.

    Parameters
    ----------
    x : Tensor
        ``(B, H, N, D)``, D even.
    theta : float
        Base of the frequencies, such as 10000.
    positions : Tensor, optional
        Integers ``(N,)`` or ``(B, N)``, the rows' positions; by default row n is at position n.

    Returns
    -------
    Tensor
        In the shape and dtype of x; angles and products are float32 at least.

    Raises
    ------
    TypeError
        Positions that are no tensor.
    ValueError
        Positions of another shape.
    """
    length, head_dim = x.shape[-2:]
    if positions is not None:
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions must be a torch.Tensor, got {type(positions).__name__}")
        if positions.shape not in ((length,), (1, length), (x.shape[0], length)):
            raise ValueError(
                f"positions must have shape ({length},) or ({x.shape[0]}, {length}), got "
                f"{tuple(positions.shape)}"
            )
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=x.device) / head_dim
    if positions is None:
        positions = torch.arange(length, device=x.device)
    elif positions.dim() == 2:
        positions = positions[:, None]
    angle = positions.to(dtype)[..., None] * replicate_like(positions, theta**-exponent)
    cos, sin = replicate_like(x, angle.cos()), replicate_like(x, angle.sin())
    low, high = x.to(dtype).chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


# A state's entry for the layout has a multiple of so many elements, so that a distributed checkpoint, which
# is read into tensors of the module's own shapes, reaches the comparison of layouts.
_STATE_PAGE = 256


class _LayoutMismatchError(ValueError):
    pass


def _to_tensor(spec: str) -> Tensor:
    codes = [*spec.encode("ascii")]
    # int32, so that averaging the states of several models leaves the text what it is. On the CPU whatever
    # device is the default, for a module that is made on "meta".
    return torch.tensor(codes + [0] * (-len(codes) % _STATE_PAGE), dtype=torch.int32, device="cpu")


def _to_spec(state: object) -> str | None:
    """The text in a tensor of `_to_tensor`; None for one without values (meta, fake). Of what holds no text,
    something that is no layout's spec."""
    if not isinstance(state, Tensor):
        return str(state)
    if state.layout is not torch.strided or state.is_quantized or state.is_nested or state.is_complex():
        return f"a tensor of {state.dtype} in the layout {state.layout}"
    try:
        codes = state.flatten().double().round().tolist()
    except (RuntimeError, NotImplementedError):
        return None
    return "".join(chr(int(code)) for code in codes if 0 < code < 128)


class BandedAttention(nn.Module):
    """Causal self-attention whose heads attend to bands of distances.

    Its state (``state_dict``) holds the layout beside the weights, as ``_extra_state``, a small int32 tensor.
    Weights are refused by a module of another layout, with ``strict=False`` too, as other shapes are; a state
    without the entry, because it was written before there was one or because it was taken out on purpose,
    loads into any layout.

    Parameters
    ----------
    embed_dim : int
        Width E of the input and the output.
    num_heads : int
        Query heads; each has ``E / num_heads`` channels.
    layout : BandLayout or str
        A layout for `num_heads` heads, or the name of one that needs no further parameters
        (``"spattention"``, ``"exclusive"``, ``"local_only"``, ``"gapped"``, ``"causal"``, ``"equal_area"``),
        which is made with `context_length`.
    context_length : int, optional
        Context length of a layout given by name; None takes each sequence's own length. Then (but for
        ``"causal"``) what a token sees depends on how many tokens come after it: fine for training at one
        length, but to decode give the length trained at. See `BandLayout.is_autoregressive`.
    num_kv_heads : int, optional
        Key and value heads, `num_heads` by default; must divide it.
    bias : bool
        Whether the four projections have biases.
    rope_theta : float, optional
        Base of a rotary position embedding of q and k, such as 10000.0. None: no position embedding.
        Only distances matter to it, so that packed documents need no positions of their own.
    impl : str
        As in :func:`banded_attention`.
    device, dtype
        Of the parameters.

    Raises
    ------
    ValueError
        Sizes that do not divide, a layout for another number of heads, or an unknown layout name.
    TypeError
        A layout that is neither a BandLayout nor a string, sizes that are no integers.

    Examples
    --------
    >>> attention = BandedAttention(256, num_heads=8, num_kv_heads=2, rope_theta=10000.0)
    >>> attention(torch.randn(2, 100, 256)).shape
    torch.Size([2, 100, 256])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        layout: BandLayout | str = "spattention",
        context_length: int | None = None,
        num_kv_heads: int | None = None,
        bias: bool = False,
        rope_theta: float | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim = require_int("embed_dim", embed_dim, 1)
        num_heads = require_int("num_heads", num_heads, 1, MAX_HEADS)
        if num_kv_heads is None:
            num_kv_heads = num_heads
        num_kv_heads = require_int("num_kv_heads", num_kv_heads, 1, MAX_HEADS)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.layout = self._whole_layout = _resolve(layout, num_heads, context_length)
        self._attend: Callable[..., Tensor] = banded_attention
        self._positions: Callable[[int, torch.device], Tensor] | None = None
        is_number = isinstance(rope_theta, (int, float)) and not isinstance(rope_theta, bool)
        if rope_theta is not None and not is_number:
            raise TypeError(
                f"rope_theta must be a number or None, got {rope_theta!r} of type {type(rope_theta).__name__}"
            )
        if rope_theta is not None and (not 0 < rope_theta < math.inf or self.head_dim % 2):
            raise ValueError(
                "rope_theta must be positive and finite and the head dim even, "
                f"got {rope_theta} and a head dim of {self.head_dim}"
            )
        self.rope_theta = rope_theta
        self.impl = impl
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, device, dtype)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"layout={self.layout.spec!r}, rope_theta={self.rope_theta}"
        )

    def get_extra_state(self) -> Tensor:
        """The spec of all heads' layout, as numbers of its letters."""
        return _to_tensor(self._whole_layout.spec)

    def set_extra_state(self, state: object) -> None:
        """Compare the layout of a state with the module's own, which stays.

        Raises
        ------
        ValueError
            The heads of the two see different distances.
        """
        spec = _to_spec(state)
        if spec is None or spec == self._whole_layout.spec:
            return
        try:
            is_same = BandLayout.from_spec(spec).has_bands_of(self._whole_layout)
        except ValueError:
            is_same = False
        if not is_same:
            raise _LayoutMismatchError(
                f"these weights belong to the layout {spec!r}, the module has {self._whole_layout.spec!r}: "
                "give the module that layout, or remove the entry '_extra_state' from the state to load them "
                "into other bands on purpose"
            )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
            )
        except _LayoutMismatchError as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
        missing_keys += [key for key in missing if key != f"{prefix}_extra_state"]

    def keep_heads(self, part: int, parts: int) -> None:
        """Attend with one of equal parts of the heads from now on, whose projections' outputs are the only
        ones that arrive: for tensor parallelism. The state stays that of all heads.

        Parameters
        ----------
        part, parts : int
            Which one, of how many.

        Raises
        ------
        ValueError
            Key/value heads that the parts can't share equally, or a part that is none.
        """
        if not 0 <= part < parts:
            raise ValueError(f"part must be from 0 to parts - 1, got {part} of {parts}")
        if self.num_kv_heads % parts:
            raise ValueError(
                f"{self.num_heads} query and {self.num_kv_heads} key/value heads can't be shared equally by "
                f"{parts} ranks"
            )
        self.num_heads //= parts
        self.num_kv_heads //= parts
        self.layout = self.layout.heads(self.num_heads * part, self.num_heads * (part + 1))

    def share_sequence(
        self, attend: Callable[..., Tensor], positions: Callable[[int, torch.device], Tensor]
    ) -> None:
        """Attend by a function in place of ``banded_attention``: for a sequence that ranks share.

        Packed documents are handed on to it; caches and padding are refused.

        Parameters
        ----------
        attend : callable
            Takes q, k, v, the layout, and `cu_seqlens` and `impl` by name.
        positions : callable
            Takes how many rows this rank has, and a device; gives their positions in the sequence.
        """
        self._attend, self._positions = attend, positions

    def make_cache(self, batch_size: int, **settings: Any) -> BandedCache:
        """A :class:`BandedCache` for this module: its layout, heads, dtype and device.

        Where the projections' weights are integers (quantized), the dtype is PyTorch's default unless given.

        Parameters
        ----------
        batch_size : int
        **settings
            Further arguments of BandedCache, such as `slack` and `max_length`.
        """
        weight: Any = self.k_proj.weight
        if not isinstance(weight, Tensor):
            weight = weight()  # a method of PyTorch's quantized projections
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        given = {"dtype": dtype, "device": weight.device, **settings}
        return BandedCache(
            self.layout,
            batch_size=batch_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            **given,
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        position_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Parameters
        ----------
        x : Tensor
            ``(B, N, E)``.
        cu_seqlens : Tensor, optional
            ``(number of documents + 1,)`` boundaries of packed documents, as in :func:`banded_attention`.
        cache : KeyValueCache, optional
            Of what came before x, which is stored behind it: a :class:`BandedCache` or a :class:`PagedCache`.
            Not differentiable.
        position_ids : Tensor, optional
            Integers ``(N,)`` or ``(B, N)``, for the rotary position embedding alone; by default positions go
            on from the cache's length, and are those of the rank's rows where ranks share the sequence.
        key_padding_mask : Tensor, optional
            ``(B, N)`` bool, True where x is padding, on the left or on the right of a row's tokens: nobody
            attends to it. With a cache, padding on the left is for its first call; what is on the right is
            not stored.

        Returns
        -------
        Tensor
            ``(B, N, E)``; what stands where there is padding has no meaning.

        Raises
        ------
        ValueError
            `cu_seqlens` together with a cache or a padding mask, a cache of another layout, and what
            :func:`banded_attention` and the cache refuse: a layout that is not autoregressive, say.
        RuntimeError
            A gradient is asked for through a cache.
        """
        if cu_seqlens is not None and (cache is not None or key_padding_mask is not None):
            other = "cache" if cache is not None else "key_padding_mask"
            raise ValueError(f"cu_seqlens and {other} exclude one another: packed documents have no padding")
        if self._attend is not banded_attention and (cache is not None or key_padding_mask is not None):
            other = "a cache" if cache is not None else "key_padding_mask"
            raise ValueError(f"a sequence that ranks share goes with cu_seqlens, not with {other}")
        if cache is not None:
            self._check_cache(cache, x.shape[0])
        # Heads stay where the projections leave them, (B, N, H, D) in memory: nothing is copied.
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        if self.rope_theta is not None:
            if position_ids is None and cache is not None:
                position_ids = cache.lengths[:, None] + torch.arange(x.shape[1], device=x.device)
            elif position_ids is None and self._positions is not None:
                position_ids = self._positions(x.shape[1], x.device)
            q, k = rotate(q, self.rope_theta, position_ids), rotate(k, self.rope_theta, position_ids)
        if cache is not None:
            o = self._attend_with_cache(q, k, v, cache, key_padding_mask)
        elif key_padding_mask is not None:
            begin, end = token_range(key_padding_mask, x.shape[:2])
            # As many queries as keys: they have the keys' positions.
            offset = torch.zeros_like(begin)
            places = {"query_offset": offset, "kv_starts": begin, "kv_lengths": end}
            o = banded_attention(q, k, v, self.layout, impl=self.impl, **places)
        else:
            o = self._attend(q, k, v, self.layout, cu_seqlens=cu_seqlens, impl=self.impl)
        return self.out_proj(o.transpose(1, 2).flatten(2))

    def _check_cache(self, cache: Any, batch: int) -> None:
        if not isinstance(cache, KeyValueCache):
            raise TypeError(
                f"cache must be a BandedCache or a PagedCache, got {type(cache).__name__}: make it with "
                "make_cache"
            )
        if not cache.serves(self.layout):
            raise ValueError(
                f"the cache is made for {cache.layout.spec}, the module has {self.layout.spec}: make it with "
                "make_cache"
            )
        if cache.batch_size != batch:
            raise ValueError(f"the cache holds a batch of {cache.batch_size}, got x with a batch of {batch}")

    def _attend_with_cache(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache, key_padding_mask: Tensor | None
    ) -> Tensor:
        counts, starts = None, cache.starts
        if key_padding_mask is not None:
            begin, counts = token_range(key_padding_mask, torch.Size((k.shape[0], k.shape[2])))
            cache.begin_rows(begin)
            is_read = counts.device.type == "cpu" and has_values(counts)
            if is_read and bool((counts == k.shape[2]).all()):
                counts = None
        try:
            return cache.attend(q, k, v, counts=counts, impl=self.impl)
        except BaseException:
            # The padding of a call that stored nothing must not be that of the next one.
            cache.starts = starts
            raise


def _resolve(layout: BandLayout | str, num_heads: int, context_length: int | None) -> BandLayout:
    if isinstance(layout, BandLayout):
        layout.check_heads(num_heads)
        if context_length is not None and context_length != layout.context_length:
            raise ValueError(
                f"the layout has the context length {layout.context_length}, "
                f"context_length is {context_length}: give it to the layout only"
            )
        return layout
    if not isinstance(layout, str):
        raise TypeError(f"layout must be a BandLayout or the name of one, got {type(layout).__name__}")
    return BandLayout(layout, num_heads, context_length)
