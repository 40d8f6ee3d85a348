"""The plan of a group, its buffers, and what the double of the communicator must be able to do wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from actors.transport.base import WireTimeout
from actors.transport.communicator import CommunicatorError, Transfer
from actors.transport.device_pool import DevicePool
from actors.transport.nccl_form import form_group
from actors.transport.nccl_group import GroupPlan
from tests.multiprocess.transport.nccl_double import GARBAGE, DoubleBackend, DoubleCommunicator
from tests.waiting import until

HANG_S = 0.1
"""What has not happened by then does not happen: nothing in the double waits for time to pass."""


@pytest.fixture
def ranks() -> Iterator[list[DoubleCommunicator]]:
    """Three ranks of one communicator, aborted in the end."""
    made = joined(3)
    yield made
    for communicator in made:
        if not communicator._aborted:
            communicator.abort()


def joined(size: int) -> list[DoubleCommunicator]:
    backend = DoubleBackend()
    name = backend.unique_id()
    made: dict[int, DoubleCommunicator] = {}

    def join(rank: int) -> None:
        made[rank] = backend.connect(name, rank, size)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return [made[rank] for rank in range(size)]


def connected(first: DoubleCommunicator, second: DoubleCommunicator) -> None:
    """One byte, so that later exchanges of the pair return at once."""
    byte = torch.zeros(1, dtype=torch.uint8)
    thread = threading.Thread(target=lambda: second.exchange([], [Transfer(byte, first.rank)]))
    thread.start()
    pending = first.exchange([Transfer(byte, second.rank)], [])
    thread.join()
    until(pending.done)


def payload(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int64).to(torch.uint8)


def test_the_double_carries_bytes_both_ways_in_one_exchange(ranks: list[DoubleCommunicator]) -> None:
    first, second, _ = ranks
    connected(first, second)
    got = [torch.zeros(5000, dtype=torch.uint8) for _ in range(2)]
    posted = [
        first.exchange([Transfer(payload(5000), 1)], [Transfer(got[0], 1)]),
        second.exchange([Transfer(payload(5000) + 1, 0)], [Transfer(got[1], 0)]),
    ]
    until(lambda: all(pending.done() for pending in posted))
    assert torch.equal(got[0], payload(5000) + 1)
    assert torch.equal(got[1], payload(5000))


@pytest.mark.parametrize("count", [9, 11])
def test_the_double_hangs_on_unequal_counts_until_abort_and_leaves_garbage(
    ranks: list[DoubleCommunicator], count: int
) -> None:
    first, second, _ = ranks
    connected(first, second)
    target = torch.zeros(count, dtype=torch.uint8)
    sent, got = first.exchange([Transfer(payload(10), 1)], []), second.exchange([], [Transfer(target, 0)])
    time.sleep(HANG_S)
    assert (sent.done(), got.done()) == (False, False)
    second.abort()
    assert got.done()
    assert target.eq(GARBAGE).all()
    assert not sent.done()
    first.abort()
    assert sent.done()


def test_the_double_hangs_on_a_dead_peer(ranks: list[DoubleCommunicator]) -> None:
    first, second, _ = ranks
    connected(first, second)
    second.abort()
    sent = first.exchange([Transfer(payload(10), 1)], [])
    time.sleep(HANG_S)
    assert not sent.done()
    assert first.failure() is None


def test_the_double_runs_exchanges_in_order(ranks: list[DoubleCommunicator]) -> None:
    """The second waits for the first, though its peer is ready: what makes careless callers lock."""
    first, second, third = ranks
    connected(first, second)
    connected(first, third)
    target = torch.zeros(10, dtype=torch.uint8)
    blocked, behind = (first.exchange([Transfer(payload(10), peer)], []) for peer in (1, 2))
    got = third.exchange([], [Transfer(target, 0)])
    time.sleep(HANG_S)
    assert not behind.done()
    assert not got.done()
    second.exchange([], [Transfer(torch.zeros(10, dtype=torch.uint8), 0)])
    until(lambda: blocked.done() and behind.done() and got.done())
    assert torch.equal(target, payload(10))


def test_the_double_blocks_in_a_pairs_first_exchange(ranks: list[DoubleCommunicator]) -> None:
    first, second, _ = ranks
    thread = threading.Thread(target=lambda: first.exchange([Transfer(payload(10), 1)], []))
    thread.start()
    thread.join(HANG_S)
    assert thread.is_alive()
    second.exchange([], [Transfer(torch.zeros(10, dtype=torch.uint8), 0)])
    thread.join(10)
    assert not thread.is_alive()


def test_the_double_has_no_receive_from_any_source(ranks: list[DoubleCommunicator]) -> None:
    with pytest.raises(CommunicatorError, match="cannot talk to rank -1"):
        ranks[0].exchange([], [Transfer(payload(1), -1)])


def test_forming_ends_at_its_deadline_and_a_late_success_is_cleaned_up() -> None:
    backend = DoubleBackend()
    plan = GroupPlan(3, backend.unique_id(), backend.unique_id(), backend.unique_id(), ("r",), ("s",))
    threads = threading.active_count()  # three of them answer for the ids
    with pytest.raises(WireTimeout, match="epoch 3 did not form"):
        form_group(plan, "r", backend, time.monotonic() + 0.1)
    # Somebody comes after all: the thread that was stuck in the library comes back and ends what it had made.
    backend.connect(plan.dispatch_id, 1, 2).abort()
    # The double answers for the other ids in threads of its own until all came for those too.
    joining = [
        threading.Thread(target=lambda i=unique_id, at=at: backend.connect(i, at, 2).abort())
        for unique_id in (plan.results_id, plan.rooms_id)
        for at in (0, 1)
    ]
    for thread in joining:
        thread.start()
    until(lambda: threading.active_count() <= threads - 3)


def test_a_plan_gives_ranks_in_order_and_refuses_doubles() -> None:
    plan = GroupPlan(1, b"a", b"b", b"c", ("r0", "r1"), ("s0",))
    assert [plan.rank(name) for name in plan.members] == [0, 1, 2]
    with pytest.raises(ValueError, match="'x' is not in the group of epoch 1: r0, r1, s0"):
        plan.rank("x")
    with pytest.raises(ValueError, match="distinct names; got r, r"):
        GroupPlan(1, b"a", b"b", b"c", ("r",), ("r",))
    with pytest.raises(ValueError, match="needs routers and shards"):
        GroupPlan(1, b"a", b"b", b"c", ("r",), ())


def test_the_pool_reuses_what_fits() -> None:
    pool = DevicePool(torch.device("cpu"))
    first = pool.take(5000)
    assert (first.numel(), first.dtype, pool.allocations) == (5000, torch.uint8, 1)
    where = first.data_ptr()
    pool.give(first)
    assert pool.take(8192).data_ptr() == where
    assert pool.take(8192).data_ptr() != where
    pool.take(0)
    assert pool.allocations == 3
