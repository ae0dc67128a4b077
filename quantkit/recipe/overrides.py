"""Flags and ``--set a.b=c`` as changes to the node tree of a recipe, each remembering its flag."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from quantkit.errors import RecipeError
from quantkit.recipe.nodes import mark

_MAP, _SEQ = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_KEY = re.compile(r"\.?(?P<name>[A-Za-z_][A-Za-z0-9_-]*)|\[(?P<index>[0-9]+)\]|\.(?P<number>[0-9]+)")


@dataclass(frozen=True, slots=True)
class Override:
    """The value that replaces what stands at `path`, as ``targets[0].scheme``, or goes before its items."""

    path: str
    value: Node
    prepend: bool = False

    @property
    def label(self) -> str:
        """The flag that it comes from."""
        return str(self.value.start_mark.name)


def flag(path: str, value: Any, label: str, *, prepend: bool = False) -> Override:
    """A value given by a flag; strings are taken as they are, whatever YAML would make of them."""
    return Override(path, _node(value, label), prepend)


def assignment(text: str) -> Override:
    """``a.b=c`` as typed after ``--set``; the value is read as YAML."""
    path, equals, value = text.partition("=")
    label = f"--set {path}"
    if not equals or not path:
        raise RecipeError(f"--set {text}: write PATH=VALUE, as calibration.rows=128")
    try:
        parsed = yaml.compose(value, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{label}: {value!r} is not valid YAML", remedy="quote the value") from error
    node = ScalarNode("tag:yaml.org,2002:str", "", mark(label)) if parsed is None else parsed
    return Override(path, _relabel(node, label))


def apply(root: Node, override: Override) -> Node:
    """`root` with the override in place; `root` itself is left as it is."""
    keys: list[str | int] = []
    end = 0
    while end < len(override.path):
        found = _KEY.match(override.path, end)
        if found is None:
            raise RecipeError(f"{override.label}: {override.path!r} is not a path as targets[0].scheme")
        keys.append(found["name"] or int(found["index"] or found["number"]))
        end = found.end()
    return _graft(root, keys, override)


def _graft(node: Node, keys: list[str | int], override: Override) -> Node:
    if not keys:
        if override.prepend and isinstance(node, SequenceNode):
            return SequenceNode(_SEQ, [*override.value.value, *node.value], node.start_mark)
        return override.value
    key, rest = keys[0], keys[1:]
    at = override.value.start_mark
    if isinstance(node, ScalarNode) and node.tag.endswith(":null"):
        node = MappingNode(_MAP, [], at)
    if isinstance(key, int):
        if not isinstance(node, SequenceNode) or key >= len(node.value):
            raise RecipeError(f"{override.label}: there is no item {key}")
        items = [_graft(item, rest, override) if i == key else item for i, item in enumerate(node.value)]
        return SequenceNode(_SEQ, items, node.start_mark)
    if not isinstance(node, MappingNode):
        raise RecipeError(f"{override.label}: {key!r} cannot be set, its parent is not a mapping")
    pairs = list(node.value)
    for i, (name, child) in enumerate(pairs):
        if isinstance(name, ScalarNode) and name.value == key:
            pairs[i] = (name, _graft(child, rest, override))
            break
    else:
        name = ScalarNode("tag:yaml.org,2002:str", key, at)
        pairs.append((name, _graft(MappingNode(_MAP, [], at), rest, override)))
    return MappingNode(_MAP, pairs, node.start_mark)


def _relabel(node: Node, label: str) -> Node:
    at = mark(label)
    match node:
        case MappingNode():
            pairs = [(_relabel(k, label), _relabel(v, label)) for k, v in node.value]
            return MappingNode(node.tag, pairs, at)
        case SequenceNode():
            return SequenceNode(node.tag, [_relabel(item, label) for item in node.value], at)
        case ScalarNode():
            return ScalarNode(node.tag, node.value, at, style=node.style)
        case _:
            return node


def _node(value: Any, label: str) -> Node:
    at = mark(label)
    match value:
        case dict():
            return MappingNode(_MAP, [(_node(k, label), _node(v, label)) for k, v in value.items()], at)
        case list() | tuple():
            return SequenceNode(_SEQ, [_node(item, label) for item in value], at)
        case None:
            return ScalarNode("tag:yaml.org,2002:null", "null", at)
        case bool():
            return ScalarNode("tag:yaml.org,2002:bool", str(value).lower(), at)
        case int():
            return ScalarNode("tag:yaml.org,2002:int", str(value), at)
        case float():
            return ScalarNode("tag:yaml.org,2002:float", repr(value), at)
        case _:
            return ScalarNode("tag:yaml.org,2002:str", str(value), at, style='"')
