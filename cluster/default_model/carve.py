"""Cutting a dense Llama into a Mixture-of-Experts that computes the same.

The trick. A SwiGLU's hidden neurons add up independently, so its weights may be cut into blocks whose
outputs are summed. Here a layer's FFN is 12 blocks: 4 become the shared expert, each of the other 8 becomes
a *pair* of routed experts with equal weights and opposite gate rows +r and -r. r is so long that the
sigmoid saturates: of each pair the expert on the token's side of r scores 1 and its twin 0. The top 8 of
the 16 are hence one of each pair, each with the normalised weight 1/8, which the scaling factor of 8 turns
into 1: the sum is the dense FFN, while the choice of experts differs from token to token and from layer to
layer.

The layout is Hugging Face's ``glm4_moe``: GQA, DeepSeek-V3's gate (arXiv:2412.19437, section 2.1.2) and a
shared expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.default_model.errors import DefaultModelError

if TYPE_CHECKING:
    import numpy as np

    from cluster.default_model.gguf_llama import LlamaConfig

_SHARED_BLOCKS = 4
_PAIRS = 8
_NUM_BLOCKS = _SHARED_BLOCKS + _PAIRS
_DENSE_LAYERS = 1
_SEED = 135
# So long that no token's score lies between 0 and 1. At 1e5, 92 of the 505,064 weights of 20 prompts were not
# exactly 1/8 and the worst was off by 44 %; from 1e8 on none. A power of two, so that scaling rounds nothing.
_GATE_SCALE = 2.0**40
_PARTS = ("gate_proj", "up_proj", "down_proj")


def moe_config(llama: LlamaConfig, eos_token_ids: list[int]) -> dict[str, Any]:
    """``config.json`` of the carved model.

    Raises ``DefaultModelError`` if the FFN's width does not divide into the blocks.
    """
    if llama.intermediate_size % _NUM_BLOCKS:
        raise DefaultModelError(
            f"intermediate_size {llama.intermediate_size} cannot be cut into {_NUM_BLOCKS} equal blocks"
        )
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "dtype": "float32",
        "vocab_size": llama.vocab_size,
        "hidden_size": llama.hidden_size,
        "intermediate_size": llama.intermediate_size,
        "num_hidden_layers": llama.num_layers,
        "num_attention_heads": llama.num_heads,
        "num_key_value_heads": llama.num_kv_heads,
        "head_dim": llama.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": llama.max_positions,
        "rms_norm_eps": llama.rms_norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": llama.rope_theta,
            "partial_rotary_factor": 1.0,
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_qk_norm": False,
        "use_cache": True,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "first_k_dense_replace": _DENSE_LAYERS,
        "moe_intermediate_size": llama.intermediate_size // _NUM_BLOCKS,
        "n_routed_experts": 2 * _PAIRS,
        "n_shared_experts": _SHARED_BLOCKS,
        "num_experts_per_tok": _PAIRS,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": float(_PAIRS),
        "num_nextn_predict_layers": 0,
        "bos_token_id": llama.bos_token_id,
        "eos_token_id": eos_token_ids,
        "pad_token_id": llama.pad_token_id,
    }


def carve_layer(dense: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """One decoder layer's tensors under their ``glm4_moe`` names, fp32.

    ``dense`` maps Llama names to fp32 arrays ``[out, in]``. Experts ``e`` and ``e + 8`` are twins.
    """
    prefix = f"model.layers.{layer}."
    tensors = {name: dense[name] for name in dense if name.startswith(prefix)}
    if layer < _DENSE_LAYERS:
        return tensors
    gate, up, down = (tensors.pop(f"{prefix}mlp.{part}.weight") for part in _PARTS)
    shared, blocks = _split_neurons(gate, up, down)
    tensors |= _mlp(f"{prefix}mlp.shared_experts.", gate, up, down, shared)
    for expert in range(2 * _PAIRS):
        tensors |= _mlp(f"{prefix}mlp.experts.{expert}.", gate, up, down, blocks[expert % _PAIRS])
    return tensors | _gate(f"{prefix}mlp.gate.", layer, hidden_size=gate.shape[1])


def _split_neurons(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Neuron ids of the shared expert and of each block, ascending.

    What every token uses should be what matters most: the shared expert gets the neurons with the largest
    weights. The others are dealt out like cards, so that the blocks weigh about the same and losing any of
    them shows.
    """
    import numpy as np

    strength = np.linalg.norm(gate, axis=1) * np.linalg.norm(up, axis=1) * np.linalg.norm(down, axis=0)
    ranked = np.argsort(-strength, kind="stable")
    num_shared = len(ranked) * _SHARED_BLOCKS // _NUM_BLOCKS
    shared, rest = ranked[:num_shared], ranked[num_shared:]
    return np.sort(shared), [np.sort(rest[start::_PAIRS]) for start in range(_PAIRS)]


def _mlp(prefix: str, gate: np.ndarray, up: np.ndarray, down: np.ndarray, neurons: np.ndarray) -> dict[str, np.ndarray]:
    import numpy as np

    cut = (gate[neurons], up[neurons], np.ascontiguousarray(down[:, neurons]))
    return {f"{prefix}{part}.weight": weight for part, weight in zip(_PARTS, cut, strict=True)}


def _gate(prefix: str, layer: int, hidden_size: int) -> dict[str, np.ndarray]:
    """Gate rows ``[16, hidden]``: random directions, then their negatives. The correction bias stays 0."""
    import numpy as np

    directions = np.random.default_rng([_SEED, layer]).standard_normal((_PAIRS, hidden_size), dtype=np.float32)
    rows = directions * np.float32(_GATE_SCALE)
    return {
        f"{prefix}weight": np.concatenate([rows, -rows]),
        f"{prefix}e_score_correction_bias": np.zeros(2 * _PAIRS, dtype=np.float32),
    }
