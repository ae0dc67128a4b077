"""Values of metadata as bytes. llama.cpp reads a key only as the type that it expects."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from quantkit.errors import UnsupportedError

Width = Literal[
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float32", "float64", "bool", "string",
]  # fmt: skip
Scalar = str | bool | int | float
STRING, ARRAY = 8, 9
# number in files and `struct` code; a string has none
WIDTHS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        **{"uint8": (0, "B"), "int8": (1, "b"), "uint16": (2, "H"), "int16": (3, "h")},
        **{"uint32": (4, "I"), "int32": (5, "i"), "float32": (6, "f"), "bool": (7, "?")},
        **{"string": (STRING, ""), "uint64": (10, "Q"), "int64": (11, "q"), "float64": (12, "d")},
    }
)


@dataclass(frozen=True, slots=True)
class Typed:
    """A value, or the elements of a list, stored in a given width."""

    value: Scalar | Sequence[Scalar]
    width: Width


# llama.cpp counts in uint32, computes in float32, and has lists of int32, float32, bool and string:
# that is what bare values become
Value = Scalar | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float] | Typed


def string(text: str) -> bytes:
    """Length and UTF-8; UnsupportedError for text that has none (lone surrogates)."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"{text!r:.40} has no UTF-8: {error.reason}") from error
    return struct.pack("<Q", len(data)) + data


def entry(key: str, value: Value) -> bytes:
    """One key with its type and value; UnsupportedError when a value does not fit its type."""
    bare, width = (value.value, value.width) if isinstance(value, Typed) else (value, _width(key, value))
    number, _ = WIDTHS[width]
    try:
        if isinstance(bare, str | bool | int | float):
            return string(key) + struct.pack("<I", number) + _pack([bare], width)
        head = struct.pack("<IIQ", ARRAY, number, len(bare))
        return string(key) + head + _pack(bare, width)
    except (struct.error, OverflowError, TypeError, AttributeError) as error:
        raise UnsupportedError(f"`{key}` cannot be stored as {width}: {bare!r:.60}") from error


def _pack(values: Sequence[Scalar], width: str) -> bytes:
    if width == "string":
        return b"".join(string(text) for text in values)  # type: ignore[arg-type]
    return struct.pack(f"<{len(values)}{WIDTHS[width][1]}", *values)


def _width(key: str, value: Scalar | Sequence[Scalar]) -> Width:
    if isinstance(value, str | bool | int | float):
        return _widest(key, {type(value)}, integers="uint32")
    if not value:
        raise UnsupportedError(
            f"`{key}` is an empty list, and GGUF stores what a list is of",
            remedy="leave the key out, or say Typed([], 'string')",
        )
    return _widest(key, {type(element) for element in value}, integers="int32")


def _widest(key: str, kinds: set[type], integers: Width) -> Width:
    if kinds == {str}:
        return "string"
    if kinds == {bool}:
        return "bool"
    if kinds == {int}:
        return integers
    if kinds <= {int, float}:
        return "float32"
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise UnsupportedError(f"`{key}` holds {found}: GGUF has strings, booleans and numbers, one kind a list")
