"""YAML that anybody may have written, as texts, lists and mappings.

It is read by walking through the parser's events. What an alias stands for is counted, because a few lines
of them can stand for gigabytes; that, deep nesting and what is no YAML end the walk. A key that cannot be
told is left out alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

_MAX_DEPTH = 32
# characters and values that all aliases together may stand for
_MAX_ALIASED = 1 << 20
_MAX_REASON = 120
_CONTROL = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ufffd\U00010000-\U0010ffff]")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_MERGE = "<<"


@dataclass(frozen=True, slots=True)
class Read:
    """A mapping, and why a key is not in it: by key, or by ``line N`` where the key itself is at fault."""

    values: dict[str, Any]
    faults: dict[str, str]


def read_mapping(text: str, first_line: int) -> Read:
    """The mapping that `text` is, whose first line has the number `first_line`; empty for an empty text.

    Texts stay as they are written, because YAML takes the language `no` for a truth value; nothing is "".
    ValueError says in which line it is none, and why.
    """
    try:
        documents = _built(yaml.parse(text, Loader=_loader()), first_line)
    except yaml.MarkedYAMLError as error:
        line = _line(error.problem_mark, first_line)
        raise ValueError(f"line {line:,}: {error.problem or 'it is not YAML'}"[:_MAX_REASON]) from error
    except yaml.YAMLError as error:
        control = _CONTROL.search(text)
        line = first_line + text.count("\n", 0, control.start() if control is not None else 0)
        raise ValueError(f"line {line:,}: it holds control characters") from error
    if len(documents) > 1:
        raise ValueError(f"line {documents[1].line:,}: a second document begins")
    if not documents or documents[0].value == "":
        return Read({}, {})
    if not isinstance(documents[0].value, dict):
        raise ValueError(f"line {documents[0].line:,}: it holds no keys with values")
    return _told(documents[0].parts)


def _loader() -> Any:
    # the parser in C reads 1 MiB in a tenth of a second, the one in Python in ten seconds
    return yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader


@dataclass(frozen=True, slots=True)
class _Node:
    """A value; `weight` counts its characters and the values in it, those that aliases stand for included.

    parts  of a document: its keys and values in turn
    """

    value: Any
    weight: int
    line: int
    parts: tuple[_Node, ...] = ()


@dataclass(slots=True)
class _Open:
    """A list that is being filled, or a mapping as its keys and values in turn."""

    line: int
    anchor: str | None
    parts: list[_Node] = field(default_factory=list)


def _told(parts: tuple[_Node, ...]) -> Read:
    values: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        name = key.value
        if not isinstance(name, str) or not name or not name.isprintable():
            faults[f"line {key.line:,}"] = "is left out: its key is no text"
        elif name == _MERGE:
            raise ValueError(f"line {key.line:,}: it merges the keys of another mapping (<<)")
        elif name in values and values[name] != value.value:
            faults[name] = f"is left out: it is there twice, again in line {key.line:,}"
        else:
            values[name] = value.value
    return Read({name: value for name, value in values.items() if name not in faults}, faults)


def _built(events: Iterable[yaml.Event], first_line: int) -> list[_Node]:
    """The documents that the events describe; ValueError for what no card needs."""
    filling = [_Open(first_line, None)]  # innermost last
    anchors: dict[str, _Node] = {}
    aliased = 0
    for event in events:
        line = _line(event.start_mark, first_line)
        anchor = None
        match event:
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                filling.append(_Open(line, event.anchor))
                if len(filling) > _MAX_DEPTH:
                    raise ValueError(f"line {line:,}: it is nested too deeply")
                continue
            case yaml.ScalarEvent():
                node, anchor = _scalar(event, line), event.anchor
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                done = filling.pop()
                mapping = isinstance(event, yaml.MappingEndEvent)
                node, anchor = _closed(done, mapping, document=len(filling) == 1), done.anchor
            case yaml.AliasEvent():
                if event.anchor not in anchors:
                    raise ValueError(f"line {line:,}: an alias of what is not there")
                node = anchors[event.anchor]
                aliased += node.weight
                if aliased > _MAX_ALIASED:
                    raise ValueError(f"line {line:,}: its aliases stand for too much")
            case _:
                continue
        filling[-1].parts.append(node)
        if anchor is not None:
            anchors[anchor] = node
    return filling[0].parts


def _line(mark: Any, first_line: int) -> int:
    return first_line + (0 if mark is None else int(mark.line))


def _scalar(event: yaml.ScalarEvent, line: int) -> _Node:
    value = "" if event.implicit[0] and event.value in _NULL else event.value
    return _Node(value, 1 + len(value), line)


def _closed(done: _Open, mapping: bool, *, document: bool) -> _Node:
    weight = 1 + sum(part.weight for part in done.parts)
    if not mapping:
        return _Node([part.value for part in done.parts], weight, done.line)
    pairs = zip(done.parts[::2], done.parts[1::2], strict=True)
    value = {key.value: held.value for key, held in pairs if isinstance(key.value, str)}
    return _Node(value, weight, done.line, tuple(done.parts) if document else ())
