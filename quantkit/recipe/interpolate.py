"""``${vars.x}`` and ``${env:NAME:-default}`` in the strings of a recipe; ``$${`` is a literal ``${``.

Environment values may be private, so a string made with one remembers how it was written
(`FromEnv`), and `dump` writes that instead of the value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantkit.errors import RecipeError
from quantkit.recipe.check import suggest

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<inside>[^{}]*)(?P<close>\}?)")
_ENV = re.compile(r"env:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(:-(?P<default>.*))?", re.DOTALL)


class FromEnv(str):
    """Text that holds an environment value; `template` is how the recipe wrote it."""

    template: str

    def __new__(cls, value: str, template: str) -> FromEnv:
        self = super().__new__(cls, value)
        self.template = template
        return self

    def __reduce__(self) -> tuple[type[FromEnv], tuple[str, str]]:
        return FromEnv, (str(self), self.template)


@dataclass(slots=True)
class Scope:
    """What references stand for."""

    env: Mapping[str, str]
    vars: dict[str, object] = field(default_factory=dict)


def escape(text: str) -> str:
    """`text` so that interpolating it gives `text` again; environment values as their references."""
    return text.template if isinstance(text, FromEnv) else text.replace("${", "$${")


def interpolate(text: str, scope: Scope) -> str:
    """`text` with its references replaced; raises RecipeError for one that stands for nothing."""
    value, template, private, end = "", "", False, 0
    for found in _REFERENCE.finditer(text):
        literal, end = text[end : found.start()], found.end()
        piece = "${" if found["inside"] is None else _lookup(found, scope)
        private = private or isinstance(piece, FromEnv)
        value += literal + piece
        template += escape(literal) + escape(piece)
    value += text[end:]
    return FromEnv(value, template + escape(text[end:])) if private else value


def _lookup(found: re.Match[str], scope: Scope) -> str:
    inside = found["inside"]
    if not found["close"]:
        raise RecipeError(f"the reference '{found[0]}' is not closed with }}; write $${{ for the text ${{")
    kind, _, name = inside.partition(".")
    if kind == "vars" and name:
        if name not in scope.vars:
            raise RecipeError(f"unknown variable {name!r}{suggest(name, scope.vars)}")
        return _text(scope.vars[name])
    env = _ENV.fullmatch(inside)
    if env is None:
        raise RecipeError(f"unknown reference '{found[0]}'; write ${{vars.name}} or ${{env:NAME:-default}}")
    value = scope.env.get(env["name"]) or env["default"]
    if value is None:
        name = env["name"]
        raise RecipeError(f"the environment variable {name} is not set; write ${{env:{name}:-default}}")
    return FromEnv(value, found[0])


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)
