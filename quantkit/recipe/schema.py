"""JSON Schema of recipes, for editors: generated from the dataclasses that `load` reads into."""

from __future__ import annotations

import collections.abc
import json
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from quantkit import registry
from quantkit.recipe import plugins
from quantkit.recipe.check import Range, doc, extras, hints, options
from quantkit.recipe.spec import Recipe, Target, TransformSpec

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_PLUGINS = ("method", "mix")
_REFERENCE = r"\$\{"


def schema() -> dict[str, Any]:
    """The schema of version 1. Imports every method and transform for its parameters."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "quantkit recipe, version 1",
        **_record(Recipe),
        "patternProperties": {"^x-": {}},
    }


def _record(cls: type[Any]) -> dict[str, Any]:
    properties, required = {}, []
    of = hints(cls)
    for f in fields(cls):
        if cls is Target and f.name == "options":
            continue
        found: dict[str, Any] = {"description": doc(of[f.name])} if doc(of[f.name]) else {}
        found |= _of_target(f.name) if cls is Target and f.name in _PLUGINS else _hint(of[f.name])
        if f.default is f.default_factory is MISSING:
            required.append(f.name)
        elif f.default is None or (isinstance(f.default, str | int | float) and f.default != ""):
            found["default"] = f.default
        properties[f.name] = found
    record = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**record, "required": required} if required else record


def _of_target(field: str) -> dict[str, Any]:
    """What plugins say about a field of a target."""
    if field == "method":
        return _plugin("methods")
    return _record(plugins.params_type("allocate", plugins.MIXER))


def _hint(hint: Any) -> dict[str, Any]:
    """A union of one structured kind, or of scalars; what is not text may be a ``${vars.x}``."""
    found: list[dict[str, Any]] = []
    types: list[str] = []
    for option in options(hint):
        origin = get_origin(option)
        if origin is Literal:
            found.append({"enum": list(get_args(option))})
        elif origin is tuple:
            found.append({"type": "array", "items": _item(get_args(option)[0])})
        elif origin is collections.abc.Mapping:
            found.append({"type": "object", "additionalProperties": _hint(get_args(option)[1])})
        elif is_dataclass(option) and isinstance(option, type):
            found.append(_record(option))
        else:
            types.append(_TYPES[option])
    if types:
        found.append(_scalar(types, hint))
    return found[0] if len(found) == 1 else {"anyOf": found}


def _scalar(types: list[str], hint: Any) -> dict[str, Any]:
    bounds = [extra for extra in extras(hint) if isinstance(extra, Range)]
    limits = {"minimum": bounds[0].low, "maximum": bounds[0].high} if bounds else {}
    found: dict[str, Any] = {key: value for key, value in limits.items() if value is not None}
    if "string" not in types and types != ["null"]:
        types, found = [*types, "string"], {**found, "pattern": _REFERENCE}
    return {"type": types[0] if len(types) == 1 else types, **found}


def _plugin(kind: registry.Kind) -> dict[str, Any]:
    """A name, or a mapping from one name to its parameters."""
    names = (*registry.names(kind), *plugins.aliases(kind))
    each = {
        name: {
            "description": plugins.summary(kind, plugins.plugin_name(kind, name)),
            **_record(plugins.params_type(kind, name)),
        }
        for name in names
    }
    mapping = {"type": "object", "additionalProperties": False, "properties": each}
    return {"anyOf": [{"enum": list(names)}, {**mapping, "minProperties": 1, "maxProperties": 1}]}


def _item(hint: Any) -> dict[str, Any]:
    """An element of a list."""
    if hint is TransformSpec:
        return _plugin("transforms")
    if hint is not Target:
        return _hint(hint)
    text = "FORMAT[:PRESET[,PRESET...]][@key=value,...], as gptq:w4g128, gptq:w4g128@method=rtn or nf4"
    return {"anyOf": [{"type": "string", "description": text}, _record(Target)]}


def schema_text() -> str:
    """The schema as the committed file holds it."""
    return json.dumps(schema(), indent=2) + "\n"
