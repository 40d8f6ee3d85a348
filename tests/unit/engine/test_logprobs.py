from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.engine import logprobs
from actors.engine.logprobs import token_logprobs
from actors.engine.request import TokenLogprobs


def reference(row: Tensor, token: int, count: int) -> TokenLogprobs:
    values = row.float().double().tolist()
    total = math.fsum(math.exp(value - max(values)) for value in values)
    logs = [value - max(values) - math.log(total) for value in values]
    ranked = sorted(range(len(values)), key=lambda at: (-values[at], at))
    return TokenLogprobs(logs[token], ranked.index(token) + 1, tuple((at, logs[at]) for at in ranked[:count]))


def assert_same(ours: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert (ours.rank, [token for token, _ in ours.top]) == (expected.rank, [token for token, _ in expected.top])
    assert ours.logprob == pytest.approx(expected.logprob, abs=1e-6)
    assert [value for _, value in ours.top] == pytest.approx([value for _, value in expected.top], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n_vocab", [1, 3, 400])
@pytest.mark.parametrize("grain", [None, 0.5], ids=["smooth", "ties"])
def test_are_those_of_the_plain_softmax(dtype: torch.dtype, n_vocab: int, grain: float | None) -> None:
    rng = np.random.default_rng(n_vocab)
    for scale in (0.0, 1.0, 20.0):
        values = rng.normal(size=(21, n_vocab)) * scale
        logits = torch.tensor(np.round(values / grain) * grain if grain else values).to(dtype)
        tokens, counts = rng.integers(0, n_vocab, 21).tolist(), list(range(21))
        for row, token, count, ours in zip(logits, tokens, counts, token_logprobs(logits, tokens, counts), strict=True):
            assert_same(ours, reference(row, token, count))


def test_equal_logits_rank_by_id_and_zero_has_no_sign() -> None:
    logits = torch.tensor([[-0.0, 1.0, 0.0, 1.0, -1.0, 0.0]])
    assert [token_logprobs(logits, [token], [0])[0].rank for token in range(6)] == [3, 1, 4, 2, 6, 5]
    assert [token for token, _ in token_logprobs(logits, [0], [4])[0].top] == [1, 3, 0, 2]


def test_extreme_logits_rank_and_stay_finite() -> None:
    logits = torch.tensor([[-3e38, 3e38, -1e-45, 1e-45, 2.9e38]])
    (ours,) = token_logprobs(logits, [0], [5])
    assert [token for token, _ in ours.top] == [1, 4, 3, 2, 0]
    assert ours.rank == 5
    assert ours.top[0][1] == 0.0
    assert all(math.isfinite(value) for _, value in ours.top)


def test_small_probabilities_are_accurate() -> None:
    """100,000 equal tokens: fp32 sums would lose the last digits."""
    logits = torch.full((1, 100_001), -10.0)
    logits[0, 7] = 5.0
    (ours,) = token_logprobs(logits, [8], [1])
    total = 1 + 100_000 * math.exp(-15)
    assert ours.logprob == pytest.approx(-15 - math.log(total), abs=2e-7)
    assert ours.top[0][1] == pytest.approx(-math.log(total), abs=2e-7)


def test_probabilities_sum_to_one() -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(2)) * 3
    (ours,) = token_logprobs(logits, [3], [20])
    assert math.fsum(math.exp(value) for _, value in ours.top) == pytest.approx(1, abs=1e-6)
    assert dict(ours.top)[3] == ours.logprob


def test_slices_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(3))
    tokens, counts = list(range(9)), [0, 20, 3] * 3
    whole = token_logprobs(logits, tokens, counts)
    for n_logits in (1, 120):
        monkeypatch.setattr(logprobs, "_SLICE", n_logits)
        assert token_logprobs(logits, tokens, counts) == whole


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    before = logits.clone()
    token_logprobs(logits, [0, 1, 2], [5, 5, 5])
    assert torch.equal(logits, before)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 rows of logits, 2 tokens, 1 counts"):
        token_logprobs(torch.zeros(2, 3), [0, 0], [0])
    assert token_logprobs(torch.zeros(0, 3), [], []) == []
