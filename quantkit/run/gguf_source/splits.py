"""How texts are split before merging, by the name that llama.cpp has for it, as tokenizer.json says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantkit.gguf.vocabulary.splits import BYTES, NAMES, PUNCTUATION

# further names of the same, as files carry them
_ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gpt-2": ("gpt2", "olmo", "mpt", "phi-2", "jais", "roberta-bpe", "exaone4", "trillion", "mellum"),
        "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        "dbrx": ("smaug-bpe",),
        "qwen2": ("stablelm2", "deepseek-r1-qwen", "megrez", "kormo"),
        "gpt-4o": ("llama4", "kanana2"),
    }
)
# texts begin with the first special token there unless a file says otherwise
_BEGINNING = frozenset(("llama-bpe", *_ALIASES["llama-bpe"], "tekken"))


@dataclass(frozen=True, slots=True)
class Splitting:
    """What a name stands for.

    patterns       what is cut out, in order, as `gguf.vocabulary.splits` writes it
    ignore_merges  whether whole words are looked up before merging
    begins         whether a text begins with the first special token unless the file says otherwise
    """

    patterns: tuple[str, ...]
    ignore_merges: bool
    begins: bool

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Steps of a pre-tokenizer in tokenizer.json."""
        found = [_step(pattern) for pattern in self.patterns]
        return found if BYTES in self.patterns else [*found, _step(BYTES)]


def splitting(name: str) -> Splitting | None:
    """None for a name that is not known."""
    for patterns, names in NAMES.items():
        for whole, known in names.items():
            if name == known or name in _ALIASES.get(known, ()):
                return Splitting(patterns, whole, name in _BEGINNING)
    return None


def _step(pattern: str) -> dict[str, Any]:
    if pattern == BYTES:
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pattern == PUNCTUATION:
        return {"type": "Punctuation", "behavior": "Contiguous"}
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
