"""The bodies of OpenAI's two generation endpoints: what is taken, and what only in its neutral value.

A parameter that would change the answer and is not offered is refused by its name: a client that sends it must not
take the answer for what it asked for. Its neutral value is accepted, since many clients send all they know. ``null`` is
as if the field were left out. Source: the request types of the ``openai`` client, and vLLM's extra parameters.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cluster.gateway.sampling import MAX_BIAS, MAX_IDS, MAX_LOGPROBS
from cluster.gateway.stopping import MAX_STOPS
from cluster.gateway.validation import MAX_CHOICES, MAX_MESSAGES
from cluster.openai.problems import shown

UINT32 = 2**32 - 1
MAX_FIELDS = 128
"""Of one object: more than any has. Each one that is wrong costs an error, so there must not be a million."""
MAX_PARTS = 4096

_SURROGATES = re.compile("[\ud800-\udfff]")
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")


def _between(least: int, most: int) -> AfterValidator:
    """Both bounds are told, whichever is passed."""

    def check(value: int) -> int:
        if not least <= value <= most:
            raise PydanticCustomError("range", f"is {value}; allowed is {least} to {most}")
        return value

    return AfterValidator(check)


_Count = Annotated[int, Field(ge=1, le=UINT32)]
_Id = Annotated[int, Field(ge=0, le=UINT32)]
_Choices = Annotated[int, _between(1, MAX_CHOICES)]
_Likeliest = Annotated[int, _between(0, MAX_LOGPROBS)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


def _neutral(*allowed: Any) -> AfterValidator:
    """Nothing but the values that ask for what is done anyway."""

    def check(value: Any) -> None:
        if value is not None and not any(_same(value, one) for one in allowed):
            words = " or ".join([*map(_shown, allowed), "to leave it out"])
            raise PydanticCustomError("unsupported", f"is not supported here; allowed is {words}")

    return AfterValidator(check)


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"


def _one(value: Any) -> Any:
    if len(value) > 1:
        raise PydanticCustomError("prompts", f"has {len(value)} prompts; allowed is one a request")
    return value


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise PydanticCustomError("fields", f"has {len(value)} fields; allowed are up to {MAX_FIELDS}")
    return value


def _unicode(text: str) -> str:
    """JSON can write half of a surrogate pair, UTF-8 cannot."""
    if _SURROGATES.search(text):
        raise PydanticCustomError("surrogate", "has a lone surrogate; allowed is Unicode text")
    return text


_Text = Annotated[str, AfterValidator(_unicode)]

# a list ends at its first bad entry: pydantic would note every one, at a hundred times the size of the body
_Texts = Annotated[list[_Text], Field(fail_fast=True)]
_Ids = Annotated[list[_Id], Field(fail_fast=True)]


def _biases(value: Any) -> Any:
    """OpenAI's form, {"id": number}, with the ids as numbers. Only the first thing that is wrong is looked for."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_IDS:
        raise PydanticCustomError("biases", f"has {len(value)} ids; allowed are up to {MAX_IDS}")
    if not all(_TOKEN_ID.fullmatch(key) and int(key) <= UINT32 for key in value):
        raise PydanticCustomError("bias_id", 'has a key that is no token id; allowed are whole numbers, as "17"')
    for key, bias in value.items():
        if type(bias) not in (int, float) or not abs(bias) <= MAX_BIAS:
            told = f"has {shown(bias)} for {int(key)}; allowed is {-MAX_BIAS:g} to {MAX_BIAS:g}"
            raise PydanticCustomError("bias", told)
    return {int(token_id): float(bias) for token_id, bias in value.items()}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return _few(value)


class Part(_Section):
    """A piece of a message's content."""

    type: Literal["text"]
    text: _Text


class Message(_Section):
    """One of a conversation. What an answer of ours carries beside role and content may come back with it."""

    role: _Text
    content: Annotated[
        Annotated[_Text, Tag("<text>")]
        | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS), Tag("<list>")],
        Discriminator(_text_or_list),
    ]
    name: Annotated[Any, _neutral()] = None
    refusal: Annotated[Any, _neutral()] = None
    audio: Annotated[Any, _neutral()] = None
    annotations: Annotated[Any, _neutral([])] = None
    function_call: Annotated[Any, _neutral()] = None
    tool_calls: Annotated[Any, _neutral([])] = None
    tool_call_id: Annotated[Any, _neutral()] = None


class StreamOptions(_Section):
    """Padding against guesses from the sizes of packets is not offered; nor is the usage in every chunk."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, _neutral(False)] = None
    continuous_usage_stats: Annotated[Any, _neutral(False)] = None


class Body(_Section):
    """What both endpoints know."""

    model: _Text | None = None
    max_tokens: _Count | None = None
    temperature: _Finite | None = None
    top_p: _Finite | None = None
    frequency_penalty: _Finite | None = None
    presence_penalty: _Finite | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    n: _Choices | None = None
    stop: (
        Annotated[
            Annotated[_Text, Tag("<text>")] | Annotated[_Texts, Field(max_length=MAX_STOPS), Tag("<list>")],
            Discriminator(_text_or_list),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # vLLM's
    top_k: Annotated[int, Field(ge=-1, le=UINT32)] | None = None
    stop_token_ids: Annotated[_Ids, Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    min_p: _Finite | None = None
    min_tokens: _Id | None = None
    repetition_penalty: _Finite | None = None
    allowed_token_ids: Annotated[_Ids, Field(max_length=MAX_IDS)] | None = None
    prompt_logprobs: _Likeliest | None = None

    priority: Literal["interactive", "batch"] | None = None  # vLLM's are numbers

    # without effect on the answer
    user: str | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None


class CompletionBody(Body):
    """/v1/completions."""

    prompt: Annotated[
        Annotated[_Text, Tag("<text>")]
        | Annotated[_Ids, Tag("<ids>")]
        | Annotated[_Texts, BeforeValidator(_one), Tag("<texts>")]
        | Annotated[list[_Ids], BeforeValidator(_one), Tag("<lists>")],
        Discriminator(_kind_of_prompt),
    ]
    logprobs: _Likeliest | None = None
    best_of: _Count | None = None
    echo: Annotated[Any, _neutral(False)] = None
    suffix: Annotated[Any, _neutral("")] = None


class ChatBody(Body):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, max_length=MAX_MESSAGES)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _Likeliest | None = None

    # without effect on the answer
    parallel_tool_calls: bool | None = None

    audio: Annotated[Any, _neutral()] = None
    function_call: Annotated[Any, _neutral("none", "auto")] = None
    functions: Annotated[Any, _neutral([])] = None
    modalities: Annotated[Any, _neutral(["text"])] = None
    moderation: Annotated[Any, _neutral()] = None
    prediction: Annotated[Any, _neutral()] = None
    prompt_cache_options: Annotated[Any, _neutral()] = None
    reasoning_effort: Annotated[Any, _neutral("none")] = None
    response_format: Annotated[Any, _neutral({"type": "text"})] = None
    service_tier: Annotated[Any, _neutral("auto", "default")] = None
    store: Annotated[Any, _neutral(False)] = None
    tool_choice: Annotated[Any, _neutral("none", "auto")] = None
    tools: Annotated[Any, _neutral([])] = None
    verbosity: Annotated[Any, _neutral("medium")] = None
    web_search_options: Annotated[Any, _neutral()] = None
