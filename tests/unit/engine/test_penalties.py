from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from actors.engine.penalties import add_bias, penalise_count, penalise_repetition
from actors.engine.request import Draw, SamplingParams


def draw(prompt: tuple[int, ...] = (), generated: tuple[int, ...] = (), **params: object) -> Draw:
    return Draw(SamplingParams(**params), len(generated), prompt_ids=prompt, generated_ids=generated)  # type: ignore[arg-type]


def test_bias_is_added_in_its_row() -> None:
    logits = torch.zeros(3, 4)
    add_bias(logits, [draw(logit_bias=((1, 2.5), (3, -100.0))), draw(), draw(logit_bias=((0, 1.0), (0, 0.5)))])
    assert logits.tolist() == [[0, 2.5, 0, -100], [0, 0, 0, 0], [1.5, 0, 0, 0]]


def test_repetition_divides_positive_and_multiplies_negative_logits_once() -> None:
    logits = torch.tensor([[3.0, -3.0, 0.0, 4.0, -4.0]]).repeat(3, 1)
    draws = [
        draw(prompt=(0, 0, 1), generated=(0, 2), repetition_penalty=2.0),
        draw(prompt=(0, 1), generated=(3,)),
        draw(generated=(3, 4), repetition_penalty=0.5),
    ]
    penalise_repetition(logits, draws)
    assert logits.tolist() == [[1.5, -6, 0, 4, -4], [3, -3, 0, 4, -4], [3, -3, 0, 8, -2]]


def test_repetition_is_that_of_transformers_bit_by_bit() -> None:
    rng = np.random.default_rng(2)
    logits = torch.tensor(rng.normal(size=(8, 300)) * 5, dtype=torch.float32)
    seen = rng.integers(0, 300, (8, 90))
    for penalty in (0.7, 1.1, 1.35):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(seen), logits)
        rows = [draw(tuple(row[:50].tolist()), tuple(row[50:].tolist()), repetition_penalty=penalty) for row in seen]
        ours = logits.clone()
        penalise_repetition(ours, rows)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("penalty", [0.5, 2.0])
def test_logits_that_repetition_makes_larger_stay_finite(penalty: float) -> None:
    logits = torch.tensor([[3e38, -3e38]])
    penalise_repetition(logits, [draw(prompt=(0, 1), repetition_penalty=penalty)])
    assert logits.isfinite().all()


def test_counts_are_of_the_answer_alone() -> None:
    logits = torch.zeros(4, 5)
    history = {"prompt": (4, 4), "generated": (2, 0, 2, 2)}
    draws = [
        draw(**history, frequency_penalty=0.5),
        draw(**history, presence_penalty=1.0),
        draw(**history),
        draw(**history, frequency_penalty=-1.0, presence_penalty=0.25),
    ]
    penalise_count(logits, draws)
    assert logits.tolist() == [[-0.5, 0, -1.5, 0, 0], [-1, 0, -1, 0, 0], [0] * 5, [0.75, 0, 2.75, 0, 0]]


def test_where_nothing_came_nothing_changes() -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    draws = [draw(repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=1.0), draw(prompt=(1,))]
    for change in (add_bias, penalise_repetition, penalise_count):
        change(logits, draws)
    assert torch.equal(logits, before)
