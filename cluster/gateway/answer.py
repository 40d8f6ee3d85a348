"""From one stream's token events to the messages of one choice that the client gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expertmesh.v1 import inference_pb2 as pb

from actors.engine.request import FinishReason, TokenEvent, TokenLogprobs
from cluster.gateway.detokenize import IncrementalDetokenizer
from cluster.gateway.errors import SHARDS_DOWN, Cancelled, DeadlineExceeded, Internal, Unavailable
from cluster.gateway.served_model import ServedModel
from cluster.gateway.stops import StopMatcher
from cluster.gateway.validation import ValidRequest

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class Answer:
    """The client's view of one choice. Pure: events in, messages out. Choice 0 says that the request has started.

    Text is a function of the tokens alone, never of how they were grouped into messages; so a stream that is resumed
    at ``next_index`` goes on with exactly the text that was not yet sent. ``started`` is the same each time it is sent,
    the log-probabilities of the prompt included, but for ``cached_tokens``: a request that is sent again finds the
    blocks of its first time.
    """

    def __init__(self, request: ValidRequest, model: ServedModel, choice: int = 0) -> None:
        self._request = request
        self._model = model
        self._choice = choice
        self._detokenizer = IncrementalDetokenizer(model.tokenizer, request.prompt_ids)
        self._stops = StopMatcher(request.stops)
        self._generated = 0
        self._first: TokenEvent | None = None
        self.started = choice > 0
        self.finished = False

    def push(self, events: Sequence[TokenEvent]) -> list[pb.GenerateResponse]:
        """Messages for what the events bring. Raises the ServiceError with which the call must end."""
        messages: list[pb.GenerateResponse] = []
        tokens: list[TokenEvent] = []
        texts: list[str] = []
        for event in events:
            stop = None
            if event.token is not None:
                self._first = self._first or event
                text, stop = self._take(event.token)
                if self._generated > self._request.next_index:
                    tokens.append(event)
                    texts.append(text)
            if stop is not None or event.finish is not None:
                if stop is None:
                    _check(event)
                    rest, stop = self._rest()
                    if self._generated > self._request.next_index:
                        texts.append(rest)
                messages += self._tokens(tokens, "".join(texts)) or self._start()
                messages.append(self._end(event.finish if stop is None else FinishReason.STOP, stop or ""))
                return messages
        return messages + self._tokens(tokens, "".join(texts))

    def _take(self, token: int) -> tuple[str, str | None]:
        self._generated += 1
        return self._stops.push(self._detokenizer.push([token]))

    def _rest(self) -> tuple[str, str | None]:
        """What was held back, now that nothing more comes, and the stop string that completed in it, if one did."""
        text, stop = self._stops.push(self._detokenizer.flush())
        return (text, stop) if stop is not None else (text + self._stops.flush(), None)

    def _tokens(self, events: list[TokenEvent], text: str) -> list[pb.GenerateResponse]:
        if not events and not text:
            return []
        ids = [event.token for event in events]
        logprobs = [
            _logprobs(event.token, event.logprobs)
            for event in events
            if event.token is not None and event.logprobs is not None
        ]
        return [*self._start(), self._message(token_ids=ids, logprobs=logprobs, text=text)]

    def _start(self) -> list[pb.GenerateResponse]:
        if self.started:
            return []
        self.started = True
        started = pb.Started(
            model=self._model.name,
            prompt_tokens=len(self._request.prompt_ids),
            seed=self._request.sampling.seed,
            cached_tokens=self._cached,
        )
        message = pb.GenerateResponse(
            request_id=self._request.request_id, next_index=self._request.next_index, started=started
        )
        self._add_prompt_logprobs(message.started)
        return [message]

    def _add_prompt_logprobs(self, started: pb.Started) -> None:
        """One by one into the message itself: a list of many would be copied in one call, during which no other
        thread runs."""
        told = self._first.prompt_logprobs if self._first is not None else None
        for token, logprobs in zip(self._request.prompt_ids, told or (), strict=told is not None):
            if logprobs is not None:
                started.prompt_logprobs.append(_logprobs(token, logprobs))

    def _end(self, reason: FinishReason | None, stop: str) -> pb.GenerateResponse:
        assert reason is not None
        self.finished = True
        usage = pb.Usage(
            prompt_tokens=len(self._request.prompt_ids),
            completion_tokens=self._generated,
            cached_tokens=self._cached,
        )
        return self._message(finished=pb.Finished(reason=_REASONS[reason], stop=stop, usage=usage))

    @property
    def _cached(self) -> int:
        """Of the prompt's tokens: what the run with the first token found when it began."""
        return self._first.cached if self._first is not None else 0

    def _message(self, **parts: Any) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            request_id=self._request.request_id, next_index=self._generated, choice=self._choice, **parts
        )


def _logprobs(token: int, told: TokenLogprobs) -> pb.TokenLogprobs:
    top = [pb.TokenLogprob(token_id=other, logprob=logprob) for other, logprob in told.top]
    return pb.TokenLogprobs(token_id=token, logprob=told.logprob, rank=told.rank, top=top)


def _check(event: TokenEvent) -> None:
    """Raises the error that ends the call, if the event tells one."""
    match event.finish:
        case FinishReason.CANCELLED:
            raise Cancelled
        case FinishReason.DEADLINE:
            raise DeadlineExceeded
        case FinishReason.UNAVAILABLE:
            raise Unavailable(SHARDS_DOWN)
        case FinishReason.ERROR:
            raise Internal(event.message)
