"""The sampler as its text says it, one row at a time in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from actors.engine.request import SamplingParams


def uniform(param: SamplingParams, position: int) -> float:
    key = np.array([param.seed, param.choice], dtype=np.uint64)
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def shares(logits: Sequence[float], param: SamplingParams) -> list[tuple[int, float]]:
    """(token, probability) of what top-k and top-p leave, most likely first, equal logits by id."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = ranked[: param.top_k or None]
    top = logits[ranked[0]]
    mass = [math.exp((logits[token] - top) / param.temperature) for token in kept]
    if param.top_p < 1:
        so_far, total = 0.0, math.fsum(mass)
        for n, share in enumerate(mass, start=1):
            so_far += share
            if so_far >= param.top_p * total:
                kept, mass = kept[:n], mass[:n]
                break
    total = math.fsum(mass)
    return [(token, share / total) for token, share in zip(kept, mass, strict=True)]


def sample_row(logits: Sequence[float], param: SamplingParams, position: int) -> int:
    if param.temperature == 0:
        return max(range(len(logits)), key=lambda token: (logits[token], -token))
    left = shares(logits, param)
    if len(left) == len(logits) and param.top_p == 1:
        left.sort()
    point = uniform(param, position)
    for token, share in left:
        point -= share
        if point < 0:
            return token
    return left[-1][0]
