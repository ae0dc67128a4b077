"""Sizes as people write them: ``5GB`` is 5·10⁹ bytes, ``20GiB`` is 20·2³⁰, ``12G`` means ``12GB``."""

from __future__ import annotations

import re

from quantkit.errors import RecipeError

_SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?) ?(?P<prefix>[kmgt])(?P<binary>i?)b?", re.IGNORECASE)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes that `text` stands for; raises RecipeError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise RecipeError(f"{text!r} is not a size", remedy="write a number and a unit, as 5GB or 20GiB")
    base = 1024 if found["binary"] else 1000
    size = int(float(found["number"]) * base ** _POWER[found["prefix"].lower()])
    if size < 1:
        raise RecipeError(f"a size of {text!r} holds nothing", remedy="write at least 1KB")
    return size


def format_size(size: int) -> str:
    """Bytes for people, in decimal units: ``5.03 GB``."""
    if size < 1000:
        return f"{size} B"
    value, unit = size / 1000, 0
    while value >= 999.5 and unit < 3:
        value, unit = value / 1000, unit + 1
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {('kB', 'MB', 'GB', 'TB')[unit]}"
