"""From the configuration to what each actor is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.engine.admission import SchedulerLimits
from actors.model.families import load_spec
from actors.model.quant.scheme import QuantScheme
from cluster.config import ConfigError, load_config
from cluster.fleet import Bundle
from cluster.settings import ROW_BLOCK, SettingsFactory, check_quantization
from tests.checkpoints import write_deepseek_v3

TOKEN_BYTES = 3 * (32 + 8) * 4
"""3 layers, a latent of 32 and a rotated key of 8, fp32."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_deepseek_v3(path)
    return path


def factory(checkpoint: Path, **keys: object) -> SettingsFactory:
    return SettingsFactory(load_config(None, {"model": str(checkpoint), **keys}), {"a": checkpoint, "b": checkpoint})


def test_the_context_is_what_model_and_cache_allow(checkpoint: Path) -> None:
    assert factory(checkpoint).context_length("a") == 512
    assert factory(checkpoint, **{"attention.kv_memory": TOKEN_BYTES * 100}).context_length("a") == 96
    bundle = Bundle("attention-0", "a")
    assert factory(checkpoint, context_length=77).engine(bundle, [bundle], {"a"}).limits.context_length == 77


def test_what_is_configured_for_the_engine_reaches_it(checkpoint: Path) -> None:
    limits: dict[str, Any] = {"max_running": 3, "token_budget": 5, "max_waiting": 7}
    limits |= {"prefix_cache": False, "max_gap": 1.5, "batch_patience_s": 9.0}
    own = {"block_size": 4, "micro_batches": 2}
    bundle = Bundle("attention-0", "a")
    keys = {f"attention.{name}": value for name, value in (limits | own).items()}
    engine = factory(checkpoint, **keys).engine(bundle, [bundle], {"a"})
    assert engine.limits == SchedulerLimits(512, **limits)
    assert {name: getattr(engine, name) for name in own} == own


@pytest.mark.parametrize(
    ("keys", "nodes", "micro_batches"),
    [
        ({}, {"a"}, 1),
        ({}, {"a", "b"}, 0),
        ({"attention.micro_batches": 3}, {"a"}, 3),
        ({"device": "cuda"}, {"a"}, 0),
    ],
)
def test_steps_are_split_only_where_the_fleets_can_compute_at_the_same_time(
    checkpoint: Path, keys: dict[str, Any], nodes: set[str], micro_batches: int
) -> None:
    bundle = Bundle("attention-0", "a")
    assert factory(checkpoint, **keys).engine(bundle, [bundle], nodes).micro_batches == micro_batches


def test_memory_that_is_to_be_measured_is_shared_by_the_replicas_of_a_node(checkpoint: Path) -> None:
    bundles = [Bundle("attention-0", "a"), Bundle("attention-1", "a"), Bundle("attention-2", "b")]
    settings = factory(checkpoint, **{"attention.kv_memory": "auto", "attention.kv_memory_share": 0.25})
    engines = [settings.engine(bundle, bundles, {"a", "b"}) for bundle in bundles]
    assert [(e.kv_bytes, e.kv_share, e.sharing, e.limits.context_length) for e in engines] == [
        (None, 0.25, 2, 512),
        (None, 0.25, 2, 512),
        (None, 0.25, 1, 512),
    ]


def test_more_than_there_is_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="context_length: 513 is over the model's 512"):
        factory(checkpoint, context_length=513).context_length("a")
    small = {"attention.kv_memory": TOKEN_BYTES * 100, "context_length": 97}
    with pytest.raises(ConfigError, match=r"attention\.kv_memory: 48000 bytes hold 96 tokens .* context_length is 97"):
        factory(checkpoint, **small).context_length("a")
    with pytest.raises(ConfigError, match="hold 0 tokens"):
        factory(checkpoint, **{"attention.kv_memory": 10}).context_length("a")


def test_shards_of_one_node_share_its_cores(checkpoint: Path) -> None:
    bundles = [Bundle("expert-0", "a"), Bundle("expert-1", "a"), Bundle("expert-2", "b")]
    settings = factory(checkpoint)
    assert [settings.expert(bundle, bundles).sharing for bundle in bundles] == [2, 2, 1]
    assert [settings.expert(bundle, bundles).thread_count for bundle in bundles] == [1, 1, 2]  # its experts are small
    assert factory(checkpoint, **{"experts.threads": 3}).expert(bundles[0], bundles).thread_count == 3


def test_deterministic_mode_and_dtype(checkpoint: Path) -> None:
    bundle = Bundle("attention-0", "a")
    assert factory(checkpoint).attention(bundle, [bundle]).row_block == ROW_BLOCK
    relaxed = factory(checkpoint, deterministic=False, dtype="bfloat16").attention(bundle, [bundle])
    assert (relaxed.row_block, relaxed.dtype) == (0, "bfloat16")
    assert factory(checkpoint).attention(bundle, [bundle]).dtype == "float32"


def test_quantisation_and_checks_reach_the_actors(checkpoint: Path) -> None:
    bundle = Bundle("expert-0", "a")
    plain = factory(checkpoint).expert(bundle, [bundle])
    assert (plain.quant_kind, plain.check_weights, plain.map_weights) == (None, True, True)
    asked = {"experts.quantization": "int4", "check_weights": False, "map_weights": False}
    settings = factory(checkpoint, **asked).expert(bundle, [bundle])
    assert (settings.quant_kind, settings.check_weights, settings.map_weights) == ("int4", False, False)
    assert factory(checkpoint, **asked).attention(bundle, [bundle]).quant_kind is None
    both = factory(checkpoint, **asked, **{"attention.quantization": "int8"})
    assert (both.expert(bundle, [bundle]).quant_kind, both.attention(bundle, [bundle]).quant_kind) == ("int4", "int8")
    assert both.router(bundle).quant_kind is None


def test_what_is_quantised_already_is_not_quantised_again(checkpoint: Path) -> None:
    spec = replace(load_spec(checkpoint), quantization=QuantScheme("gptq", 4))
    check_quantization(load_config(None, {"experts.quantization": "none"}), spec)
    config = load_config(None, {"experts.quantization": "int8"})
    check_quantization(config, load_spec(checkpoint))
    with pytest.raises(ConfigError, match=r"experts\.quantization: int8, but .* quantised already \(gptq, 4 bits\)"):
        check_quantization(config, spec)
    with pytest.raises(ConfigError, match=r"attention\.quantization: int4, but .* quantised already"):
        check_quantization(load_config(None, {"attention.quantization": "int4"}), spec)
