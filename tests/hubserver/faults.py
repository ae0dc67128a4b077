"""Faults: what the server does instead of answering well."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tests.hubserver.wire import Request

Action = Literal[
    "status",
    "drop",
    "drop_mid_request",
    "drop_after",
    "drop_mid",
    "close_mid",
    "truncate",
    "ignore_range",
    "corrupt",
    "delay",
    "stall",
    "html",
]
_OF_BODIES = ("drop_mid", "close_mid", "truncate", "ignore_range", "corrupt")


@dataclass
class Fault:
    """The next `times` requests whose ``METHOD /path?query`` (decoded) matches `on` go wrong.

    status            answer `status` with `headers` and `body`; the work is not done
    html              a page of a network's log-in instead of an answer
    drop              reset the connection, nothing read, nothing done
    drop_mid_request  read `after` bytes of the request's body, then reset
    drop_after        do the work, then reset instead of answering
    drop_mid          send `after` bytes of the answer's body, then reset
    close_mid         send `after` bytes of the answer's body, then close politely
    truncate          `after` bytes of the body only, with a length that says so (PUT: so many are kept)
    ignore_range      answer a request for a range with the whole file
    corrupt           flip byte `after` of the answer's body (PUT: of what was sent)
    delay             answer after `seconds`
    stall             do the work, send `after` bytes of the answer's body (0: not even its head), be
                      silent for `seconds`, then close

    Faults of bodies do not match HEAD; ignore_range only requests with a range. `skip` matches pass
    unharmed first. `times` and `skip` count down in place.
    """

    on: str
    action: Action
    times: int = 1
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    after: int = 0
    seconds: float = 0.0
    skip: int = 0

    def takes(self, request: Request) -> bool:
        """Whether this fault befalls `request`; counts down."""
        if self.times <= 0 or not re.search(self.on, request.line):
            return False
        if self.action in _OF_BODIES and request.method == "HEAD":
            return False
        if self.action == "ignore_range" and "range" not in request.headers:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True
