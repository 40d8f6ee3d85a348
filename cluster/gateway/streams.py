"""Open streams: which request runs on which attention shard, and how its tokens find the call that waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from actors.attention import Refusal
from actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from actors.transport.base import Address
from cluster.fleet import ActorHandle, ActorUnreachable
from cluster.gateway.errors import Conflict, InvalidRequest, Overloaded, ServiceError, Unavailable
from cluster.gateway.validation import ValidRequest

SHARDS_DOWN = "SHARDS_DOWN"
QUEUE_FULL = "QUEUE_FULL"
DRAINING = "DRAINING"
_SUSPECT_S = 10.0
_RETRY_S = 1.0


@dataclass(frozen=True)
class AttentionPeer:
    """An attention shard as a gateway knows it: control by ``handle``, tokens over the wire to ``address``."""

    handle: ActorHandle
    address: Address


@dataclass(eq=False)
class Stream:
    """One running request. ``engine_id`` is unique in the cluster; the client's own id need not be."""

    engine_id: str
    request: ValidRequest
    peer: AttentionPeer
    events: asyncio.Queue[TokenEvent] = field(default_factory=asyncio.Queue)
    admission: Future[Refusal | None] | None = None
    ended: bool = False

    def same_body(self, other: ValidRequest) -> bool:
        """True if ``other`` asks for what this stream gives, perhaps from a later token on."""
        seed = self.request.sampling.seed if not other.seed_given else other.sampling.seed
        other = replace(other, next_index=0, seed_given=False, sampling=replace(other.sampling, seed=seed))
        return other == replace(self.request, next_index=0, seed_given=False)


class Streams:
    """All open streams of one gateway. Everything runs in the gateway's event loop."""

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._peers: dict[str, AttentionPeer] = {}
        self._open: dict[str, Stream] = {}
        self._by_client_id: dict[str, Stream] = {}
        self._numbers = itertools.count()
        self._suspects: set[str] = set()
        self._draining = False
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def ready(self) -> bool:
        """True while some attention shard is connected whose last step could be computed."""
        return bool(self._peers.keys() - self._suspects)

    async def readiness_changed(self, known: bool) -> None:
        """Return when ``ready`` is not ``known`` any more."""
        while self.ready == known:
            self._changed.clear()
            await self._changed.wait()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests; return when the running ones are done, or after ``timeout_s``."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._open and (left := deadline - asyncio.get_running_loop().time()) > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def add_peer(self, peer: AttentionPeer) -> None:
        """A shard whose wire is up: requests may go there."""
        self._peers[peer.address.name] = peer
        self._changed.set()

    def lose_peer(self, name: str) -> None:
        """A shard's wire is gone: its streams end, nothing new goes there."""
        self._peers.pop(name, None)
        self._changed.set()
        for stream in list(self._open.values()):
            if stream.peer.address.name == name:
                reason, text = FinishReason.UNAVAILABLE, f"attention shard {name} is gone"
                stream.events.put_nowait(TokenEvent(stream.engine_id, 0, None, reason, text))

    async def open(self, request: ValidRequest, timeout_s: float | None) -> Stream:
        """Admit ``request`` on the shard with the fewest streams.

        A request with the id and body of a running one takes its place: the client has come back before its broken
        connection was noticed. Raises Conflict for the same id with another body, InvalidRequest, Overloaded,
        Unavailable.
        """
        earlier = self._by_client_id.get(request.request_id)
        if earlier is not None:
            if not earlier.same_body(request):
                raise Conflict(request.request_id)
            request = replace(request, sampling=earlier.request.sampling)
            self.abort(earlier)
        stream = Stream(f"{self._gateway}/{next(self._numbers)}", request, self._least_loaded())
        self._open[stream.engine_id] = stream
        self._by_client_id[request.request_id] = stream
        try:
            await self._submit(stream, timeout_s)
        except BaseException:
            self.close(stream)
            raise
        return stream

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Hand the events of one step to their streams; those of closed streams are dropped."""
        for event in events:
            stream = self._open.get(event.request_id)
            if stream is not None:
                self._judge(stream.peer.address.name, event)
                stream.ended = stream.ended or event.finish is not None
                stream.events.put_nowait(event)

    def abort(self, stream: Stream) -> None:
        """End a stream from outside of its call: the engine frees it, its call ends with CANCELLED."""
        self._abort_engine(stream)
        stream.events.put_nowait(TokenEvent(stream.engine_id, 0, None, FinishReason.CANCELLED))

    def find(self, request_id: str) -> Stream | None:
        """The running stream of a client's request id."""
        return self._by_client_id.get(request_id)

    def close(self, stream: Stream) -> None:
        """The call is over. If the engine still works on it, that ends within two steps. Idempotent."""
        self._open.pop(stream.engine_id, None)
        self._changed.set()
        if self._by_client_id.get(stream.request.request_id) is stream:
            del self._by_client_id[stream.request.request_id]
        self._abort_engine(stream)

    def _judge(self, peer: str, event: TokenEvent) -> None:
        """A step that could not be computed makes its shard a suspect: until the next good one, or for a while.

        For a while only: nobody sends requests to a gateway that is not ready, so it must try again by itself.
        """
        if event.finish == FinishReason.UNAVAILABLE:
            self._suspects.add(peer)
            asyncio.get_running_loop().call_later(_SUSPECT_S, self._acquit, peer)
            self._changed.set()
        elif event.token is not None:
            self._acquit(peer)

    def _acquit(self, peer: str) -> None:
        if peer in self._suspects:
            self._suspects.discard(peer)
            self._changed.set()

    def _least_loaded(self) -> AttentionPeer:
        if self._draining:
            raise Unavailable(DRAINING, _RETRY_S)
        if not self._peers:
            raise Unavailable(SHARDS_DOWN, _RETRY_S)
        load = Counter(stream.peer.address.name for stream in self._open.values())
        return self._peers[min(self._peers, key=lambda name: (name in self._suspects, load[name], name))]

    async def _submit(self, stream: Stream, timeout_s: float | None) -> None:
        request = stream.request
        job = GenerationRequest(
            request_id=stream.engine_id,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop_ids=request.stop_ids,
            timeout_s=timeout_s,
            gateway=self._gateway,
        )
        stream.admission = stream.peer.handle.begin("submit", job)
        try:
            # shielded: a call that was sent is carried out even if nobody waits for it any more; see _abort_engine
            refusal = await asyncio.shield(asyncio.wrap_future(stream.admission))
        except ActorUnreachable as error:
            raise Unavailable(SHARDS_DOWN, _RETRY_S) from error
        if refusal is not None:
            stream.ended = True
            raise _refused(refusal)

    def _abort_engine(self, stream: Stream) -> None:
        """Sent only once the admission is through: the two calls must not overtake each other."""
        if not stream.ended and stream.admission is not None:
            stream.ended = True
            stream.admission.add_done_callback(
                lambda _: stream.peer.handle.begin("abort", stream.engine_id).add_done_callback(_forget)
            )


def _forget(done: Future[Any]) -> None:
    """An abort that fails has nobody left to tell: the shard is gone, and its streams with it."""
    done.exception()


def _refused(refusal: Refusal) -> ServiceError:
    if refusal.kind == Refusal.INVALID:
        return InvalidRequest(refusal.field, refusal.message)
    if refusal.kind == Refusal.FULL:
        return Overloaded(QUEUE_FULL, refusal.retry_after_s)
    return Unavailable(SHARDS_DOWN, refusal.retry_after_s)
