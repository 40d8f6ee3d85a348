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
from tests.cluster.conftest import PROMPTS, distributed, kv_in_use, nothing_of_ours, rings_mapped
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
    with running_cluster(distributed(ray_address, deepseek[0], **keys)) as address, Client(address) as client:
        with singing(client, PROMPTS, wanted) as chorus:
            gaps = kill_often(client, chorus, pb.ROLE_EXPERT, kills, seed=kills + len(keys))
        report(capsys, f"expert shards {case}", gaps, chorus)
        until(lambda: kv_in_use(client) == 0)
        assert client.cluster().expert_map_epoch >= 1 + kills
    assert set(SHM.iterdir()) == segments
    until(lambda: rings_mapped() == rings)
    assert nothing_of_ours(ray_address)


@pytest.mark.timeout(300)
def test_attention_shards_and_routers_are_killed(
    ray_address: str, deepseek: tuple[Path, Any], wanted: list[Reference], capsys: pytest.CaptureFixture[str]
) -> None:
    """The streams of the dead one are computed anew on the other from what the gateway has of them."""
    config = distributed(ray_address, deepseek[0], **{"attention.replicas": 2})
    with running_cluster(config) as address, Client(address) as client:
        with singing(client, PROMPTS, wanted) as chorus:
            gaps = kill_often(client, chorus, pb.ROLE_ATTENTION, 3, seed=5)
            gaps += kill_often(client, chorus, pb.ROLE_ROUTER, 2, seed=6)
        report(capsys, "attention shards and routers, one of two", gaps, chorus)
        assert client.load(pb.ROLE_GATEWAY)[0].gateway.replays > 0
        until(lambda: kv_in_use(client) == 0)
    assert nothing_of_ours(ray_address)
