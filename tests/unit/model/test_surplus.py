"""Tensors beyond the description: refused where they contradict it, passed over where nobody reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from actors.model.families import spec_from_config
from actors.model.header_check import KnownHeaders, find_faults
from actors.model.quant.scheme import QuantScheme
from actors.model.spec import MoEDecoderSpec
from actors.model.surplus import skipped_tensors
from actors.model.tensor_list import expected_tensors

from .tiny_configs import ALL, GLM, LITE, MIX, OLMOE, QWEN2, QWEN3, V3, V32


def spec_of(config: dict[str, Any], **keys: Any) -> MoEDecoderSpec:
    return spec_from_config({**config, **keys})


def whole(spec: MoEDecoderSpec) -> list[str]:
    return [tensor.name for tensor in expected_tensors(spec)]


def faults(spec: MoEDecoderSpec, names: Iterable[str]) -> list[str]:
    return [fault.text or f"{fault.name} is missing" for fault in find_faults(spec, KnownHeaders(dict.fromkeys(names)))]


def mtp_layer(spec: MoEDecoderSpec, layer: int) -> list[str]:
    """As DeepSeek-V3 and GLM-4.5 publish it: a whole layer, and what leads into it."""
    last = f"model.layers.{spec.n_layers - 1}."
    own = [name.removeprefix(last) for name in whole(spec) if name.startswith(last)]
    return [f"model.layers.{layer}.{end}" for end in (*own, "eh_proj.weight", "enorm.weight", "hnorm.weight")]


@pytest.mark.parametrize("config", ALL, ids=lambda config: config["model_type"])
def test_whole_checkpoints_have_no_faults(config: dict[str, Any]) -> None:
    spec = spec_of(config)
    assert faults(spec, whole(spec)) == []
    assert skipped_tensors(spec, whole(spec)) == 0


@pytest.mark.parametrize("config", ALL, ids=lambda config: config["model_type"])
@pytest.mark.parametrize("stated", [0, 1])
def test_a_layer_too_few_is_refused(config: dict[str, Any], stated: int) -> None:
    """Whatever the configuration says of layers for multi-token prediction: this is none."""
    names, n_layers = whole(spec_of(config)), config["num_hidden_layers"]
    spec = spec_of(config, num_hidden_layers=n_layers - 1, num_nextn_predict_layers=stated)
    behind = [name for name in names if name.startswith(f"model.layers.{n_layers - 1}.")]
    (text,) = faults(spec, names)
    assert text.startswith(f"{len(behind)} tensor(s) such as '{behind[0]}' are of 1 layer(s) behind")
    assert f"expected no more than num_hidden_layers = {n_layers - 1}" in text
    assert ("num_nextn_predict_layers" in text) == (config in (V3, V32, GLM))
    assert skipped_tensors(spec, names) == 0


@pytest.mark.parametrize("config", [V3, V32, GLM], ids=lambda config: config["model_type"])
def test_layers_for_multi_token_prediction(config: dict[str, Any]) -> None:
    """As many as are stated; any, where the configuration has lost how many."""
    for stated, layers in ((1, 1), (2, 2), (2, 1), (0, 1), (0, 2)):
        spec = spec_of(config, num_nextn_predict_layers=stated)
        behind = [name for layer in range(layers) for name in mtp_layer(spec, spec.n_layers + layer)]
        assert faults(spec, whole(spec) + behind) == []
        assert skipped_tensors(spec, whole(spec) + behind) == len(behind)
    spec = spec_of(config, num_nextn_predict_layers=1)
    behind = [name for layer in range(2) for name in mtp_layer(spec, spec.n_layers + layer)]
    (text,) = faults(spec, whole(spec) + behind)
    assert f"{len(behind)} tensor(s)" in text
    assert "are of 2 layer(s) behind" in text
    assert "num_nextn_predict_layers = 1" in text


def test_other_families_have_none_for_multi_token_prediction() -> None:
    spec = spec_of(QWEN3, num_nextn_predict_layers=1)
    names = whole(spec) + mtp_layer(spec, spec.n_layers)
    assert "behind those of config.json" in faults(spec, names)[0]
    assert skipped_tensors(spec, names) == 0


ATTENTION, EXPERT = "model.layers.0.self_attn", "model.layers.2.mlp.experts.0"
SURPLUS: list[tuple[dict[str, Any], str, str]] = [
    (QWEN3, f"{ATTENTION}.q_proj.bias", "'qwen3_moe' with attention_bias"),
    (V3, f"{ATTENTION}.kv_a_proj_with_mqa.bias", "'deepseek_v3'"),
    (V3, f"{ATTENTION}.o_proj.bias", "'deepseek_v3' with attention_bias"),
    (QWEN2 | {"qkv_bias": False}, f"{ATTENTION}.k_proj.bias", "'qwen2_moe' with qkv_bias"),
    (QWEN2, f"{ATTENTION}.o_proj.bias", "'qwen2_moe'"),
    (GLM | {"use_qk_norm": False}, f"{ATTENTION}.q_norm.weight", "'glm4_moe' with use_qk_norm"),
    (QWEN2, f"{ATTENTION}.k_norm.weight", "'qwen2_moe' with use_qk_norm"),
    (V3, f"{ATTENTION}.indexer.wk.weight", "'deepseek_v3' with index_topk"),
    (V3, f"{ATTENTION}.indexer.k_norm.bias", "'deepseek_v3' with index_topk"),
    (V3 | {"n_shared_experts": 0}, "model.layers.1.mlp.shared_experts.up_proj.weight", "with n_shared_experts"),
    (QWEN3, "model.layers.0.mlp.shared_expert.up_proj.weight", "with shared_expert_intermediate_size"),
    (QWEN3, "model.layers.0.mlp.shared_expert_gate.weight", "with shared_expert_intermediate_size"),
    (QWEN3, "model.layers.0.mlp.gate.e_score_correction_bias", "'qwen3_moe' with topk_method"),
    (LITE, "model.layers.1.mlp.gate.e_score_correction_bias", "'deepseek_v2' with topk_method"),
    (MIX, "model.layers.1.block_sparse_moe.gate.bias", "'mixtral'"),
    (QWEN3, f"{EXPERT}.down_proj.bias", "'qwen3_moe' with mlp_bias"),
    (OLMOE, "model.norm.bias", "'olmoe'"),
    (OLMOE, "lm_head.bias", "'olmoe'"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "name", "told"), SURPLUS)
def test_what_the_configuration_denies_is_refused(config: dict[str, Any], name: str, told: str) -> None:
    spec = spec_of(config)
    (text,) = faults(spec, [*whole(spec), name])
    assert text.startswith(f"1 tensor(s) such as '{name}': expected none in a model of type ")
    assert re.search(rf"{re.escape(told)}( as config\.json has it)?$", text)


def test_one_line_for_all_layers() -> None:
    spec = spec_of(QWEN3)
    biases = [name.replace(".weight", ".bias") for name in whole(spec) if re.search(r"self_attn\.[qkv]_proj", name)]
    (text,) = faults(spec, whole(spec) + biases)
    assert text.startswith(f"9 tensor(s) such as '{biases[0]}'")


@pytest.mark.parametrize("config", ALL, ids=lambda config: config["model_type"])
def test_what_nobody_reads_is_passed_over(config: dict[str, Any]) -> None:
    spec = spec_of(config)
    others = [
        f"{ATTENTION}.rotary_emb.inv_freq",
        f"{ATTENTION}.k_scale",
        f"{ATTENTION}.k_proj.k_scale",
        f"{ATTENTION}.masked.bias",
        "model.rotary_emb.inv_freq",
        "model.layers.more.q_norm.weight",
        "model.layers",
        "visual.layers.9.bias",
    ]
    assert faults(spec, whole(spec) + others) == []
    assert skipped_tensors(spec, others) == 0


def test_biases_that_gptq_pads_with() -> None:
    spec = replace(spec_of(QWEN3), quantization=QuantScheme("gptq", 4, 32))
    names = [name.replace("_proj.weight", f"_proj.{end}") for name in whole(spec) for end in ("qweight", "bias")]
    told = "; ".join(faults(spec, names))
    assert "expected none" not in told
    plain = "; ".join(faults(spec, [name.replace("qweight", "weight") for name in names]))
    assert "expected none in a model of type 'qwen3_moe' with attention_bias" in plain
