"""Sizes from a description alone, against what transformers builds and writes, and against published figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from actors.model.families import load_spec, spec_from_config
from actors.model.inventory import Inventory, bytes_at_load, expert_shapes, held_bytes
from actors.model.quant.quantize import quantize
from actors.model.quant.scheme import QuantScheme
from actors.model.tensor_list import expected_tensors
from actors.quant_kind import QUANT_KINDS, QuantKind
from tests.checkpoints import WRITERS

MORE = {
    "tied": ("glm4_moe", {"tie_word_embeddings": True}),
    "biased": ("deepseek_v3", {"attention_bias": True}),
}
CASES = {**{family: (family, {}) for family in WRITERS}, **MORE}
V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "num_nextn_predict_layers": 1,
}


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    return shapes


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_every_parameter(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    model = WRITERS[family](tmp_path, **overrides)
    spec = load_spec(tmp_path)
    expected = {tensor.name: tensor.shape for tensor in expected_tensors(spec)}
    assert expected == stored_shapes(tmp_path)
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert Inventory.of(spec).total == sum(p.numel() for p in model.parameters()) + biases


def test_deepseek_v3_as_published() -> None:
    """671 B in all, without the layer for multi-token prediction; 37 B of them active."""
    spec = spec_from_config(V3)
    sizes = Inventory.of(spec)
    assert sizes.total == 671_026_419_200
    assert round(sizes.active / 1e9) == 37
    assert (len(spec.moe_layers), sizes.experts, sizes.active_experts) == (58, 58 * 256, 58 * 8)
    assert sizes.expert == 3 * 7168 * 2048
    assert spec.n_mtp == 1


def test_a_tied_head_is_counted_and_active_once() -> None:
    config = {"model_type": "glm4_moe", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128}
    config |= {"moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    config |= {"max_position_embeddings": 512}
    apart = Inventory.of(spec_from_config({**config, "tie_word_embeddings": False}))
    tied = Inventory.of(spec_from_config({**config, "tie_word_embeddings": True}))
    assert (apart.head, tied.head) == (64_000, 0)
    assert apart.total - tied.total == 64_000
    assert apart.active - tied.active == 64


def test_shards() -> None:
    sizes = Inventory.of(spec_from_config(V3))
    assert [sizes.experts_per_shard(n) for n in (1, 3, 256)] == [14848, 4950, 58]
    expert = 3 * 7168 * 2048 * 2
    assert sizes.shards_for(80 * 2**30, expert) == -(-14848 // (80 * 2**30 // expert)) == 16
    assert sizes.shards_for(expert, expert) == 14848
    assert sizes.shards_for(expert - 1, expert) is None


@pytest.mark.parametrize("kind", QUANT_KINDS)
@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (10, 200), (3, 130)])
def test_quantised_at_load(kind: QuantKind, shape: tuple[int, int]) -> None:
    assert bytes_at_load([shape], kind) == quantize(torch.zeros(shape), kind).nbytes


def test_held_as_stored() -> None:
    shapes = expert_shapes(spec_from_config(V3))
    params = 3 * 7168 * 2048
    assert held_bytes(shapes, None, 2) == 2 * params
    assert held_bytes(shapes, QuantScheme("fp8", 8), 2) == params + 4 * params // 128
    packed = QuantScheme("compressed-tensors", 4, group_size=32)
    assert held_bytes(shapes, packed, 2) == params // 2 + 2 * params // 32
    assert held_bytes(shapes, QuantScheme("awq", 4, group_size=128, symmetric=False), 2) == (
        params // 2 + 3 * params // 128
    )
    assert held_bytes([(7, 100)], QuantScheme("compressed-tensors", 8), 2) == 700 + 14
    assert held_bytes([(7, 100)], QuantScheme("compressed-tensors", 8), 2, scale_bytes=4) == 700 + 28
    ordered = QuantScheme("gptq", 8, group_size=50, ordered=True)
    assert held_bytes([(7, 100)], ordered, 2) == 700 + 7 * 2 * 2 + 100 * 8
