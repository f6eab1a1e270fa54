"""Padded batches: where each row's tokens lie, and the same tokens packed without the padding.

Masks are those of ``torch.nn.MultiheadAttention``: True where there is padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spattn_tvm.torch_private import has_values


class Packed(NamedTuple):
    """A batch without its padding.

    Attributes
    ----------
    values : Tensor
        ``(1, T, ...)``, the T tokens of all rows one after the other.
    cu_seqlens : Tensor
        ``(B + 1,)`` int32 boundaries of the rows, as ``banded_attention`` takes them.
    indices : Tensor
        ``(T,)`` int64, where each token was in the flattened batch.
    shape : torch.Size
        ``(B, N)`` of the batch.
    """

    values: Tensor
    cu_seqlens: Tensor
    indices: Tensor
    shape: torch.Size


def _check_mask(key_padding_mask: Tensor, shape: torch.Size) -> None:
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype is not torch.bool:
        got = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
        raise TypeError(f"key_padding_mask must be a bool tensor, True where there is padding, got {got}")
    if key_padding_mask.shape != shape:
        raise ValueError(
            f"key_padding_mask must have shape (batch, length) = {tuple(shape)}, "
            f"got {tuple(key_padding_mask.shape)}"
        )


def _check_values(values: Any) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a torch.Tensor, got {type(values).__name__}")
    if values.dim() < 2:
        raise ValueError(f"values must have the dimensions (batch, length, ...), got {tuple(values.shape)}")


def unpad(values: Tensor, key_padding_mask: Tensor) -> Packed:
    """Take the padding out of a batch.

    The host waits for the number of tokens.

    Parameters
    ----------
    values : Tensor
        ``(B, N, ...)``: embeddings, labels, or anything else with a value a token.
    key_padding_mask : Tensor
        ``(B, N)`` bool, True where there is padding.

    Returns
    -------
    Packed
        `pad` brings results of its shape back.

    Raises
    ------
    TypeError
        A mask that is not bool, values that are no tensor.
    ValueError
        One of another shape; values without two dimensions.

    Examples
    --------
    >>> x = torch.arange(6.0).view(2, 3, 1)
    >>> packed = unpad(x, torch.tensor([[False, False, True], [True, False, False]]))
    >>> packed.values.flatten().tolist(), packed.cu_seqlens.tolist()
    ([0.0, 1.0, 4.0, 5.0], [0, 2, 4])
    """
    _check_values(values)
    _check_mask(key_padding_mask, values.shape[:2])
    is_token = ~key_padding_mask
    indices = is_token.flatten().nonzero().flatten()
    ends = is_token.sum(1).cumsum(0)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int()
    return Packed(values.flatten(0, 1).index_select(0, indices)[None], cu_seqlens, indices, values.shape[:2])


def pad(values: Tensor, packed: Packed) -> Tensor:
    """Put what was computed of a packed batch back in its places; zeros where there was padding.

    Parameters
    ----------
    values : Tensor
        ``(1, T, ...)``.
    packed : Packed
        What `unpad` returned.

    Returns
    -------
    Tensor
        ``(B, N, ...)``.

    Raises
    ------
    TypeError
        Values that are no tensor, something that `unpad` did not return.
    ValueError
        Values of another number of tokens.
    """
    _check_values(values)
    if not isinstance(packed, Packed):
        raise TypeError(f"packed must be what unpad returned, got {type(packed).__name__}")
    if values.shape[:2] != (1, packed.indices.shape[0]):
        raise ValueError(
            f"values must have shape (1, {packed.indices.shape[0]}, ...), the tokens that unpad found, got "
            f"{tuple(values.shape)}"
        )
    batch, length = packed.shape
    places = values.new_zeros((batch * length, *values.shape[2:]))
    return places.index_copy(0, packed.indices, values[0]).unflatten(0, (batch, length))


def token_range(key_padding_mask: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Where each row's tokens begin and end, between padding on the left and on the right.

    Parameters
    ----------
    key_padding_mask : Tensor
        ``(B, N)`` bool, True where there is padding.
    shape : torch.Size
        ``(B, N)`` that is expected.

    Returns
    -------
    begin, end : Tensor
        ``(B,)`` int64 on the mask's device; 0 and 0 of a row without tokens.

    Raises
    ------
    TypeError
        A mask that is not bool.
    ValueError
        One of another shape; on the CPU, padding between a row's tokens, too. Elsewhere the host would have
        to wait for the values, as compiled code can't read them, and tokens amid padding count.
    """
    _check_mask(key_padding_mask, shape)
    place = torch.arange(shape[1], device=key_padding_mask.device)
    begin = torch.where(key_padding_mask, shape[1], place).amin(1)
    end = torch.where(key_padding_mask, 0, place + 1).amax(1)
    begin = torch.minimum(begin, end)
    if key_padding_mask.device.type == "cpu" and has_values(key_padding_mask):
        holes = (end - begin != (~key_padding_mask).sum(1)).nonzero().flatten()
        if len(holes):
            raise ValueError(
                f"row {int(holes[0])} of key_padding_mask has padding between its tokens, and only padding "
                "on the left and on the right can be left out: pack the tokens with unpad"
            )
    return begin, end
