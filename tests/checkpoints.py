"""Tiny random checkpoints of both model families, written by transformers, with the model that wrote them."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DEEPSEEK_V3 = {
    **BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_parameters": YARN,
}
GLM4_MOE = {
    **BASE,
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


def _write(path: Path, seed: int, model_class: Any, config_class: Any, settings: dict[str, Any]) -> Any:
    dtype = settings.pop("dtype", torch.float32)
    shard = settings.pop("max_shard_size", "5GB")
    rope = dict(settings.pop("rope_parameters"))
    with _quiet():
        config = config_class(
            **settings, rope_parameters=rope, attn_implementation="eager", experts_implementation="grouped_mm"
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = model_class(config)
        _scatter(model, seed)
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


def _scatter(model: Any, seed: int) -> None:
    """Give every weight a scale at which it matters: experts differ clearly, routing is not near-tied."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                value.copy_(draw(value.shape, 0.02))
            elif name.endswith("mlp.gate.weight"):
                value.copy_(draw(value.shape, 0.5))
            elif name.endswith("norm.weight"):
                value.copy_(1 + draw(value.shape, 0.1))
            elif name.endswith("bias"):
                value.copy_(draw(value.shape, 0.1))
            elif name.endswith("embed_tokens.weight"):
                value.copy_(draw(value.shape, 1.0))
            elif value.dim() >= 2:
                value.copy_(draw(value.shape, value.shape[-1] ** -0.5))


def _restore_bias(path: Path, bias: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.update({name: value for name, value in bias.items() if name in tensors})
        save_file(tensors, file, metadata={"format": "pt"})


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep transformers' progress bars and advice out of the tests' output."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
