"""What lies beside the weights of a source: its licence and card, and JSON files as they may be published.

The licence and the card of a repository lie in its root and hold for its sub-folders, too.

JSON files go without what only says where on somebody's machine something lay. Nothing reads these keys
again: transformers overwrites them with where it found the files. Everything else stays byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from quantkit.checkpoint import card, folder
from quantkit.hub import selection

# Keys are tokens or tensors there, so none of them means what it says.
VOCABULARY = re.compile(
    r"^(tokenizer\.json|vocab\..*|added_tokens\.json|merges\.txt|.*\.model|.*\.tiktoken|.*\.index\.json)$"
)
# Somewhere in a file system, also relative to a folder that nobody else has.
LOCAL = re.compile(r"^(?:/|~[\\/]|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\|file:)", re.IGNORECASE)
_ORIGIN_KEYS = frozenset(
    ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "cache_dir")
)
_PATH_KEY = re.compile(
    r"(^|_)(path|paths|file|files|dir|folder|directory|checkpoint)$|^(dataset|tokenizer|tokenizer_name|processor)$"
)
_DECODER = json.JSONDecoder()
_CARD = "README.md"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def terms(model: Path) -> list[Path]:
    """The files that say under which terms a model, a folder or a GGUF file, may be used.

    Beside a GGUF file they count in the client's cache alone: elsewhere a folder holds anything.
    """
    if model.is_file() and _root(model) is None:
        return []
    return [path for path in _of_all(model) if folder.is_terms(path.name)]


def card_file(model: Path) -> Path | None:
    """The card of a model, a folder or a GGUF file; None where it has none."""
    return next((path for path in _of_all(model) if path.name == _CARD), None)


def card_of(model: Path) -> dict[str, Any]:
    """What the card of a model says, as `card.inherited` gives it; links are from the repository's root."""
    found = card_file(model)
    said = {} if found is None else card.inherited(card.read(found))
    root, link = _root(model), said.get("license_link")
    if found is not None and root is not None and link in _files(found.parent):
        said["license_link"] = (found.parent.relative_to(root) / link).as_posix()
    return said


def _of_all(model: Path) -> list[Path]:
    """Terms and cards of a model: those of its folder and, of the kinds it lacks, of its repository."""
    here, root = model if model.is_dir() else model.parent, _root(model)
    own = _files(here)
    above = {} if root is None or root == here else _files(root)
    return [*own.values(), *(above[name] for name in selection.of_root(own, above))]


def _files(path: Path) -> dict[str, Path]:
    return {file.name: file for file in sorted(path.iterdir()) if file.is_file()}


def _root(model: Path) -> Path | None:
    """The root of the repository that holds a model, by the client's layout of its cache."""
    return next(
        (p for p in model.parents if p.parent.name == "snapshots" and _COMMIT.fullmatch(p.name)), None
    )


def scrubbed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without what only says where on a machine something lay, also in its parts."""
    return {k: _scrubbed(v) for k, v in config.items() if not names_a_place(k, v)}


def cleaned(name: str, content: bytes) -> bytes:
    """A file of the source as it may be published: its JSON without `scrubbed_config`'s keys.

    All other bytes stay as they are, and so does what is no JSON object, or a vocabulary.
    """
    plain = PurePosixPath(name).name
    if not plain.endswith(".json") or VOCABULARY.match(plain):
        return content
    try:
        text = content.decode("utf-8")
        found = json.loads(text)
        if not isinstance(found, dict) or scrubbed_config(found) == found:
            return content
        cuts: list[tuple[int, int]] = []
        _walk(text, _skip(text, 0), cuts)
    except (ValueError, RecursionError):
        return content
    for begin, end in sorted(cuts, reverse=True):
        text = text[:begin] + text[end:]
    return text.encode("utf-8")


def names_a_place(key: str, value: Any) -> bool:
    """Whether a key of a configuration says where something came from, or names a place of a machine."""
    if key in _ORIGIN_KEYS and (value is None or isinstance(value, str)):
        return True
    meant = key in _ORIGIN_KEYS or _PATH_KEY.search(key) is not None
    return meant and any(map(_is_local, value if isinstance(value, list) else [value]))


def _is_local(text: object) -> bool:
    return isinstance(text, str) and bool(LOCAL.match(text)) and len(text) < 1000 and "\n" not in text


def _scrubbed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return scrubbed_config(value)
    return [_scrubbed(item) for item in value] if isinstance(value, list) else value


def _walk(text: str, at: int, cuts: list[tuple[int, int]]) -> int:
    """Where the sound JSON value at `at` ends; what goes within it is added to `cuts`."""
    if text[at] not in "{[":
        return int(_DECODER.raw_decode(text, at)[1])
    closing = "}" if text[at] == "{" else "]"
    members: list[tuple[int, int, bool]] = []
    at = _skip(text, at + 1)
    while text[at] != closing:
        begin, goes = at, False
        if closing == "}":
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # behind the colon
            goes = names_a_place(key, _DECODER.raw_decode(text, at)[0])
        inner: list[tuple[int, int]] = []
        at = _walk(text, at, inner)
        members.append((begin, at, goes))
        if not goes:
            cuts += inner
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    kept = False
    for number, (begin, end, goes) in enumerate(members):
        if goes and kept:  # with the comma before it
            cuts.append((members[number - 1][1], end))
        elif goes:  # with the comma behind it
            cuts.append((begin, members[number + 1][0] if number + 1 < len(members) else at))
        kept = kept or not goes
    return at + 1


def _skip(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at
