"""What to calibrate and evaluate on: named mixtures of text, without reading a word of it.

A calibration set is a file ``calibration/<name>.yaml``::

    parts:
      - file: my-text.txt            # .txt, .md, …: raw text; .jsonl, .parquet: one document per row
        share: 0.4                   # fraction of the rows; the shares add up to 1
      - hub: Salesforce/wikitext     # a dataset on the Hub
        config: wikitext-103-raw-v1
        split: train
        revision: b08601e04326c79dfdd32d625aee71d232d685c3
        join: ""                     # rows are lines of one text
        licence: CC BY-SA 3.0
        share: 0.6

This module imports neither torch nor transformers: recipes are made of its values.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from quantkit.errors import RecipeError
from quantkit.resources import folder

Template = Literal["raw", "chat"]
Style = Literal["llamacpp", "gptq"]
EVAL_SETS = ("embedded", "wikitext2")
MAX_CHARS = 20_000_000
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"


@dataclass(frozen=True, slots=True)
class FileSource:
    """A local file. ``.jsonl`` and ``.parquet`` hold one document per row; all else is one raw text."""

    path: Path

    @property
    def label(self) -> str:
        return self.path.name


@dataclass(frozen=True, slots=True)
class HubSource:
    """One split of a dataset on the Hub; `revision` is a commit, or a branch that is resolved to one."""

    id: str
    config: str | None = None
    split: str = "train"
    revision: str = "main"
    data_files: str | None = None

    @property
    def label(self) -> str:
        return f"{self.id}@{self.revision}:{self.config or 'default'}/{self.split}"


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a mixture.

    share      fraction of the rows that come from here
    column     the column of a row that holds the text, or a list of chat messages
    template   ``chat``: every document goes through the tokenizer's chat template
    join       None: every row is a document. Otherwise the rows are one document, joined with this:
               ``""`` restores a file that was split into lines (an empty row stands for ``" \\n"``)
    max_chars  no more text than this is read: the first characters, or documents up to it
    """

    source: FileSource | HubSource
    share: float = 1.0
    licence: str = "not stated"
    column: str = "text"
    template: Template = "raw"
    join: Literal["", "\n\n"] | None = None
    max_chars: int = MAX_CHARS

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError(f"share must be above 0 and at most 1, not {self.share}")
        if self.template not in ("raw", "chat"):
            raise RecipeError(f"template must be 'raw' or 'chat', not {self.template!r}")
        if self.join not in (None, "", "\n\n"):
            raise RecipeError(f'join must be "" or "\\n\\n", not {self.join!r}')
        if self.max_chars < 1:
            raise RecipeError(f"max_chars must be at least 1, not {self.max_chars:,}")


@dataclass(frozen=True, slots=True)
class SetSpec:
    """A named calibration set: a mixture whose shares add up to 1."""

    name: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        total = math.fsum(part.share for part in self.parts)
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise RecipeError(f"the shares of calibration set '{self.name}' add up to {total:g}, not to 1")


@dataclass(frozen=True, slots=True)
class EvalSpec:
    """A text to measure on, and the convention to measure by.

    name     one of EVAL_SETS, or any name when `file` is given
    style    ``llamacpp``: as llama-perplexity does; ``gptq``: as the GPTQ family of papers does
    context  tokens per window
    chunks   only the first windows, or None for all; the result is then partial
    """

    name: str
    style: Style = "llamacpp"
    context: int = 512
    chunks: int | None = None
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.file is None and self.name not in EVAL_SETS:
            raise RecipeError(
                f"unknown evaluation text '{self.name}'{_suggestion(self.name, EVAL_SETS)}",
                remedy=f"known: {', '.join(EVAL_SETS)}; or give a file",
            )
        if self.style not in ("llamacpp", "gptq"):
            raise RecipeError(f"style must be 'llamacpp' or 'gptq', not {self.style!r}")
        if self.context < 4:
            raise RecipeError(f"context must be at least 4 tokens, not {self.context}")
        if self.chunks is not None and self.chunks < 1:
            raise RecipeError(f"chunks must be at least 1, not {self.chunks}")

    @property
    def source(self) -> FileSource | HubSource:
        if self.file is not None:
            return FileSource(self.file)
        if self.name == "embedded":
            return FileSource(folder("calibration") / "embedded-eval.txt")
        return HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "test", WIKITEXT_REVISION)


def set_names() -> tuple[str, ...]:
    """Names of the shipped calibration sets."""
    return tuple(sorted(path.stem for path in folder("calibration").glob("*.yaml")))


def find_set(name: str) -> SetSpec:
    """The shipped calibration set of this name; RecipeError with a suggestion if there is none."""
    known = set_names()
    if name not in known:
        raise RecipeError(
            f"unknown calibration set '{name}'{_suggestion(name, known)}",
            remedy=f"known: {', '.join(known)}; or give a file",
        )
    return load_set(folder("calibration") / f"{name}.yaml")


def as_set(source: SetSpec | Path) -> SetSpec:
    """A set as it is; a ``.yaml`` file loaded; any other file as a set of one part."""
    match source:
        case SetSpec():
            return source
        case Path() if source.suffix in (".yaml", ".yml"):
            return load_set(source)
        case Path():
            return SetSpec(source.stem, (Part(FileSource(source)),))


def load_set(path: Path) -> SetSpec:
    """The set that a YAML file describes, its files looked up beside it; RecipeError on a mistake."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read calibration set `{path}`: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("parts"), list) or len(content) > 1:
        raise RecipeError(f"{path}: expected one key, 'parts', with a list")
    parts: list[Part] = []
    for index, entry in enumerate(content["parts"]):
        try:
            parts.append(_part(entry, path.parent))
        except RecipeError as error:
            raise RecipeError(f"{path}: parts[{index}]: {error.message}", remedy=error.remedy) from None
    return SetSpec(path.stem, tuple(parts))


_PART_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "share": (int, float),
    "licence": str,
    "column": str,
    "template": str,
    "join": str,
    "max_chars": int,
}
_HUB_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "config": str,
    "split": str,
    "revision": str,
    "data_files": str,
}


def _part(entry: object, beside: Path) -> Part:
    if not isinstance(entry, dict) or ("file" in entry) == ("hub" in entry):
        raise RecipeError("expected a mapping with either 'file' or 'hub'")
    kind: str = "hub" if "hub" in entry else "file"
    known = {kind: str, **_PART_KEYS, **(_HUB_KEYS if kind == "hub" else {})}
    for key, value in entry.items():
        if key not in known:
            raise RecipeError(f"unknown key '{key}'{_suggestion(str(key), tuple(known))}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise RecipeError(f"'{key}' cannot be {value!r}")
    place = {key: value for key, value in entry.items() if key in _HUB_KEYS}
    source = HubSource(entry["hub"], **place) if kind == "hub" else FileSource(beside / entry["file"])
    return Part(source, **{key: value for key, value in entry.items() if key in _PART_KEYS})


def _suggestion(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
