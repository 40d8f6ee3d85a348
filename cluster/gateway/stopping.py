"""When an answer ends, as a client sent it."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.v1 import inference_pb2 as pb

from cluster.gateway.checks import check_ids, refuse_nul
from cluster.gateway.errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_CHARS = 1000


def stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    """``stopping.stop``. Raises InvalidRequest."""
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("stopping.stop", f"has {len(stops)} strings; allowed are up to {MAX_STOPS}")
    for index, stop in enumerate(stops):
        field = f"stopping.stop[{index}]"
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(field, f"has {len(stop)} characters; allowed are 1 to {MAX_STOP_CHARS}")
        refuse_nul(field, stop)
    return tuple(stops)


def all_stop_ids(stopping: pb.StoppingParameters, own: frozenset[int], vocab_size: int) -> frozenset[int]:
    """The client's, and the model's ``own`` unless they are ignored. Raises InvalidRequest."""
    ids = stopping.stop_token_ids
    check_ids("stopping.stop_token_ids", ids, vocab_size, MAX_STOPS)
    return (frozenset[int]() if stopping.ignore_eos else own) | frozenset(ids)


def token_limit(stopping: pb.StoppingParameters, prompt_tokens: int, context_length: int, cut: bool) -> int:
    """``max_tokens``, or what the context has room for; ``min_tokens`` is within it. Raises InvalidRequest."""
    room = context_length - prompt_tokens
    most = room
    if stopping.HasField("max_tokens") and not (cut and stopping.max_tokens > room):
        most = stopping.max_tokens
    if not 1 <= most <= room:
        raise InvalidRequest(
            "stopping.max_tokens",
            f"is {most} after a prompt of {prompt_tokens} tokens; allowed is 1 to {room}, so "
            f"that both fit the context of {context_length}",
        )
    if stopping.min_tokens > most:
        raise InvalidRequest(
            "stopping.min_tokens", f"is {stopping.min_tokens}; allowed is 0 to max_tokens, which is {most}"
        )
    return most
