"""YAML → `Recipe`, and back: strict, every problem at once as ``file:line:column path: message``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from quantkit import registry
from quantkit.errors import RecipeError
from quantkit.recipe import plugins
from quantkit.recipe.check import said
from quantkit.recipe.interpolate import Scope
from quantkit.recipe.nodes import FAILED, Reader, mark
from quantkit.recipe.overrides import Override, apply
from quantkit.recipe.shorthand import parse_targets
from quantkit.recipe.spec import Recipe, Scalar, Target, TransformSpec

_NO_ENV: Mapping[str, str] = MappingProxyType({})
COMMAND_LINE = "command line"


def load_recipe(
    path: Path | str, *, env: Mapping[str, str] = _NO_ENV, overrides: Sequence[Override] = ()
) -> Recipe:
    """The recipe in a file. `env` is what ``${env:NAME}`` may see; raises RecipeError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start:,})") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_recipe(text, name=str(path), env=env, overrides=overrides)


def parse_recipe(
    text: str,
    *,
    name: str = "recipe",
    env: Mapping[str, str] = _NO_ENV,
    overrides: Sequence[Override] = (),
) -> Recipe:
    """The recipe in a YAML text; `name` stands for it in messages."""
    return _build(_compose(text, name), env, overrides)


def recipe_from_flags(overrides: Sequence[Override], *, env: Mapping[str, str] = _NO_ENV) -> Recipe:
    """The recipe that flags alone describe."""
    return _build(MappingNode("tag:yaml.org,2002:map", [], mark(COMMAND_LINE)), env, overrides)


def _compose(text: str, name: str) -> Node:
    try:
        loader = yaml.SafeLoader(text)
        loader.name = name
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        place = f"{name}:{at.line + 1}:{at.column + 1}" if at else name
        raise RecipeError(f"{place} not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{name}:{line}:1 not valid YAML: {error.reason}") from error
    except RecursionError as error:
        raise RecipeError(f"{name}: nested too deeply") from error
    if node is None:
        raise RecipeError(f"{name}:1:1 the recipe is empty", remedy="start with `source:` and `targets:`")
    found: Node = node
    return found


def _build(root: Node, env: Mapping[str, str], overrides: Sequence[Override]) -> Recipe:
    for override in overrides:
        root = apply(root, override)
    reader = Reader(Scope(env))
    recipe = None
    if isinstance(root, MappingNode):
        given = _read_vars(reader, root)
        special = {"targets": _Targets(reader).read, "vars": lambda _node, _path: {"vars": given}}
        recipe = reader.record(root, Recipe, "", special=special)
    else:
        reader.fail(root, "", "a recipe must be a mapping with `source:` and `targets:`")
    if reader.problems or not isinstance(recipe, Recipe):
        raise RecipeError([str(problem) for problem in sorted(set(reader.problems))])
    return recipe


def _read_vars(reader: Reader, root: MappingNode) -> Any:
    """The value of `vars`, read before anything can refer to it; fills the reader's scope."""
    node = next((value for key, value in root.value if key.value == "vars"), None)
    if node is None:
        return {}
    given = reader.read(node, Mapping[str, Scalar], "vars")
    if isinstance(node, MappingNode):
        # A variable whose own value is wrong is known all the same: one mistake, one message.
        known = given if isinstance(given, dict) else {key.value: "" for key, _ in node.value}
        reader.scope.vars |= known
    return given


class _Targets:
    """Reads `targets`: shorthands, which may stand for several targets, and mappings."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def read(self, node: Node, path: str) -> Any:
        if not isinstance(node, SequenceNode):
            return self._reader.read(node, tuple[Target, ...], path)
        groups = self._reader.sequence(node, path, self._item)
        return FAILED if groups is FAILED else tuple(target for group in groups for target in group)

    def _item(self, node: Node, path: str) -> Any:
        if isinstance(node, MappingNode):
            special = {"method": self._method, "transforms": self._transforms}
            target = self._reader.record(node, Target, path, special=special, hidden=("options",))
            return FAILED if target is FAILED else (target,)
        text = self._reader.read(node, str, path)
        if text is FAILED:
            return FAILED
        try:
            return parse_targets(text)
        except RecipeError as error:
            return self._reader.fail(node, path, said(error))

    def _method(self, node: Node, path: str) -> Any:
        """``gptq`` or ``{gptq: {damp: 0.01}}``, as the fields `method` and `options`."""
        found = self._plugin(node, path, "methods", "one method, as gptq or {gptq: {damp: 0.01}}")
        return FAILED if found is FAILED else {"method": found[0], "options": found[1]}

    def _transforms(self, node: Node, path: str) -> Any:
        """A list of ``smoothquant`` or ``{smoothquant: {alpha: 0.8}}``."""
        if not isinstance(node, SequenceNode):
            return self._reader.read(node, tuple[TransformSpec, ...], path)
        return self._reader.sequence(node, path, self._transform)

    def _transform(self, node: Node, path: str) -> Any:
        wanted = "one transform, as smoothquant or {smoothquant: {alpha: 0.8}}"
        found = self._plugin(node, path, "transforms", wanted)
        try:
            return FAILED if found is FAILED else TransformSpec(*found)
        except RecipeError as error:
            return self._reader.fail(node, path, said(error))

    def _plugin(self, node: Node, path: str, kind: registry.Kind, wanted: str) -> Any:
        """(name, parameters) from a name or a mapping from one name to its parameters, or FAILED."""
        if not isinstance(node, MappingNode):
            name = self._reader.read(node, str, path)
            return FAILED if name is FAILED else (name, {})
        pairs = self._reader.pairs(node, path)
        if len(pairs) != 1:
            return self._reader.fail(node, path, f"must name {wanted}")
        (name, (key, value)), = pairs.items()  # fmt: skip
        try:
            params_type = plugins.params_type(kind, name)
        except RecipeError as error:
            return self._reader.fail(key, path, said(error))
        if isinstance(value, ScalarNode) and value.tag.endswith(":null"):
            return name, {}
        params = self._reader.read(value, params_type, f"{path}.{name}")
        return FAILED if params is FAILED else (name, plugins.params_dict(params))
