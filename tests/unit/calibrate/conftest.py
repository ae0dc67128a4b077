"""Tiny tokenizers, built on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </{{ m.role }}> {% endfor %}"
BOS, EOS, UNKNOWN = 0, 1, 2


@pytest.fixture
def words() -> Callable[..., Any]:
    """A tokenizer of words: ``w3`` is token 3 + 3 and so on up to w99; BOS is 0, EOS 1, other words 2."""

    def make(*, adds_bos: bool = False, eos: bool = True, chat: bool = False) -> Any:
        vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN, **{f"w{n}": n + 3 for n in range(100)}}
        vocabulary |= {"<user>": 103, "</user>": 104, "<assistant>": 105, "</assistant>": 106}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", BOS)]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="</s>" if eos else None,
            unk_token="<unk>",
            chat_template=CHATML if chat else None,
        )

    return make
