"""Log-probabilities of drawn tokens and of prompts find their events."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actors.engine.plan import Chunk
from actors.engine.request import Draw, FinishReason, SamplingParams, TokenEvent
from actors.logprob_book import LogprobBook

VOCABULARY = 50
HEAD = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(0))


def head(hidden: Tensor) -> Tensor:
    return hidden @ HEAD


def rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def chunk(
    name: str, start: int = 0, length: int = 1, logprobs: int | None = None, targets: tuple[int, ...] = ()
) -> Chunk:
    draw = Draw(SamplingParams(logprobs=logprobs), 0)
    return Chunk(name, (0,) * length, start, (0,) * length, (), draw, targets, prompt_logprobs=2)


def test_of_drawn_tokens() -> None:
    book, logits = LogprobBook(), head(rows(3))
    book.note_drawn([chunk("a", logprobs=2), chunk("b"), chunk("c", logprobs=0)], logits, [7, 8, 9])
    a, b, c = book.complete([TokenEvent(name, 0, token) for name, token in (("a", 7), ("b", 8), ("c", 9))])
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert a.logprobs is not None
    assert abs(a.logprobs.logprob - float(expected[0, 7])) < 1e-6
    assert [token for token, _ in a.logprobs.top] == expected[0].topk(2).indices.tolist()
    assert b.logprobs is None
    assert c.logprobs is not None
    assert (c.logprobs.top, c.logprobs.rank) == ((), 1 + int((expected[2] > expected[2, 9]).sum()))


def test_each_step_tells_its_own() -> None:
    book = LogprobBook()
    told = []
    for seed in (1, 2):
        book.note_drawn([chunk("a", logprobs=0)], head(rows(1, seed)), [7])
        told += book.complete([TokenEvent("a", seed, 7)])
    assert [event.logprobs.logprob for event in told if event.logprobs] == pytest.approx(
        [torch.log_softmax(head(rows(1, seed))[0], dim=-1)[7].item() for seed in (1, 2)]
    )


def test_a_row_without_a_token_and_a_void_step_tell_nothing() -> None:
    book = LogprobBook()
    book.note_drawn([chunk("a", logprobs=0), chunk("b", logprobs=0)], head(rows(2)), [None, 4])
    book.forget_step()
    assert book.complete([TokenEvent("b", 0, 4)])[0].logprobs is None


def test_of_a_prompt_in_chunks() -> None:
    """The second chunk is computed twice, as after a preemption."""
    book, hidden, prompt = LogprobBook(), rows(150), [n % VOCABULARY for n in range(151)]
    for start, end in ((0, 100), (100, 130), (100, 150)):
        part = chunk("a", start, end - start, targets=tuple(prompt[start + 1 : end + 1]))
        book.note_prompts([part], hidden[start:end], head)
    assert book.complete([TokenEvent("other", 0, 3)])[0].prompt_logprobs is None
    (event,) = book.complete([TokenEvent("a", 0, 3)])
    expected = torch.log_softmax(head(hidden).double(), dim=-1)
    assert event.prompt_logprobs is not None
    first, *rest = event.prompt_logprobs
    assert first is None
    assert len(rest) == 150
    for position, entry in enumerate(rest, start=1):
        assert entry is not None
        assert abs(entry.logprob - float(expected[position - 1, prompt[position]])) < 1e-5
        assert [token for token, _ in entry.top] == expected[position - 1].topk(2).indices.tolist()
    assert book.complete([TokenEvent("a", 1, 3)])[0].prompt_logprobs is None


def test_a_request_that_ends_without_a_token_leaves_nothing() -> None:
    book = LogprobBook()
    book.note_prompts([chunk("a", 0, 3, targets=(1, 2, 3))], rows(3), head)
    (event,) = book.complete([TokenEvent("a", 0, None, FinishReason.CANCELLED)])
    assert event.prompt_logprobs is None
    assert book.complete([TokenEvent("a", 0, 3)])[0].prompt_logprobs is None


def test_rows_of_several_prompts_come_in_the_order_of_the_chunks() -> None:
    book, hidden = LogprobBook(), rows(70)
    parts = [chunk("a", 0, 2, targets=(4, 5)), chunk("none"), chunk("b", 10, 68, targets=tuple([6] * 68))]
    book.note_prompts(parts, hidden, head)
    a, b = book.complete([TokenEvent("a", 0, 1), TokenEvent("b", 0, 1)])
    expected = torch.log_softmax(head(hidden).double(), dim=-1)
    assert [round(e.logprob, 4) for e in (a.prompt_logprobs or ())[1:] if e] == [
        round(float(expected[0, 4]), 4),
        round(float(expected[1, 5]), 4),
    ]
    last = (b.prompt_logprobs or ())[-1]
    assert last is not None
    assert abs(last.logprob - float(expected[69, 6])) < 1e-5
