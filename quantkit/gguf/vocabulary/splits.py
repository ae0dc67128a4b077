"""How texts are cut into words before bytes are merged: patterns, and llama.cpp's names for them.

llama.cpp reads no patterns from a file: it has its own under names, and a name also says whether words are
looked up whole before any merge (`ignore_merges`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# spellings of the same → ours; all that follows a possessive part here cannot match it anyway
_SPELLINGS = (
    (r"'(?i:[sdmt]|ll|ve|re)", _SUFFIXES),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _SUFFIXES),
    (r"(?:'[sS]|'[dD]|'[mM]|'[tT]|'[lL][lL]|'[vV][eE]|'[rR][eE])", _SUFFIXES),
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("?+", "?"),
    ("++", "+"),
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"\s*[\r\n]|", r"\s*[\r\n]+|"),
)

_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_CASED_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES

BYTES = "bytes"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = f"{_SUFFIXES}|{_WORDS}" + r"\p{N}{1,3}" + _SIGNS
QWEN2 = f"{_SUFFIXES}|{_WORDS}" + r"\p{N}" + _SIGNS
QWEN35 = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
O200K = _CASED % (_SUFFIXES + "?", _SUFFIXES + "?") + r"\p{N}{1,3}" + _CASED_SIGNS
TEKKEN = _CASED % ("", "") + r"\p{N}" + _CASED_SIGNS
SEED = f"{_SUFFIXES}|{_WORDS}" + r"\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES
DIGIT, DIGITS, UP_TO_3, THREE = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", "[0-9][0-9][0-9]"
PUNCTUATION = "punctuation"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

# (patterns, in order) → {whole words are looked up first: name}
NAMES: Mapping[tuple[str, ...], Mapping[bool, str]] = MappingProxyType(
    {
        (GPT2,): {False: "gpt-2"},
        (DIGIT, GPT2): {False: "smollm"},
        (LLAMA3,): {False: "dbrx", True: "llama-bpe"},
        (QWEN2,): {False: "qwen2"},
        (QWEN35,): {False: "qwen35"},
        (O200K,): {False: "gpt-4o", True: "granite-embed-multi-97m"},
        (TEKKEN,): {True: "tekken"},
        (SEED,): {False: "seed-coder"},
        (f"{_WORDS}" + DIGIT + _SIGNS,): {False: "ufakzeka"},
        (UP_TO_3, f"{_SUFFIXES}|{_WORDS}" + DIGITS + _SIGNS): {True: "minicpm5"},
        (UP_TO_3, "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3): {False: "deepseek-v3"},
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT): {False: "deepseek-coder"},
        (PUNCTUATION, GPT2, BYTES, DIGITS, THREE): {False: "falcon"},
        (BLOOM,): {False: "bloom"},
        (BLOOM, DIGIT): {False: "viking"},
    }
)
# patterns of which llama.cpp has only an approximation
CASED = frozenset({O200K, TEKKEN})
# every letter is part of a match of these, so what lies between matches is nothing
_COVERING = frozenset({GPT2, LLAMA3, QWEN2, QWEN35, O200K, TEKKEN, SEED})


def pattern_of(step: Mapping[str, Any]) -> list[str] | None:
    """What a pre-tokenizer step cuts out, as in the keys of NAMES; None for what llama.cpp never does."""
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return [GPT2, BYTES] if step.get("use_regex", True) else [BYTES]
        case "Digits":
            return [DIGIT if step.get("individual_digits") else DIGITS]
        case "Punctuation" if str(step.get("behavior")).lower() == "contiguous":
            return [PUNCTUATION]
        case "Split":
            pattern = step.get("pattern") or {}
            found = (
                canonical(pattern["Regex"]) if "Regex" in pattern else re.escape(pattern.get("String", ""))
            )
            isolated = str(step.get("behavior")).lower() == "isolated" and not step.get("invert")
            removed = str(step.get("behavior")).lower() == "removed" and step.get("invert")
            return [found] if isolated or (removed and found in _COVERING) else None
    return None


def canonical(pattern: str) -> str:
    """One spelling for patterns that match the same texts."""
    for theirs, ours in _SPELLINGS:
        pattern = pattern.replace(theirs, ours)
    return pattern
