"""What the wires' benchmark makes of its times."""

from __future__ import annotations

import math

import pytest

from benchmarks.transport_figures import Cost, LayerBytes, Trips, Wanted, fit, gb_per_s, layer_bounds, ratio, trips


def test_a_figure_is_the_median_of_its_rounds() -> None:
    slow = [float(n) for n in range(901, 1001)]
    figure = trips([[float(n) for n in range(1, 101)], slow, [float(n) for n in range(11, 111)]])
    assert figure == Trips(60.0, 109.0, (50.0, 950.0, 60.0))


def test_bytes_go_both_ways() -> None:
    assert gb_per_s(1 << 20, 2 * (1 << 20) / 5e9) == pytest.approx(5.0)


def test_a_ratio_is_that_of_most_rounds_though_the_machine_was_slower_in_some() -> None:
    ours, limit = Trips(0, 0, (3.0, 30.0, 12.0)), Trips(0, 0, (2.0, 20.0, 1.0))
    assert ratio(ours, limit) == pytest.approx(1.5)


@pytest.mark.parametrize(("ratio", "met"), [(1.5, True), (1.51, False), (math.nan, False)])
def test_what_is_wanted_is_met_or_not(ratio: float, met: bool) -> None:
    assert Wanted("shm", ratio, 1.5).met is met


def test_a_line_is_found_again() -> None:
    cost = Cost(20e-6, 0.1e-9)
    sizes = [64, 4096, 1 << 20, 64 << 20]
    fitted = fit(sizes, [cost.of(size) for size in sizes])
    assert fitted.fixed_s == pytest.approx(cost.fixed_s)
    assert fitted.byte_s == pytest.approx(cost.byte_s)


def test_small_frames_count_as_much_as_large_ones() -> None:
    cost = Cost(20e-6, 0.1e-9)
    sizes = [64, 4096, 64 << 20]
    fitted = fit(sizes, [cost.of(64), cost.of(4096), 1.2 * cost.of(64 << 20)])
    assert fitted.fixed_s == pytest.approx(cost.fixed_s, rel=0.02)


@pytest.mark.parametrize(
    ("seconds", "fixed", "byte"),
    [((1.0, 300.0), 0.0, True), ((4.0, 2.0), 8 / 3 * 0.9, False)],
    ids=["never a frame that costs less than nothing", "nor a byte"],
)
def test_no_part_of_a_cost_is_negative(seconds: tuple[float, float], fixed: float, byte: bool) -> None:
    fitted = fit([10, 100], seconds)
    assert (fitted.byte_s > 0) is byte
    assert fitted.fixed_s == pytest.approx(fixed)


@pytest.mark.parametrize(("sizes", "seconds"), [([], []), ([8], [1.0]), ([8, 8], [1.0, 2.0]), ([8, 9], [1.0])])
def test_a_line_needs_two_points(sizes: list[int], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two sizes"):
        fit(sizes, seconds)


def test_a_layer_lies_between_all_frames_at_once_and_one_after_the_other() -> None:
    moved = LayerBytes(rows=100, dispatch=(10, 20, 30), results=(40, 50, 60))
    least, most = layer_bounds(moved, near=Cost(1.0, 0.01), far=Cost(7.0, 1.0))
    assert least == pytest.approx(2 * (1 + 1) + (7 + 60) + (7 + 150))
    assert most == pytest.approx(2 * (1 + 1) + 6 * 7 + 60 + 150)
    alone = LayerBytes(100, (60,), (150,))
    assert layer_bounds(alone, Cost(1.0, 0.01), Cost(7.0, 1.0)) == (pytest.approx(least), pytest.approx(least))
