"""The tokenizer in a GGUF file as the files of a tokenizer that Transformers loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import SourceError, UnsupportedError
from quantkit.run.gguf_source.splits import Splitting, splitting

NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5
_SPACE = "▁"
_BESIDE = "put the tokenizer.json of the model it was made from beside the file: it is preferred"
_DAMAGED = "the file is damaged or was tampered with: download it again"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer of one file.

    kind    "gpt2" (bytes are merged by rank) or "llama" (characters are merged by the score of the result)
    tokens  text of every id
    types   kind of every id, in llama.cpp's numbers
    """

    where: str
    metadata: Mapping[str, Any]
    kind: str
    tokens: Sequence[str]
    types: Sequence[int]

    @classmethod
    def of(cls, where: str, metadata: Mapping[str, Any]) -> Vocabulary:
        """SourceError when the file has none, UnsupportedError for a kind that is not known."""
        kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
        if kind in (None, "none", "no_vocab") or not tokens:
            raise SourceError(f"`{where}` has no tokenizer", remedy=_BESIDE)
        if kind not in ("gpt2", "llama"):
            raise UnsupportedError(f"`{where}` has a tokenizer of the kind {kind!r:.40}", remedy=_BESIDE)
        types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise SourceError(f"`{where}`: {len(tokens):,} tokens and {len(types):,} types", remedy=_DAMAGED)
        return cls(where, metadata, kind, tokens, types)

    def files(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """(name, content) of the files: JSON objects and the chat template."""
        yield "tokenizer.json", self._backend()
        # a token that has a name is found in texts, which llama.cpp never does with one that is unused
        template = self.metadata.get("tokenizer.chat_template")
        special = {f"{name}_token": self._special(key) for name, key in _NAMED if not self._is_unused(key)}
        yield (
            "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "add_bos_token": self._begins(),
                "add_eos_token": self._flag("add_eos_token", default=False),
                **{name: text for name, text in special.items() if text is not None},
                # not as a file of its own: reading one changes ends of lines
                **({"chat_template": template} if isinstance(template, str) else {}),
            },
        )

    def _backend(self) -> dict[str, Any]:
        parts = self._byte_level() if self.kind == "gpt2" else self._sentencepiece()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added()),
            **parts,
            "post_processor": self._post_processor(),
        }

    def _byte_level(self) -> dict[str, Any]:
        found = self._splitting()
        merges = [merge.split(" ", 1) for merge in self.metadata.get("tokenizer.ggml.merges") or ()]
        return {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": found.steps},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            "model": self._model(merges, ignore_merges=found.ignore_merges),
        }

    def _sentencepiece(self) -> dict[str, Any]:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        prefixed = self._flag("add_space_prefix", default=True)
        prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
        back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
            },
            "model": self._model(self._implied_merges(), byte_fallback=True, fuse_unk=True),
        }

    def _model(self, merges: Sequence[Sequence[str]], **own: bool) -> dict[str, Any]:
        unknown = self._special("unknown") if self.kind == "llama" else None
        vocabulary = {t: n for n, t in enumerate(self.tokens) if self.types[n] != _UNUSED}
        if any(part not in vocabulary for merge in merges for part in (*merge, "".join(merge))):
            raise SourceError(f"`{self.where}` merges tokens that it does not have", remedy=_DAMAGED)
        fixed = {"byte_fallback": False, "fuse_unk": False, "ignore_merges": False, "dropout": None}
        return {
            "type": "BPE",
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **fixed,
            **own,
            "vocab": vocabulary,
            "merges": merges,
        }

    def _implied_merges(self) -> list[tuple[str, str]]:
        """SentencePiece merges the two neighbours whose union has the best score: every way to halve a
        token is a merge, in the order of the scores."""
        scores = self.metadata.get("tokenizer.ggml.scores")
        if not scores or len(scores) != len(self.tokens):
            raise SourceError(f"`{self.where}` has no score for each of its tokens", remedy=_DAMAGED)
        known = {t: n for n, t in enumerate(self.tokens) if self.types[n] != _UNUSED}
        order = sorted((n for n in known.values() if self.types[n] == NORMAL), key=lambda n: -scores[n])
        halves = ((t[:cut], t[cut:]) for t in map(self.tokens.__getitem__, order) for cut in range(1, len(t)))
        return [(left, right) for left, right in halves if left in known and right in known]

    def _splitting(self) -> Splitting:
        name = self.metadata.get("tokenizer.ggml.pre")
        found = splitting(name) if isinstance(name, str) else None
        if found is None:
            said = "does not say" if name is None else f"says by the name {name!r:.40}, which is not known,"
            raise UnsupportedError(
                f"`{self.where}` {said} how texts are split before they are merged", remedy=_BESIDE
            )
        return found

    def _added(self) -> Iterator[dict[str, Any]]:
        """Tokens that are found in a text before it is split."""
        for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in (_CONTROL, _USER, _UNKNOWN):
                yield {
                    "id": number,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": kind != _USER,
                }

    def _post_processor(self) -> dict[str, Any] | None:
        """The special tokens around a text."""
        before = self._special("bos") if self._begins() else None
        after = self._special("eos") if self._flag("add_eos_token", default=False) else None

        def template(*sequences: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            for number, name in enumerate(sequences):
                around = [
                    *((("SpecialToken", before),) if before else ()),
                    ("Sequence", name),
                    *((("SpecialToken", after),) if after else ()),
                ]
                found += [{what: {"id": text, "type_id": number}} for what, text in around]
            return found

        if before is None and after is None:
            return None if self.kind == "llama" else {"type": "ByteLevel", **_OFFSETS}
        tokens = {text: self.tokens.index(text) for text in (before, after) if text}
        special = {text: {"id": text, "ids": [n], "tokens": [text]} for text, n in tokens.items()}
        return {
            "type": "TemplateProcessing",
            "single": template("A"),
            "pair": template("A", "B"),
            "special_tokens": special,
        }

    def _begins(self) -> bool:
        """Whether a text begins with the first special token; llama.cpp's defaults where nothing is said."""
        usual = True if self.kind == "llama" else self._splitting().begins
        return self._flag("add_bos_token", default=usual) and self._special("bos") is not None

    def _flag(self, name: str, *, default: bool) -> bool:
        return bool(self.metadata.get(f"tokenizer.ggml.{name}", default))

    def _special(self, name: str) -> str | None:
        number = self._number(name)
        return None if number is None else self.tokens[number]

    def _is_unused(self, name: str) -> bool:
        number = self._number(name)
        return number is not None and self.types[number] == _UNUSED

    def _number(self, name: str) -> int | None:
        number = self.metadata.get(f"tokenizer.ggml.{name}_token_id", _USUAL[self.kind].get(name))
        return number if isinstance(number, int) and 0 <= number < len(self.tokens) else None


_NAMED = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
_OFFSETS = {"add_prefix_space": True, "trim_offsets": False, "use_regex": True}
# llama.cpp's numbers where a file does not say them
_USUAL: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "gpt2": {"bos": 11, "eos": 11},
}
