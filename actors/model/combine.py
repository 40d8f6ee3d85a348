"""From unweighted expert outputs to the routed sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.native import dispatch


class Piece(NamedTuple):
    """Some of a batch's unweighted outputs, where they lie.

    ``slots`` int64[P]: flat indices into [T, K]. ``rows`` [P, D]: contiguous, on the device of the weights; bytes where
    that is host memory.
    """

    slots: NDArray[np.int64]
    rows: Tensor | memoryview


def combine_rows(out: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted sum over the chosen experts of each token.

    out: [T, K, D] in the model's dtype; weight: [T, K], fp32 or in that dtype too; returns [T, D] in ``dtype``.
    A product has the wider of both dtypes: weights in the model's dtype make each weighted row round to it. Additions
    are fp32, in the order k = 0 .. K-1, with one cast at the end: bit-equal to transformers' ``grouped_mm`` experts,
    and independent of which shard computed which expert.
    """
    tokens, k, d = out.shape
    if d and out.is_cpu and out.is_contiguous() and dispatch.combines(out.dtype, weight, dtype):
        into = torch.empty(tokens, d, dtype=dtype)
        dispatch.combine([(0, out.data_ptr(), tokens * k)], out.dtype, d, weight, dtype, into.data_ptr())
        return into
    total = (out[:, 0] * weight[:, 0, None]).to(torch.float32)
    for at in range(1, k):
        total += out[:, at] * weight[:, at, None]
    return total.to(dtype)


def combine_pieces(pieces: Sequence[Piece], rows: torch.dtype, weight: Tensor, into: memoryview) -> None:
    """:func:`combine_rows` of outputs of dtype ``rows`` that lie in pieces, which have every slot once.

    weight: [T, K]. into: the bytes of [T, D] in dtype ``rows``, writable.
    """
    if not into:
        return
    tokens, k = weight.shape
    d = len(into) // (tokens * rows.itemsize)
    if dispatch.combines(rows, weight, rows):
        placed = [(dispatch.address(piece.slots), _address(piece.rows), piece.slots.size) for piece in pieces]
        dispatch.combine(placed, rows, d, weight, rows, dispatch.address(into))
        return
    out = gathered(pieces, tokens * k, d, rows, weight.device).view(tokens, k, d)
    torch.frombuffer(into, dtype=rows).view(tokens, d).copy_(combine_rows(out, weight, rows))


def gathered(pieces: Sequence[Piece], count: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, d] on ``device``: the pieces' rows at their slots.

    In host memory by numpy, which copies row by row: torch goes element by element, six times as slow for 48 rows of
    4 KiB. To another device all slots go at once.
    """
    out = torch.empty(count, d, dtype=dtype, device=device)
    if out.is_cpu:
        for slots, rows in pieces:
            lie = rows.view(torch.uint8).numpy() if isinstance(rows, Tensor) else np.frombuffer(rows, np.uint8)
            out.view(torch.uint8).numpy()[slots] = lie.reshape(slots.size, -1)
        return out
    at = torch.from_numpy(np.concatenate([piece.slots for piece in pieces])).to(device)
    for slots, piece in zip(at.split([piece.slots.size for piece in pieces]), pieces, strict=True):
        assert isinstance(piece.rows, Tensor)  # bytes are in host memory
        out[slots] = piece.rows
    return out


def _address(rows: Tensor | memoryview) -> int:
    return rows.data_ptr() if isinstance(rows, Tensor) else dispatch.address(rows)
