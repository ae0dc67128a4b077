"""The tokenizer of a checkpoint as llama.cpp's metadata, from the rules in its own `tokenizer.json`.

llama.cpp finds out how a text is split before merging by a name. That name is found here from the rules
themselves, so a tokenizer trained yesterday works; rules that it has no name for are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit.calibrate.tokenizer import Specials, load_tokenizer
from quantkit.checkpoint.folder import read_json
from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.container import Value

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_FILE = "tokenizer.json"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
# patterns of a Split before bytes are mapped → llama.cpp's name
_SPLITS = MappingProxyType(
    {
        _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST: "dbrx",
        _CONTRACTIONS + _WORDS + r"\p{N}" + _REST: "qwen2",
        _CASED + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
    }
)


def vocabulary(folder: Path, rows: int) -> dict[str, Value]:
    """Metadata of the tokenizer in `folder` for an embedding of `rows` rows.

    SourceError without a usable tokenizer, UnsupportedError for one that llama.cpp cannot express.
    """
    if not (folder / _FILE).is_file():
        raise SourceError(
            f"`{folder}` has no {_FILE}, and a GGUF file holds its tokenizer",
            remedy="load the tokenizer with transformers and save_pretrained it there",
        )
    content = read_json(folder / _FILE)
    model = content["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(f"a tokenizer of the type {model.get('type')!r} is not written as GGUF yet")
    pieces = _pieces(content, rows)
    own = _sentencepiece(content) if model.get("byte_fallback") else _byte_level(content)
    if model.get("byte_fallback"):
        own["tokenizer.ggml.scores"] = _scores(pieces, _merges(model))
    else:
        own["tokenizer.ggml.merges"] = [" ".join(_unspaced(part) for part in pair) for pair in _merges(model)]
    return {
        **own,
        "tokenizer.ggml.tokens": [text for text, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, kind in pieces],
        **_specials(folder),
    }


def _pieces(content: Mapping[str, Any], rows: int) -> list[tuple[str, int]]:
    """(text, type) of every token id below `rows`."""
    model = content["model"]
    unknown = model.get("unk_token")
    pieces: list[tuple[str, int] | None] = [None] * rows
    added = {token["content"]: token for token in content.get("added_tokens") or ()}
    for text, number in [*model["vocab"].items(), *((t, token["id"]) for t, token in added.items())]:
        if number >= rows:
            raise SourceError(f"token {text!r} has the number {number:,} and the embedding {rows:,} rows")
        pieces[number] = (
            text,
            _kind(text, added.get(text), unknown, byte_tokens=bool(model.get("byte_fallback"))),
        )
    found = [(f"[PAD{n}]", _UNUSED) if piece is None else piece for n, piece in enumerate(pieces)]
    texts = {text for text, _ in found}
    if len(texts) < rows:
        raise UnsupportedError(
            f"{rows - len(texts):,} tokens share their text with another, which llama.cpp forbids"
        )
    return found


def _kind(text: str, added: Mapping[str, Any] | None, unknown: str | None, *, byte_tokens: bool) -> int:
    if text == unknown and byte_tokens:
        return _UNKNOWN
    if added is not None:
        marked = text.startswith("<|") and text.endswith("|>")
        return _CONTROL if added.get("special") or marked else _USER
    return _BYTE if byte_tokens and len(text) == 6 and text.startswith("<0x") else _NORMAL


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order; older files write them as one string."""
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(left, right) for left, right in pairs]


def _unspaced(part: str) -> str:
    """A merge is written with a space between its halves, so a space inside is written as its byte letter."""
    return part.replace(" ", "Ġ")


def _scores(pieces: Sequence[tuple[str, int]], merges: Sequence[tuple[str, str]]) -> list[float]:
    """SentencePiece merges the pair with the best score first: minus the rank of the merge that makes it."""
    ranks = {left + right: float(-rank) for rank, (left, right) in reversed(list(enumerate(merges, 1)))}
    return [ranks.get(text, 0.0) if kind == _NORMAL else -1000.0 for text, kind in pieces]


def _byte_level(content: Mapping[str, Any]) -> dict[str, Value]:
    name = _pre_tokenizer(content)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}


def _pre_tokenizer(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of how texts are split; UnsupportedError when it has none."""
    normalizer = (content.get("normalizer") or {}).get("type")
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    last = steps[-1] if steps else {}
    if normalizer in (None, "NFC") and last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        match [step.get("type") for step in steps[:-1]]:
            case [] if last.get("use_regex", True):
                return "gpt-2"
            case ["Digits"] if steps[0].get("individual_digits") and last.get("use_regex", True):
                return "smollm"
            case ["Split"] if not last.get("use_regex", True) and _isolates(steps[0]):
                name = _SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""))
                # the same pattern, but whole words are looked up before any merge
                if name == "dbrx" and content["model"].get("ignore_merges"):
                    return "llama-bpe"
                if name is not None:
                    return name
    kinds = " + ".join(str(step.get("type")) for step in steps) or "nothing"
    raise UnsupportedError(
        f"llama.cpp has no name for how the tokenizer splits texts: {normalizer or 'no normalizer'}, {kinds}",
        remedy="export to a format that keeps the tokenizer files, as compressed_tensors does",
    )


def _isolates(split: Mapping[str, Any]) -> bool:
    return str(split.get("behavior", "")).lower() == "isolated" and not split.get("invert")


def _sentencepiece(content: Mapping[str, Any]) -> dict[str, Value]:
    """A space becomes ▁, with one before the text or without."""
    steps = _steps(content.get("normalizer"), "normalizers")
    steps += _steps(content.get("pre_tokenizer"), "pretokenizers")
    prefixed = False
    for step in steps:
        match step.get("type"):
            case "Prepend" if step.get("prepend") == _SPACE:
                prefixed = True
            case "Metaspace" if step.get("replacement", _SPACE) == _SPACE:
                scheme = step.get(
                    "prepend_scheme", "always" if step.get("add_prefix_space", True) else "never"
                )
                prefixed = prefixed or scheme != "never"
            case "Replace" if step.get("content") == _SPACE and step.get("pattern") == {"String": " "}:
                pass
            case "Split" if step.get("pattern") == {"String": " "}:
                pass  # spaces are gone by then
            case other:
                raise UnsupportedError(
                    f"the tokenizer prepares texts with {other!r}, which llama.cpp cannot express",
                    remedy="export to a format that keeps the tokenizer files, as compressed_tensors does",
                )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def _steps(part: Mapping[str, Any] | None, within: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part[within] for step in _steps(inner, within)]
    return [part]


def _specials(folder: Path) -> dict[str, Value]:
    """Special tokens, whether they are added, and the chat template, as the tokenizer itself says."""
    tokenizer: Any = load_tokenizer(folder)
    around = Specials.of(tokenizer)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if around.prefix not in ((), (begin,)) or around.suffix not in ((), (end,)):
        raise UnsupportedError(
            "the tokenizer puts more around a text than its begin and end tokens: llama.cpp cannot do that"
        )
    numbers = {
        # without one, llama.cpp would take token 11
        "bos": end if begin is None else begin,
        "eos": begin if end is None else end,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    found: dict[str, Value] = {
        f"tokenizer.ggml.{name}_token_id": number for name, number in numbers.items() if number is not None
    }
    found["tokenizer.ggml.add_bos_token"] = bool(around.prefix)
    found["tokenizer.ggml.add_eos_token"] = bool(around.suffix)
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found
