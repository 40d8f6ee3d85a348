"""From one stream's token events to the messages that the client gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expertmesh.v1 import inference_pb2 as pb

from actors.engine.request import FinishReason, TokenEvent
from cluster.gateway.detokenize import IncrementalDetokenizer
from cluster.gateway.errors import SHARDS_DOWN, Cancelled, DeadlineExceeded, Internal, ServiceError, Unavailable
from cluster.gateway.served_model import ServedModel
from cluster.gateway.stops import StopMatcher
from cluster.gateway.validation import ValidRequest

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class Answer:
    """The client's view of one request. Pure: events in, messages out.

    Text is a function of the tokens alone, never of how they were grouped into messages; so a stream that is resumed
    at ``next_index`` goes on with exactly the text that was not yet sent.
    """

    def __init__(self, request: ValidRequest, model: ServedModel) -> None:
        self._request = request
        self._model = model
        self._detokenizer = IncrementalDetokenizer(model.tokenizer, request.prompt_ids)
        self._stops = StopMatcher(request.stops)
        self._generated = 0
        self._started = False
        self.finished = False

    def push(self, events: Sequence[TokenEvent]) -> list[pb.GenerateResponse]:
        """Messages for what the events bring. Raises the ServiceError with which the call must end."""
        messages: list[pb.GenerateResponse] = []
        tokens: list[int] = []
        texts: list[str] = []
        for event in events:
            stop = None
            if event.token is not None:
                text, stop = self._take(event.token)
                if self._generated > self._request.next_index:
                    tokens.append(event.token)
                    texts.append(text)
            if stop is not None or event.finish is not None:
                if stop is None:
                    self._check(event)
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

    def _check(self, event: TokenEvent) -> None:
        error = _failure(event)
        if error is not None:
            raise error

    def _tokens(self, tokens: list[int], text: str) -> list[pb.GenerateResponse]:
        if not tokens and not text:
            return []
        return [*self._start(), self._message(token_ids=tokens, text=text)]

    def _start(self) -> list[pb.GenerateResponse]:
        if self._started:
            return []
        self._started = True
        started = pb.Started(
            model=self._model.name,
            prompt_tokens=len(self._request.prompt_ids),
            seed=self._request.sampling.seed,
        )
        return [
            pb.GenerateResponse(
                request_id=self._request.request_id, next_index=self._request.next_index, started=started
            )
        ]

    def _end(self, reason: FinishReason | None, stop: str) -> pb.GenerateResponse:
        assert reason is not None
        self.finished = True
        usage = pb.Usage(prompt_tokens=len(self._request.prompt_ids), completion_tokens=self._generated)
        return self._message(finished=pb.Finished(reason=_REASONS[reason], stop=stop, usage=usage))

    def _message(self, **parts: Any) -> pb.GenerateResponse:
        return pb.GenerateResponse(request_id=self._request.request_id, next_index=self._generated, **parts)


def _failure(event: TokenEvent) -> ServiceError | None:
    match event.finish:
        case FinishReason.CANCELLED:
            return Cancelled()
        case FinishReason.DEADLINE:
            return DeadlineExceeded()
        case FinishReason.UNAVAILABLE:
            return Unavailable(SHARDS_DOWN)
        case FinishReason.ERROR:
            return Internal(event.message)
        case _:
            return None
