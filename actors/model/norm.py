"""RMSNorm as DeepSeek, GLM, Llama and Mixtral compute it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LayerNorms(NamedTuple):
    """The weights [D] of a layer's norms before attention and before the MLP."""

    input: Tensor
    post: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last axis in fp32, cast back to x's dtype, then multiply by ``weight`` in that
    dtype.

    x: [..., n], weight: [n]; returns [..., n] in x's dtype. The cast before the multiplication is part of the
    definition (arXiv 1910.07467 as implemented in transformers): in bf16 the other order differs by an ulp.
    """
    wide = x.to(torch.float32)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype)
