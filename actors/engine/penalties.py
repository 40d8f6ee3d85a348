"""What is added to and taken from the logits of single tokens before a draw, in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.engine.cells import cells
from actors.engine.request import Draw


def add_bias(logits: Tensor, draws: Sequence[Draw]) -> None:
    """Adds each draw's ``logit_bias`` to its row of ``logits [R, V]``; an id that stands there twice gets both."""
    biases = [draw.sampling.logit_bias for draw in draws]
    where = cells("logit_bias", [[token for token, _ in bias] for bias in biases], logits.shape[-1])
    amounts = logits.new_tensor([amount for bias in biases for _, amount in bias])
    logits.view(-1).index_add_(0, torch.from_numpy(where).to(logits.device), amounts)


def penalise_repetition(logits: Tensor, draws: Sequence[Draw]) -> None:
    """Makes tokens of prompt and answer less likely (penalty > 1) or more (< 1): positive logits are divided by the
    ``repetition_penalty``, others multiplied by it. ``logits [R, V]`` stay finite.

    Source: Keskar et al., "CTRL" (2019), section 4.1, with the sign rule of transformers'
    RepetitionPenaltyLogitsProcessor.
    """
    penalties = [draw.sampling.repetition_penalty for draw in draws]
    prompts = [draw.prompt_ids if draw.sampling.repetition_penalty != 1 else () for draw in draws]
    answers = [draw.generated_ids if draw.sampling.repetition_penalty != 1 else () for draw in draws]
    n_vocab = logits.shape[-1]
    seen = np.concatenate([cells("prompt_ids", prompts, n_vocab), cells("generated_ids", answers, n_vocab)])
    where, by = _each(seen, penalties, logits)
    values = logits.view(-1)[where]
    values = torch.where(values > 0, values / by, values * by)
    # A cell that stands here several times is written the same value each time.
    logits.view(-1)[where] = values.clamp_(min=torch.finfo(values.dtype).min, max=torch.finfo(values.dtype).max)


def penalise_count(logits: Tensor, draws: Sequence[Draw]) -> None:
    """Takes from the logits ``[R, V]`` of tokens in the answer ``frequency_penalty`` for each time they came and
    ``presence_penalty`` once.

    Source: OpenAI API reference, "Frequency and presence penalties":
    mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence.
    """
    params = [draw.sampling for draw in draws]
    is_on = [param.frequency_penalty != 0 or param.presence_penalty != 0 for param in params]
    answers = [draw.generated_ids if on else () for draw, on in zip(draws, is_on, strict=True)]
    came, counts = np.unique(cells("generated_ids", answers, logits.shape[-1]), return_counts=True)
    where, frequency = _each(came, [param.frequency_penalty for param in params], logits)
    _, presence = _each(came, [param.presence_penalty for param in params], logits)
    times = torch.from_numpy(counts).to(logits)
    logits.view(-1)[where] = logits.view(-1)[where] - times * frequency - presence


def _each(where: np.ndarray, of_rows: Sequence[float], logits: Tensor) -> tuple[Tensor, Tensor]:
    """``where`` [N] on the logits' device, and for each its row's number of ``of_rows`` in their dtype."""
    positions = torch.from_numpy(where).to(logits.device)
    return positions, logits.new_tensor(of_rows)[positions // logits.shape[-1]]
