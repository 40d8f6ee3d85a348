"""How likely the model itself held a token, and which were the likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.engine.request import TokenLogprobs

# So many logits at a time (16 rows of 129,280): their keys take twice the memory of fp32 logits.
_SLICE = 1 << 21


def token_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Of each row of the model's own ``logits [S, V]``, of any float dtype and device, taken as fp32: the natural
    log-softmax at its token, the token's rank, and the ``counts[i]`` likeliest (all V where there are no more).

    Equal logits rank by id. The softmax is summed in float64. Rows must be finite: those that are not have no token,
    their requests have ended. ValueError when the lengths differ.
    """
    if not len(logits) == len(tokens) == len(counts):
        raise ValueError(f"{len(logits)} rows of logits, {len(tokens)} tokens, {len(counts)} counts")
    n = max(1, _SLICE // logits.shape[-1])
    starts = range(0, len(tokens), n)
    return [entry for i in starts for entry in _of_some(logits[i : i + n], tokens[i : i + n], counts[i : i + n])]


def _of_some(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    logits = logits.float()
    n_top = min(max(counts), logits.shape[-1])
    keys = _keys(logits)
    at = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    rank = (keys >= keys.gather(1, at)).sum(dim=-1)
    top = keys.topk(n_top, dim=-1).indices
    logprobs = _logprobs(logits, torch.cat([at, top], dim=1))
    rows = zip(rank.tolist(), top.tolist(), logprobs.tolist(), counts, strict=True)
    return [
        TokenLogprobs(own, n_before, tuple(zip(ids[:count], others[:count], strict=True)))
        for n_before, ids, (own, *others), count in rows
    ]


def _keys(logits: Tensor) -> Tensor:
    """int64 [S, V], all different in a row, that rank as the fp32 ``logits`` do and, where these are equal, by id."""
    # Adding 0 makes -0 into 0. The bits of positive floats rank as they do; those of negative ones the other way round.
    bits = (logits + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.to(torch.int64).bitwise_left_shift_(32)
    return keys.sub_(torch.arange(logits.shape[-1], device=logits.device))


def _logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-softmax of ``logits`` [S, V] fp32 at ``ids`` [S, N]: float64."""
    top = logits.amax(dim=-1, keepdim=True)
    mass = (logits - top).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)
    return (logits.gather(1, ids).double() - top) - mass.log()
