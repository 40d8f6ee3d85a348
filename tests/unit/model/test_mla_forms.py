"""Absorbed and expanded attention are the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.model import mla
from tests.checkpoints import DEFAULT_ROPE, write_deepseek_v3
from tests.paged_runner import PagedRunner, random_ids


@pytest.mark.parametrize("overrides", [{}, {"rope_parameters": DEFAULT_ROPE}, {"q_lora_rank": None, "v_head_dim": 20}])
def test_absorbed_equals_expanded_at_every_position(tmp_path: Path, overrides: dict[str, Any]) -> None:
    write_deepseek_v3(tmp_path, seed=4, **overrides)
    ids = random_ids(37, seed=8)
    logits = {}
    for form in ("rows", "block"):
        runner = PagedRunner(tmp_path)
        runner.model.attention.form = form
        logits[form] = runner.step([(runner.add(ids), len(ids))])[0]
    assert not torch.equal(logits["rows"], logits["block"]), "both forms took one path"
    assert (logits["rows"] - logits["block"]).abs().max() < 1e-5 * logits["rows"].abs().max()


def test_decode_is_absorbed_and_equals_an_expanded_decode(
    deepseek: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expanded = []
    attend = mla.LatentAttention._attend_block

    def counted(*args: Any) -> Any:
        expanded.append(args)
        return attend(*args)

    monkeypatch.setattr(mla.LatentAttention, "_attend_block", counted)
    ids = random_ids(20, seed=8)
    logits = {}
    for form in ("auto", "rows", "block"):
        runner = PagedRunner(deepseek[0])
        number = runner.add(ids)
        runner.step([(number, 19)])
        runner.model.attention.form = form
        expanded.clear()
        logits[form] = runner.step([(number, 1)])[0]
        assert bool(expanded) == (form == "block")
    for form in ("rows", "block"):
        assert (logits["auto"] - logits[form]).abs().max() < 1e-5 * logits["auto"].abs().max()


def test_long_pieces_are_expanded_beside_short_ones(
    deepseek: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of both, in one step and in turns, end up where they belong."""
    prompts = [random_ids(count, seed=count) for count in (9, 3, 12, 4)]
    runner = PagedRunner(deepseek[0])
    work = [(runner.add(prompt), len(prompt)) for prompt in prompts]
    want = runner.step(work)
    monkeypatch.setattr(mla.LatentAttention, "longest_paged", 4)
    runner = PagedRunner(deepseek[0])
    got = runner.step([(runner.add(prompt), len(prompt)) for prompt in prompts])
    for ours, whole in zip(got, want, strict=True):
        assert not torch.equal(ours, whole) or len(ours) <= 4
        assert (ours - whole).abs().max() < 1e-5 * whole.abs().max()


def test_cache_holds_the_latent_alone(deepseek: tuple[Path, Any]) -> None:
    spec = PagedRunner(deepseek[0]).spec
    assert spec.kv_floats_per_token == 3 * (32 + 8)


@pytest.mark.parametrize("at_once", [1, 40 * 37 * 3])
def test_heads_expanded_one_after_another_are_the_same(
    deepseek: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """One head at a time, and three and then one of four."""
    ids = random_ids(37, seed=8)
    runner = PagedRunner(deepseek[0])
    want = runner.step([(runner.add(ids), len(ids))])[0]
    monkeypatch.setattr(mla, "MAX_EXPANDED", at_once)
    got = runner.step([(runner.add(ids), len(ids))])[0]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_values_wider_than_keys(tmp_path: Path) -> None:
    write_deepseek_v3(tmp_path, seed=4, v_head_dim=40)
    ids = random_ids(30, seed=8)
    logits = {}
    for form in ("rows", "block"):
        runner = PagedRunner(tmp_path)
        runner.model.attention.form = form
        number = runner.add(ids)
        logits[form] = torch.cat([runner.step([(number, 15)])[0] for _ in range(2)])
    assert (logits["rows"] - logits["block"]).abs().max() < 1e-5 * logits["rows"].abs().max()
