"""Tiny random checkpoints of every model family, written by transformers, with the model that wrote them."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

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
    "factor": 40.0,
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
    return _write_deepseek(path, seed, {**DEEPSEEK, "rope_parameters": DEFAULT_ROPE, **overrides})


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


class DeepseekReference(torch.nn.Module):
    """DeepSeekMoE's decoder out of transformers' parts: called, and answering, as its causal models are."""

    def __init__(self, config: Any) -> None:
        from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

        super().__init__()
        self.config = config
        self.model = DeepseekOcr2TextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for layer in self.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.forward = _original_gate.__get__(layer.mlp.gate)

    def forward(self, **inputs: Any) -> Any:
        """input_ids, past_key_values and use_cache in; logits and past_key_values out."""
        out = self.model(**inputs)
        return SimpleNamespace(logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values)


def _original_gate(gate: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MoEGate of the hub's modeling_deepseek.py: all in the model's dtype."""
    logits = torch.nn.functional.linear(hidden_states.view(-1, gate.hidden_dim), gate.weight)
    weights, experts = torch.topk(logits.softmax(dim=-1), k=gate.top_k, dim=-1, sorted=False)
    if gate.top_k > 1 and getattr(gate, "normalise", False):
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights, experts


def _write_deepseek(path: Path, seed: int, settings: dict[str, Any]) -> DeepseekReference:
    from safetensors.torch import save_file
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig

    dtype = settings.pop("dtype", torch.float32)
    normalise = settings.pop("norm_topk_prob", False)
    frequency = settings.pop("moe_layer_freq", 1)
    first = settings.pop("first_k_dense_replace")
    layers = range(settings["num_hidden_layers"])
    sparse = [layer >= first and layer % frequency == 0 for layer in layers]
    with _quiet():
        config = DeepseekOcr2TextConfig(
            **{**settings, "rope_parameters": dict(settings["rope_parameters"])},
            mlp_layer_types=["sparse" if kind else "dense" for kind in sparse],
            topk_method="greedy",
            routed_scaling_factor=1.0,
            attn_implementation="eager",
            experts_implementation="grouped_mm",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DeepseekReference(config)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.normalise = normalise
    _scatter(model, seed)
    frequencies = model.model.rotary_emb.inv_freq
    model.to(dtype).eval()
    model.model.rotary_emb.inv_freq = frequencies  # which the cast has rounded; transformers never does when it loads
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                block = name.replace("gate_up_proj", str(expert))
                tensors |= {f"{block}.gate_proj.weight": gate, f"{block}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                tensors[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            tensors[name] = value
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")
    rope = settings.pop("rope_parameters")
    on_hub = {
        **settings,
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
        "attention_bias": False,
        "first_k_dense_replace": first,
        "moe_layer_freq": frequency,
        "hidden_act": "silu",
        "norm_topk_prob": normalise,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
        "scoring_func": "softmax",
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (path / "config.json").write_text(json.dumps(on_hub, indent=2))
    return model


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
            elif name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
                value.copy_(draw(value.shape, 0.5))
            elif name.endswith(("norm.weight", "layernorm.weight")):
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
