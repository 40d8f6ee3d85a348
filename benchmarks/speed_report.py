"""What a comparison prints and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.speed_cases import Case
from benchmarks.speed_figures import (
    Contender,
    Key,
    Precision,
    Results,
    Wish,
    apart_wishes,
    memory_wishes,
    most_memory,
    roof_wishes,
    settle,
    speed_wishes,
    start_seconds,
    start_wishes,
)
from benchmarks.speed_roofline import Machine, Shapes, popularity, roof
from benchmarks.speed_runs import Seen

_GIB = 2**30
_DASH = "–"


@dataclass(frozen=True)
class Report:
    """Everything that was found. ``roofs``: tokens a second that the machine allows, by precision and case;
    ``notes``: why a figure is missing; ``missing``: why an engine is;
    ``limits_other_cpu``: cores that others used while ``machine`` was measured, in the quietest round."""

    model: str
    cases: Sequence[Case]
    contenders: Sequence[Contender]
    figures: Results
    machine: Machine
    weight_bytes: Mapping[Precision, float]
    roofs: Mapping[tuple[Precision, str], float] = field(default_factory=dict)
    notes: Mapping[Key, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    start_s: Mapping[Contender, float] = field(default_factory=dict)
    pss: Mapping[Contender, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    wishes: Sequence[Wish] = ()
    limits_other_cpu: float = 0.0

    def shares(self) -> dict[Key, float]:
        """The part of its roof that each figure reaches."""
        return {
            key: figure.rate / self.roofs[key[0].precision, key[1]]
            for key, figure in self.figures.items()
            if (key[0].precision, key[1]) in self.roofs
        }


def summarise(
    model: str,
    shapes: Shapes,
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    seen: Seen,
    missing: Mapping[str, str],
    at: Machine,
    limit: float,
) -> Report:
    """Medians of what others disturbed with ``limit`` cores at most, roofs, and what is wanted of them."""
    figures, disturbed = settle(seen.samples, limit)
    precisions = tuple(dict.fromkeys(one.precision for one in contenders))
    shares = popularity(shapes, seen.expert_rows)
    report = Report(
        model=model,
        cases=cases,
        contenders=contenders,
        figures=figures,
        machine=at,
        weight_bytes={precision: shapes.weight_bytes(precision) for precision in precisions},
        roofs={(p, case.name): roof(shapes, p, case, shares, at) for p in precisions for case in cases},
        notes=seen.failures | disturbed,
        missing=missing,
        start_s=start_seconds(seen.starts, limit),
        pss=most_memory(seen.starts),
        versions={engine: ", ".join(f"{k} {v}" for k, v in found.items()) for engine, found in seen.versions.items()},
    )
    return replace(report, wishes=wanted(report, precisions))


def wanted(report: Report, precisions: Sequence[Precision]) -> list[Wish]:
    """Everything that is wanted and was asked for."""
    names = [case.name for case in report.cases]
    return [
        *speed_wishes(report.figures, names, precisions),
        *apart_wishes(report.figures, names),
        *roof_wishes(report.shares()),
        *start_wishes(report.start_s),
        *memory_wishes(report.pss, report.weight_bytes),
    ]


Row = tuple[str, ...]
COLUMNS = ("case", "engine", "precision", "tokens/s", "first token, s", "ms a token", "of the roof", "note")


def speed_rows(report: Report) -> list[list[Row]]:
    """One block a case: the roofs, and a row for each contender, the fastest first; then a block of who is missing."""
    shares = report.shares()
    blocks: list[list[Row]] = []
    for case in report.cases:
        precisions = {one.precision: None for one in report.contenders}
        roofs = [(p, report.roofs[p, case.name]) for p in precisions if (p, case.name) in report.roofs]
        block: list[Row] = [
            (case.name, "the machine's roof", p, f"{rate:.1f}", "", "", "100 %", "") for p, rate in roofs
        ]
        keys: list[Key] = [(contender, case.name) for contender in report.contenders]
        keys.sort(key=lambda key: -report.figures[key].rate if key in report.figures else 0.0)
        blocks.append(block + [_speed_row(report, key, shares) for key in keys])
    missing: list[Row] = [("", engine, "", _DASH, "", "", "", why) for engine, why in report.missing.items()]
    return blocks + ([missing] if missing else [])


def _speed_row(report: Report, key: Key, shares: Mapping[Key, float]) -> Row:
    contender, case = key
    figure = report.figures.get(key)
    if figure is None:
        return case, contender.label, contender.precision, _DASH, "", "", "", report.notes.get(key, "not measured")
    gap = _DASH if figure.tpot_s is None else f"{1e3 * figure.tpot_s:.1f}"
    share = f"{shares[key]:.0%}" if key in shares else ""
    texts = (f"{figure.rate:.1f}", f"{figure.ttft_s:.2f}", gap, share, report.notes.get(key, ""))
    return case, contender.label, contender.precision, *texts


def cost_rows(report: Report) -> list[Row]:
    """Start and memory of each engine."""
    rows: list[Row] = []
    for one in report.contenders:
        pss, seconds = report.pss.get(one), report.start_s.get(one)
        memory = (f"{pss / _GIB:.2f}", f"{pss / report.weight_bytes[one.precision]:.2f}") if pss else (_DASH, _DASH)
        start = f"{seconds:.1f}" if seconds is not None else _DASH
        rows.append((one.label, one.precision, start, *memory, report.versions.get(one.engine, "")))
    return rows


def wish_rows(report: Report) -> list[Row]:
    """What is wanted."""
    return [
        (
            wish.what,
            wish.against,
            f"{'<=' if wish.at_most else '>='} {wish.bound:g}",
            _DASH if wish.value is None else f"{wish.value:.2f}",
            wish.verdict,
        )
        for wish in report.wishes
    ]


def print_report(report: Report, console: Console) -> None:
    """Three tables and the machine's limits."""
    at = report.machine
    console.print(
        f"{report.model}. Read from memory {at.bandwidth / 1e9:.1f} GB/s; products {at.float_ops / 1e9:.0f} GFLOP/s, "
        f"int8 {at.int_ops / 1e9:.0f} GOP/s (others used {report.limits_other_cpu:.2f} cores meanwhile)"
    )
    speed = _table("Speed: tokens of answers a second, in prefill cases of prompts", COLUMNS)
    for block in speed_rows(report):
        for row in block:
            speed.add_row(*row)
        speed.add_section()
    costs = ("engine", "precision", "start, s", "memory, GiB", "of the weights", "versions")
    tables = [
        (_table("Start and memory (PSS of all processes together)", costs), cost_rows(report)),
        (_table("Wanted", ("what", "against", "bound", "measured", "")), wish_rows(report)),
    ]
    console.print(speed)
    for table, rows in tables:
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def draw_speed(path: Path, report: Report) -> None:
    """A panel a case, a bar for each contender that was measured, and a line for each precision's roof, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = len(report.cases)
    figure, axes = pyplot.subplots(1, panels, figsize=(4 * panels, 4), layout="constrained", squeeze=False)
    for case, panel in zip(report.cases, axes[0], strict=True):
        bars = [one for one in report.contenders if (one, case.name) in report.figures]
        panel.barh(
            [f"{one.label} {one.precision}" for one in bars],
            [report.figures[one, case.name].rate for one in bars],
            color=[f"C{sorted({other.engine for other in report.contenders}).index(one.engine)}" for one in bars],
        )
        for precision in dict.fromkeys(one.precision for one in bars):
            if (precision, case.name) in report.roofs:
                panel.axvline(report.roofs[precision, case.name], color="grey", linestyle=":")
        panel.invert_yaxis()
        panel.set(title=case.name, xlabel="tokens/s", xlim=(0, None))
    figure.savefig(path)
    pyplot.close(figure)
