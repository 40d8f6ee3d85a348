"""A cluster that changes while streams run: scaled, drained, rebalanced, and with parts that die. In one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import grpc
import pytest
from expertmesh.v1 import control_pb2 as pb

from actors.attention import AttentionShard
from actors.expert import ExpertShard
from actors.model.errors import CheckpointError
from actors.router import Router
from actors.transport.base import PeerGone
from cluster.attention_fleet import AttentionFleet
from cluster.config import ConfigError, ServerConfig
from cluster.controller import Controller
from cluster.local_fleet import LocalFleet
from placement.expert_map import ExpertMap
from tests.chorus import singing
from tests.local_cluster import answers, crash, names, running
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Reference, greedy, ids_request
from tests.waiting import until

Local = Callable[..., ServerConfig]
COUNT = 48
PROMPTS = [random_ids(3 + 2 * n, seed=n, vocab=VOCABULARY) for n in range(16)]


@pytest.fixture(scope="module")
def wanted(checkpoint: tuple[Path, Any]) -> list[Reference]:
    return [greedy(checkpoint[1], prompt, COUNT) for prompt in PROMPTS]


def test_16_streams_while_both_fleets_are_scaled(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference]
) -> None:
    with running(local(checkpoint[0])) as (client, _), singing(client, PROMPTS, wanted):
        up = client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=4))
        assert list(up.shards) == ["expert-0", "expert-1", "expert-2", "expert-3"]
        assert up.expert_map_epoch == 2
        more = client.control.ScaleAttention(pb.ScaleAttentionRequest(replicas=2))
        assert list(more.replicas) == ["attention-0", "attention-1"]
        down = client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=2))
        assert list(down.shards) == ["expert-0", "expert-1"]
        assert down.expert_map_epoch == 3
        fewer = client.control.ScaleAttention(pb.ScaleAttentionRequest(replicas=1))
        assert list(fewer.replicas) == ["attention-0"]
        assert names(client, pb.ROLE_EXPERT) == ["expert-0", "expert-1"]
        assert names(client, pb.ROLE_ROUTER) == ["router-0"]


@pytest.mark.parametrize("min_replicas", [1, 2])
def test_expert_shards_die_in_mid_stream(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference], min_replicas: int
) -> None:
    config = local(checkpoint[0], **{"experts.shards": 3, "experts.min_replicas": min_replicas})
    with running(config) as (client, controller), singing(client, PROMPTS, wanted):
        for epoch in (2, 3, 4):
            crash(controller, names(client, pb.ROLE_EXPERT)[0])
            until(lambda epoch=epoch: client.cluster().expert_map_epoch >= epoch)
        gone = [event for event in client.cluster().events if event.kind == pb.CLUSTER_EVENT_KIND_ACTOR_LOST]
        assert [event.actor for event in gone] == ["expert-0", "expert-1", "expert-2"]
    shards = names_after(controller)
    assert shards == []


@pytest.mark.parametrize("part", ["attention-0", "router-0"])
def test_a_replica_dies_in_mid_stream(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference], part: str
) -> None:
    """The only one: its streams wait for its successor and go on where they were."""
    with running(local(checkpoint[0])) as (client, controller), singing(client, PROMPTS, wanted):
        crash(controller, part)
        until(lambda: names(client, pb.ROLE_ATTENTION) == ["attention-1"])
        until(lambda: client.load(pb.ROLE_GATEWAY)[0].gateway.replays >= 16)


def test_a_change_that_waits_for_room_holds_no_repair_up(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, room, honest = threading.Event(), threading.Event(), LocalFleet.reserve

    def reserve(fleet: LocalFleet, requests: Any, *args: Any) -> Any:
        if len(requests) == 2:
            asked.set()
            assert room.wait(60)
        return honest(fleet, requests, *args)

    with running(local(checkpoint[0])) as (client, controller), singing(client, PROMPTS, wanted[:4]):
        monkeypatch.setattr(LocalFleet, "reserve", reserve)
        change = client.control.ScaleExperts.future(pb.ScaleExpertsRequest(shards=4))
        assert asked.wait(60)
        crash(controller, "expert-0")
        until(lambda: client.cluster().expert_map_epoch >= 2)
        crash(controller, "attention-0")
        until(lambda: len(names(client, pb.ROLE_ATTENTION)) == 1)
        room.set()
        assert len(change.result().shards) == 4
        assert "expert-0" not in change.result().shards


def test_a_failed_start_of_a_change_gives_its_room_back(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a new node the model is missing: nothing of the change is left."""
    with running(local(checkpoint[0])) as (client, controller):
        reserved = dict(controller._deployment._bundles)

        def settings(*_: Any) -> None:
            raise ConfigError("model: no such folder on that node")

        monkeypatch.setattr(controller._deployment, "settings", settings)
        for call in (
            lambda: client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=4)),
            lambda: client.control.ScaleAttention(pb.ScaleAttentionRequest(replicas=3)),
        ):
            code, text = refusal(call)
            assert code == grpc.StatusCode.FAILED_PRECONDITION
            assert "no such folder on that node" in text
        assert controller._deployment._bundles == reserved
        assert len(names_after(controller)) == 5


def test_a_router_that_is_late_does_not_mix_up_two_changes(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One router fails to prepare at once while the other is still preparing: the next change finds both in order."""
    release, honest, failed = threading.Event(), Router.prepare, threading.Event()

    def prepare(router: Router, expert_map: ExpertMap, *args: Any) -> None:
        if expert_map.epoch > 1 and not release.is_set():
            if router.name == "router-0":
                failed.set()
                raise PeerGone("no way")
            assert release.wait(60)
        honest(router, expert_map, *args)

    config = local(checkpoint[0], **{"attention.replicas": 2})
    with running(config) as (client, _), singing(client, PROMPTS, wanted[:4]):
        monkeypatch.setattr(Router, "prepare", prepare)
        first = client.control.ScaleExperts.future(pb.ScaleExpertsRequest(shards=3))
        assert failed.wait(60)
        second = client.control.ScaleExperts.future(pb.ScaleExpertsRequest(shards=4))
        release.set()
        assert first.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert len(second.result().shards) == 4
        epochs = {actor.router.expert_map_epoch for actor in client.load(pb.ROLE_ROUTER)}
        assert epochs == {second.result().expert_map_epoch}


def test_what_can_be_repaired_is_while_something_else_cannot(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No expert shard can start, which its replicas bear; an attention shard that dies meanwhile is replaced."""
    config = local(checkpoint[0], **{"experts.shards": 3, "experts.min_replicas": 2})
    with running(config) as (client, controller), singing(client, PROMPTS, wanted[:4]):
        monkeypatch.setattr(ExpertShard, "listen", lambda _: 1 / 0)
        crash(controller, "expert-0")
        until(lambda: any(e.kind == pb.CLUSTER_EVENT_KIND_FAILED for e in client.cluster().events))
        crash(controller, "attention-0")
        until(lambda: names(client, pb.ROLE_ATTENTION) == ["attention-1"])
        until(lambda: names(client, pb.ROLE_EXPERT) == ["expert-1", "expert-2"])  # between two attempts
        more = client.control.ScaleAttention(pb.ScaleAttentionRequest(replicas=2))
        assert list(more.replicas) == ["attention-1", "attention-2"]
        down = client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=2))  # the dead one is not missed any more
        assert list(down.shards) == ["expert-1", "expert-2"]


def test_scaling_while_a_replica_is_being_replaced_counts_it_once(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor serves already, and its vacancy is not struck off yet."""
    with running(local(checkpoint[0])) as (client, controller), ThreadPoolExecutor(1) as pool:
        added, asked = threading.Event(), threading.Event()
        honest = AttentionFleet.add

        def add(fleet: AttentionFleet, *arguments: Any) -> Any:
            replicas = honest(fleet, *arguments)
            added.set()
            asked.wait(20)
            return replicas

        monkeypatch.setattr(AttentionFleet, "add", add)
        crash(controller, "attention-0")
        assert added.wait(20)
        more = pool.submit(client.control.ScaleAttention, pb.ScaleAttentionRequest(replicas=2))
        wait([more], 0.3)  # it must not have counted yet
        asked.set()
        assert list(more.result(20).replicas) == ["attention-1", "attention-2"]


def test_scaling_while_a_replica_is_missing_counts_it(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(local(checkpoint[0], **{"attention.replicas": 2})) as (client, controller):
        honest = AttentionShard.load
        monkeypatch.setattr(AttentionShard, "load", lambda _: 1 / 0)
        crash(controller, "attention-0")
        until(lambda: any(e.kind == pb.CLUSTER_EVENT_KIND_FAILED for e in client.cluster().events))
        assert client.cluster().attention_replicas_wanted == 2
        down = client.control.ScaleAttention(pb.ScaleAttentionRequest(replicas=1))
        assert list(down.replicas) == ["attention-1"]
        monkeypatch.setattr(AttentionShard, "load", honest)
        up = client.control.ScaleAttention(pb.ScaleAttentionRequest(replicas=2))
        assert len(up.replicas) == 2
        assert len(names(client, pb.ROLE_ATTENTION)) == 2


def test_a_spare_takes_the_place_of_a_dead_shard(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference]
) -> None:
    with (
        running(local(checkpoint[0], **{"experts.spares": 1})) as (client, controller),
        singing(client, PROMPTS, wanted[:2]),
    ):
        until(lambda: names(client, pb.ROLE_EXPERT) == ["expert-0", "expert-1", "expert-2"])
        held = [actor.expert.experts for actor in client.load(pb.ROLE_EXPERT)]
        assert held == [16, 16, 0]
        crash(controller, "expert-0")
        until(lambda: names(client, pb.ROLE_EXPERT) == ["expert-1", "expert-2", "expert-3"])
        assert [actor.expert.experts for actor in client.load(pb.ROLE_EXPERT)] == [16, 16, 0]
        crash(controller, "expert-3")  # the spare itself
        until(lambda: names(client, pb.ROLE_EXPERT) == ["expert-1", "expert-2", "expert-4"])
        crash(controller, "expert-1")
        until(lambda: names(client, pb.ROLE_EXPERT) == ["expert-2", "expert-4", "expert-5"])
        assert client.cluster().expert_shards_wanted == 2


def names_after(controller: Controller) -> list[str]:
    """Who is still on duty once the cluster was stopped."""
    return [member.name for member in controller._roster.all()]


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_what_cannot_be_is_refused_by_field_and_changes_nothing(checkpoint: tuple[Path, Any], local: Local) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    with running(local(checkpoint[0])) as (client, _):
        control, before = client.control, client.cluster().actors
        for shards in (0, 17):
            assert refusal(lambda shards=shards: control.ScaleExperts(pb.ScaleExpertsRequest(shards=shards))) == (
                invalid,
                f"shards: {shards}; allowed are 1 to 16",
            )
        code, text = refusal(lambda: control.ScaleAttention(pb.ScaleAttentionRequest()))
        assert (code, text) == (invalid, "replicas: 0; allowed are 1 to 1024")
        code, text = refusal(lambda: control.Drain(pb.DrainRequest()))
        assert code == invalid
        assert text.startswith("target: ")
        code, text = refusal(lambda: control.Drain(pb.DrainRequest(actor="router-0")))
        assert code == invalid
        assert "there are expert-0, expert-1, attention-0" in text
        code, text = refusal(lambda: control.Drain(pb.DrainRequest(actor="attention-0")))
        assert (code, text) == (invalid, "actor: attention-0 is the last attention shard; scale up first")
        code, text = refusal(lambda: control.Drain(pb.DrainRequest(node="nowhere")))
        assert code == invalid
        code, text = refusal(lambda: control.Drain(pb.DrainRequest(node="loc")))
        assert (code, text.split(":")[:2]) == (invalid, ["node", " local"])
        assert [actor.name for actor in client.cluster().actors] == [actor.name for actor in before]
        assert client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=3)).shards  # the node is not cordoned


def test_more_changes_than_can_wait_are_refused_and_looking_goes_on(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release, honest = threading.Event(), threading.Event(), ExpertShard.load

    def load(shard: ExpertShard, epoch: int, experts: Any) -> int:
        begun.set()
        assert release.wait(60)
        return honest(shard, epoch, experts)

    with running(local(checkpoint[0])) as (client, _):
        monkeypatch.setattr(ExpertShard, "load", load)
        changes = [client.control.ScaleExperts.future(pb.ScaleExpertsRequest(shards=3 + n % 2)) for n in range(9)]
        assert begun.wait(60)
        until(lambda: sum(change.done() for change in changes) == 5)
        refused = [change.code() for change in changes if change.done()]
        assert refused == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 5
        assert client.cluster().expert_map_epoch == 1
        release.set()
        assert sum(change.exception() is None for change in changes) == 4


def test_a_shard_is_drained_and_not_replaced(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference]
) -> None:
    config = local(checkpoint[0], **{"experts.shards": 3, "attention.replicas": 2})
    with running(config) as (client, _), singing(client, PROMPTS, wanted[:4]):
        done = client.control.Drain(pb.DrainRequest(actor="expert-1"))
        assert (list(done.stopped), list(done.started)) == (["expert-1"], [])
        done = client.control.Drain(pb.DrainRequest(actor="attention-0"))
        assert list(done.stopped) == ["attention-0", "router-0"]
        assert names(client, pb.ROLE_EXPERT) == ["expert-0", "expert-2"]
        view = client.cluster()
        assert (view.attention_replicas_wanted, view.expert_shards_wanted) == (1, 2)


def test_rebalancing_follows_the_counted_load(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference]
) -> None:
    """One prompt over and over loads few experts: the map is spread anew, or left alone when that is not worth it."""
    with running(local(checkpoint[0], **{"experts.shards": 4})) as (client, controller):
        assert wanted[0].agrees(client.tokens(PROMPTS[0], COUNT))
        assert controller._experts is not None
        done = client.control.Rebalance(pb.RebalanceRequest())
        assert done.imbalance_after <= done.imbalance_before
        assert (done.experts_read > 0) == (done.expert_map_epoch > 1)
        assert wanted[0].agrees(client.tokens(PROMPTS[0], COUNT))
        request = pb.GetClusterRequest(include_experts=True)
        layers = client.control.GetCluster(request).layers
        assert [layer.layer for layer in layers] == [1, 2]
        shards = {name for layer in layers for expert in layer.experts for name in expert.shards}
        assert shards == set(names(client, pb.ROLE_EXPERT))
        rows = sum(expert.rows for layer in layers for expert in layer.experts)
        assert rows == sum(actor.expert.pairs for actor in client.load(pb.ROLE_EXPERT))


def test_a_change_that_fails_half_way_leaves_everything_as_it_was(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new shards cannot read their weights: they go again, the old map stays, streams notice nothing."""
    honest = ExpertShard.load

    def load(shard: ExpertShard, epoch: int, experts: Any) -> int:
        if shard.name == "expert-3":
            raise CheckpointError("model.safetensors: gone")
        return honest(shard, epoch, experts)

    monkeypatch.setattr(ExpertShard, "load", load)
    with running(local(checkpoint[0])) as (client, _), singing(client, PROMPTS, wanted[:4]):
        code, text = refusal(lambda: client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=4)))
        assert (code, text) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "scaling experts to 4 failed: model.safetensors: gone",
        )
        assert client.cluster().events[-1].message == text
        assert names(client, pb.ROLE_EXPERT) == ["expert-0", "expert-1"]
        assert client.cluster().expert_map_epoch == 1
        until(lambda: [actor.expert.experts for actor in client.load(pb.ROLE_EXPERT)] == [16, 16])
        monkeypatch.setattr(ExpertShard, "load", honest)
        assert len(client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=4)).shards) == 4


def test_what_cannot_be_replaced_ends_its_streams_with_unavailable(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No expert is ever left out: streams end with a typed error and a hint; once it works again, all is well."""
    honest, tried = ExpertShard.load, threading.Semaphore(0)

    def load(shard: ExpertShard, epoch: int, experts: Any) -> int:
        tried.release()
        raise CheckpointError("model.safetensors: gone")

    config = local(checkpoint[0], step_timeout_s=0.5, recovery_timeout_s=0.5)
    with running(config) as (client, controller):
        monkeypatch.setattr(ExpertShard, "load", load)
        call = client.inference.Generate(ids_request(PROMPTS[0], 400))
        next(call)
        crash(controller, "expert-1")
        code, text = refusal(lambda: list(call))
        assert (code, text) == (grpc.StatusCode.UNAVAILABLE, "shards down; retry in 1 s")
        for _ in range(2):
            assert tried.acquire(timeout=30)  # it is tried again and again
        failed = [e.message for e in client.cluster().events if e.kind == pb.CLUSTER_EVENT_KIND_FAILED]
        assert "a repair failed and will be tried again: CheckpointError: model.safetensors: gone" in failed
        monkeypatch.setattr(ExpertShard, "load", honest)
        until(lambda: answers(client))
        assert wanted[0].agrees(client.tokens(PROMPTS[0], COUNT))


def test_a_wire_that_breaks_between_living_ends_is_made_anew(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference]
) -> None:
    """The router reports the loss, the shard answers: it is connected again, not replaced."""
    with running(local(checkpoint[0])) as (client, controller), singing(client, PROMPTS, wanted[:4]):
        router = controller._roster.find("router-0")
        assert router is not None
        router.handle.actor._data.routes.wires["expert-1"].close()  # type: ignore[attr-defined]
        until(lambda: client.cluster().expert_map_epoch >= 2)
        assert names(client, pb.ROLE_EXPERT) == ["expert-0", "expert-1"]


def test_an_attention_shard_that_its_gateway_lost_is_replaced(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference]
) -> None:
    with running(local(checkpoint[0])) as (client, controller), singing(client, PROMPTS, wanted[:4]):
        gateway = controller._roster.find("gateway-0")
        assert gateway is not None
        gateway.handle.actor._wires["attention-0"].close()  # type: ignore[attr-defined]
        until(lambda: names(client, pb.ROLE_ATTENTION) == ["attention-1"])


def test_watching_tells_what_happens(checkpoint: tuple[Path, Any], local: Local) -> None:
    with running(local(checkpoint[0])) as (client, _):
        watchers = [client.control.WatchCluster(pb.WatchClusterRequest()) for _ in range(2)]
        client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=3))
        for watcher in watchers:
            wires, *seen = [next(watcher).event for _ in range(8)]
            assert wires.kind == pb.CLUSTER_EVENT_KIND_WIRES_CHOSEN
            assert [e.sequence for e in seen] == [2, 3, 4, 5, 6, 7, 8]
            assert [e.actor for e in seen[:5]] == ["gateway-0", "expert-0", "expert-1", "router-0", "attention-0"]
            assert seen[5].message == "expert-2 is being started"
            event = seen[6]
            assert event.kind == pb.CLUSTER_EVENT_KIND_MAP_COMMITTED
            assert "expert map 2 is in force on expert-0, expert-1, expert-2" in event.message
        later = client.control.WatchCluster(pb.WatchClusterRequest(after=event.sequence))
        client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=2))
        kinds = [next(later).event.kind for _ in range(2)]
        assert kinds == [pb.CLUSTER_EVENT_KIND_MAP_COMMITTED, pb.CLUSTER_EVENT_KIND_ACTOR_STOPPED]
        for _ in range(40):  # each leaves at once: no question to the controller stays behind for it
            brief = client.control.WatchCluster(pb.WatchClusterRequest())
            next(brief)
            brief.cancel()
        assert client.cluster().expert_map_epoch == 3
        for watcher in (*watchers, later):
            watcher.cancel()
