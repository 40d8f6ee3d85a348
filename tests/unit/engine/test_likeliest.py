"""The arg max by integers is torch's, whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.likeliest import _by_torch, likeliest

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NUMBERS = st.one_of(
    st.floats(-4.0, 4.0, width=16), st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 6e-8, -6e-8, 65504.0])
)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 40).flatmap(
        lambda width: st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1, max_size=5)
    ),
    st.sampled_from(DTYPES),
)
def test_it_is_that_of_torch(rows: list[list[float]], dtype: torch.dtype) -> None:
    """Of equal ones the first, with zeros of both signs, and none beside NaN and infinities."""
    logits = torch.tensor(rows, dtype=torch.float64).to(dtype)
    wanted = [
        None if not row.isfinite().all() else int((row == row.max()).nonzero()[0])  # max alone promises no order
        for row in logits
    ]
    assert likeliest(logits) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_vocabulary(dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 50_001, generator=draws).to(dtype)
    logits[1] -= 20
    logits[2, 777] = -math.inf
    logits[3, 50_000] = math.nan
    logits[4, 0] = math.inf
    expected = _by_torch(logits)
    assert likeliest(logits) == expected
    assert expected[2:5] == [None] * 3
    assert None not in (expected[0], expected[1], expected[5])
    assert likeliest(logits[:, ::2]) == _by_torch(logits[:, ::2])
    assert likeliest(logits[:0]) == []
