"""Tokenizers as llama.cpp's metadata: freshly trained ones, known to nobody."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quantkit.errors import SourceError, UnsupportedError
from quantkit.gguf.vocabulary import count, vocabulary
from quantkit.gguf.vocabulary.known import NAMES, PROBE, known_name

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
        # every token is what merging gives, so looking words up first changes nothing
        (split(LLAMA3.replace("{1,3}", "")), {"ignore_merges": True}, "qwen2"),
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


@pytest.mark.parametrize(
    ("pre", "why"),
    [
        (split(r"\w+|\W+"), r"splits texts with '\\\\w\+\|"),
        (pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES]), "Whitespace"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "add_prefix_space"),
        (pre_tokenizers.Sequence([BYTES, GPT2]), "bytes"),
    ],
    ids=["regex", "kind", "prefix", "order"],
)
def test_rules_that_llama_cpp_has_no_name_for_are_refused(pre: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"{why}.*llama.cpp cannot express"):
        vocabulary(save(tmp_path, byte_level(pre)), 300)


def test_looking_words_up_first_is_refused_where_it_matters(tmp_path: Path) -> None:
    """`qqq` is a token that no merge makes: only the whole word finds it."""
    content = json.loads(byte_level(split(LLAMA3.replace("{1,3}", "")), ignore_merges=True).to_str())
    content["model"]["vocab"]["qqq"] = len(content["model"]["vocab"])
    save(tmp_path, Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(UnsupportedError, match="looks words up before it merges"):
        vocabulary(tmp_path, 400)


@pytest.mark.parametrize("steps", [[normalizers.Lowercase()], [normalizers.NFC(), normalizers.Strip()]])
def test_texts_that_are_changed_first_are_refused(steps: list[Any], tmp_path: Path) -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.normalizer = normalizers.Sequence(steps)
    with pytest.raises(UnsupportedError, match="changes texts first"):
        vocabulary(save(tmp_path, tokenizer), 300)


def test_rows_without_a_token_are_padded_and_tokens_without_a_row_refused(tmp_path: Path) -> None:
    save(tmp_path, byte_level(GPT2))
    found: dict[str, Any] = vocabulary(tmp_path, 304)
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD303]" and found["tokenizer.ggml.token_type"][-1] == 5
    with pytest.raises(SourceError, match="the embedding 299 rows"):
        vocabulary(tmp_path, 299)


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    """Gemma 3 1B has a token for images, and one row less."""
    tokenizer = byte_level(GPT2)
    tokenizer.add_special_tokens(["<image>"])
    save(tmp_path, tokenizer)
    assert count(tmp_path) == 301
    assert "<image>" not in vocabulary(tmp_path, 300)["tokenizer.ggml.tokens"]  # type: ignore[operator]


def test_added_tokens_are_control_tokens_or_text(tmp_path: Path) -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.add_special_tokens(["<special>"])
    tokenizer.add_tokens(["<|looks|>", "<think>"])
    found: dict[str, Any] = vocabulary(save(tmp_path, tokenizer), 303)
    assert found["tokenizer.ggml.token_type"][300:] == [3, 3, 4]


def test_tokens_of_equal_text_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.add_tokens(["[PAD302]"])
    with pytest.raises(UnsupportedError, match=r"two tokens are '\[PAD302\]'"):
        vocabulary(save(tmp_path, tokenizer), 303)


def test_specials_by_name_and_by_text_and_several_templates(tmp_path: Path) -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.add_special_tokens(["<|im_end|>", "<|eom_id|>", "<pre>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<s>", prefix_token="<pre>"
    )
    wrapped.chat_template = {"default": "A", "tool use": "B"}
    wrapped.save_pretrained(tmp_path)
    found = vocabulary(tmp_path, 303)
    numbers = {
        name: found.get(f"tokenizer.ggml.{name}_token_id") for name in ("padding", "eot", "eom", "fim_pre")
    }
    assert numbers == {"padding": 0, "eot": 300, "eom": 301, "fim_pre": 302}
    assert found["tokenizer.chat_template"] == "A" and found["tokenizer.chat_template.tool_use"] == "B"
    assert found["tokenizer.chat_templates"] == ["tool_use"]


def test_specials_that_only_a_class_adds_have_no_row(tmp_path: Path) -> None:
    """Qwen2's class pads with `<|endoftext|>`, which it adds where a tokenizer.json has none."""
    save(tmp_path, byte_level(GPT2))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 300
    found: dict[str, Any] = vocabulary(tmp_path, 304)
    assert found["tokenizer.ggml.tokens"][300] == "[PAD300]"
    assert "tokenizer.ggml.padding_token_id" not in found and "tokenizer.ggml.eos_token_id" in found


def test_a_tokenizer_without_ends_is_refused(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=byte_level(GPT2)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="no begin and no end token"):
        vocabulary(tmp_path, 300)


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


@pytest.mark.parametrize(
    ("normalizer", "pre", "why"),
    [
        (normalizers.NFKC(), None, "prepares texts with {'type': 'NFKC'}"),
        (normalizers.Replace(" ", "_"), None, "'content': '_'"),
        (None, pre_tokenizers.Whitespace(), "'Whitespace'"),
    ],
)
def test_spaces_that_are_treated_otherwise_are_refused(
    normalizer: Any, pre: Any, why: str, tmp_path: Path
) -> None:
    tokenizer = sentencepiece()
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre
    with pytest.raises(UnsupportedError, match=why):
        vocabulary(save(tmp_path, tokenizer), 340)


def test_tokens_over_several_words_are_refused_where_words_are_kept_apart(tmp_path: Path) -> None:
    content = json.loads(sentencepiece().to_str())
    content["model"]["vocab"]["▁▁"] = 900
    content["model"]["merges"].append(["▁", "▁"])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizers.Metaspace(split=True)
    with pytest.raises(UnsupportedError, match="reach over several"):
        vocabulary(save(tmp_path, tokenizer), 901)


def test_letters_without_bytes_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "▁": 2, "a": 3}, [], unk_token="<s>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    with pytest.raises(UnsupportedError, match="no tokens for single bytes"):
        vocabulary(save(tmp_path, tokenizer), 4)


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no tokenizer"):
        vocabulary(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="`model` is missing"):
        vocabulary(tmp_path, 10)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    with pytest.raises(UnsupportedError, match="'WordLevel'"):
        vocabulary(save(tmp_path / "words", words), 2)
    pieces = Tokenizer(models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    assert count(save(tmp_path / "pieces", pieces)) == 3
    with pytest.raises(UnsupportedError, match="'Unigram'"):
        vocabulary(tmp_path / "pieces", 3)


def test_names_of_published_tokenizers_come_from_their_ids() -> None:
    assert hashlib.sha256(PROBE.encode()).hexdigest() == (
        "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
    )
    # the ids that GPT-2 gives the text are not at hand: any others have no name
    assert known_name(lambda text, **_: {"input_ids": [1, 2, 3]}) is None  # type: ignore[arg-type]
    assert NAMES["3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"] == "gpt-2"
