from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from actors.engine import inverse_cdf, sampling
from actors.engine.request import Draw, SamplingParams
from actors.engine.sampling import sample

from .reference_sampler import processed, sample_row, shares

GREEDY = Draw(SamplingParams(), 0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_cut(rng: np.random.Generator, n_vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7])),
        top_p=float(rng.choice([1.0, 0.99, 0.9, 0.5, 0.01])),
        top_k=int(rng.choice([0, 0, 1, 3, 40, n_vocab // 2 + 1, n_vocab - 1, n_vocab, n_vocab + 7])),
        min_p=float(rng.choice([0.0, 0.0, 0.0, 0.001, 0.1, 0.9])),
        seed=int(rng.integers(2**64, dtype=np.uint64)),
        choice=int(rng.integers(4)),
    )


def random_draw(rng: np.random.Generator, n_vocab: int) -> Draw:
    """Each parameter is set now and then; masks may leave nothing."""

    def now_and_then(values: Sequence[float], otherwise: float) -> float:
        return float(rng.choice(values)) if rng.random() < 0.4 else otherwise

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, n_vocab, rng.integers(most + 1)).tolist()) if rng.random() < 0.4 else ()

    param = replace(
        random_cut(rng, n_vocab),
        repetition_penalty=now_and_then((0.7, 1.1, 2.0), 1.0),
        presence_penalty=now_and_then((-1.0, 0.3, 2.0), 0.0),
        frequency_penalty=now_and_then((-0.5, 0.1, 2.0), 0.0),
        logit_bias=tuple((token, float(rng.normal() * 5)) for token in dict.fromkeys(ids(5))),
        allowed_ids=ids(n_vocab),
        banned_ids=ids(n_vocab // 3 + 1),
    )
    answer = tuple(rng.integers(0, n_vocab, rng.integers(2 * n_vocab)).tolist())
    prompt = tuple(rng.integers(0, n_vocab, rng.integers(n_vocab + 1)).tolist())
    return Draw(param, len(answer), frozenset(ids(3)), prompt, answer)


def random_logits(rng: np.random.Generator, n: int, n_vocab: int, grain: float | None, scale: float) -> Tensor:
    values = rng.normal(size=(n, n_vocab)) * scale
    return torch.tensor(np.round(values / grain) * grain if grain else values)


def as_numpy(row: Tensor) -> np.ndarray:
    return (row if row.dtype == torch.float64 else row.float()).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n_vocab", [1, 2, 50, 700])
@pytest.mark.parametrize("grain", [None, 0.5], ids=["smooth", "ties"])
def test_draws_what_the_slow_sampler_draws(dtype: torch.dtype, n_vocab: int, grain: float | None) -> None:
    """Flat, peaked and tied logits; 700 tokens need several widenings of the leaders."""
    rng = np.random.default_rng(n_vocab)
    for scale in (0.1, 1.0, 8.0):
        logits = random_logits(rng, 40, n_vocab, grain, scale).to(dtype)
        cuts = [Draw(random_cut(rng, n_vocab), int(index)) for index in rng.integers(0, 5000, 20)]
        draws = cuts + [random_draw(rng, n_vocab) for _ in range(20)]
        assert sample(logits, draws) == [sample_row(as_numpy(row), at) for row, at in zip(logits, draws, strict=True)]


def test_the_random_draws_set_every_parameter() -> None:
    rng = np.random.default_rng(50)
    draws = [random_draw(rng, 50) for _ in range(60)]
    for name in SamplingParams.__dataclass_fields__.keys() - {"min_tokens", "logprobs"}:
        assert len({getattr(draw.sampling, name) for draw in draws}) > 1, name


def tokens_at(points: Sequence[float], logits: Tensor, draw: Draw, patch: pytest.MonkeyPatch) -> list[int | None]:
    """What ``draw`` takes from ``logits`` [V] when its uniform number is each of ``points``."""
    patch.setattr(inverse_cdf, "uniforms", lambda draws: np.array(points))
    return sample(logits.expand(len(points), -1), [draw] * len(points))


@pytest.mark.parametrize("grain", [None, 0.5], ids=["smooth", "ties"])
def test_what_is_kept_and_its_probabilities_are_exact(grain: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniforms just before and behind each border of the cumulative distribution find the tokens on both sides."""
    rng, n_checked = np.random.default_rng(5), 0
    for _ in range(300):
        logits = random_logits(rng, 1, 30, grain, 2.0)[0].float()
        draw = random_draw(rng, 30)
        values = processed(logits.numpy(), draw)
        if draw.sampling.temperature == 0 or values.max() == -np.inf:
            continue
        tokens, masses = map(np.array, zip(*shares(values.tolist(), draw.sampling), strict=True))
        ends = np.cumsum(masses)
        large = masses > 1e-11
        for points in (ends - masses + 1e-12, ends - 1e-12):
            assert tokens_at(points[large].tolist(), logits, draw, monkeypatch) == tokens[large].tolist()
        n_checked += large.sum()
    assert n_checked > 500


@pytest.mark.parametrize(
    "param",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=9),
        SamplingParams(temperature=1.4, top_p=0.8),
        SamplingParams(temperature=1.4, min_p=0.1),
        SamplingParams(temperature=2.0, min_p=0.05, top_k=12, top_p=0.9),
    ],
    ids=str,
)
def test_what_is_kept_is_what_transformers_keeps(param: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [TemperatureLogitsWarper(param.temperature), MinPLogitsWarper(param.min_p)]
    steps += [TopKLogitsWarper(param.top_k or 40), TopPLogitsWarper(param.top_p)]
    is_cut = param != SamplingParams(temperature=param.temperature)
    for seed in range(20):
        logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
        left = logits
        for step in steps:
            left = step(None, left)
        order = left[0].argsort(descending=True) if is_cut else torch.arange(40)
        probabilities = left[0].softmax(-1)[order]
        kept = probabilities > 1e-8
        middles = (probabilities.cumsum(0) - probabilities / 2)[kept].tolist()
        assert tokens_at(middles, logits[0], Draw(param, 0), monkeypatch) == order[kept].tolist()


@pytest.mark.parametrize(
    "param",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.0, top_k=4),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=7),
        SamplingParams(temperature=1.5, min_p=0.2),
        SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3),
        SamplingParams(temperature=1.2, frequency_penalty=-0.4, min_p=0.05, top_p=0.95),
        SamplingParams(temperature=1.0, logit_bias=((2, 1.5), (5, -3.0)), banned_ids=(0, 1)),
        SamplingParams(temperature=0.9, allowed_ids=(3, 4, 8, 9), top_k=3),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability(param: SamplingParams) -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(7))
    n, answer = 20_000, (4, 4, 8, 4, 0)
    draws = [Draw(replace(param, seed=seed), len(answer), frozenset(), (3, 4), answer) for seed in range(n)]
    drawn = Counter(sample(logits.expand(n, -1), draws))
    values = processed(logits.numpy(), draws[0])
    expected = {token: share * n for token, share in shares(values.tolist(), param)}
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
    assert sample(logits, [GREEDY] * 3) == [0, 17, 0]


def test_greedy_takes_the_best_of_the_processed_logits() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(6, -1)
    draws = [
        Draw(SamplingParams(banned_ids=(0,)), 0),
        Draw(SamplingParams(), 0, held_back=frozenset({0, 1})),
        Draw(SamplingParams(allowed_ids=(3,)), 0),
        Draw(SamplingParams(logit_bias=((3, 4.0),)), 0),
        Draw(SamplingParams(repetition_penalty=2.0), 1, prompt_ids=(0,), generated_ids=(1,)),
        Draw(SamplingParams(frequency_penalty=1.0, presence_penalty=0.5), 2, generated_ids=(0, 0)),
    ]
    assert sample(logits, draws) == [1, 2, 3, 3, 0, 1]


def test_penalties_come_after_the_bias() -> None:
    """(-1 + 5) / 2 = 2; the other way round it would be -1 * 2 + 5 = 3."""
    param = SamplingParams(logit_bias=((0, 5.0),), repetition_penalty=2.0)
    assert sample(torch.tensor([[-1.0, 2.5]]), [Draw(param, 0, prompt_ids=(0,))]) == [1]
    assert sample(torch.tensor([[-1.0, 1.5]]), [Draw(param, 0, prompt_ids=(0,))]) == [0]


def test_choices_of_one_seed_differ_and_come_again() -> None:
    logits = torch.zeros(1, 1000).expand(8, -1)
    draws = [Draw(SamplingParams(temperature=1.0, seed=3, choice=choice), 5) for choice in range(8)]
    first = sample(logits, draws)
    assert len(set(first)) == 8
    assert sample(logits, draws) == first


def test_a_row_does_not_depend_on_its_batch_mates(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    logits = torch.tensor(rng.normal(size=(64, 600)) * 2, dtype=torch.float32)
    draws = [random_draw(rng, 600) for _ in range(64)]
    together = sample(logits, draws)
    order = rng.permutation(64).tolist()
    alone = [sample(logits[row : row + 1], [draws[row]])[0] for row in range(64)]
    assert together == alone
    assert sample(logits[order], [draws[row] for row in order]) == [together[row] for row in order]
    for n_logits in (1, 7 * 600):
        monkeypatch.setattr(sampling, "_SLICE", n_logits)
        assert sample(logits, draws) == together


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("banned", [(), (299, 0)], ids=["plain", "banned"])
def test_a_row_that_is_not_finite_has_no_token_and_harms_no_other(
    bad: float, temperature: float, banned: tuple[int, ...]
) -> None:
    """Not even when just the tokens with such logits are banned."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=temperature, seed=9, top_p=p, banned_ids=banned) for p in (1.0, 0.9) * 2]
    draws = [Draw(param, index) for index, param in enumerate(params)]
    good = sample(logits, draws)
    broken = logits.clone()
    broken[1, 299] = bad
    broken[2, 0] = bad
    assert sample(broken, draws) == [good[0], None, None, good[3]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_in_which_no_token_may_come_has_none(temperature: float) -> None:
    param = SamplingParams(temperature=temperature, allowed_ids=(2,), banned_ids=(2,), top_k=2)
    draws = [Draw(replace(param, banned_ids=()), 0), Draw(param, 0), Draw(SamplingParams(temperature=temperature), 0)]
    logits = torch.tensor([9.0, 0.0, 0.0]).mul(100).expand(3, -1)
    assert sample(logits, draws) == [2, None, 0]


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([3e38, 3e38, -3e38]).expand(4, -1)
    params = [SamplingParams(temperature=t, repetition_penalty=r) for t in (0.0, 1.0) for r in (0.5, 2.0)]
    draws = [Draw(replace(param, top_p=0.9), 0, prompt_ids=(0, 2)) for param in params]
    assert sample(logits, draws) == [0, 1, 0, 1]


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 rows of logits, 1 draws"):
        sample(torch.zeros(2, 3), [GREEDY])
    assert sample(torch.zeros(0, 3), []) == []


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="held_back: token id 3, allowed are 0 to 2"):
        sample(torch.zeros(1, 3), [Draw(SamplingParams(), 0, held_back=frozenset({3}))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_left_as_they_were(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(4)
    logits = torch.randn(60, 40, dtype=torch.float64).to(dtype)
    before = logits.clone()
    sample(logits, [random_draw(rng, 40) for _ in range(60)])
    assert torch.equal(logits, before)
