"""What a failed call means, and what people are told of it."""

from __future__ import annotations

import grpc
import pytest

from cluster.batch.gateway import Failure, Gateway, judge
from cluster.gateway import errors
from tests.unit.batch.scripted import bare, lost, refusal


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (lost(), Failure.LOST),
        (refusal(errors.Unavailable("SHARDS_DOWN", 1.0)), Failure.AWAY),
        (refusal(errors.Overloaded("QUEUE_FULL", 1.0)), Failure.BUSY),
        (refusal(errors.InvalidRequest("prompt", "is bad")), Failure.ROW),
        (refusal(errors.UnknownModel("other", "tiny")), Failure.ROW),
        (refusal(errors.FailedPrecondition("no", "NO_TEMPLATE")), Failure.ROW),
        (refusal(errors.Internal("x")), Failure.ATTEMPT),
        (refusal(errors.DeadlineExceeded()), Failure.ATTEMPT),
        (refusal(errors.PermissionDenied("ADMIN_NEEDED", "no")), Failure.CALLER),
        (bare(grpc.StatusCode.UNAUTHENTICATED), Failure.CALLER),
        (bare(grpc.StatusCode.UNIMPLEMENTED), Failure.ATTEMPT),
        (bare(grpc.StatusCode.INVALID_ARGUMENT), Failure.ATTEMPT),
        (bare(grpc.StatusCode.RESOURCE_EXHAUSTED), Failure.ATTEMPT),
        (bare(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)"), Failure.ROW),
    ],
)
def test_what_it_means(error: grpc.RpcError, failure: Failure) -> None:
    assert judge(error) == failure


async def test_only_the_short_questions_have_a_deadline() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        gateway = Gateway(channel, "", lambda error: f"told: {error.code().name}")
        late = bare(grpc.StatusCode.DEADLINE_EXCEEDED)
        assert gateway.explain(late) == "told: DEADLINE_EXCEEDED"
        assert gateway.unanswered(late) == "the gateway does not answer within 10 s"
        assert gateway.unanswered(lost()) == "told: UNAVAILABLE"
