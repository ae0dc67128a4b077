"""A small server on 127.0.0.1 that speaks the read half of the Hub protocol, with faults on request.

It serves one repository with one commit out of a folder: `*.safetensors` as large files (sha256), the
rest as small ones (git's blob hash). Enough for the real client to resolve, list and download.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS = {"hf_alice": "alice"}


@dataclass
class Fault:
    """The next `times` requests whose ``METHOD path`` matches `on` fail in this way.

    status: answer `status` with `headers`   short: a body of half the length, consistently announced
    flip: one byte of the body is different  close: no answer at all        html: a page instead of JSON
    """

    on: str
    action: Literal["status", "short", "flip", "close", "html"]
    times: int = 1
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)


class _Answered(Exception):
    """The request is done."""


class HubServer:
    """Context manager; `url` is the endpoint, `log` the requests so far as ``METHOD path``."""

    def __init__(self, folder: Path, repo: str = "org/tiny", *, gated: bool = False) -> None:
        self.folder, self.repo, self.gated = folder, repo, gated
        self.refs = {"main": COMMIT, "v1": COMMIT}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, request: str) -> Fault | None:
        self.log.append(request)
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.on, request):
                fault.times -= 1
                return fault
        return None


def listing(folder: Path) -> list[dict[str, Any]]:
    """The tree as the Hub lists it."""
    items: list[dict[str, Any]] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        item: dict[str, Any] = {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": len(content),
        }
        item["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if path.suffix == ".safetensors":
            item["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 134,
            }
        items.append(item)
    return items


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.active = self.hub.fault(f"{self.command} {path}")
        try:
            self.plain_faults()
            self.route(path)
        except _Answered:
            pass

    do_HEAD = do_GET

    def plain_faults(self) -> None:
        match self.active:
            case Fault(action="status"):
                self.answer(self.active.status, b"", self.active.headers)
            case Fault(action="html"):
                self.answer(200, b"<html>log in to the network</html>")
            case Fault(action="close"):
                self.close_connection = True
                raise _Answered

    def route(self, path: str) -> NoReturn:
        if path == "/api/whoami-v2":
            self.json({"type": "user", "name": self.user(), "orgs": [], "auth": {}})
        api = f"/api/models/{self.hub.repo}"
        if path == f"{api}/refs":
            refs = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in self.hub.refs.items()
            ]
            self.json({"branches": refs, "tags": [], "converts": []})
        if path == api or path.startswith(f"{api}/revision/"):
            sha = self.commit("main" if path == api else path.removeprefix(f"{api}/revision/"))
            self.json({"id": self.hub.repo, "sha": sha, "siblings": [], "tags": [], "private": False})
        if path.startswith(f"{api}/tree/"):
            self.commit(path.removeprefix(f"{api}/tree/").partition("/")[0])
            recursive = "recursive=true" in self.path
            self.json([i for i in listing(self.hub.folder) if recursive or "/" not in i["path"]])
        if path.startswith(f"/{self.hub.repo}/resolve/"):
            revision, _, name = path.removeprefix(f"/{self.hub.repo}/resolve/").partition("/")
            self.file(self.commit(revision), name)
        self.refuse(401 if self.user() is None else 404, "RepoNotFound")

    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def commit(self, revision: str) -> str:
        if revision not in {**self.hub.refs, COMMIT: COMMIT}:
            self.refuse(404, "RevisionNotFound")
        return COMMIT

    def file(self, commit: str, name: str) -> NoReturn:
        if self.hub.gated:
            self.refuse(401 if self.user() is None else 403, "GatedRepo")
        listed = {item["path"]: item for item in listing(self.hub.folder)}
        if name not in listed:
            self.refuse(404, "EntryNotFound")
        body = (self.hub.folder / name).read_bytes()
        item = listed[name]
        tag = item["lfs"]["oid"] if "lfs" in item else item["oid"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "X-Linked-Etag": f'"{tag}"'}
        headers["X-Linked-Size"] = str(len(body))
        match self.active:
            case Fault(action="short"):
                body = body[: len(body) // 2]
            case Fault(action="flip"):
                body = body[:-1] + bytes([body[-1] ^ 1])
        self.answer(200, body, headers)

    def json(self, content: Any) -> NoReturn:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> NoReturn:
        self.answer(status, b"{}", {"X-Error-Code": code})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> NoReturn:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        raise _Answered
