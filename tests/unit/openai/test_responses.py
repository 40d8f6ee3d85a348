"""The messages of an answer, as OpenAI's clients read them."""

from __future__ import annotations

import pytest
from expertmesh.v1 import inference_pb2 as pb
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.openai.requests import Endpoint, Parsed
from cluster.openai.responses import Answer, Json

CREATED = 1_700_000_000


def message(**fields: object) -> pb.GenerateResponse:
    return pb.GenerateResponse(request_id="r1", **fields)  # type: ignore[arg-type]


def stream(*texts: str, reason: int = pb.FINISH_REASON_STOP) -> list[pb.GenerateResponse]:
    usage = pb.Usage(prompt_tokens=5, completion_tokens=len(texts))
    return [
        message(started=pb.Started(model="tiny", prompt_tokens=5, seed=1)),
        *(message(text=text, token_ids=[7]) for text in texts),
        message(finished=pb.Finished(reason=reason, usage=usage)),
    ]


def answer(endpoint: Endpoint, streams: bool, include_usage: bool = False) -> Answer:
    return Answer(Parsed(endpoint, pb.GenerateRequest(), streams, include_usage), CREATED)


def chunks(endpoint: Endpoint, messages: list[pb.GenerateResponse], include_usage: bool = False) -> list[Json]:
    told = answer(endpoint, True, include_usage)
    return [chunk for one in messages for chunk in told.push(one)]


def whole(endpoint: Endpoint, messages: list[pb.GenerateResponse]) -> Json:
    told = answer(endpoint, False)
    for one in messages:
        told.push(one)
    return told.body()


def test_a_whole_chat() -> None:
    body = whole(Endpoint.CHAT, stream("He", "", "llo"))
    assert body == {
        "id": "chatcmpl-r1",
        "object": "chat.completion",
        "created": CREATED,
        "model": "tiny",
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }
    assert ChatCompletion.model_validate(body, strict=True).choices[0].message.content == "Hello"


def test_a_whole_text() -> None:
    body = whole(Endpoint.COMPLETIONS, stream("a", "b", reason=pb.FINISH_REASON_LENGTH))
    assert (body["id"], body["object"]) == ("cmpl-r1", "text_completion")
    assert body["choices"] == [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}]
    assert Completion.model_validate(body, strict=True).usage is not None


def test_the_chunks_of_a_chat() -> None:
    found = chunks(Endpoint.CHAT, stream("He", "", "llo"))
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert "usage" not in chunk
        assert (chunk["id"], chunk["object"], chunk["model"]) == ("chatcmpl-r1", "chat.completion.chunk", "tiny")
    choices = [chunk["choices"][0] for chunk in found]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "He"},
        {"content": "llo"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


def test_the_chunks_of_a_text() -> None:
    found = chunks(Endpoint.COMPLETIONS, stream("a", "b"))
    assert [chunk["choices"][0]["text"] for chunk in found] == ["a", "b", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [None, None, "stop"]
    assert {chunk["object"] for chunk in found} == {"text_completion"}


@pytest.mark.parametrize("endpoint", Endpoint)
def test_usage_comes_last_and_alone(endpoint: Endpoint) -> None:
    *others, last = chunks(endpoint, stream("a", "b"), include_usage=True)
    assert [chunk["usage"] for chunk in others] == [None] * len(others)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def test_a_stream_that_was_resumed_is_one_answer() -> None:
    first, second = stream("a", "b")[:3], stream("c", "d")
    assert whole(Endpoint.CHAT, [*first, *second])["choices"][0]["message"]["content"] == "abcd"
    roles = [chunk["choices"][0]["delta"] for chunk in chunks(Endpoint.CHAT, [*first, *second])]
    assert [delta for delta in roles if "role" in delta] == [{"role": "assistant", "content": ""}]


def test_half_an_answer_has_no_body() -> None:
    told = answer(Endpoint.CHAT, False)
    told.push(stream("a")[0])
    assert not told.finished
    with pytest.raises(RuntimeError, match="not finished"):
        told.body()


def test_a_stream_keeps_no_text() -> None:
    told = answer(Endpoint.CHAT, True)
    for one in stream("a secret", "b"):
        told.push(one)
    assert told.finished
    assert "a secret" not in repr(vars(told))
    with pytest.raises(RuntimeError, match="a stream"):
        told.body()
