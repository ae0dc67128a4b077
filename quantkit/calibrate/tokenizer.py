"""The tokenizer of a checkpoint, and long texts through it in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantkit.errors import SourceError

Ids = npt.NDArray[np.int32]

# A tokenizer takes about 700 bytes of memory per token: long texts are encoded in pieces of so many
# characters, with so many more on either side that do not count.
PIECE = 250_000
OVERLAP = 4_000
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "vocab.txt", "spiece.model")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def is_fast(self) -> bool: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def chat_template(self) -> Any: ...
    @property
    def name_or_path(self) -> str: ...
    @property
    def special_tokens_map(self) -> dict[str, str]: ...
    def get_chat_template(self) -> str: ...
    def __call__(self, text: str, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Specials:
    """Tokens that a tokenizer by default puts around a text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Specials:
        bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        dressed = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
        for begin in reversed(range(len(dressed) - len(bare) + 1)):
            if dressed[begin : begin + len(bare)] == bare:
                return cls(tuple(dressed[:begin]), tuple(dressed[begin + len(bare) :]))
        raise SourceError("the tokenizer changes a text when it adds special tokens, which cannot be packed")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a checkpoint folder; never runs code from it. SourceError if it has none."""
    if not any((path / name).is_file() for name in _FILES):
        raise SourceError(
            f"`{path}` holds no tokenizer: none of {', '.join(_FILES)}",
            remedy="copy the tokenizer files of the source model there",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError) as error:
        raise SourceError(f"cannot load the tokenizer in `{path}`: {error}") from error
    return tokenizer


def encode(text: str, tokenizer: Tokenizer, *, piece: int = PIECE) -> Ids:
    """(tokens,) of a text, without special tokens, as if it were encoded at once.

    Long texts are encoded in pieces that overlap. A piece takes over where the previous one stops if
    both have the same tokens for half the overlap from there on; if not, the whole text is encoded.
    """
    if len(text) <= piece + OVERLAP or not tokenizer.is_fast:
        return _encode_whole(text, tokenizer)
    kept: list[Ids] = []
    expected = np.empty(0, dtype=np.int32)
    start = 0
    while True:
        end = start + piece + OVERLAP
        ids, begins = _encode_piece(text, max(0, start - OVERLAP), end, tokenizer)
        first = int(np.searchsorted(begins, start))
        taken_over = np.array_equal(ids[first : first + len(expected)], expected)
        if not taken_over or np.any(np.diff(begins) < 0):
            return _encode_whole(text, tokenizer)
        if end >= len(text):
            return np.concatenate([*kept, ids[first:]])
        stop, checked = np.searchsorted(begins, (start + piece, start + piece + OVERLAP // 2))
        kept.append(ids[first:stop])
        expected = ids[stop:checked]
        start = int(begins[stop]) if stop < len(begins) else len(text)


def _encode_whole(text: str, tokenizer: Tokenizer) -> Ids:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)


def _encode_piece(text: str, begin: int, end: int, tokenizer: Tokenizer) -> tuple[Ids, npt.NDArray[np.int64]]:
    """Tokens of text[begin:end], and the position in `text` where each begins."""
    found = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = np.array([offset for offset, _ in found["offset_mapping"]], dtype=np.int64) + begin
    return np.array(found["input_ids"], dtype=np.int32), begins
