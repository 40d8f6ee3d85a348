"""A whole cluster with ``transport: nccl``, in this process and on the CPU: the communicators are the double's."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from expertmesh.v1 import control_pb2 as pb

from actors import groups
from actors.expert import ExpertShard
from actors.router import Router
from actors.transport.nccl_group import GroupPlan, NcclGroup
from cluster import gpus
from cluster.config import ServerConfig
from cluster.controller import Controller
from tests.chorus import singing
from tests.local_cluster import names, running
from tests.multiprocess.transport import nccl_double
from tests.multiprocess.transport.nccl_double import DoubleBackend
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, Reference, greedy
from tests.unit.serving.conftest import Actors
from tests.waiting import until

COUNT = 24
STREAMS = 6
PROMPTS = [random_ids(3 + 2 * n, seed=n, vocab=VOCABULARY) for n in range(STREAMS)]


@pytest.fixture(scope="module")
def wanted(checkpoint: tuple[Path, Any]) -> list[Reference]:
    return [greedy(checkpoint[1], prompt, COUNT) for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def over_the_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every process could use NCCL, and its communicators are the double's. No thread of a group is left behind."""
    monkeypatch.setattr(groups, "make_backend", lambda device: DoubleBackend())
    monkeypatch.setattr(gpus, "requirements_missing", list)
    yield
    gc.collect()  # the double frees its descriptors with its objects
    until(lambda: not [thread.name for thread in threading.enumerate() if thread.name.endswith("-watchdog")])


@pytest.fixture
def config(checkpoint: tuple[Path, Any], local: Callable[..., ServerConfig]) -> Callable[..., ServerConfig]:
    """A configuration that no file could ask for: nccl on the CPU."""

    def make(**overrides: Any) -> ServerConfig:
        return local(checkpoint[0], **overrides).model_copy(update={"transport": "nccl"})

    return make


def kill(controller: Controller, name: str) -> None:
    """As by kill -9: nobody is told farewell."""
    member = controller._roster.find(name)
    assert member is not None
    actor = member.handle.actor  # type: ignore[attr-defined]
    for joined in actor._groups._joined.values():
        joined.group.abort("killed")
    member.handle.end()  # type: ignore[attr-defined]


def maps(client: Client) -> int:
    """How many maps were brought into force."""
    kinds = [event.kind for event in client.cluster().events]
    return kinds.count(pb.CLUSTER_EVENT_KIND_MAP_COMMITTED)


def media(client: Client) -> dict[str, set[str]]:
    """By role of the actor and its peer's name without the number."""
    view = client.cluster()
    found: dict[str, set[str]] = {}
    for wire in view.wires:
        pair = f"{getattr(wire, 'from').split('-')[0]} {wire.to.split('-')[0]}"
        found.setdefault(pair, set()).add(wire.medium)
    return found


def test_the_tokens_are_those_of_the_reference(
    config: Callable[..., ServerConfig], wanted: list[Reference], actors: Actors
) -> None:
    with running(config(**{"attention.replicas": 2})) as (client, _):
        got = client.tokens_together(PROMPTS, COUNT)
        assert all(reference.agrees(tokens) for reference, tokens in zip(wanted, got, strict=True))
        found = media(client)
        assert found["router expert"] == {"nccl"}
        assert found["attention router"] == {"local"}
        routers = [router for router in actors.of(Router) if sum(router.stats().rows_per_shard.values())]
        assert routers
        for router in routers:
            group = router._data.routes.group
            assert group.plan.members == ("router-0", "router-1", "expert-0", "expert-1")
            assert group.pool.allocations > 0  # rows went as tensors, not in the announcements
    assert not in_groups(actors)


def in_groups(actors: Actors) -> list[str]:
    """Each actor with the epochs of the groups that it has not left."""
    return [f"{a.name} {e}" for a in (*actors.of(Router), *actors.of(ExpertShard)) for e in a._groups._joined]


def test_shards_and_routers_come_and_go_while_streams_run(
    config: Callable[..., ServerConfig], wanted: list[Reference], actors: Actors
) -> None:
    with running(config()) as (client, _), singing(client, PROMPTS, wanted) as chorus:
        assert client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=3)).expert_map_epoch == 2
        chorus.after(4 * STREAMS)
        client.control.ScaleAttention(pb.ScaleAttentionRequest(replicas=2))
        chorus.after(4 * STREAMS)
        client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=2))
        client.control.ScaleAttention(pb.ScaleAttentionRequest(replicas=1))
        chorus.after(4 * STREAMS)
        assert names(client, pb.ROLE_ROUTER) == ["router-0"]
        until(lambda: in_groups(actors) == ["router-0 5", "expert-0 5", "expert-1 5"])
        assert client.cluster().expert_map_epoch == 5


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_shard_that_dies_means_one_new_map_and_nobody_else_goes(
    config: Callable[..., ServerConfig], wanted: list[Reference], actors: Actors, replicas: int
) -> None:
    settings = config(**{"experts.shards": 3, "attention.replicas": replicas})
    with running(settings) as (client, controller), singing(client, PROMPTS, wanted) as chorus:
        before = maps(client)
        kill(controller, "expert-1")
        until(lambda: names(client, pb.ROLE_EXPERT) == ["expert-0", "expert-2", "expert-3"])
        chorus.after(8 * STREAMS)
        assert maps(client) == before + 1
        lost = [e.actor for e in client.cluster().events if e.kind == pb.CLUSTER_EVENT_KIND_ACTOR_LOST]
        assert lost == ["expert-1"]
        assert names(client, pb.ROLE_ROUTER) == [f"router-{n}" for n in range(replicas)]


def test_two_shards_that_die_at_once_mean_one_new_map(
    config: Callable[..., ServerConfig], wanted: list[Reference]
) -> None:
    with running(config(**{"experts.shards": 3})) as (client, controller), singing(client, PROMPTS, wanted) as chorus:
        before = maps(client)
        kill(controller, "expert-1")
        kill(controller, "expert-0")
        until(lambda: len({"expert-0", "expert-1", *names(client, pb.ROLE_EXPERT)}) == 5)
        chorus.after(8 * STREAMS)
        assert before < maps(client) <= before + 2


def test_a_router_that_dies_leaves_the_others_a_group(
    config: Callable[..., ServerConfig], wanted: list[Reference]
) -> None:
    settings = config(**{"attention.replicas": 2})
    with running(settings) as (client, controller), singing(client, PROMPTS, wanted) as chorus:
        kill(controller, "router-0")
        until(lambda: set(names(client, pb.ROLE_ROUTER)) == {"router-1", "router-2"})
        chorus.after(8 * STREAMS)
        assert names(client, pb.ROLE_EXPERT) == ["expert-0", "expert-1"]


def test_a_group_that_breaks_though_all_live_is_formed_anew(
    config: Callable[..., ServerConfig], wanted: list[Reference], actors: Actors
) -> None:
    with running(config()) as (client, _), singing(client, PROMPTS, wanted) as chorus:
        before = maps(client)
        (router,) = actors.of(Router)
        router._data.routes.group.abort("a link is broken")
        until(lambda: maps(client) == before + 1)
        chorus.after(8 * STREAMS)
        assert maps(client) == before + 1
        assert names(client, pb.ROLE_EXPERT) == ["expert-0", "expert-1"]


def test_a_group_that_cannot_form_leaves_the_old_map(
    config: Callable[..., ServerConfig], wanted: list[Reference], actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard cannot join: the others give up at once, not at the deadline of 300 s, and the next change works."""
    honest = ExpertShard.join
    plans: list[GroupPlan] = []
    before = set(threading.enumerate())

    def join(shard: ExpertShard, plan: GroupPlan, timeout_s: float) -> None:
        if shard.name == "expert-2":
            plans.append(plan)
            raise ValueError("no device")
        honest(shard, plan, timeout_s)

    monkeypatch.setattr(ExpertShard, "join", join)
    with running(config()) as (client, _), singing(client, PROMPTS, wanted) as chorus:
        with pytest.raises(grpc.RpcError):
            client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=3), timeout=30)
        assert client.cluster().expert_map_epoch == 1
        chorus.after(4 * STREAMS)
        monkeypatch.setattr(ExpertShard, "join", honest)
        assert len(client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=3), timeout=30).shards) == 3
        until(lambda: {text.split()[1] for text in in_groups(actors)} == {"3"})
    let_go(plans[0], before)


def let_go(plan: GroupPlan, before: set[threading.Thread]) -> None:
    """End the threads that still wait for the missing member, as they would wait in NCCL: everybody comes now."""
    for name in (plan.dispatch_id, plan.results_id, plan.rooms_id):
        with ExitStack() as stack:
            for rank in range(len(plan.members)):
                member = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                member.connect(nccl_double._named(name.decode()))
                member.sendall(nccl_double._JOIN.pack(rank, len(plan.members)))
    name = f"form-epoch-{plan.epoch}"
    until(lambda: not [thread for thread in set(threading.enumerate()) - before if thread.name == name])


def test_the_shares_of_a_batch_leave_together(
    config: Callable[..., ServerConfig], wanted: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[int] = []
    honest = NcclGroup._post_batch

    def post(group: NcclGroup) -> None:
        posted.append(len(group._batch))
        honest(group)

    monkeypatch.setattr(NcclGroup, "_post_batch", post)
    with running(config()) as (client, _):
        assert wanted[-1].agrees(client.tokens(PROMPTS[-1], COUNT))
    assert max(posted) == 2
