"""What recipes need to know about methods, transforms and formats. Asking imports a plugin, and so torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit import registry
from quantkit.errors import RecipeError
from quantkit.gguf.mixes import MIXES
from quantkit.recipe.check import fault, hints, refuse, suggest
from quantkit.schemes import Scheme, parse_scheme

MIXER = "gguf_mix"
_METHODS = (("search", "gptq"),)
_FORMATS = (("ct", "compressed_tensors"), ("bnb", "bitsandbytes"))
# what people call a result, as the format and the scheme that it stands for
_RESULTS = (
    ("nf4", ("bitsandbytes", "nf4")),
    ("nf4_dq", ("bitsandbytes", "nf4_dq")),
    ("fp4", ("bitsandbytes", "fp4")),
    ("int8", ("bitsandbytes", "int8")),
    ("llm_int8", ("bitsandbytes", "int8")),
    ("fp8", ("compressed_tensors", "fp8a8")),
    ("w8a8", ("compressed_tensors", "w8a8")),
    ("mxfp4", ("compressed_tensors", "mxfp4")),
    ("nvfp4", ("compressed_tensors", "nvfp4")),
)


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """What ``quantkit/formats/<name>.py`` says about itself."""

    name: str
    summary: str
    default_method: Callable[[Scheme], str]
    default_scheme: str
    presets: tuple[str, ...]
    parse: Callable[[str], Scheme]


def _spelled(text: str) -> str:
    return text.strip().lower().replace("-", "_")


def aliases(kind: registry.Kind) -> tuple[str, ...]:
    """Other names that recipes may use."""
    known = {
        "methods": tuple(name for name, _ in _METHODS),
        "formats": tuple(name for name, _ in (*_FORMATS, *_RESULTS)),
    }
    return known.get(kind, ())


def shortcuts() -> dict[str, str]:
    """Name of a result → the target that it stands for, as ``bitsandbytes:nf4``."""
    return {name: ":".join(target) for name, target in _RESULTS}


def plugin_name(kind: registry.Kind, text: str) -> str:
    """The registry's spelling of a method or transform: aliases, case and dashes resolved."""
    name = _spelled(text)
    return dict(_METHODS).get(name, name) if kind == "methods" else name


def resolve_format(text: str, scheme: str = "") -> tuple[FormatInfo, str]:
    """(format, name of the scheme) of a target: ``nf4`` is both. An empty scheme is the format's usual one.

    Raises RecipeError with a suggestion.
    """
    name = _spelled(text)
    result = dict(_RESULTS).get(name)
    if result is None:
        info = format_info(name)
        return info, scheme or info.default_scheme
    if scheme:
        raise RecipeError(
            f"{text!r} stands for {':'.join(result)} and takes no scheme",
            remedy=f"write {result[0]}:{scheme}",
        )
    return format_info(result[0]), result[1]


def format_info(text: str) -> FormatInfo:
    """About one format; raises RecipeError with a suggestion."""
    name = dict(_FORMATS).get(_spelled(text), _spelled(text))
    known = registry.names("formats")
    if name not in known:
        hint = _scheme_hint(name) or suggest(name, (*known, *aliases("formats")))
        raise RecipeError(f"unknown format {name!r}{hint}", remedy=f"known: {', '.join(known)}")
    plugin = registry.load("formats", name)
    return FormatInfo(
        name, plugin.SUMMARY, plugin.default_method, plugin.DEFAULT_SCHEME, plugin.PRESETS, plugin.parse
    )


def _scheme_hint(text: str) -> str:
    """A word for who wrote a scheme or a preset without its format, else empty."""
    if text in MIXES:
        return f"; {text!r} is a preset of gguf, write gguf:{text}"
    try:
        return f"; {parse_scheme(text).name!r} is a scheme, write FORMAT:{text}"
    except RecipeError:
        return ""


def summary(kind: registry.Kind, name: str) -> str:
    """One line about a plugin; raises RecipeError with a suggestion."""
    return str(registry.load(kind, name).SUMMARY)


def scheme_name(text: str, info: FormatInfo) -> str:
    """The canonical name of a scheme as the format reads it; raises RecipeError that suggests its presets."""
    try:
        return info.parse(text).name
    except RecipeError as error:
        close = suggest(text, info.presets, cutoff=0.5)
        if not close or not error.message.startswith("unknown scheme"):
            raise
        raise RecipeError(f"unknown scheme {text!r}{close}", remedy=error.remedy) from None


def params_type(kind: registry.Kind, name: str) -> type[Any]:
    """The frozen dataclass of a plugin's parameters; raises RecipeError with a suggestion."""
    params: type[Any] = registry.load(kind, plugin_name(kind, name)).Params
    return params


def make_params(kind: registry.Kind, name: str, given: Mapping[str, Any]) -> Any:
    """A plugin's parameters from keyword values; unknown, missing or wrong ones raise RecipeError."""
    cls = params_type(kind, name)
    known = hints(cls)
    problems = []
    for key, value in given.items():
        if key not in known:
            problems.append(f"options: {name!r} has no parameter {key!r}{suggest(key, known)}")
        elif wrong := fault(value, known[key]):
            problems.append(f"{key}: {wrong}")
    refuse(problems)
    return cls(**given)


def mix_options(scheme: Scheme, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the rules that a preset stands for which are not the usual ones; RecipeError where there
    are none."""
    if scheme.mix:
        known = params_type("allocate", MIXER)
        unknown = [f"gguf presets have no option {key!r}{suggest(key, hints(known))}" for key in given
                   if key not in hints(known)]  # fmt: skip
        refuse(unknown)
        made = make_params("allocate", MIXER, given)
        return {key: value for key, value in params_dict(made).items() if value != getattr(known(), key)}
    if given:
        raise RecipeError(f"{', '.join(given)} belong to presets of gguf, and {scheme.name!r} is none")
    return {}


def params_dict(params: Any) -> dict[str, Any]:
    """Every parameter of a plugin with its value."""
    return {name: getattr(params, name) for name in hints(type(params))}
