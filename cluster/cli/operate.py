"""``expertmesh scale``, ``rebalance``, ``drain`` and ``watch``: an operator's commands to a running cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.control_pb2_grpc import ControlStub
from rich.console import Console

from cluster.cli.client import explain, open_channel
from cluster.cli.connection import Connection
from cluster.cli.terminal import complain

_FLEETS = ("experts", "attention")


def run_scale(connection: Connection, wanted: list[str]) -> int:
    """Carry out each ``FLEET=N``; the exit status."""
    try:
        numbers = [_parse(text) for text in wanted]
    except ValueError as error:
        return complain(str(error))
    return _operate(connection, lambda stub: _scale_all(stub, numbers))


def run_rebalance(connection: Connection) -> int:
    """Spread the experts anew; the exit status."""
    return _operate(connection, _rebalance)


def run_drain(connection: Connection, actor: str | None, node: str | None, undo: bool) -> int:
    """Take an actor, or everything on a node, out of service, or let a node be used again; the exit status."""
    if undo:
        if node is None or actor is not None:
            return complain("--undo goes with --node ID alone")
        return _operate(connection, lambda stub: _undo(stub, pb.DrainRequest(node=node, undo=True)))
    if (actor is None) == (node is None):
        return complain("name either one shard (expert-0, attention-1) or one node (--node ID)")
    request = pb.DrainRequest(actor=actor) if actor is not None else pb.DrainRequest(node=node)
    return _operate(connection, lambda stub: _drain(stub, request))


def run_watch(connection: Connection) -> int:
    """Print events until Ctrl-C; the exit status."""
    with open_channel(connection) as channel:
        call = ControlStub(channel).WatchCluster(pb.WatchClusterRequest())
        try:
            for response in call:
                print(event_line(response.event), flush=True)
        except grpc.RpcError as error:
            return complain(explain(error, connection))
        except KeyboardInterrupt:
            call.cancel()
        return 0


def event_line(event: pb.ClusterEvent) -> str:
    """One event for people."""
    return f"{event.time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC  {event.message}"


def _scale_all(stub: ControlStub, numbers: list[tuple[str, int]]) -> None:
    for fleet, count in numbers:
        _scale(stub, fleet, count)


def _scale(stub: ControlStub, fleet: str, count: int) -> None:
    with _working(f"scaling {fleet} to {count}"):
        if fleet == "experts":
            done = stub.ScaleExperts(pb.ScaleExpertsRequest(shards=count))
            read = f"; expert map {done.expert_map_epoch}, {done.experts_read} experts were read"
            names = list(done.shards)
        else:
            names, read = list(stub.ScaleAttention(pb.ScaleAttentionRequest(replicas=count)).replicas), ""
    kind = "expert" if fleet == "experts" else "attention"
    print(f"{len(names)} {kind} shard{'s' if len(names) > 1 else ''}: {', '.join(names)}{read}")


def _rebalance(stub: ControlStub) -> None:
    with _working("rebalancing"):
        done = stub.Rebalance(pb.RebalanceRequest())
    if done.experts_read:
        change = f"{done.imbalance_before:.2f} → {done.imbalance_after:.2f} (busiest shard over the mean)"
        print(f"{done.experts_read} experts were read; imbalance {change}; expert map {done.expert_map_epoch}")
    else:
        print(f"left alone: imbalance {done.imbalance_before:.2f} (busiest shard over the mean) is near the best")


def _drain(stub: ControlStub, request: pb.DrainRequest) -> None:
    with _working(f"draining {request.actor or request.node}"):
        done = stub.Drain(request)
    print(f"stopped: {', '.join(done.stopped) or 'nothing ran there'}")
    if done.started:
        print(f"started for them: {', '.join(done.started)}")


def _undo(stub: ControlStub, request: pb.DrainRequest) -> None:
    stub.Drain(request)
    print(f"{request.node} may be used again")


def _operate(connection: Connection, work: Callable[[ControlStub], None]) -> int:
    with open_channel(connection) as channel:
        try:
            work(ControlStub(channel))
        except grpc.RpcError as error:
            return complain(explain(error, connection))
        except KeyboardInterrupt:
            print("not waiting any longer; the change goes on (see `expertmesh watch`)", file=sys.stderr)
            return 130
    return 0


@contextmanager
def _working(text: str) -> Iterator[None]:
    """Says that something is being done, on a terminal."""
    with Console(stderr=True).status(text):
        yield


def _parse(text: str) -> tuple[str, int]:
    fleet, _, number = text.partition("=")
    if fleet not in _FLEETS or not number.isascii() or not number.isdigit():
        raise ValueError(f"{text!r}: write FLEET=N with a whole number, FLEET one of {', '.join(_FLEETS)}")
    if not 1 <= int(number) < 2**32:
        raise ValueError(f"{text!r}: the number must be at least 1, and below 2^32")
    return fleet, int(number)
