"""A small hub on this machine that answers what the real client asks, and fails in the ways a real one does.

Large files lie on another host, as the real hub's do: `resolve` sends there, with the file's name, size and checksum in
the headers of the answer.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SMALL = 4096
"""Bytes from which a file is a large one, kept under its sha256."""


@dataclass
class Hub:
    """What the hub has, and how it behaves.

    Attributes:
        address: of its pages.
        files: of every repository: names and contents.
        token: that is asked for; None lets everybody in.
        status: answered to everything instead; 0 answers as it should.
        breaks: bytes after which connections that send a large file are closed, one after the other.
        ignores_ranges: large files are always sent whole.
        damaged: names of files that are sent with a byte changed.
        asked: method and path of every request, in order, with the range.
        leaked: whether a token was sent to the other host.
    """

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    status: int = 0
    breaks: list[int] = field(default_factory=list)
    ignores_ranges: bool = False
    damaged: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    leaked: bool = False

    def commit(self, repository: str) -> str:
        """The only commit of a repository: its contents decide it."""
        names = {name: hashlib.sha256(data).hexdigest() for name, data in self.files[repository].items()}
        return hashlib.sha1(json.dumps(names, sort_keys=True).encode()).hexdigest()

    def sent(self, name: str) -> list[str | None]:
        """The ranges in which a large file was asked for, in order."""
        etags = {etag(data) for files in self.files.values() for own, data in files.items() if own == name}
        return [asked for method, path, asked in self.asked if method == "GET" and path.removeprefix("/cdn/") in etags]


def etag(data: bytes) -> str:
    """What the hub calls a file's contents."""
    if len(data) < SMALL:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub at an address of its own, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/cdn/"):
            hub.leaked |= "Authorization" in self.headers
            self._large(path.removeprefix("/cdn/"), with_body)
            return
        if hub.status:
            self._fail(hub.status, "")
            return
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._fail(403 if "Authorization" in self.headers else 401, "GatedRepo")
            return
        api = path.startswith("/api/models/")
        words = path.removeprefix("/api/models/").lstrip("/").split("/")
        repository, kind, revision, name = "/".join(words[:2]), words[2], words[3], "/".join(words[4:])
        if repository not in hub.files:
            self._fail(404, "RepoNotFound")
        elif revision not in ("main", hub.commit(repository)):
            self._fail(404, "RevisionNotFound")
        elif api and kind == "revision":
            told = json.dumps(self._info(repository)).encode()
            self._send(200, told, {"Content-Type": "application/json"}, with_body)
        elif name not in hub.files[repository]:
            self._fail(404, "EntryNotFound", {"X-Repo-Commit": hub.commit(repository)})
        else:
            self._file(repository, name, with_body)

    def _info(self, repository: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.hub.files[repository].items():
            large = {"sha256": etag(data), "size": len(data), "pointerSize": 134} if len(data) >= SMALL else None
            blob = hashlib.sha1(data).hexdigest() if large else etag(data)
            siblings.append({"rfilename": name, "size": len(data), "blobId": blob, "lfs": large})
        commit = self.hub.commit(repository)
        return {"_id": "1", "id": repository, "modelId": repository, "sha": commit, "siblings": siblings}

    def _file(self, repository: str, name: str, with_body: bool) -> None:
        data, facts = self.hub.files[repository][name], {"X-Repo-Commit": self.hub.commit(repository)}
        if len(data) < SMALL:
            self._send(200, self._damaged(data), {**facts, "ETag": f'"{etag(data)}"'}, with_body)
            return
        port = urlsplit(self.hub.address).port
        facts |= {"X-Linked-Etag": f'"{etag(data)}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", {**facts, "Location": f"http://localhost:{port}/cdn/{etag(data)}"}, with_body)

    def _large(self, name: str, with_body: bool) -> None:
        data = next(data for files in self.hub.files.values() for data in files.values() if etag(data) == name)
        data, wanted = self._damaged(data), self.headers.get("Range")
        if wanted is None or self.hub.ignores_ranges:
            self._send(200, data, {}, with_body)
            return
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        self._send(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, with_body)

    def _damaged(self, data: bytes) -> bytes:
        names = {n for files in self.hub.files.values() for n, own in files.items() if own == data}
        return bytes([data[0] ^ 1]) + data[1:] if names & self.hub.damaged else data

    def _fail(self, status: int, code: str, more: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": "no", **(more or {})}, with_body=True)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not with_body:
            return
        if self.path.startswith("/cdn/") and self.hub.breaks:
            self.wfile.write(body[: self.hub.breaks.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)
