"""Attention over the paged KV cache on the CPU, and products per head, whose results for a row depend on it alone.

Keys and values are read where they lie, once for the rows that share them. Each row's sums run over the tokens that it
sees in one fixed order (an online softmax over blocks of absolute positions, in fp32), whatever is computed beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import library
from .matrix import KINDS


def attention(
    query: Tensor,
    keys: Sequence[Tensor],
    value: Tensor,
    spans: Tensor,
    tables: Tensor,
    block_size: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of query [T, H, d] over planes of a paged cache; returns [T, H, dv].

    keys: one or two planes [slots, G, d_i], whose widths add up to d; value: [slots, G, dv]; all :func:`usable`. G
    divides H: query heads in order share a plane's head. spans: int64 [S, 4], for each sequence the first of its rows,
    their number, the tokens before them, and where in ``tables`` (int64) its list of blocks begins. Row i of a span
    sees the tokens 0 .. context + i, or the last ``window`` of them. Rows in no span are left undefined.
    """
    kernels = library()
    assert kernels is not None
    query = query.contiguous()
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    rest = keys[1] if len(keys) > 1 else None
    kernels.attention(
        kernels.number,
        KINDS[query.dtype],
        query.data_ptr(),
        keys[0].data_ptr(),
        None if rest is None else rest.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        spans.data_ptr(),
        tables.data_ptr(),
        spans.shape[0],
        query.shape[1],
        value.shape[1],
        keys[0].shape[-1],
        0 if rest is None else rest.shape[-1],
        value.shape[-1],
        block_size,
        window or 0,
        scale,
        torch.get_num_threads(),
    )
    return out


def head_products(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out[:, h] = x[:, h] @ weight[h].T`` for all heads: x [T, H, K], weight [H, N, K], out [T, H, N], all
    :func:`usable`; x and out may be parts of wider tensors, but with numbers side by side along their last axis.
    """
    kernels = library()
    assert kernels is not None
    kernels.head_products(
        kernels.number,
        KINDS[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        weight.shape[0],
        x.shape[2],
        weight.shape[1],
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        torch.get_num_threads(),
    )
