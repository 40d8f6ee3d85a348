"""What a long prompt does to running streams, and they to it."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from statistics import median

from benchmarks.arrivals import FIRST_ID, Arrival
from benchmarks.open_loop import Gateway, Served

_WARM_TOKENS = 40
_USUAL_TOKENS = 24
_LOOK_S = 0.02


@dataclass(frozen=True)
class Stall:
    """Seconds. ``usual``: median gap between a stream's tokens with the same streams and no prompt; ``longest``: of all
    streams while the prompt was computed; ``ttft`` beside them, ``alone`` without them."""

    streams: int
    prompt_tokens: int
    usual: float
    longest: float
    ttft: float
    alone: float

    def __str__(self) -> str:
        return (
            f"{self.streams} streams, then a prompt of {self.prompt_tokens} tokens: longest gap "
            f"{self.longest * 1e3:.0f} ms = {self.longest / self.usual:.2f} x the usual {self.usual * 1e3:.0f} ms; "
            f"its first token after {self.ttft:.2f} s = {self.ttft / self.alone:.2f} x the {self.alone:.2f} s alone"
        )


async def measure_stall(target: str, streams: int, prompt_tokens: int) -> Stall:
    """Every prompt is another one, so that none is found in the prefix cache."""
    gateway = Gateway(target)
    try:
        vocabulary = (await gateway.model()).vocab_size
        rng = random.Random(0)
        before = await _ttft(gateway, _prompt(rng, prompt_tokens, vocabulary))
        began = time.monotonic()
        running = [Served(Arrival(0.0, _prompt(rng, 4, vocabulary), 2000, False)) for _ in range(streams)]
        tasks = [asyncio.create_task(gateway.serve(one.arrival, began, one)) for one in running]
        while min(len(one.token_at) for one in running) < _WARM_TOKENS:
            await asyncio.sleep(_LOOK_S)
        usual = median(gap for one in running for gap in one.gaps_s[-_USUAL_TOKENS:])
        sent = time.monotonic() - began
        ttft = await _ttft(gateway, _prompt(rng, prompt_tokens, vocabulary))
        longest = max(_gaps_within(one, sent, sent + ttft) for one in running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        after = await _ttft(gateway, _prompt(rng, prompt_tokens, vocabulary))
        return Stall(streams, prompt_tokens, usual, longest, ttft, (before + after) / 2)
    finally:
        await gateway.close()


async def _ttft(gateway: Gateway, prompt: tuple[int, ...]) -> float:
    served = await gateway.serve(Arrival(0.0, prompt, 1, False), time.monotonic())
    if served.error:
        raise RuntimeError(f"a prompt of {len(prompt)} tokens: {served.error}")
    return served.ttft_s


def _gaps_within(served: Served, start: float, end: float) -> float:
    """The longest gap of which any part lies between the two times."""
    pairs = zip(served.token_at, served.token_at[1:], strict=False)
    return max((after - before for before, after in pairs if after > start and before < end), default=0.0)


def _prompt(rng: random.Random, tokens: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_ID, vocabulary) for _ in range(tokens))
