"""The answers of one request, as the one stream of messages that its client gets."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.v1 import inference_pb2 as pb

from actors.engine.request import TokenEvent
from cluster.gateway.answer import Answer, failure_of
from cluster.gateway.served_model import ServedModel
from cluster.gateway.validation import ValidRequest


class Answers:
    """An ``Answer`` for each choice. Pure: events in, messages out.

    ``started`` comes once and first, with choice 0's first token, which alone knows the prompt's log-probabilities;
    what others bring before that is held back. An error of one choice is the whole request's.
    """

    def __init__(self, request: ValidRequest, model: ServedModel) -> None:
        self._answers = [Answer(request, model, choice) for choice in range(request.n)]
        self._held: list[tuple[int, Sequence[TokenEvent]]] = []

    def push(self, choice: int, events: Sequence[TokenEvent]) -> list[pb.GenerateResponse]:
        """Messages for what the events bring. Raises the ServiceError with which the call must end."""
        if choice and not self._answers[0].started:
            error = failure_of(events[-1])
            if error is not None:
                raise error
            self._held.append((choice, events))
            return []
        messages = self._push(choice, events)
        if self._held and self._answers[0].started:
            held, self._held = self._held, []
            for other, earlier in held:
                messages += self._push(other, earlier)
        return messages

    @property
    def finished(self) -> bool:
        """True once all last messages were given."""
        return all(answer.finished for answer in self._answers)

    def _push(self, choice: int, events: Sequence[TokenEvent]) -> list[pb.GenerateResponse]:
        """Nothing, once a choice has met a stop string: more of it may have been on its way."""
        answer = self._answers[choice]
        return [] if answer.finished else answer.push(events)
