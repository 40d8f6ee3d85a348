"""The same logits and the same greedy tokens as transformers."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.model.experts import ExpertBank
from actors.model.local_moe import LocalMoE
from actors.model.weights import Checkpoint
from tests.checkpoints import DEFAULT_ROPE, WRITERS, YARN, write_deepseek_v3, write_glm4_moe
from tests.paged_runner import PagedRunner, random_ids

CheckpointOf = Callable[..., tuple[Path, Any]]

WIDE_YARN = {**DEFAULT_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OVERRIDES: dict[str, dict[str, dict[str, Any]]] = {
    "deepseek": {
        "default": {},
        "every_other_layer": {"num_hidden_layers": 4, "moe_layer_freq": 2, "n_shared_experts": 1},
        "normalised": {"norm_topk_prob": True},
    },
    "deepseek_v2": {
        "default": {},
        "greedy_in_groups": {"topk_method": "greedy", "n_group": 3, "routed_scaling_factor": 1.5},
        "bias": {"attention_bias": True, "topk_group": 1},
        "all_moe": {"first_k_dense_replace": 0, "rope_parameters": DEFAULT_ROPE, "tie_word_embeddings": True},
    },
    "deepseek_v2_lite": {"default": {}, "bias": {"attention_bias": True, "n_shared_experts": 1}},
    "deepseek_v3": {
        "default": {},
        "no_q_lora": {"q_lora_rank": None},
        "no_yarn": {"rope_parameters": DEFAULT_ROPE},
        "mscale_differs": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
        "mscale_absent": {"rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}},
        "attention_factor": {"rope_parameters": {**YARN, "attention_factor": 0.8, "truncate": False}},
        "one_group": {"n_group": 1, "topk_group": 1},
        "unnormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
        "bias": {"attention_bias": True},
        "bias_no_q_lora": {"attention_bias": True, "q_lora_rank": None},
        "half_rotated": {"rope_interleave": False},
        "two_shared_all_moe": {"n_shared_experts": 2, "first_k_dense_replace": 0},
        "tied": {"tie_word_embeddings": True},
        "odd_sizes": {
            "hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 24,
            "kv_lora_rank": 20, "moe_intermediate_size": 28, "vocab_size": 201, "n_routed_experts": 12,
            "n_group": 3, "topk_group": 1, "num_experts_per_tok": 3, "num_hidden_layers": 4, "rms_norm_eps": 1e-4,
        },
    },
    "deepseek_v32": {  # with few indexing heads a token's score is often exactly 0, and ties fall by the batch's shape
        "default": {"index_n_heads": 16},
        "all_are_kept": {"index_topk": 512, "mlp_layer_types": ["sparse", "dense", "sparse"]},
        "bias": {"attention_bias": True, "index_n_heads": 24, "index_head_dim": 8, "index_topk": 20},
    },
    "glm4_moe": {
        "default": {},
        "plain": {"use_qk_norm": False, "attention_bias": False},
        "full_rotary": {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 1.0}},
        "yarn": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
        "four_groups": {"n_group": 4, "topk_group": 2},
        "tied": {"tie_word_embeddings": True},
        "multi_query": {"num_key_value_heads": 1},
        "multi_head": {"num_key_value_heads": 4, "head_dim": 16},
        "odd_sizes": {
            "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12,
            "moe_intermediate_size": 20, "vocab_size": 199, "num_hidden_layers": 4, "first_k_dense_replace": 2,
            "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-3,
        },
    },
    "mixtral": {
        "default": {},
        "no_window": {"sliding_window": None, "head_dim": 24},
        "one_expert": {"num_experts_per_tok": 1, "tie_word_embeddings": True},
    },
    "olmoe": {
        "default": {},
        "clipped": {"clip_qkv": 0.7},
        "normalised": {"norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 2},
    },
    "qwen2_moe": {
        "default": {},
        "windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "num_hidden_layers": 4},
        "named_windows": {
            "use_sliding_window": True, "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"],
        },
        "every_other_layer": {
            "decoder_sparse_step": 2, "num_hidden_layers": 3, "qkv_bias": False, "norm_topk_prob": True,
        },
    },
    "qwen3_moe": {
        "default": {},
        "windows": {"use_sliding_window": True, "sliding_window": 6, "mlp_only_layers": []},
        "bias": {"attention_bias": True, "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": []},
        "yarn": {"rope_parameters": WIDE_YARN, "tie_word_embeddings": True},
    },
}  # fmt: skip
"""Per family, every branch that its configuration can reach."""
# Widths of tensors stay multiples of 16 bytes: the grouped_mm of the reference wants that.
CASES = [
    pytest.param(family, overrides, seed, id=f"{family}-{name}")
    for family, cases in OVERRIDES.items()
    for seed, (name, overrides) in enumerate(cases.items())
]


def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def reference_greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """``count`` arg-max tokens, and the logits [count, V] they were taken from."""
    ids, seen, out = torch.tensor([prompt]), None, []
    with torch.no_grad():
        for _ in range(count):
            result = model(input_ids=ids, past_key_values=seen, use_cache=True)
            seen = result.past_key_values
            out.append(result.logits[0, -1])
            ids = out[-1].argmax().view(1, 1)
    return [int(row.argmax()) for row in out], torch.stack(out)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def first_near_tie(logits: torch.Tensor) -> int:
    """First step whose two best candidates lie closer than 1e-5 of the logits' scale."""
    best = logits.topk(2, dim=-1).values
    near = ((best[:, 0] - best[:, 1]) < 1e-5 * logits.abs().max()).nonzero()
    return int(near[0]) if len(near) else len(logits)


@pytest.mark.parametrize(("family", "overrides", "seed"), CASES)
@pytest.mark.parametrize("row_block", [0, 8])
def test_prefill_logits(
    checkpoint_of: CheckpointOf, family: str, overrides: dict[str, Any], seed: int, row_block: int
) -> None:
    path, model = checkpoint_of(family, seed, **overrides)
    runner = PagedRunner(path, row_block=row_block)
    ids = [random_ids(count, seed + count, runner.spec.vocab_size) for count in (90, 1, 17)]
    got = runner.step([(runner.add(sequence), len(sequence)) for sequence in ids])
    for logits, sequence in zip(got, ids, strict=True):
        assert_close(logits, reference_logits(model, sequence))


@pytest.mark.parametrize(("family", "overrides", "seed"), CASES)
def test_greedy_tokens_of_a_ragged_batch(
    checkpoint_of: CheckpointOf, family: str, overrides: dict[str, Any], seed: int
) -> None:
    path, model = checkpoint_of(family, seed, **overrides)
    runner = PagedRunner(path)
    prompts = [random_ids(count, seed + count, runner.spec.vocab_size) for count in (3, 40, 11, 1)]
    got = runner.greedy(prompts, 32, chunk=7)
    for tokens, prompt in zip(got, prompts, strict=True):
        want, logits = reference_greedy(model, prompt, 32)
        tie = first_near_tie(logits)
        assert tokens[:tie] == want[:tie]
        assert tie > 16, "too many near-ties: the case tests nothing, choose another seed"


@pytest.mark.parametrize("row_block", [0, 8])
def test_yarn_reaches_behind_max_position_embeddings(checkpoint_of: CheckpointOf, row_block: int) -> None:
    """As model cards prescribe it: rope_scaling is added, and max_position_embeddings stays as it was."""
    path, model = checkpoint_of("qwen3_moe", 1, rope_parameters=WIDE_YARN, max_position_embeddings=80)
    runner = PagedRunner(path, row_block=row_block)
    assert runner.spec.max_positions == 256
    ids = random_ids(256, seed=4)
    number = runner.add(ids)
    got = torch.cat([runner.step([(number, 255)])[0], runner.step([(number, 1)])[0]])
    assert_close(got, reference_logits(model, ids))
    plain, _ = checkpoint_of("qwen3_moe", 1, max_position_embeddings=80)
    assert PagedRunner(plain).spec.max_positions == 80


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("row_block", [0, 8])
def test_chunked_prefill(written: tuple[Path, Any], chunk: int, row_block: int) -> None:
    path, model = written
    runner = PagedRunner(path, row_block=row_block)
    ids = random_ids(41, seed=3)
    number = runner.add(ids)
    parts = [runner.step([(number, min(chunk, len(ids) - i))])[0] for i in range(0, len(ids), chunk)]
    assert_close(torch.cat(parts), reference_logits(model, ids))


def test_reference_runs_as_pinned(written: tuple[Path, Any]) -> None:
    model = written[1]
    assert model.config._attn_implementation == "eager"
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("family", WRITERS)
def test_bf16_is_as_close_to_fp32_as_the_reference_is(checkpoint_of: CheckpointOf, family: str) -> None:
    ids = random_ids(48, seed=5)
    path, low = checkpoint_of(family, dtype=torch.bfloat16)
    runner = PagedRunner(path, torch.bfloat16)
    assert runner.spec.dtype == torch.bfloat16
    got = runner.step([(runner.add(ids), len(ids))])[0]
    assert got.dtype == torch.bfloat16
    exact = reference_logits(copy.deepcopy(low).float(), ids)
    theirs = (reference_logits(low, ids).float() - exact).pow(2).mean(dim=1).sqrt()
    ours = (got.float() - exact).pow(2).mean(dim=1).sqrt()
    assert ours.median() < 1.5 * theirs.median(), "of all rows: in some, near-tied routing falls another way"


def test_hub_style_config_means_the_same(tmp_path: Path) -> None:
    write_deepseek_v3(tmp_path, seed=1)
    ids = random_ids(30, seed=2)
    runner = PagedRunner(tmp_path)
    want = runner.step([(runner.add(ids), len(ids))])[0]

    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {**rope, "type": rope.pop("rope_type")}
    del config["rope_scaling"]["rope_type"]
    config["torch_dtype"] = config.pop("dtype")
    config |= {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "hidden_act": "silu",
    }
    del config["rope_interleave"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    hub = PagedRunner(tmp_path)
    assert hub.spec == runner.spec
    assert torch.equal(hub.step([(hub.add(ids), len(ids))])[0], want)


def test_hub_style_config_of_glm_means_the_same(tmp_path: Path) -> None:
    write_glm4_moe(tmp_path, rope_parameters={**DEFAULT_ROPE, "rope_theta": 5e5})
    want = PagedRunner(tmp_path).spec
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    config["partial_rotary_factor"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert PagedRunner(tmp_path).spec == want


def test_swapped_experts_change_the_logits(written: tuple[Path, Any]) -> None:
    path, model = written
    runner = PagedRunner(path)
    ids = random_ids(24, seed=9)
    held = dict(runner.bank._held)
    layer = runner.spec.moe_layers[0]
    held[layer, 0], held[layer, 1] = held[layer, 1], held[layer, 0]
    runner.moe = LocalMoE(runner.gate, ExpertBank(held, runner.spec.d_model, torch.float32))
    got = runner.step([(runner.add(ids), len(ids))])[0]
    want = reference_logits(model, ids)
    assert (got - want).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "qwen2_moe"])
def test_experts_in_one_piece(checkpoint_of: CheckpointOf, tmp_path: Path, family: str) -> None:
    """As transformers saves them when it is asked not to go back to the original names."""
    path, model = checkpoint_of(family)
    model.save_pretrained(tmp_path, save_original_format=False)
    ids = random_ids(30, seed=2)
    runner, pieces = PagedRunner(path), PagedRunner(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert all(map(checkpoint.has, pieces.spec.names.fused_experts(pieces.spec.moe_layers[0])))
    want = runner.step([(runner.add(ids), len(ids))])[0]
    assert torch.equal(pieces.step([(pieces.add(ids), len(ids))])[0], want)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_layers_for_several_tokens_are_not_read(checkpoint_of: CheckpointOf, tmp_path: Path, family: str) -> None:
    path, _ = checkpoint_of(family)
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    tensors = load_file(path / "model.safetensors")
    last = [name for name in tensors if name.startswith("model.layers.2.")]
    assert last
    more = {name.replace("layers.2", "layers.3"): torch.full_like(tensors[name], torch.nan) for name in last}
    more["model.layers.3.eh_proj.weight"] = torch.full((64, 128), torch.nan)
    save_file({**tensors, **more}, tmp_path / "model.safetensors")

    ids = random_ids(30, seed=2)
    runner, followed = PagedRunner(path), PagedRunner(tmp_path)
    assert followed.spec.n_mtp == 1
    want = runner.step([(runner.add(ids), len(ids))])[0]
    assert torch.equal(followed.step([(followed.add(ids), len(ids))])[0], want)
