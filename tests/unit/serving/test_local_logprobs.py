"""Log-probabilities as OpenAI's own client reads them, from an engine that says what a test tells it to."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from actors.engine.request import TokenEvent, TokenLogprobs
from cluster.config import ServerConfig
from cluster.gateway import answer
from cluster.gateway.http import generation
from cluster.gateway.streams import Streams
from cluster.gateway.validation import ValidRequest
from cluster.launch import running_cluster
from tests.unit.gateway.tiny_tokenizers import byte_level

Local = Callable[..., ServerConfig]
CHAT: Any = [{"role": "user", "content": "hello"}]
PROMPT, COUNT = [5, 6, 7], 12
SPELLED = byte_level()
TOP = ((40, -0.25), (41, -1.5))
OF_PROMPT = TokenLogprobs(-3.0, 9, TOP)


def told(event: TokenEvent, request: ValidRequest) -> TokenEvent:
    """What an engine says besides, of what was asked for."""
    if event.token is None:
        return event
    own = prompt = None
    if request.sampling.logprobs is not None:
        own = TokenLogprobs(-2.0 - event.index, 3, TOP)
    if request.prompt_logprobs is not None and event.index == 0:
        prompt = (None, *[OF_PROMPT] * (len(request.prompt_ids) - 1))
    return dataclasses.replace(event, logprobs=own, prompt_logprobs=prompt, cached=2)


@pytest.fixture
def client(checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAI]:
    honest = Streams.deliver

    def deliver(streams: Streams, events: Sequence[TokenEvent]) -> None:
        requests = {name: run.stream.request for name, run in streams._runs.items()}
        honest(streams, [told(e, requests[e.request_id]) for e in events if e.request_id in requests])

    monkeypatch.setattr(Streams, "deliver", deliver)
    with (
        running_cluster(local(checkpoint[0])) as doors,
        OpenAI(base_url=f"http://{doors.http}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def test_of_a_chat(client: OpenAI) -> None:
    fields: Any = {"model": "", "messages": CHAT, "max_tokens": COUNT, "logprobs": True, "top_logprobs": 2, "n": 2}
    whole = client.chat.completions.create(**fields)
    streamed: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                streamed[choice.index] += choice.logprobs.content or []
    for choice in whole.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content is not None
        assert [one.logprob for one in content] == [-2.0 - index for index in range(COUNT)]
        assert [one.model_dump() for one in content] == [one.model_dump() for one in streamed[choice.index]]
        text = b"".join(bytes(one.bytes or []) for one in content if one.token not in SPELLED.special_tokens.values())
        assert text.decode("utf-8", "replace") == choice.message.content
        tops = [(top.token, top.logprob) for top in content[0].top_logprobs]
        assert tops == [(SPELLED.decode([token]), logprob) for token, logprob in TOP]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 2


def test_of_a_text_and_its_prompt(client: OpenAI) -> None:
    fields: Any = {"model": "", "prompt": PROMPT, "max_tokens": COUNT, "logprobs": 2}
    whole = client.completions.create(**fields, extra_body={"prompt_logprobs": 2, "ignore_eos": True})
    (choice,) = whole.choices
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [-2.0 - index for index in range(COUNT)]
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert tokens is not None
    assert offsets == [len("".join(tokens[:at])) for at in range(COUNT)]
    assert [entry and sorted(entry) for entry in choice.model_dump()["prompt_logprobs"]] == [
        None,
        ["40", "41", "6"],
        ["40", "41", "7"],
    ]
    chunks = list(client.completions.create(**fields, extra_body={"ignore_eos": True}, stream=True))
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for one in told for value in getattr(one, name)] == getattr(choice.logprobs, name)


def test_who_does_not_ask_is_not_told(client: OpenAI) -> None:
    chat = client.chat.completions.create(model="", messages=CHAT, max_tokens=3)
    text = client.completions.create(model="", prompt=PROMPT, max_tokens=3)
    assert chat.choices[0].logprobs is None
    assert text.choices[0].logprobs is None
    assert "prompt_logprobs" not in chat.model_dump()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("likeliest", [0, 20])
def test_many_leave_the_gateways_event_loop(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch, likeliest: int, chat: bool
) -> None:
    """Few do not: a thread would only cost time."""
    loops, built, spelling = set(), set(), set()

    def noting(found: set[Any], honest: Any) -> Any:
        return lambda *args: found.add(threading.current_thread()) or honest(*args)

    monkeypatch.setattr(Streams, "open", noting(loops, Streams.open))
    monkeypatch.setattr(answer.Answer, "_add_prompt_logprobs", noting(built, answer.Answer._add_prompt_logprobs))
    monkeypatch.setattr(generation, "spelled", noting(spelling, generation.spelled))
    fields: Any = {"model": "", "max_tokens": 2, "extra_body": {"prompt_logprobs": likeliest}}
    if chat:
        told = client.chat.completions.create(messages=CHAT, **fields).model_dump()
    else:
        told = client.completions.create(prompt=PROMPT + [9] * 40, **fields).model_dump()["choices"][0]
    first, *others = told["prompt_logprobs"]
    assert first is None
    assert all({"40", "41"} <= entry.keys() for entry in others)
    assert len(built) == len(loops) == 1
    assert (built == loops, spelling == loops) == ((False, False) if likeliest else (True, True))
