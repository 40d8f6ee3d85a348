"""A seeded load: which requests arrive when. Pure: nothing is sent and no clock is read here."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_ID = 100
"""Ids below are left out: many vocabularies keep them for special tokens."""


@dataclass(frozen=True)
class Mix:
    """What requests look like. Lengths are log-normal with these means (tokens) and ``spread`` (sigma of the
    logarithm). ``shared`` of the requests begin with one of ``prefixes`` prompts of ``prefix_tokens``, ``batch`` of
    them are of the lower priority."""

    prompt_tokens: float = 160
    answer_tokens: float = 48
    spread: float = 0.8
    shared: float = 0.5
    prefixes: int = 4
    prefix_tokens: int = 128
    batch: float = 0.2


@dataclass(frozen=True)
class Arrival:
    """One request, ``at_s`` seconds after the start; ``batch`` ones may wait."""

    at_s: float
    prompt_ids: tuple[int, ...]
    max_tokens: int
    batch: bool


def poisson(
    rate: float, seconds: float, mix: Mix, vocabulary: int, context: int, seed: int, shift: int = 0
) -> list[Arrival]:
    """Arrivals of a Poisson process of ``rate`` requests a second during ``seconds``; the same for the same seed.

    ``shift`` moves all ids by so many: the same load with other tokens, of which a cluster that has served it knows
    none.

    Prompt and answer together fit ``context`` tokens; ids are below ``vocabulary``.
    """
    rng = random.Random(seed)
    heads = [_ids(rng, mix.prefix_tokens, vocabulary, shift) for _ in range(mix.prefixes)]
    arrivals: list[Arrival] = []
    now = rng.expovariate(rate)
    while now < seconds:
        head = rng.choice(heads) if heads and rng.random() < mix.shared else ()
        prompt = _length(rng, mix.prompt_tokens, mix.spread, context // 2)
        own = _ids(rng, max(1, prompt - len(head)), vocabulary, shift)
        ids = (head + own)[: context // 2]
        answer = _length(rng, mix.answer_tokens, mix.spread, context - len(ids))
        arrivals.append(Arrival(now, ids, answer, rng.random() < mix.batch))
        now += rng.expovariate(rate)
    return arrivals


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of them do not exceed; NaN without any."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def _length(rng: random.Random, mean: float, sigma: float, most: int) -> int:
    drawn = rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
    return min(max(1, round(drawn)), most)


def _ids(rng: random.Random, count: int, vocabulary: int, shift: int) -> tuple[int, ...]:
    usable = vocabulary - FIRST_ID
    return tuple(FIRST_ID + (rng.randrange(usable) + shift) % usable for _ in range(count))
