"""A cluster behind TLS and tokens: who gets in, by which door, and what the others are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from expertmesh.v1 import control_pb2, inference_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.access import AccessList, Caller, token_hash
from cluster.config import ConfigError, ServerConfig, load_config
from cluster.launch import running_cluster
from tests.authority import Authority, Pair
from tests.processes import run
from tests.serving import Client, ids_request

Local = Callable[..., ServerConfig]
USER, ADMIN = "emt_the-user's", "emt_the-admin's"
TOKENS = [
    {"sha256": token_hash(USER), "tenant": "acme", "share": 2},
    {"sha256": token_hash(ADMIN), "tenant": "ops", "role": "admin"},
]
NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def client_pair(authority: Authority) -> Pair:
    return authority.sign("client@acme.example")


def door(local: Local, path: Path, pair: Pair, client_ca: Path | None = None) -> ServerConfig:
    tls = {"certificate": str(pair.certificate), "key": str(pair.key), "client_ca": client_ca and str(client_ca)}
    return local(path, **{"gateway.tls": tls, "access.tokens": TOKENS})


@pytest.fixture(scope="module")
def closed(checkpoint: tuple[Path, Any], local: Local, authority: Authority) -> Iterator[str]:
    """Address of a gateway with TLS and tokens."""
    with running_cluster(door(local, checkpoint[0], authority.sign("127.0.0.1"))) as doors:
        yield doors.grpc


@pytest.fixture(scope="module")
def mutual(checkpoint: tuple[Path, Any], local: Local, authority: Authority) -> Iterator[str]:
    """The same, and clients need a certificate."""
    pair = authority.sign("127.0.0.1", "localhost")
    with running_cluster(door(local, checkpoint[0], pair, authority.certificate)) as doors:
        yield doors.grpc


@pytest.fixture(scope="module")
def plain(checkpoint: tuple[Path, Any], local: Local) -> Iterator[str]:
    """Tokens without TLS, on loopback."""
    with running_cluster(local(checkpoint[0], **{"access.tokens": TOKENS})) as doors:
        yield doors.grpc


def credentials(authority: Authority, token: str = "", pair: Pair | None = None) -> grpc.ChannelCredentials:
    files = (pair.key.read_bytes(), pair.certificate.read_bytes()) if pair else (None, None)
    tls = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *files)
    return grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(token)) if token else tls


def code(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def healthy(client: Client) -> bool:
    request = health_pb2.HealthCheckRequest(service="expertmesh.v1.Inference")
    answer = health_pb2_grpc.HealthStub(client.channel).Check(request, timeout=20)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_a_user_streams_and_leaves_the_cluster_alone(closed: str, authority: Authority) -> None:
    with Client(closed, credentials(authority, USER)) as client:
        assert len(client.tokens([1, 2, 3], 12)) == 12
        assert client.inference.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=20).vocab_size == 300
        assert code(client.cluster) == grpc.StatusCode.PERMISSION_DENIED


def test_an_admin_may_both(closed: str, authority: Authority) -> None:
    with Client(closed, credentials(authority, ADMIN)) as client:
        assert client.load(control_pb2.ROLE_GATEWAY)[0].gateway.address == closed
        assert len(client.tokens([1, 2, 3], 3)) == 3


@pytest.mark.parametrize("token", ["", "emt_wrong", token_hash(ADMIN)])
def test_strangers_get_nothing_but_health(closed: str, authority: Authority, token: str) -> None:
    with Client(closed, credentials(authority, token)) as client:
        assert code(lambda: client.tokens([1, 2, 3], 3)) == grpc.StatusCode.UNAUTHENTICATED
        assert code(client.cluster) == grpc.StatusCode.UNAUTHENTICATED
        assert healthy(client)


def test_reflection_wants_a_token(closed: str, authority: Authority) -> None:
    with Client(closed, credentials(authority)) as client:
        services = ProtoReflectionDescriptorDatabase(client.channel).get_services
        assert code(services) == grpc.StatusCode.UNAUTHENTICATED
    with Client(closed, credentials(authority, USER)) as client:
        assert "expertmesh.v1.Inference" in ProtoReflectionDescriptorDatabase(client.channel).get_services()


def test_who_does_not_speak_tls_or_trusts_others_gets_no_connection(
    closed: str, authority: Authority, stranger: Authority
) -> None:
    for wrong in (None, credentials(stranger, USER), grpc.ssl_channel_credentials()):
        with Client(closed, wrong) as client:
            assert code(lambda client=client: healthy(client)) == grpc.StatusCode.UNAVAILABLE


def test_mutual_tls_wants_a_certificate_and_the_token_too(
    mutual: str, authority: Authority, stranger: Authority, client_pair: Pair
) -> None:
    with Client(mutual, credentials(authority, USER, client_pair)) as client:
        assert len(client.tokens([1, 2, 3], 3)) == 3
    with Client(mutual, credentials(authority, "", client_pair)) as client:
        assert code(lambda: client.tokens([1], 1)) == grpc.StatusCode.UNAUTHENTICATED
    for pair in (None, stranger.sign("client@acme.example")):
        with Client(mutual, credentials(authority, USER, pair)) as client:
            assert code(lambda client=client: healthy(client)) == grpc.StatusCode.UNAVAILABLE


def test_on_loopback_tokens_work_without_tls(plain: str) -> None:
    with Client(plain) as client:
        assert code(lambda: client.tokens([1], 1)) == grpc.StatusCode.UNAUTHENTICATED
        answer = client.inference.Generate(
            ids_request([1, 2], 4), metadata=[("authorization", f"Bearer {USER}")], timeout=60
        )
        assert sum(len(message.token_ids) for message in answer) == 4


def test_an_open_door_is_refused_to_programs_too(checkpoint: tuple[Path, Any], local: Local) -> None:
    with (
        pytest.raises(ConfigError, match=r"'0\.0\.0\.0' is not loopback and gateway\.tls and access\.tokens not set"),
        running_cluster(local(checkpoint[0], **{"gateway.host": "0.0.0.0"})),
    ):
        pass
    insecure = {"gateway.host": "0.0.0.0", "gateway.insecure": True}
    with running_cluster(local(checkpoint[0], **insecure)) as doors, Client(doors.grpc) as client:
        assert healthy(client)


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path: Path) -> Callable[[str], str]:
    def write(token: str) -> str:
        (tmp_path / "token").write_text(token + "\n")
        return str(tmp_path / "token")

    return write


def failed(*arguments: str, **environment: str) -> str:
    """What a command that fails says: one line, and no token in it."""
    result = run(*arguments, **environment)
    assert (result.returncode, result.stdout.strip()) == (1, "")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert USER not in line
    return line.removeprefix("error: ")


def test_commands_with_what_they_need(
    closed: str, mutual: str, plain: str, authority: Authority, client_pair: Pair, token_file: Callable[[str], str]
) -> None:
    ca = ("--ca", str(authority.certificate))
    own = ("--cert", str(client_pair.certificate), "--key", str(client_pair.key))
    generate = ("generate", "hello", "--raw", "--max-tokens", "3", "--target")
    for arguments in (
        (*generate, closed, *ca, "--token-file", token_file(USER)),
        (*generate, mutual, *ca, *own, "--token-file", token_file(USER)),
        (*generate, plain, "--token-file", token_file(USER)),
    ):
        answer = run(*arguments, EXPERTMESH_TOKEN="not this one")
        assert (answer.returncode, answer.stderr) == (0, "")
    status = run("status", "--target", closed, *ca, EXPERTMESH_TOKEN=ADMIN)
    assert status.returncode == 0, status.stderr
    assert "gateway-0" in status.stdout


def test_commands_that_get_no_answer_say_why(
    closed: str, mutual: str, plain: str, authority: Authority, stranger: Authority
) -> None:
    def asked(target: str, *arguments: str, **environment: str) -> str:
        return failed("status", "--target", target, *arguments, **environment)

    ca = ("--ca", str(authority.certificate))
    assert asked(closed, *ca).startswith("UNAUTHENTICATED: a token is needed")
    assert "--token-file FILE, or $EXPERTMESH_TOKEN" in asked(plain, EXPERTMESH_TOKEN="wrong")
    assert asked(closed, *ca, EXPERTMESH_TOKEN=USER).startswith("PERMISSION_DENIED: role admin is needed")
    assert "or it speaks TLS (--ca FILE or --tls)" in asked(closed)
    wrong = asked(closed, "--ca", str(stranger.certificate), EXPERTMESH_TOKEN=ADMIN)
    assert wrong.startswith(f"no TLS connection to {closed}: CERTIFICATE_VERIFY_FAILED")
    assert asked(closed, "--tls").startswith(f"no TLS connection to {closed}: CERTIFICATE_VERIFY_FAILED")
    assert "WRONG_VERSION_NUMBER" in asked(plain, *ca)
    assert "does it want a certificate (--cert, --key)?" in asked(mutual, *ca)
    assert "is for other names" in asked(closed.replace("127.0.0.1", "localhost"), *ca)
    assert "no gateway answers at 127.0.0.1:1" in asked(NOBODY, *ca, EXPERTMESH_TOKEN=USER)


def test_options_that_cannot_be_used_are_named(
    tmp_path: Path, authority: Authority, client_pair: Pair, token_file: Callable[[str], str]
) -> None:
    def asked(*arguments: str, **environment: str) -> str:
        return failed("generate", "hello", *arguments, **environment)

    certificate = str(client_pair.certificate)
    for target in ("192.0.2.1:50051", "[2001:db8::1]:50051", "dns:///127.0.0.1:50051", "127.0.0.1:1@192.0.2.1"):
        line = asked("--target", target, "--token-file", token_file(USER))
        assert f"--target: {target!r} is not loopback, and without TLS everybody" in line
    assert "has no address" in asked("--target", "no.such.host.invalid:1", EXPERTMESH_TOKEN=USER)
    assert "--cert and --key: both or none" in asked("--cert", certificate)
    assert f"--key: {certificate}: no PEM private key" in asked("--cert", certificate, "--key", certificate)
    assert f"--ca: {client_pair.key}: no PEM certificate" in asked("--ca", str(client_pair.key))
    assert "--token-file: /no/such/file: cannot be read: No such file" in asked("--token-file", "/no/such/file")
    for text in ("", f"{USER} {USER}", "größe"):
        assert "must hold one token" in asked("--token-file", token_file(text))
    assert "$EXPERTMESH_TOKEN: must hold one token" in asked(EXPERTMESH_TOKEN=f"{USER} {USER}")


def test_the_command_that_makes_tokens(tmp_path: Path) -> None:
    """What it prints is what the configuration and the other commands take."""
    made = run("token", "--tenant", "123", "--role", "admin", "--share", "2.5")
    assert made.returncode == 0
    token = made.stdout.removesuffix("\n")
    assert token not in made.stderr
    entry = tmp_path / "server.yaml"
    entry.write_text(made.stderr[made.stderr.index("access:") :])
    assert yaml.safe_load(entry.read_text())["access"]["tokens"][0]["sha256"] == token_hash(token)
    assert AccessList(load_config(entry).access.tokens).caller(token) == Caller("123", "admin", 2.5)
    assert run("token", "--tenant", "123").stdout != made.stdout
    assert "--tenant: " in failed("token", "--tenant", "a/b")
    assert "'user' or 'admin'" in failed("token", "--tenant", "a", "--role", "root")
    assert "equal to 0.001" in failed("token", "--tenant", "a", "--share", "0")


@pytest.mark.parametrize(("fixture", "words"), [("closed", "a server that speaks TLS"), ("plain", "wants a token")])
def test_a_port_that_such_a_gateway_holds(
    request: pytest.FixtureRequest, checkpoint: tuple[Path, Any], fixture: str, words: str
) -> None:
    port = request.getfixturevalue(fixture).rpartition(":")[2]
    line = failed("serve", "--model", str(checkpoint[0]), "--grpc-port", port, "--http-port", "0")
    assert f"gateway.port: {port} is in use on 127.0.0.1 by a" in line
    assert words in line
