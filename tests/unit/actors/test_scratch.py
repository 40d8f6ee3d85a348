"""Reused result memory."""

from __future__ import annotations

import pytest
import torch

from actors.scratch import ScratchPool


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


def test_what_is_not_lent_cannot_come_back() -> None:
    pool = ScratchPool(torch.float32, torch.device("cpu"))
    taken, empty = pool.take(2, 2), pool.take(0, 2)
    pool.give(taken)
    pool.give(empty)
    with pytest.raises(KeyError):
        pool.give(taken)
