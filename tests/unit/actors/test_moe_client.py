"""An attention shard's wire to its router: which frames are marked, and how long was waited for the answers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from actors import moe_client
from actors.messages import CPU, BatchTimes, Kind, encode_times, tensor_bytes
from actors.moe_client import MoEClient, MoEUnavailable
from actors.transport.base import Wire
from actors.transport.local import local_pair
from tests.span_recorder import TRACEPARENT

D = 4
TIMES = BatchTimes(0.25, 0.5)
LAYERS = tuple(range(20))
ROWS = torch.arange(3 * D, dtype=torch.float32).view(3, D)


@pytest.fixture
def pair() -> Iterator[tuple[MoEClient, Wire]]:
    """The client, and its router's end."""
    near, far = local_pair("attention", "router")
    yield MoEClient(near, torch.float32, CPU, D, 5.0, LAYERS), far
    near.close()
    far.close()


def layer(client: MoEClient, router: Wire, number: int) -> list[bytes]:
    """One layer, whose rows come back as they are; returns the parts that the router got."""
    sent = client.start(number, ROWS)
    frame = router.recv(time.monotonic() + 5)
    parts = [bytes(part) for part in frame.parts]
    router.send(Kind.ROWS_DONE, frame.tag, [parts[0], encode_times(TIMES)], time.monotonic() + 5)
    assert torch.equal(client.finish(sent), ROWS)
    return parts


def test_only_the_traced_step_and_few_layers_are_marked(pair: tuple[MoEClient, Wire]) -> None:
    client, router = pair
    plain, mark = bytes(tensor_bytes(ROWS)), TRACEPARENT.encode()
    marked = []
    for traceparent in ("", TRACEPARENT, ""):
        client.begin_step(traceparent)
        got = {number: layer(client, router, number) for number in LAYERS}
        assert all(parts in ([plain], [plain, mark]) for parts in got.values())
        marked.append({number for number, parts in got.items() if len(parts) == 2})
    assert marked == [set(), moe_client.traced_layers(LAYERS), set()]
    assert len(marked[1]) == 16


def test_waits_of_a_step_add_up_and_the_next_begins_anew(
    pair: tuple[MoEClient, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock is a second later, so each wait takes one."""
    client, router = pair
    seconds = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)), monotonic=time.monotonic)
    monkeypatch.setattr(moe_client, "time", clock)
    for layers in (3, 2):
        client.begin_step()
        assert (client.batches, client.waited_s) == (0, 0.0)
        for number in range(layers):
            layer(client, router, number)
        assert (client.batches, client.waited_s) == (layers, float(layers))


def test_a_wait_in_vain_counts_as_well(pair: tuple[MoEClient, Wire]) -> None:
    client, router = pair
    client.begin_step()
    sent = client.start(1, ROWS)
    router.close()
    with pytest.raises(MoEUnavailable):
        client.finish(sent)
    assert client.batches == 1
    assert client.waited_s > 0
