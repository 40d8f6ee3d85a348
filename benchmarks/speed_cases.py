"""The cases in which engines are compared, their prompts, and what the times of one run come to. Pure."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

from benchmarks.arrivals import FIRST_ID

Kind = Literal["decode", "prefill", "batch"]
DEFAULT_CASES = ("decode-1", "decode-8", "decode-32", "prefill-32x128", "prefill-1x2048", "batch-96")
QUICK_CASES = ("decode-1", "decode-8", "prefill-8x128", "batch-16")

_USUAL_PROMPT = 128
_NEW_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """``streams`` requests that are sent at once, each with ``prompt`` tokens and ``new`` ones to draw."""

    kind: Kind
    streams: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        short = self.kind != "prefill" and self.prompt == _USUAL_PROMPT
        return f"{self.kind}-{self.streams}" + ("" if short else f"x{self.prompt}")

    @property
    def tokens(self) -> int:
        """Of one stream, prompt and answer."""
        return self.prompt + self.new


Times = Sequence[Sequence[float]]
"""Of each stream, the seconds after the start at which its tokens came."""


@dataclass(frozen=True)
class Figure:
    """``rate``: tokens a second, of prompts in a prefill case, else of answers. ``ttft_s``: median over the streams.
    ``tpot_s``: seconds between a stream's tokens, median over the streams; None where each has one token."""

    rate: float
    ttft_s: float
    tpot_s: float | None


def parse_case(text: str) -> Case:
    """``decode-8``, ``batch-96`` (prompts of 128 tokens), ``decode-1x2048``, ``prefill-32x128``. ValueError else."""
    match = re.fullmatch(r"(decode|prefill|batch)-([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise ValueError(
            f"case {text!r}: allowed is decode-STREAMS, prefill-STREAMS or batch-STREAMS, and xPROMPT_TOKENS behind it"
        )
    kind: Kind = match[1]  # type: ignore[assignment]
    prompt = int(match[3] or _USUAL_PROMPT)
    return Case(kind, int(match[2]), prompt, 1 if kind == "prefill" else _NEW_TOKENS)


def prompts(case: Case, vocabulary: int, round_number: int, attempt: int) -> list[list[int]]:
    """[streams][prompt] ids, the same for every engine; others in each round and attempt, so that no cache has any."""
    rng = random.Random(f"{case.name}/{round_number}/{attempt}")
    return [[rng.randrange(FIRST_ID, vocabulary) for _ in range(case.prompt)] for _ in range(case.streams)]


def figure(case: Case, times: Times) -> Figure:
    """What a run comes to. ValueError if a stream is missing or has too few tokens.

    ``decode`` counts only while all streams have begun and none has ended: the sum of each one's own rate in that
    window, since tokens of one step do not arrive at the same instant.
    """
    needed = 1 if case.kind == "prefill" else 2
    if len(times) != case.streams or min(map(len, times)) < needed:
        seen = sorted({len(stream) for stream in times})
        raise ValueError(f"{case.name}: {len(times)} streams with {seen} tokens; {case.streams} with {needed} or more")
    ttft = median(stream[0] for stream in times)
    if case.kind == "prefill":
        return Figure(case.streams * case.prompt / max(stream[0] for stream in times), ttft, None)
    if case.kind == "batch":
        total = sum(map(len, times)) / max(stream[-1] for stream in times)
        return Figure(total, ttft, median(_per_token(stream) for stream in times))
    steps = [_per_token(stream) for stream in _together(case, times)]
    return Figure(sum(1 / step for step in steps), ttft, median(steps))


def _together(case: Case, times: Times) -> list[list[float]]:
    began, ended = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    shared = [[at for at in stream if began <= at <= ended] for stream in times]
    if min(map(len, shared)) < 2:
        raise ValueError(f"{case.name}: its streams do not run at the same time")
    return shared


def _per_token(stream: Sequence[float]) -> float:
    """Seconds."""
    return sum(after - before for before, after in pairwise(stream)) / (len(stream) - 1)
