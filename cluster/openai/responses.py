"""From the messages of one answer to OpenAI's JSON: whole, or chunk by chunk."""

from __future__ import annotations

from typing import Any

from expertmesh.v1 import inference_pb2 as pb

from cluster.openai.requests import Endpoint, Parsed

_PREFIX = {Endpoint.CHAT: "chatcmpl-", Endpoint.COMPLETIONS: "cmpl-"}
_WHOLE = {Endpoint.CHAT: "chat.completion", Endpoint.COMPLETIONS: "text_completion"}
_CHUNK = {Endpoint.CHAT: "chat.completion.chunk", Endpoint.COMPLETIONS: "text_completion"}
_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}

Json = dict[str, Any]


class Answer:
    """One answer, fed message by message in the order of the stream; a stream that was resumed goes on with the
    messages of the next call.

    ``created`` is in seconds since 1970. ``push`` gives the chunks of a message, ``body`` what they make up together,
    unless the request is for a stream: of that no text is kept.
    """

    def __init__(self, parsed: Parsed, created: int) -> None:
        self._endpoint = parsed.endpoint
        self._stream = parsed.stream
        self._include_usage = parsed.include_usage
        self._created = created
        self._id = ""
        self._model = ""
        self._texts: list[str] = []
        self._finished: pb.Finished | None = None

    def push(self, message: pb.GenerateResponse) -> list[Json]:
        """Chunks for one message; most give one, the first of a text completion none."""
        if message.HasField("started"):
            begins = not self._id
            self._id = _PREFIX[self._endpoint] + message.request_id
            self._model = message.started.model
            return [self._chunk({"role": "assistant", "content": ""})] if begins and self._is_chat else []
        if message.HasField("finished"):
            self._finished = message.finished
            return [self._last_chunk(), *([self._usage_chunk()] if self._include_usage else [])]
        if not message.text:  # tokens whose text is not complete yet
            return []
        if not self._stream:
            self._texts.append(message.text)
        return [self._chunk({"content": message.text} if self._is_chat else message.text)]

    @property
    def finished(self) -> bool:
        """True once its last message is there."""
        return self._finished is not None

    def body(self) -> Json:
        """The whole answer. RuntimeError before its last message, and for a stream."""
        if self._stream:
            raise RuntimeError("the answer is a stream")
        if self._finished is None:
            raise RuntimeError("the answer is not finished")
        text, reason = "".join(self._texts), _REASONS[self._finished.reason]
        if self._is_chat:
            given: Json = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            given = {"text": text}
        choice = {"index": 0, **given, "logprobs": None, "finish_reason": reason}
        return self._object(_WHOLE, [choice], {"usage": _usage(self._finished.usage)})

    @property
    def _is_chat(self) -> bool:
        return self._endpoint == Endpoint.CHAT

    def _chunk(self, delta: Json | str, reason: str | None = None) -> Json:
        key = "delta" if self._is_chat else "text"
        choice = {"index": 0, key: delta, "logprobs": None, "finish_reason": reason}
        return self._object(_CHUNK, [choice], {"usage": None} if self._include_usage else {})

    def _last_chunk(self) -> Json:
        assert self._finished is not None
        return self._chunk({} if self._is_chat else "", _REASONS[self._finished.reason])

    def _usage_chunk(self) -> Json:
        assert self._finished is not None
        return self._object(_CHUNK, [], {"usage": _usage(self._finished.usage)})

    def _object(self, kinds: dict[Endpoint, str], choices: list[Json], rest: Json) -> Json:
        return {
            "id": self._id,
            "object": kinds[self._endpoint],
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
            "choices": choices,
            **rest,
        }


def _usage(usage: pb.Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
