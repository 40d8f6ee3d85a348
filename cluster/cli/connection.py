"""How a command reaches a gateway: the options that all of them share, checked before anything is sent."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.terminal import complain

DEFAULT_TARGET = "127.0.0.1:50051"
TOKEN_VARIABLE = "EXPERTMESH_TOKEN"

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[^]]+)\]|(?P<host>[^][:/]+))(?::\d+)?")
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class ClientTls:
    """PEM. ``ca`` None: the well-known authorities. A certificate with its key is for gateways that ask for one."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Connection:
    """A gateway, and how to speak to it. ``tls`` None: plaintext. ``token`` "": none is sent."""

    target: str
    tls: ClientTls | None = None
    token: str = field(default="", repr=False)


def read_connection(
    target: Annotated[
        str, typer.Option("--target", metavar="HOST:PORT", help="The gateway to talk to.")
    ] = DEFAULT_TARGET,
    ca: Annotated[
        Path | None, typer.Option("--ca", metavar="FILE", help="TLS; this authority (PEM) signed the gateway's key.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="TLS; a well-known authority signed the gateway's key.")] = False,
    cert: Annotated[
        Path | None, typer.Option("--cert", metavar="FILE", help="Client certificate (PEM), if the gateway wants one.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="The client certificate's key.")] = None,
    # no option takes the token itself: every user of a machine can read command lines
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help=f"Holds the token; else ${TOKEN_VARIABLE}.")
    ] = None,
) -> Connection:
    """From options to what they mean. Raises ConfigError with the option and what is wrong with it."""
    from cluster.config import ConfigError
    from cluster.tls import certificates, key_pair

    if (cert is None) != (key is None):
        raise ConfigError("--cert and --key: both or none; one is the certificate, the other its private key")
    pair = key_pair("--cert", cert, "--key", key) if cert is not None and key is not None else (None, None)
    encrypted = tls or ca is not None or cert is not None
    connection = Connection(
        target,
        ClientTls(certificates("--ca", ca) if ca is not None else None, *pair) if encrypted else None,
        _token(token_file),
    )
    if connection.token and connection.tls is None and not stays_here(target):
        raise ConfigError(
            f"--target: {target!r} is not loopback, and without TLS everybody on the way could read the token: give "
            f"--ca FILE or --tls (or no token: neither --token-file nor ${TOKEN_VARIABLE})"
        )
    return connection


def stays_here(target: str) -> bool:
    """True if what is sent to ``target`` does not leave this machine, as far as its form tells. Raises ConfigError."""
    from cluster.access import is_loopback

    found = _HOST_PORT.fullmatch(target)
    if found is None:
        return target.startswith(("unix:", "unix-abstract:"))
    return is_loopback(found["v6"] or found["host"], "--target")


def connecting(command: Callable[..., int]) -> Callable[..., None]:
    """A typer command from a function of ``connection`` and its own options that returns the exit status.

    typer has no groups of options: the signature gets those of ``read_connection`` in place of ``connection``.
    """
    shared = inspect.signature(read_connection, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when grpc is imported: its own lines would join ours
        from cluster.config import ConfigError

        try:
            connection = read_connection(**{name: given.pop(name) for name in shared})
        except ConfigError as error:
            raise typer.Exit(complain(str(error))) from None
        raise typer.Exit(command(connection=connection, **given))

    parameters = [*(p for p in own if p.name != "connection"), *shared.values()]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    vars(run)["__signature__"] = inspect.Signature(keywords)
    return run


def _token(file: Path | None) -> str:
    from cluster.config import ConfigError
    from cluster.tls import read

    source = f"--token-file: {file}" if file is not None else f"${TOKEN_VARIABLE}"
    given = read("--token-file", file) if file is not None else os.environ.get(TOKEN_VARIABLE, "").encode()
    token = given.decode("ascii", "replace").strip()
    if (token or file is not None) and not _TOKEN.fullmatch(token):
        raise ConfigError(f"{source}: must hold one token: printable ASCII without blanks")
    return token
