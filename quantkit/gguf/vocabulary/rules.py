"""What a tokenizer does to a text, step by step, and the tokens that it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.calibrate.tokenizer import Tokenizer, load_tokenizer
from quantkit.checkpoint.folder import read_json
from quantkit.errors import SourceError, UnsupportedError

FILE = "tokenizer.json"
_KEEP = "export to a format that keeps the tokenizer files, as compressed_tensors does"

Step = Mapping[str, Any]


class Kind(IntEnum):
    """llama.cpp's types of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def reference(folder: Path) -> Tokenizer:
    """The tokenizer as the files in `folder` describe it: its `tokenizer.json`, if there is one, rules.

    Classes of transformers put rules of their own in place of the file's: StarCoder2's, for one, no longer
    divides numbers into digits. SourceError without a usable tokenizer.
    """
    if not (folder / FILE).is_file():
        return _converted(folder)
    if not isinstance(read_json(folder / FILE).get("model"), Mapping):
        raise SourceError(f"`{folder / FILE}` holds no tokenizer: `model` is missing")
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer: Tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise SourceError(f"cannot load `{folder / FILE}`: {error}") from error
    return tokenizer


def _converted(folder: Path) -> Tokenizer:
    """A tokenizer that transformers converts from older files."""
    if (folder / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
        raise SourceError(
            f"`{folder}` has a tokenizer.model, but no {FILE}",
            remedy="pip install sentencepiece protobuf, or add the tokenizer.json that transformers saves",
        )
    return load_tokenizer(folder)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a `tokenizer.json` says."""

    content: Mapping[str, Any]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Rules:
        """UnsupportedError for a tokenizer without rules to read."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # those of the `tokenizers` library
        if backend is None:
            raise UnsupportedError(
                f"a tokenizer of the class {type(tokenizer).__name__} has no rules that can be read",
                remedy=f"load it with transformers and save_pretrained it, so that there is a {FILE}",
            )
        return cls(json.loads(backend.to_str()))

    @property
    def model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.content["model"]
        return found

    @property
    def kind(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel."""
        return str(self.model.get("type"))

    @property
    def vocabulary(self) -> Mapping[str, int]:
        found: Mapping[str, int] = self.model["vocab"]
        return found

    @property
    def added(self) -> Sequence[Mapping[str, Any]]:
        """Tokens that are found before anything else happens: `id`, `content`, `special`, …"""
        return self.content.get("added_tokens") or ()

    @property
    def numbers(self) -> frozenset[int]:
        """Those that have a token."""
        vocabulary = self.model["vocab"]
        # a Unigram model lists its pieces, the others map texts to numbers
        known = vocabulary.values() if isinstance(vocabulary, Mapping) else range(len(vocabulary))
        return frozenset((*known, *(token["id"] for token in self.added)))

    @property
    def count(self) -> int:
        return 1 + max(self.numbers, default=-1)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs, best first; older files write them as one string."""
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in self.model["merges"]]
        return [(left, right) for left, right in pairs]

    @property
    def normalizers(self) -> list[Step]:
        return list(_steps(self.content.get("normalizer"), "normalizers"))

    @property
    def pre_tokenizers(self) -> list[Step]:
        return list(_steps(self.content.get("pre_tokenizer"), "pretokenizers"))

    @property
    def byte_level(self) -> bool:
        return any(step.get("type") == "ByteLevel" for step in (*self.normalizers, *self.pre_tokenizers))

    def plain_merges(self) -> None:
        """UnsupportedError when merging has rules of its own."""
        for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if self.model.get(option):
                raise self.refusal(f"merges with {option} = {self.model[option]!r}")

    def refusal(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"the tokenizer {what}, which llama.cpp cannot express", remedy=_KEEP)


def controls(token: Mapping[str, Any]) -> bool:
    """Whether an added token steers the model rather than being text; some only look as if they did.

    llama.cpp's converter goes by the same looks, and its users rely on what such tokens print: nothing.
    """
    text = token["content"]
    marked = any(
        text.startswith(a) and text.endswith(b) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    )
    return bool(token.get("special")) or marked or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def place(
    texts: Mapping[int, tuple[str, Kind]], added: Mapping[int, tuple[str, Kind]], rows: int
) -> list[tuple[str, Kind]]:
    """(text, kind) of every row: `added` tokens go before others, rows that are left over are unused.

    SourceError for tokens without a row that the model could produce, UnsupportedError for equal texts.
    """
    if (last := max(texts.keys() - added.keys(), default=0)) >= rows:
        raise SourceError(
            f"token {texts[last][0]!r} has the number {last:,} and the embedding {rows:,} rows",
            remedy="the tokenizer is not that of these weights: copy its files from the source model",
        )
    known = {**texts, **added}
    found = [known.get(n, (f"[PAD{n}]", Kind.UNUSED)) for n in range(rows)]
    seen: set[str] = set()
    for text, _ in found:
        if text in seen:
            raise UnsupportedError(
                f"two tokens are {text!r}, and llama.cpp wants texts that differ",
                remedy="remove one of them from the tokenizer's added tokens",
            )
        seen.add(text)
    return found


def _steps(part: Step | None, within: str) -> Iterator[Step]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for inner in part[within]:
            yield from _steps(inner, within)
    else:
        yield part
