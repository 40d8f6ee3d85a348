"""What a long prompt does to running streams is measured, or it is said why not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from expertmesh.v1 import inference_pb2 as pb

from benchmarks.stall import Stall, StallError, measure_stall, summary
from tests.unit.benchmarks.scripted import scripted


async def answered(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
    """As many tokens as were asked for, one a millisecond."""
    for token in range(request.stopping.max_tokens):
        yield pb.GenerateResponse(token_ids=[token])
        await asyncio.sleep(0.001)


async def test_it_is_measured_with_streams_that_fill_the_context() -> None:
    asked = []

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        asked.append((len(request.token_ids.ids), request.stopping.max_tokens))
        async for message in answered(request, context):
            yield message

    async with scripted(script, context_length=5000) as target:
        stall = await measure_stall(target, 2, 64)
    assert sorted(asked) == [(4, 4996)] * 2 + [(64, 1)] * 3
    assert min(stall.usual, stall.ttft, stall.alone) > 0


async def test_the_longest_gap_without_the_prompt_stands_beside_the_one_with_it() -> None:
    """Streams hesitate while the prompt is computed, and for less long a while before."""
    prompts = 0

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal prompts
        prompts += len(request.token_ids.ids) == 64
        if len(request.token_ids.ids) == 64:
            await asyncio.sleep(0.3)
        for token in range(request.stopping.max_tokens):
            yield pb.GenerateResponse(token_ids=[token])
            await asyncio.sleep({60: 0.05}.get(token, 0.2 if prompts == 2 else 0.001))

    async with scripted(script, context_length=5000) as target:
        stall = await measure_stall(target, 1, 64)
    assert stall.usual < 0.05 <= stall.undisturbed < 0.2 <= stall.longest


def test_rounds_are_told_by_their_medians() -> None:
    rounds = [
        Stall(8, 1024, 0.1, 0.1 * quiet, 0.1 * gap, ttft, 1.0) for quiet, gap, ttft in [(1, 2, 9), (3, 8, 2), (2, 3, 1)]
    ]
    assert [str(one).count("2.00 x") for one in rounds] == [1, 1, 1]
    assert summary(rounds) == (
        "median of 3: longest gap 3.00 x the usual (without the prompt 2.00 x), first token after 2.00 x the time alone"
    )


async def test_a_stream_that_is_refused_ends_it_with_the_reason() -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if len(request.token_ids.ids) == 4:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        async for message in answered(request, context):
            yield message

    async with scripted(script) as target:
        with pytest.raises(StallError, match="ended after 0 tokens: RESOURCE_EXHAUSTED: the queue is full"):
            await measure_stall(target, 2, 64)


async def test_a_prompt_that_is_refused_does_too() -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too long")
        yield pb.GenerateResponse()

    async with scripted(script) as target:
        with pytest.raises(StallError, match="a prompt of 64 tokens: INVALID_ARGUMENT: too long"):
            await measure_stall(target, 1, 64)


@pytest.mark.parametrize("context_length", [20, 44])
async def test_streams_that_end_too_early_measure_nothing(context_length: int) -> None:
    """Before there are enough tokens for a usual gap, or while the prompt is computed."""
    prompts = 0

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal prompts
        prompts += len(request.token_ids.ids) == 64
        if prompts == 2:
            await asyncio.sleep(0.2)
        async for message in answered(request, context):
            yield message

    async with scripted(script, context_length) as target:
        with pytest.raises(StallError, match=f"ended after {context_length - 4} tokens: the context is full"):
            await measure_stall(target, 1, 64)
