"""Experts that are computed together, against each of them alone."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.native import products
from actors.native.expert_places import ExpertPlaces


def assert_each_as_alone(together: ExpertPlaces | None, alone: dict[int, ExpertPlaces]) -> None:
    """Bits of 33 pairs of 20 rows [64] and the experts, numbered from 2; none are no rows; expert 1 is missed."""
    assert together is not None
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(20, 64, generator=numbers).bfloat16()
    pair_row = torch.randint(20, (33,), generator=numbers)
    pair_expert = torch.randint(2, 2 + len(alone), (33,), generator=numbers)
    out = products.experts(x, pair_row, pair_expert, together)
    assert isinstance(out, Tensor)
    for p, (row, number) in enumerate(zip(pair_row.tolist(), pair_expert.tolist(), strict=True)):
        assert torch.equal(out[p], products.swiglu(x[row : row + 1], alone[number])[0])
    nothing = products.experts(x, pair_row[:0], pair_expert[:0], together)
    assert isinstance(nothing, Tensor)
    assert nothing.shape == (0, 64)
    assert products.experts(x, pair_row[:1], torch.tensor([1]), together) == 1
