"""Element-wise functions whose result at an element does not depend on where the element lies.

torch's CPU kernels compute full vectors with one exp and the rest of the array with another, which differ in
the last bit for fp32 silu and sigmoid. So a row's result would depend on how many rows there are: at the
array's end, and with several threads at every place where the work is cut.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

LANES = 64
"""Elements in the largest unrolled vector step (AVX-512, bf16): a multiple of it has no rest."""

PIECE = 16384
"""Elements of one call: below torch's grain size (32768), so that no call is cut between threads."""


def pointwise(function: Callable[[Tensor], Tensor], x: Tensor, row_block: int = 0) -> Tensor:
    """``function(x)``, with ``row_block > 0`` on whole vectors alone. Any shape; same shape and dtype."""
    if row_block == 0:
        return function(x)
    flat = x.reshape(-1)
    padded = flat.new_zeros(-(-flat.numel() // LANES) * LANES)
    padded[: flat.numel()] = flat
    for start in range(0, padded.numel(), PIECE):
        piece = padded[start : start + PIECE]
        piece.copy_(function(piece))
    return padded[: flat.numel()].view(x.shape)
