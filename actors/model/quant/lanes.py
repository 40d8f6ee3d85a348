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


def to_lanes(part: Tensor, element: int) -> None:
    """Bring contiguous [N, ...] in that order, where it lies. N: a multiple of ROWS; ``element``: bytes of one."""
    for tile in part.view(torch.uint8).split(_TILE_ROWS):
        blocks, width = tile.shape[0] // ROWS, tile.shape[1] // element
        tile.copy_(_exchanged(tile, (blocks, ROWS, width, element)))


def from_lanes(part: Tensor, element: int) -> Tensor:
    """A copy that lies row by row: what :func:`to_lanes` was given."""
    plain = part.view(torch.uint8)
    blocks, width = plain.shape[0] // ROWS, plain.shape[1] // element
    return _exchanged(plain, (blocks, width, ROWS, element)).view(part.dtype)


def _exchanged(plain: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """``plain`` as ``shape`` with the two axes in the middle exchanged."""
    return plain.reshape(shape).transpose(1, 2).reshape(plain.shape)
