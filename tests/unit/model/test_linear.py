from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from actors.model.linear import linear
from actors.model.pointwise import PIECE, pointwise

SHAPES = [(64, 32), (48, 96), (576, 49), (17, 19), (576, 1536), (40, 203)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("width", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_a_row_is_the_same_bits_alone_and_at_any_place(
    width: tuple[int, int], dtype: torch.dtype, biased: bool
) -> None:
    inner, outer = width
    weight, rows = draw(outer, inner, seed=1, dtype=dtype), draw(31, inner, seed=2, dtype=dtype)
    bias = draw(outer, seed=4, dtype=dtype) if biased else None
    row = draw(1, inner, seed=3, dtype=dtype)
    want = linear(row, weight, bias, row_block=8)
    for place in range(32):
        mixed = torch.cat((rows[:place], row, rows[place:]))
        assert torch.equal(linear(mixed, weight, bias, row_block=8)[place : place + 1], want)


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 30])
@pytest.mark.parametrize("row_block", [0, 8, 16])
def test_it_is_the_product(rows: int, row_block: int) -> None:
    x, weight, bias = draw(rows, 33), draw(21, 33, seed=1), draw(21, seed=2)
    got = linear(x, weight, bias, row_block)
    assert got.shape == (rows, 21)
    torch.testing.assert_close(got, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_nan_in_one_row_stays_in_it() -> None:
    x, weight = draw(11, 16), draw(5, 16, seed=1)
    want = linear(x, weight, row_block=8)
    x[3] = float("nan")
    got = linear(x, weight, row_block=8)
    kept = [i for i in range(11) if i != 3]
    assert torch.equal(got[kept], want[kept])
    assert got[3].isnan().all()


@pytest.mark.parametrize("function", [F.silu, torch.sigmoid])
@pytest.mark.parametrize("threads", [1, 2])
def test_pointwise_does_not_depend_on_the_place(function: object, threads: int) -> None:
    row = draw(1, 27, seed=5)
    torch.set_num_threads(threads)
    try:
        want = pointwise(function, row, row_block=8)
        for place in (0, 1, 6, 600, 3000):
            x = draw(3001, 27, seed=6)
            x[place] = row
            assert x.numel() > 2 * PIECE
            assert torch.equal(pointwise(function, x, row_block=8)[place : place + 1], want)
    finally:
        torch.set_num_threads(1)


def test_pointwise_takes_views_and_nothing() -> None:
    x = draw(5, 20)
    left = x.chunk(2, dim=-1)[0]
    before = x.clone()
    torch.testing.assert_close(pointwise(F.silu, left, row_block=8), F.silu(left))
    assert torch.equal(x, before)
    assert pointwise(F.silu, x[:0], row_block=8).shape == (0, 20)
