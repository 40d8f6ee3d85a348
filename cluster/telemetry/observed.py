"""One request as its gateway observes it: a span, metrics, and a line in the access log; never a word of its text.

The span is handed on explicitly and never made the current one: its request is carried out in an async generator, in
whose caller's context a current span would be left behind at each ``yield``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import grpc
from expertmesh.v1 import inference_pb2 as pb
from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode

from actors.engine.request import TokenEvent
from actors.guard import Guard
from actors.log_fields import fields, mark
from actors.trace_context import traceparent_of
from cluster.gateway.call import Call
from cluster.gateway.errors import Internal
from cluster.gateway.status import status_code
from cluster.gateway.validation import ValidRequest
from cluster.openai.paths import Endpoint
from cluster.telemetry.request_metrics import RequestMetrics

UNSAMPLED = ""

_GENERATE = "expertmesh.v1.Inference/Generate"
_ROUTES = {"chat": Endpoint.CHAT, "text_completion": Endpoint.COMPLETIONS}

_access = logging.getLogger("expertmesh.access")


class _Progress:
    """Of one choice: when its first and its last token came (seconds of the clock), and how many did."""

    def __init__(self, first: float) -> None:
        self.first = self.last = first
        self.tokens = 1


class ObservedRequest:
    """From a request's arrival to its end: ``with`` ends it, by whatever ends the block. Made by ``RequestObserver``.

    An error that ends it is marked: its records, whoever logs them, say which request it was.
    """

    def __init__(
        self,
        metrics: RequestMetrics,
        span: Span,
        request_id: str,
        call: Call,
        labels: Mapping[str, str],
        clock: Callable[[], float],
        guard: Guard,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._guard = guard
        self._span = span
        self._request_id = request_id
        self._call = call
        self._labels = dict(labels)
        self._began = clock()
        self._first: float | None = None
        self._choices: dict[int, _Progress] = {}
        self._request: ValidRequest | None = None
        self._finished: dict[int, pb.Finished] = {}

    def __enter__(self) -> ObservedRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._guard:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """Each part on its own: one that fails must not cost the others."""
        now = self._clock()
        if error is None:
            code, outcome = grpc.StatusCode.OK, self._reason
        else:
            code, outcome = _ending(error)
        if error is not None:
            mark(error, **self._ids)
        with self._guard:
            self._measure(now, "" if error is None else outcome, outcome)
            self._measure_call(now - self._began, code)
        with self._guard:
            self._log(now, error is not None, outcome)
        with self._guard:
            self._end_span(error, outcome, code)

    @property
    def traceparent(self) -> str:
        """W3C trace context for whoever works on it, if its trace is recorded; else empty."""
        with self._guard:
            return traceparent_of(self._span) if self._span.is_recording() else UNSAMPLED
        return UNSAMPLED

    def validated(self, request: ValidRequest) -> None:
        """It can be served, and as what."""
        self._request = request
        with self._guard:
            self._describe(request)
            self._metrics.prompt_tokens.add(len(request.prompt_ids), self._labels)

    def arrived(self, event: TokenEvent, choice: int) -> None:
        """An attention shard has sent this of an answer, whether or not the client is ready to take it."""
        with self._guard:
            self._count(event, choice)

    def sent(self, message: pb.GenerateResponse) -> None:
        """The client gets this."""
        if message.HasField("finished"):
            self._finished[message.choice] = message.finished

    def _describe(self, request: ValidRequest) -> None:
        sampling = request.sampling
        self._span.set_attributes(
            {
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
                "gen_ai.request.max_tokens": request.max_tokens,
                "gen_ai.response.id": request.request_id,
                "gen_ai.usage.input_tokens": len(request.prompt_ids),
                # a trace's integers are signed
                "gen_ai.request.seed": sampling.seed if sampling.seed < 2**63 else str(sampling.seed),
                **({"gen_ai.request.choice.count": request.n} if request.n > 1 else {}),
            }
        )

    def _count(self, event: TokenEvent, choice: int) -> None:
        if choice == 0:  # for its prompt: the others find it computed
            self._count_prefill(event)
        if event.token is None:
            return
        now = self._clock()
        if self._first is None:
            self._first = now
            self._span.add_event("first_token")
            self._metrics.first_token.record(now - self._began, self._labels)
        progress = self._choices.get(choice)
        if progress is None:
            self._choices[choice] = _Progress(now)
        else:
            # with every token, in the event loop: without labels, which take longer than all the rest
            self._metrics.between_tokens.record(now - progress.last)
            progress.last = now
            progress.tokens += 1

    def _count_prefill(self, event: TokenEvent) -> None:
        if event.queue_s is not None:
            self._metrics.queue.record(event.queue_s, self._labels)
        if event.prefill_s is not None:
            self._metrics.prefill.record(event.prefill_s, self._labels)

    @property
    def _reason(self) -> str:
        """Of the first choice."""
        return _reason(self._finished[0]) if 0 in self._finished else "none"

    @property
    def _ids(self) -> dict[str, str | None]:
        """What its records in the log have in common; None for what it has not."""
        context = self._span.get_span_context()
        return {
            "request_id": self._request_id,
            "trace_id": trace.format_trace_id(context.trace_id) if context.is_valid else None,
            "span_id": trace.format_span_id(context.span_id) if context.is_valid else None,
        }

    @property
    def _output_tokens(self) -> int:
        """What the client got of each answer that ended, and what came for the others."""
        ended = {choice: finished.usage.completion_tokens for choice, finished in self._finished.items()}
        return sum(({choice: progress.tokens for choice, progress in self._choices.items()} | ended).values())

    def _measure(self, now: float, error: str, outcome: str) -> None:
        metrics, labels, tokens = self._metrics, self._labels, self._output_tokens
        metrics.duration.record(now - self._began, {**labels, **({"error.type": error} if error else {})})
        metrics.finished.add(
            1, {"door": self._call.door, "operation": labels["gen_ai.operation.name"], "reason": outcome}
        )
        metrics.generated_tokens.add(sum(progress.tokens for progress in self._choices.values()), labels)
        if self._request is not None:
            prompt = len(self._request.prompt_ids)
            metrics.usage.record(prompt, {**labels, "gen_ai.token.type": "input"})
            metrics.usage.record(tokens, {**labels, "gen_ai.token.type": "output"})
        if self._first is not None:
            metrics.decode.record(now - self._first, labels)
        for progress in self._choices.values():
            if progress.tokens > 1:
                metrics.output_token.record((progress.last - progress.first) / (progress.tokens - 1), labels)

    def _measure_call(self, duration_s: float, code: grpc.StatusCode) -> None:
        """For HTTP that is the door's own business: only it knows what status it sent."""
        if self._call.door == "grpc":
            attributes = {**door_attributes("grpc", ""), "rpc.response.status_code": code.name}
            self._metrics.rpc.record(duration_s, attributes)

    def _log(self, now: float, failed: bool, outcome: str) -> None:
        ids, request = self._ids, self._request
        _access.info(
            "request",
            extra=fields(
                request_id=ids["request_id"],
                client_request_id=self._call.client_id or None,
                door=self._call.door,
                operation=self._labels["gen_ai.operation.name"],
                tenant=self._call.caller.tenant or None,
                model=self._labels["gen_ai.request.model"],
                prompt_tokens=len(request.prompt_ids) if request is not None else None,
                completion_tokens=self._output_tokens,
                **{"error" if failed else "finish_reason": outcome},
                ttft_s=None if self._first is None else round(self._first - self._began, 6),
                duration_s=round(now - self._began, 6),
                trace_id=ids["trace_id"],
                span_id=ids["span_id"],
            ),
        )

    def _end_span(self, error: BaseException | None, outcome: str, code: grpc.StatusCode) -> None:
        span = self._span
        span.set_attribute("gen_ai.usage.output_tokens", self._output_tokens)
        if self._call.door == "grpc":
            span.set_attribute("rpc.response.status_code", code.name)
        if error is None:
            span.set_attribute("gen_ai.response.model", self._labels["gen_ai.request.model"])
            reasons = [_reason(finished) for _, finished in sorted(self._finished.items())]
            span.set_attribute("gen_ai.response.finish_reasons", reasons)
        else:
            span.set_attribute("error.type", outcome)
            if isinstance(error, Internal):
                span.set_attribute("expertmesh.error.reference", error.reference)
            # not the error's text: that of a bug may quote anything
            span.set_status(Status(StatusCode.ERROR, outcome))
        span.end()


def _reason(finished: pb.Finished) -> str:
    """As the conventions name it: without the prefix of ours."""
    return pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()


def _ending(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Status and kind of what ended a request. Whoever is not interested any more closes the generator, or cancels."""
    if not isinstance(error, Exception):
        return grpc.StatusCode.CANCELLED, "cancelled"
    code = status_code(error)
    return code, code.name.lower()


def door_attributes(door: str, operation: str) -> dict[str, Any]:
    """What OpenTelemetry's conventions for RPC and HTTP ask for."""
    if door == "grpc":
        return {"rpc.system.name": "grpc", "rpc.method": _GENERATE}
    return {"http.request.method": "POST", "http.route": str(_ROUTES[operation])}
