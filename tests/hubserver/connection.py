"""One connection: reads requests, lets faults befall them, sends answers."""

from __future__ import annotations

import fcntl
import re
import socket
import struct
import termios
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from tests.hubserver import accounts, commits, discussions, downloads, repositories, uploads
from tests.hubserver.faults import Fault
from tests.hubserver.state import State, flip
from tests.hubserver.wire import Answer, Refused, Request, dispatch, to_json

_ROUTES = (
    *downloads.ROUTES,
    *uploads.ROUTES,
    *accounts.ROUTES,
    *repositories.ROUTES,
    *discussions.ROUTES,
    *commits.ROUTES,
)
_PAGE = Answer(
    200,
    b"<!DOCTYPE html><html><body>Log in to use this network.</body></html>",
    {"Content-Type": "text/html"},
)


@dataclass
class Traffic:
    """What has come in, what is to go wrong, and the connections that are open."""

    log: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    meanwhile: list[tuple[str, Callable[[], object]]] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    open: set[socket.socket] = field(default_factory=set)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def received(self, request: Request) -> Fault | None:
        """Note a request; the fault that befalls it."""
        with self.lock:
            self.log.append(request.line)
            self.requests.append(request)
            return next((fault for fault in self.faults if fault.takes(request)), None)

    def before(self, request: Request) -> None:
        """Do what was to happen before this request is answered."""
        with self.lock:
            due = [pair for pair in self.meanwhile if re.search(pair[0], request.line)][:1]
            self.meanwhile = [pair for pair in self.meanwhile if pair not in due]
        for _, do in due:
            do()

    def close(self) -> None:
        """End whatever waits and every connection."""
        self.closing.set()
        with self.lock:
            for connection in self.open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Reset(Exception):
    """The connection ends here, rudely."""


class Connection(BaseHTTPRequestHandler):
    """The requests of one client, one after another."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else head and body of an answer wait 40 ms for each other
    wbufsize = -1

    def __init__(self, state: State, traffic: Traffic, *args: Any) -> None:
        self.state, self.traffic = state, traffic
        super().__init__(*args)

    def setup(self) -> None:
        super().setup()
        with self.traffic.lock:
            self.traffic.open.add(self.connection)

    def finish(self) -> None:
        with self.traffic.lock:
            self.traffic.open.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.command, unquote(self.path), headers, self.path)
        fault = self.traffic.received(request)
        try:
            answer = self._answer(request, fault)
            self._send(answer, fault)
        except _Reset:
            self._reset()
        except (ConnectionError, TimeoutError):  # the client went away
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _answer(self, request: Request, fault: Fault | None) -> Answer:
        """The answer, unless something goes wrong before."""
        match fault:
            case Fault(action="drop"):
                raise _Reset
            case Fault(action="drop_mid_request"):
                self.rfile.read(min(fault.after, int(self.headers.get("Content-Length", "0"))))
                raise _Reset
            case Fault(action="delay"):
                self.traffic.closing.wait(fault.seconds)
        request.body = self._body()
        self.traffic.before(request)
        match fault:
            case Fault(action="status"):
                kind = "application/json" if fault.body.startswith(("{", "[")) else "text/plain"
                return Answer(fault.status, fault.body.encode(), {"Content-Type": kind, **fault.headers})
            case Fault(action="html"):
                return _PAGE
        return self._work(_tampered(request, fault))

    def _work(self, request: Request) -> Answer:
        try:
            with self.state.lock:
                return dispatch(_ROUTES, self.state, request)
        except Refused as refused:
            return refused.answer
        except Exception:  # a flaw of this server must fail the test, not end a thread nobody looks at
            self.traffic.crashes.append(f"{request.line}\n{traceback.format_exc()}")
            return to_json({"error": "the test server is at fault", "trace": traceback.format_exc()}, 500)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            size = int(self.headers.get("Content-Length", "0"))
            body = self.rfile.read(size)
            if len(body) < size:
                raise ConnectionResetError("the client went away while it sent")
            return body
        body = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        """Head and body, or as much of them as the fault lets through."""
        sent = answer.body
        match fault:
            case Fault(action="drop_after"):
                raise _Reset
            case Fault(action="corrupt") if self.command != "PUT":
                sent = flip(sent, fault.after)
            case Fault(action="truncate") if self.command != "PUT":
                sent = sent[: fault.after]
            case Fault(action="stall", after=0):
                self.traffic.closing.wait(fault.seconds)
                self.close_connection = True
                return
        self.send_response_only(answer.status)
        for key, value in {"Content-Length": str(len(sent)), **answer.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            sent = b""
        match fault:
            case Fault(action="drop_mid" | "close_mid" | "stall"):
                self._send_part(sent[: fault.after], fault)
            case _:
                self.wfile.write(sent)

    def _send_part(self, part: bytes, fault: Fault) -> None:
        self.wfile.write(part)
        self.wfile.flush()
        self.close_connection = True
        if fault.action == "stall":
            self.traffic.closing.wait(fault.seconds)
        if fault.action == "drop_mid":
            _wait_until_sent(self.connection)
            raise _Reset

    def _reset(self) -> None:
        """Close so that the other side sees a reset, not an end."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def connections(state: State, traffic: Traffic) -> Callable[..., Connection]:
    """What a listener makes for each client."""

    def connection(*args: Any) -> Connection:
        return Connection(state, traffic, *args)

    return connection


def _tampered(request: Request, fault: Fault | None) -> Request:
    """The request as the routes see it; the one in the log stays as it was sent."""
    match fault:
        case Fault(action="ignore_range"):
            kept = {key: value for key, value in request.headers.items() if key != "range"}
            return replace(request, headers=kept)
        case Fault(action="corrupt") if request.method == "PUT":
            return replace(request, body=flip(request.body, fault.after))
        case Fault(action="truncate") if request.method == "PUT":
            return replace(request, body=request.body[: fault.after])
    return request


def _wait_until_sent(connection: socket.socket) -> None:
    """Until the other side has all of it: a reset throws away what is still on its way."""
    waiting = threading.Event()
    for _ in range(1000):
        unsent = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        if unsent == b"\0\0\0\0":
            return
        waiting.wait(0.001)
