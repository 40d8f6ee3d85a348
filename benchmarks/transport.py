"""The data plane's figures beside what this machine can do at all: one table, one run.

    python -m benchmarks.transport [--quick] [--rounds 3] [--without ray pyzmq] [-o NAME]

Prints what README.md beside this file explains, and writes NAME.json. Ours and the limits take turns within each round,
so that whatever else this machine does meets both; a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from actors.transport.base import Medium, WireTimeout
from benchmarks.transport_figures import Cost, Trips, Wanted, fit, gb_per_s, layer_bounds, ratio, trips
from benchmarks.transport_lanes import Copies, Lane, LocalLane, MemoryLane, PipeLane, WireLane, tcp_lane, unix_lane
from benchmarks.transport_layer import Layer, Shape, moved
from benchmarks.transport_layer_raw import RawLayer
from benchmarks.transport_others import GlooLane, GlooPair, Missing, RayLane, TlsLane, ZmqLane

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64, 4 * KIB, 64 * KIB, MIB, 4 * MIB, 64 * MIB)
SHARDS = (1, 2, 4, 8, 16)
ROUTERS = (1, 2, 4, 8)
OTHERS = ("gloo", "pyzmq", "ray")
IDLE_S = 2.0
_PIPED_WIDTH = 170
_LEAST, _MOST = 5, 2000
_WARM_UP_S = 0.2


@dataclass(frozen=True)
class Effort:
    """``burst_s``: about so long one contender is measured in a round."""

    rounds: int
    burst_s: float
    spin_us: float


Figures = dict[str, dict[int, Trips]]
"""By contender's name and size."""


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def sized(burst: Callable[[int], Sequence[float]], burst_s: float) -> int:
    """How many trips take about ``burst_s``, by those that warm up: where processes share cores, who waits for them
    learns in its first hundred waits how to."""
    count, spent, times = 3, 0.0, [0.0]
    while spent < _WARM_UP_S:
        times = sorted(burst(count))
        spent += max(sum(times), 1e-4 * count)
        count = min(2 * count, _MOST)
    return max(_LEAST, min(_MOST, round(burst_s / max(times[len(times) // 2], 1e-7))))


def in_turns(bursts: Mapping[str, Callable[[int], Sequence[float]]], effort: Effort) -> dict[str, Trips]:
    """Each contender once in each round, one after the other."""
    counts = {name: sized(burst, effort.burst_s) for name, burst in bursts.items()}
    seen: dict[str, list[Sequence[float]]] = {name: [] for name in bursts}
    for _ in range(effort.rounds):
        for name, burst in bursts.items():
            seen[name].append(burst(counts[name]))
    return {name: trips(rounds) for name, rounds in seen.items()}


def measure(lanes: Sequence[Lane], sizes: Sequence[int], effort: Effort) -> Figures:
    """Round trips of every lane and size."""
    figures: Figures = {lane.name: {} for lane in lanes}
    for size in sizes:
        say(f"round trips of {size_text(size)} over {', '.join(figures)}")
        bursts = {lane.name: lambda count, lane=lane, size=size: lane.burst(size, count) for lane in lanes}
        for name, figure in in_turns(bursts, effort).items():
            figures[name][size] = figure
    return figures


@contextmanager
def opened(effort: Effort, missing: dict[str, str]) -> Iterator[list[Lane]]:
    """Our wires and the limits. ``missing`` is told which of them cannot be measured here, and why."""
    makers: Sequence[Callable[[], Lane]] = (
        lambda: LocalLane(effort.spin_us),
        lambda: WireLane(Medium.SHM, effort.spin_us),
        lambda: MemoryLane(SIZES[-1]),
        Copies,
        lambda: WireLane(Medium.TCP, effort.spin_us),
        lambda: TlsLane(effort.spin_us),
        tcp_lane,
        unix_lane,
        PipeLane,
    )
    with ExitStack() as stack:
        lanes = []
        for make in makers:
            try:
                lanes.append(make())
            except Missing as reason:
                missing[Medium.TLS.value] = str(reason)  # nothing else of these can be missing
                continue
            stack.callback(lanes[-1].close)
        yield lanes


def others(effort: Effort, sizes: Sequence[int], without: Sequence[str]) -> tuple[Figures, dict[str, str]]:
    """What others need, and of those that were not measured why. One after the other: Ray works in the background."""
    figures: Figures = {}
    missing = dict.fromkeys(without, "left out by --without")
    makers: dict[str, Callable[[ExitStack], list[Lane]]] = {
        "gloo": _gloo_lanes,
        "pyzmq": lambda stack: [_closing(stack, ZmqLane())],
        "ray": lambda stack: [_closing(stack, RayLane())],
    }
    for name in (name for name in OTHERS if name not in without):
        with ExitStack() as stack:
            try:
                lanes = makers[name](stack)
            except Missing as reason:
                missing[name] = str(reason)
                continue
            figures |= measure(lanes, sizes, effort)
    return figures, missing


def _gloo_lanes(stack: ExitStack) -> list[Lane]:
    pair = GlooPair()
    stack.callback(pair.close)
    return [GlooLane(pair, collective) for collective in (False, True)]


def _closing(stack: ExitStack, lane: Lane) -> Lane:
    stack.callback(lane.close)
    return lane


def idle_share(lane: WireLane | LocalLane) -> float:
    """Of a core, what a thread uses that waits in ``recv`` for IDLE_S. Traffic before has made it eager to poll."""
    lane.burst(64, 200)
    before = time.thread_time()
    try:
        lane.wire.recv(time.monotonic() + IDLE_S)
    except WireTimeout:
        return (time.thread_time() - before) / IDLE_S
    raise RuntimeError(f"{lane.name}: a frame came that nobody had sent")


def loops_idle_share(layer: Layer) -> float:
    """Of a core, what the processes of a router and its shards use together while nothing happens for IDLE_S."""
    before = layer.cpu()
    time.sleep(IDLE_S)
    return (layer.cpu() - before) / IDLE_S


def measure_layer(shape: Shape, effort: Effort) -> dict[str, Trips]:
    """One layer over two shards: raw, over shm, over tcp; and what raw frames take with the same index work."""
    say("a layer: attention, router, 2 expert shards and back")
    with ExitStack() as stack:
        layers = {
            "memory + pipe": RawLayer(moved(shape, 2), None),
            "memory + pipe, frames made and combined": RawLayer(moved(shape, 2), shape),
            "shm": Layer(shape, Medium.SHM, 2),
            "tcp": Layer(shape, Medium.TCP, 2),
        }
        for layer in layers.values():
            stack.callback(layer.close)
        return in_turns({name: layer.burst for name, layer in layers.items()}, effort)


def measure_growth(shape: Shape, effort: Effort, medium: Medium) -> tuple[dict[int, Trips], dict[int, Trips]]:
    """A layer by the number of expert shards (one router), and by that of routers (two shards)."""
    grown: list[dict[int, Trips]] = []
    for counts, make in (
        (SHARDS, lambda n: Layer(shape, medium, n)),
        (ROUTERS, lambda n: Layer(shape, medium, 2, n)),
    ):
        say(f"a layer over {medium} with {', '.join(map(str, counts))} {'shards' if counts is SHARDS else 'routers'}")
        with ExitStack() as stack:
            layers = {str(count): make(count) for count in counts}
            for layer in layers.values():
                stack.callback(layer.close)
            figures = in_turns({name: layer.burst for name, layer in layers.items()}, effort)
        grown.append({int(name): figure for name, figure in figures.items()})
    return grown[0], grown[1]


def costs(figures: Figures) -> dict[str, Cost]:
    """Of each of our wires between processes, fitted to half of the round trips."""
    fitted = {}
    for name in (Medium.SHM.value, Medium.TCP.value):
        sizes = sorted(figures[name])
        fitted[name] = fit(sizes, [figures[name][size].p50 / 2 for size in sizes])
    return fitted


def wishes(figures: Figures, layer: Mapping[str, Trips], idle: Mapping[str, float]) -> list[Wanted]:
    """What is wanted of the data plane, and what it is."""
    shm, tcp = figures["shm"], figures["tcp"]
    raw_tcp = [
        Wanted(f"tcp {size_text(n)} / raw tcp socket", ratio(tcp[n], figures["tcp socket"][n]), 1.3) for n in tcp
    ]
    made = "memory + pipe, frames made and combined"
    return [
        Wanted("shm 4 KiB / raw memory + pipe", ratio(shm[4 * KIB], figures["memory + pipe"][4 * KIB]), 1.5),
        Wanted("shm 4 MiB one way / two memcpys", ratio(shm[4 * MIB], figures["memcpy x4"][4 * MIB]), 1.3),
        Wanted("layer over shm / its frames raw", ratio(layer["shm"], layer["memory + pipe"]), 1.5),
        Wanted("layer over shm / its frames raw, made and combined too", ratio(layer["shm"], layer[made]), 1.5),
        *raw_tcp,
        *(Wanted(f"share of a core while waiting: {name}", share, 0.02) for name, share in idle.items()),
    ]


def size_text(size: int) -> str:
    """As people write it."""
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def print_all(console: Console, report: Mapping[str, Any]) -> None:
    """The table of round trips, then what is wanted, then growth."""
    console.print(f"{report['machine']}\nRound trips: p50 / p99 in us, and GB/s both ways together")
    figures: Figures = report["figures"]
    sizes = sorted(next(iter(figures.values())))
    table = Table("", *(size_text(size) for size in sizes))
    for name, by_size in figures.items():
        table.add_row(name, *(trip_text(size, by_size[size]) for size in sizes))
    for name, why in report["missing"].items():
        table.add_row(name, why)
    console.print(table)
    _print_wanted(console, report["wanted"])
    _print_layers(console, report)


def trip_text(size: int, figure: Trips) -> str:
    """A cell."""
    digits = 0 if figure.p50 >= 10e-6 else 1  # copies of small payloads take less than a microsecond
    return f"{figure.p50 * 1e6:.{digits}f} / {figure.p99 * 1e6:.{digits}f} · {gb_per_s(size, figure.p50):.2g}"


def _print_wanted(console: Console, wanted: Sequence[Wanted]) -> None:
    table = Table("wanted", "is", "at most", "", title="What is wanted (the median of the rounds' ratios)")
    for one in wanted:
        table.add_row(one.what, f"{one.ratio:.3g}", f"{one.most:g}", "met" if one.met else "NOT met")
    console.print(table)


def _print_layers(console: Console, report: Mapping[str, Any]) -> None:
    shape: Shape = report["shape"]
    table = Table(
        *("a layer", "p50 / p99 us"),
        title=f"A layer without compute: {shape.rows} rows of {shape.width} bf16, top-{shape.top} of {shape.experts}",
    )
    for name, figure in report["layer"].items():
        table.add_row(name, f"{figure.p50 * 1e6:.0f} / {figure.p99 * 1e6:.0f}")
    console.print(table)
    model: dict[str, Cost] = report["costs"]
    for name, cost in model.items():
        console.print(f"{name}: a frame of n bytes takes {cost.fixed_s * 1e6:.1f} us + n * {cost.byte_s * 1e9:.3f} ns")
    table = Table("shards", "here, p50 us", "a node each, by the model: least - most us", title="One router")
    for count, figure in report["by_shards"].items():
        least, most = layer_bounds(moved(shape, count), model["shm"], model["tcp"])
        table.add_row(str(count), f"{figure.p50 * 1e6:.0f}", f"{least * 1e6:.0f} - {most * 1e6:.0f}")
    console.print(table)
    table = Table("routers", "a layer of each, p50 us", "layers a second together", title="Two shards")
    for count, figure in report["by_routers"].items():
        table.add_row(str(count), f"{figure.p50 * 1e6:.0f}", f"{count / figure.p50:.0f}")
    console.print(table)


def machine() -> str:
    """What the figures are of."""
    return (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, "
        f"Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def run(effort: Effort, sizes: Sequence[int], without: Sequence[str]) -> dict[str, Any]:
    """Everything."""
    where, shape = machine(), Shape()
    unmeasured: dict[str, str] = {}
    with opened(effort, unmeasured) as lanes:
        figures = measure(lanes, sizes, effort)
        say("waiting")
        idle = {lane.name: idle_share(lane) for lane in lanes if isinstance(lane, WireLane | LocalLane)}
    layer = measure_layer(shape, effort)
    resting = Layer(shape, Medium.SHM, 2)
    resting.burst(100)
    idle["router and 2 shards"] = loops_idle_share(resting)
    resting.close()
    by_shards, by_routers = measure_growth(shape, effort, Medium.SHM)
    theirs, missing = others(effort, sizes, without)
    return {
        "machine": where,
        "shape": shape,
        "figures": figures | theirs,
        "missing": unmeasured | missing,
        "wanted": wishes(figures, layer, idle),
        "layer": layer,
        "costs": costs(figures),
        "by_shards": by_shards,
        "by_routers": by_routers,
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter bursts: two minutes, noisier")
    parser.add_argument("--rounds", type=int, default=5, help="at least 3; in each, every contender is measured once")
    parser.add_argument("--spin-us", type=float, default=50.0, help="bound of one phase of yielding polls")
    parser.add_argument("--without", nargs="+", default=[], choices=OTHERS, help="others that are not measured")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/transport"), help="without suffix"
    )
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error(f"--rounds is {options.rounds}; at least 3, for a median")
    effort = Effort(3 if options.quick else options.rounds, 0.05 if options.quick else 0.2, options.spin_us)
    report = run(effort, SIZES, options.without)
    print_all(Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH), report)
    written = options.output.with_suffix(".json")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(report, indent=1, default=asdict) + "\n", encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
