"""A certificate authority for tests, and what it signs, as PEM files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Writes into ``folder``; ``certificate`` is what its peers trust."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._ca = trustme.CA()
        self.certificate = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.certificate))

    def sign(self, *names: str) -> Pair:
        """A certificate for hosts, addresses, or mail addresses (clients)."""
        pair = Pair(self._folder / f"{names[0]}.pem", self._folder / f"{names[0]}.key")
        leaf = self._ca.issue_cert(*names)
        pair.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(str(pair.key))
        return pair


def encrypted(key: Path) -> Path:
    """A copy of a private key that asks for a passphrase."""
    secret = load_pem_private_key(key.read_bytes(), None)
    copy = key.with_suffix(".encrypted")
    copy.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"sesame")))
    return copy
