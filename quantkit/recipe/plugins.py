"""What recipes need to know about methods and formats. Asking imports the plugin, and so torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit import registry
from quantkit.errors import RecipeError
from quantkit.recipe.check import fault, hints, refuse, suggest
from quantkit.schemes import Scheme, parse_scheme

_ALIASES = (("ct", "compressed_tensors"),)


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """What ``quantkit/formats/<name>.py`` says about itself."""

    name: str
    summary: str
    default_method: Callable[[Scheme], str]
    default_scheme: str
    presets: tuple[str, ...]


def format_name(text: str) -> str:
    """The registry's spelling of a format: aliases, case and dashes resolved."""
    name = text.strip().lower().replace("-", "_")
    return dict(_ALIASES).get(name, name)


def format_info(text: str) -> FormatInfo:
    """About one format; raises RecipeError with a suggestion."""
    name = format_name(text)
    plugin = registry.load("formats", name)
    return FormatInfo(name, plugin.SUMMARY, plugin.default_method, plugin.DEFAULT_SCHEME, plugin.PRESETS)


def method_summary(name: str) -> str:
    """One line about a method; raises RecipeError with a suggestion."""
    return str(registry.load("methods", name).SUMMARY)


def scheme_name(text: str, info: FormatInfo) -> str:
    """The canonical name of a scheme; raises RecipeError that suggests the format's presets."""
    try:
        return parse_scheme(text).name
    except RecipeError as error:
        close = suggest(text, info.presets, cutoff=0.5)
        if not close:
            raise
        raise RecipeError(f"unknown scheme {text!r}{close}", remedy=error.remedy) from None


def params_type(method: str) -> type[Any]:
    """The frozen dataclass of a method's parameters; raises RecipeError with a suggestion."""
    params: type[Any] = registry.load("methods", method).Params
    return params


def make_params(method: str, given: Mapping[str, Any]) -> Any:
    """The method's parameters from keyword values; unknown, missing or wrong ones raise RecipeError."""
    cls = params_type(method)
    known = hints(cls)
    problems = []
    for key, value in given.items():
        if key not in known:
            problems.append(f"options: {method!r} has no parameter {key!r}{suggest(key, known)}")
        elif wrong := fault(value, known[key]):
            problems.append(f"{key}: {wrong}")
    refuse(problems)
    return cls(**given)


def params_dict(params: Any) -> dict[str, Any]:
    """Every parameter of a method with its value."""
    return {name: getattr(params, name) for name in hints(type(params))}
