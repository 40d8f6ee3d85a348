"""From the messages of a request's answers to OpenAI's JSON: whole, or chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from expertmesh.v1 import inference_pb2 as pb

from cluster.openai.choice import Choice
from cluster.openai.json_pieces import json_pieces
from cluster.openai.logprobs import Json, Listed, Spell, prompt_logprobs
from cluster.openai.requests import Endpoint, Parsed

_PREFIX = {Endpoint.CHAT: "chatcmpl-", Endpoint.COMPLETIONS: "cmpl-"}
_WHOLE = {Endpoint.CHAT: "chat.completion", Endpoint.COMPLETIONS: "text_completion"}
_CHUNK = {Endpoint.CHAT: "chat.completion.chunk", Endpoint.COMPLETIONS: "text_completion"}


class Answer:
    """What one request gets, fed message by message in the order of the stream; a stream that was resumed goes on with
    the messages of the next call.

    ``created`` is in seconds since 1970, ``spell`` is for lists of tokens. ``push`` gives the chunks of a message,
    ``body`` what they make up together, unless the request is for a stream: of that no text is kept.
    """

    def __init__(self, parsed: Parsed, created: int, spell: Spell) -> None:
        self._endpoint = parsed.endpoint
        self._stream = parsed.stream
        self._include_usage = parsed.include_usage
        self._created = created
        self._spell = spell
        self._spell_choices = spell if parsed.message.HasField("logprobs") else None
        self._n = parsed.message.n or 1
        self._choices: list[Choice] = []  # once it started: until then n may be any number
        self._wants_prompt = parsed.message.HasField("prompt_logprobs")
        self._likeliest, self._prompt_likeliest = parsed.message.logprobs, parsed.message.prompt_logprobs
        self._prompt: Sequence[pb.TokenLogprobs] = ()
        self._id = ""
        self._model = ""

    def push(self, message: pb.GenerateResponse) -> list[Json]:
        """Chunks for one message of a stream; most give one, the first of a text completion none."""
        if message.HasField("started"):
            return self._begin(message)
        chunks = [self._chunk(piece) for piece in self._choices[message.choice].push(message)]
        if message.HasField("finished") and self.finished and self._include_usage:
            chunks.append(self._object(_CHUNK, [], {"usage": self._usage()}))
        return chunks

    @property
    def finished(self) -> bool:
        """True once the last message of each choice is there."""
        return bool(self._choices) and all(choice.finished for choice in self._choices)

    @property
    def usage(self) -> pb.Usage:
        """Of all choices together: the prompt counts once, the cache as the first choice found it. RuntimeError before
        their last messages."""
        if not self.finished:
            raise RuntimeError("the answer is not finished")
        ended = [choice.finished.usage for choice in self._choices if choice.finished is not None]
        total = pb.Usage()
        total.CopyFrom(ended[0])
        total.completion_tokens = sum(usage.completion_tokens for usage in ended)
        return total

    @property
    def entries(self) -> int:
        """Log-probabilities in ``body``, or about so many."""
        drawn = sum(choice.listed for choice in self._choices) * (1 + self._likeliest)
        prompt = len(self._prompt) * (1 + self._prompt_likeliest)
        return drawn + prompt * (1 if self._is_chat else self._n)

    def body(self) -> Json:
        """The whole answer. RuntimeError before its last message, and for a stream."""
        return self._body(list)

    def pieces(self) -> Iterator[bytes]:
        """``body`` as JSON for which no other thread has to wait long: see ``json_pieces``."""
        return json_pieces(self._body(iter))

    def _body(self, listed: Listed) -> Json:
        if self._stream:
            raise RuntimeError("the answer is a stream")
        if not self.finished:
            raise RuntimeError("the answer is not finished")
        choices = [choice.whole(listed) for choice in self._choices]
        rest: Json = {"usage": self._usage()}
        if self._wants_prompt:
            for told in [rest] if self._is_chat else choices:
                told["prompt_logprobs"] = listed(prompt_logprobs(self._prompt, self._spell))
        return self._object(_WHOLE, choices, rest)

    @property
    def _is_chat(self) -> bool:
        return self._endpoint == Endpoint.CHAT

    def _begin(self, message: pb.GenerateResponse) -> list[Json]:
        if self._choices:  # a stream that was resumed
            return []
        self._choices = [Choice(self._endpoint, index, self._stream, self._spell_choices) for index in range(self._n)]
        self._id = _PREFIX[self._endpoint] + message.request_id
        self._model = message.started.model
        if self._wants_prompt:
            self._prompt = message.started.prompt_logprobs
        return [self._chunk(piece) for choice in self._choices for piece in choice.begin()]

    def _chunk(self, piece: Json) -> Json:
        return self._object(_CHUNK, [piece], {"usage": None} if self._include_usage else {})

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

    def _usage(self) -> Json:
        usage = self.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }
