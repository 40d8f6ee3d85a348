"""A model driven step by step as PagedRunner does, with each step cut into micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from actors.engine.plan import Chunk
from actors.messages import CPU
from actors.step_batch import split_chunks, step_batch
from tests.paged_runner import PagedRunner


class MicroBatched(PagedRunner):
    """``parts``: how many micro-batches a step has, or as many as it has rows. All of its rows' logits are wanted."""

    parts = 1

    def chunks(self, work: Sequence[tuple[int, int]]) -> list[Chunk]:
        """The next ``count`` tokens of each (sequence, count) as the scheduler gives them; they count as computed."""
        chunks = []
        for number, count in work:
            start = self._computed[number]
            table, size = self._grow(number, start + count), self.cache.block_size
            positions = range(start, start + count)
            slots = tuple(int(table[p // size]) * size + p % size for p in positions)
            ids = tuple(self.tokens[number][start : start + count])
            chunks.append(Chunk(str(number), ids, start, slots, tuple(table.tolist()), None, ids))
            self._computed[number] += count
        return chunks

    def step(self, work: Sequence[tuple[int, int]]) -> list[Tensor]:
        """See PagedRunner."""
        chunks = self.chunks(work)
        split = split_chunks(chunks, min(self.parts, sum(count for _, count in work)))
        logits: dict[str, list[Tensor]] = defaultdict(list)

        def done(part: int, hidden: Tensor) -> None:
            pieces = hidden.split([len(chunk.token_ids) for chunk in split[part]])
            for chunk, rows in zip(split[part], pieces, strict=True):
                logits[chunk.request_id].append(self.model.head(rows))

        self.model.run([step_batch(part, CPU) for part in split], self.cache, self.moe, done)
        return [torch.cat(logits[str(number)]) for number, _ in work]
