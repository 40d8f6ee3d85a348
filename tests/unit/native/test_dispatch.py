"""Splitting and combining by the kernels against numpy and torch, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.dispatch import split_rows_by_numpy
from actors.model.combine import combine_rows
from actors.native import dispatch
from actors.native.library import Library, functions, instruction_sets

DTYPES = [torch.float32, torch.bfloat16]
BUILT = functions()
SHAPES = [(1, 1, 1), (3, 6, 33), (5, 8, 513), (2, 3, 1024), (300, 4, 700)]
"""T, K and D: tails of the columns that are summed at once, and more than one thread takes."""


@pytest.fixture(autouse=True, params=instruction_sets(BUILT) if BUILT else [])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    assert BUILT is not None
    found = Library(BUILT, request.param)
    monkeypatch.setattr("actors.native.dispatch.library", lambda: found)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield found
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_torch(*args: Any) -> Tensor:
    """``combine_rows`` where the kernels are not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.native.dispatch.library", lambda: None)
        return combine_rows(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_weight", DTYPES)
@pytest.mark.parametrize("of_rows", DTYPES)
@pytest.mark.parametrize(("t", "k", "d"), SHAPES)
def test_sums_have_the_bits_of_torch(
    of_rows: torch.dtype, of_weight: torch.dtype, dtype: torch.dtype, t: int, k: int, d: int
) -> None:
    out, weight = random(t, k, d, dtype=of_rows), random(t, k, dtype=of_weight, seed=1)
    assert dispatch.combines(out, weight, dtype)
    got = combine_rows(out, weight, dtype)
    want = by_torch(out, weight, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("of_rows", DTYPES)
def test_rows_of_the_last_shard_are_taken_from_its_frame(of_rows: torch.dtype) -> None:
    out, weight = random(7, 5, 90, dtype=of_rows), random(7, 5, dtype=torch.float32, seed=1)
    slots = np.array([0, 3, 4, 17, 34], np.int64)
    want = combine_rows(out, weight, of_rows)
    rows = out.view(-1, 90)[torch.from_numpy(slots)]
    out.view(-1, 90)[torch.from_numpy(slots)] = torch.nan
    assert torch.equal(combine_rows(out, weight, of_rows, slots, rows), want)
    assert torch.equal(by_torch(out, weight, of_rows, slots, rows), want)


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
    assert dispatch.combines(out, weight, torch.float32)
    assert not dispatch.combines(out.to(half), weight, torch.float32)
    assert not dispatch.combines(out, weight.to(half), torch.float32)
    assert not dispatch.combines(out, weight, half)
    assert not dispatch.combines(out[..., ::2], weight, torch.float32)
    assert not dispatch.combines(out[:0], weight[:0], torch.float32)
    assert not dispatch.combines(out.to("meta"), weight, torch.float32)
    assert not dispatch.combines(out, weight.to("meta"), torch.float32)


@pytest.mark.parametrize("seed", range(40))
def test_shares_are_those_of_numpy(seed: int) -> None:
    """Some slots, of rows that some shards get nothing of; some pairs are nobody's."""
    draw = np.random.default_rng(seed)
    t, k, shards = (int(draw.integers(0, 30)), int(draw.integers(1, 9)), int(draw.integers(1, 6)))
    chosen = draw.integers(0, 64, (t, k))
    slots = np.flatnonzero(draw.random(t * k) < draw.choice([0.2, 0.8, 1.0]))
    owner = draw.integers(-1, shards, slots.size) * int(draw.integers(1, 3))
    got = dispatch.split(chosen, slots, owner)
    want = split_rows_by_numpy(chosen, slots, owner)
    assert [share[0] for share in got] == [share.shard for share in want]
    for ours, theirs in zip(got, want, strict=True):
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            assert isinstance(mine, np.ndarray)
            assert mine.dtype == other.dtype
            assert np.array_equal(mine, other)
