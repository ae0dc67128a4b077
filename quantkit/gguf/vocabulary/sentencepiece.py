"""SentencePiece BPE: spaces become ▁, neighbours are merged by score, unknown letters become bytes.

Scores come from the merges in `tokenizer.json`, not from a `tokenizer.model` beside it: the two can differ
(pieces of equal score, pieces of the user's own), and transformers goes by the former.
"""

from __future__ import annotations

from collections.abc import Collection

from quantkit.gguf.container import Value
from quantkit.gguf.vocabulary.rules import Kind, Rules, controls, place

_SPACE = "▁"
_BYTES = frozenset(f"<0x{n:02X}>" for n in range(256))


def metadata(rules: Rules, rows: int) -> dict[str, Value]:
    """Scores make llama.cpp merge in the order of the tokenizer's merges: minus the rank of the first.

    UnsupportedError when texts are prepared as llama.cpp cannot.
    """
    rules.plain_merges()
    prefixed = space_prefix(rules)
    if not rules.vocabulary.keys() >= _BYTES:
        raise rules.refusal("has no tokens for single bytes (<0x00> … <0xFF>)")
    merges = rules.merges
    ranks = {left + right: float(-rank) for rank, (left, right) in reversed(list(enumerate(merges)))}
    # letters are made by no merge, and other tokens that none makes come last of all
    last = -1.0 - len(merges)
    texts = {n: (text, _kind(text, rules)) for text, n in rules.vocabulary.items()}
    found = place(texts, _added(rules, ranks), rows)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [text for text, _ in found],
        "tokenizer.ggml.scores": [ranks.get(t, last) if k is Kind.NORMAL else last for t, k in found],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in found],
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def space_prefix(rules: Rules) -> bool:
    """Whether a space is put before a text; UnsupportedError when more happens to it than ▁ for spaces."""
    prefixed, divided = False, False
    for step in (*rules.normalizers, *rules.pre_tokenizers):
        match step.get("type"):
            case "Prepend" if step.get("prepend") == _SPACE:
                prefixed = True
            case "Metaspace" if step.get("replacement", _SPACE) == _SPACE:
                always = "always" if step.get("add_prefix_space", True) else "never"
                prefixed = prefixed or step.get("prepend_scheme", always) != "never"
                divided = divided or step.get("split", True)
            case "Replace" if step.get("content") == _SPACE and step.get("pattern") == {"String": " "}:
                pass
            case "Split" if step.get("pattern") == {"String": " "}:
                pass  # spaces are gone by then
            case _:
                raise rules.refusal(f"prepares texts with {dict(step)!r}")
    if divided and any(_SPACE in (left + right)[1:] for left, right in rules.merges):
        raise rules.refusal("merges within words only, though some of its tokens reach over several")
    return prefixed


def _kind(text: str, rules: Rules) -> Kind:
    if text == rules.model.get("unk_token"):
        return Kind.UNKNOWN
    return Kind.BYTE if text in _BYTES else Kind.NORMAL


def _added(rules: Rules, made: Collection[str]) -> dict[int, tuple[str, Kind]]:
    """Texts that llama.cpp is to look for before it merges, which it does before spaces become ▁."""
    found: dict[int, tuple[str, Kind]] = {}
    for token in rules.added:
        text = token["content"]
        if text == rules.model.get("unk_token"):
            found[token["id"]] = (text, Kind.UNKNOWN)
        elif controls(token):
            found[token["id"]] = (text, Kind.CONTROL)
        elif _SPACE in text and text in made:
            # a run of spaces, as Gemma's: merging makes it, and what it prints is spaces
            found[token["id"]] = (text, Kind.NORMAL)
        else:
            found[token["id"]] = (text.replace(_SPACE, " "), Kind.USER_DEFINED)
    return found
