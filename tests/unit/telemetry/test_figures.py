"""Figures of the data plane: from views of the cluster to points of metrics."""

from __future__ import annotations

from typing import Any

import pytest
from expertmesh.v1 import control_pb2 as pb

from cluster.telemetry.figures import METRICS, ClusterFigures, Figures


class Cluster:
    """A view, piece by piece."""

    def __init__(self, **fields: Any) -> None:
        self.view = pb.GetClusterResponse(**fields)

    def add(self, name: str, role: Any, load: Any = None, state: Any = pb.ACTOR_STATE_READY) -> Cluster:
        """One more actor."""
        actor = self.view.actors.add(name=name, role=role, state=state)
        if load is not None:
            getattr(actor, pb.Role.Name(role).removeprefix("ROLE_").lower()).CopyFrom(load)
        return self

    def expert(self, name: str, **load: Any) -> Cluster:
        """One more expert shard, with experts unless told otherwise."""
        return self.add(name, pb.ROLE_EXPERT, pb.ExpertLoad(**{"experts": 4, **load}))

    def attention(self, name: str, **load: Any) -> Cluster:
        """One more attention shard."""
        return self.add(name, pb.ROLE_ATTENTION, pb.AttentionLoad(**load))

    def sender(self, name: str, role: Any, **sent: int) -> Cluster:
        """One more actor, which sent so many bytes by each medium."""
        self.add(name, role)
        self.view.actors[-1].bytes_sent.update(sent)
        return self


def points(figures: Figures, name: str) -> dict[tuple[str, ...], float]:
    """Values by their labels' values."""
    found = {tuple(labels.values()): value for value, labels in figures.get(name, [])}
    assert len(found) == len(figures.get(name, []))
    return found


def test_attention_time_a_batch_is_without_waiting_and_since_the_last_look() -> None:
    look = ClusterFigures()
    first = look.of(Cluster().attention("attention-0", busy_s=10, experts_wait_s=6, moe_batches=8).view)
    second = look.of(Cluster().attention("attention-0", busy_s=13, experts_wait_s=8, moe_batches=10).view)
    idle = look.of(Cluster().attention("attention-0", busy_s=13, experts_wait_s=8, moe_batches=10).view)

    assert points(first, "expertmesh.attention.batch.duration") == {("attention-0",): pytest.approx(0.5)}
    assert points(second, "expertmesh.attention.batch.duration") == {("attention-0",): pytest.approx(0.5)}
    assert points(idle, "expertmesh.attention.batch.duration") == {}
    assert points(idle, "expertmesh.attention.busy") == {("attention-0",): 13}
    assert points(idle, "expertmesh.attention.experts_wait") == {("attention-0",): 8}


def test_expert_time_a_batch_is_since_the_last_look() -> None:
    look = ClusterFigures()
    look.of(Cluster().expert("expert-0", busy_s=100, batches=10).view)
    figures = look.of(Cluster().expert("expert-0", busy_s=101, batches=14).expert("expert-1", busy_s=3, batches=6).view)

    assert points(figures, "expertmesh.expert.batch.duration") == {("expert-0",): 0.25, ("expert-1",): 0.5}


def test_a_shard_that_did_not_answer_once_is_compared_with_its_last_answer() -> None:
    look = ClusterFigures()
    look.of(Cluster().expert("expert-0", busy_s=100, batches=10).view)
    silent = look.of(Cluster().add("expert-0", pb.ROLE_EXPERT, state=pb.ACTOR_STATE_UNREACHABLE).view)
    figures = look.of(Cluster().expert("expert-0", busy_s=101, batches=14).view)

    assert points(silent, "expertmesh.expert.rows") == {}
    assert points(silent, "expertmesh.actors")["expert", "unreachable"] == 1
    assert points(figures, "expertmesh.expert.batch.duration") == {("expert-0",): 0.25}


def test_imbalance_is_the_busiest_over_the_mean_of_shards_that_hold_experts() -> None:
    look = ClusterFigures()
    look.of(Cluster().expert("a", rows=100).expert("b", rows=100).expert("spare", experts=0).view)
    figures = look.of(Cluster().expert("a", rows=130).expert("b", rows=110).expert("spare", experts=0).view)
    idle = look.of(Cluster().expert("a", rows=130).expert("b", rows=110).view)

    assert points(figures, "expertmesh.expert.imbalance") == {("lately",): 1.5, ("total",): pytest.approx(130 / 120)}
    assert points(idle, "expertmesh.expert.imbalance").keys() == {("total",)}


def test_bytes_are_each_actors_own_count_whatever_was_seen_before() -> None:
    """Not one that did not answer once, nor another one that is gone, changes anything for those that are there."""
    look, name = ClusterFigures(), "expertmesh.wire.sent"
    both = Cluster().sender("router-0", pb.ROLE_ROUTER, shm=1000, tcp=5).sender("expert-0", pb.ROLE_EXPERT, tcp=70)
    silent = Cluster().add("router-0", pb.ROLE_ROUTER, state=pb.ACTOR_STATE_UNREACHABLE)
    back = Cluster().sender("router-0", pb.ROLE_ROUTER, shm=1010, tcp=5)

    wanted = {("router-0", "shm"): 1000, ("router-0", "tcp"): 5, ("expert-0", "tcp"): 70}
    assert points(look.of(both.view), name) == wanted
    assert points(look.of(silent.view), name) == {}
    assert points(look.of(back.view), name) == {("router-0", "shm"): 1010, ("router-0", "tcp"): 5}


def test_everything_else_is_taken_over_as_it_is() -> None:
    view = (
        Cluster(expert_map_epoch=7, expert_shards_wanted=3, attention_replicas_wanted=2)
        .attention(
            "attention-0",
            running=5,
            waiting=2,
            kv_blocks=40,
            kv_blocks_free=10,
            kv_blocks_cached=7,
            kv_blocks_shared=4,
            prefix_queried_tokens=900,
            prefix_hit_tokens=600,
            preemptions=1,
            micro_batches=2,
            steps=11,
            tokens=99,
            moe_batches=22,
        )
        .add(
            "router-0",
            pb.ROLE_ROUTER,
            pb.RouterLoad(batches=22, dispatch_s=2.5, combine_s=0.5, reroutes=1, longest_wait_s=0.75),
        )
        .expert("expert-0", rows=30, pairs=60, batches=20, busy_s=1.5, experts=16)
        .add("gateway-0", pb.ROLE_GATEWAY)
        .add("controller", pb.ROLE_CONTROLLER)
    ).view
    figures = ClusterFigures().of(view)

    assert points(figures, "expertmesh.expert_map.epoch") == {(): 7}
    assert points(figures, "expertmesh.shards.wanted") == {("expert",): 3, ("attention",): 2}
    there = points(figures, "expertmesh.actors")
    assert {role for (role, state), count in there.items() if state == "ready" and count == 1} == {
        "controller",
        "gateway",
        "attention",
        "router",
        "expert",
    }
    assert points(figures, "expertmesh.attention.requests") == {
        ("attention-0", "running"): 5,
        ("attention-0", "waiting"): 2,
    }
    assert points(figures, "expertmesh.attention.kv_blocks") == {
        ("attention-0", "used"): 30,
        ("attention-0", "cached"): 7,
        ("attention-0", "free"): 3,
    }
    singles = {
        "attention.kv_blocks.shared": 4,
        "attention.prefix_cache.queried": 900,
        "attention.prefix_cache.hit": 600,
        "attention.preemptions": 1,
        "attention.micro_batches": 2,
        "attention.steps": 11,
        "attention.tokens": 99,
        "attention.moe_batches": 22,
        "router.batches": 22,
        "router.dispatch": 2.5,
        "router.combine": 0.5,
        "router.reroutes": 1,
        "router.longest_wait": 0.75,
        "expert.experts": 16,
        "expert.rows": 30,
        "expert.pairs": 60,
        "expert.batches": 20,
        "expert.busy": 1.5,
    }
    for name, value in singles.items():
        actor = f"{name.split('.')[0]}-0"
        assert points(figures, f"expertmesh.{name}") == {(actor,): value}, name
    assert figures.keys() <= {metric.name for metric in METRICS}
