"""From token events to messages: text, ends, and streams that are resumed at any token."""

from __future__ import annotations

import pytest
from expertmesh.v1 import inference_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.request import FinishReason, SamplingParams, TokenEvent
from cluster.gateway.answer import Answer
from cluster.gateway.errors import Cancelled, DeadlineExceeded, Internal, ServiceError, Unavailable
from cluster.gateway.served_model import ServedModel
from cluster.gateway.validation import ValidRequest
from tests.unit.gateway.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
MODEL = ServedModel(
    "tiny", "deepseek_v3", "float32", 512, 300, 3, 2, 16, 4, frozenset(), SamplingParams(), TOKENIZER, None
)


def answer(stops: tuple[str, ...] = (), next_index: int = 0) -> Answer:
    prompt = tuple(TOKENIZER.encode("hello"))
    request = ValidRequest("r", prompt, SamplingParams(seed=3), True, 100, frozenset(), stops, next_index)
    return Answer(request, MODEL)


def events(text: str, finish: FinishReason = FinishReason.LENGTH) -> list[TokenEvent]:
    ids = TOKENIZER.encode(text)
    last = len(ids) - 1
    return [TokenEvent("e", n, token, finish if n == last else None) for n, token in enumerate(ids)]


def play(made: Answer, news: list[TokenEvent], sizes: list[int]) -> list[pb.GenerateResponse]:
    """Push the events in groups of the given sizes, the rest at once, until the answer is finished."""
    messages: list[pb.GenerateResponse] = []
    for size in [*sizes, len(news)]:
        group, news = news[:size], news[size:]
        if group and not made.finished:
            messages += made.push(group)
    return messages


def text_of(messages: list[pb.GenerateResponse]) -> str:
    return "".join(message.text for message in messages)


TEXTS = st.text(st.sampled_from("aéEND👩 x\n"), min_size=1, max_size=30)
SIZES = st.lists(st.integers(1, 5), max_size=10)


@given(TEXTS, st.sampled_from([(), ("END",), ("D", "👩 ")]), SIZES, st.data())
def test_a_resumed_stream_gives_exactly_what_was_not_sent(
    text: str, stops: tuple[str, ...], sizes: list[int], data: st.DataObject
) -> None:
    whole = play(answer(stops), events(text), sizes)
    at = data.draw(st.integers(0, len(whole) - 1))
    resumed = play(answer(stops, next_index=whole[at].next_index), events(text), sizes[::-1])
    assert text_of(whole[: at + 1]) + text_of(resumed) == text_of(whole)
    assert [t for m in whole[: at + 1] + resumed for t in m.token_ids] == [t for m in whole for t in m.token_ids]
    assert resumed[-1].finished == whole[-1].finished
    assert resumed[0].HasField("started")


@given(TEXTS, SIZES)
def test_text_does_not_depend_on_the_grouping(text: str, sizes: list[int]) -> None:
    stops = ("END",)
    messages = play(answer(stops), events(text), sizes)
    assert text_of(messages) == text.split("END")[0]
    wanted = pb.FINISH_REASON_STOP if "END" in text else pb.FINISH_REASON_LENGTH
    assert messages[-1].finished.reason == wanted
    assert [m.HasField("started") for m in messages] == [True] + [False] * (len(messages) - 1)
    assert [m.HasField("finished") for m in messages] == [False] * (len(messages) - 1) + [True]


def test_a_stop_string_that_completes_at_the_very_end_counts() -> None:
    """The replacement character of a broken byte is known only when nothing more comes."""
    broken = TokenEvent("e", 0, TOKENIZER.id_of("Ã"), FinishReason.LENGTH)
    (_, _, last) = answer(("\ufffd",), 0).push([TokenEvent("e", 0, TOKENIZER.encode("a")[0]), broken])
    assert (last.finished.reason, last.finished.stop) == (pb.FINISH_REASON_STOP, "\ufffd")


@pytest.mark.parametrize(
    ("finish", "error"),
    [
        (FinishReason.DEADLINE, DeadlineExceeded),
        (FinishReason.CANCELLED, Cancelled),
        (FinishReason.UNAVAILABLE, Unavailable),
        (FinishReason.ERROR, Internal),
    ],
)
def test_other_ends_are_errors(finish: FinishReason, error: type[ServiceError]) -> None:
    with pytest.raises(error):
        answer().push([TokenEvent("e", 0, None, finish, "why")])
