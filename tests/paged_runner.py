"""A model in one process, driven step by step over a paged cache: the reference for other ways to run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from actors.model.batch import Segment, StepBatch
from actors.model.decoder import AttentionModel, MoE
from actors.model.experts import ExpertBank
from actors.model.families import load_spec
from actors.model.gate import Gate
from actors.model.kv_cache import KVCache
from actors.model.local_moe import LocalMoE
from actors.model.weights import Checkpoint
from actors.quant_kind import QuantKind


class PagedRunner:
    """Sequences with their blocks, which are handed out in a shuffled order: no table is contiguous."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        row_block: int = 0,
        n_blocks: int = 96,
        block_size: int = 4,
        quantization: QuantKind | None = None,
    ) -> None:
        """``quantization``: at load, of what an attention shard holds."""
        self.spec = load_spec(path)
        everything = [(layer, e) for layer in self.spec.moe_layers for e in range(self.spec.moe.n_experts)]
        with Checkpoint(path) as checkpoint:
            self.model = AttentionModel.load(self.spec, checkpoint, dtype, row_block, quantization=quantization)
            self.gate = Gate.load(self.spec, checkpoint, dtype, row_block)
            self.bank = ExpertBank.load(self.spec, checkpoint, everything, dtype, row_block)
        self.moe: MoE = LocalMoE(self.gate, self.bank)
        self.cache = KVCache(self.spec, n_blocks, block_size, dtype)
        self.tokens: list[list[int]] = []
        self._computed: list[int] = []
        self._tables: list[list[int]] = []
        self._free = list(range(n_blocks))
        random.Random(0).shuffle(self._free)

    def add(self, tokens: Sequence[int]) -> int:
        """A new sequence, nothing of it computed yet. Returns its number."""
        self.tokens.append(list(tokens))
        self._computed.append(0)
        self._tables.append([])
        return len(self.tokens) - 1

    def step(self, work: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Compute the next ``count`` tokens of each (sequence, count); logits [count, V] of all of them."""
        segments, ids, positions, slots = [], [], [], []
        for number, count in work:
            context = self._computed[number]
            table = self._grow(number, context + count)
            segments.append(Segment(len(ids), count, context, table))
            ids += self.tokens[number][context : context + count]
            positions += range(context, context + count)
            slots.append(segments[-1].slots(self.cache.block_size)[context:])
            self._computed[number] += count
        batch = StepBatch(
            torch.tensor(ids), torch.tensor(positions), torch.cat(slots), segments, torch.arange(len(ids))
        )
        logits = self.model.forward(batch, self.cache, self.moe)
        return list(torch.split(logits, [count for _, count in work]))

    def greedy(self, prompts: Sequence[Sequence[int]], count: int, chunk: int = 1 << 30) -> list[list[int]]:
        """``count`` arg-max tokens after each prompt: all together, chunks of prompts beside decodes."""
        numbers = [self.add(prompt) for prompt in prompts]
        produced: list[list[int]] = [[] for _ in prompts]
        while any(len(tokens) < count for tokens in produced):
            open_ = [i for i in range(len(prompts)) if len(produced[i]) < count]
            work = [(numbers[i], min(chunk, self._left(numbers[i]))) for i in open_]
            for i, logits in zip(open_, self.step(work), strict=True):
                if self._left(numbers[i]) == 0:
                    produced[i].append(int(logits[-1].argmax()))
                    self.tokens[numbers[i]].append(produced[i][-1])
        return produced

    def _left(self, number: int) -> int:
        return len(self.tokens[number]) - self._computed[number]

    def _grow(self, number: int, tokens: int) -> Tensor:
        table = self._tables[number]
        while len(table) * self.cache.block_size < tokens:
            table.append(self._free.pop())
        return torch.tensor(table)


def random_ids(count: int, seed: int, vocab: int = 256) -> list[int]:
    """``count`` token ids drawn with ``seed``."""
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
