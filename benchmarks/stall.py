"""What a long prompt does to running streams, and they to it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.arrivals import FIRST_ID, Arrival
from benchmarks.open_loop import Gateway, Served

_STREAM_PROMPT = 4
_WARM_TOKENS = 40
_USUAL_TOKENS = 24
_LOOK_S = 0.02
_ABOUT_BESIDE = 2
"""A prompt beside streams takes about so many times as long as alone."""


@dataclass(frozen=True)
class Stall:
    """Seconds. ``usual``: median gap between a stream's tokens just before the prompt came; ``undisturbed``: the
    longest of all streams in about as long a time without the prompt, which is the machine's own unrest; ``longest``:
    of all streams while the prompt was computed; ``ttft`` beside them, ``alone`` without them."""

    streams: int
    prompt_tokens: int
    usual: float
    undisturbed: float
    longest: float
    ttft: float
    alone: float

    @property
    def gap_ratio(self) -> float:
        return self.longest / self.usual

    @property
    def unrest(self) -> float:
        """What ``gap_ratio`` is without a prompt."""
        return self.undisturbed / self.usual

    @property
    def ttft_ratio(self) -> float:
        return self.ttft / self.alone

    def __str__(self) -> str:
        return (
            f"{self.streams} streams, then a prompt of {self.prompt_tokens} tokens: longest gap "
            f"{self.longest * 1e3:.0f} ms = {self.gap_ratio:.2f} x the usual {self.usual * 1e3:.0f} ms (without the "
            f"prompt {self.unrest:.2f} x); its first token after {self.ttft:.2f} s = {self.ttft_ratio:.2f} x the "
            f"{self.alone:.2f} s alone"
        )


def summary(rounds: Sequence[Stall]) -> str:
    """The medians of several rounds."""
    gap, unrest, ttft = (median(getattr(one, name) for one in rounds) for name in ("gap_ratio", "unrest", "ttft_ratio"))
    return (
        f"median of {len(rounds)}: longest gap {gap:.2f} x the usual (without the prompt {unrest:.2f} x), first token "
        f"after {ttft:.2f} x the time alone"
    )


class StallError(Exception):
    """It cannot be measured; the text says why."""


async def measure_stall(target: str, streams: int, prompt_tokens: int) -> Stall:
    """Every prompt is another one in every run, so that none is found in the prefix cache; the streams go on to the
    context's end.

    Raises StallError when a request is refused, or a stream ends before the prompt's first token.
    """
    gateway = Gateway(target)
    tasks: list[asyncio.Task[Served]] = []
    try:
        model, rng = await gateway.model(), random.SystemRandom()
        most = model.context_length - _STREAM_PROMPT

        def prompt(tokens: int) -> tuple[int, ...]:
            return tuple(rng.randrange(FIRST_ID, model.vocab_size) for _ in range(tokens))

        before = await _ttft(gateway, prompt(prompt_tokens))
        began = time.monotonic()
        running = [Served(Arrival(0.0, prompt(_STREAM_PROMPT), most, False)) for _ in range(streams)]
        tasks += [asyncio.create_task(gateway.serve(one.arrival, began, one)) for one in running]
        while min(len(one.token_at) for one in running) < _WARM_TOKENS:
            _check_running(tasks)
            await asyncio.sleep(_LOOK_S)
        a_step = median(gap for one in running for gap in one.gaps_s[-_USUAL_TOKENS:])
        waited = time.monotonic() - began
        await asyncio.sleep(max(_ABOUT_BESIDE * before, _USUAL_TOKENS * a_step))
        sent = time.monotonic() - began
        _check_running(tasks)
        # By now the streams' contexts have grown, and their gaps with them.
        usual = median(gap for one in running for gap in one.gaps_s[-_USUAL_TOKENS:])
        undisturbed = max(_gaps_within(one, waited, sent) for one in running)
        ttft = await _ttft(gateway, prompt(prompt_tokens))
        _check_running(tasks)
        longest = max(_gaps_within(one, sent, sent + ttft) for one in running)
        await _end(tasks)
        after = await _ttft(gateway, prompt(prompt_tokens))
        return Stall(streams, prompt_tokens, usual, undisturbed, longest, ttft, (before + after) / 2)
    finally:
        await _end(tasks)
        await gateway.close()


async def _ttft(gateway: Gateway, prompt: tuple[int, ...]) -> float:
    served = await gateway.serve(Arrival(0.0, prompt, 1, False), time.monotonic())
    if served.error:
        raise StallError(f"a prompt of {len(prompt)} tokens: {served.error}: {served.details}")
    return served.ttft_s


def _check_running(tasks: Sequence[asyncio.Task[Served]]) -> None:
    for task in tasks:
        if task.done():
            ended = task.result()
            why = f"{ended.error}: {ended.details}" if ended.error else "the context is full"
            raise StallError(f"a running stream ended after {len(ended.token_at)} tokens: {why}")


async def _end(tasks: Sequence[asyncio.Task[Served]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _gaps_within(served: Served, start: float, end: float) -> float:
    """The longest gap of which any part lies between the two times."""
    pairs = zip(served.token_at, served.token_at[1:], strict=False)
    return max((after - before for before, after in pairs if after > start and before < end), default=0.0)
