from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from actors.engine import inverse_cdf
from actors.engine.inverse_cdf import _invert, draw_tokens
from actors.engine.request import Draw, SamplingParams

NEG = -torch.inf


def drawn(row: Sequence[float] | torch.Tensor, param: SamplingParams, n: int = 300) -> set[int]:
    logits = torch.as_tensor(row, dtype=torch.float32).expand(n, -1)
    return set(draw_tokens(logits, [Draw(param, index) for index in range(n)]))


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    """Of four equal tokens 0.5 is reached by the first two, 0.51 by three."""
    for top_p, kept in ((0.5, {0, 1}), (0.51, {0, 1, 2}), (0.0001, {0})):
        assert drawn([0.0] * 4, SamplingParams(temperature=1.0, top_p=top_p)) == kept


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # 0.4 / 0.7 = 0.571 reaches 0.55; of the whole, 0.4 would not.
    assert drawn(row, SamplingParams(temperature=1.0, top_k=2, top_p=0.55)) == {0}


def test_top_p_is_a_share_of_what_min_p_left() -> None:
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert drawn(row, SamplingParams(temperature=1.0, min_p=0.6, top_p=0.55)) == {0}


def test_min_p_is_measured_after_the_temperature() -> None:
    """0.25 / 0.5 is half of the likeliest; at temperature 2 it is 0.71 of it, at 0.5 a quarter."""
    row = torch.tensor([0.5, 0.25, 0.25]).log()
    for temperature, kept in ((2.0, {0, 1, 2}), (0.5, {0})):
        assert drawn(row, SamplingParams(temperature=temperature, min_p=0.6)) == kept


def test_min_p_of_one_keeps_the_likeliest_and_its_equals() -> None:
    assert drawn([1.0, 3.0, 3.0, 2.999], SamplingParams(temperature=1.0, min_p=1.0)) == {1, 2}


@pytest.mark.parametrize("min_p", [0.0, 0.5])
def test_flat_rows_keep_more_than_the_first_leaders(min_p: float) -> None:
    """700 equal tokens: all pass min-p, top-k takes the lowest 600 ids."""
    param = SamplingParams(temperature=1.0, min_p=min_p, top_k=600)
    assert drawn(torch.zeros(700), param, 9000) == set(range(600))


@pytest.mark.parametrize("cut", [{"min_p": 0.5}, {"top_k": 100}], ids=str)
def test_top_p_is_a_share_of_what_the_first_leaders_do_not_show(cut: dict[str, float]) -> None:
    """100 of 700 tokens are left, more than are ranked at first: 0.3 of these are 30, of all the mass 55."""
    row = torch.arange(700) * -1e-5
    row[100:] -= 2
    assert drawn(row, SamplingParams(temperature=1.0, top_p=0.2995, **cut), 3000) == set(range(30))  # type: ignore[arg-type]


def test_a_few_unmasked_tokens_are_found_among_the_first_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    leaders = inverse_cdf._leaders
    monkeypatch.setattr(inverse_cdf, "_leaders", lambda logits, n: (sizes.append(n), leaders(logits, n))[1])
    row = torch.full((5000,), NEG)
    row[[7, 4000]] = 1.0
    for cut in (SamplingParams(temperature=1.0, top_k=40), SamplingParams(temperature=1.0, top_p=0.99)):
        assert drawn(row, cut) == {7, 4000}
    assert sizes == [64, 64]


@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 5, "top_p": 0.999, "min_p": 1e-9}], ids=str
)
def test_masked_tokens_never_come(cut: dict[str, float]) -> None:
    param = SamplingParams(temperature=1.5, **cut)  # type: ignore[arg-type]
    assert drawn([NEG, 0.5, NEG, 0.4, NEG], param) == {1, 3}
    assert drawn([NEG, NEG, 0.5], param) == {2}


def test_extreme_temperatures_and_logits_stay_in_range() -> None:
    row = [3e38, -3e38, 2.9e38]
    for temperature in (1e-300, 1e-5, 1.0, 2.0):
        assert drawn(row, SamplingParams(temperature=temperature)) == {0}
    for top_p in (1.0, 0.99):
        assert drawn(row, SamplingParams(temperature=1e300, top_p=top_p)) == {0, 1, 2}


def test_the_inverse_cdf_never_takes_a_token_without_mass() -> None:
    last = 1 - 2.0**-53
    masses = torch.tensor([[0.0, 0.0, 1.0, 0.4, 0.0]], dtype=torch.float64)
    for uniform_, token in ((0.0, 2), (0.71, 2), (0.72, 3), (last, 3)):
        at = _invert(masses.cumsum(1), torch.tensor([[uniform_]], dtype=torch.float64))
        assert at.tolist() == [[token]]
    halves = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert _invert(halves, torch.tensor([[0.5]], dtype=torch.float64)).tolist() == [[1]]
