"""What is measured of each request. Names, buckets and labels follow OpenTelemetry's conventions for generative AI
where those have one (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/); ours begin with
``expertmesh``.

Labels are words from closed sets: the model's is the served one's name or ``other``, whatever a client asked for.
"""

from __future__ import annotations

from opentelemetry.metrics import Histogram, Meter

_REQUEST_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_CALL_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(float(4**power) for power in range(14))


class RequestMetrics:
    """The instruments. All times in seconds."""

    def __init__(self, meter: Meter) -> None:
        def seconds(name: str, buckets: tuple[float, ...], meaning: str) -> Histogram:
            return meter.create_histogram(name, "s", meaning, explicit_bucket_boundaries_advisory=buckets)

        self.duration = seconds("gen_ai.server.request.duration", _REQUEST_S, "From a request's arrival to its end.")
        self.first_token = seconds(
            "gen_ai.server.time_to_first_token", _FIRST_TOKEN_S, "From a request's arrival to its first token."
        )
        self.output_token = seconds(
            "gen_ai.server.time_per_output_token", _TOKEN_S, "Mean time of a request's tokens after the first."
        )
        self.usage = meter.create_histogram(
            "gen_ai.client.token.usage", "{token}", "Tokens of a request.", explicit_bucket_boundaries_advisory=_TOKENS
        )
        self.between_tokens = seconds(
            "expertmesh.token.interval", _FIRST_TOKEN_S, "Between one token of a request and the next."
        )
        self.queue = seconds("expertmesh.request.queue", _REQUEST_S, "Wait on an attention shard for the first step.")
        self.prefill = seconds("expertmesh.request.prefill", _REQUEST_S, "From the first step to the first token.")
        self.decode = seconds("expertmesh.request.decode", _REQUEST_S, "From the first token to the end.")
        self.rpc = seconds("rpc.server.call.duration", _CALL_S, "Calls of Generate that came over gRPC, by status.")
        self.http = seconds("http.server.request.duration", _CALL_S, "Requests over HTTP, by route and status.")
        self.prompt_tokens = meter.create_counter("expertmesh.prompt.tokens", "{token}", "Tokens of admitted prompts.")
        self.generated_tokens = meter.create_counter("expertmesh.generated.tokens", "{token}", "Tokens generated.")
        self.finished = meter.create_counter(
            "expertmesh.requests.finished", "{request}", "Requests that ended, by door and by how they ended."
        )
