from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.model.errors import CheckpointError, UnsupportedModelError
from actors.model.families import FAMILIES, load_spec, spec_from_config
from actors.model.kv_cache import KVCache
from actors.model.quant.scheme import QuantScheme
from actors.model.rope import inverse_frequencies
from actors.model.spec import AttnSpec, GateSpec, IndexerSpec, MoEDecoderSpec, MoESpec
from tests.checkpoints import DEFAULT_ROPE, YARN
from tests.unit.model.released_configs import RELEASED
from tests.unit.model.tiny_configs import ALL, GLM, LITE, MIX, QWEN2, QWEN3, V1, V2, V3, V32

V3_GATE = GateSpec(
    "sigmoid", bias=True, n_group=8, topk_group=4, group_rank="top2_sum", masked=float("-inf"), normalise=True,
    epsilon=1e-20, scale=2.5,
)  # fmt: skip
V3_ATTN = AttnSpec(
    "mla", heads=128, kv_heads=128, head_dim=192,
    scale=192**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2, q_lora_rank=1536, kv_lora_rank=512, qk_nope_dim=128,
    qk_rope_dim=64, v_dim=128,
)  # fmt: skip
LITE_ATTN = replace(
    V3_ATTN, heads=16, kv_heads=16, q_lora_rank=None, scale=192**-0.5 * (0.0707 * 3.6888794541139363 + 1) ** 2
)
QWEN_GATE = GateSpec("softmax", logits="model", ranked=True, weights="model")
GQA_128 = AttnSpec("gqa", heads=16, kv_heads=16, head_dim=128, scale=128**-0.5)
EXPECTED: dict[str, tuple[AttnSpec, MoESpec]] = {
    "deepseek-moe-16b": (
        GQA_128,
        MoESpec(64, 6, 1408, replace(QWEN_GATE, scores="model", ranked=False, epsilon=1e-20), shared_inter=2816),
    ),
    "DeepSeek-V2-Lite": (LITE_ATTN, MoESpec(64, 6, 1408, GateSpec("softmax"), shared_inter=2816)),
    "DeepSeek-V2": (
        V3_ATTN,
        MoESpec(160, 6, 1536, GateSpec("softmax", n_group=8, topk_group=3, scale=16.0), shared_inter=3072),
    ),
    "DeepSeek-V3": (V3_ATTN, MoESpec(256, 8, 2048, V3_GATE, shared_inter=2048)),
    "DeepSeek-V3.2-Exp": (
        replace(V3_ATTN, indexer=IndexerSpec(64, 128, 2048)),
        MoESpec(256, 8, 2048, V3_GATE, shared_inter=2048),
    ),
    "Mixtral-8x7B-v0.1": (
        replace(GQA_128, heads=32, kv_heads=8),
        MoESpec(8, 2, 14336, GateSpec("softmax", logits="model", ranked=True, normalise=True)),
    ),
    "Qwen3-30B-A3B": (
        replace(GQA_128, heads=32, kv_heads=4, qk_norm="head"),
        MoESpec(128, 8, 768, replace(QWEN_GATE, normalise=True)),
    ),
    "Qwen3-Coder-30B-A3B": (
        replace(GQA_128, heads=32, kv_heads=4, qk_norm="head"),
        MoESpec(128, 8, 768, replace(QWEN_GATE, normalise=True)),
    ),
    "Qwen1.5-MoE-A2.7B": (
        replace(GQA_128, qkv_bias=True),
        MoESpec(60, 4, 1408, QWEN_GATE, shared_inter=5632, shared_gated=True),
    ),
    "OLMoE-1B-7B-0924": (replace(GQA_128, qk_norm="full"), MoESpec(64, 8, 1024, QWEN_GATE)),
    "GLM-4.5-Air": (
        replace(GQA_128, heads=96, kv_heads=8, qkv_bias=True),
        MoESpec(128, 8, 1408, replace(V3_GATE, n_group=1, topk_group=1, scale=1.0), shared_inter=1408),
    ),
}

QUANTISED = {name: QuantScheme("fp8", 8, group_size=128) for name in ("DeepSeek-V3", "DeepSeek-V3.2-Exp")}


def parameters(spec: MoEDecoderSpec) -> int:
    """Numbers in the model's tensors, multi-token prediction left out."""
    d, a, moe = spec.d_model, spec.attn, spec.moe
    if a.kind == "mla":
        queries = (d * a.q_lora_rank + a.q_lora_rank * (1 + a.heads * a.head_dim)) if a.q_lora_rank else (
            d * a.heads * a.head_dim
        )  # fmt: skip
        keys = d * (a.kv_lora_rank + a.qk_rope_dim) + a.kv_lora_rank * (1 + a.heads * (a.qk_nope_dim + a.v_dim))
        attention = queries + keys + a.heads * a.v_dim * d
    else:
        width = (a.heads + 2 * a.kv_heads) * a.head_dim
        norms = {"none": 0, "head": 2 * a.head_dim, "full": (a.heads + a.kv_heads) * a.head_dim}[a.qk_norm]
        attention = width * (d + a.qkv_bias) + a.heads * a.head_dim * d + norms
    if a.indexer:
        i = a.indexer
        attention += (a.q_lora_rank or 0) * i.heads * i.head_dim + d * (i.head_dim + i.heads) + 2 * i.head_dim
    sparse = moe.n_experts * (3 * d * moe.inter + d + moe.gate.bias) + 3 * d * moe.shared_inter + d * moe.shared_gated
    dense = 3 * d * spec.dense_inter
    layers = sum(sparse if kind == "moe" else dense for kind in spec.layer_kinds)
    head = spec.vocab_size * d * (1 if spec.tie_embeddings else 2)
    return head + d + spec.n_layers * (attention + 2 * d) + layers


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name: str) -> None:
    config, count = RELEASED[name]
    before = copy.deepcopy(config)
    spec = spec_from_config(config)
    assert config == before
    attn, moe = EXPECTED[name]
    assert replace(spec.attn, scale=0.0) == replace(attn, scale=0.0)
    assert spec.attn.scale == pytest.approx(attn.scale)
    assert spec.moe == moe
    assert parameters(spec) == count
    assert spec.dtype == torch.bfloat16
    assert spec.quantization == QUANTISED.get(name)
    assert spec.max_positions == config["max_position_embeddings"]
    assert spec.eos_token_ids == tuple(spec_ids(config["eos_token_id"]))
    rotated = attn.qk_rope_dim or int(attn.head_dim * config.get("partial_rotary_factor", 1))
    assert (spec.rope.theta, spec.rope.dim) == (config["rope_theta"], rotated)
    assert spec.rope.type == ("yarn" if config.get("rope_scaling") else "default")
    assert spec.rope.interleaved == (attn.kind == "mla")
    assert spec.rope.precision == ("float32" if config["model_type"] == "deepseek_v2" else "model")
    assert spec.layer_kinds == ("dense",) * (spec.n_layers - len(spec.moe_layers)) + ("moe",) * len(spec.moe_layers)
    assert spec.n_layers - len(spec.moe_layers) == config.get("first_k_dense_replace", 0)
    assert spec.n_mtp == config.get("num_nextn_predict_layers", 0)


def spec_ids(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def test_cache_of_deepseek_v3() -> None:
    spec = spec_from_config(RELEASED["DeepSeek-V3"][0])
    assert spec.kv_floats_per_token == 61 * 576
    assert KVCache.bytes_per_token(spec, torch.bfloat16) == 61 * 1152


SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts", "num_local_experts", "num_experts_per_tok",
    "shared_expert_intermediate_size", "head_dim", "model_type",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"deepseek"}))
def test_absent_keys_have_the_defaults_of_transformers(name: str) -> None:
    """A configuration of nothing but sizes is what transformers' class makes of it and writes out in full."""
    from transformers import CONFIG_MAPPING

    released = next(config for config, _ in RELEASED.values() if config["model_type"] == name)
    sizes = {key: value for key, value in released.items() if key in SIZES}
    given = {key: value for key, value in sizes.items() if key != "model_type"}
    saved = {"dtype": None, **json.loads(CONFIG_MAPPING[name](**given).to_json_string(use_diff=False))}
    bare = spec_from_config(sizes)
    full = spec_from_config(saved)
    assert bare.eos_token_ids == ()  # those are generation_config.json's to tell
    same = {"eos_token_ids": (), "bos_token_id": None, "n_mtp": 0}
    assert bare == replace(full, **same)


def test_defaults_of_the_first_deepseek() -> None:
    """Those of the original repository's configuration_deepseek.py: what is null there is a dense model's."""
    spec = spec_from_config({key: value for key, value in V1.items() if key in SIZES - {"num_key_value_heads"}})
    assert spec.attn == AttnSpec("gqa", heads=4, kv_heads=4, head_dim=16, scale=0.25)
    assert spec.layer_kinds == ("moe",) * 3
    assert spec.moe.shared_inter == 0
    assert spec.rms_eps == 1e-6
    assert (spec.rope.type, spec.rope.theta) == ("default", 10000.0)


def test_layers_of_the_first_deepseek() -> None:
    spec = spec_from_config({**V1, "num_hidden_layers": 7, "first_k_dense_replace": 3, "moe_layer_freq": 2})
    assert spec.moe_layers == (4, 6)


def test_one_expert_of_the_first_deepseek_is_not_normalised() -> None:
    assert spec_from_config({**V1, "norm_topk_prob": True}).moe.gate.normalise
    assert not spec_from_config({**V1, "norm_topk_prob": True, "num_experts_per_tok": 1}).moe.gate.normalise


def test_greedy_gate_of_v2_does_not_look_at_groups() -> None:
    spec = spec_from_config({**V2, "topk_method": "greedy", "n_group": 5, "topk_group": 9})
    assert spec.moe.gate == GateSpec("softmax", scale=16.0)
    assert spec_from_config({**LITE, "n_group": None, "topk_group": None}).moe.gate == GateSpec("softmax")


def test_absent_and_null_differ() -> None:
    """For transformers null is no value, whatever the default of an absent key."""
    absent = {key: value for key, value in LITE.items() if key != "q_lora_rank"}
    assert spec_from_config(absent).attn.q_lora_rank == 1536
    assert spec_from_config({**absent, "q_lora_rank": None}).attn.q_lora_rank is None
    windowed = {**QWEN3, "use_sliding_window": True}
    assert spec_from_config(windowed).attn.windows == (4096,) * 3
    assert spec_from_config({**windowed, "sliding_window": None}).attn.windows == ()


def test_windows() -> None:
    assert spec_from_config(MIX).attn.windows == (8, 8)
    assert spec_from_config({**MIX, "sliding_window": None}).attn.windows == ()
    assert spec_from_config({**QWEN3, "sliding_window": 9}).attn.windows == ()
    assert spec_from_config({**QWEN2, "sliding_window": 0, "use_sliding_window": False}).attn.windows == ()
    config = {**QWEN2, "num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 9}
    assert spec_from_config(config).attn.windows == (9, None, 9, None, 9, None)
    assert spec_from_config({**config, "max_window_layers": 3}).attn.windows == (9, None, 9, None, None, None)
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 4
    assert spec_from_config({**config, "layer_types": kinds}).attn.windows == (9, 9, None, None, None, None)


def test_layers_with_experts() -> None:
    config = {**QWEN3, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert spec_from_config(config).moe_layers == (1, 5)
    kinds = ["sparse", "dense", "sparse"]
    assert spec_from_config({**V32, "mlp_layer_types": kinds}).moe_layers == (0, 2), "wins over first_k_dense_replace"
    spec_from_config({**V3, "mlp_layer_types": ["dense", "sparse", "sparse"]})


def test_glm_defaults() -> None:
    config = {k: v for k, v in GLM.items() if k not in ("head_dim", "use_qk_norm", "rope_parameters", "eos_token_id")}
    spec = spec_from_config({**config, "attention_bias": False, "eos_token_id": [5, 7]})
    assert (spec.attn.head_dim, spec.rope.dim, spec.rope.theta) == (16, 8, 10000.0)
    assert not spec.attn.qkv_bias
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


def test_yarn_as_a_model_card_prescribes_it_lengthens_the_context() -> None:
    config = RELEASED["Qwen3-30B-A3B"][0]
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert spec_from_config({**config, "rope_scaling": scaling}).max_positions == 131072
    assert spec_from_config({**config, "rope_scaling": {**scaling, "factor": 1.1}}).max_positions == 40960
    bare = spec_from_config({**config, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    assert (bare.rope.original_max_positions, bare.max_positions) == (40960, 2 * 40960)


def test_the_original_context_beside_wins_over_the_one_inside() -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    key, scaling = "original_max_position_embeddings", {"rope_type": "yarn", "factor": 4.0}
    config = RELEASED["Qwen3-30B-A3B"][0] | {key: 8192, "rope_scaling": {**scaling, key: 32768}}
    theirs = Qwen3MoeRotaryEmbedding(Qwen3MoeConfig(**copy.deepcopy(config)))
    frequencies, factor = inverse_frequencies(spec_from_config(config).rope)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling
    inside = inverse_frequencies(spec_from_config({**config, key: None}).rope)[0]
    assert not torch.equal(frequencies, inside)
    assert spec_from_config(config).rope.original_max_positions == 8192
    assert spec_from_config({**config, key: None}).rope.original_max_positions == 32768
    whole = spec_from_config({**config, key: 8192.0}).rope.original_max_positions
    assert (whole, type(whole)) == (8192, int)


def test_spellings_of_the_dtype() -> None:
    assert spec_from_config({**V3, "torch_dtype": "torch.float16"}).dtype == torch.float16
    assert spec_from_config({**V3, "torch_dtype": "float8_e4m3fn", "dtype": "bfloat16"}).dtype == torch.bfloat16
    assert spec_from_config({**V3, "torch_dtype": "float16", "dtype": None}).dtype == torch.float16


@pytest.mark.parametrize("base", ALL, ids=lambda base: base["model_type"])
def test_three_names_of_the_expert_count(base: dict[str, Any]) -> None:
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    count = next(base[name] for name in names if name in base)
    rest = {key: value for key, value in base.items() if key not in names}
    assert all(spec_from_config({**rest, name: count}) == spec_from_config(base) for name in names)
    assert spec_from_config({**rest, names[1]: count, names[2]: count}) == spec_from_config(base)
    with pytest.raises(UnsupportedModelError, match=f"num_experts is {count + 4}: allowed is {count}, as n_routed"):
        spec_from_config({**rest, names[0]: count, names[1]: count + 4})


@pytest.mark.parametrize("base", ALL, ids=lambda base: base["model_type"])
def test_code_of_a_repository_is_not_looked_at(base: dict[str, Any]) -> None:
    mapped = {**base, "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil--repo.Model"}}
    assert spec_from_config(mapped) == spec_from_config(base)


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


def test_full_rotation_of_glm() -> None:
    rope = {**DEFAULT_ROPE, "partial_rotary_factor": 1.0}
    assert spec_from_config({**GLM, "rope_parameters": rope}).rope.dim == 32


def test_null_is_false_for_a_flag_as_in_transformers() -> None:
    assert not spec_from_config({**V3, "norm_topk_prob": None}).moe.gate.normalise
    assert not spec_from_config({**V3, "rope_interleave": None}).rope.interleaved


def test_what_is_wrong_in_a_file_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**V3, "hidden_size": "64"}))
    with pytest.raises(UnsupportedModelError, match=f"{tmp_path}/config.json: hidden_size is '64': allowed is"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        load_spec(tmp_path)
