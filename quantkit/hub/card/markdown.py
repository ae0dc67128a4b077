"""Markdown that says what it is given: names of strangers cannot leave their cell or become HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

_SPECIAL = re.compile(r"[\\`*\[\]|]|(?<![^\W_])_|_(?![^\W_])")
_ENDS = re.compile(r"[\s<>\\|]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def text(value: str) -> str:
    """`value` as plain words of one line."""
    line = "".join(_ENTITIES.get(c, c) for c in " ".join(value.split()))
    return _SPECIAL.sub(r"\\\g<0>", line)


def code(value: str, *, in_table: bool = False) -> str:
    """`value` as code in a line."""
    line = " ".join(value.split())
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    # inside a table a bar ends the cell, even in code
    shown = line.replace("|", "\\|") if in_table else line
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def link(label: str, address: str) -> str:
    """A link; `label` is Markdown already. What could end the address, or the line, is quoted."""
    address = _ENDS.sub(lambda found: quote(found[0]), address)
    return f"[{label}](<{address}>)" if re.search(r"[()]", address) else f"[{label}]({address})"


def fenced(value: str, language: str = "") -> str:
    """`value` verbatim as a block of code."""
    ticks = "`" * max(3, _longest_run(value) + 1)
    end = "" if value.endswith("\n") else "\n"
    return f"{ticks}{language}\n{value}{end}{ticks}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of cells that are Markdown already; columns whose number is in `right` are aligned so."""
    rules = ["---:" if number in right else "---" for number in range(len(columns))]
    lines = [columns, rules, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def folded(summary: str, content: str) -> str:
    """`content` behind a line to click on; `summary` is HTML."""
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"


def _longest_run(value: str) -> int:
    return max(map(len, re.findall("`+", value)), default=0)
