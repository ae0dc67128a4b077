"""Tokenizers as llama.cpp's metadata: freshly trained ones, known to nobody."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.vocabulary import vocabulary

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs 12345"] * 5
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def save(folder: Path, tokenizer: Tokenizer, **specials: str) -> Path:
    specials = specials or {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
    return folder


def byte_level(pre: Any, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentencepiece(prefix: bool = True) -> Tokenizer:
    """As Llama 2's: spaces become ▁, what is unknown becomes bytes."""
    pieces = [f"<0x{n:02X}>" for n in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<unk>", "<s>", "</s>", *pieces], show_progress=False
    )
    tokenizer.train_from_iterator([text.replace(" ", " ▁")[:] for text in TEXT], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize(
    ("pre", "options", "name"),
    [
        (split(LLAMA3), {"ignore_merges": True}, "llama-bpe"),
        (split(LLAMA3), {}, "dbrx"),
        (split(LLAMA3.replace("{1,3}", "")), {}, "qwen2"),
        (GPT2, {}, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), {}, "smollm"),
    ],
)
def test_how_texts_are_split_is_read_from_the_rules(
    pre: Any, options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(pre, **options)
    found: dict[str, Any] = vocabulary(save(tmp_path, tokenizer), 300)
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.tokens"] == [tokenizer.id_to_token(n) for n in range(300)]
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert found["tokenizer.ggml.merges"][0].count(" ") == 1
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("pre", [split(r"\w+|\W+"), pre_tokenizers.Whitespace()], ids=["regex", "kind"])
def test_rules_without_a_name_are_refused(pre: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no name for how the tokenizer splits texts"):
        vocabulary(save(tmp_path, byte_level(pre)), 300)


def test_rows_without_a_token_are_padded_and_tokens_without_a_row_refused(tmp_path: Path) -> None:
    save(tmp_path, byte_level(GPT2))
    found: dict[str, Any] = vocabulary(tmp_path, 304)
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD303]" and found["tokenizer.ggml.token_type"][-1] == 5
    with pytest.raises(SourceError, match="the embedding 299 rows"):
        vocabulary(tmp_path, 299)


def test_tokens_around_a_text_are_those_that_the_tokenizer_adds(tmp_path: Path) -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert vocabulary(save(tmp_path / "a", tokenizer), 300)["tokenizer.ggml.add_bos_token"] is True
    # a model without a begin token gets the other one, or llama.cpp would take its own
    found = vocabulary(save(tmp_path / "b", byte_level(GPT2), eos_token="</s>"), 300)
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == 1
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 0)])
    with pytest.raises(UnsupportedError, match="more around a text"):
        vocabulary(save(tmp_path / "c", tokenizer), 300)


def merged(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """SentencePiece: again and again, the neighbours whose union has the best score are joined."""
    score = dict(zip(tokens, scores, strict=True))
    symbols = list(text)
    while True:
        pairs = [(score[a + b], -n) for n, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in score]
        if not pairs:
            return symbols
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def test_scores_make_sentencepiece_merge_as_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    found: dict[str, Any] = vocabulary(save(tmp_path, tokenizer), tokenizer.get_vocab_size())
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256
    for text in ("▁the▁quick▁fox", "▁jumps▁over▁the▁dozen▁dogs", "▁box▁of▁liquor"):
        expected = tokenizer.encode(text[1:].replace("▁", " "), add_special_tokens=False).tokens
        assert merged(text, tokens, found["tokenizer.ggml.scores"]) == expected
    bare = save(tmp_path / "bare", sentencepiece(prefix=False))
    assert vocabulary(bare, tokenizer.get_vocab_size())["tokenizer.ggml.add_space_prefix"] is False


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no tokenizer.json"):
        vocabulary(tmp_path, 10)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    with pytest.raises(UnsupportedError, match="'WordLevel'"):
        vocabulary(save(tmp_path, words), 2)
