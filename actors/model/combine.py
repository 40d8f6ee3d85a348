"""From unweighted expert outputs to the routed sum."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_rows(out: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted sum over the chosen experts of each token.

    out: [T, K, D], weight: fp32 [T, K]; returns [T, D] in ``dtype``. Products and additions are fp32, in the
    order k = 0 .. K-1, with one cast at the end: bit-equal to transformers' ``grouped_mm`` experts, and
    independent of which shard computed which expert.
    """
    total = out[:, 0].to(torch.float32) * weight[:, 0, None]
    for k in range(1, out.shape[1]):
        total += out[:, k].to(torch.float32) * weight[:, k, None]
    return total.to(dtype)
