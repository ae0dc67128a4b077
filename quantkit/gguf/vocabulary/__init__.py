"""The tokenizer of a checkpoint as llama.cpp's metadata, from the rules that it really follows.

What it does is read from its own rules, so one that was trained yesterday works; what llama.cpp has no way
to do is refused.
"""

from __future__ import annotations

from pathlib import Path

from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.errors import UnsupportedError
from quantkit.gguf.container import Value
from quantkit.gguf.vocabulary import bytelevel, sentencepiece
from quantkit.gguf.vocabulary.rules import Rules, reference
from quantkit.gguf.vocabulary.specials import specials

__all__ = ["count", "reference", "vocabulary"]


def vocabulary(folder: Path, rows: int) -> dict[str, Value]:
    """Metadata of the tokenizer in `folder` for an embedding of `rows` rows.

    Rows without a token get unused ones; added tokens without a row are left out, as no model can use them.
    SourceError without a usable tokenizer, UnsupportedError for one that llama.cpp cannot express.
    """
    tokenizer = reference(folder)
    rules = Rules.of(tokenizer)
    if rules.kind != "BPE":
        raise UnsupportedError(
            f"llama.cpp runs no language model with a tokenizer of the type {rules.kind!r}, only byte-level "
            "and SentencePiece BPE",
            remedy="export to a format that keeps the tokenizer files, as compressed_tensors does",
        )
    if rules.byte_level:
        metadata = bytelevel.metadata(rules, rows, tokenizer)
    else:
        metadata = sentencepiece.metadata(rules, rows)
    used = {number for number in rules.numbers if number < rows}
    return {**metadata, **specials(load_tokenizer(folder), used)}


def count(folder: Path) -> int:
    """Rows of an embedding that the tokenizer in `folder` can reach: its largest token id plus one."""
    return Rules.of(reference(folder)).count
