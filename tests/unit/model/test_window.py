"""Sliding windows: a query sees the last W tokens, itself among them, and no more of the cache is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.model import block_attention as module
from actors.model.block_attention import Sight, Tile, block_attention
from tests.checkpoints import write_mixtral, write_qwen2_moe, write_qwen3_moe
from tests.paged_runner import PagedRunner, random_ids
from tests.stepwise import assert_every_way, stepwise_logits

CPU = torch.device("cpu")

LENGTHS = (7, 8, 9, 40, 1, 25)
"""Below, at and above the windows."""

CASES: dict[str, tuple[Any, dict[str, Any], tuple[int | None, ...]]] = {
    "mixtral": (write_mixtral, {}, (8, 8)),
    "window_of_one": (write_mixtral, {"sliding_window": 1}, (1, 1)),
    "some_layers": (
        write_qwen2_moe,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        (5, None),
    ),
    "qk_norm": (write_qwen3_moe, {"use_sliding_window": True, "sliding_window": 9}, (9, 9, 9)),
}


@pytest.mark.parametrize(("write", "overrides", "windows"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("row_block", [0, 8])
def test_windows(
    tmp_path: Path, write: Any, overrides: dict[str, Any], windows: tuple[int | None, ...], row_block: int
) -> None:
    model = write(tmp_path, seed=1, **overrides)
    assert PagedRunner(tmp_path).spec.attn.windows == windows
    prompts = [random_ids(count, seed=count) for count in LENGTHS]
    assert_every_way(tmp_path, model, prompts, row_block)


@pytest.mark.parametrize("row_block", [0, 8])
@pytest.mark.parametrize("chunk", [1, 6])
def test_what_lies_before_the_window_is_not_read(tmp_path: Path, row_block: int, chunk: int) -> None:
    write_mixtral(tmp_path)
    runner = PagedRunner(tmp_path, row_block=row_block)
    ids = random_ids(30, seed=1)
    want = stepwise_logits(PagedRunner(tmp_path, row_block=row_block), [ids], chunk, [20])[0]
    number = runner.add(ids)
    parts = [runner.step([(number, 20)])[0]]
    for done in range(20, 30, chunk):
        count = min(chunk, 30 - done)
        unseen = torch.arange(max(0, done + 1 - 8))
        table = torch.tensor(runner._tables[number])
        poison = torch.full((len(unseen), 2, 16), float("nan"))
        for layer in range(2):
            runner.cache.write(layer, table[unseen // 4] * 4 + unseen % 4, poison, poison)
        parts.append(runner.step([(number, count)])[0])
    assert torch.equal(torch.cat(parts), want)


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sight: Sight, scale: float) -> torch.Tensor:
    """The definition, query by query."""
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    out = []
    for i, row in enumerate(query):
        last = sight.context + i
        seen = set(range(last + 1))
        if sight.window is not None:
            seen &= set(range(last - sight.window + 1, last + 1))
        if sight.chosen is not None:
            seen &= set(sight.chosen[i].tolist())
        which = sorted(seen)
        shares = torch.einsum("hd,thd->ht", row, key[which]).mul(scale).softmax(-1)
        out.append(torch.einsum("ht,thd->hd", shares, value[which]))
    return torch.stack(out)


@pytest.mark.parametrize("max_mask", [1, 130, 1 << 22])
@pytest.mark.parametrize(("context", "n"), [(0, 1), (0, 23), (11, 1), (11, 23), (70, 90)])
@pytest.mark.parametrize("narrowed", ["all", "window", "wide_window", "chosen"])
def test_block_form_in_tiles(
    monkeypatch: pytest.MonkeyPatch, max_mask: int, context: int, n: int, narrowed: str
) -> None:
    monkeypatch.setattr(module, "MAX_MASK", max_mask)
    generator = torch.Generator().manual_seed(context + n)
    total = context + n
    query = torch.randn(n, 4, 6, generator=generator)
    key, value = torch.randn(total, 2, 6, generator=generator), torch.randn(total, 2, 5, generator=generator)
    chosen = torch.stack([torch.randperm(total, generator=generator)[: (total + 1) // 2] for _ in range(n)])
    chosen[:, 0] = 0  # so that everyone sees something
    sight = {
        "all": Sight(context, n),
        "window": Sight(context, n, window=7),
        "wide_window": Sight(context, n, window=total + 1),
        "chosen": Sight(context, n, chosen=chosen),
    }[narrowed]
    got = block_attention(query, key, value, sight.tiles(4, CPU), 0.3)
    torch.testing.assert_close(got, naive(query, key, value, sight, 0.3), rtol=1e-5, atol=1e-6)


def test_tiles_leave_out_what_none_of_their_queries_sees() -> None:
    tiles = list(Sight(10_000, 5_000, window=100).tiles(4, CPU))
    assert [row for tile in tiles for row in range(tile.rows.start, tile.rows.stop)] == list(range(5_000))
    for tile in tiles:
        assert tile.keys.stop == 10_000 + tile.rows.stop
        assert tile.keys.start == 10_000 + tile.rows.start - 99
        assert tile.keys.stop - tile.keys.start < 200


def elements(tile: Tile) -> int:
    return (tile.rows.stop - tile.rows.start) * (tile.keys.stop - tile.keys.start)


def test_tiles_are_bounded() -> None:
    """On the CPU by the mask alone; elsewhere by what a kernel that holds the scores of all heads would hold."""
    masks = [elements(tile) for tile in Sight(30_000, 1_000).tiles(64, CPU)]
    assert module.MAX_MASK / 2 < max(masks) <= module.MAX_MASK
    scores = [64 * elements(tile) for tile in Sight(30_000, 1_000).tiles(64, torch.device("meta"))]
    assert module.MAX_SCORES / 2 < max(scores) <= module.MAX_SCORES


@pytest.mark.parametrize(("context", "n"), [(0, 40), (24, 16), (39, 1)])
def test_a_window_that_cuts_nothing_off_is_none(context: int, n: int) -> None:
    assert Sight(context, n, window=40).window is None
    assert Sight(context, n, window=39).window == 39
    (tile,) = Sight(context, n, window=40).tiles(1, CPU)
    assert tile.causal == (context == 0)
