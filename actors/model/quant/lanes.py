"""The other order in which a quantised matrix's bytes may lie: as the kernels for int8 rows read them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .qtensor import QTensor

LANES = 16
"""Rows of a matrix that lie side by side."""

HEIGHT = 2 * LANES
"""Only matrices of a multiple of so many rows: the half of a gate and its up must be whole too."""

WIDTH = 32
"""And of so many columns."""

TILE_ROWS = 512


def takes_lanes(weight: QTensor) -> bool:
    """Whether :func:`in_lanes` helps and can: the kernels for int8 rows multiply it, and it has whole blocks."""
    return bool(weight.row_group) and not weight.shape[0] % HEIGHT and not weight.shape[1] % WIDTH


def in_lanes(weight: QTensor) -> QTensor:
    """The same matrix, its bytes rearranged where they lie: ``weight`` is not to be used any more.

    Of each 16 rows the first four bytes lie next to each other, then the next four, and so on; likewise their first
    scales and zero points. So a register of 64 bytes has four columns (int4: eight) of 16 rows, a row in each lane.
    """
    for part, size in _parts(weight):
        for tile in part.split(TILE_ROWS):
            tile.copy_(_exchanged(tile, size))
    return replace(weight, lanes=True)


def in_rows(weight: QTensor) -> QTensor:
    """A copy that lies row by row; ``weight`` itself if it does."""
    if not weight.lanes:
        return weight
    data, scale, zero = (None if part is None else torch.empty_like(part) for part in _fields(weight))
    assert data is not None
    assert scale is not None
    made = replace(weight, data=data, scale=scale, zero=zero, lanes=False)
    for (part, size), (source, _) in zip(_parts(made), _parts(weight), strict=True):
        part.copy_(_exchanged(source, size, back=True))
    return made


def _fields(weight: QTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return weight.data, weight.scale, weight.zero


def _parts(weight: QTensor) -> list[tuple[Tensor, int]]:
    """Each part as bytes [N, ...] and how many of them lie together."""
    sizes = (4, weight.scale.itemsize, 1)
    return [
        (part.view(torch.uint8), size) for part, size in zip(_fields(weight), sizes, strict=True) if part is not None
    ]


def _exchanged(tile: Tensor, size: int, back: bool = False) -> Tensor:
    """uint8 [n, w] with the elements of ``size`` bytes of each 16 rows transposed, or transposed back."""
    blocks, width = tile.shape[0] // LANES, tile.shape[1] // size
    shape = (blocks, width, LANES, size) if back else (blocks, LANES, width, size)
    return tile.reshape(shape).transpose(1, 2).reshape(tile.shape)
