"""Whether a GGUF file tokenizes as its source does: the same ids, on texts that tell rules apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quantkit.calibrate.tokenizer import Tokenizer
from quantkit.gguf.vocabulary.rules import Rules
from quantkit.gguf.vocabulary.splits import CASED, pattern_of

Encode = Callable[[str], list[int]]

TEXTS = (
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    "def add(a: int, b=0x1F) -> int:\n    if a <= b:\n\t\treturn a + b  # sum\n\n\n    return {'k': [a]}\n",
    'for (int i = 0; i < n; ++i) {\r\n  s += x[i] * 1e-5f; // "quoted"\r\n}\r\n#include <vector>',
    '<html lang="en"><!-- note --><a href="https://example.org/a?b=1&c=%20">x</a></html>',
    "1 12 123 1234 12345 123456789012 3.14159 -0.5e10 1,234,567.89 №5 ½ ² Ⅷ ١٢٣ 2024-02-29T12:00:00Z",
    "a b  c   d    e     f      g       h\n\ni\n\n\nj\n\n\n\nk\tl\t\tm \n n\t \no  \n  p \u3000q\u00a0r",
    "ends with spaces   ",
    "ends with a line\n",
    "I'm you're he'll we've they'd it's don't I'M YOU'RE HE'LL WE'VE THEY'D IT'S DON'T 'tis 'Twas",
    "naïve café jalapeño Ångström Zürich œuvre façade élan straße Łódź",
    "ÉCOLE GARÇON STRAẞE NAÏVE CamelCaseWords iPhone HTTPServer XMLHttpRequest2",
    "Привет, мир! Съешь ещё этих мягких французских булок. Καλημέρα κόσμε. Հայերեն ქართული",
    "我想在apple工作1314151天。今天天气很好,我们去公园吧!",
    "日本語のテキスト、カタカナとひらがな。한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם, מה שלומך?",
    "हिन्दी में एक वाक्य। বাংলা ভাষা ภาษาไทย தமிழ் ខ្មែរ",
    "😀 😶\u200d🌫️ 👩\u200d👩\u200d👧\u200d👦 🇩🇪 ✅ 🦙🦙 ♥️ ☎",
    "... !!! ??? --- ___ *** ``` ''' \"\"\" ((( ))) [[ ]] {{ }} <<>> ||| && // \\\\ ~~ ^^ $$ %% @@ ##",
    "∑∫√∞≠≤≥ αβγ x² + y³ = z₁ €100 £5 ¥7 “quotes” ‘single’ – — … •",
    "zero\u200bwidth \ufeffmark soft\u00adhyphen combining e\u0301 a\u030a control \x01\x7f end",
)
SPACED = (" leads with a space", "   leads with three", "\n\nleads with lines", "\tleads with a tab", " ")
_MARKERS = 64


@dataclass(frozen=True, slots=True)
class Difference:
    """A text with the ids that the source gives it and those of the file.

    `edge`: it differs only where llama.cpp has its own way, for any file: in what surrounds special tokens,
    for a space at the very start, for texts that Unicode writes in several ways, for capitals and marks
    beyond ASCII in patterns that go by case (gpt-4o, tekken).
    """

    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    edge: bool

    def __str__(self) -> str:
        at = next(
            (n for n, (a, b) in enumerate(zip(self.expected, self.found, strict=False)) if a != b),
            min(len(self.expected), len(self.found)),
        )
        ours, theirs = self.expected[at : at + 4], self.found[at : at + 4]
        return f"{self.text[:40]!r}: token {at} on is {list(ours)} in the source, {list(theirs)} in the file"


def texts_for(tokenizer: Tokenizer) -> tuple[str, ...]:
    """What `same_ids` tries."""
    return tuple(text for text, _ in _texts(tokenizer))


def same_ids(tokenizer: Tokenizer, encode: Encode) -> list[Difference]:
    """Texts that `encode`, without tokens around them, gives other ids than `reference` of the source."""
    found = []
    for text, edge in _texts(tokenizer):
        expected = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if (other := tuple(encode(text))) != expected:
            found.append(Difference(text, expected, other, edge))
    return found


def _texts(tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """(text, edge) of all that is tried."""
    cased = _splits_by_case(tokenizer)
    for text in TEXTS:
        yield text, not unicodedata.is_normalized("NFC", text) or (cased and _beyond_ascii(text))
    for text in SPACED:
        yield text, text.startswith(" ")
    added = getattr(tokenizer, "added_tokens_decoder", {})  # a foreign class, which may not have it
    for _, token in sorted(added.items())[:_MARKERS]:
        yield str(token), "▁" in str(token)
        yield f"{token}user\nHow are you?{token} Fine.\n{token}{token}", True


def _splits_by_case(tokenizer: Tokenizer) -> bool:
    """Whether words end where case changes: llama.cpp knows the case of ASCII letters only, and no marks."""
    steps = Rules.of(tokenizer).pre_tokenizers
    return any(pattern in CASED for step in steps for pattern in pattern_of(step) or ())


def _beyond_ascii(text: str) -> bool:
    return any(ord(c) > 127 and (c.isupper() or unicodedata.category(c).startswith("M")) for c in text)
