"""Sequences run in every way a server cuts them, against the same sequences run by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.paged_runner import PagedRunner

WHOLE = 1 << 30


def reference_logits(model: Any, ids: Sequence[int], chunk: int = WHOLE) -> Tensor:
    """What transformers gives for every position, [len(ids), V]; with ``chunk`` through its own cache."""
    parts, seen = [], None
    with torch.no_grad():
        for start in range(0, len(ids), chunk):
            part = torch.tensor([ids[start : start + chunk]])
            result = model(input_ids=part, past_key_values=seen, use_cache=chunk != WHOLE)
            seen = result.past_key_values
            parts.append(result.logits[0])
    return torch.cat(parts)


def stepwise_logits(
    runner: PagedRunner, prompts: Sequence[Sequence[int]], chunk: int = WHOLE, first: Sequence[int] = ()
) -> list[Tensor]:
    """Logits [len, V] of each prompt, all computed beside each other: in every step the next ``chunk`` tokens of each.

    ``first`` says how many tokens each gets in the first step, so that decodes of different lengths meet.
    """
    numbers = [runner.add(prompt) for prompt in prompts]
    done = [0] * len(prompts)
    parts: list[list[Tensor]] = [[] for _ in prompts]
    sizes = list(first) or [chunk] * len(prompts)
    while open_ := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        counts = [min(sizes[i], len(prompts[i]) - done[i]) for i in open_]
        for i, count, logits in zip(
            open_, counts, runner.step([(numbers[i], c) for i, c in zip(open_, counts, strict=True)]), strict=True
        ):
            parts[i].append(logits)
            done[i] += count
        sizes = [chunk] * len(prompts)
    return [torch.cat(rows) for rows in parts]


def assert_every_way(path: Path, model: Any, prompts: Sequence[Sequence[int]], row_block: int) -> None:
    """Prefills in one go, in chunks, and decodes of ragged batches give transformers' logits, to 1e-5 of their scale.

    In the deterministic mode all of them give the same bits.
    """
    want = [reference_logits(model, prompt) for prompt in prompts]
    ways = {"whole": (WHOLE, ()), "chunks": (7, ()), "decodes": (1, [max(1, len(p) // 3) for p in prompts])}
    got = {name: stepwise_logits(PagedRunner(path, row_block=row_block), prompts, *way) for name, way in ways.items()}
    for name, logits in got.items():
        for i, (mine, theirs) in enumerate(zip(logits, want, strict=True)):
            error = float((mine - theirs).abs().max() / theirs.abs().max())
            assert error < 1e-5, f"{name}, prompt {i} of {len(prompts[i])} tokens: off by {error}"
            assert not row_block or torch.equal(mine, got["whole"][i]), f"{name}, prompt {i}: other bits"
