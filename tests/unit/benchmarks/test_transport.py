"""The wires' benchmark takes turns, says what is wanted, and measures the bytes that are really sent."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from actors.frames import array_bytes
from actors.messages import tensor_bytes
from benchmarks.transport import IDLE_S, Effort, in_turns, print_all, size_text, sized, trip_text, wishes
from benchmarks.transport_figures import Cost, Trips, Wanted
from benchmarks.transport_layer import Shape, moved

QUICK = Effort(rounds=3, burst_s=1.0, spin_us=0.0)


def test_contenders_take_turns_within_each_round() -> None:
    calls: list[tuple[str, int]] = []

    def contender(name: str, seconds: float) -> Callable[[int], list[float]]:
        def burst(count: int) -> list[float]:
            calls.append((name, count))
            return [seconds] * count

        return burst

    found = in_turns({"fast": contender("fast", 0.01), "slow": contender("slow", 0.1)}, QUICK)
    assert calls[-6:] == [("fast", 100), ("slow", 10)] * 3
    warm_up = calls[:-6]
    assert [name for name, _ in warm_up] == sorted(name for name, _ in warm_up)
    assert sum(count for name, count in warm_up if name == "fast") * 0.01 >= 0.2
    assert found["slow"] == Trips(0.1, 0.1, (0.1, 0.1, 0.1))


@pytest.mark.parametrize(("trip_s", "count"), [(0.02, 50), (10.0, 5), (1e-9, 2000)])
def test_a_burst_has_few_long_trips_or_many_short_ones(trip_s: float, count: int) -> None:
    assert sized(lambda count: [trip_s] * (count - 1) + [9.0], 1.0) == count


def figure(seconds: float) -> Trips:
    return Trips(seconds, 2 * seconds, (seconds,) * 3)


FIGURES = {
    "shm": {4096: figure(3e-5), 4 << 20: figure(4e-4)},
    "memory + pipe": {4096: figure(2e-5), 4 << 20: figure(3e-4)},
    "memcpy x4": {4096: figure(1e-6), 4 << 20: figure(2e-4)},
    "tcp": {4096: figure(5e-5), 4 << 20: figure(1e-3)},
    "tcp socket": {4096: figure(4e-5), 4 << 20: figure(5e-4)},
}
LAYER = {
    "memory + pipe": figure(1e-4),
    "memory + pipe, frames made and combined": figure(2e-4),
    "shm": figure(3e-4),
    "tcp": figure(4e-4),
}


def test_what_is_wanted_is_compared_with_its_own_limit() -> None:
    wanted = {one.what: (round(one.ratio, 6), one.met) for one in wishes(FIGURES, LAYER, {"shm": 0.03})}
    assert wanted == {
        "shm 4 KiB / raw memory + pipe": (1.5, True),
        "shm 4 MiB one way / two memcpys": (2.0, False),
        "layer over shm / its frames raw": (3.0, False),
        "layer over shm / its frames raw, made and combined too": (1.5, True),
        "tcp 4 KiB / raw tcp socket": (1.25, True),
        "tcp 4 MiB / raw tcp socket": (2.0, False),
        "share of a core while waiting: shm": (0.03, False),
    }
    assert IDLE_S == 2.0


def test_the_table_tells_what_was_not_measured_and_what_is_not_met() -> None:
    out = io.StringIO()
    report = {
        "machine": "a machine",
        "shape": Shape(),
        "figures": FIGURES,
        "missing": {"pyzmq": "zmq is not installed"},
        "wanted": [Wanted("this", 1.0, 1.3), Wanted("that", 2.0, 1.3)],
        "layer": LAYER,
        "costs": {"shm": Cost(1e-5, 1e-11), "tcp": Cost(2e-5, 1e-10)},
        "by_shards": {2: figure(4e-4)},
        "by_routers": {8: figure(8e-3)},
    }
    print_all(Console(file=out, width=150), report)
    text = out.getvalue()
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "zmq is not installed" in lines["pyzmq"]
    assert "30 / 60 · 0.27" in lines["shm"] or "300 / 600" in lines["shm"]
    assert "NOT met" in lines["that"]
    assert "NOT" not in lines["this"]
    assert "1000" in lines["8"]
    assert "shm: a frame of n bytes takes 10.0 us + n * 0.010 ns" in text


@pytest.mark.parametrize(("size", "text"), [(64, "64 B"), (4096, "4 KiB"), (64 << 20, "64 MiB")])
def test_sizes_are_written_as_people_do(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_cell_has_the_bandwidth_of_both_ways() -> None:
    assert trip_text(4 << 20, figure(400e-6)) == "400 / 800 · 21"
    assert trip_text(64, figure(0.3e-6)) == "0.3 / 0.6 · 0.43"


@pytest.mark.parametrize("shards", [1, 2, 16])
def test_the_raw_layer_moves_the_bytes_of_the_real_frames(shards: int) -> None:
    shape = Shape(rows=4, width=64, top=3, experts=16)
    found = moved(shape, shards)
    chosen, _ = shape.choice()
    rows_of = [{row for row in range(4) if (chosen[row] % shards == shard).any()} for shard in range(shards)]
    pairs_of = [int((chosen % shards == shard).sum()) for shard in range(shards)]
    assert found.rows == len(tensor_bytes(shape.batch()))
    assert found.dispatch == tuple(len(r) * 128 + p * 2 * 4 for r, p in zip(rows_of, pairs_of, strict=True) if p)
    assert found.results == tuple(p * 128 + 8 for p in pairs_of if p)
    assert len(array_bytes(chosen)) == 4 * 3 * 8


def test_the_batch_is_always_the_same_and_comes_back_as_it_went() -> None:
    shape = Shape(rows=4, width=64, top=2, experts=16)
    assert torch.equal(shape.batch(), shape.batch())
    assert (shape.choice()[0] == shape.choice()[0]).all()
    assert torch.equal(shape.result(), shape.batch())
