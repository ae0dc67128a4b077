"""The YAML at the top of a model card, which anybody may have written.

It is read by walking through the parser's events: aliases, which let a few lines stand for gigabytes, deep
nesting and keys that are no texts end the walk, and then the card says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

HUB = "https://huggingface.co"
# Embedding models list thousands of results here; a fast parser reads this much within a second.
MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_TEXTS, _MAX_LENGTH = 500, 500
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Somewhere in a file system: cards that trainers write name folders of their machine.
_LOCAL = re.compile(r"(^|:)(~|\.{0,2}[\\/]|[A-Za-z]:[\\/])")
_WEB = re.compile(r"https?://", re.IGNORECASE)
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
# What the Hub adds to the tags by itself.
_DERIVED_TAGS = ("base_model:", "license:", "region:")
_GATE = "extra_gated_"


def read(path: Path) -> dict[str, Any]:
    """`front_matter` of the card in a file; empty where there is none that can be read."""
    try:
        with path.open("rb") as file:
            return front_matter(file.read(MAX_BYTES).decode("utf-8", "replace"))
    except OSError:
        return {}


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a card, every value a text, a list or a mapping; empty where there is none that reads.

    Texts stay as they are written, because YAML takes the language `no` for a truth value; nothing is "".
    """
    found = _FRONT.match(text[:MAX_BYTES])
    if found is None:
        return {}
    try:
        front = _built(yaml.parse(found[1], Loader=_loader()))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return front if isinstance(front, dict) else {}


def listed(value: object) -> list[str]:
    """A text or a list of texts, as a list; whatever else is left out, and so are paths."""
    texts = (text.strip() for text in _each(value) if isinstance(text, str))
    return [text for text in texts if text and not is_local(text)]


def hub_ids(value: object) -> list[str]:
    """Those of the texts that are ids of the Hub, also when written as addresses."""
    ids = (text.removeprefix(f"{HUB}/").rstrip("/") for text in listed(value))
    return list(dict.fromkeys(id for id in ids if _HUB_ID.fullmatch(id)))


def is_local(text: str) -> bool:
    """Whether a text names a place in a file system, also behind a prefix as ``base_model:``."""
    return not _WEB.match(text) and _LOCAL.search(text) is not None


def inherited(card: Mapping[str, Any]) -> dict[str, Any]:
    """What of a source's card a published model may need, as JSON: no paths, nothing of endless length.

    license, language and the like are lists where the card lists several; `gated` is there, and true, when
    the card asks for something before it gives access.
    """
    single = {key: _sound(listed(card.get(key))) for key in ("license_name", "pipeline_tag", "library_name")}
    several = {key: _sound(listed(card.get(key))) for key in ("license", "language", "tags", "datasets")}
    several["tags"] = [tag for tag in several["tags"] if not tag.startswith(_DERIVED_TAGS)]
    out: dict[str, Any] = {key: texts[0] for key, texts in single.items() if texts}
    out |= {key: texts for key, texts in several.items() if texts}
    if len(out.get("license", ())) == 1:
        (out["license"],) = out["license"]
    if link := _sound(listed([_beside(text) for text in _each(card.get("license_link"))])):
        out["license_link"] = link[0]
    if models := _sound(hub_ids(card.get("base_model"))):
        out["base_model"] = models
    if any(key.startswith(_GATE) for key in card):
        out["gated"] = True
    return out


def _each(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _beside(text: object) -> object:
    """``./LICENSE`` is beside the card, as ``LICENSE`` is; it is no place of a machine."""
    return text.strip().removeprefix("./") if isinstance(text, str) else text


def _sound(texts: Iterable[str]) -> list[str]:
    sound = (text for text in texts if text.isprintable() and len(text) <= _MAX_LENGTH)
    return list(dict.fromkeys(sound))[:_MAX_TEXTS]


def _loader() -> Any:
    # the parser in C reads 1 MiB in a tenth of a second, the one in Python in ten seconds
    return yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader


def _built(events: Iterable[yaml.Event]) -> Any:
    """The document that the events describe; ValueError for what no card needs."""
    root: list[Any] = []
    # what is being filled, innermost last; a mapping as the list of its keys and values in turn
    filling: list[list[Any]] = [root]
    for event in events:
        match event:
            case yaml.ScalarEvent():
                plain_null = event.implicit[0] and event.value in _NULL
                filling[-1].append("" if plain_null else event.value)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                filling.append([])
                if len(filling) > _MAX_DEPTH:
                    raise ValueError("nested too deeply")
            case yaml.SequenceEndEvent():
                filling[-2].append(filling.pop())
            case yaml.MappingEndEvent():
                filling[-2].append(_mapping(filling.pop()))
            case yaml.AliasEvent():
                raise ValueError("an alias")
            case _:
                continue
    if len(root) != 1:
        raise ValueError("not one document")
    return root[0]


def _mapping(parts: list[Any]) -> dict[str, Any]:
    keys = parts[::2]
    if not all(isinstance(key, str) for key in keys):
        raise ValueError("a key that is no text")
    return dict(zip(keys, parts[1::2], strict=True))
