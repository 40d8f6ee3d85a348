"""The load that the engine's benchmark sends, and what it makes of what came back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.arrivals import FIRST_ID, Arrival, Mix, percentile, poisson
from benchmarks.engine import Slo, figures, print_sweep
from benchmarks.open_loop import Run, Served
from benchmarks.plots import draw_sweep

PROMPT = tuple(range(10))


def served(*token_at: float, at: float = 0.0, batch: bool = False, error: str = "", cached: int = 0) -> Served:
    return Served(Arrival(at, PROMPT, 8, batch), list(token_at), cached, error)


def test_a_seed_gives_the_same_load_and_another_one_another() -> None:
    loads = [poisson(2.0, 50.0, Mix(), 1000, 512, seed) for seed in (1, 1, 2)]
    assert loads[0] == loads[1] != loads[2]


def test_a_shifted_load_has_the_same_shape_and_other_tokens() -> None:
    one, other = (poisson(5.0, 20.0, Mix(), 1000, 512, 1, shift) for shift in (0, 7))
    assert [(a.at_s, len(a.prompt_ids), a.max_tokens) for a in one] == [
        (a.at_s, len(a.prompt_ids), a.max_tokens) for a in other
    ]
    assert all(a.prompt_ids[0] != b.prompt_ids[0] for a, b in zip(one, other, strict=True))


def test_the_load_is_what_was_asked_for() -> None:
    mix = Mix(prompt_tokens=60, answer_tokens=20, shared=0.5, prefixes=2, prefix_tokens=16, batch=0.25)
    load = poisson(20.0, 200.0, mix, 1000, 512, seed=3)
    assert len(load) == pytest.approx(4000, rel=0.06)
    assert all(0 < a.at_s < 200 for a in load)
    assert sorted(load, key=lambda a: a.at_s) == load
    assert all(FIRST_ID <= token < 1000 for a in load for token in a.prompt_ids)
    assert all(1 <= len(a.prompt_ids) <= 256 and len(a.prompt_ids) + a.max_tokens <= 512 for a in load)
    assert sum(a.batch for a in load) / len(load) == pytest.approx(0.25, abs=0.03)
    heads = [a.prompt_ids[:16] for a in load if len(a.prompt_ids) > 16]
    repeated = [head for head in heads if heads.count(head) > 1]
    assert len(set(repeated)) == 2
    assert len(repeated) / len(load) == pytest.approx(0.5, abs=0.05)
    answers = [a.max_tokens for a in load]
    assert sum(answers) / len(answers) == pytest.approx(20, rel=0.1)


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile([3, 1, 2, 4], share) for share in (0.25, 0.5, 0.99, 1)] == [1, 2, 4, 4]
    assert math.isnan(percentile([], 0.5))


def test_figures() -> None:
    quick = served(1.5, 1.6, 1.7, at=1.0, cached=5)
    late = served(4.0, 4.1, at=0.0)
    stuck = served(0.5, 1.5, 2.5)
    patient = served(9.0, 9.5, batch=True)  # late, but nobody said when it has to come
    prompt_batch = served(0.1, 0.2, batch=True)
    full, broken = served(error="RESOURCE_EXHAUSTED"), served(0.5, error="UNAVAILABLE")
    run = Run([quick, late, stuck, patient, prompt_batch, full, broken], 10.0, [(0.0, 0.2), (1.0, 0.6)])
    row = figures(0.7, run, Slo(ttft_s=1.0, tpot_s=0.5))
    assert (row.requests, row.refused, row.failed) == (7, 1, 1)
    assert row.offered == pytest.approx(0.5)
    assert row.tokens_per_s == pytest.approx(1.2)
    assert (row.ttft_p50, row.ttft_p99) == (0.5, 4.0)
    assert row.itl_p50 == pytest.approx(0.1)
    assert row.itl_p99 == pytest.approx(1.0)
    assert row.goodput == pytest.approx(0.1)  # the quick one
    assert (row.kv_use_mean, row.kv_use_max) == (pytest.approx(0.4), 0.6)
    assert row.hits == pytest.approx(5 / 50)


def test_it_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run([served(0.5, 1.0)], 2.0, [(0.0, 0.1), (1.0, 0.3)])
    rows = [figures(rate, run, Slo(1.0, 1.0)) for rate in (0.5, 1.0)]
    print_sweep(rows, Slo(1.0, 1.0))
    printed = capsys.readouterr().out
    assert "cache hits" in printed
    assert "0.50 of 1.00 req/s" in printed
    draw_sweep(tmp_path / "a.svg", rows, run)
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
