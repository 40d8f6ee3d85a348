"""Tracer: what every actor does in the next steps of each attention shard, on the controller's clock.

The main path is ``trace``: start recording everywhere → wait for the attention shards' steps → take what was recorded
→ shift it to one clock. Nothing here is on the way of a token.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait

from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.control_pb2 import Role

from actors.span_log import Recording, Span, clock_name
from cluster.calls import answers, log_failure
from cluster.clock_offsets import ClockOffset, measure
from cluster.compute_spans import by_start, with_compute
from cluster.fleet import ActorHandle
from cluster.refusals import BadOperation, TraceRunning
from cluster.roster import Member

MOST_STEPS = 1000
MOST_TIMEOUT_S = 600.0
DEFAULT_TIMEOUT_S = 30.0

_ANSWER_S = 2.0  # an attention shard may tell that its time is over a little later than that
_TAKE_S = 30.0
_ABANDONED_S = 60.0  # recorders that were not asked for so long after the timeout stop by themselves
_FRAMING_BYTES = 32  # at most what an actor's length and ``dropped`` take beside its spans
_DELIVERY_NS = 100_000_000  # a gateway hands out the tokens of the last step a little after its end
_SPAN_FRAMING_BYTES = 6  # at most a span's tag and length


def check(steps: int, timeout_s: float) -> None:
    """Raises BadOperation unless ``steps`` and ``timeout_s`` (0: the default) are allowed."""
    if not 1 <= steps <= MOST_STEPS:
        raise BadOperation("steps", f"{steps}; allowed are 1 to {MOST_STEPS}")
    if not (math.isfinite(timeout_s) and 0 <= timeout_s <= MOST_TIMEOUT_S):
        raise BadOperation("timeout_s", f"{timeout_s:g}; allowed are 0 ({DEFAULT_TIMEOUT_S:g} s) to {MOST_TIMEOUT_S:g}")


class Tracer:
    """One trace at a time. ``members()`` tells who is on duty, ``node_id`` where an actor runs; an answer takes at
    most ``max_bytes``."""

    def __init__(
        self, members: Callable[[], Sequence[Member]], node_id: Callable[[ActorHandle], str], max_bytes: int
    ) -> None:
        self._members = members
        self._node_id = node_id
        self._max_bytes = max_bytes
        self._running = threading.Lock()
        self._caller = ""
        self._shards: list[Member] = []
        self._stopped = threading.Event()

    def trace(self, steps: int, timeout_s: float, caller: str) -> pb.TraceResponse:
        """Record ``steps`` steps of each attention shard, or what there is of them after ``timeout_s``.

        An actor that does not answer has no spans and no pid. Raises BadOperation, TraceRunning.
        """
        check(steps, timeout_s)
        if not self._running.acquire(blocking=False):
            raise TraceRunning("another trace is being recorded; try again when it is done")
        try:
            self._stopped.clear()
            self._shards, self._caller = [], caller  # who goes from now on is heard
            members = list(self._members())
            recordings = self._record(members, steps, timeout_s or DEFAULT_TIMEOUT_S)
            return self._response(members, recordings)
        finally:
            self._caller = ""
            self._running.release()

    def stop(self, caller: str) -> None:
        """End the trace of ``caller``, who has gone, if it runs."""
        if caller == self._caller:
            self._stopped.set()
            for shard in self._shards:
                shard.handle.begin("take_spans").add_done_callback(log_failure)

    def _record(self, members: list[Member], steps: int, timeout_s: float) -> dict[str, Recording]:
        shards = self._shards = [member for member in members if member.role == Role.ROLE_ATTENTION]
        limit_s = timeout_s + _ABANDONED_S
        try:
            answers({m.name: m.handle.begin("start_spans", 0, limit_s) for m in members if m not in shards})
            answers({shard.name: shard.handle.begin("start_spans", steps, limit_s) for shard in shards})
            if not self._stopped.is_set():
                wait([shard.handle.begin("wait_for_steps", timeout_s) for shard in shards], timeout_s + _ANSWER_S)
        finally:
            recordings = answers({m.name: m.handle.begin("take_spans") for m in members}, _TAKE_S)
        return recordings

    def _response(self, members: Sequence[Member], recordings: Mapping[str, Recording]) -> pb.TraceResponse:
        offsets = _offsets(members, recordings)
        response = pb.TraceResponse()
        shifted: list[list[Span]] = []
        for member in members:
            actor = response.actors.add(name=member.name, role=member.role, node_id=self._node_id(member.handle))
            recording = recordings.get(member.name)
            if recording is None or (offset := offsets[recording.clock]) is None:
                shifted.append([])
                continue
            actor.pid, actor.dropped, actor.clock_error_ns = recording.pid, recording.dropped, offset.error_ns
            filled = with_compute if member.role == Role.ROLE_ATTENTION else by_start
            shifted.append([s._replace(start_ns=s.start_ns - offset.offset_ns) for s in filled(recording.spans)])
        _add(response, [list(map(_message, spans)) for spans in _during_steps(shifted)], self._max_bytes)
        response.steps = min((_steps(a) for a in response.actors if a.role == Role.ROLE_ATTENTION and a.pid), default=0)
        return response


def _offsets(members: Sequence[Member], recordings: Mapping[str, Recording]) -> dict[str, ClockOffset | None]:
    """By the name of the clock. Those of our own machine are not off; None for one that cannot be told."""
    there = defaultdict(list)
    for member in members:
        if member.name in recordings:
            there[recordings[member.name].clock].append(member.handle)
    own = clock_name()
    return {clock: ClockOffset() if clock == own else measure(handles) for clock, handles in there.items()}


def _during_steps(spans: Sequence[Sequence[Span]]) -> Sequence[Sequence[Span]]:
    """Without what lies before the first step or after the last: where one attention shard has no work, the others'
    routers and experts are recorded for as long as it is waited for."""
    steps = [span for of_actor in spans for span in of_actor if span.name == "step"]
    if not steps:
        return spans
    first_ns = min(step.start_ns for step in steps)
    last_ns = max(step.end_ns for step in steps) + _DELIVERY_NS
    return [[span for span in of_actor if first_ns <= span.end_ns and span.start_ns <= last_ns] for of_actor in spans]


def _message(span: Span) -> pb.TracedSpan:
    name, lane, start_ns, duration_ns, numbers = span
    return pb.TracedSpan(name=name, lane=lane, start_ns=start_ns, duration_ns=duration_ns, numbers=numbers)


def _add(response: pb.TraceResponse, spans: Sequence[Sequence[pb.TracedSpan]], max_bytes: int) -> None:
    """Add ``spans``, one list for each actor of ``response``, without the oldest ones if they were too large."""
    room = max_bytes - response.ByteSize() - _FRAMING_BYTES * (1 + len(spans))
    first_ns = _first_that_fits([span for of_actor in spans for span in of_actor], room)
    for actor, of_actor in zip(response.actors, spans, strict=True):
        actor.spans.extend(span for span in of_actor if span.start_ns >= first_ns)
        actor.dropped += len(of_actor) - len(actor.spans)


def _first_that_fits(spans: list[pb.TracedSpan], room: int) -> int:
    """The start from which on all of ``spans`` take at most ``room`` bytes."""
    for span in sorted(spans, key=lambda span: span.start_ns, reverse=True):
        room -= span.ByteSize() + _SPAN_FRAMING_BYTES
        if room < 0:
            return span.start_ns + 1
    return 0


def _steps(actor: pb.TracedActor) -> int:
    return sum(span.name == "step" for span in actor.spans)
