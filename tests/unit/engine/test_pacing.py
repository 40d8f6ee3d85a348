from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from actors.engine.pacing import GapBound

Cost = Callable[[int, int, int], float]  # seconds of a step by decodes, prompt tokens, and tokens before them

N_DECODES, PROMPT, BUDGET = 8, 4096, 512


def affine(n_decodes: int, n_prefill: int, context: int) -> float:
    return 0.020 + 0.00025 * n_decodes + 0.0012 * n_prefill


def growing(n_decodes: int, n_prefill: int, context: int) -> float:
    return 0.020 + 0.00025 * n_decodes + 0.0012 * n_prefill * (1 + (context + n_prefill / 2) / 8192)


def dear_start(n_decodes: int, n_prefill: int, context: int) -> float:
    """The first prompt token costs as much as eight: experts are read that no decode row needs."""
    return 0.020 + 0.00025 * n_decodes + (0.004 + 0.0005 * n_prefill if n_prefill else 0.0)


def noisy(cost: Cost, seed: int) -> Cost:
    rng = random.Random(seed)
    return lambda *step: cost(*step) * rng.uniform(0.8, 1.2)


def beside_decodes(cost: Cost, bound: GapBound) -> list[tuple[int, int, float]]:
    """(tokens before, tokens, seconds) of the steps in which the prompt is computed beside streams."""
    for _ in range(20):
        bound.measured(N_DECODES, 0, 0, cost(N_DECODES, 0, 0))
    steps, done = [], 0
    while done < PROMPT:
        allowance = bound.allowance(N_DECODES)
        assert allowance is not None
        n = min(PROMPT - done, allowance, BUDGET - N_DECODES)
        steps.append((done, n, cost(N_DECODES, n, done)))
        bound.measured(N_DECODES, n, done, steps[-1][2])
        done += n
    return steps


def alone_s(cost: Cost) -> float:
    return sum(cost(0, BUDGET, done) for done in range(0, PROMPT, BUDGET))


@pytest.mark.parametrize("cost", [affine, growing])
def test_gaps_stay_short_and_the_prompt_moves(cost: Cost) -> None:
    steps = beside_decodes(cost, GapBound(2.2))
    assert max(seconds for *_, seconds in steps) < 2.3 * cost(N_DECODES, 0, 0)
    assert sum(seconds for *_, seconds in steps) < 1.85 * alone_s(cost)


def test_the_fixed_point_is_at_the_bound_even_if_the_first_token_is_dear() -> None:
    # Twice the time alone cannot be had: half of each step is the streams', and small chunks are dear.
    steps = beside_decodes(dear_start, GapBound(2.2))
    *_, last = steps[-2]
    assert 2.15 * dear_start(N_DECODES, 0, 0) < last <= 2.2 * dear_start(N_DECODES, 0, 0) + 0.0005 / 2
    assert sum(seconds for *_, seconds in steps) < 2.1 * alone_s(dear_start)


@pytest.mark.parametrize("first_s", [0.016, 0.020])
def test_a_first_token_that_takes_most_of_the_gap_does_not_end_growth(first_s: float) -> None:
    def cost(n_decodes: int, n_prefill: int, context: int) -> float:
        return 0.022 + (first_s + 0.0005 * n_prefill if n_prefill else 0.0)

    *_, last = beside_decodes(cost, GapBound(2.2))[-2]
    assert 2.1 * cost(N_DECODES, 0, 0) < last < 2.22 * cost(N_DECODES, 0, 0)


def test_where_the_least_piece_breaks_the_bound_it_is_computed() -> None:
    steps = beside_decodes(lambda n_decodes, n_prefill, context: 0.020 + 0.030 * bool(n_prefill), GapBound(2.2))
    assert {n for _, n, _ in steps} == {0, GapBound.LEAST}  # nothing where decodes alone are measured


@pytest.mark.parametrize("cost", [affine, growing])
@pytest.mark.parametrize("seed", range(10))
def test_noise_of_a_fifth_is_added_to_the_bound_and_not_multiplied(cost: Cost, seed: int) -> None:
    steps = beside_decodes(noisy(cost, seed), GapBound(2.2))
    usual = cost(N_DECODES, 0, 0)
    planned = [cost(N_DECODES, n, done) / usual for done, n, _ in steps]
    assert max(planned) < 2.7
    assert sum(planned) / len(planned) < 2.4
    assert sum(seconds for *_, seconds in steps) < 2 * alone_s(cost)


def test_there_is_no_bound_without_times_streams_or_limit() -> None:
    bound = GapBound(2.2)
    assert bound.allowance(3) is None
    bound.measured(0, 50, 0, 1.0)
    assert bound.allowance(0) is None
    assert bound.allowance(3) == 0
    off = GapBound(0)
    off.measured(3, 0, 0, 1.0)
    assert off.allowance(3) is None


def test_decodes_alone_are_measured_again_after_a_while_and_for_other_numbers() -> None:
    bound = GapBound(2.2)
    bound.measured(4, 0, 0, 1.0)
    allowances = []
    for _ in range(600):
        allowances.append(bound.allowance(5))
        bound.measured(5, allowances[-1] or 0, 0, 1.0 if not allowances[-1] else 2.0)
    assert allowances.count(0) == 2
    assert bound.allowance(8) == 0


def test_a_stall_is_soon_forgotten() -> None:
    bound = GapBound(2.2)
    beside_decodes(affine, bound)
    usual = bound.allowance(N_DECODES)
    assert usual is not None
    bound.measured(N_DECODES, usual, PROMPT, 5.0)
    for _ in range(5):
        n = bound.allowance(N_DECODES)
        assert n is not None
        assert n >= GapBound.LEAST
        bound.measured(N_DECODES, n, PROMPT, affine(N_DECODES, n, PROMPT))
    assert (bound.allowance(N_DECODES) or 0) > 0.7 * usual


def test_a_prompt_far_behind_what_was_measured_begins_small() -> None:
    bound = GapBound(2.2)
    beside_decodes(affine, bound)
    assert bound.first_allowance(2 * PROMPT) is None
    assert bound.first_allowance(10 * PROMPT) == GapBound.LEAST
    bound.measured(N_DECODES, GapBound.LEAST, 10 * PROMPT, 0.5)
    assert bound.first_allowance(10 * PROMPT) is None
    assert bound.allowance(N_DECODES) == GapBound.LEAST


def per_row(first_s: float) -> Cost:
    """Rows cost as much as prompt tokens, so that the usual times of many and of few differ much."""
    return lambda n_decodes, n_prefill, context: (
        0.010 + 0.002 * n_decodes + (first_s + 0.001 * n_prefill if n_prefill else 0.0)
    )


def ratios(cost: Cost, bound: GapBound, n_decodes: int, n_steps: int) -> list[float]:
    """How many times the usual time each step of a prefill takes."""
    taken = []
    for _ in range(n_steps):
        n_prefill = bound.allowance(n_decodes) or 0
        taken.append(cost(n_decodes, n_prefill, 0) / cost(n_decodes, 0, 0))
        bound.measured(n_decodes, n_prefill, 0, cost(n_decodes, n_prefill, 0))
    return taken


@pytest.mark.parametrize("first_s", [0.0, 0.004])
def test_who_stays_alone_during_a_prefill_waits_no_longer_than_usual(first_s: float) -> None:
    bound, cost = GapBound(2.2), per_row(first_s)
    for n_decodes in (1, 64):
        for _ in range(20):
            bound.measured(n_decodes, 0, 0, cost(n_decodes, 0, 0))
    assert 2.15 < ratios(cost, bound, 64, 40)[-1] < 2.25
    alone = ratios(cost, bound, 1, 10)
    assert max(alone) < 2.25 + first_s / cost(1, 0, 0)
    assert 2.0 < alone[-1] < 2.35
    together = ratios(cost, bound, 64, 20)
    assert max(together) < 2.25
    assert together[-1] > 2.1


@pytest.mark.parametrize("usual_s", [0.0, -1.0, 1e-12])
def test_times_of_a_coarse_clock_are_very_short_ones(usual_s: float) -> None:
    bound = GapBound(2.2)
    bound.measured(1, 0, 0, usual_s)
    bound.measured(1, 8, 0, usual_s)
    assert GapBound.LEAST <= (bound.allowance(1) or 0) <= 2 * GapBound.LEAST


@pytest.mark.parametrize("elapsed_s", [math.nan, math.inf, -math.inf])
def test_times_that_are_not_finite_tell_nothing(elapsed_s: float) -> None:
    bound = GapBound(2.2)
    bound.measured(1, 0, 0, elapsed_s)
    assert bound.allowance(1) is None
    bound.measured(1, 0, 0, 1.0)
    before = vars(bound).copy()
    bound.measured(1, 8, 0, elapsed_s)
    assert vars(bound) == before
