"""A controller that answers as a test wants it to."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from expertmesh.v1 import control_pb2 as pb

from cluster.fleet import ActorHandle, ActorUnreachable


class Controller(ActorHandle):
    """Its ``view``; None: it is unreachable."""

    name = "controller"

    def __init__(self, view: pb.GetClusterResponse | None) -> None:
        self.view = view
        self.asked = 0

    def begin(self, method: str, *args: Any) -> Future[Any]:
        """See ActorHandle."""
        assert (method, args) == ("view", ())
        self.asked += 1
        answer: Future[Any] = Future()
        if self.view is None:
            answer.set_exception(ActorUnreachable("controller has ended"))
        else:
            answer.set_result(self.view.SerializeToString())
        return answer


def view(**fields: Any) -> pb.GetClusterResponse:
    """Of a cluster with one expert shard."""
    made = pb.GetClusterResponse(**fields)
    shard = made.actors.add(name="expert-0", role=pb.ROLE_EXPERT, state=pb.ACTOR_STATE_READY)
    shard.expert.CopyFrom(pb.ExpertLoad(experts=4, rows=30))
    return made
