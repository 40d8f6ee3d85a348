"""The one validator behind every door: a request as it came in, a request that can be served out.

Cheap checks come before costly ones: nothing is tokenised that is too long or has a bad parameter. Errors
name the field, its value where that is not text of the client, and what is allowed.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertmesh.v1 import inference_pb2 as pb

from actors.engine.request import SamplingParams
from cluster.gateway.errors import FailedPrecondition, InvalidRequest, UnknownModel
from cluster.gateway.served_model import ServedModel

MAX_CHARS_PER_CONTEXT_TOKEN = 32
"""Text with more characters than so many times the context is refused without being tokenised."""
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_REQUEST_ID_CHARS = 128
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 2**31 - 1
ROLES = ("system", "user", "assistant")

_SEED_BITS = 53
"""Drawn seeds survive JSON, whose numbers are doubles."""


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request that can be served as it is. ``stop_ids`` holds the model's own too, unless the client
    ignores them."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    seed_given: bool
    max_tokens: int
    stop_ids: frozenset[int]
    stops: tuple[str, ...]
    next_index: int


def random_seed() -> int:
    """A seed nobody can guess."""
    return secrets.randbits(_SEED_BITS)


def random_request_id() -> str:
    """An id for a request whose client gave none."""
    return uuid.uuid4().hex


def is_request_id(text: str) -> bool:
    """True if ``text`` may name a request."""
    return 1 <= len(text) <= MAX_REQUEST_ID_CHARS and all("!" <= char <= "~" for char in text)


def validate(
    request: pb.GenerateRequest,
    model: ServedModel,
    draw_seed: Callable[[], int] = random_seed,
    draw_request_id: Callable[[], str] = random_request_id,
    cut_max_tokens: bool = False,
) -> ValidRequest:
    """Checks ``request`` against ``model`` and fills in what the client left out.

    ``cut_max_tokens``: a max_tokens for which the context has no room is no error; it becomes what there is room for.

    Raises:
        UnknownModel: another model than the served one is asked for.
        InvalidRequest: a field is missing or outside what is allowed.
        FailedPrecondition: a sampled stream is to be resumed without its seed.
    """
    if request.model and request.model != model.name:
        raise UnknownModel(request.model, model.name)
    _check_request_id(request)
    sampling = _sampling(request.sampling, model.default_sampling, draw_seed)
    seed_given = request.sampling.HasField("seed")
    if request.next_index and sampling.temperature > 0 and not seed_given:
        raise FailedPrecondition(
            f"next_index is {request.next_index} for a sampled request without sampling.seed; send the seed "
            "told in the first message of the stream"
        )
    stops = _stop_strings(request.stopping.stop)
    stop_ids = _stop_ids(request.stopping, model)
    prompt_ids = _prompt_ids(request, model)
    max_tokens = _max_tokens(request.stopping, len(prompt_ids), model.context_length, cut_max_tokens)
    if request.next_index > max_tokens:
        raise InvalidRequest(
            "next_index", f"is {request.next_index}; allowed is up to the {max_tokens} tokens of this request"
        )
    return ValidRequest(
        request_id=request.request_id or draw_request_id(),
        prompt_ids=prompt_ids,
        sampling=sampling,
        seed_given=seed_given,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        stops=stops,
        next_index=request.next_index,
    )


def _check_request_id(request: pb.GenerateRequest) -> None:
    request_id = request.request_id
    if not request_id:
        if request.next_index:
            raise InvalidRequest("request_id", f"is needed to resume at next_index {request.next_index}")
        return
    if not is_request_id(request_id):
        raise InvalidRequest(
            "request_id",
            f"is {request_id[:MAX_REQUEST_ID_CHARS]!a} of {len(request_id)} characters; allowed are 1 to "
            f"{MAX_REQUEST_ID_CHARS} printable ASCII characters without spaces",
        )


def _sampling(
    parameters: pb.SamplingParameters, defaults: SamplingParams, draw_seed: Callable[[], int]
) -> SamplingParams:
    """Client's values over the model's defaults. Comparisons are written so that NaN fails them."""
    temperature = parameters.temperature if parameters.HasField("temperature") else defaults.temperature
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise InvalidRequest("sampling.temperature", f"is {temperature:.7g}; allowed is 0 to {MAX_TEMPERATURE:g}")
    top_p = parameters.top_p if parameters.HasField("top_p") else defaults.top_p
    if not 0 < top_p <= 1:
        raise InvalidRequest("sampling.top_p", f"is {top_p:.7g}; allowed is above 0 to 1")
    top_k = parameters.top_k if parameters.HasField("top_k") else defaults.top_k
    if top_k > MAX_TOP_K:
        raise InvalidRequest("sampling.top_k", f"is {top_k}; allowed is 0 (all) to {MAX_TOP_K}")
    seed = parameters.seed if parameters.HasField("seed") else draw_seed()
    return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)


def _stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("stopping.stop", f"has {len(stops)} strings; allowed are up to {MAX_STOPS}")
    for index, stop in enumerate(stops):
        field = f"stopping.stop[{index}]"
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(field, f"has {len(stop)} characters; allowed are 1 to {MAX_STOP_CHARS}")
        _refuse_nul(field, stop)
    return tuple(stops)


def _stop_ids(stopping: pb.StoppingParameters, model: ServedModel) -> frozenset[int]:
    ids = stopping.stop_token_ids
    if len(ids) > MAX_STOPS:
        raise InvalidRequest("stopping.stop_token_ids", f"has {len(ids)} ids; allowed are up to {MAX_STOPS}")
    _check_ids("stopping.stop_token_ids", ids, model.vocab_size)
    own = frozenset[int]() if stopping.ignore_eos else model.stop_ids
    return own | frozenset(ids)


def _prompt_ids(request: pb.GenerateRequest, model: ServedModel) -> tuple[int, ...]:
    """Token ids of whichever input was given: at least one, all within the logits width, room left for one
    more."""
    field = request.WhichOneof("input")
    if field is None:
        raise InvalidRequest("input", "is missing; one of prompt, token_ids, messages has to be given")
    if field == "token_ids":
        ids: Sequence[int] = request.token_ids.ids
        field = "token_ids.ids"
        if not ids:
            raise InvalidRequest(field, "is empty; allowed is 1 token id on")
    else:
        ids = model.tokenizer.encode(_prompt_text(request, model))
        if not ids:
            raise InvalidRequest(field, "has no token; allowed is text of 1 token on")
    if len(ids) >= model.context_length:
        raise InvalidRequest(
            field,
            f"has {len(ids)} tokens; allowed are up to {model.context_length - 1}, so that one more fits the "
            f"context of {model.context_length}",
        )
    _check_ids(field, ids, model.vocab_size)
    return tuple(ids)


def _prompt_text(request: pb.GenerateRequest, model: ServedModel) -> str:
    max_chars = MAX_CHARS_PER_CONTEXT_TOKEN * model.context_length
    if request.WhichOneof("input") == "messages":
        return _rendered(request.messages.messages, model, max_chars)
    if not request.prompt:
        raise InvalidRequest("prompt", "is empty; allowed is text of 1 token on")
    _check_chars("prompt", len(request.prompt), max_chars)
    _refuse_nul("prompt", request.prompt)
    return request.prompt


def _rendered(messages: Sequence[pb.ChatMessage], model: ServedModel, max_chars: int) -> str:
    if model.chat is None:
        raise InvalidRequest("messages", f"chat is not available for model {model.name!r}; allowed: prompt, token_ids")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest("messages", f"has {len(messages)} messages; allowed are 1 to {MAX_MESSAGES}")
    _check_chars("messages", sum(len(message.content) for message in messages), max_chars)
    for index, message in enumerate(messages):
        field = f"messages.messages[{index}]"
        if message.role not in ROLES:
            raise InvalidRequest(f"{field}.role", f"is {message.role[:32]!a}; allowed are {', '.join(ROLES)}")
        _refuse_nul(f"{field}.content", message.content)
    return model.chat.render([{"role": m.role, "content": m.content} for m in messages], max_chars)


def _max_tokens(stopping: pb.StoppingParameters, prompt_tokens: int, context_length: int, cut: bool) -> int:
    room = context_length - prompt_tokens
    if not stopping.HasField("max_tokens") or (cut and stopping.max_tokens > room):
        return room
    if not 1 <= stopping.max_tokens <= room:
        raise InvalidRequest(
            "stopping.max_tokens",
            f"is {stopping.max_tokens} after a prompt of {prompt_tokens} tokens; allowed is 1 to {room}, so "
            f"that both fit the context of {context_length}",
        )
    return stopping.max_tokens


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    for index, token_id in enumerate(ids):
        if token_id >= vocab_size:
            raise InvalidRequest(f"{field}[{index}]", f"is token id {token_id}; allowed is 0 to {vocab_size - 1}")


def _check_chars(field: str, chars: int, max_chars: int) -> None:
    if chars > max_chars:
        raise InvalidRequest(field, f"has {chars} characters; allowed are up to {max_chars} for this model's context")


def _refuse_nul(field: str, text: str) -> None:
    if "\0" in text:
        raise InvalidRequest(field, f"has a NUL at character {text.index(chr(0))}; allowed is text without NUL")
