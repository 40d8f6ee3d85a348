"""From the body of an OpenAI request to the message that every door hands to the validator.

Here a body is read: which fields there are, and of which type. What their values may be is for the one validator
(``cluster.gateway.validation``); ``Parsed.param`` gives its complaints the names that the client used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from expertmesh.v1 import inference_pb2 as pb
from pydantic import ValidationError

from cluster.gateway.errors import InvalidRequest
from cluster.openai.json_body import parse_json
from cluster.openai.paths import Endpoint
from cluster.openai.problems import invalid, shown
from cluster.openai.schema import Body, ChatBody, CompletionBody, Message

__all__ = ["Endpoint", "Parsed", "parse_json", "parse_request"]

DEFAULT_COMPLETION_TOKENS = 16
"""Of /v1/completions, by OpenAI's reference. A chat without max_tokens goes on until the context is full."""

_SEED_MASK = 2**64 - 1
_PARTS_JOINT = "\n"
"""Between the text parts of one message, as in vLLM."""

_PRIORITIES = {
    None: pb.PRIORITY_UNSPECIFIED,
    "interactive": pb.PRIORITY_INTERACTIVE,
    "batch": pb.PRIORITY_BATCH,
}

_PARAMS = {
    "sampling": "",
    "stopping": "",
    "messages.messages": "messages",
    "token_ids.ids": "prompt",
    "input": "prompt",
}


@dataclass(frozen=True)
class Parsed:
    """A request as it goes to the validator. ``stream`` and ``include_usage`` say how the answer is to be told.

    ``default_max_tokens``: the ``max_tokens`` of ``message`` is OpenAI's default and not the client's word: fewer do
    where the context has no room for it.
    ``sent_as``: names of fields of ``message`` as this client wrote them, where that is not what OpenAI calls them.
    """

    endpoint: Endpoint
    message: pb.GenerateRequest
    stream: bool
    include_usage: bool
    default_max_tokens: bool = False
    sent_as: Mapping[str, str] = field(default_factory=dict)

    def param(self, path: str) -> str:
        """What the client calls the field of ``message`` at ``path``: ``stop[2]`` for ``stopping.stop[2]``."""
        for known, name in (*self.sent_as.items(), *_PARAMS.items()):
            rest = path.removeprefix(known)
            if path.startswith(known) and rest[:1] in ("", ".", "["):
                return name + rest if name else rest.removeprefix(".")
        return path


def parse_request(endpoint: Endpoint, body: Any) -> Parsed:
    """What ``body``, a JSON value, asks for. Raises InvalidRequest with the field's name in OpenAI's words."""
    if not isinstance(body, dict):
        raise InvalidRequest("body", f"is {shown(body)}; allowed is an object")
    try:
        if endpoint == Endpoint.CHAT:
            return _chat(ChatBody.model_validate(body))
        return _completion(CompletionBody.model_validate(body))
    except ValidationError as error:
        raise invalid(error) from None


def _chat(body: ChatBody) -> Parsed:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest("max_tokens", "is given beside max_completion_tokens; allowed is one of them")
    sent_as = {}
    if body.max_completion_tokens is not None:
        sent_as["stopping.max_tokens"] = "max_completion_tokens"
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", f"is {body.top_logprobs} without logprobs; allowed is with logprobs true")
    if body.logprobs:
        sent_as["logprobs"] = "top_logprobs"
    message = _message(body, body.max_tokens or body.max_completion_tokens)
    if body.logprobs:
        message.logprobs = body.top_logprobs or 0
    message.messages.SetInParent()
    for one in body.messages:
        role = "system" if one.role == "developer" else one.role
        message.messages.messages.add(role=role, content=_content(one))
    return _parsed(Endpoint.CHAT, body, message, sent_as)


def _content(message: Message) -> str:
    content = message.content
    return content if isinstance(content, str) else _PARTS_JOINT.join(part.text for part in content)


def _completion(body: CompletionBody) -> Parsed:
    prompt: Any = body.prompt
    sent_as = {}
    if body.best_of not in (None, body.n or 1):
        raise InvalidRequest("best_of", f"is not supported here; allowed is {body.n or 1} or to leave it out")
    message = _message(body, body.max_tokens or DEFAULT_COMPLETION_TOKENS)
    if body.logprobs is not None:
        message.logprobs = body.logprobs
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        sent_as = {"prompt": "prompt[0]", "token_ids.ids": "prompt[0]"}
        (prompt,) = prompt
    if isinstance(prompt, str):
        message.prompt = prompt
    else:
        message.token_ids.ids.extend(prompt)
        message.token_ids.SetInParent()
    return _parsed(Endpoint.COMPLETIONS, body, message, sent_as)


def _message(body: Body, max_tokens: int | None) -> pb.GenerateRequest:
    """All but the input. Fields that were not given stay unset: they take the model's defaults."""
    seed = None if body.seed is None else body.seed & _SEED_MASK  # OpenAI's are signed
    top_k = 0 if body.top_k == -1 else body.top_k  # vLLM's word for all
    return pb.GenerateRequest(
        model=body.model or "",
        sampling=pb.SamplingParameters(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=top_k,
            min_p=body.min_p,
            seed=seed,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=body.logit_bias or {},
            allowed_token_ids=body.allowed_token_ids or (),
        ),
        stopping=pb.StoppingParameters(
            max_tokens=max_tokens,
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
            stop_token_ids=body.stop_token_ids or (),
            ignore_eos=body.ignore_eos,
            min_tokens=body.min_tokens,
        ),
        n=body.n,
        prompt_logprobs=body.prompt_logprobs,
        priority=_PRIORITIES[body.priority],
    )


def _parsed(endpoint: Endpoint, body: Body, message: pb.GenerateRequest, sent_as: Mapping[str, str]) -> Parsed:
    defaulted = endpoint == Endpoint.COMPLETIONS and body.max_tokens is None
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest("stream_options", "is given without stream; allowed is with stream true")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs", "is given with stream; allowed is without: a stream has no place for them"
        )
    include_usage = options is not None and bool(options.include_usage)
    if isinstance(body.stop, str):
        sent_as = {**sent_as, "stopping.stop[0]": "stop"}
    return Parsed(endpoint, message, bool(body.stream), include_usage, defaulted, sent_as)
