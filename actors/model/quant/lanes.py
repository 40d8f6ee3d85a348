"""The other order in which a quantised matrix's bytes may lie: rows side by side, as kernels for int8 rows read them.

Of each 16 rows the first elements lie next to each other, then the second ones, and so on. So of numbers a register of
64 bytes has four columns (int4: eight) of 16 rows, a row in each lane, and no instruction is spent on bringing them
there.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16
"""That lie side by side."""

HEIGHT = 2 * ROWS
"""Rows of a matrix are a multiple of this, so that it can be cut in two: gate and up lie in one."""

WIDTH = 32
"""And columns of this."""

ELEMENT = 4
"""Bytes of numbers that stay together."""

_TILE_ROWS = 512


def to_lanes(part: Tensor, element: int, out: Tensor) -> None:
    """Write ``part`` [N, ...] in that order into ``out``, of its shape and dtype, both contiguous. N: a multiple of
    ROWS; ``element``: bytes of one."""
    for tile, to in zip(part.view(torch.uint8).split(_TILE_ROWS), out.view(torch.uint8).split(_TILE_ROWS), strict=True):
        blocks, width = tile.shape[0] // ROWS, tile.shape[1] // element
        to.view(blocks, width, ROWS, element).copy_(tile.view(blocks, ROWS, width, element).transpose(1, 2))


def from_lanes(part: Tensor, element: int) -> Tensor:
    """A copy that lies row by row: what :func:`to_lanes` was given."""
    plain = part.view(torch.uint8)
    blocks, width = plain.shape[0] // ROWS, plain.shape[1] // element
    rows = plain.view(blocks, width, ROWS, element).transpose(1, 2)
    return rows.reshape(plain.shape).view(part.dtype)
