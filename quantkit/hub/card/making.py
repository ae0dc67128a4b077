"""How it was made: tools, source, what was known of inputs, what is not quantized, the recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import yaml

from quantkit.hub.card.markdown import bullets, code, fenced, folded, link, table, text
from quantkit.hub.card.page import Page, Variant
from quantkit.hub.manifest import Origin
from quantkit.recipe.sizes import format_size

_FOLDED_ROWS = 12
_FORMATS = MappingProxyType(
    {
        "gguf": "GGUF",
        "gptq": "GPTQ",
        "awq": "AWQ",
        "compressed_tensors": "compressed-tensors",
        "bitsandbytes": "bitsandbytes",
        "hqq": "HQQ",
    }
)


def facts(page: Page) -> str:
    """Bullets that hold for all variants, and one per variant where they differ."""
    lines = [f"Source: {source_line(page)}"]
    lines += _grouped(page, "Made with", _versions)
    lines += _grouped(page, "Moved", _moved)
    lines += _grouped(page, "Method", _method)
    lines += _grouped(page, "Calibration", _calibration)
    lines += _grouped(page, "Help", _help)
    return bullets(lines)


def formats(page: Page) -> str:
    """The names of the formats, for readers."""
    names = dict.fromkeys(_FORMATS.get(v.manifest.format, v.manifest.format) for v in page.listed)
    return " and ".join(map(text, names))


def source_line(page: Page) -> str:
    """The source with a link to the very commit."""
    origin = page.source
    if origin.on_hub:
        name = link(
            f"{text(origin.id)}@{str(origin.revision)[:8]}", page.url(origin.id, "tree", str(origin.revision))
        )
    else:
        models = [link(text(id), page.url(id)) for id in page.licence.base_models]
        of = f", according to the publisher {' and '.join(models)}" if models else ""
        name = f"a folder called {code(origin.id)}{of}"
    return f"{name}; {described(origin)}; fingerprint {code(origin.fingerprint[:16])}"


def described(origin: Origin) -> str:
    return (
        f"{text(origin.architecture)}, {origin.parameters:,} parameters, {text(origin.dtype)}, "
        f"{format_size(origin.size_bytes)}"
    )


def kept_tables(page: Page) -> str:
    """What is not quantized, once for all variants that keep the same."""
    groups: dict[Any, list[str]] = {}
    for variant, label in zip(page.listed, page.labels(), strict=True):
        groups.setdefault(variant.manifest.kept, []).append(label)
    parts = []
    for kept, labels in groups.items():
        rows = [
            (code(k.pattern, in_table=True), f"{k.count:,}", f"{k.parameters:,}", text(k.dtype)) for k in kept
        ]
        shown = table(("not quantized", "tensors", "parameters", "stored as"), rows, right=(1, 2))
        if not kept:
            shown = "Every weight is quantized."
        if len(rows) > _FOLDED_ROWS:
            shown = folded(f"{len(rows)} groups of weights are not quantized", shown)
        of = f"{text(', '.join(labels))}:\n\n" if len(groups) > 1 else ""
        parts.append(of + shown)
    return "\n\n".join(parts)


def recipes(page: Page) -> str:
    """Every recipe verbatim, folded; equal ones once."""
    groups: dict[str, list[str]] = {}
    for variant, label in zip(page.listed, page.labels(), strict=True):
        if variant.manifest.recipe:
            groups.setdefault(variant.manifest.recipe, []).append(label)
    parts = []
    for recipe, labels in groups.items():
        of = f" of {_html(', '.join(labels))}" if len(page.listed) > 1 else ""
        parts.append(folded(f"Recipe{of}, with every default written out", fenced(recipe, "yaml")))
    return "\n\n".join(parts)


def _grouped(page: Page, title: str, say: Any) -> Iterator[str]:
    """``Title: what``, once for all variants that say the same."""
    groups: dict[str, list[str]] = {}
    for variant, label in zip(page.listed, page.labels(), strict=True):
        groups.setdefault(say(variant), []).append(label)
    for said, labels in groups.items():
        if said:
            of = f" ({text(', '.join(labels))})" if len(groups) > 1 else ""
            yield f"{title}{of}: {said}"


def _versions(variant: Variant) -> str:
    made = variant.manifest
    used = [f"{name} {version}" for name, version in made.versions.items() if name != "quantkit"]
    return text(", ".join([f"quantkit {made.quantkit}", *used]))


def _moved(variant: Variant) -> str:
    """Of what export made: the recipe makes what it was made from."""
    told = variant.manifest.repacked
    if told is None:
        return ""
    source = code(str(told.get("source")))
    of = f"; the recipe is that of {source}" if variant.manifest.recipe else ""
    return (
        f"by `quantkit export` from {source}: codes and scales are stored in another format, every value the "
        f"same in every bit{of}"
    )


def _method(variant: Variant) -> str:
    made = variant.manifest
    said = code(made.method)
    more = [part for key, value in made.made.items() if (part := _used(key, value))]
    return "; ".join([said, *more])


def _used(name: str, value: Any) -> str:
    """One thing that was used; empty for what was not."""
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if item is not None}
    if value is None or value is False or (isinstance(value, Mapping | Sequence) and not value):
        return ""
    if value is True:
        return text(name)
    return f"{text(name)} {code(_flat(value))}"


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_flat(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _calibration(variant: Variant) -> str:
    known = variant.manifest.calibration
    if known is None:
        return "none, the method looks at weights alone"
    if "imatrix" in known:
        return _imatrix(known)
    rows, length = known.get("rows"), known.get("length")
    parts = []
    if isinstance(rows, int) and isinstance(length, int):
        parts.append(f"{rows * length:,} tokens ({rows:,} rows of {length:,})")
    sources = known.get("sources") or []
    named = [
        f"{code(_base(str(s.get('name'))))} ({s['rows']:,} rows, licence: {text(str(s.get('licence')))})"
        for s in sources
        if isinstance(s, Mapping) and isinstance(s.get("rows"), int)
    ]
    parts += [f"of {', '.join(named)}"] if named else []
    parts += [_seed(variant)] if "rows" in known else []
    parts += [f"sha256 of the tokens {code(str(known['sha256']))}"] if "sha256" in known else []
    return ", ".join(part for part in parts if part)


def _imatrix(known: Mapping[str, Any]) -> str:
    texts = [code(_base(str(name))) for name in known.get("datasets") or ()]
    of = f", collected from {', '.join(texts)}" if texts else ""
    return (
        f"importance matrix {code(_base(str(known['imatrix'])))}{of}, sha256 {code(str(known.get('sha256')))}"
    )


def _seed(variant: Variant) -> str:
    """How rows were chosen, which the recipe knows."""
    known = variant.manifest.calibration or {}
    try:
        recipe = yaml.safe_load(variant.manifest.recipe)
    except yaml.YAMLError:
        recipe = None
    asked = recipe.get("calibration") if isinstance(recipe, dict) else None
    seed = known.get("seed", asked.get("seed") if isinstance(asked, dict) else None)
    if isinstance(seed, int) and seed:
        return f"chosen with seed {seed}"
    return "the first rows" if seed == 0 else ""


def _help(variant: Variant) -> str:
    count = variant.manifest.fallbacks
    if not count:
        return ""
    return f"{count:,} weights needed a fallback or more damping"


def _base(name: str) -> str:
    """A file's name without its folder; ids of the Hub have one slash and stay."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", name) else re.split(r"[\\/]", name)[-1]


def _html(value: str) -> str:
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
