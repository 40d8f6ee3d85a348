"""What a step tells a gateway comes back as it was."""

from __future__ import annotations

import pytest

from actors.engine.request import FinishReason, TokenEvent, TokenLogprobs
from actors.frames import Kind
from actors.token_frames import decode_tokens, encode_tokens
from actors.transport.base import Frame, FrameTag, ProtocolError


def frame(*parts: bytes) -> Frame:
    return Frame(Kind.TOKENS, FrameTag(), tuple(memoryview(part) for part in parts))


def test_events_come_back() -> None:
    events = [
        TokenEvent("gateway-0/1", 0, 0),
        TokenEvent("gateway-0/2", 41, 129_279, FinishReason.STOP),
        TokenEvent("gateway-0/1", 2**31, None, FinishReason.ERROR, "the expert's Zähler\nbroke"),
    ]
    assert decode_tokens(frame(*(bytes(part) for part in encode_tokens(events)))) == events
    assert decode_tokens(frame(*(bytes(part) for part in encode_tokens([])))) == []


def test_times_come_back_in_single_precision_and_only_where_they_were() -> None:
    events = [
        TokenEvent("a", 0, 5, queue_s=0.0, prefill_s=2.5),
        TokenEvent("b", 7, 5),
        TokenEvent("c", 0, 5, FinishReason.LENGTH, queue_s=1e-6, prefill_s=86_400.1),
    ]
    back = decode_tokens(frame(*(bytes(part) for part in encode_tokens(events))))
    assert back[:2] == events[:2]
    assert (back[2].queue_s, back[2].prefill_s) == pytest.approx((1e-6, 86_400.1), rel=1e-7)


def test_log_probabilities_come_back_where_they_were() -> None:
    some = TokenLogprobs(-0.5, 1, ((7, -0.5), (129_279, -2.25)))
    rare = TokenLogprobs(-float("inf"), 129_280)
    events = [
        TokenEvent("a", 0, 7, logprobs=some, prompt_logprobs=(None, rare, some), cached=48),
        TokenEvent("b", 3, 7),
        TokenEvent("c", 4, 9, FinishReason.STOP, logprobs=rare),
        TokenEvent("d", 0, 7, prompt_logprobs=(None, some)),
    ]
    assert decode_tokens(frame(*(bytes(part) for part in encode_tokens(events)))) == events


def test_a_frame_that_is_torn_is_refused() -> None:
    parts = [
        bytes(part) for part in encode_tokens([TokenEvent("a", 0, 7, logprobs=TokenLogprobs(-1.0, 1, ((1, -1.0),)))])
    ]
    for at in (0, 3, 4):
        torn = [part[:-1] if n == at else part for n, part in enumerate(parts)]
        with pytest.raises(ProtocolError, match="cannot be read"):
            decode_tokens(frame(*torn))
    with pytest.raises(ProtocolError, match="4 parts, expected 5"):
        decode_tokens(frame(*parts[:4]))
