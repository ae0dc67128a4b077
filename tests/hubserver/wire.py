"""Requests and answers as values, and the routes between them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from tests.hubserver.state import State


@dataclass
class Request:
    """What was asked. `path` is decoded and ends with the query; `params` are the parts of the route."""

    method: str
    path: str
    headers: Mapping[str, str]
    target: str
    body: bytes = b""
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """What the log holds and faults are searched in."""
        return f"{self.method} {self.path}"

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self.body)

    @property
    def origin(self) -> str:
        return f"http://{self.headers['host']}"

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.target).query).items()}

    def flag(self, name: str) -> bool:
        """A switch of the query; both spellings of true are in use."""
        return self.query.get(name, "").lower() in ("1", "true")

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    """Raised by a route to answer at once."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def to_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer in JSON."""
    return Answer(
        status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
    )


def refusal(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Refused:
    """An error as the Hub words it: code and message in headers, the message again in the body."""
    told = {"X-Error-Message": message, **(headers or {})}
    if code is not None:
        told["X-Error-Code"] = code
    return Refused(to_json({"error": message}, status, told))


@dataclass(frozen=True)
class Route:
    """A method and a pattern of raw paths, whose named groups become the request's decoded `params`."""

    methods: str
    pattern: re.Pattern[str]
    answer: Callable[[State, Request], Answer]


def route(methods: str, pattern: str, answer: Callable[[State, Request], Answer]) -> Route:
    """`pattern` may use {api} and {id}: the start of a path under /api, and a repository's id."""
    id = r"(?P<id>[^/]+/[^/]+)"
    api = rf"/api/(?P<kind>models|datasets|spaces)/{id}"
    pattern = pattern.replace("{api}", api).replace("{id}", id)
    return Route(methods, re.compile(pattern), answer)


def dispatch(routes: tuple[Route, ...], state: State, request: Request) -> Answer:
    """The answer of the first route that fits."""
    raw = urlsplit(request.target).path
    for candidate in routes:
        found = candidate.pattern.fullmatch(raw)
        if found is not None and request.method in candidate.methods.split():
            request.params = {key: unquote(value or "") for key, value in found.groupdict().items()}
            return candidate.answer(state, request)
    raise refusal(404, f"no route for {request.method} {raw}")
