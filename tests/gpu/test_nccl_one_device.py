"""What one GPU can tell: a communicator of one rank, which sends to itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from actors.transport.communicator import CommunicatorError, Pending, Transfer
from actors.transport.cupy_nccl import CupyBackend, CupyCommunicator
from tests.waiting import until


@pytest.fixture
def alone(backend: CupyBackend) -> Iterator[Callable[[], CupyCommunicator]]:
    """Makes communicators of one rank, and aborts them all together."""
    made: list[CupyCommunicator] = []

    def make() -> CupyCommunicator:
        made.append(backend.connect(backend.unique_id(), 0, 1))
        return made[-1]

    yield make
    backend.abort(made)


def test_bytes_of_every_size_come_back(backend: CupyBackend, alone: Callable[[], CupyCommunicator]) -> None:
    communicator = alone()
    for size in (1, 7, 4096, 4097, (3 << 20) + 5):
        sent = torch.randint(0, 256, (size,), dtype=torch.uint8, device=backend.device)
        got = torch.zeros_like(sent)
        until(communicator.exchange([Transfer(sent, 0)], [Transfer(got, 0)]).done)
        assert torch.equal(sent, got)


def test_an_exchange_waits_for_the_work_before_it(backend: CupyBackend, alone: Callable[[], CupyCommunicator]) -> None:
    """What is sent is computed on torch's current stream; the exchange runs on another."""
    communicator = alone()
    factor = torch.ones(4096, 4096, device=backend.device)
    value = torch.zeros(1 << 20, dtype=torch.uint8, device=backend.device)
    got = torch.empty_like(value)
    for _ in range(20):
        factor = (factor @ factor).clamp_(0, 1)
    value.add_(factor.max().to(torch.uint8))
    until(communicator.exchange([Transfer(value, 0)], [Transfer(got, 0)]).done)
    assert got.eq(1).all()


def test_exchanges_on_two_communicators_may_be_posted_from_two_threads(
    backend: CupyBackend, alone: Callable[[], CupyCommunicator]
) -> None:
    """As when an epoch forms beside the one in use."""

    def many(communicator: CupyCommunicator, posted: list[Pending]) -> None:
        torch.cuda.set_device(backend.device)
        tensor = torch.zeros(4096, dtype=torch.uint8, device=backend.device)
        target = torch.zeros_like(tensor)
        posted.extend(communicator.exchange([Transfer(tensor, 0)], [Transfer(target, 0)]) for _ in range(200))

    posted: list[Pending] = []
    threads = [threading.Thread(target=many, args=(alone(), posted)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(posted) == 400 and all(pending.done() for pending in posted))


def test_abort_ends_what_is_quiet_and_the_next_one_works(
    backend: CupyBackend, alone: Callable[[], CupyCommunicator]
) -> None:
    old = [backend.connect(backend.unique_id(), 0, 1) for _ in range(2)]
    assert [communicator.failure() for communicator in old] == [None, None]
    backend.abort(old)
    test_bytes_of_every_size_come_back(backend, alone)


def test_a_rank_outside_is_refused_and_leaves_no_open_group(
    backend: CupyBackend, alone: Callable[[], CupyCommunicator]
) -> None:
    tensor = torch.zeros(1, dtype=torch.uint8, device=backend.device)
    with pytest.raises(CommunicatorError, match="rank 0 cannot post"):
        alone().exchange([Transfer(tensor, 5)], [])
    test_bytes_of_every_size_come_back(backend, alone)
