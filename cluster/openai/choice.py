"""One of the answers to a request, while it comes."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.v1 import inference_pb2 as pb

from cluster.openai.logprobs import Json, Listed, Spell, chat_logprobs, completion_logprobs
from cluster.openai.paths import Endpoint

_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


class Choice:
    """``choices[index]`` of an answer: piece by piece for a stream, else as a whole in the end."""

    def __init__(self, endpoint: Endpoint, index: int, stream: bool, spell: Spell | None) -> None:
        """``spell``: of tokens, None where no log-probabilities are wanted."""
        self._is_chat = endpoint == Endpoint.CHAT
        self._index = index
        self._stream = stream
        self._spell = spell
        self._texts: list[str] = []
        self._logprobs: list[pb.TokenLogprobs] = []
        self._offset = 0
        self.finished: pb.Finished | None = None

    @property
    def listed(self) -> int:
        """Tokens of which ``whole`` tells log-probabilities."""
        return len(self._logprobs)

    def begin(self) -> list[Json]:
        """The first piece of a stream: a chat tells whose words they are."""
        return [self._piece({"role": "assistant", "content": ""})] if self._is_chat and self._stream else []

    def push(self, message: pb.GenerateResponse) -> list[Json]:
        """The pieces for one message of a stream. Log-probabilities do not wait for text that lags behind."""
        if message.HasField("finished"):
            self.finished = message.finished
        if not self._stream:
            self._texts.append(message.text)
            self._logprobs += message.logprobs
            return []
        if message.HasField("finished"):
            return [self._piece({} if self._is_chat else "", reason=_REASONS[message.finished.reason])]
        if not message.text and not (self._spell and message.logprobs):
            return []
        return [self._piece({"content": message.text} if self._is_chat else message.text, self._told(message.logprobs))]

    def whole(self, listed: Listed = list) -> Json:
        """All of it. RuntimeError before the last message."""
        if self.finished is None:
            raise RuntimeError("the answer is not finished")
        text = "".join(self._texts)
        given: Json = {"text": text}
        if self._is_chat:
            given = {"message": {"role": "assistant", "content": text, "refusal": None}}
        reason = _REASONS[self.finished.reason]
        return {"index": self._index, **given, "logprobs": self._told(self._logprobs, listed), "finish_reason": reason}

    def _piece(self, delta: Json | str, logprobs: Json | None = None, reason: str | None = None) -> Json:
        key = "delta" if self._is_chat else "text"
        return {"index": self._index, key: delta, "logprobs": logprobs, "finish_reason": reason}

    def _told(self, logprobs: Sequence[pb.TokenLogprobs], listed: Listed = list) -> Json | None:
        """For the next tokens."""
        if self._spell is None:
            return None
        if self._is_chat:
            return chat_logprobs(logprobs, self._spell, listed)
        told = completion_logprobs(logprobs, self._spell, self._offset)
        self._offset += sum(map(len, told["tokens"]))
        return told
