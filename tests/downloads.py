"""A repository that is downloaded from the loopback Hub: what is asked for, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import QuantkitError
from quantkit.hub.fetch import Source, resolve
from tests.hubserver import HubServer

ALICE, BOB = "hf_alicealicealice", "hf_bobbobbobbob"
SHARD = "model-00001-of-00002.safetensors"
INFO, TREE, HEAD = "GET /api/models/org/tiny", "GET .*/tree/", "HEAD .*/config.json"
SMALL, BODY = "GET /org/tiny/resolve/.*/config.json", rf"GET /cdn/.*{SHARD}"
EVERYWHERE = (INFO, TREE, HEAD, SMALL, "HEAD .*/model-00001", BODY)


def fetched(source: str, hub: HubServer, cache: Path, **more: Any) -> Source:
    return resolve(source, cache_dir=cache, endpoint=hub.url, **more)


def refused(source: str, hub: HubServer, cache: Path, **more: Any) -> QuantkitError:
    with pytest.raises(QuantkitError) as caught:
        fetched(source, hub, cache, **more)
    assert caught.value.remedy
    return caught.value


def head(hub: HubServer) -> str:
    return hub.repo("org/tiny").refs["refs/heads/main"]


def downloads(hub: HubServer) -> list[str]:
    """Requests for the content of files."""
    return [line for line in hub.log if line.startswith("GET") and ("/resolve/" in line or "/cdn/" in line)]
