"""JSON objects from files that nobody vouches for."""

from __future__ import annotations

import json
from typing import Any


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in UTF-8 `raw`; ValueError with the reason, also when a key occurs twice."""
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it is not an object but a {type(content).__name__}")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key[:200]!r} occurs twice")
        out[key] = value
    return out
