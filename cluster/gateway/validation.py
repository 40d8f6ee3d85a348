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

from actors.engine.request import Priority, SamplingParams
from cluster.gateway.checks import check_chars, check_ids, check_range, refuse_nul
from cluster.gateway.errors import FailedPrecondition, InvalidRequest, UnknownModel
from cluster.gateway.sampling import check_drawable, likeliest, sampling_params
from cluster.gateway.served_model import ServedModel
from cluster.gateway.stopping import all_stop_ids, stop_strings, token_limit

MAX_CHARS_PER_CONTEXT_TOKEN = 32
"""Text with more characters than so many times the context is refused without being tokenised."""
MAX_MESSAGES = 4096
MAX_CHOICES = 16
MAX_REQUEST_ID_CHARS = 128
MAX_PROMPT_LOGPROBS = 200_000
"""Prompt tokens times (1 + prompt_logprobs) times n. ``started`` has at most 19 bytes for each, which is less than the
4 MiB that gRPC's clients take by default; JSON has some 80."""
ROLES = ("system", "user", "assistant")

_SEED_BITS = 53
"""Drawn seeds survive JSON, whose numbers are doubles."""

_PRIORITIES = {
    pb.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BATCH: Priority.BATCH,
}


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request that can be served as it is. ``stop_ids`` holds the model's own too, unless the client
    ignores them. ``n`` answers are wanted, ``sampling`` is that of the first; ``prompt_logprobs`` is as in
    ``GenerationRequest``."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    seed_given: bool
    max_tokens: int
    stop_ids: frozenset[int]
    stops: tuple[str, ...]
    next_index: int
    n: int = 1
    priority: Priority = Priority.INTERACTIVE
    prompt_logprobs: int | None = None

    @property
    def prompt_entries(self) -> int:
        """Log-probabilities of the prompt that are wanted, the likeliest beside each of its tokens included."""
        return 0 if self.prompt_logprobs is None else len(self.prompt_ids) * (1 + self.prompt_logprobs)


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
    n, priority = _choices(request), _priority(request.priority)
    sampling = sampling_params(request, model.default_sampling, model.vocab_size, draw_seed)
    prompt_logprobs = likeliest("prompt_logprobs", request)
    seed_given = request.sampling.HasField("seed")
    if request.next_index and sampling.temperature > 0 and not seed_given:
        raise FailedPrecondition(
            f"next_index is {request.next_index} for a sampled request without sampling.seed; send the seed "
            "told in the first message of the stream"
        )
    stops = stop_strings(request.stopping.stop)
    stop_ids = all_stop_ids(request.stopping, model.stop_ids, model.vocab_size)
    check_drawable(sampling, stop_ids, model.vocab_size)
    prompt_ids = _prompt_ids(request, model)
    max_tokens = token_limit(request.stopping, len(prompt_ids), model.context_length, cut_max_tokens)
    if request.next_index > max_tokens:
        raise InvalidRequest(
            "next_index", f"is {request.next_index}; allowed is up to the {max_tokens} tokens of this request"
        )
    _check_prompt_logprobs(prompt_logprobs, len(prompt_ids), n)
    return ValidRequest(
        request_id=request.request_id or draw_request_id(),
        prompt_ids=prompt_ids,
        sampling=sampling,
        seed_given=seed_given,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        stops=stops,
        next_index=request.next_index,
        n=n,
        priority=priority,
        prompt_logprobs=prompt_logprobs,
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


def _choices(request: pb.GenerateRequest) -> int:
    n = request.n if request.HasField("n") else 1
    check_range("n", n, 1, MAX_CHOICES)
    if n > 1 and request.next_index:
        raise InvalidRequest(
            "next_index", f"is {request.next_index} for n {n}; allowed is 0: only a request for one answer is resumed"
        )
    return n


def _check_prompt_logprobs(count: int | None, prompt_tokens: int, n: int) -> None:
    """``n`` counts because a text completion over HTTP repeats them in each answer, as vLLM's does."""
    if count is not None and prompt_tokens * (1 + count) * n > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            "prompt_logprobs",
            f"is {count} for {prompt_tokens} prompt tokens and n {n}; allowed is that prompt tokens x (1 + "
            f"prompt_logprobs) x n is up to {MAX_PROMPT_LOGPROBS}",
        )


def _priority(sent: int) -> Priority:
    found = _PRIORITIES.get(sent)  # type: ignore[call-overload]
    if found is None:
        names = ", ".join(pb.Priority.keys())
        raise InvalidRequest("priority", f"is {sent}; allowed are {names} (0 to {len(_PRIORITIES) - 1})")
    return Priority(found)


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
    check_ids(field, ids, model.vocab_size)
    return tuple(ids)


def _prompt_text(request: pb.GenerateRequest, model: ServedModel) -> str:
    max_chars = MAX_CHARS_PER_CONTEXT_TOKEN * model.context_length
    if request.WhichOneof("input") == "messages":
        return _rendered(request.messages.messages, model, max_chars)
    if not request.prompt:
        raise InvalidRequest("prompt", "is empty; allowed is text of 1 token on")
    check_chars("prompt", len(request.prompt), max_chars)
    refuse_nul("prompt", request.prompt)
    return request.prompt


def _rendered(messages: Sequence[pb.ChatMessage], model: ServedModel, max_chars: int) -> str:
    if model.chat is None:
        raise InvalidRequest("messages", f"chat is not available for model {model.name!r}; allowed: prompt, token_ids")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequest("messages", f"has {len(messages)} messages; allowed are 1 to {MAX_MESSAGES}")
    check_chars("messages", sum(len(message.content) for message in messages), max_chars)
    for index, message in enumerate(messages):
        field = f"messages.messages[{index}]"
        if message.role not in ROLES:
            raise InvalidRequest(f"{field}.role", f"is {message.role[:32]!a}; allowed are {', '.join(ROLES)}")
        refuse_nul(f"{field}.content", message.content)
    return model.chat.render([{"role": m.role, "content": m.content} for m in messages], max_chars)
