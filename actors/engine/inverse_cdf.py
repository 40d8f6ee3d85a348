"""Draws tokens by inverse CDF from what min-p, top-k and top-p leave. Mass is summed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.engine.request import Draw, SamplingParams
from actors.engine.uniforms import uniforms

_FIRST_LEADERS = 64
# With 64, flat rows that need nearly all of 129,280 tokens cost a fifth less on CPUs, but those that need 65 to 512, or
# some 20,000 (min-p of 0.05), twice as much.
_MORE_LEADERS = 8


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token of each row of ``logits [R, V]``, which have a finite maximum and may have -inf; the temperatures are
    positive. What is left in a row is ranked by logit, then by id, if anything is cut; else it is in the order of ids.
    """
    cut = [_is_cut(draw.sampling, logits.shape[-1]) for draw in draws]
    tokens = [0] * len(draws)
    for is_cut, draw_from in ((False, _draw_from_all), (True, _draw_from_leaders)):
        chosen = [row for row, value in enumerate(cut) if value == is_cut]
        if chosen:
            some = logits if len(chosen) == len(draws) else logits[chosen]
            drawn = draw_from(_rows(some, [draws[row] for row in chosen])).tolist()
            for row, token in zip(chosen, drawn, strict=True):
                tokens[row] = token
    return tokens


def _is_cut(param: SamplingParams, n_vocab: int) -> bool:
    return param.top_p < 1 or param.min_p > 0 or 0 < param.top_k < n_vocab


class _Rows(NamedTuple):
    """Rows to draw from: logits [R, V], the rest [R, 1] float64; ``top_k`` int64, V where there is none."""

    logits: Tensor
    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor

    def pick(self, index: Tensor) -> _Rows:
        return _Rows(*(field[index] for field in self))


def _rows(logits: Tensor, draws: Sequence[Draw]) -> _Rows:
    n_vocab, params = logits.shape[-1], [draw.sampling for draw in draws]
    columns = [
        [param.temperature for param in params],
        [param.min_p for param in params],
        [min(param.top_k or n_vocab, n_vocab) for param in params],
        [param.top_p for param in params],
        uniforms(draws),
    ]
    temperature, min_p, top_k, top_p, uniform = (
        torch.from_numpy(np.array(columns, dtype=np.float64)).to(logits.device).unsqueeze(-1).unbind()
    )
    return _Rows(logits, temperature, min_p, top_k.long(), top_p, uniform)


def _draw_from_all(rows: _Rows) -> Tensor:
    """Token ids [R]."""
    top = rows.logits.amax(dim=-1, keepdim=True)
    return _invert(_mass(rows.logits, top, rows.temperature).cumsum_(dim=-1), rows.uniform).squeeze(1)


def _draw_from_leaders(rows: _Rows) -> Tensor:
    """Token ids [R]. Ranks few tokens at first, and more for the rows that turn out to need them."""
    n_vocab, total = rows.logits.shape[-1], _totals(rows)
    tokens = torch.empty(len(total), dtype=torch.int64, device=total.device)
    pending = torch.arange(len(total), device=total.device)
    n = _FIRST_LEADERS
    while len(pending):
        n = min(n, n_vocab)
        some = rows if len(pending) == len(total) else rows.pick(pending)
        found, settled = _draw_from_some(some, n, total[pending])
        tokens[pending[settled]] = found[settled]
        pending, n = pending[~settled], n * _MORE_LEADERS
    return tokens


def _draw_from_some(rows: _Rows, n: int, total: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [R] by the ``n`` leaders of each row alone, and which of them [R] are exact."""
    values, ids = _leaders(rows.logits, n)
    mass = _mass(values, values[:, :1], rows.temperature)
    n_likely = (mass >= rows.min_p).sum(dim=-1, keepdim=True)
    limit = torch.minimum(rows.top_k, n_likely)
    # Else min-p or top-k may leave more than was ranked, and top-p is a share of the total; where that is inf, of what
    # is not known yet: then all leaders are kept, and the row is not settled.
    is_known = (rows.top_k <= n) | (n_likely < n) | (n == rows.logits.shape[-1])
    cumulative = mass.cumsum_(dim=-1)
    left = torch.where(is_known, cumulative.gather(1, limit - 1), total)
    last = torch.minimum((cumulative < rows.top_p * left).sum(dim=-1, keepdim=True), limit - 1)
    rank = _invert(cumulative.clamp(max=cumulative.gather(1, last)), rows.uniform)
    # No token outside the leaders may rank before the last one kept.
    settled = (values.gather(1, last) > values[:, -1:]) | (n == rows.logits.shape[-1])
    return ids.gather(1, rank).squeeze(1), settled.squeeze(1)


def _leaders(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Logits and ids [R, n] of the n largest of each row, largest first, equal ones by id.

    Which of several tokens equal to the n-th largest are among them is open.
    """
    if n == logits.shape[-1]:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = logits.topk(n, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _totals(rows: _Rows) -> Tensor:
    """Mass [R, 1] of all tokens, inf in rows with min-p or top-k: there, top-p is a share of less than all."""
    total = torch.full_like(rows.top_p, torch.inf)
    needed = ((rows.top_k == rows.logits.shape[-1]) & (rows.min_p == 0)).squeeze(1).nonzero().squeeze(1)
    if len(needed):
        some = rows if len(needed) == len(total) else rows.pick(needed)
        top = some.logits.amax(dim=-1, keepdim=True)
        # Not sum(): it adds in another order when a row is alone.
        total[needed] = _mass(some.logits, top, some.temperature).cumsum_(dim=-1)[:, -1:]
    return total


def _mass(logits: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """exp((logit - top) / temperature) [R, N] float64, of 1 at the top."""
    # The difference first: logit / temperature can overflow.
    return logits.to(torch.float64, copy=True).sub_(top).div_(temperature).exp_()


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """First index [R, 1] where ``cumulative`` [R, N] exceeds ``uniform`` [R, 1] times its last value."""
    # At most 1 - 2^-53 of the last value, so below it in float64 too.
    return torch.searchsorted(cumulative.contiguous(), uniform * cumulative[:, -1:], right=True)
