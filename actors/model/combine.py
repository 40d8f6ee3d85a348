"""From unweighted expert outputs to the routed sum."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_rows(out: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted sum over the chosen experts of each token.

    out: [T, K, D] in the model's dtype; weight: [T, K], fp32 or in that dtype too; returns [T, D] in ``dtype``.
    A product has the wider of both dtypes: weights in the model's dtype make each weighted row round to it. Additions
    are fp32, in the order k = 0 .. K-1, with one cast at the end: bit-equal to transformers' ``grouped_mm`` experts,
    and independent of which shard computed which expert.
    """
    total = (out[:, 0] * weight[:, 0, None]).to(torch.float32)
    for k in range(1, out.shape[1]):
        total += out[:, k] * weight[:, k, None]
    return total.to(dtype)
