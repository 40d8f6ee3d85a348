from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding, apply_rotary_emb
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding, apply_rotary_pos_emb

from actors.model.families import spec_from_config
from actors.model.rope import PIECE, RopeTable, inverse_frequencies, rotate_half
from actors.model.spec import Precision, RopeSpec
from tests.checkpoints import DEEPSEEK_V2, DEEPSEEK_V3, DEFAULT_ROPE, GLM4_MOE, YARN

POSITIONS = torch.tensor([0, 1, 7, 63, 64, 300, 511])


def heads(width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(len(POSITIONS), 3, width, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("rope", [YARN, DEFAULT_ROPE, {**YARN, "factor": 4.0, "beta_fast": 8, "truncate": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleaved_is_the_reference(rope: dict[str, object], dtype: torch.dtype) -> None:
    settings = {**DEEPSEEK_V3, "qk_rope_head_dim": 32, "rope_parameters": rope}
    theirs = DeepseekV3RotaryEmbedding(DeepseekV3Config(**{**settings, "rope_parameters": dict(rope)}))
    spec = spec_from_config({**settings, "model_type": "deepseek_v3"})
    torch.testing.assert_close(inverse_frequencies(spec.rope)[0], theirs.inv_freq, rtol=0, atol=0)
    x = heads(32, dtype)
    cos, sin = theirs(x, POSITIONS[None])
    want = apply_rotary_pos_emb_interleave(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)[0]
    got = RopeTable(spec.rope, 512, dtype).apply(x, POSITIONS)
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=0, atol=2e-6 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("rope", [YARN, {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}, DEFAULT_ROPE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp32_rotation_is_bit_for_bit_that_of_v2(rope: dict[str, object], dtype: torch.dtype) -> None:
    settings = {**DEEPSEEK_V2, "qk_rope_head_dim": 32, "head_dim": 32}
    theirs = DeepseekV2RotaryEmbedding(DeepseekV2Config(**{**settings, "rope_parameters": dict(rope)}))
    spec = spec_from_config({**settings, "rope_parameters": rope, "model_type": "deepseek_v2"})
    assert spec.rope.precision == "float32"
    positions = torch.arange(0, 20_000, 7)
    x = torch.randn(len(positions), 3, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = x.transpose(0, 1)[None]
    want = apply_rotary_emb(packed, packed, theirs(x, positions[None]))[0][0].transpose(0, 1)
    got = RopeTable(spec.rope, 20_000, dtype).apply(x, positions)
    assert got.dtype == dtype
    assert torch.equal(got, torch.cat((want[..., 0::2], want[..., 1::2]), dim=-1)), "laid out as V3's"
    narrow = RopeTable(replace(spec.rope, precision="model"), 20_000, dtype).apply(x, positions)
    assert dtype == torch.float32 or not torch.equal(narrow, got)


@pytest.mark.parametrize("precision", ["model", "float32"])
def test_halves_are_turned_by_the_same_angles(precision: Precision) -> None:
    spec = RopeSpec(type="default", theta=1e4, dim=8, interleaved=True, precision=precision)
    table, x = RopeTable(spec, 512, torch.float32), heads(12, torch.float32)
    got = table.apply_half(x, POSITIONS)
    angles = (POSITIONS[:, None] * inverse_frequencies(spec)[0])[:, None]
    torch.testing.assert_close(got[..., :8], rotate_half(x[..., :8], angles.cos(), angles.sin()))
    assert torch.equal(got[..., 8:], x[..., 8:])
    paired = table.apply(x, POSITIONS)
    assert not torch.equal(paired, got)
    assert torch.equal(paired[..., :8], table.apply_half(torch.cat((x[..., 0:8:2], x[..., 1:8:2]), -1), POSITIONS))


def test_a_long_table_is_made_in_pieces() -> None:
    spec = spec_from_config({**DEEPSEEK_V3, "model_type": "deepseek_v3"}).rope
    count = 2 * PIECE + 5
    positions = torch.tensor([0, PIECE - 1, PIECE, count - 1])
    x = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(2))
    frequencies, scaling = inverse_frequencies(spec)
    angles = (positions[:, None] * frequencies)[:, None]
    want = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    want = rotate_half(want, angles.cos() * scaling, angles.sin() * scaling)
    torch.testing.assert_close(RopeTable(spec, count, torch.float32).apply(x, positions), want)


@pytest.mark.parametrize("partial", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_half_rotated_is_the_reference(partial: float, dtype: torch.dtype) -> None:
    rope = {**DEFAULT_ROPE, "partial_rotary_factor": partial}
    theirs = Glm4MoeRotaryEmbedding(Glm4MoeConfig(**{**GLM4_MOE, "rope_parameters": dict(rope)}))
    spec = spec_from_config({**GLM4_MOE, "rope_parameters": rope, "model_type": "glm4_moe"})
    assert spec.rope.dim == int(32 * partial)
    x = heads(32, dtype)
    cos, sin = theirs(x, POSITIONS[None])
    want = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)[0]
    got = RopeTable(spec.rope, 512, dtype).apply(x, POSITIONS)
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=0, atol=2e-6 if dtype == torch.float32 else 0)


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(8) + 1) / (0.05 * math.log(8) + 1)),
        ({"mscale": None, "mscale_all_dim": None}, 0.1 * math.log(8) + 1),
        ({"mscale_all_dim": 0}, 0.1 * math.log(8) + 1),
        ({"attention_factor": 0.75}, 0.75),
        ({"factor": 1.0, "mscale": None}, 1.0),
        ({"factor": None, "mscale": None, "original_max_position_embeddings": 32}, 0.1 * math.log(512 / 32) + 1),
    ],
)
def test_attention_scaling(change: dict[str, object], scaling: float) -> None:
    spec = spec_from_config({**DEEPSEEK_V3, "model_type": "deepseek_v3", "rope_parameters": {**YARN, **change}})
    assert inverse_frequencies(spec.rope)[1] == pytest.approx(scaling)


def test_yarn_bends_the_slow_frequencies_alone() -> None:
    config = {**DEEPSEEK_V3, "model_type": "deepseek_v3", "qk_rope_head_dim": 32}
    yarn = inverse_frequencies(spec_from_config(config).rope)[0]
    plain = inverse_frequencies(spec_from_config({**config, "rope_parameters": DEFAULT_ROPE}).rope)[0]
    assert yarn[0] == plain[0]
    torch.testing.assert_close(yarn[-1], plain[-1] / 8)


def test_positions_outside_the_table_are_refused() -> None:
    spec = spec_from_config({**GLM4_MOE, "model_type": "glm4_moe"})
    with pytest.raises(IndexError):
        RopeTable(spec.rope, 16, torch.float32).apply(torch.zeros(1, 1, 32), torch.tensor([16]))
