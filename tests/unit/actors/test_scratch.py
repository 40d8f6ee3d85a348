"""Reused result memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.scratch import ScratchPool, place_rows


def test_memory_comes_back_and_grows() -> None:
    pool = ScratchPool(torch.float32, torch.device("cpu"))
    first = pool.take(4, 8)
    second = pool.take(4, 8)
    assert first.shape == (4, 8)
    assert first.data_ptr() != second.data_ptr()
    where = first.data_ptr()
    pool.give(first)
    assert pool.take(2, 8).data_ptr() == where
    pool.give(second)
    large = pool.take(100, 8)
    large.fill_(1.0)
    assert large.sum() == 800


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 3])
def test_rows_are_placed_where_they_belong(dtype: torch.dtype, count: int) -> None:
    into = torch.zeros(5, 3, dtype=dtype)
    at, rows = np.array([4, 0, 2], np.int64)[:count], torch.randn(3, 3).to(dtype)[:count]
    place_rows(into, at, rows)
    expected = torch.zeros(5, 3, dtype=dtype)
    expected[torch.from_numpy(at)] = rows
    assert torch.equal(into, expected)


def test_rows_are_placed_on_a_device_too() -> None:
    into = torch.zeros(5, 3, device="meta")
    place_rows(into, np.array([1]), torch.ones(1, 3, device="meta"))
    assert into.device.type == "meta"
