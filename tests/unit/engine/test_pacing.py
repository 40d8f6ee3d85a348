from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from actors.engine.pacing import GapBound
from actors.engine.plan import Pace

Cost = Callable[[int, int], float]  # seconds of a layer by rows and tokens before them

N_DECODES, PROMPT, BUDGET, LAYERS, USUAL = 8, 4096, 512, 30, 0.060


def even(rows: int, context: int) -> float:
    return 0.0001 * rows


def growing(rows: int, context: int) -> float:
    return 0.00005 * rows * (1 + context / 2048)


def dear_start(rows: int, context: int) -> float:
    """A layer's weights are read: as dear as 40 rows."""
    return 0.0001 * (40 + rows)


@dataclass
class Beside:
    """A prompt beside decodes, computed as ``prefill_pieces`` does: (rows, context) of each piece, seconds of each
    step."""

    cost: Cost
    bound: GapBound = field(default_factory=lambda: GapBound(2.2, LAYERS))
    usual_s: float = USUAL
    noise: Callable[[], float] = lambda: 1.0
    pieces: list[tuple[int, int]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def decode(self, n_steps: int = 20) -> None:
        for _ in range(n_steps):
            self.bound.measured_alone(N_DECODES, self.usual_s * self.noise())

    def run(self, prompt: int = PROMPT, context: int = 0) -> Beside:
        left, rows, layer = prompt, 0, 0
        while left or rows:
            pace = self.bound.pace(N_DECODES)
            assert pace is not None
            if not pace.limit_s:
                self.decode(1)
                continue
            elapsed_s, passes, first = self.usual_s * self.noise(), 0.0, 0
            while left or rows:
                if not rows:
                    rows, layer = min(left, self.bound.rows(pace, context), BUDGET), 0
                    left -= rows
                    self.pieces.append((rows, context))
                first = first or rows
                if passes and not pace.allows(elapsed_s, 1.0, 0.0, rows * pace.row_s / LAYERS):
                    break
                elapsed_s += self.cost(rows, context) * self.noise()
                passes += rows / LAYERS
                layer += 1
                if layer == LAYERS:
                    context += rows
                    rows = 0
            self.bound.measured_beside(pace, N_DECODES, first, passes, context, elapsed_s)
            self.steps.append(elapsed_s)
        return self

    @property
    def alone_s(self) -> float:
        return sum(LAYERS * self.cost(BUDGET, done) for done in range(0, PROMPT, BUDGET))


@pytest.fixture
def bound() -> GapBound:
    return GapBound(2.2, LAYERS)


@pytest.mark.parametrize(
    ("cost", "dearer"), [(even, 1.0), (growing, 1.0), (dear_start, (40 / GapBound.ENOUGH + 1) / (40 / 512 + 1))]
)
def test_gaps_stay_short_and_the_prompt_moves(cost: Cost, dearer: float) -> None:
    """At best a prompt takes 2.2 / 1.2 times as long as alone: the rest of each step is the streams'. Its pieces are
    smaller than those of a prompt alone, and so much dearer."""
    beside = Beside(cost)
    beside.decode()
    beside.run()
    assert max(beside.steps) < 2.5 * USUAL
    assert sum(beside.steps) < 2.05 * dearer * beside.alone_s
    assert sum(beside.steps) / len(beside.steps) == pytest.approx(2.2 * USUAL, rel=0.05)


@pytest.mark.parametrize("seed", range(10))
def test_what_disturbs_the_decodes_is_made_up_for(seed: int) -> None:
    rng = random.Random(seed)
    beside = Beside(even, noise=lambda: rng.uniform(0.8, 1.2))
    beside.decode()
    beside.run()
    assert max(beside.steps) < 2.6 * USUAL
    assert sum(beside.steps) < 2.1 * beside.alone_s


def test_a_heavy_model_has_pieces_that_pass_through_a_layer_or_two_in_a_step() -> None:
    def cost(rows: int, context: int) -> float:
        return 0.010 + 0.0005 * rows

    beside = Beside(cost)
    beside.decode()
    beside.run()
    rows = beside.pieces[-2][0]
    assert 1 <= 1.2 * USUAL / cost(rows, 0) < 2
    assert max(beside.steps) < 2.5 * USUAL


def test_where_a_layer_of_the_least_piece_breaks_the_bound_it_moves_by_one(bound: GapBound) -> None:
    beside = Beside(lambda rows, context: 0.200, bound)
    beside.decode()
    beside.run(2 * GapBound.LEAST)
    assert beside.pieces == [(GapBound.LEAST, 0), (GapBound.LEAST, GapBound.LEAST)]
    assert beside.steps == [pytest.approx(USUAL + 0.200)] * (2 * LAYERS)


def test_pieces_grow_as_they_are_measured_up_to_what_is_enough(bound: GapBound) -> None:
    beside = Beside(lambda rows, context: 0.0002 * rows, bound)
    beside.decode()
    beside.run()
    rows = [rows for rows, _ in beside.pieces[:-1]]
    assert rows[0] == GapBound.LEAST
    assert all(after <= 4 * before for before, after in pairwise(rows))
    assert max(rows) == GapBound.ENOUGH


def test_where_layers_take_little_time_pieces_are_larger(bound: GapBound) -> None:
    beside = Beside(lambda rows, context: 0.00001 * rows, bound)
    beside.decode()
    beside.run()
    assert max(rows for rows, _ in beside.pieces) == BUDGET


def test_a_model_that_cannot_be_cut_has_pieces_of_one_step() -> None:
    bound = GapBound(2.2)
    bound.measured_alone(N_DECODES, 0.020)
    for _ in range(20):
        pace = bound.pace(N_DECODES)
        assert pace is not None
        rows = bound.rows(pace, 0)
        bound.measured_beside(pace, N_DECODES, rows, rows, 0, 0.020 + 0.001 * rows)
    assert rows == 24  # 1.2 * 20 ms at 1 ms a row


def test_there_is_no_bound_without_times_streams_or_limit(bound: GapBound) -> None:
    assert bound.pace(3) is None
    bound.measured_alone(0, 1.0)
    assert bound.pace(0) is None
    assert bound.pace(3) == Pace(0.0, 0.0)
    off = GapBound(0)
    off.measured_alone(3, 1.0)
    assert off.pace(3) is None


def test_decodes_alone_are_measured_again_after_a_while_and_for_other_numbers(bound: GapBound) -> None:
    bound.measured_alone(4, 1.0)
    left_out = 0
    for _ in range(600):
        pace = bound.pace(5)
        assert pace is not None
        if pace.limit_s:
            bound.measured_beside(pace, 5, 8, 8, 0, 2.0)
        else:
            left_out += 1
            bound.measured_alone(5, 1.0)
    assert left_out == 2
    assert bound.pace(8) == Pace(0.0, 0.0)


def test_a_stall_is_soon_forgotten(bound: GapBound) -> None:
    beside = Beside(even, bound)
    beside.decode()
    beside.run()
    before = bound.pace(N_DECODES)
    assert before is not None
    bound.measured_beside(before, N_DECODES, 128, 64.0, PROMPT, 5.0)
    bound.measured_alone(N_DECODES, 5.0)
    after = bound.pace(N_DECODES)
    assert after is not None
    assert after.limit_s == before.limit_s
    assert after.row_s == pytest.approx(before.row_s, rel=0.1)


def test_a_prompt_far_behind_what_was_measured_begins_small(bound: GapBound) -> None:
    beside = Beside(growing, bound)
    beside.decode()
    beside.run()
    pace = bound.pace(N_DECODES)
    assert pace is not None
    assert bound.rows(pace, 2 * PROMPT) > GapBound.LEAST
    assert bound.rows(pace, 10 * PROMPT) == GapBound.LEAST
    beside.pieces.clear()
    beside.run(context=10 * PROMPT)
    assert beside.pieces[0] == (GapBound.LEAST, 10 * PROMPT)
    assert max(rows for rows, _ in beside.pieces) > GapBound.LEAST


def test_streams_that_end_leave_less_time(bound: GapBound) -> None:
    bound.measured_alone(1, 0.010)
    bound.measured_alone(64, 0.100)
    many, one = bound.pace(64), bound.pace(1)
    assert many == Pace(pytest.approx(0.220), 0.100)
    assert one == Pace(pytest.approx(0.022), 0.010)


@pytest.mark.parametrize("usual_s", [0.0, -1.0, 1e-12])
def test_times_of_a_coarse_clock_are_very_short_ones(bound: GapBound, usual_s: float) -> None:
    bound.measured_alone(1, usual_s)
    pace = bound.pace(1)
    assert pace is not None
    bound.measured_beside(pace, 1, 8, 8, 0, usual_s)
    pace = bound.pace(1)
    assert pace is not None
    assert GapBound.LEAST <= bound.rows(pace, 0) <= 4 * GapBound.LEAST


@pytest.mark.parametrize("elapsed_s", [math.nan, math.inf, -math.inf])
def test_times_that_are_not_finite_tell_nothing(bound: GapBound, elapsed_s: float) -> None:
    bound.measured_alone(1, elapsed_s)
    assert bound.pace(1) is None
    bound.measured_alone(1, 1.0)
    pace = bound.pace(1)
    assert pace is not None
    bound.measured_beside(pace, 1, 8, 8, 0, elapsed_s)
    assert bound.pace(1) == pace
    assert bound.rows(pace, 0) == GapBound.LEAST


def test_the_time_of_pieces_is_spread_over_a_step() -> None:
    pace = Pace(limit_s=0.2, usual_s=0.1, row_s=0.0)
    assert not pace.allows(0.0, 0.0, 0.1, 0.0)
    assert pace.allows(0.099, 0.5, 0.05, 0.0)
    assert not pace.allows(0.101, 0.5, 0.05, 0.0)
    assert pace.allows(0.189, 1.0, 0.01, 0.0)
    assert not pace.allows(0.191, 1.0, 0.01, 0.0)
    assert not pace.allows(0.189, 1.0, 0.01, 0.01)


def test_what_pieces_took_apart_is_not_guessed_from_decodes_that_took_longer(bound: GapBound) -> None:
    bound.measured_alone(N_DECODES, USUAL)
    pace = bound.pace(N_DECODES)
    assert pace is not None
    bound.measured_beside(pace, N_DECODES, 64, 16.0, 0, elapsed_s=2 * USUAL, apart_s=0.040)
    now = bound.pace(N_DECODES)
    assert now is not None
    assert now.row_s == pytest.approx(0.040 / 16)
