"""Checking values against type hints, and the words in which a mismatch is said.

One set of rules for Python, YAML, flags and shorthands: `fault` says what is wrong with a value,
`from_text` reads a value typed on the command line. Hints may be ``Annotated[T, "doc", Range(1)]``.
"""

from __future__ import annotations

import collections.abc
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from quantkit.errors import RecipeError

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number, both included."""

    low: float
    high: float | None = None


def plain(hint: Any) -> Any:
    """The hint without its ``Annotated`` wrapping."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def extras(hint: Any) -> tuple[Any, ...]:
    """What ``Annotated`` adds to the hint: documentation (str) and `Range`."""
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def doc(hint: Any) -> str:
    """The documentation in the hint, or an empty string."""
    return next((extra for extra in extras(hint) if isinstance(extra, str)), "")


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    hint = plain(hint)
    return get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def accepts(hint: Any, kind: type) -> bool:
    """Whether one member of the hint is exactly `kind`."""
    return kind in options(hint)


def hints(cls: type) -> dict[str, Any]:
    """Field name → type hint with extras, in order of declaration."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in fields(cls)}


def describe(hint: Any) -> str:
    """The hint in words: ``an integer or null``."""
    parts = []
    for option in options(hint):
        origin = get_origin(option)
        if origin is Literal:
            parts += [repr(value) for value in get_args(option)]
        elif origin is tuple:
            parts.append("a list")
        elif origin is collections.abc.Mapping or is_dataclass(option):
            parts.append("a mapping")
        else:
            parts.append(_WORDS.get(option, str(option)))
    return " or ".join(parts)


def show(value: Any) -> str:
    """A value as messages quote it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str() | int() | float():
            return repr(value)
        case dict():
            return "a mapping"
        case _:
            return f"a {type(value).__name__}"


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(fault(v, get_args(hint)[0]) is None for v in value)
    if origin is collections.abc.Mapping:
        of = get_args(hint)[1]
        return isinstance(value, Mapping) and all(fault(v, of) is None for v in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def fault(value: Any, hint: Any) -> str | None:
    """What is wrong with `value`, or None: ``must be an integer, not 'x'``."""
    if not any(_fits(value, option) for option in options(hint)):
        if isinstance(value, list) and any(get_origin(option) is tuple for option in options(hint)):
            return "must be a tuple, not a list"
        quote = "; quote it" if accepts(hint, str) and isinstance(value, int | float) else ""
        return f"must be {describe(hint)}, not {show(value)}{quote}"
    for extra in extras(hint):
        if isinstance(extra, Range) and value is not None:
            if extra.high is not None and not extra.low <= value <= extra.high:
                return f"must be between {extra.low:,} and {extra.high:,}, not {value:,}"
            if value < extra.low:
                return f"must be at least {extra.low:,}, not {value:,}"
    return None


def check_types(spec: Any) -> None:
    """Check every field of a dataclass instance; raises RecipeError with ``field: what is wrong``."""
    found = ((name, fault(getattr(spec, name), hint)) for name, hint in hints(type(spec)).items())
    refuse(f"{name}: {wrong}" for name, wrong in found if wrong is not None)


def refuse(problems: Iterable[str]) -> None:
    """Raise a RecipeError when there are problems."""
    listed = tuple(problems)
    if listed:
        raise RecipeError(listed)


def suggest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean 'x'?`` or an empty string."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def said(error: RecipeError) -> str:
    """An error on one line, its remedy in parentheses."""
    remedy = f" ({error.remedy})" if error.remedy else ""
    return "; ".join(error.problems) + remedy


def complaint(name: str, parse: Callable[[str], object], text: str | None) -> list[str]:
    """What `parse` has against `text`, as a problem of field `name`; nothing when text is None."""
    try:
        if text is not None:
            parse(text)
    except RecipeError as error:
        return [f"{name}: {said(error)}"]
    return []


def from_text(text: str, hint: Any) -> Any:
    """The value that `text` stands for where `hint` is expected; raises RecipeError."""
    value = _read(text, options(hint))
    wrong = fault(value, hint)
    if wrong is not None:
        raise RecipeError(wrong)
    return value


def _read(text: str, kinds: tuple[Any, ...]) -> Any:
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if int in kinds and INTEGER.fullmatch(text):
        return int(text)
    if float in kinds and NUMBER.fullmatch(text):
        return float(text)
    if type(None) in kinds and text.lower() in ("null", "none", ""):
        return None
    choices = [c for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
    return next((c for c in choices if str(c).lower() == text.lower()), text)
