"""``expertmesh serve``: check everything that can be checked, start, say one line, stop in order."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

from cluster.access import missing_locks, refuse_open_door
from cluster.cli.terminal import complain
from cluster.config import ConfigError, ServerConfig, load_config
from cluster.gateway.settings import Doors
from cluster.model_source import model_name, pinned_model
from cluster.tls import server_pem, wire_tls

_WHO_TIMEOUT_S = 2.0
_OPEN = {
    "gateway.tls": "whoever is on the way can read and change what is sent, tokens too",
    "access.tokens": "whoever reaches that address can use the model and change the cluster",
}


def run_serve(
    model: str | None,
    config_file: Path | None,
    grpc_port: int | None,
    http_port: int | None,
    insecure: bool,
    quantization: str | None,
) -> int:
    """Serve until SIGINT or SIGTERM; the exit status."""
    signals = StopSignals()
    flags = {
        "model": model,
        "gateway.port": grpc_port,
        "gateway.http_port": http_port,
        "gateway.insecure": insecure or None,
        "experts.quantization": quantization,
    }
    try:
        config = load_config(config_file, {key: value for key, value in flags.items() if value is not None})
        check_door(config)
        check_ports(config)
        check_kernels()
        config = config.model_copy(update={"model": pinned_model(config.model)})
        with ready_cluster(config, weight_bytes(config), signals):
            signals.wait()
            print("stopping", file=sys.stderr, flush=True)
        return 0
    except (Stopped, SystemExit):  # SystemExit: Ray's own SIGTERM handler, in force while ray.init runs
        print("stopped before it was ready", file=sys.stderr)
        return 130
    except expected_errors() as error:
        return complain(str(error))


class Stopped(BaseException):
    """SIGINT or SIGTERM came before there was something to serve."""


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP: they end whatever is done in order. A second one changes nothing.

    While ``interrupting``, the first raises Stopped wherever the main thread is. While Ray is started or used that is
    not safe (it crashes in the middle of its own C++ calls): then a signal is only noted, and ``check`` raises.
    The kernel may hand a signal to any thread, Ray's included, which interrupts nothing in the main thread: so the
    interpreter is told to write each one to a pipe, and ``wait`` waits for that.
    """

    def __init__(self) -> None:
        self.interrupting = True
        self._stopped = False
        self._arrived, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._install()

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        self._install()
        if self._stopped:
            raise Stopped

    def wait(self) -> None:
        """Return when a signal comes, or at once if one has come."""
        self._install()
        while not self._stopped:
            select.select([self._arrived], [], [])

    def _install(self) -> None:
        """Again and again: Ray puts a SIGTERM handler of its own when it starts."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._stopped = not self._stopped, True
        if first and self.interrupting:
            raise Stopped


def check_ports(config: ServerConfig) -> None:
    """Refuse early what cannot be opened. Raises ConfigError."""
    for key in ("port", "http_port", "health_port", "metrics_port"):
        port = getattr(config.gateway, key)
        if port is not None:
            _check_port(key, config.gateway.host, port)


def _check_port(key: str, host: str, port: int) -> None:
    """Also says who is there, when that is one of us. Raises ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ConfigError(f"gateway.host: {host!r}: {error.strerror}") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"gateway.{key}: {port} is in use on {host}{_who(key, host, port)}") from None
            raise ConfigError(f"gateway.host: cannot listen on {host}:{port}: {error.strerror}") from None


def check_door(config: ServerConfig) -> None:
    """Refuse an open door and TLS files that cannot be used; say what an insecure one means. Raises ConfigError."""
    refuse_open_door(config)
    if config.gateway.tls is not None:
        server_pem(config.gateway.tls)
    if config.data_plane.tls is not None:
        wire_tls(config.data_plane.tls)
    for key in missing_locks(config):
        text = f"{config.gateway.host} is not loopback and {key} is not set: {_OPEN[key]}"
        print(f"warning: gateway.host: {text}", file=sys.stderr)


def check_kernels() -> None:
    """Refuse a wrong EXPERTMESH_ISA, on which every actor of this machine would end. Raises ConfigError."""
    from actors.native.library import library

    try:
        library()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def weight_bytes(config: ServerConfig) -> int:
    """Have the checkpoint on this machine and open it and its tokenizer, so that what is wrong with them is said before
    anything starts; of the weights, what their files' headers tell. A repository's are fetched only when the rest is
    sound.

    Returns the bytes that attention and expert shards will read. Raises ConfigError, CheckpointError,
    UnsupportedModelError, TokenizerError.
    """
    from actors.model.errors import CheckpointError
    from actors.model.families import load_spec
    from actors.model.surplus import skipped_tensors
    from actors.model.weight_files import locate_weights
    from cluster.inspection import bytes_by_part, tensor_problems
    from cluster.model_source import resolve_model

    path = resolve_model(config.model, progress=True, check=partial(check_description, config))
    check_description(config, path)
    spec = load_spec(path)
    files = locate_weights(path).values()
    entries = {name: entry for held in files for name, entry in held.items()}
    if problems := tensor_problems(spec, entries):
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    if skipped := skipped_tensors(spec, entries):
        print(f"note: {skipped} tensors of layers for multi-token prediction are skipped", file=sys.stderr)
    by_part = bytes_by_part(spec, files)
    resident = sum(size for part, size in by_part.items() if part not in ("expert", "gate"))
    return by_part["expert"] * config.experts.min_replicas + resident * config.attention.replicas


def check_description(config: ServerConfig, folder: Path) -> None:
    """Open everything but the weights: what ``folder`` says of the model, whether it can be served as configured, and
    its tokenizer. Raises ConfigError, CheckpointError, UnsupportedModelError, TokenizerError.
    """
    from actors.model.families import load_spec
    from cluster.gateway.served_model import served_model
    from cluster.settings import SettingsFactory, check_quantization
    from cluster.shard_counts import check_shards

    spec = load_spec(folder)
    if config.experts.shards:  # else it is known when the nodes are
        check_shards(config, spec, config.experts.shards)
    check_quantization(config, spec)
    served_model(SettingsFactory(config, {"": folder}).gateway(""))


def expected_errors() -> tuple[type[Exception], ...]:
    """What a user can cause; anything else is a bug and shows its traceback."""
    from actors.model.errors import CheckpointError, UnsupportedModelError
    from actors.refusals import NoMemory
    from actors.transport.base import TransportError
    from cluster.controller import StartFailed
    from cluster.default_model import DefaultModelError
    from cluster.fleet import ActorUnreachable
    from cluster.gateway.settings import PortInUse
    from cluster.gateway.tokenizer import TokenizerError
    from cluster.ray_fleet import AlreadyServing
    from placement.bundles import NoRoom

    return (
        ActorUnreachable,
        AlreadyServing,
        CheckpointError,
        ConfigError,
        DefaultModelError,
        NoMemory,
        NoRoom,
        PortInUse,
        StartFailed,
        TokenizerError,
        TransportError,
        UnsupportedModelError,
    )


@contextmanager
def ready_cluster(config: ServerConfig, expected_bytes: int, signals: StopSignals) -> Iterator[Doors]:
    """A running cluster, with a progress bar until it is up and then one line that says so."""
    from cluster.controller import Progress as StartProgress
    from cluster.launch import running_cluster

    signals.interrupting = False
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting Ray", total=expected_bytes)

        reported = StartProgress()

        def on_progress(now: StartProgress) -> None:
            nonlocal reported
            reported = now
            signals.check()
            bar.update(task, description=now.phase, completed=now.loaded_bytes)

        with running_cluster(config, on_progress) as doors:
            bar.stop()
            summary = _summary(config, reported.expert_shards)
            print(f"expertmesh is ready: {summary} at {_where(config, doors)}; Ctrl-C stops it", flush=True)
            yield doors


def _summary(config: ServerConfig, expert_shards: int) -> str:
    attention = config.attention.replicas
    return f"{model_name(config.model)} on {attention} attention, {attention} router, {expert_shards} expert shard(s)"


def _where(config: ServerConfig, doors: Doors) -> str:
    """The addresses that users need; the last two doors are for probes."""
    scheme = "http" if config.gateway.tls is None else "https"
    return doors.grpc + (f" (gRPC) and {scheme}://{doors.http}/v1 (HTTP)" if doors.http else "")


def _who(key: str, host: str, port: int) -> str:
    """Who listens there, as far as it tells."""
    if key != "port":
        return "; choose another" + (", or null for no such door" if key == "http_port" else "")
    import grpc
    from expertmesh.v1.inference_pb2 import GetModelInfoRequest
    from expertmesh.v1.inference_pb2_grpc import InferenceStub

    from cluster.gateway.settings import host_port

    another = "stop it, or choose another --grpc-port"
    with grpc.insecure_channel(host_port(host, port)) as channel:
        try:
            info = InferenceStub(channel).GetModelInfo(GetModelInfoRequest(), timeout=_WHO_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return f" by a gateway that wants a token; {another}"
        else:
            return f" by an expertmesh that serves {info.model}; {another}"
    return f" by a server that speaks TLS; {another}" if _speaks_tls(host, port) else ""


def _speaks_tls(host: str, port: int) -> bool:
    try:
        ssl.get_server_certificate((host, port), timeout=_WHO_TIMEOUT_S)
    except OSError:
        return False
    return True
