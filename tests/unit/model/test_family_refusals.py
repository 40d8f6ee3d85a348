"""What is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from actors.model.errors import UnsupportedModelError
from actors.model.families import spec_from_config
from tests.checkpoints import YARN
from tests.unit.model.tiny_configs import GLM, MIX, OLMOE, QWEN2, QWEN3, V1, V2, V3, V32

BAD = [
    (V3, {"model_type": "llama"}, r"model_type is 'llama': allowed is one of 'deepseek', 'deepseek_v2', "),
    (V3, {"model_type": None}, "model_type is null"),
    (V3, {"hidden_act": "gelu"}, "hidden_act is 'gelu': allowed is one of 'silu'"),
    (V3, {"quantization_config": {"quant_method": "nonesuch"}}, r"quant\w+.*'nonesuch'"),
    (V3, {"mlp_bias": True}, "mlp_bias is true: allowed is false"),
    (V3, {"scoring_func": "softmax"}, "scoring_func is 'softmax': allowed is one of 'sigmoid'"),
    (V3, {"topk_method": "greedy"}, "topk_method is 'greedy': allowed is one of 'noaux_tc'"),
    (V3, {"moe_layer_freq": 2}, "moe_layer_freq is 2: allowed is 1 .this model_type has no such thing"),
    (V3, {"hidden_size": "64"}, "hidden_size is '64': allowed is an integer >= 1"),
    (V3, {"hidden_size": True}, "hidden_size is true"),
    (V3, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    (V3, {"kv_lora_rank": None}, "kv_lora_rank is null: allowed is an integer >= 1"),
    (V3, {"q_lora_rank": 0}, "q_lora_rank is 0"),
    (V3, {"num_key_value_heads": 2}, "num_key_value_heads is 2: allowed is num_attention_heads = 4"),
    (V3, {"rope_interleave": 1}, "rope_interleave is 1: allowed is true or false"),
    (V3, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan: allowed is a finite number > 0"),
    (V3, {"routed_scaling_factor": -1}, "routed_scaling_factor is -1"),
    (V3, {"n_group": 3}, "n_group is 3: allowed is a divisor of the 16 experts that leaves 2 or more in a group"),
    (V3, {"n_group": 16}, "n_group is 16: .*2 or more"),
    (V3, {"topk_group": 5}, "topk_group is 5: allowed is at most n_group = 4"),
    (V3, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9: allowed is at most the 8 experts of the chosen groups"),
    (V3, {"first_k_dense_replace": 3}, "num_hidden_layers is 3: allowed is a pattern of layers with a MoE layer in it"),
    (V3, {"mlp_layer_types": ["sparse"] * 3}, r"mlp_layer_types is .*: allowed is what the other keys say: \['dense'"),
    (V3, {"mlp_layer_types": ["sparse"]}, "mlp_layer_types is .*: allowed is a list of 3, each one of 'dense'"),
    (V3, {"layer_types": ["sliding_attention"] * 3}, "layer_types is .*: allowed is what the other keys say"),
    (V3, {"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn': allowed is one of 'float32', 'bfloat16'"),
    (V3, {"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
    (V3, {"torch_dtype": "auto"}, "torch_dtype is 'auto': allowed is one of .*; a `dtype` beside torch_dtype wins"),
    (V3, {"torch_dtype": "torch.float8_e4m3fn"}, "torch_dtype is 'torch.float8_e4m3fn'"),
    (V3, {"torch_dtype": 16}, "torch_dtype is 16"),
    (V3, {"rope_parameters": {**YARN, "original_max_position_embeddings": 64.5}}, r"_parameters\.original\w+ is 64\.5"),
    (V3, {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0: allowed is a finite number"),
    (V3, {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    (V3, {"eos_token_id": [1, -1]}, "eos_token_id is"),
    (V3, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1: allowed is an integer >= 0"),
    (V3, {"num_nextn_predict_layers": 1, "num_mtp_layers": 2}, "num_mtp_layers is 2: allowed is 1, as num_nextn"),
    (V3, {"rope_parameters": {**YARN, "rope_type": "linear"}}, r"rope_parameters\.rope_type is 'linear': .*'yarn'"),
    (V3, {"rope_scaling": {"type": "dynamic", "factor": 2}}, r"rope_scaling\.type is 'dynamic'"),
    (V3, {"rope_scaling": 4}, "rope_scaling is 4: allowed is an object"),
    (V3, {"rope_parameters": {"full_attention": YARN}}, "rope_parameters is .*one setting for all layers"),
    (V3, {"rope_parameters": {**YARN, "factor": 0}}, r"rope_parameters\.factor is 0"),
    (V3, {"rope_parameters": {**YARN, "mscale": "1"}}, r"rope_parameters\.mscale is '1': .*finite number >= 0"),
    (V3, {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    (V3, {"sliding_window": 8}, "sliding_window is 8: allowed is null .this model_type has no such thing"),
    (V2, {"norm_topk_prob": True}, "norm_topk_prob is true: allowed is false .transformers ignores it, the original"),
    (V2, {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc': allowed is one of 'greedy', 'group_limited_greedy'"),
    (V2, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid': allowed is one of 'softmax'"),
    (V2, {"moe_layer_freq": 2}, "moe_layer_freq is 2: allowed is 1"),
    (V2, {"rope_interleave": False}, "rope_interleave is false: allowed is true"),
    (V2, {"n_group": 5}, "n_group is 5: allowed is a divisor of the 16 experts that leaves 1 or more"),
    (V2, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9: allowed is at most the 8 experts of the chosen groups"),
    (V2, {"index_topk": 64}, "index_topk is 64: allowed is null .this model_type has no such thing"),
    (V32, {"q_lora_rank": None}, "q_lora_rank is null: allowed is an integer >= 1"),
    (V32, {"rope_interleave": False}, "rope_interleave is false: allowed is true"),
    (V32, {"index_head_dim": 6}, "index_head_dim is 6: allowed is qk_rope_head_dim = 8 or more"),
    (V32, {"index_topk": 0}, "index_topk is 0: allowed is an integer >= 1"),
    (V32, {"mlp_layer_types": ["dense"] * 3}, "num_hidden_layers is 3: allowed is a pattern"),
    (V32, {"layer_types": ["full_attention"] * 3}, "layer_types is .*'indexed_attention'"),
    (V1, {"n_routed_experts": None}, "n_routed_experts is null: allowed is an integer >= 1"),
    (V1, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid': allowed is one of 'softmax'"),
    (V1, {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc': allowed is one of 'greedy'"),
    (V1, {"routed_scaling_factor": 2.0}, "routed_scaling_factor is 2.0: allowed is 1.0"),
    (V1, {"moe_layer_freq": 0}, "moe_layer_freq is 0"),
    (V1, {"num_attention_heads": 3, "num_key_value_heads": 3}, "num_attention_heads is 3: .*hidden_size = 64"),
    (V1, {"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling.type is .linear.: allowed is one of"),
    (MIX, {"norm_topk_prob": False}, "norm_topk_prob is false: allowed is true"),
    (MIX, {"num_local_experts": 1}, "num_experts_per_tok is 2: allowed is at most the 1 experts of the model"),
    (MIX, {"attention_bias": True}, "attention_bias is true: allowed is false .this model_type has no such thing"),
    (MIX, {"sliding_window": 0}, "sliding_window is 0: allowed is an integer >= 1"),
    (MIX, {"n_shared_experts": 1}, "n_shared_experts is 1: allowed is 0"),
    (V3, {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7: allowed is an even number"),
    (MIX, {"head_dim": 31}, "head_dim is 31: allowed is an even number"),
    (V3, {"num_hidden_layers": 10**12}, "num_hidden_layers is 10{12}: allowed is an integer <= 10000"),
    (MIX, {"num_local_experts": 10**9}, "num_local_experts is 10{9}: allowed is an integer <= "),
    (MIX, {"max_position_embeddings": 10**15}, "max_position_embeddings is 10{15}: allowed is an integer <= 16777216"),
    (MIX, {"max_position_embeddings": 10**6000}, "max_position_embeddings is an integer of 19932 bits: allowed is"),
    (MIX, {"vocab_size": 10**12}, "vocab_size is 10{12}: allowed is an integer <= 2147483647"),
    (V3, {"rope_parameters": {**YARN, "factor": 1e9}}, "rope_scaling is .*at most 16777216 positions"),
    (MIX, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: allowed is 1.0"),
    (QWEN3, {"use_qk_norm": False}, "use_qk_norm is false: allowed is true"),
    (QWEN3, {"qkv_bias": True}, "qkv_bias is true: allowed is false .this model_type has no such thing"),
    (QWEN3, {"clip_qkv": 8.0}, "clip_qkv is 8.0: allowed is null"),
    (QWEN3, {"decoder_sparse_step": 4}, "num_hidden_layers is 3: allowed is a pattern"),
    (QWEN3, {"mlp_only_layers": 1}, "mlp_only_layers is 1: allowed is a list of integers >= 0"),
    (QWEN3, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0: allowed is an integer >= 1"),
    (QWEN3, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64: allowed is 0"),
    (QWEN2, {"use_sliding_window": True, "sliding_window": None}, "sliding_window is null: allowed is an integer"),
    (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types is .*\['full_attention', 'full"),
    (QWEN2, {"layer_types": ["chunked_attention"] * 2}, "layer_types is .*each one of 'full_attention'"),
    (QWEN2, {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size is null"),
    (OLMOE, {"clip_qkv": -1}, "clip_qkv is -1: allowed is a finite number >= 0"),
    (OLMOE, {"head_dim": 32}, "num_attention_heads is 4: allowed is heads that share hidden_size = 64 out"),
    (OLMOE, {"n_group": 2}, "n_group is 2: allowed is 1"),
    (GLM, {"num_key_value_heads": 3}, "num_key_value_heads is 3: allowed is a divisor of num_attention_heads = 4"),
    (GLM, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    (GLM, {"partial_rotary_factor": 0.1}, "partial_rotary_factor is 0.1: .*even count"),
    (GLM, {"use_qk_norm": "yes"}, "use_qk_norm is 'yes'"),
    (GLM, {"topk_method": "greedy"}, "topk_method is 'greedy'"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "change", "message"), BAD)
def test_refusals_name_key_value_and_what_is_allowed(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    spec_from_config(base)
    with pytest.raises(UnsupportedModelError, match=message):
        spec_from_config({**base, **change})


def test_a_default_that_is_refused_is_called_one() -> None:
    config = {key: value for key, value in V3.items() if key != "n_group"}
    with pytest.raises(
        UnsupportedModelError, match="n_group is missing, which means 8: allowed is a divisor of the 12"
    ):
        spec_from_config({**config, "n_routed_experts": 12})


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_experts_per_tok", "max_position_embeddings"])
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{key} is missing: allowed is"):
        spec_from_config({k: v for k, v in V3.items() if k != key})
