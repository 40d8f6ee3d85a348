"""The arg max of rows of logits that are all finite, which most steps need of 100,000 numbers a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class _Form(NamedTuple):
    """The bits of a float as integers: of positive ones the order is the same, and ``infinity`` and NaN are above."""

    torch_signed: torch.dtype
    unsigned: type[np.unsignedinteger[Any]]
    infinity: int
    minus_infinity: int


_FORMS = {
    torch.bfloat16: _Form(torch.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float16: _Form(torch.int16, np.uint16, 0x7C00, 0xFC00),
    torch.float32: _Form(torch.int32, np.uint32, 0x7F800000, 0xFF800000),
}


def likeliest(logits: Tensor) -> list[int | None]:
    """Of each row of ``logits [R, V]`` the first of the highest; None where a logit is NaN or infinite.

    On CPUs their bits are compared as integers, in a fiftieth of torch's time for bf16, where it has no vector code.
    Rows whose highest is not above 0 are torch's: there the orders differ.
    """
    form = _FORMS.get(logits.dtype) if logits.is_cpu else None
    if form is None or not logits.numel():
        return _by_torch(logits)
    numbers = logits.contiguous().view(form.torch_signed).numpy()
    best = numbers.argmax(axis=1)
    sure = _sure(numbers, best, form)
    tokens: list[int | None] = best.tolist()
    if not sure.all():
        rest = np.flatnonzero(~sure).tolist()
        for row, token in zip(rest, _by_torch(logits[rest]), strict=True):
            tokens[row] = token
    return tokens


def _sure(numbers: NDArray[Any], best: NDArray[np.int64], form: _Form) -> NDArray[np.bool_]:
    top = numbers[np.arange(len(best)), best]
    finite = (top < form.infinity) & (numbers.view(form.unsigned).max(axis=1) < form.minus_infinity)
    above_zero: NDArray[np.bool_] = (top > 0) & finite
    return above_zero


def _by_torch(logits: Tensor) -> list[int | None]:
    tops, best = logits.max(dim=-1)
    finite = tops.isfinite() & logits.amin(dim=-1).isfinite()
    return [None if token < 0 else token for token in best.where(finite, -1).tolist()]
