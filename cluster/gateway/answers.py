"""The answers of one request, as the one stream of messages that its client gets."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.v1 import inference_pb2 as pb

from actors.engine.request import TokenEvent
from cluster.gateway.answer import Answer
from cluster.gateway.served_model import ServedModel
from cluster.gateway.validation import ValidRequest


class Answers:
    """An ``Answer`` for each choice. Pure: events in, messages out.

    ``started`` comes once and first, with choice 0's first token, which alone knows the prompt's log-probabilities;
    messages of others are held back until then. An error of one choice is the whole request's.
    """

    def __init__(self, request: ValidRequest, model: ServedModel) -> None:
        self._answers = [Answer(request, model, choice) for choice in range(request.n)]
        self._held: list[pb.GenerateResponse] = []

    def push(self, choice: int, events: Sequence[TokenEvent]) -> list[pb.GenerateResponse]:
        """Messages for what the events bring: none, once a choice has met a stop string, after which more of it may
        have been on its way. Raises the ServiceError with which the call must end."""
        answer = self._answers[choice]
        messages = [] if answer.finished else answer.push(events)
        if not self._answers[0].started:
            self._held += messages
            return []
        held, self._held = self._held, []
        return messages + held

    @property
    def finished(self) -> bool:
        """True once all last messages were given."""
        return all(answer.finished for answer in self._answers)

    def ended(self, choice: int) -> bool:
        """True once no more of a choice is wanted, whether or not its last message was given."""
        return self._answers[choice].finished
