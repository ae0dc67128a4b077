"""Byte-level BPE: bytes become letters, words are cut out by patterns, neighbours are merged."""

from __future__ import annotations

from quantkit.calibrate.tokenizer import Tokenizer
from quantkit.gguf.container import Value
from quantkit.gguf.vocabulary.known import known_name
from quantkit.gguf.vocabulary.rules import Kind, Rules, controls, place
from quantkit.gguf.vocabulary.splits import BYTES, NAMES, pattern_of

# normal forms leave a text as it is that has them already, as nearly all have
_FORMS = frozenset({"NFC"})


def metadata(rules: Rules, rows: int, tokenizer: Tokenizer) -> dict[str, Value]:
    """UnsupportedError when llama.cpp has no name for how texts are split."""
    rules.plain_merges()
    texts = {n: (text, Kind.NORMAL) for text, n in rules.vocabulary.items()}
    added = {
        token["id"]: (token["content"], Kind.CONTROL if controls(token) else Kind.USER_DEFINED)
        for token in rules.added
    }
    pieces = place(texts, added, rows)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": known_name(tokenizer) or pre_tokenizer(rules),
        "tokenizer.ggml.tokens": [text for text, _ in pieces],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in pieces],
        # a space divides the halves of a merge: one inside is written as its byte letter
        "tokenizer.ggml.merges": [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in rules.merges],
    }


def pre_tokenizer(rules: Rules) -> str:
    """llama.cpp's name of how texts are split, by the rules; UnsupportedError when it has none."""
    if odd := [step.get("type") for step in rules.normalizers if step.get("type") not in _FORMS]:
        raise rules.refusal(f"changes texts first ({odd[0]})")
    patterns: list[str] = []
    for step in rules.pre_tokenizers:
        pattern = pattern_of(step)
        if pattern is None:
            raise rules.refusal(f"splits texts with {dict(step)!r}")
        patterns += pattern
    whole = bool(rules.model.get("ignore_merges"))
    if patterns[-1] == BYTES:
        patterns.pop()
    names = NAMES.get(tuple(patterns), {})
    if whole in names:
        return names[whole]
    if names and _merges_make_all(rules):
        return next(iter(names.values()))
    if names:
        looks = "looks words up" if whole else "does not look words up"
        raise rules.refusal(f"{looks} before it merges, unlike all that split texts as it does")
    raise rules.refusal(f"splits texts with {' then '.join(map(repr, patterns)) or 'nothing'}")


def _merges_make_all(rules: Rules) -> bool:
    """Whether merging the letters of any token gives that token: then looking it up first changes nothing."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    alone = Backend(BPE(vocab=dict(rules.vocabulary), merges=rules.merges))
    special = {token["content"] for token in rules.added}
    texts = [text for text in rules.vocabulary if text not in special]
    return all(len(found.ids) == 1 for found in alone.encode_batch(texts, add_special_tokens=False))
