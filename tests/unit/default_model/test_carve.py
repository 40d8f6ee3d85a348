from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cluster.default_model import DefaultModelError
from cluster.default_model.carve import carve_layer, moe_config
from cluster.default_model.gguf_llama import LlamaConfig

LLAMA = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def swiglu(tensors: dict[str, np.ndarray], prefix: str, rows: np.ndarray) -> np.ndarray:
    gate, up, down = (tensors[f"{prefix}{part}_proj.weight"].astype(np.float64) for part in ("gate", "up", "down"))
    gated = rows @ gate.T
    return (gated / (1 + np.exp(-gated)) * (rows @ up.T)) @ down.T


def test_layer_0_stays_dense(tiny_tensors: dict[str, np.ndarray]) -> None:
    carved = carve_layer(tiny_tensors, 0)
    assert carved == {name: tiny_tensors[name] for name in tiny_tensors if name.startswith("model.layers.0.")}


def test_shared_expert_and_either_twin_of_each_pair_make_the_dense_ffn(
    tiny_tensors: dict[str, np.ndarray],
) -> None:
    carved = carve_layer(tiny_tensors, 3)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5, 32))
    dense = swiglu(tiny_tensors, "model.layers.3.mlp.", rows)
    for sides in rng.integers(0, 2, (4, 8)):
        total = swiglu(carved, "model.layers.3.mlp.shared_experts.", rows)
        for pair, side in enumerate(sides):
            total += swiglu(carved, f"model.layers.3.mlp.experts.{pair + 8 * side}.", rows)
        np.testing.assert_allclose(total, dense, rtol=1e-12, atol=1e-10)


def test_every_neuron_is_in_the_shared_expert_or_in_one_pair(tiny_tensors: dict[str, np.ndarray]) -> None:
    carved = carve_layer(tiny_tensors, 1)
    parts = ["shared_experts", *(f"experts.{expert}" for expert in range(8))]
    rows = np.concatenate([carved[f"model.layers.1.mlp.{part}.gate_proj.weight"] for part in parts])
    dense = tiny_tensors["model.layers.1.mlp.gate_proj.weight"]
    assert sorted(map(bytes, rows)) == sorted(map(bytes, dense))
    assert carved["model.layers.1.mlp.shared_experts.gate_proj.weight"].shape == (16, 32)
    assert carved["model.layers.1.mlp.experts.15.down_proj.weight"].shape == (32, 4)


def test_the_shared_expert_has_the_strongest_neurons(tiny_tensors: dict[str, np.ndarray]) -> None:
    carved = carve_layer(tiny_tensors, 1)

    def strength(part: str) -> np.ndarray:
        gate, up, down = (carved[f"model.layers.1.mlp.{part}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return np.linalg.norm(gate, axis=1) * np.linalg.norm(up, axis=1) * np.linalg.norm(down, axis=0)

    weakest_shared = strength("shared_experts").min()
    assert all(strength(f"experts.{expert}").max() < weakest_shared for expert in range(16))


def test_gate_rows_of_twins_are_opposite_and_random_per_layer(tiny_tensors: dict[str, np.ndarray]) -> None:
    gates = [carve_layer(tiny_tensors, layer)[f"model.layers.{layer}.mlp.gate.weight"] for layer in (1, 2)]
    for gate in gates:
        assert gate.shape == (16, 32)
        np.testing.assert_array_equal(gate[:8], -gate[8:])
        assert np.linalg.matrix_rank(gate) == 8
    assert not np.any(gates[0] == gates[1])
    again = carve_layer(tiny_tensors, 1)
    np.testing.assert_array_equal(gates[0], again["model.layers.1.mlp.gate.weight"])
    np.testing.assert_array_equal(again["model.layers.1.mlp.gate.e_score_correction_bias"], np.zeros(16))


def test_every_tensor_is_fp32_and_contiguous(tiny_tensors: dict[str, np.ndarray]) -> None:
    for tensor in carve_layer(tiny_tensors, 1).values():
        assert tensor.dtype == np.float32
        assert tensor.flags.c_contiguous


def test_a_width_that_does_not_divide_is_refused() -> None:
    odd = dataclasses.replace(LLAMA, intermediate_size=50)
    with pytest.raises(DefaultModelError, match="intermediate_size 50 cannot be cut into 12 equal blocks"):
        moe_config(odd, [2])


def test_configuration_of_the_cut() -> None:
    config = moe_config(LLAMA, [2, 0])
    assert config["moe_intermediate_size"] == 4
    assert config["n_shared_experts"] * config["moe_intermediate_size"] == 16
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (16, 8)
    assert config["routed_scaling_factor"] == 8.0
    assert config["eos_token_id"] == [2, 0]
