"""Spans of one batch of rows in a traced step: ``dispatch`` in its router, and under it ``experts`` in each shard.

Each is stamped with the clock of its own node: between nodes they nest only as well as the clocks agree. On a GPU
``experts`` is the host's part, which is over when the work is handed to the device; ``dispatch`` waits for results.
"""

from __future__ import annotations

import time

from opentelemetry.trace import INVALID_SPAN, Span, Status, StatusCode, get_tracer

from actors.guard import Guard
from actors.trace_context import Trace, traceparent_of

_TRACER = get_tracer("expertmesh.actors")
_GUARD = Guard("batches")


class BatchSpan:
    """A span that began when the batch arrived, at ``began_ns`` (wall clock). If it cannot be made, the batch goes on
    without: ``traceparent``, which names it elsewhere, is empty then."""

    def __init__(self, name: str, actor: str, parent: Trace, layer: int, began_ns: int) -> None:
        about: dict[str, str | int] = {"expertmesh.actor": actor, "expertmesh.layer": layer}
        self._span: Span = INVALID_SPAN
        self.traceparent = ""
        with _GUARD:
            self._span = _TRACER.start_span(name, parent, attributes=about, start_time=began_ns)
            self.traceparent = traceparent_of(self._span)

    def end(self, error: str = "", **about: int) -> None:
        """It ends now. ``error``: the kind of failure, if it was one; ``about``: attributes ``expertmesh.*``."""
        with _GUARD:
            self._span.set_attributes({f"expertmesh.{name}": value for name, value in about.items()})
            if error:
                self._span.set_attribute("error.type", error)
                self._span.set_status(Status(StatusCode.ERROR, error))
            self._span.end(time.time_ns())


class DispatchSpan(BatchSpan):
    """The router's, until the answer is ready. ``parts`` at the end of a frame make the receiver's span its child."""

    FAILED = "failed"
    ABANDONED = "abandoned"

    def __init__(self, actor: str, parent: Trace, layer: int, rows: int, began_ns: int) -> None:
        super().__init__("dispatch", actor, parent, layer, began_ns)
        self.parts = [self.traceparent.encode()] if self.traceparent else []
        self._rows = rows
        self._shards: set[str] = set()
        self._reroutes = 0

    def asked(self, shard: str) -> None:
        """A share of the rows went to this shard."""
        self._shards.add(shard)

    def rerouted(self) -> None:
        """Some rows are sent again."""
        self._reroutes += 1

    def over(self, epoch: int, error: str = "") -> None:
        """Answered by the map of ``epoch``, or not."""
        self.end(error, epoch=epoch, rows=self._rows, shards=len(self._shards), reroutes=self._reroutes)
