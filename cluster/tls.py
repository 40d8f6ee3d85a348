"""PEM files, read and checked while there is still somebody to tell."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from actors.transport.tls import WireTls
from cluster.config import ConfigError, TlsConfig, WireTlsConfig


@dataclass(frozen=True)
class ServerPem:
    """What a TLS server shows, and whom it trusts to sign its clients' certificates (None: it asks for none)."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None


def server_pem(tls: TlsConfig) -> ServerPem:
    """Read the files of ``gateway.tls``. Raises ConfigError with the key and the file."""
    certificate, key = key_pair("gateway.tls.certificate", tls.certificate, "gateway.tls.key", tls.key)
    client_ca = certificates("gateway.tls.client_ca", tls.client_ca) if tls.client_ca is not None else None
    return ServerPem(certificate, key, client_ca)


def wire_tls(tls: WireTlsConfig) -> WireTls:
    """Read the files of ``data_plane.tls``. Raises ConfigError with the key and the file, also if an actor with them
    would not accept another one with them."""
    certificates("data_plane.tls.ca", tls.ca)
    key_pair("data_plane.tls.certificate", tls.certificate, "data_plane.tls.key", tls.key)
    made = WireTls(tls.certificate, tls.key, tls.ca)
    try:
        made.check()
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"data_plane.tls.certificate: {tls.certificate}: not good for wires under data_plane.tls.ca ({tls.ca}): "
            f"{error.verify_message}"
        ) from None
    return made


def wire_tls_problem(tls: WireTlsConfig) -> str | None:
    """What keeps an actor of this machine from using these files; None when nothing does."""
    try:
        wire_tls(tls)
    except ConfigError as error:
        return str(error)
    return None


def certificates(name: str, path: Path) -> bytes:
    """The PEM certificates in ``path``, which ``name`` (a key or an option) gave. Raises ConfigError."""
    pem = read(name, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise ConfigError(f"{name}: {path}: no PEM certificate can be read from it ({error.reason})") from None
    return pem


def key_pair(certificate_name: str, certificate: Path, key_name: str, key: Path) -> tuple[bytes, bytes]:
    """A certificate (leaf first) and its private key, as PEM. Raises ConfigError, also if they do not match."""

    def refuse_password() -> str:
        raise ConfigError(f"{key_name}: {key}: the key is encrypted; a key without a passphrase is needed")

    pair = certificates(certificate_name, certificate), read(key_name, key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, refuse_password)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise ConfigError(f"{key_name}: {key}: not the key of the certificate in {certificate}") from None
        raise ConfigError(f"{key_name}: {key}: no PEM private key can be read from it ({error.reason})") from None
    return pair


def read(name: str, path: Path) -> bytes:
    """The file's bytes. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {path}: cannot be read: {error.strerror}") from None
