"""The tokens that llama.cpp makes of texts with the vocabulary of a GGUF file, beside a tokenizer's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from quantkit.calibrate.tokenizer import Tokenizer
from quantkit.evaluate.engines import Request, ask_tokens
from quantkit.gguf.vocabulary.identity import Difference, same_ids, texts_for

_SECONDS = 120.0


def llama_differences(path: Path, tokenizer: Tokenizer) -> tuple[list[Difference] | None, str | None]:
    """(texts that llama.cpp gives other ids; None: it did not say, why it did not).

    It has a process of its own, as any engine: a file may be one that it cannot take. Where it is not
    installed there is neither.
    """
    if find_spec("llama_cpp") is None:
        return None, None
    texts = texts_for(tokenizer)
    answer, found = ask_tokens(Request("llamacpp", str(path.absolute()), (), seconds=_SECONDS, texts=texts))
    if found is None:
        return None, f"llama.cpp does not load the vocabulary of `{path.name}`: {answer.problem}"
    ids = dict(zip(texts, found, strict=True))
    return same_ids(tokenizer, ids.__getitem__), None
