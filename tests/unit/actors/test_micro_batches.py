"""How many micro-batches are chosen, on fleets that are formulas."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from actors.micro_batches import MARGIN, MIN_ROWS, MOST, PAUSE, TRIAL, MicroBatchTuner, StepTimes

Cost = Callable[[int, int], float]
ROWS = 64
A, E, C = 0.010, 0.008, 0.001
"""T_a, T_e, T_c of a step of ROWS rows."""


def separate(rows: int, m: int) -> float:
    """Fleets on machines of their own: the slower one's work, or the way of one micro-batch through both."""
    share = rows / ROWS
    return max(A * share, E * share, (A + E) * share / m + 2 * C)


def shared(rows: int, m: int) -> float:
    """The same cores compute both, and each micro-batch reads the weights anew."""
    return (A + E) * rows / ROWS + 0.002 * (m - 1) + 2 * C


def run(
    tuner: MicroBatchTuner, cost: Cost, steps: int, rows: int = ROWS, noise: random.Random | None = None
) -> list[int]:
    """What is chosen in each of so many steps."""
    chosen = []
    for _ in range(steps):
        m = tuner.choose(rows)
        jitter = noise.lognormvariate(0, 0.1) if noise else 1.0
        share = rows / ROWS
        tuner.observe(rows, m, cost(rows, m) * jitter, A * share * jitter, E * share * jitter, C * jitter)
        chosen.append(m)
    return chosen


def share(chosen: list[int], m: int) -> float:
    return chosen.count(m) / len(chosen)


def test_separate_fleets_are_kept_busy_after_a_few_steps() -> None:
    chosen = run(MicroBatchTuner(0), separate, 2000)
    assert chosen[:8] == [1] * 8
    assert chosen[8:24] == [3] * 16  # ceil(2 (1 + 1 / 10)): tried, and at once kept
    assert share(chosen[1000:], 3) > 0.98


def test_on_shared_cores_splitting_is_tried_and_given_up() -> None:
    chosen = run(MicroBatchTuner(0), shared, 5000)
    assert {m for m in chosen if m > 1} == {2, 3}
    assert share(chosen, 1) > 0.97
    assert share(chosen[1000:], 1) >= 1 - 1 / 50


@pytest.mark.parametrize("cost", [separate, shared])
@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_tenth_costs_little(cost: Cost, seed: int) -> None:
    """What is lost beside knowing the best: trials, and choices that noise made."""
    chosen = run(MicroBatchTuner(0), cost, 6000, noise=random.Random(seed))
    best = min(cost(ROWS, m) for m in range(1, MOST + 1))
    lost = sum(cost(ROWS, m) for m in chosen) / len(chosen) / best - 1
    assert lost < 0.07  # a number within the margin of the best may stay for a while


def test_when_conditions_change_so_does_the_choice() -> None:
    """Each other number is tried within MOST - 1 trials."""
    tuner = MicroBatchTuner(0)
    bound = (MOST - 1) * (PAUSE + TRIAL)
    run(tuner, separate, 2000)
    assert tuner.choose(ROWS) == 3
    run(tuner, shared, bound)
    assert share(run(tuner, shared, 2000), 1) > 0.97
    run(tuner, separate, bound)
    assert share(run(tuner, separate, 2000), 3) > 0.95


def test_each_size_of_step_is_learned_for_itself() -> None:
    tuner = MicroBatchTuner(0)

    def cost(rows: int, m: int) -> float:
        return separate(rows, m) if rows >= 64 else shared(rows, m)

    for _ in range(1000):
        run(tuner, cost, 1, 40)
        run(tuner, cost, 1, 100)
    assert share(run(tuner, cost, 1000, 40), 1) > 0.97
    assert share(run(tuner, cost, 1000, 100), 2) > 0.97  # a third would save only 3 %
    assert tuner.choose(127) == tuner.choose(64) > 1
    assert tuner.choose(128) == 1


@pytest.mark.parametrize(("rows", "most"), [(1, 1), (MIN_ROWS, 1), (2 * MIN_ROWS - 1, 1), (2 * MIN_ROWS, 2), (31, 2)])
def test_micro_batches_of_few_rows_are_not_tried(rows: int, most: int) -> None:
    assert max(run(MicroBatchTuner(0), separate, 500, rows)) <= most
    assert max(run(MicroBatchTuner(0), lambda _, m: 1.0 / m, 500, rows)) == most


@pytest.mark.parametrize(("most", "rows", "m"), [(1, 100, 1), (3, 100, 3), (3, 2, 2), (9, 100, 9), (2, 1, 1)])
def test_a_fixed_number_stays_as_far_as_rows_allow(most: int, rows: int, m: int) -> None:
    assert set(run(MicroBatchTuner(most), separate, 50, rows)) == {m}
    assert set(run(MicroBatchTuner(most), shared, 50, rows)) == {m}


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="most is -1; allowed is 0"):
        MicroBatchTuner(-1)


def test_looking_changes_nothing() -> None:
    looked, plain = MicroBatchTuner(0), MicroBatchTuner(0)
    for _ in range(300):
        for _ in range(7):
            looked.choose(ROWS)
        assert run(looked, separate, 1) == run(plain, separate, 1)


@pytest.mark.parametrize(
    ("times", "m"),
    [
        ((1.0, 1.0, 0.0), 2),
        ((1.0, 1.0, 0.1), 3),
        ((1.0, 1.0, 0.5), 3),
        ((1.0, 1.0, 0.6), 4),
        ((1.0, 1.0, 9.0), 4),
        ((1.0, 1.0, 19.0), 1),  # nearly all of it is latency, which no splitting hides
        ((0.02, 1.0, 0.001), 1),  # the experts are busy anyway
        ((1.0, 0.02, 0.001), 1),
        ((1.0, 0.2, 0.0), 2),
        ((0.0, 0.0, 1.0), 1),
    ],
)
def test_what_the_papers_formula_wants(times: tuple[float, float, float], m: int) -> None:
    assert StepTimes(*times).wanted(MOST) == m
    assert StepTimes(*times).wanted(1) == 1


def test_a_gain_within_the_margin_is_none() -> None:
    def barely(rows: int, m: int) -> float:
        return 1.0 if m == 1 else 1.0 - 0.9 * MARGIN

    assert share(run(MicroBatchTuner(0), barely, 2000), 1) > 0.95


def test_times_of_split_steps_are_not_learned() -> None:
    """Several batches in flight wait for each other, which looks like long transfers."""
    tuner, chosen = MicroBatchTuner(0), set()
    for _ in range(3000):
        m = tuner.choose(ROWS)
        chosen.add(m)
        tuner.observe(ROWS, m, separate(ROWS, m), A, E, C if m == 1 else 10 * C)
    assert (tuner.choose(ROWS), chosen) == (3, {1, 2, 3})
