"""Computes the steps that the scheduler forms: copies, micro-batches, forward pass, draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from actors.engine.plan import Chunk, Progress, StepPlan
from actors.logprob_book import LogprobBook
from actors.micro_batches import MicroBatchTuner
from actors.model.decoder import AttentionModel
from actors.model.kv_cache import KVCache
from actors.moe_client import MoEClient
from actors.prefill_pieces import PrefillPieces, StepPieces
from actors.span_log import FORWARD, HEAD, SAMPLE, SpanLog
from actors.step_batch import sample_chunks, split_chunks, step_batch

T = TypeVar("T")


class StepRunner:
    """Model and KV cache of one attention shard. ``micro_batches``: of the last step."""

    def __init__(self, model: AttentionModel, cache: KVCache, tuner: MicroBatchTuner, device: torch.device) -> None:
        self.micro_batches = 1
        self.logprobs = LogprobBook()
        self._model = model
        self._cache = cache
        self._tuner = tuner
        self._device = device
        self._aside_s = 0.0
        self._pieces = PrefillPieces(model, cache, device, apart=tuner.never_splits)

    @property
    def kv_bytes(self) -> int:
        """Of the KV cache."""
        return self._cache.nbytes

    def run(
        self, plan: StepPlan, moe: MoEClient, spans: SpanLog, tell_last: Callable[[], None]
    ) -> tuple[list[int | None], Progress]:
        """One token for each of ``plan.sampled``, None for a row without one, and how far its pieces came. Raises
        MoEUnavailable.

        ``tell_last`` tells what the step before has brought: called when this one's first rows are on their way.
        """
        began = time.perf_counter()
        moe.when_sent = lambda: self._aside(tell_last)
        self._cache.copy_blocks(plan.copies)
        rows = sum(len(chunk.token_ids) for chunk in plan.chunks)
        self.micro_batches = count = self._tuner.choose(rows) if rows else 0
        parts = split_chunks(plan.chunks, count) if count else []
        drawn: dict[str, int | None] = {}
        self._aside_s = 0.0

        def draw(chunks: Sequence[Chunk], hidden: Tensor) -> dict[str, int | None]:
            return self._aside(lambda: self._draw(chunks, hidden, spans))

        def done(number: int, hidden: Tensor) -> None:
            drawn.update(draw(parts[number], hidden))

        batches = [step_batch(part, self._device) for part in parts]
        pieces = StepPieces(self._pieces, plan, moe, count, draw, began)
        began_ns = spans.begin()
        try:
            self._model.run(batches, self._cache, moe, done, pieces)
            pieces.over()
        except BaseException:
            self._pieces.keep(())
            raise
        finally:
            pieces.close()
        if began_ns:
            spans.end(FORWARD, began_ns)
        if not plan.pieces:
            step_s = time.perf_counter() - began
            attention_s = step_s - moe.waited_s - self._aside_s
            self._tuner.observe(rows, count, step_s, attention_s, moe.experts_s, moe.transfer_s)
        return [drawn[chunk.request_id] for chunk in plan.sampled], pieces.progress

    def _draw(self, chunks: Sequence[Chunk], hidden: Tensor, spans: SpanLog) -> dict[str, int | None]:
        """By request, what the chunks that draw give; ``hidden`` as ``step_batch`` asked for it."""
        began_ns = spans.begin()
        drawing = [chunk for chunk in chunks if chunk.draw is not None]
        logits = self._model.head(hidden[: len(drawing)])
        self.logprobs.note_prompts(chunks, hidden[len(drawing) :], self._model.head)
        if began_ns:
            spans.end(HEAD, began_ns, rows=len(hidden))
            began_ns = spans.begin()
        tokens = sample_chunks(drawing, logits)
        self.logprobs.note_drawn(drawing, logits, tokens)
        if began_ns:
            spans.end(SAMPLE, began_ns, rows=len(drawing))
        return {chunk.request_id: token for chunk, token in zip(drawing, tokens, strict=True)}

    def _aside(self, work: Callable[[], T]) -> T:
        """Do something that is no part of the attention's time."""
        began = time.perf_counter()
        try:
            return work()
        finally:
            self._aside_s += time.perf_counter() - began
