"""Targets as one string: ``FORMAT[:PRESET[,PRESET...]][@key=value,...]``, upper or lower case.

``gptq:w4g128``, ``gptq:w4g128,w4g32@method=rtn``, ``gptq:w4g128@damp=0.05,act_order=static``.
The keys `method`, `feedback` and `name` are the target's; all others are parameters of the method.
"""

from __future__ import annotations

from quantkit.errors import RecipeError
from quantkit.recipe import plugins
from quantkit.recipe.check import from_text, hints, said, suggest
from quantkit.recipe.spec import Target
from quantkit.schemes import parse_scheme

_OWN = ("method", "feedback", "name")


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
        info = plugins.format_info(name)
        given = _pairs(tail) if at else {}
        own = {key: from_text(given.pop(key), hints(Target)[key]) for key in _OWN if key in given}
        if "name" in own and len(presets) > 1:
            raise RecipeError(f"name: {own['name']!r} cannot be the name of {len(presets)} targets")
        asked = own.pop("method", "").lower()
        targets = []
        for preset in presets:
            scheme = parse_scheme(plugins.scheme_name(preset or info.default_scheme, info))
            method = asked or info.default_method(scheme)
            targets.append(Target(info.name, preset, method, _typed(method, given), **own))
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


def _typed(method: str, given: dict[str, str]) -> dict[str, object]:
    """The parameters of a method, read from text according to their types."""
    known = hints(plugins.params_type(method))
    options = {}
    for key, text in given.items():
        if key not in known:
            close = suggest(key, (*known, *_OWN))
            raise RecipeError(f"{method!r} has no parameter {key!r}{close}")
        try:
            options[key] = from_text(text, known[key])
        except RecipeError as error:
            raise RecipeError(f"{key}: {said(error)}") from None
    return options
