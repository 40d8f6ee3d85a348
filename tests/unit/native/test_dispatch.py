"""Splitting and combining by the kernels against numpy and torch, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.dispatch import NOBODY, Owners, dispatch_rows_by_numpy
from actors.messages import tensor_bytes
from actors.model.combine import Piece, combine_pieces, combine_rows
from actors.native import dispatch
from actors.native.library import Library
from tests.kernels import INSTRUCTION_SETS, use

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (3, 6, 33), (5, 8, 513), (2, 3, 1024), (300, 4, 700)]
"""T, K and D: tails of the columns that are summed at once, and more than one thread takes."""


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield use(request.param, monkeypatch)
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_torch(*args: Any, call: Callable[..., Any] = combine_rows) -> Any:
    """What ``call`` does where the kernels are not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.native.dispatch.library", lambda: None)
        return call(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_weight", DTYPES)
@pytest.mark.parametrize("of_rows", DTYPES)
@pytest.mark.parametrize(("t", "k", "d"), SHAPES)
def test_sums_have_the_bits_of_torch(
    of_rows: torch.dtype, of_weight: torch.dtype, dtype: torch.dtype, t: int, k: int, d: int
) -> None:
    out, weight = random(t, k, d, dtype=of_rows), random(t, k, dtype=of_weight, seed=1)
    assert dispatch.combines(out.dtype, weight, dtype)
    got = combine_rows(out, weight, dtype)
    want = by_torch(out, weight, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("of_weight", DTYPES)
@pytest.mark.parametrize("of_rows", DTYPES)
@pytest.mark.parametrize("sizes", [(35,), (5, 30), (1, 20, 14)])
def test_pieces_are_combined_from_where_they_lie(
    of_rows: torch.dtype, of_weight: torch.dtype, sizes: tuple[int, ...]
) -> None:
    """As bytes, as what came in frames is, or as tensors; in any order of the slots."""
    out, weight = random(7, 5, 90, dtype=of_rows), random(7, 5, dtype=of_weight, seed=1)
    slots = np.split(np.random.default_rng(3).permutation(35), np.cumsum(sizes)[:-1])
    rows = [out.view(-1, 90)[torch.from_numpy(at)].contiguous() for at in slots]
    for given in (rows, [tensor_bytes(piece) for piece in rows]):
        pieces = [Piece(at, lie) for at, lie in zip(slots, given, strict=True)]
        got, want = torch.empty(7, 90, dtype=of_rows), torch.empty(7, 90, dtype=of_rows)
        combine_pieces(pieces, of_rows, weight, tensor_bytes(got))
        by_torch(pieces, of_rows, weight, tensor_bytes(want), call=combine_pieces)
        assert torch.equal(want, by_torch(out, weight, of_rows))
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_weight", DTYPES)
def test_what_is_no_number_stays_none(of_weight: torch.dtype, dtype: torch.dtype) -> None:
    out = torch.ones(4, 2, 40, dtype=torch.bfloat16)
    out[0, 1, 3], out[1, 0, 7], out[2, 0, 35] = torch.nan, torch.inf, -torch.inf
    out[3, 0], out[3, 1] = torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).max
    weight = torch.ones(4, 2, dtype=of_weight)
    got, want = combine_rows(out, weight, dtype), by_torch(out, weight, dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0, 1.0, -1.0), want.nan_to_num(0.0, 1.0, -1.0))
    assert got[0].isnan().sum() == 1


def test_halves_to_the_nearest_even() -> None:
    """Of numbers exactly between two of bf16, and beside them."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF808000 - (1 << 32), 1], dtype=torch.int32)
    out = bits.view(torch.float32).reshape(1, 1, -1)
    one = torch.ones(1, 1)
    assert torch.equal(combine_rows(out, one, torch.bfloat16)[0], out[0, 0].to(torch.bfloat16))


def test_what_the_kernels_do_not_take_is_left_to_torch() -> None:
    out, weight = random(3, 2, 8, dtype=torch.float32), random(3, 2, dtype=torch.float32)
    half = torch.float16
    assert dispatch.combines(out.dtype, weight, torch.float32)
    assert not dispatch.combines(half, weight, torch.float32)
    assert not dispatch.combines(out.dtype, weight.to(half), torch.float32)
    assert not dispatch.combines(out.dtype, weight, half)
    assert not dispatch.combines(out.dtype, weight.t(), torch.float32)
    assert not dispatch.combines(out.dtype, weight[:0], torch.float32)
    assert not dispatch.combines(out.dtype, weight.to("meta"), torch.float32)
    for odd in (out[..., ::2], out[:0], out[..., :0], out.to(half)):
        assert torch.equal(combine_rows(odd, weight[: len(odd)], torch.float32), summed(odd, weight))


def summed(out: Tensor, weight: Tensor) -> Tensor:
    return out[:, 0].float() * weight[: len(out), :1] + out[:, 1].float() * weight[: len(out), 1:]


@pytest.mark.parametrize("seed", range(40))
def test_shares_are_those_of_numpy(seed: int) -> None:
    """Experts have up to three live shards, or none; some shards get nothing."""
    draw = np.random.default_rng(seed)
    t, k, shards, width = (int(draw.integers(0, 30)), *map(int, draw.integers(1, [9, 6, 4])))
    chosen = draw.integers(0, 64, (t, k))
    live = draw.integers(0 if seed % 2 else 1, width + 1, 64)
    table = np.where(np.arange(width) < live[:, None], draw.integers(0, shards, (64, width)) * (1 + seed % 3), NOBODY)
    owners, turn = Owners(table, live), int(draw.integers(0, 5))
    loads = np.zeros((2, 64), np.int64)
    got = dispatch.dispatch(chosen, *owners.places, loads[0], turn)
    want = dispatch_rows_by_numpy(chosen, owners, turn, loads[1])
    assert [share[0] for share in got] == [share.shard for share in want]
    assert np.array_equal(*loads)
    for ours, theirs in zip(got, want, strict=True):
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            assert isinstance(mine, np.ndarray)
            assert mine.dtype == other.dtype
            assert np.array_equal(mine, other)
