"""TLS for wires under test: a certificate of an authority that lives as long as this process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from actors.transport.base import Medium
from actors.transport.tls import WireTls
from tests.authority import Authority


@functools.cache
def folder() -> Path:
    """Where ``node.pem``, ``node.key`` and ``ca.pem`` lie; another process of the test may use it too."""
    path = Path(tempfile.mkdtemp(prefix="wire-tls-"))
    atexit.register(shutil.rmtree, path)
    Authority(path).sign("node")
    return path


@functools.cache
def wire_tls(path: Path) -> WireTls:
    """What an endpoint wants, from the files in ``path``."""
    return WireTls(path / "node.pem", path / "node.key", path / "ca.pem")


def tls_for(medium: Medium, path: Path | None = None) -> WireTls | None:
    """For an endpoint that is to make wires of this medium."""
    return wire_tls(path or folder()) if medium is Medium.TLS else None
