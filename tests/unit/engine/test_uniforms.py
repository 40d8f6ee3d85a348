from __future__ import annotations

import numpy as np

from actors.engine.request import Draw, SamplingParams
from actors.engine.uniforms import uniforms

from .reference_sampler import uniform


def test_they_are_philox_at_seed_choice_and_index() -> None:
    params = [SamplingParams(seed=s, choice=c) for s in (0, 7, 2**64 - 1) for c in (0, 1)]
    draws = [Draw(param, index) for index in (0, 1, 2**20) for param in params]
    expected = [uniform(draw) for draw in draws]
    assert uniforms(draws).tolist() == expected
    assert len(set(expected)) == len(expected)


def test_those_of_neighbours_are_independent() -> None:
    """Consecutive indices, seeds and choices: even spread, no correlation from one to the next."""
    n = 5000
    for draws in (
        [Draw(SamplingParams(seed=1), index) for index in range(n)],
        [Draw(SamplingParams(seed=seed), 0) for seed in range(n)],
        [Draw(SamplingParams(choice=choice), 3) for choice in range(n)],
    ):
        values = uniforms(draws)
        assert values.min() >= 0
        assert values.max() < 1
        counts, _ = np.histogram(values, bins=20, range=(0, 1))
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / n**0.5
