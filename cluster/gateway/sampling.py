"""Sampling parameters as a client sent them, and as the engine takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expertmesh.v1 import inference_pb2 as pb

from actors.engine.request import SamplingParams
from cluster.gateway.checks import check_above, check_ids, check_range
from cluster.gateway.errors import InvalidRequest

MAX_TEMPERATURE = 2.0
MAX_TOP_K = 2**31 - 1
MAX_REPETITION_PENALTY = 2.0
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_IDS = 1024
"""Of each list of token ids."""
MAX_LOGPROBS = 20

_SINGLE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def sampling_params(
    request: pb.GenerateRequest, defaults: SamplingParams, vocab_size: int, draw_seed: Callable[[], int]
) -> SamplingParams:
    """Client's values over the model's defaults; ``min_tokens`` is checked by ``stopping.py``, which knows its bound.

    Lists of ids are in rising order without duplicates, so that equal requests are equal. Raises InvalidRequest.
    """
    sent = request.sampling
    single: dict[str, Any] = {name: getattr(sent if sent.HasField(name) else defaults, name) for name in _SINGLE}
    _check_single(**single)
    check_ids("sampling.allowed_token_ids", sent.allowed_token_ids, vocab_size, MAX_IDS)
    check_ids("sampling.banned_token_ids", sent.banned_token_ids, vocab_size, MAX_IDS)
    return SamplingParams(
        **single,
        seed=sent.seed if sent.HasField("seed") else draw_seed(),
        logit_bias=_logit_bias(sent.logit_bias, vocab_size),
        allowed_ids=_rising(sent.allowed_token_ids),
        banned_ids=_rising(sent.banned_token_ids),
        min_tokens=request.stopping.min_tokens,
        logprobs=likeliest("logprobs", request),
    )


def likeliest(field: str, request: pb.GenerateRequest) -> int | None:
    """Of how many tokens log-probabilities are wanted, None for no log-probabilities. Raises InvalidRequest."""
    if not request.HasField(field):
        return None
    count: int = getattr(request, field)
    check_range(field, count, 0, MAX_LOGPROBS)
    return count


def check_drawable(sampling: SamplingParams, stop_ids: frozenset[int], vocab_size: int) -> None:
    """That some token may come first, as far as lists of ids say. (What a bias leaves is always enough: it only adds.)

    Stop ids may not while ``min_tokens`` have not come. Raises InvalidRequest.
    """
    held_back = stop_ids if sampling.min_tokens else frozenset[int]()
    banned = set(sampling.banned_ids)
    allowed = set(sampling.allowed_ids) or range(vocab_size)
    if not any(token_id not in banned for token_id in allowed):
        _refuse_all(sampling, "is not banned")
    if not any(token_id not in banned and token_id not in held_back for token_id in allowed):
        _refuse_all(sampling, f"is neither banned nor a stop id, which min_tokens {sampling.min_tokens} holds back")


def _refuse_all(sampling: SamplingParams, needed: str) -> None:
    if sampling.allowed_ids:
        count = len(sampling.allowed_ids)
        raise InvalidRequest("sampling.allowed_token_ids", f"has {count} ids; at least one is needed that {needed}")
    raise InvalidRequest(
        "sampling.banned_token_ids",
        f"has {len(sampling.banned_ids)} ids; at least one of the vocabulary is needed that {needed}",
    )


def _check_single(
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
) -> None:
    check_range("sampling.temperature", temperature, 0, MAX_TEMPERATURE)
    check_above("sampling.top_p", top_p, 0, 1)
    if top_k > MAX_TOP_K:
        raise InvalidRequest("sampling.top_k", f"is {top_k}; allowed is 0 (all) to {MAX_TOP_K}")
    check_range("sampling.min_p", min_p, 0, 1)
    check_above("sampling.repetition_penalty", repetition_penalty, 0, MAX_REPETITION_PENALTY)
    check_range("sampling.presence_penalty", presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    check_range("sampling.frequency_penalty", frequency_penalty, -MAX_PENALTY, MAX_PENALTY)


def _logit_bias(biases: Mapping[int, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    field = "sampling.logit_bias"
    if len(biases) > MAX_IDS:
        raise InvalidRequest(field, f"has {len(biases)} ids; allowed are up to {MAX_IDS}")
    for token_id, bias in sorted(biases.items()):
        if token_id >= vocab_size:
            raise InvalidRequest(field, f"has token id {token_id}; allowed is 0 to {vocab_size - 1}")
        check_range(f"{field}[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)
    return tuple(sorted(biases.items()))


def _rising(ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(ids)))
