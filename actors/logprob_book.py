"""Log-probabilities on their way to the events that tell them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from actors.engine.logprobs import token_logprobs
from actors.engine.plan import Chunk
from actors.engine.request import TokenEvent, TokenLogprobs

_ROWS_AT_ONCE = 64
"""Prompt rows whose logits are held at once: 33 MB of fp32 at a vocabulary of 129,280."""


class _Drawn(NamedTuple):
    """Raw logits [S, V] of rows that gave a token, what they gave, and how many of the likeliest are wanted of each."""

    request_ids: list[str]
    logits: Tensor
    tokens: list[int]
    counts: list[int]


class LogprobBook:
    """Those of one attention shard. Nothing is kept of requests that ask for none.

    Of drawn tokens only the logits are noted while a step is computed; the rest is done when its events are told, off
    the steps' way. Of prompts the logits would be too many to keep.
    """

    def __init__(self) -> None:
        self._drawn: list[_Drawn] = []
        self._prompts: dict[str, dict[int, TokenLogprobs]] = {}

    def note_drawn(self, chunks: Sequence[Chunk], logits: Tensor, tokens: Sequence[int | None]) -> None:
        """The chunks that draw gave ``tokens`` by ``logits`` [S, V], which must not change any more."""
        wanted = [
            (row, chunk.request_id, token, chunk.draw.sampling.logprobs)
            for row, (chunk, token) in enumerate(zip((c for c in chunks if c.draw), tokens, strict=True))
            if chunk.draw is not None and chunk.draw.sampling.logprobs is not None and token is not None
        ]
        if wanted:
            rows, names, drawn, counts = map(list, zip(*wanted, strict=True))
            picked = logits if len(rows) == len(logits) else logits[torch.tensor(rows, device=logits.device)]
            self._drawn.append(_Drawn(names, picked, drawn, counts))

    def note_prompts(self, chunks: Sequence[Chunk], hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """``hidden`` [R, D]: the rows with prompt targets, in the order of the chunks; ``head`` gives their logits."""
        where = [
            (chunk.request_id, chunk.start + at + 1, target, chunk.prompt_logprobs)
            for chunk in chunks
            for at, target in enumerate(chunk.prompt_targets)
        ]
        for start in range(0, len(where), _ROWS_AT_ONCE):
            part = where[start : start + _ROWS_AT_ONCE]
            logits = head(hidden[start : start + len(part)])
            told = token_logprobs(logits, [target for _, _, target, _ in part], [count for *_, count in part])
            for (name, position, _, _), entry in zip(part, told, strict=True):
                self._prompts.setdefault(name, {})[position] = entry

    def complete(self, events: Iterable[TokenEvent]) -> list[TokenEvent]:
        """The events of what was noted since the last time, with their log-probabilities; ends forget the rest."""
        drawn: dict[str, TokenLogprobs] = {}
        for rows in self._drawn:
            drawn.update(zip(rows.request_ids, token_logprobs(*rows[1:]), strict=True))
        self._drawn.clear()  # not if that failed: see ``forget_step``
        return [self._completed(event, drawn) for event in events]

    def forget_step(self) -> set[str]:
        """Nothing of what was noted of draws since the last ``complete`` will be told. Returns whose it was."""
        lost = {name for rows in self._drawn for name in rows.request_ids}
        self._drawn.clear()
        return lost

    def _completed(self, event: TokenEvent, drawn: dict[str, TokenLogprobs]) -> TokenEvent:
        name = event.request_id
        prompt = None
        if event.token is not None or event.finish is not None:
            prompt = self._prompts.pop(name, None)
        if event.token is None:
            return event
        if name in drawn:
            event = replace(event, logprobs=drawn[name])
        if prompt is not None:
            event = replace(event, prompt_logprobs=(None, *(entry for _, entry in sorted(prompt.items()))))
        return event
