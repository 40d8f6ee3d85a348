"""The first DeepSeekMoE, which transformers does not have: a reference model, and checkpoints of it as on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.quiet import quiet
from tests.random_weights import scatter


class DeepseekReference(torch.nn.Module):
    """DeepSeekMoE's decoder out of transformers' parts: called, and answering, as its causal models are.

    ``normalise``: whether the gate's weights are divided by their sum (``norm_topk_prob``).
    """

    def __init__(self, config: Any, normalise: bool) -> None:
        from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

        super().__init__()
        self.config = config
        self.model = DeepseekOcr2TextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for layer in self.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.normalise = normalise
                layer.mlp.gate.forward = _original_gate.__get__(layer.mlp.gate)

    def forward(self, **inputs: Any) -> Any:
        """input_ids, past_key_values and use_cache in; logits and past_key_values out."""
        out = self.model(**inputs)
        return SimpleNamespace(logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values)


def _original_gate(gate: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MoEGate of the hub's modeling_deepseek.py: all in the model's dtype."""
    logits = torch.nn.functional.linear(hidden_states.view(-1, gate.hidden_dim), gate.weight)
    weights, experts = torch.topk(logits.softmax(dim=-1), k=gate.top_k, dim=-1, sorted=False)
    if gate.top_k > 1 and gate.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights, experts


def write_reference(path: Path, seed: int, settings: Mapping[str, Any]) -> DeepseekReference:
    """Write a ``deepseek`` checkpoint with these config keys to the folder ``path``; returns the model that is in it.

    ``dtype`` (default torch.float32) is what the weights are stored in.
    """
    from safetensors.torch import save_file

    keys = {"moe_layer_freq": 1, "norm_topk_prob": False, **settings}
    dtype = keys.pop("dtype", torch.float32)
    model = _random_model(keys, seed, dtype)
    path.mkdir(parents=True, exist_ok=True)
    save_file(_hub_tensors(model), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(_hub_config(keys, model.config.rms_norm_eps, dtype), indent=2))
    return model


def _random_model(keys: Mapping[str, Any], seed: int, dtype: torch.dtype) -> DeepseekReference:
    with quiet():
        config = _config(**keys)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DeepseekReference(config, keys["norm_topk_prob"])
    scatter(model, seed)
    frequencies = model.model.rotary_emb.inv_freq
    model.to(dtype).eval()
    model.model.rotary_emb.inv_freq = frequencies  # which the cast has rounded; transformers never does when it loads
    return model


def _config(
    first_k_dense_replace: int,
    moe_layer_freq: int,
    norm_topk_prob: bool,
    rope_parameters: dict[str, Any],
    num_hidden_layers: int,
    **more: Any,
) -> Any:
    """The same model in the keys of transformers' DeepseekOcr2; ``norm_topk_prob`` has none there."""
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig

    layers = range(num_hidden_layers)
    sparse = [layer >= first_k_dense_replace and layer % moe_layer_freq == 0 for layer in layers]
    return DeepseekOcr2TextConfig(
        **more,
        num_hidden_layers=num_hidden_layers,
        mlp_layer_types=["sparse" if kind else "dense" for kind in sparse],
        rope_parameters=dict(rope_parameters),
        topk_method="greedy",
        routed_scaling_factor=1.0,
        attn_implementation="eager",
        experts_implementation="grouped_mm",
    )


def _hub_tensors(model: DeepseekReference) -> dict[str, Tensor]:
    """The weights by their names on the hub, where every expert's lie singly."""
    tensors: dict[str, Tensor] = {}
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
    return {name: value.contiguous() for name, value in tensors.items()}


def _hub_config(keys: Mapping[str, Any], rms_norm_eps: float, dtype: torch.dtype) -> dict[str, Any]:
    return {
        **{key: value for key, value in keys.items() if key != "rope_parameters"},
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": keys["rope_parameters"]["rope_theta"],
        "scoring_func": "softmax",
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
