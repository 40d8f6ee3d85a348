"""The sampler as its text says it, one row at a time in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from actors.engine.request import Draw, SamplingParams


def uniform(draw: Draw) -> float:
    key = np.array([draw.sampling.seed, draw.sampling.choice], dtype=np.uint64)
    counter = np.array([draw.index, 0, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def processed(logits: np.ndarray, draw: Draw) -> np.ndarray:
    """Logits [V] after bias, penalties and masks, in the dtype (float32, float64) in which they come."""
    out, number, param = logits.copy(), logits.dtype.type, draw.sampling
    for token, amount in param.logit_bias:
        out[token] += number(amount)
    for token in {*draw.prompt_ids, *draw.generated_ids}:
        penalty = number(param.repetition_penalty)
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token in set(draw.generated_ids):
        times = number(list(draw.generated_ids).count(token))
        out[token] -= times * number(param.frequency_penalty)
        out[token] -= number(param.presence_penalty)
    for token in range(len(out)):
        is_out = token in param.banned_ids or token in draw.held_back
        if is_out or (param.allowed_ids and token not in param.allowed_ids):
            out[token] = -math.inf
    return out


def shares(values: Sequence[float], param: SamplingParams) -> list[tuple[int, float]]:
    """(token, probability) of what min-p, top-k and top-p leave, in the order in which uniforms meet them: the most
    likely first, equal logits by id; by id if nothing is cut."""
    ranked = sorted(range(len(values)), key=lambda token: (-values[token], token))
    top = values[ranked[0]]
    mass = {token: math.exp((values[token] - top) / param.temperature) for token in ranked}
    kept = [token for token in ranked if values[token] > -math.inf and mass[token] >= param.min_p]
    kept = kept[: param.top_k or None]
    if param.top_p < 1:
        so_far, total = 0.0, math.fsum(mass[token] for token in kept)
        for n, token in enumerate(kept, start=1):
            so_far += mass[token]
            if so_far >= param.top_p * total:
                kept = kept[:n]
                break
    if param.top_p == 1 and param.min_p == 0 and (param.top_k or len(values)) >= len(values):
        kept.sort()
    total = math.fsum(mass[token] for token in kept)
    return [(token, mass[token] / total) for token in kept]


def sample_row(logits: np.ndarray, draw: Draw) -> int | None:
    if not np.isfinite(logits).all():
        return None
    values = processed(logits, draw).tolist()
    if max(values) == -math.inf:
        return None
    if draw.sampling.temperature == 0:
        return max(range(len(values)), key=lambda token: (values[token], -token))
    left = shares(values, draw.sampling)
    point = uniform(draw)
    for token, share in left:
        point -= share
        if point < 0:
            return token
    return left[-1][0]
