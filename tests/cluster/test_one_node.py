"""Experts, router and attention in processes of their own on one node: the same tokens as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from expertmesh.v1 import control_pb2

from cluster.launch import running_cluster
from tests.cluster.conftest import PROMPTS, agreement, distributed, kv_in_use
from tests.serving import Client, Reference, ids_request
from tests.waiting import until

SHM = Path("/dev/shm")


@pytest.fixture(scope="module")
def one_node(ray_address: str, deepseek: tuple[Path, Any]) -> Iterator[Client]:
    with (
        running_cluster(distributed(ray_address, deepseek[0], **{"experts.shards": 3})) as doors,
        Client(doors.grpc) as client,
    ):
        yield client


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_one_node_uses_shared_memory(one_node: Client, wanted: list[Reference]) -> None:
    assert all(agreement(one_node, wanted))
    view = one_node.cluster()
    rows = [wire for wire in view.wires if wire.to.startswith("expert-")]
    assert {wire.medium for wire in rows} == {"shm"}
    assert all(wire.bytes_sent > 0 and wire.bytes_received > 0 for wire in rows)
    assert len({actor.pid for actor in view.actors}) == len(view.actors) == 7
    groups = {a.name: a.placement_group for a in view.actors if a.placement_group}
    assert groups["router-0"] == groups["attention-0"]
    assert len({groups[f"expert-{n}"] for n in range(3)} | {groups["router-0"]}) == 4


def test_200_requests_a_third_cancelled_leave_nothing(one_node: Client) -> None:
    def one(number: int) -> None:
        call = one_node.inference.Generate(ids_request(PROMPTS[number % 4], 10 + number % 20), timeout=100)
        if number % 3 == 0:
            for _ in range(number % 4):
                next(call)
            call.cancel()
        else:
            assert sum(len(message.token_ids) for message in call) == 10 + number % 20

    one_node.tokens_together(PROMPTS * 4, 4)  # every thread pool is warm
    pids = [actor.pid for actor in one_node.cluster().actors]
    files, segments = {pid: open_files(pid) for pid in pids}, set(SHM.iterdir())
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(200)))
    until(lambda: kv_in_use(one_node) == 0)
    assert one_node.load(control_pb2.ROLE_GATEWAY)[0].gateway.streams == 0
    assert [actor.pid for actor in one_node.cluster().actors] == pids
    until(lambda: {pid: open_files(pid) for pid in pids} == files)
    assert set(SHM.iterdir()) == segments
