"""Who may call, and as whom. Knows no protocol: every door asks here."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import ConfigError, Role, ServerConfig, TokenConfig

_TOKEN_BYTES = 32
_TOKEN_PREFIX = "emt_"
"""Lets scanners for leaked secrets recognise one."""

_BEARER = "bearer"


@dataclass(frozen=True)
class Caller:
    """``share`` is the tenant's weight beside the others'."""

    tenant: str
    role: Role
    share: float

    @property
    def is_admin(self) -> bool:
        """True if the cluster may be looked at and changed."""
        return self.role == "admin"


EVERYBODY = Caller(tenant="", role="admin", share=1.0)
"""Whoever calls where no tokens are configured."""


class AccessList:
    """The configured tokens, by their hashes alone."""

    def __init__(self, tokens: Sequence[TokenConfig] = ()) -> None:
        self._entries = [(bytes.fromhex(t.sha256), Caller(t.tenant, t.role, t.share)) for t in tokens]

    @property
    def is_open(self) -> bool:
        """True if there are no tokens: then everybody is ``EVERYBODY``."""
        return not self._entries

    def caller(self, token: str) -> Caller | None:
        """Who comes with ``token``; None if nobody does. Takes the same time whichever entry it is, or none."""
        digest = bytes.fromhex(token_hash(token))
        found = None
        for known, caller in self._entries:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def new_token() -> str:
    """256 random bits."""
    return _TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)


def token_hash(token: str) -> str:
    """What the configuration holds, in hex. One round of SHA-256: a slow hash makes guessing passwords expensive, and
    256 random bits cannot be guessed at any speed."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def bearer_token(header: str) -> str | None:
    """The token of ``Bearer TOKEN`` (RFC 6750; the scheme in any case), None if that is not what it says."""
    scheme, _, token = header.partition(" ")
    token = token.strip(" ")
    return token if scheme.lower() == _BEARER and token and " " not in token else None


def is_loopback(host: str, field: str) -> bool:
    """True if nobody but this machine can mean ``host``. Raises ConfigError, in the name of ``field``, if it has no
    address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"{field}: {host!r} has no address: {error}") from None
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def missing_locks(config: ServerConfig) -> list[str]:
    """Keys that would close the gateway's door and are not set; none are missed on loopback. Raises ConfigError."""
    locks = {"gateway.tls": config.gateway.tls, "access.tokens": config.access.tokens}
    missing = [key for key, value in locks.items() if not value]
    return missing if missing and not is_loopback(config.gateway.host, "gateway.host") else []


def refuse_open_door(config: ServerConfig) -> None:
    """Raises ConfigError if others than this machine could reach a gateway without TLS or tokens, unless
    ``gateway.insecure`` says that this is meant."""
    missing = missing_locks(config)
    if missing and not config.gateway.insecure:
        raise ConfigError(
            f"gateway.host: {config.gateway.host!r} is not loopback and {' and '.join(missing)} not set; set what is "
            "missing, or give --insecure (gateway.insecure: true) where something else guards that address"
        )
