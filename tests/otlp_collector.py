"""An OTLP/HTTP collector as a process of its own: it prints its port, then appends what it gets to a file.

``python tests/otlp_collector.py FILE``. One JSON object a line: {"signal": "traces" | "metrics", "headers": {...},
"request": the decoded message}, ids of traces and spans in hex. Answers as the specification says
(https://opentelemetry.io/docs/specs/otlp/#otlphttp).
"""

from __future__ import annotations

import base64
import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

_MESSAGES: dict[str, tuple[str, type, type]] = {
    "/v1/traces": (
        "traces",
        trace_service_pb2.ExportTraceServiceRequest,
        trace_service_pb2.ExportTraceServiceResponse,
    ),
    "/v1/metrics": (
        "metrics",
        metrics_service_pb2.ExportMetricsServiceRequest,
        metrics_service_pb2.ExportMetricsServiceResponse,
    ),
}
_IDS = ("traceId", "spanId", "parentSpanId")
_PROTOBUF = "application/x-protobuf"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    file: Path
    writing = threading.Lock()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path not in _MESSAGES:
            return self._answer(404)
        if self.headers["Content-Type"] != _PROTOBUF:
            return self._answer(415)
        signal, request, response = _MESSAGES[self.path]
        message = request()
        try:
            message.ParseFromString(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
        except (DecodeError, OSError):
            return self._answer(400)
        line = {"signal": signal, "headers": dict(self.headers), "request": _readable(MessageToDict(message))}
        with self.writing, self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return self._answer(200, response().SerializeToString())

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", _PROTOBUF)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what came is in the file."""


def _readable(value: Any) -> Any:
    """Ids in hex, as everywhere else; protobuf's JSON has bytes in base64."""
    if isinstance(value, dict):
        return {key: base64.b64decode(v).hex() if key in _IDS else _readable(v) for key, v in value.items()}
    return [_readable(item) for item in value] if isinstance(value, list) else value


def main(file: Path) -> None:
    """Serve until stdin ends: with whoever started it."""
    file.touch()
    _Handler.file = file
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_port, flush=True)
        sys.stdin.read()
        server.shutdown()


class Collector:
    """A running collector, and what it got so far."""

    def __init__(self, port: int, file: Path) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._file = file

    @property
    def text(self) -> str:
        """Everything, as it was written down."""
        return self._file.read_text(encoding="utf-8")

    @property
    def exports(self) -> list[dict[str, Any]]:
        """One for each request that came, in order."""
        return [json.loads(line) for line in self.text.splitlines() if line.endswith("}")]

    @property
    def spans(self) -> list[dict[str, Any]]:
        """Every span, with ``attributes`` as a plain dict and ``actor`` from its resource."""
        return [
            {**span, "attributes": _attributes(span), "actor": _attributes(group["resource"])["service.instance.id"]}
            for export in self.exports
            for group in export["request"].get("resourceSpans", ())
            for scope in group["scopeSpans"]
            for span in scope["spans"]
        ]

    @property
    def metrics(self) -> dict[str, Any]:
        """The latest state of each metric, by its name."""
        return {
            metric["name"]: metric
            for export in self.exports
            for group in export["request"].get("resourceMetrics", ())
            for scope in group["scopeMetrics"]
            for metric in scope["metrics"]
        }


def _attributes(owner: dict[str, Any]) -> dict[str, Any]:
    return {entry["key"]: next(iter(entry["value"].values())) for entry in owner.get("attributes", ())}


@contextmanager
def collecting(file: Path) -> Iterator[Collector]:
    """A collector that writes to ``file``, for as long as the block lasts."""
    command = [sys.executable, "-W", "error", __file__, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Collector(int(process.stdout.readline()), file)
        finally:
            process.stdin.close()
            process.wait(30)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
