"""DeepSeek-V3.2's sparse attention: the indexer chooses what transformers' chooses, and only that is attended to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer, DeepseekV32RotaryEmbedding

from actors.model import indexer, mla
from actors.model.block_attention import Sight
from actors.model.decoder import AttentionModel
from actors.model.errors import CheckpointError
from actors.model.indexer import Indexer, IndexQueries
from actors.model.kv_cache import KVCache
from actors.model.reader import TensorReader
from actors.model.rope import RopeTable
from actors.model.weights import Checkpoint
from tests.checkpoints import DEFAULT_ROPE, write_deepseek_v3, write_deepseek_v32
from tests.paged_runner import PagedRunner, random_ids
from tests.stepwise import assert_every_way, reference_logits, stepwise_logits

TOP_K = 6
LENGTHS = (5, 6, 7, 40, 1, 22, 12, 19)
"""Below, at and above what is chosen. The last two decode their tokens 5 and 7 together: one sees all, one chooses."""

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no_yarn": {"rope_parameters": DEFAULT_ROPE, "index_head_dim": 8},
    "nothing_left_out": {"index_topk": 2048},
    "one_token": {"index_topk": 1, "attention_bias": True},
}


def write(path: Path, **overrides: Any) -> Any:
    """With 12 heads: 4 heads often have no positive product, and then scores are exactly 0 and tie."""
    return write_deepseek_v32(path, **{"seed": 1, "index_n_heads": 12, **overrides})


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("sparse")
    return path, write(path)


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
@pytest.mark.parametrize("row_block", [0, 8])
def test_sparse_attention(tmp_path: Path, overrides: dict[str, Any], row_block: int) -> None:
    model = write(tmp_path, **overrides)
    prompts = [random_ids(count, seed=count) for count in LENGTHS]
    assert_every_way(tmp_path, model, prompts, row_block)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 30])
def test_ties_fall_as_in_transformers_if_the_prompt_is_cut_alike(tmp_path: Path, chunk: int) -> None:
    """Of 2 heads neither has a positive product for a quarter of all tokens: these all score 0."""
    model = write(tmp_path, index_n_heads=2)
    ids = random_ids(60, seed=3)
    want = reference_logits(model, ids, chunk)
    got = stepwise_logits(PagedRunner(tmp_path), [ids], chunk)[0]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    whole = reference_logits(model, ids)
    assert chunk > 60 or (whole - want).abs().max() > 1e-2 * want.abs().max(), "no ties: the case tests nothing"


def test_forms_agree(sparse: tuple[Path, Any]) -> None:
    ids = random_ids(37, seed=8)
    logits = {}
    for form in ("rows", "block"):
        runner = PagedRunner(sparse[0])
        runner.model.attention.form = form
        logits[form] = stepwise_logits(runner, [ids], 10)[0]
    assert not torch.equal(logits["rows"], logits["block"])
    assert (logits["rows"] - logits["block"]).abs().max() < 1e-5 * logits["rows"].abs().max()


def test_what_is_left_out_matters(sparse: tuple[Path, Any], tmp_path: Path) -> None:
    """Or the tests above would prove nothing: the dense model says something else from token 7 on."""
    ids = random_ids(20, seed=2)
    dense = reference_logits(write(tmp_path, index_topk=64), ids)
    got = stepwise_logits(PagedRunner(sparse[0]), [ids])[0]
    off = (got - dense).abs().amax(1) > 1e-2 * dense.abs().max()
    assert off.tolist() == [False] * TOP_K + [True] * (20 - TOP_K)


def test_masks_are_built_once_for_all_groups_of_heads(
    sparse: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    mask = Sight._mask

    def counted(sight: Sight, *args: Any) -> Tensor | None:
        built.append(args)
        return mask(sight, *args)

    monkeypatch.setattr(Sight, "_mask", counted)
    ids, logits = random_ids(37, seed=8), []
    for at_once, most, count in ((1 << 25, 1 << 27, 3), (40, 1 << 27, 3), (40, 1, 12)):  # 3 layers; 1, 4, 4 groups
        monkeypatch.setattr(mla, "MAX_EXPANDED", at_once)
        monkeypatch.setattr(mla, "MAX_KEPT", most)
        built.clear()
        logits.append(stepwise_logits(PagedRunner(sparse[0]), [ids])[0])
        assert len(built) == count
    assert torch.equal(logits[1], logits[2])
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()


class CountingCache(KVCache):
    """Remembers which planes were read for how many slots."""

    reads: list[tuple[tuple[int, ...], tuple[int, ...]]]

    def read(self, layer: int, slots: Tensor, planes: Any = None) -> tuple[Tensor, ...]:
        self.reads.append((tuple(planes), tuple(slots.shape)))
        return super().read(layer, slots, planes)


@pytest.mark.parametrize("row_block", [0, 8])
def test_planes_are_read_where_they_are_needed(sparse: tuple[Path, Any], row_block: int) -> None:
    runner = PagedRunner(sparse[0], row_block=row_block)
    runner.cache = CountingCache(runner.spec, 96, 4, torch.float32)
    runner.cache.reads = reads = []
    short, long = runner.add(random_ids(6, seed=0)), runner.add(random_ids(30, seed=1))
    runner.step([(short, TOP_K)])
    assert {planes for planes, _ in reads} == {(0, 1)}, "all fits, so there is nothing to choose"
    runner.step([(long, 29)])
    reads.clear()
    runner.step([(long, 1)])
    per_layer = [((2,), (1, 30)), ((0, 1), (1, TOP_K))]
    assert row_block or reads == per_layer * 3, "a decode reads the chosen tokens alone"


def attention_input(spec: Any, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(count, spec.d_model, generator=generator)
    return rows.to(dtype), torch.randn(count, spec.attn.q_lora_rank, generator=generator).to(dtype)


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_choice_is_that_of_the_reference(sparse: tuple[Path, Any], dtype: torch.dtype) -> None:
    path, model = sparse
    spec = PagedRunner(path).spec
    with Checkpoint(path) as checkpoint:
        read = TensorReader(checkpoint, dtype)
        rope = RopeTable(spec.rope, 512, dtype)
        ours = Indexer.load(spec, spec.attn.indexer, read, 1, rope, row_block=0)
    theirs = DeepseekV32Indexer(model.config, 1)
    theirs.load_state_dict(model.model.layers[1].self_attn.indexer.state_dict())
    theirs.to(dtype)
    if dtype == torch.float16:
        theirs.weights_proj.float()  # as from_pretrained keeps it: fp32 in fp16 models alone
    x, latent = attention_input(spec, 50, dtype)
    positions = torch.arange(50)
    rotary = DeepseekV32RotaryEmbedding(model.config)(x, positions[None])
    causal = torch.ones(1, 50, 50, dtype=torch.bool).tril()
    with torch.no_grad():
        want = theirs(x[None], latent[None], rotary, causal, positions[None])[0]
    queries, keys = ours.project(x, latent, positions)
    assert keys.dtype == dtype
    heads = theirs.weights_proj(x.to(theirs.weights_proj.weight.dtype)).float() * 12**-0.5
    assert torch.equal(queries.weights, heads)
    got = queries.choose_causal(keys, 0)
    for i in range(TOP_K, 50):
        assert set(got[i].tolist()) == set(want[i].tolist())
        one = queries.one(i).choose(keys[None, : i + 1], None)[0]
        assert one.tolist() == sorted(want[i].tolist())
    assert all(set(range(i + 1)) <= set(got[i].tolist()) for i in range(TOP_K))


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 24])
@pytest.mark.parametrize("context", [0, 3, 5, 6, 40])
def test_a_chunk_is_chosen_for_in_parts(monkeypatch: pytest.MonkeyPatch, at_once: int, context: int) -> None:
    monkeypatch.setattr(indexer, "MAX_SCORES", at_once)
    generator = torch.Generator().manual_seed(context)
    queries = IndexQueries(
        torch.randn(17, 8, 12, generator=generator), torch.randn(17, 8, generator=generator), top_k=TOP_K
    )
    keys = torch.randn(context + 17, 12, generator=generator)
    got = queries.choose_causal(keys, context)
    for i, chosen in enumerate(got.tolist()):
        assert len(set(chosen)) == TOP_K
        seen = keys[: context + i + 1]
        scores = (torch.relu(seen @ queries.query[i].T * 12**-0.5) * queries.weights[i]).sum(-1)
        best = scores.topk(min(TOP_K, len(seen))).indices.tolist()
        assert set(best) <= set(chosen) if len(seen) < TOP_K else set(best) == set(chosen)


def test_padding_of_a_group_is_chosen_last() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = IndexQueries(torch.randn(2, 8, 12, generator=generator), torch.randn(2, 8, generator=generator), TOP_K)
    keys = torch.randn(2, 9, 12, generator=generator)
    mask = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    chosen = queries.choose(keys, mask)
    assert mask[1].gather(0, chosen[1]).sum() == 4
    assert set(chosen[1].tolist()) >= {0, 1, 2, 3}
    assert chosen[0].tolist() == queries.one(0).choose(keys[:1], None)[0].tolist()


def test_bf16_runs_in_every_way(tmp_path: Path) -> None:
    write(tmp_path, dtype=torch.bfloat16)
    prompts = [random_ids(count, seed=count) for count in LENGTHS]
    whole = stepwise_logits(PagedRunner(tmp_path, torch.bfloat16, row_block=8), prompts)
    steps = stepwise_logits(PagedRunner(tmp_path, torch.bfloat16, row_block=8), prompts, 5)
    assert all(torch.equal(one, other) for one, other in zip(whole, steps, strict=True))
    assert whole[0].dtype == torch.bfloat16


def test_a_checkpoint_without_indexer_is_refused(sparse: tuple[Path, Any], tmp_path: Path) -> None:
    write_deepseek_v3(tmp_path)
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"self_attn\.indexer"):
        AttentionModel.load(PagedRunner(sparse[0]).spec, checkpoint, torch.float32)
