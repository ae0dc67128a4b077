"""What must not be published: secrets, places on somebody's machine, files that only look like a model's.

Everything is searched for tokens and for the home folder of the user. What else is looked for depends on
what a file is: quantkit's own files must not name any place of a machine; in texts homes are looked for; and
in files of the source, whose vocabularies and templates are full of slashes, only values meant as paths.
"""

from __future__ import annotations

import bisect
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quantkit.errors import SourceError
from quantkit.hub.secrets import masked, shown
from quantkit.hub.side_files import LOCAL, VOCABULARY, cleaned, names_a_place, scrubbed_config

__all__ = ["cleaned", "findings", "scrubbed_config"]

_FORBIDDEN = re.compile(
    r"\.(pt|pth|ckpt|pkl|pickle|joblib|bin|ipynb|py|pyc|pem|key|log|incomplete|partial|tmp|swp)$"
    r"|^\.|^id_(rsa|ed25519)$|~$",
    re.IGNORECASE,
)
_FOLDERS = frozenset(
    (".git", ".cache", ".venv", ".quantkit", ".ipynb_checkpoints", ".ssh", ".aws", "__pycache__")
)
_OWN = re.compile(
    r"^(quantkit\.json|checks\.json|measurement\.json|SHA256SUMS|(report|\.eval_results)/.*\.json|.*\.ya?ml)$"
)
_AS_IT_IS = re.compile(r"^(LICENSE|NOTICE|USE_POLICY).*|.*\.jinja$")
_MAX_TEXT = 256 << 20

# Not within an address or a longer path.
_START = r"(?<![\w/.\-~*}])"
_REST = r"[^\s\"'`<>|,;)\]}]*"
_SLASH = r"(?:/|\\{1,2})"
# Placeholders of instructions, and caches of containers.
_NOBODY = r"(?!(?:user|username|you|your[\w-]*|me|name|path)\b|\.cache\b)"
_HOME = re.compile(
    rf"{_START}(?:/home/|/Users/|/root/){_NOBODY}[\w.@-]+{_REST}"
    rf"|(?<!\w)[A-Za-z]:[\\/]{{1,2}}(?:Users|Documents and Settings)[\\/]{{1,2}}{_NOBODY}[\w.@-]+{_REST}"
    rf"|\bfile:/{{1,3}}{_NOBODY}[\w.~-]+{_REST}"
    # where data lies; deep places alone, because some chat templates speak of /mnt/data
    rf"|{_START}/(?:mnt|data\d*|scratch|workspace|Volumes|private|nfs|lustre|gpfs|storage|fsx|srv)"
    rf"(?:/[\w.@+-]+){{2,}}"
)
_PLACE = re.compile(
    rf"{_START}(?:/[\w.@+-]+){{2,}}|{_START}~[\w.-]*/[\w.]+{_REST}"
    rf"|(?<!\w)[A-Za-z]:[\\/]{{1,2}}\w{_REST}|\bfile:/{_REST}|(?<![\w\\])\\\\[\w.-]+\\\w{_REST}"
)
# Homes that are everybody's, or words.
_COMMON = """
root home user users ubuntu admin runner app data model models work workspace hub main test default nobody
vscode codespace jovyan docker
"""
_NOBODYS_HOME = frozenset(_COMMON.split())
_MOST = 10


@dataclass(frozen=True, slots=True)
class _Sought:
    """What is searched for in everything: values of secrets, and the user's home: its name and a pattern."""

    secrets: tuple[str, ...]
    homes: tuple[tuple[str, re.Pattern[str]], ...]

    @classmethod
    def of(cls, secrets: Sequence[str], home: Path | None) -> _Sought:
        if home is None or len(home.name) < 2 or home.name.lower() in _NOBODYS_HOME:
            return cls(tuple(secrets), ())
        spelled = {str(home), home.as_posix(), json.dumps(str(home))[1:-1]}
        exact = "|".join(re.escape(text) for text in sorted(spelled))
        # as a folder within another one, so that neither an address nor `name/model` of the Hub is meant
        inside = (
            rf"{_START}(?:[A-Za-z]:)?(?:{_SLASH}[\w.@+-]+)+{_SLASH}{re.escape(home.name)}(?=[\\/\s\"'`]|$)"
        )
        patterns = (re.compile(rf"(?:{exact})(?!\w)"), re.compile(inside, re.MULTILINE))
        return cls(tuple(secrets), tuple((home.name, pattern) for pattern in patterns))

    def inside(self, text: str) -> Iterator[tuple[int, str]]:
        """(position, what it is)."""
        yield from shown(text, self.secrets)
        for name, home in self.homes:
            for found in home.finditer(text) if name in text else ():
                yield found.start(), f"the home folder of the user, {found[0]!r}"


def findings(
    files: Mapping[str, Path | bytes], *, secrets: Sequence[str] = (), home: Path | None = None
) -> list[str]:
    """What stands in the way of publishing `files`, by their names in the repository; empty: nothing.

    secrets  values that must not be in any file: the token in use
    home     the home folder of the user, whose name is private too
    Each is ``file:line what was found``, and repeats no secret. Files that cannot be read are found, too.
    """
    sought = _Sought.of(secrets, home)
    out: list[str] = []
    for name, content in files.items():
        found = list(dict.fromkeys(_of_file(name, content, sought)))
        out += found[:_MOST]
        if len(found) > _MOST:
            out.append(f"{name}: {len(found) - _MOST:,} more of the same kind")
    return [masked(line, secrets) for line in out]


def _of_file(name: str, content: Path | bytes, sought: _Sought) -> Iterator[str]:
    reason = _forbidden(name)
    if reason is not None:
        yield f"{name}: {reason}"
        return
    try:
        yield from _inside(name, content, sought)
    except OSError as error:
        yield f"{name}: cannot be read: {error.strerror}"
    except SourceError as error:
        yield f"{name}: {error.message}"


def _forbidden(name: str) -> str | None:
    *folders, last = PurePosixPath(name).parts
    if within := _FOLDERS.intersection(folders):
        return f"lies in `{min(within)}`, which belongs to a machine and not to a model"
    if last == ".gitattributes":
        return "the Hub keeps its own"
    if _FORBIDDEN.search(last):
        return "is no file of a published model: no pickles, code, logs, keys or hidden files"
    return None


def _inside(name: str, content: Path | bytes, sought: _Sought) -> Iterator[str]:
    match PurePosixPath(name).suffix:
        case ".safetensors":
            yield from _safetensors(name, content, sought)
        case ".gguf":
            yield from _gguf(name, content, sought)
        case _:
            yield from _plain(name, content, sought)


def _plain(name: str, content: Path | bytes, sought: _Sought) -> Iterator[str]:
    if isinstance(content, Path):
        if content.stat().st_size > _MAX_TEXT:
            raise SourceError(f"has {content.stat().st_size:,} bytes, and is neither safetensors nor GGUF")
        content = content.read_bytes()
    binary = b"\0" in content
    text = content.decode("latin-1" if binary else "utf-8", "replace")
    lines = _Lines(text)
    base = PurePosixPath(name).name
    for at, what in sought.inside(text):
        yield f"{name}:{lines.number(at)} {what}"
    if VOCABULARY.match(base) or _AS_IT_IS.match(base):
        return
    own = _OWN.match(name) is not None
    parsed = None if binary or not base.endswith(".json") else _parsed(text)
    if parsed is None:
        for found in (_PLACE if own else _HOME).finditer(text):
            yield f"{name}:{lines.number(found.start())} {_named(found[0])}"
        return
    for key, value in parsed:
        place = _place(value) if own else _meant(key, value)
        if place is not None:
            yield f"{name}:{lines.number(text.find(json.dumps(value)[1:-1]))} {key}: {_named(place)}"


def _parsed(text: str) -> list[tuple[str, str]] | None:
    """(key, text) of every text in a JSON file, also where keys occur twice; None: it is no JSON."""
    out: list[tuple[str, str]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            texts = value if isinstance(value, list) else [value]
            out.extend((key, item) for item in texts if isinstance(item, str))

    try:
        json.loads(text, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        return None
    return out


def _place(text: str) -> str | None:
    """A place on a machine in a text of ours."""
    found = _PLACE.search(text)
    if found is None and LOCAL.match(text) and not text.startswith("/"):
        return text
    return found[0] if found else None


def _meant(key: str, text: str) -> str | None:
    """A text of the source's that is meant as a path, or is a path to a home as a whole."""
    if LOCAL.match(text) and names_a_place(key, text):
        return text
    return text if (found := _HOME.match(text)) and found.end() == len(text) else None


def _named(place: str) -> str:
    shown = place if len(place) <= 80 else f"{place[:77]}…"
    return f"a place on this machine, {shown!r}"


def _safetensors(name: str, content: Path | bytes, sought: _Sought) -> Iterator[str]:
    from quantkit.checkpoint.header import METADATA, PREFIX_BYTES, parse_header, read_header

    if isinstance(content, Path):
        header = read_header(content)
    else:
        end = PREFIX_BYTES + int.from_bytes(content[:PREFIX_BYTES], "little")
        header = parse_header(content[PREFIX_BYTES:end], Path(name), len(content))
    yield from _values(f"{name}: {METADATA}", header.metadata.items(), sought)


def _gguf(name: str, content: Path | bytes, sought: _Sought) -> Iterator[str]:
    from quantkit.gguf.container import open_file

    if isinstance(content, bytes):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / PurePosixPath(name).name
            path.write_bytes(content)
            yield from _gguf(name, path, sought)
        return
    opened = open_file(content)
    texts = [
        (key, text)
        for key, value in opened.metadata.items()
        for text in (value if isinstance(value, tuple) else (value,))
        if isinstance(text, str)
    ]
    vocabulary = "\n".join(text for key, text in texts if key.startswith("tokenizer."))
    for _, what in sought.inside(vocabulary):
        yield f"{name}: tokenizer: {what}"
    yield from _values(name, ((k, t) for k, t in texts if not k.startswith("tokenizer.")), sought)


def _values(where: str, texts: Iterable[tuple[str, str]], sought: _Sought) -> Iterator[str]:
    """Of metadata, which the person or a program wrote about the file."""
    for key, text in texts:
        for _, what in sought.inside(f"{key}\n{text}"):
            yield f"{where}: {key}: {what}"
        if (place := _place(text)) is not None:
            yield f"{where}: {key}: {_named(place)}"


class _Lines:
    """Numbers of lines by position."""

    def __init__(self, text: str) -> None:
        self._ends = [found.start() for found in re.finditer("\n", text)]

    def number(self, at: int) -> int:
        return bisect.bisect_left(self._ends, max(at, 0)) + 1
