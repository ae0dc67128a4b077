"""Tokens with a meaning of their own, whether they are put around a text, and chat templates."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from quantkit.calibrate.tokenizer import Specials, Tokenizer
from quantkit.errors import UnsupportedError
from quantkit.gguf.container import Value

# transformers' name → llama.cpp's; the spelling of the fifth is llama.cpp's
_NAMED = (
    ("bos", "bos"),
    ("eos", "eos"),
    ("unk", "unknown"),
    ("pad", "padding"),
    ("sep", "seperator"),
    ("cls", "cls"),
    ("mask", "mask"),
    ("prefix", "fim_pre"),
    ("suffix", "fim_suf"),
    ("middle", "fim_mid"),
)
# what ends a turn or a message goes by its text, the first that a tokenizer has
_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_role|>",
    "<EOT>",
    "<end_of_utterance>",
)
_MESSAGE = ("<|eom_id|>",)


def specials(tokenizer: Tokenizer, used: Collection[int]) -> dict[str, Value]:
    """Metadata of the special tokens among those that are `used`, by number.

    Classes of transformers name tokens that the model's own files do not have. UnsupportedError for what
    llama.cpp cannot add to a text.
    """
    around = Specials.of(tokenizer)
    numbers = {name: number for name, number in _numbers(tokenizer).items() if number in used}
    _surround(numbers, "bos", around.prefix)
    _surround(numbers, "eos", around.suffix)
    if "bos" not in numbers and "eos" not in numbers:
        raise UnsupportedError(
            "the tokenizer has no begin and no end token, and llama.cpp would take token 11 for both",
            remedy="name an eos_token in tokenizer_config.json",
        )
    numbers.setdefault("bos", numbers.get("eos", 0))
    numbers.setdefault("eos", numbers["bos"])
    found: dict[str, Value] = {f"tokenizer.ggml.{name}_token_id": n for name, n in numbers.items()}
    found["tokenizer.ggml.add_bos_token"] = bool(around.prefix)
    found["tokenizer.ggml.add_eos_token"] = bool(around.suffix)
    return {**found, **_templates(tokenizer)}


def _surround(numbers: dict[str, int], name: str, added: tuple[int, ...]) -> None:
    """llama.cpp can add one token, which is the one of that name."""
    if len(added) > 1 or (added and numbers.setdefault(name, added[0]) != added[0]):
        raise UnsupportedError(
            f"the tokenizer puts more around a text than its begin and end tokens ({list(added)}): "
            "llama.cpp cannot do that",
            remedy="set add_bos_token and add_eos_token in tokenizer_config.json as the model was trained",
        )


def _numbers(tokenizer: Any) -> dict[str, int]:
    """llama.cpp's name → number of the token."""
    known = tokenizer.get_vocab()
    given = tokenizer.init_kwargs
    found: dict[str, int] = {}
    for theirs, ours in _NAMED:
        number = getattr(tokenizer, f"{theirs}_token_id", None)  # a foreign class: most have not all
        if number is None:
            text = given.get(f"{theirs}_token")
            number = None if text is None else known.get(str(text))
        if number is not None:
            found[ours] = number
    for name, texts in (("eot", _TURN), ("eom", _MESSAGE)):
        if (number := next((known[text] for text in texts if text in known), None)) is not None:
            found[name] = number
    return found


def _templates(tokenizer: Tokenizer) -> dict[str, Value]:
    """The chat template, or several by name."""
    templates = tokenizer.chat_template
    if isinstance(templates, str):
        return {"tokenizer.chat_template": templates}
    named: dict[str, str] = {
        re.sub(r"\W", "_", name, flags=re.ASCII): text for name, text in (templates or {}).items()
    }
    default = named.pop("default", None)
    found: dict[str, Value] = {} if default is None else {"tokenizer.chat_template": default}
    if named:
        found["tokenizer.chat_templates"] = sorted(named)
    return {**found, **{f"tokenizer.chat_template.{name}": text for name, text in named.items()}}
