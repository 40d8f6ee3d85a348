"""TOKENS frames: what one step has for one gateway.

Parts: event records; the request ids joined by newlines; JSON {record: message}; and, where log-probabilities were
asked for, one record for each token that has them and the likeliest tokens of all of them, one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.engine.request import FinishReason, TokenEvent, TokenLogprobs
from actors.frames import array_bytes, expect_parts, on_host
from actors.transport.base import Buffer, Frame, ProtocolError

# Times are NaN for None. float32 is 0.1 us in a second, and half the bytes: these are in every token's record.
_EVENT = np.dtype(
    [("index", "<u4"), ("token", "<i4"), ("finish", "u1"), ("queue_s", "<f4"), ("prefill_s", "<f4"), ("cached", "<u4")]
)
_FINISH: tuple[FinishReason | None, ...] = (None, *FinishReason)

_LOGPROBS = np.dtype([("event", "<u4"), ("position", "<i4"), ("rank", "<u4"), ("logprob", "<f4"), ("tops", "<u4")])
_TOP = np.dtype([("token", "<u4"), ("logprob", "<f4")])

_DRAWN = -1
"""``position`` of the log-probabilities of the event's own token; others are of the prompt's token at it."""


def encode_tokens(events: Sequence[TokenEvent]) -> list[Buffer]:
    """Parts of a TOKENS frame. Times and log-probabilities travel as float32."""
    records = np.empty(len(events), dtype=_EVENT)
    for at, event in enumerate(events):
        token = -1 if event.token is None else event.token
        times = _sent(event.queue_s), _sent(event.prefill_s)
        records[at] = (event.index, token, _FINISH.index(event.finish), *times, event.cached)
    messages = {str(at): event.message for at, event in enumerate(events) if event.message}
    return [
        records.tobytes(),
        "\n".join(event.request_id for event in events).encode(),
        json.dumps(messages).encode() if messages else b"",
        *_encode_logprobs(events),
    ]


def decode_tokens(frame: Frame) -> list[TokenEvent]:
    """The events of a TOKENS frame, as given to ``encode_tokens`` (numbers as float32). ProtocolError if it is none."""
    try:
        return list(_events(frame))
    except (ValueError, IndexError) as error:
        raise ProtocolError(f"a TOKENS frame cannot be read: {error}") from error


def _encode_logprobs(events: Sequence[TokenEvent]) -> list[Buffer]:
    found = [(at, position, entry) for at, event in enumerate(events) for position, entry in _entries(event)]
    if not found:
        return [b"", b""]
    records = [(at, position, e.rank, e.logprob, len(e.top)) for at, position, e in found]
    tops = [top for _, _, entry in found for top in entry.top]
    return [array_bytes(np.array(records, dtype=_LOGPROBS)), array_bytes(np.array(tops, dtype=_TOP)) if tops else b""]


def _entries(event: TokenEvent) -> Iterator[tuple[int, TokenLogprobs]]:
    if event.logprobs is not None:
        yield _DRAWN, event.logprobs
    for position, entry in enumerate(event.prompt_logprobs or ()):
        if entry is not None:
            yield position, entry


def _events(frame: Frame) -> Iterator[TokenEvent]:
    records, ids, messages, logprobs, tops = map(on_host, expect_parts(frame, 5))
    told: dict[str, Any] = json.loads(bytes(messages)) if len(messages) else {}
    rows = np.frombuffer(records, dtype=_EVENT).tolist()  # plain tuples: fields of numpy records are slow one by one
    names = bytes(ids).decode().split("\n") if rows else []
    drawn, prompts = _decode_logprobs(np.frombuffer(logprobs, _LOGPROBS), np.frombuffer(tops, _TOP))
    for at, (name, row) in enumerate(zip(names, rows, strict=True)):
        index, token, finish, queue_s, prefill_s, cached = row
        yield TokenEvent(
            request_id=name,
            index=index,
            token=None if token < 0 else token,
            finish=_FINISH[finish],
            message=told.get(str(at), ""),
            queue_s=None if math.isnan(queue_s) else queue_s,
            prefill_s=None if math.isnan(prefill_s) else prefill_s,
            logprobs=drawn.get(at),
            prompt_logprobs=(None, *prompts[at]) if at in prompts else None,
            cached=cached,
        )


def _decode_logprobs(
    records: NDArray[Any], tops: NDArray[Any]
) -> tuple[dict[int, TokenLogprobs], dict[int, list[TokenLogprobs]]]:
    """By the event's number: those of its token, and those of the prompt's tokens from the second on."""
    drawn: dict[int, TokenLogprobs] = {}
    prompts: dict[int, list[TokenLogprobs]] = {}
    if (named := int(records["tops"].sum())) != len(tops):
        raise ValueError(f"{named} likeliest tokens are named, {len(tops)} are there")
    listed, taken = tops.tolist(), 0
    for at, position, rank, logprob, n_tops in records.tolist():
        entry = TokenLogprobs(logprob, rank, tuple(listed[taken : taken + n_tops]))
        taken += n_tops
        if position == _DRAWN:
            drawn[at] = entry
        else:
            prompts.setdefault(at, []).append(entry)
    return drawn, prompts


def _sent(seconds: float | None) -> float:
    return math.nan if seconds is None else seconds
