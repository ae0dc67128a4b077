"""Lists by which configs leave modules as they are: what an entry names, as engines read it."""

from __future__ import annotations

import re


def names_part(entry: str, module: str) -> bool:
    """Whether an entry is a module or part of its path, from one dot to another: as every engine reads it."""
    return f".{entry}." in f".{module}."


def excludes(entry: str, module: str) -> bool:
    """As Transformers reads it: from the start up to a dot, as a pattern, or as the end of the path."""
    return module.endswith(entry) or matches(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module)


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern fits the start of a path; what is no pattern fits nothing."""
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False
