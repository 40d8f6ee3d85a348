"""Draws the next token of each row from its logits.

Every draw is a pure function of the row's logits, what came before in its sequence, its parameters and (seed, choice,
index): neither the other rows of the batch nor earlier draws matter, so a step that is redone, or a request that is
replayed elsewhere, draws the same. Tokens with equal logits rank by id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.engine.inverse_cdf import draw_tokens
from actors.engine.likeliest import likeliest
from actors.engine.masks import mask
from actors.engine.penalties import add_bias, penalise_count, penalise_repetition
from actors.engine.request import Draw

# So many logits are worked on at a time: 32 rows of 129,280. Bounds the memory, and on CPUs a fresh 300 MB cost more
# than the arithmetic on them.
_SLICE = 1 << 22


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """Next token of each row of ``logits [S, V]``, of any float dtype and device; they are left as they are.

    1. In fp32 (float64 stays): ``logit_bias`` is added, ``repetition_penalty``, ``frequency_penalty`` and
       ``presence_penalty`` are applied; ``allowed_ids``, ``banned_ids`` and ``held_back`` take tokens out.
    2. Temperature 0 takes the arg max of that. Otherwise it is divided by the temperature, and cut
    3. to the tokens with at least ``min_p`` times the probability of the likeliest,
    4. to the ``top_k`` likeliest of them,
    5. to the fewest of the likeliest whose share of what was left reaches ``top_p`` (at least one);
    6. one is drawn by inverse CDF.

    This is vLLM's order (vllm.v1.sample.sampler.Sampler), which takes tokens out first, to the same effect.

    None stands for a row without a token: its logits have a NaN or an infinity, or no token may come (requests that
    allow none are refused at the border). Other rows are as without it. ValueError when the lengths differ or when an
    id is outside the vocabulary.
    """
    if len(logits) != len(draws):
        raise ValueError(f"{len(logits)} rows of logits, {len(draws)} draws")
    n_rows = max(1, _SLICE // logits.shape[-1])
    starts = range(0, len(draws), n_rows)
    return [token for i in starts for token in _sample(logits[i : i + n_rows], draws[i : i + n_rows])]


def _sample(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    tokens = likeliest(logits)
    changed = [row for row, draw in enumerate(draws) if _is_changed(draw, tokens[row], logits.shape[-1])]
    for row in changed:
        tokens[row] = None
    _draw(logits, draws, tokens)
    if changed:
        some = [draws[row] for row in changed]
        processed = _processed(logits[changed], some)
        tops, best = processed.max(dim=-1)  # what was taken out is infinite, and no fault
        others = [None if token < 0 else token for token in best.where(tops.isfinite(), -1).tolist()]
        _draw(processed, some, others)
        for row, token in zip(changed, others, strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: Tensor, draws: Sequence[Draw], tokens: list[int | None]) -> None:
    """Replaces the likeliest of ``tokens`` (None: there is none) by a drawn one where the temperature is not 0."""
    warm = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0 and tokens[row] is not None]
    if warm:
        some = logits if len(warm) == len(draws) else logits[warm]
        for row, token in zip(warm, draw_tokens(some, [draws[row] for row in warm]), strict=True):
            tokens[row] = token


def _is_changed(draw: Draw, likeliest: int | None, n_vocab: int) -> bool:
    """Whether step 1 has to be done for this draw: not for the arg max alone, if only others are taken out. It tells of
    ids that there are not."""
    param = draw.sampling
    if likeliest is None:
        return False
    if param.has_penalties or param.logit_bias:
        return True
    if param.temperature > 0:
        return bool(param.allowed_ids or param.banned_ids or draw.held_back)
    if param.allowed_ids and likeliest not in param.allowed_ids:
        return True
    named = (param.allowed_ids, param.banned_ids, draw.held_back)
    known = all(min(ids) >= 0 and max(ids) < n_vocab for ids in named if ids)
    return not known or likeliest in param.banned_ids or likeliest in draw.held_back


def _processed(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Step 1 of `sample` on ``logits [R, V]``, which are the caller's to lose."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    add_bias(logits, draws)
    penalise_repetition(logits, draws)
    penalise_count(logits, draws)
    mask(logits, draws)
    return logits
