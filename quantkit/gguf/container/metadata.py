"""Values of metadata and how wide they are stored. llama.cpp reads a key only as the type that it expects."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

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

    @property
    def listed(self) -> bool:
        return not isinstance(self.value, str | bool | int | float)


# llama.cpp counts in uint32, computes in float32, and has lists of int32, float32, bool and string:
# that is what bare values become
Value = Scalar | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float] | Typed


def typed(key: str, value: Value) -> Typed:
    """`value` with the width it is stored in; UnsupportedError when it does not fit.

    The library refuses the same values, but without saying which key they belong to.
    """
    found = value if isinstance(value, Typed) else Typed(value, _width(key, value))
    if found.listed and not found.value:
        raise UnsupportedError(
            f"`{key}` is an empty list, which the package gguf does not write", remedy="leave the key out"
        )
    values: Any = found.value if found.listed else [found.value]
    try:
        if found.width == "string":
            "".join(values).encode("utf-8")
        else:
            struct.pack(f"<{len(values)}{WIDTHS[found.width][1]}", *values)
    except UnicodeEncodeError as error:
        text = error.object[error.start : error.end]
        raise UnsupportedError(f"{text!r:.40} in `{key}` has no UTF-8: {error.reason}") from error
    except (struct.error, OverflowError, TypeError) as error:
        raise UnsupportedError(f"`{key}` cannot be stored as {found.width}: {found.value!r:.60}") from error
    return found


def _width(key: str, value: Scalar | Sequence[Scalar]) -> Width:
    if isinstance(value, str | bool | int | float):
        return _widest(key, {type(value)}, integers="uint32")
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
