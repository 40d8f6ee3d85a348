"""``expertmesh batch run`` as its own process against local clusters: killed, stopped, cut off, refused."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from expertmesh.v1 import control_pb2

from cluster.access import token_hash
from cluster.config import ServerConfig
from cluster.launch import running_cluster
from tests.authority import Authority
from tests.local_cluster import running
from tests.processes import EXPERTMESH, run, serving
from tests.serving import Client
from tests.waiting import until

Local = Callable[..., ServerConfig]
ROWS = 500


@pytest.fixture(scope="module")
def client(checkpoint: tuple[Path, Any], local: Local) -> Iterator[Client]:
    """Of a cluster that goes on through everything; its target is ``client.target``."""
    with running(local(checkpoint[0])) as (client, _):
        yield client


class Batch:
    """The command over one input and one output."""

    def __init__(self, target: str, requests: Path, output: Path, *options: str) -> None:
        self.output = output
        self.errors = output.with_name(output.name + ".errors.jsonl")
        self.arguments = ("batch", "run", str(requests), "-o", str(output), "--target", target, *options)

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """To its end."""
        return run(*self.arguments, *options)

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        """In a process that is ended."""
        with subprocess.Popen(
            [EXPERTMESH, *self.arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def lines(self) -> int:
        """Complete ones, now."""
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def results(self) -> dict[str, Any]:
        """By custom_id; each is there once, and nothing is torn."""
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        found = {line["custom_id"]: line for line in lines}
        assert len(found) == len(lines)
        return found

    def answers(self) -> dict[str, Any]:
        """What the model gave for each row. What was in the prefix cache is a matter of luck."""
        bodies = {name: line["response"]["body"] for name, line in self.results().items()}
        for body in bodies.values():
            del body["usage"]["prompt_tokens_details"]
        return {name: (body["choices"], body["usage"]) for name, body in bodies.items()}


def row(custom_id: str, body: dict[str, Any], url: str = "/v1/completions") -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def write_rows(path: Path, count: int, tokens: int) -> Path:
    """Greedy and sampled ones, prompts and chats; none has a seed."""
    with path.open("w") as file:
        for number in range(count):
            body: dict[str, Any] = {"max_tokens": tokens, "temperature": number % 2, "ignore_eos": True}
            if number % 3:
                file.write(row(f"row {number}", body | {"prompt": f"hello {number}"}))
            else:
                chat = body | {"messages": [{"role": "user", "content": f"hello {number}"}]}
                file.write(row(f"row {number}", chat, "/v1/chat/completions"))
    return path


def requests_seen(client: Client) -> int:
    (gateway,) = client.load(control_pb2.ROLE_GATEWAY)
    return int(gateway.gateway.requests)


def target(client: Client) -> str:
    (gateway,) = client.load(control_pb2.ROLE_GATEWAY)
    return str(gateway.gateway.address)


def test_killed_five_times_nothing_is_lost_or_redone(client: Client, tmp_path: Path) -> None:
    requests, kills = write_rows(tmp_path / "in.jsonl", ROWS, 6), (0, 60, 170, 330, 470)
    calm = Batch(target(client), requests, tmp_path / "calm.jsonl")
    assert calm.run().returncode == 0
    before = requests_seen(client)
    batch = Batch(target(client), requests, tmp_path / "out.jsonl", "--concurrency", "8")
    manifest = tmp_path / "out.jsonl.manifest.json"
    for lines in kills:
        with batch.started() as process:
            until(lambda lines=lines: manifest.exists() and batch.lines() >= lines)  # type: ignore[misc]
            process.kill()
            assert process.wait() == -signal.SIGKILL
        whole = batch.output.read_bytes().rpartition(b"\n")
        assert lines <= batch.lines() < ROWS
        batch.output.write_bytes(b"".join(whole) + b'{"id":"batch_req_')  # torn by what else may come
        kept = b"".join(whole[:2])
        ended = batch.run() if lines == kills[-1] else None
    assert ended is not None
    assert ended.returncode == 0, ended.stderr
    assert "bytes of a line that was not complete" in ended.stderr
    assert f"{ROWS} rows ({kept.count(10)} finished earlier), 0 failed; " in ended.stdout
    assert batch.output.read_bytes().startswith(kept)
    assert set(batch.results()) == {f"row {number}" for number in range(ROWS)}
    assert batch.answers() == calm.answers()
    seen = requests_seen(client) - before
    assert ROWS <= seen <= ROWS + 8 * len(kills)
    print(f"{seen} requests for {ROWS} rows and {len(kills)} kills")
    assert batch.run().returncode == 0
    assert requests_seen(client) - before == seen


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(client: Client, tmp_path: Path) -> None:
    requests = write_rows(tmp_path / "in.jsonl", 100, 12)
    batch = Batch(target(client), requests, tmp_path / "out.jsonl", "--concurrency", "4")
    for number in (signal.SIGINT, signal.SIGTERM):
        earlier = batch.lines()
        with batch.started() as process:
            until(lambda earlier=earlier: batch.lines() > earlier)  # type: ignore[misc]
            process.send_signal(number)
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert (
            f"stopped: {len(batch.results())} of 100 rows are finished and on disk; the same command goes on" in errors
        )
        assert "Traceback" not in errors
    until(lambda: client.load(control_pb2.ROLE_GATEWAY)[0].gateway.streams == 0)
    assert batch.run("--concurrency", "32").returncode == 0
    assert len(batch.results()) == 100


def test_stopped_while_the_gateway_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(20)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        batch = Batch(address, write_rows(tmp_path / "in.jsonl", 2, 2), tmp_path / "out.jsonl")
        with batch.started() as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGTERM)
                _, errors = process.communicate(timeout=8)  # its question has 10 s
    assert process.returncode == 130
    assert errors == "stopped: 0 of 2 rows are finished and on disk; the same command goes on with the others\n"


def test_rows_that_are_refused_are_kept_apart(client: Client, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    good = [row(f"good {number}", {"prompt": "hello", "max_tokens": 2}) for number in range(3)]
    bad = [
        row("model", {"model": "other", "prompt": "hello"}),
        row("hot", {"prompt": "hello", "temperature": 9}),
        row("many", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10**6}, "/v1/chat/completions"),
        row("stream", {"prompt": "hello", "stream": True}),
    ]
    requests.write_text("".join([*bad[:2], *good, *bad[2:]]))
    batch = Batch(target(client), requests, tmp_path / "out.jsonl")
    ended = batch.run()
    assert ended.returncode == 1
    assert ended.stdout.startswith("7 rows (0 finished earlier), 4 failed; ")
    assert f"failed rows: 4, see {batch.errors}; --retry-failed does them again" in ended.stderr
    assert set(batch.results()) == {"good 0", "good 1", "good 2"}
    failed = Batch(target(client), requests, batch.errors).results()
    told = {name: (line["error"], line["response"]["status_code"]) for name, line in failed.items()}
    assert told == {"model": (None, 404), "hot": (None, 400), "many": (None, 400), "stream": (None, 400)}
    params = {name: line["response"]["body"]["error"]["param"] for name, line in failed.items()}
    assert params == {"model": "model", "hot": "temperature", "many": "max_tokens", "stream": "stream"}

    before = requests_seen(client)
    assert batch.run().returncode == 1
    assert requests_seen(client) == before
    again = batch.run("--retry-failed")
    assert again.stdout.startswith("7 rows (3 finished earlier), 4 failed; ")
    assert requests_seen(client) == before + 3  # the stream is refused here
    assert len(batch.errors.read_text().splitlines()) == 4


def test_a_gateway_that_is_killed_and_comes_back(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    keys = {"model": str(checkpoint[0]), "transport": "local"}
    config.write_text(yaml.safe_dump(keys | {"attention": {"threads": 1}, "experts": {"threads": 1}}))
    requests = write_rows(tmp_path / "in.jsonl", 60, 20)
    serve = ("--config", str(config), "--http-port", "0", "--grpc-port")
    with serving(*serve, "0") as server:
        address = server.address
        calm = Batch(address, requests, tmp_path / "calm.jsonl")
        assert calm.run().returncode == 0
        patient = Batch(address, requests, tmp_path / "patient.jsonl", "--concurrency", "8")
        hasty = Batch(address, requests, tmp_path / "hasty.jsonl", "--concurrency", "8", "--patience", "1")
        with patient.started() as process, hasty.started() as other:
            until(lambda: patient.lines() >= 10 and hasty.lines() >= 10)
            server.process.kill()
            server.process.wait()
            _, errors = other.communicate(timeout=30)
            assert other.returncode == 1
            assert f"error: no token came for 1 s (--patience): no gateway answers at {address}" in errors
            assert f"{len(hasty.results())} of 60 rows are finished and on disk; the same command goes on" in errors
            with serving(*serve, address.rpartition(":")[2]):
                out, errors = process.communicate(timeout=60)
                assert process.returncode == 0, errors
                assert "attempts repeated" in out
                assert hasty.run().returncode == 0
    assert patient.answers() == hasty.answers() == calm.answers()
    assert len(calm.answers()) == 60


def test_another_model_on_the_same_output(client: Client, checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text(row("a", {"prompt": "hello", "max_tokens": 1}) + row("b", {"prompt": "x", "max_tokens": 10**6}))
    batch = Batch(target(client), requests, tmp_path / "out.jsonl")
    assert batch.run().returncode == 1
    manifest = tmp_path / "out.jsonl.manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(told | {"model": told["model"] | {"dtype": "bfloat16"}}))
    refused = batch.run("--retry-failed")
    assert refused.returncode == 1
    assert "out.jsonl was begun otherwise:\n  model dtype: bfloat16 → float32\n" in refused.stderr
    assert len(batch.errors.read_text().splitlines()) == 1
    accepted = batch.run("--retry-failed", "--accept-changes")
    assert accepted.stdout.startswith("2 rows (1 finished earlier), 1 failed; ")
    assert json.loads(manifest.read_text()) == told


def test_tls_and_tokens(checkpoint: tuple[Path, Any], local: Local, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    pair, client_pair = authority.sign("127.0.0.1"), authority.sign("client@acme.example")
    tls = {"certificate": str(pair.certificate), "key": str(pair.key), "client_ca": str(authority.certificate)}
    tokens = [{"sha256": token_hash("emt_secret"), "tenant": "acme"}]
    token_file = tmp_path / "token"
    token_file.write_text("emt_secret\n")
    requests = write_rows(tmp_path / "in.jsonl", 3, 2)
    with running_cluster(local(checkpoint[0], **{"gateway.tls": tls, "access.tokens": tokens})) as doors:
        locks = ("--ca", str(authority.certificate), "--cert", str(client_pair.certificate))
        batch = Batch(doors.grpc, requests, tmp_path / "out.jsonl", *locks, "--key", str(client_pair.key))
        assert "UNAUTHENTICATED: " in batch.run().stderr
        refused = run(*batch.arguments, EXPERTMESH_TOKEN="wrong")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "UNAUTHENTICATED: " in refused.stderr
        assert "finished" not in refused.stderr
        assert batch.run("--token-file", str(token_file)).returncode == 0
        assert len(batch.results()) == 3
        plain = Batch(doors.grpc, requests, tmp_path / "plain.jsonl").run()
        assert "or it speaks TLS (--ca FILE or --tls)" in plain.stderr


def test_nobody_there(tmp_path: Path) -> None:
    batch = Batch("127.0.0.1:1", write_rows(tmp_path / "in.jsonl", 3, 2), tmp_path / "out.jsonl")
    ended = batch.run()
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: no gateway answers at 127.0.0.1:1 (is `expertmesh serve` running?")
