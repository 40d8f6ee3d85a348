"""Downloads that break off, that are given up, and whose owner ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from cluster.hub import Hub
from cluster.hub_errors import (
    HubError,
    HubUnreachable,
)
from tests.hub_repository import REPO, WANTED, A, B, files, in_downloads, names, repository
from tests.hub_server import HubServer


def test_a_download_that_breaks_off_goes_on_where_it_was(
    server: HubServer, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_downloads(monkeypatch, tmp_path, "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000")
    server.publish("org/tiny", files())
    server.cut.add(A)
    assert (hub.fetch(REPO) / A).read_bytes() == b"a" * 5000
    assert server.ranges == [f"{A} bytes=2000-"]


def test_a_download_that_was_given_up_fetches_only_what_is_missing(
    server: HubServer, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_downloads(monkeypatch, tmp_path, "import time; time.sleep = lambda _: None")
    server.publish("org/tiny", files())
    server.broken.add(A)
    with pytest.raises(HubUnreachable, match=r"org/tiny@\w+ cannot be fetched from http"):
        hub.fetch(REPO)
    server.broken.clear()
    server.asked.clear()
    assert names(hub.fetch(REPO)) == WANTED
    assert A in server.fetched()
    assert "config.json" not in server.fetched()


class StoppedError(BaseException):
    """What the handler of a signal raises."""


@pytest.mark.parametrize("xet", [False, True])
def test_a_signal_ends_a_download(server: HubServer, hub: Hub, xet: bool) -> None:
    """At once, though nothing comes from the server; and no part of a file is kept."""
    server.publish("org/tiny", files())
    server.xet.update({A, B} if xet else ())
    over = threading.Event()

    def half_way(name: str) -> None:
        if name == A or name.startswith("/xet/"):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert over.wait(60)

    def on_signal(*_: Any) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        raise StoppedError

    server.half_way = half_way
    previous = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with pytest.raises(StoppedError):
            hub.fetch(REPO)
        assert not over.is_set()
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, previous)
    kept = [path.name for path in (repository(hub) / "snapshots").glob("*/*")]
    assert "config.json" in kept
    assert A not in kept
    assert not list((repository(hub) / "blobs").glob("*.incomplete"))


def test_a_download_ends_with_its_owner(server: HubServer, tmp_path: Path) -> None:
    """However that ends."""
    server.publish("org/tiny", files())
    begun, over = threading.Event(), threading.Event()

    def half_way(name: str) -> None:
        if name == A:
            begun.set()
            assert over.wait(60)

    server.half_way = half_way
    code = "import sys, pathlib; from cluster.hub import Hub; from cluster.hub_id import HubId; "
    code += "Hub(sys.argv[1], pathlib.Path(sys.argv[2])).fetch(HubId('org/tiny'))"
    with subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)]) as owner:
        try:
            assert begun.wait(60)
            (child,) = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
            watched = os.pidfd_open(int(child))
            owner.kill()
            assert select.select([watched], [], [], 30)[0], "it has ended"
            os.close(watched)
        finally:
            owner.kill()
            over.set()
    parts = [path.name for path in (tmp_path / "models--org--tiny" / "blobs").glob("*.incomplete")]
    assert parts, "nobody was there to tidy up"
    server.half_way = lambda _: None
    hub = Hub(server.url, tmp_path)
    with FileLock(tmp_path / ".locks" / "models--org--tiny" / f"{parts[0].split('.')[0]}.lock"):
        hub._cache.drop_parts(REPO, hub.listing(REPO), files())
        assert [path.name for path in (repository(hub) / "blobs").glob("*.incomplete")] == [parts[0]], "in use"
    hub.fetch(REPO)
    assert not list((repository(hub) / "blobs").glob("*.incomplete"))


def test_a_download_that_dies_says_so(
    server: HubServer, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_downloads(monkeypatch, tmp_path, "import os; os._exit(3)")
    server.publish("org/tiny", files())
    with pytest.raises(HubError, match=r"the download of org/tiny@main ended with status 3"):
        hub.fetch(REPO)
