"""What a comparison prints: every case, everybody who is missing, and what is wanted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.speed import as_json, parse
from benchmarks.speed_cases import Figure, parse_case
from benchmarks.speed_figures import ONE_PROCESS, OURS, TRANSFORMERS, VLLM, Contender, Sample, Start
from benchmarks.speed_report import Report, cost_rows, draw_speed, print_report, speed_rows, summarise, wish_rows
from benchmarks.speed_roofline import Machine, Shapes
from benchmarks.speed_runs import Seen

SHAPES = Shapes(body=100, head=50, embed=50, expert=10, layers=2, experts=4, top_k=1, kv_floats=0, score_width=0)
AT = Machine(bandwidth=3400.0, float_ops=1e12, int_ops=1e12)
"""One stream reads 340 bytes a step in bf16: ten tokens a second."""
MINE, ONE, THEIRS = Contender(OURS, "bf16"), Contender(ONE_PROCESS, "bf16"), Contender(TRANSFORMERS, "bf16")
CASES = [parse_case("decode-1"), parse_case("prefill-1x2048")]


@pytest.fixture
def report() -> Report:
    seen = Seen(
        samples=[
            Sample(THEIRS, "decode-1", 0, Figure(4.0, 0.5, 0.25), 0.0),
            Sample(MINE, "decode-1", 0, Figure(8.0, 0.25, 0.125), 0.0),
            Sample(ONE, "decode-1", 0, Figure(8.0, 0.25, 0.125), 0.9),
            Sample(MINE, "prefill-1x2048", 0, Figure(100.0, 20.48, None), 0.0),
        ],
        starts=[Start(MINE, 0, 9.0, 3 * 2**30, 0.0), Start(THEIRS, 0, 8.0, 2**30, 0.0)],
        failures={(THEIRS, "prefill-1x2048"): "it ended with status 1"},
        versions={TRANSFORMERS: {"transformers": "5.23", "torch": "2.13"}},
    )
    return summarise("lite8", SHAPES, CASES, [MINE, ONE, THEIRS], seen, {VLLM: "not installed"}, AT, 0.1)


def test_the_fastest_comes_first_under_the_roof(report: Report) -> None:
    decode, _, _ = speed_rows(report)
    assert decode == [
        ("decode-1", "the machine's roof", "bf16", "10.0", "", "", "100 %", ""),
        ("decode-1", "expertmesh", "bf16", "8.0", "0.25", "125.0", "80%", ""),
        ("decode-1", "transformers", "bf16", "4.0", "0.50", "250.0", "40%", ""),
        (
            *("decode-1", "expertmesh, one process", "bf16", "–", "", "", ""),
            "disturbed: 1 of 1 rounds left out, others used 0.90 cores or more",
        ),
    ]


def test_what_failed_or_is_missing_is_said(report: Report) -> None:
    _, prefill, missing = speed_rows(report)
    assert [row[3:] for row in prefill[1:]] == [
        ("100.0", "20.48", "–", prefill[1][6], ""),
        ("–", "", "", "", "not measured"),
        ("–", "", "", "", "it ended with status 1"),
    ]
    assert missing == [("", "vLLM", "", "–", "", "", "", "not installed")]


def test_starts_and_memory(report: Report) -> None:
    weights = SHAPES.weight_bytes("bf16")
    assert cost_rows(report) == [
        ("expertmesh", "bf16", "9.0", "3.00", f"{3 * 2**30 / weights:.2f}", ""),
        ("expertmesh, one process", "bf16", "–", "–", "–", ""),
        ("transformers", "bf16", "8.0", "1.00", f"{2**30 / weights:.2f}", "transformers 5.23, torch 2.13"),
    ]


def test_what_is_wanted(report: Report) -> None:
    rows = wish_rows(report)
    assert rows[:2] == [
        ("decode-1, bf16", "transformers (without vLLM, llama.cpp)", ">= 1.5", "2.00", "met"),
        ("prefill-1x2048, bf16", "no peer", ">= 2", "–", "not measured"),
    ]
    assert [(row[0], row[-1]) for row in rows[2:]] == [
        ("decode-1, bf16, share of the roof", "not met"),
        ("start, load to ready", "not met"),
        ("memory, bf16", "not met"),
    ]


def test_all_is_printed_drawn_and_kept(report: Report, tmp_path: Path) -> None:
    text = io.StringIO()
    print_report(report, Console(file=text, width=160))
    for part in ("lite8. Read from memory", "decode-1", "not installed", "transformers 5.23", "not met"):
        assert part in text.getvalue()
    draw_speed(tmp_path / "speed.svg", report)
    assert "<svg" in (tmp_path / "speed.svg").read_text()
    kept = json.loads(json.dumps(as_json(report, {"samples": []})))
    assert kept["figures"][0]["case"] == "decode-1"
    assert kept["missing"]["vLLM"] == "not installed"
    assert {"cpu", "cores", "commit", "torch"} <= set(kept["machine"])


def test_quick_is_one_round_of_small_cases() -> None:
    quick, usual = parse(["--quick"]), parse([])
    assert (quick.rounds, usual.rounds) == (1, 3)
    assert max(case.streams for case in quick.cases) < max(case.streams for case in usual.cases)
    assert parse(["--quick", "--rounds", "2", "--cases", "decode-1"]).rounds == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--cases", "decode-x"], "case 'decode-x': allowed is"), (["--rounds", "0"], "'0': allowed is a number from 1")],
)
def test_what_cannot_be_asked_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert said in capsys.readouterr().err
