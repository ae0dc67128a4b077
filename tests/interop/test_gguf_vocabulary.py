"""llama.cpp tokenizes as the source does: tokenizers in the shape of every family, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quantkit import resources
from quantkit.gguf import container
from quantkit.gguf.vocabulary import count, reference, vocabulary
from quantkit.gguf.vocabulary.identity import SPACED, TEXTS, Difference
from quantkit.gguf.vocabulary.known import NAMES as KNOWN
from quantkit.run.llama_tokens import llama_differences

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python"),
]

# what vocab-only loading asks of a model
MODEL = {
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
CORPUS = [*TEXTS, *SPACED, " ".join(TEXTS), *(text.upper() for text in TEXTS), "\n".join(TEXTS)] * 2
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS, SIGNS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{SIGNS}{SPACES}"
QWEN2 = LLAMA3.replace("{1,3}", "")
TIKTOKEN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SEED, BLOOM = r" ?[^\s\p{L}\p{N}\r\n]+", r" ?[^(\s|[.,!?…。，、।۔،])]+"
HAN = "[一-龥ࠀ-一가-퟿]+"
QWEN35 = QWEN2.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{SPACES}"
)
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{SPACES}"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{SPACES}"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGIT = pre_tokenizers.Digits(individual_digits=True)
LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
GEMMA = normalizers.Replace(" ", "▁")
FALCON = [
    pre_tokenizers.Punctuation("contiguous"),
    GPT2,
    pre_tokenizers.Digits(individual_digits=False),
    pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
]


def split(*patterns: str) -> list[Any]:
    return [*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns), BYTES]


def byte_level(steps: Sequence[Any], **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(list(steps)), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def spaced(normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    """SentencePiece's shape: spaces become ▁, unknown letters become bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    # words are kept apart while it learns, or it would learn whole sentences
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=pieces, limit_alphabet=150, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.add_special_tokens([AddedToken("<start_of_turn>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, **options: Any) -> Path:
    begin, end = ("<|bos|>", "<|eos|>") if tokenizer.token_to_id("<|bos|>") is not None else ("<s>", "</s>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, **options)
    wrapped.save_pretrained(folder)
    return folder


def differences(folder: Path, path: Path | None = None) -> list[Difference]:
    """Of the tokenizer in `folder` through a file without weights, for three rows more than tokens."""
    path = path or folder / "vocabulary.gguf"
    metadata = vocabulary(folder, count(folder) + 3)
    container.write(path, "llama", {**MODEL, **metadata}, [], [])
    found, refused = llama_differences(path, reference(folder))
    assert found is not None, refused
    return found


def plain(found: Sequence[Difference]) -> list[str]:
    return [str(difference) for difference in found if not difference.edge]


@pytest.mark.parametrize(
    ("steps", "options", "name"),
    [
        ([GPT2], {}, "gpt-2"),
        ([DIGIT, GPT2], {}, "smollm"),
        (split(LLAMA3), {}, "dbrx"),
        (split(LLAMA3), {"ignore_merges": True}, "llama-bpe"),
        ([pre_tokenizers.Split(Regex(TIKTOKEN), "removed", invert=True), BYTES], {}, "dbrx"),
        (split(QWEN2), {}, "qwen2"),
        (split(QWEN35), {}, "qwen35"),
        (split(O200K), {}, "gpt-4o"),
        (split(TEKKEN), {"ignore_merges": True}, "tekken"),
        (FALCON, {}, "falcon"),
        (split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3), {}, "deepseek-v3"),
        (
            [*split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN)[:-1], DIGIT, BYTES],
            {},
            "deepseek-coder",
        ),
        (
            split(
                LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}{1}").replace(SIGNS, SEED),
            ),
            {},
            "seed-coder",
        ),
        (split(r"\p{N}{1,3}", LLAMA3.replace("{1,3}", "+")), {"ignore_merges": True}, "minicpm5"),
        (split(QWEN2.removeprefix(f"{CONTRACTIONS}|")), {}, "ufakzeka"),
        (split(BLOOM), {}, "bloom"),
        ([*split(BLOOM)[:-1], DIGIT, BYTES], {}, "viking"),
        ([GPT2], {"ignore_merges": True}, "gpt-2"),
        (split(TEKKEN), {}, "tekken"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_byte_level_splits_as_its_rules_say(
    steps: Sequence[Any], options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(steps, **options)
    save(tmp_path, tokenizer)
    assert vocabulary(tmp_path, count(tmp_path))["tokenizer.ggml.pre"] == name
    assert plain(differences(tmp_path)) == []


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (LLAMA2, None),
        (GEMMA, pre_tokenizers.Split(" ", "merged_with_previous")),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
    ],
    ids=["llama2", "gemma", "mistral", "metaspace", "bare"],
)
def test_sentencepiece_merges_as_the_tokenizer_does(
    normalizer: Any, pre_tokenizer: Any, tmp_path: Path
) -> None:
    save(tmp_path, spaced(normalizer, pre_tokenizer))
    assert vocabulary(tmp_path, count(tmp_path))["tokenizer.ggml.model"] == "llama"
    found = differences(tmp_path)
    assert plain(found) == []
    # Metaspace puts no space before one, nor after special tokens; llama.cpp does
    if normalizer is not None:
        assert found == []


def test_runs_of_spaces_and_lines_as_gemma_has_them(tmp_path: Path) -> None:
    content = json.loads(spaced(GEMMA, pre_tokenizers.Split(" ", "merged_with_previous")).to_str())
    model, runs = content["model"], ["▁▁", "▁▁▁▁"]
    model["vocab"] |= {run: len(model["vocab"]) + 10 + n for n, run in enumerate(runs)}
    model["merges"][:0] = [["▁", "▁"], ["▁▁", "▁▁"]]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*runs, "\n\n", "<td>")])
    save(tmp_path, tokenizer)
    assert plain(differences(tmp_path)) == []


def test_what_the_class_of_a_tokenizer_forgets_is_kept(tmp_path: Path) -> None:
    """StarCoder2's shape and class: transformers no longer divides its numbers, llama.cpp does."""
    save(tmp_path, byte_level([DIGIT, GPT2]))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    assert vocabulary(tmp_path, count(tmp_path))["tokenizer.ggml.pre"] == "smollm"
    assert plain(differences(tmp_path)) == []


def test_a_wrong_name_is_found_out(tmp_path: Path) -> None:
    save(tmp_path, byte_level(split(QWEN2)))
    path = tmp_path / "wrong.gguf"
    metadata = {**vocabulary(tmp_path, count(tmp_path)), "tokenizer.ggml.pre": "gpt-2"}
    container.write(path, "llama", {**MODEL, **metadata}, [], [])
    found, _ = llama_differences(path, reference(tmp_path))
    assert found is not None
    assert any("DON'T" in difference.text for difference in found if not difference.edge)
    assert "in the source" in str(found[0])
    path.write_bytes(b"GGUF")
    found, refused = llama_differences(path, reference(tmp_path))
    assert found is None and refused is not None and "does not load the vocabulary" in refused


def test_llama_cpp_knows_every_name_in_the_table(tmp_path: Path) -> None:
    save(tmp_path, byte_level([GPT2]))
    metadata = {**MODEL, **vocabulary(tmp_path, count(tmp_path))}
    for name in sorted(set(KNOWN.values())):
        path = tmp_path / f"{name}.gguf"
        container.write(path, "llama", {**metadata, "tokenizer.ggml.pre": name}, [], [])
        found, refused = llama_differences(path, reference(tmp_path))
        assert found is not None, refused


@pytest.mark.parametrize("name", ["demo-llama", "wiki-llama-7m"])
def test_trained_models(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if name == "demo-llama":
        folder = resources.folder("demo-llama")
    else:
        folder = request.getfixturevalue("shared") / "models" / name
    if not folder.is_dir():
        pytest.skip(f"needs models/{name} in ../shared")
    assert differences(folder, tmp_path / "vocabulary.gguf") == []
