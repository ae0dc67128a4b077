"""A model of the loopback Hub that is looked at without its weights: what is asked for, and how it ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import QuantkitError
from quantkit.hub import client
from quantkit.hub.fetch import Source, headers
from quantkit.recipe.load import recipe_from_flags
from quantkit.recipe.overrides import flag
from quantkit.recipe.spec import Recipe
from tests.hubserver import HubServer, Request

_WEIGHTS = re.compile(r"GET .*/(resolve|cdn)/.*\.(safetensors|gguf)")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


def look(hub: HubServer, cache: Path, source: str, **more: Any) -> Source:
    return headers(source, cache_dir=cache, endpoint=hub.url, **more)


def refused(hub: HubServer, cache: Path, source: str, **more: Any) -> QuantkitError:
    with pytest.raises(QuantkitError) as caught:
        look(hub, cache, source, **more)
    assert caught.value.remedy
    return caught.value


def weight_requests(hub: HubServer, origin: str = "") -> list[Request]:
    """Requests for bytes of weights: at the Hub (``resolve``), at the storage (``cdn``), or any."""
    return [r for r in hub.requests if _WEIGHTS.fullmatch(r.line) and f"/{origin}" in r.path]


def asked(hub: HubServer) -> list[tuple[int, int]]:
    """Parts of weights, (begin, end), that the storage was asked for, in order; never a whole file."""
    found = []
    for request in weight_requests(hub):
        span = _RANGE.fullmatch(request.headers.get("range", ""))
        assert span, f"{request.line} asks for the whole file"
        if "/cdn/" in request.path:
            found.append((int(span[1]), int(span[2]) + 1))
    return found


def asked_bytes(hub: HubServer) -> int:
    return sum(end - begin for begin, end in asked(hub))


def use(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not told of an endpoint asks this one, as with HF_ENDPOINT."""
    connect: Callable[..., Any] = client.connect
    monkeypatch.setattr(client, "connect", lambda _, token=None: connect(hub.url, token))


def recipe(source: str, *targets: str) -> Recipe:
    given = [flag("source", source, "SOURCE"), flag("targets", list(targets), "--to")]
    return recipe_from_flags(given, env={})
