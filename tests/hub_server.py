"""A Hugging Face hub on this machine: as much of its HTTP interface as huggingface_hub needs to fetch a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class HubServer:
    """Repositories by ``org/name``, each with revisions (branch or tag -> commit) and files by commit.

    ``private``: repositories that answer nobody without ``token``; ``gated``: whose files do not. ``broken``: names of
    files of which half of what is asked for comes, ``cut``: once. ``half_way`` is called, with the name, when half of a
    file was sent. ``sizes``: what is said of a file instead of the truth. ``garbled``: the answers are no JSON.
    ``untold``: no sizes are listed. ``status``, if not 0: what everybody gets instead of an answer. ``asked`` has every
    request, as "METHOD path". ``xet``: names of files that are stored with Xet; that storage is here
    too, below ``/xet/``: it says ``half_way(path)``, and then has nothing.
    """

    url: str = ""
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    half_way: Callable[[str], None] = lambda _: None
    garbled: bool = False
    untold: bool = False
    xet: set[str] = field(default_factory=set)
    status: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    token: str = "hf_right"
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)

    def publish(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """A new commit of ``repo``, to which ``revision`` points from now on; its hash."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.revisions.setdefault(repo, {})[revision] = commit
        self.files[repo, commit] = files
        return commit

    def publish_folder(self, repo: str, folder: Path) -> str:
        """The files of a folder as a new commit."""
        return self.publish(repo, {path.name: path.read_bytes() for path in folder.iterdir()})

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [path.rsplit("/", 1)[1] for path in self.asked if path.startswith("GET") and "/resolve/" in path]


class _Refused(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        try:
            parts = path.strip("/").split("/")
            if self.hub.status:
                raise _Refused(self.hub.status)
            if parts[:2] == ["api", "models"]:
                self._api("/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision", "/".join(parts[5:]))
            elif parts[0] == "xet":
                self.hub.half_way(path)
                raise _Refused(404)
            elif parts[2:3] == ["resolve"]:
                self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                raise _Refused(404)
        except _Refused as refused:
            self.send_response(refused.status)
            self.send_header("X-Error-Code", refused.code)
            self._end(b"")

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        trusted = self.headers.get("authorization") == f"Bearer {self.hub.token}"
        if repo not in self.hub.revisions or (repo in self.hub.private and not trusted):
            raise _Refused(404 if trusted else 401, "RepoNotFound")
        commit = self.hub.revisions[repo].get(revision or "main", revision)
        if (repo, commit) not in self.hub.files:
            raise _Refused(404, "RevisionNotFound")
        if repo in self.hub.gated and not trusted and "/resolve/" in self.path:
            raise _Refused(403, "GatedRepo")
        return commit, self.hub.files[repo, commit]

    def _api(self, repo: str, what: str, revision: str) -> None:
        commit, files = self._files(repo, revision)
        if what == "xet-read-token":
            return self._json(
                {},
                **{
                    "X-Xet-Cas-Url": f"{self.hub.url}/xet",
                    "X-Xet-Access-Token": "token",
                    "X-Xet-Token-Expiration": str(2**33),
                },
            )
        sizes = {name: self.hub.sizes.get(name, len(data)) for name, data in files.items()}
        if what == "tree":
            entries = [
                {"type": "file", "path": name, "size": sizes[name], "oid": _etag(data)} for name, data in files.items()
            ]
            return self._json(entries)
        siblings: list[dict[str, Any]] = [
            {"rfilename": name, "blobId": _etag(data)} for name, data in sorted(files.items())
        ]
        if not self.hub.untold:
            siblings = [{**entry, "size": sizes[entry["rfilename"]]} for entry in siblings]
        return self._json({"id": repo, "sha": commit, "siblings": siblings})

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit, files = self._files(repo, revision)
        if name not in files:
            raise _Refused(404, "EntryNotFound")
        data = files[name]
        begin = 0
        if wanted := self.headers.get("range"):
            self.hub.ranges.append(f"{name} {wanted}")
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", commit)
        if name in self.hub.xet:
            self.send_header("X-Xet-Hash", hashlib.sha256(data).hexdigest())
            self.send_header("X-Xet-Refresh-Route", f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit}")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if self.command == "GET":
            self._send(name, data[begin:])

    def _send(self, name: str, data: bytes) -> None:
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.hub.half_way(name)
        if name in self.hub.cut:
            self.hub.cut.discard(name)
        elif name not in self.hub.broken:
            with contextlib.suppress(ConnectionError):  # whoever asked has gone
                self.wfile.write(data[len(data) // 2 :])

    def _json(self, value: Any, **headers: str) -> None:
        self.send_response(200)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self._end(b"<html>" if self.hub.garbled else json.dumps(value).encode())

    def _end(self, body: bytes) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # whoever asked has gone
                self.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub without repositories, for as long as the block lasts."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = False
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="hub-server")
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
