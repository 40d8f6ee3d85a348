"""The GPU wire over the communicator double: routers and shards in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from actors.transport.base import Medium
from tests.multiprocess.transport.nccl_members import Fleet, Report, random_sizes

ROUTERS = ("r0", "r1")
SHARDS = ("s0", "s1", "s2")
TOLD_S = 3.0
"""By then everyone knows of a death; it takes milliseconds where the cores are free."""


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Members that are ended whatever happens."""
    fleet = Fleet()
    yield fleet
    fleet.close()


def drive(fleet: Fleet, epoch: int, seed: int, batches: int, shards: int, *how: float) -> None:
    """Both routers begin to send random batches."""
    for at, router in enumerate(ROUTERS):
        fleet.call(router, "drive", epoch, random_sizes(seed + at, batches, shards), *how)


def reports(fleet: Fleet) -> list[Report]:
    """What came of it at both routers."""
    return fleet.each(ROUTERS, "report")


def all_well(fleet: Fleet, batches: int) -> None:
    """Every batch of both routers was answered rightly."""
    for report in reports(fleet):
        assert (report.done, report.error, report.dropped) == (batches, "", 0)


@pytest.mark.parametrize("medium", [Medium.SHM, Medium.TCP])
def test_random_exchanges_arrive_whole_and_the_steady_state_allocates_nothing(fleet: Fleet, medium: Medium) -> None:
    """Two routers, three shards, thousands of payloads of 0 bytes to 3 MiB, two batches in flight each."""
    fleet.start(*ROUTERS, *SHARDS)
    fleet.form(1, ROUTERS, SHARDS, medium)
    drive(fleet, 1, seed=1, batches=500, shards=3)
    first = reports(fleet)
    drive(fleet, 1, seed=1, batches=500, shards=3)
    second = reports(fleet)
    assert [report.error for report in (*first, *second)] == [""] * 4
    assert [report.done for report in (*first, *second)] == [500] * 4
    for before, after in zip(first, second, strict=True):
        # Which sizes meet depends on timing: a handful more, where thousands would be one for each frame.
        assert after.allocations - before.allocations <= 5
        assert before.allocations < 60


def test_batches_crossing_in_opposite_orders_do_not_lock(fleet: Fleet) -> None:
    """Routers that address the shards in turns, in opposite turns, deep in flight and both ways at once."""
    fleet.start(*ROUTERS, "s0", "s1")
    fleet.form(1, ROUTERS, ("s0", "s1"))
    turns = [[300_000, 0], [0, 300_000]] * 200
    fleet.call("r0", "drive", 1, turns, 6)
    fleet.call("r1", "drive", 1, turns[::-1], 6)
    all_well(fleet, 400)


def test_whoever_dies_wherever_the_others_abort_and_go_on_without_it(fleet: Fleet) -> None:
    """kill -9 between announcement and payload, before a receive, in the middle of the bytes; a router too."""
    shards = ["s0", "s1", "s2", "s3", "s4"]
    fleet.start(*ROUTERS, *shards)
    # (what the victim dies at, the how manieth time)
    for epoch, (point, after) in enumerate([("receive", 40), ("send", 40), ("_post_batch", 40), ("", 0)], start=1):
        fleet.form(epoch, ROUTERS, shards)
        victim = shards.pop()
        if point:
            fleet.call(victim, "die_at", point, after)
            drive(fleet, epoch, epoch, 2000, len(shards) + 1)
        else:
            for router in ROUTERS:
                fleet.call(router, "drive", epoch, [[4 << 20, 4 << 20]] * 500)
            fleet.peers[victim].kill()
        fleet.peers[victim].join()
        expect_abort(fleet, epoch, [*ROUTERS, *shards])
    fleet.form(9, ROUTERS, shards)
    drive(fleet, 9, 9, 50, len(shards))
    all_well(fleet, 50)


def test_a_router_that_dies_between_announcement_and_payload(fleet: Fleet) -> None:
    """The shards have posted receives that nobody will ever answer."""
    fleet.start(*ROUTERS, "s0", "s1")
    fleet.form(1, ROUTERS, ("s0", "s1"))
    fleet.call("r1", "die_at", "_post_batch", 20)
    drive(fleet, 1, 5, 2000, 2)
    fleet.peers["r1"].join()
    begin = time.monotonic()
    assert all(fleet.each(("s0", "s1"), "failure", 1))
    assert fleet.call("r0", "report").error.startswith("PeerGone")
    assert time.monotonic() - begin < TOLD_S
    fleet.form(2, ("r0",), ("s0", "s1"))
    fleet.call("r0", "drive", 2, random_sizes(6, 50, 2))
    assert fleet.call("r0", "report").done == 50


def test_a_stopped_peer_ends_the_group_at_the_deadline(fleet: Fleet) -> None:
    """SIGSTOP tells nobody anything: only the deadline does. It finds itself outside when it comes back."""
    fleet.start(*ROUTERS, *SHARDS)
    fleet.form(1, ROUTERS, SHARDS)
    fleet.peers["s2"].stop()
    begin = time.monotonic()
    drive(fleet, 1, 3, 500, 3, 2, 0.7)
    told = fleet.each(("r0", "r1", "s0", "s1"), "failure", 1)
    assert all(told)
    assert any("did not end before its deadline" in reason or "had not ended" in reason for reason in told)
    assert 0.5 < time.monotonic() - begin < 0.7 + TOLD_S
    assert all(report.error for report in reports(fleet))
    fleet.form(2, ROUTERS, ("s0", "s1"))
    drive(fleet, 2, 4, 50, 2)
    all_well(fleet, 50)
    fleet.peers["s2"].resume()
    assert fleet.call("s2", "failure", 1)


def test_a_new_member_joins_while_exchanges_run(fleet: Fleet) -> None:
    """The next epoch forms beside the one in use; the old one ends when everybody has switched."""
    fleet.start(*ROUTERS, "s0", "s1")
    fleet.form(1, ROUTERS, ("s0", "s1"))
    drive(fleet, 1, 1, 800, 2)
    fleet.start("s2")
    fleet.form(2, ROUTERS, SHARDS)
    drive(fleet, 2, 2, 200, 3)
    both = [*reports(fleet), *reports(fleet)]
    assert sorted((report.done, report.error) for report in both) == [(200, "")] * 2 + [(800, "")] * 2
    for member in (*ROUTERS, "s0", "s1"):
        fleet.call(member, "retire", 1)
    drive(fleet, 2, 3, 100, 3)
    all_well(fleet, 100)


def test_a_member_that_leaves_in_order_disturbs_nobody(fleet: Fleet) -> None:
    """Routers switch one by one: the first to close its wires must not end the group for the others."""
    fleet.start(*ROUTERS, "s0", "s1")
    fleet.form(1, ROUTERS, ("s0", "s1"))
    drive(fleet, 1, 1, 50, 2)
    all_well(fleet, 50)
    fleet.call("r1", "drive", 1, random_sizes(2, 400, 2))
    fleet.call("r0", "leave", 1)
    assert fleet.call("r1", "report").done == 400
    assert fleet.call("s0", "failure", 1, 0.0) is None


def test_a_group_whose_member_never_comes_is_given_up(fleet: Fleet) -> None:
    """Forming hangs until all came: the deadline ends it, and the next attempt is not disturbed by it."""
    fleet.start(*ROUTERS, "s0", "s1")
    plan = fleet.plan(1, ROUTERS, ("s0", "s1"))
    assert fleet.each((*ROUTERS, "s0"), "form", plan, fleet.addresses, None, 1.0) == ["WireTimeout"] * 3
    fleet.form(2, ROUTERS, ("s0", "s1"))
    drive(fleet, 2, 1, 20, 2)
    all_well(fleet, 20)


def expect_abort(fleet: Fleet, epoch: int, survivors: list[str]) -> None:
    """Both routers say that the group is over, and all survivors know, soon."""
    begin = time.monotonic()
    assert all(fleet.each(survivors, "failure", epoch))
    for report in reports(fleet):
        assert report.error.startswith(("PeerGone", "WireTimeout"))
    assert time.monotonic() - begin < TOLD_S
