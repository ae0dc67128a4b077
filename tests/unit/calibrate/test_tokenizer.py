from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quantkit.calibrate.tokenizer import Specials, encode, load_tokenizer
from quantkit.errors import SourceError
from quantkit.resources import folder


def trained(kind: str, text: str) -> Any:
    """A BPE tokenizer of 600 tokens that cuts words as GPT-2 does, or not at all, as Llama 2 does."""
    backend = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=sorted({*text, "▁"}))
    if kind == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(text[:20_000].split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
def test_pieces_give_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (folder("calibration") / "embedded-calib.txt").read_text()[:60_000]
    tokenizer = trained(kind, text)
    whole = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    monkeypatch.delattr("quantkit.calibrate.tokenizer._encode_whole")
    for piece in (7_001, 20_000):
        np.testing.assert_array_equal(encode(text, tokenizer, piece=piece), whole)


def test_pieces_that_disagree_fall_back_to_the_whole() -> None:
    class Moody:
        """Answers every text with its length: no piece can agree with another."""

        is_fast = True
        asked: list[int] = []  # noqa: RUF012

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            self.asked.append(len(text))
            places = range(len(text))
            return {"input_ids": [len(text) for _ in places], "offset_mapping": [(p, p + 1) for p in places]}

    text = "x" * 30_000
    assert encode(text, Moody(), piece=10_000).tolist() == [30_000] * 30_000  # type: ignore[arg-type]
    assert Moody.asked == [14_000, 18_000, 30_000]


def test_special_tokens_are_found_by_asking(words: Callable[..., Any]) -> None:
    assert Specials.of(words()) == Specials((), ())
    assert Specials.of(words(adds_bos=True)) == Specials((0,), ())


def test_a_saved_tokenizer_loads(tmp_path: Path, words: Callable[..., Any]) -> None:
    words(adds_bos=True).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("w0 w1")["input_ids"] == [0, 3, 4]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="cannot load"):
        load_tokenizer(tmp_path)
