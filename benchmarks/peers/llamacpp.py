"""llama.cpp: what its batched benchmark is asked, and what its line of JSON says. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.speed_cases import Case
from benchmarks.speed_figures import Precision

FILES: dict[Precision, str] = {"bf16": "bf16.gguf", "int8": "q8_0.gguf", "int4": "q4km.gguf"}
TOOL = Path("build/bin/llama-batched-bench")


def arguments(folder: Path, precision: Precision, case: Case, threads: int) -> list[str]:
    """The command for one case. It takes its own tokens and draws none; prompts of all streams are computed first."""
    room = case.streams * case.tokens
    options = {
        "-m": str(folder / FILES[precision]),
        "-c": str(room),
        "-npp": str(case.prompt),
        "-ntg": str(case.new),
        "-npl": str(case.streams),
        "-b": "2048",
        "-ub": "512",
        "-t": str(threads),
        "-tb": str(threads),
        "--output-format": "jsonl",
    }
    return [str(folder / TOOL), *(word for option in options.items() for word in option)]


def result(output: str) -> dict[str, Any] | None:
    """Its one line of JSON among others; None without one."""
    lines = (line.strip() for line in output.splitlines())
    return next((json.loads(line) for line in lines if line.startswith("{")), None)


def times(case: Case, found: dict[str, Any]) -> list[list[float]]:
    """The seconds at which tokens came: its ``t_pp`` for all prompts, then ``t_tg`` for the steps. Only their sums are
    known, so all steps are taken as alike; the first of them draws nothing that the prompts had not told."""
    first, steps = float(found["t_pp"]), float(found["t_tg"])
    stream = [first + steps * number / case.new for number in range(case.new + 1)]
    return [stream for _ in range(case.streams)]
