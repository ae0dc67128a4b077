"""Targets as one string: ``FORMAT[:PRESET[,PRESET...]][@key=value,...]``, upper or lower case.

``gptq:w4g128``, ``gptq:w4g128,w4g32@method=rtn``, ``nf4``, ``ct:w8a8@transforms=smoothquant,alpha=0.8``.
The keys `method`, `transforms` (one), `kv_cache`, `feedback` and `name` are the target's; `pure`, `output`
and `embedding` those of a gguf preset; all others are parameters of the method, or of the transform where
only that knows them.
"""

from __future__ import annotations

from typing import Any

from quantkit.errors import RecipeError
from quantkit.recipe import plugins
from quantkit.recipe.check import from_text, hints, said, suggest
from quantkit.recipe.spec import Target, TransformSpec
from quantkit.schemes import Scheme

_OWN = ("method", "kv_cache", "feedback", "name")


def parse_targets(text: str) -> tuple[Target, ...]:
    """One target per preset; raises RecipeError with a suggestion."""
    head, at, tail = text.strip().partition("@")
    name, colon, listed = head.partition(":")
    presets = [preset.strip() for preset in listed.split(",")] if colon else [""]
    if not name or (colon and not all(presets)) or (at and not tail):
        raise RecipeError(
            f"{text!r} is not a target", remedy="write FORMAT:PRESET or FORMAT:PRESET@key=value,key=value"
        )
    try:
        given = _pairs(tail) if at else {}
        own = {key: from_text(given.pop(key), hints(Target)[key]) for key in _OWN if key in given}
        if "name" in own and len(presets) > 1:
            raise RecipeError(f"name: {own['name']!r} cannot be the name of {len(presets)} targets")
        asked, transform = own.pop("method", ""), given.pop("transforms", None)
        targets = []
        for preset in presets:
            info, wanted = plugins.resolve_format(name, preset)
            scheme = plugins.scheme_name(wanted, info)
            method = plugins.plugin_name("methods", asked or info.default_method(info.parse(scheme)))
            mix, rest = _mixed(info.parse(scheme), given)
            options, rescaling = _options(method, transform, rest)
            targets.append(Target(info.name, scheme, method, options, rescaling, mix=mix, **own))
        return tuple(targets)
    except RecipeError as error:
        raise RecipeError(f"{text!r}: {said(error)}") from None


def _pairs(tail: str) -> dict[str, str]:
    """``a=1,b=2`` as a dict."""
    given: dict[str, str] = {}
    for part in tail.split(","):
        key, equals, value = part.partition("=")
        key = key.strip().lower()
        if not equals or not key:
            raise RecipeError(f"{part!r} is not key=value")
        if key in given:
            raise RecipeError(f"{key}: given twice")
        given[key] = value.strip()
    return given


def _mixed(scheme: Scheme, given: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(options of the rules of a preset, what else is given)."""
    if not scheme.mix:
        return {}, given
    known = hints(plugins.params_type("allocate", plugins.MIXER))
    mix = {key: from_text(text, known[key]) for key, text in given.items() if key in known}
    return mix, {key: text for key, text in given.items() if key not in known}


def _options(
    method: str, transform: str | None, given: dict[str, str]
) -> tuple[dict[str, object], tuple[TransformSpec, ...]]:
    """The parameters of the method, and the transform with its own, read from text as their types say."""
    of_method = hints(plugins.params_type("methods", method))
    of_transform: dict[str, Any] = {}
    if transform is not None:
        of_transform = hints(plugins.params_type("transforms", transform))
    options: dict[str, object] = {}
    rescaling: dict[str, object] = {}
    for key, text in given.items():
        if key not in of_method and key not in of_transform:
            mixing = hints(plugins.params_type("allocate", plugins.MIXER))
            close = suggest(key, (*of_method, *of_transform, *_OWN, "transforms", *mixing))
            owners = repr(method) if transform is None else f"neither {method!r} nor {transform!r}"
            raise RecipeError(f"{owners} has {'no' if transform is None else 'a'} parameter {key!r}{close}")
        if key in of_method and key in of_transform:
            raise RecipeError(
                f"{key}: a parameter of both {method!r} and {transform!r}",
                remedy=f"write {{{transform}: {{{key}: {text}}}}} in a recipe",
            )
        into, known = (options, of_method) if key in of_method else (rescaling, of_transform)
        try:
            into[key] = from_text(text, known[key])
        except RecipeError as error:
            raise RecipeError(f"{key}: {said(error)}") from None
    return options, () if transform is None else (TransformSpec(transform, rescaling),)
