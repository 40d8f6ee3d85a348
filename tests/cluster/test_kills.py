"""kill -9 at random moments while greedy streams run: every stream ends with the tokens of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from expertmesh.v1 import control_pb2 as pb

from cluster.launch import running_cluster
from tests.chorus import Chorus, singing
from tests.cluster.conftest import PROMPTS, SMALL, distributed, kv_in_use, nothing_of_ours, rings_mapped
from tests.serving import Client, Reference
from tests.waiting import until

SHM = Path("/dev/shm")
SOME = 400
"""Tokens, over all streams, within which a kill comes at random."""


def replaced(client: Client, victim: str, role: int, count: int) -> bool:
    """True when ``count`` other actors of its role are there, and all of them answer."""
    actors = client.load(role)
    sound = [a for a in actors if a.name != victim and a.state == pb.ACTOR_STATE_READY]
    return len(sound) == len(actors) == count


def kill_often(client: Client, chorus: Chorus, role: int, kills: int, seed: int) -> list[float]:
    """``kills`` times: wait for a random moment, kill a random actor of ``role``, wait until it is replaced.

    Returns the longest gap that any stream had around each kill, in seconds.
    """
    draw = random.Random(seed)
    gaps = []
    count = len(client.load(role))
    for _ in range(kills):
        chorus.after(draw.randrange(SOME))
        victim = draw.choice(client.load(role))
        begin = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda name=victim.name: replaced(client, name, role, count), 60)
        chorus.after(8 * len(PROMPTS))
        gaps.append(chorus.longest_gap(begin))
    return gaps


def report(capsys: pytest.CaptureFixture[str], what: str, gaps: list[float], chorus: Chorus) -> None:
    """The longest stalls, where whoever runs the tests sees them."""
    longest = ", ".join(f"{gap:.2f}" for gap in sorted(gaps, reverse=True))
    with capsys.disabled():
        print(f"\n{what}: {len(gaps)} kills, {chorus.answers} answers, all right; longest stalls, s: {longest}")


KILLS = {"without a replica": (10, {}), "with a replica": (10, {"experts.shards": 3, "experts.min_replicas": 2})}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", KILLS)
def test_20_expert_shards_are_killed(
    ray_address: str,
    deepseek: tuple[Path, Any],
    wanted: list[Reference],
    case: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kills, keys = KILLS[case]
    segments, rings = set(SHM.iterdir()), rings_mapped()
    with running_cluster(distributed(ray_address, deepseek[0], **keys)) as doors, Client(doors.grpc) as client:
        with singing(client, PROMPTS, wanted) as chorus:
            gaps = kill_often(client, chorus, pb.ROLE_EXPERT, kills, seed=kills + len(keys))
        report(capsys, f"expert shards {case}", gaps, chorus)
        until(lambda: kv_in_use(client) == 0)
        # the last one's successor answers before the map that names it is in force
        until(lambda: client.cluster().expert_map_epoch >= 1 + kills)
    assert set(SHM.iterdir()) == segments
    until(lambda: rings_mapped() == rings)
    assert nothing_of_ours(ray_address)


@pytest.mark.timeout(300)
def test_attention_shards_and_routers_are_killed(
    ray_address: str, deepseek: tuple[Path, Any], wanted: list[Reference], capsys: pytest.CaptureFixture[str]
) -> None:
    """The streams of the dead one are computed anew on the other from what the gateway has of them."""
    config = distributed(ray_address, deepseek[0], **{"attention.replicas": 2})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        with singing(client, PROMPTS, wanted) as chorus:
            gaps = kill_often(client, chorus, pb.ROLE_ATTENTION, 3, seed=5)
            gaps += kill_often(client, chorus, pb.ROLE_ROUTER, 2, seed=6)
        report(capsys, "attention shards and routers, one of two", gaps, chorus)
        assert client.load(pb.ROLE_GATEWAY)[0].gateway.replays > 0
        until(lambda: kv_in_use(client) == 0)
    assert nothing_of_ours(ray_address)


@pytest.mark.timeout(300)
def test_a_node_dies(
    ray_cluster: Any, deepseek: tuple[Path, Any], wanted: list[Reference], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shard starts anew on the other node of its kind, though Ray takes a while to notice that the node is dead."""
    pool = {"expertmesh.io/pool": "doomed"}
    nodes = [ray_cluster.add_node(**SMALL, labels=pool) for _ in range(2)]
    try:
        config = distributed(ray_cluster.address, deepseek[0], **{"experts.node_labels": pool})
        with running_cluster(config) as doors, Client(doors.grpc) as client:
            where = {actor.name: actor.node_id for actor in client.load(pb.ROLE_EXPERT)}
            assert set(where.values()) == {node.node_id for node in nodes}
            with singing(client, PROMPTS, wanted) as chorus:
                begin = time.monotonic()
                ray_cluster.remove_node(nodes[0], allow_graceful=False)
                lost = next(name for name, node in where.items() if node == nodes[0].node_id)
                until(lambda: replaced(client, lost, pb.ROLE_EXPERT, 2), 120)
                chorus.after(8 * len(PROMPTS))
                gap = chorus.longest_gap(begin)
            report(capsys, "an expert shard's node", [gap], chorus)
            assert {actor.node_id for actor in client.load(pb.ROLE_EXPERT)} == {nodes[1].node_id}
        assert nothing_of_ours(ray_cluster.address)
    finally:
        ray_cluster.remove_node(nodes[1])
