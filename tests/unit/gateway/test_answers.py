"""Several answers in one stream of messages: who comes first, what belongs to whom, how they end."""

from __future__ import annotations

import dataclasses

import pytest
from expertmesh.v1 import inference_pb2 as pb

from actors.engine.request import FinishReason, SamplingParams, TokenEvent, TokenLogprobs
from cluster.gateway.answers import Answers
from cluster.gateway.errors import Internal
from cluster.gateway.validation import ValidRequest
from tests.unit.gateway.test_answer import MODEL, TOKENIZER, events, text_of

LENGTH = FinishReason.LENGTH
PROMPT = tuple(TOKENIZER.encode("hello world"))


def answers(n: int = 2, stops: tuple[str, ...] = ()) -> Answers:
    return Answers(ValidRequest("r", PROMPT, SamplingParams(seed=3), True, 100, frozenset(), stops, 0, n), MODEL)


def of(choice: int, messages: list[pb.GenerateResponse]) -> list[pb.GenerateResponse]:
    return [message for message in messages if message.choice == choice and not message.HasField("started")]


def test_each_message_tells_its_choice_and_started_comes_once() -> None:
    made = answers()
    messages = [*made.push(0, events("ab")[:1]), *made.push(1, events("xy")), *made.push(0, events("ab")[1:])]
    assert [message.HasField("started") for message in messages] == [True] + [False] * (len(messages) - 1)
    assert [text_of(of(choice, messages)) for choice in (0, 1)] == ["ab", "xy"]
    assert [[m.next_index for m in of(choice, messages)] for choice in (0, 1)] == [[1, 2, 2], [2, 2]]
    assert made.finished


def test_what_comes_before_the_first_choice_is_held_back() -> None:
    made = answers(3)
    assert made.push(2, events("pqr")[:1]) == []
    assert made.push(1, events("xy")) == []
    assert made.push(2, events("pqr")[1:]) == []
    messages = made.push(0, events("ab"))
    assert messages[0].HasField("started")
    assert [text_of(of(choice, messages)) for choice in range(3)] == ["ab", "xy", "pqr"]
    assert made.finished


def test_each_choice_has_its_own_end() -> None:
    made = answers(stops=("END",))
    messages = made.push(0, events("aENDb"))
    assert text_of(messages) == "a"
    assert (messages[-1].finished.reason, made.finished) == (pb.FINISH_REASON_STOP, False)
    assert made.push(0, events("more")) == [], "what was on its way when it was stopped"
    messages = made.push(1, events("aEN"))
    assert (text_of(messages), messages[-1].finished.reason) == ("aEN", pb.FINISH_REASON_LENGTH)
    assert made.finished


def test_a_stop_string_in_what_was_held_back() -> None:
    made = answers(stops=("END",))
    made.push(1, events("aEND rest")[:-1])
    made.push(1, events("aEND rest")[-1:])
    messages = made.push(0, events("x"))
    assert [(m.choice, m.finished.reason) for m in messages if m.HasField("finished")] == [
        (0, pb.FINISH_REASON_LENGTH),
        (1, pb.FINISH_REASON_STOP),
    ]
    assert text_of(of(1, messages)) == "a"


def test_a_stop_string_ends_a_choice_at_once_though_its_messages_are_held_back() -> None:
    made = answers(stops=("END",))
    assert (made.push(1, events("aEND rest")[:-1]), made.ended(1), made.ended(0)) == ([], True, False)
    failed = TokenEvent("e", 99, None, FinishReason.ERROR, "too late")
    assert made.push(1, [failed]) == [], "nobody waits for it any more"
    messages = made.push(0, events("ab")[:1])
    assert [message.HasField("started") for message in messages].index(True) == 0
    assert (text_of(of(1, messages)), made.ended(0), made.finished) == ("a", False, False)
    made.push(0, events("ab")[1:])
    assert made.finished


@pytest.mark.parametrize("begun", [False, True])
def test_one_choices_error_is_the_requests(begun: bool) -> None:
    made = answers()
    if begun:
        made.push(0, events("ab")[:1])
    with pytest.raises(Internal):
        made.push(1, [TokenEvent("e", 0, None, FinishReason.ERROR, "why")])


def test_log_probabilities_and_the_cache_are_told() -> None:
    told = TokenLogprobs(-0.5, 2, ((7, -0.25), (8, -1.0)))
    of_prompt = (None, *[told] * (len(PROMPT) - 1))
    (first, last), made = events("ab"), answers()
    first = dataclasses.replace(first, logprobs=told, prompt_logprobs=of_prompt, cached=2)
    last = dataclasses.replace(last, logprobs=TokenLogprobs(-4.0, 1), cached=9)
    started, tokens, finished = made.push(0, [first, last])
    assert started.started.cached_tokens == finished.finished.usage.cached_tokens == 2
    assert [one.token_id for one in started.started.prompt_logprobs] == list(PROMPT[1:])
    top = [pb.TokenLogprob(token_id=7, logprob=-0.25), pb.TokenLogprob(token_id=8, logprob=-1.0)]
    assert started.started.prompt_logprobs[0] == pb.TokenLogprobs(token_id=PROMPT[1], logprob=-0.5, rank=2, top=top)
    assert list(tokens.logprobs) == [
        pb.TokenLogprobs(token_id=first.token, logprob=-0.5, rank=2, top=top),
        pb.TokenLogprobs(token_id=last.token, logprob=-4.0, rank=1),
    ]
    (_, finished) = made.push(1, [dataclasses.replace(event, cached=5) for event in events("xy")])
    assert finished.finished.usage.cached_tokens == 5


def test_log_probabilities_do_not_wait_for_their_text() -> None:
    told = TokenLogprobs(-0.5, 1)
    (first, second) = [dataclasses.replace(event, logprobs=told, finish=None) for event in events("é👩")[:2]]
    half = dataclasses.replace(second, index=0)
    messages = answers(1).push(0, [half])
    assert [(list(m.token_ids), len(m.logprobs), m.text) for m in messages[1:]] == [([half.token], 1, "")]
    assert len(answers(1).push(0, [first, second])[1].logprobs) == 2
