"""Attention shards that do what a test tells them, and an event loop whose time passes only when nothing else can."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from actors.engine.request import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from actors.refusals import Refusal
from actors.transport.base import Address
from cluster.fleet import ActorHandle, ActorUnreachable
from cluster.gateway.peers import AttentionPeer
from cluster.gateway.streams import Streams
from cluster.gateway.validation import ValidRequest


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Sleeps take no time: the clock jumps to the next timer. Everybody waiting for nothing at all is an error."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 0.0
        self._look = self._selector.select
        self._selector.select = self._jump

    def time(self) -> float:
        return self._seconds

    def _jump(self, timeout: float | None) -> Any:
        if timeout is None:
            raise AssertionError("everything waits, and nothing will ever happen")
        self._seconds += timeout
        return self._look(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test in virtual time; no task but its own may be left when it ends."""

    async def whole() -> None:
        await test
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(whole())


async def settle() -> None:
    """Let everything happen that can happen now."""
    for _ in range(20):
        await asyncio.sleep(0)


class FakeShard(ActorHandle):
    """Answers submissions by ``answers`` in turn, then admits; None in ``answers`` admits, HANG never answers."""

    HANG = object()

    def __init__(self, streams: Streams, name: str) -> None:
        self.name = name
        self.jobs: list[GenerationRequest] = []
        self.submissions: list[int] = []
        self.times: list[float] = []
        self.aborted: list[str] = []
        self.answers: list[Any] = []
        self.pending: list[Future[Any]] = []
        self.peer = AttentionPeer(self, Address(name, "node"))
        self._streams = streams

    def begin(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if method == "abort":
            self.aborted.append(args[0])
            future.set_exception(ActorUnreachable("nobody waits for this"))
            return future
        assert method == "submit"
        (jobs,) = args
        assert isinstance(jobs, tuple)
        self.jobs += jobs
        self.submissions.append(len(jobs))
        self.times.append(asyncio.get_running_loop().time())
        answer = self.answers.pop(0) if self.answers else None
        if answer is self.HANG:
            self.pending.append(future)
        elif isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    def give(self, *tokens: int, job: int = -1, finish: FinishReason | None = None, message: str = "") -> None:
        """Send the next tokens of a submission (the latest) as a shard would, the end with the last of them."""
        request = self.jobs[job]
        self.send(request.request_id, len(request.generated_ids), *tokens, finish=finish, message=message)

    def send(
        self, engine_id: str, index: int, *tokens: int, finish: FinishReason | None = None, message: str = ""
    ) -> None:
        """Send tokens from an index on."""
        last = len(tokens) - 1
        events = [TokenEvent(engine_id, index + n, t, finish if n == last else None) for n, t in enumerate(tokens)]
        if not tokens:
            events = [TokenEvent(engine_id, index, None, finish, message)]
        self._streams.deliver(events)


def unavailable(retry_after_s: float = 1.0) -> Refusal:
    return Refusal(Refusal.UNAVAILABLE, "no router", retry_after_s=retry_after_s)


def request(
    request_id: str = "r",
    max_tokens: int = 8,
    stop_ids: frozenset[int] = frozenset(),
    seed: int = 5,
    n: int = 1,
    **fields: Any,
) -> ValidRequest:
    sampling = SamplingParams(seed=seed)
    return ValidRequest(request_id, (1, 2, 3), sampling, True, max_tokens, stop_ids, (), 0, n, **fields)
