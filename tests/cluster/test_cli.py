"""The command line as a user types it, and a client that knows the service only through reflection."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.cluster.conftest import PROMPTS, ROLE, kv_in_use, nothing_of_ours, server_file
from tests.processes import Serving, run, serving, starting
from tests.serving import Client
from tests.waiting import until


@pytest.fixture(scope="module")
def config(ray_address: str, deepseek: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server_file(tmp_path_factory.mktemp("config"), ray_address, deepseek[0])


@pytest.fixture(scope="module")
def server(config: Path) -> Iterator[Serving]:
    with serving("--config", str(config), "--grpc-port", "0", "--http-port", "0") as server:
        yield server


def alive(pid: int) -> bool:
    """False for zombies too: Ray reaps its workers when it gets to it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ready_line_generate_and_status(server: Serving) -> None:
    assert "1 attention, 1 router, 2 expert shard(s) at 127.0.0.1:" in server.ready
    answer = run("generate", "hello", "--raw", "--max-tokens", "5", "--target", server.address)
    assert (answer.returncode, answer.stderr) == (0, "")
    status = run("status", "--target", server.address)
    assert status.returncode == 0
    for word in ("expert-0", "expert-1", "router-0", "attention-0", "gateway-0", "controller", "tcp", "shm", "epoch"):
        assert word in status.stdout


def test_bad_parameters_are_told_in_one_line(server: Serving) -> None:
    bad = run("generate", "hello", "--temperature", "9", "--target", server.address)
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: INVALID_ARGUMENT: sampling.temperature")
    nobody = run("generate", "hello", "--target", "127.0.0.1:1")
    assert nobody.returncode == 1
    assert "no gateway answers at 127.0.0.1:1" in nobody.stderr


def test_started_twice(server: Serving, config: Path) -> None:
    same_port = run("serve", "--config", str(config), "--grpc-port", server.address.split(":")[1], "--http-port", "0")
    assert same_port.returncode == 1
    assert "is in use on 127.0.0.1 by an expertmesh that serves" in same_port.stderr
    same_ray = run("serve", "--config", str(config), "--grpc-port", "0", "--http-port", "0")
    assert same_ray.returncode == 1
    assert "this Ray cluster is serving already" in same_ray.stderr


class Reflected:
    """A client made from what the server tells of itself, as grpcurl is."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)

    def stream(self, service: str, method: str, body: dict[str, Any]) -> Any:
        found = self.pool.FindServiceByName(service).methods_by_name[method]
        request = message_factory.GetMessageClass(found.input_type)
        response = message_factory.GetMessageClass(found.output_type)
        call = self.channel.unary_stream(
            f"/{service}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return call(json_format.ParseDict(body, request()), timeout=60)


def test_a_foreign_client_streams_two_chats_while_a_third_is_cancelled(server: Serving) -> None:
    client = Reflected(server.address)
    assert "expertmesh.v1.Inference" in client.database.get_services()

    def chat(text: str, tokens: int) -> Any:
        body = {
            "messages": {"messages": [{"role": "user", "content": text}]},
            "stopping": {"max_tokens": tokens, "ignore_eos": True},
        }
        return client.stream("expertmesh.v1.Inference", "Generate", body)

    calls = [chat("first", 120), chat("second", 120)]
    third = chat("third", 400)
    counts: dict[int, int] = {}

    def read(number: int) -> None:
        counts[number] = sum(len(message.token_ids) for message in calls[number])

    readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for reader in readers:
        reader.start()
    next(third)
    third.cancel()
    for reader in readers:
        reader.join(60)
    assert counts == {0: 120, 1: 120}
    with Client(server.address) as own:
        until(lambda: kv_in_use(own) == 0)
    client.channel.close()


def test_sigterm_leaves_nothing_behind(server: Serving, ray_address: str) -> None:
    """Last in this file: it ends the module's server."""
    with Client(server.address) as client:
        assert len(client.tokens(PROMPTS[0], 4)) == 4
        pids = [actor.pid for actor in client.cluster().actors]
    for _ in range(5):
        server.process.send_signal(signal.SIGINT)  # an impatient operator
    assert server.stop(signal.SIGTERM) == 0, server.errors
    until(lambda: not any(map(alive, pids)))
    assert nothing_of_ours(ray_address)
    assert run("generate", "x", "--target", server.address).returncode == 1


def test_what_a_killed_server_left_is_swept_by_the_next(config: Path) -> None:
    with serving("--config", str(config), "--grpc-port", "0", "--http-port", "0") as first:
        with Client(first.address) as client:
            actors = {actor.name: actor.pid for actor in client.cluster().actors}
        os.kill(actors["controller"], signal.SIGKILL)
        first.process.kill()
        first.process.wait()
    assert alive(actors["expert-0"])
    with (
        serving("--config", str(config), "--grpc-port", "0", "--http-port", "0") as second,
        Client(second.address) as client,
    ):
        until(lambda: not any(map(alive, actors.values())))
        assert len(client.tokens(PROMPTS[0], 4)) == 4
        assert second.stop(signal.SIGINT) == 0, second.errors


def test_stop_ends_a_cluster_whose_serve_is_gone(config: Path, ray_address: str) -> None:
    with serving("--config", str(config), "--grpc-port", "0", "--http-port", "0") as server:
        server.process.kill()
        server.process.wait()
    assert "serving already" in run("serve", "--config", str(config), "--grpc-port", "0", "--http-port", "0").stderr
    stopped = run("stop", "--ray-address", ray_address)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert "controller" in stopped.stdout
    assert "expertmesh-expert-0" in stopped.stdout
    assert nothing_of_ours(ray_address)
    assert "nothing of expertmesh runs there" in run("stop", "--ray-address", ray_address).stdout


def test_addresses_of_ray_that_lead_nowhere(config: Path, tmp_path: Path) -> None:
    for address, message in (("127.0.0.1:1", "no Ray cluster answers"), ("nonsense", "allowed: auto, local, or HOST:")):
        file = tmp_path / "a.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "ray": {"address": address}}))
        refused = run("serve", "--config", str(file), "--grpc-port", "0", "--http-port", "0")
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
        assert message in refused.stderr


def test_ctrl_c_while_there_is_no_room(config: Path, ray_address: str, tmp_path: Path) -> None:
    """The bundles that wait for a node go too."""
    tree = yaml.safe_load(config.read_text())
    tree["experts"]["node_labels"] = {ROLE: "nowhere"}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(tree))
    with starting("--config", str(file), "--grpc-port", "0", "--http-port", "0") as process:
        until(lambda: not nothing_of_ours(ray_address))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    until(lambda: nothing_of_ours(ray_address))
