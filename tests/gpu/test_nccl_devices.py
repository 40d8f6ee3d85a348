"""The same members as over the double, each on a GPU of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.multiprocess.transport.nccl_members import Fleet, random_sizes


def test_random_exchanges_arrive_whole(devices: Callable[[int], Fleet]) -> None:
    fleet = devices(2)
    fleet.start("r0", "s0")
    fleet.form(1, ["r0"], ["s0"])
    fleet.call("r0", "drive", 1, random_sizes(1, 1000, 1))
    report = fleet.call("r0", "report")
    assert (report.done, report.error) == (1000, "")


def test_batches_crossing_in_opposite_orders_do_not_lock(devices: Callable[[int], Fleet]) -> None:
    fleet = devices(4)
    fleet.start("r0", "r1", "s0", "s1")
    fleet.form(1, ["r0", "r1"], ["s0", "s1"])
    turns = [[3 << 20, 0], [0, 3 << 20]] * 200
    fleet.call("r0", "drive", 1, turns, 6)
    fleet.call("r1", "drive", 1, turns[::-1], 6)
    assert [report.error for report in fleet.each(("r0", "r1"), "report")] == ["", ""]


def test_a_dead_peer_is_aborted_and_the_next_epoch_works(devices: Callable[[int], Fleet]) -> None:
    fleet = devices(3)
    fleet.start("r0", "s0", "s1")
    fleet.form(1, ["r0"], ["s0", "s1"])
    fleet.call("s1", "die_at", "receive", 50)
    fleet.call("r0", "drive", 1, random_sizes(2, 2000, 2))
    fleet.peers["s1"].join()
    begin = time.monotonic()
    assert all(fleet.each(("r0", "s0"), "failure", 1))
    assert fleet.call("r0", "report").error
    assert time.monotonic() - begin < 10.0
    fleet.form(2, ["r0"], ["s0"])
    fleet.call("r0", "drive", 2, random_sizes(3, 200, 1))
    assert fleet.call("r0", "report").done == 200


def test_an_epoch_forms_beside_the_one_in_use(devices: Callable[[int], Fleet]) -> None:
    fleet = devices(3)
    fleet.start("r0", "s0", "s1")
    fleet.form(1, ["r0"], ["s0"])
    fleet.call("r0", "drive", 1, random_sizes(4, 3000, 1))
    fleet.form(2, ["r0"], ["s0", "s1"])
    fleet.call("r0", "drive", 2, random_sizes(5, 300, 2))
    errors = [fleet.call("r0", "report").error for _ in range(2)]
    assert errors == ["", ""]
