from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.engine import sampling
from actors.engine.request import Draw, SamplingParams
from actors.engine.sampling import _invert, uniforms

from .reference_sampler import sample_row, shares, uniform


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(logits, params, positions):  # type: ignore[no-untyped-def]
    return sampling.sample(logits, [Draw(*row) for row in zip(params, positions, strict=True)])


def random_params(rng: np.random.Generator, n_vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7])),
        top_p=float(rng.choice([1.0, 0.99, 0.9, 0.5, 0.01])),
        top_k=int(rng.choice([0, 0, 1, 3, 40, n_vocab // 2 + 1, n_vocab - 1, n_vocab, n_vocab + 7])),
        seed=int(rng.integers(2**64, dtype=np.uint64)),
        choice=int(rng.integers(4)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_vocab", [1, 2, 50, 700])
@pytest.mark.parametrize("grain", [None, 0.5], ids=["smooth", "ties"])
def test_draws_what_the_slow_sampler_draws(dtype: torch.dtype, n_vocab: int, grain: float | None) -> None:
    """Flat, peaked and tied logits; 700 tokens need several widenings of the leaders."""
    rng = np.random.default_rng(n_vocab)
    for scale in (0.1, 1.0, 8.0):
        values = rng.normal(size=(25, n_vocab)) * scale
        logits = torch.tensor(np.round(values / grain) * grain if grain else values).to(dtype)
        params = [random_params(rng, n_vocab) for _ in logits]
        positions = [int(position) for position in rng.integers(0, 5000, len(logits))]
        expected = [
            sample_row(row.tolist(), param, position)
            for row, param, position in zip(logits, params, positions, strict=True)
        ]
        assert sample(logits, params, positions) == expected


@pytest.mark.parametrize(
    "param",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.0, top_k=4),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=7),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability(param: SamplingParams) -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(7))
    n = 20_000
    drawn = Counter(sample(logits.expand(n, -1), [replace(param, seed=11)] * n, range(n)))
    expected = {token: share * n for token, share in shares(logits.tolist(), param)}
    assert drawn.keys() <= expected.keys()
    chi2 = sum((drawn[token] - count) ** 2 / count for token, count in expected.items())
    freedom = len(expected) - 1
    # Wilson-Hilferty: chi2 / freedom, cubic root, is nearly normal; 3.7 sigma is p = 1e-4.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.7 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi2 < limit


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 4000)
    logits[1, [17, 900]] = 2.0
    logits[2] = -5.0
    assert sample(logits, [SamplingParams()] * 3, [0, 0, 0]) == [0, 17, 0]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    """Of four equal tokens 0.5 is reached by the first two, 0.51 by three."""
    logits = torch.zeros(200, 4)
    for top_p, kept in ((0.5, {0, 1}), (0.51, {0, 1, 2}), (0.0001, {0})):
        params = [SamplingParams(temperature=1.0, top_p=top_p, seed=1)] * 200
        assert set(sample(logits, params, range(200))) == kept


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(300, -1)
    params = [SamplingParams(temperature=1.0, top_k=2, top_p=0.55, seed=1)] * 300
    # 0.4 / 0.7 = 0.571 reaches 0.55; of the whole, 0.4 would not.
    assert set(sample(logits, params, range(300))) == {0}


def test_extreme_temperatures_and_logits_stay_in_range() -> None:
    logits = torch.tensor([[3e38, -3e38, 2.9e38]] * 4)
    params = [SamplingParams(temperature=t, seed=5) for t in (1e-300, 1e-5, 1.0, 2.0)]
    assert sample(logits, params, [0, 1, 2, 3]) == [0, 0, 0, 0]
    hot = [SamplingParams(temperature=1e300, seed=5, top_p=p) for p in (1.0, 0.99)]
    assert set(sample(logits[:2], hot, [0, 1])) <= {0, 1, 2}


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    rng = np.random.default_rng(3)
    logits = torch.tensor(rng.normal(size=(64, 600)) * 2, dtype=torch.float32)
    params = [random_params(rng, 600) for _ in range(64)]
    together = sample(logits, params, range(64))
    order = rng.permutation(64).tolist()
    shuffled = sample(logits[order], [params[row] for row in order], order)
    alone = [sample(logits[row : row + 1], [params[row]], [row])[0] for row in range(64)]
    assert together == alone
    assert shuffled == [together[row] for row in order]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token_and_harms_no_other(bad: float, temperature: float) -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=temperature, seed=9, top_p=p) for p in (1.0, 0.9, 1.0, 0.9)]
    good = sample(logits, params, range(4))
    broken = logits.clone()
    broken[1, 299] = bad
    broken[2, 0] = bad
    assert sample(broken, params, range(4)) == [good[0], None, None, good[3]]


def test_the_inverse_cdf_never_takes_a_token_without_mass() -> None:
    last = 1 - 2.0**-53
    masses = torch.tensor([[0.0, 0.0, 1.0, 0.4, 0.0]], dtype=torch.float64)
    for uniform_, token in ((0.0, 2), (0.71, 2), (0.72, 3), (last, 3)):
        at = _invert(masses.cumsum(1), torch.tensor([[uniform_]], dtype=torch.float64))
        assert at.tolist() == [[token]]
    halves = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert _invert(halves, torch.tensor([[0.5]], dtype=torch.float64)).tolist() == [[1]]


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 rows of logits, 1 draws"):
        sample(torch.zeros(2, 3), [SamplingParams()], [0])
    assert sample(torch.zeros(0, 3), [], []) == []


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(3, 40, dtype=torch.float64)
    before = logits.clone()
    sample(logits, [SamplingParams(temperature=0.5, top_p=p) for p in (1.0, 0.5, 0.2)], range(3))
    assert torch.equal(logits, before)


def test_uniforms_are_philox_at_seed_choice_and_position() -> None:
    params = [SamplingParams(seed=s, choice=c) for s in (0, 7, 2**64 - 1) for c in (0, 1)] * 3
    positions = [position for position in (0, 1, 2**20) for _ in range(6)]
    expected = [uniform(param, position) for param, position in zip(params, positions, strict=True)]
    assert uniforms(params, positions).tolist() == expected
    assert len(set(expected)) == len(expected)


def test_uniforms_of_neighbours_are_independent() -> None:
    """Consecutive positions, seeds and choices: even spread, no correlation from one to the next."""
    n = 5000
    for params, positions in (
        ([SamplingParams(seed=1)] * n, range(n)),
        ([SamplingParams(seed=seed) for seed in range(n)], [0] * n),
        ([SamplingParams(choice=choice) for choice in range(n)], [3] * n),
    ):
        values = uniforms(params, positions)
        assert values.min() >= 0
        assert values.max() < 1
        counts, _ = np.histogram(values, bins=20, range=(0, 1))
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / n**0.5
