"""How far a model computed here is from transformers', in each way to run it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.moe_client import MoEClient
from tests.paged_runner import PagedRunner, random_ids
from tests.parity.fleet import ExpertFleet

STEPS = 64
PROMPT = 40
MIXED = (1, 5, 17, 40)
CHUNK = 7
NEAR_TIE = 1e-5
FP32_LIMIT = 1e-5
"""Of a logit's difference, relative to the largest logit."""
BF16_LIMIT = 1.3
"""Of the error in bf16, relative to transformers' own."""
RIGHT_SLACK = 0.04
"""Of all positions: by how many fewer our best token in bf16 may be that of fp32 than transformers' is."""
_BLOCKS = 192
MODES = ("prefill", "cached decode", "batch of mixed lengths", "1 router + 3 expert shards")


@dataclass(frozen=True)
class Agreement:
    """``delta``: largest difference of a logit, relative to the largest logit. ``same`` of ``steps`` greedy tokens are
    the same; ``ties`` of the others are near-ties: transformers' own two best lie closer than NEAR_TIE of the scale.
    Each step continues transformers' tokens. Of bf16 alone: ``error``, the root mean square distance of a position's
    logits from those of the same weights in fp32, the lowest decile, as a multiple of transformers' own;
    ``right``, the share of positions whose best token is that of fp32, ours and transformers'."""

    delta: float
    same: int
    steps: int
    ties: int
    error: float = 0.0
    right: tuple[float, float] = (1.0, 1.0)

    @property
    def low_is_as_good(self) -> bool:
        """In bf16 we are as near to fp32 as transformers is."""
        ours, theirs = self.right
        return self.error <= BF16_LIMIT and ours >= theirs - RIGHT_SLACK

    @property
    def tokens_agree(self) -> bool:
        """Every greedy token is the same, near-ties apart."""
        return self.same + self.ties == self.steps


@dataclass(frozen=True)
class Stream:
    """A prompt, transformers' greedy ``tokens`` after it, and its ``logits`` [P + STEPS - 1, V] of prompt and tokens;
    ``exact``: those of the same weights in fp32, if these are not."""

    prompt: list[int]
    tokens: list[int]
    logits: Tensor
    exact: Tensor | None

    @property
    def ids(self) -> list[int]:
        """What the logits are of."""
        return self.prompt + self.tokens[:-1]


def reference(model: Any, seed: int = 0) -> list[Stream]:
    """transformers' answers to random prompts of the lengths MIXED. Leaves ``model`` in fp32."""
    prompts = [random_ids(count, seed + count, model.config.vocab_size) for count in MIXED]
    answers = [_greedy(model, prompt) for prompt in prompts]
    low = answers[0][1].dtype != torch.float32
    with torch.inference_mode():
        ids = [torch.tensor([prompt + tokens[:-1]]) for prompt, (tokens, _) in zip(prompts, answers, strict=True)]
        exact = [model.float()(input_ids=i).logits[0] if low else None for i in ids]
    return [Stream(p, *answer, e) for p, answer, e in zip(prompts, answers, exact, strict=True)]


@torch.inference_mode()
def _greedy(model: Any, prompt: Sequence[int]) -> tuple[list[int], Tensor]:
    out = model(input_ids=torch.tensor([list(prompt)]), use_cache=True)
    rows, tokens = [out.logits[0]], [int(out.logits[0, -1].argmax())]
    while len(tokens) < STEPS:
        out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0])
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens, torch.cat(rows)


def agreement(mode: str, path: Path, dtype: torch.dtype, streams: list[Stream], fleet: ExpertFleet) -> Agreement:
    """Run the checkpoint at ``path`` in the way ``mode`` (one of MODES), and compare with ``streams`` (all of
    them where several share a step, else the longest)."""
    longest = streams[-1:]
    if mode == MODES[0]:
        return _compare(longest, _along(_runner(path, dtype, None), longest, whole=True))
    if mode == MODES[1]:
        return _compare(longest, _along(_runner(path, dtype, None), longest))
    served: AbstractContextManager[MoEClient | None] = nullcontext()
    if mode == MODES[3]:
        served = fleet.serving(path, dtype)
    with served as moe:
        got = _along(_runner(path, dtype, moe), streams, chunk=CHUNK)
        if moe is not None:
            fleet.check_all_were_asked()
    return _compare(streams, got)


class _Distributed(PagedRunner):
    """Its experts are behind ``moe``; none are left here."""

    def __init__(self, path: Path, dtype: torch.dtype, moe: MoEClient) -> None:
        super().__init__(path, dtype, n_blocks=_BLOCKS)
        self.moe = self._client = moe
        del self.bank, self.gate

    def step(self, work: Sequence[tuple[int, int]]) -> list[Tensor]:
        """See PagedRunner."""
        self._client.begin_step()
        return super().step(work)


def _runner(path: Path, dtype: torch.dtype, moe: MoEClient | None) -> PagedRunner:
    return PagedRunner(path, dtype, n_blocks=_BLOCKS) if moe is None else _Distributed(path, dtype, moe)


def _along(runner: PagedRunner, streams: Sequence[Stream], chunk: int = 1 << 30, whole: bool = False) -> list[Tensor]:
    """Logits of each stream's ids, computed side by side: prompts in chunks, then token by token; or at once."""
    numbers = [runner.add(stream.ids) for stream in streams]
    got: list[list[Tensor]] = [[] for _ in streams]
    done = [0] * len(streams)
    while work := {
        i: _next(stream, done[i], chunk, whole) for i, stream in enumerate(streams) if done[i] < len(stream.ids)
    }:
        for i, logits in zip(work, runner.step([(numbers[i], count) for i, count in work.items()]), strict=True):
            got[i].append(logits)
            done[i] += work[i]
    return [torch.cat(parts) for parts in got]


def _next(stream: Stream, done: int, chunk: int, whole: bool) -> int:
    """Tokens of the next step, when ``done`` are computed."""
    if whole:
        return len(stream.ids)
    return min(chunk, len(stream.prompt) - done) if done < len(stream.prompt) else 1


def _compare(streams: Sequence[Stream], got: Sequence[Tensor]) -> Agreement:
    scale = max(float(stream.logits.abs().max()) for stream in streams)
    pairs = list(zip(streams, got, strict=True))
    delta = max(float((logits.float() - stream.logits.float()).abs().max()) for stream, logits in pairs) / scale
    same = ties = 0
    for stream, logits in pairs:
        answer = slice(len(stream.prompt) - 1, None)
        equal = logits[answer].float().argmax(dim=-1) == torch.tensor(stream.tokens)
        best = stream.logits[answer].float().topk(2, dim=-1).values
        same += int(equal.sum())
        ties += int((~equal & (best[:, 0] - best[:, 1] < NEAR_TIE * scale)).sum())
    low = [(stream, logits) for stream, logits in pairs if stream.exact is not None]
    agreed = Agreement(delta, same, STEPS * len(streams), ties)
    return replace(agreed, error=_error(low), right=_right(low)) if low else agreed


def _error(pairs: Sequence[tuple[Stream, Tensor]]) -> float:
    """Of the lowest deciles: of positions at which rounding has turned no choice of a gate or an indexer, neither ours
    nor transformers'; one that is turned outweighs all rounding, and changes what comes after it."""
    ours = [(logits.float() - stream.exact).pow(2).mean(dim=-1) for stream, logits in pairs]
    theirs = [(stream.logits.float() - stream.exact).pow(2).mean(dim=-1) for stream, _ in pairs]
    return float((torch.cat(ours).quantile(0.1) / torch.cat(theirs).quantile(0.1)).sqrt())


def _right(pairs: Sequence[tuple[Stream, Tensor]]) -> tuple[float, float]:
    best = torch.cat([stream.exact.argmax(dim=-1) for stream, _ in pairs if stream.exact is not None])
    ours = torch.cat([logits.float().argmax(dim=-1) for _, logits in pairs])
    theirs = torch.cat([stream.logits.float().argmax(dim=-1) for stream, _ in pairs])
    return float((ours == best).float().mean()), float((theirs == best).float().mean())
