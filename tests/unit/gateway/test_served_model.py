from __future__ import annotations

from typing import Any

import pytest

from actors.engine.request import SamplingParams
from cluster.gateway.served_model import default_sampling, stop_ids
from tests.unit.gateway.tiny_tokenizers import byte_level, plain_metaspace


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams(0.0, 1.0, 0)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 5}, SamplingParams(0.0, 1.0, 0)),
        ({"temperature": 0.6}, SamplingParams(0.0, 1.0, 0)),
        ({"do_sample": True}, SamplingParams(1.0, 1.0, 0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, SamplingParams(0.6, 0.95, 0)),
        ({"do_sample": True, "temperature": None, "top_k": 20}, SamplingParams(1.0, 1.0, 20)),
        ({"do_sample": True, "min_p": 0.1}, SamplingParams(1.0, min_p=0.1)),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, SamplingParams(0.0, repetition_penalty=1.05)),
    ],
)
def test_default_sampling(config: dict[str, Any], expected: SamplingParams) -> None:
    assert default_sampling(config) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.5),
    ],
)
def test_default_sampling_names_what_is_wrong(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.{name} is {value!r}; allowed"):
        default_sampling({"do_sample": True, name: value})


def test_stop_ids_join_the_files_and_the_tokenizers() -> None:
    tokenizer = byte_level()
    own = tokenizer.eos_id
    assert stop_ids({}, tokenizer) == {own}
    assert stop_ids({"eos_token_id": None}, tokenizer) == {own}
    assert stop_ids({"eos_token_id": 3}, tokenizer) == {own, 3}
    assert stop_ids({"eos_token_id": [3, own, 5]}, tokenizer) == {own, 3, 5}
    assert stop_ids({}, plain_metaspace()) == frozenset()


@pytest.mark.parametrize("value", ["1", [None], -1, True, {"a": 1}])
def test_stop_ids_of_another_kind_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="eos_token_id"):
        stop_ids({"eos_token_id": value}, byte_level())
