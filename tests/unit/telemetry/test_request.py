"""One request as its gateway observes it, with a clock that a test sets."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal
from unittest.mock import Mock

import pytest
from expertmesh.v1 import inference_pb2 as pb
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from prometheus_client.parser import text_string_to_metric_families

from actors.engine.request import SamplingParams, TokenEvent
from actors.log_fields import fields_of
from cluster.access import Caller
from cluster.config import TelemetryConfig
from cluster.gateway.call import Call
from cluster.gateway.errors import Internal, Overloaded
from cluster.gateway.validation import ValidRequest
from cluster.telemetry.metrics import GatewayMetrics
from cluster.telemetry.observed import ObservedRequest
from cluster.telemetry.request import RequestObserver
from tests.unit.telemetry.controllers import Controller

TRACE_ID, SPAN_ID = "ab" * 16, "cd" * 8
MARKER = "PROMPT-MARKER"


class Gateway:
    """An observer, what it measured, and the spans it made."""

    def __init__(self, sampler: Any = ALWAYS_ON) -> None:
        self.now = 0.0
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=ParentBased(sampler), resource=Resource({}), shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.metrics = GatewayMetrics(TelemetryConfig(), "gateway-0", Controller(None), lambda: 0, lambda: 0)
        tracer = self.provider.get_tracer("test")
        self.observer = RequestObserver("tiny", self.metrics.requests, tracer, lambda: self.now)

    def begin(
        self, model: str = "", door: Literal["grpc", "http"] = "grpc", tenant: str = "", **trace: str
    ) -> ObservedRequest:
        """A request for ``model``."""
        call = Call(door, "chat", Caller(tenant, "user", 1.0), trace=trace, client_id="theirs")
        return self.observer.begin(pb.GenerateRequest(model=model, prompt=MARKER), "id-1", call)

    def serve(self, observed: ObservedRequest, count: int, step_s: float = 0.5) -> None:
        """All of a request of 3 prompt tokens: ``count`` tokens, ``step_s`` apart, the first after twice that."""
        with observed:
            observed.validated(valid(count))
            self.now += step_s
            for index in range(count):
                self.now += step_s
                first = {"queue_s": 0.125, "prefill_s": 0.25} if index == 0 else {}
                observed.arrived(TokenEvent("", index, 7, **first), 0)
            usage = pb.Usage(prompt_tokens=3, completion_tokens=count)
            finished = pb.Finished(reason=pb.FINISH_REASON_LENGTH, stop=MARKER, usage=usage)
            observed.sent(pb.GenerateResponse(finished=finished, text=MARKER))

    def fail(self, observed: ObservedRequest, error: BaseException) -> None:
        """One that ends with an error after its first token."""
        with observed:
            observed.validated(valid())
            observed.arrived(TokenEvent("", 0, 7), 0)
            raise error

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        """Those that ended."""
        return self.exporter.get_finished_spans()

    @property
    def samples(self) -> list[tuple[str, Mapping[str, str], float]]:
        """Name, labels, value of everything that was measured."""
        families = text_string_to_metric_families(self.metrics.exposition().decode())
        return [(s.name, s.labels, s.value) for family in families for s in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels."""
        return sum(value for n, found, value in self.samples if n == name and labels.items() <= found.items())


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """One that traces every request whose client does not say otherwise."""
    made = Gateway()
    yield made
    made.metrics.close()
    made.provider.shutdown()


def valid(max_tokens: int = 5, seed: int = 9) -> ValidRequest:
    """A request of three tokens."""
    sampling = SamplingParams(temperature=0.5, top_p=0.9, top_k=4, seed=seed)
    return ValidRequest("id-1", (1, 2, 3), sampling, True, max_tokens, frozenset(), (MARKER,), 0)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """As a plain dict."""
    return dict(span.attributes or {})


def test_counters_of_a_known_run_are_exact(gateway: Gateway) -> None:
    for _ in range(3):
        gateway.serve(gateway.begin("tiny"), 5)

    known = {"gen_ai_operation_name": "chat", "gen_ai_request_model": "tiny"}
    assert gateway.value("expertmesh_prompt_tokens_total", **known) == 9
    assert gateway.value("expertmesh_generated_tokens_total", **known) == 15
    assert gateway.value("expertmesh_requests_finished_total", door="grpc", operation="chat", reason="length") == 3
    counts = {
        "gen_ai_server_request_duration_seconds": (3, 9.0),
        "gen_ai_server_time_to_first_token_seconds": (3, 3.0),
        "gen_ai_server_time_per_output_token_seconds": (3, 1.5),
        "expertmesh_request_queue_seconds": (3, 0.375),
        "expertmesh_request_prefill_seconds": (3, 0.75),
        "expertmesh_request_decode_seconds": (3, 6.0),
    }
    for name, (count, total) in counts.items():
        assert gateway.value(f"{name}_count", **known) == count, name
        assert gateway.value(f"{name}_sum", **known) == pytest.approx(total), name
    interval = "expertmesh_token_interval_seconds"
    assert (gateway.value(f"{interval}_count"), gateway.value(f"{interval}_sum")) == (12, 6.0)
    assert [labels for name, labels, _ in gateway.samples if name == f"{interval}_count"] == [{}]
    for kind, tokens in (("input", 9), ("output", 15)):
        assert gateway.value("gen_ai_client_token_usage_sum", gen_ai_token_type=kind, **known) == tokens
    assert gateway.value("rpc_server_call_duration_seconds_count", rpc_response_status_code="OK") == 3


def serve_two(gateway: Gateway, observed: ObservedRequest) -> None:
    """A request for two answers of 3 and 2 tokens: one step of half a second brings one of each."""
    with observed:
        observed.validated(dataclasses.replace(valid(3), n=2))
        for index in range(3):
            gateway.now += 0.5
            times = {"queue_s": 0.125, "prefill_s": 0.25} if index == 0 else {}
            for choice in (0, 1):
                if index < 3 - choice:
                    observed.arrived(TokenEvent("", index, 7, **times), choice)
        for choice, reason in ((1, pb.FINISH_REASON_STOP), (0, pb.FINISH_REASON_LENGTH)):
            usage = pb.Usage(prompt_tokens=3, completion_tokens=3 - choice)
            observed.sent(pb.GenerateResponse(choice=choice, finished=pb.Finished(reason=reason, usage=usage)))


def test_several_answers_are_one_request(gateway: Gateway) -> None:
    serve_two(gateway, gateway.begin("tiny"))

    assert gateway.value("expertmesh_prompt_tokens_total") == 3
    assert gateway.value("expertmesh_generated_tokens_total") == 5
    assert gateway.value("expertmesh_requests_finished_total") == 1
    assert gateway.value("expertmesh_requests_finished_total", reason="length") == 1
    counts = {
        "gen_ai_server_request_duration_seconds": (1, 1.5),
        "gen_ai_server_time_to_first_token_seconds": (1, 0.5),
        "gen_ai_server_time_per_output_token_seconds": (2, 1.0),
        "expertmesh_request_queue_seconds": (1, 0.125),
        "expertmesh_request_prefill_seconds": (1, 0.25),
        "expertmesh_request_decode_seconds": (1, 1.0),
        "expertmesh_token_interval_seconds": (3, 1.5),
    }
    for name, (count, total) in counts.items():
        assert gateway.value(f"{name}_count") == count, name
        assert gateway.value(f"{name}_sum") == pytest.approx(total), name
    for kind, tokens in (("input", 3), ("output", 5)):
        assert gateway.value("gen_ai_client_token_usage_sum", gen_ai_token_type=kind) == tokens
    (span,) = gateway.spans
    assert attributes(span)["gen_ai.request.choice.count"] == 2
    assert attributes(span)["gen_ai.response.finish_reasons"] == ("length", "stop")
    assert attributes(span)["gen_ai.usage.output_tokens"] == 5
    assert [event.name for event in span.events] == ["first_token"]


def test_tokens_of_answers_that_did_not_end_count_as_they_came(gateway: Gateway) -> None:
    with gateway.begin("tiny") as observed:
        observed.validated(dataclasses.replace(valid(3), n=2))
        for choice in (0, 0, 1, 1, 1):
            observed.arrived(TokenEvent("", 0, 7), choice)
        usage = pb.Usage(prompt_tokens=3, completion_tokens=1)  # a stop string
        observed.sent(pb.GenerateResponse(choice=0, finished=pb.Finished(usage=usage)))
    assert gateway.value("gen_ai_client_token_usage_sum", gen_ai_token_type="output") == 4


def test_a_span_says_what_was_asked_and_how_it_ended(gateway: Gateway) -> None:
    gateway.serve(gateway.begin("tiny", tenant="acme", traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01"), 2)

    (span,) = gateway.spans
    assert span.name == "chat tiny"
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:x}", f"{span.parent.span_id:x}") == (TRACE_ID, SPAN_ID)
    assert span.kind.name == "SERVER"
    assert span.status.is_unset
    assert [event.name for event in span.events] == ["first_token"]
    assert attributes(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "expertmesh",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 4,
        "gen_ai.request.seed": 9,
        "gen_ai.request.max_tokens": 2,
        "gen_ai.response.id": "id-1",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "rpc.system.name": "grpc",
        "rpc.method": "expertmesh.v1.Inference/Generate",
        "rpc.response.status_code": "OK",
        "expertmesh.tenant": "acme",
    }


def test_shards_get_the_trace_context_of_a_recorded_span_only(gateway: Gateway) -> None:
    recorded = gateway.begin(traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01")
    declined = gateway.begin(traceparent=f"00-{TRACE_ID}-{SPAN_ID}-00")
    with recorded, declined:
        assert declined.traceparent == ""
        version, trace_id, span_id, flags = recorded.traceparent.split("-")
        assert (version, trace_id, flags) == ("00", TRACE_ID, "01")
    (span,) = gateway.spans
    assert span.context is not None
    assert span_id == f"{span.context.span_id:016x}" != SPAN_ID


@pytest.mark.parametrize(
    "header", ["", "nonsense", f"00-{'0' * 32}-{SPAN_ID}-01", f"ff-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}"]
)
def test_a_malformed_trace_context_counts_as_none(gateway: Gateway, header: str) -> None:
    gateway.serve(gateway.begin(traceparent=header), 1)
    (span,) = gateway.spans
    assert span.parent is None


@pytest.mark.parametrize("state", ["vendor=1", "no; state " + MARKER, "a" * 20_000])
def test_a_tracestate_is_neither_read_nor_logged(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, state: str
) -> None:
    with caplog.at_level(logging.INFO):
        gateway.serve(gateway.begin(traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01", tracestate=state), 1)
    (span,) = gateway.spans
    assert span.parent is not None
    assert span.context is not None
    assert not span.context.trace_state
    assert [entry.name for entry in caplog.records] == ["expertmesh.access"]


def test_without_a_sampled_parent_the_ratio_decides() -> None:
    gateway = Gateway(ALWAYS_OFF)
    gateway.serve(gateway.begin(), 1)
    gateway.serve(gateway.begin(traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01"), 1)
    assert len(gateway.spans) == 1
    gateway.metrics.close()
    gateway.provider.shutdown()


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (Overloaded("QUEUE_FULL", 1.0), "resource_exhausted", "RESOURCE_EXHAUSTED"),
        (Internal(MARKER), "internal", "INTERNAL"),
        (ValueError(MARKER), "internal", "INTERNAL"),
        (GeneratorExit(), "cancelled", "CANCELLED"),
    ],
)
def test_an_error_is_told_by_its_kind_never_by_its_text(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, error: BaseException, kind: str, code: str
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(type(error)):
        gateway.fail(gateway.begin(), error)

    (span,) = gateway.spans
    assert attributes(span)["error.type"] == kind
    assert attributes(span)["rpc.response.status_code"] == code
    assert not span.status.is_ok
    assert span.status.description == kind
    assert MARKER not in span.to_json()
    assert gateway.value("gen_ai_server_request_duration_seconds_count", error_type=kind) == 1
    assert gateway.value("expertmesh_requests_finished_total", reason=kind) == 1
    (entry,) = caplog.records
    assert vars(entry)["fields"]["error"] == kind
    assert vars(entry)["fields"]["completion_tokens"] == 1
    assert MARKER not in str(vars(entry))


def test_a_reference_to_the_log_is_on_the_span(gateway: Gateway) -> None:
    error = Internal("what only the log says")
    with pytest.raises(Internal), gateway.begin():
        raise error
    assert attributes(gateway.spans[0])["expertmesh.error.reference"] == error.reference


def test_whoever_logs_an_error_says_which_request_it_ended(gateway: Gateway) -> None:
    error = ValueError(MARKER)
    with pytest.raises(ValueError, match=MARKER):
        gateway.fail(gateway.begin(), error)
    (span,) = gateway.spans
    assert span.context is not None
    ids = {"trace_id": f"{span.context.trace_id:032x}", "span_id": f"{span.context.span_id:016x}"}
    assert fields_of(error) == {"request_id": "id-1", **ids}


@pytest.mark.parametrize("broken", ["start_span", "spans", "metrics", "clock", "log"])
def test_what_fails_in_observing_a_request_does_not_reach_it(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    fail = Mock(side_effect=KeyError("broken"))
    if broken == "start_span":
        gateway.observer._tracer = Mock(start_span=fail)
    elif broken == "spans":
        for method in ("add_event", "set_attribute", "set_attributes", "set_status", "end"):
            monkeypatch.setattr(Span, method, fail)
    elif broken == "metrics":
        gateway.observer._metrics = Mock(
            **{f"{name}.{method}": fail for name in vars(gateway.metrics.requests) for method in ("add", "record")}
        )
    observed = gateway.begin("tiny")
    if broken == "clock":
        observed._clock = fail
    elif broken == "log":
        monkeypatch.setattr(logging.getLogger("expertmesh.access"), "info", fail)

    gateway.serve(observed, 3)
    error = Overloaded("QUEUE_FULL", 1.0)
    with pytest.raises(Overloaded):
        gateway.fail(gateway.begin("tiny"), error)
    assert fail.called
    told = [entry for entry in caplog.records if entry.name == "actors.guard"]
    assert [entry.getMessage() for entry in told] == ["telemetry of requests fails; serving goes on"]
    counted = gateway.value("expertmesh_requests_finished_total", reason="length")
    assert counted == (broken not in ("metrics", "clock")), "the rest of it is as ever"
    assert len(gateway.spans) == {"start_span": 0, "spans": 0, "clock": 1}.get(broken, 2)


def test_a_seed_past_signed_integers_is_told_as_text(gateway: Gateway) -> None:
    with gateway.begin() as observed:
        observed.validated(valid(seed=2**64 - 1))
    assert attributes(gateway.spans[0])["gen_ai.request.seed"] == str(2**64 - 1)


def test_no_label_is_chosen_by_a_client_or_named_after_a_tenant(gateway: Gateway) -> None:
    gateway.serve(gateway.begin("tiny", tenant="acme"), 2)
    series = len(gateway.samples)
    for number in range(1000):
        with pytest.raises(ValueError), gateway.begin(f"model-{number}", tenant=f"tenant-{number}"):
            raise ValueError("not served")
    first = len(gateway.samples)
    labels = {value for _, found, _ in gateway.samples for value in found.values()}

    assert first - series < 60, "one more model and one more error, of 1,000 each"
    assert "other" in labels
    assert not [label for label in labels if label.startswith(("model-", "tenant-", "acme"))]
    assert {span.name for span in gateway.spans} == {"chat tiny", "chat other"}


def test_the_access_log_has_one_line_a_request(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        gateway.serve(gateway.begin("tiny", door="http", tenant="acme"), 2)

    (entry,) = caplog.records
    assert (entry.name, entry.getMessage()) == ("expertmesh.access", "request")
    (span,) = gateway.spans
    assert span.context is not None
    assert {key: value for key, value in vars(entry)["fields"].items() if value is not None} == {
        "request_id": "id-1",
        "client_request_id": "theirs",
        "door": "http",
        "operation": "chat",
        "tenant": "acme",
        "model": "tiny",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "finish_reason": "length",
        "ttft_s": 1.0,
        "duration_s": 1.5,
        "trace_id": f"{span.context.trace_id:032x}",
        "span_id": f"{span.context.span_id:016x}",
    }
    assert MARKER not in str(vars(entry)) + span.to_json()
    assert attributes(span)["http.route"] == "/v1/chat/completions"
    assert "rpc.method" not in attributes(span)
