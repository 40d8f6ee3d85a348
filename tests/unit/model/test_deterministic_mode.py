"""With row_block > 0 a token's logits are the same bits, whatever is computed beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.model.indexer import IndexQueries
from tests.checkpoints import (
    DEFAULT_ROPE,
    write_deepseek,
    write_deepseek_v2,
    write_deepseek_v2_lite,
    write_deepseek_v3,
    write_deepseek_v32,
    write_glm4_moe,
    write_mixtral,
    write_olmoe,
    write_qwen2_moe,
    write_qwen3_moe,
)
from tests.paged_runner import PagedRunner, random_ids

ROW_BLOCK = 8
SIZES = {
    "moe_intermediate_size": 27,
    "intermediate_size": 75,
    "hidden_size": 52,
    "vocab_size": 203,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
LATENT = {"qk_nope_head_dim": 11, "qk_rope_head_dim": 6, "v_head_dim": 13, "kv_lora_rank": 29}
WITHOUT_MOE_SIZE = {key: value for key, value in SIZES.items() if key != "moe_intermediate_size"}
# Prompts are longer than the window and than what the indexer chooses.
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "deepseek": (write_deepseek, {**SIZES, "hidden_size": 60, "num_hidden_layers": 2}),
    "deepseek_v2": (write_deepseek_v2, {**SIZES, **LATENT, "hidden_size": 60}),
    "deepseek_v2_lite": (write_deepseek_v2_lite, {**SIZES, **LATENT, "hidden_size": 60, "num_hidden_layers": 2}),
    "deepseek_v3": (write_deepseek_v3, {**SIZES, **LATENT}),
    "deepseek_v32": (write_deepseek_v32, {**SIZES, **LATENT, "index_n_heads": 7, "index_head_dim": 15}),
    "glm4_moe": (
        write_glm4_moe,
        {**SIZES, "head_dim": 10, "rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.6}},
    ),
    "mixtral": (write_mixtral, {**WITHOUT_MOE_SIZE, "head_dim": 10, "sliding_window": 7}),
    "olmoe": (write_olmoe, {**WITHOUT_MOE_SIZE, "hidden_size": 60, "clip_qkv": 1.5}),
    "qwen2_moe": (
        write_qwen2_moe,
        {**SIZES, "head_dim": 10, "shared_expert_intermediate_size": 45, "sliding_window": 7, "max_window_layers": 1}
        | {"use_sliding_window": True},
    ),
    "qwen3_moe": (write_qwen3_moe, {**SIZES, "head_dim": 10, "num_hidden_layers": 2, "mlp_only_layers": []}),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that are no multiples of a vector, so that every row ends in the middle of one."""
    path: Path = tmp_path_factory.mktemp("odd")
    write, overrides = MODELS[request.param]
    write(path, seed=6, **overrides)
    return path


def alone(folder: Path, ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    runner = PagedRunner(folder, dtype, ROW_BLOCK)
    return runner.step([(runner.add(ids), len(ids))])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mates_do_not_change_a_bit(folder: Path, dtype: torch.dtype) -> None:
    ids = random_ids(13, seed=0, vocab=203)
    want = alone(folder, ids, dtype)
    rng = random.Random(1)
    for mates in (1, 3, 31):
        runner = PagedRunner(folder, dtype, ROW_BLOCK, n_blocks=256)
        numbers = [runner.add(random_ids(rng.randint(1, 9), seed=50 + i, vocab=203)) for i in range(mates)]
        work = [(number, len(runner.tokens[number])) for number in numbers]
        place = rng.randint(0, mates)
        work.insert(place, (runner.add(ids), len(ids)))
        assert torch.equal(runner.step(work)[place], want)


def test_chunks_do_not_change_a_bit(folder: Path) -> None:
    ids = random_ids(29, seed=2, vocab=203)
    want = alone(folder, ids)
    for chunk in (1, 4, 10):
        runner = PagedRunner(folder, row_block=ROW_BLOCK)
        number = runner.add(ids)
        got = [runner.step([(number, min(chunk, len(ids) - i))])[0] for i in range(0, len(ids), chunk)]
        assert torch.equal(torch.cat(got), want)


def test_replay_of_decoded_tokens_does_not_change_a_bit(folder: Path) -> None:
    prompts = [random_ids(count, seed=count, vocab=203) for count in (5, 12, 1, 8)]
    runner = PagedRunner(folder, row_block=ROW_BLOCK)
    produced = runner.greedy(prompts, 12, chunk=6)
    for prompt, tokens in zip(prompts, produced, strict=True):
        logits = alone(folder, prompt + tokens[:-1])
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == tokens
        single = PagedRunner(folder, row_block=ROW_BLOCK)
        assert single.greedy([prompt], 12) == [tokens]


def test_thread_count_does_not_change_a_bit(folder: Path) -> None:
    ids = random_ids(13, seed=0, vocab=203)
    want = alone(folder, ids)
    torch.set_num_threads(2)
    try:
        got = alone(folder, ids)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(got, want)


def test_operands_of_single_rows_are_aligned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied where they would not be: what a product of one row makes of an odd address is the machine's."""
    seen: list[Tensor] = []
    runner = PagedRunner(folder, row_block=ROW_BLOCK)
    attention = runner.model.attention
    attention.form = "rows"
    attend, choose = attention._attend_rows, IndexQueries.choose

    def attended(layer: int, query: Tensor, past: tuple[Tensor, ...], mask: None) -> Tensor:
        seen.extend((query, *past))
        return attend(layer, query, past, mask)

    def chosen(queries: IndexQueries, keys: Tensor, mask: None) -> Tensor:
        seen.extend((queries.query, queries.weights, keys))
        return choose(queries, keys, mask)

    monkeypatch.setattr(attention, "_attend_rows", attended)
    monkeypatch.setattr(IndexQueries, "choose", chosen)
    runner.greedy([random_ids(13, seed=0, vocab=203), random_ids(3, seed=1, vocab=203)], 12)
    assert seen
    assert all(operand.data_ptr() % 64 == 0 for operand in seen)


def test_the_plain_mode_does_depend_on_mates(glm: tuple[Path, Any]) -> None:
    """Or the tests above would prove nothing on this machine."""
    runner = PagedRunner(glm[0])
    ids = random_ids(9, seed=0)
    numbers = [runner.add(ids), runner.add(ids), runner.add(random_ids(31, seed=1))]
    single = runner.step([(numbers[0], 9)])[0]
    batched = runner.step([(numbers[1], 9), (numbers[2], 31)])[0]
    if torch.equal(single, batched):
        pytest.skip("this machine's plain products happen to be independent of the batch")
    assert (single - batched).abs().max() < 1e-5 * single.abs().max()
