"""The server: two listeners, the Hub and its CDN, and what tests may ask it and tell it."""

from __future__ import annotations

import selectors
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.hubserver.connection import Traffic, connections
from tests.hubserver.faults import Fault
from tests.hubserver.state import Kind, Repo, State, User, is_large
from tests.hubserver.wire import Request
from tests.hubserver.xet import XetStore


class _Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A port of its own, a thread per connection."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, state: State, traffic: Traffic) -> None:
        super().__init__(("127.0.0.1", 0), connections(state, traffic))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away in the middle all the time."""


class HubServer:
    """Context manager; `url` is the endpoint.

    xet        folder of the Xet store; None is a server without Xet
    multipart  large files go in parts of so many bytes; None takes any in one PUT
    verify     whether uploads are checked against their sha256 when the client asks for it
    page       entries per page of a listing
    """

    def __init__(
        self, *, xet: Path | None = None, multipart: int | None = None, verify: bool = True, page: int = 1000
    ) -> None:
        store = XetStore(xet) if xet is not None else None
        self._state = State(store, multipart=multipart, verify=verify, page=page)
        self._traffic = Traffic()
        self._listeners = [_Listener(self._state, self._traffic) for _ in range(2)]
        self.url, self._state.cdn = (listener.url for listener in self._listeners)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="hubserver", daemon=True)

    @property
    def cdn(self) -> str:
        """The origin that large files come from."""
        return self._state.cdn

    @property
    def log(self) -> list[str]:
        """``METHOD /path?query`` of all requests so far, decoded."""
        return self._traffic.log

    @property
    def requests(self) -> list[Request]:
        """All requests so far, with headers and bodies."""
        return self._traffic.requests

    @property
    def faults(self) -> list[Fault]:
        """What is to go wrong; the first that matches a request befalls it."""
        return self._traffic.faults

    @faults.setter
    def faults(self, faults: list[Fault]) -> None:
        self._traffic.faults = faults

    def when(self, on: str, do: Callable[[], object]) -> None:
        """Call `do` once, before the next request whose ``METHOD /path?query`` matches `on` is answered:
        what somebody else does in the meantime."""
        self._traffic.meanwhile.append((on, do))

    @property
    def tokens(self) -> dict[str, User]:
        """Who is known by which token; a token that is taken out has expired."""
        return self._state.tokens

    def add(
        self,
        repo: str,
        folder: Path | Mapping[str, bytes],
        *,
        private: bool | None = None,
        gated: bool | str | None = None,
        revision: str = "main",
        message: str = "Add files",
        kind: Kind = "model",
    ) -> str:
        """Commit files on top of those that are there; the hash of the commit.

        Repository and branch are made when there are none; a branch from the first commit.
        """
        with self._state.lock:
            found = self._state.repos.get((kind, repo))
            if found is None:
                found = self._state.create(kind, repo, repo.partition("/")[0])
            if private is not None:
                found.private = private
            if gated is not None:
                found.gated = gated
            ref = f"refs/heads/{revision}"
            files = dict(found.made[found.refs.setdefault(ref, next(iter(found.made)))].files)
            for path, content in _contents(folder).items():
                large = is_large(path, len(content), content[:512])
                keep = self._state.store.large if large else self._state.store.regular
                files[path] = keep(path, content)
            return found.commit(ref, message, files, author=found.namespace).sha

    def repo(self, repo: str, kind: Kind = "model") -> Repo:
        """A repository; KeyError when there is none."""
        return self._state.repos[kind, repo]

    def has(self, repo: str, kind: Kind = "model") -> bool:
        return (kind, repo) in self._state.repos

    def rename(self, old: str, new: str, kind: Kind = "model") -> None:
        """Give a repository another name; the old one redirects until something else has it."""
        with self._state.lock:
            self._state.rename(kind, old, new)

    def remove(self, repo: str, kind: Kind = "model") -> None:
        """Delete a repository; large files stay in the storage for a while, as at the Hub."""
        with self._state.lock:
            del self._state.repos[kind, repo]

    def corrupt(self, repo: str, path: str, revision: str = "main") -> None:
        """Flip a byte of a stored file; its hashes stay what they were."""
        with self._state.lock:
            found = self.repo(repo)
            self._state.store.corrupt(found.files(revision)[path])

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wake.send(b"!")
        self._thread.join()
        self._traffic.close()
        for listener in self._listeners:
            listener.server_close()
        self._wake.close()
        self._woken.close()
        if error is None and self._traffic.crashes:
            raise AssertionError("the test server is at fault:\n" + "\n".join(self._traffic.crashes))

    def _listen(self) -> None:
        """Take connections until woken: no polling, so that the end is immediate."""
        with selectors.DefaultSelector() as ready:
            ready.register(self._woken, selectors.EVENT_READ)
            for listener in self._listeners:
                ready.register(listener, selectors.EVENT_READ, listener)
            while True:
                for key, _ in ready.select():
                    if key.data is None:
                        return
                    key.data.handle_request()


def _contents(folder: Path | Mapping[str, bytes]) -> Mapping[str, bytes]:
    if not isinstance(folder, Path):
        return folder
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
