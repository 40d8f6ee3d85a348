"""Who takes part in the comparison, what each is told, and what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.speed_cases import parse_case
from benchmarks.speed_figures import LLAMACPP, ONE_PROCESS, OURS, TRANSFORMERS, VLLM, Contender
from benchmarks.speed_plan import contenders, needed_bytes, our_config, shortages, too_long, turn
from cluster.config import ServerConfig

MODEL = Path("/models/lite8")


def test_each_takes_part_in_the_precisions_that_it_has() -> None:
    found = contenders(["bf16", "int8"], [TRANSFORMERS, VLLM, LLAMACPP], [4])
    assert found == [
        Contender(OURS, "bf16"),
        Contender(OURS, "int8"),
        Contender(ONE_PROCESS, "bf16"),
        Contender(OURS, "bf16", 4),
        Contender(TRANSFORMERS, "bf16"),
        Contender(VLLM, "bf16"),
        Contender(LLAMACPP, "bf16"),
        Contender(LLAMACPP, "int8"),
    ]


@pytest.mark.parametrize(
    ("contender", "transport", "quantization", "shards"),
    [
        (Contender(OURS, "bf16"), "auto", "none", 0),
        (Contender(OURS, "int8"), "auto", "w8a8", 0),
        (Contender(OURS, "int4"), "auto", "w4a8", 0),
        (Contender(ONE_PROCESS, "bf16"), "local", "none", 0),
        (Contender(OURS, "bf16", 8), "auto", "none", 8),
    ],
)
def test_ours_is_as_it_is_shipped_but_for_what_is_compared(
    contender: Contender, transport: str, quantization: str, shards: int
) -> None:
    config = ServerConfig.model_validate(our_config(contender, MODEL, 8, 900.0))
    assert (config.transport, config.experts.quantization, config.experts.shards) == (transport, quantization, shards)
    assert config.attention.quantization == quantization
    assert (config.gateway.port, config.gateway.http_port, config.ray.address) == (0, 0, "local")
    assert config.attention.max_running == ServerConfig().attention.max_running
    assert (config.model, config.start_timeout_s) == (str(MODEL), 900.0)


def test_all_streams_of_a_case_fit_in_a_step() -> None:
    config = ServerConfig.model_validate(our_config(Contender(OURS, "bf16"), MODEL, 96, 900.0))
    assert config.attention.max_running == 96


def test_who_needs_more_memory_than_there_is_is_named() -> None:
    small, large = Contender(LLAMACPP, "int4"), Contender(TRANSFORMERS, "bf16")
    needs = {one: needed_bytes(one, size) for one, size in ((small, 2.4e9), (large, 9.4e9))}
    (line,) = shortages(needs, 12 * 2**30)
    assert line == "transformers in bf16 needs about 16.3 GiB of memory, and 12.0 GiB are available"
    assert shortages(needs, 17 * 2**30) == []


def test_a_case_longer_than_the_context_is_left_out_with_a_note() -> None:
    cases = [parse_case(text) for text in ("decode-1", "decode-1x8161", "decode-1x8160")]
    assert too_long(cases, 8192) == {"decode-1x8161": "left out: 8193 tokens, and the model's context is 8192"}


def test_nobody_is_always_first() -> None:
    everyone = contenders(["bf16"], [TRANSFORMERS], [])
    assert turn(everyone, 0) == turn(everyone, 2) == everyone
    assert turn(everyone, 1) == everyone[::-1]
