from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from actors.model.linear import linear
from actors.model.pointwise import PIECE, pointwise
from actors.model.quant.qtensor import QTensor
from actors.model.quant.quantize import quantize
from actors.quant_kind import QuantKind

SHAPES = [(54, 8), (333, 2), (27, 3), (64, 32), (48, 96), (576, 49), (17, 19), (576, 1536), (40, 203)]


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


@pytest.mark.parametrize("row_block", [0, 8])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_bias_that_is_no_row_of_memory(row_block: int, kind: QuantKind | None) -> None:
    x, weight = draw(5, 64), draw(21, 64, seed=1)
    matrix = weight if kind is None else quantize(weight, kind)
    for bias in (draw(42, seed=2)[::2], draw(1, seed=2).expand(21)):
        want = linear(x, matrix, None, row_block) + bias
        torch.testing.assert_close(linear(x, matrix, bias, row_block), want, rtol=1e-5, atol=1e-5)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight = draw(2, 64), draw(3, 40)
    with pytest.raises(ValueError, match="x has 64 columns, the weight 40"):
        linear(x, weight)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x[:, :40].bfloat16(), weight.bfloat16(), draw(3))


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


QUANTISED = ["int8", "int4", "fp8", "int4 ordered"]


def quantised(kind: str, outer: int, inner: int) -> QTensor:
    q = quantize(draw(outer, inner, seed=1), kind.removesuffix(" ordered"))  # type: ignore[arg-type]
    if not kind.endswith("ordered"):
        return q
    return replace(q, columns=torch.randperm(inner, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("width", [(64, 32), (48, 96), (300, 50), (1536, 776)])
@pytest.mark.parametrize("row_block", [0, 8])
def test_a_quantised_weight_is_multiplied_as_what_it_stands_for(
    kind: str, width: tuple[int, int], row_block: int
) -> None:
    inner, outer = width
    weight, x, bias = quantised(kind, outer, inner), draw(11, inner), draw(outer, seed=2)
    want = F.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    got = linear(x, weight, bias, row_block)
    assert (got.double() - want).abs().max() <= 2e-6 * want.abs().max()
    short = linear(x.bfloat16(), weight, row_block=row_block)
    want = F.linear(x.bfloat16().double(), weight.dequantize(torch.bfloat16).double())
    assert (short.double() - want).abs().max() <= 8e-3 * want.abs().max()


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_with_a_quantised_weight_too_a_row_is_the_same_bits_alone_and_at_any_place(
    kind: str, dtype: torch.dtype, biased: bool
) -> None:
    """A weight of more than one tile."""
    weight, rows, row = quantised(kind, 776, 1536), draw(31, 1536, seed=3).to(dtype), draw(1, 1536, seed=4).to(dtype)
    assert len(list(weight.tiles(dtype))) == 2
    bias = draw(776, seed=5, dtype=dtype) if biased else None
    want = linear(row, weight, bias, row_block=8)
    for place in (0, 1, 7, 8, 20, 31):
        mixed = torch.cat((rows[:place], row, rows[place:]))
        assert torch.equal(linear(mixed, weight, bias, row_block=8)[place : place + 1], want)


def test_no_rows_and_nan_with_a_quantised_weight() -> None:
    weight, x = quantised("int8", 24, 64), draw(11, 64)
    assert linear(x[:0], weight).shape == linear(x[:0], weight, row_block=8).shape == (0, 24)
    want = linear(x, weight, row_block=8)
    x[3] = float("nan")
    got = linear(x, weight, row_block=8)
    assert got[3].isnan().all()
    got[3] = want[3]
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_rows_meet_quantised_weights_in_bf16(kind: QuantKind) -> None:
    """By torch, with the weights rounded; in the deterministic mode as few rows would."""
    x, weight = draw(64, 96, dtype=torch.bfloat16), quantize(draw(40, 96, seed=1), kind)
    assert torch.equal(linear(x, weight), F.linear(x, weight.dequantize(torch.bfloat16)))
    together = linear(x, weight, row_block=8)
    for count in (1, 5, 17, 63):
        assert torch.equal(linear(x[:count], weight, row_block=8), together[:count])
    assert torch.equal(linear(x[:5], weight), together[:5])
