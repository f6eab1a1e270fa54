"""Shares of a tile's keys: how many there may be, and what is kept of them until they are put together.

Blocks, or threads, that share a tile's keys leave of each row float32 outputs that are not yet divided, and
what their weights are relative to and sum to.
"""

from __future__ import annotations

from .family import Scratch, Shape

MOST_SHARES = 32  # where one warp puts them together: one for each lane


def scratch_of_shares(rows: Shape, numbers: int) -> tuple[Scratch, Scratch]:
    """What a kernel needs beside inputs and outputs where keys are shared out.

    Parameters
    ----------
    rows : (Sizes) -> tuple of int
        The leading dimensions of all shares' rows.
    numbers : int
        That a share leaves of a row beside its outputs.

    Returns
    -------
    tuple of Scratch
        ``partial_o`` (*rows, head_dim) and ``partial_sums`` (*rows, numbers), float32.
    """
    return (
        Scratch("partial_o", shape=lambda n: (*rows(n), n.head_dim), dtype="float32"),
        Scratch("partial_sums", shape=lambda n: (*rows(n), numbers), dtype="float32"),
    )
