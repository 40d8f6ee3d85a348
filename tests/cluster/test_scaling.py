"""Both fleets scaled by a user's commands while greedy streams run, and experts by the load alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from expertmesh.v1 import control_pb2 as pb

from cluster.launch import running_cluster
from tests.chorus import singing
from tests.cluster.conftest import PROMPTS, distributed, kv_in_use, nothing_of_ours
from tests.processes import run
from tests.serving import Client, Reference
from tests.waiting import until


def told(address: str, *command: str) -> str:
    """What the command printed; it must have worked."""
    done = run(*command, "--target", address, timeout_s=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(240)
def test_16_streams_while_both_fleets_are_scaled(
    ray_address: str, deepseek: tuple[Path, Any], wanted: list[Reference], capsys: pytest.CaptureFixture[str]
) -> None:
    config = distributed(ray_address, deepseek[0], drain_timeout_s=1.0)
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        with singing(client, PROMPTS * 4, wanted * 4) as chorus:
            assert "4 expert shards: expert-0, expert-1, expert-2, expert-3" in told(doors.grpc, "scale", "experts=4")
            assert "2 attention shards: attention-0, attention-1" in told(doors.grpc, "scale", "attention=2")
            until(lambda: all(a.attention.tokens for a in client.load(pb.ROLE_ATTENTION)))
            view = client.cluster()
            groups = {a.name: a.placement_group for a in view.actors if a.placement_group}
            assert len({groups[f"expert-{n}"] for n in range(4)}) == 4
            assert groups["attention-1"] == groups["router-1"]
            assert all(a.expert.rows for a in view.actors if a.role == pb.ROLE_EXPERT)
            out = told(doors.grpc, "scale", "experts=2", "attention=1")
            assert "2 expert shards: expert-0, expert-1" in out
            assert "1 attention shard: attention-0" in out
            assert "experts were read" in told(doors.grpc, "rebalance") or "left alone" in told(doors.grpc, "rebalance")
            chorus.after(200)
        with capsys.disabled():
            print(f"\nscaling: {chorus.answers} answers, all right; longest gap {chorus.longest_gap():.2f} s")
        assert len(client.load(pb.ROLE_EXPERT)) == 2
        assert "expert map 3 is in force" in told(doors.grpc, "status")
        until(lambda: kv_in_use(client) == 0)
    assert nothing_of_ours(ray_address)


@pytest.mark.timeout(240)
def test_a_node_is_drained_while_streams_run(
    ray_address: str, deepseek: tuple[Path, Any], wanted: list[Reference]
) -> None:
    """What runs there starts elsewhere; then the node holds nothing, and nothing new is placed there."""
    keys = {"experts.node_labels": {}, "experts.shards": 3, "drain_timeout_s": 0.5}
    with running_cluster(distributed(ray_address, deepseek[0], **keys)) as doors, Client(doors.grpc) as client:
        view = client.cluster()
        home = next(a.node_id for a in view.actors if a.role == pb.ROLE_CONTROLLER)
        attention = next(a.node_id for a in view.actors if a.role == pb.ROLE_ATTENTION)
        shards = [a for a in view.actors if a.role == pb.ROLE_EXPERT and a.node_id not in (home, attention)]
        node, gone = shards[0].node_id, {shard.name for shard in shards}
        with singing(client, PROMPTS, wanted) as chorus:
            out = told(doors.grpc, "drain", "--node", node[:20])
            assert all(name in out for name in gone)
            chorus.after(50)
            view = client.cluster()
            assert all(actor.node_id != node for actor in view.actors)
            assert view.expert_shards_wanted == len(client.load(pb.ROLE_EXPERT)) == 3
            told(doors.grpc, "scale", "experts=4")
            assert all(actor.node_id != node for actor in client.cluster().actors)
        refused = run("drain", "--node", home, "--target", doors.grpc)
        assert refused.returncode == 1
        assert "the controller and the gateway run there" in refused.stderr
    assert nothing_of_ours(ray_address)


@contextmanager
def load(client: Client, prompt: list[int], interval_s: float) -> Iterator[None]:
    """One short request after the other begun every ``interval_s``, whatever becomes of the others."""
    ended, requests = threading.Event(), []

    def pace() -> None:
        while not ended.wait(interval_s):
            requests.append(threading.Thread(target=client.tokens, args=(prompt, 8)))
            requests[-1].start()

    pacer = threading.Thread(target=pace)
    pacer.start()
    try:
        yield
    finally:
        ended.set()
        pacer.join()
        for request in requests:
            request.join()


def decisions(client: Client) -> list[str]:
    return [e.message for e in client.cluster().events if e.kind == pb.CLUSTER_EVENT_KIND_SCALING_DECIDED]


@pytest.mark.timeout(240)
def test_a_load_that_doubles_adds_a_shard_and_gives_it_back(ray_address: str, deepseek: tuple[Path, Any]) -> None:
    """2 prompt rows and 7 of decode, 4 experts each, in 2 layers: 72 pairs a request; 5 a second are 360 pairs/s."""
    keys = {
        "experts.autoscale.mode": "on",
        "experts.autoscale.minimum": 2,
        "experts.autoscale.maximum": 3,
        "experts.autoscale.target_busy": 0,
        "experts.autoscale.target_pairs_per_s": 240,
        "experts.autoscale.interval_s": 2.0,
        "experts.autoscale.cool_down_s": 4.0,
        "experts.autoscale.down_after_s": 6.0,
    }
    with running_cluster(distributed(ray_address, deepseek[0], **keys)) as doors, Client(doors.grpc) as client:
        assert len(client.tokens(PROMPTS[0], 8)) == 8
        with load(client, PROMPTS[0], 0.2):
            until(lambda: client.load(pb.ROLE_GATEWAY)[0].gateway.requests > 40)
            assert decisions(client) == []
            with load(client, PROMPTS[0], 0.2):
                until(lambda: client.cluster().expert_shards_wanted == 3, 60)
            until(lambda: client.cluster().expert_shards_wanted == 2, 60)
        first, last = decisions(client)
        assert first.startswith("scaling experts to 3: pairs/s ")
        assert last.startswith("scaling experts to 2: pairs/s ")
        until(lambda: kv_in_use(client) == 0)
    assert nothing_of_ours(ray_address)
