"""`Recipe` → YAML with every default written out; loading it gives an equal recipe.

Left out: what is null or empty by default and was not set. Text from the environment is written as
its reference, never as its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import yaml

from quantkit.recipe.interpolate import escape
from quantkit.recipe.spec import Recipe, Target, TransformSpec


def dump(recipe: Recipe) -> str:
    """The YAML text of a recipe."""
    document = {"quantkit": recipe.quantkit, **_record(recipe)}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


def _record(spec: Any) -> dict[str, Any]:
    values = {}
    for f in fields(spec):
        value = getattr(spec, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if value == default and (value is None or value in ((), {}, "")):
            continue
        values[f.name] = _plain(value)
    if isinstance(spec, Target):
        options = values.pop("options", None)
        if options:
            values["method"] = {spec.method: options}
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, TransformSpec):
        return {value.name: _plain(value.options)} if value.options else value.name
    return _record(value) if is_dataclass(value) else value
