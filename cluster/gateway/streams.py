"""All open streams: which runs on which attention shard, how its tokens find the call that waits for them, and how it
goes on elsewhere when its shard is lost. A request has a stream for each of its answers (``group.py``).

A stream that was admitted is never refused afterwards. When its shard's wire ends, when the shard ends it with
UNAVAILABLE, or when the shard retires, the stream is *adrift*; the call that waits for its tokens then submits it
anew: prompt and tokens so far, under a fresh engine id. Draws are keyed by seed, choice and index, so the tokens that
follow are those that would have followed. No task works for a stream but its own call's: nothing is left when that
ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from actors.engine.request import FinishReason, TokenEvent
from actors.log_fields import fields, trace_ids
from actors.refusals import Refusal
from cluster.access import Caller
from cluster.fleet import ActorUnreachable
from cluster.gateway.errors import (
    DRAINING,
    QUEUE_FULL,
    RETRY_S,
    SHARDS_DOWN,
    Conflict,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    ServiceError,
    Unavailable,
)
from cluster.gateway.group import StreamGroup
from cluster.gateway.notice import Notice
from cluster.gateway.peers import AttentionPeer, OnlyShard, Peers
from cluster.gateway.stream import UNWATCHED, Run, Stream, Watch
from cluster.gateway.validation import ValidRequest

log = logging.getLogger(__name__)


class Streams:
    """The streams of one gateway. Everything runs in the gateway's event loop.

    ``recovery_timeout_s``: so long an admitted stream that lost its shard goes on without a new token.
    """

    def __init__(self, gateway: str, recovery_timeout_s: float) -> None:
        self._gateway = gateway
        self._recovery_timeout_s = recovery_timeout_s
        self._changed = Notice()
        self._peers = Peers(self._changed)
        self._open: set[StreamGroup] = set()
        self._by_client: dict[tuple[str, str], StreamGroup] = {}
        self._runs: dict[str, Run] = {}
        self._numbers = itertools.count()
        self._draining = False
        self.replays = 0
        """Times that a shard took over a stream, since the start."""

    def __len__(self) -> int:
        """Of requests, however many answers each has."""
        return len(self._open)

    # -- the shards -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """True while some attention shard is connected whose last step could be computed."""
        return self._peers.ready

    async def readiness_changed(self, known: bool) -> None:
        """Return when ``ready`` is not ``known`` any more."""
        while self.ready == known:
            await self._changed.wait()

    def check_new_peer(self, name: str) -> None:
        """ValueError for a shard that is or was here. From any thread."""
        self._peers.check_new(name)

    async def add_peer(self, peer: AttentionPeer) -> None:
        """A shard whose wire is up: requests may go there. ValueError for a name that was used before."""
        self._peers.add(peer)

    def lose_peer(self, name: str) -> None:
        """A shard's wire is gone: nothing new goes there, and its streams go elsewhere. Idempotent."""
        self._peers.remove(name)
        for run in self._runs_on(name):
            self._leave(run)

    async def retire_peer(self, name: str, timeout_s: float) -> int:
        """Nothing new goes to a shard; its streams may end within ``timeout_s``, then they have to go elsewhere.

        Returns how many had to. ValueError for a shard that never was here. OnlyShard when streams are left and there
        is no other shard: then everything is as before.
        """
        if not self._peers.retire(name):
            return 0
        until = _now() + timeout_s
        while self._runs_on(name) and _now() < until:
            await self._changed.wait(until)
        left = self._runs_on(name)
        if left and not self._peers.open_names:
            self._peers.reopen(name)
            raise OnlyShard(f"attention shard {name!r} stays: no other could take its {len(left)} streams")
        for run in left:
            self._abort_engine(run)
            self._leave(run)
        self._peers.remove(name)
        return len(left)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests; return when the running ones are done. Those that are left after ``timeout_s`` end with
        UNAVAILABLE: their clients may go on elsewhere."""
        self._draining = True
        until = _now() + timeout_s
        while self._open and _now() < until:
            await self._changed.wait(until)
        for group in self._open:
            for stream in group.streams:
                self._quit(stream)
            group.fail(Unavailable(DRAINING))

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Hand the events of one step to their streams; those of runs that are over are dropped."""
        for event in events:
            run = self._runs.get(event.request_id)
            if run is not None:
                self._take(run, event)

    # -- the calls ------------------------------------------------------------------------------------------------

    async def open(
        self, request: ValidRequest, timeout_s: float | None, caller: Caller, watch: Watch = UNWATCHED
    ) -> StreamGroup:
        """Admit ``request``, all of its answers or none, on the shard with the fewest streams.

        A request with the id and body of a running one of the same tenant takes its place: the client has come back
        before its broken connection was noticed. Raises Conflict for the same id with another body, InvalidRequest,
        Overloaded, Unavailable, DeadlineExceeded.
        """
        if self._draining:
            raise Unavailable(DRAINING)
        request = self._supplant((caller.tenant, request.request_id), request)
        deadline = math.inf if timeout_s is None else _now() + timeout_s
        group = StreamGroup(caller, request, deadline, self._recovery_timeout_s, watch)
        self._open.add(group)
        self._by_client[group.client] = group
        try:
            await self._admit(group)
            for stream in group.streams:
                await self._place(stream)
        except BaseException:
            self.close(group)
            raise
        return group

    async def next_events(self, stream: Stream) -> list[TokenEvent]:
        """At least one event, and some of what else is there already; to be called until one tells the end.

        A stream whose shard is lost is taken elsewhere in here. Raises DeadlineExceeded, Unavailable, Internal.
        """
        while not stream.has_news:
            if stream.error is not None:
                raise stream.error
            if stream.ended:
                raise RuntimeError(f"the end of request {stream.request.request_id!r} was taken before")
            if stream.run is None:
                await self._place(stream)
            else:
                await stream.wait()
        return stream.take()

    def stop(self, stream: Stream) -> None:
        """Nobody wants more of this one answer. If the engine still works on it, that ends within two steps."""
        self._quit(stream)
        stream.ended = True

    def abort(self, group: StreamGroup) -> None:
        """End a request from outside of its call: the engine frees it, its call ends with CANCELLED."""
        for stream in group.streams:
            if not stream.ended:
                self._end(stream, FinishReason.CANCELLED)

    def find(self, request_id: str, tenant: str) -> StreamGroup | None:
        """The streams of a client's running request."""
        return self._by_client.get((tenant, request_id))

    def close(self, group: StreamGroup) -> None:
        """The call is over. If the engine still works on it, that ends within two steps. Idempotent."""
        for stream in group.streams:
            self.stop(stream)
        self._open.discard(group)
        if self._by_client.get(group.client) is group:
            del self._by_client[group.client]
        self._changed.give()

    def _supplant(self, client: tuple[str, str], request: ValidRequest) -> ValidRequest:
        """End the client's earlier request of this id, if there is one; its seed is the new one's."""
        earlier = self._by_client.get(client)
        if earlier is None:
            return request
        if not earlier.same_body(request):
            raise Conflict(request.request_id)
        self.abort(earlier)
        return earlier.with_own_seed(request)

    # -- a stream's way to a shard ----------------------------------------------------------------------------------

    async def _admit(self, group: StreamGroup) -> None:
        """The first submission, of all streams at once: what every shard refuses is told to the client.

        Returns as soon as some shard may have taken them. Those of a shard which died meanwhile are in doubt; then they
        count as admitted, and go elsewhere.
        """
        retry_s, first = RETRY_S, group.streams[0]
        while (peer := self._peers.best(self._load(), excluding=first.search.tried)) is not None:
            refusal = await self._submit(group.streams, peer)
            if refusal is None or group.ended:
                return
            if refusal.kind != Refusal.UNAVAILABLE:
                raise _refused(refusal)
            retry_s = refusal.retry_after_s
        raise Unavailable(SHARDS_DOWN, retry_s)

    async def _place(self, stream: Stream) -> None:
        """Bring a stream that is adrift to a shard, or to its end. Raises the ServiceError with which it ends."""
        if stream.adrift and stream.complete is not None:
            self._end(stream, stream.complete)
        while stream.adrift:
            peer = await self._find_peer(stream)
            if peer is None:
                return
            refusal = await self._submit((stream,), peer)
            if refusal is not None and refusal.kind == Refusal.INVALID:
                if stream.admitted:
                    raise Internal(f"attention shard {peer.name} does not take over what another took: {refusal}")
                raise _refused(refusal)

    async def _find_peer(self, stream: Stream) -> AttentionPeer | None:
        """The shard to try next, or None when the stream was ended from outside meanwhile."""
        search = stream.search
        search.begin(_now())
        while stream.adrift:
            now = _now()
            if now >= stream.deadline:
                raise DeadlineExceeded
            if now >= search.give_up_at:
                raise Unavailable(SHARDS_DOWN)
            peer = self._peers.best(self._load(), excluding=search.tried, sound_only=True)
            if peer is None and now >= search.resume_at:
                peer = self._peers.best(self._load(), excluding=search.next_try(self._peers.open_names))
            if peer is not None:
                return peer
            resume_at = search.resume_at if self._peers.open_names else math.inf
            await self._changed.wait(min(stream.deadline, search.give_up_at, resume_at))
        return None

    async def _submit(self, streams: Sequence[Stream], peer: AttentionPeer) -> Refusal | None:
        """Ask a shard to run streams, all or none: one, or all of a new request, the first of which leads the others.

        None if it does, or if that ended before its answer came: see ``adrift``.
        """
        ids = [f"{self._gateway}/{next(self._numbers)}" for _ in streams]
        leaders = ["", *ids[:1] * (len(ids) - 1)]
        now = _now()
        jobs = tuple(
            stream.job(engine_id, self._gateway, now, leader)
            for stream, engine_id, leader in zip(streams, ids, leaders, strict=True)
        )
        admission = peer.handle.begin("submit", jobs)
        runs = [self._begin(stream, engine_id, peer, admission) for stream, engine_id in zip(streams, ids, strict=True)]
        # Not awaited itself: a call that was sent is carried out even if nobody waits for it any more (see
        # _abort_engine), and whether a lost node's shard took it may be known only long after its wire was lost.
        answer = asyncio.wrap_future(admission)
        answer.add_done_callback(_forget)
        while not answer.done() and (left := [run.over for run in runs if not run.over.done()]):
            await asyncio.wait((answer, *left), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            for stream in streams:
                stream.doubtful = True
            return None
        return self._answered(runs, answer)

    def _begin(self, stream: Stream, engine_id: str, peer: AttentionPeer, admission: Future[Refusal | None]) -> Run:
        """From now on the shard's events under this id are the stream's."""
        run = Run(engine_id, stream, peer, admission, asyncio.get_running_loop().create_future())
        stream.run, stream.runs = run, stream.runs + 1
        self._runs[engine_id] = run
        return run

    def _answered(self, runs: Sequence[Run], answer: asyncio.Future[Refusal | None]) -> Refusal | None:
        """Take the shard's answer to a submission in."""
        unreachable = isinstance(answer.exception(), ActorUnreachable)
        refusal = None if unreachable else answer.result()
        for run in runs:
            stream = run.stream
            if refusal is None and not unreachable:
                stream.admitted = True
                self.replays += stream.runs > 1
            elif stream.run is run:
                stream.doubtful = stream.doubtful or unreachable
                stream.search.failed(run.peer.name)
                if unreachable or (refusal is not None and refusal.kind == Refusal.UNAVAILABLE):
                    self._peers.suspect(run.peer.name)
                self._leave(run)
        return refusal

    # -- a stream's runs ------------------------------------------------------------------------------------------

    def _take(self, run: Run, event: TokenEvent) -> None:
        stream = run.stream
        stream.admitted = True
        if event.finish == FinishReason.UNAVAILABLE:
            about = fields(request_id=stream.request.request_id, **trace_ids(stream.watch.traceparent))
            log.warning("%s has to go on elsewhere: %s: %s", run.engine_id, run.peer.name, event.message, extra=about)
            stream.search.failed(run.peer.name)
            self._peers.suspect(run.peer.name)
            self._leave(run)
        elif event.index > len(stream.log):
            text = f"{run.engine_id}: {run.peer.name} sent index {event.index} after {len(stream.log)} tokens"
            self._end(stream, FinishReason.ERROR, text)
        elif event.token is None or event.index == len(stream.log):
            if event.token is not None:
                self._peers.acquit(run.peer.name)
            if event.finish is not None:
                self._leave(run)
            stream.push(event)

    def _end(self, stream: Stream, reason: FinishReason, message: str = "") -> None:
        """End a stream from here, after the tokens that it has."""
        self._quit(stream)
        stream.push(TokenEvent("", len(stream.log), None, reason, message))
        self._changed.give()

    def _quit(self, stream: Stream) -> None:
        """Nobody wants more from the shard that works on the stream, if one does."""
        if stream.run is not None:
            self._abort_engine(stream.run)
            self._leave(stream.run)

    def _leave(self, run: Run) -> None:
        """The stream has nothing to do with this run any more."""
        del self._runs[run.engine_id]
        run.stream.run = None
        run.over.set_result(None)
        run.stream.wake()
        self._changed.give()

    def _abort_engine(self, run: Run) -> None:
        """Sent only once the admission is through: the two calls must not overtake each other."""
        run.admission.add_done_callback(
            lambda _: run.peer.handle.begin("abort", run.engine_id).add_done_callback(_forget)
        )

    def _runs_on(self, name: str) -> list[Run]:
        return [run for run in self._runs.values() if run.peer.name == name]

    def _load(self) -> Counter[str]:
        return Counter(run.peer.name for run in self._runs.values())


def _now() -> float:
    """Seconds of the event loop's clock."""
    return asyncio.get_running_loop().time()


def _forget(done: Future[Any] | asyncio.Future[Any]) -> None:
    """An answer that has nobody left to tell: the shard is gone, or its stream left it."""
    if not done.cancelled():
        done.exception()


def _refused(refusal: Refusal) -> ServiceError:
    if refusal.kind == Refusal.INVALID:
        return InvalidRequest(refusal.field, refusal.message)
    return Overloaded(QUEUE_FULL, refusal.retry_after_s)
