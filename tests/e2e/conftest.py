"""A tiny checkpoint with a tokenizer and two texts: enough to run the whole pipeline in seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import VOCAB, save_tiny

WORDS = [f"w{n}" for n in range(VOCAB - 3)]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of words: w0 is token 3 and so on."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: n + 3 for n, word in enumerate(WORDS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


def write_text(path: Path, words: int, seed: int) -> Path:
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=words)))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks, dims multiples of 32."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("source") / "tiny-llama")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "calibration.txt", 2000, seed=1)


@pytest.fixture(scope="session")
def evaluation_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "evaluation.txt", 1000, seed=2)
