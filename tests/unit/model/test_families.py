from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.model.errors import CheckpointError, UnsupportedModelError
from actors.model.families import load_spec, spec_from_config
from actors.model.kv_cache import KVCache
from tests.checkpoints import DEEPSEEK_V3, GLM4_MOE, YARN

V3 = {**DEEPSEEK_V3, "model_type": "deepseek_v3"}
GLM = {**GLM4_MOE, "model_type": "glm4_moe"}
HUB_V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "ep_size": 1, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1,
    "first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid", "hidden_act": "silu",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000, "num_nextn_predict_layers": 1,
    "attention_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


def test_the_released_deepseek_v3() -> None:
    spec = spec_from_config(HUB_V3)
    assert spec.moe_layers == tuple(range(3, 61))
    assert spec.layer_kinds[:4] == ("dense", "dense", "dense", "moe")
    assert spec.dtype == torch.bfloat16
    assert spec.attn.scale == pytest.approx(192**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2)
    assert spec.rope.interleaved
    assert spec.kv_floats_per_token == 61 * 576
    assert KVCache.bytes_per_token(spec, torch.bfloat16) == 61 * 1152
    assert (spec.moe.n_experts, spec.moe.top_k, spec.moe.gate.n_group, spec.moe.gate.topk_group) == (256, 8, 8, 4)
    assert spec.eos_token_ids == (1,)


def test_glm_defaults() -> None:
    config = {k: v for k, v in GLM.items() if k not in ("head_dim", "use_qk_norm", "rope_parameters", "eos_token_id")}
    spec = spec_from_config({**config, "attention_bias": False, "eos_token_id": [5, 7]})
    assert (spec.attn.head_dim, spec.attn.rotary_dim, spec.rope.theta) == (16, 8, 10000.0)
    assert not spec.attn.bias
    assert spec.attn.qk_norm == "none"
    assert spec.eos_token_ids == (5, 7)
    assert spec.dtype == torch.float32
    assert spec.kv_floats_per_token == 3 * 2 * 2 * 16


def test_two_styles_of_rope_are_one() -> None:
    scaling = {"type": "yarn", **{k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")}}
    hub = {k: v for k, v in V3.items() if k != "rope_parameters"} | {"rope_theta": 5e4, "rope_scaling": scaling}
    new = {**V3, "rope_parameters": {**YARN, "rope_theta": 5e4}}
    assert spec_from_config(hub) == spec_from_config(new)
    assert spec_from_config({**new, "rope_theta": 3.0}) == spec_from_config(new), "what stands inside wins"


def test_old_name_of_the_expert_count() -> None:
    config = {k: v for k, v in GLM.items() if k != "n_routed_experts"}
    assert spec_from_config({**config, "num_local_experts": 8}) == spec_from_config(GLM)


BAD = [
    (V3, {"model_type": "llama"}, r"model_type is 'llama': allowed is one of 'deepseek_v3', 'glm4_moe'"),
    (V3, {"model_type": None}, "model_type is None"),
    (V3, {"hidden_act": "gelu"}, "hidden_act is 'gelu': allowed is one of 'silu'"),
    (V3, {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config is \{'quant_method': 'fp8'\}"),
    (V3, {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    (V3, {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    (V3, {"moe_layer_freq": 2}, "moe_layer_freq is 2: allowed is 1"),
    (V3, {"hidden_size": "64"}, "hidden_size is '64': allowed is an integer >= 1"),
    (V3, {"hidden_size": True}, "hidden_size is True"),
    (V3, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    (V3, {"kv_lora_rank": None}, "kv_lora_rank is None: allowed is an integer >= 1"),
    (V3, {"q_lora_rank": 0}, "q_lora_rank is 0"),
    (V3, {"num_key_value_heads": 2}, "num_key_value_heads is 2: allowed is num_attention_heads = 4"),
    (V3, {"rope_interleave": 1}, "rope_interleave is 1: allowed is true or false"),
    (V3, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan: allowed is a finite number > 0"),
    (V3, {"routed_scaling_factor": -1}, "routed_scaling_factor is -1"),
    (V3, {"n_group": 3}, "n_group is 3: allowed is a divisor of n_routed_experts = 16"),
    (V3, {"n_group": 16}, "n_group is 16: .*2 experts or more"),
    (V3, {"topk_group": 5}, "topk_group is 5: allowed is at most n_group = 4"),
    (V3, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9: allowed is at most the 8 experts"),
    (V3, {"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn': allowed is one of 'float32', 'bfloat16'"),
    (V3, {"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
    (V3, {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    (V3, {"eos_token_id": [1, -1]}, "eos_token_id is"),
    (V3, {"rope_parameters": {**YARN, "rope_type": "linear"}}, r"rope_parameters\.rope_type is 'linear': .*'yarn'"),
    (V3, {"rope_scaling": {"type": "dynamic", "factor": 2}}, r"rope_scaling\.type is 'dynamic'"),
    (V3, {"rope_scaling": 4}, "rope_scaling is 4: allowed is an object"),
    (V3, {"rope_parameters": {"full_attention": YARN}}, "rope_parameters is .*one setting for all layers"),
    (V3, {"rope_parameters": {**YARN, "factor": 0}}, r"rope_parameters\.factor is 0"),
    (V3, {"rope_parameters": {**YARN, "mscale": "1"}}, r"rope_parameters\.mscale is '1': .*finite number >= 0"),
    (V3, {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    (GLM, {"num_key_value_heads": 3}, "num_key_value_heads is 3: allowed is a divisor of num_attention_heads = 4"),
    (GLM, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    (GLM, {"partial_rotary_factor": 0.1}, "partial_rotary_factor is 0.1: .*even count"),
    (GLM, {"use_qk_norm": "yes"}, "use_qk_norm is 'yes'"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "change", "message"), BAD)
def test_refusals_name_key_value_and_what_is_allowed(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    spec_from_config(base)
    with pytest.raises(UnsupportedModelError, match=message):
        spec_from_config({**base, **change})


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_experts_per_tok", "max_position_embeddings"])
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{key} is missing: allowed is"):
        spec_from_config({k: v for k, v in V3.items() if k != key})


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_stop_ids_of_the_generation_config_are_added(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {**GLM, "eos_token_id": [4, 2]})
    assert load_spec(tmp_path).eos_token_ids == (4, 2)
    write(tmp_path, "generation_config.json", {"eos_token_id": 9})
    assert load_spec(tmp_path).eos_token_ids == (4, 2, 9)
    write(tmp_path, "generation_config.json", {"eos_token_id": [2, 8]})
    assert load_spec(str(tmp_path)).eos_token_ids == (4, 2, 8)
    write(tmp_path, "generation_config.json", {"eos_token_id": "x"})
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json: eos_token_id is 'x'"):
        load_spec(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_spec(tmp_path)
    write(tmp_path, "config.json", "{")
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        load_spec(tmp_path)
    write(tmp_path, "config.json", "[]")
    with pytest.raises(CheckpointError, match=r"config\.json: holds list, expected a JSON object"):
        load_spec(tmp_path)
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        load_spec(tmp_path / "config.json")
    write(tmp_path, "config.json", GLM)
    write(tmp_path, "generation_config.json", "nope")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: is not valid JSON"):
        load_spec(tmp_path)
