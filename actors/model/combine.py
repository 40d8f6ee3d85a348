"""From unweighted expert outputs to the routed sum."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.native import dispatch

_NO_SLOTS = np.empty(0, np.int64)


def combine_rows(
    out: Tensor, weight: Tensor, dtype: torch.dtype, at: NDArray[np.int64] = _NO_SLOTS, rows: Tensor | None = None
) -> Tensor:
    """Weighted sum over the chosen experts of each token.

    out: [T, K, D] in the model's dtype; weight: [T, K], fp32 or in that dtype too; returns [T, D] in ``dtype``.
    A product has the wider of both dtypes: weights in the model's dtype make each weighted row round to it. Additions
    are fp32, in the order k = 0 .. K-1, with one cast at the end: bit-equal to transformers' ``grouped_mm`` experts,
    and independent of which shard computed which expert.

    ``rows`` [P, D], contiguous: used instead of those of ``out`` at ``at`` int64[P], flat indices into [T * K], which
    are overwritten or not.
    """
    if dispatch.combines(out, weight, dtype):
        return dispatch.combine(out, weight, dtype, at, out if rows is None else rows)
    if rows is not None:
        place_rows(out.view(-1, out.shape[-1]), at, rows)
    total = (out[:, 0] * weight[:, 0, None]).to(torch.float32)
    for k in range(1, out.shape[1]):
        total += out[:, k] * weight[:, k, None]
    return total.to(dtype)


def place_rows(into: Tensor, at: NDArray[np.int64], rows: Tensor) -> None:
    """``into`` [N, D] at the indices ``at`` int64[P] becomes ``rows`` [P, D] of its dtype and device; both contiguous.

    In host memory by numpy, which copies row by row: torch goes element by element, six times as slow for 48 rows of
    4 KiB.
    """
    if into.is_cpu:
        into.view(torch.uint8).numpy()[at] = rows.view(torch.uint8).numpy()
    else:
        into[torch.from_numpy(at).to(into.device)] = rows
