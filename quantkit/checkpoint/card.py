"""The metadata at the top of a model card, which anybody may have written.

A card that has none says nothing, and that is known of it. One whose metadata cannot be read may say
anything: the reason stands in its place, so that nobody takes it for a card without a licence.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from quantkit.checkpoint.card_yaml import read_mapping

HUB = "https://huggingface.co"
# Embedding models list thousands of results here; a fast parser reads this much within a second.
MAX_BYTES = 1 << 20
# Why a card, or the licence in it, cannot be read; and by key what else could not be taken as it is. No card
# says these itself: `front_matter` takes them away.
UNREADABLE, FAULTS = "unreadable", "faults"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
LANGUAGE = re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8})*|multilingual|code")
WORD = re.compile(r"[a-z0-9][\w.+-]*", re.IGNORECASE | re.ASCII)
ADDRESS = re.compile(r"https?://[!#-;=?-\[\]_a-z~]+", re.IGNORECASE | re.ASCII)

_MAX_TEXTS, _MAX_LENGTH = 500, 500
_RULE = re.compile(r"---[ \t]*")
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_REPO = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Somewhere in a file system: cards that trainers write name folders of their machine.
_LOCAL = re.compile(r"(^|:)(~|\.{0,2}[\\/]|[A-Za-z]:[\\/])")
_WEB = re.compile(r"https?://", re.IGNORECASE)
_NOT_IN_ADDRESSES = re.compile(r"[^!#-;=?-\[\]_a-z~]", re.IGNORECASE | re.ASCII)
_ANY = re.compile(r".+")
# What the Hub adds to the tags by itself.
_DERIVED_TAGS = ("base_model:", "license:", "region:")
_GATE = "extra_gated_"
_TEXTS: Mapping[str, tuple[re.Pattern[str], str]] = MappingProxyType(
    {
        "license_name": (_ANY, "a name"),
        "pipeline_tag": (WORD, "a task, as text-generation"),
        "library_name": (WORD, "the name of a library, as transformers"),
        "language": (LANGUAGE, "the code of a language, as en"),
        "tags": (_ANY, "a tag"),
        "datasets": (HUB_ID, "an id of the Hub, as org/name"),
    }
)
_SINGLE = ("license_name", "pipeline_tag", "library_name")


def read(path: Path) -> dict[str, Any]:
    """`front_matter` of the card in a file; empty where there is no file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return {}
    except OSError as error:
        return {UNREADABLE: error.strerror or "the file cannot be read"}
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return {UNREADABLE: "it is not UTF-8"}
    return front_matter(content.decode("utf-8", "replace"))


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a card, every value a text, a list or a mapping; empty where there is none.

    `UNREADABLE` alone says why there is some that cannot be read, `FAULTS` what of it was left out.
    """
    lines = _LINES.findall(text[: MAX_BYTES + 1])
    # the Hub finds it behind empty lines and spaces, too
    start = next((n for n, line in enumerate(lines) if _bare(line)), len(lines))
    if start == len(lines) or _bare(lines[start]) != "---":
        return {}
    end = next((n for n in range(start + 1, len(lines)) if _RULE.fullmatch(lines[n].rstrip("\r\n"))), None)
    large = len(text.encode("utf-8", "replace")) > MAX_BYTES
    if end is None or (large and end == len(lines) - 1):  # that line may go on
        why = f"its metadata is larger than {MAX_BYTES:,} bytes" if large else "no second line of --- ends it"
        return {UNREADABLE: f"line {start + 1:,}: {why}"}
    try:
        found = read_mapping("".join(lines[start + 1 : end]), start + 2)
    except ValueError as error:
        return {UNREADABLE: str(error)}
    said = {key: value for key, value in found.values.items() if key not in (UNREADABLE, FAULTS)}
    return {**said, FAULTS: found.faults} if found.faults else said


def listed(value: object) -> list[str]:
    """A text or a list of texts, as a list; whatever else is left out, and so are paths."""
    texts = (text.strip() for text in _each(value) if isinstance(text, str))
    return [text for text in texts if text and not is_local(text)]


def hub_ids(value: object) -> list[str]:
    """Those of the texts that are ids of the Hub, also when written as addresses."""
    ids = (text.removeprefix(f"{HUB}/").rstrip("/") for text in listed(value))
    return list(dict.fromkeys(id for id in ids if _REPO.fullmatch(id)))


def is_local(text: str) -> bool:
    """Whether a text names a place in a file system, also behind a prefix as ``base_model:``."""
    return not _WEB.match(text) and _LOCAL.search(text) is not None


def inherited(card: Mapping[str, Any]) -> dict[str, Any]:
    """What of a source's card a published model may need, as JSON: valid values, no paths, of limited length.

    license, language and the like are lists where the card lists several; `gated` is there, and true, when
    the card asks for something before it gives access. `UNREADABLE` says why the licence is not known,
    `FAULTS` by key what was left out or repaired. Of its own result it makes the same again.
    """
    out: dict[str, Any] = {}
    faults = _reasons(card.get(FAULTS))
    for key, (pattern, what) in _TEXTS.items():
        texts, lost = _valid(_meant(key, card.get(key)), pattern)
        if lost:
            faults[key] = f"is left out: not {what}" if not texts else f"is partly left out: not {what}"
        if texts:
            out[key] = texts[0] if key in _SINGLE else texts
    licence, unread = _valid(_each(card.get("license")), _ANY)
    if licence:
        out["license"] = licence if len(licence) > 1 else licence[0]
    if (link := _link(card.get("license_link"), faults)) is not None:
        out["license_link"] = link
    if models := _limited(hub_ids(card.get("base_model"))):
        out["base_model"] = models
    if card.get("gated") is True or any(key.startswith(_GATE) for key in card):
        out["gated"] = True
    fault = faults.pop("license", "is no plain text that names a licence" if unread else "")
    if UNREADABLE in card:
        why = card[UNREADABLE]
        out[UNREADABLE] = why if isinstance(why, str) and _is_sound(why) else "nobody says why"
    elif fault:
        out[UNREADABLE] = f"`license` {fault}"
    return {**out, FAULTS: faults} if faults else out


def _meant(key: str, value: object) -> list[object]:
    """What a key is to hold, where people write it in another way, too."""
    each = _each(value)
    if key == "tags":
        return [tag for tag in each if not (isinstance(tag, str) and tag.startswith(_DERIVED_TAGS))]
    if key == "datasets":
        return [id.strip().removeprefix(f"{HUB}/datasets/") if isinstance(id, str) else id for id in each]
    return each


def _valid(values: Sequence[object], pattern: re.Pattern[str]) -> tuple[list[str], bool]:
    """(the texts that match, whether there is something else)."""
    texts = [value.strip() if isinstance(value, str) else value for value in values]
    given = [text for text in texts if text not in (None, "")]
    valid = [text for text in listed(given) if _is_sound(text) and pattern.fullmatch(text)]
    return _limited(valid), len(valid) < len(given)


def _link(value: object, faults: dict[str, str]) -> str | None:
    """The first address or file; ``./LICENSE`` is beside the card, and no place of a machine."""
    each = [text.strip().removeprefix("./") if isinstance(text, str) else text for text in _each(value)]
    texts, lost = _valid(each, _ANY)
    if not texts:
        if lost:
            faults["license_link"] = "is left out: no address, and no file of the repository"
        return None
    if not _WEB.match(texts[0]) or ADDRESS.fullmatch(texts[0]):
        return texts[0]
    faults["license_link"] = "is written with %XX for what no address has"
    return _NOT_IN_ADDRESSES.sub(lambda found: quote(found[0]), texts[0])


def _reasons(value: object) -> dict[str, str]:
    """Reasons by key, of whoever wrote them."""
    if not isinstance(value, Mapping):
        return {}
    pairs = ((key, why) for key, why in value.items() if isinstance(key, str) and isinstance(why, str))
    return {key: why for key, why in pairs if why and _is_sound(key) and _is_sound(why)}


def _each(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _limited(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(_is_sound, texts)))[:_MAX_TEXTS]


def _is_sound(text: str) -> bool:
    return text.isprintable() and len(text) <= _MAX_LENGTH


def _bare(line: str) -> str:
    return line.replace("\ufeff", "").strip()
