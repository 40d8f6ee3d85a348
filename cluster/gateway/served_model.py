"""What is served, as the gateway has to know it to answer and to check requests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.engine.request import SamplingParams
from actors.model.families import load_spec
from cluster.config import ConfigError
from cluster.gateway.chat import ChatTemplate
from cluster.gateway.sampling import MAX_REPETITION_PENALTY, MAX_TEMPERATURE
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.tokenizer import Tokenizer

_NEUTRAL_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model behind the doors.

    ``vocab_size`` is the logits width (the tokenizer may know fewer or more ids); ``context_length`` counts
    prompt and generated tokens together; ``stop_ids`` end generation unless a request ignores them;
    ``default_sampling`` is what unset parameters take (its seed means nothing); ``chat`` is None for a
    model without a chat template.
    """

    name: str
    model_type: str
    dtype: str
    context_length: int
    vocab_size: int
    layers: int
    moe_layers: int
    experts_per_layer: int
    experts_per_token: int
    stop_ids: frozenset[int]
    default_sampling: SamplingParams
    tokenizer: Tokenizer
    chat: ChatTemplate | None


def default_sampling(generation_config: Mapping[str, Any]) -> SamplingParams:
    """Sampling that a checkpoint's generation_config.json recommends: greedy unless ``do_sample`` is true. Its
    repetition penalty holds either way, as in transformers.

    Parameters that the file leaves out or sets to null are neutral (temperature 1, top_p 1, all tokens).

    Raises:
        ValueError: a value outside its range; it is named.
    """
    penalty = _number(generation_config, "repetition_penalty", 1.0)
    if not 0 < penalty <= MAX_REPETITION_PENALTY:
        raise _outside("repetition_penalty", penalty, f"above 0 to {MAX_REPETITION_PENALTY:g}")
    if not generation_config.get("do_sample"):
        return SamplingParams(temperature=0.0, repetition_penalty=penalty)
    temperature = _number(generation_config, "temperature", _NEUTRAL_TEMPERATURE)
    top_p = _number(generation_config, "top_p", 1.0)
    top_k = _number(generation_config, "top_k", 0)
    min_p = _number(generation_config, "min_p", 0.0)
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise _outside("temperature", temperature, f"0 to {MAX_TEMPERATURE:g}")
    if not 0 < top_p <= 1:
        raise _outside("top_p", top_p, "above 0 to 1")
    if top_k < 0 or top_k != int(top_k):
        raise ValueError(f"generation_config.top_k is {top_k}; allowed are whole numbers, 0 for all")
    if not 0 <= min_p <= 1:
        raise _outside("min_p", min_p, "0 to 1")
    return SamplingParams(temperature, top_p, int(top_k), min_p=min_p, repetition_penalty=penalty)


def _outside(name: str, value: float, allowed: str) -> ValueError:
    return ValueError(f"generation_config.{name} is {value}; allowed is {allowed}")


def stop_ids(generation_config: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end generation: ``eos_token_id`` (one, several, or null) and the tokenizer's own end of
    sequence.

    Raises:
        ValueError: ``eos_token_id`` is something else.
    """
    raw = generation_config.get("eos_token_id")
    listed = [] if raw is None else raw if isinstance(raw, list) else [raw]
    if not all(type(token_id) is int and token_id >= 0 for token_id in listed):
        raise ValueError(f"generation_config.eos_token_id is {raw!r}; allowed: an id, a list of ids, or null")
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return frozenset([*listed, *own])


def _number(generation_config: Mapping[str, Any], name: str, neutral: float) -> float:
    value = generation_config.get(name)
    if value is None:
        return neutral
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"generation_config.{name} is {value!r}; allowed are finite numbers")
    return value


def served_model(settings: GatewaySettings) -> ServedModel:
    """What the checkpoint says of itself. Raises CheckpointError, TokenizerError, ConfigError."""
    spec = load_spec(settings.model_path)
    tokenizer = Tokenizer.load(settings.model_path)
    generation = settings.model_path / "generation_config.json"
    try:
        config = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
        sampling, stops = default_sampling(config), stop_ids(config, tokenizer)
    except ValueError as error:
        raise ConfigError(f"{generation}: {error}") from error
    return ServedModel(
        name=settings.model_name,
        model_type=spec.model_type,
        dtype=settings.dtype,
        context_length=settings.context_length,
        vocab_size=spec.vocab_size,
        layers=spec.n_layers,
        moe_layers=len(spec.moe_layers),
        experts_per_layer=spec.moe.n_experts,
        experts_per_token=spec.moe.top_k,
        stop_ids=stops | frozenset(spec.eos_token_ids),
        default_sampling=sampling,
        tokenizer=tokenizer,
        chat=ChatTemplate.of(tokenizer),
    )
