"""The messages of an answer, as OpenAI's clients read them."""

from __future__ import annotations

import json
from typing import Any

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


def spell(token_id: int) -> tuple[str, bytes]:
    """Every third token is half a character."""
    return ("\ufffd", b"\xc3") if token_id % 3 == 0 else (f"<{token_id}>", f"<{token_id}>".encode())


def answer(endpoint: Endpoint, streams: bool, include_usage: bool = False, **request: Any) -> Answer:
    return Answer(Parsed(endpoint, pb.GenerateRequest(**request), streams, include_usage), CREATED, spell)


def chunks(
    endpoint: Endpoint, messages: list[pb.GenerateResponse], include_usage: bool = False, **request: Any
) -> list[Json]:
    told = answer(endpoint, True, include_usage, **request)
    return [chunk for one in messages for chunk in told.push(one)]


def whole(endpoint: Endpoint, messages: list[pb.GenerateResponse], **request: Any) -> Json:
    told = answer(endpoint, False, **request)
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
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
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
    details = {"cached_tokens": 0}
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": details,
    }


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


# -- several answers ---------------------------------------------------------------------------------------------------


def several(*pieces: tuple[int, str], reasons: tuple[int, ...], cached: int = 0) -> list[pb.GenerateResponse]:
    """Messages of as many choices as there are reasons, each of whose pieces is a token."""
    counts = [sum(choice == index for choice, _ in pieces) for index in range(len(reasons))]
    usages = [
        pb.Usage(prompt_tokens=5, completion_tokens=count, cached_tokens=cached + index)
        for index, count in enumerate(counts)
    ]
    return [
        message(started=pb.Started(model="tiny", prompt_tokens=5, seed=1)),
        *(message(choice=choice, text=text, token_ids=[7]) for choice, text in pieces),
        *(
            message(choice=index, finished=pb.Finished(reason=reason, usage=usage))
            for index, (reason, usage) in reversed(list(enumerate(zip(reasons, usages, strict=True))))
        ),
    ]


PIECES = ((0, "a"), (1, "x"), (1, "y"), (0, "b"), (1, "z"))
REASONS = (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)


def test_several_answers_are_told_in_order_and_counted_together() -> None:
    body = whole(Endpoint.CHAT, several(*PIECES, reasons=REASONS, cached=3), n=2)
    found = ChatCompletion.model_validate(body, strict=True)
    assert [(c.index, c.message.content, c.finish_reason) for c in found.choices] == [
        (0, "ab", "stop"),
        (1, "xyz", "length"),
    ]
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (5, 5, 10)
    assert found.usage.prompt_tokens_details.cached_tokens == 3


def test_the_chunks_of_several_answers() -> None:
    found = chunks(Endpoint.CHAT, several(*PIECES, reasons=REASONS), include_usage=True, n=2)
    *others, last = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in found]
    choices = [chunk.choices[0] for chunk in others]
    assert [(c.index, c.delta.role) for c in choices[:2]] == [(0, "assistant"), (1, "assistant")]
    assert [(c.index, c.delta.content) for c in choices[2:7]] == list(PIECES)
    assert [(c.index, c.finish_reason) for c in choices[7:]] == [(1, "length"), (0, "stop")]
    assert last.usage is not None
    assert (last.choices, last.usage.completion_tokens) == ([], 5)


def test_an_answer_is_finished_when_all_choices_are() -> None:
    told = answer(Endpoint.COMPLETIONS, False, n=2)
    *rest, last = several(*PIECES, reasons=REASONS)
    assert not told.finished
    for one in rest:
        told.push(one)
        assert not told.finished
    with pytest.raises(RuntimeError, match="not finished"):
        told.body()
    told.push(last)
    assert [choice["text"] for choice in told.body()["choices"]] == ["ab", "xyz"]


def test_nothing_is_made_of_a_number_that_nobody_checked_yet() -> None:
    assert not answer(Endpoint.CHAT, False, n=2**32 - 1).finished


# -- log-probabilities -------------------------------------------------------------------------------------------------


def logprobs(token_id: int, logprob: float, *top: tuple[int, float], rank: int = 1) -> pb.TokenLogprobs:
    likeliest = [pb.TokenLogprob(token_id=other, logprob=value) for other, value in top]
    return pb.TokenLogprobs(token_id=token_id, logprob=logprob, rank=rank, top=likeliest)


FIRST = logprobs(1, -0.5, (1, -0.5), (2, -1.0))
SECOND = logprobs(3, -2.0, (4, -0.25), (6, -1.5), rank=3)
"""Its text is that of 6, which is likelier."""
TOLD = [
    message(started=pb.Started(model="tiny", prompt_tokens=3, prompt_logprobs=[SECOND, FIRST])),
    message(text="<1>", token_ids=[1], logprobs=[FIRST]),
    message(text="", token_ids=[3], logprobs=[SECOND]),
    message(text="é", token_ids=[1], logprobs=[FIRST]),
    message(finished=pb.Finished(reason=pb.FINISH_REASON_STOP, usage=pb.Usage(prompt_tokens=3, completion_tokens=3))),
]


def test_a_chats_log_probabilities() -> None:
    body = whole(Endpoint.CHAT, TOLD, logprobs=2)
    told = ChatCompletion.model_validate(body, strict=True).choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert body["choices"][0]["logprobs"]["refusal"] is None
    assert [(one.token, one.bytes, one.logprob) for one in told.content] == [
        ("<1>", [60, 49, 62], -0.5),
        ("\ufffd", [0xC3], -2.0),
        ("<1>", [60, 49, 62], -0.5),
    ]
    assert [[(top.token, top.logprob) for top in one.top_logprobs] for one in told.content[:2]] == [
        [("<1>", -0.5), ("<2>", -1.0)],
        [("<4>", -0.25), ("\ufffd", -1.5)],
    ]


def test_a_texts_log_probabilities() -> None:
    told = Completion.model_validate(whole(Endpoint.COMPLETIONS, TOLD, logprobs=2), strict=True).choices[0].logprobs
    assert told is not None
    assert told.tokens == ["<1>", "\ufffd", "<1>"]
    assert told.token_logprobs == [-0.5, -2.0, -0.5]
    assert told.text_offset == [0, 3, 4]
    assert told.top_logprobs == [
        {"<1>": -0.5, "<2>": -1.0},
        {"<4>": -0.25, "\ufffd": -1.5},
        {"<1>": -0.5, "<2>": -1.0},
    ]


def test_the_drawn_token_is_among_the_likeliest_of_a_text() -> None:
    drawn = [TOLD[0], message(text="<5>", token_ids=[5], logprobs=[logprobs(5, -3.0, (1, -0.5))]), TOLD[-1]]
    (told,) = whole(Endpoint.COMPLETIONS, drawn, logprobs=1)["choices"][0]["logprobs"]["top_logprobs"]
    assert told == {"<1>": -0.5, "<5>": -3.0}


@pytest.mark.parametrize("endpoint", Endpoint)
def test_no_log_probability_is_lost_where_text_lags_behind(endpoint: Endpoint) -> None:
    pieces = chunks(endpoint, TOLD, logprobs=2)
    for piece in pieces if endpoint == Endpoint.CHAT else []:
        ChatCompletionChunk.model_validate(piece, strict=True)
    found = [piece["choices"][0] for piece in pieces]
    told = [choice["logprobs"] for choice in found if choice["logprobs"]]
    together = whole(endpoint, TOLD, logprobs=2)["choices"][0]["logprobs"]
    for key, value in together.items():
        if value is not None:
            assert [entry for one in told for entry in one[key]] == value
    begun = [True] if endpoint == Endpoint.CHAT else []
    assert [choice["logprobs"] is None for choice in found] == [*begun, False, False, False, True]


@pytest.mark.parametrize("endpoint", Endpoint)
def test_the_prompts_log_probabilities_are_as_vllm_tells_them(endpoint: Endpoint) -> None:
    body = whole(endpoint, TOLD, prompt_logprobs=2)
    told = (body if endpoint == Endpoint.CHAT else body["choices"][0])["prompt_logprobs"]
    assert told == [
        None,
        {
            "3": {"logprob": -2.0, "rank": 3, "decoded_token": "\ufffd"},
            "4": {"logprob": -0.25, "rank": 1, "decoded_token": "<4>"},
            "6": {"logprob": -1.5, "rank": 2, "decoded_token": "\ufffd"},
        },
        {
            "1": {"logprob": -0.5, "rank": 1, "decoded_token": "<1>"},
            "2": {"logprob": -1.0, "rank": 2, "decoded_token": "<2>"},
        },
    ]
    assert body["choices"][0]["logprobs"] is None


def test_a_stream_that_was_resumed_keeps_its_log_probabilities() -> None:
    body = whole(Endpoint.COMPLETIONS, [*TOLD[:2], TOLD[0], *TOLD[2:]], logprobs=2)
    assert body == whole(Endpoint.COMPLETIONS, TOLD, logprobs=2)


@pytest.mark.parametrize("endpoint", Endpoint)
def test_in_pieces_it_is_the_same(endpoint: Endpoint) -> None:
    """And nothing is spelled before its piece is wanted."""
    tops = [pb.TokenLogprob(token_id=4, logprob=-1.5)]
    of_prompt = [pb.TokenLogprobs(token_id=token, logprob=-0.5, rank=1, top=tops) for token in range(3000)]
    begin, *rest = streams = stream("a", "b")
    begin.started.prompt_logprobs.extend(of_prompt)
    for one in rest[:-1]:
        one.logprobs.extend(of_prompt[:1])
    spelled: list[int] = []
    parsed = Parsed(endpoint, pb.GenerateRequest(logprobs=1, prompt_logprobs=1), False, False)
    told, again = [Answer(parsed, CREATED, lambda token: spelled.append(token) or spell(token)) for _ in range(2)]
    for one in streams:
        told.push(one)
        again.push(one)
    assert (spelled, told.entries) == ([], 2 * 2 + 3000 * 2)
    pieces = told.pieces()
    first = next(pieces)
    assert len(spelled) < 3000
    assert json.loads(b"".join([first, *pieces])) == again.body()
