"""Who takes part in a comparison, what each is told, and what it needs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from actors.quant_kind import QuantKind
from benchmarks.speed_cases import Case
from benchmarks.speed_figures import LLAMACPP, ONE_PROCESS, OURS, PEERS, TRANSFORMERS, VLLM, Contender, Precision

_USUAL_STREAMS = 64
_GIB = 2**30
_NEEDS: Mapping[str, tuple[float, float]] = {
    OURS: (1.25, 3.0),
    ONE_PROCESS: (1.25, 2.0),
    TRANSFORMERS: (1.75, 1.0),
    VLLM: (1.4, 2.5),
    LLAMACPP: (1.05, 1.0),
}
"""Memory: times the bytes of the weights, and GiB beside."""

_OUR_KIND: Mapping[Precision, QuantKind | Literal["none"]] = {"bf16": "none", "int8": "w8a8", "int4": "w4a8"}
"""What a precision is for us: llama.cpp, with which ours is compared, rounds rows to int8 as well."""


def contenders(precisions: Sequence[Precision], peers: Sequence[str], shards: Sequence[int]) -> list[Contender]:
    """Ours first, in one process too in the first precision; with other numbers of expert ``shards`` than the usual
    one where asked for; then the peers, each in those precisions that it has."""
    ours = [Contender(OURS, precision) for precision in precisions]
    ours += [Contender(ONE_PROCESS, precision) for precision in precisions[:1]]
    ours += [Contender(OURS, precisions[0], count) for count in shards]
    return ours + [Contender(peer, precision) for peer in peers for precision in precisions if precision in PEERS[peer]]


def our_config(contender: Contender, model: Path, streams: int, start_timeout_s: float) -> dict[str, Any]:
    """The server's configuration: as it is shipped, but for the model, its precision, ports of its own, a Ray of its
    own, and room for ``streams`` in a step where that is more than usual."""
    kind = _OUR_KIND[contender.precision]
    experts: dict[str, Any] = {"quantization": kind}
    attention: dict[str, Any] = {"max_running": max(_USUAL_STREAMS, streams), "quantization": kind}
    if contender.shards:
        experts["shards"] = contender.shards
    return {
        "model": str(model),
        "gateway": {"port": 0, "http_port": 0},
        "attention": attention,
        "experts": experts,
        "transport": "local" if contender.engine == ONE_PROCESS else "auto",
        "ray": {"address": "local"},
        "start_timeout_s": start_timeout_s,
    }


def needed_bytes(contender: Contender, weight_bytes: float) -> float:
    """About how much memory all its processes take; ``weight_bytes`` in its precision."""
    times, beside = _NEEDS[contender.engine]
    return times * weight_bytes + beside * _GIB


def shortages(needs: Mapping[Contender, float], available: float) -> list[str]:
    """For each that needs more than there is, a line that says so."""
    return [
        f"{contender.label} in {contender.precision} needs about {need / _GIB:.1f} GiB of memory, and "
        f"{available / _GIB:.1f} GiB are available"
        for contender, need in needs.items()
        if need > available
    ]


def too_long(cases: Sequence[Case], context: int) -> dict[str, str]:
    """The cases that do not fit a context of so many tokens, and why."""
    return {
        case.name: f"left out: {case.tokens} tokens, and the model's context is {context}"
        for case in cases
        if case.tokens > context
    }


def turn(everyone: Sequence[Contender], round_number: int) -> list[Contender]:
    """The order of a round: every other one the other way round, so that nobody is always first."""
    return list(everyone if round_number % 2 == 0 else reversed(everyone))
