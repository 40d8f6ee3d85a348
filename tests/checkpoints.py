"""Tiny random checkpoints of every model family, written by transformers, with the model that wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.deepseek_reference import write_reference
from tests.quiet import quiet
from tests.random_weights import scatter

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
DEEPSEEK = {
    **BASE,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
}
DEEPSEEK_V2_LITE = {
    **BASE,
    **MLA,
    "q_lora_rank": None,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}
DEEPSEEK_V2 = {
    **DEEPSEEK_V2_LITE,
    "q_lora_rank": 48,
    "n_routed_experts": 16,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 16.0,
    "rope_parameters": YARN,
}
DEEPSEEK_V3 = {
    **BASE,
    **MLA,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_parameters": YARN,
}
# With few heads the indexer's relu leaves many a token with a score of exactly 0, and ties are topk's to break.
DEEPSEEK_V32 = {**DEEPSEEK_V3, "index_n_heads": 12, "index_head_dim": 16, "index_topk": 6}
GLM4_MOE = {
    **BASE,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "use_qk_norm": True,
    "attention_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "rope_parameters": DEFAULT_ROPE,
}
MIXTRAL = {
    **{key: value for key, value in BASE.items() if key != "moe_intermediate_size"},
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 1e6},
}
QWEN3_MOE = {
    **BASE,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 1e6},
}
QWEN2_MOE = {
    **BASE,
    "num_hidden_layers": 2,
    "shared_expert_intermediate_size": 64,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "rope_parameters": DEFAULT_ROPE,
}
OLMOE = {
    **{key: value for key, value in BASE.items() if key != "moe_intermediate_size"},
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "rope_parameters": DEFAULT_ROPE,
}


def write_deepseek(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a ``deepseek`` checkpoint (DeepSeekMoE-16B's kind: MHA, softmax gate, 8 experts, top-3); see below.

    transformers has no such type: the reference is its DeepseekOcr2 text model (Llama's attention, V2's experts) with a
    head on top and the gate of the original code, whose logits and softmax are in the model's dtype.
    """
    return write_reference(path, seed, {**DEEPSEEK, "rope_parameters": DEFAULT_ROPE, **overrides})


def write_deepseek_v2(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a ``deepseek_v2`` checkpoint (MLA, YaRN, 16 experts in 4 groups, top-3, group-limited); see below."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return _write(path, seed, DeepseekV2ForCausalLM, DeepseekV2Config, {**DEEPSEEK_V2, **overrides})


def write_deepseek_v2_lite(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a ``deepseek_v2`` checkpoint as V2-Lite (no q_lora, greedy gate, 8 experts, top-3); see below."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return _write(path, seed, DeepseekV2ForCausalLM, DeepseekV2Config, {**DEEPSEEK_V2_LITE, **overrides})


def write_deepseek_v3(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a ``deepseek_v3`` checkpoint (MLA, YaRN, 16 experts in 4 groups, top-4) to the folder ``path``.

    ``overrides`` are config keys; ``dtype`` (default torch.float32) is what the weights are stored in, and
    ``max_shard_size`` (such as "100KB") splits the file. Returns the Hugging Face model, in eval mode.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return _write(path, seed, DeepseekV3ForCausalLM, DeepseekV3Config, {**DEEPSEEK_V3, **overrides})


def write_glm4_moe(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a ``glm4_moe`` checkpoint (GQA, qk-norm, bias, 8 experts, top-4); see the other writer."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    return _write(path, seed, Glm4MoeForCausalLM, Glm4MoeConfig, {**GLM4_MOE, **overrides})


def write_deepseek_v32(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a ``deepseek_v32`` checkpoint (V3 with an indexer that keeps 6 tokens); see the V3 writer."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    return _write(path, seed, DeepseekV32ForCausalLM, DeepseekV32Config, {**DEEPSEEK_V32, **overrides})


def write_mixtral(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a ``mixtral`` checkpoint (GQA, window of 8, 4 experts, top-2); see the V3 writer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return _write(path, seed, MixtralForCausalLM, MixtralConfig, {**MIXTRAL, **overrides})


def write_qwen3_moe(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a ``qwen3_moe`` checkpoint (GQA, qk-norm, layer 1 dense, 8 experts, top-4); see the V3 writer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return _write(path, seed, Qwen3MoeForCausalLM, Qwen3MoeConfig, {**QWEN3_MOE, **overrides})


def write_qwen2_moe(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write a ``qwen2_moe`` checkpoint (qkv bias, gated shared expert, 8 experts, top-4); see the V3 writer."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return _write(path, seed, Qwen2MoeForCausalLM, Qwen2MoeConfig, {**QWEN2_MOE, **overrides})


def write_olmoe(path: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write an ``olmoe`` checkpoint (MHA, norm of the whole q and k, 8 experts, top-4); see the V3 writer."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return _write(path, seed, OlmoeForCausalLM, OlmoeConfig, {**OLMOE, **overrides})


WRITERS: Mapping[str, Callable[..., Any]] = {
    "deepseek": write_deepseek,
    "deepseek_v2": write_deepseek_v2,
    "deepseek_v2_lite": write_deepseek_v2_lite,
    "deepseek_v3": write_deepseek_v3,
    "deepseek_v32": write_deepseek_v32,
    "glm4_moe": write_glm4_moe,
    "mixtral": write_mixtral,
    "olmoe": write_olmoe,
    "qwen2_moe": write_qwen2_moe,
    "qwen3_moe": write_qwen3_moe,
}
"""By model family; ``deepseek_v2`` comes in two shapes."""


def _write(path: Path, seed: int, model_class: Any, config_class: Any, settings: dict[str, Any]) -> Any:
    dtype = settings.pop("dtype", torch.float32)
    shard = settings.pop("max_shard_size", "5GB")
    rope = dict(settings.pop("rope_parameters"))
    with quiet():
        config = config_class(
            **settings, rope_parameters=rope, attn_implementation="eager", experts_implementation="grouped_mm"
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = model_class(config)
        scatter(model, seed)
        bias = {name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
        kept = {name: value.clone() for name, value in bias.items()}
        model.to(dtype).save_pretrained(path, max_shard_size=shard)
        if dtype != torch.float32:
            # The cast rounds the correction bias, which transformers keeps in fp32 when it loads: so reload.
            _restore_bias(path, kept)
            model = model_class.from_pretrained(
                path, dtype=dtype, attn_implementation="eager", experts_implementation="grouped_mm"
            )
    return model.eval()


def _restore_bias(path: Path, bias: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.update({name: value for name, value in bias.items() if name in tensors})
        save_file(tensors, file, metadata={"format": "pt"})
