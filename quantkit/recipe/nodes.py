"""YAML nodes → typed values, strictly, every problem with the place it stands at.

`yaml.compose` gives a tree that still knows lines and columns; `Reader` structures it against type
hints without coercion. YAML 1.1 reads ``no`` as false, ``010`` as 8 and ``3:30`` as 210: such
scalars are refused rather than guessed at, and ``1e-5``, which it reads as text, is a number here.
"""

from __future__ import annotations

import collections.abc
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Final, get_args, get_origin

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from quantkit.errors import RecipeError
from quantkit.recipe.check import (
    INTEGER,
    NUMBER,
    accepts,
    fault,
    from_text,
    hints,
    options,
    said,
    show,
    suggest,
)
from quantkit.recipe.interpolate import FromEnv, Scope, interpolate

_TAG = "tag:yaml.org,2002:"
_FIELD = re.compile(r"(?P<field>\w+)(?P<colon>:?) (?P<rest>.*)", re.DOTALL)
Special = Callable[[Node, str], Any]


class _Failed:
    """Stands for a value that could not be read; its problem is already listed."""


FAILED: Final = _Failed()


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One complaint. `line` and `column` count from 1; line 0 stands for a flag."""

    line: int
    column: int
    place: str
    message: str

    def __str__(self) -> str:
        where = f"{self.place}:{self.line}:{self.column}" if self.line else self.place
        return f"{where} {self.message}"


def mark(label: str) -> yaml.Mark:
    """The place of a value that comes from a flag."""
    return yaml.Mark(label, 0, -1, -1, None, 0)


class Reader:
    """Structures nodes; `problems` collects what is wrong."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.problems: list[Problem] = []

    def fail(self, node: Node, path: str, message: str) -> _Failed:
        """List a problem at `node`."""
        at = node.start_mark
        text = f"{path}: {message}" if path else message
        self.problems.append(Problem(at.line + 1, at.column + 1, at.name, text))
        return FAILED

    def read(self, node: Node, hint: Any, path: str) -> Any:
        """The value of `node` where `hint` is expected, or FAILED."""
        for option in options(hint):
            origin = get_origin(option)
            if origin is tuple and isinstance(node, SequenceNode):
                return self._tuple(node, get_args(option)[0], path)
            if isinstance(node, MappingNode):
                if is_dataclass(option) and isinstance(option, type):
                    return self.record(node, option, path)
                if origin is collections.abc.Mapping:
                    return self._dictionary(node, get_args(option)[1], path)
        if isinstance(node, ScalarNode):
            return self.scalar(node, hint, path)
        found: Any = [] if isinstance(node, SequenceNode) else {}
        return self.fail(node, path, fault(found, hint) or "is not possible here")

    def _tuple(self, node: SequenceNode, hint: Any, path: str) -> Any:
        return self.sequence(node, path, lambda child, where: self.read(child, hint, where))

    def sequence(self, node: SequenceNode, path: str, item: Special) -> Any:
        """A tuple of the items, or FAILED."""
        values = tuple(item(child, f"{path}[{i}]") for i, child in enumerate(node.value))
        return FAILED if any(value is FAILED for value in values) else values

    def _dictionary(self, node: MappingNode, hint: Any, path: str) -> Any:
        values = {
            key: self.read(child, hint, f"{path}.{key}") for key, (_, child) in self.pairs(node, path).items()
        }
        return FAILED if any(value is FAILED for value in values.values()) else values

    def pairs(self, node: MappingNode, path: str) -> dict[str, tuple[Node, Node]]:
        """Key → (key node, value node); keys that are not text or come twice are problems."""
        found: dict[str, tuple[Node, Node]] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or key.tag != f"{_TAG}str":
                shown = repr(key.value) if isinstance(key, ScalarNode) else "a list or mapping"
                self.fail(key, path, f"a key must be text, not {shown}")
            elif key.value in found:
                line = found[key.value][0].start_mark.line + 1
                self.fail(key, path, f"key {key.value!r} given twice (first on line {line})")
            else:
                found[key.value] = (key, value)
        return found

    def record(
        self,
        node: MappingNode,
        cls: type[Any],
        path: str,
        special: Mapping[str, Special] | None = None,
        hidden: Iterable[str] = (),
    ) -> Any:
        """An instance of the dataclass `cls`, or FAILED.

        `special` reads some keys in its own way (and may return a dict of several fields);
        `hidden` fields are not keys. Keys that start with ``x-`` are ignored at the top level.
        """
        known = {name: hint for name, hint in hints(cls).items() if name not in hidden}
        given = {k: v for k, v in self.pairs(node, path).items() if path or not k.startswith("x-")}
        values: dict[str, Any] = {}
        for key, (key_node, child) in given.items():
            where = f"{path}.{key}" if path else key
            if key not in known:
                values[key] = self.fail(key_node, path, f"unknown key {key!r}{suggest(key, known)}")
            elif special and key in special:
                value = special[key](child, where)
                values |= value if isinstance(value, dict) else {key: value}
            else:
                values[key] = self.read(child, known[key], where)
        for f in fields(cls):
            if f.name in known and f.name not in values and f.default is f.default_factory is MISSING:
                values[f.name] = self.fail(node, path, f"{f.name!r} is missing")
        if any(value is FAILED for value in values.values()):
            return FAILED
        try:
            return cls(**values)
        except RecipeError as error:
            remedy = f" ({error.remedy})" if error.remedy else ""
            for problem in error.problems:
                self._place(problem + remedy, node, given, path)
            return FAILED

    def _place(self, problem: str, node: Node, given: Mapping[str, tuple[Node, Node]], path: str) -> None:
        """List what a dataclass says about itself at the field that it names."""
        found = _FIELD.match(problem)
        if found is None or not (found["colon"] or found["field"] in given):
            self.fail(node, path, problem)
            return
        name = found["field"]
        at = given[name][1] if name in given else node
        where = f"{path}.{name}" if path else name
        self.fail(at, where, found["rest"])

    def scalar(self, node: ScalarNode, hint: Any, path: str) -> Any:
        """The value of a scalar, checked against `hint`, or FAILED."""
        try:
            value = self._text(node, hint, path) if node.tag == f"{_TAG}str" else _resolve(node, hint)
        except RecipeError as error:
            return self.fail(node, path, said(error))
        wrong = fault(value, hint)
        return value if wrong is None else self.fail(node, path, wrong)

    def _text(self, node: ScalarNode, hint: Any, path: str) -> Any:
        text: str = node.value
        if "${" in text:
            value = interpolate(text, self.scope)
            if isinstance(value, FromEnv) and (path.startswith("targets") or not accepts(hint, str)):
                raise RecipeError("an environment value can only be used as text, and not in targets")
            return value if accepts(hint, str) else from_text(value, hint)
        if node.style is None and not accepts(hint, str) and accepts(hint, float) and NUMBER.fullmatch(text):
            return float(text)
        return text


def _resolve(node: ScalarNode, hint: Any) -> Any:
    """The value of a scalar that YAML does not read as text; raises RecipeError for its traps."""
    text = node.value
    match node.tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "int" if INTEGER.fullmatch(text):
            return int(text)
        case "float" if NUMBER.fullmatch(text):
            return float(text)
        case "bool" | "int" | "float" | "timestamp":
            wanted = {bool, int, float} & set(options(hint))
            number = "write true or false" if bool in wanted else "write plain digits"
            do = number if wanted else f"quote it: '{text}'"
            raise RecipeError(f"YAML reads {text} as {show(yaml.safe_load(text))}; {do}")
        case _:
            raise RecipeError(f"the YAML tag {node.tag} has no meaning in a recipe")
