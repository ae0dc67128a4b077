"""`problems`: what the Hub would refuse or misread in the front matter of a card, before it is asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

from quantkit.checkpoint.card import ADDRESS, HUB_ID, LANGUAGE, WORD
from quantkit.hub.card.front_matter import compose, find, load
from quantkit.hub.licence_terms import known_licences

_LINK = re.compile(rf"{ADDRESS.pattern}|\w[\w./-]*", re.IGNORECASE | re.ASCII)
_REQUIRED = ("library_name", "tags", "quantkit")


@dataclass(frozen=True, slots=True)
class _Found:
    """A front matter: values by key, and where each begins."""

    values: Mapping[str, Any]
    lines: Mapping[str, int]


def problems(text: str) -> list[str]:
    """What is wrong with the front matter of a README, as ``README.md:LINE key: what``; empty: nothing."""
    front = find(text)
    if front is None:
        return [
            "README.md:1 front matter: is missing; the card begins with metadata between two lines of ---"
        ]
    first = front.first_line
    try:
        node = compose(front.yaml)
        values = load(front.yaml)
    except yaml.YAMLError as error:
        return [f"README.md:{first + _line_of(error)} front matter: is not YAML: {_said(error)}"]
    except (ValueError, RecursionError) as error:
        return [f"README.md:{first} front matter: cannot be read: {error}"]
    if node is None:
        return [f"README.md:{first} front matter: is empty"]
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        return [f"README.md:{first} front matter: must be keys with values, not {type(values).__name__}"]
    lines: dict[str, int] = {}
    out = []
    if text.startswith("\ufeff"):
        out.append((1, "front matter", "stands behind a byte order mark, where the Hub's client misses it"))
    for key, _ in node.value:
        if key.value in lines:
            out.append(
                (first + key.start_mark.line, key.value, f"is there twice, first in line {lines[key.value]}")
            )
        lines.setdefault(key.value, first + key.start_mark.line)
    found = _Found({str(k): v for k, v in values.items()}, lines)
    for key, what in _checked(found):
        out.append((lines.get(key, first), key, what))
    return [f"README.md:{line} {key}: {what}" for line, key, what in sorted(out)]


def _checked(found: _Found) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it)."""
    for key in _REQUIRED:
        if found.values.get(key) in (None, [], "", {}):
            yield key, "is missing"
    for key, check in _CHECKS.items():
        if key in found.values:
            yield from ((key, problem) for problem in check(found.values[key]))
    yield from _licence(found.values)
    if "base_model" in found.values and "base_model_relation" not in found.values:
        yield "base_model_relation", "is missing beside base_model; the Hub would guess it"


def _licence(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ids = values.get("license")
    ids = ids if isinstance(ids, list) else [ids]
    if "other" in ids:
        for key in ("license_name", "license_link"):
            if not values.get(key):
                yield key, "is missing; `license: other` needs a name and a link"
    for key in ("license_name", "license_link"):
        if values.get(key) and ids == [None]:
            yield key, "is there without `license`"


def _texts(value: Any, pattern: re.Pattern[str], what: str) -> Iterator[str]:
    """A text, or a list of texts, that match."""
    each = value if isinstance(value, list) else [value]
    if not each:
        yield f"must be {what} or a list of them, not an empty list"
    for item in each:
        if isinstance(item, bool):
            yield f"{item} is a truth value to YAML: put it in quotes"
        elif not isinstance(item, str):
            yield f"must be {what} or a list of them, not {item!r}"
        elif not pattern.fullmatch(item):
            yield f"{item!r} is not {what}"


def _one(value: Any, pattern: re.Pattern[str], what: str) -> Iterator[str]:
    if isinstance(value, list):
        yield f"must be {what}, not a list"
    else:
        yield from _texts(value, pattern, what)


def _licence_ids(value: Any) -> Iterator[str]:
    yield from _texts(value, WORD, "the id of a licence, as apache-2.0")
    for id in value if isinstance(value, list) else [value]:
        if isinstance(id, str) and WORD.fullmatch(id) and id not in known_licences():
            yield f"{id!r} is none that the Hub knows: write `other` with license_name and license_link"


def _tag_list(value: Any) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"must be a list, not {value!r}"
        return
    yield from _texts(value, re.compile(r"\S(.*\S)?"), "a tag")


def _index(value: Any) -> Iterator[str]:
    if not isinstance(value, list) or not value:
        yield "must be a list of entries with `name` and `results`"
        return
    for number, entry in enumerate(value, 1):
        where = f"entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            yield f"{where} needs a `name`"
            continue
        results = entry.get("results")
        if not isinstance(results, list) or not results:
            yield f"{where}, {entry['name']!r}, needs a list of `results`"
            continue
        for result in results:
            yield from (f"{where}, {entry['name']!r}: {problem}" for problem in _result(result))


def _result(result: Any) -> Iterator[str]:
    if not isinstance(result, dict):
        yield f"a result must be a mapping, not {result!r}"
        return
    for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
        held = result.get(part)
        for key in keys:
            if not isinstance(held, dict) or not isinstance(held.get(key), str):
                yield f"`{part}` needs a `{key}`"
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield "needs a list of `metrics`"
        return
    for metric in metrics:
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            yield "a metric needs a `type`"
        elif isinstance(metric.get("value"), bool) or not isinstance(metric.get("value"), int | float | str):
            yield f"metric {metric['type']!r} needs a `value`"


_CHECKS: Mapping[str, Callable[[Any], Iterator[str]]] = MappingProxyType(
    {
        "license": _licence_ids,
        "license_name": lambda value: _one(value, re.compile(r"\S(.*\S)?"), "a name"),
        "license_link": lambda value: _one(value, _LINK, "an address or a file of the repository"),
        "language": lambda value: _texts(value, LANGUAGE, "the code of a language, as en"),
        "base_model": lambda value: _texts(value, HUB_ID, "an id of the Hub, as org/name"),
        "datasets": lambda value: _texts(value, HUB_ID, "an id of the Hub, as org/name"),
        "base_model_relation": lambda value: _one(
            value, re.compile("quantized|finetune|adapter|merge"), "quantized, finetune, adapter or merge"
        ),
        "pipeline_tag": lambda value: _one(value, WORD, "a task, as text-generation"),
        "library_name": lambda value: _one(value, WORD, "the name of a library, as transformers"),
        "tags": _tag_list,
        "model-index": _index,
    }
)


def _line_of(error: yaml.YAMLError) -> int:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return 0 if mark is None else int(mark.line)


def _said(error: yaml.YAMLError) -> str:
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
    return str(problem or error).splitlines()[0]
