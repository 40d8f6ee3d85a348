"""A load that is sent to a gateway, and what is seen of the cluster meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from expertmesh.v1 import inference_pb2 as pb

from benchmarks import open_loop
from benchmarks.arrivals import Arrival
from benchmarks.open_loop import Gateway, Run
from tests.unit.benchmarks.scripted import Script, scripted


async def short(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
    yield pb.GenerateResponse(started=pb.Started(cached_tokens=2))
    yield pb.GenerateResponse(token_ids=[1, 2])


async def stuck(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
    await asyncio.Event().wait()
    yield pb.GenerateResponse()


async def run(script: Script, looks: int = 10**9) -> Run:
    async with scripted(script, looks=looks) as target:
        gateway = Gateway(target)
        try:
            return await gateway.run([Arrival(0.05, (1, 2, 3), 2, batch) for batch in (False, True)])
        finally:
            await gateway.close()


async def test_tokens_and_the_kv_cache_are_noted() -> None:
    done = await run(short)
    assert [(len(one.token_at), one.cached, one.error) for one in done.served] == [(2, 2, "")] * 2
    assert {share for _, share in done.kv_use} == {0.6}
    assert done.seconds >= 0.05


async def test_an_error_is_noted_with_what_was_said() -> None:
    async def full(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        yield pb.GenerateResponse()

    done = await run(full)
    assert [(one.error, one.details) for one in done.served] == [("RESOURCE_EXHAUSTED", "the queue is full")] * 2


@pytest.mark.parametrize("looks", [0, 2])
async def test_a_cluster_that_cannot_be_looked_at_fails_the_run(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    """At once: these requests would never end."""
    monkeypatch.setattr(open_loop, "_LOOK_S", 0.01)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await run(stuck, looks)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
