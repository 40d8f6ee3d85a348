"""Matrix products of rows, with a mode in which a row's result does not depend on the other rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.native import products

from .quant.int8_product import int8_linear
from .quant.qtensor import TILE_BYTES, QTensor

Matrix = Tensor | QTensor

_FEW = 11

_MANY = 16
"""Rows above which torch's bf16 products are faster than the kernels, which are made for few. With weights of
4096 x 4096, on an AMD EPYC with AVX512_BF16, both take as long for about 14 rows; torch is 1.2 to 1.3 times as fast for
24."""

MANY_OF_EXPERTS = 32
"""The same for experts that are computed in one call, rows of each: 64 of 2048 x 1408 on that machine take as long in
torch's loop for 24 to 32 rows."""

_MANY_QUANTISED = 16
"""The same for quantised weights, of which the kernels then only make bf16 tiles: that takes as long as three to four
products of one row (2048 x 1408)."""


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None, row_block: int = 0) -> Tensor:
    """``x @ weight.T + bias``. x: [R, K], weight: [N, K], bias: [N] or None, one dtype; returns [R, N].

    A quantised weight stays as it is: the kernels multiply int8 and int4 where they lie, in fp32. Else (fp8, act order,
    many rows in bf16) some of its rows at a time are dequantised to x's dtype and multiplied. With a ``row_group`` x is
    quantised too and multiplied as integers, whatever the number of rows.

    ``row_block > 0`` is the deterministic mode. The package's own kernels keep it as they are. Without them (a GPU,
    fp16, no compiler) every product is computed on exactly that many rows, copied to aligned memory and zero padded.
    GEMM libraries choose their kernel, and with it the order of additions, by the number of rows; with one row alone
    (GEMV) MKL looks at the operands' alignment as well. For 8 rows MKL (fp32), oneDNN (bf16) and torch's fp16 products
    were found independent of position, mates, alignment and thread count; 1, 2 and 4 rows are not safe. Nor are 2 to 8
    columns where K is no multiple of 4 (fp32): such a weight is padded to _FEW + 1 rows first.
    """
    if isinstance(weight, Tensor):
        return _dense(x, weight, bias, row_block)
    if not weight.row_group:
        return _weight_only(x, weight, bias, row_block)
    if products.usable(x, weight) and products.adds(bias, x, weight):
        return products.linear(x, weight, bias)
    out = int8_linear(x, weight)
    return out if bias is None else out + bias


def _weight_only(x: Tensor, weight: QTensor, bias: Tensor | None, row_block: int) -> Tensor:
    if native(x.shape[0], row_block, x, weight) and products.adds(bias, x, weight):
        return products.linear(x, weight, bias)
    if weight.columns is not None:
        x = x.index_select(1, weight.columns)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start, tile in _tiles(weight, x):
        part = slice(start, start + tile.shape[0])
        out[:, part] = _dense(x, tile, None if bias is None else bias[part], row_block)
    return out


def _tiles(weight: QTensor, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """As :meth:`QTensor.tiles`, by the kernels where they can."""
    if not products.usable(x, weight):
        yield from weight.tiles(x.dtype)
        return
    rows, width = weight.shape
    height = weight.tile_rows(TILE_BYTES)
    for start in range(0, rows, height):
        tile = x.new_empty(min(height, rows - start), width)
        products.dequantize(weight, start, tile)
        yield start, tile


def native(rows: float, row_block: int, x: Tensor, *weights: Matrix, many: int = _MANY) -> bool:
    """Whether products of so many ``rows`` with each of ``weights`` are the kernels' (x: any rows, for its dtype).
    ``many``: above so many rows in bf16 they are not, unless a weight is quantised."""
    return rows <= _most_rows(row_block, x.dtype, weights, many) and products.usable(x, *weights)


def most_native(row_block: int, x: Tensor, *weights: Matrix, many: int = _MANY) -> float:
    """Up to how many rows :func:`native` says yes; infinity without a limit."""
    return _most_rows(row_block, x.dtype, weights, many) if products.usable(x, *weights) else 0.0


def _most_rows(row_block: int, dtype: torch.dtype, weights: Sequence[Matrix], many: int) -> float:
    quantised = [weight for weight in weights if isinstance(weight, QTensor)]
    if dtype != torch.bfloat16 or row_block or any(weight.row_group for weight in quantised):
        return math.inf
    return _MANY_QUANTISED if quantised else many


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, row_block: int) -> Tensor:
    if native(x.shape[0], row_block, x, weight) and products.adds(bias, x, weight):
        return products.linear(x, weight, bias)
    if row_block == 0:
        return F.linear(x, weight, bias)
    few = weight.shape[0]
    if few <= _FEW and weight.shape[1] % 4:
        missing = _FEW + 1 - few
        padded = None if bias is None else F.pad(bias, (0, missing))
        return _in_blocks(x, F.pad(weight, (0, 0, 0, missing)), padded, row_block)[:, :few]
    return _in_blocks(x, weight, bias, row_block)


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, row_block: int) -> Tensor:
    rows = x.shape[0]
    blocks = -(-rows // row_block)
    out = x.new_empty(blocks * row_block, weight.shape[0])
    block = x.new_empty(row_block, x.shape[1])
    for start in range(0, rows, row_block):
        count = min(row_block, rows - start)
        block[:count] = x[start : start + count]
        block[count:] = 0
        out[start : start + row_block] = F.linear(block, weight, bias)
    return out[:rows]
