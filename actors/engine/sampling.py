"""Draws the next token of each row from its logits.

Every draw is a pure function of the row's logits, its parameters and (seed, choice, index): neither the other
rows of the batch nor earlier draws matter, so a step that is redone, or a request that is replayed elsewhere,
draws the same. Tokens with equal logits rank by id. Mass is summed in float64, one cumulative sum per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.engine.request import Draw, SamplingParams

_FIRST_LEADERS = 64
_MORE_LEADERS = 8


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """Next token of each row of ``logits [S, V]``, of any float dtype and device.

    Temperature 0
    takes the arg max. Otherwise logits are divided by the temperature, cut to the ``top_k`` largest, then to
    the fewest of the largest whose share of what was left reaches ``top_p`` (at least one), and one is drawn
    by inverse CDF. None stands for a row with a NaN or infinite logit: it has no token, the others are as
    without it. ValueError when the lengths differ.
    """
    if len(logits) != len(draws):
        raise ValueError(f"{len(logits)} rows of logits, {len(draws)} draws")
    params, positions = [draw.sampling for draw in draws], [draw.index for draw in draws]
    finite = torch.isfinite(logits).all(dim=-1).tolist()
    best = logits.argmax(dim=-1).tolist()
    tokens: list[int | None] = [token if good else None for token, good in zip(best, finite, strict=True)]
    drawn = [row for row, param in enumerate(params) if finite[row] and param.temperature > 0]
    if drawn:
        rows = _rows(
            logits.index_select(0, torch.tensor(drawn, device=logits.device)),
            [params[row] for row in drawn],
            [positions[row] for row in drawn],
        )
        for row, token in zip(drawn, _draw(rows).tolist(), strict=True):
            tokens[row] = token
    return tokens


def uniforms(params: Sequence[SamplingParams], positions: Sequence[int]) -> np.ndarray:
    """One float64 in [0, 1) per row: 53 bits of Philox4x64-10 at key (seed, choice), counter (position).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), as in numpy.random.Philox.
    """
    # One generator whose state is set anew for each row: making one costs ten times as much.
    generator = np.random.Philox(0)
    state = generator.state
    bits = np.empty(len(params), dtype=np.uint64)
    for row, (param, position) in enumerate(zip(params, positions, strict=True)):
        state["state"]["key"][:] = (param.seed, param.choice)
        state["state"]["counter"][:] = (position, 0, 0, 0)
        generator.state = state
        bits[row] = generator.random_raw()
    return (bits >> np.uint64(11)) * 2.0**-53


class _Rows(NamedTuple):
    """Rows to draw from: logits [R, V], the rest [R, 1] float64; ``top_k`` int64, V where there is none."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor

    def pick(self, index: Tensor) -> _Rows:
        return _Rows(*(field[index] for field in self))


def _rows(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> _Rows:
    n_vocab = logits.shape[-1]
    columns = [
        [param.temperature for param in params],
        [min(param.top_k or n_vocab, n_vocab) for param in params],
        [param.top_p for param in params],
        uniforms(params, positions),
    ]
    temperature, top_k, top_p, uniform = (
        torch.as_tensor(column, dtype=torch.float64).to(logits.device).unsqueeze(1) for column in columns
    )
    return _Rows(logits, temperature, top_k.long(), top_p, uniform)


def _draw(rows: _Rows) -> Tensor:
    """Token ids [R]."""
    cut = ((rows.top_k < rows.logits.shape[-1]) | (rows.top_p < 1)).squeeze(1)
    tokens = torch.empty(len(cut), dtype=torch.int64, device=cut.device)
    tokens[~cut] = _draw_from_all(rows.pick(~cut))
    tokens[cut] = _draw_from_leaders(rows.pick(cut))
    return tokens


def _draw_from_all(rows: _Rows) -> Tensor:
    top = rows.logits.amax(dim=-1, keepdim=True)
    return _invert(_cumulative_mass(rows.logits, top, rows.temperature), rows.uniform).squeeze(1)


def _draw_from_leaders(rows: _Rows) -> Tensor:
    """Token ids [R]. Ranks few tokens at first, and more for the rows that turn out to need them."""
    n_vocab = rows.logits.shape[-1]
    top = rows.logits.amax(dim=-1, keepdim=True)
    total = _cumulative_mass(rows.logits, top, rows.temperature)[:, -1:]
    tokens = torch.empty(len(total), dtype=torch.int64, device=total.device)
    pending = torch.arange(len(total), device=total.device)
    n = _FIRST_LEADERS
    while len(pending):
        n = min(n, n_vocab)
        some = rows.pick(pending)
        values, ids = _leaders(some.logits, n)
        cumulative = _cumulative_mass(values, values[:, :1], some.temperature)
        keep = _n_kept(cumulative, some, total[pending])
        # Exact only if no token outside the leaders could rank before the last one kept.
        settled = (some.top_k <= n) | (some.top_k == n_vocab)
        settled &= values.gather(1, keep - 1) > values[:, -1:]
        settled = settled.squeeze(1) | (n == n_vocab)
        rank = _invert(cumulative.clamp(max=cumulative.gather(1, keep - 1)), some.uniform)
        tokens[pending[settled]] = ids.gather(1, rank).squeeze(1)[settled]
        pending, n = pending[~settled], n * _MORE_LEADERS
    return tokens


def _leaders(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Logits and ids [R, n] of the n largest of each row, largest first, equal ones by id.

    Which of several tokens equal to the n-th largest are among them is open.
    """
    ids = logits.topk(n, dim=-1).indices.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _n_kept(cumulative: Tensor, rows: _Rows, total: Tensor) -> Tensor:
    """How many of the ranked tokens top-k and top-p leave: [R, 1] int64, at least 1, at most those ranked.

    ``cumulative`` [R, n] is over the leaders, ``total`` [R, 1] over all tokens.
    """
    n = cumulative.shape[-1]
    limit = rows.top_k.clamp(max=n)
    of_top_k = torch.where(rows.top_k == rows.logits.shape[-1], total, cumulative.gather(1, limit - 1))
    n_before = (cumulative < rows.top_p * of_top_k).sum(dim=-1, keepdim=True)
    return torch.minimum(n_before + 1, limit)


def _cumulative_mass(logits: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """Running sums [R, N] float64 of exp((logit - top) / temperature)."""
    # The difference first: logit / temperature can overflow.
    return logits.to(torch.float64, copy=True).sub_(top).div_(temperature).exp_().cumsum(dim=-1)


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """First index [R, 1] where ``cumulative`` [R, N] exceeds ``uniform`` [R, 1] times its last value."""
    # At most 1 - 2^-53 of the last value, so below it in float64 too.
    return torch.searchsorted(cumulative.contiguous(), uniform * cumulative[:, -1:], right=True)
