"""What of a sequence's KV need not be computed, because it is there already or just being computed.

Prompts share what they have in common from the first token on, as in vLLM's hash-based prefix caching and SGLang's
RadixAttention (arXiv 2312.07104). The choices of one request, *siblings*, share their prompt without a cache, too: the
first computes it, the others fork from any that has it, and the last that has it leaves it to one that waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from actors.engine.kv_blocks import BlockPool
from actors.engine.sequence import Sequence, Status


class Found(NamedTuple):
    """The first ``n_tokens`` tokens of a sequence lie in ``blocks``, the last of which may have to be copied.

    They are those of ``sibling``, or in the prefix cache if that is None.
    """

    blocks: tuple[int, ...]
    n_tokens: int
    sibling: Sequence | None = None


class Reuse:
    """Finds blocks for sequences that start, publishes those that are known to be good, and says who should wait.

    ``queried_tokens``: of the sequences that looked into the prefix cache when they started; ``hit_tokens``: what they
    found there. Neither counts what a sibling gave, nor who needs all rows of its prompt and so reads no cache.
    """

    def __init__(self, blocks: BlockPool, prefix_cache: bool) -> None:
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._blocks = blocks
        self._prefix_cache = prefix_cache
        self._pending: dict[bytes, Sequence] = {}  # who computes the block of this key in its prefill

    def held(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence should let others pass, because it soon finds more than it does now.

        It waits for running prefills and for the first of its siblings, never for one of a lower class: so there is no
        circle, and what it waits for moves forward in its stead.
        """
        if sequence.wants_prompt_rows:
            return False
        return self._awaits_block(sequence) or self._awaits_sibling(sequence)

    def find(self, sequence: Sequence) -> Found:
        """What a waiting sequence can take over: of all its tokens but the last, whose logits are needed."""
        if sequence.wants_prompt_rows:
            return Found((), 0)
        cached = tuple(self._blocks.find(self._useful_keys(sequence)))
        n_cached = min(len(cached) * self._blocks.block_size, len(sequence.token_ids) - 1)
        n_forked = _n_forked(sequence)
        sibling = next(_with_prompt(sequence), None)
        if sibling is not None and n_cached <= n_forked:
            return Found(sibling.block_table[: self._blocks.needed(n_forked)], n_forked, sibling)
        return Found(cached, n_cached)

    def heir(self, sequence: Sequence) -> Sequence | None:
        """The waiting sibling that has to start before ``sequence`` lets go of their prompt, lest it be lost to all."""
        if not 0 < _n_forked(sequence) <= sequence.n_verified or any(_with_prompt(sequence)):
            return None
        waiting = [s for s in sequence.siblings if s.status is Status.WAITING and not s.wants_prompt_rows]
        return min(waiting, key=attrgetter("rank"), default=None)

    def only_whole(self, found: Found) -> Found:
        """``found`` without a last block that is not used to its end, and so would have to be copied."""
        n = found.n_tokens // self._blocks.block_size
        return found._replace(blocks=found.blocks[:n], n_tokens=n * self._blocks.block_size)

    def begin(self, sequence: Sequence, found: Found) -> None:
        """The sequence starts with what was found."""
        self._blocks.share(found.blocks)
        sequence.block_table = found.blocks
        sequence.n_computed = sequence.n_verified = sequence.n_reused = found.n_tokens
        sequence.n_published = 0
        sequence.awaited = None
        if sequence.n_drawn == 0:
            in_prompt = min(found.n_tokens, len(sequence.request.prompt_ids))
            sequence.n_cached = in_prompt if found.sibling is None else found.sibling.n_cached
        if self._prefix_cache and found.sibling is None and not sequence.wants_prompt_rows:
            self.queried_tokens += len(sequence.token_ids)
            self.hit_tokens += found.n_tokens
        for key in self._uncomputed_keys(sequence):
            self._pending[key] = sequence

    def verified(self, sequence: Sequence) -> None:
        """A token was drawn from logits that attend to all that is computed: its full blocks may be found."""
        if sequence.n_verified < sequence.n_given:
            self.end_prefill(sequence)
        sequence.n_verified = sequence.n_computed
        n = sequence.n_verified // self._blocks.block_size
        if not self._prefix_cache or n == sequence.n_published:
            return
        keys = sequence.keys.first(n, sequence.token_ids)
        for i in range(sequence.n_published, n):
            self._blocks.publish(sequence.block_table[i], keys[i])
        sequence.n_published = n

    def end_prefill(self, sequence: Sequence) -> None:
        """Nobody need wait for what the sequence computes: it is computed, or never will be."""
        for key in self._uncomputed_keys(sequence):
            if self._pending.get(key) is sequence:
                del self._pending[key]

    def check(self, running: list[Sequence]) -> None:
        """Assert what always holds. For tests."""
        assert all(owner in running and owner.n_verified < owner.n_given for owner in self._pending.values())

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Whether nothing is there of what the first of its siblings is about to compute."""
        first = min(sequence.siblings, key=attrgetter("rank"))
        return first is not sequence and _n_forked(sequence) > 0 and self.find(sequence).n_tokens == 0

    def _awaits_block(self, sequence: Sequence) -> bool:
        # The key is kept: most who wait do so for several steps, and looking for it costs more than looking at it. Its
        # block may be there while somebody still computes it: for log-probabilities of the prompt, or in another class.
        awaited = sequence.awaited
        if awaited is None or awaited not in self._pending or self._blocks.find((awaited,)):
            keys = self._useful_keys(sequence)
            n_found = len(self._blocks.find(keys))
            sequence.awaited = keys[n_found] if n_found < len(keys) else None
        owner = self._pending.get(sequence.awaited) if sequence.awaited is not None else None
        return owner is not None and owner.priority <= sequence.priority

    def _useful_keys(self, sequence: Sequence) -> list[bytes]:
        """Those of the full blocks that hold any token but the last."""
        if not self._prefix_cache:
            return []
        n_tokens = len(sequence.token_ids)
        n = min(n_tokens // self._blocks.block_size, self._blocks.needed(n_tokens - 1))
        return sequence.keys.first(n, sequence.token_ids)

    def _uncomputed_keys(self, sequence: Sequence) -> list[bytes]:
        """Those of the given tokens' full blocks that were not there when the sequence started."""
        if not self._prefix_cache:
            return []
        size = self._blocks.block_size
        return sequence.keys.first(sequence.n_given // size, sequence.token_ids)[sequence.n_reused // size :]


def _n_forked(sequence: Sequence) -> int:
    """Tokens that it can have from a sibling: all of the prompt but the last, whose logits are needed."""
    return len(sequence.request.prompt_ids) - 1


def _with_prompt(sequence: Sequence) -> Iterator[Sequence]:
    """Its siblings whose prompt is computed and known to be good."""
    n = _n_forked(sequence)
    return (s for s in sequence.siblings if s is not sequence and s.n_verified >= n > 0)
