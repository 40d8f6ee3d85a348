"""A context of 32,768 tokens, eight times what YaRN extends: transformers' logits, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import torch

from actors.model.block_attention import Sight, block_attention
from actors.model.indexer import IndexQueries
from tests.checkpoints import YARN, write_deepseek_v3, write_mixtral
from tests.paged_runner import PagedRunner, random_ids

TOKENS = 32_768
CHUNK = 2_048
DECODED = 6
MIB = 1 << 20
NARROW = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 40_960,
}
V3 = {
    **NARROW,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {**YARN, "factor": 8.0, "original_max_position_embeddings": 4096},
}


def run(path: Path, ids: list[int]) -> torch.Tensor:
    """Chunked prefill, then decode steps; logits [len, V]."""
    runner = PagedRunner(path, n_blocks=len(ids) // 16 + 1, block_size=16)
    number, parts, done = runner.add(ids), [], 0
    while done < len(ids):
        left = len(ids) - DECODED - done
        parts.append(runner.step([(number, min(CHUNK, left) if left > 0 else 1)])[0])
        done += len(parts[-1])
    return torch.cat(parts)


def reset_peak() -> None:
    """Let the kernel count this process's largest resident size anew."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes that /proc says: VmRSS now, VmHWM at most since the last reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def test_yarn_at_every_position_up_to_32k(tmp_path: Path) -> None:
    model = write_deepseek_v3(tmp_path, seed=1, **V3)
    model.set_attn_implementation("sdpa")
    ids = random_ids(TOKENS, seed=3, vocab=64)
    with torch.no_grad():
        want = model(input_ids=torch.tensor([ids])).logits[0]
    reset_peak()
    before = resident("VmRSS")
    got = run(tmp_path, ids)
    used = resident("VmHWM") - before
    error = (got - want).abs().amax(dim=1) / want.abs().max()
    assert error.max() < 1e-5, f"position {int(error.argmax())} is off by {float(error.max())}"
    assert used < 256 * MIB, "one mask of all queries and tokens in fp32 would take 256 MiB a chunk"


def test_a_window_over_a_long_context(tmp_path: Path) -> None:
    """Each chunk reads the window and itself."""
    model = write_mixtral(tmp_path, seed=2, **{**NARROW, "sliding_window": 512, "num_local_experts": 4})
    model.set_attn_implementation("sdpa")
    ids = random_ids(6_000, seed=4, vocab=64)
    with torch.no_grad():
        want = model(input_ids=torch.tensor([ids])).logits[0]
    got = run(tmp_path, ids)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_values_narrower_than_keys_take_bounded_memory() -> None:
    """As in every DeepSeek: torch's fused kernel for the CPU wants one width; otherwise all scores are held."""
    generator = torch.Generator().manual_seed(6)
    rows, tokens = 512, 8_192
    query, key, value = (torch.randn(n, 16, d, generator=generator) for n, d in ((rows, 12), (tokens, 12), (tokens, 8)))
    reset_peak()
    before = resident("VmRSS")
    block_attention(query, key, value, Sight(tokens - rows, rows).tiles(16, query.device), 0.3)
    assert resident("VmHWM") - before < 96 * MIB, "all scores would take 256 MiB"


def test_an_indexer_over_a_long_context_takes_bounded_memory() -> None:
    generator = torch.Generator().manual_seed(5)
    rows, heads = 64, 16
    queries = IndexQueries(
        torch.randn(rows, heads, 16, generator=generator), torch.randn(rows, heads, generator=generator), top_k=256
    )
    keys = torch.randn(TOKENS, 16, generator=generator)
    reset_peak()
    before = resident("VmRSS")
    chosen = queries.choose_causal(keys, TOKENS - rows)
    used = resident("VmHWM") - before
    assert used < 112 * MIB, "all scores of all heads would take 128 MiB"
    last = queries.one(rows - 1).choose(keys[None], None)[0]
    assert sorted(chosen[-1].tolist()) == last.tolist()
